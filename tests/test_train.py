"""train.py: what may not change a result (ranks, micro-batches, interruptions), and clear errors."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, ends, make_documents, run, same

import data
import roberta
import train

# A model so small that a step takes a millisecond; no dropout, so that ranks and micro-batches may be
# compared.
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "seq_len": 32,
    "batch_size": 8,
    "micro_batch_size": 8,
    "max_steps": 12,
    "warmup_steps": 3,
    "log_interval": 4,
    "eval_interval": 6,
    "checkpoint_interval": 6,
    "eval_sequences": 40,
}


def config(prepared, out, **changes):
    return dataclasses.replace(train.tiny(), data=str(prepared), out=str(out), **SMALL | changes)


def command(prepared, out, **changes):
    """The same as command-line arguments."""
    arguments = ["train.py", "--data", str(prepared), "--out", str(out)]
    for name, value in (SMALL | changes).items():
        arguments += ["--" + name.replace("_", "-"), str(value)]
    return arguments


def torchrun(prepared, out, ranks=2, **changes):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    return run(*launcher, *command(prepared, out, **changes))


def weights(out):
    return torch.load(out / "checkpoint" / "pytorch_model.bin", weights_only=True)


def same_weights(a, b, tolerance=0.0):
    a, b = weights(a), weights(b)
    return all((a[key] - b[key]).abs().max() <= tolerance for key in a)


def losses(out):
    """All that a log says, but for how fast it went."""
    timing = {"tokens_per_second", "eta_seconds"}
    return [{k: v for k, v in line.items() if k not in timing} for line in train.read_log(out)]


# ----------------------------------------------------------------------------------------------------------
# Schedule, presets, flags
# ----------------------------------------------------------------------------------------------------------


def test_presets_are_table_9():
    base, large = train.base(), train.large()
    for c in (base, large):
        assert (c.batch_size, c.max_steps, c.weight_decay, c.clip_norm) == (8192, 500_000, 0.01, 0.0)
        assert (c.adam_eps, c.adam_beta1, c.adam_beta2, c.seq_len) == (1e-6, 0.9, 0.98, 512)
    assert (base.peak_lr, base.warmup_steps) == (6e-4, 24_000)
    assert (large.peak_lr, large.warmup_steps) == (4e-4, 30_000)
    shape = train.model_config(large, 50265)
    assert (shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size) == (24, 1024, 4096)
    assert (shape.num_attention_heads, shape.hidden_dropout_prob, shape.max_position_embeddings) == (
        16,
        0.1,
        514,
    )


def test_learning_rate_warms_up_and_decays_linearly():
    c = dataclasses.replace(train.base(), max_steps=100, warmup_steps=10)
    rates = [train.learning_rate(step, c.peak_lr, c.warmup_steps, c.max_steps) for step in range(100)]
    assert rates[9] == rates[10] == max(rates) == 6e-4
    assert np.allclose(np.diff(rates[:10]), 6e-5) and np.allclose(np.diff(rates[10:]), -6e-4 / 90)
    assert rates[-1] == pytest.approx(6e-4 / 90)


def test_only_matrices_decay():
    model = roberta.RobertaForMaskedLM(roberta.RobertaConfig.tiny())
    decayed, free = train.make_optimizer(model, train.tiny()).param_groups
    assert decayed["weight_decay"] == 0.01 and free["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in free["params"]} == {1}


def test_help_shows_every_flag_and_unknown_ones_are_refused(capsys):
    result = run("train.py", "--help")
    for field in dataclasses.fields(train.TrainConfig):
        assert "--" + field.name.replace("_", "-") in result.stdout
    assert "Table 9" in result.stdout
    for bad in (["--no-such-flag", "1"], ["--max-step", "5"], ["--precision", "fp8"], ["--seed", "x"]):
        assert "error: " in ends(train.main, bad, 2, capsys)


# ----------------------------------------------------------------------------------------------------------
# What changes nothing: micro-batches, ranks, interruptions
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory):
    """An uninterrupted run of 12 steps in one process."""
    out = tmp_path_factory.mktemp("straight") / "run"
    results = train.train(config(prepared, out))
    return out, results


def test_a_run_leaves_what_it_promises(straight, prepared):
    out, results = straight
    assert results["steps"] == 12 and results["eval_perplexity"] == pytest.approx(
        math.exp(results["eval_loss"])
    )
    assert json.loads((out / "results.json").read_text()) == results
    for name in (
        "run.json",
        "config.json",
        "log.jsonl",
        "loss.png",
        "checkpoint/vocab.json",
        "checkpoint/merges.txt",
    ):
        assert (out / name).stat().st_size > 0
    lines = train.read_log(out)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [4, 8, 12]
    expected = {"step", "epoch", "loss", "perplexity", "lr", "grad_norm", "tokens_per_second", "eta_seconds"}
    assert all(expected <= line.keys() for line in training)
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [6, 12]
    assert {"eval_loss", "eval_perplexity", "unigram_perplexity", "masked_accuracy"} < evaluations[0].keys()
    tokens = sum(b.num_tokens for s in range(12) for b in batches(prepared).step(s).batches)
    assert results["tokens"] == tokens
    for place in (out, out / "checkpoint", out / "checkpoint-6"):
        assert roberta.RobertaForMaskedLM.from_pretrained(place).config.hidden_size == 16
        assert data.Tokenizer.from_pretrained(place).vocab_size == 400


def batches(prepared, **changes):
    sequences = data.Sequences(data.Corpus(prepared), "full-sentences", 32)
    return data.Batches(sequences, **{"batch_size": 8, "micro_batch_size": 8, "seed": 0} | changes)


def test_accumulation_changes_only_rounding(straight, prepared, tmp_path):
    train.train(config(prepared, tmp_path / "run", micro_batch_size=2))
    assert same_weights(straight[0], tmp_path / "run", 1e-6)


def test_two_ranks_change_only_rounding(straight, prepared, tmp_path):
    """Batch 8 in one process = 2 gloo ranks x 2 micro-steps of 2, evaluation included."""
    result = torchrun(prepared, tmp_path / "run", micro_batch_size=2)
    assert result.returncode == 0, result.stderr
    assert same_weights(straight[0], tmp_path / "run", 1e-6)
    for one, two in zip(losses(straight[0]), losses(tmp_path / "run")):
        assert one.keys() == two.keys()
        assert all(one[key] == pytest.approx(two[key], rel=1e-4) for key in one)


@pytest.mark.parametrize("input_format", ["doc-sentences", "segment-pair", "sentence-pair"])
def test_accumulation_changes_only_rounding_in_the_other_formats(prepared, tmp_path, input_format):
    for micro in (8, 2):
        train.train(
            config(prepared, tmp_path / str(micro), micro_batch_size=micro, input_format=input_format)
        )
    assert same_weights(tmp_path / "8", tmp_path / "2", 1e-6)


def interrupt_at(monkeypatch, *steps):
    """Has SIGTERM arrive during these steps."""
    original = train.Run.train_step

    def train_step(self, step):
        original(self, step)
        if self.step in steps:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.Run, "train_step", train_step)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "fp16"},
        {"precision": "bf16", "dropout": 0.1},
        {"input_format": "sentence-pair", "masking": "static"},
    ],
)
def test_resuming_is_exact_to_the_bit(prepared, tmp_path, monkeypatch, changes, capsys):
    train.train(config(prepared, tmp_path / "straight", **changes))
    interrupt_at(monkeypatch, 2, 7, 11)
    for _ in range(3):
        with pytest.raises(SystemExit) as stopped:
            train.train(config(prepared, tmp_path / "resumed", **changes))
        assert stopped.value.code == 128 + signal.SIGTERM
    train.train(config(prepared, tmp_path / "resumed", **changes))
    assert "resuming at step 11" in capsys.readouterr().out
    assert losses(tmp_path / "straight") == losses(tmp_path / "resumed")
    assert same_weights(tmp_path / "straight", tmp_path / "resumed")
    a, b = (
        torch.load(tmp_path / run / "checkpoint" / "training.pt", weights_only=True)
        for run in ("straight", "resumed")
    )
    assert all(same(a[key], b[key]) for key in ("optimizer", "scaler", "window", "health"))


def test_a_killed_run_goes_on_from_its_last_checkpoint(straight, prepared, tmp_path):
    """SIGKILL once a checkpoint and some log lines behind it are there."""
    out = tmp_path / "run"
    slow = (
        "import time, train; f = train.Run.train_step\n"
        "train.Run.train_step = lambda self, step: (f(self, step), time.sleep(0.3))\ntrain.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *command(prepared, out)[1:]], cwd=ROOT)
    while not (out / "checkpoint-6").exists() or train.read_log(out)[-1]["step"] < 8:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a line the crash cut short
    train.train(config(prepared, out))
    assert losses(straight[0]) == losses(out) and same_weights(straight[0], out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit(prepared, tmp_path, number):
    out = tmp_path / "run"
    many = command(prepared, out, max_steps=100_000, checkpoint_interval=100_000, eval_interval=100_000)
    process = subprocess.Popen([sys.executable, *many], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while "step" not in process.stdout.readline().split(" "):
        assert process.poll() is None
    process.send_signal(number)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    step = int(printed.split("stopped at step ")[1].split(",")[0])
    assert (out / f"checkpoint-{step}" / "checksums.json").exists()
    assert not list(out.glob(".*"))


def test_the_newest_and_the_best_checkpoints_are_kept(prepared, tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 2.5, 2.2])

    def fake(*_):
        fixed = {"eval_perplexity": 2.0, "unigram_perplexity": 3.0, "masked_accuracy": 0.5}
        return {"eval_loss": next(scores)} | fixed

    monkeypatch.setattr(train, "evaluate", fake)
    train.train(config(prepared, tmp_path / "run", max_steps=10, eval_interval=2, checkpoint_interval=2))
    assert [step for step, _ in train.checkpoints(tmp_path / "run")] == [10, 8, 4]


# ----------------------------------------------------------------------------------------------------------
# Starting again
# ----------------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_can_be_lengthened(prepared, tmp_path, capsys):
    out = tmp_path / "run"
    train.train(config(prepared, out))
    before = weights(out)
    capsys.readouterr()
    train.train(config(prepared, out))
    printed = capsys.readouterr().out
    assert "is finished at step 12. To lengthen it: --max-steps 24" in printed and "another --out" in printed
    assert all(torch.equal(before[key], value) for key, value in weights(out).items())
    assert train.train(config(prepared, out, max_steps=15))["steps"] == 15
    assert [line["step"] for line in losses(out) if "loss" in line] == [4, 8, 12, 15]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"peak_lr": 1.0}, {"hidden_size": 32}, {"masking": "static"}]
)
def test_another_run_in_the_same_directory_is_refused(straight, prepared, change):
    before = weights(straight[0])
    ((name, value),) = change.items()
    with pytest.raises(
        ValueError, match=f"holds a run with {name} .*, this one has {value}; choose another --out"
    ):
        train.train(config(prepared, straight[0], **change))
    assert all(torch.equal(before[key], value) for key, value in weights(straight[0]).items())


def test_other_data_under_an_old_run_is_refused(straight, prepared, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(make_documents(50, seed=9)))
    other = data.prepare(
        data.PrepareConfig((str(tmp_path / "a.txt"),), str(tmp_path / "other"), 400, workers=1)
    )
    with pytest.raises(ValueError, match="holds a run with"):
        train.train(config(other, straight[0]))


def test_text_is_prepared_on_the_way(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(make_documents(60)))
    results = train.train(config(tmp_path / "a.txt", tmp_path / "run", vocab_size=300, max_steps=3))
    assert results["steps"] == 3 and (tmp_path / "run" / "data" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"batch_size": 9, "micro_batch_size": 2},
            "error: micro_batch_size 2 x world_size 1 = 2 does not divide",
        ),
        ({"data": "no/such/place"}, "error: no/such/place: no such file or directory"),
        ({"data": ""}, "error: --data is empty"),
        ({"seq_len": 3, "batch_size": 0}, "error: --batch-size 0 must be at least 1"),
        ({"max_steps": 10**400}, "error: --max-steps is beyond 2^53"),
        ({"batch_size": 8 * 10**12, "micro_batch_size": 0}, "error: "),
        ({"timeout": "nan"}, "error: --timeout nan must be from 1 up to 1e+07"),
        ({"warmup_steps": 50}, "error: --warmup-steps 50 exceeds --max-steps 12"),
        ({"peak_lr": "nan"}, "error: --peak-lr nan must be from 1e-12 up to 1000"),
        ({"seq_len": 4}, "error: --seq-len 4 with --mlm-probability 0.15 leaves nothing to predict"),
        ({"num_attention_heads": 3}, "error: hidden_size 16 must be a multiple of num_attention_heads 3"),
    ],
)
def test_bad_values_are_one_clear_line(prepared, tmp_path, arguments, message, capsys):
    errors = ends(train.main, command(prepared, tmp_path / "run", **arguments)[1:], 1, capsys)
    assert errors.startswith(message) and errors.count("\n") == 1, errors


# ----------------------------------------------------------------------------------------------------------
# Precision, evaluation, learning
# ----------------------------------------------------------------------------------------------------------


def test_steps_without_finite_gradients_are_skipped_counted_and_at_last_stop_the_run(prepared, tmp_path):
    setup = train.set_up("fp32")
    run_ = train.Pretraining(config(prepared, tmp_path / "run", max_steps=100), prepared, setup)
    run_.resume()
    before = {name: p.clone() for name, p in run_.model.named_parameters()}
    step = run_.batches.step(0)
    run_.model.lm_head.bias.register_hook(lambda gradient: gradient * math.nan)
    for _ in range(train.MAX_SKIPPED - 1):
        run_.train_step(step)
    assert run_.state["skipped"] == train.MAX_SKIPPED - 1
    assert all(torch.equal(before[name], p) for name, p in run_.model.named_parameters())
    with pytest.raises(FloatingPointError, match="no finite gradient in 20 steps .* lower --peak-lr"):
        run_.train_step(step)


def test_fp16_scaler_recovers_from_an_overflow(prepared, tmp_path):
    run_ = train.Pretraining(
        config(prepared, tmp_path / "run", precision="fp16"), prepared, train.set_up("fp16")
    )
    run_.resume()
    run_.scaler.load_state_dict(run_.scaler.state_dict() | {"scale": 2.0**60})
    step, skipped = run_.batches.step(0), 0
    for _ in range(19):
        run_.train_step(step)
    skipped = run_.state["skipped"]
    assert 0 < skipped
    assert run_.scaler.get_scale() == 2.0 ** (60 - skipped)


def test_evaluation_and_its_unigram_baseline_equal_a_count_by_hand(straight, prepared):
    out, results = straight
    model = roberta.RobertaForMaskedLM.from_pretrained(out)
    corpus, held_out = data.Corpus(prepared), data.Corpus(prepared, "heldout")
    counts = np.bincount(np.concatenate([shard.tokens for shard in corpus.shards]), minlength=400) + 1
    share = counts / counts.sum()
    sequences = data.Sequences(held_out, "full-sentences", 32)
    all_batches = data.Batches(sequences, batch_size=8, micro_batch_size=8, seed=2**32)
    loss, baseline, correct, total = 0.0, 0.0, 0, 0
    for batch in all_batches.held_out(40):
        logits = model(torch.from_numpy(batch.input_ids)).flatten(0, 1).log_softmax(-1).detach().numpy()
        for position, label in zip(batch.positions, batch.labels):
            if label != -100:
                total += 1
                loss -= logits[position, label]
                baseline -= math.log(share[label])
                correct += logits[position].argmax() == label
    assert results["eval_loss"] == pytest.approx(loss / total, rel=1e-5)
    assert results["unigram_perplexity"] == pytest.approx(math.exp(baseline / total), rel=1e-9)
    assert results["masked_accuracy"] == pytest.approx(correct / total)


def test_end_to_end_from_text_to_a_filled_mask(tmp_path):
    """A language in which the last word of a sentence follows from an earlier one, learned from scratch."""
    ends = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "acht"}
    lines = [f"The number {word} is {end}." for word, end in ends.items()]
    rng = np.random.default_rng(0)
    (tmp_path / "a.txt").write_text("\n\n".join(" ".join(rng.permutation(lines * 2)) for _ in range(200)))
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    results = train.train(
        dataclasses.replace(
            train.tiny(),
            data=str(tmp_path / "a.txt"),
            out=str(tmp_path / "run"),
            vocab_size=400,
            seq_len=32,
            max_steps=400,
            warmup_steps=40,
            eval_interval=200,
            **shape,
        )
    )
    assert results["eval_perplexity"] < results["unigram_perplexity"] / 5
    filled = run("roberta.py", tmp_path / "run", "The number three is <mask>. The number two is zwei.")
    assert "' drei'" in filled.stdout.splitlines()[0], filled.stdout


def test_importing_train_has_no_side_effect(tmp_path):
    code = "import sys, train; assert 'matplotlib' not in sys.modules and not train.dist.is_initialized()"
    assert run("-c", code, env=os.environ | {"RANK": "0"}).returncode == 0
