"""finetune.py: the published formats, exact answer spans, metrics by hand, runs that learn and resume."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, ends, make_documents, run

import data
import finetune
import roberta
import train

GLUE = ["cola", "sst-2", "mrpc", "sts-b", "qqp", "mnli", "qnli", "rte", "wnli"]
SETUP = train.Setup(0, 1, torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random encoder of width 32 with a tokenizer of 400 units, as a saved model."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = data.train_bpe(make_documents(100), 400)
    torch.manual_seed(0)
    shape = roberta.RobertaConfig.tiny(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, intermediate_size=64
    )
    roberta.RobertaForMaskedLM(shape).save_pretrained(directory, tokenizer)
    return directory


# ----------------------------------------------------------------------------------------------------------
# Small files in the published formats
# ----------------------------------------------------------------------------------------------------------

GOOD, BAD = "sun gold joy fine".split(), "mud rust woe dull".split()


def sentences(count: int, seed: int) -> list[tuple[str, str, int]]:
    """Pairs of texts whose label, 0 or 1, is told by the kind of words in the first."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        label = rng.randrange(2)
        words = rng.choices(GOOD if label else BAD, k=rng.randint(1, 5))
        rows.append((" ".join(words), " ".join(rng.choices(GOOD + BAD, k=3)), label))
    return rows


HEADERS = {
    "cola": None,
    "sst-2": "sentence label",
    "mrpc": "Quality #1_ID #2_ID #1_String #2_String",
    "sts-b": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "mnli": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
    "sentence2_parse sentence1 sentence2 label1 gold_label",
    "qnli": "index question sentence label",
    "rte": "index sentence1 sentence2 label",
    "wnli": "index sentence1 sentence2 label",
}


def write_glue(place: Path, task: str, counts=(64, 16, 4), quote: str = "") -> Path:
    """Writes train, dev and test files of a GLUE task as they are published; returns their directory."""
    folder = place / finetune.TASKS[task].folder
    folder.mkdir(parents=True, exist_ok=True)
    names = finetune.TASKS[task].labels or ("0.5", "4.500")
    parts = ["_matched", "_mismatched"] if task == "mnli" else [""]
    files = [("train", "", counts[0])] + [
        (s, p, n) for s, n in zip(("dev", "test"), counts[1:]) for p in parts
    ]
    for seed, (split, part, count) in enumerate(files):
        rows = []
        for i, (first, second, label) in enumerate(sentences(count, seed)):
            first, label = quote + first, names[label]
            row = {"index": i, "id": i, "#1_ID": f"{seed}{i}", "#2_ID": f"9{i}", "genre": "x"}
            row |= {"sentence": first, "sentence1": first, "question1": first, "#1_String": first}
            row |= {"sentence2": second, "question2": second, "#2_String": second, "question": first}
            row |= {"sentence": second if task == "qnli" else first}
            row |= {
                "label": label,
                "gold_label": label,
                "is_duplicate": label,
                "score": label,
                "Quality": label,
            }
            rows.append(row)
        columns = (HEADERS[task] or "").split()
        if task == "cola":
            lines = [f"gj04\t{row['label']}\t\t{row['sentence']}" for row in rows]
        if task == "cola" and split == "test":
            lines = ["index\tsentence", *(f"{row['index']}\t{row['sentence']}" for row in rows)]
        if task != "cola":
            labels = {"label", "label1", "gold_label", "is_duplicate", "score", "Quality"}
            if split == "test":
                columns = [name for name in columns if name not in labels]
                columns = columns if {"index", "id"} & set(columns) else ["index", *columns]
            lines = ["\t".join(columns).replace("_ID", " ID").replace("_String", " String")]
            lines += ["\t".join(str(row.get(name, "")) for name in columns) for row in rows]
        (folder / f"{split}{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if task == "mnli":  # GLUE's diagnostic set goes with it
        (place / "diagnostic").mkdir(exist_ok=True)
        (place / "diagnostic" / "diagnostic.tsv").write_text("index\tsentence1\tsentence2\n0\tsun\tmud\n")
    return folder


PLACES = "Rome Oslo Lima Cairo Delhi".split()


def squad_file(count: int, seed: int, version: int, padding: int = 0) -> dict:
    """Passages that say where people are; in v2.0 every other question is about somebody else."""
    rng, paragraphs = random.Random(seed), []
    for i in range(count):
        names, places = rng.sample("Ann Bob Cid Dan".split(), 2), rng.sample(PLACES, 2)
        sentences = [f"{name} is in {place} ." for name, place in zip(names, places)]
        sentences += ["The sky is grey ." for _ in range(rng.randint(0, padding))]
        rng.shuffle(sentences)
        passage = " ".join(sentences)
        asked = rng.choice(names)
        place = dict(zip(names, places))[asked]
        answers = [{"text": place, "answer_start": passage.index(place)}]
        if version == 2 and i % 2:
            asked, answers = "Zoe", []
        entry = {"id": f"q{seed}-{i}", "question": f"Where is {asked} ?", "answers": answers}
        entry |= {"is_impossible": not answers} if version == 2 else {}
        paragraphs.append({"context": passage, "qas": [entry]})
    return {"version": "v2.0" if version == 2 else "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}


def write_squad(place: Path, version: int, counts=(64, 16), padding: int = 0) -> Path:
    folder = place / "squad"
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(zip(("train", "dev"), counts)):
        content = json.dumps(squad_file(count, seed, version, padding))
        (folder / f"{split}-v{'1.1' if version == 1 else '2.0'}.json").write_text(content)
    return folder


def write_race(place: Path, counts=(16, 8, 4)) -> Path:
    """The answer to a question is the only option made of good words."""
    for seed, (split, count) in enumerate(zip(("train", "dev", "test"), counts)):
        rng = random.Random(seed)
        for part in ("middle", "high"):
            folder = place / "RACE" / split / part
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                entry = {"article": "Much is said .", "questions": [], "options": [], "answers": []}
                for question in ("Which one is _ ?", "What is right ?"):
                    right = rng.randrange(4)
                    options = [" ".join(rng.choices(GOOD if j == right else BAD, k=2)) for j in range(4)]
                    entry["questions"].append(question)
                    entry["options"].append(options)
                    entry["answers"].append("ABCD"[right])
                entry["id"] = f"{part}{i}.txt"
                (folder / f"{i}.txt").write_text(json.dumps(entry))
    return place / "RACE"


def write_all(place: Path) -> Path:
    for task in GLUE:
        write_glue(place / "glue", task)
    write_squad(place, 1)
    write_squad(place, 2)
    write_race(place)
    return place


# Settings with which a model of width 32 learns the languages above within seconds.
QUICK = {"peak_lr": 3e-3, "epochs": 4, "batch_size": 8, "patience": 0, "log_interval": 10}


def command(task, data, model, out, **changes) -> list[str]:
    arguments = ["--task", task, "--data", str(data), "--model", str(model), "--out", str(out)]
    settings = QUICK | changes
    if changes.get("sweep"):  # it has its own lists of these
        settings = {name: value for name, value in settings.items() if name not in ("batch_size", "peak_lr")}
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif isinstance(value, (list, tuple)):
            arguments += [flag, *map(str, value)]
        else:
            arguments += [flag, str(value)]
    return arguments


def start(*arguments, **changes) -> dict:
    """Runs the program in this process; returns the results.json it leaves."""
    finetune.main(command(*arguments, **changes))
    return json.loads((Path(arguments[3]) / "results.json").read_text())


def config(task: str, **changes) -> finetune.FinetuneConfig:
    return dataclasses.replace(finetune.FinetuneConfig(), task=task, **changes)


# ----------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", GLUE)
def test_glue_files_are_read_as_published_with_quotes_as_text(tmp_path, task):
    place = write_glue(tmp_path, task, quote='" ')
    examples = finetune.read_examples(task, place, "train")
    expected = sentences(64, 0)
    assert len(examples) == 64
    for i, (example, (first, second, label)) in enumerate(zip(examples, expected)):
        texts = (f'" {first}',) if task in ("cola", "sst-2") else (f'" {first}', second)
        label = [0.5, 4.5][label] if task == "sts-b" else label
        assert example == (str(i), "", texts, label)
    parts = {"mnli": ["matched", "mismatched"]}.get(task, [""])
    assert [e.part for e in finetune.read_examples(task, place, "dev")] == [
        p for p in parts for _ in range(16)
    ]
    assert {e.label for e in finetune.read_examples(task, place, "test")} == {None}


def test_a_carriage_return_a_byte_order_mark_and_unicode_line_ends_are_no_trouble(tmp_path):
    place = write_glue(tmp_path, "sst-2")
    text = "\ufeffsentence\tlabel\r\na line\u2028goes on\x85here\t1\r\n\r\n"
    (place / "train.tsv").write_bytes(text.encode())
    (example,) = finetune.read_examples("sst-2", place, "train")
    assert example.texts == ("a line\u2028goes on\x85here",) and example.label == 1


def test_mrpc_is_read_from_microsofts_files_too(tmp_path):
    folder = tmp_path / "MRPC"
    folder.mkdir()
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    rows = [f'{i % 2}\t{i}\t{i + 50}\tHe said "a{i}\tb{i}"\r\n' for i in range(6)]
    (folder / "msr_paraphrase_train.txt").write_bytes((header + "".join(rows)).encode())
    (folder / "msr_paraphrase_test.txt").write_bytes((header + "".join(rows[:2])).encode())
    assert len(finetune.read_examples("mrpc", folder, "train")) == 6
    dev = finetune.read_examples("mrpc", folder, "dev")
    assert [e.label for e in dev] == [0, 1] and dev[0].texts == ('He said "a0', 'b0"')
    (folder / "dev_ids.tsv").write_text("1\t51\n4\t54\n")
    assert [e.texts[1] for e in finetune.read_examples("mrpc", folder, "dev")] == ['b1"', 'b4"']
    assert [e.texts[1] for e in finetune.read_examples("mrpc", folder, "train")] == [
        'b0"',
        'b2"',
        'b3"',
        'b5"',
    ]


def test_the_data_folder_may_be_that_of_all_tasks_or_the_tasks_own(tmp_path):
    write_glue(tmp_path / "glue", "rte")
    place = tmp_path / "glue" / "RTE"
    for data_ in (tmp_path, tmp_path / "glue", place):
        assert finetune.find_task("rte", data_) == place
    with pytest.raises(ValueError, match="no training and dev files of cola"):
        finetune.find_task("cola", tmp_path)


def replace_line(path: Path, number: int, text: str) -> None:
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[number - 1] = text
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    "task, damage, message",
    [
        (
            "rte",
            lambda p: replace_line(p / "train.tsv", 5, "3\tonly one text"),
            "RTE/train.tsv: line 5: 2 col",
        ),
        (
            "rte",
            lambda p: replace_line(p / "dev.tsv", 3, "1\ta\tb\tmaybe"),
            "line 3: label 'maybe' is none of rte's",
        ),
        ("cola", lambda p: replace_line(p / "train.tsv", 2, "x\t2\t\tText."), "line 2: label '2' is none of"),
        (
            "sts-b",
            lambda p: replace_line(p / "dev.tsv", 2, "\t" * 9 + "7.5"),
            "line 2: score 7.5 is not betw",
        ),
        (
            "sts-b",
            lambda p: replace_line(p / "dev.tsv", 2, "\t" * 9 + "high"),
            "line 2: could not convert str",
        ),
        ("sst-2", lambda p: (p / "train.tsv").write_text(""), "SST-2/train.tsv: line 1: no column label"),
        ("cola", lambda p: (p / "dev.tsv").write_text(""), "CoLA/dev.tsv: no example in it"),
        ("qnli", lambda p: (p / "dev.tsv").write_text("index\tquestion\tsentence\tlabel\n"), "no example in"),
        (
            "sst-2",
            lambda p: (
                write_glue(p.parent, "rte").rename(p.parent / "S")
                and (p / "train.tsv").write_text((p.parent / "S" / "train.tsv").read_text())
            ),
            "line 1: no column sentence, only 'index, sentence1",
        ),
        (
            "sst-2",
            lambda p: (p / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n"),
            "not UTF-8 at byte 15",
        ),
        ("mrpc", lambda p: (p / "train.tsv").unlink(), "no training and dev files of mrpc"),
    ],
)
def test_bad_glue_files_are_one_line_that_names_file_and_row(tmp_path, model, capsys, task, damage, message):
    damage(write_glue(tmp_path, task))
    with pytest.raises(SystemExit) as stopped:
        start(task, tmp_path, model, tmp_path / "run")
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1, printed


def edit_json(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda c: c.pop("data"), 'not a SQuAD file, which is an object with a list "data"'),
        (lambda c: c["data"][0].pop("paragraphs"), "article 0: paragraphs with context and qas expected"),
        (
            lambda c: c["data"][0]["paragraphs"][1]["qas"][0].pop("answers"),
            "question q0-1: KeyError 'answers'",
        ),
        (lambda c: c["data"][0]["paragraphs"][1]["qas"][0].update(answers=[]), "--task squad2?"),
        (
            lambda c: c["data"][0]["paragraphs"][1].update(context=None),
            "question q0-1: context, id and quest",
        ),
        (
            lambda c: c["data"][0]["paragraphs"][1].update(context="\ud800"),
            "question q0-1: 'utf-8' codec can't",
        ),
        (
            lambda c: c["data"][0]["paragraphs"][1]["qas"][0].update(id="q0-0"),
            "two questions have the id q0-0",
        ),
        (lambda c: c["data"].clear(), "no example in it"),
        (lambda c: c["data"][0]["paragraphs"][1]["qas"].append(["x"]), "question ['x']: TypeError"),
        (lambda c: c["data"][0]["paragraphs"][1]["qas"][0]["answers"][0].update(answer_start=1.5), "integer"),
    ],
)
def test_bad_squad_files_are_one_line_that_names_file_and_question(tmp_path, model, capsys, edit, message):
    edit_json(write_squad(tmp_path, 1) / "train-v1.1.json", edit)
    with pytest.raises(SystemExit) as stopped:
        start("squad1", tmp_path, model, tmp_path / "run")
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.count("\n") == 1
    assert "train-v1.1.json: " in printed and message in printed, printed


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda c: c["options"][1].pop(), "question 1 has 3 options and answer"),
        (lambda c: c["answers"].pop(), "2 questions, 2 options, 1 answers"),
        (lambda c: c.update(answers=["E", "A"]), "question 0 has 4 options and answer 'E'"),
        (lambda c: c.pop("answers"), "no answers"),
        (lambda c: c.pop("article"), "KeyError 'article'"),
    ],
)
def test_bad_race_files_are_one_line_that_names_the_file(tmp_path, model, capsys, edit, message):
    edit_json(write_race(tmp_path) / "train" / "high" / "3.txt", edit)
    with pytest.raises(SystemExit) as stopped:
        start("race", tmp_path, model, tmp_path / "run")
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.count("\n") == 1
    assert "train/high: 3.txt: " in printed and message in printed, printed


def test_malformed_rows_can_be_left_out_and_are_counted(tmp_path, model, capsys):
    place = write_glue(tmp_path, "qqp")
    replace_line(place / "train.tsv", 5, "broken")
    replace_line(place / "train.tsv", 9, "broken\ttoo")
    start("qqp", tmp_path, model, tmp_path / "run", epochs=1, skip_bad_rows=True)
    assert "left out 2 malformed rows, the first: " in (printed := capsys.readouterr().out)
    assert "train.tsv: line 5: 1 columns" in printed and "qqp train: 62 examples" in printed


def test_a_command_without_data_or_model_says_what_is_missing(tmp_path, model, capsys):
    for arguments, message in (
        ([], "--data is missing"),
        (["--data", str(tmp_path)], "--model is missing"),
        (["--data", str(tmp_path), "--model", str(tmp_path)], "none of the tasks"),
        (["--data", str(tmp_path / "no"), "--model", str(model), "--task", "rte"], "no such directory"),
        (["--data", "x", "--model", str(model), "--epochs", "0"], "--epochs 0 must be at least 1"),
        (["--data", "x", "--model", str(model), "--peak-lr", "nan"], "--peak-lr nan must be from"),
    ):
        with pytest.raises(SystemExit) as stopped:
            finetune.main(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    write_glue(tmp_path, "rte")
    for changes, message in (
        ({"model": tmp_path}, "not a model"),
        ({"model": model, "seq_len": 500}, "--seq-len 500 is more than the 128 tokens"),
        ({"model": model, "ranking": True}, "--ranking is for qnli and wnli, not for rte"),
    ):
        with pytest.raises(SystemExit) as stopped:
            start("rte", tmp_path, changes.pop("model"), tmp_path / "run", **changes)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# Inputs
# ----------------------------------------------------------------------------------------------------------


def test_the_longer_text_is_cut_token_by_token():
    def by_hand(first, second, seq_len):
        first, second = list(first), list(second)
        while len(first) + len(second) + 4 > seq_len:
            (first if len(first) > len(second) else second).pop()
        return [0, *first, 2, 2, *second, 2]

    for a in range(0, 12):
        for b in range(0, 12):
            for seq_len in (16, 17, 18, 30):
                first, second = np.arange(10, 10 + a), np.arange(50, 50 + b)
                assert finetune.join(first, second, seq_len).tolist() == by_hand(first, second, seq_len)
    assert finetune.join(np.arange(10, 30), None, 16).tolist() == [0, *range(10, 24), 2]


TEXTS = [
    "Denver's 1-0 win (in 2016).",
    "  two  spaces\n\nand a line ",
    "naïve café – “quoted” Łódź",
    "日本語のテキスト、東京。",
    "a 🙂🙂‍👩‍👩 emoji 🏳️‍🌈 b",
    "\u00a0nbsp\u3000wide",
    "x",
]


def test_offsets_lead_from_every_token_to_its_characters(prepared):
    tokenizer = data.Tokenizer.from_pretrained(prepared)
    for text in TEXTS:
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids.tolist() == tokenizer.encode(text)
        assert offsets[0, 0] == 0 and offsets[-1, 1] == len(text)
        for token, (begin, end) in zip(ids, offsets):
            assert tokenizer.id_to_bytes[token] in text[begin:end].encode()
    assert tokenizer.encode_with_offsets("")[1].shape == (0, 2)


def test_every_answer_at_token_borders_goes_to_tokens_and_back_unchanged(prepared):
    """Words between spaces are made of whole tokens, so any run of words must come back as it is."""
    tokenizer = data.Tokenizer.from_pretrained(prepared)
    for text in TEXTS:
        _, offsets = tokenizer.encode_with_offsets(text)
        words = list(finetune.re.finditer(r"\S+", text))
        for i, first in enumerate(words):
            for last in words[i:]:
                answer = text[first.start() : last.end()]
                span = finetune.tokens_of_answer(offsets, first.start(), last.end())
                assert finetune.answer_text(text, offsets, *span) == answer


def test_an_answer_inside_a_token_gives_the_smallest_span_around_it(prepared):
    tokenizer = data.Tokenizer.from_pretrained(prepared)
    text = "ab 🙂 cd"
    _, offsets = tokenizer.encode_with_offsets(text)
    first, last = finetune.tokens_of_answer(offsets, 3, 4)  # the emoji is several tokens, each all of it
    assert finetune.answer_text(text, offsets, first, last) == "🙂" and last > first


def spans_of(model, texts, answers, seq_len, **changes):
    """Returns the head, the examples and the windows of one question on a passage."""
    tokenizer = data.Tokenizer.from_pretrained(model)
    examples = [finetune.Example("q", "", texts, answers)]
    head = finetune.Spans(config("squad2", **changes))
    return head, examples, head.encode(examples, tokenizer, seq_len), tokenizer


def test_windows_cover_the_passage_overlap_and_know_where_the_answer_is(model):
    passage = " ".join(f"word{i}" for i in range(60)) + " café 🙂 end."
    begin = passage.index("café 🙂")
    _, _, features, tokenizer = spans_of(model, ("What ?", passage), ((begin, "café 🙂"),), 40)
    ids, offsets = tokenizer.encode_with_offsets(passage)
    seen = np.zeros(len(ids), dtype=int)
    for i in range(len(features.bounds) - 1):
        window = features.ids[features.bounds[i] : features.bounds[i + 1]]
        spans = features.offsets[features.bounds[i] : features.bounds[i + 1]]
        at, to = features.passage[i]
        assert (
            len(window) <= 40 and window[0] == 0 and list(window[at - 2 : at]) == [2, 2] and window[-1] == 2
        )
        first = int(np.flatnonzero((offsets == spans[at]).all(1))[0])
        matches = [
            k for k in range(len(ids) - (to - at) + 1) if (offsets[k : k + to - at] == spans[at:to]).all()
        ]
        assert matches and (ids[matches[0] : matches[0] + to - at] == window[at:to]).all() and first >= 0
        seen[matches[0] : matches[0] + to - at] += 1
        start_, end_, held = features.targets[i].astype(int)
        if held:
            assert finetune.answer_text(passage, spans, start_, end_) == "café 🙂"
        else:
            assert start_ == end_ == 0
    assert seen.min() >= 1 and (seen[20:-20] >= 2).all() and features.targets[:, 2].sum() >= 1


def test_answers_that_do_not_match_are_counted_and_named(model):
    units = data.Tokenizer.from_pretrained(model).id_to_bytes
    word = next(unit.decode() for unit in units if unit[:1] == b" " and len(unit) >= 4 and unit[1:].isalpha())
    passage = f"Ann is in Rome .{word} ."
    part = word[2:]  # without the space and the first letter
    answers = ((3, "Rome"), (-6 - len(word), "Rome"), (10, "Rome"), (passage.rindex(part), part))
    *_, features, _ = spans_of(model, ("Where ?", passage), answers, 64)
    summary, *named = str(features.notes).split("\n")
    assert (
        "of 4 gold answers 2 are not at their offset and left out, 1 begin or end inside a token" in summary
    )
    assert named == [*["not at its offset: 'Rome' in q"] * 2, f"begins or ends inside a token: {part!r} in q"]
    start_, end_, held = features.targets[0].astype(int)
    assert held and finetune.answer_text(passage, features.offsets, start_, end_) == "Rome"


def test_the_best_span_is_the_best_of_all_windows_and_no_longer_than_allowed(model):
    passage = " ".join(f"w{i}" for i in range(40))
    head, examples, features, _ = spans_of(model, ("?", passage), ((0, "w0"),), 32, max_answer_tokens=3)
    rng = np.random.default_rng(0)
    windows, width = len(features.bounds) - 1, int(features.lengths.max())
    scores = rng.normal(size=(windows, 2 * width + 1))
    place = np.arange(width)
    outside = (place < features.passage[:, :1]) | (place >= features.passage[:, 1:])
    outside[:, 0] = False
    scores[:, :-1][np.concatenate([outside, outside], axis=1)] = -np.inf
    scores[:, -1] = 5.0  # answerable
    probabilities = head.probabilities(scores, features)
    best, expected = -1.0, ""
    for i in range(windows):
        spans = features.offsets[features.bounds[i] : features.bounds[i + 1]]
        for a in range(*features.passage[i]):
            for b in range(a, min(a + 3, features.passage[i][1])):
                value = probabilities[i, a] * probabilities[i, width + b]
                if value > best:
                    best, expected = value, passage[spans[a][0] : spans[b][1]].strip()
    ((answer, none),) = head.predictions(probabilities, features, examples)
    assert answer == expected and none == pytest.approx(1 / (1 + np.exp(5)))
    assert head.answers([(answer, none)], examples) == {"q": expected}
    scores[:, -1] = -1.0
    predictions = head.predictions(head.probabilities(scores, features), features, examples)
    assert predictions[0][0] == expected and head.answers(predictions, examples) == {"q": ""}


def test_race_inputs_are_question_and_answer_then_the_passage(model):
    tokenizer = data.Tokenizer.from_pretrained(model)
    options = ("red", "green " * 200, "blue", "grey")
    examples = [finetune.Example("a-0", "high", ("The passage. " * 60, "It is _ .", *options), 2)]
    features = finetune.MultipleChoice(config("race")).encode(examples, tokenizer, 200)
    rows = [features.ids[a:b].tolist() for a, b in zip(features.bounds, features.bounds[1:])]
    first, passage = tokenizer.encode("It is red ."), tokenizer.encode(("The passage. " * 60).strip())
    assert rows[0] == [0, *first, 2, 2, *passage[: 200 - 4 - len(first)], 2]
    long = tokenizer.encode("It is " + " ".join(["green"] * 200) + " .")
    assert rows[1] == [0, *long[:128], 2, 2, *passage[: 200 - 4 - 128], 2]
    assert features.targets[:, 0].tolist() == [0, 0, 1, 0] and features.group.tolist() == [0] * 4


# ----------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------


def some_features(count: int, seed: int = 0) -> finetune.Features:
    rng = np.random.default_rng(seed)
    inputs = [rng.integers(4, 90, rng.integers(3, 40)) for _ in range(count)]
    place = np.arange(count)
    return finetune.Features.of(inputs, example=place, group=place, targets=place, labelled=True, notes="")


@pytest.mark.parametrize("count, batch_size", [(1000, 16), (37, 8), (5, 8), (1, 4)])
def test_every_example_is_seen_once_an_epoch_by_one_rank(count, batch_size):
    features = some_features(count)
    alone = finetune.LengthBuckets(features, batch_size, batch_size, seed=3)
    ranks = [finetune.LengthBuckets(features, batch_size, 2, 3, rank, 2) for rank in range(2)]
    orders = []
    for epoch in range(2):
        seen = []
        for n in range(epoch * alone.steps_per_epoch, (epoch + 1) * alone.steps_per_epoch):
            step = alone.step(n)
            (batch,) = step.batches
            assert step.num_groups == len(batch.inputs) <= batch_size
            assert batch.input_ids.shape[1] == batch.attention_mask.sum(1).max()
            parts = [b for r in ranks for b in r.step(n).batches]
            together = [i for b in parts if b.weight for i in b.inputs]
            assert (
                sorted(together) == sorted(batch.inputs) and len(ranks[0].step(n).batches) == batch_size // 4
            )
            seen += batch.inputs.tolist()
        assert sorted(seen) == list(range(count))
        orders.append(seen)
    assert count <= batch_size or orders[0] != orders[1]


def test_length_buckets_pad_far_less_than_a_plain_shuffle():
    features = some_features(3000)
    buckets = finetune.LengthBuckets(features, 16, 16, seed=0)
    shapes = [buckets.step(n).batches[0] for n in range(buckets.steps_per_epoch)]
    padded = sum(b.input_ids.size for b in shapes) / sum(b.num_tokens for b in shapes)
    order = np.random.default_rng(0).permutation(3000)
    plain = sum(features.lengths[part].max() * len(part) for part in np.array_split(order, 188))
    assert padded < 1.05 < 1.5 < plain / features.lengths.sum()
    lengths = [b.input_ids.shape[1] for b in shapes]
    assert abs(np.corrcoef(lengths, np.arange(len(lengths)))[0, 1]) < 0.2  # batches are shuffled again


# ----------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------


def classes(seed, count, high=2):
    rng = np.random.default_rng(seed)
    return rng.integers(0, high, count), rng.integers(0, high, count)


@pytest.mark.filterwarnings("ignore")
def test_metrics_equal_scikit_learns_and_scipys(oracle):
    sklearn, stats = oracle("sklearn.metrics"), oracle("scipy.stats")
    cases = [classes(seed, 3 + 40 * seed) for seed in range(20)]
    ones, zeros = np.ones(9, dtype=int), np.zeros(9, dtype=int)
    cases += [(ones, ones), (zeros, zeros), (ones, zeros), (zeros, ones), (ones, np.arange(9) % 2)]
    cases += [(np.arange(9) % 2, ones), (np.array([1]), np.array([0]))]
    for a, b in cases:
        assert finetune.accuracy(a, b) == pytest.approx(sklearn.accuracy_score(a, b), abs=1e-9)
        assert finetune.f1_score(a, b) == pytest.approx(sklearn.f1_score(a, b), abs=1e-9)
        assert finetune.matthews_correlation(a, b) == pytest.approx(sklearn.matthews_corrcoef(a, b), abs=1e-9)
    for a, b in [classes(seed, 60, high=4) for seed in range(9)]:
        assert finetune.matthews_correlation(a, b) == pytest.approx(sklearn.matthews_corrcoef(a, b), abs=1e-9)
    rng = np.random.default_rng(0)
    values = [(rng.normal(size=n), rng.normal(size=n)) for n in (2, 3, 50, 999)]
    values += [(np.round(a), np.round(b)) for a, b in values]  # ties
    values += [(rng.normal(size=30) * 1e-9 + 5, rng.normal(size=30)), (np.arange(5.0), -np.arange(5.0))]
    values += [(np.ones(7), rng.normal(size=7)), (rng.normal(size=7), np.zeros(7)), (np.ones(4), np.ones(4))]
    values += [(np.array([1, np.nan, 2, 3]), np.arange(4.0))]
    for a, b in values:
        assert finetune.pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0], abs=1e-9, nan_ok=True)
        assert finetune.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0], abs=1e-9, nan_ok=True)


def test_squad_v1_by_hand():
    golds = {
        "articles": ["the Denver Broncos", "Broncos"],
        "punctuation": ["1,000 U.S. dollars!"],
        "partial": ["in the year 1999"],
        "repeated": ["to be or not to be"],
        "missing": ["x"],
        "empty": ["The"],
    }
    predictions = {
        "articles": "Broncos, the",  # normalised "broncos": exact with the second gold answer
        "punctuation": "1000 US dollars",  # exact
        "partial": "1999",  # precision 1, recall 1/3 ("in year 1999"): F1 1/2
        "repeated": "to be be be",  # common: to, be, be: precision 3/4, recall 3/6: F1 0.6
        "empty": "a",  # both nothing but articles: equal, yet without a common word
    }
    metrics = finetune.squad1_metrics(golds, predictions)
    assert metrics["exact_match"] == pytest.approx(100 * 3 / 6)
    assert metrics["f1"] == pytest.approx(100 * (1 + 1 + 0.5 + 0.6) / 6)


def test_squad_v2_and_its_thresholds_by_hand():
    golds = {"a": ["Rome"], "b": ["the big city"], "c": [], "d": [], "e": ["Oslo"], "f": ["!"]}
    predictions = {"a": "Rome", "b": "city", "c": "", "d": "Lima", "e": "", "f": ""}
    # exact: a 1, b 0, c 1, d 0, e 0, f 1 (its gold answer is nothing but punctuation); F1: b 2/3
    na_probs = {"a": 0.1, "b": 0.3, "c": 0.9, "d": 0.2, "e": 0.8, "f": 0.4}
    metrics = finetune.squad2_metrics(golds, predictions, na_probs)
    expected = {
        "exact": 100 * 3 / 6, "f1": 100 * (3 + 2 / 3) / 6, "total": 6,
        "HasAns_exact": 100 * 2 / 4, "HasAns_f1": 100 * (2 + 2 / 3) / 4, "HasAns_total": 4,
        "NoAns_exact": 50, "NoAns_f1": 50, "NoAns_total": 2,
        # Begin with c and d right: 2. a at 0.1: 3. d at 0.2 costs one: 2. b at 0.3: 2 (F1 2.67).
        # f at 0.4: 3 (F1 3.67). e: no gain. c: an empty prediction costs nothing.
        "best_exact": 100 * 3 / 6, "best_exact_thresh": 0.1,
        "best_f1": 100 * (3 + 2 / 3) / 6, "best_f1_thresh": 0.4,
    }  # fmt: skip
    assert metrics == pytest.approx(expected)
    nothing = finetune.squad2_metrics({"c": [], "d": []}, {"c": "", "d": "x"}, {"c": 1.0, "d": 0.0})
    assert nothing["best_exact"] == 100 and nothing["best_exact_thresh"] == 0.0 and "HasAns_f1" not in nothing


def test_best_thresholds_equal_trying_every_threshold():
    """The script's rule by brute force: up to a threshold a prediction stands, above it is no answer."""
    rng = random.Random(0)

    def text():
        return " ".join(rng.choices(["the Rome", "rome", "a city.", "big", "Oslo!"], k=rng.randint(1, 3)))

    golds = {str(i): [text() for _ in range(rng.randint(0, 3))] for i in range(200)}
    predictions = {id: rng.choice([text(), ""]) for id in golds}
    na_probs = {id: rng.random() for id in golds}
    ours = finetune.squad2_metrics(golds, predictions, na_probs)
    for name in ("exact", "f1"):
        tried = {}
        for threshold in [0.0, *na_probs.values()]:
            stand = {id: p if na_probs[id] <= threshold else "" for id, p in predictions.items()}
            tried[threshold] = finetune.squad2_metrics(golds, stand)[name]
        assert ours[f"best_{name}"] == pytest.approx(max(tried.values()))
        assert tried[ours[f"best_{name}_thresh"]] == pytest.approx(max(tried.values()))


# ----------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------


def test_choice_and_margin_losses_by_hand():
    scores = torch.tensor([1.0, 0.0, 2.0, 0.5])
    group, right = torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, False, True])
    softmax = -np.log(np.e / (np.e + 1)) - np.log(np.exp(0.5) / (np.exp(2) + np.exp(0.5)))
    assert finetune.choice_loss(scores, group, right).item() == pytest.approx(softmax, abs=1e-6)
    assert finetune.margin_loss(scores, group, right).item() == pytest.approx(0 + (1 - 0.5 + 2))


def test_ranking_groups_rows_and_takes_the_best_of_each(model):
    tokenizer = data.Tokenizer.from_pretrained(model)
    rows = [("q1", "a", 0), ("q2", "b", 1), ("q1", "c", 1), ("q3", "d", 0)]
    examples = [finetune.Example(str(i), "", (q, s), label) for i, (q, s, label) in enumerate(rows)]
    head = finetune.Ranking(config("qnli", ranking=True))
    features = head.encode(examples, tokenizer, 32)
    assert features.example.tolist() == [0, 2, 1, 3] and features.group.tolist() == [0, 0, 1, 2]
    assert features.targets[:, 0].tolist() == [1, 0, 0, 1]  # QNLI's label 0 is entailment
    scores = np.array([[-2.0], [-1.0], [-0.5], [0.5]])
    shares = head.probabilities(scores, features)[:, 0]
    e = np.exp
    assert shares == pytest.approx([e(-2) / (e(-2) + e(-1) + 1), e(-1) / (e(-2) + e(-1) + 1),
                                    e(-0.5) / (e(-0.5) + 1), e(0.5) / (e(0.5) + 1)])  # fmt: skip
    # Of q1's rows the second wins though no score is positive; q2's and q3's stand alone.
    assert head.predictions(shares[:, None], features, examples) == [1, 1, 0, 0]
    batch = finetune.collate(features, features.group_begins, np.arange(3))
    loss = head.loss(torch.tensor(scores, dtype=torch.float32), batch).item()
    assert loss == pytest.approx(-np.log(shares[0]) - np.log(1 - shares[2]) - np.log(shares[3]), abs=1e-5)


def test_span_loss_is_cross_entropy_over_the_passage_plus_the_answerability(model):
    passage = "Ann is in Rome ."
    head, _, features, _ = spans_of(model, ("Where ?", passage), ((10, "Rome"),), 64)
    batch = finetune.collate(features, features.group_begins, np.array([0]))
    length = batch.input_ids.shape[1]
    logits = torch.randn(2, length)
    model_ = lambda ids, mask: (logits[:1], logits[1:], torch.tensor([0.3]))  # noqa: E731
    scores = head.forward(model_, batch, torch.device("cpu"))
    at, to = features.passage[0]
    places = [0, *range(at, to)]
    start_, end_, _ = batch.targets[0].astype(int)
    expected = -logits[0][places].log_softmax(0)[places.index(start_)] / 2
    expected = expected - logits[1][places].log_softmax(0)[places.index(end_)] / 2
    expected = expected - torch.tensor(0.3).sigmoid().log()
    assert head.loss(scores, batch).item() == pytest.approx(expected.item(), abs=1e-5)


# ----------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, least", [("sst-2", 0.95), ("rte", 0.95), ("mnli", 0.95), ("sts-b", 0.9)])
def test_a_glue_task_is_learned(tmp_path, model, task, least):
    write_glue(tmp_path, task, (200, 40, 6))
    results = start(task, tmp_path, model, tmp_path / "run", predict=True)
    metric = next(iter(finetune.TASKS[task].paper))
    assert results["metrics"][metric] > least
    assert results["task"] == task and results["seed"] == 0 and results["peak_lr"] == 3e-3
    name = {"mnli": "MNLI-mm"}.get(task, finetune.TASKS[task].folder)
    lines = (tmp_path / "run" / f"{name}.tsv").read_text().split("\n")
    assert lines[0] == "index\tprediction" and lines[-1] == "" and len(lines) == 8
    assert [line.split("\t")[0] for line in lines[1:-1]] == [str(i) for i in range(6)]
    predicted = [line.split("\t")[1] for line in lines[1:-1]]
    truth = [label for _, _, label in sentences(6, {"mnli": 4}.get(task, 2))]
    if task == "sts-b":
        assert all(0 <= float(value) <= 5 for value in predicted)
        assert np.corrcoef([float(value) for value in predicted], truth)[0, 1] > 0.8
    else:
        assert predicted == [finetune.TASKS[task].labels[label] for label in truth]
        saved = roberta.RobertaForSequenceClassification.from_pretrained(tmp_path / "run")
        assert tuple(saved.config.id2label.values()) == finetune.TASKS[task].labels


@pytest.mark.parametrize("version", [1, 2])
def test_squad_is_learned_and_its_files_satisfy_a_strict_reader(tmp_path, model, version):
    write_squad(tmp_path, version, (200, 40), padding=6)
    task = f"squad{version}"
    results = start(task, tmp_path, model, tmp_path / "run", epochs=5, seq_len=48, predict=True, peak_lr=4e-3)
    log = [line["loss"] for line in train.read_log(tmp_path / "run") if "loss" in line]
    f1 = results["metrics"]["f1" if version == 1 else "best_f1"]  # short windows make the classifier shy
    assert log[-1] < log[0] / 2 and f1 > results["majority"]["f1"] + 10
    content = squad_file(40, 1, version, 6)
    passages = {q["id"]: p["context"] for p in content["data"][0]["paragraphs"] for q in p["qas"]}
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text(encoding="utf-8"))
    assert predictions.keys() == passages.keys()
    assert all(isinstance(p, str) and p in passages[id] for id, p in predictions.items())
    golds = {
        q["id"]: [a["text"] for a in q["answers"]] for p in content["data"][0]["paragraphs"] for q in p["qas"]
    }
    if version == 2:
        none = json.loads((tmp_path / "run" / "na_prob.json").read_text())
        assert none.keys() == passages.keys() and all(0 <= p <= 1 for p in none.values())
        assert all((predictions[id] == "") == (none[id] > 0.5) for id in none)
        spans = json.loads((tmp_path / "run" / "spans.json").read_text(encoding="utf-8"))
        assert all(spans[id] in passages[id] and predictions[id] in (spans[id], "") for id in spans)
        printed = finetune.squad2_metrics(golds, spans, none) | finetune.squad2_metrics(golds, predictions)
        assert printed == pytest.approx(results["metrics"])
    else:
        assert finetune.squad1_metrics(golds, predictions) == pytest.approx(results["metrics"])


def test_race_is_learned_and_its_answers_written(tmp_path, model):
    write_race(tmp_path, (60, 10, 3))
    results = start("race", tmp_path, model, tmp_path / "run", predict=True)
    assert results["metrics"]["accuracy"] > 0.9
    assert results["metrics"].keys() == {"accuracy", "accuracy_middle", "accuracy_high"}
    answers = json.loads((tmp_path / "run" / "RACE.json").read_text())
    truth = {}
    for file in sorted((tmp_path / "RACE" / "test").glob("*/*.txt")):
        entry = json.loads(file.read_text())
        truth[entry["id"]] = entry["answers"]
    assert answers == truth


def test_ranking_runs_and_learns(tmp_path, model):
    write_glue(tmp_path, "qnli", (200, 40, 6))
    results = start("qnli", tmp_path, model, tmp_path / "run", ranking=True, predict=True)
    assert (
        results["metrics"]["accuracy"] > 0.8
    )  # rows that happen to share their text are all right or all wrong
    lines = (tmp_path / "run" / "QNLI.tsv").read_text().splitlines()[1:]
    assert {line.split("\t")[1] for line in lines} <= {"entailment", "not_entailment"}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "checkpoint" / "pytorch_model.bin", weights_only=True)


def same_weights(a: Path, b: Path, tolerance: float = 0.0) -> bool:
    """RACE's bias is left out: it is in all four scores, so its gradient is nothing but rounding."""
    a, b = weights(a), weights(b)
    return all(
        (a[key] - b[key]).abs().max() <= tolerance for key in a if tolerance == 0 or key != "classifier.bias"
    )


def without_time(path: Path) -> dict:
    results = json.loads((path / "results.json").read_text())
    results.pop("run", None)
    return {key: value for key, value in results.items() if key != "seconds"}


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1, "precision": "bf16"}, {"precision": "fp16"}])
def test_resuming_is_exact_to_the_bit(tmp_path, model, monkeypatch, changes):
    write_glue(tmp_path, "sst-2", (100, 20, 4))
    arguments = ("sst-2", tmp_path, model)
    start(*arguments, tmp_path / "straight", **changes)
    original = train.Run.train_step

    def train_step(self, step):
        original(self, step)
        if self.step in (3, 13, 26, 51):  # 26 is the end of an epoch
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.Run, "train_step", train_step)
    for _ in range(4):
        with pytest.raises(SystemExit) as stopped:
            start(*arguments, tmp_path / "resumed", **changes)
        assert stopped.value.code == 128 + signal.SIGTERM
    start(*arguments, tmp_path / "resumed", **changes)
    assert without_time(tmp_path / "straight") == without_time(tmp_path / "resumed")
    assert same_weights(tmp_path / "straight", tmp_path / "resumed")
    logs = [[line.get("loss", line.get("accuracy")) for line in train.read_log(tmp_path / name)]
            for name in ("straight", "resumed")]  # fmt: skip
    assert logs[0] == logs[1]


def test_a_finished_run_keeps_its_best_model_only_and_is_not_repeated(tmp_path, model, capsys):
    write_glue(tmp_path, "sst-2", (100, 20, 4))
    out = tmp_path / "run"
    results = start("sst-2", tmp_path, model, out, keep=3)
    assert len(list(out.glob("checkpoint-*"))) == 1 and not list(out.glob("*/training.pt"))
    lines = [line for line in train.read_log(out) if "accuracy" in line]
    best = max(line["accuracy"] for line in lines)
    first = next(line for line in lines if line["accuracy"] == best)
    assert results["metrics"]["accuracy"] == best
    assert (out / "checkpoint").resolve().name == f"checkpoint-{first['step']}"
    saved = roberta.RobertaForSequenceClassification.from_pretrained(out)
    head, tokenizer = finetune.Classification(config("sst-2")), data.Tokenizer.from_pretrained(out)
    examples = finetune.read_examples("sst-2", tmp_path / "SST-2", "dev")
    probabilities, loss = finetune.predict(saved, head, head.encode(examples, tokenizer, 128), SETUP)
    assert head.metrics(probabilities.argmax(1).tolist(), examples)["accuracy"] == best
    assert loss == pytest.approx(results["eval_loss"], rel=1e-5)
    capsys.readouterr()
    before = (out / "results.json").stat().st_mtime_ns
    start("sst-2", tmp_path, model, out, keep=3)
    assert "is finished" in capsys.readouterr().out
    assert (out / "results.json").stat().st_mtime_ns == before
    whole = (out / "results.json").read_text()
    for damaged in ("{}", whole[:40]):
        (out / "results.json").write_text(damaged)
        errors = ends(finetune.main, command("sst-2", tmp_path, model, out, keep=3), 2, capsys)
        assert "results.json: damaged" in errors and f"delete {out}" in errors and errors.count("\n") == 1
    (out / "results.json").write_text(whole)
    with pytest.raises(SystemExit):
        start("sst-2", tmp_path, model, out, peak_lr=1e-3)
    assert "holds a run with peak_lr 0.003, this one has 0.001" in capsys.readouterr().err
    write_glue(tmp_path, "sst-2", (90, 20, 4))
    with pytest.raises(SystemExit):
        start("sst-2", tmp_path, model, out)
    assert "holds a run with training examples" in capsys.readouterr().err


@pytest.mark.parametrize("last", [False, True])
def test_a_run_that_lost_its_best_checkpoint_keeps_the_best_of_the_others(tmp_path, model, monkeypatch, last):
    write_glue(tmp_path, "sst-2", (100, 20, 4))
    stop, original = (52 if last else 45), train.Run.train_step  # 13 steps an epoch, 4 epochs

    def train_step(self, step):
        original(self, step)
        if self.step == stop:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.Run, "train_step", train_step)
    monkeypatch.setattr(finetune.Finetuning, "finish", lambda self: sys.exit(1))
    with pytest.raises(SystemExit):
        start("sst-2", tmp_path, model, tmp_path / "run")
    saved = torch.load(tmp_path / "run" / f"checkpoint-{stop}" / "training.pt", weights_only=True)["state"]
    best = tmp_path / "run" / f"checkpoint-{saved['best_step']}"
    assert 0 < saved["best_step"] < stop
    shutil.rmtree(best)
    monkeypatch.undo()
    results = start("sst-2", tmp_path, model, tmp_path / "run")
    assert results["best_epoch"] == 4 and (tmp_path / "run" / "checkpoint").resolve().name == "checkpoint-52"
    assert results["metrics"]["accuracy"] == train.read_log(tmp_path / "run")[-1]["accuracy"]


def test_patience_ends_a_run_that_no_longer_improves(tmp_path, model):
    write_glue(tmp_path, "sst-2", (100, 20, 4))
    results = start("sst-2", tmp_path, model, tmp_path / "run", epochs=30, patience=2)
    evaluations = [line["accuracy"] for line in train.read_log(tmp_path / "run") if "accuracy" in line]
    best = evaluations.index(max(evaluations))
    assert len(evaluations) == best + 1 + 2 < 30 and results["best_epoch"] == best + 1


def test_micro_batches_change_nothing_but_rounding(tmp_path, model):
    write_race(tmp_path)
    write_glue(tmp_path, "cola")
    for task in ("cola", "race"):
        for micro in (8, 2):
            start(task, tmp_path, model, tmp_path / f"{task}{micro}", micro_batch_size=micro, epochs=2)
        assert same_weights(tmp_path / f"{task}8", tmp_path / f"{task}2", 1e-5)


def test_two_ranks_equal_one_process(tmp_path, model):
    write_squad(tmp_path, 2, (61, 17))  # the last micro-batches are without an example for one of the ranks
    changes = {"epochs": 2, "micro_batch_size": 2, "peak_lr": 1e-3}
    alone = start("squad2", tmp_path, model, tmp_path / "1", **changes)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    arguments = command("squad2", tmp_path, model, tmp_path / "2", **changes)
    result = run(*launcher, ROOT / "finetune.py", *arguments, "--predict")
    assert result.returncode == 0, result.stderr
    together = json.loads((tmp_path / "2" / "results.json").read_text())
    assert together["metrics"] == pytest.approx(alone["metrics"], abs=1e-4)
    assert same_weights(tmp_path / "1", tmp_path / "2", 1e-4)
    assert (tmp_path / "2" / "na_prob.json").exists()


# ----------------------------------------------------------------------------------------------------------
# Starting points
# ----------------------------------------------------------------------------------------------------------


def built(task: str, model, **changes) -> roberta.RobertaModelBase:
    settings = config(task, model=str(model), **changes)
    return finetune.build_model(settings, finetune.head_of(settings), SETUP)


def test_heads_are_kept_for_the_same_labels_and_fresh_for_others(tmp_path, model):
    write_glue(tmp_path, "mnli")
    start("mnli", tmp_path, model, tmp_path / "mnli", epochs=1)
    mnli = roberta.RobertaForSequenceClassification.from_pretrained(tmp_path / "mnli")
    again, rte, race = (built(task, tmp_path / "mnli") for task in ("mnli", "rte", "race"))
    for other in (again, rte, race):
        assert torch.equal(other.roberta.blocks[0].ffn_in.weight, mnli.roberta.blocks[0].ffn_in.weight)
    assert torch.equal(again.classifier.out_proj.weight, mnli.classifier.out_proj.weight)
    assert rte.classifier.out_proj.weight.shape == (2, 32) and not torch.equal(
        rte.classifier.dense.weight, mnli.classifier.dense.weight
    )
    assert isinstance(race, roberta.RobertaForMultipleChoice)
    assert built("squad2", model).answerable is not None and built("squad1", model).answerable is None


def test_scratch_is_random_and_seeds_differ_in_the_head(model):
    pretrained = roberta.RobertaModel.from_pretrained(model).embeddings.tokens.weight
    a, b, scratch = built("rte", model), built("rte", model, seed=1), built("rte", model, scratch=True)
    assert torch.equal(a.roberta.embeddings.tokens.weight, pretrained)
    assert torch.equal(b.roberta.embeddings.tokens.weight, pretrained)
    assert not torch.equal(scratch.roberta.embeddings.tokens.weight, pretrained)
    assert not torch.equal(a.classifier.dense.weight, b.classifier.dense.weight)
    assert torch.equal(a.classifier.dense.weight, built("rte", model).classifier.dense.weight)
    assert built("rte", model, dropout=0.3).config.hidden_dropout_prob == 0.3


# ----------------------------------------------------------------------------------------------------------
# Sweeps, ensembles, all tasks
# ----------------------------------------------------------------------------------------------------------

SWEEP = {"sweep": True, "sweep_batch_sizes": (8, 16), "sweep_lrs": (1e-3, 3e-3), "seeds": 3, "epochs": 2}


def test_a_sweep_reports_median_and_spread_of_its_best_setting(tmp_path, model):
    write_glue(tmp_path, "sst-2")
    results = start("sst-2", tmp_path, model, tmp_path / "run", **SWEEP)
    assert len(results["runs"]) == 2 * 2 * 3 and results["seeds"] == 3
    by_setting = {}
    for entry in results["runs"]:
        own = json.loads((tmp_path / "run" / entry["run"] / "results.json").read_text())
        assert own == entry
        setting = entry["batch_size"], entry["peak_lr"]
        by_setting.setdefault(setting, []).append(entry["metrics"]["accuracy"])
    medians = {setting: sorted(values)[1] for setting, values in by_setting.items()}
    chosen = results["batch_size"], results["peak_lr"]
    assert medians[chosen] == max(medians.values()) == results["metrics"]["accuracy"]
    values = by_setting[chosen]
    assert results["spread"]["accuracy"] == [min(values), max(values)]
    table = (tmp_path / "run" / "results.md").read_text().splitlines()
    low, high = (100 * value for value in (min(values), max(values)))
    assert (
        f"| {100 * medians[chosen]:.1f} ({low:.1f} to {high:.1f}) |" in table[2]
        and "| 94.8 | 96.4 |" in table[2]
    )


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_ends_with_the_same_table(tmp_path, model):
    write_glue(tmp_path, "sst-2")
    sweep = SWEEP | {"sweep_batch_sizes": (8,)}
    arguments = command("sst-2", tmp_path, model, tmp_path / "killed", **sweep)
    start("sst-2", tmp_path, model, tmp_path / "straight", **sweep)
    slow = (
        "import time, train, finetune; f = train.Run.train_step\n"
        "train.Run.train_step = lambda self, step: (f(self, step), time.sleep(0.02))\nfinetune.main()"
    )
    finished = 0
    for goal in (1, 3):  # killed twice, with some runs finished and one under way
        process = subprocess.Popen(
            [sys.executable, "-c", slow, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        while finished < goal or len(list((tmp_path / "killed").glob("*/run.json"))) <= finished:
            assert process.poll() is None
            time.sleep(0.01)
            finished = len(list((tmp_path / "killed").glob("*/results.json")))
        process.kill()
        process.wait()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*/results.json")}
    assert 3 <= len(done) < 6
    finetune.main(arguments)
    tables = [(tmp_path / name / "results.md").read_text() for name in ("straight", "killed")]
    assert tables[0] == tables[1]
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())  # not run again


def test_an_ensemble_averages_probabilities(tmp_path, model):
    write_glue(tmp_path, "rte", (64, 30, 4))
    sweep = start("rte", tmp_path, model, tmp_path / "runs", seeds=3, epochs=2)
    runs = [str(tmp_path / "runs" / entry["run"]) for entry in sweep["runs"]]
    finetune.main(["--task", "rte", "--data", str(tmp_path), "--out", str(tmp_path / "mean"), "--predict",
                   "--ensemble", *runs])  # fmt: skip
    results = json.loads((tmp_path / "mean" / "results.json").read_text())
    examples = finetune.read_examples("rte", tmp_path / "RTE", "dev")
    mean = 0.0
    for path in runs:
        one = roberta.RobertaForSequenceClassification.from_pretrained(path)
        tokenizer = data.Tokenizer.from_pretrained(path)
        for i, example in enumerate(examples):
            first, second = map(tokenizer.encode, example.texts)
            ids = torch.tensor([[0, *first, 2, 2, *second, 2]])
            mean = mean + np.eye(len(examples))[i][:, None] * one(ids).softmax(1).detach().numpy() / 3
    expected = finetune.accuracy([e.label for e in examples], mean.argmax(1))
    assert results["metrics"]["accuracy"] == expected and results["ensemble"] == runs
    assert (tmp_path / "mean" / "RTE.tsv").read_text().startswith("index\tprediction\n0\t")
    finetune.main(["--task", "rte", "--data", str(tmp_path), "--out", str(tmp_path / "again"),
                   "--ensemble", str(tmp_path / "runs")])  # fmt: skip
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["metrics"] == results["metrics"] and again["ensemble"] == runs


def test_a_directory_belongs_to_one_kind_of_command(tmp_path, model, capsys):
    write_glue(tmp_path, "rte")
    write_glue(tmp_path, "wnli")
    start("rte", tmp_path, model, tmp_path / "one", epochs=1)
    start("rte", tmp_path, model, tmp_path / "two", epochs=1, seeds=2)
    before = [(tmp_path / name / "results.json").read_bytes() for name in ("one", "two")]
    for arguments in (
        command("rte", tmp_path, model, tmp_path / "one", epochs=1, ensemble=[tmp_path / "one"]),
        command("rte", tmp_path, model, tmp_path / "one", epochs=1, seeds=2),
        command("all", tmp_path, model, tmp_path / "one", epochs=1),
        command("rte", tmp_path, model, tmp_path / "two", epochs=1),
        command("wnli", tmp_path, model, tmp_path / "two", epochs=1, seeds=2),
    ):
        with pytest.raises(SystemExit) as stopped:
            finetune.main(arguments)
        assert stopped.value.code == 2 and " holds a run with kind " in capsys.readouterr().err
    assert before == [(tmp_path / name / "results.json").read_bytes() for name in ("one", "two")]


def test_a_diverging_run_does_not_end_a_sweep(tmp_path, model, monkeypatch):
    write_glue(tmp_path, "rte")
    original = train.Run.train_step

    def train_step(self, step):
        if self.config.seed == 1:
            raise FloatingPointError("no finite gradient")
        original(self, step)

    monkeypatch.setattr(train.Run, "train_step", train_step)
    results = start("rte", tmp_path, model, tmp_path / "run", epochs=1, seeds=3)
    assert [run.get("error") for run in results["runs"]] == [None, "no finite gradient", None]
    assert results["metrics"]["accuracy"] is not None


def test_files_of_all_tasks_and_of_the_test_set_are_read_before_training(tmp_path, model, capsys):
    write_glue(tmp_path, "cola")
    place = write_glue(tmp_path, "rte")
    replace_line(place / "test.tsv", 3, "broken")
    with pytest.raises(SystemExit):
        start("rte", tmp_path, model, tmp_path / "run", predict=True, skip_bad_rows=True)
    assert "test.tsv: line 3: 1 columns, but rte has 3" in capsys.readouterr().err
    (place / "dev.tsv").unlink()
    with pytest.raises(SystemExit):
        start("all", tmp_path, model, tmp_path / "all")
    assert "no training and dev files of rte" in capsys.readouterr().err
    assert not (tmp_path / "all" / "cola").exists()


def test_ensembles_of_unfinished_or_other_runs_are_refused(tmp_path, model, capsys):
    write_glue(tmp_path, "rte")
    write_glue(tmp_path, "wnli")
    start("wnli", tmp_path, model, tmp_path / "wnli", epochs=1)
    for path, message in (
        (tmp_path / "no", "no finished run"),
        (tmp_path / "wnli", "is one run of wnli, not one run of rte"),
    ):
        with pytest.raises(SystemExit) as stopped:
            finetune.main(["--task", "rte", "--data", str(tmp_path), "--out", str(tmp_path / "e"),
                           "--ensemble", str(path)])  # fmt: skip
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_span_ensembles_average_start_and_end_probabilities(tmp_path, model):
    write_squad(tmp_path, 2)
    sweep = start("squad2", tmp_path, model, tmp_path / "runs", seeds=2, epochs=1)
    runs = [tmp_path / "runs" / entry["run"] for entry in sweep["runs"]]
    finetune.main(["--task", "squad2", "--data", str(tmp_path), "--out", str(tmp_path / "mean"), "--predict",
                   "--ensemble", *map(str, runs)])  # fmt: skip
    none = json.loads((tmp_path / "mean" / "na_prob.json").read_text())
    examples = finetune.read_examples("squad2", tmp_path / "squad", "dev")
    head = finetune.Spans(config("squad2"))
    features = head.encode(examples, data.Tokenizer.from_pretrained(runs[0]), 128)
    models = [roberta.RobertaForQuestionAnswering.from_pretrained(path) for path in runs]
    found = [finetune.predict(one, head, features, SETUP)[0] for one in models]
    expected = head.predictions((found[0] + found[1]) / 2, features, examples)
    assert list(none.values()) == pytest.approx([p for _, p in expected], abs=1e-6)


def test_all_tasks_in_one_table_beside_the_papers_figures(tmp_path, model, capsys):
    write_all(tmp_path / "data")
    out = tmp_path / "all"
    results = start("all", tmp_path / "data", model, out, epochs=1, predict=True, scratch=True)
    assert list(results["tasks"]) == list(finetune.TASKS)
    table = (out / "results.md").read_text()
    assert table in capsys.readouterr().out
    for task, name, base, large in (
        ("cola", "matthews_correlation", "63.6", "68.0"), ("sst-2", "accuracy", "94.8", "96.4"),
        ("mrpc", "accuracy", "90.2", "90.9"), ("sts-b", "pearson", "91.2", "92.4"),
        ("qqp", "accuracy", "91.9", "92.2"), ("mnli", "accuracy", "87.6", "90.2"),
        ("mnli", "accuracy_mismatched", "–", "90.2"), ("qnli", "accuracy", "92.8", "94.7"),
        ("rte", "accuracy", "78.7", "86.6"), ("wnli", "accuracy", "–", "91.3"), ("squad1", "f1", "–", "94.6"),
        ("squad1", "exact_match", "–", "88.9"), ("squad2", "f1", "–", "89.4"),
        ("squad2", "exact", "–", "86.5"), ("race", "accuracy", "–", "83.2"),
    ):  # fmt: skip
        assert any(
            line.startswith(f"| {task} | {name} |") and f"| {base} | {large} |" in line
            for line in table.split("\n")
        ), (task, name)
    names = "CoLA SST-2 MRPC STS-B QQP MNLI-m MNLI-mm QNLI RTE WNLI AX".split()
    assert {path.stem for path in out.glob("*/*.tsv")} == set(names)
    assert len(list(out.glob("*/predictions.json"))) == 2 and (out / "race" / "RACE.json").exists()


def test_inputs_are_made_once_and_damaged_or_outdated_caches_are_not_used(tmp_path, model, monkeypatch):
    write_glue(tmp_path, "rte")
    start("rte", tmp_path, model, tmp_path / "run", epochs=1)
    settings = config("rte", data=str(tmp_path), seq_len=128)
    tokenizer, cache = data.Tokenizer.from_pretrained(model), tmp_path / "run" / "features"
    made = []
    original = finetune.Classification.encode
    monkeypatch.setattr(
        finetune.Classification, "encode", lambda *arguments: made.append(1) or original(*arguments)
    )

    def load(**changes):
        return finetune.load_split(
            dataclasses.replace(settings, **changes), "dev", tokenizer, cache, SETUP
        ).features

    first = load()
    assert not made
    (file,) = cache.glob("rte-dev-*.npz")
    file.write_bytes(file.read_bytes()[:-100])
    again = load()
    assert len(made) == 1 and all(
        np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(again).values())
    )
    load(seq_len=32)
    assert len(made) == 2
    replace_line(tmp_path / "RTE" / "dev.tsv", 2, "0\tother\twords\tentailment")
    load()
    assert len(made) == 3


def test_help_shows_every_flag(capsys):
    result = run("finetune.py", "--help")
    for field in dataclasses.fields(finetune.FinetuneConfig):
        assert "--" + field.name.replace("_", "-") in result.stdout
    assert "Table 10" in result.stdout and "--peak-lr 1.5e-05" in result.stdout.replace("\n", " ")
    assert "--no-such-flag" in ends(finetune.main, ["--no-such-flag"], 2, capsys)


def test_table_10():
    for task, values in (("rte", (32, 2e-5, 0.1, 10)), ("squad1", (48, 1.5e-5, 0.01, 2)),
                         ("squad2", (48, 1.5e-5, 0.01, 2)), ("race", (16, 1e-5, 0.1, 4))):  # fmt: skip
        c = finetune.config_of(task, {})
        assert (c.batch_size, c.peak_lr, c.weight_decay, c.epochs) == values and c.warmup_ratio == 0.06
    sweep = finetune.settings_of(finetune.config_of("rte", {"sweep": True}))
    assert len(sweep) == 6 * 5
    assert {(c.batch_size, c.peak_lr) for c in sweep} == {
        (b, r) for b in (16, 32) for r in (1e-5, 2e-5, 3e-5)
    }
    assert {c.seed for c in sweep} == set(range(5)) and len({c.out for c in sweep}) == 30


def test_importing_finetune_has_no_side_effect():
    code = "import sys, finetune; assert 'matplotlib' not in sys.modules"
    assert run("-c", code, env=os.environ | {"RANK": "0"}).returncode == 0
