"""train.py as a whole: what a run costs beside its steps, and what a second rank gains.

    pytest --benchmark-only bench/bench_train.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

import measure
import pytest
from bench_model import TINY
from measure import ON_GPU, QUICK

import data
import train

SMALL = TINY | {"seq_len": 128}


def run_training(out: Path, flags: dict[str, Any], ranks: int = 1, **options: Any) -> tuple[dict, float]:
    """Runs train.py as a command; returns its results, and the usual pace of its steps in tokens a second."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words = measure.command("train.py", flags | {"out": out}, launcher if ranks > 1 else None)
    done = subprocess.run(words, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    rates = [line["tokens_per_second"] for line in train.read_log(out) if "tokens_per_second" in line]
    return data.read_json(out / "results.json"), median(rates[1:])  # the first steps are slower


def test_whole_run(benchmark, corpus, tmp_path):
    """A run with its evaluations and checkpoints, beside its steps alone at their usual pace."""
    steps = 10 if QUICK else 600 if ON_GPU else 60  # on a GPU it begins by compiling
    flags = ({"preset": "base"} if ON_GPU else SMALL) | {
        "data": corpus.directory, "batch_size": 32 if ON_GPU else 8, "max_steps": steps, "warmup_steps": 5,
        "log_interval": steps // 10, "eval_interval": steps // 2, "eval_sequences": 16,
        "checkpoint_interval": steps // 2,
    }
    results, pace = benchmark.pedantic(run_training, (tmp_path / "run", flags), rounds=1)
    times = {"ours": [results["seconds"]], "its steps alone": [results["tokens"] / pace]}
    measure.note(benchmark, f"train.py, {steps} steps, 2 evaluations, 2 checkpoints", times)


def test_two_ranks(benchmark, corpus, tmp_path):
    """Two gloo ranks, a core each, beside one on one core: what talking costs. Perfect would be 2.

    The batch is of 4 sequences a rank: a step of two ranks is as long, and has twice the tokens.
    """
    if data.cores() < 2 or not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs two CPU cores, and Linux to keep each rank on one")
    paces = {}

    def run(ranks: int) -> None:
        flags = SMALL | {
            "data": corpus.directory, "batch_size": 4 * ranks, "micro_batch_size": 4, "warmup_steps": 2,
            "max_steps": 10 if QUICK else 40, "log_interval": 2, "eval_interval": 40, "eval_sequences": 4,
        }
        own = sorted(os.sched_getaffinity(0))[:ranks]
        no_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        _, paces[ranks] = run_training(tmp_path / f"ranks{ranks}", flags, ranks, env=no_gpu,
                                       preexec_fn=lambda: os.sched_setaffinity(0, own))

    run(1)
    benchmark.pedantic(run, (2,), rounds=1)
    times = {"ours": [1000 / paces[2]], "one rank": [1000 / paces[1]]}
    measure.note(benchmark, "train.py, 1,000 tokens with two ranks", times)
