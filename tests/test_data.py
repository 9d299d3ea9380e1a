"""data.py against worked examples, brute force, other people's constants, and attempts to break it."""

import bz2
import dataclasses
import gzip
import json
import lzma
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, contents, ends, make_documents, run

import data

FORMATS = data.get_args(data.InputFormat)
CONFIG = data.PrepareConfig()


def flags(corpus, out, **changes):
    config = data.PrepareConfig((str(corpus),), str(out), vocab_size=400, held_out=0.1, workers=1)
    return dataclasses.replace(config, **changes)


def arguments(corpus, out, *more):
    """The same on the command line."""
    return ["prepare", "--corpus", corpus, "--out", out, *"--vocab-size 400 --held-out 0.1".split(), *more]


# ----------------------------------------------------------------------------------------------------------
# Documents and sentences
# ----------------------------------------------------------------------------------------------------------


def documents(path, left_out):
    blocks = data.read_blocks(path)
    return [document for block in blocks for document in data.documents_of(block, CONFIG, left_out)]


def documents_of(out):
    """Returns the documents of a prepared directory, as text, by split."""
    found = {}
    for split in data.SPLITS:
        corpus = data.Corpus(out, split)
        bounds = zip([0, *corpus.documents], corpus.documents)
        found[split] = [corpus.tokenizer.decode(corpus.tokens[a:b]) for a, b in bounds]
    return found


@pytest.mark.parametrize("packed", ["", ".gz", ".xz", ".bz2"])
def test_text_and_rows_become_documents_packed_or_not(tmp_path, packed):
    opener = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}[packed]
    with opener(tmp_path / f"a.txt{packed}", "wb") as file:
        file.write("\ufeffone\r\ntwo\n\n \n\nthree\nfour é".encode())
    with opener(tmp_path / f"b.jsonl{packed}", "wb") as file:
        file.write(json.dumps({"id": 1, "text": "x\n\ny"}).encode() + b'\n\n{"text": "z"}\n')
    found = [document for path in data.find_files([tmp_path]) for document in documents(path, {})]
    assert found == ["one\ntwo", "three\nfour é", "x\n\ny", "z"]


@pytest.mark.parametrize("block_bytes", [100, 999, 10_000])
def test_blocks_hold_the_documents_and_line_numbers_of_the_whole_file(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(data, "BLOCK_BYTES", block_bytes)
    expected = make_documents(60)
    (tmp_path / "a.txt").write_bytes("\n\n".join(expected).encode() + b"\n\nbad \xff")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in expected) + "bad")
    for name, line in (("a.txt", 121), ("b.jsonl", 61)):
        left_out = {}
        found = documents(tmp_path / name, left_out)
        assert "".join(found) == "".join(expected)
        assert found == expected or (name == "a.txt" and block_bytes < 1000)  # cut, for want of room
        ((count, first),) = left_out.values()
        assert count == 1 and f"line {line}" in first


def test_long_texts_without_blank_lines_are_cut_at_line_ends_or_spaces(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_DOCUMENT", 1000)
    lines = "\n".join(f"line {i} " + "x" * 90 for i in range(500))
    for text, joint in ((lines, "\n"), ("é日 " * 5000 + "é" * 5000, "")):
        (tmp_path / "a.txt").write_text(text)
        found = documents(tmp_path / "a.txt", {})
        assert max(map(len, found)) <= 1000 and joint.join(found) == text


def bad_corpus(directory):
    """Writes good documents with all kinds of bad lines between; returns the good, and what is left out."""
    directory.mkdir()
    good = make_documents(60)
    rows = [json.dumps({"body": text}).encode() for text in good[:20]]
    rows[3:3] = [b'{"body": "cut', b'{"text": 5}', b"[1]", b'{"body": "\\ud800"}', b"", b'{"body": " "}']
    rows[12:12] = [b"\0" * 500, b'{"body": "caf\xe9"}', b"[" * 100_000]
    (directory / "a.jsonl").write_bytes(b"\n".join(rows))
    text = "\n\n".join([*good[20:30], "caf\xe9 au lait", "\0" * 100, *good[30:40]])
    (directory / "b.txt").write_text(text, encoding="latin-1")
    (directory / "c.txt.gz").write_bytes(gzip.compress(b"lost " * 1000)[:-20])
    (directory / "d.txt.xz").write_bytes(b"not packed")
    (directory / "e.txt").write_text("\n\n".join(good[40:]))
    return good, {"without a text": (5, "a.jsonl: line 4"), "not UTF-8": (4, "a.jsonl: line 13"),
                  "behind damage": (2, "c.txt.gz: line 1 and the rest")}


@pytest.mark.parametrize("workers", [1, 2])
def test_unusable_lines_are_left_out_counted_and_named(tmp_path, monkeypatch, capsys, workers):
    monkeypatch.setattr(data, "BLOCK_BYTES", 2000)
    good, expected = bad_corpus(tmp_path / "corpus")
    config = flags(tmp_path / "corpus", tmp_path / "out", workers=workers, text_field="body")
    left_out, printed = data.Corpus(data.prepare(config)).manifest["left_out"], capsys.readouterr().out
    assert len(left_out) == len(expected)
    for reason, (count, first) in left_out.items():
        (wanted,) = [place for kind, place in expected.items() if reason.startswith(kind)]
        assert count == wanted[0] and f"corpus/{wanted[1]}" in first and first in printed
    assert Counter("".join(sum(documents_of(config.out).values(), []))) == Counter("".join(good))
    strict = dataclasses.replace(config, out=str(tmp_path / "strict"), strict=True)
    with pytest.raises(ValueError, match="^[^\n]*corpus/a.jsonl: line 4[^\n]*--strict[^\n]*$"):
        data.prepare(strict)


def test_files_are_read_by_ending_or_look_and_the_rest_is_counted(tmp_path, capsys):
    for name, content in {
        "A.TXT": "one", "book.md": "two", "no_ending": "three",
        "wiki_00": '{"text": "four"}\n{"text": "five"}',
        "b.JSONL.GZ": gzip.compress(b'{"text": "six"}'), "list.json": '[{"text": "seven"},\n"eight"]',
        "rows.json": '{"text": "nine"}\n', "more.ndjson": '{"text": "ten"}', ".hidden": "no",
        "t.csv": "a,b", "u.csv": "a,b", "v.parquet": "PAR1", "w.pdf": "%PDF",
    }.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    files = data.find_files([tmp_path])
    found = Counter(document for path in files for document in documents(path, {}))
    assert found == Counter("one two three four five six seven eight nine ten".split())
    assert "passed over 2 .csv, 1 .parquet, 1 .pdf; make it .jsonl, as with pandas" in capsys.readouterr().out
    with pytest.raises(ValueError, match="t.csv: .csv is not read; make it .jsonl"):
        data.find_files([tmp_path / "t.csv"])
    (tmp_path / "list.json").write_text('[{"text": "cut"')
    with pytest.raises(ValueError, match="list.json: damaged, not a list of JSON"):
        documents(tmp_path / "list.json", {})
    left_out = {}
    (tmp_path / "wiki_00").write_text('{"title": "x", "body": "y"}')
    assert documents(tmp_path / "wiki_00", left_out) == []
    assert "(its fields are title, body); see data.py prepare --text-field" in str(left_out)


def test_a_document_is_what_parts_of_blank_lines_a_line_or_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(data, "MAX_DOCUMENT", 1000)
    books = ["\n\n".join(make_documents(30, seed)) for seed in range(5)]
    for number, book in enumerate(books):
        (tmp_path / f"{number}.txt").write_text(book)

    def prepared_as(kind, out):
        found = documents_of(data.prepare(flags(tmp_path, tmp_path / out, documents=kind)))
        assert found["train"] and found["heldout"] and not set(found["train"]) & set(found["heldout"])
        return Counter(sum(found.values(), []))

    whole = prepared_as("file", ".whole")
    assert whole == Counter(books)
    assert prepared_as("line", ".lines") == Counter(filter(None, "\n\n".join(books).split("\n")))
    assert len(prepared_as("blank-line", ".parts")) >= 5 * 30  # the longest are cut
    with pytest.raises(ValueError, match="another documents: file, not line"):
        prepared_as("line", ".whole")


LANGUAGES = {
    "Chinese": "今天下雨了。|我们在家里看书。|你去哪儿？|他说：“好。”|火车晚点了！|山上有房子。",
    "Japanese": "今日は雨が降った。|家で本を読みます。|どこへ行きますか？|「はい。」|電車が遅れた！",
    "Hindi": "आज बारिश हुई।| हम घर पर किताब पढ़ते हैं।| तुम कहाँ जा रहे हो?| गाड़ी देर से आई।| बच्चों को सेब पसंद हैं।",
    "Arabic": " نزل المطر اليوم.| نقرأ الكتب في البيت.| إلى أين تذهب؟| تأخر القطار.| يحب الأطفال التفاح.",
    "Burmese": "ဒီနေ့ မိုးရွာတယ်။| အိမ်မှာ စာဖတ်တယ်။| ဘယ်သွားမလဲ။| ရထား နောက်ကျတယ်။| ကလေးတွေ ပန်းသီး ကြိုက်တယ်။",
    "Thai": "วันนี้ฝนตก |เราอ่านหนังสือที่บ้าน |คุณจะไปไหน |รถไฟมาสาย |เด็กๆ ชอบแอปเปิล |มีบ้านเล็กๆ บนภูเขา ",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_sequences_are_full_in_any_script(tmp_path, language):
    sentences, rng = LANGUAGES[language].split("|"), np.random.default_rng(0)
    texts = ["".join(rng.choice(sentences, 60)) for _ in range(60)]
    if language not in ("Arabic", "Thai"):  # ASCII's stops want a space; Thai has none
        assert sum(map(len, map(data.split_sentences, texts))) >= 0.8 * 60 * 60
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    corpus = data.Corpus(data.prepare(flags(tmp_path / "a.txt", tmp_path / "out", vocab_size=300)))
    lengths = data.Sequences(corpus, "full-sentences", 512).lengths(None)
    assert (lengths[:-1].mean() + 2) / 512 >= 0.92


def test_docstrings_are_read_and_never_run(tmp_path):
    source = tmp_path / "module.py"
    source.write_text('"""Top."""\nraise SystemExit\nclass A:\n    """Of A."""\n    def f(): "Of f."\n')
    assert data.docstrings(source) == "Top.\n\nOf A.\n\nOf f."
    source.write_text('"""unfinished')
    assert data.docstrings(source) == ""


# ----------------------------------------------------------------------------------------------------------
# Byte-level BPE and the tokenizer
# ----------------------------------------------------------------------------------------------------------


def test_bpe_on_the_textbook_example():
    """aaabdaaabac: aa is most frequent (4 overlapping times); then ab and aa+a tie: the lower unit wins."""
    assert data.train_bpe(["aaabdaaabac"], 261 + 3).merges == [("a", "a"), ("a", "b"), ("aa", "ab")]


def test_bpe_stays_inside_pretokens_and_stops_when_no_pair_repeats():
    tokenizer = data.train_bpe(["ab ab ab"], 1000)
    assert tokenizer.merges == [("a", "b"), ("Ġ", "ab")] and tokenizer.vocab_size == 263
    with pytest.raises(ValueError, match="vocab_size 200 is too small: .* make 261"):
        data.train_bpe(["text"], 200)


def test_a_long_pretoken_of_equal_characters_takes_linear_work():
    """200,000 times the same pair in one word: visited for each of them, it would be read for hours."""
    assert data.train_bpe(["a" * 200_000], 264).merges == [("a", "a"), ("aa", "aa"), ("aaaa", "aaaa")]


def test_tiktoken_segments_words_as_the_merges_do_one_after_the_other():
    text = make_documents(100)
    tokenizer = data.train_bpe(text, 700)
    for word in list(data.count_pretokens(text))[:400]:
        pieces = [data.spell(bytes([b])) for b in word.encode()]
        for left, right in tokenizer.merges:
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == (left, right):
                    pieces[i : i + 2] = [left + right]
                i += 1
        assert tokenizer.encode(word) == [tokenizer.vocab[piece] for piece in pieces]


AWKWARD = [*"|a|</s> <mask> <s><pad>|\u0085\u2028 \u00a0x|\ufeffa|a\0b|🙂👍🏽👨‍👩‍👧|don't WE'LL".split("|"),
           "a" * 100_000, " " * 100_000 + "b", "\n" * 50_000, "!?" * 50_000, "\t\t  x   \n"]


def random_texts(count, seed=0):
    rng = random.Random(seed)
    often = [*" \n\t'sdtlvem0.!?\"A\u3000日🙂\u200d\U0010ffff\x1c\u0085"] * 12
    alphabet = [*map(chr, range(0x250)), *often]
    return ["".join(rng.choices(alphabet, k=rng.randint(0, 60))) for _ in range(count)]


def test_any_text_survives_and_never_becomes_a_special_token(tokenizer):
    for text in [*AWKWARD, *random_texts(3000)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(4 <= i < tokenizer.mask_id for i in ids)


def test_any_bytes_decode_as_python_decodes_them(tokenizer):
    rng = random.Random(7)
    for _ in range(2000):
        content = rng.randbytes(rng.randint(0, 40))
        ids = [tokenizer.vocab[data.spell(bytes([byte]))] for byte in content]
        assert tokenizer.decode(ids) == content.decode("utf-8", "replace")


def test_sentences_are_borders_of_tokens(tokenizer, monkeypatch):
    """So a document encoded whole, which is faster, is the same as its sentences encoded apart."""
    for cuts in ("He left.| Then it rained.", '"Why?"| (Really!)| So', "i.e. at 3.5 p.m. it rained",
                 "A heading\n|\nIts text.| More. ", "No\nend\n \t|\nhere", "One.|\n\nTwo",
                 "Three" + "\n" * 10**6):
        assert data.split_sentences(cuts.replace("|", "")) == cuts.split("|")
    prose = ['Dr. Who? "Yes!" he said. (Really.) 3.5 is... Ünd?\n\nNeu', "a\n\nb\n \nc. D\n\n\n"]
    texts = [*prose, *make_documents(30, seed=5), *random_texts(3000, seed=1)]
    for text in texts:
        apart = [tokenizer.encode(sentence) for sentence in data.split_sentences(text)]
        assert "".join(data.split_sentences(text)) == text and sum(apart, []) == tokenizer.encode(text)
    rows = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    monkeypatch.setattr(data, "tokenizer_of_worker", lambda _: tokenizer)
    encoded = data.encode_job([data.Block(Path("a"), 0, rows, "rows")], Path("."), CONFIG)
    sentences = [sentence for text in texts if text.strip() for sentence in data.split_sentences(text)]
    assert encoded.tokens_of_sentence.tolist() == [len(tokenizer.encode(sentence)) for sentence in sentences]


def test_white_space_that_overflows_tiktokens_regex_engine(tokenizer):
    for blank in " \n":
        long, short = (tokenizer.encode("a" + blank * n + "b") for n in (1_500_000, 15))
        assert tokenizer.decode(long) == "a" + blank * 1_500_000 + "b"
        assert long[:1] + long[-2:] == short[:1] + short[-2:]


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"character 2 is '\\ud83d', a lone surrogate"):
        tokenizer.encode("ab\ud83d")


def test_a_tokenizer_saved_and_opened_with_the_mask_last_or_at_4(tokenizer, tmp_path):
    early = {token: 4 if token == "<mask>" else i + (i >= 4) for token, i in tokenizer.vocab.items()}
    for saved, mask_id in ((tokenizer, 499), (data.Tokenizer(early, tokenizer.merges), 4)):
        saved.save_pretrained(tmp_path)
        for _ in range(2):  # from tokenizer.json, from vocab.json and merges.txt
            opened = data.Tokenizer.from_pretrained(tmp_path)
            assert (opened.vocab, opened.merges, opened.mask_id) == (saved.vocab, saved.merges, mask_id)
            assert opened.fingerprint == saved.fingerprint
            (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    assert [i - 1 for i in opened.encode("Some text.")] == tokenizer.encode("Some text.")
    assert opened.decode([0, 1, 2, 3, 4]) == "<s><pad></s><unk><mask>"


def test_fairseqs_files_open_through_the_dictionary(tmp_path):
    """The dictionary lists GPT-2's ids by frequency, here 'aa' and 'a' first, with padding entries."""
    units = {data.spell(bytes([b])): i for i, b in enumerate(data.BYTE_ORDER)}
    a, aa = units["a"], 256
    (tmp_path / "encoder.json").write_text(json.dumps(units | {"aa": aa}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na a\n", encoding="utf-8")
    order = [aa, a, *(i for i in range(256) if i != a)]
    lines = "".join(f"{i} 9\n" for i in order) + "madeupword0000 0\n"
    (tmp_path / "dict.txt").write_text(lines)
    tokenizer = data.Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("aaa") == [4, 5] and tokenizer.mask_id == 4 + 257 + 1
    assert tokenizer.decode([4, 5]) == "aaa"
    (tmp_path / "dict.txt").write_text(lines + f"{aa} 1\n")
    with pytest.raises(ValueError, match="dict.txt has a unit twice"):
        data.Tokenizer.from_pretrained(tmp_path)


def test_units_that_fairseqs_dictionary_lacks_are_unk_and_stay_so(tokenizer, corpus, tmp_path, capsys):
    """A small corpus lacks some. Such tokens are read, masked and predicted as <unk>."""
    units = {data.spell(bytes([b])): i for i, b in enumerate(data.BYTE_ORDER)}
    (tmp_path / "encoder.json").write_text(json.dumps(units | {"he": 256, "the": 257}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nh e\nt he\n", encoding="utf-8")
    (tmp_path / "dict.txt").write_text("".join(f"{i} 1\n" for unit, i in units.items() if unit not in "fwxé"))
    tokenizer = data.Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    data.Tokenizer.from_pretrained(tmp_path)
    assert capsys.readouterr().out.count("6 units that merges make are not in dict.txt") == 1
    for opened in (tokenizer, data.Tokenizer.from_pretrained(tmp_path / "saved")):
        assert opened.decode(opened.encode("a the box")) == "a <unk> bo<unk>" and opened.mask_id == 256
        assert [text.tolist() for text in opened.encode_with_offsets("the x")[1]] == [[0, 3], [3, 4], [4, 5]]
    out = data.prepare(flags(corpus, tmp_path / "out", tokenizer=str(tmp_path / "saved")))
    batches = data.Batches(data.Sequences(data.Corpus(out), "full-sentences", 64), 8, 4, seed=0)
    for step in map(batches.step, range(5)):
        labels = np.concatenate([batch.labels for batch in step.batches])
        assert step.num_predictions == (labels != data.NOT_PREDICTED).sum()
        assert (labels == data.UNK).any()


def test_bad_tokenizer_files_are_refused_by_name(tokenizer, tmp_path):
    merges = "\n".join(map(" ".join, tokenizer.merges))
    without_mask = {token: i for token, i in tokenizer.vocab.items() if token != "<mask>"}
    for number, (name, content, message) in enumerate([
        ("tokenizer.json", {"model": {"type": "WordPiece"}}, "tokenizer.json"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"500": {"content": "<x>"}}}, "tokens were added"),
        ("tokenizer_config.json", {"add_prefix_space": True}, "add_prefix_space is not built"),
        ("merges.txt", merges[: len(merges) // 2].rsplit("\n", 1)[0], "in vocabulary or merges only"),
        ("merges.txt", merges + "\nz z", "'zz' is in vocabulary or merges only"),
        ("merges.txt", merges + "\none two three", "'onetwothree' is in"),
        ("vocab.json", "{", "vocab.json: damaged"),
        ("vocab.json", without_mask | {"<mask>": 2_000_000_000}, "must be 0 to"),
        ("vocab.json", without_mask | {"<mask>": "499"}, "must be 0 to"),
        ("vocab.json", without_mask, "<mask> has id None"),
    ]):
        directory = tmp_path / str(number)
        tokenizer.save_pretrained(directory)
        if name in ("merges.txt", "vocab.json"):
            (directory / "tokenizer.json").unlink()
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=message) as refusal:
            data.Tokenizer.from_pretrained(directory)
        assert str(directory) in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="no tokenizer here; it takes tokenizer.json"):
        data.Tokenizer.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# prepare
# ----------------------------------------------------------------------------------------------------------


def test_prepare_keeps_every_document_once_on_one_side(corpus, tmp_path, tokenizer):
    """With a tokenizer that is given."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (corpus / "9.txt").write_text("\n\n".join(make_documents(40, seed=0)[:7]))
    out = data.prepare(flags(corpus, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer")))
    found, train = documents_of(out), data.Corpus(out)
    assert train.tokenizer.fingerprint == tokenizer.fingerprint
    assert train.manifest["duplicates"] == 7
    assert sorted(sum(found.values(), [])) == sorted(sum((make_documents(40, i) for i in range(6)), []))
    assert not set(found["train"]) & set(found["heldout"]) and 10 <= len(found["heldout"]) <= 40
    assert train.unigram.tolist() == np.bincount(train.tokens, minlength=500).tolist()


def test_any_number_of_workers_gives_the_same_bytes(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK_BYTES", 5000)
    found = [contents(data.prepare(flags(corpus, tmp_path / str(n), workers=n))) for n in (1, 2, 5)]
    # Beside a GPU's driver workers are not forked.
    driver = SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=driver))
    found.append(contents(data.prepare(flags(corpus, tmp_path / "spawned", workers=2))))
    assert found[0] == found[1] == found[2] == found[3] and "hashes.bin" not in found[0]


def test_workers_end_with_a_killed_parent():
    code = ("import data, os, time\n"
            "def work(i): os.write(1, f'{os.getpid()}\\n'.encode()); time.sleep(600)\n"
            "list(data.in_order(work, range(2), 2))")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    assert parent.stdout.read() == "" and len(set(workers)) == 2  # the pipe's end: nobody is left to write


def test_a_text_that_is_mended_after_a_failed_start_begins_again(tmp_path):
    (tmp_path / "a.txt").write_text("only one document")
    with pytest.raises(ValueError, match="fewer than 2 different documents"):
        data.prepare(flags(tmp_path / "a.txt", tmp_path / "out"))
    (tmp_path / "a.txt").write_text("\n\n".join(make_documents(30)))
    mended = data.prepare(flags(tmp_path / "a.txt", tmp_path / "out"))
    assert contents(mended) == contents(data.prepare(flags(tmp_path / "a.txt", tmp_path / "fresh")))


def test_other_settings_in_the_same_place_are_refused_with_both_values(corpus, tmp_path):
    out = data.prepare(flags(corpus, tmp_path / "out"))
    before = contents(out)
    data.prepare(flags(corpus, out))  # the same again is fine
    with pytest.raises(ValueError, match="another vocabulary: 400, not 500; choose another --out"):
        data.prepare(flags(corpus, out, vocab_size=500))
    (corpus / "0.txt").write_text("other text")
    with pytest.raises(ValueError, match="another corpus: 6 files, with their dates"):
        data.prepare(flags(corpus, out))
    assert contents(out) == before


@pytest.mark.parametrize(("text", "more", "message"), [
    ("", [], "fewer than 2 different documents"),
    ("a\n\nb", ["--held-out", "1.5"], "--held-out 1.5 must be from 1e-09 to 0.999"),
    ("a\n\nb", ["--vocab-size", "17"], "--vocab-size 17 must be at least 261"),
    ("a\n\nb", ["--tokenizer", "nowhere"], "nowhere: no tokenizer here"),
    ("a\n\nb", ["--corpus", "no/such"], "no/such: no such file or directory"),
    ("a\n\nb", ["--corpus", str(ROOT / "tests")], "tests: no text"),
    ("a\n\nb", ["--out", "/proc/out"], "/proc/out"),
])
def test_bad_input_to_prepare_is_one_line(tmp_path, capsys, text, more, message):
    (tmp_path / "a.txt").write_text(text)
    errors = ends(data.main, arguments(tmp_path / "a.txt", tmp_path / "out", *more), 1, capsys)
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_a_directory_of_someone_elses_is_never_written_into(corpus, capsys):
    before = sorted(path.name for path in corpus.iterdir())
    errors = ends(data.main, arguments(corpus, corpus), 1, capsys)
    assert "corpus holds '0.txt' and no manifest.json of this program; choose another --out" in errors
    assert sorted(path.name for path in corpus.iterdir()) == before


def change_json(path, **changes):
    data.write_json(path, data.read_json(path) | changes)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(("damage", "message"), [
    (lambda out: flip(out / "train.tokens.bin"), "train.tokens.bin: altered since it was written"),
    (lambda out: cut(out / "train.documents.bin"), "train.documents.bin: .* bytes, not the manifest's"),
    (lambda out: (out / "manifest.json").unlink(), "not prepared, or not to its end"),
    (lambda out: cut(out / "manifest.json"), "manifest.json: damaged, not JSON"),
    (lambda out: change_json(out / "manifest.json", format_version=7), "version': 7.*version': 2"),
    (lambda out: data.train_bpe(make_documents(20), 300).save_pretrained(out / "tokenizer"), "prepare again"),
    (lambda out: shutil.rmtree(out / "tokenizer"), "no tokenizer here"),
])
def test_a_damaged_prepared_directory_is_refused(prepared, tmp_path, damage, message):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    damage(out)
    with pytest.raises(ValueError, match=message) as refusal:
        for split in data.SPLITS:
            data.Corpus(out, split).verify()
    assert str(out) in str(refusal.value) and "\n" not in str(refusal.value)


# ----------------------------------------------------------------------------------------------------------
# Draws and packing
# ----------------------------------------------------------------------------------------------------------


def test_draw_is_splitmix64():
    """The published generator's first output from seed 0, and draws that look uniform."""
    assert int(data.draw(0)) == 0xE220A8397B1DCDAF
    values = data.uniform(3, 1, np.arange(100_000))
    assert abs(values.mean() - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5
    assert not np.array_equal(data.draw(1, 2), data.draw(2, 1))


def test_an_epochs_order_is_a_permutation_without_a_trace_of_the_old_order():
    orders = [data.epoch_order(5000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4
    for order in orders:
        assert sorted(order) == list(range(5000))
        assert abs(np.corrcoef(np.arange(5000), order)[0, 1]) < 5 / 5000**0.5
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / 5000**0.5


def random_corpus(rng):
    """Returns where sentences end, and where documents do, in tokens."""
    longest = rng.choice([3, 30, 300])
    sizes = [[rng.randint(1, longest) for _ in range(rng.randint(1, 12))] for _ in range(rng.randint(1, 40))]
    sentences = np.cumsum([size for document in sizes for size in document])
    return sentences, np.cumsum([sum(document) for document in sizes])


def packed_by_definition(sentences, documents, room, input_format):
    """Returns the bounds that `pack` should: one sentence at a time, a new sequence where it does not fit."""
    bounds, separators, last_end = [0], 0, 0
    for sentence_begin, sentence_end in zip([0, *sentences], sentences):
        for begin in range(sentence_begin, sentence_end, room):
            end = min(begin + room, sentence_end)
            new_document = begin in documents
            if begin > bounds[-1]:  # something is in the sequence already
                separators += new_document and input_format == "full-sentences"
                is_full = end - bounds[-1] + separators > room
                if is_full or input_format == "sentence-pair" or (new_document and separators == 0):
                    bounds.append(begin)
                    separators = 0
            last_end = end
    return [*bounds, int(last_end)]


@pytest.mark.parametrize("input_format", FORMATS)
def test_pack_equals_its_definition(monkeypatch, input_format):
    rng = random.Random(input_format)
    for window in [data.WINDOW] * 60 + [1, 2, 20] * 20:
        monkeypatch.setattr(data, "WINDOW", window)
        sentences, documents = random_corpus(rng)
        seq_len = rng.randint(6, 80)
        room = data.room_for_text(seq_len, input_format)
        assert room == ((seq_len - 4) // 2 if input_format in data.PAIR_FORMATS else seq_len - 2)
        found = data.pack(sentences, documents, seq_len, input_format)
        assert found.tolist() == packed_by_definition(sentences, set(documents.tolist()), room, input_format)


@pytest.mark.parametrize("input_format", ["full-sentences", "doc-sentences"])
def test_an_epoch_holds_the_corpus_exactly(prepared, input_format):
    corpus = data.Corpus(prepared)
    sequences = data.Sequences(corpus, input_format, 48)
    rows = [sequences.token_ids(None, i) for i in range(len(sequences.lengths(None)))]
    assert all(len(ids) <= 48 and (ids[0], ids[-1]) == (data.BOS, data.EOS) for ids in rows)
    inside = np.concatenate([ids[1:-1] for ids in rows])
    assert inside[inside != data.EOS].tolist() == corpus.tokens.tolist()
    crossed = set(corpus.documents.tolist()) - set(sequences.bounds.tolist())  # ends inside a sequence
    assert (inside == data.EOS).sum() == len(crossed) and (input_format == "full-sentences") == bool(crossed)


@pytest.mark.parametrize("input_format", data.PAIR_FORMATS)
def test_half_of_the_pairs_are_negatives_from_other_documents(prepared, input_format):
    sequences = data.Sequences(data.Corpus(prepared), input_format, 64)
    document = np.searchsorted(sequences.corpus.documents, sequences.bounds[:-1], side="right")
    begins, shares, pairings = np.searchsorted(document, document), [], set()
    every_other = np.flatnonzero((np.arange(len(document)) - begins) % 2 == 0)
    for epoch in range(10):
        pairs = sequences.pairs(0, epoch)
        follows = pairs.is_random == 0
        assert pairs.first.tolist() == every_other.tolist()
        assert (pairs.second[follows] == pairs.first[follows] + 1).all()
        assert ((document[pairs.first] == document[pairs.second]) == follows).all()
        assert max(len(sequences.token_ids(pairs, i)) for i in range(100)) <= 64
        shares.append(pairs.is_random.mean())
        pairings.add(pairs.second.tobytes())
    assert abs(np.mean(shares) - 0.5) < 5 * (0.25 / (10 * len(every_other))) ** 0.5 and len(pairings) == 10


def test_half_are_positives_where_most_documents_have_one_segment():
    document = np.repeat(np.arange(1000), [2] * 300 + [1] * 700)
    pairings = [data.pair_up(document, 0, epoch) for epoch in range(10)]
    assert all(280 <= (pairs.is_random == 0).sum() <= 300 for pairs in pairings)
    assert abs(np.mean([pairs.is_random.mean() for pairs in pairings]) - 0.5) < 0.02
    assert len({number for pairs in pairings for number in pairs.first}) > 980  # another draw each epoch


@pytest.mark.parametrize("document", [[0, 1, 2, 3], [0, 0, 0, 0], [0, 0, *range(1, 100)]])
def test_pairs_without_a_question_are_refused(document):
    with pytest.raises(ValueError, match="next-sentence prediction needs .*full-sentences"):
        data.pair_up(np.array(document), 0, 0)


# ----------------------------------------------------------------------------------------------------------
# Masking
# ----------------------------------------------------------------------------------------------------------

V = 1000


def rows(count=64, length=128):
    rng = np.random.default_rng(0)
    ids = rng.integers(data.UNK, V - 1, (count, length))
    ids[:, 0] = data.BOS
    for row in ids:
        end = rng.integers(2, length)
        row[end], row[end + 1 :] = data.EOS, data.PAD
    return ids


def mask(ids, sequence, epoch, seed=0, **more):
    epoch = np.full(len(ids), epoch)
    return data.mask_tokens(ids, sequence, epoch, seed=seed, vocab_size=V, **more)


def test_exactly_the_rounded_share_is_predicted_and_no_special_token():
    """<unk> stands for text, so it counts as such."""
    ids = rows(256)
    masked, labels = mask(ids, np.arange(256), 0)
    for row, label in zip(ids, labels):
        assert (label != -100).sum() == round(0.15 * (row >= data.UNK).sum())
    assert (labels[ids < data.UNK] == -100).all() and (labels[ids == data.UNK] == data.UNK).any()
    assert (labels[labels != -100] == ids[labels != -100]).all()
    assert (masked[labels == -100] == ids[labels == -100]).all()


@pytest.mark.parametrize("mask_id", [V - 1, 4])
def test_80_10_10_at_uniform_places(mask_id):
    ids = np.full((2000, 100), 5)
    masked, labels = mask(ids, np.arange(2000), 0, seed=1, mask_id=mask_id)
    chosen = masked[labels != -100]
    assert len(chosen) == 2000 * 15
    for found, share in ((chosen == mask_id, 0.8), (chosen == 5, 0.1 + 0.1 / (V - 5))):
        assert abs(found.mean() - share) < 5 * (share * (1 - share) / len(chosen)) ** 0.5
    others = chosen[(chosen != mask_id) & (chosen != 5)]
    words = set(range(4, V)) - {mask_id}
    assert set(others.tolist()) <= words and len(set(others.tolist())) > 900
    by_place = (labels != -100).mean(0)
    assert (abs(by_place - 0.15) < 5 * (0.15 * 0.85 / 2000) ** 0.5).all()


def test_masks_depend_on_seed_epoch_sequence_and_place_alone():
    ids = rows()
    whole = mask(ids, np.arange(64), 3, seed=5)
    order = np.random.default_rng(0).permutation(64)[:20]
    for all_rows, some_rows in zip(whole, mask(ids[order], order, 3, seed=5)):
        assert np.array_equal(all_rows[order], some_rows)
    for seed, epoch, sequence in ((6, 3, 0), (5, 4, 0), (5, 3, 1)):
        assert not np.array_equal(mask(ids, np.arange(64) + sequence, epoch, seed)[1], whole[1])


def test_static_masks_return_after_ten_epochs_and_dynamic_ones_never():
    ids = rows()
    static, dynamic = ([mask(ids, np.arange(64), epoch, masking=kind)[1].tobytes() for epoch in range(20)]
                       for kind in ("static", "dynamic"))
    assert static[:10] == static[10:] == dynamic[:10] and len(set(dynamic)) == 20


# ----------------------------------------------------------------------------------------------------------
# Order and batches
# ----------------------------------------------------------------------------------------------------------


def make_batches(directory, input_format="full-sentences", split="train", seq_len=64, **more):
    sequences = data.Sequences(data.Corpus(directory, split), input_format, seq_len)
    return data.Batches(sequences, **{"batch_size": 12, "micro_batch_size": 4, "seed": 3} | more)


def spy(batches):
    """Makes `assemble` return which sequences it was asked for, and of which epoch."""
    batches.assemble = lambda index, epochs: list(zip(index.tolist(), epochs.tolist()))
    return batches


@pytest.mark.parametrize("input_format", FORMATS)
@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 3), (2, 6), (3, 2), (4, 1)])
def test_every_sequence_once_an_epoch_whatever_the_ranks(prepared, input_format, world_size, micro):
    alone = spy(make_batches(prepared, input_format, micro_batch_size=12))
    shared = {"micro_batch_size": micro, "world_size": world_size}
    ranks = [spy(make_batches(prepared, input_format, rank=rank, **shared)) for rank in range(world_size)]
    size = len(alone.sequences.lengths(alone.sequences.pairs(3, 0)))
    steps = -(-2 * size // 12) if input_format == "full-sentences" else 2 * alone.steps_per_epoch
    seen = Counter()
    for step in range(steps):
        expected, parts = alone.step(step), [rank.step(step) for rank in ranks]
        assert all(len(part.batches) == 12 // (world_size * micro) for part in parts)
        assert {(part.epoch, *part[2:]) for part in parts} == {(expected.epoch, *expected[2:])}
        fed = [pair for part in parts for batch in part.batches for pair in batch]
        assert sorted(fed) == sorted(pair for batch in expected.batches for pair in batch)
        seen.update(fed)
    assert all(seen[i, epoch] == 1 for i in range(size) for epoch in (0, 1)) and max(seen.values()) == 1


@pytest.mark.parametrize("input_format", ["doc-sentences", "sentence-pair"])
def test_short_sequences_make_enlarged_batches_of_about_equal_tokens(prepared, input_format):
    batches = make_batches(prepared, input_format, seq_len=128)
    steps = [batches.step(step) for step in range(batches.steps_per_epoch)]
    tokens = [sum(batch.num_tokens for batch in step.batches) for step in steps]
    assert max(tokens) - min(tokens) <= 2 * 128 and abs(np.mean(tokens) / (12 * 128) - 1) < 0.2
    assert all(step.num_sequences > 12 for step in steps)


@pytest.mark.parametrize("input_format", FORMATS)
def test_batches_say_what_they_hold(prepared, input_format):
    batches = make_batches(prepared, input_format)
    step = batches.step(5)
    assert sum((batch.labels >= 0).sum() for batch in step.batches) == step.num_predictions
    for batch, again in zip(step.batches, batches.step(5).batches):
        height, width = batch.input_ids.shape
        assert batch.num_tokens == batch.attention_mask.sum() == (batch.input_ids != data.PAD).sum()
        assert batch.labels[batch.labels >= 0].min() > 3 and batch.predicted.max() < height * width
        if input_format == "full-sentences":  # steady shapes
            assert (height, width, len(batch.labels)) == (4, 64, 4 * round(0.15 * 62))
        is_pairs = input_format in data.PAIR_FORMATS
        assert (batch.token_type_ids is not None) == (batch.next_sentence_labels is not None) == is_pairs
        if is_pairs:  # the second segment is behind the first two </s>
            assert batch.next_sentence_labels.dtype == batch.token_type_ids.dtype == np.int64
            for ids, types in zip(batch.input_ids, batch.token_type_ids):
                second = np.flatnonzero(ids == data.EOS)[1]
                assert types.tolist() == [int(second <= t and ids[t] != data.PAD) for t in range(width)]
        assert np.array_equal(batch.input_ids, again.input_ids) and np.array_equal(batch.labels, again.labels)


def test_a_batch_that_does_not_divide_says_what_would(prepared):
    with pytest.raises(ValueError, match="4 = 48 does not divide batch_size 256; try micro_batch_size 8"):
        make_batches(prepared, batch_size=256, micro_batch_size=12, world_size=4)


def test_held_out_batches_are_all_sequences_once_over_all_ranks(prepared):
    ranks = [spy(make_batches(prepared, split="heldout", rank=rank, world_size=3)) for rank in range(3)]
    seen = [i for rank in ranks for batch in rank.held_out(10**6) for i, _ in batch]
    assert sorted(seen) == list(range(len(ranks[0].sequences.bounds) - 1))
    assert sum(len(batch) for rank in ranks for batch in rank.held_out(10)) == 10


def test_equal_parts_are_in_order_and_about_equal():
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights, count = rng.integers(1, 50, rng.integers(1, 80)), rng.integers(1, 20)
        parts = data.equal_parts(weights, count)
        assert len(parts) == count and np.concatenate(parts).tolist() == list(range(len(weights)))
        assert max(weights[part].sum() for part in parts) <= weights.sum() / count + weights.max()


def test_prefetch_keeps_the_order_and_passes_errors_on():
    assert list(data.prefetch(lambda i: i * i, range(50))) == [i * i for i in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch(lambda i: 1 / i, [2, 1, 0, 3]))


def test_importing_has_no_side_effects():
    code = ("import sys, data; assert not {'torch', 'matplotlib'} & sys.modules.keys()\n"
            "import train; assert 'matplotlib' not in sys.modules and not train.dist.is_initialized()")
    run("-c", code)
