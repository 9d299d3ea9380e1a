"""train.py as a whole: what the loop costs beside the model, and what a second rank gains.

    pytest --benchmark-only bench/bench_train.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import measure
import pytest
from bench_data import corpus
from measure import CLOCK, ROOT, Turns

import train
from data import read_json

pytestmark = pytest.mark.benchmark(timer=CLOCK)


SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024,
         "seq_len": 128, "batch_size": 8, "micro_batch_size": 4}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "seq_len": 512, "batch_size": 32, "micro_batch_size": 32}


def test_share_outside_the_model(benchmark, tmp_path):
    """The share of a run's time that is neither forward, backward nor optimiser, by what takes it.

    A GPU is waited for after every part, so what else runs meanwhile counts in full here.
    """
    steps = 60
    config = train.TrainConfig(
        preset="tiny", data=str(corpus().directory), out=str(tmp_path / "run"), max_steps=steps,
        warmup_steps=5, log_interval=10, eval_interval=30, eval_sequences=16, checkpoint_interval=30,
        **(BASE if measure.ON_GPU else SMALL))
    spent = {"step": 0.0, "wait": 0.0, "log": 0.0, "evaluate": 0.0, "save": 0.0}

    def timed(name: str, function):
        def call(*args):
            measure.synchronize()
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                measure.synchronize()
                spent[name] += time.perf_counter() - started
        return call

    run = train.Pretraining(replace(config, precision=measure.PRECISIONS[0]), corpus().directory,
                            train.set_up(measure.PRECISIONS[0]))
    run.resume()
    run.train_step(run.batches.step(0))  # the first is slower, and not part of it
    for method in ("log", "evaluate", "save"):
        setattr(run, method, timed(method, getattr(run, method)))
    run.train_step = timed("step", run.train_step)
    measure.reset_peak_memory()
    started = time.perf_counter()
    run.loop(config.eval_interval)
    measure.synchronize()
    total = time.perf_counter() - started
    spent["wait"] = total - sum(spent.values())  # for data, and what the loop itself does
    turns = {"ours": Turns([total], measure.peak_memory())}
    measure.report(benchmark, "train.py, whole run", "ours", turns, steps=steps - 1)
    benchmark.extra_info |= {f"share_of_{name}": seconds / total for name, seconds in spent.items()}


@pytest.mark.parametrize("ranks", (1, 2))
def test_ranks(benchmark, tmp_path, ranks):
    """Tokens a second of 1 gloo rank on 1 CPU, and of 2 on 2: what they lose by talking to each other.

    The batch is of 4 sequences a rank, so that perfect scaling is twice the tokens of one.
    """
    if train.cores() < 2 or not hasattr(os, "sched_setaffinity"):
        measure.LEFT_OUT["2 gloo ranks against 1"] = "needs two CPU cores, and Linux to keep each rank on one"
        pytest.skip("needs two CPU cores, and Linux")
    flags = SMALL | {"batch_size": 4 * ranks, "micro_batch_size": 4, "max_steps": 40, "warmup_steps": 2,
                     "log_interval": 5, "eval_interval": 40, "eval_sequences": 4}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               str(ROOT / "train.py"), "--data", str(corpus().directory), "--out", str(tmp_path), *words]
    own = sorted(os.sched_getaffinity(0))[:ranks]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                   preexec_fn=lambda: os.sched_setaffinity(0, own))
    lines = [line for line in train.read_log(tmp_path) if "tokens_per_second" in line]
    tokens = read_json(tmp_path / "results.json")["tokens"] / flags["max_steps"]
    turns = Turns([tokens / line["tokens_per_second"] for line in lines[2:]], 0)
    who = f"{ranks} rank{'s' * (ranks > 1)}"
    measure.report(benchmark, "train.py, ranks of a core each", who, {who: turns}, tokens=tokens)
