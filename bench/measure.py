"""How the benchmarks measure: contestants take turns, and limits are measured, not looked up.

Two programs that are timed one after the other are timed on two machines: a laptop slows down as it warms
up, a server's neighbour wakes. So the contestants of a case take turns in one process, round by round:

    round       1         2         3
    a peer      9 ms      14 ms     9 ms
    ours        3 ms      5 ms      3 ms        a disturbance lasts longer than a turn, and so meets both

What is reported is the ratio of the medians, here 3. Two things are shared by all contestants because they
are the process's: the number of threads, and how the C library keeps freed memory, where train.py changes
it.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from roberta import RobertaConfig  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
synchronize = torch.get_device_module(DEVICE).synchronize  # which on a CPU does nothing
PRECISIONS = ("fp16", "bf16") if ON_GPU else ("fp32",)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUICK = bool(os.environ.get("BENCH_QUICK"))  # every case once, and small: does it work at all?

# Hugging Face's libraries; without them a case measures ours alone.
PEERS = all(importlib.util.find_spec(name) for name in ("transformers", "tokenizers"))
CASES: list[dict[str, Any]] = []  # what was measured in this session, for the table at its end


def command(script: str, flags: dict[str, Any], launcher: list[str] | None = None) -> list[str]:
    """Returns the words that run one of the four files with these flags."""
    words = [sys.executable, *(launcher or []), str(ROOT / script)]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


# ----------------------------------------------------------------------------------------------------------
# Taking turns
# ----------------------------------------------------------------------------------------------------------


def compare(benchmark: Any, case: str, contestants: dict[str, Callable[[], object]], *, rounds: int,
            warmup: int = 1, amount: tuple[float, str] | None = None, flops: float = 0,
            precision: str = "fp32") -> None:
    """Times the contestants of a case in turns; notes medians, ratios and rates in `benchmark.extra_info`.

    contestants: by name; "ours" is among them, and is whom pytest-benchmark's own columns are about.
    warmup: rounds before those that count.
    amount: what one turn works through, such as (4096, "tokens"), for the rate.
    flops: what one turn computes, for the share of the rate of a large matrix product.
    """
    if QUICK:
        rounds, warmup = 1, 0
    times: dict[str, list[float]] = {name: [] for name in contestants}
    memory: dict[str, int] = {}

    def turn(name: str) -> None:
        before = torch.cuda.memory_allocated() if ON_GPU else 0  # by all contestants' weights
        started = time.perf_counter()
        contestants[name]()
        synchronize()  # a GPU has only been told what to do when the call returns
        times[name].append(time.perf_counter() - started)
        if ON_GPU:
            memory[name] = torch.cuda.max_memory_allocated() - before
            torch.cuda.reset_peak_memory_stats()

    def turns_of_the_others() -> None:
        for name in contestants:
            if name != "ours":
                gc.collect()  # nobody pays for what another has left behind
                turn(name)
        gc.collect()

    # pytest-benchmark calls `setup` before each round and does not count its time: there the others go.
    benchmark.pedantic(lambda: turn("ours"), setup=turns_of_the_others, rounds=rounds, warmup_rounds=warmup)
    info = note(benchmark, case, {name: found[warmup:] for name, found in times.items()})
    medians = info["seconds"]
    if memory:
        info["peak_bytes"] = memory  # of the last turn, beyond weights and Adam's moments
    if amount:
        count, info["unit"] = amount
        info["per_second"] = {name: count / seconds for name, seconds in medians.items()}
    if flops:
        # Roofline: how much of what this machine's matrix products can do a contestant gets out of it.
        limit = matmul_rate(precision)
        info |= {"precision": precision, "flops": flops, "matmul_flops_per_second": limit}
        info["share_of_matmul_rate"] = {name: flops / seconds / limit for name, seconds in medians.items()}


def note(benchmark: Any, case: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Notes the seconds of all rounds, their medians and the ratios of these to ours; returns these notes."""
    case += " (quick)" if QUICK else ""
    medians = {name: median(found) for name, found in times.items()}
    ratios = {name: seconds / medians["ours"] for name, seconds in medians.items() if name != "ours"}
    benchmark.group = case
    info = benchmark.extra_info
    info |= {"case": case, "quick": QUICK, "rounds": times, "seconds": medians, "times_ours": ratios}
    CASES.append(info)
    return info


# ----------------------------------------------------------------------------------------------------------
# Limits
# ----------------------------------------------------------------------------------------------------------


@functools.cache
def matmul_rate(precision: str) -> float:
    """Returns the FLOP/s of a large matrix product on this machine, measured once in each session."""
    dtype, size = DTYPES[precision], 8192 if ON_GPU else 2048
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(13):
        started = time.perf_counter()
        torch.mm(a, b)
        synchronize()
        times.append(time.perf_counter() - started)
    # Each of the size² results takes `size` multiplications and as many additions. The first rounds warm up.
    return 2 * size**3 / median(times[3:])


def model_flops(config: RobertaConfig, batch_size: int, seq_len: int, predictions: int) -> float:
    """Returns the FLOPs of a forward pass: what the matrix products need, the head at predictions only.

    A multiplication and an addition are two. A training step takes three times as many: the backward pass
    makes two products for each one of the forward pass.
    """
    width, inner = config.hidden_size, config.intermediate_size
    # Of a token in a layer: query, key, value and output, then the two matrices of the feed-forward layer.
    weights = 4 * width**2 + 2 * width * inner
    # Its scores with every token of the sequence, then the sum of their values.
    attention = 2 * seq_len * width
    # Of a prediction: the head's dense layer, then the scores of the vocabulary.
    head = width**2 + width * config.vocab_size
    tokens = batch_size * seq_len
    return 2 * (tokens * config.num_hidden_layers * (weights + attention) + predictions * head)


# ----------------------------------------------------------------------------------------------------------
# Text, and the machine
# ----------------------------------------------------------------------------------------------------------


def texts_of(corpus: data.Corpus) -> Iterator[str]:
    """Yields the documents of a prepared corpus as text: byte-level BPE has lost nothing of it."""
    for begin, end in zip([0, *corpus.documents], corpus.documents):
        yield corpus.tokenizer.decode(corpus.tokens[begin:end].tolist())


def processor() -> str:
    """Returns the processor's name, as far as the system tells it."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text(encoding="utf-8")) if path.exists() else None
    return found[1] if found else platform.machine()


def machine() -> dict[str, str]:
    """Returns what a figure depends on beside the code: date, commit, hardware, versions."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    commit = found or os.environ.get("BENCH_COMMIT")  # a copy of the files may come without git's
    device = torch.cuda.get_device_name() if ON_GPU else f"{data.cores()} CPU cores ({processor()})"
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit or "unknown", "machine": device,
            "torch": torch.__version__, "python": platform.python_version()}
