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
import io
import json
import pickle
import pickletools
import re
import sys
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from data import Tokenizer

# ----------------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------------


MAX_SIZE = 1 << 24  # no field of a real config is larger; what is, would only fill the memory


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

    def __post_init__(self):
        for f in fields(self):  # they may come from a stranger's file
            value = getattr(self, f.name)
            if value is None and "None" in f.type:
                continue
            lowest = 0 if f.name.endswith("_id") else 1
            if f.type.startswith("int") and not (type(value) is int and lowest <= value < MAX_SIZE):
                raise ValueError(f"{f.name} {value!r} must be a whole number from {lowest} to {MAX_SIZE - 1}")
            if f.type.startswith("float") and not (type(value) in (int, float) and 0 <= value < 1):
                raise ValueError(f"{f.name} {value!r} must be a number from 0 to less than 1")
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
        except (AttributeError, ValueError):
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


class RobertaModelBase(nn.Module):
    """What all models here share: a config, initialisation, `save_pretrained` and `from_pretrained`."""

    architecture: str | None = None  # Hugging Face's class for such a model, if not of the same name
    head_keys: dict[str, str] = {}  # our names of the head's modules -> Hugging Face's, see KEYS below
    extra_keys: tuple[str, ...] = ()  # what Hugging Face's class has no place for, by how its keys begin

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
        """Returns the ids of a text, `<s> A </s>`, or of a pair, `<s> A </s></s> B </s>`, as a batch of one.

        (1, T), for this model. Raises: ValueError for a tokenizer with more units than the model.
        """
        texts = [text] if isinstance(text, str) else text
        return self.with_ends(*(tokenizer.encode(text) for text in texts), tokenizer=tokenizer)

    def to_ids(self, text: str | Sequence[str] | Tensor, tokenizer: Tokenizer | None) -> Tensor:
        """Returns ids, (B, T), of what may be ids already."""
        if isinstance(text, Tensor):
            return torch.atleast_2d(text).to(self.device)
        if tokenizer is None:
            raise ValueError("a text needs a tokenizer: give one, or the text as ids")
        return self.encode(text, tokenizer)

    def with_ends(self, *segments: list[int], tokenizer: Tokenizer) -> Tensor:
        """Returns the ids of one or more segments between `<s>` and `</s>`, as a batch of one: (1, T)."""
        if tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} units, the model "
                             f"{self.config.vocab_size}; they do not belong together")
        bos, eos = self.config.bos_token_id, self.config.eos_token_id
        ids = [bos, *segments[0], eos]
        for segment in segments[1:]:
            ids += [eos, *segment, eos]
        return torch.tensor([ids], device=self.device)

    def save_pretrained(self, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Writes config, weights and tokenizer files: a directory that Hugging Face's classes open too.

        Raises: ValueError where other files with weights are there already: nobody could say which count.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if others := [name for name in WEIGHT_FILES if (directory / name).exists() and name != WEIGHTS]:
            raise ValueError(f"{directory} holds {others[0]} already; save to another directory")
        weights = self.to_hugging_face()
        extra = {key: weights.pop(key) for key in list(weights) if key.startswith(self.extra_keys)}
        (directory / "config.json").write_text(self.config.to_json(self.architecture or type(self).__name__), encoding="utf-8")
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
        num_labels). `head`: which of fairseq's classification heads. A head that the weights lack starts at
        random, and a line on stderr says so. No code in the files is executed.
        Raises: ValueError where the directory is no model, or not each weight has its place and its shape.
        """
        directory = find_model(directory)
        entries, weights = read_model(directory)
        if cls in (RobertaForSequenceClassification, RobertaForMultipleChoice):
            weights = use_head(weights, head, cls, directory)
        config = make_config(entries, weights, changes, directory)
        with torch.device("meta"):  # no memory yet: what the config asks for may be absurd
            model = cls(config)
        model.load_hugging_face(weights, directory)
        return model.eval()

    def to_hugging_face(self) -> dict[str, Tensor]:
        """Returns the weights under Hugging Face's keys."""
        weights = {self.hugging_face_key(name): value for name, value in self.state_dict().items()}
        if self.config.type_vocab_size == 1:  # there it has a row, and ours is part of the positions
            weights[TOKEN_TYPES] = torch.zeros(1, self.config.hidden_size, device=self.device)
        if "lm_head.bias" in weights:  # there it is repeated, as is the embedding where the decoder is tied
            weights.setdefault("lm_head.decoder.weight", weights[WORDS])
            weights["lm_head.decoder.bias"] = weights["lm_head.bias"]
        return weights

    def load_hugging_face(self, weights: dict[str, Tensor], source: object) -> None:
        """Copies weights under Hugging Face's keys into this model, after all of them have been checked.

        A head that none of them belongs to is left as it is, or on the meta device drawn at random; the heads
        of other models are passed over. Raises: ValueError naming a weight that is missing, has no place
        here, has another shape or is not finite.
        """
        weights = derive(weights, self.config, source)
        ours = {self.hugging_face_key(name): value for name, value in self.state_dict().items()}
        head = [key for key in ours if not key.startswith((*ENCODER, "lm_head."))]
        fresh = [key for key in ours if key not in weights]
        if fresh and fresh != head:
            lacking = [key for key in fresh if key not in head] or fresh
            raise ValueError(f"{source}: {len(lacking)} weights are missing, first of all {lacking[0]}")
        other_heads = tuple(name for name in HEADS if not any(key.startswith(name) for key in ours))
        extra = [key for key in weights if key not in ours and not key.startswith(other_heads)]
        if extra:
            raise ValueError(f"{source}: {len(extra)} weights have no place in a {type(self).__name__} of this "
                             f"shape, first of all {extra[0]}")
        for key, value in ours.items():
            check_weight(key, weights.get(key, value), value, source)
        if self.device.type == "meta":
            self.to_empty(device="cpu")
            for name, module in self.named_modules():
                if self.hugging_face_key(f"{name}.weight") in fresh:
                    self.init_module(module)
        for name, parameter in self.state_dict().items():
            parameter.copy_(weights.get(self.hugging_face_key(name), parameter))
        if fresh:
            print(f"note: {source} has no {', '.join(fresh)}; initialised at random", file=sys.stderr)

    @classmethod
    def hugging_face_key(cls, name: str) -> str:
        """Returns Hugging Face's key of one of our parameters."""
        for ours, theirs in [*cls.head_keys.items(), *KEYS.items()]:
            name = name.replace(ours, theirs)
        return "roberta." + name if cls is RobertaModel else name

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
        """Returns hidden states of a text or a pair, (1, T, C) with the specials, or of ids (B, T); no dropout.

        return_all_hiddens: those of the embeddings and of every layer, as a list.
        """
        with evaluating(self):
            return self(self.to_ids(text, tokenizer), return_all_hiddens=return_all_hiddens)

    def extract_word_features(self, text: str, words: Sequence[tuple[int, int]],
                              tokenizer: Tokenizer) -> Tensor:
        """Returns features of words, (W, C): the average over each one's tokens in the last hidden states.

        words: where they begin and end in the text, in characters, from any tokenisation. A token counts by
        the share of its characters (white space apart) that belongs to the word; most belong whole to one.
        Raises: ValueError for a word outside the text or of nothing but white space.
        """
        ids, offsets = tokenizer.encode_with_offsets(text)
        features = self.extract_features(self.with_ends(ids.tolist(), tokenizer=tokenizer))[0, 1:-1]  # (T, C)
        black = torch.tensor([0, *(not character.isspace() for character in text)]).cumsum(0)
        begins, ends = torch.from_numpy(offsets).unbind(1)  # of the tokens, (T,) each
        averages = []
        for begin, end in words:
            if not 0 <= begin < end <= len(text) or black[begin] == black[end]:
                raise ValueError(f"word ({begin}, {end}) holds no text of the {len(text)} characters")
            shared = black[ends.clamp(begin, end)] - black[begins.clamp(begin, end)]
            weights = (shared / (black[ends] - black[begins]).clamp(min=1)).to(features)  # (T,)
            averages.append(weights @ features / weights.sum())
        return torch.stack(averages) if averages else features[:0]


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
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
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

    def register_classification_head(self, name: str, num_classes: int, inner_size: int | None = None) -> None:
        """Adds a classification head for `predict`, drawn at random; one of that name is replaced."""
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"a head's name may hold letters, digits and _, not {name!r}")
        head = ClassificationHead(self.config, num_classes, inner_size).to(self.device)
        for module in head.modules():
            self.init_module(module)
        self.classification_heads[name] = head

    def predict(self, head: str, text: str | Sequence[str] | Tensor, tokenizer: Tokenizer | None = None,
                return_logits: bool = False) -> Tensor:
        """Returns the log-probabilities, (B, classes), that a named head gives a text, a pair or ids (B, T).

        Gradients flow, so it serves for training as well. Raises: ValueError for a name without a head.
        """
        if head not in self.classification_heads:
            raise ValueError(f"no classification head {head!r}, only {list(self.classification_heads)}; add it "
                             f"with register_classification_head({head!r}, num_classes)")
        logits = self.classification_heads[head](self.roberta(self.to_ids(text, tokenizer)))
        return logits if return_logits else logits.log_softmax(-1)

    def load_hugging_face(self, weights: dict[str, Tensor], source: object) -> None:
        """See RobertaModelBase.load_hugging_face. Named classification heads are registered first."""
        for key, weight in weights.items():
            if (match := re.fullmatch(r"classification_heads\.(\w+)\.out_proj\.weight", key)) and weight.ndim == 2:
                with self.device:
                    self.register_classification_head(match[1], *weight.shape)
        super().load_hugging_face(weights, source)

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

    def extract_word_features(self, *args, **kwargs) -> Tensor:
        """See RobertaModel.extract_word_features."""
        return self.roberta.extract_word_features(*args, **kwargs)

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
        input_ids = self.with_ends([*ids, *tokenizer.encode(text[start:])], tokenizer=tokenizer)
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
    architecture = "RobertaForMaskedLM"  # Hugging Face has none with NSP
    extra_keys = ("classification_heads.", "roberta.pooler.", "nsp_head.")

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
    """A label (or with one label, a value) for a text or pair (§5.1)."""

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

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.roberta = RobertaModel(config)
        self.pooler = Pooler(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.init_weights()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None) -> Tensor:
        """All of them (B, N, T). Returns scores (B, N); their softmax picks the answer."""
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

# Our module names -> Hugging Face's, by which roberta.blocks.0.ffn_in.weight becomes
# roberta.encoder.layer.0.intermediate.dense.weight.
KEYS = {
    "embeddings.tokens.": "embeddings.word_embeddings.",
    "embeddings.positions.": "embeddings.position_embeddings.",
    "embeddings.token_types.": "embeddings.token_type_embeddings.",
    "embeddings.norm.": "embeddings.LayerNorm.",
    "blocks.": "encoder.layer.",
    "attention.q_proj.": "attention.self.query.",
    "attention.k_proj.": "attention.self.key.",
    "attention.v_proj.": "attention.self.value.",
    "attention.out_proj.": "attention.output.dense.",
    "attn_norm.": "attention.output.LayerNorm.",
    "ffn_in.": "intermediate.dense.",
    "ffn_out.": "output.dense.",
    "ffn_norm.": "output.LayerNorm.",
}

# Hugging Face's names -> fairseq's, in this order; backwards from the last to the first.
FAIRSEQ_KEYS = {
    "roberta.embeddings.word_embeddings.": "encoder.sentence_encoder.embed_tokens.",
    "roberta.embeddings.position_embeddings.": "encoder.sentence_encoder.embed_positions.",
    "roberta.embeddings.token_type_embeddings.": "encoder.sentence_encoder.segment_embeddings.",
    "roberta.embeddings.LayerNorm.": "encoder.sentence_encoder.layernorm_embedding.",
    "roberta.encoder.layer.": "encoder.sentence_encoder.layers.",
    "attention.self.query.": "self_attn.q_proj.",
    "attention.self.key.": "self_attn.k_proj.",
    "attention.self.value.": "self_attn.v_proj.",
    "attention.output.dense.": "self_attn.out_proj.",
    "attention.output.LayerNorm.": "self_attn_layer_norm.",
    "intermediate.dense.": "fc1.",
    "output.dense.": "fc2.",
    "output.LayerNorm.": "final_layer_norm.",
    "lm_head.decoder.": "encoder.lm_head.",
    "lm_head.": "encoder.lm_head.",
}
WORDS = "roberta.embeddings.word_embeddings.weight"
POSITIONS = "roberta.embeddings.position_embeddings.weight"
TOKEN_TYPES = "roberta.embeddings.token_type_embeddings.weight"
ENCODER = ("roberta.embeddings.", "roberta.encoder.")  # what the keys of every model's encoder begin with
HEADS = ("lm_head.", "classifier.", "qa_outputs.", "roberta.pooler.", "answerable.", "nsp_head.",
         "classification_heads.")  # and those of heads
IGNORED = re.compile(r".*(position_ids|token_type_ids|\.version|_float_tensor)")  # buffers without a content


def derive(weights: dict[str, Tensor], config: RobertaConfig, source: object) -> dict[str, Tensor]:
    """Returns the weights as our models hold them: what is in them twice or says nothing is left out."""
    weights = {key: value for key, value in weights.items() if not IGNORED.fullmatch(key)}
    if not any(key.startswith("roberta.") for key in weights):  # saved from an encoder without a head
        weights = {key if key.startswith(HEADS) else "roberta." + key: value for key, value in weights.items()}
    if "lm_head.decoder.bias" in weights:  # the one that Hugging Face's decoder uses, should they differ
        weights["lm_head.bias"] = weights.pop("lm_head.decoder.bias")
    if config.tie_word_embeddings and "lm_head.decoder.weight" in weights:
        if is_untied(weights):
            raise ValueError(f"{source}: lm_head.decoder.weight is not the embedding's; the model needs "
                             "tie_word_embeddings=False")
        del weights["lm_head.decoder.weight"]
    if config.type_vocab_size == 1 and TOKEN_TYPES in weights:  # fold the row in, see Embeddings
        row = weights.pop(TOKEN_TYPES)
        if row.shape != (1, config.hidden_size):
            raise ValueError(f"{source}: {TOKEN_TYPES} has shape {tuple(row.shape)}, config.json asks for "
                             f"(1, {config.hidden_size})")
        if POSITIONS in weights and row.any():
            weights[POSITIONS] = weights[POSITIONS].float() + row
    return weights


def is_untied(weights: dict[str, Tensor]) -> bool:
    """Tells whether the decoder's weights are others than the embedding's, whatever a config says."""
    decoder, embedding = weights.get("lm_head.decoder.weight"), weights.get(WORDS)
    return decoder is not None and embedding is not None and not torch.equal(decoder, embedding)


def check_weight(key: str, found: Tensor, expected: Tensor, source: object) -> None:
    """Raises ValueError where a weight does not fit its place, or holds what would spoil all results."""
    if key == WORDS and found.ndim == 2 and len(found) != len(expected):
        raise ValueError(f"{source}: config.json says vocab_size {len(expected)}, the weights are for "
                         f"{len(found)} units")
    if found.shape != expected.shape:
        raise ValueError(f"{source}: {key} has shape {tuple(found.shape)}, config.json asks for "
                         f"{tuple(expected.shape)}")
    if found.device.type != "meta" and not torch.isfinite(found).all():
        raise ValueError(f"{source}: {key} holds {int((~torch.isfinite(found)).sum())} values that are NaN or "
                         "infinite; the run it is from has diverged, or the file is damaged")


# ----------------------------------------------------------------------------------------------------------
# Finding and opening a saved model
# ----------------------------------------------------------------------------------------------------------

WEIGHTS = "pytorch_model.bin"  # what we write
EXTRA_WEIGHTS = "extra_heads.bin"  # beside it: heads for which Hugging Face's classes have no place
FAIRSEQ = "model.pt"
# In order of preference. An index names the files of a model that is too large for one.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", WEIGHTS, WEIGHTS + ".index.json")


def find_model(directory: str | Path) -> Path:
    """Returns the directory that holds the model: this one, or of a run directory its newest checkpoint."""
    directory = Path(directory)
    for place in (directory / "checkpoint", directory):
        if (place / FAIRSEQ).is_file() or (place / "config.json").is_file() and weight_files(place):
            return place
    state = "no such directory" if not directory.is_dir() else (
        f"no config.json with {' or '.join(WEIGHT_FILES[::2])} in it, and no {FAIRSEQ}")
    raise ValueError(f"{directory}: not a model ({state}); give a run directory of train.py or a saved model")


def weight_files(directory: Path) -> list[Path]:
    """Returns the files that hold a saved model's weights, none where there are none.

    Raises: ValueError for an index that leads anywhere but to files of weights beside it.
    """
    if not (directory / "config.json").is_file() and (directory / FAIRSEQ).is_file():
        return [directory / FAIRSEQ]
    found = [directory / name for name in WEIGHT_FILES if (directory / name).is_file()]
    if not has_safetensors() and any(path.name.startswith(WEIGHTS) for path in found):
        found = [path for path in found if path.name.startswith(WEIGHTS)]  # the same weights, most likely
    if not found:
        return []
    if found[0].suffix != ".json":
        return [path for path in (found[0], directory / EXTRA_WEIGHTS) if path.is_file()]
    return [found[0].parent / name for name in sorted(set(read_index(found[0]).values()))]


def read_index(path: Path) -> dict[str, str]:
    """Returns which file holds which weight."""
    where, ending = read_json(path).get("weight_map"), Path(path.stem.removesuffix(".index")).suffix
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{path}: damaged, without a weight_map")
    for name in set(map(str, where.values())):
        if Path(name).name != name or Path(name).suffix != ending:
            raise ValueError(f"{path}: {name!r} is no {ending} file beside it")
        if not (path.parent / name).is_file():
            raise ValueError(f"{path}: the file {name} is missing")
    return where


def has_safetensors() -> bool:
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged, not an object but {type(content).__name__}")
    return content


def read_model(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the entries of config.json, of fairseq's arguments under its names, and the weights under
    Hugging Face's. Raises: ValueError naming the file that is damaged or no such thing.
    """
    files, weights = weight_files(directory), {}
    for path in files:
        if path.suffix == ".safetensors":
            part = read_safetensors(path)
        else:
            part = read_pickle(path)
        if path.name == FAIRSEQ:
            return from_fairseq(part, path)
        if twice := weights.keys() & part.keys():
            raise ValueError(f"{path}: {sorted(twice)[0]} is in another file as well")
        weights |= part
    index = next(iter(directory / name for name in WEIGHT_FILES if (directory / name).is_file()))
    if index.suffix == ".json" and (differing := read_index(index).keys() ^ weights.keys()):
        raise ValueError(f"{index}: {sorted(differing)[0]} is in either the index or the files, not in both")
    check_tensors(weights, files)
    return read_json(directory / "config.json"), weights


def check_tensors(weights: dict[str, Any], files: list[Path]) -> None:
    """Raises ValueError where weights are anything but tensors of floats that the files can really hold."""
    size = sum(path.stat().st_size for path in files)
    for key, value in weights.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
            if not IGNORED.fullmatch(str(key)):
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{files[0]}: {key} is no tensor of floats, but {kind}")
    promised = sum(value.numel() * value.element_size() for value in weights.values()
                   if isinstance(value, Tensor))
    if promised > 3 * size:  # tied weights are in it twice at most
        raise ValueError(f"{files[0]}: refused, its weights would take {promised:,} bytes, the file has {size:,}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    if not has_safetensors():
        raise ValueError(f"{path}: reading this needs `pip install safetensors`")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise ValueError(f"{path}: damaged ({first_line(error)})") from None


# What a file of weights may name: containers, tensors and their storages. torch's own list is longer: it has
# types of which a stranger's file could ask for any amount of memory.
PLAIN = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")
# What fairseq's arguments may be made of. None of these is imported: an `Inert` stands in for each.
ARGUMENTS = re.compile(r"argparse Namespace|(omegaconf|fairseq)(\.\w+)* \w+|typing Any|numpy dtype|"
                       r"numpy\._?core\.multiarray scalar|(__builtin__|builtins) (str|unicode|int|float|bool|"
                       r"dict|list|tuple)|collections defaultdict|enum \w+")


class Inert:
    """Stands in for a class of another program: takes what the file gives it, and does nothing with it."""

    def __new__(cls, *arguments: Any) -> Inert:
        self = super().__new__(cls)
        self.arguments = arguments
        return self

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def read_pickle(path: Path) -> dict[str, Any]:
    """Returns what torch.save wrote, executing nothing: the names in the file are looked through first."""
    try:
        is_zip = zipfile.is_zipfile(path)  # files from before torch 1.6 are of another form
        names = names_in_zip(path) if is_zip else names_in_legacy(path)
        allowed = ARGUMENTS if path.name == FAIRSEQ else re.compile("$.")
        strangers = {name for name in names if not PLAIN.fullmatch(name)}
        if refused := sorted(name for name in strangers if not allowed.fullmatch(name)):
            raise pickle.UnpicklingError(f"it names {refused[0].replace(' ', '.')}")
        stand_ins = [(Inert, name.replace(" ", ".").replace("__builtin__", "builtins")) for name in strangers]
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused, it holds more than plain weights or none at all "
                         f"({first_line(error)})") from None
    except Exception as error:  # a damaged pickle may fail in any way
        raise ValueError(f"{path}: damaged ({first_line(error) or type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no weights by name, but {type(content).__name__}")
    return content


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def names_in_zip(path: Path) -> set[str]:
    """Returns the names in a file of torch 1.6 or later, a zip in which nothing is compressed."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                raise pickle.UnpicklingError(f"{entry.filename} would unpack to {entry.file_size:,} bytes")
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return {name for entry in pickles for name in names_in_pickle(io.BytesIO(archive.read(entry)))}


def names_in_legacy(path: Path) -> set[str]:
    """Returns the names in a file of an earlier torch: five pickles, then the storages."""
    with open(path, "rb") as file:
        return {name for _ in range(5) for name in names_in_pickle(file)}


def names_in_pickle(file: BinaryIO) -> set[str]:
    """Returns the classes and functions a pickle names, as "module name". Nothing is executed.

    Only torch's own form of naming is let through, by an opcode that holds the name itself.
    """
    names = set()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            names.add(argument)
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise pickle.UnpicklingError(f"it names something by {opcode.name}")
    return names


def from_fairseq(content: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the entries of a config.json and the weights under Hugging Face's keys.

    Shapes are taken from the weights. Older files keep the arguments in a Namespace, `args`, newer ones in
    `cfg`, whose `model` has what concerns us.
    """
    state, arguments = content.get("model"), plain(content.get("args")) or plain(content.get("cfg"))
    if not isinstance(state, dict) or not isinstance(arguments, dict):
        raise ValueError(f"{path}: not fairseq's, it needs `model` and `args` or `cfg`")
    arguments = plain(arguments.get("model")) if isinstance(plain(arguments.get("model")), dict) else arguments
    check_tensors(state, [path])
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        if IGNORED.fullmatch(key):
            continue
        # The first releases called the encoder decoder, and had q, k and v in one matrix.
        key = re.sub(r"^decoder\.", "encoder.", key).replace(".emb_layer_norm.", ".layernorm_embedding.")
        if match := re.fullmatch(r"(.*\.self_attn\.)in_proj_(weight|bias)", key):
            parts = zip("qkv", value.chunk(3))
            weights |= {to_hugging_face_key(f"{match[1]}{x}_proj.{match[2]}"): part for x, part in parts}
        else:
            weights[to_hugging_face_key(key)] = value
    for name, needed in (("activation_fn", "gelu"), ("pooler_activation_fn", "tanh")):
        if arguments.get(name, needed) != needed:
            raise ValueError(f"{path}: {name} {arguments[name]!r} is not built, only {needed!r}")
    try:
        layers = [int(match[1]) for key in weights if (match := re.match(r"roberta\.encoder\.layer\.(\d+)\.", key))]
        intermediate = weights["roberta.encoder.layer.0.intermediate.dense.weight"]
        entries = {"vocab_size": len(weights[WORDS]), "hidden_size": weights[WORDS].shape[1],
                   "num_hidden_layers": max(layers) + 1, "intermediate_size": len(intermediate),
                   "max_position_embeddings": len(weights[POSITIONS]),
                   "type_vocab_size": len(weights.get(TOKEN_TYPES, "1"))}
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: the weights lack {error}") from None
    large = str(arguments.get("arch")).startswith("roberta_large")
    entries |= {"num_attention_heads": arguments.get("encoder_attention_heads", 16 if large else 12),
                "hidden_dropout_prob": arguments.get("dropout", 0.1),
                "attention_probs_dropout_prob": arguments.get("attention_dropout", 0.1),
                "classifier_dropout": arguments.get("pooler_dropout", 0.0),
                "model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}
    return entries, weights


def plain(value: Any) -> Any:
    """Returns what an `Inert` of fairseq's arguments holds: a dict of a container, the value of a leaf."""
    if isinstance(value, Inert):
        held = vars(value)
        value = held.get("_content", held.get("_val", held))
    return value


def to_hugging_face_key(key: str) -> str:
    for theirs, fairseqs in reversed(FAIRSEQ_KEYS.items()):
        key = key.replace(fairseqs, theirs)
    return "lm_head.decoder.weight" if key == "lm_head.weight" else key


def use_head(weights: dict[str, Tensor], name: str | None, model: type, source: object) -> dict[str, Tensor]:
    """Returns the weights with one of fairseq's named classification heads as that of `model`."""
    names = sorted({key.split(".")[1] for key in weights if key.startswith("classification_heads.")})
    if name is None and not names:
        return weights
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        raise ValueError(f"{source}: which classification head? head={name!r} was asked for, it has {names}")
    choice = model is RobertaForMultipleChoice  # there dense and tanh are called pooler
    places = {f"classification_heads.{name}.dense.": "roberta.pooler.dense." if choice else "classifier.dense.",
              f"classification_heads.{name}.out_proj.": "classifier." if choice else "classifier.out_proj."}
    for old, new in places.items():
        weights = {key.replace(old, new): value for key, value in weights.items()}
    return weights


def make_config(entries: dict[str, Any], weights: dict[str, Tensor], changes: dict[str, Any],
                source: object) -> RobertaConfig:
    """Returns the config of a saved model; entries that are no fields do not change what is computed."""
    for name, needed in (("model_type", "roberta"), ("position_embedding_type", "absolute"),
                         ("is_decoder", False), ("add_cross_attention", False)):
        if entries.get(name, needed if name != "model_type" else None) != needed:
            raise ValueError(f"{source}: {name} {entries.get(name)!r} in config.json; only {needed!r} opens here")
    entries = entries | changes
    if "num_labels" in changes and "id2label" not in changes:
        entries.pop("id2label", None)
    head = weights.get("classifier.out_proj.weight")
    if head is not None and not {"num_labels", "id2label"} & entries.keys():
        entries["num_labels"] = len(head)
    if is_untied(weights):  # then it is, whatever config.json says; Hugging Face's classes see it so too
        entries["tie_word_embeddings"] = False
    known = {f.name for f in fields(RobertaConfig)}
    try:
        config = RobertaConfig(**{key: value for key, value in entries.items() if key in known})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if (layers := count_layers(weights)) != config.num_hidden_layers:
        raise ValueError(f"{source}: config.json says num_hidden_layers {config.num_hidden_layers}, the weights "
                         f"have {layers}")
    return config


def count_layers(weights: dict[str, Tensor]) -> int:
    found = (re.match(r"(roberta\.)?encoder\.layer\.(\d+)\.", key) for key in weights)
    return max((int(match[2]) + 1 for match in found if match), default=0)


def read_config(directory: str | Path, **changes: Any) -> RobertaConfig:
    """Returns the config of a saved model, of whatever origin."""
    directory = find_model(directory)
    return make_config(*read_model(directory), changes, directory)


# ----------------------------------------------------------------------------------------------------------
# Command line: fill masks, export
# ----------------------------------------------------------------------------------------------------------


def open_model(directory: str | Path, head: str | None = None) -> RobertaModelBase:
    """Returns the model in a directory as the class that its weights are for.

    head: have this one of fairseq's classification heads, and no other.
    """
    entries, weights = read_model(find_model(directory))
    if head is not None or "classifier.out_proj.weight" in weights:
        kind = RobertaForSequenceClassification
    elif "nsp_head.weight" in weights:
        kind = RobertaForPreTraining
    elif "lm_head.dense.weight" in weights:
        kind = RobertaForMaskedLM
    elif "qa_outputs.weight" in weights:
        kind = RobertaForQuestionAnswering
    elif "classifier.weight" in weights and "roberta.pooler.dense.weight" in weights:
        kind = RobertaForMultipleChoice
    else:
        kind = RobertaModel
    return kind.from_pretrained(directory, head=head)


def export(directory: str | Path, out: str | Path, form: str, head: str | None = None) -> None:
    """Writes a saved model, of whatever origin, as Hugging Face's ("hf") or fairseq's classes open it.

    Raises: ValueError where there is no model or tokenizer, where `out` is no new or empty directory, or
    where fairseq has no place for what the model has.
    """
    from data import Tokenizer

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something already; choose another directory")
    model, tokenizer = open_model(directory, head), Tokenizer.from_pretrained(find_model(directory))
    if form == "hf":
        model.save_pretrained(out, tokenizer)
        return
    content = {"args": Namespace(**to_fairseq_arguments(model.config)), "model": to_fairseq(model)}
    out.mkdir(parents=True, exist_ok=True)
    torch.save(content, out / FAIRSEQ)
    tokenizer.save_fairseq(out)


def to_fairseq(model: RobertaModelBase) -> dict[str, Tensor]:
    """Returns a model's weights under fairseq's keys."""
    config, weights = model.config, model.to_hugging_face()
    if config.type_vocab_size > 1 or config.layer_norm_eps != 1e-5 or config.pad_token_id != 1:
        raise ValueError(f"fairseq's RoBERTa has one token type, layer_norm_eps 1e-05 and padding id 1; this model "
                         f"{config.type_vocab_size}, {config.layer_norm_eps} and {config.pad_token_id}")
    name = "classification_heads.sentence_classification_head."
    heads = {"classifier.dense.": name + "dense.", "classifier.out_proj.": name + "out_proj.",
             "roberta.pooler.dense.": name + "dense.", "classifier.": name + "out_proj."}
    del weights[TOKEN_TYPES]
    weights.pop("lm_head.decoder.bias", None)
    renamed = {}
    for key, value in weights.items():
        if key.startswith(("qa_outputs.", "answerable.", "nsp_head.")):
            raise ValueError(f"fairseq's RoBERTa has no place for {key}")
        for old, new in (FAIRSEQ_KEYS | heads).items():
            key = key.replace(old, new, 1) if key.startswith(old) or not old.startswith(("roberta.", "lm_", "cl")) else key
        renamed[key] = value
    return renamed


def to_fairseq_arguments(config: RobertaConfig) -> dict[str, Any]:
    return {}


def main() -> None:
    """Prints the five most probable fillings of a text's masks, or exports a model."""
    arguments = sys.argv[1:]
    exporting = arguments[:1] == ["export"]
    if exporting:
        parser = argparse.ArgumentParser(prog="roberta.py export", description="Write a model for other programs.")
        parser.add_argument("model", metavar="DIR", help="run directory, or a saved model of any origin")
        parser.add_argument("out", metavar="OUT", help="new directory to write")
        parser.add_argument("--format", choices=("hf", "fairseq"), default="hf", help="(default: hf)")
        parser.add_argument("--head", metavar="NAME", help="one of fairseq's classification heads, instead of "
                            "the LM head")
        options = parser.parse_args(arguments[1:])
    else:
        parser = argparse.ArgumentParser(prog="roberta.py", description="Fill the <mask> in a text.",
                                         epilog="python roberta.py export --help: write a model for others")
        parser.add_argument("model", metavar="DIR", help="run directory of train.py, or a saved model")
        parser.add_argument("text", help='for example "Returns a new array of given <mask> and type."')
        parser.add_argument("--top-k", type=int, default=5, metavar="N", help="fillings to print (default: 5)")
        options = parser.parse_args(arguments)
    try:
        if exporting:
            export(options.model, options.out, options.format, options.head)
        else:
            print_fillings(options.model, options.text, options.top_k)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def print_fillings(directory: str, text: str, top_k: int) -> None:
    from data import Tokenizer  # here alone the model meets text: as a module this file needs only torch

    model = RobertaForMaskedLM.from_pretrained(directory)
    filled = model.fill_mask(text, Tokenizer.from_pretrained(find_model(directory)), top_k)
    for number, mask in enumerate(filled if isinstance(filled[0], list) else [filled]):
        if number:
            print()
        for candidate in mask:
            shown = candidate["sequence"].replace("\n", "\\n")
            print(f"{candidate['score']:7.2%}  {candidate['token_str']!r:20} {shown}")


if __name__ == "__main__":
    main()
