"""bench/: the studies end to end at their smallest, worked examples, how the benchmarks measure."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, make_documents, run

import data

sys.path.insert(0, str(ROOT / "bench"))
import measure  # noqa: E402
import report  # noqa: E402
import study  # noqa: E402

STUDIES = ("batch_size", "masking", "input_format", "text_encoding", "data_size", "ladder")


def call_gpu_sh(root, *parts):
    """Calls bench/gpu.sh, on this machine and at its smallest; returns what it printed."""
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    quick = {"BENCH_QUICK": "1", "BENCH_SECONDS": "3000", "BENCH_CORPUS": f"{root}/text.txt", "PATH": paths}
    words = ["bash", str(ROOT / "bench/gpu.sh"), str(root / "out"), *parts]
    return subprocess.run(words, env=os.environ | quick, capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The directory where bench/gpu.sh has done all."""
    root = tmp_path_factory.mktemp("gpu")
    (root / "text.txt").write_text("\n\n".join(make_documents(400)), encoding="utf-8")
    done = call_gpu_sh(root)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def records(smoke, name):
    return json.loads((smoke / f"out/results/{name}-smoke.json").read_text())["runs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_smoke(smoke, name):
    """Records of two seeds, a table with the paper's figures, a figure."""
    runs = records(smoke, name)
    assert {run["seed"] for run in runs} == {0, 1}
    assert all(run["eval_loss"] > 0 and run["steps"] > 0 for run in runs)
    stem = smoke / f"out/results/{name}-smoke"
    text = stem.with_suffix(".md").read_text()
    assert "| paper: " in text and f"]({name}-smoke.png)" in text
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_equal_passes(smoke):
    """§4.3: a batch four times as large takes a quarter of the steps."""
    assert {(run["batch_size"], run["steps"]) for run in records(smoke, "batch_size")} == {(4, 64), (16, 16)}


@pytest.mark.slow
def test_static_and_dynamic_are_equal_for_ten_epochs(smoke):
    runs = records(smoke, "masking")
    static, dynamic = ([r["eval_loss"] for r in runs if r["masking"] == m] for m in ("static", "dynamic"))
    assert static == dynamic and {run["passes"] for run in runs} == {1, 4}


@pytest.mark.slow
def test_second_call_repeats_nothing(smoke):
    """Parts that are done are left as they are; without that note a study finds its runs done."""
    def files():
        return {path: path.stat().st_mtime_ns for path in (smoke / "out/studies/masking-smoke").rglob("*")}

    before, runs = files(), records(smoke, "masking")
    archive = smoke / "out/results.tar.gz"
    archive.unlink()
    (smoke / "out/masking-smoke.done").unlink()
    assert "all is done; done so far: base128-smoke.done" in call_gpu_sh(smoke).stdout
    assert files() == before and records(smoke, "masking") == runs
    with tarfile.open(archive) as packed:
        names = {Path(name).name for name in packed.getnames()}
    assert {"tiny-smoke.json", "train-smoke.md", *(f"{name}-smoke.png" for name in STUDIES)} <= names


@pytest.mark.slow
def test_what_fails_is_not_done(tmp_path):
    (tmp_path / "text.txt").write_text("too little")
    failed = call_gpu_sh(tmp_path, "masking")
    assert failed.returncode == 1 and "masking ended with 1" in failed.stderr
    assert not (tmp_path / "out/masking-smoke.done").exists()
    again = call_gpu_sh(tmp_path, "masking")
    assert again.returncode == 1 and "masking ended" not in again.stderr and "left alone" in again.stderr


@pytest.mark.slow
def test_shares_hold_the_same_documents_out(smoke):
    whole, half = (smoke / f"out/studies/data/units1024{share}" for share in ("", "-share0.5"))
    texts = [set(measure.texts_of(data.Corpus(part, "heldout"))) for part in (whole, half)]
    assert texts[0] == texts[1]
    kept, of = (set(measure.texts_of(data.Corpus(part))) for part in (half, whole))
    assert kept < of and 0.4 < len(kept) / len(of) < 0.6


def test_bad_flags(tmp_path):
    cases = ((["--jobs", "0"], 2, "--jobs 0"), (["--corpus", "no.txt"], 1, "no.txt"),
             (["--glue", "no"], 2, "no has no SST-2"))
    for flags, code, message in cases:
        failed = run("bench/masking.py", *flags, "--out", tmp_path, code=code)
        assert message in failed.stderr and "Traceback" not in failed.stderr


def test_table_beside_the_papers():
    """A cell that the paper has stands in one line with its figures; the paper's others follow."""
    paper = study.Paper("Table 1", ("SST-2",), {("static",): (92.5,), ("dynamic",): (92.9,)})
    masking = study.Study("masking", "", {"smoke": [{"masking": "static"}]}, None, (), paper)
    runs = [{"masking": "static", "steps": 10, "eval_perplexity": value} for value in (2.0, 4.0)]
    lines = study.table(masking, runs).splitlines()[2:]
    assert lines == ["| static | 10 | 3 (2 to 4) | 92.5 |", "| dynamic |  |  | 92.9 |"]


def test_flops_by_hand():
    """One layer of width 2, inner width 3, 5 units; 2 sequences of 4 tokens, 1 prediction."""
    config = SimpleNamespace(hidden_size=2, intermediate_size=3, num_hidden_layers=1, vocab_size=5)
    layer = 4 * 2 * 2 + 2 * 2 * 3  # four square projections, two of the feed-forward layer
    attention = 4 * 2 + 4 * 2  # a token's scores with 4 others, and their weighted sum
    head = 2 * 2 + 2 * 5
    assert measure.model_flops(config, 2, 4, 1) == 2 * (8 * (layer + attention) + head)


class Benchmark(SimpleNamespace):
    """What pytest-benchmark's fixture does with `pedantic`, as far as it concerns us."""

    def pedantic(self, function, setup, rounds, warmup_rounds):
        for _ in range(warmup_rounds + rounds):
            setup()
            function()


def test_turns_alternate(monkeypatch):
    monkeypatch.setattr(measure, "QUICK", False)
    monkeypatch.setattr(measure, "CASES", [])
    order, benchmark = [], Benchmark(extra_info={})
    contestants = {name: lambda name=name: order.append(name) for name in ("ours", "a", "b")}
    measure.compare(benchmark, "case", contestants, rounds=2, warmup=1, amount=(5, "tokens"))
    assert order == ["a", "b", "ours"] * 3
    seconds, ratios = benchmark.extra_info["seconds"], benchmark.extra_info["times_ours"]
    assert ratios == {name: seconds[name] / seconds["ours"] for name in ("a", "b")}
    assert report.table(measure.CASES).count("tokens/s") == 3


def test_plain_pytest_leaves_benchmarks_out():
    found = run("-m", "pytest", "--collect-only", "-q", "bench")
    assert "bench/bench_" not in found.stdout and "bench/study.py" in found.stdout
