"""data.py against worked examples, brute force, other people's constants, and attempts to break it."""

import gzip
import hashlib
import json
import lzma
import os
import random
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from helpers import ROOT, make_documents, run

import data

# ----------------------------------------------------------------------------------------------------------
# Documents and sentences
# ----------------------------------------------------------------------------------------------------------


def test_text_documents_are_separated_by_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\n\n \n\nthree\nfour é".encode())
    assert list(data.read_documents(path)) == ["one\ntwo", "three\nfour é"]


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_compressed_text_and_jsonl(tmp_path, suffix, opener):
    with opener(tmp_path / f"a.jsonl{suffix}", "wb") as file:
        file.write(json.dumps({"id": 1, "text": "x\n\ny"}).encode() + b"\n\n" + b'{"text": "z"}\n')
    with opener(tmp_path / f"b.txt{suffix}", "wb") as file:
        file.write(b"p\n\nq")
    parts = data.find_parts([tmp_path])
    assert [d for part in parts for d in data.read_documents(*part)] == ["x\n\ny", "z", "p", "q"]


def test_a_long_text_without_blank_lines_is_cut_at_line_ends(tmp_path):
    lines = [f"line {i} " + "x" * 1000 for i in range(500)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    documents = list(data.read_documents(tmp_path / "a.txt"))
    assert len(documents) > 3 and "\n".join(documents).split("\n") == lines
    assert max(map(len, documents)) < data.MAX_DOCUMENT_BYTES + 2000


@pytest.mark.parametrize("part_bytes", [100, 999, 10_000])
def test_parts_of_a_file_hold_the_same_documents_as_the_file(tmp_path, part_bytes):
    documents = make_documents(60)
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    for name in ("a.txt", "b.jsonl"):
        parts = data.find_parts([tmp_path / name], part_bytes)
        assert len(parts) > 1
        assert [d for part in parts for d in data.read_documents(*part)] == documents


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\n\nbad \xff\n", "a.txt: line 3, at byte 6, is not UTF-8"),
        ("a.jsonl", b'{"text": "ok"}\nnot json\n', "a.jsonl: line 2, at byte 15, is no JSON"),
        ("a.jsonl", b'{"body": "ok"}\n', 'is no object with a "text" string'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair"),
        ("a.txt.gz", gzip.compress(b"text " * 1000)[:-20], "damaged or cut short"),
        ("a.txt.xz", lzma.compress(b"text " * 1000)[:-20], "damaged or cut short"),
    ],
)
def test_bad_text_is_named_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(data.read_documents(tmp_path / name))


def test_docstrings_are_read_and_never_run(tmp_path):
    source = tmp_path / "module.py"
    code = (
        '"""Top."""\nraise SystemExit\nclass A:\n    """Of A.\n\n    More.\n    """\n    def f(): "Of f."\n'
    )
    source.write_text(code)
    assert data.docstrings(source) == "Top.\n\nOf A.\n\nMore.\n\nOf f."
    source.write_text('"""unfinished')
    assert data.docstrings(source) == ""
    files = data.documentation_files()
    assert any(file.name == "argparse.py" for file in files) and any("torch" in file.parts for file in files)


def test_sentences_joined_are_the_document():
    prose = 'Dr. Who? "Yes!" he said. (Really.) 3.5 is e.g. a number... Fine'
    for text in [prose, "a\n\nb\n \nc. D\n\n\n", "", "x", "\n\n"]:
        assert "".join(data.split_sentences(text)) == text
    assert data.split_sentences("A title\n\nText here. More.") == ["A title", "\n\nText here.", " More."]


# ----------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------


def test_bpe_on_the_textbook_example():
    """aaabdaaabac: aa is most frequent (4 overlapping times); then ab and aa+a tie: the lower unit wins."""
    assert data.train_bpe(["aaabdaaabac"], 261 + 3).merges == [("a", "a"), ("a", "b"), ("aa", "ab")]


def test_bpe_never_merges_across_pretokens_and_stops_when_no_pair_repeats():
    tokenizer = data.train_bpe(["ab ab ab"], 1000)
    assert tokenizer.merges == [("a", "b"), ("Ġ", "ab")]
    assert tokenizer.vocab_size == 263


def test_bpe_with_several_processes_is_the_same():
    documents = make_documents(200) * 2
    alone = data.train_bpe(documents, 600)
    assert alone.merges == data.train_bpe(iter(documents), 600, workers=2).merges
    assert alone.vocab_size == 600


def test_tiktoken_segments_training_words_as_the_trainer_did():
    """The merges applied to words one after the other, against tiktoken, which goes by rank."""
    documents = make_documents(100)
    tokenizer = data.train_bpe(documents, 700)
    for word in list(data.count_pretokens(documents))[:400]:
        pieces = [data.spell(bytes([b])) for b in word.encode()]
        for left, right in tokenizer.merges:
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == (left, right):
                    pieces[i : i + 2] = [left + right]
                i += 1
        assert tokenizer.encode(word) == [tokenizer.vocab[piece] for piece in pieces]


def test_too_small_a_vocabulary():
    with pytest.raises(ValueError, match="vocab_size 200 is too small: .* make 261"):
        data.train_bpe(["text"], 200)


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_bpe([*make_documents(100), "Ümläut é日本語 🙂👍🏽 \r\n\t don't it's"] * 2, 500)


STRINGS = [
    "",
    " ",
    "a",
    "Hello, world!",
    "it's don't WE'LL",
    "é日本語 Ω",
    "🙂👍🏽👨‍👩‍👧",
    "a\0b\0",
    "line\r\nline\r\n\r\n",
    "\t\t  x   \n",
    "</s> <mask> <s><pad>",
    "\u0085\u2028 \u00a0x",
    "\ufeffa",
    "0123456789" * 3,
    "\x7f\x80ÿ",
    "a" * 100_000,
    " " * 100_000 + "b",
    "\n" * 50_000,
    "!?" * 50_000,
]


@pytest.mark.parametrize("text", STRINGS, ids=lambda text: repr(text[:12]))
def test_any_string_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(4 <= i < tokenizer.mask_id for i in ids)  # the user's text never becomes a special token


def test_random_strings_survive(tokenizer):
    rng = random.Random(0)
    alphabet = [*map(chr, range(0x250)), *" \n\t'sdtlvem0\u3000日🙂\u200d\U0010ffff" * 8]
    for _ in range(2000):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 40)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_white_space_that_overflows_tiktokens_regex_engine(tokenizer):
    """A million blanks before a word: encoded in pieces, with the result that shorter runs have."""
    for blank in " \n":
        long, short = (tokenizer.encode("a" + blank * n + "b") for n in (1_500_000, 15))
        assert tokenizer.decode(long) == "a" + blank * 1_500_000 + "b"
        assert long[:1] + long[-2:] == short[:1] + short[-2:]


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"character 2 is '\\ud83d', a lone surrogate"):
        tokenizer.encode("ab\ud83d")


def test_id_layout(tokenizer):
    assert [tokenizer.vocab[t] for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert tokenizer.vocab["<mask>"] == tokenizer.mask_id == 499 == tokenizer.vocab_size - 1
    assert tokenizer.vocab["!"] == 4 and tokenizer.decode([0, 499, 2]) == "<s><mask></s>"


def test_tokenizer_saved_and_opened(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    opened = data.Tokenizer.from_pretrained(tmp_path)
    assert opened.vocab == tokenizer.vocab and opened.merges == tokenizer.merges
    assert opened.fingerprint == tokenizer.fingerprint


def test_fairseqs_files_open_through_the_dictionary(tmp_path):
    """The dictionary lists GPT-2's ids by frequency, here 'aa' and 'a' first, with padding entries."""
    units = {data.spell(bytes([b])): i for i, b in enumerate(data.BYTE_ORDER)}
    a, aa = units["a"], 256
    (tmp_path / "encoder.json").write_text(json.dumps(units | {"aa": aa}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na a\n", encoding="utf-8")
    order = [aa, a, *(i for i in range(256) if i != a)]
    (tmp_path / "dict.txt").write_text("".join(f"{i} 9\n" for i in order) + "madeupword0000 0\n")
    tokenizer = data.Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("aaa") == [4, 5] and tokenizer.mask_id == 4 + 257 + 1
    assert tokenizer.decode([4, 5]) == "aaa"
    whole = (tmp_path / "dict.txt").read_text()
    for changed, message in (
        (whole.replace("\n", "\n\n", 1), "line 2 of dict.txt is empty"),
        (whole + f"{aa} 1\n", "'aa' stands twice"),
        (whole + "<mask> 1\n", "'<mask>' stands twice"),
    ):
        (tmp_path / "dict.txt").write_text(changed)
        with pytest.raises(ValueError, match=message):
            data.Tokenizer.from_pretrained(tmp_path)


def test_bad_tokenizer_files(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no tokenizer here"):
        data.Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    whole, half = vocab.read_text(), merges.read_text()[: merges.stat().st_size // 2].rsplit("\n", 1)[0]
    merges.write_text(half)
    with pytest.raises(ValueError, match="they do not say the same"):
        data.Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no merge makes .* the merges are cut short"):
        data.Tokenizer.from_pretrained(tmp_path)
    for changed, message in (
        ({t: i for t, i in tokenizer.vocab.items() if t != "<mask>"}, "<mask> has id None"),
        (tokenizer.vocab | {"<mask>": 2_000_000_000}, "must be 0 to"),
        (tokenizer.vocab | {"<mask>": "1"}, "must be 0 to"),
        (tokenizer.vocab | {"<mask>": -1}, "must be 0 to"),
        ([1], "vocab.json: damaged, no object but list"),
    ):
        vocab.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"^{tmp_path}.*{message}"):
            data.Tokenizer.from_pretrained(tmp_path)
    vocab.write_text("{")
    with pytest.raises(ValueError, match="vocab.json: damaged"):
        data.Tokenizer.from_pretrained(tmp_path)
    vocab.write_text(whole)
    merges.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=f"^{tmp_path}.*merges.txt"):
        data.Tokenizer.from_pretrained(tmp_path)
    merges.write_text("\n".join(map(" ".join, tokenizer.merges)))
    (tmp_path / "added_tokens.json").write_text('{"<ent>": 900}')
    with pytest.raises(ValueError, match="tokens were added, such as '<ent>'"):
        data.Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks? 'zz'|make 'zz'"):
        data.Tokenizer(tokenizer.vocab, [("z", "z")])


def test_documents_are_encoded_whole_and_sentences_found_again(tokenizer):
    for text in [*make_documents(30, seed=5), "Ein Satz. Ünd noch einer! 日本。 Ja?\n\nNeu. Ende"]:
        ids, ends = data.encode_document(text, tokenizer)
        assert ids.tolist() == tokenizer.encode(text)
        pieces = [tokenizer.decode(ids[a:b]) for a, b in zip([0, *ends], ends)]
        assert pieces == data.split_sentences(text)


# ----------------------------------------------------------------------------------------------------------
# prepare
# ----------------------------------------------------------------------------------------------------------


def contents(directory):
    """Returns what each file holds, as a digest: files that differ are then named in one line each."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files}


def write_corpus(directory, files=6, documents=40):
    directory.mkdir(exist_ok=True)
    for i in range(files):
        (directory / f"{i}.txt").write_text("\n\n".join(make_documents(documents, seed=i)))
    return directory


def arguments_of(corpus, out, workers=1):
    """The same as `flags`, as command-line arguments."""
    words = f"prepare --vocab-size 400 --held-out 0.1 --workers {workers}".split()
    return [*words, "--corpus", str(corpus), "--out", str(out)]


def flags(corpus, out, **more):
    config = data.PrepareConfig(corpus=(str(corpus),), out=str(out), vocab_size=400, held_out=0.1, workers=1)
    return data.dataclasses.replace(config, **more)


def test_prepare_keeps_every_document_once_on_one_side(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    repeated = make_documents(40, seed=0)[:7]
    (corpus / "9.txt").write_text("\n\n".join(repeated))
    out = data.prepare(flags(corpus, tmp_path / "out"))
    train, held_out = data.Corpus(out), data.Corpus(out, "heldout")
    assert train.manifest["counts"]["duplicate_documents_dropped"] == 7
    found = {}
    for split in (train, held_out):
        found[split.split] = []
        for shard in split.shards:
            for a, b in zip([0, *shard.documents], shard.documents):
                found[split.split].append(train.tokenizer.decode(shard.tokens[a:b].tolist()))
    everything = [d for i in range(6) for d in make_documents(40, seed=i)]
    assert sorted(found["train"] + found["heldout"]) == sorted(everything)
    assert not set(found["train"]) & set(found["heldout"]) and 10 <= len(found["heldout"]) <= 40
    assert train.unigram.sum() == train.num_tokens
    counts = Counter(train.read(0, train.shards[0].tokens.size).tolist())
    assert all(train.unigram[i] >= n for i, n in counts.items())


def test_any_number_of_workers_and_ranks_gives_the_same_bytes(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    alone = contents(data.prepare(flags(corpus, tmp_path / "alone")))
    assert alone == contents(data.prepare(flags(corpus, tmp_path / "two", workers=2)))
    command = [sys.executable, "data.py", *arguments_of(corpus, tmp_path / "ranks", workers=1)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | {"RANK": str(r), "WORLD_SIZE": "2"})
        for r in range(2)
    ]
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    assert alone == contents(tmp_path / "ranks")


def test_workers_die_with_a_killed_parent(tmp_path):
    code = (
        "import data, os, time\n"
        "def work(i): os.write(1, f'{os.getpid()}\\n'.encode()); time.sleep(60)\n"
        "list(data.run_jobs(work, [(i,) for i in range(2)], 2))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            break
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_other_settings_in_the_same_place_are_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    out = data.prepare(flags(corpus, tmp_path / "out"))
    before = contents(out)
    data.prepare(flags(corpus, out))  # the same again is fine
    with pytest.raises(ValueError, match="tokenizer 400, this call asks for 500; choose another --out"):
        data.prepare(flags(corpus, out, vocab_size=500))
    (corpus / "0.txt").write_text("other text")
    with pytest.raises(ValueError, match="was prepared from other files, or they have changed since"):
        data.prepare(flags(corpus, out))
    assert contents(out) == before


def test_a_given_tokenizer_is_used(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = data.prepare(
        flags(write_corpus(tmp_path / "c"), tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    )
    assert data.Corpus(out).tokenizer.fingerprint == tokenizer.fingerprint


def test_a_preparation_that_came_to_nothing_does_not_stand_in_the_way(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"bad \xff")
    with pytest.raises(ValueError, match="0 different documents"):
        data.prepare(flags(path, tmp_path / "out"))
    path.write_text("\n\n".join(make_documents(30)))
    assert data.Corpus(data.prepare(flags(path, tmp_path / "out"))).num_tokens > 0


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("", {}, "0 different documents"),
        ("only one", {}, "1 different documents"),
        ("a\n\nb", {"held_out": 1.5}, "held_out 1.5 must lie between 0 and 1"),
        ("a\n\nb", {"vocab_size": 17}, "vocab_size 17 is too small"),
        ("a\n\nb", {"tokenizer": "nowhere"}, "no tokenizer here"),
    ],
)
def test_bad_input_to_prepare(tmp_path, text, more, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        data.prepare(flags(tmp_path / "a.txt", tmp_path / "out", **more))


def test_prepare_command_line_errors_are_one_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    for corpus in (tmp_path / "missing", tmp_path / "a.txt"):
        result = run("data.py", "prepare", "--corpus", corpus, "--out", tmp_path / "out", "--workers", "2")
        assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith("error: ") and str(corpus) in result.stdout + result.stderr


def test_a_full_disk_is_one_clear_line_and_nothing_is_lost(tmp_path):
    """A limit on the size of files stands in for the disk's end."""
    corpus = write_corpus(tmp_path / "corpus", files=2, documents=400)
    code = (
        "import resource, signal, sys, data; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); data.main(sys.argv[1:])"
    )
    arguments = arguments_of(corpus, tmp_path / "out")
    result = run("-c", code, *arguments)
    assert result.returncode == 1 and "File too large" in result.stderr and result.stderr.count("\n") == 1
    assert run("data.py", *arguments).returncode == 0
    assert contents(tmp_path / "out") == contents(data.prepare(flags(corpus, tmp_path / "straight")))


def test_a_damaged_prepared_directory_is_refused(tmp_path):
    out = data.prepare(flags(write_corpus(tmp_path / "corpus"), tmp_path / "out"))
    shard, manifest = out / "train-00000.tokens.bin", out / "manifest.json"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=f"{len(whole) - 2} bytes, not the manifest's {len(whole)}"):
        data.Corpus(out)
    shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match="train-00000.tokens.bin: altered since it was written"):
        data.Corpus(out).verify()
    shard.write_bytes(whole)
    data.Corpus(out).verify()
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 7', 1))
    with pytest.raises(ValueError, match="format version 7, this program reads 1"):
        data.Corpus(out)
    manifest.write_text(manifest.read_text().replace('"format_version": 7', '"format_version": 1', 1))
    data.train_bpe(make_documents(20), 300).save_pretrained(out / "tokenizer")
    with pytest.raises(ValueError, match="the shards were made with"):
        data.Corpus(out)
    with pytest.raises(ValueError, match="no manifest.json"):
        data.Corpus(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# Random draws
# ----------------------------------------------------------------------------------------------------------


def test_draw_is_splitmix64():
    """The published generator's first output from seed 0, and draws that look uniform."""
    assert int(data.draw(0)) == 0xE220A8397B1DCDAF
    values = data.draw(3, 1, np.arange(100_000)) / 2.0**64
    assert abs(values.mean() - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5
    assert not np.array_equal(data.draw(1, 2), data.draw(2, 1))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_permutation(size):
    orders = [tuple(data.permute(np.arange(size), size, seed=s, epoch=e)) for s in (0, 1) for e in (0, 1)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size < 7 or len(set(orders)) == 4
    some = np.arange(size)[::3]
    assert data.permute(some, size, 0, 0).tolist() == list(orders[0])[::3]


def test_permute_leaves_no_trace_of_the_order():
    order = data.permute(np.arange(5000), 5000, seed=0, epoch=0)
    assert abs(np.corrcoef(np.arange(5000), order)[0, 1]) < 5 / 5000**0.5
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / 5000**0.5


# ----------------------------------------------------------------------------------------------------------
# pack
# ----------------------------------------------------------------------------------------------------------


def random_shard(rng, documents=50, longest=30):
    sizes = [[rng.randint(1, longest) for _ in range(rng.randint(1, 12))] for _ in range(documents)]
    sentences = np.cumsum([size for document in sizes for size in document])
    return sentences, np.cumsum([sum(document) for document in sizes])


def greedy(sentences, documents, room, across):
    """pack, one sentence at a time: the definition."""
    runs, begin, end, separators = [], 0, 0, 0
    ends = set(documents.tolist())
    for sentence_begin, sentence_end in zip([0, *sentences], sentences):
        for piece_begin in range(sentence_begin, sentence_end, room):
            piece_end = min(piece_begin + room, sentence_end)
            new_document = end in ends and end > begin
            extra = int(new_document and across)
            if end > begin and (
                piece_end - begin + separators + extra > room or (new_document and not across)
            ):
                runs.append([begin, end])
                begin, separators, extra = end, 0, 0
            end, separators = piece_end, separators + extra
    return [*runs, [begin, end]]


@pytest.mark.parametrize("seed", range(20))
def test_pack_equals_its_definition(seed):
    rng = random.Random(seed)
    sentences, documents = random_shard(rng)
    seq_len = rng.randint(6, 60)
    for name, room, across in (
        ("full-sentences", seq_len - 2, True),
        ("doc-sentences", seq_len - 2, False),
        ("segment-pair", (seq_len - 4) // 2, False),
    ):
        found = data.pack(sentences, documents, seq_len, name)
        expected = greedy(sentences, documents, room, across)
        assert found.tolist() == [end - begin for begin, end in expected], name
        assert expected[-1][1] == sentences[-1] == found.sum(dtype=int)  # all tokens, once


def test_pack_in_stretches_loses_nothing(monkeypatch):
    monkeypatch.setattr(data, "STRETCH", 300)
    sentences, documents = random_shard(random.Random(1))
    found = data.pack(sentences, documents, 40, "full-sentences")
    assert found.sum(dtype=int) == sentences[-1] and 0 < found.min() <= found.max() <= 38


def test_sequences_are_too_short_for_text():
    with pytest.raises(ValueError, match="seq_len 2 leaves no room"):
        data.pack(np.array([3]), np.array([3]), 2, "full-sentences")


@pytest.mark.parametrize("input_format", ["full-sentences", "doc-sentences"])
def test_an_epoch_holds_the_corpus_exactly(prepared, input_format):
    corpus = data.Corpus(prepared)
    sequences = data.Sequences(corpus, input_format, 48)
    epoch, seen = sequences.epoch(0, 0), Counter()
    for i in range(len(epoch)):
        ids, _ = sequences.token_ids(epoch, i)
        assert len(ids) <= 48 and ids[0] == data.BOS and ids[-1] == data.EOS
        inside = ids[1:-1]
        assert input_format == "full-sentences" or (inside > 3).all()
        seen.update(inside[inside > 3].tolist())
        separators = np.flatnonzero(inside == data.EOS)
        a, b = epoch.segments(i)[0]
        ends = np.concatenate([shard.documents + shard.base for shard in corpus.shards])
        assert len(separators) == ((a < ends) & (ends < b)).sum()
    assert seen == Counter(np.concatenate([shard.tokens for shard in corpus.shards]).tolist())


@pytest.mark.parametrize("input_format", ["segment-pair", "sentence-pair"])
def test_pairs_feed_every_sentence_and_half_are_negatives(prepared, input_format):
    corpus = data.Corpus(prepared)
    sequences = data.Sequences(corpus, input_format, 64)
    ends = np.concatenate([shard.documents + shard.base for shard in corpus.shards])
    pairings = set()
    for epoch_number in range(3):
        epoch = sequences.epoch(0, epoch_number)
        segments = epoch.segments(np.arange(len(epoch)))
        first, second = (np.searchsorted(ends, r[:, 0], side="right") for r in segments)
        same = first == second
        follows = segments[0][:, 1] == segments[1][:, 0]
        assert (same == (epoch.is_random == 0)).all() and (follows[same]).all()
        assert abs(epoch.is_random.mean() - 0.5) < 0.03
        fed = np.concatenate([epoch.first, epoch.second])
        assert set(fed.tolist()) == set(range(len(sequences.bounds) - 1))
        assert len(fed) - len(set(fed)) <= 1  # at most one was fed twice, for want of a partner
        pairings.add(epoch.first.tobytes() + epoch.second.tobytes())
        for i in range(0, len(epoch), 17):
            ids, second_at = sequences.token_ids(epoch, i)
            assert len(ids) <= 64 and ids[second_at - 1] == ids[second_at] == data.EOS
    assert len(pairings) == 3


AWKWARD = [[0, 0, 0, 0, 0, 1], [0, 1], [0, 0, 0, 1, 1, 2], [0] * 30 + [1], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("documents", AWKWARD)
def test_pairs_of_awkward_corpora(documents):
    documents = np.array(documents)
    for epoch in range(5):
        first, second, is_random = data.pair_up(documents, 0, epoch)
        assert set(first) | set(second) == set(range(len(documents)))
        assert ((documents[first] != documents[second]) == is_random).all()
        assert (second[is_random == 0] == first[is_random == 0] + 1).all()


# ----------------------------------------------------------------------------------------------------------
# Masking
# ----------------------------------------------------------------------------------------------------------

V = 1000


def rows(count=64, length=128, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, V - 1, (count, length))
    ids[:, 0] = data.BOS
    for row in ids:
        end = rng.integers(2, length)
        row[end], row[end + 1 :] = data.EOS, data.PAD
    return ids


def test_exactly_the_rounded_share_is_predicted_and_no_special_token():
    ids = rows(256)
    masked, labels = data.mask_tokens(ids, np.arange(256), 0, seed=0, vocab_size=V)
    for row, label in zip(ids, labels):
        assert (label != -100).sum() == round(0.15 * (row > 3).sum())
    assert (labels[ids < 4] == -100).all() and (masked[ids < 4] == ids[ids < 4]).all()
    assert (labels[labels != -100] == ids[labels != -100]).all()
    assert (masked[labels == -100] == ids[labels == -100]).all()


def test_80_10_10_and_uniform_positions():
    ids = np.full((2000, 100), 5)
    masked, labels = data.mask_tokens(ids, np.arange(2000), 0, seed=1, vocab_size=V)
    chosen = masked[labels != -100]
    n = len(chosen)
    assert n == 2000 * 15
    random_ones = chosen[(chosen != V - 1) & (chosen != 5)]
    for found, share in ((chosen == V - 1, 0.8), (chosen == 5, 0.1 + 0.1 / (V - 5))):
        assert abs(found.mean() - share) < 5 * (share * (1 - share) / n) ** 0.5
    assert random_ones.min() >= 4 and random_ones.max() <= V - 2 and len(set(random_ones.tolist())) > 900
    by_position = (labels != -100).mean(0)
    assert (abs(by_position - 0.15) < 5 * (0.15 * 0.85 / 2000) ** 0.5).all()


def test_masks_depend_on_seed_epoch_sequence_and_position_alone():
    ids = rows()
    both = data.mask_tokens(ids, np.arange(64), 3, seed=5, vocab_size=V)
    order = np.random.default_rng(0).permutation(64)[:20]
    for whole, part in zip(both, data.mask_tokens(ids[order], order, np.full(20, 3), seed=5, vocab_size=V)):
        assert np.array_equal(whole[order], part)
    for other in (dict(seed=6, epoch=3), dict(seed=5, epoch=4)):
        masks = data.mask_tokens(ids, np.arange(64), other["epoch"], seed=other["seed"], vocab_size=V)[1]
        assert not np.array_equal(masks, both[1])


def test_static_masks_return_after_ten_epochs_and_dynamic_ones_never():
    ids = rows()

    def mask(epoch, kind):
        return data.mask_tokens(ids, np.arange(64), epoch, seed=0, vocab_size=V, masking=kind)[1]

    static = [mask(epoch, "static") for epoch in range(20)]
    assert all(np.array_equal(static[e], static[e + 10]) for e in range(10))
    assert len({m.tobytes() for m in static}) == 10
    assert np.array_equal(mask(4, "static"), mask(4, "dynamic"))
    assert len({mask(epoch, "dynamic").tobytes() for epoch in range(20)}) == 20


# ----------------------------------------------------------------------------------------------------------
# Order and batches
# ----------------------------------------------------------------------------------------------------------


def spy(batches):
    """Makes `assemble` return which sequences it was asked for."""
    batches.assemble = lambda index, epochs: list(zip(index.tolist(), epochs.tolist()))
    return batches


@pytest.mark.parametrize("input_format", data.typing.get_args(data.InputFormat))
@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 3), (2, 6), (3, 2), (4, 1)])
def test_every_sequence_once_an_epoch_whatever_the_ranks(prepared, input_format, world_size, micro):
    sequences = data.Sequences(data.Corpus(prepared), input_format, 64)

    def make(rank, world, micro):
        options = {"batch_size": 12, "micro_batch_size": micro, "seed": 3, "rank": rank, "world_size": world}
        return spy(data.Batches(sequences, **options))

    alone, ranks = make(0, 1, 12), [make(rank, world_size, micro) for rank in range(world_size)]
    seen = Counter()
    size = len(sequences.epoch(3, 0))
    for step in range(-(-2 * size // 12) if alone.fixed else 2 * alone.steps_per_epoch):
        expected = [pair for batch in alone.step(step).batches for pair in batch]
        parts = [rank.step(step) for rank in ranks]
        assert all(len(part.batches) == 12 // (world_size * micro) for part in parts)
        assert sorted(pair for part in parts for batch in part.batches for pair in batch) == sorted(expected)
        assert {(part.num_predictions, part.num_sequences) for part in parts} == {alone.step(step)[2:]}
        seen.update(expected)
    assert all(seen[i, epoch] == 1 for i in range(size) for epoch in (0, 1))
    assert max(seen.values()) == 1


@pytest.mark.parametrize("input_format", ["doc-sentences", "sentence-pair"])
def test_short_sequences_make_enlarged_batches_of_equal_tokens(prepared, input_format):
    sequences = data.Sequences(data.Corpus(prepared), input_format, 128)
    batches = data.Batches(sequences, batch_size=16, micro_batch_size=16, seed=0)
    steps = [batches.step(step) for step in range(batches.steps_per_epoch)]
    tokens = [sum(batch.num_tokens for batch in step.batches) for step in steps]
    assert max(tokens) - min(tokens) < 0.3 * 16 * 128
    assert abs(np.mean(tokens) / (16 * 128) - 1) < 0.2
    assert all(step.num_sequences > 16 for step in steps)


@pytest.mark.parametrize("input_format", data.typing.get_args(data.InputFormat))
def test_batches_say_what_they_hold(prepared, input_format):
    corpus = data.Corpus(prepared)
    batches = data.Batches(data.Sequences(corpus, input_format, 64), batch_size=8, micro_batch_size=4, seed=0)
    step = batches.step(5)
    assert sum((batch.labels >= 0).sum() for batch in step.batches) == step.num_predictions
    for batch in step.batches:
        rows, width = batch.input_ids.shape
        assert batch.num_tokens == batch.attention_mask.sum() == (batch.input_ids != data.PAD).sum()
        real = batch.labels >= 0
        assert batch.labels[real].min() > 3 and batch.positions.max() < rows * width
        if input_format == "full-sentences":
            assert (rows, width, len(batch.labels)) == (4, 64, 4 * round(0.15 * 62))
        assert (batch.token_type_ids is None) == (batch.next_sentence_labels is None)
        assert (batch.token_type_ids is not None) == (input_format in data.PAIR_FORMATS)
    for a, b in zip(step.batches, batches.step(5).batches):
        assert np.array_equal(a.input_ids, b.input_ids)


def test_a_batch_that_does_not_divide_says_what_would(prepared):
    sequences = data.Sequences(data.Corpus(prepared), "full-sentences", 64)
    message = "12 x world_size 4 = 48 does not divide batch_size 256; try micro_batch_size 8"
    with pytest.raises(ValueError, match=message):
        data.Batches(sequences, batch_size=256, micro_batch_size=12, seed=0, world_size=4)


def test_held_out_batches_are_all_sequences_once_over_all_ranks(prepared):
    sequences = data.Sequences(data.Corpus(prepared, "heldout"), "full-sentences", 64)
    seen = []
    for rank in range(3):
        batches = spy(
            data.Batches(sequences, batch_size=12, micro_batch_size=4, seed=0, rank=rank, world_size=3)
        )
        seen += [i for batch in batches.held_out(10**6) for i, _ in batch]
    assert sorted(seen) == list(range(len(sequences.epoch(0, 0))))


def test_prefetch_keeps_order_and_passes_errors_on():
    assert list(data.prefetch(lambda i: i * i, range(50))) == [i * i for i in range(50)]

    def fail(i):
        if i == 3:
            raise KeyError("three")
        return i

    with pytest.raises(KeyError, match="three"):
        list(data.prefetch(fail, range(9)))
