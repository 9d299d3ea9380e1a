"""Pretraining: one command from nothing to a RoBERTa, on one core or on many machines.

    torchrun train.py                                            # tiny, on the documentation installed here
    torchrun train.py --preset base --data prepared --out runs/mine
    torchrun train.py --init-from DIR --data my-texts --out runs/mine    # goes on from a model's weights
    torchrun --nproc-per-node 8 --nnodes 4 --rdzv-backend c10d --rdzv-endpoint HOST:29400 train.py ...
    python train.py                                              # in one process, without torchrun

RoBERTa is BERT trained right (§5): dynamic masks, full sentences without NSP, large batches, a large
byte-level BPE. What a model reads, and in which order, is data.py's; this file is about the training itself,
and `pretrain` is its loop.

What makes a run reproducible: every random draw is a pure function of the seed and of where it is used
(data.py: `draw`), and the loss is a sum divided by the number of predictions of the whole step, over all
ranks and micro-batches. So in one process on a CPU a resumed run equals an uninterrupted one bit for bit, and
without dropout, more ranks or smaller micro-batches change nothing but rounding.

Part I is what the paper says; Part II is ranks, checkpoints, logs and the ways in which a run ends. What Part
I needs of it: `Ranks` says which of the processes this is, and has `meet`, where all wait for all, and `sum`,
a sum over all, and `autocast`, which computes products in 16 bits; `to_tensor` takes an array to the device;
`Progress` says where a run stands; `open_data`, `settle`, `make_batches` and `begin_pretraining` make the
parts of a run; `log`, `log_result`, `show_place`, `plot_log`, `save` and `finish` show and write;
`stop_signals`, `stop_asked` and `end_after_signal` end a run that is told to; `held_by_first_rank` keeps
others out of the directory. `DIFFERS:` tags a departure from the paper, `CHOICE:` what it leaves open.
Legend: B micro-batch, T tokens, M predicted places, V vocabulary; C, F and H as in roberta.py. A rank is one
of the processes of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import resource
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import data
import roberta
from data import Batch, Batches, Corpus, Sequences, Tokenizer, flag, say
from roberta import RobertaConfig, RobertaForMaskedLM, RobertaForPreTraining, RobertaModelBase, evaluating

# ----------------------------------------------------------------------------------------------------------
# Part I: what the paper says
# ----------------------------------------------------------------------------------------------------------

# ----------------------------------------------------------------------------------------------------------
# Config: Table 9
# ----------------------------------------------------------------------------------------------------------

# Each field is a flag of the command line, too (data.py, `flag`): default, meaning, source, and the group in
# which --help shows it. `may_change`: a second start, which resumes the run, may give another value.
recipe = functools.partial(flag, group="recipe (Table 9)")
of_model = functools.partial(flag, group="model")
machine = functools.partial(flag, group="machine and files")


@dataclass(frozen=True)
class RunConfig:
    """What pretraining and fine-tuning have in common. The defaults are BASE's of Table 9; None means what
    the help text says.
    """

    out: str | None = flag(None, "run directory; none: runs/PRESET", may_change=True)
    seed: int = flag(0, "of every random draw", low=0)
    batch_size: int = recipe(8192, "sequences a step, over all ranks", "Table 9", low=1)
    peak_lr: float = recipe(6e-4, "learning rate after warm-up", "Table 9", low=1e-12, high=1e3)
    weight_decay: float = recipe(0.01, "decoupled decay of every parameter", "Table 9", low=0)
    adam_beta1: float = recipe(0.9, "Adam's beta 1", "Table 9", low=0, high=0.9999999)
    adam_beta2: float = recipe(0.98, "Adam's beta 2", "Table 9", low=0, high=0.9999999)
    adam_eps: float = recipe(1e-6, "Adam's epsilon", "Table 9", low=1e-30, high=1)
    clip_norm: float = recipe(0.0, "largest gradient norm; 0: no clipping", "Table 9", low=0)
    dropout: float | None = recipe(None, "of layers and attention; none: the model's", low=0, high=0.99)
    precision: Literal["fp32", "fp16", "bf16"] | None = machine(None, "none: fp16 on a GPU, else fp32", "§3")
    micro_batch_size: int | None = machine(None, "sequences a pass; none: up to 32", low=1, may_change=True)
    log_interval: int = machine(100, "steps between log lines", low=1, may_change=True)
    checkpoint_interval: int = machine(2000, "steps between checkpoints", low=1, may_change=True)
    keep: int = machine(2, "newest checkpoints kept, and the one evaluated best", low=1, may_change=True)
    timeout: float = machine(600.0, "seconds that ranks wait for another", low=1, high=1e7, may_change=True)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One pretraining run. All defaults but the preset's name are BASE's; `parse` takes a preset's values,
    and then the flags'.
    """

    preset: Literal["tiny", "small", "base", "large"] = flag(
        "tiny", "size and schedule; beside --init-from the schedule alone", "Table 9; tiny, small: a laptop")
    data: str | None = flag(None, "prepared directory, or text; none: documentation here", may_change=True)
    init_from: str | None = flag(None, "go on from the weights of the model in this directory")
    eval_only: bool = flag(False, "only evaluate the model of --init-from on --data's held-out part",
                           may_change=True)
    max_steps: int = flag(500_000, "optimiser steps", "Table 9", low=1, may_change=True)
    warmup_steps: int = recipe(24_000, "of linear warm-up", "Table 9", low=0, may_change=True)
    seq_len: int = recipe(512, "tokens a sequence at most", "§2", low=1)
    masking: Literal["dynamic", "static"] = recipe("dynamic", "new masks each epoch, or ten", "§4.1")
    mlm_probability: float = recipe(0.15, "share of tokens predicted", "§2", low=1e-9, high=0.99)
    unigram_bias: bool = recipe(False, "the LM head's bias begins at the logs of the tokens' shares")
    input_format: data.InputFormat = recipe("full-sentences", "what a sequence is", "§4.2")
    vocab_size: int = of_model(50265, "units, where --data is text", "§4.4", low=261, may_change=True)
    hidden_size: int | None = of_model(None, "width; none: the preset's", low=1)
    num_hidden_layers: int | None = of_model(None, "none: the preset's", low=1)
    num_attention_heads: int | None = of_model(None, "none: the preset's", low=1)
    intermediate_size: int | None = of_model(None, "of the feed-forward layer; none: the preset's", low=1)
    eval_interval: int = machine(2000, "steps between evaluations", low=1, may_change=True)
    eval_sequences: int = machine(4096, "held-out sequences read, at most", low=1, may_change=True)
    compile: bool | None = machine(None, "compile the model; none: on a GPU", may_change=True)


def tiny() -> TrainConfig:
    """Minutes on two cores: bench/results/first_run.json has the figures, first_run_search.json those of the
    recipes that it was chosen from.

    CHOICE: many small steps instead of §4.3's large batches: with so little compute the number of updates
    decides how soon the model leaves the plateau near the unigram entropy, to which every run
    falls within some steps. Gradients of small batches are noisy, so beta2 averages over twice as many steps.
    CHOICE: the LM head's bias begins where it would have to be brought first, at the logs of the tokens'
    shares in the text: so the run begins on that plateau.
    """
    return TrainConfig(preset="tiny", vocab_size=4096, batch_size=32, seq_len=64, peak_lr=3.6e-3,
                       adam_beta2=0.99, unigram_bias=True, max_steps=7200, warmup_steps=500,
                       eval_interval=500, eval_sequences=2048, checkpoint_interval=1000)


def small() -> TrainConfig:
    """A night on two cores, less where they multiply bf16, and an hour on one GPU.

    CHOICE: batch and rate were tried on short schedules (bench/results/small.json): with twice the rate it
    stays on the plateau, with half of it it learns less, and half or twice the batch are no better.
    """
    return replace(tiny(), preset="small", vocab_size=16_384, seq_len=128, peak_lr=1e-3, max_steps=18_000,
                   warmup_steps=1100, eval_interval=1000)


def base() -> TrainConfig:
    return TrainConfig(preset="base")


def large() -> TrainConfig:
    return TrainConfig(preset="large", warmup_steps=30_000, peak_lr=4e-4)


PRESETS = {"tiny": tiny, "small": small, "base": base, "large": large}


def dropout_changes(config: RunConfig) -> dict[str, float]:
    """Returns what --dropout changes in a model's config: nothing, where it is not given."""
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return {} if config.dropout is None else dict.fromkeys(names, config.dropout)


def model_config(config: TrainConfig, vocab_size: int, initial: RobertaConfig | None = None) -> RobertaConfig:
    """Returns the preset's model with the flags' changes, for inputs of `seq_len` tokens.

    initial: of the model at --init-from, which keeps its shape.
    """
    changes: dict[str, Any] = dropout_changes(config)
    # Weights that exist fit one shape; dropout has none.
    if initial is not None:
        return replace(initial, **changes)

    # What no flag names is the preset's.
    preset = getattr(RobertaConfig, config.preset)()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    changes |= {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    # Positions are numbered from pad_token_id + 1 = 2 on, so 512 of them need a table of 514.
    longest = max(preset.max_position_embeddings, config.seq_len + preset.pad_token_id + 1)
    # Two types of token, for the two segments of a pair (§4.2); else one.
    changes["type_vocab_size"] = 2 if config.input_format in data.PAIR_FORMATS else 1
    return replace(preset, vocab_size=vocab_size, max_position_embeddings=longest, **changes)


# ----------------------------------------------------------------------------------------------------------
# Optimiser and schedule (§2, §3)
# ----------------------------------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """Returns Adam with decoupled weight decay, one fused kernel for all parameters (§2, §3, Table 9)."""
    # Adam divides each gradient by the root of its running second moment. Decay written as an L2 term of the
    # loss would be divided, too: a weight with large gradients would hardly decay. The paper says L2 (§2),
    # but BERT's and RoBERTa's code shrinks the weights beside Adam's step ("decoupled", AdamW), by lr *
    # weight_decay. RoBERTa's decays every parameter, LayerNorms and biases too; BERT's exempts these.
    #
    # beta2 = 0.98 is more stable with large batches (§3). It averages squared gradients over some 50 steps
    # instead of 1,000: large batches have less noise to average away, and a scale that lags behind makes
    # steps too long when gradients grow.
    # Epsilon keeps steps short where the second moment is almost 0; training is very sensitive to it (§3).
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(model.parameters(), config.peak_lr, betas, config.adam_eps, config.weight_decay,
                             fused=True)


def learning_rate(step: int, peak_lr: float, warmup_steps: int, max_steps: int) -> float:
    """Returns the rate of step 0, 1, ...: up linearly for the warm-up, then down linearly to 0 (§2). The peak
    is used twice, by the last step of the one and the first of the other.

    >>> [learning_rate(step, 1.0, warmup_steps=2, max_steps=10) for step in (0, 1, 2, 6)]
    [0.5, 1.0, 1.0, 0.5]
    """
    # 1. Warm-up. Adam's second moments are averages of a few gradients at first, and post-LN layers have
    #    large gradients until they have settled (roberta.py, Block): long steps would diverge.
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    # 2. Decay: the smaller the steps, the less the weights jitter around a minimum. It is 0 after the last
    # step.
    return peak_lr * (max_steps - step) / (max_steps - warmup_steps)


# ----------------------------------------------------------------------------------------------------------
# Loss: a sum divided by known counts (§2, §4.3)
# ----------------------------------------------------------------------------------------------------------


def model_outputs(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Returns the MLM logits where tokens are predicted, (M, V), and NSP's, (B, 2), or None without pairs."""
    # The head scores only where something is predicted: about 15 % of the places (roberta.py, LMHead).
    arrays = (batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.predicted)
    outputs = model(*[None if array is None else to_tensor(array, device) for array in arrays])
    return outputs if isinstance(outputs, tuple) else (outputs, None)


def loss_sums(model: nn.Module, batch: Batch, device: torch.device) -> list[Tensor]:
    """Returns the summed MLM loss of a micro-batch, in nats, and in the pair formats the summed NSP loss.

    Sums, not means: what they are divided by is known only for the whole step (`accumulate`).
    """
    logits, nsp_logits = model_outputs(model, batch, device)
    # In 32 bits: a logarithm of a sum of 50,000 exponentials is too delicate for 16. Labels of -100 are
    # ignored.
    losses = [F.cross_entropy(logits.float(), to_tensor(batch.labels, device), reduction="sum")]
    # BERT's second question, whether the segments belong together; its loss is added with equal weight (§2).
    if batch.next_sentence_labels is not None:
        labels = to_tensor(batch.next_sentence_labels, device)
        losses.append(F.cross_entropy(nsp_logits.float(), labels, reduction="sum"))
    return losses


def perplexity(loss: float) -> float:
    """Returns exp(loss), for a loss in nats a token: as unsure as if it chose among so many equally likely
    tokens.

    Where a run has diverged, no more than exp(25).

    >>> round(perplexity(math.log(4)))
    4
    """
    return math.exp(min(loss, 25.0))


# ----------------------------------------------------------------------------------------------------------
# One step: accumulation (§4.3) and mixed precision (§3)
# ----------------------------------------------------------------------------------------------------------

MAX_SKIPPED = 20  # steps in a row without finite gradients, after which a run gives up


@dataclass
class Training:
    """What an optimiser step reads and changes."""

    config: RunConfig
    ranks: Ranks
    model: RobertaModelBase  # what is evaluated and saved
    parallel: nn.Module  # the same, as the step calls it: across ranks, or compiled
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    max_steps: int  # of the whole run
    # Since the last log line: the sum of each loss, real tokens and places (with padding) on this rank, kept
    # on the device, as asking for them would wait for them; and what each loss is divided by, over all ranks.
    window: Tensor | float = 0.0
    window_counts: np.ndarray | int = 0
    lap_began: float = field(default_factory=time.monotonic)


def accumulate(training: Training, batches: Sequence, losses_of: Callable, counts: Sequence[int]) -> None:
    """Adds up the gradients of one step: of this rank's micro-batches, and over all ranks (§4.3).

    8,192 sequences fit on no machine at once. But the gradient of a sum is the sum of gradients, so a batch
    may be processed in micro-batches, here eight of different sizes against the whole:

    >>> x, weight = torch.arange(36.0), torch.tensor(0.5, requires_grad=True)
    >>> ((weight * x) ** 2).mean().backward()
    >>> whole, weight.grad = weight.grad.item(), None
    >>> for part in x.split([1, 2, 3, 4, 5, 6, 7, 8]):
    ...     (((weight * part) ** 2).sum() / 36).backward()      # divided by the count of the whole, each time
    >>> abs(weight.grad.item() - whole) < 1e-4
    True

    losses_of(model, batch) gives the summed losses of a micro-batch; the gradient is of their means, added
    (§2: MLM's and NSP's). The trap is a mean of means, `part.mean() / 8`: it gives the one number of the
    first micro-batch as much weight as the eight of the last. So `counts` says what each sum is divided by: a
    number over all micro-batches of all ranks, which every rank knows from the order of the data and need not
    ask for.
    """
    ranks, progress = training.ranks, training.progress
    training.model.train()
    for number, batch in enumerate(batches):
        # Dropout depends on where in the run we are, not on how often a generator was asked before.
        bits = data.draw(training.config.seed, data.DROPOUT, progress.step, number, ranks.rank)
        torch.manual_seed(int(bits))

        # Gradients travel between ranks once a step: DDP adds them up during the last micro-batch's backward
        # pass, if this flag of its is set (a model without DDP ignores it). All ranks meet before it:
        # in the midst of it nobody could tell which one is missing.
        is_last = number == len(batches) - 1
        training.parallel.require_backward_grad_sync = is_last
        if is_last:
            ranks.meet(f"the gradients of step {progress.step + 1}")

        # Without pairs there is one loss, and `zip` leaves the second count out. Matrix products run in 16
        # bits, if so asked; weights, sums of gradients and Adam's moments stay in 32.
        with ranks.autocast():
            sums = losses_of(training.parallel, batch)
        loss = sum(part / max(1, count) for part, count in zip(sums, counts))
        # DDP takes the mean over ranks; the sum is what is wanted. (Why a scaler: see `loss_scaler`.)
        training.scaler.scale(loss * ranks.world_size).backward()

        # For the log. The losses stay on the device: to ask for them would be to wait for it.
        places = to_tensor(np.array([batch.num_tokens, batch.input_ids.size]), ranks.device)
        training.window = training.window + torch.cat([torch.stack(sums).detach().double(), places])
        show_place(training, number + 1, len(batches))
    training.window_counts = training.window_counts + np.array(counts)


def loss_scaler(device: str, precision: str, micro_batches: int) -> torch.amp.GradScaler:
    """Returns what keeps small gradients from vanishing in fp16 (§3); for fp32 and bf16 it does nothing.

    fp16 holds nothing below 6e-8, and the gradients of a mean over thousands of predictions often are. So the
    loss is multiplied by a large scale before the backward pass, and the gradients are divided by it
    afterwards, in 32 bits. Too large a scale gives infinity instead, for fp16 ends at 65,504: such a step is
    skipped and the scale halved. After many good steps it is doubled, to stay as large as can be:

    >>> weight = torch.nn.Parameter(torch.tensor(1.0))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=3)
    >>> for gradient in (0.25, 2.0, 0.5, 0.5, 0.5):
    ...     weight.grad = scaler.scale(torch.tensor(gradient)).half().float()  # what fp16 holds of it
    ...     scaled = weight.grad.item()
    ...     scaler.unscale_(optimizer)
    ...     _ = scaler.step(optimizer)
    ...     scaler.update()
    ...     print(f"scaled {scaled:g}, weight {weight.item():g}, next scale {scaler.get_scale():g}")
    scaled 16384, weight 0.75, next scale 65536
    scaled inf, weight 0.75, next scale 32768
    scaled 16384, weight 0.25, next scale 32768
    scaled 16384, weight -0.25, next scale 32768
    scaled 16384, weight -0.75, next scale 65536
    """
    # The loss is a mean over the whole step, so the gradients of one micro-batch are smaller by the number of
    # a rank's micro-batches, and the first scale may be larger by as much.
    scale = 2.0 ** (16 + round(math.log2(micro_batches)))
    return torch.amp.GradScaler(device, scale, enabled=precision == "fp16")


def update(training: Training, rate: float) -> None:
    """Applies the gradients, unless they are not finite: such a step is skipped, and counted.

    Raises: FloatingPointError where MAX_SKIPPED steps in a row were skipped.
    """
    optimizer, scaler, progress = training.optimizer, training.scaler, training.progress
    # The rate is set anew every step: a schedule that is a function of the step needs no state.
    optimizer.param_groups[0]["lr"] = rate

    # The norm is of the true gradients, so unscale comes first; clipping scaled ones would be the classic
    # mistake.
    scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in training.model.parameters() if p.grad is not None])
    if training.config.clip_norm > 0:
        nn.utils.clip_grads_with_norm_(training.model.parameters(), training.config.clip_norm, norm)

    # The scaler skips by itself; without one it is done here: one NaN would be in every weight after the
    # step. Asking for the norm is the only time in a step that a GPU is waited for: until here it has been
    # told what to do faster than it could do it.
    progress.grad_norm = norm.item()
    is_finite = math.isfinite(progress.grad_norm)
    if is_finite or scaler.is_enabled():
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    progress.skipped += not is_finite
    progress.skipped_in_a_row = 0 if is_finite else progress.skipped_in_a_row + 1
    if progress.skipped_in_a_row >= MAX_SKIPPED:
        raise FloatingPointError(f"no finite gradient in {MAX_SKIPPED} steps to {progress.step}; use another "
                                 f"--out and a lower --peak-lr than {training.config.peak_lr:g}, or "
                                 "--precision fp32 or bf16")


# ----------------------------------------------------------------------------------------------------------
# Evaluation, against a unigram baseline (§4.3, held-out perplexity)
# ----------------------------------------------------------------------------------------------------------


def log_shares(unigram: np.ndarray) -> Tensor:
    """Returns (V,) the logarithm of each token's share of a text, of how often each occurs in it (V,).

    >>> log_shares(np.array([0, 2, 5])).exp()  # one is added to each, so that no share is 0
    tensor([0.1000, 0.3000, 0.6000], dtype=torch.float64)
    """
    return torch.from_numpy(np.log((unigram + 1) / (unigram + 1).sum()))


@torch.no_grad()
def evaluate(training: Training, held_out: Batches, unigram: np.ndarray) -> dict[str, float]:
    """Returns the loss and perplexity on held-out text, the unigram baseline's perplexity, and for which
    share of the predicted tokens the right one is the first guess, or among the first five. (One predicted
    token in ten stands there unmasked, §2.)

    All ranks share the work. unigram: (V,) how often each token occurs in the training text.
    """
    # The baseline predicts each token with its share of the training text: all that a model without context
    # can know. A run falls to a plateau near it, if it does not begin there; leaving that is the first sign
    # of learning.
    model, ranks, log_share = training.model, training.ranks, log_shares(unigram)
    # Predictions, loss, baseline's loss, right first guesses, right ones among five.
    sums = torch.zeros(5, dtype=torch.float64)
    with evaluating(model), ranks.autocast():
        # The masks are fixed, by a seed of their own (`make_batches`): runs on the same data compare if they
        # have the same --seq-len, --mlm-probability and --eval-sequences.
        for batch in held_out.held_out(training.config.eval_sequences):
            logits, _ = model_outputs(model, batch, ranks.device)
            labels = torch.from_numpy(batch.labels)
            loss = F.cross_entropy(logits.float(), labels.to(ranks.device), reduction="sum").cpu()
            is_right = logits.topk(5).indices.cpu() == labels[:, None]  # (M, 5), the best guess first
            # What fills up the batch has label -100: it counts neither here nor in the loss.
            labels = labels[labels >= 0]
            baseline, right = -log_share[labels].sum(), is_right[:, 0].sum()
            sums += torch.tensor([len(labels), loss, baseline, right, is_right.sum()], dtype=torch.float64)
    # Sums over all ranks, then one division: a mean of the ranks' means would weigh short shares too much.
    count, loss, baseline, right, among_five = ranks.sum(sums, "the held-out losses").tolist()
    if count == 0:
        raise ValueError("the held-out split has no token to predict; prepare more text, or more of "
                         "it for this: data.py prepare --held-out")
    return {"eval_loss": loss / count, "eval_perplexity": perplexity(loss / count),
            "unigram_perplexity": perplexity(baseline / count), "masked_accuracy": right / count,
            "masked_top5_accuracy": among_five / count}


# ----------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------


def pretrain(config: TrainConfig) -> dict[str, Any]:
    """Runs, or goes on with, the run that `config` describes; returns what results.json holds."""
    out = Path(config.out)
    with held_by_first_rank(out):
        # The text; what this machine decides; the order of the data; and the model where it stands, at its
        # beginning or at the newest checkpoint.
        corpus, held_out_corpus, shape, ranks = open_data(config, out / "data")
        config = settle(config, shape, ranks)
        batches, held_out = make_batches(config, corpus, held_out_corpus, ranks)
        training, fingerprint = begin_pretraining(config, shape, corpus, ranks)
        progress = training.progress
        losses_of = functools.partial(loss_sums, device=ranks.device)
        # Steps count from 0: what step 1 has behind it is what one step reads, in epochs.
        epochs_per_step = batches.step(1).epoch
        result = {}  # of the newest evaluation
        # What a model from elsewhere knows of this text before it has read any: step 0, for comparison.
        if config.init_from and progress.step == 0:
            log_result(training, out, evaluate(training, held_out, corpus.unigram))

        with stop_signals() as received:
            # A thread makes the batches of the next steps while this one is computed.
            for step in data.prefetch(batches.step, range(progress.step, config.max_steps)):
                # One optimiser step.
                rate = learning_rate(progress.step, config.peak_lr, config.warmup_steps, config.max_steps)
                accumulate(training, step.batches, losses_of, [step.num_predictions, step.num_sequences])
                update(training, rate)

                # A log line precedes every evaluation and checkpoint, so no running sums need saving, and
                # neither counts for the throughput. A signal ends all ranks after the same step.
                must_stop, is_last = stop_asked(received, ranks), progress.step == config.max_steps
                must_save = must_stop or is_last or progress.step % config.checkpoint_interval == 0
                must_evaluate = is_last or progress.step % config.eval_interval == 0
                if must_save or must_evaluate or progress.step % config.log_interval == 0:
                    log(training, out, progress.step * epochs_per_step)
                # Held-out text, beside the training loss: the one that says what was learned.
                if must_evaluate:
                    result = log_result(training, out, evaluate(training, held_out, corpus.unigram))
                    if must_save:  # the best of those that will have a checkpoint
                        progress.note_result(result, -result["eval_loss"])
                if must_save:
                    save(training, out, corpus.tokenizer, fingerprint)
                    plot_log(out, f"RoBERTa {config.preset}", ranks)
                if must_stop:
                    end_after_signal(progress.step, received)
        return finish(training, result, corpus, held_out)


# ----------------------------------------------------------------------------------------------------------
# Part II: the machinery
# ----------------------------------------------------------------------------------------------------------

GO_ON = "the same command goes on from the last checkpoint, if there is one"

# ----------------------------------------------------------------------------------------------------------
# Ranks and precision
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """Who and where this process is, and how it meets the others.

    Every rank runs this same program on its share of each batch. They meet a few times in a step: for the sum
    of the gradients, and for the few numbers that all must agree on. Where one is missing the others would
    wait, and no collective says for whom; so before each one they meet at a barrier that does.
    """

    rank: int
    world_size: int
    device: torch.device
    precision: str
    timeout: timedelta
    meeting: Any = None  # a group whose messages go over the network, whatever the device; None: alone

    def meet(self, where: str) -> None:
        """Returns when all ranks are here. Raises: RuntimeError naming who has not come within --timeout."""
        if self.world_size > 1:
            try:
                # Every rank writes to rank 0, which knows from whom it has not heard, and answers all.
                dist.monitored_barrier(self.meeting, self.timeout, wait_all_ranks=True)
            except RuntimeError as error:
                raise RuntimeError(f"before {where}: {error}") from None

    def sum(self, values: Tensor, of: str) -> Tensor:
        """Returns the sum of `values`, on the CPU, over all ranks, which wait for each other here."""
        self.meet(of)
        if self.world_size > 1:
            dist.all_reduce(values, group=self.meeting)
        return values

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in 16 bits, sums and normalisations in 32 (§3); does nothing for fp32."""
        # torch has a list of which operations lose nothing in 16 bits, and casts for each.
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)


def ranks_of_environment() -> tuple[int, int, int, int]:
    """Returns rank, world size, local rank and local world size as torchrun sets them; alone without it."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return tuple(int(os.environ.get(name, default)) for name, default in names.items())


def set_up(config: RunConfig) -> Ranks:
    """Takes this rank's device, joins the other ranks, and says what was chosen."""
    rank, world_size, local_rank, local_world_size = ranks_of_environment()
    on_gpu, timeout, meeting = torch.cuda.is_available(), timedelta(seconds=config.timeout), None
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    # The first rank without a GPU of its own says so for all; torchrun then ends the others.
    if on_gpu and local_rank == (gpus := torch.cuda.device_count()):
        raise ValueError(f"{local_world_size} ranks, but {gpus} GPUs here; try --nproc-per-node {gpus}")
    if world_size > 1:
        # torchrun hands restarted ranks the store of the attempt before, with addresses of the dead in it. On
        # one machine the attempts have a common number, by which the entries can be told apart.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if local_world_size == world_size else "0"
        store, _, _ = next(dist.rendezvous("env://", rank, world_size))
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        # All wait for rank 0 at the store, for it may have prepared a corpus for hours before it came here,
        # and every collective has a limit.
        if rank == 0:
            store.set("ready", "yes")
        store.wait(["ready"], timedelta(days=30))
        dist.init_process_group("nccl" if on_gpu else "gloo", None, timeout, world_size, rank, store)
        # NCCL moves what is on GPUs and knows no barrier that names the absent: a second group is on the CPU.
        meeting = dist.new_group(backend="gloo", timeout=timeout)
    keep_freed_memory()
    if on_gpu:
        torch.cuda.set_device(device)
        # Of torch's attention kernels cuDNN's is not taken: it plans anew for every shape, which the formats
        # of varying length pay for, and rounds the dropout probability.
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif local_world_size > 1:  # torchrun gives each rank one thread; the cores are there to be shared
        torch.set_num_threads(max(1, data.cores() // local_world_size))
    precision = config.precision or ("fp16" if on_gpu else "fp32")
    where = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads a rank"
    say(f"{world_size} rank{'s' * (world_size > 1)} on {where}; {precision}; torch {torch.__version__}")
    return Ranks(rank, world_size, device, precision, timeout, meeting)


def keep_freed_memory() -> None:
    """Has the C library keep the memory of freed tensors for the next ones, as torch itself does on a GPU.

    glibc returns large blocks to the system at once, and for every new one the system clears each page anew:
    with BASE on a CPU that takes a quarter of a step. Another C library is left as it is.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: blocks up to 1 GB come from the heap, and where that is too much up to 32 MB,
        mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: whose free end is kept, up to 2 GB


def to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# ----------------------------------------------------------------------------------------------------------
# Memory: how many sequences at once
# ----------------------------------------------------------------------------------------------------------


def micro_batch_size(config: RunConfig, world_size: int, most: float = 32) -> int:
    """Returns --micro-batch-size, or the largest size up to `most` that divides each rank's share."""
    # Where ranks can't have equal shares, pretraining's `Batches` refuses; fine-tuning takes unequal ones.
    share = config.batch_size // world_size
    sizes = [size for size in range(1, share + 1) if share % size == 0 and size <= most]
    return config.micro_batch_size or max(sizes, default=1)


# The peak memory of two steps, and behind it what is estimated below, in GB: fp32 on two cores with torch
# 2.13, `sequences` at once of T tokens each. In 16 bits BASE of 12 layers, 8 sequences, has a peak of 11.9,
# and 11.6 are estimated. On a GPU the terms are counted, not measured.
#
#     model, layers    T   sequences      dropout 0.1          none
#                                       peak estimate     peak estimate
#     tiny       2    512      16        0.75   1.00       0.47   0.58
#     BASE       2    128      16        2.26   2.43       2.13   2.12
#     BASE       2    512       8        3.29   3.97       2.64   2.61
#     BASE       4    128      16        2.97   3.14       2.57   2.61
#     BASE       4    512       2        2.71   2.86       2.28   2.23
#     BASE       4    512      16        8.35   9.92       4.74   4.87
#     BASE      12    512       4        7.33   8.16
#     BASE      12    512       8       12.57  13.56       5.95   6.35
#     BASE      12    128      16        6.09   5.98
#
# So in 24 GB BASE trains with 8 sequences of 512 at once: 16 would take 23 GB, and 32 were killed.


def memory_needed(config: TrainConfig, shape: RobertaConfig, ranks: Ranks) -> tuple[float, float]:
    """Returns how many bytes training takes in any case, and how many more for each sequence held at once."""
    V, C, F, H = shape.vocab_size, shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    on_cpu, size = ranks.device.type == "cpu", 4 if ranks.precision == "fp32" else 2
    # In any case: a weight, its gradient and Adam's two moments, four bytes each; three V x C matrices while
    # the head's gradient of the embeddings is added to the encoder's; and 0.3 GB for torch's own.
    with torch.device("meta"):  # shapes without a content
        parameters = RobertaForMaskedLM(shape).num_parameters()
    fixed = 16 * parameters + 12 * V * C + 3e8

    # What a block keeps of a token for its backward pass: the inputs of its matrices, C for the three of
    # attention together, C for out_proj, C for ffn_in and F for ffn_out; queries, keys and values, 3C; GELU's
    # input, F; the noise of two dropouts, 2C; and the inputs of its two LayerNorms, always in 32 bits.
    token, slack = size * (8 * C + 2 * F) + 8 * C, 1.15
    # On a CPU no fused kernel drops attention weights: then they are there three times, before, after and as
    # the noise, in 32 bits, and the C library's heap (`keep_freed_memory`) has larger holes.
    if on_cpu and shape.attention_probs_dropout_prob > 0:
        token, slack = token + 12 * H * config.seq_len, 1.6
    # The embeddings add 3C, the head V logits for each prediction, their logarithms and their gradients.
    around = 12 * C + 12 * V * config.mlm_probability
    return fixed, slack * config.seq_len * (shape.num_hidden_layers * token + around)


def free_memory(ranks: Ranks) -> float:
    """Returns how many bytes this rank may still take: on its GPU, or of the machine or container."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    free, groups = math.inf, Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError):
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    # What a container may take, less what it has; files that the system remembers give way. "max": all.
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((groups / f"memory.{name}").read_text()) for name in ("max", "current"))
        files = int((groups / "memory.stat").read_text().split("\nfile ")[1].split()[0])
        free = min(free, limit - used + files)
    return free / ranks_of_environment()[3]


def compiled(model: nn.Module, device: torch.device, has_one_shape: bool) -> nn.Module:
    """Returns the model compiled; where this machine has no compiler, says so and returns it as it is.

    A compiler fuses what stands between the matrix products, additions, GELU, dropout and LayerNorm, into
    few kernels, each of which reads and writes memory once.
    """
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))  # what may be missing is torch's to know
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:150]
        say(f"not compiled, so slower, for want of a compiler ({reason}); --no-compile stops asking")
        return model
    # By default DDP has the model cut into many graphs, so that some gradients travel while others are still
    # computed. They travel once in a step of many micro-batches: one graph is worth more.
    torch._dynamo.config.optimize_ddp = False
    # FULL-SENTENCES has one shape. In the other formats what is compiled takes any, and is slower for that.
    return torch.compile(model, dynamic=None if has_one_shape else True)


def begin(config: RunConfig, ranks: Ranks, model: RobertaModelBase, max_steps: int = 0) -> Training:
    """Returns what a run of `max_steps` trains with, at its beginning."""
    model = parallel = model.to(ranks.device)
    # Compiled is only what the step calls: what is saved keeps its names, and evaluation needs no graph.
    if isinstance(config, TrainConfig) and config.compile:
        parallel = compiled(model, ranks.device, config.input_format == "full-sentences")
    # DDP copies rank 0's weights to all at the beginning, and hooks into the backward pass: as soon as the
    # gradients of some layers are there, they travel, while those of earlier layers are still computed.
    if ranks.world_size > 1:
        parallel = nn.parallel.DistributedDataParallel(parallel, gradient_as_bucket_view=True)
    # How many micro-batches a rank has in a step: rounded up, for in fine-tuning the last may be a part.
    share = config.batch_size / ranks.world_size
    micro_batches = math.ceil(share / micro_batch_size(config, ranks.world_size))
    scaler = loss_scaler(ranks.device.type, ranks.precision, micro_batches)
    optimizer = make_optimizer(model, config)
    return Training(config, ranks, model, parallel, optimizer, scaler, Progress(), max_steps)


# ----------------------------------------------------------------------------------------------------------
# The parts of a pretraining run
# ----------------------------------------------------------------------------------------------------------


def open_data(config: TrainConfig, directory: Path) -> tuple[Corpus, Corpus, RobertaConfig, Ranks]:
    """Returns the training and the held-out text, the shape of the model that reads them, and the ranks.

    --data is taken as it is if it is prepared; else rank 0 prepares its text in `directory`, and the others
    wait. Raises: ValueError where the text, the flags and the model of --init-from do not fit together.
    """
    # What is wrong with a model from elsewhere shows before a text is prepared for it.
    initial = initial_shape(config) if config.init_from else None
    # Once there is a checkpoint, the run has the tokenizer itself.
    source = config.out if config.init_from and checkpoints(Path(config.out)) else config.init_from
    given, texts = Path(config.data or "."), (config.data,) if config.data else ()
    if texts and (given / "manifest.json").exists():
        directory = given
    elif ranks_of_environment()[0] == 0:
        data.prepare(data.PrepareConfig(texts, str(directory), config.vocab_size, source))
    # One rank compares the checksums, as all read the same files. The others wait in `set_up`, without limit.
    if ranks_of_environment()[0] == 0:
        for split in data.SPLITS:
            Corpus(directory, split).verify()
    ranks, corpus, held_out = set_up(config), Corpus(directory), Corpus(directory, "heldout")
    # An id must mean to the model what it means in the text.
    found = corpus.tokenizer.fingerprint
    if initial and (wanted := Tokenizer.from_pretrained(source).fingerprint) != found:
        raise ValueError(f"{directory} is prepared with vocabulary {found}, and {config.init_from} has "
                         f"{wanted}; give the text itself as --data, or prepare it with --tokenizer")
    return corpus, held_out, model_config(config, corpus.vocab_size, initial), ranks


def initial_shape(config: TrainConfig) -> RobertaConfig:
    """Returns the shape of the model at --init-from. Raises: ValueError where the flags ask for more."""
    # A run that has a checkpoint needs those weights no longer: they may have changed, or be gone.
    if checkpoints(Path(config.out)):
        return RobertaConfig(**run_before(Path(config.out)).get("model", {}))
    shape = roberta.read_config(config.init_from)
    roberta.check_tokenizer(Tokenizer.from_pretrained(config.init_from), shape)
    if config.seq_len > shape.max_tokens and not config.eval_only:
        raise ValueError(f"--seq-len {config.seq_len}, but {config.init_from} has positions for "
                         f"{shape.max_tokens} tokens; try --seq-len {shape.max_tokens}")
    if config.input_format in data.PAIR_FORMATS and shape.type_vocab_size != 2:
        raise ValueError(f"--input-format {config.input_format} needs type_vocab_size 2, {config.init_from} "
                         f"has {shape.type_vocab_size}; take full-sentences or doc-sentences")
    return shape


def settle(config: TrainConfig, shape: RobertaConfig, ranks: Ranks) -> TrainConfig:
    """Returns the config with what was left to the machine and to the model."""
    on_gpu = ranks.device.type == "cuda"
    config = replace(config, precision=ranks.precision, seq_len=min(config.seq_len, shape.max_tokens),
                     compile=on_gpu if config.compile is None else config.compile)
    # A run goes on with the size that it began with: dropout's draws depend on it. (Among other ranks they
    # are others anyhow.)
    size = config.micro_batch_size or run_before(Path(config.out)).get("flags", {}).get("micro_batch_size")
    if size and (config.micro_batch_size or config.batch_size % (size * ranks.world_size) == 0):
        return replace(config, micro_batch_size=size)
    # A CPU is no faster with more than 32 sequences, a GPU busy only with some 16,000 tokens at once. And all
    # ranks take what fits the one with the least room.
    enough = max(32, 16_384 // config.seq_len) if on_gpu else 32
    fixed, sequence = memory_needed(config, shape, ranks)
    room = torch.zeros(ranks.world_size, dtype=torch.float64)
    room[ranks.rank] = (0.95 * free_memory(ranks) - fixed) / sequence
    most = min(enough, ranks.sum(room, "the micro-batch size").min().item())
    return replace(config, micro_batch_size=micro_batch_size(config, ranks.world_size, most))


def make_batches(config: TrainConfig, corpus: Corpus, held_out: Corpus,
                 ranks: Ranks) -> tuple[Batches, Batches]:
    """Returns the batches of the training text, and those of the held-out text."""
    # What differs between ranks is which of a step's micro-batches they take, and nothing else.
    micro, sequences = config.micro_batch_size, Sequences(corpus, config.input_format, config.seq_len)
    batches = Batches(sequences, config.batch_size, micro, config.seed, config.masking,
                      config.mlm_probability, ranks.rank, ranks.world_size)
    # Text and special tokens; the rest is padding.
    lengths = sequences.lengths(sequences.pairs(config.seed, 0)) + sequences.special_tokens
    say(f"{corpus.num_tokens:,} tokens in sequences that are {lengths.mean() / config.seq_len:.1%} full; "
        f"{batches.num_micro_batches:,} x {micro} sequences a rank and step")
    # CHOICE: every format is evaluated on FULL-SENTENCES, so that runs in different formats compare (§4.2).
    # The seed is no run's own: all runs on the same data are asked for the same masks.
    sequences = Sequences(held_out, "full-sentences", config.seq_len)
    return batches, replace(batches, sequences=sequences, batch_size=micro * ranks.world_size, seed=2**32)


def begin_pretraining(config: TrainConfig, shape: RobertaConfig, corpus: Corpus,
                      ranks: Ranks) -> tuple[Training, str]:
    """Returns what the run trains with, where it stands, and the run's fingerprint."""
    out = Path(config.out)
    # What the run is gets written down, so that going on with it can be told from starting another.
    described = {"flags": asdict(config), "model": asdict(shape), "data": {"fingerprint": corpus.fingerprint}}
    fingerprint = claim_directory(out, described, config, ranks)
    is_pairs = config.input_format in data.PAIR_FORMATS
    model = initial_model(config, shape, RobertaForPreTraining if is_pairs else RobertaForMaskedLM)
    if config.unigram_bias and config.init_from is None:
        model.lm_head.bias.data = log_shares(corpus.unigram).float()
    say(f"{model.num_parameters():,} parameters")
    training = begin(config, ranks, model, config.max_steps)
    resume(training, out, fingerprint)
    return training, fingerprint


def initial_model(config: TrainConfig, shape: RobertaConfig, kind: type[RobertaForMaskedLM]) -> Any:
    """Returns the model as it is before the first step, the same on every rank."""
    # The seed is for a new model, or for a head that the files lack.
    torch.manual_seed(config.seed)
    # Where there is a checkpoint, `resume` will give the weights.
    if config.init_from is None or checkpoints(Path(config.out)):
        return kind(shape)
    return kind.from_pretrained(config.init_from, **dropout_changes(config))


def evaluate_only(config: TrainConfig) -> dict[str, Any]:
    """Evaluates the model at --init-from as a run does before its first step; returns what it writes.

    That is --out/results.json, and nothing else. Raises: ValueError where --out holds anything but that.
    """
    out, path = Path(config.out), Path(config.out) / "results.json"
    others = set(os.listdir(out)) - {path.name, ".lock"} if out.is_dir() else set()
    if others or (path.exists() and "init_from" not in data.read_json(path)):
        raise ValueError(f"{out} holds {min(others or {path.name})!r}, which --eval-only has not written; "
                         "choose another --out")
    # A text is prepared beside --out, where every rank finds it, and goes afterwards.
    scratch = data.temporary_beside(out)
    with held_by_first_rank(scratch), contextlib.ExitStack() as at_the_end:
        if ranks_of_environment()[0] == 0:
            at_the_end.callback(shutil.rmtree, scratch)
        corpus, held_out, shape, ranks = open_data(config, scratch / "data")
        # Nothing is trained, so any number of ranks will do: each has a batch of its own.
        config = settle(replace(config, batch_size=config.batch_size * ranks.world_size), shape, ranks)
        _, batches = make_batches(config, corpus, held_out, ranks)
        model = initial_model(config, shape, RobertaForMaskedLM)
        training = begin(replace(config, compile=False), ranks, model)
        result = evaluate(training, batches, corpus.unigram)
    result |= {"init_from": config.init_from, "data": config.data, "seq_len": config.seq_len}
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        data.write_json(path, result)
    say("  ".join(f"{name} {value:.4g}" for name, value in result.items() if isinstance(value, float)))
    return result


def finish(training: Training, result: dict, corpus: Corpus, held_out: Batches) -> dict[str, Any]:
    """Puts the model into the run directory itself, writes results.json and shows what was learned.

    result: of the last evaluation; empty where the run was at its end already.
    """
    out, progress, model = Path(training.config.out), training.progress, training.model
    if not result:
        step = progress.step
        say(f"{out} is finished at step {step}. To lengthen it: --max-steps {2 * step}. Or: another --out")
        # Its results stay as they are; but a crash may have come before them, or they are of a shorter run.
        results = data.read_json(out / "results.json") if (out / "results.json").exists() else {}
        if results.get("steps") == progress.step:
            return results
        result = evaluate(training, held_out, corpus.unigram)
    results = result | {"steps": progress.step, "tokens": progress.tokens, "seconds": progress.seconds,
                        "parameters": model.num_parameters(), "peak_memory_bytes": peak_memory()}
    if training.ranks.rank == 0:
        # From here on the directory is a model like any other.
        model.save_pretrained(out, corpus.tokenizer)
        data.write_json(out / "results.json", results)
        say("\nheld-out perplexity {eval_perplexity:.2f}, unigram baseline {unigram_perplexity:.1f}; "
            "{tokens:,} tokens in {seconds:,.0f} s\nof the predicted tokens of held-out text the first guess "
            "gets {masked_accuracy:.0%} right, the first five {masked_top5_accuracy:.0%}\n\n"
            "held-out sentences, and the three best guesses, with the right one in [ ]:\n".format(**results))
        example = show_filled_masks(model, held_out.sequences.corpus)
        say(f"\nask it yourself:  python roberta.py {shlex.quote(str(out))} {shlex.quote(example)}\n"
            f"your own text:    torchrun train.py --data FILE.txt --out runs/mine\n"
            f"its curves:       {out / 'loss.png'}")
    return results


def show_filled_masks(model: RobertaForMaskedLM, corpus: Corpus, count: int = 5) -> str:
    """Prints held-out sentences with a word masked, and the three tokens that the model finds most probable;
    returns the last sentence with its mask.
    """
    tokenizer, ends, masked = corpus.tokenizer, corpus.sentences[:20_000], "It is <mask>."
    for number in data.epoch_order(len(ends), 0, 0):
        ids = corpus.read(ends[number - 1] if number else 0, ends[number])
        words = [tokenizer.decode([index]) for index in ids]
        # The word in the middle that is a single token, of three letters and more.
        places = [place for place, word in enumerate(words[:-1]) if place > 2 and len(word) > 3
                  and word[0] == " " and word[1:].isalpha() and not words[place + 1][0].isalpha()]
        if places and 10 <= len(ids) <= 25 and not set("\n<") & set("".join(words[1:])):
            place = places[len(places) // 2]
            masked = ("".join(words[:place]) + " <mask>" + "".join(words[place + 1 :])).strip()
            guesses = []
            for guess in model.fill_mask(masked, tokenizer, top_k=3):
                shown = guess["token_str"].strip() or "white space"
                guesses.append(f"[{shown}]" if guess["token"] == ids[place] else shown)
            say(f"  {masked}\n     {'  '.join(guesses)}   (it was{words[place]})")
            count -= 1
        if count == 0:
            break
    return masked


# ----------------------------------------------------------------------------------------------------------
# Checkpoints: why a rename is enough
# ----------------------------------------------------------------------------------------------------------

@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds besides weights, Adam's moments and the scaler's scale."""

    step: int = 0  # optimiser steps, skipped ones too
    tokens: int = 0  # real ones, up to the last log line
    seconds: float = 0.0  # of training, evaluating and saving
    skipped: int = 0  # steps whose gradients were not finite
    skipped_in_a_row: int = 0
    grad_norm: float = 0.0
    best: float | None = None  # the best evaluation's score, the more the better
    best_step: int = 0
    best_result: dict[str, float] = field(default_factory=dict)

    def note_result(self, result: dict[str, float], score: float) -> bool:
        """Notes an evaluation; returns whether it is the best so far. A score may be NaN."""
        # Equal is not better: of two equal evaluations the earlier one is kept, which took less training.
        is_best = self.best is None or score > self.best
        if is_best:
            self.best = score if math.isfinite(score) else None
            self.best_step, self.best_result = self.step, result
        return is_best


def save(training: Training, out: Path, tokenizer: Tokenizer, fingerprint: str) -> None:
    """Writes out/checkpoint-<step>: the model, as anyone can open it, and the training state beside it.

    Written under another name, flushed to the disk with a checksum of every file, then renamed, which happens
    or does not: at no time does a directory with a checkpoint's name hold a part of one. Raises: OSError
    where the disk is full; what is written by then is removed as a killed process's is, by `resume`.
    """
    progress, final = training.progress, out / f"checkpoint-{training.progress.step}"
    if training.ranks.rank == 0 and not final.exists():
        # The model for everyone; for this program Adam's moments, the progress, and the scaler's scale.
        # There is no state of random generators, since every draw is a function of the step.
        temporary = data.temporary_beside(final)
        temporary.mkdir()
        training.model.save_pretrained(temporary, tokenizer)
        # The optimiser knows parameters by identity, the file by name.
        moments = {f"{name}.{kind}": value for name, parameter in training.model.named_parameters()
                   for kind, value in training.optimizer.state[parameter].items()}
        roberta.write_safetensors(temporary / "optimizer.safetensors", moments)
        state = {"fingerprint": fingerprint, "scaler": training.scaler.state_dict()}
        data.write_json(temporary / "progress.json", state | {"progress": asdict(progress)})
        checksums = {path.name: data.checksum(path) for path in temporary.iterdir()}
        data.write_json(temporary / "checksums.json", checksums)
        # Every file is on the disk by now. This makes them a checkpoint, all at once.
        os.replace(temporary, final)
        os.sync()  # the directories, too
        # Only now may older ones go; never the one that evaluated best.
        for step, path in checkpoints(out)[training.config.keep :]:
            if step != progress.best_step:
                remove_checkpoint(path)
    training.ranks.meet(f"going on after the checkpoint of step {progress.step}")
    lap(training)  # the time of saving counts for the run, but not for its throughput


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """Returns (step, directory) of the run's checkpoints, newest first."""
    paths = [path for path in out.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(((int(path.name.removeprefix("checkpoint-")), path) for path in paths), reverse=True)


def remove_checkpoint(path: Path) -> None:
    # Renamed first: a directory that is only half removed must not look like a checkpoint.
    shutil.rmtree(path.replace(data.temporary_beside(path)))


# ----------------------------------------------------------------------------------------------------------
# Resuming
# ----------------------------------------------------------------------------------------------------------


def run_before(out: Path) -> dict[str, Any]:
    """Returns what run.json says of the run that has begun in a directory; empty where none has."""
    return data.read_json(out / "run.json") if (out / "run.json").exists() else {}


def claim_directory(out: Path, described: dict[str, dict], config: RunConfig, ranks: Ranks) -> str:
    """Writes run.json, or where it is there already, refuses a run that would not continue it.

    Returns the run's fingerprint, of all that may not change; checkpoints have it, too.
    Raises: ValueError with both values, for the first that differs.
    """
    # A second start may change what leaves the result alone, such as how often checkpoints are written. It
    # may also change the length of the schedule and the micro-batch, which do not.
    fixed = json.loads(json.dumps(described))  # as it will be read back
    for name in data.may_change(config):
        fixed["flags"].pop(name, None)
    fingerprint, before = data.fingerprint_of(fixed), run_before(out) or fixed
    for part, values in fixed.items():
        for name, value in values.items():
            if (found := before.get(part, {}).get(name)) != value:
                way = f"; to go on from its weights: --init-from {out} --out NEW" if part == "flags" else ""
                what = f"{part} {name}" if name == "fingerprint" else name
                raise ValueError(f"{out} holds a run with {what} {found}, this one has {value}; choose "
                                 f"another --out, or delete it to start over{way}")
    ranks.meet("the beginning of the run")  # all have looked
    if ranks.rank == 0 and before is fixed:
        data.write_json(out / "run.json", described | {"fingerprint": fingerprint})
    return before.get("fingerprint", fingerprint)


def resume(training: Training, out: Path, fingerprint: str) -> None:
    """Takes over the newest whole checkpoint, if there is one, and removes what a killed process left."""
    ranks = training.ranks
    # Rank 0 chooses for all, for what one finds damaged another may find whole. The others add nothing to
    # its number.
    newest = newest_checkpoint(out, fingerprint) if ranks.rank == 0 else 0
    newest = int(ranks.sum(torch.tensor(newest), "the choice of a checkpoint"))
    if newest > 0:
        path = out / f"checkpoint-{newest}"
        saved, loaded = data.read_json(path / "progress.json"), type(training.model).from_pretrained(path)
        training.model.load_state_dict(loaded.state_dict())
        for key, value in roberta.read_safetensors(path / "optimizer.safetensors").items():
            name, kind = key.rsplit(".", 1)
            training.optimizer.state[training.model.get_parameter(name)][kind] = value.to(ranks.device)
        training.scaler.load_state_dict(saved["scaler"])
        training.progress = Progress(**saved["progress"])
        say(f"resuming at step {newest} from {path}")
    if ranks.rank == 0:
        # What a kill or a full disk has left half written or half removed.
        for path in out.glob(".checkpoint-*[0-9].tmp"):
            shutil.rmtree(path)
        # Lines written after that checkpoint will be written again; without one all of them, step 0's, too.
        lines = [json.dumps(line) + "\n" for line in read_log(out) if newest and line["step"] <= newest]
        data.write_atomically(out / "log.jsonl", "".join(lines).encode())


def newest_checkpoint(out: Path, fingerprint: str) -> int:
    """Returns the step of the newest checkpoint that is whole; 0 where there are none at all.

    A damaged one is said and set aside, the one before it used. Raises: ValueError where all are damaged.
    """
    found = checkpoints(out)
    for number, (step, path) in enumerate(found):
        try:
            check_checkpoint(path, step, fingerprint)
        except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            fault = f"{path.name} is damaged ({error})"
            say(f"warning: {fault}; the one before it is used, if there is one")
            continue
        # Nothing is set aside before a whole one is found: where none is, a person has to look.
        for _, damaged in found[:number]:
            aside = damaged.with_name(f"damaged-{damaged.name}")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.replace(aside)
        return step
    if found:
        raise ValueError(f"no whole checkpoint: {fault}; put one back, or delete {out} to start over")
    return 0


def check_checkpoint(path: Path, step: int, fingerprint: str) -> None:
    """Raises ValueError or OSError where a checkpoint is not whole, or not step `step` of this run."""
    # A cut or altered file would otherwise come to light as odd losses days later, or never. What is read is
    # in this directory, whatever names the list of checksums holds.
    expected = data.read_json(path / "checksums.json")
    found = {file.name: data.checksum(file) for file in path.iterdir() if file.name in expected}
    for name in ("config.json", roberta.MODEL_FILE, "optimizer.safetensors", "progress.json", *expected):
        if name not in found or found[name] != expected[name]:
            raise ValueError(f"{name} does not have its checksum")
    saved = data.read_json(path / "progress.json")
    identity = saved.get("fingerprint"), saved.get("progress", {}).get("step")
    if identity != (fingerprint, step):
        raise ValueError(f"it is step {identity[1]} of run {identity[0]}, not step {step} of {fingerprint}")


# ----------------------------------------------------------------------------------------------------------
# Log and plot
# ----------------------------------------------------------------------------------------------------------


def lap(training: Training) -> float:
    """Returns the seconds since the last call, which count for the run's duration."""
    began, training.lap_began = training.lap_began, time.monotonic()
    training.progress.seconds += training.lap_began - began
    return training.lap_began - began


def log(training: Training, out: Path, epoch: float) -> None:
    """Writes and prints a line about the steps since the last one. epoch: passes over the data so far."""
    progress, scaler, seconds = training.progress, training.scaler, lap(training)
    # Means over what was predicted since the last line, on all ranks; the share of padding is of all places.
    *sums, tokens, slots = training.ranks.sum(training.window.cpu(), "the losses").tolist()
    means = [part / max(1, count) for part, count in zip(sums, training.window_counts)]
    training.window, training.window_counts = 0.0, 0
    progress.tokens += int(tokens)
    line = {"epoch": round(epoch, 4), **dict(zip(("loss", "nsp_loss"), means))}
    if isinstance(training.config, TrainConfig):
        line["perplexity"] = perplexity(means[0])
    line |= {"lr": training.optimizer.param_groups[0]["lr"], "grad_norm": progress.grad_norm,
             "tokens_per_second": round(tokens / seconds), "padding": 1 - tokens / slots}
    if scaler.is_enabled() or progress.skipped:
        line |= {"scale": scaler.get_scale(), "skipped": progress.skipped}
    log_result(training, out, line, f"  {time_left(training, progress.step)} left")


def show_place(training: Training, number: int, micro_batches: int) -> None:
    """Shows where a run is, `number` of a step's micro-batches done: a step of BASE's 8,192 sequences takes
    hours on a laptop, and a log line comes after many steps.
    """
    step = training.progress.step
    place = f", micro-batch {number:,} of {micro_batches:,}" if micro_batches > 1 else ""
    data.say_now(lambda: f"step {step + 1:,} of {training.max_steps:,}{place}, "
                         f"{time_left(training, step + number / micro_batches)} left")


def time_left(training: Training, done: float) -> str:
    """Returns how long the run still takes, at its pace so far. done: steps, and a part of one."""
    seconds = training.progress.seconds + time.monotonic() - training.lap_began
    return data.clock(seconds / done * (training.max_steps - done))


def log_result(training: Training, out: Path, result: dict[str, float], more: str = "") -> dict[str, float]:
    """Writes and prints a line, with `more` behind it. An evaluation's time is not the next steps'."""
    step = training.progress.step
    if training.ranks.rank == 0:
        append_line(out / "log.jsonl", {"step": step} | result)
    shown = [f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"
             for name, value in result.items()]
    say("  ".join([f"step {step}", *shown]) + more)
    lap(training)
    return result


def read_log(out: Path) -> list[dict[str, Any]]:
    """Returns the lines of log.jsonl; those that a crash damaged are left out."""
    # A full disk or a crash may have left a part of a line, or zeros.
    path, lines = out / "log.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Adds a line to a file. Raises: OSError naming it. A part may be left then, which `read_log` leaves out.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(data.without_nan(line)) + "\n")
    except OSError as error:
        error.filename = str(path)  # a failed write does not say where
        raise


def plot_log(out: Path, title: str, ranks: Ranks) -> None:
    """Draws loss.png from log.jsonl: training and held-out loss, the unigram baseline, if any, as a line."""
    if ranks.rank > 0:
        return
    from matplotlib.figure import Figure

    lines = read_log(out)
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    # The training loss is a mean over many steps, the held-out loss one point for each evaluation.
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o-")):
        points = [line for line in lines if isinstance(line.get(name), float)]
        axes.plot([line["step"] for line in points], [line[name] for line in points], style, label=label)
    # Where a model would be that looks at no context: the plateau that every run has to leave.
    if baselines := [line["unigram_perplexity"] for line in lines if line.get("unigram_perplexity")]:
        axes.axhline(math.log(baselines[-1]), label="unigram baseline", color="gray", linestyle="--")
    axes.legend(frameon=False)
    axes.set(xlabel="optimiser steps", ylabel="loss (nats)", title=title)
    # Should a crash cut the picture off: it is drawn anew after the next checkpoint.
    axes.figure.savefig(out / "loss.png", dpi=120)


def peak_memory() -> int:
    """Returns the most memory this process has held, in bytes: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ----------------------------------------------------------------------------------------------------------
# Ends, and the command line
# ----------------------------------------------------------------------------------------------------------


def held_by_first_rank(out: Path) -> contextlib.AbstractContextManager:
    """Refuses a directory of someone else's; a run's own is locked, once however many ranks there are."""
    data.check_ours(out, "run.json", {"data"})
    return data.locked(out) if ranks_of_environment()[0] == 0 else contextlib.nullcontext()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM, Ctrl-C and SIGHUP instead of dying from them; torchrun may send several for one."""
    # SIGHUP: the terminal was closed. Who has started the run under nohup wants it to live on.
    numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    # A handler that only notes: the step at hand is finished, then the loop looks at the list.
    received: list[int] = []
    with contextlib.ExitStack() as at_the_end:
        for number in numbers:
            before = signal.signal(number, lambda number, _: received.append(number))
            at_the_end.callback(signal.signal, number, before)
        yield received


def stop_asked(received: list[int], ranks: Ranks) -> bool:
    """Returns whether any rank has received a signal: the same on all of them."""
    return bool(ranks.sum(torch.tensor(len(received)), "the signals"))


def end_after_signal(step: int, received: list[int]) -> NoReturn:
    say(f"stopped at step {step}, saved; the same command goes on from there")
    leave(128 + (received[0] if received else signal.SIGTERM))


@contextlib.contextmanager
def clean_end(unfit: int = 1) -> Iterator[None]:
    """Ends the process after a `with` block; with one line and no traceback, where a person can mend it.

    unfit: the exit code where the input, the flags or the disk are to blame.
    """
    try:
        yield
    except KeyboardInterrupt:
        leave(128 + signal.SIGINT, f"interrupted; {GO_ON}")
    except OSError as error:
        leave(unfit, f"error: {error}; once that is mended, {GO_ON}")
    except (ValueError, FloatingPointError) as error:
        leave(unfit if isinstance(error, ValueError) else 1, f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]  # torch takes several lines, the first of which says it
        # torch has a class for a full GPU, and only a message for a full machine. Smaller micro-batches
        # change the result by no more than rounding and dropout's noise.
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in reason:
            leave(1, f"error: out of memory; try a smaller --micro-batch-size ({reason})")
        # Among several ranks, whatever else goes wrong in a collective is most often that another is gone.
        if not dist.is_initialized():
            raise
        leave(1, f"error: rank {dist.get_rank()} lost another: {reason}; {GO_ON}")
    leave(0)


def leave(code: int, message: str = "") -> NoReturn:
    """Ends this process; a rank among others at once, for a farewell could block."""
    if message:
        data.clear_line()
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # gloo's threads were seen to abort a process while Python took it down.
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


def check(config: TrainConfig) -> None:
    """Raises ValueError for values that no run can have, before anything is read or written."""
    data.check_flags(config)
    if config.data == "":
        raise ValueError("--data is empty; leave it out to learn from the documentation installed here")
    if config.init_from and Path(config.init_from).resolve() == Path(config.out).resolve():
        raise ValueError(f"--init-from and --out are both {config.out}; choose another --out")
    if config.eval_only and not config.init_from:
        raise ValueError("--eval-only evaluates the model of --init-from DIR, which is not given")
    if config.warmup_steps > config.max_steps:
        raise ValueError(f"--warmup-steps {config.warmup_steps} exceeds --max-steps {config.max_steps}")
    size, share = config.seq_len, config.mlm_probability
    if data.predictions_of(data.room_for_text(size, config.input_format), share) < 1:
        raise ValueError(f"--seq-len {size} at --mlm-probability {share} leaves nothing to predict; try 128")


def parse(argv: Sequence[str] | None) -> TrainConfig:
    """Returns the preset with the flags' changes. --help shows the defaults of the preset that would run."""
    # The preset is looked for first, since the other flags' defaults depend on it.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", choices=PRESETS, default="tiny")
    preset = PRESETS[finder.parse_known_args(argv)[0].preset]()
    parser = argparse.ArgumentParser("train.py", None, "Pretrain RoBERTa.", allow_abbrev=False)
    data.add_flags(parser, preset)
    given = vars(parser.parse_args(argv))
    given.setdefault("out", "runs/eval" if given.get("eval_only") else f"runs/{preset.preset}")
    shape_flags = [f.name for f in fields(preset) if f.metadata["group"] == "model" and f.name in given]
    if "init_from" in given and shape_flags:
        raise ValueError(f"--{shape_flags[0].replace('_', '-')} beside --init-from, whose model has a shape "
                         "and a vocabulary; leave one of the two out")
    if "max_steps" in given and "warmup_steps" not in given:  # a warm-up that is not given keeps its share
        given["warmup_steps"] = preset.warmup_steps * given["max_steps"] // preset.max_steps
    return replace(preset, **given)


def main(argv: Sequence[str] | None = None) -> None:
    with clean_end():
        config = parse(argv)
        say("  ".join(f"{name}={value}" for name, value in asdict(config).items() if value is not None))
        check(config)
        if config.eval_only:
            evaluate_only(config)
        else:
            pretrain(config)


if __name__ == "__main__":
    main()
