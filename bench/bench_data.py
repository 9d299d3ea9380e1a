"""The path of the data beside Hugging Face's libraries: learning BPE, encoding, masking.

    pytest --benchmark-only bench/bench_data.py
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measure
import numpy as np
import pytest
import torch
from measure import PEERS, QUICK

import data

UNITS = (2048,) if QUICK else (8192, 32768)


def size_of(texts: list[str]) -> float:
    """Returns megabytes."""
    return sum(len(text.encode()) for text in texts) / 1e6


def hugging_face_tokenizer(tokenizer: data.Tokenizer, directory: Path) -> Any:
    """Returns Hugging Face's tokenizer with our vocabulary, by way of the files that we publish."""
    import transformers

    tokenizer.save_pretrained(directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


def learn_with_tokenizers(texts: list[str], vocab_size: int) -> Any:
    """Returns the byte-level BPE that `tokenizers`, which is written in Rust, learns."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    # The settings are ours: all bytes to begin with, no unit seen less than twice, five special tokens.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=list(data.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.mark.parametrize("vocab_size", UNITS)
def test_learning_bpe(benchmark, texts, vocab_size):
    """§4.4: from documents to a tokenizer, with all cores."""
    contestants = {"ours": lambda: data.train_bpe(texts, vocab_size, workers=data.cores())}
    if PEERS:
        contestants["tokenizers (Rust)"] = lambda: learn_with_tokenizers(texts, vocab_size)
    size = size_of(texts)
    case = f"learning BPE, {size:.0f} MB, {vocab_size:,} units"
    measure.compare(benchmark, case, contestants, rounds=3, amount=(size, "MB"))


def encode_all(tokenizer: data.Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Encodes with a thread a core: tiktoken releases Python's lock while it works."""
    # A call for each text would cost more than a short text's encoding, so threads take shares of them.
    shares = data.equal_parts(np.ones(len(texts)), 8 * data.cores())  # a few a thread, to even out
    with ThreadPoolExecutor(data.cores()) as pool:
        encoded = pool.map(lambda share: [tokenizer.encode_to_numpy(texts[i]) for i in share], shares)
        return [ids for share in encoded for ids in share]


@pytest.mark.parametrize("kind", ("documents", "sentences"))
def test_encoding(benchmark, corpus, texts, tmp_path, kind):
    """§4.4: texts to ids, with all cores. Many short texts cost more by the text, long ones by the byte."""
    if kind == "sentences":
        texts = [sentence for text in texts[: len(texts) // 4] for sentence in data.split_sentences(text)]
    contestants = {"ours": lambda: encode_all(corpus.tokenizer, texts)}
    if PEERS:
        theirs = hugging_face_tokenizer(corpus.tokenizer, tmp_path)
        contestants["Hugging Face"] = lambda: theirs(texts, add_special_tokens=False, verbose=False)
        # It is a comparison only if the ids are the same. (Not on all texts: theirs takes the characters
        # "<s>", where they stand in a text, for the special token.)
        sample = texts[0][:2000]
        assert theirs(sample, add_special_tokens=False)["input_ids"] == corpus.tokenizer.encode(sample)
    case = f"encoding, {len(texts):,} {kind}"
    measure.compare(benchmark, case, contestants, rounds=5, amount=(size_of(texts), "MB"))


def test_masking(benchmark, corpus, tmp_path):
    """§2: 256 sequences of 512 tokens masked, 15 %, 80/10/10."""
    vocab_size, rows = corpus.vocab_size, np.arange(256)
    input_ids = np.random.default_rng(0).integers(5, vocab_size - 1, (256, 512))
    input_ids[:, 0], input_ids[:, -1] = data.BOS, data.EOS
    epochs = iter(range(10**9))  # every turn another: new masks, as in training
    contestants = {"ours": lambda: data.mask_tokens(input_ids, rows, np.full(256, next(epochs)), seed=0,
                                                    vocab_size=vocab_size)}
    if PEERS:
        import transformers

        # Theirs takes a list of examples, which it puts together first; ours are in one array already.
        theirs = hugging_face_tokenizer(corpus.tokenizer, tmp_path)
        collator = transformers.DataCollatorForLanguageModeling(theirs, mlm_probability=0.15)
        examples = [{"input_ids": row} for row in torch.from_numpy(input_ids)]
        contestants["Hugging Face's collator"] = lambda: collator(examples)
    amount = (input_ids.size, "tokens")
    measure.compare(benchmark, "masking, 256 x 512 tokens", contestants, rounds=9, amount=amount)
