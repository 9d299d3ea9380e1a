"""The tokenizer beside others': learning BPE, and encoding.

    pytest --benchmark-only bench/bench_bpe.py
    BENCH_CORPUS=books/:wiki.jsonl.xz pytest --benchmark-only bench/bench_bpe.py      # 50 MB need more text
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import measure
import pytest
from measure import CLOCK

import train
from data import SPECIAL_TOKENS, Tokenizer, split_sentences, train_bpe

pytestmark = pytest.mark.benchmark(timer=CLOCK)

RUST = ("tokenizers (Rust)",) if measure.installed("tokenizers", "tokenizers, the Rust BPE trainer") else ()
HUGGING_FACE = ("Hugging Face fast",) if measure.installed("transformers", "Hugging Face's tokenizer") else ()


def size_of(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def make_trainer(who: str, megabytes: int, vocab_size: int) -> Callable[[], object]:
    """Returns a function that learns a byte-level BPE, all cores allowed."""
    texts = measure.documents(megabytes)
    if who == "ours":
        return lambda: train_bpe(texts, vocab_size, workers=train.cores())
    import tokenizers

    def learn() -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer

    return learn


@pytest.mark.parametrize("who", ("ours", *RUST))
@pytest.mark.parametrize(("megabytes", "vocab_size"), [(10, 8192), (10, 32768), (50, 32768)])
def test_learning_bpe(benchmark, megabytes, vocab_size, who):
    """From documents to a tokenizer."""
    found = size_of(measure.documents(megabytes))
    if found < megabytes * 1_000_000:
        measure.LEFT_OUT[f"BPE on {megabytes} MB"] = f"there are {found / 1e6:.0f}: set BENCH_CORPUS to more"
        pytest.skip("not enough text")
    makers = {name: partial(make_trainer, name, megabytes, vocab_size) for name in ("ours", *RUST)}
    case = f"BPE training, {megabytes} MB, {vocab_size:,} units"
    turns = measure.take_turns(case, makers, rounds=3 if megabytes == 10 else 2, warmup=0)
    measure.report(benchmark, case, who, turns, bytes=found)


@cache
def tokenizer() -> Tokenizer:
    return train_bpe(measure.documents(10), 32768, workers=train.cores())


def hugging_face_tokenizer() -> Any:
    """Returns Hugging Face's fast tokenizer with our vocabulary."""
    import transformers

    with tempfile.TemporaryDirectory() as directory:
        tokenizer().save_pretrained(directory)
        return transformers.RobertaTokenizerFast.from_pretrained(directory)


def make_encoder(who: str, texts: tuple[str, ...], threads: int) -> Callable[[], object]:
    """Returns a function that encodes texts, to ids of the vocabulary."""
    ours = tokenizer()
    if who == "ours":
        return lambda: ours.encode_batch(texts, threads)
    if who.startswith("tiktoken"):  # as it comes: ranks, not yet the vocabulary's ids
        if threads == 1:
            return lambda: [ours._bpe.encode_ordinary(text) for text in texts]
        return lambda: ours._bpe.encode_ordinary_batch(list(texts), num_threads=threads)
    theirs = hugging_face_tokenizer()
    sample = texts[0][:2000]  # in a longer one the characters "<s>" may stand, which they take for the token
    if theirs(sample, add_special_tokens=False)["input_ids"] != ours.encode(sample):
        raise ValueError("Hugging Face's tokenizer gives other ids; this is no comparison")
    return lambda: theirs(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.parametrize("who", ("ours", "tiktoken, ranks only", *HUGGING_FACE))
@pytest.mark.parametrize("kind", ("one long document", "documents", "sentences"))
def test_encoding(benchmark, kind, who):
    """To ids: one document of 2 MB in one thread, or many texts in all that the machine has."""
    texts = measure.documents(10)
    if kind == "one long document":
        texts = ["\n".join(texts)[:2_000_000]]
    else:
        texts = texts[: len(texts) // 2]
    if kind == "sentences":
        texts = [sentence for text in texts for sentence in split_sentences(text)]
    threads = 1 if len(texts) == 1 else train.cores()
    makers = {name: partial(make_encoder, name, tuple(texts), threads)
              for name in ("ours", "tiktoken, ranks only", *HUGGING_FACE)}
    case = f"encoding, {kind}, {threads} thread{'s' * (threads > 1)}"
    turns = measure.take_turns(case, makers, rounds=4, warmup=1)
    measure.report(benchmark, case, who, turns, bytes=size_of(texts))

