"""finetune.py: the published formats, exact answer spans, metrics by hand, runs that learn and resume."""

import csv
import dataclasses
import itertools
import json
import random
import signal
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ends, holds_no_pickle, make_documents, run, same
from test_train import close_weights, interrupt_at, torchrun, weights

import data
import finetune
import roberta
import train
from finetune import TASKS, Answer, Example

ALONE = train.Ranks(0, 1, torch.device("cpu"), "fp32", timedelta(seconds=60))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random encoder of width 32 with a tokenizer of 400 units, as a saved model."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = data.train_bpe(make_documents(100), 400)
    torch.manual_seed(1000)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    shape = roberta.RobertaConfig.tiny(vocab_size=tokenizer.vocab_size, **sizes)
    roberta.RobertaForMaskedLM(shape).save_pretrained(directory, tokenizer)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model) -> data.Tokenizer:
    return data.Tokenizer.from_pretrained(model)


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


HEADERS = {  # a test set has an index and no label; CoLA's other files have no header
    "cola": "source|label|star|sentence",
    "sst-2": "sentence|label",
    "mrpc": "Quality|#1 ID|#2 ID|#1 String|#2 String",
    "sts-b": "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score",
    "qqp": "id|qid1|qid2|question1|question2|is_duplicate",
    "mnli": "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|"
    "sentence2_parse|sentence1|sentence2|label1|gold_label",
    "qnli": "index|question|sentence|label",
    "rte": "index|sentence1|sentence2|label",
    "wnli": "index|sentence1|sentence2|label",
}


def write_glue(place: Path, task: str, counts=(64, 16, 4), quote: str = "") -> Path:
    """Writes train, dev and test files of a GLUE task as they are published; returns their directory."""
    folder = place / TASKS[task].folder
    folder.mkdir(parents=True, exist_ok=True)
    labels, column = TASKS[task].labels or ("0.5", "4.500"), TASKS[task].label
    parts = ["_matched", "_mismatched"] if task == "mnli" else [""]
    files = [("train", counts[0])]
    files += [(split + part, count) for split, count in zip(("dev", "test"), counts[1:]) for part in parts]
    for seed, (name, count) in enumerate(files):
        columns = HEADERS[task].split("|")
        if name.startswith("test"):
            columns = [column_ for column_ in columns if column_ not in (column, "label1", "source", "star")]
            columns = columns if columns[0] in ("index", "id") else ["index", *columns]
        lines = ["\t".join(columns)]
        for number, (first, second, label) in enumerate(sentences(count, seed)):
            row = {"index": number, "id": number, column: labels[label]}
            row |= zip(TASKS[task].texts, (quote + first, second))
            lines.append("\t".join(str(row.get(name, "x")) for name in columns))
        lines = lines[1:] if columns[0] == "source" else lines
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if task == "mnli":  # GLUE's diagnostic set goes with it
        (place / "diagnostic").mkdir(exist_ok=True)
        (place / "diagnostic" / "diagnostic.tsv").write_text("index\tsentence1\tsentence2\n0\tsun\tmud\n")
    return folder


def squad_file(count: int, seed: int, version: int, padding: int = 0) -> dict:
    """Passages that say where people are; in v2.0 every other question is about somebody else."""
    rng, paragraphs = random.Random(seed), []
    for i in range(count):
        names = rng.sample("Ann Bob Cid Dan".split(), 2)
        places = dict(zip(names, rng.sample("Rome Oslo Lima Cairo Delhi".split(), 2)))
        lines = [f"{name} is in {place} ." for name, place in places.items()]
        lines += ["The sky is grey ." for _ in range(rng.randint(0, padding))]
        rng.shuffle(lines)
        passage, asked = " ".join(lines), rng.choice(names)
        answers = [{"text": places[asked], "answer_start": passage.index(places[asked])}]
        if version == 2 and i % 2:
            asked, answers = "Zoe", []
        entry = {"id": f"q{seed}-{i}", "question": f"Where is {asked} ?", "answers": answers}
        paragraphs.append({"context": passage, "qas": [entry]})
    return {"version": f"{version}", "data": [{"title": "t", "paragraphs": paragraphs}]}


def write_squad(place: Path, version: int, counts=(64, 16), padding: int = 0) -> Path:
    folder = place / "squad"
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(zip(("train", "dev"), counts)):
        path = folder / f"{split}-v{'1.1' if version == 1 else '2.0'}.json"
        path.write_text(json.dumps(squad_file(count, seed, version, padding)))
    return folder


def write_race(place: Path, counts=(16, 8, 4)) -> None:
    """The answer to a question is the only option made of good words."""
    for seed, (split, count) in enumerate(zip(("train", "dev", "test"), counts)):
        rng = random.Random(seed)
        for part in ("middle", "high"):
            folder = place / "RACE" / split / part
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                right = rng.choices("ABCD", k=2)
                options = [[" ".join(rng.choices(GOOD if j == answer else BAD, k=2)) for j in "ABCD"]
                           for answer in right]
                entry = {"id": f"{part}{i}.txt", "article": "Much is said .", "options": options,
                         "questions": ["Which one is _ ?", "What is right ?"], "answers": right}
                (folder / f"{i}.txt").write_text(json.dumps(entry))


# Settings with which a model of width 32 learns the languages above within seconds.
QUICK = {"peak_lr": 3e-3, "epochs": 4, "batch_size": 8, "patience": 0, "log_interval": 10}


def command(task, data_, model, out, **changes) -> list[str]:
    settings = {"task": task, "data": data_, "model": model, "out": out} | QUICK | changes
    arguments = []
    for name, value in settings.items():
        # A sweep has its own lists of two of them.
        if not (changes.get("sweep") and name in ("batch_size", "peak_lr")):
            values = value if isinstance(value, list | tuple) else [] if value is True else [value]
            arguments += ["--" + name.replace("_", "-"), *map(str, values)]
    return arguments


def finish(arguments) -> None:
    """Runs the program in this process, to its end."""
    with pytest.raises(SystemExit) as end:
        finetune.main([str(argument) for argument in arguments])
    assert not end.value.code


def start(*arguments, **changes) -> dict:
    """Runs the program in this process; returns the results.json it leaves."""
    finish(command(*arguments, **changes))
    return json.loads((Path(arguments[3]) / "results.json").read_text())


def head_for(task: str, **changes):
    config = finetune.FinetuneConfig(task=task, **{"seq_len": 64} | changes)
    return finetune.head_of(TASKS[task], config)


def read(task: str, place: Path, split: str) -> list[Example]:
    return finetune.read_examples(TASKS[task], finetune.FinetuneConfig(data=str(place)), split)


# ----------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", HEADERS)
def test_glue_files_are_read_as_published_with_quotes_as_text(tmp_path, task):
    place = write_glue(tmp_path / "glue", task, quote='" ')
    examples = read(task, place, "train")
    # --data may be the folder of all tasks, of GLUE's, or the task's own.
    assert examples == read(task, tmp_path, "train") == read(task, tmp_path / "glue", "train")
    assert len(examples) == 64
    for i, (example, (first, second, label)) in enumerate(zip(examples, sentences(64, 0))):
        texts = (f'" {first}',) if task in ("cola", "sst-2") else (f'" {first}', second)
        assert example == (str(i), "", texts, [0.5, 4.5][label] if task == "sts-b" else label)
    parts = {"mnli": ["matched", "mismatched"]}.get(task, [""])
    assert [example.part for example in read(task, place, "dev")] == sorted(parts * 16)
    test = read(task, place, "test")
    assert {example.label for example in test} == {None}
    assert [example.part for example in test] == sorted(parts * 4) + ["AX"] * (task == "mnli")


def test_a_carriage_return_a_byte_order_mark_and_unicode_line_ends_are_no_trouble(tmp_path):
    place = write_glue(tmp_path, "sst-2")
    text = "\ufeffsentence\tlabel\r\na line\u2028goes on\x85here\t1\r\n\r\n"
    (place / "train.tsv").write_bytes(text.encode())
    assert read("sst-2", place, "train") == [("0", "", ("a line\u2028goes on\x85here",), 1)]


def replace_line(path: Path, number: int, text: str) -> None:
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[number - 1] = text
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")


def refused(arguments, message: str, capsys) -> None:
    """The program must end with one line that has `message` in it, and the code for unusable input."""
    printed = ends(finetune.main, arguments, 2, capsys)
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1, printed


@pytest.mark.parametrize("task, file, line, text, message", [
    ("rte", "train.tsv", 5, "3\tonly one text", "RTE/train.tsv: line 5: a text or label is missing"),
    ("rte", "dev.tsv", 3, "1\ta\tb\tmaybe", "dev.tsv: line 3: label 'maybe' is none of rte's"),
    ("cola", "train.tsv", 2, "x\t2\t\tText.", "line 2: label '2' is none of cola's"),
    ("sts-b", "dev.tsv", 2, "\t" * 9 + "7.5", "line 2: score 7.5 is not between 0 and 5"),
    ("sts-b", "dev.tsv", 2, "\t" * 9 + "high", "line 2: could not convert string to float"),
    ("sst-2", "train.tsv", 1, "index\tsentence1\tlabel", "not sst-2 as it is published (KeyError('sent"),
    ("sst-2", "train.tsv", 2, "\udcff\t1", "train.tsv: line 2: 'utf-8' codec"),  # the byte 0xff
])  # fmt: skip
def test_bad_glue_files_are_one_line(tmp_path, model, capsys, task, file, line, text, message):
    replace_line(write_glue(tmp_path, task) / file, line, text)
    refused(command(task, tmp_path, model, tmp_path / "run"), message, capsys)


def edit_json(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def passage_of(content: dict) -> dict:
    return content["data"][0]["paragraphs"][1]


def entry_of(content: dict) -> dict:
    return passage_of(content)["qas"][0]


@pytest.mark.parametrize("task, edit, message", [
    ("squad1", lambda c: c.pop("data"), "train-v1.1.json: not squad1 as it is published (KeyError('data'))"),
    ("squad1", lambda c: c["data"].clear(), "train-v1.1.json: no example in it"),
    ("squad1", lambda c: passage_of(c).update(context=None), "question q0-1: a text or label is missing"),
    ("squad1", lambda c: passage_of(c).update(context=""), "question q0-1: a text or label is missing"),
    ("squad1", lambda c: passage_of(c).update(context="\ud800"), "q0-1: 'utf-8' codec"),
    ("squad1", lambda c: passage_of(c)["qas"].append(["x"]), "not squad1 as it is published"),
    ("squad1", lambda c: entry_of(c).pop("answers"), "question q0-1: a text or label is missing"),
    ("squad1", lambda c: entry_of(c).update(answers=[]), "is this v2.0, --task squad2?"),
    ("squad1", lambda c: entry_of(c)["answers"][0].update(answer_start=1.5), "integer answer_start"),
    ("race", lambda c: c["options"][1].clear(), "train/high/3.txt: question 1: answer "),
    ("race", lambda c: c["answers"].pop(), "train/high/3.txt: not race as it is published (ValueError("),
    ("race", lambda c: c.update(answers=["E", "A"]), "question 0: answer E of 4 options; it takes 2 to 10"),
    ("race", lambda c: c.pop("answers"), "3.txt: not race as it is published (KeyError('answers'))"),
])  # fmt: skip
def test_bad_json_files_are_one_line(tmp_path, model, capsys, task, edit, message):
    files = {"squad1": "squad/train-v1.1.json", "race": "RACE/train/high/3.txt"}
    write_squad(tmp_path, 1)
    write_race(tmp_path)
    edit_json(tmp_path / files[task], edit)
    refused(command(task, tmp_path, model, tmp_path / "run"), message, capsys)


def test_squad_answers_that_are_not_where_the_file_says_teach_nothing(tmp_path, tokenizer, capsys):
    """A few are left out with their questions; many mean that the file counts otherwise."""
    def shift(content, numbers):
        for number in numbers:
            content["data"][0]["paragraphs"][number]["qas"][0]["answers"][0]["answer_start"] += 1

    head = head_for("squad1", data=str(tmp_path))
    edit_json(write_squad(tmp_path, 1, (300, 16)) / "train-v1.1.json", lambda content: shift(content, (3, 5)))
    split = finetune.load_split(head, "train", tokenizer)
    assert "left out: 2 of 300 questions have no answer where the file says it is; the first is q0-3\n" in (
        capsys.readouterr().out)
    assert len(split.examples) == 298 and all(item.target[2] for item in split.items)

    def recount(content, encoding, size):
        for paragraph in content["data"][0]["paragraphs"]:
            before = paragraph["context"][: paragraph["qas"][0]["answers"][0]["answer_start"]]
            paragraph["context"] = "😀 " + paragraph["context"]
            place = len(("😀 " + before).encode(encoding)) // size
            paragraph["qas"][0]["answers"][0]["answer_start"] = place

    for encoding, size, cause in (("utf-8", 1, "bytes of UTF-8"), ("utf-16-le", 2, "units of UTF-16")):
        path = write_squad(tmp_path, 1) / "train-v1.1.json"
        edit_json(path, lambda content: recount(content, encoding, size))  # noqa: B023
        with pytest.raises(ValueError, match=f"64 of 64 questions.*{cause}, but must count characters"):
            finetune.load_split(head, "train", tokenizer)


def test_squad_as_hugging_face_has_it(tmp_path):
    """Answers as a dict of lists, numbers as ids, and no answers where it is impossible."""
    def rewrite(content):
        for number, paragraph in enumerate(content["data"][0]["paragraphs"]):
            (entry,) = paragraph["qas"]
            answers = entry.pop("answers")
            entry |= {"id": number, "is_impossible": not answers}
            if answers:
                keys = ("text", "answer_start")
                entry["answers"] = {key: [answer[key] for answer in answers] for key in keys}

    plain = read("squad2", write_squad(tmp_path, 2), "dev")
    edit_json(tmp_path / "squad" / "dev-v2.0.json", rewrite)
    rewritten = read("squad2", tmp_path, "dev")
    assert [example.id for example in rewritten] == [str(number) for number in range(16)]
    assert [example.label for example in rewritten] == [example.label for example in plain]
    edit_json(tmp_path / "squad" / "dev-v2.0.json", lambda c: entry_of(c).update(id="0"))
    with pytest.raises(ValueError, match="dev-v2.0.json: the id 0 occurs twice; give each its own"):
        read("squad2", tmp_path, "dev")


def test_malformed_rows_can_be_left_out_up_to_one_in_twenty(tmp_path, tokenizer, capsys):
    """They are counted by label and reason: with a wrong --task a whole class would be gone."""
    place = write_glue(tmp_path, "qqp", (200, 16, 4))
    replace_line(place / "train.tsv", 5, "broken")
    replace_line(place / "train.tsv", 9, "broken\ttoo")
    replace_line(place / "train.tsv", 11, "0\t0\t0\ta\tb\t2")
    for line in range(20, 27):  # ten of 200 are not too many
        replace_line(place / "train.tsv", line, "broken")
    head = head_for("qqp", data=str(place), skip_bad_rows=True)
    assert len(finetune.load_split(head, "train", tokenizer).examples) == 190
    printed = capsys.readouterr().out
    assert "left out of train 9 rows with label None: a text or label is missing" in printed
    assert "left out of train 1 rows with label '2': label '2' is none of qqp's (0, 1)" in printed
    text = (place / "train.tsv").read_text()
    (place / "train.tsv").write_text(text.replace("\t1\n", "\tyes\n"))
    with pytest.raises(ValueError, match="more than one row in twenty of train is malformed; is this qqp?"):
        finetune.load_split(head, "train", tokenizer)


def write_own(place: Path, ending: str, labels=("no", 'yes, "it" is')) -> Path:
    """The rows of `sentences` as people have them: a table with other columns, or an object a line."""
    place.mkdir(exist_ok=True)
    for seed, (split, count) in enumerate((("train", 64), ("dev", 16), ("test", 4))):
        rows = [{"id": f"r{i}", "text": a, "text_b": b, "note": "x, y"} for i, (a, b, _) in
                enumerate(sentences(count, seed))]
        for row, (*_, label) in zip(rows, sentences(count, seed)):
            row |= {"label": labels[label]} if split != "test" else {}
        with open(place / f"{split}.{ending}", "w", encoding="utf-8-sig", newline="") as file:
            if ending == "jsonl":
                file.writelines(json.dumps(row) + "\n" for row in rows)
            else:
                tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
                writer = csv.DictWriter(file, rows[0].keys(), **(tabs if ending == "tsv" else {}))
                writer.writeheader()
                writer.writerows(rows)
    return place


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_ones_own_labels_are_learned_evaluated_and_predicted(tmp_path, model, ending, capsys):
    place = write_own(tmp_path / "own", ending)
    results = start("classification", place, model, tmp_path / "run", predict=True, epochs=12)
    assert list(results["metrics"]) == ["accuracy", "f1_macro", "matthews_correlation"]
    assert results["metrics"]["accuracy"] > 0.9
    opened = roberta.RobertaForSequenceClassification.from_pretrained(tmp_path / "run")
    assert opened.config.id2label == {0: "no", 1: 'yes, "it" is'}
    lines = (tmp_path / "run" / "predictions.tsv").read_text().splitlines()
    header, *rows = [line.split("\t") for line in lines]
    assert header == ["index", "prediction", "no", 'yes, "it" is']
    assert [row[0] for row in rows] == ["r0", "r1", "r2", "r3"]
    for _, prediction, *shares in rows:
        assert prediction == header[2 + (float(shares[1]) > 0.5)]
        assert sum(map(float, shares)) == pytest.approx(1)
    # On new texts without labels, with nothing to train on; and with labels, of which one is new.
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "dev.csv").write_text("sentence1,sentence2\nsun,mud\nrust,woe\n")
    new = ("classification", tmp_path / "new", tmp_path / "run")
    start(*new, tmp_path / "out", eval_only=True, predict=True)
    assert "the dev set is without labels, or some are missing: no metrics" in capsys.readouterr().out
    predicted = (tmp_path / "out" / "predictions.tsv").read_text().splitlines()[1:]
    assert [row.split("\t")[1] for row in predicted] == ['yes, "it" is', "no"]
    (tmp_path / "new" / "dev.csv").write_text('text,text_b,label\nsun,mud,"YES, ""it"" is"\n')
    assert start(*new, tmp_path / "capitals", eval_only=True)["metrics"]["accuracy"] == 1
    (tmp_path / "new" / "dev.csv").write_text("text,label\nsun,maybe\n")
    message = "row 1: label 'maybe' is none of classification's (no, yes, \"it\" is)"
    refused(command(*new, tmp_path / "no", eval_only=True), message, capsys)


@pytest.mark.parametrize("name, content, message", [
    ("train.jsonl", "[1, 2]\n", "train.jsonl: not a .jsonl that can be read"),
    ("train.csv", 'text,label\n"open,yes\n', "train.csv: not a .csv that can be read (Error("),
    ("train.csv", "words,label\na,b\n", "no column text (or sentence), but words, label"),
    ("train.csv", "TEXT,Label\na,x\nb,x\n", "its column label has 1 different labels; it takes two"),
    ("train.csv", "text,label\na,x\nWell, b,y\nc,z\n", "row 2: a text or label is missing, or there are"),
    ("train.jsonl", '{"text": 5, "label": 1}\n{"text": "a", "label": 0}\n', "row 1: no text, but [5]"),
])  # fmt: skip
def test_ones_own_files_with_faults_are_one_line(tmp_path, model, capsys, name, content, message):
    (tmp_path / name).write_text(content)
    (tmp_path / name.replace("train", "dev")).write_text(content)
    refused(command("classification", tmp_path, model, tmp_path / "run"), message, capsys)


def test_ones_own_files_are_one_for_each_split_and_names_keep_to_their_cells(tmp_path, model, capsys):
    place = write_own(tmp_path / "own", "csv", ("a\tb", "c"))
    (place / "test.csv").write_text('id,text,text_b\n"x\ty\nz",sun,mud\n')
    start("classification", place, model, tmp_path / "run", predict=True, epochs=1)
    header, row = (tmp_path / "run" / "predictions.tsv").read_text().splitlines()
    assert header == "index\tprediction\ta b\tc" and row.startswith("x y z\t")
    write_own(place, "tsv")
    refused(command("classification", place, model, tmp_path / "no"), "which is the train set?", capsys)


def test_ones_own_csv_gives_what_glues_file_gives(tmp_path, model):
    glue = start("sst-2", write_glue(tmp_path, "sst-2"), model, tmp_path / "glue", epochs=2)
    (tmp_path / "own").mkdir()
    for split in ("train", "dev"):
        text = (tmp_path / "SST-2" / f"{split}.tsv").read_text()
        (tmp_path / "own" / f"{split}.csv").write_text(text.replace("sentence", "text").replace("\t", " ,"))
    own = start("classification", tmp_path / "own", model, tmp_path / "out", epochs=2)
    assert own["metrics"]["accuracy"] == glue["metrics"]["accuracy"] and own["eval_loss"] == glue["eval_loss"]


def test_numbers_of_any_range_are_learned_and_come_out_as_they_are(tmp_path, model, capsys):
    place = write_own(tmp_path / "own", "csv", ("-500.5", "90000"))
    results = start("regression", place, model, tmp_path / "run", predict=True, epochs=12)
    assert results["metrics"]["pearson"] > 0.9
    classifier = roberta.RobertaForSequenceClassification.from_pretrained(tmp_path / "run")
    texts, tokens = [("sun joy", "mud"), ("rust", "mud")], data.Tokenizer.from_pretrained(model)
    high, low = (found["score"] for found in classifier.classify(texts, tokens))
    assert high > 60_000 and low < 30_000
    again = start("regression", place, tmp_path / "run", tmp_path / "again", eval_only=True)
    assert again["metrics"] == pytest.approx(results["metrics"])
    late = write_own(tmp_path / "late", "csv", ("1700000000", "1700000040"))
    refused(command("regression", late, model, tmp_path / "no"), "too close for 32 bits; subtract 17", capsys)
    more = start("regression", place, tmp_path / "run", tmp_path / "more", peak_lr=1e-9, epochs=1)
    assert more["metrics"]["pearson"] == pytest.approx(results["metrics"]["pearson"], abs=1e-3)


@pytest.mark.parametrize("names, kept", [
    (("ENTAILMENT", "Neutral", "contradiction"), True), (("LABEL_0", "LABEL_1", "LABEL_2"), True),
    (("entailment", "neutral", "no"), False), (("LABEL_0", "LABEL_1"), False),
])  # fmt: skip
def test_labels_spelt_otherwise_are_the_same_labels(tmp_path, model, capsys, names, kept):
    other = roberta.RobertaForSequenceClassification.from_pretrained(model, id2label=dict(enumerate(names)))
    other.save_pretrained(tmp_path, data.Tokenizer.from_pretrained(model))
    after = built("mnli", tmp_path)
    printed = capsys.readouterr().out
    assert ("its head, too" in printed) == kept and ("a fresh head: its labels are" in printed) != kept
    if kept:
        rows = [0, 1, 2] if "LABEL" in names[0] else [2, 1, 0]
        assert torch.equal(after.classifier.out_proj.weight, other.classifier.out_proj.weight[rows])
        assert list(after.config.id2label.values()) == ["contradiction", "neutral", "entailment"]


def test_questions_may_have_two_to_ten_options(tmp_path, model):
    write_race(tmp_path)

    def fewer(content):
        content["options"][0] = [option for option, name in zip(content["options"][0], "ABCD")
                                 if name in ("A", content["answers"][0])] + ["dull"] * 3
        content["answers"][0] = "A" if content["answers"][0] == "A" else "B"
        content["options"][1] += ["mud"]

    for path in (tmp_path / "RACE").glob("*/*/*.txt"):
        edit_json(path, fewer)
    results = start("race", tmp_path, model, tmp_path / "run", predict=True)
    assert results["metrics"]["accuracy"] > 0.5  # by chance a quarter
    header, *rows = (tmp_path / "run" / "RACE-probabilities.tsv").read_text().splitlines()
    assert all(float(row.split("\t")[-1]) == 0 for row in rows) and len(rows) == 16


def test_bad_flags_are_one_line(tmp_path, model, capsys):
    write_glue(tmp_path, "rte")
    for arguments, message in (
        ([], "--task is missing"),
        (["--task", "rte"], "--data is missing"),
        (["--task", "rte", "--data", tmp_path], "--model is missing"),
        (command("rte", tmp_path / "no", model, tmp_path / "run"), "no train set of rte (train.tsv) in"),
        (command("rte", tmp_path, model, tmp_path / "run", peak_lr="nan"), "--peak-lr nan must be"),
        (command("rte", tmp_path, model, tmp_path / "run", seq_len=500), "--seq-len 500 exceeds the 128"),
        (command("rte", tmp_path, tmp_path, tmp_path / "run"), "no model"),
        ([*command("rte", tmp_path, model, tmp_path / "run"), "--sweep"], "--sweep goes by --sweep-"),
    ):
        refused(arguments, message, capsys)


# ----------------------------------------------------------------------------------------------------------
# Inputs
# ----------------------------------------------------------------------------------------------------------


def test_texts_that_are_too_long_are_cut_to_seq_len(tokenizer):
    first, second = "sun " * 30, "mud " * 12
    rows = [Example("0", "", (first,), 0), Example("1", "", (first, second), 0)]
    alone, pair = (item.sequences[0] for item in head_for("rte", seq_len=32).inputs(rows, tokenizer))
    assert alone.tolist() == [0, *tokenizer.encode(first)[:30], 2]
    ids = [tokenizer.encode(text)[:14] for text in (first, second)]
    assert pair.tolist() == [0, *ids[0], 2, 2, *ids[1], 2]  # both longer than half of the room


TEXTS = [
    "Denver's 1-0 win (in 2016).", "  two  spaces\n\nand a line ",
    "naïve café – “quoted” Łódź", "日本語のテキスト、東京。",
    "a 🙂🙂‍👩‍👩 emoji 🏳️‍🌈 b", "\u00a0nbsp\u3000wide",
]  # fmt: skip


def test_every_answer_at_token_borders_goes_to_tokens_and_back_unchanged(tokenizer):
    """Words between spaces are made of whole tokens, so any run of words must come back as it is."""
    for text in TEXTS:
        _, offsets = tokenizer.encode_with_offsets(text)
        words = list(finetune.re.finditer(r"\S+", text))
        for i, first in enumerate(words):
            for last in words[i:]:
                span = finetune.tokens_of_answer(offsets, first.start(), last.end())
                assert finetune.answer_text(text, offsets, *span) == text[first.start() : last.end()]


def test_windows_cover_the_passage_overlap_and_know_where_the_answer_is(tokenizer):
    passage = " ".join(f"word{i}" for i in range(60)) + " café 🙂 end."
    begin = passage.index("café 🙂")
    # Of these gold answers only the last one stands where it says.
    golds = ((begin + 1, "café 🙂"), (-3, "end"), (begin, "café 🙂"))
    example = Example("q", "", ("What ?", passage), golds)
    items = list(head_for("squad2", seq_len=40).inputs([example], tokenizer))
    ids, offsets = tokenizer.encode_with_offsets(passage)
    question, seen = tokenizer.encode("What ?"), np.zeros(len(ids), dtype=int)
    for item in items:
        place = int(np.flatnonzero((offsets == item.offsets[0]).all(1))[0])
        inside = ids[place : place + len(item.offsets)]
        assert item.sequences[0].tolist() == [0, *question, 2, 2, *inside, 2]
        assert len(item.sequences[0]) <= 40 and item.begin == len(question) + 3
        seen[place : place + len(inside)] += 1
        first, last, held = item.target
        if held:
            found = finetune.answer_text(passage, item.offsets, first - item.begin, last - item.begin)
            assert found == "café 🙂"
        else:
            assert first == last == 0
    assert seen.min() >= 1 and (seen[20:-20] >= 2).all() and any(item.target[2] for item in items)


def test_the_decision_is_the_best_span_of_all_windows_where_one_is_answerable(tokenizer):
    passage = " ".join(f"w{i}" for i in range(40))
    head = head_for("squad2", seq_len=32, max_answer_tokens=3)
    examples = [Example("q", "", ("?", passage), ())]
    items = list(head.inputs(examples, tokenizer))
    probabilities = np.zeros((len(items), 2, 33))
    for row, (sure, start_, end) in enumerate([(0.8, 0.2, 0.3), (0.3, 0.5, 0.9)]):  # as in `Spans`
        probabilities[row, :, 0] = sure
        first = 1 + items[row].begin
        probabilities[row, 0, [first, first + 4]] = 1, start_  # the first token is too far from the last
        probabilities[row, 1, first + 5] = end
    expected = passage[items[1].offsets[4, 0] : items[1].offsets[5, 1]].strip()
    assert head.decide(probabilities, items, examples) == [(expected, expected, pytest.approx(0.2))]
    probabilities[0, :, 0] = 0.4
    assert head.decide(probabilities, items, examples) == [("", expected, pytest.approx(0.6))]


def test_race_inputs_are_question_and_answer_then_the_passage(tokenizer):
    options = ("red", "green " * 200, "blue", "grey")
    example = Example("a-0", "high", ("The passage. " * 60, "It is _ .", *options), 2)
    (item,) = head_for("race", seq_len=200).inputs([example], tokenizer)
    first, passage = tokenizer.encode("It is red ."), tokenizer.encode(("The passage. " * 60).strip())
    assert item.sequences[0].tolist() == [0, *first, 2, 2, *passage[: 200 - 4 - len(first)], 2]
    long = tokenizer.encode("It is " + " ".join(["green"] * 200) + " .")
    assert item.sequences[1].tolist() == [0, *long[:128], 2, 2, *passage[: 200 - 4 - 128], 2]
    assert len(item.sequences) == 4 and item.target == 2


# ----------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------


def batches_of(count: int, batch_size: int, micro: int, rank: int = 0, world_size: int = 1):
    rng = np.random.default_rng(0)
    items = [finetune.Item([rng.integers(4, 90, rng.integers(3, 40))], i, i) for i in range(count)]
    config = finetune.FinetuneConfig(batch_size=batch_size, micro_batch_size=micro, seed=3)
    return finetune.TaskBatches(items, config, dataclasses.replace(ALONE, rank=rank, world_size=world_size))


@pytest.mark.parametrize("count, batch_size", [(1000, 16), (37, 8), (5, 8), (1, 4)])
def test_every_example_is_seen_once_an_epoch_by_one_rank(count, batch_size):
    alone = batches_of(count, batch_size, batch_size)
    both = [batches_of(count, batch_size, 2, rank, 2) for rank in range(2)]
    for epoch in range(2):
        seen = []
        for n in range(epoch * alone.steps_per_epoch, (epoch + 1) * alone.steps_per_epoch):
            (batch,), number = alone.step(n)
            assert number == len(batch.items) <= batch_size
            assert batch.input_ids.shape[1] == max(len(item.sequences[0]) for item in batch.items)
            shares = [order.step(n)[0] for order in both]
            together = [i for share in shares for b in share if b.weight for i in b.targets]
            assert len(shares[0]) == len(shares[1]) and sorted(together) == sorted(batch.targets)
            seen += batch.targets.tolist()
        assert sorted(seen) == list(range(count))


def test_length_buckets_pad_far_less_than_a_plain_shuffle():
    order = batches_of(3000, 16, 16)
    shapes = [order.step(n)[0][0] for n in range(order.steps_per_epoch)]
    padded = sum(b.input_ids.size for b in shapes) / sum(b.num_tokens for b in shapes)
    shuffled = np.random.default_rng(0).permutation(order.lengths)
    plain = sum(part.max() * len(part) for part in np.array_split(shuffled, 188)) / shuffled.sum()
    assert padded < 1.05 < 1.5 < plain


# ----------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_metrics_equal_scikit_learns_and_scipys(oracle):
    sklearn, stats = oracle("sklearn.metrics"), oracle("scipy.stats")
    rng = np.random.default_rng(0)
    cases = [(rng.integers(0, 2, n), rng.integers(0, 2, n)) for n in range(3, 800, 40)]
    ones, zeros, both = np.ones(9, dtype=int), np.zeros(9, dtype=int), np.arange(9) % 2
    cases += [(ones, ones), (zeros, zeros), (ones, zeros), (zeros, ones), (ones, both), (both, ones)]
    for a, b in cases:
        assert finetune.accuracy(a, b) == pytest.approx(sklearn.accuracy_score(a, b), abs=1e-9)
        assert finetune.f1_score(a, b) == pytest.approx(sklearn.f1_score(a, b), abs=1e-9)
        assert finetune.matthews_correlation(a, b) == pytest.approx(sklearn.matthews_corrcoef(a, b), abs=1e-9)
    values = [(rng.normal(size=n), rng.normal(size=n)) for n in (2, 3, 50, 999)]
    values += [(np.round(a), np.round(b)) for a, b in values]  # ties
    values += [(rng.normal(size=30) * 1e-9 + 5, rng.normal(size=30)), (np.arange(5.0), -np.arange(5.0))]
    values += [(np.ones(7), rng.normal(size=7)), (rng.normal(size=7), np.zeros(7)), (np.ones(4), np.ones(4))]
    values += [(np.array([1, np.nan, 2, 3]), np.arange(4.0))]
    for a, b in values:
        assert finetune.pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0], abs=1e-9, nan_ok=True)
        assert finetune.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0], abs=1e-9, nan_ok=True)


def test_squad_v1_by_hand():
    golds = [["the Denver Broncos", "Broncos"], ["1,000 U.S. dollars!"], ["in the year 1999"],
             ["to be or not to be"], ["x"], ["The"]]  # fmt: skip
    given = [
        "Broncos, the",  # normalised "broncos": exact with the second gold answer
        "1000 US dollars",  # exact
        "1999",  # precision 1, recall 1/3 ("in year 1999"): F1 1/2
        "to be be be",  # common: to, be, be: precision 3/4, recall 3/6: F1 0.6
        "y",
        "a",  # both nothing but articles: equal, yet without a common word
    ]
    metrics = finetune.squad_metrics(golds, [Answer(text, text, 0.0) for text in given], version2=False)
    assert metrics == pytest.approx({"exact_match": 100 * 3 / 6, "f1": 100 * (1 + 1 + 0.5 + 0.6) / 6})


def test_squad_v2_and_its_thresholds_by_hand():
    golds = [["Rome"], ["the big city"], [], [], ["Oslo"], ["!"]]
    # exact: 1, 0, 1, 0, 0, 1 (its gold answer is nothing but punctuation); F1 of the second: 2/3
    given = [("Rome", 0.1), ("city", 0.3), ("", 0.9), ("Lima", 0.2), ("", 0.8), ("", 0.4)]
    answers = [Answer(text, text, none) for text, none in given]
    metrics = finetune.squad_metrics(golds, answers, version2=True)
    expected = {
        "exact": 100 * 3 / 6, "f1": 100 * (3 + 2 / 3) / 6, "total": 6,
        "HasAns_exact": 100 * 2 / 4, "HasAns_f1": 100 * (2 + 2 / 3) / 4, "HasAns_total": 4,
        "NoAns_exact": 50, "NoAns_f1": 50, "NoAns_total": 2,
        # Begin with the two unanswerable ones right: 2. Rome at 0.1: 3. Lima at 0.2 costs one: 2.
        # city at 0.3: 2 (F1 2.67). "" at 0.4: 3 (F1 3.67). The others: no gain.
        "best_exact": 100 * 3 / 6, "best_exact_thresh": 0.1,
        "best_f1": 100 * (3 + 2 / 3) / 6, "best_f1_thresh": 0.4,
    }  # fmt: skip
    assert metrics == pytest.approx(expected)


# ----------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------


def test_losses_of_labels_choices_and_numbers_by_hand():
    items = [finetune.Item([np.array([0, 5, 2])] * 2, i, target) for i, target in enumerate((0, 1))]
    scores = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    expected = -np.log(np.e**2 / (np.e**2 + 1)) - np.log(1 / (np.e**2 + 1))  # 0.13 + 2.13
    for task in ("rte", "race"):
        loss = head_for(task).loss(scores, finetune.collate(items))
        assert loss.item() == pytest.approx(expected, abs=1e-6)
    items = [finetune.Item([np.array([0, 5, 2])], i, target) for i, target in enumerate((4.5, 1.0))]
    loss = head_for("sts-b").loss(torch.tensor([[4.0], [3.0]]), finetune.collate(items))
    assert loss.item() == pytest.approx(0.25 + 4)


def test_span_loss_is_cross_entropy_over_the_passage_plus_the_answerability(tokenizer):
    head = head_for("squad2")
    example = Example("q", "", ("Where ?", "Ann is in Rome ."), ((10, "Rome"),))
    (item,) = head.inputs([example], tokenizer)
    logits = torch.randn(2, len(item.sequences[0]))
    loss = head.loss((logits[:1], logits[1:], torch.tensor([0.3])), finetune.collate([item]))
    places = [0, *range(item.begin, item.begin + len(item.offsets))]
    expected = -torch.tensor(0.3).sigmoid().log()
    for scores, place in zip(logits, item.target):
        expected = expected - scores[places].log_softmax(0)[places.index(place)] / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


# ----------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, least", [("sst-2", 0.95), ("rte", 0.95), ("mnli", 0.95), ("sts-b", 0.85)])
def test_a_glue_task_is_learned(tmp_path, model, task, least):
    write_glue(tmp_path, task, (200, 40, 6))
    results = start(task, tmp_path, model, tmp_path / "run", predict=True)
    assert results["metrics"][TASKS[task].metric] > least > (results["majority"][TASKS[task].metric] or 0)
    assert (results["task"], results["seed"], results["peak_lr"]) == (task, 0, 3e-3)
    name = {"mnli": "MNLI-mm"}.get(task, TASKS[task].folder)
    header, *lines = (tmp_path / "run" / f"{name}.tsv").read_text().splitlines()
    numbers, predicted = zip(*(line.split("\t") for line in lines))
    truth = [label for _, _, label in sentences(6, {"mnli": 4}.get(task, 2))]
    assert header == "index\tprediction" and numbers == tuple("012345")
    if task == "sts-b":
        assert all(0 <= float(value) <= 5 for value in predicted)
        assert np.corrcoef([float(value) for value in predicted], truth)[0, 1] > 0.8
    else:
        assert list(predicted) == [TASKS[task].labels[label] for label in truth]


@pytest.mark.parametrize("version", [1, 2])
def test_squad_is_learned_and_its_files_satisfy_a_strict_reader(tmp_path, model, version):
    write_squad(tmp_path, version, (200, 40), padding=6)
    changes = {"epochs": 5, "seq_len": 48, "predict": True, "peak_lr": 4e-3}
    results = start(f"squad{version}", tmp_path, model, tmp_path / "run", **changes)
    f1 = results["metrics"]["f1" if version == 1 else "best_f1"]  # short windows make the classifier shy
    assert f1 > results["majority"]["f1"] + 10
    paragraphs = squad_file(40, 1, version, 6)["data"][0]["paragraphs"]
    passages = {entry["id"]: p["context"] for p in paragraphs for entry in p["qas"]}
    golds = [[a["text"] for a in entry["answers"]] for p in paragraphs for entry in p["qas"]]
    texts, spans, none = (json.loads((tmp_path / "run" / f"{name}.json").read_text(encoding="utf-8"))
                          for name in ("predictions", "spans", "na_prob"))  # fmt: skip
    assert texts.keys() == spans.keys() == none.keys() == passages.keys()
    for id, passage in passages.items():
        assert spans[id] in passage and texts[id] == ("" if none[id] > 0.5 else spans[id])
    answers = [Answer(texts[id], spans[id], none[id]) for id in passages]
    assert finetune.squad_metrics(golds, answers, version == 2) == pytest.approx(results["metrics"])


def test_race_is_learned_and_its_answers_written(tmp_path, model):
    write_race(tmp_path, (60, 10, 3))
    metrics = start("race", tmp_path, model, tmp_path / "run", predict=True)["metrics"]
    assert metrics.keys() == {"accuracy", "accuracy_middle", "accuracy_high"} and metrics["accuracy"] > 0.9
    truth = ["index\tprediction"]
    for part in ("middle", "high"):
        for path in sorted((tmp_path / "RACE" / "test" / part).iterdir()):
            entry = json.loads(path.read_text())
            truth += [f"{entry['id']}-{i}\t{answer}" for i, answer in enumerate(entry["answers"])]
    assert (tmp_path / "run" / "RACE.tsv").read_text().splitlines() == truth


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1, "precision": "bf16"}, {"precision": "fp16"}])
def test_resuming_is_exact_to_the_bit(tmp_path, model, monkeypatch, capsys, changes):
    write_glue(tmp_path, "sst-2", (100, 20, 4))
    results = start("sst-2", tmp_path, model, tmp_path / "straight", **changes)
    again = command("sst-2", tmp_path, model, tmp_path / "resumed", **changes)
    # 13 steps an epoch: 13 and 26 are ends of epochs.
    interrupt_at(monkeypatch, 3, 13, 26, 51)
    for _ in range(4):
        ends(finetune.main, again, 128 + signal.SIGTERM, capsys)
    finish(again)
    resumed = json.loads((tmp_path / "resumed" / "results.json").read_text())
    assert {name for name in results if results[name] != resumed[name]} <= {"out", "run", "seconds"}
    assert same(weights(tmp_path / "straight"), weights(tmp_path / "resumed"))


def test_a_run_ends_when_it_no_longer_improves_is_its_best_model_and_is_not_repeated(tmp_path, model, capsys):
    write_glue(tmp_path, "sst-2", (100, 20, 4))
    out, changes = tmp_path / "run", {"keep": 3, "epochs": 30, "patience": 2}
    results = start("sst-2", tmp_path, model, out, **changes)
    accuracies = [line["accuracy"] for line in train.read_log(out) if "accuracy" in line]
    best = accuracies.index(max(accuracies))
    assert len(accuracies) == best + 1 + 2 < 30 and results["metrics"]["accuracy"] == accuracies[best]
    assert results["best_step"] == 13 * (best + 1)  # 13 steps an epoch
    assert not list(out.glob("checkpoint-*")) and not list(out.glob("optimizer*"))
    holds_no_pickle(out)
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert start("sst-2", tmp_path, model, out, **changes) == results
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    again = command("sst-2", tmp_path, model, out, **changes, peak_lr=1e-3)
    refused(again, "holds a run with peak_lr 0.003, this one has 0.001", capsys)
    write_glue(tmp_path, "sst-2", (90, 20, 4))
    refused(command("sst-2", tmp_path, model, out, **changes), "holds a run with train examples", capsys)


def test_a_metric_that_is_undefined_in_every_epoch_leaves_a_model_all_the_same(tmp_path, model):
    place = write_glue(tmp_path, "sts-b")
    lines = [HEADERS["sts-b"].replace("|", "\t"), *["x\t" * 9 + "2.0"] * 5]
    (place / "dev.tsv").write_text("\n".join(lines))
    results = start("sts-b", tmp_path, model, tmp_path / "run", epochs=2)
    assert results["metrics"] == {"pearson": None, "spearman": None}
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_two_ranks_and_smaller_micro_batches_change_nothing_but_rounding(tmp_path, model):
    write_squad(tmp_path, 2, (61, 17))  # the last micro-batches leave one of the ranks without an example
    changes = {"epochs": 2, "peak_lr": 1e-3}
    alone = start("squad2", tmp_path, model, tmp_path / "1", **changes)
    arguments = command("squad2", tmp_path, model, tmp_path / "2", **changes, micro_batch_size=2)
    run(*torchrun(2), "finetune.py", *arguments, "--predict")
    together = json.loads((tmp_path / "2" / "results.json").read_text())
    assert together["metrics"] == pytest.approx(alone["metrics"], abs=1e-4)
    assert close_weights(tmp_path / "1", tmp_path / "2", 1e-4)
    assert (tmp_path / "2" / "na_prob.json").exists()


# ----------------------------------------------------------------------------------------------------------
# Starting points
# ----------------------------------------------------------------------------------------------------------


def built(task: str, model, **changes) -> roberta.RobertaModelBase:
    return finetune.build_model(head_for(task, model=str(model), **changes))


@pytest.mark.parametrize("trained, task, kept", [
    ("mnli", "mnli", True), ("mnli", "rte", False), ("mnli", "race", False), ("qnli", "cola", False),
    ("qnli", "rte", True), ("cola", "sst-2", True), ("sts-b", "sts-b", True), ("race", "race", True),
    ("squad1", "race", False), ("squad1", "squad1", True), ("squad1", "squad2", True),
    ("squad2", "squad1", True), ("squad2", "squad2", True),
])  # fmt: skip
def test_the_encoder_is_kept_and_a_head_where_the_labels_are_spelt_alike(
        tmp_path, model, capsys, trained, task, kept):
    """QNLI's head has the shape of CoLA's, but what it has learned is about other labels."""
    before = built(trained, model, seed=1)
    torch.nn.init.normal_(next(before.roberta.parameters()))
    before.save_pretrained(tmp_path)
    assert "a fresh head: the model is a RobertaForMaskedLM\n" in capsys.readouterr().out
    after = built(task, tmp_path)
    printed = capsys.readouterr().out
    assert f"encoder from {tmp_path}, {'its head, too' if kept else 'a fresh head: '}" in printed
    known = before.state_dict() if kept else before.roberta.state_dict(prefix="roberta.")
    expected = built(task, model).state_dict() | known
    assert all(torch.equal(weight, expected[key]) for key, weight in after.state_dict().items())


def test_scratch_is_random_and_seeds_differ_in_the_head(model):
    pretrained = next(roberta.RobertaModel.from_pretrained(model).parameters())
    a, b, scratch = built("rte", model), built("rte", model, seed=1), built("rte", model, scratch=True)
    same = [torch.equal(next(other.parameters()), pretrained) for other in (a, b, scratch)]
    assert same == [True, True, False]
    assert not torch.equal(a.classifier.dense.weight, b.classifier.dense.weight)
    assert torch.equal(a.classifier.dense.weight, built("rte", model).classifier.dense.weight)
    assert built("rte", model, dropout=0.3).config.hidden_dropout_prob == 0.3


# ----------------------------------------------------------------------------------------------------------
# Sweeps, ensembles, evaluation
# ----------------------------------------------------------------------------------------------------------

def test_a_sweep_interrupted_or_not_reports_median_and_spread_of_its_best_setting(
        tmp_path, model, monkeypatch, capsys):
    write_glue(tmp_path, "sst-2")
    sweep = {"sweep": True, "sweep_batch_sizes": [8], "sweep_lrs": [1e-3, 3e-3], "seeds": 3, "epochs": 2}
    results = start("sst-2", tmp_path, model, tmp_path / "straight", **sweep)
    assert len(results["runs"]) == 2 * 3 and results["seeds"] == 3
    accuracies = {}
    for entry in results["runs"]:
        assert json.loads((tmp_path / "straight" / entry["run"] / "results.json").read_text()) == entry
        accuracies.setdefault(entry["peak_lr"], []).append(entry["metrics"]["accuracy"])
    low, median, high = max((sorted(values) for values in accuracies.values()), key=lambda values: values[1])
    assert sorted(accuracies[results["peak_lr"]]) == [low, median, high]
    assert results["metrics"]["accuracy"] == median and results["spread"]["accuracy"] == [low, high]
    table = (tmp_path / "straight" / "results.md").read_text()
    assert f"| {100 * median:.1f} ({100 * low:.1f} to {100 * high:.1f}, 3 seeds) |" in table
    assert "| 94.8 | 96.4 |" in table

    measure, calls = finetune.measure, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) in (3, 7):  # in the second and in the third of six runs of two epochs
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(finetune, "measure", interrupted)
    again = command("sst-2", tmp_path, model, tmp_path / "broken", **sweep)
    for _ in range(2):
        ends(finetune.main, again, 128 + signal.SIGINT, capsys)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "broken").glob("*/results.json")}
    assert 1 < len(done) < 6
    finish(again)
    assert (tmp_path / "broken" / "results.md").read_text() == table
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())  # not run again


def test_a_sweep_of_a_single_setting_takes_it(tmp_path, model):
    write_glue(tmp_path, "sst-2")
    sweep = {"sweep": True, "sweep_batch_sizes": [4], "sweep_lrs": [2e-3], "seeds": 1, "epochs": 1}
    results = start("sst-2", tmp_path, model, tmp_path / "out", **sweep)
    assert (results["batch_size"], results["peak_lr"]) == (4, 2e-3)


@pytest.mark.parametrize("task", ["rte", "squad2"])
def test_an_ensemble_averages_probabilities(tmp_path, model, tokenizer, task):
    write_glue(tmp_path, "rte", (64, 30, 4))
    write_squad(tmp_path, 2)
    sweep = start(task, tmp_path, model, tmp_path / "runs", seeds=3, epochs=2)
    runs = [str(tmp_path / "runs" / entry["run"]) for entry in sweep["runs"]]
    arguments = ["--task", task, "--data", tmp_path, "--out", tmp_path / "mean", "--predict", "--ensemble"]
    finish([*arguments, *runs])
    results = json.loads((tmp_path / "mean" / "results.json").read_text())
    head = head_for(task, seq_len=128, data=str(tmp_path))
    dev = finetune.load_split(head, "dev", tokenizer)
    mean = sum(finetune.predict(roberta.open_model(path), head, dev, ALONE)[0] for path in runs) / 3
    decided = head.decide(mean, dev.items, dev.examples)
    assert results["metrics"] == pytest.approx(finetune.metrics_of(TASKS[task], decided, dev.examples))
    assert results["models"] == runs


def test_what_is_evaluated_must_have_the_tasks_head_and_be_finished(tmp_path, model, capsys):
    write_glue(tmp_path, "rte")
    write_glue(tmp_path, "wnli")
    trained = start("rte", tmp_path, model, tmp_path / "one", epochs=2)
    measured = start("rte", tmp_path, tmp_path / "one", tmp_path / "again", eval_only=True)
    assert measured["metrics"] == trained["metrics"] and measured["majority"] == trained["majority"]
    for task, other in (("rte", model), ("wnli", tmp_path / "one")):
        arguments = command(task, tmp_path, other, tmp_path / f"no-{task}", eval_only=True)
        refused(arguments, f"has no head for {task}", capsys)
    arguments = command("rte", tmp_path, model, tmp_path / "mean", ensemble=[model])
    refused(arguments, "is no finished run", capsys)
    # A directory belongs to one kind of command.
    start("rte", tmp_path, model, tmp_path / "two", epochs=1, seeds=2)
    for out, changes in (("one", {"ensemble": [tmp_path / "one"]}), ("one", {"seeds": 2}), ("two", {})):
        arguments = command("rte", tmp_path, model, tmp_path / out, epochs=1, **changes)
        refused(arguments, " holds a run with kind ", capsys)


def test_a_broken_test_set_comes_to_light_before_training(tmp_path, model, capsys):
    place = write_glue(tmp_path, "rte")
    replace_line(place / "test.tsv", 3, "broken")
    arguments = command("rte", tmp_path, model, tmp_path / "run", predict=True, skip_bad_rows=True)
    refused(arguments, "test.tsv: line 3: a text or label is missing", capsys)
    assert not (tmp_path / "run" / "run.json").exists()


def test_help_shows_the_tasks_defaults():
    printed = run("finetune.py", "--task", "squad1", "--help").stdout
    assert "[Table 10] (default: 1.5e-05)" in " ".join(printed.split())


def test_table_10():
    for task, values in (("rte", (32, 2e-5, 0.1, 10)), ("squad1", (48, 1.5e-5, 0.01, 2)),
                         ("squad2", (48, 1.5e-5, 0.01, 2)), ("race", (16, 1e-5, 0.1, 4))):  # fmt: skip
        c = finetune.parse(["--task", task, "--data", "x", "--model", "x"])
        assert (c.batch_size, c.peak_lr, c.weight_decay, c.epochs) == values and c.warmup_ratio == 0.06
    sweep = finetune.settings_of(finetune.parse("--task rte --data x --model x --sweep".split()))
    assert len({c.out for c in sweep}) == len(sweep) == 6 * 5 and {c.seed for c in sweep} == set(range(5))
    assert {c.batch_size for c in sweep} == {16, 32} and {c.peak_lr for c in sweep} == {1e-5, 2e-5, 3e-5}
