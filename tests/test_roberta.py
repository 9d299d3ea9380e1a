"""roberta.py against hand-written maths, the paper's counts, and files made to break it."""

import os
import pickle

import pytest
import torch
from helpers import run
from torch.nn import functional as F

import data
from roberta import (
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForPreTraining,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaModel,
)

# Odd, unequal dimensions, so that a transposed axis cannot hide: B3 T7 C10 H2 V97.
ODD = RobertaConfig(
    vocab_size=97,
    hidden_size=10,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=22,
    max_position_embeddings=23,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.3,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return RobertaForMaskedLM(ODD).eval()


@pytest.fixture
def input_ids():
    torch.manual_seed(1)
    return torch.randint(4, 96, (3, 7))


def count(config, kind=RobertaForMaskedLM):
    with torch.device("meta"):
        return kind(config).num_parameters()


def test_base_has_the_papers_number_of_parameters():
    assert count(RobertaConfig.base()) == 124_696_665


def test_larger_vocabulary_adds_what_section_4_4_says():
    for size, millions in (("base", 15), ("large", 20)):
        make = getattr(RobertaConfig, size)
        assert round((count(make(vocab_size=50265)) - count(make(vocab_size=30522))) / 1e6) == millions
    assert round(count(RobertaConfig.large()) / 1e6) == 355  # §2: LARGE with the 50K vocabulary


def test_forward_equals_the_formulas(model, input_ids):
    """The encoder written out with loops over heads, against the fused one."""
    p = dict(model.named_parameters())
    e = "roberta.embeddings."

    def norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * p[name + ".weight"] + p[name + ".bias"]

    def linear(x, name):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    h = p[e + "tokens.weight"][input_ids] + p[e + "positions.weight"][torch.arange(2, 9)]
    h = norm(h, e + "norm")
    for i in range(3):
        b = f"roberta.blocks.{i}."
        q, k, v = (linear(h, b + f"attention.{x}_proj") for x in "qkv")
        heads = []
        for s in (slice(0, 5), slice(5, 10)):
            scores = q[..., s] @ k[..., s].transpose(1, 2) / 5**0.5
            heads.append(scores.softmax(-1) @ v[..., s])
        h = norm(h + linear(torch.cat(heads, -1), b + "attention.out_proj"), b + "attn_norm")
        h = norm(h + linear(gelu(linear(h, b + "ffn_in")), b + "ffn_out"), b + "ffn_norm")
    scores = norm(gelu(linear(h, "lm_head.dense")), "lm_head.norm")
    expected = scores @ p[e + "tokens.weight"].T + p["lm_head.bias"]
    torch.testing.assert_close(model(input_ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("left", [0, 5])
def test_a_padded_row_equals_the_same_row_alone(model, input_ids, left):
    padded = torch.full((3, 16), 1)
    padded[:, left : left + 7] = input_ids
    padded[1, left + 4 :] = 1
    logits = model(padded)
    assert logits.isfinite().all()
    for row, length in ((0, 7), (1, 4), (2, 7)):
        alone = model(input_ids[row : row + 1, :length])
        torch.testing.assert_close(logits[row : row + 1, left : left + length], alone, atol=1e-5, rtol=1e-5)


def test_a_row_of_padding_gives_no_nan_in_values_or_gradients(model, input_ids):
    input_ids[1] = 1
    for mask in (None, input_ids != 1, (input_ids != 1).long()):
        model.zero_grad()
        logits = model(input_ids, mask)
        logits.logsumexp(-1).sum().backward()
        assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


def test_the_head_on_predicted_positions_equals_the_head_everywhere(model, input_ids):
    positions = torch.tensor([1, 6, 7, 20])
    torch.testing.assert_close(
        model(input_ids, positions=positions), model(input_ids).flatten(0, 1)[positions]
    )


def test_initialisation():
    torch.manual_seed(0)
    config = RobertaConfig(hidden_size=64, num_attention_heads=4, intermediate_size=256, vocab_size=500)
    for name, p in RobertaForSequenceClassification(config).named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif p.numel() > 1000:
            assert abs(p.std().item() / 0.02 - 1) < 0.1 and abs(p.mean()) < 0.002, name
    embeddings = RobertaModel(config).embeddings
    assert (embeddings.tokens.weight[1] == 0).all() and (embeddings.positions.weight[1] == 0).all()


def test_dropout_acts_in_training_only(input_ids):
    config = RobertaConfig(
        **{**ODD.__dict__, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    )
    model = RobertaForMaskedLM(config)
    assert not torch.equal(model(input_ids), model(input_ids))
    model.eval()
    assert torch.equal(model(input_ids), model(input_ids))


def test_heads(input_ids):
    config = RobertaConfig(**{**ODD.__dict__, "num_labels": 3, "id2label": {}})
    assert RobertaForSequenceClassification(config)(input_ids).shape == (3, 3)
    start, end = RobertaForQuestionAnswering(ODD)(input_ids)
    assert start.shape == end.shape == (3, 7)
    candidates = input_ids.reshape(3, 1, 7).expand(3, 4, 7)
    scores = RobertaForMultipleChoice(ODD).eval()(candidates, candidates != 1)
    assert scores.shape == (3, 4)
    torch.testing.assert_close(scores[:, 0], scores[:, 3])


def test_nsp_model_uses_its_two_token_types(input_ids):
    model = RobertaForPreTraining(RobertaConfig(**{**ODD.__dict__, "type_vocab_size": 2})).eval()
    types = torch.zeros_like(input_ids)
    types[:, 4:] = 1
    logits, nsp = model(input_ids, token_type_ids=types)
    assert logits.shape == (3, 7, 97) and nsp.shape == (3, 2)
    assert not torch.allclose(nsp, model(input_ids)[1])


def test_features(model, input_ids):
    hiddens = model.extract_features(input_ids, return_all_hiddens=True)
    assert len(hiddens) == 4
    assert torch.equal(hiddens[-1], model.roberta(input_ids))
    tokenizer = data.train_bpe([], 261)
    wide = RobertaModel(RobertaConfig(**{**ODD.__dict__, "vocab_size": 261}))
    assert wide.extract_features("abc", tokenizer).shape == (1, 5, 10)
    assert wide.training  # as it was
    wide.blocks[0].eval()
    wide.extract_features("abc", tokenizer)
    assert wide.training and not wide.blocks[0].training


def test_too_long_an_input_is_refused_with_both_numbers(model):
    with pytest.raises(ValueError, match="22 tokens .* 21 positions"):
        model(torch.full((1, 22), 5))


def test_configs_are_checked():
    with pytest.raises(ValueError, match="hidden_size 10 .* num_attention_heads 3"):
        RobertaConfig(hidden_size=10, num_attention_heads=3)
    with pytest.raises(ValueError, match="relu"):
        RobertaConfig(hidden_act="relu")


# ----------------------------------------------------------------------------------------------------------
# Saving and loading
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        RobertaForMaskedLM,
        RobertaForSequenceClassification,
        RobertaForPreTraining,
        RobertaForMultipleChoice,
        RobertaForQuestionAnswering,
        RobertaModel,
    ],
)
@pytest.mark.parametrize("types", [1, 2])
def test_saved_and_opened_is_the_same_bit_for_bit(tmp_path, kind, types, capsys):
    model = kind(RobertaConfig(**{**ODD.__dict__, "type_vocab_size": types}))
    model.save_pretrained(tmp_path)
    opened = kind.from_pretrained(tmp_path)
    assert opened.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, opened.state_dict()[name]), name
    assert capsys.readouterr().err == ""


def test_another_head_starts_at_random_and_says_so(tmp_path, model, capsys):
    model.save_pretrained(tmp_path)
    opened = RobertaForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert opened.config.num_labels == 3
    assert "classifier.dense.weight" in capsys.readouterr().err
    assert torch.equal(opened.roberta.embeddings.tokens.weight, model.roberta.embeddings.tokens.weight)


def test_what_is_no_model_is_refused_in_one_line(tmp_path, model):
    with pytest.raises(ValueError, match="no such directory"):
        RobertaForMaskedLM.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="neither a config.json"):
        RobertaForMaskedLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "pytorch_model.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        RobertaForMaskedLM.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 97', '"vocab_size": 98'))
    with pytest.raises(ValueError, match="vocab_size 98, the weights are for 97"):
        RobertaForMaskedLM.from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match="config.json: damaged"):
        RobertaForMaskedLM.from_pretrained(tmp_path)


def test_a_missing_weight_is_named(tmp_path, model):
    model.save_pretrained(tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    del weights["roberta.encoder.layer.1.output.dense.bias"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="roberta.encoder.layer.1.output.dense.bias"):
        RobertaForMaskedLM.from_pretrained(tmp_path)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    "write", [lambda p: torch.save({"x": Hostile()}, p), lambda p: p.write_bytes(pickle.dumps(Hostile()))]
)
def test_a_pickle_that_would_run_code_is_refused(tmp_path, model, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(tmp_path)
    write(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="refused|damaged"):
        RobertaForMaskedLM.from_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()


# ----------------------------------------------------------------------------------------------------------
# Filling masks
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A saved model with its tokenizer whose head puts ' b' first everywhere, whatever the text."""
    tokenizer = data.train_bpe(["a b a b a b c b"] * 3, 270)
    config = RobertaConfig(**{**ODD.__dict__, "vocab_size": tokenizer.vocab_size})
    model = RobertaForMaskedLM(config)
    with torch.no_grad():
        model.lm_head.bias[tokenizer.encode(" b")[0]] = 100
    model.save_pretrained(tmp_path, tokenizer)
    return tmp_path


def test_fill_mask(saved):
    model, tokenizer = RobertaForMaskedLM.from_pretrained(saved), data.Tokenizer.from_pretrained(saved)
    best = model.fill_mask("a <mask> c", tokenizer, top_k=3)
    assert len(best) == 3 and best[0]["token_str"] == " b" and best[0]["sequence"] == "a b c"
    assert best[0]["score"] > 0.99 >= sum(c["score"] for c in best) - 0.01
    ids = torch.tensor([[0, *tokenizer.encode("a"), tokenizer.mask_id, *tokenizer.encode(" c"), 2]])
    probabilities = F.softmax(model(ids)[0, 2], -1)
    assert best[0]["score"] == pytest.approx(probabilities.max().item())
    two = model.fill_mask("<mask> <mask>", tokenizer)
    assert len(two) == 2 and two[0][0]["sequence"] == " b <mask>" and two[1][0]["sequence"] == "<mask> b"
    with pytest.raises(ValueError, match="no <mask>"):
        model.fill_mask("a b", tokenizer)
    with pytest.raises(ValueError, match="positions"):
        model.fill_mask("a b c" * 100 + "<mask>", tokenizer)


def test_command_line(saved):
    result = run("roberta.py", saved, "a <mask> c")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 5 and "100.00%" in lines[0] and "a b c" in lines[0]
    for arguments in ((saved, "no mask"), (saved / "nowhere", "a <mask>")):
        result = run("roberta.py", *arguments)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stderr.startswith("error: ") and not result.stdout


def test_importing_has_no_side_effect():
    assert (
        run("-c", "import sys, roberta; assert not {'data', 'matplotlib'} & set(sys.modules)").returncode == 0
    )
