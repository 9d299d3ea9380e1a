"""The same numbers as other people's implementations, which the optional `oracle` extra brings."""

import json
import lzma
import random
import shutil

import pytest
import torch
from helpers import PUBLISHED, make_documents
from test_formats import CLOSE, CONFIG_OF_2019, KINDS, padded_batch
from test_formats import theirs as make_theirs

import data
import roberta
from roberta import RobertaForMaskedLM, RobertaForMultipleChoice

ODD = dict(vocab_size=97, hidden_size=10, num_hidden_layers=3, num_attention_heads=2, intermediate_size=22,
           max_position_embeddings=23, initializer_range=0.3)
# The published widths, cut in depth and vocabulary: what makes them slow tests no other line of code.
BASE = ODD | dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_hidden_layers=2,
                  initializer_range=0.02)
LARGE = BASE | dict(hidden_size=1024, num_attention_heads=16, intermediate_size=4096)


def needs_published(*names):
    missing = [name for name in names if not (PUBLISHED / name).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"not in {PUBLISHED}: {missing}; set ROBERTA_DATA")


# ----------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------


def assert_same_gradients(ours, theirs):
    """After backward passes of both."""
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, gradient in roberta.rename(found, roberta.TO_HUGGING_FACE).items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("shape", [ODD, BASE, LARGE], ids=["odd", "base", "large"])
@pytest.mark.parametrize("kind", KINDS[:4], ids=lambda kind: kind.__name__)  # all but RobertaForPreTraining
def test_every_model_equals_hugging_faces(oracle, tmp_path, kind, shape):
    """Logits, the hidden states of all layers, and gradients."""
    scale = 0.1 if shape is ODD else 0.01  # the wide ones' sums must not grow beyond floats' 1e-5
    theirs = make_theirs(oracle, tmp_path, kind, scale, **shape)
    ours = kind.from_pretrained(tmp_path)
    input_ids, mask = padded_batch()
    given, attention_mask = input_ids, mask
    if kind is RobertaForMultipleChoice:
        given, attention_mask = given[:, None].repeat(1, 4, 1), mask[:, None].repeat(1, 4, 1)
    found = ours(given, attention_mask)
    found = found if isinstance(found, tuple) else (found,)
    expected = theirs(given, attention_mask=attention_mask.long()).to_tuple()
    # What stands at padding means nothing.
    found, expected = ([x[mask] if x.shape[:2] == mask.shape else x for x in xs] for xs in (found, expected))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for logits in (found, expected):
        sum(x.square().mean() for x in logits).backward()
    assert_same_gradients(ours, theirs)

    hidden = theirs.base_model(input_ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    for a, b in zip(ours.extract_features(input_ids, return_all_hiddens=True), hidden, strict=True):
        torch.testing.assert_close(a[mask], b[mask], **CLOSE)


WORDS = {"vocab_size": 50265, "max_position_embeddings": 514}  # roberta-base's; its other sizes are cut


@needs_published("roberta_base/tokenizer.json")
def test_roberta_base_as_it_was_published(oracle, tmp_path):
    theirs = make_theirs(oracle, tmp_path, **ODD | WORDS)
    shutil.copytree(PUBLISHED / "roberta_base", tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_OF_2019 | ODD | WORDS))
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    model, tokenizer = RobertaForMaskedLM.from_pretrained(tmp_path), data.Tokenizer.from_pretrained(tmp_path)
    input_ids = model.encode(["Hello world!", "Hello"], tokenizer)
    assert input_ids.tolist() == [[0, 31414, 232, 328, 2], [0, 31414, 2, 1, 1]]
    real = input_ids != 1
    expected = theirs(input_ids, attention_mask=real.long()).logits
    torch.testing.assert_close(model(input_ids)[real], expected[real], **CLOSE)


# ----------------------------------------------------------------------------------------------------------
# The tokenizer
# ----------------------------------------------------------------------------------------------------------


def assert_same_merges(oracle, documents, vocab_size, workers=1):
    theirs = oracle("tokenizers").ByteLevelBPETokenizer()
    theirs.train_from_iterator(documents, vocab_size, min_frequency=2, show_progress=False,
                               special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    ours = data.train_bpe(documents, vocab_size, workers=workers)
    assert ours.merges == [tuple(merge) for merge in json.loads(theirs.to_str())["model"]["merges"]]


@pytest.mark.parametrize("vocab_size", [300, 1000, 5000])
def test_merges_equal_hugging_faces_on_made_up_text(oracle, vocab_size):
    odd = "aaaa aaa aaaaaaa abab ababab 1111 !!!! éééé日本日本 🙂🙂\n\n\n  \t"
    assert_same_merges(oracle, [*make_documents(300), odd] * 2, vocab_size)


def test_merges_equal_hugging_faces_where_two_merges_make_one_unit(oracle):
    """Random strings over three letters: short units arise in more than one way."""
    rng = random.Random(0)
    for _ in range(30):
        document = " ".join("".join(rng.choices("abc", k=rng.randint(1, 12))) for _ in range(200))
        assert_same_merges(oracle, [document], 420)


@pytest.mark.slow
@needs_published("text/books-0.txt.xz")
def test_merges_equal_hugging_faces_on_ten_megabytes_of_books(oracle):
    with lzma.open(PUBLISHED / "text" / "books-0.txt.xz", "rt", encoding="utf-8") as file:
        documents = file.read(10_000_000).split("\n\n")
    assert_same_merges(oracle, documents, 8192, workers=2)


def mixed_text(size):
    """Words, numbers, punctuation, scripts, emoji, controls and long runs, the same every time."""
    rng = random.Random(0)
    scripts = ["the quick Brown fox's don't we'll I'VE", "naïve façade Ærøskøbing", "Привет мир", "한국어",
               "日本語のテキスト", "مرحبا بالعالم", "हिन्दी", "🙂👍🏽👨‍👩‍👧🇩🇪", "3.14159 1,000,000 ½ ²",
               "\x00\x01\x7f\x80\xa0\u200b\u2028", "</s><mask>", "a" * 50, " " * 37, "!?" * 20,
               "http://x.y/z?q=1&r=%20", "e\u0301 o\u0308", "\t\t\n\r\n  \n"]
    pieces, length = [], 0
    while length < size:
        script = rng.choice(scripts)
        cut = script[: rng.randint(0, len(script))]
        pieces += [rng.choice([script, cut, script.replace(" ", ""), script.upper()])]
        pieces += [rng.choice(["", " ", "  ", "\n", ". "])]
        length += len("".join(pieces[-2:]).encode())
    return "".join(pieces)


def assert_same_ids_and_offsets(oracle, tokenizer, directory, text):
    """As Hugging Face's byte-level BPE has them of plain text, special tokens not looked for."""
    tokenizers = oracle("tokenizers")
    tokenizer.save_pretrained(directory)
    model = tokenizers.models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    expected = theirs.encode(text)
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids.tolist() == expected.ids == tokenizer.encode(text)
    assert offsets.tolist() == [list(pair) for pair in expected.offsets]


def test_ids_and_offsets_equal_hugging_faces_with_our_merges(oracle, tmp_path):
    text = mixed_text(300_000)
    tokenizer = data.train_bpe([text[:100_000], *make_documents(50)], 1500)
    assert_same_ids_and_offsets(oracle, tokenizer, tmp_path, text)


@needs_published("gpt2_bpe/vocab.bpe", "roberta_base/tokenizer.json")
@pytest.mark.parametrize("size", [500_000, pytest.param(5_000_000, marks=pytest.mark.slow)])
def test_ids_and_offsets_equal_hugging_faces_with_the_published_merges(oracle, tmp_path, size):
    """GPT-2's files with fairseq's dictionary, and roberta-base's: one tokenizer, on text of all kinds."""
    tokenizer = data.Tokenizer.from_pretrained(PUBLISHED / "gpt2_bpe")
    assert tokenizer.vocab_size == 50265 and tokenizer.mask_id == 50264
    assert data.join(tokenizer.encode_to_numpy("Hello world!")).tolist() == [0, 31414, 232, 328, 2]
    text = mixed_text(size)
    assert_same_ids_and_offsets(oracle, tokenizer, tmp_path, text)
    published = PUBLISHED / "roberta_base"
    assert data.Tokenizer.from_pretrained(published).fingerprint == tokenizer.fingerprint
    plain = text[:200_000].replace("</s>", "").replace("<mask>", "")
    for directory in (published, tmp_path):
        theirs = oracle("transformers").AutoTokenizer.from_pretrained(directory)
        assert theirs(plain, add_special_tokens=False)["input_ids"] == tokenizer.encode(plain)


@pytest.mark.parametrize("use_fast", [True, False])
def test_hugging_faces_tokenizer_of_our_files(oracle, tmp_path, use_fast):
    """What is fed: <s> A </s> and <s> A </s></s> B </s>, cut where the model ends; ids and text again."""
    ours = data.train_bpe([*make_documents(200), "naïve café 日本語 🙂"], 600)
    model = RobertaForMaskedLM(roberta.RobertaConfig(**ODD | {"vocab_size": 600}))
    model.save_pretrained(tmp_path, ours)
    theirs = oracle("transformers").AutoTokenizer.from_pretrained(tmp_path, use_fast=use_fast)
    for text in [*make_documents(30, seed=4), " a  b\n\nc\t", "日本語 🙂 é", "“quoted” Łódź – 🏳️\u200d🌈b"]:
        ids = model.encode(text, ours)[0].tolist()
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids, skip_special_tokens=True) == text
        assert theirs(text, "Why?")["input_ids"] == model.encode((text, "Why?"), ours)[0].tolist()
    assert theirs.model_max_length == model.config.max_tokens == 21
    assert len(theirs("word " * 99, truncation=True)["input_ids"]) == 21
    special = (theirs.cls_token_id, theirs.pad_token_id, theirs.sep_token_id, theirs.unk_token_id)
    assert special == (data.BOS, data.PAD, data.EOS, data.UNK) and theirs.mask_token_id == ours.mask_id
    theirs.save_pretrained(tmp_path / "theirs")  # and back
    assert data.Tokenizer.from_pretrained(tmp_path / "theirs").fingerprint == ours.fingerprint
