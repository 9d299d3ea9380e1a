"""roberta.py against formulas written out by hand, the paper's counts, and the promises of its docstrings."""

from dataclasses import replace

import pytest
import torch
from helpers import ends, run

import data
import roberta
from roberta import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification, RobertaModel

# Odd, unequal dimensions, so that a transposed axis cannot hide: B3 T7 C10 H2 V97.
ODD = RobertaConfig(vocab_size=97, hidden_size=10, num_hidden_layers=3, num_attention_heads=2,
                    intermediate_size=22, max_position_embeddings=23, hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0, initializer_range=0.3)
CLOSE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return RobertaForMaskedLM(ODD).eval()


@pytest.fixture
def input_ids():
    torch.manual_seed(1)
    return torch.randint(4, 96, (3, 7))


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_bpe(["a b a b a b c b"] * 3, 270)


# ----------------------------------------------------------------------------------------------------------
# The architecture
# ----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_parameters_are_the_papers():
    def count(config):
        with torch.device("meta"):
            return RobertaForMaskedLM(config).num_parameters()

    # The published count leaves out the row of the only token type.
    assert count(RobertaConfig.base()) == 124_696_665 + 768
    assert round(count(RobertaConfig.large()) / 1e6) == 355
    # §4.4: what a vocabulary of 50K adds to BERT's 30K.
    for make, millions in ((RobertaConfig.base, 15), (RobertaConfig.large, 20)):
        assert round((count(make(vocab_size=50265)) - count(make(vocab_size=30522))) / 1e6) == millions


def test_forward_equals_the_formulas(model, input_ids):
    """The model written out with loops over heads, against the fused one."""
    with torch.no_grad():  # away from 0 and 1, where a bias that goes astray could not be seen
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
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
    h = norm(h + p[e + "token_types.weight"][0], e + "norm")
    for i in range(3):
        b = f"roberta.blocks.{i}."
        q, k, v = (linear(h, b + f"attention.{x}_proj") for x in "qkv")
        heads = []
        for s in (slice(0, 5), slice(5, 10)):
            scores = q[..., s] @ k[..., s].transpose(1, 2) / 5**0.5
            heads.append(scores.softmax(-1) @ v[..., s])
        h = norm(h + linear(torch.cat(heads, -1), b + "attention.out_proj"), b + "attn_norm")
        h = norm(h + linear(gelu(linear(h, b + "ffn_in")), b + "ffn_out"), b + "ffn_norm")
    scores = norm(gelu(linear(h, "lm_head.dense")), "lm_head.layer_norm")
    expected = scores @ p[e + "tokens.weight"].T + p["lm_head.bias"]
    torch.testing.assert_close(model(input_ids), expected, **CLOSE)


def test_attention_by_hand_equals_the_kernel():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 7, 5)  # three of (B, H, T, D)
    may_attend = torch.rand(3, 1, 1, 7) < 0.6
    may_attend[..., 0] = True
    kernel = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=may_attend)
    torch.testing.assert_close(roberta.attention_by_hand(q, k, v, may_attend), kernel, **CLOSE)


def test_one_product_for_queries_keys_and_values_equals_three():
    """Gradients too, with the parameters apart."""
    torch.manual_seed(0)
    attention, hidden = roberta.SelfAttention(RobertaConfig.tiny(hidden_size=10)), torch.randn(3, 7, 10)
    may_attend, found = torch.rand(3, 1, 1, 7) < 0.8, []
    q, k, v = (layer(hidden).unflatten(-1, (2, 5)).transpose(1, 2)
               for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    by_hand = roberta.attention_by_hand(q, k, v, may_attend).transpose(1, 2).flatten(2)
    for attended in (attention(hidden, may_attend), attention.out_proj(by_hand)):
        found.append([attended, *torch.autograd.grad(attended.square().sum(), attention.parameters())])
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("left", [0, 5])
def test_a_padded_row_equals_the_same_row_alone(model, input_ids, left):
    padded = torch.full((3, 16), 1)
    padded[:, left : left + 7] = input_ids
    padded[1, left + 4 :] = 1
    logits = model(padded)
    assert logits.isfinite().all()
    for row, length in ((0, 7), (1, 4), (2, 7)):
        alone = model(input_ids[row : row + 1, :length])
        torch.testing.assert_close(logits[row : row + 1, left : left + length], alone, **CLOSE)


def test_a_row_of_padding_gives_no_nan_in_values_or_gradients(model, input_ids):
    input_ids[1] = 1
    for mask in (None, input_ids != 1, (input_ids != 1).long()):
        model.zero_grad()
        logits = model(input_ids, mask)
        logits.logsumexp(-1).sum().backward()
        assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


def test_the_head_at_predicted_places_equals_the_head_everywhere(model, input_ids):
    """In pretraining it is computed there only; the gradients are the same, too."""
    predicted, found = torch.tensor([1, 6, 7, 20]), []
    for logits in (model(input_ids, predicted=predicted), model(input_ids).flatten(0, 1)[predicted]):
        loss = torch.nn.functional.cross_entropy(logits, input_ids.flatten()[predicted])
        found.append([logits, *torch.autograd.grad(loss, model.parameters())])
    torch.testing.assert_close(found[0], found[1], **CLOSE)


def test_a_vocabulary_that_is_filled_up_changes_no_loss():
    """What a GPU computes, 97 units as 128, beside the plain product."""
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((6, 10), (97, 10), (97,))]
    found = []
    for multiple in (1, 64):
        loss = torch.nn.functional.cross_entropy(roberta.padded_linear(*inputs, multiple), torch.arange(6))
        found.append([loss, *torch.autograd.grad(loss, inputs)])
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-6)


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
    model = RobertaForMaskedLM(replace(ODD, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5))
    assert not torch.equal(model(input_ids), model(input_ids))
    model.eval()
    assert torch.equal(model(input_ids), model(input_ids))


def test_the_nsp_model_reads_two_types_of_tokens(input_ids):
    model = roberta.RobertaForPreTraining(replace(ODD, type_vocab_size=2)).eval()
    types = torch.zeros_like(input_ids)
    types[:, 4:] = 1
    logits, nsp = model(input_ids, token_type_ids=types, predicted=torch.tensor([3, 8]))
    assert logits.shape == (2, 97) and nsp.shape == (3, 2)
    assert not torch.allclose(nsp, model(input_ids)[1])


def test_what_cannot_be_is_refused_with_the_numbers(model):
    with pytest.raises(ValueError, match="22 tokens for 21 positions"):
        model(torch.full((1, 22), 5))
    with pytest.raises(ValueError, match="3 heads do not divide hidden_size 10"):
        RobertaConfig(hidden_size=10, num_attention_heads=3)
    with pytest.raises(ValueError, match="num_labels 2, but id2label names 3"):
        RobertaConfig(num_labels=2, id2label={0: "a", 1: "b", 2: "c"})


# ----------------------------------------------------------------------------------------------------------
# Put to use
# ----------------------------------------------------------------------------------------------------------


def test_features(model, input_ids, tokenizer):
    hiddens = model.extract_features(input_ids, return_all_hiddens=True)
    assert len(hiddens) == 4 and torch.equal(hiddens[-1], model.roberta(input_ids))
    wide = RobertaModel(replace(ODD, vocab_size=270))
    wide.blocks[0].eval()
    ids = tokenizer.encode("abc")
    assert wide.encode("abc", tokenizer).tolist() == [[0, *ids, 2]]
    assert wide.encode(("abc", "abc"), tokenizer).tolist() == [[0, *ids, 2, 2, *ids, 2]]
    assert wide.extract_features("abc", tokenizer).shape == (1, len(ids) + 2, 10)
    assert wide.training and not wide.blocks[0].training  # as they were
    with pytest.raises(ValueError, match="own tokenizer: .* units > 97"):
        model.extract_features("abc", tokenizer)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        wide.extract_features("abc")


def leaves(result):
    """The numbers and texts in a result, however nested."""
    parts = list(result.values()) if isinstance(result, dict) else result
    return [leaf for part in parts for leaf in leaves(part)] if isinstance(parts, list) else [parts]


TEXTS, PAIRS = ["a b", "a", "b a b c b a", "", " c"], [("a", "b c"), ("a b a b", "c b"), ("", "a")]
MASKED = ["a <mask> c", "<mask> b a <mask>", "b b <mask>", "<mask>", "a b c<mask> b"]


@pytest.mark.parametrize(("kind", "method", "texts", "changes"), [
    (RobertaForMaskedLM, "fill_mask", MASKED, {}),
    (RobertaForSequenceClassification, "classify", TEXTS + PAIRS, {"num_labels": 3}),
    (RobertaForSequenceClassification, "classify", TEXTS + PAIRS, {"num_labels": 1}),
    (roberta.RobertaForQuestionAnswering, "answer", PAIRS, {}),
    (roberta.RobertaForQuestionAnswering, "answer", PAIRS, {"answerability": True}),
    (RobertaModel, "extract_features", TEXTS + PAIRS, {}),
], ids=range(6))
def test_a_list_gives_what_its_texts_give_one_by_one(tokenizer, monkeypatch, kind, method, texts, changes):
    """Padded, two at a time, without dropout; a pair is a tuple, and a list of two is none."""
    monkeypatch.setattr(roberta, "AT_ONCE", 2)
    torch.manual_seed(0)
    model, sizes = kind(replace(ODD, vocab_size=270, hidden_dropout_prob=0.5, **changes)), []
    encoder = getattr(model, "roberta", model)
    encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for batch in (texts, texts[:2], texts[1:2]):
        together = getattr(model, method)(batch, tokenizer)
        alone = [getattr(model, method)(text, tokenizer) for text in batch]
        assert len(together) == len(batch) and max(sizes) <= 2
        for a, b in zip(together, alone):
            if kind is RobertaModel:
                a, b = a[: b.shape[1]].tolist(), b[0].tolist()
            assert leaves(a) == pytest.approx(leaves(b), abs=1e-5)
    assert model.training


def test_results_are_what_the_docstrings_say(tokenizer):
    names = {0: "bad", 1: "good", 2: "neither"}
    config = replace(ODD, vocab_size=270, id2label=names, num_labels=3)
    model = RobertaForSequenceClassification(config).eval()
    probabilities = model(model.encode(("a b", "c"), tokenizer))[0].softmax(0).tolist()
    found = model.classify(("a b", "c"), tokenizer)
    assert list(found) == ["bad", "good", "neither"] and leaves(found) == pytest.approx(probabilities)
    number = RobertaForSequenceClassification(replace(ODD, vocab_size=270, num_labels=1)).eval()
    assert number.classify("a", tokenizer) == {"score": number(number.encode("a", tokenizer)).item()}
    answers = roberta.RobertaForQuestionAnswering(replace(config, answerability=True))
    assert list(answers.answer(("a", "b"), tokenizer)) == ["answer", "score", "answerable"]
    for method, text, message in (
            (answers.answer, ("a b", " \n"), "a passage that is not empty; got .'a b', ' "),
            (answers.answer, "ab", "needs a question and a passage"),
            (model.classify, ("a", "b", "c"), "a list of these, not .'a', 'b', 'c'"),
            (model.classify, [["a", "b"]], "a list of these, not .'a', 'b'"),
            (model.classify, ["a", "a b c " * 9], "30 tokens for 21 positions")):
        with pytest.raises(ValueError, match=message):
            method(text, tokenizer)


def save_with_bias(kind, directory, tokenizer, **biases):
    """A saved model whose head prefers what a large bias says, whatever the text."""
    model = kind(replace(ODD, vocab_size=tokenizer.vocab_size, num_labels=3))
    for name, place in biases.items():
        with torch.no_grad():
            dict(model.named_parameters())[name.replace("__", ".")][place] = 100
    model.save_pretrained(directory, tokenizer)
    return model.eval()


def test_fill_mask(tmp_path, tokenizer):
    model = save_with_bias(RobertaForMaskedLM, tmp_path, tokenizer, lm_head__bias=tokenizer.encode(" b")[0])
    best = model.fill_mask("a <mask> c", tokenizer, top_k=3)
    assert len(best) == 3 and best[0]["token_str"] == " b" and best[0]["sequence"] == "a b c"
    ids = torch.tensor([[0, *tokenizer.encode("a"), tokenizer.mask_id, *tokenizer.encode(" c"), 2]])
    probabilities = model(ids)[0, 2].softmax(-1)
    assert best[0]["score"] > 0.99 and best[0]["score"] == pytest.approx(probabilities.max().item())
    two = model.fill_mask("<mask> <mask>", tokenizer)
    assert len(two) == 2 and two[0][0]["sequence"] == " b <mask>" and two[1][0]["sequence"] == "<mask> b"
    assert len(roberta.RobertaForPreTraining(model.config).fill_mask("a <mask>", tokenizer)) == 5
    with pytest.raises(ValueError, match="not a text with <mask>, .*: 'a b'$"):
        model.fill_mask("a b", tokenizer)


def test_the_command_does_what_each_model_is_for(tmp_path, tokenizer, capsys):
    place = tokenizer.encode(" b")[0]
    save_with_bias(RobertaForMaskedLM, tmp_path / "lm", tokenizer, lm_head__bias=place)
    save_with_bias(RobertaForSequenceClassification, tmp_path / "labels", tokenizer,
                   classifier__out_proj__bias=1)
    answers = save_with_bias(roberta.RobertaForQuestionAnswering, tmp_path / "answers", tokenizer)
    result = run("roberta.py", tmp_path / "lm", "a <mask> c", "--top-k", 2)
    assert result.stdout.startswith("100.00%  a b c\n") and len(result.stdout.splitlines()) == 2
    roberta.main([str(tmp_path / "labels"), "a b", "c"])
    assert capsys.readouterr().out == "  0.00%  LABEL_0\n100.00%  LABEL_1\n  0.00%  LABEL_2\n"

    # Of all spans the best one, looked for one by one.
    question, passage = "a c?", "b a b c b"
    roberta.main([str(tmp_path / "answers"), question, passage])
    ids, characters = tokenizer.encode_with_offsets(passage)
    logits = answers(answers.encode((question, passage), tokenizer))
    start, end = (x[0, len(tokenizer.encode(question)) + 3 : -1].softmax(0) for x in logits)
    spans = [(i, j) for i in range(len(ids)) for j in range(i, len(ids))]
    i, j = max(spans, key=lambda span: start[span[0]] * end[span[1]])
    answer = passage[characters[i][0] : characters[j][1]].strip()
    assert capsys.readouterr().out == f"{start[i] * end[j]:7.2%}  {answer}\n"


def test_the_commands_errors_are_one_line(tmp_path, tokenizer, capsys):
    save_with_bias(RobertaForMaskedLM, tmp_path, tokenizer)
    answers, encoder = tmp_path / "answers", tmp_path / "encoder"
    save_with_bias(roberta.RobertaForQuestionAnswering, answers, tokenizer)
    save_with_bias(RobertaModel, encoder, tokenizer)
    for arguments in ((tmp_path, "no mask"), (tmp_path / "nowhere", "a <mask>"), (tmp_path, "<mask>", "b"),
                      (tmp_path, "<mask>", "--top-k", "0"), (tmp_path, "a b c " * 100 + "<mask>"),
                      (answers, "a?"), (answers, "a?", ""), (answers, "a", "b", "c"), (encoder, "a")):
        error = ends(roberta.main, arguments, 1, capsys)
        assert error.startswith("error: ") and len(error.splitlines()) == 1
