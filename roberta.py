"""The RoBERTa model (Liu et al. 2019): a Transformer encoder that predicts masked tokens, and heads to put it
to use.

    python roberta.py runs/tiny "Returns a new array of given <mask> and type."

The architecture is BERT's (§2); what RoBERTa changed is how it is trained (train.py) and what it reads
(data.py). The file follows a token upwards: config, embeddings, self-attention, block, encoder, heads, then
initialisation, loading and saving, and filling masks.

Legend: B micro-batch, T tokens, M predicted positions, C hidden_size, H heads, D head_size = C / H,
F intermediate_size, V vocabulary. Batch first. Masks are bool, True = real token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from data import Tokenizer

# ----------------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RobertaConfig:
    """A model's shape, by the names of Hugging Face's config.json; the defaults are BASE's (Table 9)."""

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 514  # 512 positions: numbering starts behind the padding id, at 2
    type_vocab_size: int = 1  # 2 for the segment formats of §4.2; one type needs no embedding at all
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    pad_token_id: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 2
    hidden_act: str = "gelu"  # the exact one, with erf
    num_labels: int | None = None  # of a classification head, 1: regression; none: those of id2label, or 2
    answerability: bool = False  # of a question-answering head: SQuAD v2.0's classifier, §3
    id2label: dict[int, str] = field(default_factory=dict)  # label names; none: LABEL_0, LABEL_1, ...

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                             f"{self.num_attention_heads}")
        if self.hidden_act != "gelu":
            raise ValueError(f"hidden_act {self.hidden_act!r} is not RoBERTa's; only 'gelu' (exact) is built")
        names = {int(i): name for i, name in self.id2label.items()}  # JSON's keys are strings
        count = self.num_labels or len(names) or 2
        if all(name == f"LABEL_{i}" for i, name in names.items()):
            names = {i: f"LABEL_{i}" for i in range(count)}
        if len(names) != count:
            raise ValueError(f"num_labels {count}, but id2label names {len(names)}: {names}")
        object.__setattr__(self, "id2label", names)
        object.__setattr__(self, "num_labels", count)

    def to_json(self, architecture: str) -> str:
        """Returns the text of a config.json that Hugging Face's classes read as well."""
        entries = asdict(self) | {"model_type": "roberta", "architectures": [architecture]}
        entries["label2id"] = {name: i for i, name in self.id2label.items()}
        return json.dumps(entries, indent=2) + "\n"

    @property
    def max_tokens(self) -> int:
        """The longest input, `<s>` and `</s>` included: 512 for the published models."""
        return self.max_position_embeddings - self.pad_token_id - 1

    @classmethod
    def tiny(cls, **changes) -> RobertaConfig:
        """A model for a laptop: learns in minutes on two cores.

        CHOICE: no dropout, because a few minutes of training see no text often enough to overfit, and
        initializer_range 0.06, because N(0, 0.02) is made for rows of 768: with narrow rows the activations
        start so small that the first thousand steps pass on the plateau of the unigram distribution.
        """
        tiny = cls(vocab_size=4096, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=512, max_position_embeddings=130, hidden_dropout_prob=0.0,
                   attention_probs_dropout_prob=0.0, initializer_range=0.06)
        return replace(tiny, **changes)

    @classmethod
    def base(cls, **changes) -> RobertaConfig:
        """BASE (Table 9), 125M parameters with its LM head."""
        return cls(**changes)

    @classmethod
    def large(cls, **changes) -> RobertaConfig:
        """LARGE (Table 9), 355M parameters with its LM head."""
        large = cls(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        return replace(large, **changes)


# ----------------------------------------------------------------------------------------------------------
# Embeddings
# ----------------------------------------------------------------------------------------------------------


class Embeddings(nn.Module):
    """Token plus learned position (and with two types, segment) embeddings, normalised (BERT §3)."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.pad_token_id, self.max_tokens = config.pad_token_id, config.max_tokens
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.positions = nn.Embedding(
            config.max_position_embeddings, config.hidden_size, padding_idx=config.pad_token_id
        )
        # DIFFERS: with a single token type its embedding is one constant row added everywhere; it is left out
        # here and folded into the positions when a checkpoint brings one (§4.2: RoBERTa feeds no segment
        # pairs).
        self.token_types = (
            nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size > 1 else None
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        if input_ids.shape[1] > self.max_tokens:
            raise ValueError(f"{input_ids.shape[1]} tokens are too many for {self.max_tokens} positions; "
                             "shorten the text")
        # fairseq counts positions from pad_token_id + 1 over the real tokens: padding keeps the row of zeros,
        # wherever it stands, and a padded row sees the same positions as the same row alone.
        mask = attention_mask.long()
        position_ids = mask.cumsum(1) * mask + self.pad_token_id  # (B, T)
        embedded = self.tokens(input_ids) + self.positions(position_ids)  # (B, T) -> (B, T, C)
        if self.token_types is not None:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            embedded = embedded + self.token_types(types)
        return self.dropout(self.norm(embedded))


# ----------------------------------------------------------------------------------------------------------
# Self-attention, block, encoder
# ----------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, §3.2), each token looking at every real token."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, may_attend: Tensor) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

        q, k, v = heads(self.q_proj(hidden)), heads(self.k_proj(hidden)), heads(self.v_proj(hidden))
        # softmax(q k^T / sqrt(D)) v, in one kernel that never stores the (T, T) matrix where the device has
        # one.
        dropout = self.dropout_prob if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)


class Block(nn.Module):
    """A Transformer layer. Post-LN: each sub-layer's output is added to its input, the sum normalised."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.attention = SelfAttention(config)
        self.attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_out = nn.Linear(config.intermediate_size, config.hidden_size)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, may_attend: Tensor) -> Tensor:
        hidden = self.attn_norm(hidden + self.dropout(self.attention(hidden, may_attend)))
        inner = F.gelu(self.ffn_in(hidden))  # (B, T, C) -> (B, T, F)
        return self.ffn_norm(hidden + self.dropout(self.ffn_out(inner)))


class RobertaModelBase(nn.Module):
    """What all models here share: a config, initialisation, `save_pretrained` and `from_pretrained`."""

    head_keys: dict[str, str] = {}  # our names of the head's modules -> Hugging Face's, see KEYS below

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.config = config

    def init_weights(self) -> None:
        """Draws matrices from N(0, initializer_range) and sets biases to 0 (BERT's scheme), by torch's seed.

        LayerNorms begin as the identity. The rows of the padding id begin as 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()

    def num_parameters(self) -> int:
        """Returns the number of parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def with_ends(self, ids: list[int]) -> Tensor:
        """Returns the ids of a text between `<s>` and `</s>`, as a batch of one: (1, T)."""
        return torch.tensor([[self.config.bos_token_id, *ids, self.config.eos_token_id]], device=self.device)

    def save_pretrained(self, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Writes config, weights and tokenizer files: a directory that Hugging Face's classes open too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(self.config.to_json(type(self).__name__), encoding="utf-8")
        torch.save(self.to_hugging_face(), directory / "pytorch_model.bin")
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)

    @classmethod
    def from_pretrained(cls, directory: str | Path, **changes: Any) -> RobertaModelBase:
        """Returns the model in a directory, for a run directory the one of its newest checkpoint.

        A head that the weights lack starts at random, and a line on stderr says so. `changes` replace fields
        of the config (dropout, num_labels). No code in the file is executed.
        Raises: ValueError where the directory is no model or the weights do not fit config.json.
        """
        directory = find_model(directory)
        config = read_config(directory / "config.json", changes)
        path = directory / "pytorch_model.bin"
        try:
            mmap = zipfile.is_zipfile(path)  # files from before torch 1.6 are of another format
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError:
            raise ValueError(f"{path}: refused, it holds more than plain weights or none at all") from None
        except (RuntimeError, ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path}: damaged ({str(error).splitlines()[0]})") from None
        model = cls(config)
        model.load_hugging_face(weights, directory)
        return model.eval()

    def to_hugging_face(self) -> dict[str, Tensor]:
        """Returns the weights under Hugging Face's keys."""
        weights = {self.hugging_face_key(name): value for name, value in self.state_dict().items()}
        embeddings = "roberta.embeddings."
        if self.config.type_vocab_size == 1:  # there it has a row, and ours is part of the positions
            width = self.config.hidden_size
            weights[embeddings + "token_type_embeddings.weight"] = torch.zeros(1, width, device=self.device)
        if "lm_head.bias" in weights:  # there the decoder is tied to the embedding, and the bias is repeated
            weights["lm_head.decoder.weight"] = weights[embeddings + "word_embeddings.weight"]
            weights["lm_head.decoder.bias"] = weights["lm_head.bias"]
        return weights

    def load_hugging_face(self, weights: dict[str, Tensor], source: object) -> None:
        """Copies weights under Hugging Face's keys into this model; a head they lack stays as it is.

        Raises: ValueError naming what the encoder lacks, or a weight of another shape.
        """
        if not any(key.startswith("roberta.") for key in weights):  # saved from an encoder without a head
            weights = {"roberta." + key: value for key, value in weights.items()}
        types = weights.get("roberta.embeddings.token_type_embeddings.weight")
        if types is not None and self.config.type_vocab_size == 1:  # fold the row in, see Embeddings
            positions = "roberta.embeddings.position_embeddings.weight"
            weights = weights | {positions: weights[positions] + types}
        keys = {name: self.hugging_face_key(name) for name in self.state_dict()}
        missing = [key for key in keys.values() if key not in weights]
        if lacking := [key for key in missing if key.startswith(("roberta.embeddings", "roberta.encoder"))]:
            raise ValueError(f"{source}: {len(lacking)} weights are missing, first of all {lacking[0]}")
        for name, parameter in self.state_dict().items():
            found = weights.get(keys[name], parameter)
            if found.shape != parameter.shape:
                raise ValueError(f"{source}: {keys[name]} has shape {tuple(found.shape)}, config.json asks "
                                 f"for {tuple(parameter.shape)}")
            parameter.copy_(found)
        if missing:
            print(f"note: {source} has no {', '.join(missing)}; initialised at random", file=sys.stderr)

    @classmethod
    def hugging_face_key(cls, name: str) -> str:
        """Returns Hugging Face's key of one of our parameters."""
        for ours, theirs in [*cls.head_keys.items(), *KEYS.items()]:
            name = name.replace(ours, theirs)
        return "roberta." + name if cls is RobertaModel else name


# Our module names -> Hugging Face's, by which roberta.blocks.0.ffn_in.weight becomes
# roberta.encoder.layer.0.intermediate.dense.weight. fairseq's are noted where they differ.
KEYS = {
    "embeddings.tokens.": "embeddings.word_embeddings.",  # fairseq: embed_tokens
    "embeddings.positions.": "embeddings.position_embeddings.",  # embed_positions
    "embeddings.token_types.": "embeddings.token_type_embeddings.",
    "embeddings.norm.": "embeddings.LayerNorm.",  # layernorm_embedding
    "blocks.": "encoder.layer.",  # sentence_encoder.layers
    "attention.q_proj.": "attention.self.query.",  # self_attn.q_proj
    "attention.k_proj.": "attention.self.key.",
    "attention.v_proj.": "attention.self.value.",
    "attention.out_proj.": "attention.output.dense.",
    "attn_norm.": "attention.output.LayerNorm.",  # self_attn_layer_norm
    "ffn_in.": "intermediate.dense.",  # fc1
    "ffn_out.": "output.dense.",  # fc2
    "ffn_norm.": "output.LayerNorm.",  # final_layer_norm
}


class RobertaModel(RobertaModelBase):
    """The encoder: a vector for each token, from the whole text around it."""

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_all_hiddens: bool = False,
    ) -> Tensor | list[Tensor]:
        """Returns the last hidden states (B, T, C), or those of the embeddings and every layer.

        input_ids: (B, T). attention_mask: (B, T), true at real tokens; derived from the padding id if not
        given. What stands at padding is meaningless, but finite, even in a row of nothing but padding.
        Raises: ValueError for inputs longer than the positions.
        """
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        attention_mask = attention_mask.bool()
        # softmax over no key at all is 0/0: a row of padding may look at everything instead.
        may_attend = attention_mask | ~attention_mask.any(1, keepdim=True)
        may_attend = may_attend[:, None, None, :]  # (B, T) -> (B, 1, 1, T): any query, these keys
        hiddens = [self.embeddings(input_ids, attention_mask, token_type_ids)]
        for block in self.blocks:
            hidden = block(hiddens[-1], may_attend)
            hiddens = [*hiddens, hidden] if return_all_hiddens else [hidden]
        return hiddens if return_all_hiddens else hiddens[-1]

    @torch.inference_mode()
    def extract_features(self, text: str | Tensor, tokenizer: Tokenizer | None = None,
                         return_all_hiddens: bool = False) -> Tensor | list[Tensor]:
        """Returns hidden states of a text, (1, T, C) with `<s>` and `</s>`, or of ids (B, T); no dropout."""
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError("extract_features of a text needs a tokenizer")
            text = self.with_ends(tokenizer.encode(text))
        with evaluating(self):
            return self(text, return_all_hiddens=return_all_hiddens)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turns a model's dropout off for a while and leaves the model as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ----------------------------------------------------------------------------------------------------------
# Heads
# ----------------------------------------------------------------------------------------------------------


class LMHead(nn.Module):
    """Scores of all tokens: dense, GELU, LayerNorm, then the token embedding once more, plus a bias."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(hidden))), embedding, self.bias)  # (..., C) -> (..., V)


class RobertaForMaskedLM(RobertaModelBase):
    """The pretraining model: the encoder and the language-model head tied to its embedding."""

    head_keys = {"lm_head.norm.": "lm_head.layer_norm."}

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.roberta = RobertaModel(config)
        self.lm_head = LMHead(config)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Returns logits (B, T, V); in training only those at `positions`, (M, V).

        positions: (M,) indices b * T + t. About 15 % of the tokens are predicted, and with 50K units the head
        costs a small model more than its encoder: scoring only what is needed is the largest saving here.
        """
        return self._score(self.roberta(input_ids, attention_mask, token_type_ids), positions)

    def _score(self, hidden: Tensor, positions: Tensor | None) -> Tensor:
        if positions is not None:
            hidden = hidden.flatten(0, 1)[positions]  # (B, T, C) -> (M, C)
        return self.lm_head(hidden, self.roberta.embeddings.tokens.weight)

    def extract_features(self, *args, **kwargs) -> Tensor | list[Tensor]:
        """See RobertaModel.extract_features."""
        return self.roberta.extract_features(*args, **kwargs)

    @torch.inference_mode()
    def fill_mask(self, text: str, tokenizer: Tokenizer, top_k: int = 5) -> list:
        """Returns the `top_k` most probable tokens for the `<mask>` in a text, best first.

        Each is a dict like those of Hugging Face's pipeline: score (a probability), token (its id),
        token_str, and sequence (the text with it filled in). With several masks: a list of such lists, each
        mask filled independently of the others.
        Raises: ValueError where the text has no `<mask>` or is longer than the positions.
        """
        if top_k < 1:
            raise ValueError(f"top_k {top_k} must be at least 1")
        masks = list(re.finditer(r"\s*<mask>", text))
        if not masks:
            raise ValueError(f"no <mask> in {text!r}; write one where a word is to be found, "
                             'as in "The capital of France is <mask>."')
        # A token carries the space before it, so the space before <mask> belongs to what will be filled in.
        ids, start = [], 0
        for mask in masks:
            ids += [*tokenizer.encode(text[start : mask.start()]), tokenizer.mask_id]
            start = mask.end()
        input_ids = self.with_ends([*ids, *tokenizer.encode(text[start:])])
        positions = (input_ids[0] == tokenizer.mask_id).nonzero()[:, 0]
        with evaluating(self):
            probabilities = self._score(self.roberta(input_ids), positions).float().softmax(-1)  # (M, V)
        best = probabilities.topk(min(top_k, probabilities.shape[-1]))
        results = []
        for mask, scores, tokens in zip(masks, best.values.tolist(), best.indices.tolist()):
            results.append([])
            for score, token in zip(scores, tokens):
                name = tokenizer.decode([token])
                sequence = text[: mask.start()] + name + text[mask.end() :]
                results[-1] += [{"score": score, "token": token, "token_str": name, "sequence": sequence}]
        return results[0] if len(results) == 1 else results


class Pooler(nn.Module):
    """BERT's summary of a text: dense and tanh on the first token, `<s>`."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden[:, 0]))  # (B, T, C) -> (B, C)


class RobertaForPreTraining(RobertaForMaskedLM):
    """BERT's pretraining model: masked LM and next-sentence prediction, for §4.2's segment formats only."""

    head_keys = {**RobertaForMaskedLM.head_keys, "pooler.": "roberta.pooler."}

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.pooler = Pooler(config)
        self.nsp_head = nn.Linear(config.hidden_size, 2)
        self.init_weights()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, positions=None):
        """Returns RobertaForMaskedLM's logits and NSP's, (B, 2): 0 = the second part follows, 1 = random."""
        hidden = self.roberta(input_ids, attention_mask, token_type_ids)
        return self._score(hidden, positions), self.nsp_head(self.pooler(hidden))


class RobertaForSequenceClassification(RobertaModelBase):
    """A label (or with one label, a value) for a text or pair: dense, tanh, projection on `<s>` (§5.1)."""

    head_keys = {"dense.": "classifier.dense.", "projection.": "classifier.out_proj."}

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.roberta = RobertaModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns logits (B, num_labels)."""
        first = self.roberta(input_ids, attention_mask)[:, 0]  # (B, T, C) -> (B, C)
        return self.projection(self.dropout(torch.tanh(self.dense(self.dropout(first)))))


class RobertaForMultipleChoice(RobertaModelBase):
    """A score for each of N candidates, encoded one by one with the question and passage (§5.3, RACE)."""

    head_keys = {"pooler.": "roberta.pooler."}

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.roberta = RobertaModel(config)
        self.pooler = Pooler(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.init_weights()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids, attention_mask: (B, N, T). Returns scores (B, N); their softmax picks the answer."""
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        hidden = self.roberta(input_ids.flatten(0, 1), mask)  # (B * N, T, C)
        return self.classifier(self.dropout(self.pooler(hidden))).view(input_ids.shape[:2])


class RobertaForQuestionAnswering(RobertaModelBase):
    """Where in the passage the answer starts and ends (§5.2, SQuAD); for v2.0, whether there is one (§3)."""

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.roberta = RobertaModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.answerable = nn.Linear(config.hidden_size, 1) if config.answerability else None
        self.init_weights()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Returns start logits and end logits, each (B, T); with `answerability` also its logits, (B,)."""
        hidden = self.roberta(input_ids, attention_mask)
        start, end = self.qa_outputs(hidden).unbind(-1)  # (B, T, 2) -> two of (B, T)
        return (start, end) if self.answerable is None else (start, end, self.answerable(hidden[:, 0])[:, 0])


# ----------------------------------------------------------------------------------------------------------
# Finding and opening a saved model
# ----------------------------------------------------------------------------------------------------------


def find_model(directory: str | Path) -> Path:
    """Returns the directory that holds the model: this one, or of a run directory its newest checkpoint."""
    directory = Path(directory)
    for place in (directory / "checkpoint", directory):
        if (place / "config.json").is_file() and (place / "pytorch_model.bin").is_file():
            return place
    state = "no such directory" if not directory.is_dir() else "no config.json and pytorch_model.bin in it"
    raise ValueError(f"{directory}: not a model ({state}); give a run directory of train.py or a saved model")


def read_config(path: Path, changes: dict[str, Any]) -> RobertaConfig:
    """Reads config.json; entries that are no fields of RobertaConfig do not change what is computed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from None
    if content.get("model_type") != "roberta":
        raise ValueError(f"{path}: model_type {content.get('model_type')!r}; only 'roberta' opens here")
    known = {f.name for f in fields(RobertaConfig)}
    if "num_labels" in changes and "id2label" not in changes:
        content.pop("id2label", None)
    return RobertaConfig(**{key: value for key, value in (content | changes).items() if key in known})


def main() -> None:
    """Prints the five most probable fillings of a text's masks."""
    parser = argparse.ArgumentParser(prog="roberta.py", description="Fill the <mask> in a text.")
    parser.add_argument("model", metavar="DIR", help="run directory of train.py, or a saved model")
    parser.add_argument("text", help='for example "Returns a new array of given <mask> and type."')
    parser.add_argument("--top-k", type=int, default=5, metavar="N", help="fillings to print (default: 5)")
    arguments = parser.parse_args()
    from data import Tokenizer  # here alone the model meets text: as a module this file needs only torch

    try:
        model = RobertaForMaskedLM.from_pretrained(arguments.model)
        tokenizer = Tokenizer.from_pretrained(find_model(arguments.model))
        filled = model.fill_mask(arguments.text, tokenizer, arguments.top_k)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for number, mask in enumerate(filled if isinstance(filled[0], list) else [filled]):
        if number:
            print()
        for candidate in mask:
            shown = candidate["sequence"].replace("\n", "\\n")
            print(f"{candidate['score']:7.2%}  {candidate['token_str']!r:20} {shown}")


if __name__ == "__main__":
    main()
