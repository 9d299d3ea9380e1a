"""The RoBERTa model (Liu et al. 2019): a Transformer encoder that predicts masked tokens, and heads to put it
to use.

    python roberta.py runs/tiny "Returns a new array of given <mask> and type."
    python roberta.py export runs/tiny exported --format fairseq

The architecture is BERT's (§2); what RoBERTa changed is how it is trained (train.py) and what it reads
(data.py). The first half of the file follows a token upwards: config, embeddings, self-attention, block,
encoder, heads. The second half is about files, ours, Hugging Face's and fairseq's: what they call the
weights, finding and opening them, and writing fairseq's.

Legend: B micro-batch, T tokens, M predicted positions, C hidden_size, H heads, D head_size = C / H,
F intermediate_size, V vocabulary. Batch first. Masks are bool, True = real token.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from data import Tokenizer

# ----------------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------------

# Upper limits, 1 << 24 for other sizes: an absurd number in a file must not fill the memory.
LIMITS = {"num_labels": 1 << 16, "num_hidden_layers": 1 << 12}


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
    tie_word_embeddings: bool = True  # the LM head scores tokens with their own embedding
    classifier_dropout: float | None = None  # of a classification head; none: hidden_dropout_prob
    num_labels: int | None = None  # of a classification head, 1: regression; none: those of id2label, or 2
    answerability: bool = False  # of a question-answering head: SQuAD v2.0's classifier, §3
    id2label: dict[int, str] = field(default_factory=dict)  # label names; none: LABEL_0, LABEL_1, ...

    def __post_init__(self) -> None:
        for f in fields(self):  # types are text here, such as "int | None"
            value, kind = getattr(self, f.name), f.type.split(" ")[0]
            if value is None and "None" in f.type:
                continue
            low, high = 0 if f.name.endswith("_id") else 1, LIMITS.get(f.name, 1 << 24)
            if kind == "int" and not (type(value) is int and low <= value < high):
                raise ValueError(f"{f.name} {value!r} must be a whole number from {low} to {high - 1}")
            if kind == "float" and not (type(value) in (int, float) and 0 <= value < 1):
                raise ValueError(f"{f.name} {value!r} must be a number from 0 to less than 1")
            if kind == "bool" and type(value) is not bool:
                raise ValueError(f"{f.name} {value!r} must be true or false")
            if f.name.endswith("_id") and value >= self.vocab_size:
                raise ValueError(f"{f.name} {value} lies outside vocab_size {self.vocab_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                             f"{self.num_attention_heads}")
        if self.max_tokens < 3:
            raise ValueError(f"max_position_embeddings {self.max_position_embeddings} with pad_token_id "
                             f"{self.pad_token_id} leaves {self.max_tokens} positions; a text needs 3")
        if self.hidden_act != "gelu":
            raise ValueError(f"hidden_act {self.hidden_act!r} is not RoBERTa's; only 'gelu' (exact) is built")
        try:
            names = {int(i): str(name) for i, name in self.id2label.items()}  # JSON's keys are strings
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f"id2label {self.id2label!r} must give numbers names") from None
        count = self.num_labels or len(names) or 2
        if all(name == f"LABEL_{i}" for i, name in names.items()):
            names = {i: f"LABEL_{i}" for i in range(count)}
        if sorted(names) != list(range(count)):
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

    @property
    def head_dropout(self) -> float:
        """The dropout of a classification head."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

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

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        if input_ids.shape[1] > self.max_tokens:
            raise ValueError(f"{input_ids.shape[1]} tokens are too many for {self.max_tokens} positions; "
                             "shorten the text")
        # fairseq counts positions from pad_token_id + 1 over what is no padding: that keeps the row of zeros,
        # wherever it stands, and a padded row sees the same positions as the same row alone.
        real = (input_ids != self.pad_token_id).long()
        position_ids = real.cumsum(1) * real + self.pad_token_id  # (B, T)
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


# ----------------------------------------------------------------------------------------------------------
# What all models share
# ----------------------------------------------------------------------------------------------------------


class RobertaModelBase(nn.Module):
    """A config, initialisation, ids of a text, `save_pretrained` and `from_pretrained`."""

    architecture: str | None = None  # the Hugging Face class that opens what is saved; None: of the same name
    head_keys: dict[str, str] = {}  # our names of the head's modules -> Hugging Face's, as in NAMES below
    extra_keys: tuple[str, ...] = ()  # prefixes of the keys that this class lacks: they go to EXTRA_WEIGHTS
    classification_keys: tuple[str, str] | None = None  # where the two layers of a fairseq head can go

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.config = config

    def init_weights(self) -> None:
        """Draws matrices from N(0, initializer_range) and sets biases to 0 (BERT's scheme), by torch's seed.

        LayerNorms begin as the identity. The rows of the padding id begin as 0.
        """
        for module in self.modules():
            self.init_module(module)

    def init_module(self, module: nn.Module) -> None:
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

    def encode(self, text: str | Sequence[str], tokenizer: Tokenizer) -> Tensor:
        """Returns the ids, (1, T), of a text, `<s> A </s>`, or of a pair of them, `<s> A </s></s> B </s>`.

        Raises: ValueError for a tokenizer with more units than the model, or no text at all.
        """
        texts = [text] if isinstance(text, str) else list(text)
        return self._with_ends([tokenizer.encode(text) for text in texts], tokenizer)

    def _with_ends(self, segments: list[list[int]], tokenizer: Tokenizer) -> Tensor:
        check_tokenizer(tokenizer, self.config)
        if not segments:
            raise ValueError("nothing to encode: give a text, or a pair of texts")
        bos, eos = self.config.bos_token_id, self.config.eos_token_id
        ids = [bos, *segments[0], eos]
        for segment in segments[1:]:
            ids += [eos, *segment, eos]
        return torch.tensor([ids], device=self.device)

    def _to_ids(self, text: str | Sequence[str] | Tensor, tokenizer: Tokenizer | None) -> Tensor:
        """Returns ids, (B, T), of what may be ids already."""
        if isinstance(text, Tensor):
            return torch.atleast_2d(text).to(self.device)
        if tokenizer is None:
            raise ValueError("a text needs a tokenizer: give one, or the text as ids")
        return self.encode(text, tokenizer)

    def save_pretrained(self, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Writes config, weights and tokenizer files: a directory that Hugging Face's classes open too.

        Files of the same names are replaced. Raises: ValueError where weights are under other names that
        would be opened instead.
        """
        directory = Path(directory)
        if others := [name for name in WEIGHT_FILES if (directory / name).exists() and name != WEIGHTS]:
            raise ValueError(f"{directory} holds {others[0]} already; save to another directory")
        if tokenizer is not None:
            check_tokenizer(tokenizer, self.config)
        weights, architecture = self.to_hugging_face(), self.architecture or type(self).__name__
        extra = {key: weights.pop(key) for key in list(weights) if key.startswith(self.extra_keys)}
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(self.config.to_json(architecture), encoding="utf-8")
        torch.save(weights, directory / WEIGHTS)
        if extra:
            torch.save(extra, directory / EXTRA_WEIGHTS)
        else:
            (directory / EXTRA_WEIGHTS).unlink(missing_ok=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory, model_max_length=self.config.max_tokens)

    @classmethod
    def from_pretrained(cls, directory: str | Path, head: str | None = None,
                        **changes: Any) -> RobertaModelBase:
        """Returns the model in a directory of ours, of Hugging Face's or of fairseq's, in eval mode.

        A run directory stands for its newest checkpoint. `changes` replace fields of the config (dropout,
        num_labels). `head` is the name of a fairseq classification head, where there are several. A head that
        the weights lack starts at random, and a line on stderr says so. No code in the files is executed.
        Raises: ValueError where the directory is no model, or not each weight has its place and its shape.
        """
        directory = find_model(directory)
        entries, weights = read_model(directory)
        if cls.classification_keys:
            weights = use_head(weights, head, cls.classification_keys, directory)
        elif head is not None:
            raise ValueError(f"a {cls.__name__} has no place for the classification head {head!r} alone")
        config = make_config(entries, weights, changes, directory)
        with torch.device("meta"), NothingDrawn():  # no memory yet: what the config asks for may be absurd
            model = cls(config)
        fresh = model.load_hugging_face(weights, directory)
        for name, module in model.named_modules():
            if cls.hugging_face_key(f"{name}.weight") in fresh:
                model.init_module(module)
        if fresh:
            print(f"note: {directory} has no {', '.join(fresh)}; initialised at random", file=sys.stderr)
        return model.eval()

    def to_hugging_face(self) -> dict[str, Tensor]:
        """Returns the weights under Hugging Face's keys; the tensors are the model's own."""
        weights = {self.hugging_face_key(name): value for name, value in self.state_dict().items()}
        if self.config.type_vocab_size == 1:  # there it has a row, and ours is part of the positions
            weights[TOKEN_TYPES] = torch.zeros(1, self.config.hidden_size, device=self.device)
        if "lm_head.bias" in weights:  # there it is repeated, as is the embedding where the decoder is tied
            weights.setdefault(DECODER, weights[WORDS])
            weights["lm_head.decoder.bias"] = weights["lm_head.bias"]
        return weights

    def load_hugging_face(self, weights: dict[str, Tensor], source: object) -> list[str]:
        """Copies weights under Hugging Face's keys into this model, after all of them have been checked.

        Heads of other models are passed over. Returns the keys of this model's head if the weights have
        nothing of it; it stays as it is. A model on the meta device moves to the CPU.
        Raises: ValueError, see `check_weights`; `source` is where its message says the weights are from.
        """
        weights = normalise(weights)
        if self.config.type_vocab_size == 1:
            weights = fold_token_type(weights)
        if self.config.tie_word_embeddings and not has_own_decoder(weights):
            weights.pop(DECODER, None)
        ours = {self.hugging_face_key(name): value for name, value in self.state_dict().items()}
        fresh = check_weights(weights, ours, source)
        if self.device.type == "meta":  # nn.Module.to_empty would do it, a second later: it imports sympy
            space = {name: torch.empty(value.shape) for name, value in self.state_dict().items()}
            self.load_state_dict(space, assign=True)
        for name, parameter in self.state_dict().items():
            parameter.copy_(weights.get(self.hugging_face_key(name), parameter))
        return fresh

    @classmethod
    def hugging_face_key(cls, name: str) -> str:
        """Returns Hugging Face's key of one of our parameters."""
        if name.startswith("classification_heads."):
            return name
        for ours, theirs in [*cls.head_keys.items(), *HUGGING_FACE_NAMES.items()]:
            name = name.replace(ours, theirs)
        return "roberta." + name if cls is RobertaModel else name


def check_tokenizer(tokenizer: Tokenizer, config: RobertaConfig) -> None:
    """Raises ValueError where a tokenizer could give ids for which the model has no embedding."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} units, the model {config.vocab_size}; "
                         "they do not belong together")


class NothingDrawn(TorchFunctionMode):
    """Under it the functions of nn.init do nothing: the weights will be read from a file."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            return kwargs.get("tensor", *args[:1])
        return function(*args, **kwargs)


# ----------------------------------------------------------------------------------------------------------
# The encoder
# ----------------------------------------------------------------------------------------------------------


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
        hiddens = [self.embeddings(input_ids, token_type_ids)]
        for block in self.blocks:
            hidden = block(hiddens[-1], may_attend)
            hiddens = [*hiddens, hidden] if return_all_hiddens else [hidden]
        return hiddens if return_all_hiddens else hiddens[-1]

    @torch.inference_mode()
    def extract_features(self, text: str | Sequence[str] | Tensor, tokenizer: Tokenizer | None = None,
                         return_all_hiddens: bool = False) -> Tensor | list[Tensor]:
        """Returns hidden states of a text or a pair, (1, T, C) with the specials, or of ids, (B, T, C).

        return_all_hiddens: those of the embeddings and of every layer, as a list. No dropout, no gradients.
        """
        with evaluating(self):
            return self(self._to_ids(text, tokenizer), return_all_hiddens=return_all_hiddens)

    def extract_word_features(self, text: str, words: Sequence[tuple[int, int]],
                              tokenizer: Tokenizer) -> Tensor:
        """Returns features of W words, (W, C): averages of the last hidden states of each one's tokens.

        words: where they begin and end in the text, in characters, from any tokenisation. A token counts by
        the share of its characters (white space apart) that belongs to the word; most belong whole to one.
        Raises: ValueError for a word outside the text or of nothing but white space, or too long a text.
        """
        ids, offsets = tokenizer.encode_with_offsets(text)
        features = self.extract_features(self._with_ends([ids.tolist()], tokenizer))[0, 1:-1]  # (T - 2, C)
        # How many visible characters stand before each place in the text, (len(text) + 1,).
        visible = torch.tensor([0, *(not character.isspace() for character in text)]).cumsum(0)
        begins, ends = torch.from_numpy(offsets).unbind(1)  # of the tokens, (T - 2,) each
        averages = []
        for begin, end in words:
            if not 0 <= begin < end <= len(text) or visible[begin] == visible[end]:
                raise ValueError(f"word ({begin}, {end}) holds no text of the {len(text)} characters")
            shared = visible[ends.clamp(begin, end)] - visible[begins.clamp(begin, end)]
            weights = (shared / (visible[ends] - visible[begins]).clamp(min=1)).to(features)  # (T - 2,)
            averages.append(weights @ features / weights.sum())
        return torch.stack(averages) if averages else features[:0]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turns a model's dropout off for a while and leaves each part of the model as it was."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


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
        tied = config.tie_word_embeddings
        self.decoder = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        embedding = embedding if self.decoder is None else self.decoder.weight
        return F.linear(self.norm(F.gelu(self.dense(hidden))), embedding, self.bias)  # (..., C) -> (..., V)


class ClassificationHead(nn.Module):
    """A label for a text, from its first token `<s>` (§5.1): dense, tanh, projection."""

    def __init__(self, config: RobertaConfig, num_labels: int, inner_size: int | None = None):
        super().__init__()
        inner_size = inner_size or config.hidden_size
        self.dropout = nn.Dropout(config.head_dropout)
        self.dense = nn.Linear(config.hidden_size, inner_size)
        self.out_proj = nn.Linear(inner_size, num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        first = self.dropout(hidden[:, 0])  # (B, T, C) -> (B, C)
        return self.out_proj(self.dropout(torch.tanh(self.dense(first))))  # (B, C) -> (B, num_labels)


class RobertaForMaskedLM(RobertaModelBase):
    """The pretraining model: the encoder and the language-model head tied to its embedding.

    As fairseq's model it may carry named classification heads besides; they are in no sum of losses here.
    """

    head_keys = {"lm_head.norm.": "lm_head.layer_norm."}
    extra_keys = ("classification_heads.",)

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.roberta = RobertaModel(config)
        self.lm_head = LMHead(config)
        self.classification_heads = nn.ModuleDict()
        self.init_weights()

    def register_classification_head(self, name: str, num_classes: int,
                                     inner_size: int | None = None) -> None:
        """Adds a classification head for `predict`, drawn at random; one of that name is replaced.

        inner_size: of its inner layer; none: hidden_size. Raises: ValueError for a name that cannot be one.
        """
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"{name!r} cannot be a head's name: it is empty, holds a dot, or torch uses it")
        with self.device:
            head = ClassificationHead(self.config, num_classes, inner_size).to(self.lm_head.bias)
        for module in head.modules():
            self.init_module(module)
        self.classification_heads[name] = head.train(self.training)

    def predict(self, head: str, text: str | Sequence[str] | Tensor, tokenizer: Tokenizer | None = None,
                return_logits: bool = False) -> Tensor:
        """Returns the log-probabilities, (B, classes), that a named head gives a text, a pair or ids (B, T).

        Gradients flow, so it serves for training as well. Raises: ValueError for a name without a head.
        """
        if head not in self.classification_heads:
            raise ValueError(f"no classification head {head!r}, only {list(self.classification_heads)}; add "
                             f"it with register_classification_head({head!r}, num_classes)")
        logits = self.classification_heads[head](self.roberta(self._to_ids(text, tokenizer)))
        return logits if return_logits else logits.log_softmax(-1)

    def load_hugging_face(self, weights: dict[str, Tensor], source: object) -> list[str]:
        """See RobertaModelBase.load_hugging_face. Named classification heads are registered first."""
        for key, weight in weights.items():
            if match := re.fullmatch(r"classification_heads\.([^.]+)\.out_proj\.weight", key):
                self.register_classification_head(match[1], *weight.shape[:2])
        return super().load_hugging_face(weights, source)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Returns logits (B, T, V), or where `positions` are given only those there, (M, V).

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

    def extract_word_features(self, *args, **kwargs) -> Tensor:
        """See RobertaModel.extract_word_features."""
        return self.roberta.extract_word_features(*args, **kwargs)

    @torch.inference_mode()
    def fill_mask(self, text: str, tokenizer: Tokenizer,
                  top_k: int = 5) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
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
        input_ids = self._with_ends([[*ids, *tokenizer.encode(text[start:])]], tokenizer)
        positions = (input_ids[0] == tokenizer.mask_id).nonzero()[:, 0]
        with evaluating(self):
            probabilities = self._score(self.roberta(input_ids), positions).float().softmax(-1)  # (M, V)
        best = probabilities[:, : tokenizer.vocab_size].topk(min(top_k, tokenizer.vocab_size))
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
    architecture = "RobertaForMaskedLM"  # Hugging Face has none with NSP
    extra_keys = ("classification_heads.", "roberta.pooler.", "nsp_head.")

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.pooler = Pooler(config)
        self.nsp_head = nn.Linear(config.hidden_size, 2)
        self.init_weights()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None,
                positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns RobertaForMaskedLM's logits and NSP's, (B, 2): 0 = the second part follows, 1 = random."""
        hidden = self.roberta(input_ids, attention_mask, token_type_ids)
        return self._score(hidden, positions), self.nsp_head(self.pooler(hidden))


class RobertaForSequenceClassification(RobertaModelBase):
    """A label (or with one label, a value) for a text or pair (§5.1)."""

    classification_keys = ("classifier.dense.", "classifier.out_proj.")

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.roberta = RobertaModel(config)
        self.classifier = ClassificationHead(config, config.num_labels)
        self.init_weights()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None) -> Tensor:
        """Returns logits (B, num_labels)."""
        return self.classifier(self.roberta(input_ids, attention_mask, token_type_ids))


class RobertaForMultipleChoice(RobertaModelBase):
    """A score for each of N candidates, encoded one by one with the question and passage (§5.3, RACE)."""

    head_keys = {"pooler.": "roberta.pooler."}
    classification_keys = ("roberta.pooler.dense.", "classifier.")

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.roberta = RobertaModel(config)
        self.pooler = Pooler(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.init_weights()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None) -> Tensor:
        """Returns scores (B, N), whose softmax picks the answer, of inputs that are (B, N, T) each."""
        given = (input_ids, attention_mask, token_type_ids)
        hidden = self.roberta(*(None if x is None else x.flatten(0, 1) for x in given))  # (B * N, T, C)
        return self.classifier(self.dropout(self.pooler(hidden))).view(input_ids.shape[:2])


class RobertaForQuestionAnswering(RobertaModelBase):
    """Where in the passage the answer starts and ends (§5.2, SQuAD); for v2.0, whether there is one (§3)."""

    extra_keys = ("answerable.",)

    def __init__(self, config: RobertaConfig):
        config = replace(config, num_labels=2, id2label={})  # start and end, as Hugging Face counts them
        super().__init__(config)
        self.roberta = RobertaModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.answerable = nn.Linear(config.hidden_size, 1) if config.answerability else None
        self.init_weights()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None) -> tuple[Tensor, ...]:
        """Returns start logits and end logits, each (B, T); with `answerability` also its logits, (B,)."""
        hidden = self.roberta(input_ids, attention_mask, token_type_ids)
        start, end = self.qa_outputs(hidden).unbind(-1)  # (B, T, 2) -> two of (B, T)
        return (start, end) if self.answerable is None else (start, end, self.answerable(hidden[:, 0])[:, 0])


# ----------------------------------------------------------------------------------------------------------
# Names of weights: ours, Hugging Face's, fairseq's
# ----------------------------------------------------------------------------------------------------------

# By this table roberta.blocks.0.ffn_in.weight is roberta.encoder.layer.0.intermediate.dense.weight for
# Hugging Face and encoder.sentence_encoder.layers.0.fc1.weight for fairseq. Parts of names are replaced one
# after the other, and back from the last to the first: attention.output.dense. must precede output.dense.
NAMES = [  # ours, Hugging Face's, fairseq's
    ("embeddings.tokens.", "embeddings.word_embeddings.", "embed_tokens."),
    ("embeddings.positions.", "embeddings.position_embeddings.", "embed_positions."),
    ("embeddings.token_types.", "embeddings.token_type_embeddings.", "segment_embeddings."),
    ("embeddings.norm.", "embeddings.LayerNorm.", "layernorm_embedding."),
    ("blocks.", "encoder.layer.", "layers."),
    ("attention.q_proj.", "attention.self.query.", "self_attn.q_proj."),
    ("attention.k_proj.", "attention.self.key.", "self_attn.k_proj."),
    ("attention.v_proj.", "attention.self.value.", "self_attn.v_proj."),
    ("attention.out_proj.", "attention.output.dense.", "self_attn.out_proj."),
    ("attn_norm.", "attention.output.LayerNorm.", "self_attn_layer_norm."),
    ("ffn_in.", "intermediate.dense.", "fc1."),
    ("ffn_out.", "output.dense.", "fc2."),
    ("ffn_norm.", "output.LayerNorm.", "final_layer_norm."),
]
HUGGING_FACE_NAMES = {ours: theirs for ours, theirs, _ in NAMES}
FAIRSEQ_NAMES = {  # from Hugging Face's
    "roberta.e": "encoder.sentence_encoder.e",  # of embeddings and encoder, not of the pooler
    **{theirs: fairseqs for _, theirs, fairseqs in NAMES},
    "lm_head.": "encoder.lm_head.",
    "encoder.lm_head.decoder.weight": "encoder.lm_head.weight",
}

WORDS = "roberta.embeddings.word_embeddings.weight"
POSITIONS = "roberta.embeddings.position_embeddings.weight"
TOKEN_TYPES = "roberta.embeddings.token_type_embeddings.weight"
DECODER = "lm_head.decoder.weight"
HEADS = ("lm_head.", "classifier.", "qa_outputs.", "roberta.pooler.", "answerable.", "nsp_head.",
         "classification_heads.")  # what the keys of each kind of head begin with
# Never read: buffers without a content, and copies of a layer's weights that fairseq keeps.
IGNORED = re.compile(r".*(position_ids|token_type_ids|\.version|_float_tensor)|"
                     r".*\.layers?\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)")


def normalise(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights with the encoder's under `roberta.`, no buffers, and one bias of the LM head."""
    weights = {key: value for key, value in weights.items() if not IGNORED.fullmatch(key)}
    if not any(key.startswith("roberta.") for key in weights):  # saved from an encoder alone
        weights = {key if key.startswith(HEADS) else "roberta." + key: value
                   for key, value in weights.items()}
    if "lm_head.decoder.bias" in weights:  # the one of the two that Hugging Face's model adds
        weights["lm_head.bias"] = weights.pop("lm_head.decoder.bias")
    return weights


def has_own_decoder(weights: dict[str, Tensor]) -> bool:
    """Tells whether the LM head's matrix is there and another than the token embedding."""
    return DECODER in weights and not (WORDS in weights and torch.equal(weights[DECODER], weights[WORDS]))


def fold_token_type(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights with a single token type's row added to every position's, see Embeddings."""
    row, positions = weights.get(TOKEN_TYPES), weights.get(POSITIONS)
    if row is None or positions is None or row.shape != (1, positions.shape[-1]):
        return weights
    folded = positions.float() + row if row.any() else positions
    return {key: value for key, value in weights.items() if key != TOKEN_TYPES} | {POSITIONS: folded}


def check_weights(weights: dict[str, Tensor], ours: dict[str, Tensor], source: object) -> list[str]:
    """Returns the keys of our heads of which the weights have nothing: these may be drawn at random.

    Raises: ValueError naming a weight that is missing, has no place, has another shape or is not finite.
    """
    absent = tuple(head for head in HEADS if not any(key.startswith(head) for key in weights))
    fresh = [key for key in ours if key.startswith(absent) and not key.startswith("lm_head.")]
    if missing := [key for key in ours if key not in weights and key not in fresh]:
        raise ValueError(f"{source}: {len(missing)} weights are missing, first of all {missing[0]}")
    others = tuple(head for head in HEADS if not any(key.startswith(head) for key in ours))
    if extra := [key for key in weights if key not in ours and not key.startswith(others)]:
        raise ValueError(f"{source}: {len(extra)} weights have no place in a model of this kind and config, "
                         f"first of all {extra[0]}")
    for key in (key for key in ours if key in weights):
        found, wanted = weights[key], ours[key].shape
        if key == WORDS and found.ndim == 2 and len(found) != wanted[0]:
            raise ValueError(f"{source}: the config says vocab_size {wanted[0]}, the weights are for "
                             f"{len(found)}")
        if found.shape != wanted:
            raise ValueError(f"{source}: {key} has shape {tuple(found.shape)}, the config asks for "
                             f"{tuple(wanted)}")
        # One NaN or infinity makes a sum one; the slower look is for finding it, and for sums that overflow.
        if not found.sum().isfinite() and (bad := int((~found.isfinite()).sum())):
            raise ValueError(f"{source}: {key} holds {bad} values that are NaN or infinite; its training "
                             "diverged, or the file is damaged")
    return fresh


# ----------------------------------------------------------------------------------------------------------
# Finding and opening a saved model
# ----------------------------------------------------------------------------------------------------------

WEIGHTS = "pytorch_model.bin"  # what we write
EXTRA_WEIGHTS = "extra_heads.bin"  # beside it: heads for which Hugging Face's classes have no place
FAIRSEQ = "model.pt"
# What its RobertaConfig takes where config.json is silent, and ours does not.
HUGGING_FACE_DEFAULTS = {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "max_position_embeddings": 512}
# In order of preference. An index names the files of a model that is too large for one.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", WEIGHTS, WEIGHTS + ".index.json")


def find_model(directory: str | Path) -> Path:
    """Returns the directory that holds the model: this one, or of a run directory its newest checkpoint."""
    directory = Path(directory)
    for place in (directory / "checkpoint", directory):
        if main_file(place):
            return place
    state = "no such directory"
    if (directory / "config.json").is_file():
        state = f"a config.json without {WEIGHT_FILES[0]} or {WEIGHTS}"
    elif directory.is_dir():
        state = f"neither a config.json with weights in it nor {FAIRSEQ}"
    raise ValueError(f"{directory}: not a model ({state}); give a run directory of train.py or a saved model")


def main_file(directory: Path) -> Path | None:
    """Returns the file of a saved model's weights, or their index; the one that counts if there are many."""
    if not (directory / "config.json").is_file():
        return directory / FAIRSEQ if (directory / FAIRSEQ).is_file() else None
    found = [directory / name for name in WEIGHT_FILES if (directory / name).is_file()]
    if not has_safetensors():  # then the pickled ones, if both are there: they should be the same
        found.sort(key=lambda path: "safetensors" in path.name)
    return found[0] if found else None


def weight_files(directory: Path) -> list[Path]:
    """Returns all files that hold weights of the saved model in a directory."""
    found = main_file(directory)
    if found is None:
        raise ValueError(f"{directory}: there are no weights here")
    if found.suffix == ".json":
        return [directory / name for name in sorted(set(read_index(found).values()))]
    extra = directory / EXTRA_WEIGHTS  # beside other weights than ours it is a leftover
    return [found, extra] if found.name == WEIGHTS and extra.is_file() else [found]


def read_index(path: Path) -> dict[str, str]:
    """Returns which file holds which weight. Raises: ValueError where it is no file of weights beside it."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{path}: damaged, it has no weight_map")
    ending = Path(path.name.removesuffix(".index.json")).suffix
    for name in map(str, where.values()):
        if Path(name).name != name or Path(name).suffix != ending:
            raise ValueError(f"{path}: {name!r} is no {ending} file beside it")
        if not (path.parent / name).is_file():
            raise ValueError(f"{path}: the file {name} is missing")
    return where


def has_safetensors() -> bool:
    return importlib.util.find_spec("safetensors") is not None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged, no object but {type(content).__name__}")
    return content


def read_model(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the entries of config.json, and the weights under Hugging Face's keys, of whatever origin.

    Nothing is checked against each other yet. Raises: ValueError naming the file that is damaged.
    """
    files = weight_files(directory)
    if files[0].name == FAIRSEQ:
        return from_fairseq(read_pickle(files[0]), files[0])
    weights: dict[str, Tensor] = {}
    for path in files:
        part = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
        check_tensors(part, path)
        if twice := weights.keys() & part.keys():
            raise ValueError(f"{path}: {sorted(twice)[0]} is in another file of the model already")
        weights |= part
    index = main_file(directory)
    if index.suffix == ".json" and (differing := read_index(index).keys() ^ weights.keys()):
        raise ValueError(f"{index}: {sorted(differing)[0]} is in the index or in the files, not in both")
    return HUGGING_FACE_DEFAULTS | read_json(directory / "config.json"), normalise(weights)


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(weights: dict[str, Any], path: Path) -> None:
    """Raises ValueError where a file's weights are not tensors of floats by name, or more than it can hold.

    A tensor may claim 10^15 values that all stand in one place of the file; a copy would fill the memory.
    """
    promised = 0
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(f"{path}: {key} is no tensor with a name, but {type(value).__name__}")
        if not (value.dtype in FLOATS and value.ndim) and not IGNORED.fullmatch(key):
            raise ValueError(f"{path}: {key} holds no row of floats, but {value.dtype} of shape "
                             f"{tuple(value.shape)}")
        promised += value.numel() * value.element_size()
    if promised > 3 * path.stat().st_size:  # tied weights are written once and counted twice
        raise ValueError(f"{path}: refused, its {path.stat().st_size:,} bytes would unfold to {promised:,}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    if not has_safetensors():
        raise ValueError(f"{path}: reading it needs the package safetensors: pip install safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > 1 << 22:  # LARGE's has 60 KB; the library would take up to 100 MB, and fill 2 GB with it
            raise ValueError(f"a header of {header:,} bytes")
        return load_file(path)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise ValueError(f"{path}: damaged ({first_line(error)})") from None


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# What a pickled file of weights may name: containers, tensors, storages. torch.load with weights_only
# executes nothing either, but would make a bytearray of any size that a file of 1 KB asks for.
PLAIN = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")
# What fairseq's arguments are made of. None of it is imported: an `Inert` stands in for each.
ARGUMENTS = re.compile(r"argparse Namespace|(omegaconf|fairseq)(\.\w+)* \w+|typing Any|numpy dtype|"
                       r"numpy\._?core\.multiarray scalar|collections defaultdict|enum \w+|"
                       r"builtins (str|int|float|bool|dict|list|tuple)")


class Inert:
    """Stands in for another program's class: holds what a file gives it, and does nothing with it."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def read_pickle(path: Path) -> dict[str, Any]:
    """Returns what torch.save wrote, executing nothing: the names in the file are looked through first."""
    try:
        is_zip = zipfile.is_zipfile(path)
        strangers = {name for name in names_in(path, is_zip) if not PLAIN.fullmatch(name)}
        for name in sorted(strangers):
            if path.name != FAIRSEQ or not ARGUMENTS.fullmatch(name):
                raise pickle.UnpicklingError(f"it names {name.replace(' ', '.')}")
        with torch.serialization.safe_globals([(Inert, name.replace(" ", ".")) for name in strangers]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        reason = "" if "weights_only" in str(error) else f" ({first_line(error)})"  # torch advises trust
        raise ValueError(f"{path}: refused, it holds more than plain weights or none at all"
                         f"{reason}") from None
    except Exception as error:  # a damaged pickle may fail in any way
        raise ValueError(f"{path}: damaged ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no weights by name, but {type(content).__name__}")
    return content


def names_in(path: Path, is_zip: bool) -> set[str]:
    """Returns the classes and functions that a file of torch.save names, as "module name"; executes nothing.

    Raises: pickle.UnpicklingError for names in another form than torch's, and for packed content.
    """
    names = set()
    with open(path, "rb") as file:
        # Before 1.6 torch wrote five pickles: magic number, version, system, content, keys; then storages.
        pickles: list[BinaryIO] = [io.BytesIO(pickle_in_zip(file, path))] if is_zip else [file] * 5
        for pickled in pickles:
            for number, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
                if opcode.name in ("GLOBAL", "INST"):
                    names.add(PYTHON_2.get(argument, argument))
                elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "DUP") or number > 500_000:
                    raise pickle.UnpicklingError(f"its opcode {number} is {opcode.name}")
    return names


def pickle_in_zip(file: BinaryIO, path: Path) -> bytes:
    """Returns the pickle of a file of torch.save, having compared all checksums: a flipped bit is found here.

    Raises: pickle.UnpicklingError where the file could be read in two ways or unpacks to more than it is.
    """
    archive, size, found = zipfile.ZipFile(file), path.stat().st_size, []
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise pickle.UnpicklingError(f"{entry.filename} would unpack to {entry.file_size:,} bytes")
        with archive.open(entry) as content:  # raises BadZipFile for another checksum
            while entry.CRC and content.read(1 << 20):
                pass
        if entry.filename.lower().endswith("data.pkl"):  # torch's reader does not look at the case
            found.append(archive.read(entry))
    first = min(entry.header_offset for entry in archive.infolist())
    if len(found) != 1 or first or torch._C.PyTorchFileReader(str(path)).get_record("data.pkl") != found[0]:
        raise pickle.UnpicklingError(f"it has {len(found)} files data.pkl, or two tables of contents")
    return found[0]


# Pickles of torch.save name what is built in as Python 2 did, and torch.load looks it up by its name today.
BUILT_IN = {"long": "int", "unicode": "str", **{x: x for x in "str int float bool dict list tuple".split()}}
PYTHON_2 = {f"__builtin__ {old}": f"builtins {new}" for old, new in BUILT_IN.items()}


def count_layers(weights: dict[str, Tensor]) -> int:
    found = (re.match(r"roberta\.encoder\.layer\.(\d+)\.", key) for key in weights)
    return len({match[1] for match in found if match})


def make_config(entries: dict[str, Any], weights: dict[str, Tensor], changes: dict[str, Any],
                source: object) -> RobertaConfig:
    """Returns the config of a saved model with `changes`, or raises ValueError where it is no such model.

    Entries unknown to RobertaConfig are passed over; those in `needed` would change the result.
    """
    known = {f.name for f in fields(RobertaConfig)}
    if unknown := changes.keys() - known:
        raise ValueError(f"RobertaConfig has no {sorted(unknown)[0]}; it has {', '.join(sorted(known))}")
    needed = {"model_type": "roberta", "position_embedding_type": "absolute", "is_decoder": False,
              "add_cross_attention": False}
    for name, value in needed.items():
        if (found := entries.get(name, None if name == "model_type" else value)) != value:
            raise ValueError(f"{source}: {name} is {found!r}; only {value!r} opens here")
    entries = {key: value for key, value in entries.items() if key in known}
    if "num_labels" in changes:  # the file's names are for another number
        entries.pop("id2label", None)
    if (head := weights.get("classifier.out_proj.weight")) is not None and not entries.get("id2label"):
        entries.setdefault("num_labels", len(head))
    if has_own_decoder(weights):  # then it has, whatever config.json says: Hugging Face's classes agree
        entries["tie_word_embeddings"] = False
    try:
        config = RobertaConfig(**entries | changes)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if (layers := count_layers(weights)) != config.num_hidden_layers:
        raise ValueError(f"{source}: the config says num_hidden_layers {config.num_hidden_layers}, the "
                         f"weights have {layers}")
    return config


def read_config(directory: str | Path) -> RobertaConfig:
    """Returns the config of a saved model, of whatever origin. Raises: ValueError as `from_pretrained`."""
    directory = find_model(directory)
    return make_config(*read_model(directory), {}, directory)


def open_model(directory: str | Path, head: str | None = None) -> RobertaModelBase:
    """Returns the model in a directory as the class that its weights are for.

    head: the name of a fairseq classification head, to open RobertaForSequenceClassification with it;
    without it there are all of them, on a RobertaForMaskedLM. Raises: ValueError as `from_pretrained`.
    """
    _, weights = read_model(find_model(directory))
    kinds = [("classifier.out_proj.weight", RobertaForSequenceClassification),
             ("classifier.weight", RobertaForMultipleChoice),
             ("qa_outputs.weight", RobertaForQuestionAnswering),
             ("nsp_head.weight", RobertaForPreTraining), ("lm_head.bias", RobertaForMaskedLM)]
    kind = next((kind for key, kind in kinds if key in weights), RobertaModel)
    return (RobertaForSequenceClassification if head else kind).from_pretrained(directory, head)


# ----------------------------------------------------------------------------------------------------------
# fairseq
# ----------------------------------------------------------------------------------------------------------


def from_fairseq(content: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns what a model.pt holds as the entries of a config.json and weights under Hugging Face's keys.

    Shapes are the weights' own. Older files keep the arguments in a Namespace, `args`, newer ones in `cfg`,
    whose `model` has those that concern us.
    """
    state, arguments = content.get("model"), plain(content.get("args")) or plain(content.get("cfg"))
    if not isinstance(state, dict) or not isinstance(arguments, dict):
        raise ValueError(f"{path}: not fairseq's, which has `model` and `args` or `cfg`")
    if isinstance(inner := plain(arguments.get("model")), dict):
        arguments = inner
    arguments = {name: plain(value) for name, value in arguments.items()}
    check_tensors(state, path)
    weights = {}
    for key, value in state.items():
        # The first releases called the encoder decoder, and had q, k and v in one matrix.
        key = re.sub(r"^decoder\.", "encoder.", key)
        key = key.replace(".sentence_encoder.emb_layer_norm.", ".sentence_encoder.layernorm_embedding.")
        if match := re.fullmatch(r"(.*\.self_attn\.)in_proj_(weight|bias)", key):
            weights |= {f"{match[1]}{x}_proj.{match[2]}": part for x, part in zip("qkv", value.chunk(3))}
        else:
            weights[key] = value
    weights = normalise(rename(weights, {new: old for old, new in reversed(FAIRSEQ_NAMES.items())}))
    needed = {"activation_fn": "gelu", "pooler_activation_fn": "tanh", "encoder_normalize_before": False,
              "layernorm_embedding": True, "no_scale_embedding": True, "encoder_learned_pos": True,
              "no_token_positional_embeddings": False, "encoder_layers_to_keep": None}
    for name, value in needed.items():
        if arguments.get(name, value) != value:
            raise ValueError(f"{path}: {name} {arguments[name]!r} is not built, only {value!r}")
    if has_own_decoder(weights) and not arguments.get("untie_weights_roberta"):
        raise ValueError(f"{path}: the LM head's weight is not the embedding's, though untie_weights_roberta "
                         "is not set")
    try:
        entries = {
            "model_type": "roberta", "architectures": ["RobertaForMaskedLM"],
            "vocab_size": len(weights[WORDS]), "hidden_size": weights[WORDS].shape[1],
            "num_hidden_layers": count_layers(weights),
            "num_attention_heads": arguments["encoder_attention_heads"],
            "intermediate_size": len(weights["roberta.encoder.layer.0.intermediate.dense.weight"]),
            "max_position_embeddings": len(weights[POSITIONS]),
            "type_vocab_size": len(weights[TOKEN_TYPES]) if TOKEN_TYPES in weights else 1,
            "hidden_dropout_prob": arguments.get("dropout", 0.1),
            "attention_probs_dropout_prob": arguments.get("attention_dropout", 0.1),
            "classifier_dropout": arguments.get("pooler_dropout", 0.0),
            "tie_word_embeddings": not arguments.get("untie_weights_roberta", False),
        }
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: no model of RoBERTa's kind, without {error}") from None
    return entries, weights


def plain(value: Any) -> Any:
    """Returns what an `Inert` of fairseq's arguments holds: a dict of a container, the value of a leaf."""
    for _ in range(4):  # they are not nested deeper, and a hostile file could have one hold itself
        if isinstance(value, Inert):
            held = vars(value)
            value = held.get("_content", held.get("_val", held))
    return value


def use_head(weights: dict[str, Tensor], name: str | None, places: tuple[str, str],
             source: object) -> dict[str, Tensor]:
    """Returns the weights with one of fairseq's named classification heads in the places of a model's own."""
    names = sorted({key.split(".")[1] for key in weights if key.startswith("classification_heads.")})
    if name is None and not names:
        return weights
    name = names[0] if name is None and len(names) == 1 else name
    if name not in names:
        raise ValueError(f"{source}: there is no classification head {name!r} among {names}" if name else
                         f"{source}: there are classification heads {names}; choose one by `head`")
    old = (f"classification_heads.{name}.dense.", f"classification_heads.{name}.out_proj.")
    return rename(weights, dict(zip(old, places)))


def rename(weights: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """Returns the weights with each of the table's strings replaced, in its order, wherever a key holds it.

    The keys of named heads are touched by entries for them alone: a name may hold any string, "lm_head" say.
    """
    renamed, prefix = {}, "classification_heads."
    for key, value in weights.items():
        for old, new in table.items():
            if key.startswith(prefix) == old.startswith(prefix):
                key = key.replace(old, new)
        renamed[key] = value
    return renamed


def save_fairseq(model: RobertaModelBase, directory: str | Path, tokenizer: Tokenizer) -> None:
    """Writes a directory that fairseq's RobertaModel.from_pretrained opens.

    fairseq's model always has an LM head: where ours has none, one of zeros is added, which finds all tokens
    equally probable. Raises: ValueError where fairseq has no place for what the model has.
    """
    directory, config = Path(directory), model.config
    fixed = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "bos_token_id": 0, "pad_token_id": 1,
             "eos_token_id": 2, "vocab_size": tokenizer.vocab_size}  # its dictionary gives the last
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(f"fairseq's model would have {name} {value}, this one has "
                             f"{getattr(config, name)}")
    weights = fold_token_type(model.to_hugging_face())
    weights.pop("lm_head.decoder.bias", None)
    weights.setdefault(DECODER, weights[WORDS])
    for name, value in LMHead(config).state_dict().items():
        weights.setdefault(RobertaForMaskedLM.hugging_face_key(f"lm_head.{name}"), torch.zeros_like(value))
    name = "classification_heads.sentence_classification_head."  # what fairseq's task calls its only one
    heads = dict(zip(type(model).classification_keys or (), (name + "dense.", name + "out_proj.")))
    weights = rename(weights, FAIRSEQ_NAMES | heads)
    if lost := [key for key in weights if not key.startswith(("encoder.", "classification_heads."))]:
        raise ValueError(f"fairseq's RoBERTa has no place for {lost[0]}")
    arguments = Namespace(
        arch="roberta_base", task="masked_lm", criterion="masked_lm",
        encoder_layers=config.num_hidden_layers, encoder_embed_dim=config.hidden_size,
        encoder_ffn_embed_dim=config.intermediate_size, encoder_attention_heads=config.num_attention_heads,
        max_positions=config.max_tokens, tokens_per_sample=config.max_tokens, activation_fn="gelu",
        pooler_activation_fn="tanh", dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob, pooler_dropout=config.head_dropout,
        untie_weights_roberta=not config.tie_word_embeddings)
    # optimizer_history and extra_state say nothing, but fairseq does not open a file without them.
    content = {"args": arguments, "model": weights, "optimizer_history": [{"lr_scheduler_state": {}}],
               "extra_state": {}}
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(content, directory / FAIRSEQ)
    tokenizer.save_fairseq(directory)


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def export(directory: str | Path, out: str | Path, file_format: str, head: str | None = None) -> None:
    """Writes a saved model, of whatever origin, as Hugging Face's ("hf") or fairseq's classes open it.

    Raises: ValueError where there is no model with a tokenizer, no place for it, or `out` is not empty.
    """
    from data import Tokenizer  # here, since with ids alone this file needs only torch

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something already; choose another directory")
    model, tokenizer = open_model(directory, head), Tokenizer.from_pretrained(find_model(directory))
    temporary = out.with_name(f".{out.name}.tmp")  # `out` appears when it is whole
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if file_format == "fairseq":
            save_fairseq(model, temporary, tokenizer)
        else:
            model.save_pretrained(temporary, tokenizer)
        os.replace(temporary, out)
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(f"cannot write {out} ({first_line(error)}); is the disk full?") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{type(model).__name__} of {model.num_parameters():,} parameters and its tokenizer are in {out}")


def print_fillings(directory: str, text: str, top_k: int) -> None:
    """Prints the most probable fillings of each mask in a text."""
    from data import Tokenizer

    model = RobertaForMaskedLM.from_pretrained(directory)
    filled = model.fill_mask(text, Tokenizer.from_pretrained(find_model(directory)), top_k)
    for number, mask in enumerate(filled if isinstance(filled[0], list) else [filled]):
        if number:
            print()
        for candidate in mask:
            shown = candidate["sequence"].replace("\n", "\\n")
            print(f"{candidate['score']:7.2%}  {candidate['token_str']!r:20} {shown}")


def parse(words: list[str]) -> argparse.Namespace:
    """Returns the options of a command line, whose first word may be a command, `export`."""
    if words[:1] == ["export"]:
        parser = argparse.ArgumentParser(prog="roberta.py export",
                                         description="Write a model for other programs.")
        parser.add_argument("model", metavar="DIR", help="run directory, or a saved model of any origin")
        parser.add_argument("out", metavar="OUT", help="directory to write, new or empty")
        parser.add_argument("--format", choices=("hf", "fairseq"), default="hf", help="whose (default: hf)")
        parser.add_argument("--head", metavar="NAME", help="the fairseq classification head to export alone "
                            "(default: all of them and the LM head)")
        parser.set_defaults(command="export")
        return parser.parse_args(words[1:])
    parser = argparse.ArgumentParser(prog="roberta.py", description="Fill the <mask> in a text.",
                                     epilog="For other programs' files: roberta.py export --help")
    parser.add_argument("model", metavar="DIR", help="run directory of train.py, or a saved model")
    parser.add_argument("text", help='for example "Returns a new array of given <mask> and type."')
    parser.add_argument("--top-k", type=int, default=5, metavar="N", help="fillings (default: 5)")
    parser.set_defaults(command="fill-mask")
    return parser.parse_args(words)


def main() -> None:
    options = parse(sys.argv[1:])
    try:
        if options.command == "export":
            export(options.model, options.out, options.format, options.head)
        else:
            print_fillings(options.model, options.text, options.top_k)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
