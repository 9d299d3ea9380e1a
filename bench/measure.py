"""How the benchmarks measure: contestants in turns, rates beside times, limits measured and not looked up.

Two programs that are timed one after the other are timed on two machines: a laptop slows down as it warms up,
a cloud's neighbour wakes. So the contestants of a case take turns, round by round, and every ratio is of
times that were taken side by side. Models take them in a process each, so that none lives on memory that
another has left behind. pytest-benchmark then gets the times as if it had taken them.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import docstrings, documentation_files, find_parts, read_documents  # noqa: E402
from roberta import RobertaConfig  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PRECISIONS = ("fp16", "bf16") if ON_GPU else ("fp32",)

LEFT_OUT: dict[str, str] = {}  # peers that could not take part, and why: shown below the tables


def installed(package: str, peer: str) -> bool:
    """Returns whether a peer can take part; notes it if not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        LEFT_OUT[peer] = f"{package} is not installed"
    return found


class Clock:
    """A timer for pytest-benchmark that tells times taken earlier: `advance` is what is "timed"."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: Iterator[float]) -> None:
        self.now += next(seconds)


CLOCK = Clock()


class Turns(NamedTuple):
    """What one contestant's rounds took."""

    seconds: list[float]
    peak_memory: int  # bytes, of the GPU or of the contestant's process; 0 where it has none of its own


class Contestant:
    """What takes turns: a function without arguments, made here by `make()`."""

    def __init__(self, make: Callable[[], Callable]):
        self.run = make()

    def round(self) -> tuple[float, int]:
        """Returns the seconds of one call, a GPU waited for, and 0: see ProcessContestant."""
        gc.collect()
        synchronize()
        started = time.perf_counter()
        self.run()
        synchronize()
        return time.perf_counter() - started, 0  # of this process's memory others hold the most

    def end(self) -> None:
        del self.run
        gc.collect()


class ProcessContestant(Contestant):
    """The same in a process of its own: memory, allocator and caches are nobody else's. `make` is pickled."""

    def __init__(self, make: Callable[[], Callable]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(make, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def round(self) -> tuple[float, int]:
        """Returns the seconds of one call, and the highest memory use of the GPU or the process in bytes."""
        self.pipe.send("round")
        return self.pipe.recv()  # raises EOFError if it died; its traceback is on stderr

    def end(self) -> None:
        self.pipe.close()
        self.process.join()


def serve(make: Callable[[], Callable], pipe: Connection) -> None:
    """Does a round whenever asked, until the other end is closed."""
    torch.set_num_threads(train.cores())
    contestant = Contestant(make)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            reset_peak_memory()
            seconds, _ = contestant.round()
            pipe.send((seconds, peak_memory()))
            if ON_GPU:
                torch.cuda.empty_cache()  # the others need the room


_done: dict[str, dict[str, Turns]] = {}  # by case: its tests, one for each contestant, share the rounds


def take_turns(case: str, makers: dict[str, Callable[[], Callable]], rounds: int,
               kind: type[Contestant] = Contestant, warmup: int = 2) -> dict[str, Turns]:
    """Returns the times of all contestants of a case; they take their turns at the first call.

    warmup: rounds before those that count.
    """
    if case not in _done:
        contestants = {name: kind(make) for name, make in makers.items()}
        found = {name: [] for name in contestants}
        try:
            for number in range(-warmup, rounds):
                for name, contestant in contestants.items():
                    result = contestant.round()
                    if number >= 0:
                        found[name].append(result)
        finally:
            for contestant in contestants.values():
                contestant.end()
        _done[case] = {name: Turns([seconds for seconds, _ in results], max(peak for _, peak in results))
                       for name, results in found.items()}
    return _done[case]


def report(benchmark, case: str, who: str, turns: dict[str, Turns], flops: float = 0, precision: str = "fp32",
           **amounts: float) -> None:
    """Hands a contestant's times to pytest-benchmark, in the case's group, with rates in `extra_info`.

    amounts: what one round processes, such as tokens=4096; becomes tokens_per_second.
    """
    mine, middle = turns[who], median(turns[who].seconds)
    benchmark.group, benchmark.name = case, who
    info = benchmark.extra_info
    info |= {"case": case, "who": who, "device": device_name(), "peak_memory_bytes": mine.peak_memory}
    info |= {f"{what}_per_second": amount / middle for what, amount in amounts.items()}
    if flops:
        info |= {"precision": precision, "model_flops_per_second": flops / middle,
                 "matmul_flops_per_second": matmul_rate(precision),
                 "share_of_matmul_rate": flops / middle / matmul_rate(precision)}
    if "ours" in turns and who != "ours":
        # Of times taken in the same round; the median is not moved by a round that was disturbed.
        info["times_ours"] = median(a / b for a, b in zip(mine.seconds, turns["ours"].seconds))
    seconds = iter(mine.seconds)
    benchmark.pedantic(CLOCK.advance, (seconds,), rounds=len(mine.seconds))


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    """Begins a new measurement of the highest memory use, where the system lets us."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is now what is held now


def peak_memory() -> int:
    """Returns the highest memory use since the last reset, in bytes: the GPU's, or resident."""
    if ON_GPU:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024


def device_name() -> str:
    return torch.cuda.get_device_name() if ON_GPU else f"{torch.get_num_threads()} CPU threads"


_rates: dict[str, float] = {}


def matmul_rate(precision: str) -> float:
    """Returns the FLOP/s of a large matrix product on this machine, measured once in each session."""
    if precision not in _rates:
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        size = 8192 if ON_GPU else 2048
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(13):
            synchronize()
            started = time.perf_counter()
            torch.mm(a, b)
            synchronize()
            times.append(time.perf_counter() - started)
        _rates[precision] = 2 * size**3 / median(times[3:])
    return _rates[precision]


def model_flops(config: RobertaConfig, batch_size: int, seq_len: int, predictions: int) -> float:
    """Returns the FLOPs of a forward pass: what the matrix products need, the head at predictions only.

    A multiplication and an addition are two. A training step takes three times as many: the backward pass
    makes two products for each one of the forward pass.
    """
    width, inner = config.hidden_size, config.intermediate_size
    weights = config.num_hidden_layers * (4 * width**2 + 2 * width * inner)
    attention = config.num_hidden_layers * 2 * seq_len * width  # for a token: scores, then their values
    head = width**2 + width * config.vocab_size
    return 2 * (batch_size * seq_len * (weights + attention) + predictions * head)


@functools.cache
def documents(megabytes: int) -> list[str]:
    """Returns that much text: of BENCH_CORPUS, files or folders with a colon between, else docstrings.

    Less where there is not as much.
    """
    given = [path for path in os.environ.get("BENCH_CORPUS", "").split(":") if path]
    texts = (text for part in find_parts(given) for text in read_documents(*part)) if given else (
        text for path in documentation_files() if (text := docstrings(path)))
    found, size = [], 0
    for text in texts:
        found.append(text)
        size += len(text.encode())
        if size >= megabytes * 1_000_000:
            break
    return found
