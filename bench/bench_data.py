"""The path of the data: masking, packing, batches, a prepared directory; features for fine-tuning.

    pytest --benchmark-only bench/bench_data.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import measure
import numpy as np
import pytest
import torch
from bench_bpe import HUGGING_FACE, hugging_face_tokenizer, tokenizer
from measure import CLOCK

import finetune
from data import (
    FORMAT_VERSION,
    PAIR_FORMATS,
    Batches,
    Corpus,
    PrepareConfig,
    Sequences,
    mask_tokens,
    pack,
    prepare,
    save_array,
    split_sentences,
)

pytestmark = pytest.mark.benchmark(timer=CLOCK)

FORMATS = ("full-sentences", "doc-sentences", *PAIR_FORMATS)


def make_masker(who: str, ids: np.ndarray) -> Callable[[], object]:
    """Returns a function that masks a batch, (B, T), special tokens left alone."""
    vocab_size, number = tokenizer().vocab_size, iter(range(10**9))
    if who == "ours":
        rows = np.arange(len(ids))
        return lambda: mask_tokens(ids, rows, next(number), seed=0, vocab_size=vocab_size)
    import transformers

    theirs = hugging_face_tokenizer()
    collator = transformers.DataCollatorForLanguageModeling(theirs, mlm_probability=0.15)
    examples = [{"input_ids": row} for row in torch.from_numpy(ids)]
    return lambda: collator(examples)


@pytest.mark.parametrize("who", ("ours", *HUGGING_FACE))
def test_masking(benchmark, who):
    """256 sequences of 512 tokens: 15 %, 80/10/10."""
    ids = np.random.default_rng(0).integers(5, tokenizer().vocab_size - 1, (256, 512))
    ids[:, 0], ids[:, -1] = 0, 2
    makers = {name: partial(make_masker, name, ids) for name in ("ours", *HUGGING_FACE)}
    case = "masking, 256 x 512 tokens"
    turns = measure.take_turns(case, makers, rounds=5)
    measure.report(benchmark, case, who, turns, tokens=ids.size)


@cache
def corpus() -> Corpus:
    """Returns a prepared corpus of 10 MB, which lives as long as the process."""
    directory = tempfile.TemporaryDirectory()
    rows = [json.dumps({"text": text}) + "\n" for text in measure.documents(10)]
    (Path(directory.name) / "text.jsonl").write_text("".join(rows), encoding="utf-8")
    tokenizer().save_pretrained(Path(directory.name) / "given")
    out = prepare(PrepareConfig((f"{directory.name}/text.jsonl",), f"{directory.name}/prepared",
                                tokenizer=f"{directory.name}/given"))
    found = Corpus(out)
    found.lives_in = directory
    return found


@pytest.mark.parametrize("input_format", FORMATS)
def test_packing(benchmark, input_format):
    """From sentence ends to sequences of 512 tokens, once a run."""
    shards = corpus().shards
    case = f"packing, {input_format}"
    turns = measure.take_turns(case, {"ours": lambda: lambda: [
        pack(shard.sentences, shard.documents, 512, input_format) for shard in shards]}, rounds=5)
    measure.report(benchmark, case, "ours", turns, tokens=corpus().num_tokens)


@pytest.mark.parametrize("input_format", FORMATS)
def test_batches(benchmark, input_format):
    """A step of 64 full sequences, or as many tokens in shorter ones: read, padded, masked."""
    batches = Batches(Sequences(corpus(), input_format, 512), batch_size=64, micro_batch_size=32, seed=0)
    steps = iter(range(10**9))
    tokens = sum(batch.num_tokens for batch in batches.step(0).batches)
    case = f"batch assembly, {input_format}"
    turns = measure.take_turns(case, {"ours": lambda: lambda: batches.step(next(steps))}, rounds=20)
    measure.report(benchmark, case, "ours", turns, tokens=tokens)


def test_opening(benchmark, tmp_path):
    """A prepared directory of 1 GB, as every run and every rank opens it; its token file is sparse."""
    tokens, sentences, documents = 500_000_000, 20_000_000, 400_000
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    save_array(tmp_path / "unigram.npy", np.ones(tokenizer().vocab_size, dtype=np.int64))
    counts = {"tokens": tokens, "sentences": sentences, "documents": documents}
    for kind, count in counts.items():
        with open(tmp_path / f"train-00000.{kind}.bin", "wb") as file:
            file.truncate(count * (2 if kind == "tokens" else 8))
    shard = {"name": "train-00000", "counts": counts, "sha256": {}}
    manifest = {"format_version": FORMAT_VERSION, "dtype": "<u2", "tokenizer": tokenizer().fingerprint,
                "shards": {"train": [shard], "heldout": []}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    case = "opening 1 GB"
    turns = measure.take_turns(case, {"ours": lambda: partial(Corpus, tmp_path)}, rounds=5)
    measure.report(benchmark, case, "ours", turns)


def questions() -> list[finetune.Example]:
    """Returns questions on passages in SQuAD's manner: five to a passage of about 200 words."""
    examples = []
    for number, text in enumerate(measure.documents(10)[:400]):
        words = text.split()[:200]
        passage = " ".join(words)
        for i in range(5 if len(words) > 40 else 0):
            answer = " ".join(words[7 * i : 7 * i + 3])
            start = len(" ".join(words[: 7 * i])) + (i > 0)
            texts = f"What stands at place {7 * i} of it?", passage
            examples.append(finetune.Example(f"{number}-{i}", "", texts, ((start, answer),)))
    return examples


def make_features(who: str, examples: list[finetune.Example], seq_len: int) -> Callable[[], object]:
    """Returns a function that makes windows with the answers' token positions."""
    if who == "ours":
        config = finetune.FinetuneConfig(task="squad1", doc_stride=100)
        return lambda: finetune.head_of(config).encode(examples, tokenizer(), seq_len)
    theirs = hugging_face_tokenizer()
    asked, passages = ([example.texts[i] for example in examples] for i in (0, 1))
    answers = [example.label[0] for example in examples]

    def windows() -> list[tuple[int, int]]:
        """As the well-known example scripts do it, offsets searched window by window."""
        # Their stride is what neighbouring windows share; these then begin some 100 tokens apart, as ours.
        found = theirs(asked, passages, truncation="only_second", max_length=seq_len, stride=seq_len - 112,
                       return_overflowing_tokens=True, return_offsets_mapping=True, padding=False)
        places = []
        for i, (offsets, of) in enumerate(zip(found["offset_mapping"], found["overflow_to_sample_mapping"])):
            start, text = answers[of]
            end, parts = start + len(text), found.sequence_ids(i)
            first, last = parts.index(1), len(parts) - 1 - parts[::-1].index(1)
            if offsets[first][0] > start or offsets[last][1] < end:
                places.append((0, 0))
                continue
            while first <= last and offsets[first][0] <= start:
                first += 1
            while offsets[last][1] >= end:
                last -= 1
            places.append((first - 1, last + 1))
        return places

    return windows


@pytest.mark.parametrize("who", ("ours", *HUGGING_FACE))
def test_squad_features(benchmark, who):
    """Question and passage to windows of 192 tokens with the places of the answers."""
    examples = questions()
    makers = {name: partial(make_features, name, examples, 192) for name in ("ours", *HUGGING_FACE)}
    case = f"SQuAD features, {len(examples):,} questions"
    turns = measure.take_turns(case, makers, rounds=4, warmup=1)
    measure.report(benchmark, case, who, turns, questions=len(examples))


def make_epoch(who: str, pairs: list[tuple[str, str]]) -> Callable[[], object]:
    """Returns a function that encodes sentence pairs and goes through an epoch of padded batches of 32."""
    if who == "ours":
        examples = [finetune.Example(str(i), "", pair, i % 3) for i, pair in enumerate(pairs)]
        head = finetune.head_of(finetune.FinetuneConfig(task="mnli"))

        def epoch() -> int:
            features = head.encode(examples, tokenizer(), 128)
            order = finetune.LengthBuckets(features, 32, 32, seed=0)
            steps = map(order.step, range(order.steps_per_epoch))
            return sum(batch.num_tokens for step in steps for batch in step.batches)

        return epoch
    import transformers

    theirs = hugging_face_tokenizer()
    collator = transformers.DataCollatorWithPadding(theirs)
    first, second = map(list, zip(*pairs))

    def their_epoch() -> int:
        found = theirs(first, second, truncation=True, max_length=128)
        order = np.random.default_rng(0).permutation(len(pairs))
        batches = (order[i : i + 32] for i in range(0, len(order), 32))
        rows = ([{name: found[name][i] for name in found} for i in batch] for batch in batches)
        return sum(int(collator(row)["attention_mask"].sum()) for row in rows)

    return their_epoch


@pytest.mark.parametrize("who", ("ours", *HUGGING_FACE))
def test_glue_epoch(benchmark, who):
    """8,000 sentence pairs: encoded, ordered, padded into batches; no model."""
    found = [sentence for text in measure.documents(10)[:1500] for sentence in split_sentences(text)]
    found = [sentence for sentence in found if 20 < len(sentence) < 300][:16_000]
    pairs = list(zip(found[::2], found[1::2]))
    makers = {name: partial(make_epoch, name, pairs) for name in ("ours", *HUGGING_FACE)}
    case = f"GLUE epoch without a model, {len(pairs):,} pairs"
    turns = measure.take_turns(case, makers, rounds=4, warmup=1)
    measure.report(benchmark, case, who, turns, pairs=len(pairs))
