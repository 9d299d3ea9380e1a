"""The RoBERTa model (Liu et al. 2019): a Transformer encoder, its head that guesses tokens, its task heads.

    python roberta.py runs/tiny "Returns a new array of given <mask> and type."

The architecture is BERT's (§2); what RoBERTa changed is how it is trained (train.py) and on what (data.py).
Part I follows a token upwards: config, embeddings, attention, block, encoder; then how the weights start, the
head that guesses tokens, and the heads of the tasks of §5. From data.py come `Tokenizer`, which turns text
into ids and back, and `join`, which puts `<s>` before the ids of a text and `</s>` behind them.

Part II is about files: ours, Hugging Face's and those of fairseq, the toolkit of the paper's authors. What
Part I needs of it: `open_model` and `save_model` read and write a model, `check_config` and `check_tokenizer`
refuse what cannot work, `parts_of` tells a text from a pair, `label_names` fills in the names of a task's
labels, and `evaluating` turns dropout off for a while.

`DIFFERS:` tags a departure from the paper, `CHOICE:` what it leaves open. Legend: B micro-batch, T tokens,
M predicted places, C hidden_size, H heads, D head_size = C / H, F intermediate_size (in code, F is
torch.nn.functional), V vocabulary, N candidate answers. Batch first. Masks are bool, True = real token.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from data import BOS, EOS, PAD, Tokenizer, join, read_json, write_atomically

# ----------------------------------------------------------------------------------------------------------
# Part I: what the paper says
# ----------------------------------------------------------------------------------------------------------

# ----------------------------------------------------------------------------------------------------------
# Config: the sizes of Table 9
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RobertaConfig:
    """The shape of a model, by the names of Hugging Face's config.json; the defaults are BASE's (Table 9).

    Table 9 lists the settings of pretraining: here are its sizes and dropout rates, in train.py the rest.
    Nearly all weights are in three places: the token embedding, V x C, and in each block the four matrices
    of attention, C x C, and the two of the feed-forward part, C x F and F x C. For BASE:

    >>> base = RobertaConfig.base()
    >>> base.vocab_size * base.hidden_size
    38603520
    >>> block = 4 * base.hidden_size**2 + 2 * base.hidden_size * base.intermediate_size
    >>> base.num_hidden_layers * block
    84934656
    """

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072  # four times hidden_size, in every published model
    hidden_dropout_prob: float = 0.1  # of the embeddings and of each sub-layer's output
    attention_probs_dropout_prob: float = 0.1  # of the attention weights
    max_position_embeddings: int = 514  # rows of the table: 512 positions and 2 more, see position_ids
    type_vocab_size: int = 1  # 2 for the formats of §4.2 that read two segments
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02  # the standard deviation with which matrices start
    position_scale: float = 1.0  # how many times as wide the position table starts
    pad_token_id: int = PAD  # <pad>
    bos_token_id: int = BOS  # <s>
    eos_token_id: int = EOS  # </s>
    hidden_act: str = "gelu"  # the exact one, with erf; check_config takes no other
    classifier_dropout: float | None = None  # of a classification head; None: hidden_dropout_prob
    num_labels: int | None = None  # of a classification head; 1: it gives a number; None: as id2label, or 2
    id2label: dict[int, str] = field(default_factory=dict)  # their names; empty: LABEL_0, LABEL_1, ...
    answerability: bool = False  # of a question-answering head: SQuAD v2.0's classifier (§3)

    def __post_init__(self) -> None:
        check_config(self)
        # The number of labels and their names say the same thing, so either may be left out.
        names = label_names(self.num_labels, self.id2label)
        object.__setattr__(self, "id2label", names)  # the way in where a dataclass is frozen
        object.__setattr__(self, "num_labels", len(names))

    @property
    def max_tokens(self) -> int:
        """The longest input, `<s>` and `</s>` included: 512 for the published models."""
        # No real token gets a row up to the padding id's, see position_ids.
        return self.max_position_embeddings - self.pad_token_id - 1

    @classmethod
    def tiny(cls, **changes: Any) -> RobertaConfig:
        """A model for a laptop, 0.7M parameters: learns in minutes on two cores."""
        # CHOICE: no dropout, because a few minutes of training see no text often enough to overfit.
        # CHOICE: initializer_range 0.06, because 0.02 suits vectors of 768 numbers, see Initialisation.
        # CHOICE: positions start three times as wide as tokens. What stands next to a mask tells most about
        # it, so the first thing for attention to learn is to find the neighbours, and that by their position.
        # The sooner it can, the sooner the model leaves the plateau near the unigram entropy.
        # CHOICE: a single block, with a narrow feed-forward part: in a few minutes a model gains more from
        # text than from depth, and reads twice as much of it.
        tiny = cls(vocab_size=4096, hidden_size=128, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=256, max_position_embeddings=130, hidden_dropout_prob=0.0,
                   attention_probs_dropout_prob=0.0, initializer_range=0.06, position_scale=3.0)
        return replace(tiny, **changes)

    @classmethod
    def small(cls, **changes: Any) -> RobertaConfig:
        """A model for a laptop's night or a GPU's hour, 7M parameters."""
        # As tiny, but for these: its text, too, is read a few times at most.
        small = cls.tiny(vocab_size=16_384, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
                         intermediate_size=1024, initializer_range=0.04)
        return replace(small, **changes)

    @classmethod
    def base(cls, **changes: Any) -> RobertaConfig:
        """BASE (Table 9), 125M parameters with its LM head."""
        return cls(**changes)

    @classmethod
    def large(cls, **changes: Any) -> RobertaConfig:
        """LARGE (Table 9), 355M parameters with its LM head."""
        # Twice as deep and a third wider. A head stays at 64 numbers; there are more of them.
        large = cls(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        return replace(large, **changes)


# ----------------------------------------------------------------------------------------------------------
# Embeddings: where order enters
# ----------------------------------------------------------------------------------------------------------


def position_ids(input_ids: Tensor, pad_token_id: int) -> Tensor:
    """Returns which row of the position table each token takes, (B, T) -> (B, T).

    Real tokens count upwards from pad_token_id + 1, as in fairseq; padding gets row pad_token_id, which is
    zero. So padding, wherever it stands, moves no real token. As the padding id is 1, row 0 is never used and
    row 1 is padding's: 512 positions need a table of 514 rows. Here "Hello world" (31414, 232) between `<s>`
    (0) and `</s>` (2) is padded (1) behind and in front:

    >>> position_ids(torch.tensor([[0, 31414, 232, 2, 1, 1], [1, 1, 0, 31414, 232, 2]]), pad_token_id=1)
    tensor([[2, 3, 4, 5, 1, 1],
            [1, 1, 2, 3, 4, 5]])
    """
    real = (input_ids != pad_token_id).long()
    # The running sum numbers the real tokens 1, 2, 3, ...; the product puts padding back to 0.
    return real.cumsum(1) * real + pad_token_id


class Embeddings(nn.Module):
    """What enters the encoder: the sum of a token's embedding, its position's and its type's (BERT §3).

    Attention compares every token with every other and does not see where they stand: without positions
    each word of "dog bites man" would come out just as in "man bites dog". So each position has a learned
    vector of its own, which is added to the token's.
    """

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.pad_token_id, self.max_tokens = config.pad_token_id, config.max_tokens
        # Three tables of rows of C numbers, looked up by row number. (`drawn`, defined under Initialisation,
        # draws the weights of a layer of torch's as BERT's are.)
        hidden_size, padding = config.hidden_size, config.pad_token_id
        self.tokens = drawn(nn.Embedding(config.vocab_size, hidden_size, padding), config)
        self.positions = drawn(nn.Embedding(config.max_position_embeddings, hidden_size, padding), config)
        self.positions.weight.data *= config.position_scale
        # BERT pretrains on two segments at once, and the type says which of them a token is from. RoBERTa
        # does not (§4.2), and in a task's pair of texts only `</s></s>` parts the two. So it has one type:
        # the same vector for every token, kept because Hugging Face's files have it, where it is 0. So it
        # begins here.
        self.token_types = drawn(nn.Embedding(config.type_vocab_size, hidden_size), config)
        if config.type_vocab_size == 1:
            nn.init.zeros_(self.token_types.weight)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        # The table of positions has a fixed length: BASE has no vector for a token 513.
        if input_ids.shape[1] > self.max_tokens:
            raise ValueError(f"{input_ids.shape[1]} tokens for {self.max_tokens} positions; shorten the text")
        positions = self.positions(position_ids(input_ids, self.pad_token_id))
        # Unless the caller says otherwise, all tokens are of type 0: one row, added to all.
        types = self.token_types.weight[0] if token_type_ids is None else self.token_types(token_type_ids)
        # A sum, not a concatenation: in 768 dimensions there is room for all three, and learning keeps them
        # apart as far as it needs to.
        embedded = self.tokens(input_ids) + positions + types  # (B, T) -> (B, T, C)
        return self.dropout(self.norm(embedded))


# ----------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, may_attend: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v, the formula that torch's kernel computes in SelfAttention.

    Each token asks for something (its query, a row of q), says what it has to offer (its key, in k), and has
    something to pass on (its value, in v). What a token receives is the average of all values, weighted by
    how well their keys fit its query. If all keys fit alike, that is the plain average; a token that may not
    be attended to counts for nothing, whatever its value:

    >>> v = torch.tensor([[[[1.0], [3.0], [80.0]]]])  # B = H = D = 1, T = 3
    >>> may_attend = torch.tensor([True, True, False])
    >>> attention_by_hand(torch.zeros_like(v), torch.zeros_like(v), v, may_attend).flatten()
    tensor([2., 2., 2.])

    q, k, v and the result: (B, H, T, D). may_attend: bool, True where a query (second-to-last axis) may see a
    key (last axis); of shape (B, H, T, T), or one that broadcasts to it.
    """
    # How well each query fits each key. A sum of D products grows as sqrt(D), and a softmax of large numbers
    # picks a single one and passes on no gradient; hence the division.
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # (B, H, T, D) -> (B, H, T, T)
    # Minus infinity becomes a weight of exactly 0. (-1e9 would too, but it does not fit into fp16.)
    scores = scores.masked_fill(~may_attend, -math.inf)
    weights = scores.softmax(-1)
    return weights @ v  # (B, H, T, T) x (B, H, T, D) -> (B, H, T, D)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, §3.2): each token looks at all real tokens.

    A model that predicts the next token may look only to the left. This one predicts hidden tokens, for which
    the right helps as much: the B of BERT stands for bidirectional. There are several heads because one
    softmax gives one average, and a verb may want to see its subject and its object apart.
    """

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        # The matrices are square: H heads of D = C / H numbers make C numbers together, so that many heads
        # cost no more than one.
        self.q_proj = drawn(nn.Linear(config.hidden_size, config.hidden_size), config)
        self.k_proj = drawn(nn.Linear(config.hidden_size, config.hidden_size), config)
        self.v_proj = drawn(nn.Linear(config.hidden_size, config.hidden_size), config)
        self.out_proj = drawn(nn.Linear(config.hidden_size, config.hidden_size), config)

    def forward(self, hidden: Tensor, may_attend: Tensor) -> Tensor:
        # Queries, keys and values are three products with the same input; one product with the three
        # matrices on top of each other is the same, and keeps the device busier.
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])  # (3C, C)
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        projected = F.linear(hidden, weight, bias)  # (B, T, C) -> (B, T, 3C)

        # Cut into three, and each into H heads of D numbers.
        projected = projected.unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, H, D)
        q, k, v = projected.permute(2, 0, 3, 1, 4)  # three of (B, H, T, D)

        # The kernel is attention_by_hand with dropout on the weights. Where the device can, it never stores
        # the (T, T) weights, which for long inputs would be most of the memory.
        dropout = self.dropout_prob if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend, dropout_p=dropout)

        # The heads side by side again, mixed by a last matrix.
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)


# ----------------------------------------------------------------------------------------------------------
# Block
# ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A Transformer layer: attention moves information between tokens, the feed-forward part works on each.

    These two sub-layers add to their input instead of replacing it, so that a block need only learn what to
    change, and gradients have a shortcut past it. RoBERTa is post-LN, as the first Transformer was: it
    normalises the sum, which keeps vectors of one size in all layers, but puts a LayerNorm on the shortcut.
    At the start of training the gradients near the output are then large and noisy (Xiong et al. 2020), and
    Adam, which divides by their size, makes steps about as long as the rate in every weight, however little
    their direction is worth as long as its averages rest on few of them. Hence the warm-up (Table 9), which
    begins with tiny steps; pre-LN models, which normalise a sub-layer's input instead, can do without one.
    """

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.attention = SelfAttention(config)
        self.attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # C -> F -> C, with a non-linearity (GELU) in between, without which two matrices could do no more
        # than one.
        self.ffn_in = drawn(nn.Linear(config.hidden_size, config.intermediate_size), config)
        self.ffn_out = drawn(nn.Linear(config.intermediate_size, config.hidden_size), config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, may_attend: Tensor) -> Tensor:
        # First the tokens look at each other.
        attended = self.attention(hidden, may_attend)
        hidden = self.attn_norm(hidden + self.dropout(attended))
        # Then each works by itself on what it saw, with two thirds of the block's weights.
        inner = F.gelu(self.ffn_in(hidden))  # (B, T, C) -> (B, T, F)
        return self.ffn_norm(hidden + self.dropout(self.ffn_out(inner)))


# ----------------------------------------------------------------------------------------------------------
# What every model can do: open and save itself, read text
# ----------------------------------------------------------------------------------------------------------

# None of this is from the paper: at a first reading, go on with Encoder.

Text = str | tuple[str, str]  # what a model reads at once: a text or a pair of them
AT_ONCE = 32  # texts that go through the model together; a list of thousands would fill the memory


def one_or_many(method: Callable[..., list]) -> Callable[..., Any]:
    """Lets a method that makes a list of results of a list of texts take one text, too, or thousands.

    One text gives one result, a list gives a list. Meanwhile there is no dropout, and no gradients are kept.
    """
    @functools.wraps(method)
    def in_parts(self: RobertaModelBase, text: Text | list[Text], *options: Any, **named: Any) -> Any:
        texts = text if isinstance(text, list) else [text]
        results = []
        with torch.inference_mode(), evaluating(self):
            for begin in range(0, len(texts), AT_ONCE):
                results += method(self, texts[begin : begin + AT_ONCE], *options, **named)
        return results if isinstance(text, list) else results[0]

    return in_parts


class RobertaModelBase(nn.Module):
    """What all models share: a config, the way from text to ids, and the way to files and back."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(cls, directory: str | Path, **config_changes: Any) -> Self:
        """Returns the model in a directory of ours, of Hugging Face's or of fairseq's, in eval mode.

        A run directory without a model of its own stands for its newest checkpoint. Changes replace entries
        of the config: dropout, num_labels, and so on. A head that the files lack, or have for another number
        of labels, is drawn at random, and a line on stderr says so. Nothing in the files is executed.
        Raises: ValueError where there is no model, or a weight is missing or misshapen.
        """
        return open_model(directory, cls, **config_changes)

    def save_pretrained(self, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Writes model.safetensors, config.json and the tokenizer's files, for Hugging Face's classes too."""
        save_model(self, Path(directory), tokenizer)

    def num_parameters(self) -> int:
        """Returns the number of weights, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def encode(self, text: Text | list[Text] | Tensor, tokenizer: Tokenizer | None) -> Tensor:
        """Returns the ids, (1, T), of a text, `<s> A </s>`, or of a pair of them, `<s> A </s></s> B </s>`.

        A pair is a tuple. A list is a batch of texts or pairs, never a pair: (B, T), padded behind. Ids stay
        as they are, (B, T). Raises: ValueError where a text comes without a tokenizer, or with one that has
        more units than the model.
        """
        if not isinstance(text, Tensor):
            check_tokenizer(tokenizer, self.config)
            # join adds `<s>` and `</s>`: in training the model has never read a text without them.
            texts = text if isinstance(text, list) else [text]
            text = self.padded([join(*map(tokenizer.encode_to_numpy, parts_of(one))) for one in texts])
        # To where the weights are, the CPU or an accelerator.
        return torch.atleast_2d(text).to(next(self.parameters()).device)

    def padded(self, rows: list[np.ndarray]) -> Tensor:
        """Returns rows of ids as one tensor, (B, T), short ones filled up with padding."""
        tensors = [torch.from_numpy(row) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=self.config.pad_token_id)

    @torch.inference_mode()
    def extract_features(self, text: Text | list[Text] | Tensor, tokenizer: Tokenizer | None = None,
                         return_all_hiddens: bool = False) -> Tensor | list[Tensor]:
        """Returns the encoder's hidden states for a text or a pair, (1, T, C), or a list of them, (B, T, C).

        Ids (B, T) may be given, too. The vectors of `<s>` and `</s>` are among them; behind `</s>` a list's
        shorter texts are padded, and what stands there means nothing. return_all_hiddens: the states of the
        embeddings and of every block, as a list. No dropout, no gradients.
        """
        # In a model with a head the encoder is a part of it; by itself it is the model.
        encoder = getattr(self, "roberta", self)
        with evaluating(encoder):
            batches = self.encode(text, tokenizer).split(AT_ONCE)
            parts = [encoder(input_ids, all_hiddens=return_all_hiddens) for input_ids in batches]
        # The batches below one another again: of each layer, or of the last.
        return [torch.cat(layer) for layer in zip(*parts)] if return_all_hiddens else torch.cat(parts)


# ----------------------------------------------------------------------------------------------------------
# Encoder
# ----------------------------------------------------------------------------------------------------------


class RobertaModel(RobertaModelBase):
    """The encoder: a vector for each token, made from the whole text around it."""

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        # The blocks are alike in shape, but each has weights of its own.
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None, all_hiddens: bool = False) -> Tensor | list[Tensor]:
        """Returns the last hidden states, (B, T, C); all_hiddens: a list, the embeddings' and each block's.

        input_ids: (B, T). attention_mask: (B, T), true at real tokens; None: wherever the id is not padding.
        What comes out at padding is meaningless, but finite, even in a row of nothing but padding.
        Raises: ValueError for inputs longer than the positions.
        """
        real = input_ids != self.config.pad_token_id if attention_mask is None else attention_mask.bool()
        # Only padding is shut out. Where a row holds several documents (FULL-SENTENCES, §4.2), their tokens
        # see each other, with no more than a separator in between.

        # A micro-batch that got no sequence is one row of nothing but padding (data.py, `assemble`). A
        # softmax over no key at all is 0/0, and one such row turns every gradient into NaN. So a row like
        # that may look at all of its padding; nobody reads the result.
        may_attend = real | ~real.any(1, keepdim=True)
        may_attend = may_attend[:, None, None, :]  # (B, T) -> (B, 1, 1, T): any head, any query, these keys

        # Each block reads the vectors that the one below has made. Only the newest are kept, unless all are
        # asked for.
        hiddens = [self.embeddings(input_ids, token_type_ids)]
        for block in self.blocks:
            hidden = block(hiddens[-1], may_attend)
            hiddens = [*hiddens, hidden] if all_hiddens else [hidden]
        return hiddens if all_hiddens else hiddens[-1]


# ----------------------------------------------------------------------------------------------------------
# Initialisation
# ----------------------------------------------------------------------------------------------------------

# Matrices start as draws from N(0, initializer_range), biases at 0, LayerNorms as the identity (BERT's code).
# A matrix of deviation s changes the size of a vector of C numbers by the factor s * sqrt(C), which is 0.55
# for 0.02 and 768. That is small enough: the first scores differ by about as much (see LMHead), so the first
# guess is nearly uniform and the first loss little above ln V. With 128 numbers the factor would be 0.23, too
# small: what a block adds would be lost beside what it is added to, and the model would take a thousand steps
# to learn more than how common each token is. Hence tiny's 0.06, which makes it 0.68, and small's 0.04.


def drawn(module: nn.Module, config: RobertaConfig) -> nn.Module:
    """Returns a layer of torch's, or a head, with weights drawn as BERT's are, in place of those it has."""
    for name, weight in module.named_parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=config.initializer_range)
        else:
            # What is no matrix is a bias, which is added, or a LayerNorm's weight, by which it multiplies.
            nn.init.constant_(weight, 0.0 if name.endswith("bias") else 1.0)
    # The padding id's row starts at 0. Looking it up gives it no gradient; in the token table it gets one all
    # the same, from the tied LM head.
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx])  # the row is a view: this changes the table
    return module


# ----------------------------------------------------------------------------------------------------------
# LM head and fill_mask: which token was it?
# ----------------------------------------------------------------------------------------------------------


class LMHead(nn.Module):
    """Turns a vector into a score for each token of the vocabulary.

    The scores are products with the embedding of each token, the matrix with which the encoder begins, so
    that reading and guessing share what they know of a token. Tying saves V x C weights, a third of BASE.
    """

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.dense = drawn(nn.Linear(config.hidden_size, config.hidden_size), config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # How common each token is, whatever the context: the first thing that a model learns.
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, token_embedding: Tensor, predicted: Tensor | None) -> Tensor:
        # The loss asks for 15 % of the tokens (§2), and a token's scores cost V x C products: for BASE as
        # much as five of its twelve blocks, for a small model more than all of them. The head at every token
        # would spend most of that, and B x T x V numbers of memory, on scores that nobody looks at.
        if predicted is not None:
            hidden = hidden.flatten(0, 1).index_select(0, predicted)  # (B, T, C) -> (M, C)
        # A layer in between: what the last block gives is not yet fit to be compared with embeddings.
        hidden = self.layer_norm(F.gelu(self.dense(hidden)))
        # A GPU multiplies matrices in tiles, and is much slower where their sides are no multiples of 8, as
        # 50,265 is not; multiples of 64 suit it best. Here rows of zeros fill up the embeddings, and their
        # scores go again.
        return padded_linear(hidden, token_embedding, self.bias, 64 if hidden.is_cuda else 1)


def padded_linear(hidden: Tensor, weight: Tensor, bias: Tensor, multiple: int) -> Tensor:
    """Returns hidden @ weight.T + bias, (..., C) -> (..., V), computed with V rounded up to a multiple."""
    size, lacking = len(bias), -len(bias) % multiple
    if lacking == 0:  # slicing off nothing would still copy the gradient
        return F.linear(hidden, weight, bias)
    weight, bias = F.pad(weight, (0, 0, 0, lacking)), F.pad(bias, (0, lacking))
    return F.linear(hidden, weight, bias)[..., :size]


class RobertaForMaskedLM(RobertaModelBase):
    """The model that is pretrained (§2): the encoder, and the head that says which token was hidden."""

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.roberta = RobertaModel(config)
        self.lm_head = LMHead(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None, predicted: Tensor | None = None) -> Tensor:
        """Returns logits, (B, T, V), or where `predicted` is given only those there, (M, V).

        predicted: (M,) indices b * T + t of the places that are predicted.
        """
        return self.scores(self.roberta(input_ids, attention_mask, token_type_ids), predicted)

    def scores(self, hidden: Tensor, predicted: Tensor | None) -> Tensor:
        """Returns the LM head's logits for the encoder's hidden states."""
        return self.lm_head(hidden, self.roberta.embeddings.tokens.weight, predicted)

    @one_or_many
    def fill_mask(self, text: str | list[str], tokenizer: Tokenizer, top_k: int = 5) -> list:
        """Returns the `top_k` most probable tokens for the `<mask>` in a text, best first; of a list, a list.

        Each is a dict like those of Hugging Face's pipeline: score (a probability), token (its id),
        token_str, and sequence (the text with it filled in). With several masks: a list of such lists, each
        mask filled independently of the others.
        Raises: ValueError where a text has no `<mask>` or is longer than the positions.
        """
        check_tokenizer(tokenizer, self.config)
        if top_k < 1:
            raise ValueError(f"top_k {top_k} must be at least 1")

        # "It is <mask>." becomes "It is", " <mask>" and ".": pieces 1, 3, 5, ... are masks. A mask takes the
        # space before it along, because a token includes the space before it (" Paris"): the model will say
        # whether there is one.
        texts, rows = [], []
        for one in text:  # in here always a list, see one_or_many
            if not isinstance(one, str) or "<mask>" not in one:
                raise ValueError(f'not a text with <mask>, such as "Paris is in <mask>.": {one!r:.200}')
            pieces, ids = re.split(r"(\s*<mask>)", one), []
            for i, piece in enumerate(pieces):
                ids += [tokenizer.mask_id] if i % 2 else tokenizer.encode(piece)
            texts.append(pieces)
            rows.append(join(ids))  # `<s> ids </s>`
        input_ids = self.encode(self.padded(rows), tokenizer)  # (B, T), where the weights are

        # A softmax turns the scores at each mask into probabilities. A model's vocabulary may have been
        # padded with rows that are no tokens: they have a share in the softmax, but are not offered.
        predicted = (input_ids.flatten() == tokenizer.mask_id).nonzero()[:, 0]  # (M,)
        logits = self.scores(self.extract_features(input_ids), predicted)  # (M, V)
        probabilities = logits.float().softmax(-1)
        best, best_ids = probabilities[:, : tokenizer.vocab_size].topk(min(top_k, tokenizer.vocab_size))

        # The masks come as they stand in the texts. In each, the piece that was the mask gives way to the
        # candidate's text.
        found, results = zip(best.tolist(), best_ids.tolist()), []
        for pieces in texts:
            masks = [filled(pieces, place, *next(found), tokenizer) for place in range(1, len(pieces), 2)]
            results.append(masks[0] if len(masks) == 1 else masks)
        return results


def filled(pieces: list[str], place: int, scores: list[float], ids: list[int], tokenizer: Tokenizer) -> list:
    """Returns what fill_mask says of a text, in pieces, of which the one at `place` is a mask."""
    candidates = []
    for score, token in zip(scores, ids):
        name = tokenizer.decode([token])
        sequence = "".join([*pieces[:place], name, *pieces[place + 1 :]])
        candidates.append({"score": score, "token": token, "token_str": name, "sequence": sequence})
    return candidates


# ----------------------------------------------------------------------------------------------------------
# Task heads (§5): a few weights on top of the encoder
# ----------------------------------------------------------------------------------------------------------

# A head is a module that turns the encoder's vectors into scores. A task keeps the encoder and replaces the
# LM head by a small one of its own, at most one C x C matrix and a vector for each label: what the task needs
# to know of the language is in the encoder already. `<s>` stands for the whole text, because it sees all
# tokens and is no word itself.


class ClassificationHead(nn.Module):
    """A score for each label, from the vector of `<s>`: dense, tanh, and a row of weights per label."""

    def __init__(self, config: RobertaConfig, num_labels: int):
        super().__init__()
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.dense = drawn(nn.Linear(config.hidden_size, config.hidden_size), config)
        self.out_proj = drawn(nn.Linear(config.hidden_size, num_labels), config)

    def forward(self, hidden: Tensor) -> Tensor:
        # A layer turns what was good for guessing tokens into what the task is about.
        first = self.dropout(hidden[:, 0])  # (B, T, C) -> (B, C)
        inner = torch.tanh(self.dense(first))
        return self.out_proj(self.dropout(inner))  # (B, C) -> (B, num_labels)


class RobertaForSequenceClassification(RobertaModelBase):
    """A label, or with num_labels 1 a number, for a text or a pair of texts (§5.1, GLUE)."""

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.roberta = RobertaModel(config)
        self.classifier = ClassificationHead(config, config.num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns logits, (B, num_labels)."""
        return self.classifier(self.roberta(input_ids, attention_mask))

    @one_or_many
    def classify(self, text: Text | list[Text], tokenizer: Tokenizer) -> Any:
        """Returns the probability of each label by its name, {"negative": 0.1, "positive": 0.9}.

        With num_labels 1: {"score": number}. text: a text, a pair as a tuple, or a list of them, which gives
        a list. Raises: ValueError where a text is longer than the positions.
        """
        logits = self(self.encode(text, tokenizer))
        # A single label is a number, such as a similarity, and no probability.
        if self.config.num_labels == 1:
            return [{"score": score} for score in logits[:, 0].tolist()]
        names = self.config.id2label.values()
        return [dict(zip(names, probabilities)) for probabilities in logits.softmax(-1).tolist()]


class RobertaForMultipleChoice(RobertaModelBase):
    """A score for each of N answers, each read with the question and the passage (§5.3, RACE)."""

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.roberta = RobertaModel(config)
        self.choice = ClassificationHead(config, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns scores, (B, N), whose softmax picks the answer; the inputs are (B, N, T) each."""
        # The answers do not see each other: the encoder reads B * N texts, and only the softmax compares.
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        hidden = self.roberta(input_ids.flatten(0, 1), mask)  # (B, N, T) -> (B * N, T, C)
        scores = self.choice(hidden).view(input_ids.shape[:2])  # (B * N, 1) -> (B, N)
        # A question with fewer answers than others of its batch has nothing but padding in their place.
        return scores.masked_fill(input_ids[:, :, 0] == self.config.pad_token_id, -math.inf)


class RobertaForQuestionAnswering(RobertaModelBase):
    """Where in the passage the answer begins and ends (§5.2, SQuAD); for v2.0 whether there is one (§3)."""

    def __init__(self, config: RobertaConfig):
        # Start and end: in Hugging Face's config.json these are two labels.
        super().__init__(replace(config, num_labels=2, id2label={}))
        self.roberta = RobertaModel(config)
        self.qa_outputs = drawn(nn.Linear(config.hidden_size, 2), config)
        self.answerable = drawn(nn.Linear(config.hidden_size, 1), config) if config.answerability else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Returns logits of start and end, (B, T) each; with `answerability` also of "answerable", (B,)."""
        hidden = self.roberta(input_ids, attention_mask)
        # Not from `<s>` alone: any token may be the first or the last of the answer.
        start, end = self.qa_outputs(hidden).unbind(-1)  # (B, T, 2) -> two of (B, T)
        if self.answerable is None:
            return start, end
        # Whether there is an answer at all is a question about the whole text.
        return start, end, self.answerable(hidden[:, 0]).squeeze(1)  # (B, 1) -> (B,)

    @one_or_many
    def answer(self, text: tuple[str, str] | list[tuple[str, str]], tokenizer: Tokenizer) -> Any:
        """Returns what a passage answers to a question, {"answer": text, "score": its probability}.

        With `answerability` also "answerable", the probability that there is an answer in it. text: a tuple
        (question, passage), or a list of such, which gives a list.
        Raises: ValueError where a passage is empty, or the pair is longer than the positions.
        """
        for pair in text:
            if len(parts_of(pair)) != 2 or not pair[1].strip():
                raise ValueError(f"needs a question and a passage that is not empty; got {pair!r:.200}")
        starts, ends, *answerable = self(self.encode(text, tokenizer))  # (B, T) each

        results = []
        for i, (question, passage) in enumerate(text):
            # The passage stands behind `<s>`, the question and two `</s>`.
            ids, characters = tokenizer.encode_with_offsets(passage)
            begin = len(tokenizer.encode(question)) + 3
            start, end = (logits[i, begin : begin + len(ids)].softmax(0) for logits in (starts, ends))
            # The product for each start and each end, where the end is neither before the start nor far
            # behind.
            scores = (start[:, None] * end).triu().tril(30)  # (T,), (T,) -> (T, T)
            first, last = divmod(int(scores.argmax()), len(ids))
            answer = passage[characters[first][0] : characters[last][1]].strip()
            results.append({"answer": answer, "score": scores.max().item()})
            if answerable:
                results[-1]["answerable"] = answerable[0][i].sigmoid().item()
        return results


class RobertaForPreTraining(RobertaForMaskedLM):
    """BERT's pretraining model: masked LM and next-sentence prediction (NSP), for the comparison of §4.2.

    NSP is a yes-or-no question, read off `<s>`: does the second part of the input follow the first in its
    document, or is it from another one (§2)? RoBERTa drops it.
    """

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        # DIFFERS: BERT's NSP head is this one without its dropout.
        self.nsp_head = ClassificationHead(config, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None, predicted: Tensor | None = None) -> tuple[Tensor, ...]:
        """Returns the logits of RobertaForMaskedLM and NSP's, (B, 2): label 0 = the second part follows."""
        # One pass through the encoder answers both questions.
        hidden = self.roberta(input_ids, attention_mask, token_type_ids)
        return self.scores(hidden, predicted), self.nsp_head(hidden)


# ----------------------------------------------------------------------------------------------------------
# Part II: the machinery
# ----------------------------------------------------------------------------------------------------------


def check_config(config: RobertaConfig) -> None:
    """Raises ValueError where a config describes no model: most come from files that others wrote."""
    for f in fields(config):
        value = getattr(config, f.name)
        # An id may be 0, a size may not. The upper limit keeps a typing error from filling the memory.
        low, high = (0, config.vocab_size) if f.name.endswith("_id") else (1, 1 << 24)
        valid = value is None or (type(value) is int and low <= value < high)
        if f.type.startswith("int") and not valid:  # types are text here
            raise ValueError(f"{f.name} {value!r} must be a whole number from {low} to {high - 1}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"{config.num_attention_heads} heads do not divide hidden_size {config.hidden_size}")
    if config.hidden_act != "gelu":
        raise ValueError(f"hidden_act {config.hidden_act!r} is not RoBERTa's; only 'gelu' (exact) is built")


def label_names(count: int | None, names: dict) -> dict[int, str]:
    """Returns a name for each label, of what a config says of their number and their names."""
    names = {int(i): str(name) for i, name in names.items()}  # the keys of JSON are strings
    count = count or len(names) or 2
    # Names that only number the labels are no obstacle to another number of them.
    if all(name == f"LABEL_{i}" for i, name in names.items()):
        names = {i: f"LABEL_{i}" for i in range(count)}
    if sorted(names) != list(range(count)):
        raise ValueError(f"num_labels {count}, but id2label names {len(names)}: {names}")
    return {i: names[i] for i in range(count)}  # a file may have 10 before 2


def check_tokenizer(tokenizer: Tokenizer | None, config: RobertaConfig) -> None:
    """Raises ValueError without a tokenizer, or where it could give ids for which there is no embedding."""
    if tokenizer is None:
        raise ValueError("a text needs a tokenizer: give one, or the text as ids")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"use the model's own tokenizer: {tokenizer.vocab_size} units > {config.vocab_size}")


def parts_of(text: Text) -> tuple[str, ...]:
    """Returns a text, or the two of a pair, as a tuple. Raises: ValueError where it is neither."""
    parts = text if isinstance(text, tuple) else (text,)
    if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"give a text, a pair as a tuple of two, or a list of these, not {text!r:.200}")
    return parts


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


@contextlib.contextmanager
def opening(path: str | Path) -> Iterator[None]:
    """Turns whatever a damaged file raises, or one made to do harm, into one line that names it."""
    try:
        yield
    except Exception as error:  # of what kind cannot be foreseen
        reason = " ".join(str(error).split()).partition(". ")[0]  # torch goes on to advise trust
        raise ValueError(f"{path}: cannot be opened ({type(error).__name__}: {reason:.300})") from None


# ----------------------------------------------------------------------------------------------------------
# Names of weights
# ----------------------------------------------------------------------------------------------------------

# What is roberta.blocks.0.ffn_in.weight here is roberta.encoder.layer.0.intermediate.dense.weight for
# Hugging Face and encoder.sentence_encoder.layers.0.fc1.weight for fairseq. Parts of names are replaced, one
# row after the other. The trap: ".output.dense." ends ".attention.output.dense.", which must come first.
# The columns: ours, Hugging Face's, and fairseq's, which has no head for multiple choice.
NAMES = [("embeddings.tokens.", "embeddings.word_embeddings.", "embed_tokens."),
         ("embeddings.positions.", "embeddings.position_embeddings.", "embed_positions."),
         ("embeddings.token_types.", "embeddings.token_type_embeddings.", "segment_embeddings."),
         ("embeddings.norm.", "embeddings.LayerNorm.", "layernorm_embedding."),
         ("blocks.", "encoder.layer.", "layers."),
         (".attention.q_proj.", ".attention.self.query.", ".self_attn.q_proj."),
         (".attention.k_proj.", ".attention.self.key.", ".self_attn.k_proj."),
         (".attention.v_proj.", ".attention.self.value.", ".self_attn.v_proj."),
         (".attention.out_proj.", ".attention.output.dense.", ".self_attn.out_proj."),
         (".attn_norm.", ".attention.output.LayerNorm.", ".self_attn_layer_norm."),
         (".ffn_in.", ".intermediate.dense.", ".fc1."),
         (".ffn_out.", ".output.dense.", ".fc2."),
         (".ffn_norm.", ".output.LayerNorm.", ".final_layer_norm."),
         ("choice.dense.", "roberta.pooler.dense.", "choice.dense."),
         ("choice.out_proj.weight", "classifier.weight", "choice.out_proj.weight"),
         ("choice.out_proj.bias", "classifier.bias", "choice.out_proj.bias")]
TO_HUGGING_FACE = [(ours, theirs) for ours, theirs, _ in NAMES]
# The LM head's bias goes by two names in their files.
FROM_HUGGING_FACE = [("lm_head.decoder.bias", "lm_head.bias"), *[(theirs, ours) for ours, theirs, _ in NAMES]]
# To Hugging Face's names. fairseq's first releases called the encoder decoder, and a norm otherwise.
FROM_FAIRSEQ = [("decoder.", "encoder."), ("encoder.sentence_encoder.", "roberta."),
                ("encoder.lm_head.", "lm_head."), ("emb_layer_norm.", "layernorm_embedding."),
                *[(fairseqs, theirs) for _, theirs, fairseqs in NAMES]]


def rename(weights: dict[str, Tensor], table: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Returns the weights under other keys: each (old, new) of a table is replaced, in its order.

    >>> list(rename({"roberta.blocks.7.ffn_in.bias": None}, TO_HUGGING_FACE))
    ['roberta.encoder.layer.7.intermediate.dense.bias']
    """
    renamed = {}
    for key, value in weights.items():
        for old, new in table:
            key = key.replace(old, new)
        renamed[key] = value
    return renamed


# ----------------------------------------------------------------------------------------------------------
# safetensors: weights in a file
# ----------------------------------------------------------------------------------------------------------

# Eight bytes say how long the header is. The header, which is JSON, says of each tensor its type, its shape,
# and where its bytes begin and end; then come the bytes. Unlike a pickle it can hold nothing but numbers.
MODEL_FILE = "model.safetensors"
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor on the CPU, to be read or written."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors by name; the same ones give the same bytes. At any moment `path` is old or whole."""
    # Larger types first: then each tensor begins at a multiple of its type's size, as readers like it.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    names = {dtype: name for name, dtype in TYPES.items()}
    # Hugging Face's classes open no file that does not say whose tensors these are: PyTorch's.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in ordered:
        begin, end = end, end + value.nbytes
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    arrays = [bytes_of(value.cpu().contiguous()) for _, value in ordered]
    write_atomically(Path(path), len(text).to_bytes(8, "little"), text, *arrays)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Returns the tensors in a file by name. Raises: ValueError naming the file where it is damaged."""
    tensors = {}
    with opening(path), open(path, "rb") as file:
        size = Path(path).stat().st_size
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, size)))  # a damaged length must not fill the memory
        header.pop("__metadata__", None)
        # The tensors follow one another without a gap, up to the end of the file.
        position = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], TYPES[entry["dtype"]]
            if begin != position or end - begin != math.prod(shape) * dtype.itemsize or end > size:
                raise ValueError(f"{name} is not where its shape {shape} asks for")
            tensors[name] = torch.empty(shape, dtype=dtype)
            file.readinto(bytes_of(tensors[name]))
            position = end
        if 8 + length + position != size:
            raise ValueError(f"{size:,} bytes, but by its header {8 + length + position:,}")
    return tensors


# ----------------------------------------------------------------------------------------------------------
# Reading files, of whoever's
# ----------------------------------------------------------------------------------------------------------

# In order of preference: Hugging Face's, where a large model has several, then fairseq's. (An index that lies
# beside several is not needed: if one of them is missing, so are its weights, and that is an error anyhow.)
WEIGHT_FILES = (MODEL_FILE, "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin", "model.pt")
# What Hugging Face's RobertaConfig takes where config.json is silent, and ours does not.
HUGGING_FACE_DEFAULTS = {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "max_position_embeddings": 512}
# What its models can also be, and ours cannot.
NEEDED = {"model_type": "roberta", "position_embedding_type": "absolute", "is_decoder": False,
          "tie_word_embeddings": True}
# Never read: the embedding once more, as the LM head's; buffers without a content; and stale copies that
# fairseq keeps of a block's weights.
IGNORED = re.compile(r"lm_head\.(decoder\.)?weight|.*(position_ids|token_type_ids|\.version|_float_tensor)|"
                     r".*\.layers?\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)")


def weight_files(directory: str | Path) -> list[Path]:
    """Returns the files that hold the weights of the model in a directory; none where there is no model."""
    for pattern in WEIGHT_FILES:
        if found := sorted(Path(directory).glob(pattern)):
            return found
    return []


def find_model(directory: str | Path) -> Path:
    """Returns the directory with the model's weights: this one, or of a run its newest checkpoint.

    Raises: ValueError where there is none, with what is there and what to give instead.
    """
    # Sorted by length first: step 9 comes before step 10.
    checkpoints = sorted(Path(directory).glob("checkpoint-*[0-9]"), key=lambda path: (len(path.name), path))
    for place in (Path(directory), *reversed(checkpoints)):
        if weight_files(place):
            return place
    raise ValueError(why_no_model(Path(directory)))


def why_no_model(directory: Path) -> str:
    """Returns what is wrong with a path that leads to no model, and what to give instead, in a line."""
    if directory.is_file():
        return f"{directory} is a file; give its directory, {directory.parent}"
    if not directory.exists():
        # It may be meant as a name of Hugging Face's hub: roberta-base, or FacebookAI/roberta-large.
        advice = (f". Nothing is downloaded: if it is a model of Hugging Face's hub, put config.json, "
                  f"{MODEL_FILE} (or pytorch_model.bin), vocab.json and merges.txt into a directory of this "
                  f"name, from https://huggingface.co/{directory}/tree/main")
        may_be_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(directory))
        return f"{directory}: no such directory{advice if may_be_name else ''}"
    holds = ", ".join(sorted(path.name for path in directory.iterdir())[:10]) or "nothing"
    return f"{directory}: no model, but {holds}; it takes config.json and one of {', '.join(WEIGHT_FILES)}"


def read_model(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the entries of config.json and the weights under our keys, of whatever origin.

    Raises: ValueError naming the file that is damaged, or the weight that is none.
    """
    directory = find_model(directory)
    found: dict[str, Any] = {}
    for path in weight_files(directory):
        found |= read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    with opening(directory):
        if path.name == "model.pt":
            entries, found = from_fairseq(found)
        else:
            entries = HUGGING_FACE_DEFAULTS | read_json(directory / "config.json")

    # An encoder that was saved by itself lacks the prefix that it has in a model with a head. The prefix also
    # says of what kind the model is where the config.json, as in 2019, does not.
    prefix = "" if any("roberta." in str(key) for key in found) else "roberta."
    entries.setdefault("model_type", None if prefix else "roberta")
    weights = {}
    for key, weight in found.items():
        # torch.compile and DistributedDataParallel put names of their own before a model's.
        key = prefix + re.sub(r"^module\.|_orig_mod\.", "", str(key))
        if IGNORED.fullmatch(key):
            continue
        is_tensor = isinstance(weight, Tensor) and weight.is_floating_point()
        # One NaN or infinity makes the sum one.
        if not is_tensor or not weight.float().sum().isfinite():
            raise ValueError(f"{directory}: {key} is no tensor of finite floats; train it again, or fetch it")
        weights[key] = weight.float().contiguous()
    return entries, rename(weights, FROM_HUGGING_FACE)


class Inert:
    """Stands in for another program's class: keeps what a file gives it, and does nothing with it."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_pickle(path: Path) -> dict[str, Any]:
    """Returns what torch.save wrote. Nothing is executed: torch builds tensors and plain values only."""
    with opening(path):
        # fairseq's file holds the arguments of its run, too: in a Namespace, with NumPy's numbers, since 2021
        # in classes that are not installed here. Of all these only what they hold is wanted.
        strangers = ["argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar",
                     "numpy._core.multiarray.scalar"]
        if zipfile.is_zipfile(path):
            # torch does not look at the checksums of its files, which since 2020 are zips.
            if damaged := zipfile.ZipFile(path).testzip():
                raise ValueError(f"the checksum of {damaged}")
            strangers = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in strangers]):
            return dict(torch.load(path, map_location="cpu", weights_only=True))


def from_fairseq(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns what a model.pt holds as the entries of a config.json and weights under Hugging Face's keys."""
    # Until 2020 the arguments were in `args`, since then in the `model` of `cfg`.
    arguments = plain(content.get("args")) or plain(plain(content["cfg"])["model"])
    weights = rename(content["model"], FROM_FAIRSEQ)
    # The first releases had queries, keys and values in one matrix.
    for key in [key for key in weights if ".self_attn.in_proj_" in key]:
        for name, part in zip(("query", "key", "value"), weights.pop(key).chunk(3)):
            weights[key.replace("self_attn.in_proj_", f"attention.self.{name}.")] = part
    # fairseq has no row for the only type of token, which is as good as one of zeros.
    words = weights["roberta.embeddings.word_embeddings.weight"]
    weights.setdefault("roberta.embeddings.token_type_embeddings.weight", torch.zeros_like(words[:1]))
    entries = {"vocab_size": len(words), "hidden_size": words.shape[1],
               "num_hidden_layers": sum(key.endswith(".intermediate.dense.bias") for key in weights),
               "num_attention_heads": plain(arguments["encoder_attention_heads"]),
               "intermediate_size": len(weights["roberta.encoder.layer.0.intermediate.dense.bias"]),
               "max_position_embeddings": len(weights["roberta.embeddings.position_embeddings.weight"]),
               "hidden_act": plain(arguments.get("activation_fn", "gelu")),
               "tie_word_embeddings": not plain(arguments.get("untie_weights_roberta", False))}
    # Heads have names there. A model may have several; the first is taken.
    found = re.search(r"classification_heads\.([^. ]+)\.out_proj\.weight", " ".join(weights))
    if found:
        weights = rename(weights, [(f"classification_heads.{found[1]}.", "classifier.")])
        # What the labels mean is in none of its files, but that of the published model is known.
        entries["num_labels"] = len(weights["classifier.out_proj.weight"])
        if found[1] == "mnli" and entries["num_labels"] == 3:
            entries["id2label"] = {0: "contradiction", 1: "neutral", 2: "entailment"}
    return entries, weights


def plain(value: Any) -> Any:
    """Returns what fairseq's arguments hold: of a Namespace or a container a dict, of a leaf its value."""
    while isinstance(value, Inert):
        value = value.state.get("_content", value.state.get("_val", value.state))
    return value


# ----------------------------------------------------------------------------------------------------------
# Opening and saving
# ----------------------------------------------------------------------------------------------------------

# The weight that tells whose head a file has, and the class of ours that has a place for it.
HEADS = {"classifier.out_proj.bias": RobertaForSequenceClassification,
         "choice.out_proj.bias": RobertaForMultipleChoice, "qa_outputs.bias": RobertaForQuestionAnswering,
         "nsp_head.dense.bias": RobertaForPreTraining, "lm_head.dense.bias": RobertaForMaskedLM}


def read_config(directory: str | Path) -> RobertaConfig:
    """Returns the config of a saved model, of whatever origin. Raises: ValueError as `from_pretrained`."""
    return open_model(directory).config


def open_model(directory: str | Path, kind: type[RobertaModelBase] | None = None, **changes: Any) -> Any:
    """Returns a saved model as a class, or if None as the class that its weights are for, in eval mode.

    See RobertaModelBase.from_pretrained, which gives the class.
    """
    entries, weights = read_model(directory)
    for name, value in NEEDED.items():
        if entries.get(name, value) != value:
            raise ValueError(f"{directory}: {name} is {entries[name]!r}; only {value!r} opens here")
    # What other models have besides is passed over.
    known = {f.name: entries[f.name] for f in fields(RobertaConfig) if f.name in entries}
    with opening(directory):
        # Where other labels are asked for, neither the number nor the names of the old ones count.
        same_number = changes.get("num_labels") in (None, len(known.get("id2label", {})))
        if "id2label" in changes or not same_number:
            changes = {"num_labels": None, "id2label": {}} | changes
        config = RobertaConfig(**known | changes)
        kind = kind or next((HEADS[key] for key in HEADS if key in weights), RobertaModel)
        # On the meta device tensors have a shape and no content: nothing is drawn that a file will replace.
        with torch.device("meta"):
            model = kind(config)

        # An encoder is the only part of itself. Heads of other models are passed over.
        parts = {"roberta": model} if isinstance(model, RobertaModel) else dict(model.named_children())
        for part, module in parts.items():
            given = {key.removeprefix(part + "."): weight
                     for key, weight in weights.items() if key.startswith(part + ".")}
            # The encoder must be there as it is, and so must an LM head of which there is anything: torch
            # compares names and shapes, and names what does not fit.
            must_fit = part == "roberta" or (part == "lm_head" and given)
            wanted = {key: weight.shape for key, weight in module.state_dict().items()}
            if must_fit or wanted == {key: weight.shape for key, weight in given.items()}:
                module.load_state_dict(given, assign=True)  # the tensors become the model's own
                continue
            # Of another head the last bias has a number for each label.
            labels, reason = list(wanted)[-1], "the model there has none"
            if labels in given:
                reason = f"the one there is for {len(given[labels])} labels, not {wanted[labels][0]}"
            print(f"note: {directory}: {part} is drawn at random: {reason}", file=sys.stderr)
            drawn(module.to_empty(device="cpu"), config)
    return model.eval()


def save_model(model: RobertaModelBase, directory: Path, tokenizer: Tokenizer | None) -> None:
    """See RobertaModelBase.save_pretrained. The weights come last: with them the directory is a model."""
    # Hugging Face has no model with NSP; there it opens as the masked LM, and the other heads are left over.
    architecture = type(model).__name__.replace("ForPreTraining", "ForMaskedLM")
    entries = asdict(model.config) | {"model_type": "roberta", "architectures": [architecture]}
    # Its classes want the names of labels both ways round, and to be told that the LM head is tied.
    label2id = {name: i for i, name in model.config.id2label.items()}
    entries |= {"label2id": label2id, "tie_word_embeddings": True}
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "config.json", (json.dumps(entries, indent=2) + "\n").encode())
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.config)
        tokenizer.save_pretrained(directory, model_max_length=model.config.max_tokens)
    write_safetensors(directory / MODEL_FILE, rename(model.state_dict(), TO_HUGGING_FACE))


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def results(model: RobertaModelBase, texts: list[str], tokenizer: Tokenizer, top_k: int) -> list[str]:
    """Returns what a model makes of one text or two, each result a line."""
    text = texts[0] if len(texts) == 1 else tuple(texts)
    if isinstance(model, RobertaForMaskedLM):
        found = model.fill_mask(text, tokenizer, top_k)
        masks = found if isinstance(found[0], list) else [found]
        return [f"{best['score']:7.2%}  {best['sequence']}" for mask in masks for best in mask]
    if isinstance(model, RobertaForSequenceClassification):
        found = model.classify(text, tokenizer)
        if model.config.num_labels == 1:
            return [f"{found['score']:.4f}"]
        return [f"{score:7.2%}  {name}" for name, score in found.items()]
    if isinstance(model, RobertaForQuestionAnswering):
        found = model.answer(text, tokenizer)
        judged = [f"{found['answerable']:7.2%}  that there is an answer"] if "answerable" in found else []
        return [f"{found['score']:7.2%}  {found['answer']}", *judged]
    raise ValueError(f"{type(model).__name__} neither fills masks nor labels texts nor answers questions")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="roberta.py", description="Fill masks, name labels, find answers.")
    parser.add_argument("model", metavar="DIR", help="run directory, or a saved model of any origin")
    parser.add_argument("text", nargs="+", help="one with <mask>; one or two to label; question and passage")
    parser.add_argument("--top-k", type=int, default=5, metavar="N", help="fillings (default: 5)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        model, tokenizer = open_model(options.model), Tokenizer.from_pretrained(options.model)
        for line in results(model, options.text, tokenizer, options.top_k):
            print(line.replace("\n", "\\n"))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
