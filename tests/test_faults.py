"""What must survive: kills, full disks, damaged files, dead and stalled ranks, two runs in one directory.

Each test injects a fault at a counted moment and compares what is left with an undisturbed run.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, command, config, contents, ends, run, same, write_corpus
from test_data import arguments, bad_corpus, change_json, cut, flags, flip
from test_train import close_weights, lines_of, stopped_at, torchrun, weights

import data
import roberta
import train


def storm(mode, stride, out, *arguments):
    """Runs tests/storm.py; returns how often it has killed."""
    return int(run("tests/storm.py", mode, stride, out, *arguments, timeout=1200).stdout)


def same_result(a, b):
    """Whether two runs ended with the same log, results, weights, Adam's moments and scaler, to the bit."""
    return same(*map(all_of, (a, b)))


def all_of(out):
    """All that a run has come to, but for how long it took."""
    newest = train.checkpoints(out)[0][1]
    results, state = map(data.read_json, (out / "results.json", newest / "progress.json"))
    for numbers in (results, state["progress"]):
        numbers["seconds"] = numbers["peak_memory_bytes"] = 0
    moments = roberta.read_safetensors(newest / "optimizer.safetensors")
    return [lines_of(out), results, state, weights(out), weights(newest), moments]


def no_partial_file(out):
    return not [path for path in out.rglob(".*") if path.name != ".lock"]


@pytest.fixture
def copied(straight, tmp_path):
    """A copy of the undisturbed run, to be damaged."""
    return shutil.copytree(straight, tmp_path / "run")


# ----------------------------------------------------------------------------------------------------------
# Killed at any moment
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"precision": "fp16"}, {"precision": "bf16", "dropout": 0.1},
    {"input_format": "sentence-pair", "masking": "static", "clip_norm": 1.0}], ids=str)
def test_a_run_killed_again_and_again_is_the_same_to_the_bit(prepared, tmp_path, changes):
    """Each start is killed before its 75th write: in a checkpoint, at another place every time."""
    small = {"max_steps": 36, "checkpoint_interval": 3, "log_interval": 2} | changes
    straight, out = tmp_path / "straight", tmp_path / "killed"
    assert storm("chain", 0, straight, "train.py", *command(prepared, straight, **small)) == 0
    assert storm("chain", 75, out, "train.py", *command(prepared, out, **small)) >= 5
    assert same_result(straight, out) and no_partial_file(out)


@pytest.mark.slow
def test_a_run_killed_before_every_write_is_the_same_to_the_bit(prepared, tmp_path):
    """It goes on with a finished run, so that there are things of that one left to be replaced."""
    out = tmp_path / "run"
    train.pretrain(config(prepared, out, max_steps=4, checkpoint_interval=2))
    kills = storm("every", 1, out, "train.py", *command(prepared, out, checkpoint_interval=4))
    assert kills > 60
    for killed in (out.with_name(f"run-killed-{number}") for number in range(1, kills + 1)):
        assert same_result(out, killed) and no_partial_file(killed), killed


@pytest.mark.slow
def test_a_preparation_killed_before_many_writes_is_the_same_to_the_byte(tmp_path):
    bad_corpus(tmp_path / "corpus")
    write_corpus(tmp_path / "corpus", files=3, documents=20)
    out = tmp_path / "out"
    out.mkdir()
    kills = storm("every", 5, out, "data.py", *arguments(tmp_path / "corpus", out, "--workers", 2))
    assert kills > 20
    for killed in tmp_path.glob("out-killed-*"):
        assert contents(killed) == contents(out) and no_partial_file(killed), killed


# ----------------------------------------------------------------------------------------------------------
# Ranks that die or stall
# ----------------------------------------------------------------------------------------------------------


def failing(tmp_path, what, rank=1, step=8, where="accumulate"):
    """Writes a train.py in which a rank does `what` at one of the steps of its first attempt."""
    code = (f"import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r})\nimport train\n"
            f"original = train.{where}\n"
            "def failing(training, *more):\n"
            "    is_first = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0'\n"
            f"    if is_first and (training.ranks.rank, training.progress.step) == ({rank}, {step}):\n"
            f"        {what}\n"
            "    return original(training, *more)\n"
            f"train.{where} = failing\ntrain.main()\n")
    (tmp_path / "failing.py").write_text(code)
    return tmp_path / "failing.py"


STOP, DIE = ("os.kill(os.getpid(), signal.SIGSTOP)", "os.kill(os.getpid(), signal.SIGKILL)")


@pytest.mark.slow
@pytest.mark.parametrize(("what", "rank", "step", "where", "message"), [
    (DIE, 1, 8, "accumulate", "the gradients of step 9: .*"),
    (STOP, 1, 8, "accumulate", "the gradients of step 9: .*[Rr]anks? 1 "),
    (STOP, 0, 8, "accumulate", "the gradients of step 9: .*[Rr]ank 0"),
    ("time.sleep(9999)", 0, 6, "save", "the checkpoint of step 6: .*[Rr]ank 0"),
])
def test_a_dead_or_stalled_rank_is_named_and_torchrun_starts_again(
        straight, prepared, tmp_path, what, rank, step, where, message):
    """Half a minute is torchrun's, which is so patient with a process that does not end when asked to."""
    out, script = tmp_path / "run", failing(tmp_path, what, rank, step, where)
    launcher = torchrun(2, "--max-restarts", 1, script)
    result = run(*launcher, *command(prepared, out, micro_batch_size=2, timeout=10))
    expected = f"error: rank {1 - rank} lost another: before [a-z ]*{message}"
    assert re.search(expected, result.stderr), result.stderr
    assert close_weights(straight, out)


# ----------------------------------------------------------------------------------------------------------
# Full disks
# ----------------------------------------------------------------------------------------------------------


def with_small_files(limit, script, arguments):
    """Runs a program that can't write files of more than `limit` bytes, which stands for a full disk."""
    code = (f"import resource, sys, {script}\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            f"{script}.main(sys.argv[1:])")
    result = run("-c", code, *arguments, code=1)
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize(("name", "limit"), [
    ("optimizer.safetensors", 60_000), ("vocab.json", 4_000), ("log.jsonl", 400_000)])
def test_a_full_disk_is_one_line_and_loses_nothing(straight, prepared, tmp_path, monkeypatch, name, limit):
    out = tmp_path / "run"
    stopped_at(monkeypatch, 6, config(prepared, out))
    log = (out / "log.jsonl").read_text()
    if name == "log.jsonl":  # made so long that half a line more is too much
        first = json.dumps({"step": 0, "note": "x" * limit}) + "\n"
        (out / name).write_text(first + log)
        limit = len(first + log) + 50
    errors = with_small_files(limit, "train", command(prepared, out))
    assert "File too large" in errors and name in errors and "the same command goes on" in errors
    assert [step for step, _ in train.checkpoints(out)] == [6] and train.read_log(out)[-1]["step"] in (6, 12)
    (out / "log.jsonl").write_text(log)
    train.pretrain(config(prepared, out))
    assert same_result(straight, out) and no_partial_file(out)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_in_prepare_is_one_line_and_nothing_is_lost(tmp_path, workers):
    corpus = write_corpus(tmp_path / "corpus", files=4, documents=300)
    call = arguments(corpus, tmp_path / "out", "--workers", workers)
    errors = with_small_files(60_000, "data", call)
    assert "File too large" in errors and "the same command goes on" in errors
    run("data.py", *call)
    assert contents(tmp_path / "out") == contents(data.prepare(flags(corpus, tmp_path / "straight")))


# ----------------------------------------------------------------------------------------------------------
# Damaged files
# ----------------------------------------------------------------------------------------------------------


def replace_by_step_6(path):
    shutil.copy(path.parent.with_name("checkpoint-6") / path.name, path)
    change_json(path.with_name("checksums.json"), **{path.name: data.checksum(path)})


@pytest.mark.parametrize(("name", "damage", "message"), [
    ("model.safetensors", flip, "model.safetensors does not have its checksum"),
    ("optimizer.safetensors", cut, "optimizer.safetensors does not have its checksum"),
    ("config.json", flip, "config.json does not have"),
    ("merges.txt", os.unlink, "merges.txt does not have its checksum"),
    ("checksums.json", cut, "checksums.json"),
    ("checksums.json", os.unlink, "checksums.json"),
    ("checksums.json", lambda path: change_json(path, **{"../../../../etc/passwd": "0"}), "passwd"),
    ("progress.json", replace_by_step_6, "it is step 6 of run"),
    ("checksums.json", lambda path: path.write_text("{}"), "config.json does not have its checksum"),
])
def test_an_unsound_checkpoint_is_named_and_the_one_before_used(
        straight, copied, prepared, capsys, name, damage, message):
    damage(copied / "checkpoint-12" / name)
    train.pretrain(config(prepared, copied))
    printed = capsys.readouterr().out
    (warning,) = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert message in warning and "checkpoint-12 is damaged" in warning and "resuming at step 6" in printed
    assert (copied / "damaged-checkpoint-12").is_dir() and same_result(straight, copied)


def test_where_all_checkpoints_are_damaged_nothing_starts_over(straight, copied, prepared, capsys):
    """A run of days must not start over, and empty its log, because of what a person may still mend."""
    for _, path in train.checkpoints(copied):
        flip(path / "model.safetensors")
    before = contents(copied)
    with pytest.raises(ValueError, match="no whole checkpoint: checkpoint-6 is damaged .*put one back, or"):
        train.pretrain(config(prepared, copied))
    assert contents(copied) == before and "checkpoint-12 is damaged (model.saf" in capsys.readouterr().out
    flip(copied / "checkpoint-6" / "model.safetensors")
    train.pretrain(config(prepared, copied))
    assert same_result(straight, copied)


@pytest.mark.parametrize("line", ['{"step": null}', 100_000 * "[", '{"step": 9, "lo'])
def test_damaged_lines_of_a_log_are_left_out(straight, copied, prepared, line):
    shutil.rmtree(copied / "checkpoint-12")
    (copied / "log.jsonl").write_text(line + "\n" + (copied / "log.jsonl").read_text() + line)
    train.pretrain(config(prepared, copied))
    assert same_result(straight, copied)


# ----------------------------------------------------------------------------------------------------------
# Two at a time
# ----------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_a_crashed_one_locks_nobody_out(prepared, tmp_path, capsys):
    out, forever = tmp_path / "run", {"max_steps": 10**6, "checkpoint_interval": 50}
    first = subprocess.Popen([sys.executable, "train.py", *command(prepared, out, **forever)], cwd=ROOT,
                             stdout=subprocess.PIPE, text=True)
    while not train.checkpoints(out):
        assert first.poll() is None and first.stdout.readline()
    errors = ends(train.main, command(prepared, out, **forever), 1, capsys)
    assert f"run is in use by process {first.pid} on " in errors and "choose another --out" in errors
    first.kill()
    first.communicate()
    step = train.checkpoints(out)[0][0] + 50
    assert train.pretrain(config(prepared, out, **forever | {"max_steps": step}))["steps"] == step
    assert "resuming at step" in capsys.readouterr().out and no_partial_file(out)


def test_a_second_prepare_in_the_same_directory_is_refused(corpus, tmp_path):
    with data.locked(tmp_path / "out"):
        result = run("data.py", *arguments(corpus, tmp_path / "out"), code=1)
    assert f"in use by process {os.getpid()} on" in result.stderr
    assert data.prepare(flags(corpus, tmp_path / "out"))


@pytest.mark.parametrize(("main", "call"), [
    (data.main, arguments), (train.main, lambda corpus, out: command(corpus, out, vocab_size=400))])
def test_ctrl_c_before_training_is_one_line_and_130(corpus, tmp_path, monkeypatch, capsys, main, call):
    out, original = tmp_path / "out", data.TokenFiles.note

    def note(self):
        original(self)
        if self.state["jobs"] == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(data.TokenFiles, "note", note)
    monkeypatch.setattr(data, "BLOCK_BYTES", 5000)
    errors = ends(main, call(corpus, out), 130, capsys)
    assert errors.startswith("interrupted; the same command goes on") and errors.count("\n") == 1
    assert data.read_json(next(out.rglob('manifest.json')))["jobs"] == 3
