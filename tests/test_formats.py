"""Files: ours to the bit, Hugging Face's and fairseq's here, ours there, and damaged or hostile ones."""

import json
import os
import pickle
import re
import sys
import types
from argparse import Namespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ends, make_documents, same

import data
import roberta
from roberta import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification, RobertaModel

ODD = dict(vocab_size=97, hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=22,
           max_position_embeddings=33)
KINDS = [RobertaForMaskedLM, RobertaForSequenceClassification, roberta.RobertaForQuestionAnswering,
         roberta.RobertaForMultipleChoice, roberta.RobertaForPreTraining]
CLOSE = dict(atol=1e-5, rtol=1e-5)
# As roberta-base and roberta-large-mnli were published with, but for the sizes.
CONFIG_OF_2019 = ODD | {
    "attention_probs_dropout_prob": 0.1, "finetuning_task": None, "hidden_act": "gelu", "num_labels": 2,
    "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-5, "output_attentions": False,
    "torchscript": False, "type_vocab_size": 1}


def away_from_defaults(model, scale=0.1):
    """Moves what initialisation leaves at 0 or 1, or a bias that goes astray could not be seen."""
    for parameter in model.parameters():
        with torch.no_grad():
            parameter += scale * torch.randn_like(parameter)
    return model


def ours(kind=RobertaForMaskedLM, **changes):
    torch.manual_seed(0)
    return away_from_defaults(kind(RobertaConfig(**ODD | changes))).eval()


def theirs(oracle, directory, kind=RobertaForMaskedLM, scale=0.1, **changes):
    """A randomly initialised model of Hugging Face's, saved by its own code."""
    transformers = oracle("transformers")
    torch.manual_seed(0)
    shape = ODD | {"type_vocab_size": 1, "layer_norm_eps": 1e-5} | changes
    shape |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    model = getattr(transformers, kind.__name__)(transformers.RobertaConfig(**shape)).eval()
    away_from_defaults(model, scale).save_pretrained(directory)
    return model


def padded_batch():
    torch.manual_seed(1)
    input_ids = torch.randint(4, 96, (3, 17))
    input_ids[1, 9:], input_ids[2, 3:] = 1, 1
    return input_ids, input_ids != 1


def assert_same_outputs(ours, theirs):
    """What stands at padding means nothing and is left out. test_oracle.py has the other models."""
    input_ids, mask = padded_batch()
    types = torch.randint(ours.config.type_vocab_size, (3, 17))
    expected = theirs(input_ids, attention_mask=mask.long(), token_type_ids=types)[0]
    torch.testing.assert_close(ours(input_ids, mask, types)[mask], expected[mask], **CLOSE)


def assert_same_weights(a, b):
    assert same(a.state_dict(), b.state_dict())


def rewrite(directory, change):
    """Changes the weights in a saved model of ours by a function."""
    weights = roberta.read_safetensors(directory / "model.safetensors")
    change(weights)
    roberta.write_safetensors(directory / "model.safetensors", weights)


# ----------------------------------------------------------------------------------------------------------
# Ours
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, RobertaModel], ids=lambda kind: kind.__name__)
def test_saved_and_opened_is_the_same_bit_for_bit(tmp_path, kind, capsys):
    names = {0: "no", 1: "yes", 2: "perhaps"}
    model = ours(kind, answerability=True, id2label=names, type_vocab_size=2)
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    opened = kind.from_pretrained(tmp_path)
    assert capsys.readouterr().err == "" and torch.equal(torch.get_rng_state(), before)  # nothing was drawn
    assert opened.config == model.config and type(roberta.open_model(tmp_path)) is kind
    assert_same_weights(opened, model)
    opened.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_safetensors_are_what_the_library_reads_and_writes(oracle, tmp_path):
    library = oracle("safetensors.torch")
    torch.manual_seed(0)
    tensors = {"b": torch.randn(3, 5), "scalar": torch.tensor(7), "empty": torch.zeros(0, 3),
               "half": torch.randn(3).half(), "brain": torch.randn(2, 3).bfloat16(), "é": torch.randn(4, 2).T,
               "flag": torch.tensor([True, False, True]), "byte": torch.arange(5, dtype=torch.uint8)}
    roberta.write_safetensors(tmp_path / "ours", tensors)
    library.save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "theirs")
    for read, name in ((library.load_file, "ours"), (roberta.read_safetensors, "theirs")):
        assert same(read(tmp_path / name), tensors), name


def test_a_run_stands_for_its_newest_checkpoint_until_it_has_a_model(tmp_path):
    for step, seed in ((9, 1), (10, 2)):
        torch.manual_seed(seed)
        RobertaForMaskedLM(RobertaConfig(**ODD)).save_pretrained(tmp_path / f"checkpoint-{step}")
    for name in ("checkpoint-11", "checkpoint-12.tmp", "checkpoint-x"):  # of which none is a model
        (tmp_path / name).mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert roberta.find_model(tmp_path) == tmp_path / "checkpoint-10"
    RobertaForMaskedLM(RobertaConfig(**ODD)).save_pretrained(tmp_path)
    assert roberta.find_model(tmp_path) == tmp_path
    assert roberta.weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert roberta.read_config(tmp_path) == RobertaConfig(**ODD)


@pytest.mark.parametrize("place", [".", "checkpoint-500"])
def test_trainers_folder_opens_with_the_tokenizer_of_either_place(tmp_path, capsys, tokenizer, place):
    ours(vocab_size=500).save_pretrained(tmp_path / "checkpoint-500")
    (tmp_path / "checkpoint-1000").mkdir()  # killed before anything was in it
    tokenizer.save_pretrained(tmp_path / place)
    for directory in (tmp_path, tmp_path / "checkpoint-500"):
        assert data.Tokenizer.from_pretrained(directory).fingerprint == tokenizer.fingerprint
        roberta.main([str(directory), "a <mask>"])
        assert len(capsys.readouterr().out.splitlines()) == 5


HUB = "no such directory. Nothing is downloaded: .* of this name, from https://huggingface.co/{}/tree/main\n?$"


@pytest.mark.parametrize(("path", "message"), [
    ("roberta-base", HUB.format("roberta-base")), ("Facebook.AI/x", HUB.format("Facebook.AI/x")),
    ("./a/b/c", "a/b/c: no such directory\n?$"), ("/a/b", "^(error: )?/a/b: no such directory\n?$"),
    ("a/model/config.json", "is a file; give its directory, a/model\n?$"),
    ("empty", "empty: no model, but nothing; it takes config.json and one of model.safetensors, "),
    ("a/other", "no model, but notes.txt, tf_model.h5; it takes config.json and one of model.safetensors, "),
    ("a", "a: no model, but model, other; it takes config.json and one of model.safetensors, ")])
def test_a_path_to_no_model_gets_a_line_that_names_the_way_out(tmp_path, monkeypatch, capsys, path, message):
    monkeypatch.chdir(tmp_path)
    ours().save_pretrained("a/model")
    for name in ("empty", "a/other/notes.txt", "a/other/tf_model.h5"):
        os.makedirs(name)
    for error in (refusal(path), ends(roberta.main, [path, "a <mask>"], 1, capsys)):
        assert re.search(message, error) and len(error.splitlines()) == 1


def test_a_head_that_is_not_there_or_for_other_labels_is_drawn_and_named(tmp_path, capsys):
    model = ours(RobertaForSequenceClassification, num_labels=3)
    model.save_pretrained(tmp_path)
    names = {0: "bad", 1: "good"}
    other = RobertaForSequenceClassification.from_pretrained(tmp_path, num_labels=2, id2label=names)
    assert other.config.id2label == names and other.classifier.out_proj.bias.shape == (2,)
    assert other.classifier.dense.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(other.roberta.blocks[0].ffn_in.weight, model.roberta.blocks[0].ffn_in.weight)
    drawn = "is drawn at random:"
    assert capsys.readouterr().err == (
        f"note: {tmp_path}: classifier {drawn} the one there is for 3 labels, not 2\n")
    # An LM head, too, but only where there is nothing of one: test_every_weight_is_accounted_for.
    for kind, head in ((roberta.RobertaForQuestionAnswering, "qa_outputs"), (RobertaForMaskedLM, "lm_head")):
        opened = getattr(kind.from_pretrained(tmp_path), head)
        note = f"note: {tmp_path}: {head} {drawn} the model there has none\n"
        assert capsys.readouterr().err == note
        assert all((w == 0).all() for key, w in opened.state_dict().items() if key.endswith("bias"))
    assert (opened.layer_norm.weight == 1).all()
    assert opened.dense.weight.std().item() == pytest.approx(0.02, rel=0.3)
    # The pooler of 2019's models is half of a head for multiple choice.
    rewrite(tmp_path, lambda w: w.update({"roberta.pooler.dense.weight": torch.zeros(12, 12)}))
    roberta.RobertaForMultipleChoice.from_pretrained(tmp_path)
    assert f"choice {drawn} the model there has none\n" in capsys.readouterr().err


def test_a_head_for_as_many_labels_keeps_their_names(tmp_path, capsys):
    names = {i: f"label {i}" for i in range(12)}
    ours(RobertaForSequenceClassification, id2label=names).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config), sort_keys=True))  # "10" before "2"
    opened = RobertaForSequenceClassification.from_pretrained(tmp_path, num_labels=12)
    assert list(opened.config.id2label.items()) == list(names.items()) and capsys.readouterr().err == ""


def test_dropout_can_be_changed_and_half_precision_becomes_whole(tmp_path):
    model = ours().half()
    model.save_pretrained(tmp_path)
    opened = RobertaForMaskedLM.from_pretrained(tmp_path, hidden_dropout_prob=0.3)
    assert opened.config.hidden_dropout_prob == opened.roberta.blocks[0].dropout.p == 0.3
    for a, b in zip(opened.parameters(), model.parameters()):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())
    with pytest.raises(ValueError, match="hiden_size"):
        RobertaForMaskedLM.from_pretrained(tmp_path, hiden_size=9)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_names_of_wrappers_are_passed_over(tmp_path, wrapper):
    """DistributedDataParallel's, torch.compile's, and both."""
    model, path = ours(), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    weights = roberta.read_safetensors(path)
    roberta.write_safetensors(path, {wrapper + key: weight for key, weight in weights.items()})
    assert_same_weights(RobertaForMaskedLM.from_pretrained(tmp_path), model)


# ----------------------------------------------------------------------------------------------------------
# Hugging Face's here, and ours there
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"type_vocab_size": 5}, {"layer_norm_eps": 1e-12}], ids=str)
@pytest.mark.parametrize("form", ["whole", "encoder", "shards", "pickle", "pickled shards"])
def test_hugging_faces_files_open_here(oracle, tmp_path, form, changes, capsys):
    kind = RobertaModel if form == "encoder" else RobertaForMaskedLM
    model = theirs(oracle, tmp_path, kind, **changes)
    if form in ("shards", "pickle", "pickled shards"):
        (tmp_path / "model.safetensors").unlink()
    if form == "shards":
        model.save_pretrained(tmp_path, max_shard_size="10KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    if form == "pickle":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    if form == "pickled shards":
        for i in (0, 1):
            shard = {key: value for key, value in model.state_dict().items() if len(key) % 2 == i}
            torch.save(shard, tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin")
    assert_same_outputs(kind.from_pretrained(tmp_path), model)
    assert "note" not in capsys.readouterr().err


def test_a_config_of_2019_opens(oracle, tmp_path):
    """It states neither model_type nor the ids of special tokens, and num_labels without names."""
    model = theirs(oracle, tmp_path, RobertaForSequenceClassification, num_labels=3, vocab_size=90)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_OF_2019 | {"num_labels": 3, "vocab_size": 90}))
    weights = model.state_dict() | {"roberta.embeddings.position_ids": torch.arange(33)[None]}
    roberta.write_safetensors(tmp_path / "model.safetensors", weights)
    opened = RobertaForSequenceClassification.from_pretrained(tmp_path)
    assert opened.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert torch.equal(opened.classifier.out_proj.bias, model.classifier.out_proj.bias)
    # What names its weights as BERT does, and says not what it is, is none of ours.
    bare = {key.removeprefix("roberta."): value for key, value in weights.items()}
    roberta.write_safetensors(tmp_path / "model.safetensors", bare)
    with pytest.raises(ValueError, match="model_type is None"):
        RobertaModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_hugging_face_opens_ours_as_it_stands(oracle, tmp_path, kind, tokenizer):
    transformers = oracle("transformers")
    names = {0: "a", 1: "b", 2: "c"}
    model = ours(kind, vocab_size=500, id2label=names, answerability=True, type_vocab_size=2)
    model.save_pretrained(tmp_path, tokenizer)
    name = kind.__name__.replace("ForPreTraining", "ForMaskedLM")
    auto = getattr(transformers, name.replace("RobertaFor", "AutoModelFor"))
    opened, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(opened).__name__ == name and opened.config.id2label == model.config.id2label
    # All is found; what it has no place for it reports.
    unknown = {key.split(".")[0] for key in report.pop("unexpected_keys")}
    assert not any(report.values()) and unknown <= {"nsp_head", "answerable"}
    # And back: of what it writes, whose outputs test_oracle.py compares, each weight is the one it was.
    opened.save_pretrained(tmp_path / "back")
    weights = roberta.read_model(tmp_path)[1]
    for key, value in roberta.read_model(tmp_path / "back")[1].items():
        assert torch.equal(value, weights.pop(key)), key
    assert {key.split(".")[0] for key in weights} == unknown


@pytest.mark.parametrize("mask_id", [499, 4])
def test_fill_mask_gives_the_same_as_their_pipeline(oracle, tmp_path, tokenizer, mask_id):
    """Whether <mask> is the last, as in RoBERTa, or the fifth, as the recipe with their trainer has it."""
    transformers, library = oracle("transformers"), oracle("tokenizers").ByteLevelBPETokenizer()
    if mask_id == 4:
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        library.train_from_iterator(make_documents(200), 500, show_progress=False, special_tokens=specials)
        library.save_model(str(tmp_path))
        tokenizer = data.Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.mask_id == mask_id
    ours(vocab_size=500, initializer_range=0.5).save_pretrained(tmp_path, tokenizer)
    model, tokenizer = RobertaForMaskedLM.from_pretrained(tmp_path), data.Tokenizer.from_pretrained(tmp_path)
    pipeline = transformers.pipeline("fill-mask", str(tmp_path), top_k=5)
    for text in ("He said<mask> again.", "<mask> of the", "a b c <mask>", "one <mask> two <mask>."):
        found, expected = model.fill_mask(text, tokenizer), pipeline(text)
        if text.count("<mask>") == 1:
            found, expected = [found], [expected]
        for a, b in zip(found, expected, strict=True):
            assert [x["token"] for x in a] == [x["token"] for x in b]
            assert [x["score"] for x in a] == pytest.approx([x["score"] for x in b], abs=1e-4)


# ----------------------------------------------------------------------------------------------------------
# fairseq's here
# ----------------------------------------------------------------------------------------------------------

FAIRSEQ = {"attention.self.query": "self_attn.q_proj", "attention.self.key": "self_attn.k_proj",
           "attention.self.value": "self_attn.v_proj", "attention.output.dense": "self_attn.out_proj",
           "attention.output.LayerNorm": "self_attn_layer_norm", "intermediate.dense": "fc1",
           "output.dense": "fc2", "output.LayerNorm": "final_layer_norm"}


def fairseq_checkpoint(model, old):
    """What fairseq would have saved of Hugging Face's model: `old` as in 2019, else as since 2021.

    The layout, the junk beside the weights included, is what fairseq 0.8.0 and 0.12.2 were seen to write.
    """
    weights = model.state_dict()
    side = "decoder" if old else "encoder"
    encoder, words = f"{side}.sentence_encoder.", weights["roberta.embeddings.word_embeddings.weight"]
    positions = weights["roberta.embeddings.position_embeddings.weight"]
    types = weights["roberta.embeddings.token_type_embeddings.weight"]
    found = {encoder + "embed_tokens.weight": words, f"{side}.lm_head.weight": words,
             encoder + "embed_positions.weight": positions + types,
             f"{side}.lm_head.bias": weights["lm_head.bias"]}
    for kind in ("weight", "bias"):
        norm = "emb_layer_norm" if old else "layernorm_embedding"
        found[f"{encoder}{norm}.{kind}"] = weights[f"roberta.embeddings.LayerNorm.{kind}"]
        for name in ("dense", "layer_norm"):
            found[f"{side}.lm_head.{name}.{kind}"] = weights[f"lm_head.{name}.{kind}"]
        for i in range(model.config.num_hidden_layers):
            layer = f"{encoder}layers.{i}."
            for name, place in FAIRSEQ.items():
                found[f"{layer}{place}.{kind}"] = weights[f"roberta.encoder.layer.{i}.{name}.{kind}"]
            fused = torch.cat([found[f"{layer}self_attn.{x}_proj.{kind}"] for x in "qkv"])
            if old:
                for x in "qkv":
                    del found[f"{layer}self_attn.{x}_proj.{kind}"]
                found[f"{layer}self_attn.in_proj_{kind}"] = fused
            else:  # kept for a fast path, stale, read by nobody
                found[f"{layer}in_proj_{kind}"] = torch.full_like(fused, 7)
    arguments = Namespace(arch="roberta_base", encoder_attention_heads=2, activation_fn="gelu")
    extra = {"best": np.float64(1.5), "epoch": 3}
    if old:
        return {"args": arguments, "model": found, "optimizer_history": [{}], "extra_state": extra}
    found[encoder + "version"] = torch.ones(1)
    found["classification_heads.mnli.out_proj.weight"] = torch.zeros(3, 12)  # another model's head
    # omegaconf's containers: what counts is that the file names classes that are not installed.
    cfg = Node(_content={"model": Node(_val=arguments, _parent=None), "task": Node(_content={})})
    return {"args": None, "cfg": cfg, "model": found, "extra_state": extra}


class Node:
    def __init__(self, **state):
        self.__dict__.update(state)


@pytest.mark.parametrize("old", [True, False], ids=["2019", "2021"])
def test_fairseqs_files_open_here(oracle, tmp_path, monkeypatch, old):
    model, path = theirs(oracle, tmp_path / "hf"), tmp_path / "model.pt"
    module = types.ModuleType("omegaconf.dictconfig")
    module.Node = Node
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "omegaconf", module)
        patch.setitem(sys.modules, "omegaconf.dictconfig", module)
        patch.setattr(Node, "__module__", "omegaconf.dictconfig")
        content = fairseq_checkpoint(model, old)
        torch.save(content, path, _use_new_zipfile_serialization=not old)
    assert b"_codecs" in path.read_bytes()  # with which NumPy's numbers are pickled
    if old:  # before NumPy's module got its underscore, and after
        RobertaForMaskedLM.from_pretrained(tmp_path)
        path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    opened = RobertaForMaskedLM.from_pretrained(tmp_path)
    assert_same_outputs(opened, model)
    assert opened.config.max_tokens == 31 and "omegaconf.dictconfig" not in sys.modules
    opened.save_pretrained(tmp_path / "ours")
    assert_same_weights(RobertaForMaskedLM.from_pretrained(tmp_path / "ours"), opened)


@pytest.mark.parametrize(("names", "labels"), [
    (["mnli"], ["contradiction", "neutral", "entailment"]),
    (["sentence_classification_head", "mnli"], ["LABEL_0", "LABEL_1", "LABEL_2"])])
def test_fairseqs_named_heads_become_classifiers(oracle, tmp_path, capsys, names, labels):
    model = theirs(oracle, tmp_path / "hf", RobertaForSequenceClassification, num_labels=3)
    masked = theirs(oracle, tmp_path / "hf", RobertaForMaskedLM)
    content = fairseq_checkpoint(masked, old=True)
    for key, weight in model.classifier.state_dict().items():
        for i, name in enumerate(names):
            content["model"][f"classification_heads.{name}.{key}"] = weight + i
    torch.save(content, tmp_path / "model.pt")
    capsys.readouterr()
    opened = roberta.open_model(tmp_path)
    assert list(opened.config.id2label.values()) == labels
    assert_same_weights(opened.classifier, model.classifier)
    assert capsys.readouterr().err == ""
    assert_same_outputs(RobertaForMaskedLM.from_pretrained(tmp_path), masked)


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c["args"].__dict__.pop("encoder_attention_heads"), "encoder_attention_heads"),
    (lambda c: setattr(c["args"], "activation_fn", "relu"), "hidden_act 'relu'"),
    (lambda c: setattr(c["args"], "untie_weights_roberta", True), "tie_word_embeddings is False"),
    (lambda c: c["model"].pop("decoder.sentence_encoder.embed_tokens.weight"), "word_embeddings"),
    (lambda c: c["model"].pop("decoder.lm_head.dense.bias"), "LMHead: Missing .*dense.bias"),
    (lambda c: c["model"].update({"decoder.sentence_encoder.more": torch.zeros(1)}), "Unexpected .*more"),
    (lambda c: c.pop("args"), "cfg"),
], ids=range(7))
def test_other_files_of_fairseq_are_refused(oracle, tmp_path, change, message):
    content = fairseq_checkpoint(theirs(oracle, tmp_path / "hf"), old=True)
    change(content)
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        RobertaForMaskedLM.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# Damaged and hostile files
# ----------------------------------------------------------------------------------------------------------


def refusal(directory, message=None):
    with pytest.raises(ValueError, match=message) as error:
        RobertaForMaskedLM.from_pretrained(directory)
    return str(error.value)


def assert_refused(directory, message=None):
    """Opening must fail with one line that names the directory, or a file in it."""
    error = refusal(directory, message)
    assert str(directory) in error and len(error.splitlines()) == 1


BIAS = "roberta.encoder.layer.1.output.dense.bias"


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.pop(BIAS), "Missing .*blocks.1.ffn_out.bias"),
    (lambda w: w.update({BIAS: torch.zeros(5)}), r"size mismatch for .*blocks.1.ffn_out.bias.*\[5\]"),
    (lambda w: w.update({BIAS: torch.zeros(12, dtype=torch.int64)}), f"{BIAS} is no tensor of finite floats"),
    (lambda w: w[BIAS][3:4].fill_(float("nan")), f"{BIAS} is no tensor of finite floats"),
    (lambda w: w[BIAS][3:4].fill_(float("inf")), f"{BIAS} is no tensor of finite floats"),
    (lambda w: w.update({"roberta.encoder.layer.3.more": torch.zeros(1)}), "Unexpected .*blocks.3.more"),
    (lambda w: w.update({"lm_head.more": torch.zeros(1)}), "LMHead: Unexpected .*more"),
    (lambda w: w.clear(), "model_type|Missing"),
], ids=range(8))
def test_every_weight_is_accounted_for(tmp_path, change, message):
    ours().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    assert_refused(tmp_path, message)


@pytest.mark.parametrize("changes", [
    {"model_type": "bert"}, {"position_embedding_type": "relative_key"}, {"is_decoder": True},
    {"tie_word_embeddings": False}, {"hidden_act": "relu"}, {"hidden_size": "many"}, {"hidden_size": -1},
    {"num_hidden_layers": 2}, {"vocab_size": 98}, {"vocab_size": None}, {"id2label": {"a": "b"}},
    {"id2label": 3}, {"hidden_dropout_prob": 2}, {"max_position_embeddings": 2}, {"eos_token_id": 98},
    {"num_labels": -1}, "[" * 100_000, "[]", "{", "",
], ids=lambda changes: str(changes)[:40])
def test_configs_that_cannot_be_are_refused(tmp_path, changes):
    """Changes of what is in config.json, or a text in its place."""
    ours().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    damaged = isinstance(changes, str)
    path.write_text(changes if damaged else json.dumps(json.loads(path.read_text()) | changes))
    assert_refused(tmp_path)


class Hostile:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
@pytest.mark.parametrize("write", [
    lambda path: torch.save({"x": Hostile()}, path),
    lambda path: torch.save({"args": Namespace(x=1), "model": {"x": Hostile()}}, path),
    lambda path: torch.save({"x": Hostile()}, path, _use_new_zipfile_serialization=False),
    lambda path: path.write_bytes(pickle.dumps({"x": Hostile()}, protocol=2)),
    lambda path: torch.save([1, 2], path),
    lambda path: torch.save({1: torch.zeros(2)}, path),
    lambda path: path.write_text("<html>not found</html>"),
    lambda path: path.write_bytes(b""),
], ids=["zip", "fairseq", "old torch", "pickle", "list", "numbers for names", "text", "empty"])
def test_pickles_that_are_no_weights_execute_nothing(tmp_path, monkeypatch, name, write):
    monkeypatch.chdir(tmp_path)
    if name != "model.pt":
        ours().save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
    write(tmp_path / name)
    assert_refused(tmp_path)
    assert not (tmp_path / "executed").exists()


def header(entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


HUGE = {"x": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 1 << 52]}}
GAP = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}
WRONG = {"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}


@pytest.mark.parametrize("content", [
    b"", b"\x08", (1 << 60).to_bytes(8, "little"), b"\x04" + bytes(7) + b"{{{{", header([]),
    header({"x": 1}), header(HUGE), header(GAP) + bytes(8), header(WRONG) + bytes(4), header({}) + b"more",
], ids=range(10))
def test_safetensors_that_are_none_are_refused(tmp_path, content):
    ours().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_refused(tmp_path, "model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_file_cut_anywhere_or_altered_is_refused(tmp_path, name):
    model = ours()
    model.save_pretrained(tmp_path)
    if name == "pytorch_model.bin":
        torch.save(roberta.read_safetensors(tmp_path / "model.safetensors"), tmp_path / name)
        (tmp_path / "model.safetensors").unlink()
    path = tmp_path / name
    whole = path.read_bytes()
    for cut in [*range(0, 300, 31), *range(300, len(whole), len(whole) // 15)]:
        path.write_bytes(whole[:cut])
        assert_refused(tmp_path, name)
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(0, len(whole), (60,), generator=generator).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            opened = RobertaForMaskedLM.from_pretrained(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error) and len(str(error).splitlines()) == 1
        else:  # safetensors has no checksums: there a number may have changed, and nothing else
            assert all(value.isfinite().all() for value in opened.state_dict().values())
            if name == "pytorch_model.bin":
                assert_same_weights(opened, model)


def test_a_disk_that_fails_leaves_the_old_file(tmp_path):
    ours().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    full = mock.patch("os.fsync", side_effect=OSError(28, "No space left on device"))
    with full, pytest.raises(OSError, match="No space left"):
        roberta.write_safetensors(tmp_path / "model.safetensors", {"x": torch.zeros(3)})
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
