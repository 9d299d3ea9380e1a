"""bench/: the studies end to end at their smallest, their rules on worked examples, the report."""

import argparse
import json
import math
import re
import subprocess
import sys

import pytest
from helpers import ROOT, make_documents, run

import data

sys.path.insert(0, str(ROOT / "bench"))
import measure  # noqa: E402
import report  # noqa: E402
import study  # noqa: E402
from masking import Masking  # noqa: E402
from text_encoding import UNKNOWN, as_for_bert  # noqa: E402

STUDIES = ("batch_size", "masking", "input_format", "text_encoding", "data_size")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The directory where all five studies have run, two at a time."""
    root = tmp_path_factory.mktemp("studies")
    (root / "text.txt").write_text("\n\n".join(make_documents(400)), encoding="utf-8")
    for names in (STUDIES[:1], STUDIES[1:3], STUDIES[3:]):  # the first makes the data for the others
        running = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "bench" / f"{name}.py"), "--scale", "smoke", "--jobs", "1"]
                + ["--corpus", str(root / "text.txt"), "--out", str(root), "--results", str(root)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for name in names
        ]  # fmt: skip
        for process in running:
            output = process.communicate()[0]
            assert process.returncode == 0, output
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_smoke(smoke, name):
    record = json.loads((smoke / f"{name}-smoke.json").read_text())
    assert record["study"] == name and record["paper"]
    assert len({run["seed"] for run in record["runs"]}) == 2
    assert all(run["eval_loss"] > 0 and run["steps"] > 0 for run in record["runs"])
    text = (smoke / f"{name}-smoke.md").read_text()
    assert f"- The paper: {record['paper']}" in text and len(re.findall("^- ", text, re.MULTILINE)) >= 5
    for line in text.splitlines():
        if line.startswith("!["):
            picture = smoke / line.partition("](")[2].rstrip(")")
            assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_equal_passes(smoke):
    """§4.3: a batch four times as large takes a quarter of the steps."""
    runs = json.loads((smoke / "batch_size-smoke.json").read_text())["runs"]
    assert {(run["batch_size"], run["steps"]) for run in runs} == {(4, 64), (16, 16)}


@pytest.mark.slow
def test_second_call_repeats_nothing(smoke):
    """Finished runs are found done: the same records, and no log line more."""
    logs = {path: path.read_text() for path in smoke.glob("masking-smoke/*/log.jsonl")}
    before = json.loads((smoke / "masking-smoke.json").read_text())["runs"]
    again = run("bench/masking.py", "--corpus", str(smoke / "text.txt"), "--out", str(smoke),
                "--results", str(smoke / "again"), "--jobs", "1")  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert json.loads((smoke / "again" / "masking-smoke.json").read_text())["runs"] == before
    assert {path: path.read_text() for path in logs} == logs


@pytest.mark.slow
def test_static_and_dynamic_are_equal_for_ten_epochs(smoke):
    runs = json.loads((smoke / "masking-smoke.json").read_text())["runs"]
    static, dynamic = ([r["eval_loss"] for r in runs if r["masking"] == m] for m in ("static", "dynamic"))
    assert static == dynamic and runs[0]["steps"] < 10 * runs[0]["steps_per_epoch"]


@pytest.mark.slow
def test_shares_are_nested_and_hold_the_same_documents_out(smoke):
    held_out, kept = [], []
    for name in ("units1024", "units1024-share0.5"):
        for split, found in (("heldout", held_out), ("train", kept)):
            corpus = data.Corpus(smoke / "data" / name, split)
            documents = set()
            for shard in corpus.shards:
                bounds = [0, *shard.documents]
                documents |= {corpus.tokenizer.decode(shard.tokens[a:b]) for a, b in zip(bounds, bounds[1:])}
            found.append(documents)
    assert held_out[0] == held_out[1]
    assert kept[1] < kept[0] and 0.35 < len(kept[1]) / len(kept[0]) < 0.65


def test_bad_flags(tmp_path):
    for flags, message in ((["--jobs", "0"], "--jobs 0"), (["--corpus", "nowhere.txt"], "nowhere.txt")):
        failed = run("bench/masking.py", *flags, "--out", str(tmp_path))
        assert failed.returncode != 0 and message in failed.stderr
        assert "Traceback" not in failed.stderr


def test_seeds_decide_what_is_told_apart():
    low, high, both = ([{"x": value} for value in found] for found in ([1, 2, 3], [4, 5, 6], [2, 4, 9]))
    assert study.apart(low, high, "x") == 1 and study.apart(high, low, "x") == -1
    assert study.apart(low, both, "x") == 0
    assert study.compare(low, high, "x") == "better in every seed (2 against 5)"


def masking_record(masking, seed, loss):
    return {"masking": masking, "seed": seed, "steps": 200, "steps_per_epoch": 10, "unigram_perplexity": 9.0,
            "eval_loss": loss, "eval_perplexity": math.exp(loss), "curve": [[200, loss]]}  # fmt: skip


VERDICTS = {
    (1, 1): "The direction agrees",
    (3, 3): "Differs",
    (2.01, 1.99): "As in the paper, the two are close",
    (1, 3): "The seeds disagree",
}


@pytest.mark.parametrize(("dynamic", "verdict"), VERDICTS.items())
def test_a_reading_follows_the_numbers(dynamic, verdict):
    """A study that contradicts the paper says so."""
    records = [masking_record("static", seed, 2.0) for seed in range(2)]
    records += [masking_record("dynamic", seed, float(loss)) for seed, loss in enumerate(dynamic)]
    reading = Masking(argparse.Namespace(scale="smoke", seeds=2, out="."))
    assert reading.reading(records)[-1].startswith(verdict)


def test_characters_as_for_bert():
    assert as_for_bert("Don't  stop\n naïve_x") == "Don ' t stop\nnaive _ x"
    assert as_for_bert("x 日本語 y") == f"x {UNKNOWN} y"


def test_flops_by_hand():
    """One layer of width 2, inner width 3, 5 units; 2 sequences of 4 tokens, 1 prediction."""
    config = measure.RobertaConfig.tiny(
        vocab_size=5, hidden_size=2, num_hidden_layers=1, num_attention_heads=1, intermediate_size=3
    )
    layer = 4 * 2 * 2 + 2 * 2 * 3  # four square projections, two of the feed-forward layer
    attention = 4 * 2 + 4 * 2  # a token's scores with 4 others, and their weighted sum
    head = 2 * 2 + 2 * 5
    assert measure.model_flops(config, 2, 4, 1) == 2 * (8 * (layer + attention) + head)


def test_turns_alternate():
    order = []
    makers = {name: lambda name=name: lambda: order.append(name) for name in "ab"}
    turns = measure.take_turns("test", makers, rounds=2, warmup=1)
    assert order == list("ababab") and len(turns["a"].seconds) == 2
    assert (
        measure.take_turns("test", {}, rounds=2) is turns
    )  # the second of the case's tests measures nothing


def test_plain_pytest_leaves_benchmarks_out():
    found = run("-m", "pytest", "--collect-only", "-q", "bench")
    assert "bench/bench_" not in found.stdout and "bench/study.py" in found.stdout


def test_report(tmp_path):
    """A table with the ratio, a figure for each kind of bar; a file of another kind is named."""
    info = {"case": "masking", "who": "ours", "tokens_per_second": 5e6, "peak_memory_bytes": 10**9}
    peer = info | {"who": "a peer", "times_ours": 3.0, "share_of_matmul_rate": 0.25}
    rows = [{"extra_info": each, "stats": {"median": 0.5}} for each in (info, peer)]
    machine = {"machine": "a machine", "torch": "2", "python": "3", "date": "today", "commit": "abc"}
    path = tmp_path / "benchmarks-test.json"
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": rows}))
    report.main(["--out", str(tmp_path), str(path)])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| masking | ours | 500 ms | 5,000,000 tokens/s |" in text and "| 3.00 | 25% |" in text
    assert {p.name for p in (tmp_path / "results").iterdir()} == {"test-peers.png", "test-roofline.png"}
    path.write_text("{}")
    with pytest.raises(SystemExit, match="benchmarks-test.json"):
        report.main(["--out", str(tmp_path), str(path)])
