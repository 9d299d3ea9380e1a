"""What must survive: kills, full disks, damaged files, dead and stalled ranks, bad text, hostile input.

Each test injects a fault and compares what is left with an undisturbed run. The long ones are run by
`pytest -m slow`; `--faults-json PATH` has the counts written.
"""

import errno
import functools
import gzip
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, ends, make_documents, run, same
from test_data import arguments_of, contents, flags, greedy, random_shard, write_corpus
from test_train import command, config, interrupt_at, losses, same_weights, weights

import data
import finetune
import train

KILLS = 30


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    train.train(config(prepared, out))
    return out


def storm(*arguments):
    """Runs tests/storm.py; returns its counts."""
    command = [sys.executable, "tests/storm.py", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def same_result(a, b):
    """Whether two runs ended with the same log, evaluation, weights and optimiser state, to the bit."""
    ends = [json.loads((out / "results.json").read_text()) for out in (a, b)]
    for end in ends:
        del end["seconds"], end["peak_memory_bytes"]
    states = [torch.load(out / "checkpoint" / "training.pt", weights_only=True) for out in (a, b)]
    kept = ("optimizer", "scaler", "window", "health")
    return (
        losses(a) == losses(b)
        and same_weights(a, b)
        and ends[0] == ends[1]
        and all(same(states[0][key], states[1][key]) for key in kept)
    )


def lines_of(out):
    """The lines of the log, each of which must be whole."""
    content = (out / "log.jsonl").read_text()
    assert content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


def no_partial_file(out):
    return not [path for path in out.rglob(".*") if path.name != ".lock"]


# ----------------------------------------------------------------------------------------------------------
# Killed at any moment
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_killed_thirty_times_is_the_same_to_the_bit(prepared, tmp_path, tally, precision):
    small = {"max_steps": 900, "checkpoint_interval": 4, "eval_interval": 20, "precision": precision}
    straight, out = tmp_path / "straight", tmp_path / "killed"
    storm(
        "random",
        *command(prepared, straight, **small)[:1],
        0,
        0,
        0,
        *command(prepared, straight, **small)[1:],
    )
    counts = storm("random", "train.py", KILLS, 0.9, 1, *command(prepared, out, **small)[1:])
    assert counts["kills"] == KILLS and counts["inside_a_write"] > 0
    assert same_result(straight, out) and no_partial_file(out)
    steps = [line["step"] for line in lines_of(out) if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 900
    tally(f"training killed at random moments, {precision}", counts.pop("kills"), **counts)


@pytest.mark.slow
def test_a_run_killed_at_every_step_of_saving_is_the_same_to_the_bit(prepared, tmp_path, tally):
    """It goes on with a finished run, so that there are things of that one left to be replaced."""
    out = tmp_path / "run"
    train.train(config(prepared, out, max_steps=4, warmup_steps=3, checkpoint_interval=2))
    counts = storm("every", *command(prepared, out, checkpoint_interval=3))
    assert counts["kills"] > 40
    for number in range(1, counts["kills"] + 1):
        killed = out.with_name(f"run-killed-{number}")
        assert train.read_log(killed)[-1]["step"] == 12 and no_partial_file(killed), number
        assert (killed / "checkpoint").resolve() == killed.resolve() / "checkpoint-12", number
        assert same_result(out, killed), number
    tally("training killed before each rename, flush, link, deletion", counts["kills"])


@pytest.mark.slow
def test_prepare_killed_thirty_times_is_the_same_byte_for_byte(tmp_path, tally):
    corpus = write_corpus(tmp_path / "corpus", files=12, documents=1200)
    (corpus / "bad.txt").write_bytes(b"good\n\nbad \xff line\n\nother")
    arguments = [*arguments_of(corpus, tmp_path / "out")[:-6], "--corpus", corpus, "--out", tmp_path / "out"]
    counts = storm("random", "data.py", KILLS, 0.4, 2, *arguments)
    assert counts["kills"] == KILLS
    assert contents(tmp_path / "out") == contents(data.prepare(flags(corpus, tmp_path / "straight")))
    tally("prepare killed at random moments, 1 to 4 workers", counts.pop("kills"), **counts)


# ----------------------------------------------------------------------------------------------------------
# Ranks that die, stall, become more or fewer
# ----------------------------------------------------------------------------------------------------------


def stalling(tmp_path, what, rank=1, step=8, where="loss_sums"):
    """A script like train.py in which a rank does `what` in one of the steps of its first attempt."""
    script = tmp_path / "stalling.py"
    script.write_text(
        f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
        f"original = train.Pretraining.{where}\n"
        "def stalled(self, *arguments):\n"
        "    first = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0'\n"
        f"    if first and self.step == {step} and self.setup.rank == {rank}:\n"
        f"        {what}\n"
        "    return original(self, *arguments)\n"
        f"train.Pretraining.{where} = stalled\ntrain.main()\n"
    )
    return script


STOP = "os.kill(os.getpid(), signal.SIGSTOP)"


LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "rank", "step", "where", "message"),
    [
        (STOP, 1, 8, "loss_sums", "is silent, last seen "),  # a beat before it stopped
        ("time.sleep(1000)", 1, 8, "loss_sums", "stands still in step 9, before the gradients are summed"),
        ("time.sleep(1000)", 1, 6, "measure", "stands still in the evaluation of step 6"),
        ("time.sleep(1000)", 0, 6, "_note_if_best", "stands still in the checkpoint of step 6"),
        ("time.sleep(1000)", 0, 6, "is_over", "stands still after the sum of the signals"),
    ],
)
def test_a_stalled_rank_ends_the_run_and_is_named(
    straight, prepared, tmp_path, tally, what, rank, step, where, message
):
    out, script = tmp_path / "run", stalling(tmp_path, what, rank, step, where)
    arguments = command(prepared, out, micro_batch_size=2, timeout=4)[1:]
    began = time.monotonic()
    result = run(*LAUNCHER, script, *arguments)
    assert result.returncode != 0 and time.monotonic() - began < 60
    assert re.search(rf"error: rank {rank} \(process .* on .*\) {message}", result.stderr), result.stderr
    assert "--timeout 4 s" in result.stderr and "all ranks" not in result.stderr
    assert run(*LAUNCHER, "train.py", *arguments).returncode == 0
    assert same_weights(straight, out, 1e-6)
    tally("rank stalled, the run ended naming it")


@pytest.mark.slow
def test_a_rank_that_is_slow_but_gets_on_is_waited_for(straight, prepared, tmp_path):
    """Each of its micro-batches takes less than half of --timeout, all of them more than the whole."""
    out, script = tmp_path / "run", stalling(tmp_path, "time.sleep(1.7)")
    result = run(*LAUNCHER, script, *command(prepared, out, micro_batch_size=1, timeout=4)[1:])
    assert result.returncode == 0 and "error" not in result.stderr, result.stderr
    assert same_weights(straight, out, 1e-6)


@pytest.mark.slow
def test_a_stopped_rank_through_which_the_others_met_ends_them(prepared, tmp_path, tally):
    """Started by hand, without torchrun, rank 0 has the store that all heartbeats go to."""
    script = stalling(tmp_path, STOP, rank=0)
    arguments = list(map(str, command(prepared, tmp_path / "run", micro_batch_size=2, timeout=4)[1:]))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        places = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in (places | meeting).items()}
        ranks.append(
            subprocess.Popen(
                [sys.executable, script, *arguments], env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    _, errors = ranks[1].communicate(timeout=60)
    ranks[0].kill()
    ranks[0].communicate()
    assert ranks[1].returncode == 1, errors
    assert "the process through which the ranks met (torchrun, or rank 0) answers no more" in errors
    tally("rank 0 stopped, which has the store")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["os.kill(os.getpid(), signal.SIGKILL)", STOP])
def test_torchrun_starts_again_after_a_dead_or_stalled_rank(straight, prepared, tmp_path, tally, what):
    out, script = tmp_path / "run", stalling(tmp_path, what)
    arguments = command(prepared, out, micro_batch_size=2, timeout=4)[1:]
    result = run(*LAUNCHER, "--max-restarts", 1, script, *arguments)
    assert result.returncode == 0, result.stderr
    assert "resuming at step 6" in result.stdout
    assert same_weights(straight, out, 1e-6)
    tally("rank killed or stopped under --max-restarts")


@pytest.mark.slow
def test_one_rank_then_two_then_one_is_the_same_run(straight, prepared, tmp_path, monkeypatch, tally):
    """The order of the data and the masks are the same, so the losses are, but for rounding."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(SystemExit):
            train.train(config(prepared, out))
    changed = "interrupt = train.Run.train_step\ndef train_step(self, step):\n    interrupt(self, step)\n"
    changed += (
        "    if self.step == 9: signal.raise_signal(signal.SIGTERM)\ntrain.Run.train_step = train_step\n"
    )
    script = tmp_path / "two.py"
    script.write_text(
        f"import signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n{changed}train.main()"
    )
    result = run(*LAUNCHER, script, *command(prepared, out, micro_batch_size=4)[1:])
    assert "resuming at step 3" in result.stdout and "stopped at step 9" in result.stdout, result.stderr
    train.train(config(prepared, out))
    assert same_weights(straight, out, 1e-6)
    for one, two in zip(losses(straight), losses(out), strict=True):
        assert one.keys() == two.keys()
        assert all(one[key] == pytest.approx(two[key], rel=1e-4) for key in one)
    tally("ranks changed 1, 2, 1", 2)


# ----------------------------------------------------------------------------------------------------------
# Signals
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_leaves_a_checkpoint_of_its_step(prepared, tmp_path, tally, number):
    """Sent from the first log line on, so that it comes in steps, evaluations and checkpoints."""
    for delay in (0, 0.02, 0.05, 0.11, 0.3):
        out = tmp_path / str(delay)
        many = command(prepared, out, max_steps=100_000, checkpoint_interval=10, eval_interval=7)
        process = subprocess.Popen([sys.executable, *many], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        while "loss" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(delay)
        process.send_signal(number)
        printed = process.communicate(timeout=60)[0]
        assert process.returncode == 128 + number
        step = int(printed.split("stopped at step ")[1].split(",")[0])
        assert train.newest_checkpoint(out, json.loads((out / "run.json").read_text())["identity"]) == step
        assert no_partial_file(out) and lines_of(out)[-1]["step"] <= step
    tally(f"signal {number.name} at different moments", 5)


def test_a_signal_during_the_last_checkpoint_is_heeded(straight, prepared, tmp_path, monkeypatch, capsys):
    """It must not be lost, lest the next run of a sweep begins; what was trained is saved."""
    out, original = tmp_path / "run", train.Pretraining.plot

    def plot(self):
        original(self)
        if self.step == 12:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.Pretraining, "plot", plot)
        with pytest.raises(SystemExit) as stopped:
            train.train(config(prepared, out))
    assert stopped.value.code == 130 and "stopped at step 12, saved" in capsys.readouterr().out
    train.train(config(prepared, out))
    assert same_result(straight, out)


@pytest.mark.parametrize("script", ["data.py", "train.py"])
def test_ctrl_c_before_training_is_one_line_and_130(tmp_path, script):
    corpus = write_corpus(tmp_path / "corpus", files=12, documents=900)
    if script == "data.py":
        arguments = arguments_of(corpus, tmp_path / "out", workers=2)
    else:
        arguments = command(corpus, tmp_path / "out", vocab_size=400)[1:]
    process = subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "digest" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.startswith("interrupted") and errors.count("\n") == 1, errors


# ----------------------------------------------------------------------------------------------------------
# Full disks
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, where one may be mounted; filled and emptied by the tests."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system takes root's rights")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(place, leave):
    """Takes all space of a disk but for `leave` bytes; returns the file that takes it."""
    statistics = os.statvfs(place)
    filler = place / "filler"
    filler.write_bytes(bytes(max(0, statistics.f_bavail * statistics.f_frsize - leave)))
    return filler


@pytest.mark.parametrize("leave", [0, 20_000, 90_000])
def test_a_full_disk_in_a_checkpoint(straight, prepared, small_disk, monkeypatch, leave, tally):
    out = small_disk / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train.Pretraining, "plot", lambda _: None)
        interrupt_at(patch, 6)
        with pytest.raises(SystemExit):
            train.train(config(prepared, out))
        filler = fill(small_disk, leave)
        with pytest.raises(
            OSError, match=r"cannot write .* is the disk full\?|No space left on device: '.*run"
        ):
            train.train(config(prepared, out))
    assert [step for step, _ in train.checkpoints(out)] == [6]
    assert lines_of(out) and not list(out.glob(".*checkpoint*"))
    filler.unlink()
    train.train(config(prepared, out))
    assert same_result(straight, out)
    tally("disk full in a checkpoint")


def test_a_full_disk_in_a_log_line_leaves_no_part_of_it(straight, prepared, tmp_path, monkeypatch, tally):
    """A limit on the size of files, which Python sees as EFBIG, comes in the middle of a line."""
    out = tmp_path / "run"
    interrupt_at(monkeypatch, 6)
    with pytest.raises(SystemExit):
        train.train(config(prepared, out))
    padding = {"step": 0, "note": "x" * 400_000}
    (out / "log.jsonl").write_text(json.dumps(padding) + "\n" + (out / "log.jsonl").read_text())
    limit = (out / "log.jsonl").stat().st_size + 50
    code = (
        f"import resource, sys, train; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "train.main(sys.argv[1:])"
    )
    result = run("-c", code, *command(prepared, out)[1:])
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "log.jsonl" in result.stderr and "is the disk full?" in result.stderr
    assert lines_of(out)[-1]["step"] == 6
    (out / "log.jsonl").write_text("".join((out / "log.jsonl").read_text().splitlines(True)[1:]))
    train.train(config(prepared, out))
    assert same_result(straight, out)
    tally("disk full in a log line")


def test_a_full_disk_in_a_shard(small_disk, tmp_path, tally):
    corpus = write_corpus(tmp_path / "corpus", files=4, documents=300)
    filler = fill(small_disk, 150_000)
    for _ in range(2):  # what the first time left is no more after the second
        result = run("data.py", *arguments_of(corpus, small_disk / "out", workers=2))
        assert result.returncode == 1 and "No space left on device" in result.stderr
        assert result.stderr.count("\n") == 1
    shards = list((small_disk / "out").glob(".train-*.tmp"))
    assert len(shards) == len({path.name.split(".tokens")[0] for path in shards if "tokens" in path.name}) * 3
    filler.unlink()
    assert run("data.py", *arguments_of(corpus, small_disk / "out")).returncode == 0
    assert contents(small_disk / "out") == contents(data.prepare(flags(corpus, tmp_path / "straight")))
    tally("disk full in a shard")


# ----------------------------------------------------------------------------------------------------------
# Damaged, swapped and hostile files
# ----------------------------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def swap_with_another_run(path, other):
    shutil.rmtree(path.parent)
    shutil.copytree(other, path.parent)


class Evil:
    def __reduce__(self):
        return (os.system, (f"touch {os.environ['EVIL']}",))


def replace_by_evil(path):
    torch.save({"state": {"step": 12}, "optimizer": Evil()}, path)
    sign(path)


def replace_by_a_step_of_before(path):
    shutil.copy(path.parent.with_name("checkpoint-6") / path.name, path)
    sign(path)


def lead_astray(path):
    sums = path.parent / "checksums.json"
    sums.write_text(json.dumps(json.loads(sums.read_text()) | {"../../../../etc/passwd": "0"}))


def forget_a_checksum(path):
    sums = json.loads((path.parent / "checksums.json").read_text())
    del sums[path.name]
    (path.parent / "checksums.json").write_text(json.dumps(sums))


def sign(path):
    """Makes the checksums fit an altered file, as who means harm would."""
    sums = json.loads((path.parent / "checksums.json").read_text())
    sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "checksums.json").write_text(json.dumps(sums))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("training.pt", cut, "training.pt does not have its checksum"),
        ("pytorch_model.bin", flip, "pytorch_model.bin does not have its checksum"),
        ("config.json", flip, "config.json does not have its checksum"),
        ("checksums.json", flip, "checksum"),
        ("checksums.json", Path.unlink, "checksums.json"),
        ("merges.txt", Path.unlink, "merges.txt"),
        ("training.pt", "swap", "it is step 12 of run"),
        ("training.pt", replace_by_a_step_of_before, "it is step 6 of run"),
        ("training.pt", forget_a_checksum, "checksums.json has none for training.pt"),
        ("training.pt", lead_astray, "is no file of the checkpoint"),
        ("training.pt", replace_by_evil, "refused, it holds more than plain weights"),
    ],
)
def test_an_unsound_checkpoint_is_named_and_the_one_before_used(
    straight, prepared, tmp_path, monkeypatch, capsys, name, damage, message, tally
):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    out = tmp_path / "run"
    shutil.copytree(straight, out, symlinks=True)
    if damage == "swap":
        train.train(config(prepared, tmp_path / "other", seed=5))
        damage = functools.partial(swap_with_another_run, other=tmp_path / "other" / "checkpoint-12")
    damage(out / "checkpoint-12" / name)
    train.train(config(prepared, out))
    printed = capsys.readouterr().out
    warning = printed.split("warning: ")[1].split("\n")[0]
    assert message in warning and "checkpoint-12 is damaged" in warning, warning
    assert "resuming at step 6" in printed and not (tmp_path / "evil").exists()
    assert same_result(straight, out)
    tally("checkpoint damaged, swapped or hostile")


def without_flags(out):
    """What a run holds, but for the flags of its last start."""
    return {name: digest for name, digest in contents(out).items() if name != "run.json"}


def test_where_all_checkpoints_are_damaged_nothing_is_begun_anew(straight, prepared, tmp_path):
    """A run of days must not start over, and empty its log, because of what a person may still mend."""
    out = tmp_path / "run"
    shutil.copytree(straight, out, symlinks=True)
    for step, path in train.checkpoints(out):
        path.with_name(f"kept-{step}").write_bytes((path / "training.pt").read_bytes())
        flip(path / "training.pt")
    before = without_flags(out)
    with pytest.raises(ValueError, match="no whole checkpoint: checkpoint-12 is damaged .*put one back, or"):
        train.train(config(prepared, out))
    assert without_flags(out) == before
    (out / "kept-6").rename(out / "checkpoint-6" / "training.pt")
    train.train(config(prepared, out))
    assert same_result(straight, out)


def test_a_disk_that_does_not_answer_says_nothing_of_a_checkpoint(straight, prepared, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(straight, out, symlinks=True)
    (out / "results.json").unlink()
    before = without_flags(out)

    def unreadable(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    for name in ("checksum", "read_pickle"):
        with monkeypatch.context() as patch:
            patch.setattr(train, name, unreadable)
            with pytest.raises(OSError, match="Input/output error"):
                train.train(config(prepared, out))
        assert without_flags(out) == before


def test_a_directory_of_harmful_links_and_pipes_harms_nothing(straight, prepared, tmp_path):
    out, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(straight, out, symlinks=True)
    mine.write_text("precious")
    (out / ".lock").symlink_to(mine)
    with pytest.raises(OSError, match="symbolic link"):
        train.train(config(prepared, out))
    (out / ".lock").unlink()
    os.mkfifo(out / ".lock")
    (out / "checkpoint-12" / "training.pt").unlink()
    os.mkfifo(out / "checkpoint-12" / "training.pt")  # to read from it would never end
    (out / "checkpoint-²").mkdir()
    train.train(config(prepared, out))
    assert same_result(straight, out) and mine.read_text() == "precious"


def test_a_checkpoint_that_is_a_link_is_used_and_only_the_link_removed(
    straight, prepared, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        with pytest.raises(SystemExit):
            train.train(config(prepared, out))
    shutil.move(out / "checkpoint-6", tmp_path / "elsewhere")
    (out / "checkpoint-6").symlink_to(tmp_path / "elsewhere")
    train.train(config(prepared, out, keep=1))
    assert [step for step, _ in train.checkpoints(out)] == [12]
    assert losses(straight) == losses(out) and (tmp_path / "elsewhere" / "training.pt").exists()


@pytest.mark.parametrize(
    "line",
    ['{"step": null}', '{"step": "x"}', 100_000 * "[", '{"step": 3, "unigram_perplexity": 0, "loss": "x"}'],
)
def test_odd_lines_in_a_log_stop_nothing(straight, prepared, tmp_path, line):
    out = tmp_path / "run"
    shutil.copytree(straight, out, symlinks=True)
    shutil.rmtree(out / "checkpoint-12")
    (out / "log.jsonl").write_text(line + "\n" + (out / "log.jsonl").read_text())
    train.train(config(prepared, out))
    assert losses(straight) == [entry for entry in losses(out) if entry.get("loss") != "x"]
    assert same_weights(straight, out)


def test_a_log_that_was_cut_is_told_of(straight, prepared, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(straight, out, symlinks=True)
    (out / "log.jsonl").unlink()
    train.train(config(prepared, out))
    assert "log.jsonl lacks lines up to step 12" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", "[]", '{"steps": 12, "eval', '{"steps": 6}'])
def test_results_that_are_damaged_or_of_another_step_are_made_again(straight, prepared, tmp_path, content):
    out = tmp_path / "run"
    shutil.copytree(straight, out, symlinks=True)
    (out / "results.json").write_text(content)
    assert train.train(config(prepared, out))["steps"] == 12
    assert same_result(straight, out)


@pytest.mark.parametrize("content", ["", "[]", '{"flags": null}', '{"flags": []}'])
def test_a_damaged_run_json_has_a_way_out(straight, prepared, tmp_path, content):
    out = tmp_path / "run"
    shutil.copytree(straight, out, symlinks=True)
    (out / "run.json").write_text(content)
    with pytest.raises(ValueError, match="run.json: damaged.*; delete run.json, and the same command"):
        train.train(config(prepared, out))
    (out / "run.json").unlink()
    train.train(config(prepared, out))
    assert same_result(straight, out)


def test_a_prepared_directory_without_manifest_is_not_taken_for_text(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="data: no manifest.json; make one with"):
        train.train(config(tmp_path / "data", tmp_path / "run"))


def test_text_that_can_not_be_read_is_not_passed_over(tmp_path, monkeypatch, capsys):
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "b.txt").symlink_to(tmp_path / "nowhere")
    assert "b.txt: no file" in ends(data.main, arguments_of(corpus, tmp_path / "out"), 1, capsys)
    (corpus / "b.txt").unlink()
    (corpus / "c.txt").mkdir()  # a directory's name decides nothing
    assert data.find_parts([corpus])
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("c.txt"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert "Permission denied: '" in ends(data.main, arguments_of(corpus, tmp_path / "out"), 1, capsys)


def test_a_copy_with_a_directory_in_the_links_place_goes_on(straight, prepared, tmp_path, monkeypatch):
    """As `cp -rL`, `scp -r` and many a cloud's tools copy it."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(SystemExit):
            train.train(config(prepared, tmp_path / "original"))
    shutil.copytree(tmp_path / "original", out)
    assert not (out / "checkpoint").is_symlink()
    train.train(config(prepared, out))
    assert (out / "checkpoint").is_symlink() and same_result(straight, out)


def test_only_what_a_run_left_itself_is_cleared_away(straight, prepared, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out, symlinks=True)
    for name in (".checkpoint-6.0123abcd.tmp", ".mine.tmp", ".checkpoint-6.mine.tmp"):
        (out / name).mkdir()
        (out / name / "file").write_text("x")
    train.train(config(prepared, out))
    assert sorted(path.name for path in out.glob(".*")) == [".checkpoint-6.mine.tmp", ".mine.tmp"]


def damaged(prepared, tmp_path, change):
    """A copy of a prepared directory with a changed manifest."""
    out = tmp_path / "data"
    shutil.copytree(prepared, out)
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest, out)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def shard_of(manifest):
    return manifest["shards"]["train"][0]


def swap_shards(manifest, out):
    """Another preparation's shard of the same size: its tokens in another order."""
    path = out / "train-00000.tokens.bin"
    path.write_bytes(np.fromfile(path, "<u2")[::-1].tobytes())


def unsound_sentences(manifest, out):
    """Ends that fall, with a checksum that fits."""
    path = out / "train-00000.sentences.bin"
    ends = np.fromfile(path, "<i8")
    ends[3] = ends[1]
    ends.tofile(path)
    shard_of(manifest)["sha256"]["sentences"] = data.checksum(path)


def ids_beyond_the_vocabulary(manifest, out):
    path = out / "train-00000.tokens.bin"
    ids = np.fromfile(path, "<u2")
    ids[:] = 60_000
    ids.tofile(path)
    shard_of(manifest)["sha256"]["tokens"] = data.checksum(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, out: flip(out / "train-00000.tokens.bin"), "train-00000.tokens.bin: altered"),
        (lambda m, out: cut(out / "train-00000.documents.bin"), "train-00000.documents.bin: .* bytes, not"),
        (swap_shards, "train-00000.tokens.bin: altered"),
        (
            lambda m, out: shard_of(m).update(name="../../../etc/passwd"),
            "shard is named '../../../etc/passwd'",
        ),
        (lambda m, out: shard_of(m)["counts"].update(tokens=2**62), "bytes, not the manifest's"),
        (lambda m, out: shard_of(m)["counts"].update(tokens=-5), "manifest.json is damaged"),
        (lambda m, out: m.update(dtype="O"), "manifest.json is damaged.*dtype O"),
        (lambda m, out: m.pop("shards"), "manifest.json is damaged.*shards"),
        (lambda m, out: cut(out / "unigram.npy"), "unigram.npy: damaged"),
        (lambda m, out: np.save(out / "unigram.npy", np.ones(3)), "unigram.npy: 3.0 tokens of"),
        (unsound_sentences, "do not rise; the shard is damaged"),
        (ids_beyond_the_vocabulary, "id 60000 in a vocabulary of 400"),
    ],
)
def test_an_unsound_prepared_directory_is_refused(prepared, tmp_path, change, message, tally):
    out = damaged(prepared, tmp_path, change)
    with pytest.raises(ValueError, match=message) as refusal:
        train.train(config(out, tmp_path / "run"))
    assert "\n" not in str(refusal.value) and str(out) in str(refusal.value)
    tally("shard or manifest damaged, swapped or hostile")


# ----------------------------------------------------------------------------------------------------------
# Text that is none
# ----------------------------------------------------------------------------------------------------------


def bad_corpus(directory):
    """Returns files of good documents with all kinds of bad lines among them, and what is to be named."""
    directory.mkdir()
    good = make_documents(80)
    rows = [json.dumps({"text": text}).encode() for text in good[:20]]
    rows[3:3] = [b'{"text": "cut', b'{"text": 5}', b"[1]", b'{"text": "\\ud800"}', b"", b'{"text": " "}']
    rows[12:12] = [
        b'{"text": "' + b"x" * (data.MAX_ROW_BYTES + 9) + b'"}',
        b"\0" * 500,
        b'{"text": "caf\xe9"}',
    ]
    (directory / "a.jsonl").write_bytes(b"\n".join(rows))
    text = "\n\n".join(good[20:50]).encode().split(b"\n")
    text[4:4] = [b"caf\xe9 au lait", b"", b"\0" * 100, b""]
    (directory / "b.txt").write_bytes(b"\n".join(text))
    packed = gzip.compress("\n\n".join(good[50:70]).encode())
    (directory / "c.txt.gz").write_bytes(packed[: len(packed) // 2])
    (directory / "d.txt").write_bytes(b"")
    (directory / "e.txt.gz").write_bytes(b"not packed")
    (directory / "f.txt").write_text("\n\n".join(good[70:]))
    expected = [("a.jsonl", 4, "is no JSON")]
    expected += [("a.jsonl", line, 'is no object with a "text" string') for line in (5, 6)]
    expected += [("a.jsonl", 7, "holds half a surrogate pair")]
    expected += [("a.jsonl", 13, f"is longer than {data.MAX_ROW_BYTES} bytes")]
    expected += [("a.jsonl", 14, "holds a NUL"), ("a.jsonl", 15, "is not UTF-8")]
    expected += [("b.txt", 5, "is not UTF-8"), ("b.txt", 7, "holds a NUL")]
    rest = "and what follows is damaged or cut short"
    return good, expected, [("c.txt.gz", rest), ("e.txt.gz", rest)]


def documents_of(out):
    """All documents of a prepared directory, as text."""
    found = []
    for split in map(functools.partial(data.Corpus, out), data.SPLITS):
        for shard in split.shards:
            for a, b in zip([0, *shard.documents], shard.documents):
                found.append(split.tokenizer.decode(shard.tokens[a:b].tolist()))
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_left_out_counted_and_named(tmp_path, tally, workers):
    good, expected, cut_short = bad_corpus(tmp_path / "corpus")
    out = data.prepare(flags(tmp_path / "corpus", tmp_path / "out", workers=workers))
    named = [json.loads(line) for line in (out / "left-out.jsonl").read_text().splitlines()]
    found = [(Path(entry["path"]).name, entry["line"], entry["reason"]) for entry in named]
    assert [entry for entry in found if ".gz" not in entry[0]] == expected
    assert [(name, reason) for name, _, reason in found if ".gz" in name] == cut_short
    counts = Counter(reason for *_, reason in found)
    assert json.loads((out / "manifest.json").read_text())["left_out"] == counts
    for entry in named:  # the byte is where the line begins
        if ".gz" not in entry["path"]:
            content = Path(entry["path"]).read_bytes()
            assert content[: entry["byte"]].count(b"\n") == entry["line"] - 1
    documents = set(documents_of(out))
    assert documents > set(good[:50]) | set(good[70:])  # what is good is there, up to where the .gz breaks
    assert documents < set(good) | {
        text for text in documents if any(g.startswith(text) for g in good[50:70])
    }
    tally("lines and files of which no text can be made", len(named))


@pytest.mark.parametrize("name", ["a.jsonl", "b.txt", "c.txt.gz"])
def test_strict_stops_at_the_first_bad_line(tmp_path, name):
    bad_corpus(tmp_path / "corpus")
    for other in (tmp_path / "corpus").iterdir():
        if other.name not in (name, "f.txt"):
            other.unlink()
    arguments = [*arguments_of(tmp_path / "corpus", tmp_path / "out"), "--strict"]
    result = run("data.py", *arguments)
    assert result.returncode == 1 and f"{name}: line " in result.stderr and result.stderr.count("\n") == 1
    data.prepare(flags(tmp_path / "corpus", tmp_path / "out"))  # not strict: it goes on
    again = run("data.py", *arguments)
    assert again.returncode == 1 and f"{name}: line " in again.stderr


def test_lines_of_a_hundred_megabytes_are_cut_at_spaces_in_little_memory(tmp_path, tally):
    words = " ".join(make_documents(3000))
    text = (words * (10**8 // len(words) + 1))[: 10**8]
    (tmp_path / "long.txt").write_text(text + "\nshort\n\nafter")
    (tmp_path / "joined.txt").write_text("é" * 300_000)
    code = (
        "import data, hashlib, json, sys\n"
        "digest, sizes = hashlib.sha256(), []\n"
        "for document in data.read_documents(sys.argv[1]):\n"
        "    digest.update(document.encode()); sizes.append(len(document.encode()))\n"
        "peak = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "print(json.dumps([digest.hexdigest(), max(sizes), document, peak]))"
    )
    found, longest, last, peak = json.loads(run("-c", code, tmp_path / "long.txt").stdout)
    assert found == hashlib.sha256((text + "\nshort" + "after").encode()).hexdigest() and last == "after"
    assert longest <= data.MAX_DOCUMENT_BYTES and peak < 100_000  # KB
    documents = list(data.read_documents(tmp_path / "joined.txt"))
    assert "".join(documents) == "é" * 300_000 and len(documents) > 5
    tally("line of 100 MB")


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_parts_of_a_file_begin_and_end_with_lines_however_long(tmp_path, ending):
    path, line = tmp_path / f"a{ending}", "日本語 " * 270_000  # 2.7 MB
    row = json.dumps({"text": line}, ensure_ascii=False) if ending == ".jsonl" else line
    path.write_text("\n".join(3 * [row]), encoding="utf-8")
    parts = data.find_parts([path], part_bytes=1 << 20)
    assert len(parts) > 1 and (parts[0].begin, parts[-1].end) == (0, path.stat().st_size)
    pieces = [list(data.read_documents(*part)) for part in parts]  # raises where one begins in a character
    whole = list(data.read_documents(path))
    assert sum(pieces, []) == whole and sum(map(len, whole)) == 3 * len(line)


def test_parts_of_a_file_name_lines_as_the_file_has_them(tmp_path):
    lines = [b"bad \xff" if i % 7 == 0 else b"line %d" % i for i in range(500)]
    (tmp_path / "a.txt").write_bytes(b"\n\n".join(lines))
    left_out = []
    for part in data.find_parts([tmp_path / "a.txt"], part_bytes=300):
        list(data.read_documents(*part, left_out.append))
    assert [problem.line for problem in left_out] == [1 + 2 * i for i in range(0, 500, 7)]


# ----------------------------------------------------------------------------------------------------------
# Two at a time, odd places
# ----------------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_directory_is_refused(prepared, tmp_path, monkeypatch, capsys, tally):
    out = tmp_path / "run"
    many = command(prepared, out, max_steps=100_000, checkpoint_interval=50)
    first = subprocess.Popen([sys.executable, *many], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not train.checkpoints(out):
        assert first.poll() is None
        first.stdout.readline()
    with monkeypatch.context() as patch:
        patch.setattr(data, "LOCK_PATIENCE", 0.5)
        errors = ends(train.main, many[1:], 1, capsys)
    assert f"run is in use by process {first.pid} on " in errors and errors.count("\n") == 1, errors
    assert "choose another --out" in errors
    first.kill()  # what it leaves locks nobody out
    first.communicate()
    step = train.read_log(out)[-1]["step"]
    capsys.readouterr()
    finished = train.train(config(prepared, out, max_steps=step + 50, checkpoint_interval=50))
    assert finished["steps"] == step + 50 and "resuming at step" in capsys.readouterr().out
    assert no_partial_file(out) and not (out / ".lock").exists()
    tally("second run in the same directory")


def test_the_other_programs_lock_their_directory_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "LOCK_PATIENCE", 0)
    out, corpus = tmp_path / "out", write_corpus(tmp_path / "corpus")
    tuning = ["--task", "cola", "--data", tmp_path, "--model", tmp_path, "--out", out]
    with data.locked(out):
        for main, arguments, code in ((data.main, arguments_of(corpus, out), 1), (finetune.main, tuning, 2)):
            assert f"in use by process {os.getpid()} on" in ends(main, arguments, code, capsys)
    assert not (out / ".lock").exists()


def test_ranks_of_a_start_that_is_refused_the_lock_keep_out(tmp_path):
    """They must not write the parts that the same ranks of the other start are at."""
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "out"

    def start(rank, port):
        places = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": str(port)}
        command = [sys.executable, "data.py", *map(str, arguments_of(corpus, out, workers=1))]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | places)

    first, stranger = start(0, port=1), start(1, port=2)
    while not (out / data.WORK / "digests-00000.npy").exists():
        assert first.poll() is None
    time.sleep(1.5)
    assert stranger.poll() is None and not (out / data.WORK / "digests-00001.npy").exists()
    stranger.kill()
    stranger.wait()
    second = start(1, port=1)
    assert (first.wait(60), second.wait(60)) == (0, 0)
    assert contents(out) == contents(data.prepare(flags(corpus, tmp_path / "straight")))


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(data.fcntl, "flock", no_locks)
    with data.locked(tmp_path / "out"):
        assert "can't be locked (Operation not supported)" in capsys.readouterr().out


def test_clocks_that_jump_change_nothing(straight, prepared, tmp_path, monkeypatch):
    """The time of day is random, and with it the order in which files seem to have been written."""
    rng, out = random.Random(0), tmp_path / "run"
    monkeypatch.setattr(time, "time", lambda: rng.uniform(-1e9, 1e12))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(SystemExit):
            train.train(config(prepared, out))
    assert [step for step, _ in train.checkpoints(out)] == [8, 6]
    for path in [*out.rglob("*"), *prepared.rglob("*")]:
        os.utime(path, 2 * (rng.uniform(0, 1e9),), follow_symlinks=False)
    os.utime(out / "checkpoint-6", 2 * (4e9,))
    train.train(config(prepared, out))
    assert same_result(straight, out)


def test_spaces_umlauts_and_relative_paths_from_another_folder(tmp_path):
    place = tmp_path / "Läuse & Flöhe" / "日本 1"
    place.mkdir(parents=True)
    (place / "täxt 1.txt").write_text("\n\n".join(make_documents(60)))

    def here(*arguments):
        command = [sys.executable, ROOT / arguments[0], *map(str, arguments[1:])]
        return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=240)

    prepared = here("data.py", *arguments_of("täxt 1.txt", "prepäred", workers=2))
    assert prepared.returncode == 0, prepared.stderr
    for _ in range(2):  # the second start finds the first one's result
        trained = here(*command("prepäred", "rün 1", max_steps=3))
        assert trained.returncode == 0, trained.stderr
    assert "is finished at step 3" in trained.stdout
    filled = here("roberta.py", "rün 1", "A <mask>.")
    assert filled.returncode == 0 and filled.stdout, filled.stderr


@pytest.mark.parametrize("out", ["/proc/run", "a.txt/run"])
def test_a_place_that_can_not_be_written_is_one_clear_line(prepared, tmp_path, out, capsys):
    (tmp_path / "a.txt").write_text("x")
    training, preparing = command(prepared, tmp_path / out)[1:], arguments_of(prepared, tmp_path / out)
    for main, arguments in ((train.main, training), (data.main, preparing)):
        errors = ends(main, arguments, 1, capsys)
        assert errors.startswith("error: ") and "run" in errors and errors.count("\n") == 1, errors


def test_a_read_only_place_is_one_clear_line(straight, prepared, small_disk, capsys):
    """Of a new run, and of one that is there and finished."""
    shutil.copytree(straight, small_disk / "old", symlinks=True)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for name in ("new", "old"):
        errors = ends(train.main, command(prepared, small_disk / name)[1:], 1, capsys)
        assert "Read-only file system" in errors and name in errors and errors.count("\n") == 1, errors


# ----------------------------------------------------------------------------------------------------------
# Gradients that are not finite, and what goes wrong slowly
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bad_gradients_are_skipped_counted_and_at_last_stop_the_run(
    prepared, tmp_path, monkeypatch, precision, value, tally
):
    """Three bad steps are survived; from step 30 on all are bad: the last good checkpoint is the newest."""
    out, original = tmp_path / "run", train.Pretraining.loss_sums

    def loss_sums(self, batch):
        sums = original(self, batch)
        return tuple(part * (value if self.step in (3, 4, 9) or self.step >= 30 else 1.0) for part in sums)

    monkeypatch.setattr(train.Pretraining, "loss_sums", loss_sums)
    bad = config(prepared, out, max_steps=60, precision=precision)
    for _ in range(2):  # the second time from the checkpoint
        with pytest.raises(FloatingPointError, match="no finite gradient in 20 steps to 50.*lower --peak-lr"):
            train.train(bad)
    assert [line["skipped"] for line in train.read_log(out) if line["step"] == 28 and "loss" in line] == [3]
    assert train.checkpoints(out)[0][0] == 30
    assert all(tensor.isfinite().all() for tensor in weights(out).values())
    monkeypatch.undo()
    assert train.train(bad)["steps"] == 60
    tally(f"gradients of {value}, {precision}", 3 + 2 * train.MAX_SKIPPED)


def test_what_goes_wrong_slowly_is_said_once(capsys):
    health = train.Health(0)
    for step in range(300):
        health.see_norm(step, 5.0 if step in (50, 200, 250) else 0.4 + 0.1 * (step % 2))
    leaps = capsys.readouterr().out
    assert (
        leaps.count("\n") == 1
        and "(said once): the gradient norm of step 200 is 5, of late it was 0.4" in leaps
    )
    for step, loss in enumerate([5, 4, 4.5, 4.4, 3.9, 4.0, 4.1, 4.2, 4.3, 4.4, 4.5, 4.6]):
        health.see_loss(step, loss)
    rise = capsys.readouterr().out
    assert rise.count("\n") == 1 and "loss of step 9 is 4.400, that of step 4 was 3.900" in rise
    for step, rate in enumerate([10, 100, 110, 90, 100, 100, 20, 95, 30, 40, 30, 20]):
        health.see_rate(step, rate)
    halved = capsys.readouterr().out
    assert (
        halved.count("\n") == 1
        and "step 9 training goes at 40 tokens a second, at first it was 100" in halved
    )


def test_a_healthy_run_has_nothing_said_of_it(straight, prepared, tmp_path, capsys):
    train.train(
        config(
            prepared,
            tmp_path / "run",
            max_steps=300,
            eval_interval=10,
            log_interval=10,
            checkpoint_interval=300,
        )
    )
    printed = capsys.readouterr().out
    assert "the gradient norm" not in printed and "the held-out loss of step" not in printed


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path):
    """2,000 steps of the tiny preset, with evaluations and checkpoints before step 200, too."""
    (tmp_path / "a.txt").write_text("\n\n".join(make_documents(3000)))
    code = (
        "import gc, json, os, sys, train\n"
        "sizes, original = [], train.Run.train_step\n"
        "def train_step(self, step):\n"
        "    original(self, step)\n"
        "    pages = int(open('/proc/self/statm').read().split()[1])\n"
        "    sizes.append(pages * os.sysconf('SC_PAGE_SIZE'))\n"
        "train.Run.train_step = train_step\n"
        "train.main(sys.argv[1:])\n"
        "print('SIZES', json.dumps(sizes))\n"
    )
    arguments = {"data": tmp_path / "a.txt", "out": tmp_path / "run", "max_steps": 2000, "eval_interval": 100}
    arguments |= {"checkpoint_interval": 100, "vocab_size": 1000}
    words = [word for key, value in arguments.items() for word in ("--" + key.replace("_", "-"), value)]
    result = run("-c", code, *words)
    assert result.returncode == 0, result.stderr
    sizes = json.loads(result.stdout.split("SIZES ")[1])
    assert len(sizes) == 2000 and max(sizes[200:]) < 1.02 * sizes[199], [size >> 20 for size in sizes[::100]]
    print(f"memory grows by {max(sizes[200:]) / sizes[199] - 1:.2%} after step 200")


# ----------------------------------------------------------------------------------------------------------
# Size, and properties of random cases
# ----------------------------------------------------------------------------------------------------------

BILLIONS = 6_000_000_000


def sparse_shard(prepared, directory, ends):
    """A copy of a prepared directory whose training shard has 6 billion tokens: a hole but for the last."""
    shutil.copytree(prepared, directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    (entry,) = manifest["shards"]["train"]
    with open(directory / f"{entry['name']}.tokens.bin", "wb") as file:
        file.truncate(2 * BILLIONS)
        file.seek(2 * BILLIONS - 20)
        file.write(np.arange(10, 20, dtype="<u2").tobytes())
    for kind in ("sentences", "documents"):
        ends.astype("<i8").tofile(directory / f"{entry['name']}.{kind}.bin")
    entry["counts"] = {"tokens": BILLIONS, "sentences": len(ends), "documents": len(ends)}
    manifest["counts"]["train"] = entry["counts"]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    np.save(directory / "unigram.npy", np.eye(1, manifest["vocab_size"], dtype=np.int64)[0] * BILLIONS)


@pytest.mark.parametrize("every", [BILLIONS, 1_000_000, 3_000])
def test_six_billion_tokens_open_in_little_time_and_memory(prepared, tmp_path, every):
    """Offsets of 64 bits everywhere: the last sequence is the shard's end, and shuffling reaches all."""
    sparse_shard(prepared, tmp_path / "big", np.arange(every, BILLIONS + 1, every))
    code = (
        "import json, sys, time, data\n"
        "began = time.process_time()\n"
        "sequences = data.Sequences(data.Corpus(sys.argv[1]), 'full-sentences', 512)\n"
        "batches = data.Batches(sequences, batch_size=256, micro_batch_size=32, seed=0)\n"
        "steps = [batches.step(n) for n in (0, 20_000, 45_000)]\n"
        "last, _ = sequences.token_ids(sequences.epoch(0, 0), len(sequences.bounds) - 2)\n"
        "peak = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "begins = data.permute(data.np.arange(1000), len(sequences.bounds) - 1, 0, 0)\n"
        "highest = int(sequences.bounds[begins].max())\n"
        "print(json.dumps([last[-11:].tolist(), peak, time.process_time() - began, highest]))"
    )
    result = run("-c", code, tmp_path / "big")
    assert result.returncode == 0, result.stderr
    last, peak, seconds, highest = json.loads(result.stdout)
    assert last == [*range(10, 20), data.EOS] and highest > 2**32
    assert peak < 200e6, f"{peak / 1e6} MB"
    print(f"6 billion tokens: {seconds:.2f} s of processor time, {peak / 1e6:.0f} MB")


def test_ten_thousand_random_strings_and_byte_sequences_survive_the_tokenizer(prepared):
    """Bytes that are no UTF-8 decode to U+FFFD first; what is text comes back as it was."""
    tokenizer, rng = data.Tokenizer.from_pretrained(prepared), random.Random(7)
    planes = [(32, 127), (0, 32), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for _ in range(10_000):
        low, high = rng.choice(planes)
        text = "".join(
            chr(rng.randrange(low, high)) if rng.random() < 0.8 else " " for _ in range(rng.randint(0, 40))
        )
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(3 < i < tokenizer.mask_id for i in ids)
        content = rng.randbytes(rng.randint(0, 40))
        text = content.decode("utf-8", "replace")
        assert tokenizer.decode(tokenizer.encode(text)) == text
        ids = [int(tokenizer.rank_to_id[data.BYTE_ORDER.index(byte)]) for byte in content]
        assert tokenizer.decode(ids) == text  # the byte units themselves


def test_random_corpora_are_packed_whole_within_limits_and_at_boundaries(monkeypatch):
    """300 of them: in one go or in slices, with long documents cut into stretches or not."""
    rng = random.Random(8)
    for _ in range(300):
        sentences, documents = random_shard(rng, rng.randint(1, 40), rng.choice([3, 30, 300]))
        seq_len, name = rng.randint(6, 80), rng.choice(["full-sentences", "doc-sentences", "segment-pair"])
        room = (seq_len - 4) // 2 if name == "segment-pair" else seq_len - 2
        monkeypatch.setattr(data, "STRETCH", 1 << 20)
        monkeypatch.setattr(data, "SLICE", 1 << 18)
        whole = data.pack(sentences, documents, seq_len, name)
        assert whole.tolist() == [
            b - a for a, b in greedy(sentences, documents, room, name == "full-sentences")
        ]
        monkeypatch.setattr(data, "STRETCH", rng.choice([50, 500]))
        monkeypatch.setattr(data, "SLICE", rng.choice([1, 20]))
        cut = data.pack(sentences, documents, seq_len, name)
        ends = np.cumsum(cut, dtype=int)
        assert ends[-1] == sentences[-1] and cut.min() > 0 and cut.max() <= room
        inner = [end for end in ends if end not in set(sentences.tolist())]  # only inside too long a sentence
        sizes = dict(zip(sentences.tolist(), np.diff(sentences, prepend=0).tolist()))
        assert all(sizes[sentences[np.searchsorted(sentences, end)]] > room for end in inner)


def test_random_ranks_batches_and_accumulations_feed_each_sequence_once_an_epoch(prepared):
    rng, sequences = random.Random(9), data.Sequences(data.Corpus(prepared), "full-sentences", 256)
    size = len(sequences.epoch(0, 0))
    for _ in range(30):
        world_size, micro, accumulate = rng.randint(1, 5), rng.randint(1, 6), rng.randint(1, 4)
        batch_size, seed = world_size * micro * accumulate, rng.randrange(100)
        seen, steps = Counter(), math.ceil(2 * size / batch_size)
        for rank in range(world_size):
            batches = data.Batches(
                sequences,
                batch_size=batch_size,
                micro_batch_size=micro,
                seed=seed,
                rank=rank,
                world_size=world_size,
            )
            batches.assemble = lambda index, epochs: list(zip(epochs.tolist(), index.tolist()))
            for step in range(steps):
                share = batches.step(step).batches
                assert [len(batch) for batch in share] == [micro] * accumulate
                seen.update(pair for batch in share for pair in batch)
        assert set(seen.values()) == {1}
        assert {pair for pair in seen if pair[0] < 2} == {(e, i) for e in (0, 1) for i in range(size)}
