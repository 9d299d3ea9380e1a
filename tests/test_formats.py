"""Other people's files open here and ours open there: Hugging Face's, fairseq's, and hostile ones."""

import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from argparse import Namespace

import pytest
import torch
from helpers import PUBLISHED, ROOT, make_documents, run
from torch.nn import functional as F

import data
import roberta
from roberta import (
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForPreTraining,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaModel,
)

ODD = {
    "vocab_size": 97,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 22,
    "max_position_embeddings": 33,
}
# The published widths, cut in depth and vocabulary: what makes them slow tests no other line of code.
BASE = ODD | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 2}
LARGE = BASE | {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
KINDS = [
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaForQuestionAnswering,
    RobertaForMultipleChoice,
]


def away_from_defaults(model):
    """Moves what initialisation leaves at 0 or 1, or a bias that goes astray could not be seen."""
    scale = 0.1 if model.config.hidden_size < 100 else 0.01  # wide sums must not grow beyond floats' 1e-5
    for parameter in model.parameters():
        with torch.no_grad():
            parameter += scale * torch.randn_like(parameter)
    return model


def saved_there(oracle, directory, kind, safe=True, **changes):
    """A randomly initialised model of Hugging Face's, saved by its own code."""
    transformers = oracle("transformers")
    torch.manual_seed(0)
    shape = ODD | {"type_vocab_size": 1, "layer_norm_eps": 1e-5} | changes
    shape |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    theirs = getattr(transformers, kind.__name__)(transformers.RobertaConfig(**shape)).eval()
    away_from_defaults(theirs)
    theirs.save_pretrained(directory)
    if not safe:
        torch.save(theirs.state_dict(), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    return theirs


def batch(kind):
    """Ids and mask with padded rows; (3, 17), of multiple choice (3, 4, 17)."""
    torch.manual_seed(1)
    input_ids = torch.randint(4, 96, (12, 17) if kind is RobertaForMultipleChoice else (3, 17))
    input_ids[1, 9:], input_ids[2, 3:] = 1, 1
    if kind is RobertaForMultipleChoice:
        input_ids = input_ids.view(3, 4, 17)
    return input_ids, input_ids != 1


def outputs(model, input_ids, mask):
    """Logits of ours or theirs as a list; those at padding mean nothing and are left out."""
    given = model(input_ids, attention_mask=mask if isinstance(model, roberta.RobertaModelBase) else mask.long())
    if hasattr(given, "to_tuple"):
        names = ("logits", "start_logits", "end_logits", "last_hidden_state")
        given = [given[name] for name in names if name in given]
    given = list(given) if isinstance(given, tuple | list) else [given]
    return [x[mask] if x.shape[:2] == mask.shape else x for x in given]


def assert_equal_models(ours, theirs, kind):
    """The same logits, hidden states of all layers and gradients, to 1e-5."""
    input_ids, mask = batch(kind)
    close = dict(atol=1e-5, rtol=1e-5)
    expected, found = outputs(theirs, input_ids, mask), outputs(ours, input_ids, mask)
    assert len(expected) == len(found)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, **close)
    flat, flat_mask = input_ids.view(-1, 17), mask.view(-1, 17)
    encoder = theirs.base_model
    hiddens = encoder(flat, attention_mask=flat_mask.long(), output_hidden_states=True).hidden_states
    own = ours.roberta if hasattr(ours, "roberta") else ours
    for a, b in zip(own(flat, flat_mask, return_all_hiddens=True), hiddens, strict=True):
        torch.testing.assert_close(a[flat_mask], b[flat_mask], **close)
    for logits in (expected, found):
        sum(x.square().mean() for x in logits).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    if "lm_head.bias" in gradients and gradients["lm_head.bias"] is None:  # untied: the decoder's is used
        gradients["lm_head.bias"] = gradients["lm_head.decoder.bias"]
    for name, p in ours.named_parameters():
        key = ours.hugging_face_key(name)
        expected = gradients.get(key, gradients.get(key.removeprefix("roberta.")))
        torch.testing.assert_close(p.grad, expected, **close, msg=lambda text, key=key: f"{key}: {text}")


# ----------------------------------------------------------------------------------------------------------
# Hugging Face's models here
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [ODD, BASE, LARGE], ids=["odd", "base", "large"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_hugging_faces_models_give_the_same_numbers_here(oracle, tmp_path, kind, shape, capsys):
    labels = 3 if kind is RobertaForSequenceClassification else 2
    theirs = saved_there(oracle, tmp_path, kind, num_labels=labels, **shape)
    ours = kind.from_pretrained(tmp_path)
    assert "note" not in capsys.readouterr().err
    assert_equal_models(ours, theirs, kind)


@pytest.mark.parametrize(
    "changes",
    [
        {"type_vocab_size": 2},
        {"type_vocab_size": 5},
        {"tie_word_embeddings": False},
        {"layer_norm_eps": 1e-12, "max_position_embeddings": 21},
    ],
    ids=str,
)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_variants_of_hugging_faces_models(oracle, tmp_path, changes, safe, capsys):
    theirs = saved_there(oracle, tmp_path, RobertaForMaskedLM, safe, **changes)
    ours = RobertaForMaskedLM.from_pretrained(tmp_path)
    assert_equal_models(ours, theirs, RobertaForMaskedLM)
    if ours.config.type_vocab_size > 1:
        input_ids, mask = batch(RobertaForMaskedLM)
        types = torch.randint(0, ours.config.type_vocab_size, input_ids.shape)
        a, b = ours(input_ids, mask, types), theirs(input_ids, mask.long(), token_type_ids=types).logits
        torch.testing.assert_close(a[mask], b[mask], atol=1e-5, rtol=1e-5)
    assert "note" not in capsys.readouterr().err


def test_an_encoder_saved_alone_opens_with_its_pooler_passed_over(oracle, tmp_path):
    theirs = saved_there(oracle, tmp_path, RobertaModel)
    assert_equal_models_of_encoders(RobertaModel.from_pretrained(tmp_path), theirs)
    with pytest.raises(ValueError, match="5 weights are missing, first of all lm_head.bias"):
        RobertaForMaskedLM.from_pretrained(tmp_path)


def assert_equal_models_of_encoders(ours, theirs):
    input_ids, mask = batch(RobertaModel)
    expected = theirs(input_ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours(input_ids, mask)[mask], expected[mask], atol=1e-5, rtol=1e-5)


def test_an_untied_decoder_is_seen_whatever_the_config_says(oracle, tmp_path):
    transformers = oracle("transformers")
    saved_there(oracle, tmp_path, RobertaForMaskedLM, tie_word_embeddings=False)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert_equal_models(RobertaForMaskedLM.from_pretrained(tmp_path), theirs, RobertaForMaskedLM)


def test_shards_open_by_their_index(oracle, tmp_path):
    theirs = saved_there(oracle, tmp_path, RobertaForMaskedLM)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_equal_models(RobertaForMaskedLM.from_pretrained(tmp_path), theirs, RobertaForMaskedLM)
    one = next(tmp_path.glob("model-*.safetensors"))
    one.rename(tmp_path / "away")
    with pytest.raises(ValueError, match=f"the file {one.name} is missing"):
        RobertaForMaskedLM.from_pretrained(tmp_path)


def test_pickled_shards_open_by_their_index(tmp_path):
    model = RobertaForMaskedLM(RobertaConfig(**ODD))
    model.save_pretrained(tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    (tmp_path / "pytorch_model.bin").unlink()
    where = {key: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, key in enumerate(weights)}
    for name in set(where.values()):
        torch.save({key: value for key, value in weights.items() if where[key] == name}, tmp_path / name)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    opened = RobertaForMaskedLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), opened.state_dict().values()))
    index.write_text(json.dumps({"weight_map": where | {"lm_head.more": where["lm_head.bias"]}}))
    with pytest.raises(ValueError, match="lm_head.more is in either the index or the files"):
        RobertaForMaskedLM.from_pretrained(tmp_path)


def test_label_names_and_dropout_come_along(oracle, tmp_path):
    names = {0: "no", 1: "yes", 2: "perhaps"}
    saved_there(oracle, tmp_path, RobertaForSequenceClassification, id2label=names, classifier_dropout=0.25)
    ours = RobertaForSequenceClassification.from_pretrained(tmp_path)
    assert ours.config.id2label == names and ours.classifier.dropout.p == 0.25


def test_half_precision_weights_open_as_floats(tmp_path):
    model = RobertaForMaskedLM(RobertaConfig(**ODD)).half()
    model.save_pretrained(tmp_path)
    opened = RobertaForMaskedLM.from_pretrained(tmp_path)
    for a, b in zip(opened.parameters(), model.parameters()):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_every_key_is_accounted_for(tmp_path):
    model = RobertaForSequenceClassification(RobertaConfig(**ODD))
    model.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)

    def refused(changed, message):
        torch.save(changed, path)
        with pytest.raises(ValueError, match=message):
            RobertaForSequenceClassification.from_pretrained(tmp_path)

    refused(weights | {"roberta.encoder.layer.0.more": torch.zeros(1)}, "no place .*layer.0.more")
    refused(weights | {"more.weight": torch.zeros(1)}, "1 weights have no place .* more.weight")
    refused(weights | {"classifier.more": torch.zeros(1)}, "no place .* classifier.more")
    bias = "classifier.out_proj.bias"
    refused({k: v for k, v in weights.items() if k != bias}, f"1 weights are missing, first of all {bias}")
    refused(weights | {bias: torch.zeros(5)}, rf"{bias} has shape \(5,\), config.json asks for \(2,\)")
    refused(weights | {bias: torch.zeros(2, dtype=torch.int64)}, f"{bias} is no tensor of floats")
    refused(weights | {bias: "x"}, f"{bias} is no tensor of floats, but str")
    layers = {k: v for k, v in weights.items() if ".layer.2." not in k}
    refused(layers, "num_hidden_layers 3, the weights have 2")
    refused({}, "num_hidden_layers 3, the weights have 0")
    # What is passed over: buffers and other models' heads.
    torch.save(weights | {"roberta.embeddings.position_ids": torch.arange(9), "lm_head.bias": weights[bias]}, path)
    opened = RobertaForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), opened.state_dict().values()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "is_decoder True"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"hidden_size": "many"}, "hidden_size 'many'"),
        ({"hidden_size": -1}, "hidden_size -1"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers 1099511627776"),
        ({"num_hidden_layers": 1 << 20}, "num_hidden_layers 1048576, the weights have 3"),
        ({"vocab_size": 1 << 20}, "vocab_size 1048576, the weights are for 97"),
        ({"num_labels": 1 << 23, "id2label": None}, "id2label|num_labels"),
        ({"id2label": {"a": "b"}}, "id2label"),
        ({"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob nan"),
        ({"max_position_embeddings": 2}, "max_position_embeddings 2"),
    ],
    ids=str,
)
def test_absurd_configs_are_refused(tmp_path, changes, message):
    RobertaForMaskedLM(RobertaConfig(**ODD)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        RobertaForMaskedLM.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# Our models there
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_bpe([*make_documents(200), "naïve café 日本語 🙂"], 500)


@pytest.mark.parametrize("kind", [*KINDS, RobertaForPreTraining], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "changes",
    [{}, {"type_vocab_size": 2}, {"tie_word_embeddings": False}, {"answerability": True}],
    ids=str,
)
def test_hugging_face_opens_ours_without_a_word(oracle, tmp_path, kind, changes, tokenizer, caplog):
    transformers = oracle("transformers")
    torch.manual_seed(0)
    config = RobertaConfig(**ODD | {"vocab_size": 500, "id2label": {0: "a", 1: "b", 2: "c"}} | changes)
    ours = away_from_defaults(kind(config)).eval()
    ours.save_pretrained(tmp_path, tokenizer)
    name = "RobertaForMaskedLM" if kind is RobertaForPreTraining else kind.__name__
    auto = getattr(transformers, name.replace("RobertaFor", "AutoModelFor"))
    transformers.utils.logging.enable_propagation()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    transformers.utils.logging.disable_propagation()
    assert not any(report.values()) and not caplog.records, (report, caplog.text)
    assert type(theirs).__name__ == name and theirs.config.id2label == ours.config.id2label
    input_ids, mask = batch(kind)
    for a, b in zip(outputs(ours, input_ids, mask), outputs(theirs.eval(), input_ids, mask)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    opened = kind.from_pretrained(tmp_path)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, opened.state_dict()[key]), key


def test_round_trip_through_hugging_face_is_exact(oracle, tmp_path, tokenizer):
    transformers = oracle("transformers")
    ours = away_from_defaults(RobertaForMaskedLM(RobertaConfig(**ODD | {"vocab_size": 500})))
    ours.save_pretrained(tmp_path / "a", tokenizer)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "model.safetensors").exists() and (tmp_path / "b" / "tokenizer.json").exists()
    again = RobertaForMaskedLM.from_pretrained(tmp_path / "b")
    for key, value in ours.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert again.config == ours.config
    opened = data.Tokenizer.from_pretrained(tmp_path / "b")  # from tokenizer.json
    assert opened.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("use_fast", [True, False])
def test_their_tokenizer_of_our_files(oracle, tmp_path, tokenizer, use_fast):
    transformers = oracle("transformers")
    model = RobertaForMaskedLM(RobertaConfig(**ODD | {"vocab_size": 500}))
    model.save_pretrained(tmp_path, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, use_fast=use_fast)
    for text in [*make_documents(30, seed=4), " a  b\n\nc\t", "日本語 🙂 é"]:
        ids = model.encode(text, tokenizer)[0].tolist()
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids, skip_special_tokens=True) == text
        pair = model.encode((text, "Why?"), tokenizer)[0].tolist()
        assert theirs(text, "Why?")["input_ids"] == pair
    assert theirs.model_max_length == model.config.max_tokens == 31
    assert len(theirs("word " * 99, truncation=True)["input_ids"]) == 31
    special = (theirs.cls_token_id, theirs.pad_token_id, theirs.sep_token_id, theirs.unk_token_id)
    assert special == (0, 1, 2, 3) and theirs.mask_token_id == tokenizer.mask_id


def test_fill_mask_gives_the_same_as_their_pipeline(oracle, tmp_path, tokenizer):
    transformers = oracle("transformers")
    torch.manual_seed(3)
    config = RobertaConfig(**ODD | {"vocab_size": 500, "initializer_range": 0.5})
    ours = away_from_defaults(RobertaForMaskedLM(config)).eval()
    ours.save_pretrained(tmp_path, tokenizer)
    pipeline = transformers.pipeline("fill-mask", str(tmp_path), top_k=5)
    for text in ("He said<mask> again.", "<mask> of the", "a b c <mask>", "one <mask> two <mask>."):
        found, expected = ours.fill_mask(text, tokenizer), pipeline(text)
        if text.count("<mask>") == 1:
            found, expected = [found], [expected]
        for a, b in zip(found, expected, strict=True):
            assert [x["token"] for x in a] == [x["token"] for x in b]
            assert [x["score"] for x in a] == pytest.approx([x["score"] for x in b], abs=1e-4)
