"""train.py: what may not change a result (ranks, micro-batches), the figures it writes, and clear errors."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from helpers import ROOT, command, config, contents, ends, make_documents, run, same, write_corpus
from test_data import FORMATS, make_batches

import data
import roberta
import train


def torchrun(ranks, *more):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *more]


def weights(out):
    return roberta.read_safetensors(out / "model.safetensors")


def close_weights(a, b, tolerance=2e-6):
    """Whether two finished runs differ by no more than rounding."""
    a, b = weights(a), weights(b)
    return all((a[key] - b[key]).abs().max() <= tolerance for key in a | b)


def lines_of(out):
    """All that a log says, but for how fast it went; every line must be whole."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def close_lines(a, b):
    """Compares logs; how much is padded depends on the micro-batches, and counts of right guesses are few."""
    for one, two in zip(lines_of(a), lines_of(b), strict=True):
        assert one | {"padding": 0} == pytest.approx(two | {"padding": 0}, rel=1e-3)


def interrupt_at(monkeypatch, *steps, number=signal.SIGTERM):
    """Has a signal arrive during these steps."""
    original = train.update

    def update(training, rate):
        original(training, rate)
        if training.progress.step in steps:
            signal.raise_signal(number)

    monkeypatch.setattr(train, "update", update)


def stopped_at(monkeypatch, step, config, number=signal.SIGTERM):
    """Runs `config` until a signal stops it at this step."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        interrupt_at(patch, step, number=number)
        train.pretrain(config)
    assert stopped.value.code == 128 + number


# ----------------------------------------------------------------------------------------------------------
# Presets, flags, schedule
# ----------------------------------------------------------------------------------------------------------


def test_presets_are_table_9():
    base, large = train.base(), train.large()
    for c in (base, large):
        assert (c.batch_size, c.max_steps, c.weight_decay, c.clip_norm) == (8192, 500_000, 0.01, 0.0)
        assert (c.adam_eps, c.adam_beta1, c.adam_beta2, c.seq_len) == (1e-6, 0.9, 0.98, 512)
    assert (base.peak_lr, base.warmup_steps) == (6e-4, 24_000)
    assert (large.peak_lr, large.warmup_steps) == (4e-4, 30_000)
    for c, layers, width, heads in ((base, 12, 768, 12), (large, 24, 1024, 16)):
        shape = train.model_config(c, 50265)
        assert (shape.num_hidden_layers, shape.num_attention_heads) == (layers, heads)
        assert (shape.hidden_size, shape.intermediate_size) == (width, 4 * width)
        assert shape.max_position_embeddings == 514
        assert shape.hidden_dropout_prob == shape.attention_probs_dropout_prob == 0.1


def test_the_learning_rate_warms_up_and_decays_linearly():
    rates = [train.learning_rate(step, 6e-4, warmup_steps=10, max_steps=100) for step in range(101)]
    assert rates[9] == rates[10] == max(rates) == 6e-4 and rates[100] == 0
    assert np.allclose(np.diff(rates[:10]), 6e-5) and np.allclose(np.diff(rates[10:]), -6e-4 / 90)


def test_every_parameter_decays_as_in_robertas_code():
    model = roberta.RobertaForMaskedLM(roberta.RobertaConfig.tiny())
    (group,) = train.make_optimizer(model, train.tiny()).param_groups
    assert group["weight_decay"] == 0.01 and len(group["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(("preset", "default"), [("tiny", 32), ("small", 32), ("base", 8192)])
def test_help_shows_every_flag_in_groups_with_the_presets_defaults(capsys, preset, default):
    with pytest.raises(SystemExit):
        train.main(["--preset", preset, "--help"])
    printed = capsys.readouterr().out
    for field in dataclasses.fields(train.TrainConfig):
        assert f"--{field.name.replace('_', '-')} " in printed and field.metadata["group"] in printed
    assert f"(default: {default})" in " ".join(printed.split()) and "Table 9" in printed


@pytest.mark.parametrize("bad", ["--no-such-flag 1", "--max-step 5", "--precision fp8", "--seed x"])
def test_unknown_flags_are_refused(capsys, bad):
    assert "error: " in ends(train.main, bad.split(), 2, capsys)


@pytest.mark.parametrize(("flags", "message"), [
    ({"batch_size": 9, "micro_batch_size": 2}, "micro_batch_size 2 x world_size 1 = 2 does not divide"),
    ({"data": "no/such/place"}, "no/such/place: no such file or directory"),
    ({"data": ""}, "--data is empty"),
    ({"batch_size": 0}, "--batch-size 0 must be at least 1"),
    ({"max_steps": 10**400}, "--max-steps 1"),
    ({"timeout": "nan"}, "--timeout nan must be from 1 to 1e+07"),
    ({"peak_lr": "nan"}, "--peak-lr nan must be from 1e-12 to 1000"),
    ({"warmup_steps": 50}, "--warmup-steps 50 exceeds --max-steps 12"),
    ({"seq_len": 4}, "--seq-len 4 at --mlm-probability 0.15 leaves nothing to predict"),
    ({"num_attention_heads": 3}, "hidden_size 16"),
    ({"out": "/proc/run"}, "/proc/run"),
    ({"init_from": "no/model/here"}, "--hidden-size beside --init-from"),
])
def test_bad_values_are_one_clear_line(prepared, tmp_path, capsys, flags, message):
    arguments = command(flags.pop("data", prepared), flags.pop("out", tmp_path / "run"), **flags)
    errors = ends(train.main, arguments, 1, capsys)
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------
# What a run leaves
# ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(straight, prepared):
    results, lines = json.loads((straight / "results.json").read_text()), train.read_log(straight)
    training, evaluations = ([line for line in lines if name in line] for name in ("loss", "eval_loss"))
    assert [line["step"] for line in training] == [4, 6, 8, 12]
    assert [line["step"] for line in evaluations] == [6, 12]
    for line in training:
        names = "step epoch loss perplexity lr grad_norm tokens_per_second padding".split()
        assert line.keys() == set(names) and line["perplexity"] == pytest.approx(math.exp(line["loss"]))
    measured = {"eval_loss", "eval_perplexity", "unigram_perplexity", "masked_accuracy",
                "masked_top5_accuracy"}
    assert all(line.keys() == measured | {"step"} for line in evaluations)
    assert results.items() >= {name: evaluations[1][name] for name in measured}.items()
    batches = [batch for step in range(12) for batch in small_batches(prepared).step(step).batches]
    assert (results["steps"], results["tokens"]) == (12, sum(batch.num_tokens for batch in batches))
    padding = 1 - sum(b.num_tokens for b in batches[8:]) / sum(b.input_ids.size for b in batches[8:])
    assert training[3]["padding"] == pytest.approx(padding) and results["seconds"] > 0
    sequences = len(small_batches(prepared).sequences.lengths(None))
    assert [line["epoch"] for line in training] == [round(8 * step / sequences, 4) for step in (4, 6, 8, 12)]
    assert (straight / "loss.png").exists() and (straight / "run.json").exists()
    for place in (straight, straight / "checkpoint-6", straight / "checkpoint-12"):
        assert roberta.RobertaForMaskedLM.from_pretrained(place).config.hidden_size == 16
        assert data.Tokenizer.from_pretrained(place).vocab_size == 400
    assert weights(straight).keys() == weights(straight / "checkpoint-12").keys()
    helpers.holds_no_pickle(straight)


def small_batches(prepared, **more):
    return make_batches(prepared, seq_len=32, **{"batch_size": 8, "micro_batch_size": 8, "seed": 0} | more)


def test_hugging_faces_programs_open_the_run_directory_itself(straight, oracle):
    text = "Etaoin <mask> shrdlu."
    found = oracle("transformers").pipeline("fill-mask", str(straight))(text)
    model = roberta.RobertaForMaskedLM.from_pretrained(straight)
    ours = model.fill_mask(text, data.Tokenizer.from_pretrained(straight))
    for a, b in zip(found, ours, strict=True):
        assert a["token"] == b["token"] and a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_evaluation_and_its_unigram_baseline_equal_a_count_by_hand(straight, prepared):
    results = json.loads((straight / "results.json").read_text())
    model = roberta.RobertaForMaskedLM.from_pretrained(straight)
    share = np.bincount(data.Corpus(prepared).tokens, minlength=400) + 1
    share = share / share.sum()
    loss, baseline, correct, among_five, total = 0.0, 0.0, 0, 0, 0
    for batch in small_batches(prepared, split="heldout", seed=2**32).held_out(4096):
        logits = model(torch.from_numpy(batch.input_ids)).flatten(0, 1).log_softmax(-1).detach().numpy()
        for place, label in zip(batch.predicted, batch.labels):
            if label != -100:
                total += 1
                loss -= logits[place, label]
                baseline -= math.log(share[label])
                correct += logits[place].argmax() == label
                among_five += label in np.argsort(logits[place])[-5:]
    assert results["eval_loss"] == pytest.approx(loss / total, rel=1e-5)
    assert results["unigram_perplexity"] == pytest.approx(math.exp(baseline / total), rel=1e-9)
    assert results["masked_accuracy"] == pytest.approx(correct / total)
    assert results["masked_top5_accuracy"] == pytest.approx(among_five / total)


def test_the_newest_and_the_best_checkpoints_are_kept(prepared, tmp_path, monkeypatch):
    scores, evaluate = iter([3.0, 1.0, 2.0, 2.5, 2.2]), train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *given: evaluate(*given) | {"eval_loss": next(scores)})
    train.pretrain(config(prepared, tmp_path / "run", max_steps=10, eval_interval=2, checkpoint_interval=2))
    assert [step for step, _ in train.checkpoints(tmp_path / "run")] == [10, 8, 4]


def test_end_to_end_from_text_to_a_filled_mask(tmp_path):
    """A language in which the last word of a sentence follows from an earlier one, learned from scratch."""
    pairs = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "acht"}
    sentences = [f"The number {word} is {end}." for word, end in pairs.items()]
    rng = np.random.default_rng(0)
    text = "\n\n".join(" ".join(rng.permutation(sentences * 2)) for _ in range(200))
    (tmp_path / "a.txt").write_text(text)
    changes = {"hidden_size": 64, "intermediate_size": 128, "batch_size": 16, "vocab_size": 400,
               "peak_lr": 5e-3, "max_steps": 400, "warmup_steps": 40, "eval_interval": 400}
    results = train.pretrain(config(tmp_path / "a.txt", tmp_path / "run", **changes))
    assert results["eval_perplexity"] < results["unigram_perplexity"] / 5
    filled = run("roberta.py", tmp_path / "run", "The number three is <mask>. The number two is zwei.")
    assert "drei" in filled.stdout.splitlines()[0], filled.stdout + filled.stderr


def test_a_run_may_begin_at_the_unigrams_shares(prepared, tmp_path):
    """Before its first step the model then knows what the baseline knows, and so has its loss."""
    found = {}
    for begins in (True, False):
        changes = {"unigram_bias": begins, "max_steps": 1, "warmup_steps": 1, "peak_lr": 1e-12}
        results = train.pretrain(config(prepared, tmp_path / str(begins), **changes))
        found[begins] = results["eval_loss"] - math.log(results["unigram_perplexity"])
    assert abs(found[True]) < 0.1 < 0.5 < found[False]


@pytest.mark.slow
def test_a_first_run_needs_no_text_and_no_network(tmp_path):
    """The documentation installed here is harvested, prepared and learned from, for a few steps."""
    code = ("import socket, train; socket.getaddrinfo = socket.socket.connect = None\n"
            "train.main(['--max-steps', '20', '--eval-sequences', '64'])")
    result = run("-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "unigram baseline" in result.stdout and result.stdout.count("   (it was ") == 5
    assert "left" in result.stdout and "torchrun train.py --data FILE.txt" in result.stdout
    assert train.read_log(tmp_path / "runs" / "tiny")[-1]["step"] == 20


# ----------------------------------------------------------------------------------------------------------
# What changes nothing: micro-batches and ranks
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_format", FORMATS)
def test_micro_batches_change_only_rounding(prepared, tmp_path, input_format):
    for micro in (8, 2, 1):
        changes = {"micro_batch_size": micro, "input_format": input_format}
        train.pretrain(config(prepared, tmp_path / str(micro), **changes))
    assert close_weights(tmp_path / "8", tmp_path / "2") and close_weights(tmp_path / "8", tmp_path / "1")
    close_lines(tmp_path / "8", tmp_path / "2")


FOUR = [pytest.param(4, 1, name, marks=pytest.mark.slow) for name in ("full-sentences", "segment-pair")]


@pytest.mark.parametrize(("ranks", "micro", "input_format"), [(2, 2, "full-sentences"), *FOUR])
def test_ranks_change_only_rounding(prepared, tmp_path, ranks, micro, input_format):
    """Batch 8 in one process = 2 gloo ranks x 2 micro-batches of 2, evaluation and log included."""
    train.pretrain(config(prepared, tmp_path / "one", input_format=input_format))
    flags = command(prepared, tmp_path / "many", micro_batch_size=micro, input_format=input_format)
    run(*torchrun(ranks), "train.py", *flags)
    assert close_weights(tmp_path / "one", tmp_path / "many")
    close_lines(tmp_path / "one", tmp_path / "many")


COUNTING = """
import functools, sys
sys.path.insert(0, ".")
import torch, train
from torch._dynamo.utils import counters

torch.compile = functools.partial(torch.compile, backend="aot_eager")
with train.clean_end():
    train.pretrain(train.parse(sys.argv[1:]))
    print("compiled", counters["frames"]["ok"], "graph breaks", len(counters["graph_break"]))
"""


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("input_format", ["full-sentences", "doc-sentences"])
def test_compiling_takes_one_graph(prepared, tmp_path, input_format, ranks):
    """Every format is compiled once, in one graph, FULL-SENTENCES for its shape, the others for any shape;
    evaluation and DDP add nothing. (Here the graphs run as they are; a GPU's compiler gets the same.)
    """
    (tmp_path / "counting.py").write_text(COUNTING)
    flags = command(prepared, tmp_path / "run", input_format=input_format, max_steps=20, micro_batch_size=2)
    launcher = torchrun(ranks) if ranks > 1 else ()
    done = run(*launcher, tmp_path / "counting.py", *flags, "--compile")
    # The first of the two is the trial, whether there is a compiler.
    assert done.stdout.count("compiled 2 graph breaks 0") == ranks, done.stdout


@pytest.mark.slow
def test_one_rank_then_two_then_one_is_the_same_run(straight, prepared, tmp_path, monkeypatch):
    out = tmp_path / "run"
    stopped_at(monkeypatch, 3, config(prepared, out))
    code = ("import signal, sys; sys.path.insert(0, '.'); sys.path.insert(0, 'tests')\n"
            "import pytest, test_train, train\n"
            "test_train.interrupt_at(pytest.MonkeyPatch(), 9); train.main()")
    (tmp_path / "two.py").write_text(code)
    result = run(*torchrun(2), tmp_path / "two.py", *command(prepared, out, micro_batch_size=4), code=1)
    assert "resuming at step 3" in result.stdout and "stopped at step 9" in result.stdout, result.stderr
    train.pretrain(config(prepared, out))
    assert close_weights(straight, out)


# ----------------------------------------------------------------------------------------------------------
# Starting again
# ----------------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_can_be_lengthened(straight, prepared, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    (out / "results.json").unlink()  # as a crash could have left it
    train.pretrain(config(prepared, out))
    assert "finished at step 12. To lengthen it: --max-steps 24. Or: another --out" in capsys.readouterr().out
    again, before = (json.loads((run / "results.json").read_text()) for run in (out, straight))
    assert again["eval_loss"] == before["eval_loss"] and again["tokens"] == before["tokens"]
    assert lines_of(out) == lines_of(straight)
    assert train.pretrain(config(prepared, out, max_steps=15))["steps"] == 15
    assert [line["step"] for line in lines_of(out) if "loss" in line] == [4, 6, 8, 12, 15]


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("hidden_size", 32), ("masking", "static")])
def test_another_run_in_the_same_directory_is_refused_with_both_values(straight, prepared, name, value):
    before = contents(straight)
    with pytest.raises(ValueError, match=f"a run with {name} .*, this one has {value}; choose another --out"):
        train.pretrain(config(prepared, straight, **{name: value}))
    assert contents(straight) == before


def test_what_may_change_may(straight, prepared, tmp_path, monkeypatch):
    out = tmp_path / "run"
    stopped_at(monkeypatch, 7, config(prepared, out))
    shutil.move(out, tmp_path / "moved")
    shutil.copytree(prepared, tmp_path / "data")
    changes = {"micro_batch_size": 4, "log_interval": 3, "checkpoint_interval": 2, "keep": 1, "timeout": 50.0}
    train.pretrain(config(tmp_path / "data", tmp_path / "moved", **changes))
    assert close_weights(straight, tmp_path / "moved")
    assert [step for step, _ in train.checkpoints(tmp_path / "moved")] == [12]


def test_text_is_prepared_on_the_way_and_found_again(prepared, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n\n".join(make_documents(60)))
    for steps in (3, 4):
        changes = {"vocab_size": 400, "max_steps": steps}
        results = train.pretrain(config(tmp_path / "a.txt", tmp_path / "run", **changes))
    assert results["steps"] == 4 and "run/data is prepared already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a run with data fingerprint .*, this one has"):
        train.pretrain(config(prepared, tmp_path / "run", **changes))


def test_a_directory_of_someone_elses_is_never_written_into(prepared, tmp_path):
    (tmp_path / "photo.jpg").write_text("precious")
    for source in (prepared, write_corpus(tmp_path / "corpus")):
        with pytest.raises(ValueError, match="no run.json of this program; choose another --out"):
            train.pretrain(config(source, tmp_path))
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "corpus") == ["photo.jpg"]


# ----------------------------------------------------------------------------------------------------------
# From the weights of another model, and evaluation alone
# ----------------------------------------------------------------------------------------------------------

RECIPE = {"seq_len": 32, "batch_size": 8, "max_steps": 4, "warmup_steps": 1, "eval_interval": 4,
          "checkpoint_interval": 2, "log_interval": 2, "peak_lr": 1e-3}  # no shape, no micro-batch


def going_on(source, text, out, **changes):
    """The command line of a run that goes on from the weights in `source`."""
    flags = {"init_from": source, "data": text, "out": out} | RECIPE | changes
    return [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]


def going_on_from(source, text, out, **changes):
    """Such a run to its end; returns its evaluations."""
    train.pretrain(train.parse(going_on(source, text, out, **changes)))
    return [line for line in train.read_log(Path(out)) if "eval_loss" in line]


@pytest.mark.parametrize(("kind", "vocab_size"), [
    (roberta.RobertaForMaskedLM, 448), (roberta.RobertaModel, 400),
    (roberta.RobertaForSequenceClassification, 448)])
def test_pretraining_goes_on_from_any_model_and_text(prepared, tmp_path, capsys, kind, vocab_size):
    """Text is prepared with the model's tokenizer; the run, its end and its evaluations are the model's.

    The tokenizer has 400 units; others fill a vocabulary up, here to 448.
    """
    corpus, out = write_corpus(tmp_path / "corpus", documents=60), tmp_path / "run"
    torch.manual_seed(1)
    model = kind(roberta.RobertaConfig.tiny(vocab_size=vocab_size, hidden_size=24, num_attention_heads=3,
                                            max_position_embeddings=50))
    model.save_pretrained(tmp_path / "model", data.Tokenizer.from_pretrained(prepared))
    first, last = going_on_from(tmp_path / "model", corpus, out, dropout=0.1)
    assert (first["step"], last["step"]) == (0, 4) and last["eval_loss"] < first["eval_loss"]
    assert "step 0  eval_loss" in capsys.readouterr().out
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    assert roberta.read_config(out) == dataclasses.replace(model.config, **dropout)
    tokenizers = [data.Tokenizer.from_pretrained(place) for place in (out / "data", prepared)]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint
    # What was measured before the first step is what --eval-only finds, which leaves nothing else behind.
    flags = ["--eval-only", *going_on(tmp_path / "model", corpus, tmp_path / "eval")]
    train.evaluate_only(train.parse(flags))
    found = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert found.items() >= {name: value for name, value in first.items() if name != "step"}.items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "eval", "model", "run"]
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["results.json"]


def test_a_run_from_weights_resumes_from_its_own(straight, prepared, tmp_path, monkeypatch):
    shutil.copytree(straight, tmp_path / "model")
    going_on_from(tmp_path / "model", prepared, tmp_path / "straight")
    stopped_at(monkeypatch, 3, train.parse(going_on(tmp_path / "model", prepared, tmp_path / "run")))
    shutil.rmtree(tmp_path / "model")  # it has been taken over
    evaluations = going_on_from(tmp_path / "model", prepared, tmp_path / "run")
    assert [line["step"] for line in evaluations] == [0, 4]
    assert same(weights(tmp_path / "straight"), weights(tmp_path / "run"))
    # Another rate in the middle is another run, from the weights that this one has come to.
    with pytest.raises(ValueError, match="a run with peak_lr .*; to go on from its weights: --init-from"):
        going_on_from(tmp_path / "model", prepared, tmp_path / "run", peak_lr=1e-4)
    again = going_on_from(tmp_path / "run", prepared, tmp_path / "again", peak_lr=1e-4)
    assert again[0]["eval_loss"] == evaluations[-1]["eval_loss"]


def test_two_ranks_go_on_and_evaluate_like_one(straight, corpus, tmp_path):
    going_on_from(straight, corpus, tmp_path / "one")
    run(*torchrun(2), "train.py", *going_on(straight, corpus, tmp_path / "two"))
    assert close_weights(tmp_path / "one", tmp_path / "two")
    run(*torchrun(2), "train.py", "--eval-only", *going_on(straight, corpus, tmp_path / "eval"))
    found = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert found["eval_loss"] == pytest.approx(lines_of(tmp_path / "one")[0]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"seq_len": 500}, "--seq-len 500, but .* has positions for 128 tokens; try --seq-len 128"),
    ({"input_format": "segment-pair"}, "--input-format segment-pair needs type_vocab_size 2, .* has 1"),
    ({"source": "no/such/place"}, "no/such/place"),
    ({"text": "other"}, "with vocabulary {theirs}, and .* has {ours}; give the text itself as --data, or"),
    ({"out": "the model"}, "--init-from and --out are both .*; choose another --out"),
])
def test_a_model_that_does_not_fit_is_one_line(straight, prepared, tmp_path, capsys, changes, message):
    corpus = write_corpus(tmp_path / "corpus")
    other = data.prepare(data.PrepareConfig((str(corpus),), str(tmp_path / "other"), 380))
    places = {"other": other, "the model": straight}
    given = {"source": straight, "text": prepared, "out": tmp_path / "run"} | changes
    given = {name: places.get(value, value) for name, value in given.items()}
    before = contents(straight)
    errors = ends(train.main, going_on(**given), 1, capsys)
    theirs, ours = (data.Tokenizer.from_pretrained(place).fingerprint for place in (other, straight))
    assert re.search(message.replace("{theirs}", theirs).replace("{ours}", ours), errors), errors
    assert errors.startswith("error: ") and errors.count("\n") == 1 and contents(straight) == before


@pytest.mark.parametrize("holds", ["photo.jpg", "run.json", "results.json"])
def test_eval_only_writes_over_nothing(straight, prepared, tmp_path, capsys, holds):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / holds).write_text("{}")
    call = ["--eval-only", *going_on(straight, prepared, tmp_path / "out")]
    errors = ends(train.main, call, 1, capsys)
    assert f"{holds}', which --eval-only has not written; choose another --out" in errors
    assert [path.name for path in tmp_path.rglob("*")] == ["out", holds]
    assert "--init-from DIR, which is not given" in ends(train.main, ["--eval-only"], 1, capsys)


# ----------------------------------------------------------------------------------------------------------
# What a machine can take
# ----------------------------------------------------------------------------------------------------------


def test_more_ranks_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": 2, "WORLD_SIZE": 4, "LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="4 ranks, but 2 GPUs here; try --nproc-per-node 2"):
        train.set_up(train.tiny())


def test_without_a_compiler_a_run_goes_on_and_says_so(prepared, tmp_path):
    flags = command(prepared, tmp_path / "run", max_steps=2, warmup_steps=1)
    caches = {"CXX": "nothing", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run("train.py", *flags, "--compile", env=os.environ | caches)
    assert done.stdout.count("not compiled, so slower") == 1, done


@pytest.mark.parametrize(("preset", "gigabytes", "size"), [
    (train.base(), 22.5, 8), (train.base(), 60, 32), (train.base(), 1, 1), (train.large(), 22.5, 4),
    (train.tiny(), 2, 32)])
def test_the_micro_batch_is_the_largest_that_fits(tmp_path, monkeypatch, preset, gigabytes, size):
    """On a CPU, where BASE keeps the attention's weights for dropout: at 32 it was killed in 24 GB."""
    monkeypatch.setattr(train, "free_memory", lambda ranks: gigabytes * 1e9)
    ranks = train.set_up(preset)
    config = dataclasses.replace(preset, out=str(tmp_path))
    assert train.settle(config, train.model_config(config, 50265), ranks).micro_batch_size == size


def test_a_resumed_run_keeps_its_micro_batch(prepared, tmp_path, monkeypatch):
    """Dropout's draws depend on it."""
    small = config(prepared, tmp_path / "run", micro_batch_size=None, max_steps=4)
    monkeypatch.setattr(train, "free_memory", lambda ranks: 0)
    train.pretrain(small)
    monkeypatch.undo()
    ranks = train.set_up(small)
    for given, size in ((None, 1), (4, 4)):
        asked = dataclasses.replace(small, micro_batch_size=given)
        assert train.settle(asked, train.model_config(asked, 400), ranks).micro_batch_size == size


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "\r\033[Ka\r\033[Kc\r\033[Kd\r\033[Ke\n"),
                                                   (False, "d\ne\n")])
def test_the_current_step_is_shown(monkeypatch, capsys, is_terminal, shown):
    """On a terminal in a line that renews itself, five times a second at most; in a file once a minute."""
    times = iter([10, 10.1, 50, 71])
    monkeypatch.setattr(data, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(data, "said_at", [0])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    for message in "abcd":
        data.say_now(lambda: message)  # noqa: B023
    data.say("e")
    assert capsys.readouterr().out == shown


def test_a_slow_step_shows_its_micro_batches(prepared, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(data, "say_now", lambda message: shown.append(message()))
    train.pretrain(config(prepared, tmp_path / "run", micro_batch_size=2, max_steps=2))
    places = [line.split(",")[:2] for line in shown]
    assert places == [[f"step {step} of 2", f" micro-batch {n} of 4"] for step in (1, 2) for n in range(1, 5)]
    assert all(re.fullmatch(r".*, 0:00:\d\d left", line) for line in shown)


# ----------------------------------------------------------------------------------------------------------
# Signals and gradients that are not finite
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_save_and_exit_and_the_run_goes_on(straight, prepared, tmp_path, monkeypatch, number):
    out = tmp_path / "run"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    stopped_at(monkeypatch, 7, config(prepared, out), number)
    assert [step for step, _ in train.checkpoints(out)] == [7, 6] and lines_of(out)[-1]["step"] == 7
    train.pretrain(config(prepared, out))
    assert same(weights(straight), weights(out)) and lines_of(straight)[-1] == lines_of(out)[-1]


def test_a_run_under_nohup_lives_on(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with train.stop_signals() as received:
        signal.raise_signal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)
    assert not received


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bad_gradients_are_skipped_counted_and_stop_a_run(prepared, tmp_path, monkeypatch, precision, value):
    """Three bad steps are survived, twenty in a row are not."""
    out, original = tmp_path / "run", train.accumulate

    def accumulate(training, batches, losses, counts):
        is_bad = training.progress.step in (3, 4, 9) or training.progress.step >= 30
        factor = value if is_bad else 1.0
        original(training, batches, lambda *of: [part * factor for part in losses(*of)], counts)

    bad = config(prepared, out, max_steps=60, precision=precision)
    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate", accumulate)
        for _ in range(2):  # the second time from the checkpoint
            with pytest.raises(FloatingPointError, match="no finite gradient in 20 steps to 50.*--peak-lr"):
                train.pretrain(bad)
    (line,) = [line for line in lines_of(out) if line["step"] == 28 and "loss" in line]
    assert line["skipped"] == 3 and line["scale"] == (2.0 ** (16 - 3) if precision == "fp16" else 1.0)
    newest = train.checkpoints(out)[0][1]
    assert all(tensor.isfinite().all() for tensor in weights(newest).values())
    assert train.pretrain(bad)["steps"] == 60


