"""Other people's files open here and ours open there: Hugging Face's, fairseq's, and hostile ones."""

import json
import os
import pickle
import struct
import sys
import types
import warnings
import zipfile
from argparse import Namespace

import pytest
import torch
from helpers import ROOT, make_documents, run

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
BASE = ODD | {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
}
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
    theirs = not isinstance(model, roberta.RobertaModelBase)
    given = model(input_ids, attention_mask=mask.long() if theirs else mask)
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
    with pytest.raises(ValueError, match="lm_head.more is in the index or in the files"):
        RobertaForMaskedLM.from_pretrained(tmp_path)


def test_label_names_and_dropout_come_along(oracle, tmp_path):
    names = {0: "no", 1: "yes", 2: "perhaps"}
    saved_there(oracle, tmp_path, RobertaForSequenceClassification, id2label=names, classifier_dropout=0.25)
    ours = RobertaForSequenceClassification.from_pretrained(tmp_path)
    assert ours.config.id2label == names and ours.classifier.dropout.p == 0.25


def test_changes_that_are_no_fields_are_refused(tmp_path):
    RobertaForMaskedLM(RobertaConfig(**ODD)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="RobertaConfig has no hiden_size; it has .*hidden_size"):
        RobertaForMaskedLM.from_pretrained(tmp_path, hiden_size=9)
    assert (
        RobertaForMaskedLM.from_pretrained(tmp_path, hidden_dropout_prob=0.3).config.hidden_dropout_prob
        == 0.3
    )


def test_each_head_that_is_not_there_is_drawn_and_named(oracle, tmp_path, capsys):
    saved_there(oracle, tmp_path / "encoder", RobertaModel)  # with its pooler
    RobertaForMultipleChoice.from_pretrained(tmp_path / "encoder")
    note = capsys.readouterr().err
    assert "has no classifier.weight, classifier.bias; initialised at random" in note and "pooler" not in note
    RobertaForQuestionAnswering(RobertaConfig(**ODD)).save_pretrained(tmp_path / "qa")
    RobertaForQuestionAnswering.from_pretrained(tmp_path / "qa", answerability=True)
    assert "has no answerable.weight, answerable.bias;" in capsys.readouterr().err
    with pytest.raises(ValueError, match="5 weights are missing, first of all lm_head.bias"):
        RobertaForMaskedLM.from_pretrained(tmp_path / "qa")


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
    refused(
        weights | {"roberta.embeddings.position_embeddings.weight": torch.tensor(1.0)}, "no row of floats"
    )
    refused(weights | {"classifier.more": torch.zeros(1)}, "no place .* classifier.more")
    bias = "classifier.out_proj.bias"
    refused({k: v for k, v in weights.items() if k != bias}, f"1 weights are missing, first of all {bias}")
    refused(weights | {bias: torch.zeros(5)}, rf"{bias} has shape \(5,\), the config asks for \(2,\)")
    refused(
        weights | {bias: torch.zeros(2, dtype=torch.int64)}, f"{bias} holds no row of floats, but torch.int64"
    )
    refused(weights | {bias: "x"}, f"{bias} is no tensor with a name, but str")
    layers = {k: v for k, v in weights.items() if ".layer.2." not in k}
    refused(layers, "num_hidden_layers 3, the weights have 2")
    refused({}, "num_hidden_layers 3, the weights have 0")
    # What is passed over: buffers and other models' heads.
    passed_over = {"roberta.embeddings.position_ids": torch.arange(9), "lm_head.bias": weights[bias]}
    torch.save(weights | passed_over, path)
    opened = RobertaForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), opened.state_dict().values()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"hidden_size": "many"}, "hidden_size 'many'"),
        ({"hidden_size": -1}, "hidden_size -1"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers 1099511627776"),
        ({"num_hidden_layers": 1 << 11}, "num_hidden_layers 2048, the weights have 3"),
        ({"vocab_size": 1 << 20}, "vocab_size 1048576, the weights are for 97"),
        ({"num_labels": 1 << 23, "id2label": {}}, "num_labels 8388608"),
        ({"id2label": {"a": "b"}}, "id2label"),
        ({"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob nan"),
        ({"max_position_embeddings": 2}, "max_position_embeddings 2"),
        ({"eos_token_id": 98}, "eos_token_id 98 lies outside vocab_size 97"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false'"),
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


# ----------------------------------------------------------------------------------------------------------
# fairseq
# ----------------------------------------------------------------------------------------------------------

LAYER = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "final_layer_norm",
}


def fairseq_checkpoint(theirs, old):
    """What fairseq would have saved of Hugging Face's model: `old` as in 2019, else as since 2021.

    The layout, the junk beside the weights included, is what fairseq 0.8.0 and 0.12.2 were seen to write.
    """
    weights = theirs.state_dict()
    side = "decoder" if old else "encoder"
    encoder = f"{side}.sentence_encoder."
    found = {
        encoder + "embed_tokens.weight": weights["roberta.embeddings.word_embeddings.weight"],
        encoder + "embed_positions.weight": weights["roberta.embeddings.position_embeddings.weight"]
        + weights["roberta.embeddings.token_type_embeddings.weight"],
        f"{side}.lm_head.weight": weights["roberta.embeddings.word_embeddings.weight"],
        f"{side}.lm_head.bias": weights["lm_head.bias"],
    }
    for kind in ("weight", "bias"):
        norm = "emb_layer_norm" if old else "layernorm_embedding"
        found[f"{encoder}{norm}.{kind}"] = weights[f"roberta.embeddings.LayerNorm.{kind}"]
        for name in ("dense", "layer_norm"):
            found[f"{side}.lm_head.{name}.{kind}"] = weights[f"lm_head.{name}.{kind}"]
        for i in range(theirs.config.num_hidden_layers):
            for name, place in LAYER.items():
                found[f"{encoder}layers.{i}.{place}.{kind}"] = weights[
                    f"roberta.encoder.layer.{i}.{name}.{kind}"
                ]
            fused = [found[f"{encoder}layers.{i}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            if old:
                for x in "qkv":
                    del found[f"{encoder}layers.{i}.self_attn.{x}_proj.{kind}"]
                found[f"{encoder}layers.{i}.self_attn.in_proj_{kind}"] = torch.cat(fused)
            else:  # kept for a fast path, stale, read by nobody
                found[f"{encoder}layers.{i}.in_proj_{kind}"] = torch.full_like(torch.cat(fused), 7)
                found[f"{encoder}layers.{i}.fc1_{kind}"] = torch.zeros(3)
    arguments = Namespace(
        arch="roberta_base", encoder_attention_heads=theirs.config.num_attention_heads, dropout=0.2
    )
    if old:
        return {"args": arguments, "model": found, "optimizer_history": [{}], "extra_state": {}}
    found[encoder + "version"] = torch.ones(1)
    cfg = {"model": arguments, "task": {"_name": "masked_lm"}, "bpe": None}
    return {"args": None, "cfg": cfg, "model": found, "extra_state": {}}


@pytest.mark.parametrize("old", [True, False], ids=["2019", "2021"])
def test_fairseqs_layout_gives_the_same_numbers_here(oracle, tmp_path, old):
    theirs = saved_there(oracle, tmp_path / "hf", RobertaForMaskedLM)
    path = tmp_path / "model.pt"
    torch.save(fairseq_checkpoint(theirs, old), path, _use_new_zipfile_serialization=not old)
    ours = RobertaForMaskedLM.from_pretrained(tmp_path)
    assert ours.config.hidden_dropout_prob == 0.2 and ours.config.max_tokens == 31
    input_ids, mask = batch(RobertaForMaskedLM)
    (found,), (expected,) = outputs(ours, input_ids, mask), outputs(theirs, input_ids, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_named_heads_of_fairseq(oracle, tmp_path, capsys):
    theirs = saved_there(oracle, tmp_path / "hf", RobertaForMaskedLM)
    content = fairseq_checkpoint(theirs, old=False)
    torch.manual_seed(2)
    heads = {"mnli": 3, "lm_head": 2, "rank-it": 1}
    for name, classes in heads.items():
        prefix = f"classification_heads.{name}."
        content["model"] |= {
            prefix + "dense.weight": torch.randn(12, 12),
            prefix + "dense.bias": torch.randn(12),
        }
        content["model"] |= {prefix + "out_proj.weight": torch.randn(classes, 12)}
        content["model"] |= {prefix + "out_proj.bias": torch.randn(classes)}
    torch.save(content, tmp_path / "model.pt")
    ours = RobertaForMaskedLM.from_pretrained(tmp_path)
    assert list(ours.classification_heads) == list(heads)
    input_ids, mask = batch(RobertaForMaskedLM)
    first = theirs.base_model(input_ids, attention_mask=mask.long()).last_hidden_state[:, 0]
    for name in heads:
        layers = [
            content["model"][f"classification_heads.{name}.{layer}"]
            for layer in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
        ]
        expected = torch.tanh(first @ layers[0].T + layers[1]) @ layers[2].T + layers[3]
        logits = ours.predict(name, input_ids, return_logits=True)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            ours.predict(name, input_ids), expected.log_softmax(-1), atol=1e-5, rtol=1e-5
        )
        alone = RobertaForSequenceClassification.from_pretrained(tmp_path, head=name)
        assert alone.config.num_labels == heads[name]
        torch.testing.assert_close(alone(input_ids), expected, atol=1e-5, rtol=1e-5)
    choice = RobertaForMultipleChoice.from_pretrained(tmp_path, head="rank-it")
    torch.testing.assert_close(choice(input_ids[:, None]), expected, atol=1e-5, rtol=1e-5)
    assert capsys.readouterr().err.count("note") == 0
    with pytest.raises(ValueError, match=r"heads \['lm_head', 'mnli', 'rank-it'\]; choose one"):
        RobertaForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no classification head 'sst'"):
        RobertaForSequenceClassification.from_pretrained(tmp_path, head="sst")
    with pytest.raises(
        ValueError, match="a RobertaForMaskedLM has no place for the classification head 'mnli'"
    ):
        RobertaForMaskedLM.from_pretrained(tmp_path, head="mnli")
    with pytest.raises(ValueError, match="no classification head 'sst'"):
        ours.predict("sst", input_ids)
    ours.save_pretrained(tmp_path / "again")  # with its heads
    again = RobertaForMaskedLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.predict("mnli", input_ids), ours.predict("mnli", input_ids))


def test_a_registered_head_learns(tokenizer):
    torch.manual_seed(0)
    model = RobertaForMaskedLM(RobertaConfig(**ODD | {"vocab_size": 500, "hidden_dropout_prob": 0.0}))
    model.register_classification_head("sign", num_classes=2)
    texts = [(text, i % 2) for i, text in enumerate(["good it is", "bad it is"])]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        loss = -sum(model.predict("sign", text, tokenizer)[0, label] for text, label in texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [int(model.predict("sign", text, tokenizer).argmax()) for text, _ in texts] == [0, 1]
    for name in ("a.b", "", "pop", "training"):
        with pytest.raises(ValueError, match="cannot be a head's name"):
            model.register_classification_head(name, 2)


EXPORTED = [RobertaForMaskedLM, RobertaForSequenceClassification, RobertaForMultipleChoice]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", EXPORTED, ids=lambda kind: kind.__name__)
def test_export_to_fairseq_and_back_is_exact(tmp_path, tokenizer, kind, tied):
    config = RobertaConfig(**ODD | {"vocab_size": 500, "num_labels": 2, "tie_word_embeddings": tied})
    ours = away_from_defaults(kind(config))
    ours.save_pretrained(tmp_path / "a", tokenizer)
    for source, form, out in (("a", "fairseq", "b"), ("b", "hf", "c")):
        named = "sentence_classification_head" if (source, kind) == ("b", EXPORTED[1]) else None
        roberta.export(tmp_path / source, tmp_path / out, form, named)
        opened = kind.from_pretrained(tmp_path / out)
        for key, value in ours.state_dict().items():
            assert torch.equal(value, opened.state_dict()[key]), key
        assert data.Tokenizer.from_pretrained(tmp_path / out).fingerprint == tokenizer.fingerprint
        if kind is RobertaForMultipleChoice:
            break  # fairseq's file does not say that its one score is for choosing


def test_the_command_exports(tmp_path, tokenizer):
    model = RobertaForMaskedLM(RobertaConfig(**ODD | {"vocab_size": 500}))
    model.save_pretrained(tmp_path / "a", tokenizer)
    result = run("roberta.py", "export", tmp_path / "a", tmp_path / "b", "--format", "fairseq")
    assert result.returncode == 0 and "RobertaForMaskedLM of " in result.stdout, result.stderr
    names = {"model.pt", "dict.txt", "encoder.json", "vocab.bpe"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == names
    result = run("roberta.py", "export", tmp_path / "a", tmp_path / "b")
    assert result.returncode == 2 and "b holds something already" in result.stderr
    result = run("roberta.py", tmp_path / "b", "a <mask>")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 5


def test_what_fairseq_has_no_place_for_is_refused(tmp_path, tokenizer):
    shape = ODD | {"vocab_size": 500}
    RobertaForQuestionAnswering(RobertaConfig(**shape)).save_pretrained(tmp_path / "a", tokenizer)
    RobertaForMaskedLM(RobertaConfig(**shape | {"layer_norm_eps": 0.1})).save_pretrained(
        tmp_path / "b", tokenizer
    )
    for name, message in (("a", "no place for qa_outputs"), ("b", "layer_norm_eps")):
        with pytest.raises(ValueError, match=message):
            roberta.export(tmp_path / name, tmp_path / "out", "fairseq", None)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["args"].__dict__.pop("encoder_attention_heads"), "without 'encoder_attention_heads'"),
        (
            lambda c: setattr(c["args"], "activation_fn", "gelu_fast"),
            "activation_fn 'gelu_fast' is not built",
        ),
        (lambda c: c["model"].__setitem__("encoder.lm_head.weight", torch.zeros(97, 12)), "untie_weights"),
        (
            lambda c: c["model"].pop("encoder.sentence_encoder.embed_tokens.weight"),
            "untie_weights_roberta|without",
        ),
        (lambda c: c["model"].pop("encoder.lm_head.dense.bias"), "missing, first of all lm_head.dense.bias"),
        (lambda c: c["model"].__setitem__("encoder.more", torch.zeros(1)), "no place .* encoder.more"),
        (lambda c: c.pop("args"), "`args` or `cfg`"),
        (lambda c: setattr(c["args"], "encoder_normalize_before", True), "encoder_normalize_before True"),
        (lambda c: setattr(c["args"], "encoder_layers_to_keep", "0,2"), "encoder_layers_to_keep '0,2'"),
        (lambda c: c["model"].clear(), "without"),
    ],
)
def test_other_files_of_fairseq_are_refused(oracle, tmp_path, change, message):
    content = fairseq_checkpoint(saved_there(oracle, tmp_path / "hf", RobertaForMaskedLM), old=False)
    content["args"], content["cfg"] = content["cfg"]["model"], None
    change(content)
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        RobertaForMaskedLM.from_pretrained(tmp_path)


def test_fairseqs_arguments_in_omegaconfs_classes_open_without_them(oracle, tmp_path, monkeypatch):
    """DictConfig is faked here: what counts is that the file names it and that it is not imported."""
    theirs = saved_there(oracle, tmp_path / "hf", RobertaForMaskedLM)
    content = fairseq_checkpoint(theirs, old=False)
    content["cfg"] = Node({"_content": {"model": Node({"_val": content["cfg"]["model"], "_parent": None})}})
    module = types.ModuleType("omegaconf.dictconfig")
    module.Node = Node
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    monkeypatch.setattr(Node, "__module__", "omegaconf.dictconfig")
    torch.save(content, tmp_path / "model.pt")
    monkeypatch.undo()
    assert b"omegaconf.dictconfig" in (tmp_path / "model.pt").read_bytes()
    ours = RobertaForMaskedLM.from_pretrained(tmp_path)
    assert ours.config.num_attention_heads == 2 and "omegaconf.dictconfig" not in sys.modules


class Node:
    def __init__(self, state):
        self.__dict__.update(state)


# ----------------------------------------------------------------------------------------------------------
# Words
# ----------------------------------------------------------------------------------------------------------


def test_word_features_are_averages_over_their_tokens(tokenizer):
    torch.manual_seed(0)
    model = RobertaModel(RobertaConfig(**ODD | {"vocab_size": 500})).eval()
    text = "Thingumabob, there!"
    features = model.extract_features(text, tokenizer)[0, 1:-1]
    offsets = [tuple(pair) for pair in tokenizer.encode_with_offsets(text)[1].tolist()]
    words = [(0, 11), (11, 12), (13, 18), (18, 19)]
    found = model.extract_word_features(text, words, tokenizer)
    for word, row in zip(words, found, strict=True):
        shares = []
        for begin, end in offsets:
            black = [i for i in range(begin, end) if text[i] != " "]
            shares.append(sum(word[0] <= i < word[1] for i in black) / len(black))
        assert sum(shares) > 0
        expected = sum(share * f for share, f in zip(shares, features)) / sum(shares)
        torch.testing.assert_close(row, expected)
    whole = [pair for pair in offsets if " " not in text[slice(*pair)]]
    torch.testing.assert_close(
        model.extract_word_features(text, whole, tokenizer), features[[offsets.index(pair) for pair in whole]]
    )
    with pytest.raises(ValueError, match=r"word \(12, 13\)"):
        model.extract_word_features(text, [(12, 13)], tokenizer)
    assert model.extract_word_features(text, [], tokenizer).shape == (0, 12)


# ----------------------------------------------------------------------------------------------------------
# Hostile files
# ----------------------------------------------------------------------------------------------------------


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, call=os.system, arguments=("touch executed",)):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def saved_model(directory, name):
    """A saved model whose weights are in a file of that name; returns the file."""
    if name == "model.pt":
        torch.save({"args": Namespace(encoder_attention_heads=2), "model": {}}, directory / name)
    else:
        RobertaForMaskedLM(RobertaConfig(**ODD)).save_pretrained(directory)
        (directory / "pytorch_model.bin").rename(directory / name)
    return directory / name


def write_bomb(path):
    """A zip whose pickle is 600 MB of zeros, packed to a thousandth."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as entry:
            for _ in range(600):
                entry.write(bytes(1 << 20))


def write_capitals(path):
    """The pickle under a name by which torch's reader finds it and Python's does not."""
    torch.save({"x": Hostile(bytearray, (1 << 30,))}, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, content in entries:
            archive.writestr(entry.filename.replace("data.pkl", "DATA.PKL"), content)


def write_twice(path):
    """Two archives, one behind the other, of which Python's reader and torch's may see another each."""
    torch.save({"x": torch.zeros(1)}, path)
    harmless = path.read_bytes()
    torch.save({"x": Hostile(bytearray, (1 << 30,))}, path)
    path.write_bytes(path.read_bytes() + harmless)


def write_stretched(path):
    """Weights of one stored number, stretched over 10^15."""
    torch.save({"lm_head.bias": torch.zeros(1).expand(10**9, 10**6)}, path)


def header(length, content=b""):
    return struct.pack("<Q", length) + content


PETABYTES = json.dumps({"x": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 1 << 52]}}).encode()
EVIL = {
    "runs a command": lambda path: torch.save({"x": Hostile()}, path),
    "runs a command among weights": lambda path: torch.save(
        {"model": {"x": torch.zeros(2), "y": Hostile()}}, path
    ),
    "plain pickle": lambda path: path.write_bytes(pickle.dumps(Hostile())),
    "old plain pickle": lambda path: path.write_bytes(pickle.dumps(Hostile(), protocol=0)),
    "old torch": lambda path: torch.save({"x": Hostile()}, path, _use_new_zipfile_serialization=False),
    "evaluates": lambda path: torch.save({"x": Hostile(eval, ("open('executed', 'w')",))}, path),
    "asks for memory in capitals": write_capitals,
    "asks for memory": lambda path: torch.save({"x": Hostile(bytearray, (1 << 36,))}, path),
    "packed": write_bomb,
    "two archives": write_twice,
    "many lists": lambda path: path.write_bytes(b"\x80\x02" + b"]" * 5_000_000 + b"."),
    "stretched": write_stretched,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>not found</html>"),
    "a list": lambda path: torch.save([1, 2], path),
    "no weights": lambda path: torch.save({}, path),
    "numbers for names": lambda path: torch.save({1: torch.zeros(2)}, path),
    "numbers for names of fairseq": lambda path: torch.save(
        {"args": Namespace(encoder_attention_heads=2), "model": {1: torch.zeros(2)}}, path
    ),
}
EVIL_SAFETENSORS = {
    "empty": b"",
    "header of petabytes": header(1 << 60),
    "header cut short": header(1 << 20, b"{"),
    "no JSON": header(4, b"{{{{"),
    "header of 8 MB": header(1 << 23, b"{" + b" " * (1 << 23)),
    "weights of petabytes": header(len(PETABYTES), PETABYTES),
}


OPEN_ALL = """
import sys, threading, time, roberta
peak = 0
def watch():  # getrusage would count what the parent had before
    global peak
    while True:
        peak = max(peak, int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20)
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
for directory in sys.argv[1:]:
    peak = 0
    try: error = roberta.RobertaForMaskedLM.from_pretrained(directory)
    except ValueError as found: error = found
    time.sleep(0.05)
    print(peak, error)
"""


def assert_all_refused(directories, megabytes=500):
    """Opens models in a process of its own, whose memory is watched; each must give one line of error."""
    result = run("-c", OPEN_ALL, *directories.values())
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(directories), result.stdout
    for (kind, directory), line in zip(directories.items(), lines):
        peak, error = line.split(" ", 1)
        assert error.startswith(str(directory)) and 100 < int(peak) < megabytes, f"{kind}: {line}"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_hostile_pickles_are_refused_in_one_line_each(tmp_path, name):
    directories = {}
    for i, (kind, write) in enumerate(EVIL.items()):
        directories[kind] = tmp_path / str(i)
        directories[kind].mkdir()
        write(saved_model(directories[kind], name))
    assert_all_refused(directories)
    assert not (ROOT / "executed").exists()


def test_hostile_safetensors_are_refused_in_one_line_each(oracle, tmp_path):
    oracle("safetensors")
    directories = {}
    for i, (kind, content) in enumerate(EVIL_SAFETENSORS.items()):
        directories[kind] = tmp_path / str(i)
        directories[kind].mkdir()
        saved_model(directories[kind], "model.safetensors").write_bytes(content)
    assert_all_refused(directories)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_file_cut_anywhere_or_altered_is_refused_or_harmless(oracle, tmp_path, name):
    theirs = saved_there(oracle, tmp_path, RobertaForMaskedLM, safe=name.endswith("safetensors"))
    path = tmp_path / name
    whole = path.read_bytes()
    for cut in [*range(0, 300, 7), *range(300, len(whole), len(whole) // 40)]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=name):
            RobertaForMaskedLM.from_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(0, len(whole), (200,), generator=generator).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:  # safetensors has no checksums: there a number may have changed, and nothing else
            opened = RobertaForMaskedLM.from_pretrained(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error) and len(str(error).splitlines()) == 1
        else:
            changed = [
                key
                for key, value in opened.to_hugging_face().items()
                if not value.equal(theirs.state_dict()[key])
            ]
            allowed = {"roberta.embeddings.token_type_embeddings.weight"}  # folded into the positions
            allowed |= {"roberta.embeddings.position_embeddings.weight"}
            assert name == "model.safetensors" or set(changed) <= allowed
            assert all(value.isfinite().all() for value in opened.state_dict().values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = RobertaForMaskedLM(RobertaConfig(**ODD))
    with torch.no_grad():
        model.roberta.blocks[1].ffn_in.bias[3] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer.1.intermediate.dense.bias holds 1 values that are NaN"):
        RobertaForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"a": "model.safetensors.index.json"}, "is no .safetensors file beside it"),
        ({"a": "../model.safetensors"}, "is no .safetensors file beside it"),
        ({"a": "/etc/passwd"}, "is no .safetensors file beside it"),
        ({"a": "gone.safetensors"}, "gone.safetensors is missing"),
        ({"a": "loop.safetensors"}, "loop.safetensors is missing"),
        ({"a": 1}, "'1' is no"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        (None, "no weight_map"),
    ],
    ids=str,
)
def test_indexes_that_lead_astray_are_refused(oracle, tmp_path, where, message):
    oracle("safetensors")
    RobertaForMaskedLM(RobertaConfig(**ODD)).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match=message):
        RobertaForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "7", "{", '{"model_type": 3}'], ids=lambda c: c[:9])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none_is_refused(oracle, tmp_path, name, content):
    oracle("safetensors")
    RobertaForMaskedLM(RobertaConfig(**ODD)).save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        RobertaForMaskedLM.from_pretrained(tmp_path)


def test_without_safetensors_a_line_says_what_to_install(oracle, tmp_path, monkeypatch):
    theirs = saved_there(oracle, tmp_path, RobertaForMaskedLM)
    monkeypatch.setattr(roberta, "has_safetensors", lambda: False)
    with pytest.raises(ValueError, match="model.safetensors: .* pip install safetensors"):
        RobertaForMaskedLM.from_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")  # both are there: this one opens
    RobertaForMaskedLM.from_pretrained(tmp_path)


def test_saving_beside_other_weights_is_refused(oracle, tmp_path):
    saved_there(oracle, tmp_path, RobertaForMaskedLM)
    model = RobertaForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds model.safetensors already"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "new")  # over our own is fine


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    model = RobertaForMaskedLM(RobertaConfig(**ODD))
    for call in (model.fill_mask, model.extract_features):
        with pytest.raises(ValueError, match="the tokenizer has 500 units, the model 97"):
            call("a <mask>", tokenizer)
