"""Pretraining: one command from nothing to a RoBERTa, on one core or on many machines.

    torchrun train.py                                            # tiny, on the documentation installed here
    torchrun train.py --data prepared --preset base --out runs/mine
    torchrun --nproc-per-node 8 --nnodes 4 --rdzv-backend c10d --rdzv-endpoint HOST:29400 train.py ...
    python train.py                                              # in one process, without torchrun

RoBERTa is BERT trained right (§5): dynamic masks, full sentences without NSP, large batches, a large
byte-level BPE. The file reads in the order a run goes: config, setup, data, model and optimiser, evaluation,
checkpoints, log, loop.

What makes a run reproducible: every random draw is a pure function of (seed, step, ...) (data.py), and the
loss is a sum divided by the number of predictions of the whole step, over all ranks and micro-steps. So in
one process on a CPU a resumed run equals an uninterrupted one bit for bit, and without dropout, more ranks or
smaller micro-batches change nothing but rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import io
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import regex
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from data import (
    DROPOUT_STREAM,
    PAIR_FORMATS,
    PRETOKEN,
    WORK,
    Batch,
    Batches,
    Corpus,
    InputFormat,
    PrepareConfig,
    Sequences,
    Step,
    Tokenizer,
    add_flags,
    checksum,
    draw,
    flag,
    garbage_collector_off,
    locked,
    permute,
    predictions_of,
    prefetch,
    prepare,
    read_json,
    remove_leftovers,
    say,
    temporary_beside,
    write_atomically,
)
from roberta import (
    WEIGHTS,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForPreTraining,
    RobertaModelBase,
    evaluating,
    read_pickle,
)

# ----------------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunConfig:
    """What pretraining and fine-tuning have in common. The defaults are BASE's of Table 9."""

    out: str | None = flag(None, "run directory; none: runs/PRESET")
    precision: Literal["fp32", "fp16", "bf16"] | None = flag(None, "none: fp16 on a GPU, else fp32", "§3")
    batch_size: int = flag(8192, "sequences an optimiser step, over all ranks", "Table 9")
    micro_batch_size: int | None = flag(None, "sequences a forward pass; none: up to 32 that divide")
    peak_lr: float = flag(6e-4, "learning rate after warm-up", "Table 9")
    weight_decay: float = flag(0.01, "decoupled weight decay of the matrices", "Table 9")
    adam_beta1: float = flag(0.9, "Adam's beta 1", "Table 9")
    adam_beta2: float = flag(0.98, "Adam's beta 2; 0.999 is unstable with large batches", "§3")
    adam_eps: float = flag(1e-6, "Adam's epsilon", "Table 9")
    clip_norm: float = flag(0.0, "largest gradient norm; 0: no clipping", "Table 9")
    dropout: float | None = flag(None, "dropout of layers and attention; none: the model's")
    seed: int = flag(0, "of every random draw")
    log_interval: int = flag(100, "steps between log lines")
    checkpoint_interval: int = flag(2000, "steps between checkpoints")
    keep: int = flag(2, "newest checkpoints kept, beside the best one")
    timeout: float = flag(600.0, "seconds after which a rank that stands still ends the run")


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One pretraining run. A preset changes some of BASE's values, flags change any."""

    preset: Literal["tiny", "base", "large"] = flag("tiny", "size and schedule", "Table 9; tiny: a laptop")
    data: str | None = flag(None, "prepared directory, or text; none: the documentation installed here")
    seq_len: int = flag(512, "tokens a sequence at most", "§2")
    max_steps: int = flag(500_000, "optimiser steps", "Table 9")
    warmup_steps: int = flag(24_000, "steps of linear warm-up", "Table 9")
    masking: Literal["dynamic", "static"] = flag("dynamic", "new masks every epoch, or ten in turn", "§4.1")
    mlm_probability: float = flag(0.15, "share of the tokens that are predicted", "§2")
    input_format: InputFormat = flag("full-sentences", "what a sequence is made of", "§4.2")
    vocab_size: int = flag(50265, "units of the tokenizer, where --data is not prepared yet", "§4.4")
    hidden_size: int | None = flag(None, "width; none: the preset's")
    num_hidden_layers: int | None = flag(None, "layers; none: the preset's")
    num_attention_heads: int | None = flag(None, "attention heads; none: the preset's")
    intermediate_size: int | None = flag(None, "width of the feed-forward layer; none: the preset's")
    initializer_range: float | None = flag(None, "standard deviation of initial weights; none: the preset's")
    eval_interval: int = flag(2000, "steps between evaluations")
    eval_sequences: int = flag(4096, "held-out sequences an evaluation reads, at most")
    compile: bool = flag(False, "compile the model with torch.compile")


# What a second start of a run may change: max_steps lengthens the schedule, the others leave the remaining
# steps as they would have been, but for rounding and for dropout's noise. The data may move to another place.
FREE_TO_CHANGE = set("""out data vocab_size max_steps micro_batch_size log_interval eval_interval
    eval_sequences checkpoint_interval keep timeout compile""".split())


def tiny() -> TrainConfig:
    """Minutes on two cores: bench/results/first_run.json has the figures.

    CHOICE: many small steps instead of §4.3's large batches: with so little compute the number of updates
    decides how soon the model leaves the plateau near the unigram entropy.
    """
    return TrainConfig(
        preset="tiny", batch_size=16, seq_len=64, max_steps=4000, warmup_steps=300, peak_lr=2e-3,
        vocab_size=4096, eval_interval=500, checkpoint_interval=500,
    )


def base() -> TrainConfig:
    return TrainConfig(preset="base")


def large() -> TrainConfig:
    return TrainConfig(preset="large", warmup_steps=30_000, peak_lr=4e-4)


def model_config(config: TrainConfig, vocab_size: int) -> RobertaConfig:
    """Returns the preset's model with the flags' changes, for inputs of `seq_len` tokens."""
    preset = getattr(RobertaConfig, config.preset)()
    shape = "hidden_size num_hidden_layers num_attention_heads intermediate_size initializer_range".split()
    changes = {name: getattr(config, name) for name in shape if getattr(config, name) is not None}
    if config.dropout is not None:
        changes |= {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    longest = max(preset.max_position_embeddings, config.seq_len + preset.pad_token_id + 1)
    changes["type_vocab_size"] = 2 if config.input_format in PAIR_FORMATS else 1
    return replace(preset, vocab_size=vocab_size, max_position_embeddings=longest, **changes)


# ----------------------------------------------------------------------------------------------------------
# Setup: ranks, device, precision
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """Who and where this process is."""

    rank: int
    world_size: int
    device: torch.device
    precision: str
    heartbeat: Heartbeat | None = None  # None: alone

    def mark(self, place: str) -> None:
        """Notes that this rank has come to a place, which all ranks come to in the same order."""
        if self.heartbeat:
            self.heartbeat.mark(place)

    def still_at_work(self) -> None:
        """Notes that this rank gets on, between two marks: others may be waiting, but not in vain."""
        if self.heartbeat:
            self.heartbeat.work += 1

    def rest(self) -> None:
        """Notes that until its next mark this rank may take any time."""
        if self.heartbeat:
            self.heartbeat.since = math.inf

    def barrier(self, of: str) -> None:
        """Returns when all ranks have come here."""
        self.sum(torch.zeros(1), of)

    def sum(self, values: Tensor, of: str) -> Tensor:
        """Returns the sum of `values` over all ranks, which wait for each other here."""
        if self.world_size > 1:
            self.mark(f"at the sum of {of}")
            dist.all_reduce(values)
            self.mark(f"after the sum of {of}")
        return values

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in 16 bits, sums and normalisations in 32 (§3, mixed precision); no-op for fp32."""
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)


def ranks_of_environment() -> tuple[int, int, int, int]:
    """Returns rank, world size, local rank and local world size as torchrun sets them; alone without it."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return tuple(int(os.environ.get(name, default)) for name, default in names.items())


def set_up(precision: str | None, timeout: float = RunConfig.timeout) -> Setup:
    """Joins the other ranks, takes this rank's device, and says what was chosen.

    timeout: seconds after which a rank that stands still ends the run.
    """
    heartbeat = None
    rank, world_size, local_rank, local_world_size = ranks_of_environment()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        if local_world_size > 1:  # torchrun gives each rank one thread; the cores are there to be shared
            torch.set_num_threads(max(1, cores() // local_world_size))
    if world_size > 1 and not dist.is_initialized():
        # torchrun hands restarted ranks the store of the attempt before, with addresses of the dead in it.
        # On one machine the attempts have a common number, by which the entries can be told apart.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if local_world_size == world_size else "0"
        store, _, _ = next(dist.rendezvous("env://", rank, world_size))
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        # torch's own limit, which names nobody, comes after the heartbeat's.
        limit = timedelta(seconds=max(1800, 2 * timeout + 60))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        heartbeat = Heartbeat(store.clone(), rank, world_size, timeout)
    precision = precision or ("fp16" if on_gpu else "fp32")
    where = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads a rank"
    say(f"{world_size} rank{'s' * (world_size > 1)} on {where}; {precision}; torch {torch.__version__}; "
        f"attention by scaled_dot_product_attention", rank)
    return Setup(rank, world_size, device, precision, heartbeat)


class Beat(NamedTuple):
    """What a rank tells of itself: another number shows that it lives, more marks or work that it gets on."""

    number: int
    marks: int
    work: int  # counts micro-batches and the like, between two marks
    place: str
    process: int
    host: str


class Heartbeat:
    """Ends the run, naming the rank to blame, when a rank stands still.

    Ranks wait for each other in every step, so where one stands still all do, and no collective says for whom
    it waits. So each rank has a thread that writes now and then, to the store through which the ranks met,
    that it lives and how far it is. A rank that has come no further for half of `timeout` reads what the
    others write, and when in the other half none has come any further, ends the run. To blame is who is
    silent (stopped, or its machine is), else who has fewer marks. Such a rank on the same machine is killed
    at once: torchrun, which starts all of them again, would first wait half a minute for it to end.

    A second thread keeps the time, for a store on a machine that is gone may never answer. Its clock stands
    still while this process does: one that was paused has not waited.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float):
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.interval = min(5.0, timeout / 8)
        self.marks = self.work = 0
        self.place, self.since = "setting up", math.inf  # infinity: at rest, which counts as getting on
        self.clock = self.answered = 0.0
        # The last beat of each rank, when it was heard, when it came further; empty while there is no need.
        self.beats: list[Beat] = []
        self.heard: list[float] = []
        self.moved: list[float] = []
        store.set_timeout(timedelta(seconds=self.interval))
        for thread in (self._talk, self._keep_time):
            threading.Thread(target=thread, daemon=True).start()

    def mark(self, place: str) -> None:
        self.marks, self.place, self.since = self.marks + 1, place, self.clock

    def _talk(self) -> None:
        keys = [f"heartbeat-{rank}" for rank in range(self.world_size)]
        process, host = os.getpid(), socket.gethostname()
        for number in itertools.count():
            if self.since == math.inf:
                self.work += 1
            beat = Beat(number, self.marks, self.work, self.place, process, host)
            with contextlib.suppress(RuntimeError):  # the store's; `answered` shows it
                self.store.set(keys[self.rank], json.dumps(beat))
                if self.clock - self.since < self.timeout / 2:
                    self.beats = []
                else:
                    self._read([Beat(*json.loads(value)) for value in self.store.multi_get(keys)])
                self.answered = self.clock
            time.sleep(self.interval)

    def _read(self, beats: list[Beat]) -> None:
        if not self.beats:
            self.heard, self.moved = [self.clock] * len(beats), [self.clock] * len(beats)
        for rank, (before, beat) in enumerate(zip(self.beats, beats)):
            if beat.number != before.number:
                self.heard[rank] = self.clock
            if (beat.marks, beat.work) != (before.marks, before.work):
                self.moved[rank] = self.clock
        self.beats = beats

    def _keep_time(self) -> None:
        while True:
            time.sleep(self.interval)
            self.clock += self.interval
            if self.clock - self.since < self.timeout:
                continue
            if self.clock - self.answered > self.timeout / 2:
                fail("error: the process through which the ranks met (torchrun, or rank 0) answers no more; "
                     "the same command goes on from the last checkpoint")
            if (beats := self.beats) and self.clock - max(self.moved) > self.timeout / 2:
                self._end(beats)

    def _end(self, beats: list[Beat]) -> NoReturn:
        """Says who is to blame, ends those of them that run on this machine, and this process."""
        silent = [rank for rank, heard in enumerate(self.heard) if self.clock - heard > 3 * self.interval]
        most = max(beat.marks for beat in beats)
        to_blame = silent or [rank for rank, beat in enumerate(beats) if beat.marks < most]
        lines = []
        for rank in to_blame:
            what = "is silent, last seen" if rank in silent else "stands still"
            lines.append(f"error: rank {rank} (process {beats[rank].process} on {beats[rank].host}) {what} "
                         f"{beats[rank].place}, and has kept the others waiting for more than "
                         f"--timeout {self.timeout:g} s\n")
        lines = lines or [f"error: all ranks stand still {self.place} for more than --timeout "
                          f"{self.timeout:g} s; is it the network?\n"]
        advice = "the same command goes on from the last checkpoint"
        print(*lines, advice, sep="", file=sys.stderr, flush=True)
        for beat in map(beats.__getitem__, to_blame):
            if beat.process != os.getpid() and is_sibling(beat.process, beat.host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.process, signal.SIGKILL)
        os._exit(1)


def is_sibling(process: int, host: str) -> bool:
    """Returns whether a process on a host has our parent: then it is a rank that our torchrun has started."""
    if host != socket.gethostname():
        return False
    try:
        parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
    except OSError:  # it is gone, or this is no Linux
        return False
    return int(parent) == os.getppid()


def keep_freed_memory() -> None:
    """Has the C library keep the memory of freed tensors for the next ones, as torch itself does on a GPU.

    glibc returns large blocks to the system at once, and for every new one the system clears each page anew:
    with BASE on a CPU that takes a quarter of a step (bench/RESULTS.md). Another C library is left as it is.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks up to 1 GB come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: whose free end is kept, up to 2 GB


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------


def prepared_data(config: TrainConfig) -> Path:
    """Returns --data if it is prepared; else prepares its text, or the documentation installed here."""
    rank, world_size, _, _ = ranks_of_environment()
    if config.data == "":
        raise ValueError("--data is empty; leave it out to learn from the documentation installed here")
    begun = ("manifest.json", WORK, "unigram.npy", "tokenizer")  # Corpus refuses what is not whole
    if config.data and any((Path(config.data) / name).exists() for name in begun):
        return Path(config.data)
    corpus = (config.data,) if config.data else ()
    directory = Path(config.out) / "data"
    return prepare(PrepareConfig(corpus, str(directory), config.vocab_size), rank, world_size)


def micro_batch_size(config: RunConfig, world_size: int) -> int:
    """Returns --micro-batch-size, or the largest size up to 32 that divides each rank's share of a batch."""
    if config.micro_batch_size:
        return config.micro_batch_size
    if config.batch_size % world_size:
        raise ValueError(f"batch_size {config.batch_size} does not divide among {world_size} ranks; "
                         f"try --batch-size {-(-config.batch_size // world_size) * world_size}")
    share = config.batch_size // world_size
    return max(n for n in range(1, min(share, 32) + 1) if share % n == 0)


def to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# ----------------------------------------------------------------------------------------------------------
# Model, loss, optimiser, schedule
# ----------------------------------------------------------------------------------------------------------


def loss_sums(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sums (in nats) of the batch's MLM and NSP losses, and the MLM logits (M, V).

    Sums, because what they are divided by is known only over all ranks and micro-steps. No pairs: NSP's is 0.
    """
    names = ("input_ids", "attention_mask", "token_type_ids", "positions")
    inputs = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
    logits = model(**{name: to_tensor(array, device) for name, array in inputs.items()})
    nsp = torch.zeros((), device=device)
    if isinstance(logits, tuple):
        logits, nsp_logits = logits
        if batch.next_sentence_labels is not None:  # evaluation is on FULL-SENTENCES, which has no pairs
            nsp_labels = to_tensor(batch.next_sentence_labels, device)
            nsp = F.cross_entropy(nsp_logits.float(), nsp_labels, reduction="sum")
    labels = to_tensor(batch.labels, device)
    mlm = F.cross_entropy(logits.float(), labels, reduction="sum")  # ignores -100; 16 bits would overflow
    return mlm, nsp, logits


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """Returns Adam with weight decay, one fused kernel for all parameters.

    CHOICE: "L2 weight decay" (§2) is decoupled from Adam's moments, and only matrices decay, both as in
    BERT's code: pulling a LayerNorm's gain or a bias to 0 regularises nothing.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, config.peak_lr, betas, config.adam_eps, fused=True)


def learning_rate(step: int, peak_lr: float, warmup_steps: int, max_steps: int) -> float:
    """Returns the rate of step 0, 1, ...: up linearly for the warm-up, then down linearly to 0 (§2).

    >>> [learning_rate(step, 1.0, warmup_steps=2, max_steps=10) for step in (0, 1, 2, 6)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    return peak_lr * (max_steps - step) / max(1, max_steps - warmup_steps)


def try_to_compile(model: nn.Module, sample: Batch, setup: Setup) -> nn.Module:
    """Returns the model compiled, or as it is where no compiler works: then a line says so."""
    compiled = torch.compile(model)
    try:
        with setup.autocast():
            loss_sums(compiled, sample, setup.device)[0].backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a missing or broken compiler raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        say(f"--compile: no working compiler ({reason}); going on without", setup.rank)
        torch._dynamo.reset()
        compiled = model
    model.zero_grad(set_to_none=True)
    return compiled


# ----------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: nn.Module, held_out: Batches, unigram: np.ndarray, limit: int, setup: Setup
) -> dict[str, float]:
    """Returns held-out loss and perplexity, masked accuracy, and the unigram baseline on the same positions.

    All ranks share the work; the masks are fixed, so any two evaluations of a run compare. The baseline
    predicts each token with its share of the training text (add-one smoothed): what a model knows that looks
    at no context.
    """
    log_share = torch.from_numpy(np.log((unigram + 1) / (unigram + 1).sum()))
    sums = torch.zeros(4, dtype=torch.float64)  # predictions, loss, unigram loss, correct
    with evaluating(model), setup.autocast():
        for batch in held_out.held_out(limit):
            setup.still_at_work()
            loss, _, logits = loss_sums(model, batch, setup.device)
            labels = torch.from_numpy(batch.labels)
            correct = (logits.argmax(-1).cpu() == labels).sum()
            labels = labels[labels >= 0]
            sums += torch.tensor([len(labels), loss, -log_share[labels].sum(), correct], dtype=torch.float64)
    count, loss, baseline, correct = setup.sum(sums, "the held-out losses").tolist()
    if count == 0:
        raise ValueError("the held-out split has no token to predict; prepare more text or raise held_out")
    return {"eval_loss": loss / count, "eval_perplexity": perplexity(loss / count),
            "unigram_perplexity": perplexity(baseline / count), "masked_accuracy": correct / count}


def perplexity(loss: float) -> float:
    """Returns exp(loss), for a loss in nats a token; where a run has diverged, no more than exp(25)."""
    return math.exp(min(loss, 25.0))


def show_filled_masks(model: RobertaForMaskedLM, corpus: Corpus, count: int = 5) -> None:
    """Prints held-out sentences with one word masked, and what the model puts there."""
    tokenizer, shown = corpus.tokenizer, 0
    sentences = [(shard, i) for shard in corpus.shards for i in range(min(len(shard.sentences), 20_000))]
    for place in permute(np.arange(len(sentences)), len(sentences), seed=0, epoch=0):
        shard, i = sentences[place]
        begin = shard.sentences[i - 1] if i else 0
        text = " ".join(tokenizer.decode(shard.tokens[begin : shard.sentences[i]].tolist()).split())
        words = [m for m in regex.finditer(PRETOKEN, text) if regex.fullmatch(r" [a-z]{4,}", m.group())]
        words = [word for word in words if len(tokenizer.encode(word.group())) == 1]
        if not (40 <= len(text) <= 100 and words and "<mask>" not in text and text[0].isupper()):
            continue
        word = words[int(draw(0, place)) % len(words)]
        masked = text[: word.start()] + " <mask>" + text[word.end() :]
        best = model.fill_mask(masked, tokenizer, top_k=1)[0]
        verdict = "right" if best["token_str"] == word.group() else f"was {word.group().strip()}"
        print(f"  {masked}\n      {best['token_str'].strip()} ({best['score']:.0%}; {verdict})", flush=True)
        shown += 1
        if shown == count:
            return


# ----------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------


def save_checkpoint(out: Path, step: int, model: RobertaModelBase, tokenizer: Tokenizer,
                    state: dict[str, Any], progress: Callable[[], object] = lambda: None) -> None:
    """Writes out/checkpoint-<step>: the model, as anyone can open it, and the training state beside it.

    Written under another name, flushed to the disk with a checksum of every file, then renamed: at no time
    does a directory with a checkpoint's name hold a part of one. The link `checkpoint` points to the newest.
    `progress` is called between its parts. Raises: OSError, having removed what it wrote.
    """
    final = out / f"checkpoint-{step}"
    temporary = temporary_beside(final)
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary, tokenizer)
        progress()
        torch.save(state, temporary / "training.pt")
        checksums = {}
        for path in sorted(temporary.iterdir()):
            progress()
            checksums[path.name] = checksum(path)
            sync(path)
        write_atomically(temporary / "checksums.json", json.dumps(checksums, indent=1).encode())
        sync(temporary)
        os.replace(temporary, final)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise  # else it is torch's word for a full disk
        raise OSError(f"cannot write {final} ({str(error).splitlines()[0]}); is the disk full? Earlier "
                      "checkpoints are whole, and the same command goes on from them") from None
    point_to(final)


def point_to(path: Path) -> None:
    """Has the link `checkpoint` beside a checkpoint lead to it."""
    link = path.parent / "checkpoint"
    if link.is_dir() and not link.is_symlink():  # many ways to copy a run put a copy in a link's place
        remove_checkpoint(link)
    temporary = temporary_beside(link)
    temporary.symlink_to(path.name)
    os.replace(temporary, link)
    sync(path.parent)


def sync(path: Path) -> None:
    """Has the disk hold what was written to a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """Returns (step, directory) of the run's checkpoints, newest first."""
    paths = [path for path in out.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(((int(path.name.removeprefix("checkpoint-")), path) for path in paths), reverse=True)


def remove_checkpoint(path: Path) -> None:
    if path.is_symlink():  # to where there was more space, perhaps
        path.unlink()
    elif path.exists():
        doomed = temporary_beside(path)
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def check_checkpoint(path: Path, step: int, identity: str) -> None:
    """Compares all files of a checkpoint with their checksums.

    Raises: ValueError or OSError where it is not whole, or not step `step` of the run `identity`.
    """
    checksums = read_json(path / "checksums.json")
    if missing := {"config.json", WEIGHTS, "training.pt"} - checksums.keys():
        raise ValueError(f"checksums.json has none for {min(missing)}")
    if added := {file.name for file in path.glob("model.safetensors*")} - checksums.keys():
        raise ValueError(f"checksums.json has none for {min(added)}, which would be opened before {WEIGHTS}")
    files = {file.name for file in path.iterdir() if file.is_file()}  # no pipe or device, which have no end
    if strange := checksums.keys() - files:
        raise ValueError(f"checksums.json names {min(strange)!r}, which is no file of the checkpoint")
    for name, expected in checksums.items():
        if checksum(path / name) != expected:
            raise ValueError(f"{name} does not have its checksum")
    saved = read_pickle(path / "training.pt")
    state = saved.get("state")
    found = saved.get("identity"), state.get("step") if isinstance(state, dict) else None
    if found != (identity, step):
        raise ValueError(f"it is step {found[1]} of run {found[0]}, not step {step} of {identity}")


def newest_checkpoint(out: Path, identity: str) -> int:
    """Returns the step of the newest checkpoint that is whole; -1 where there are none at all.

    A damaged one is reported and set aside, and the one before it is used.
    Raises: ValueError where all are damaged, OSError where one can't be read: nothing is set aside then.
    """
    damaged: dict[Path, Exception] = {}
    for step, path in checkpoints(out):
        try:
            check_checkpoint(path, step, identity)
        except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            damaged[path] = error
            continue
        for unsound, error in damaged.items():
            aside = unsound.with_name(f"damaged-{unsound.name}")
            say(f"warning: {unsound} is damaged ({error}); it is now {aside.name}, the one before it is used")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(unsound, aside)
        return step
    if damaged:
        path, error = next(iter(damaged.items()))
        raise ValueError(f"{out} holds no whole checkpoint: {path.name} is damaged ({error}), and so is any "
                         "before it; put one back, or delete the directory to start over")
    return -1


# ----------------------------------------------------------------------------------------------------------
# Log and plot
# ----------------------------------------------------------------------------------------------------------


def read_log(out: Path) -> list[dict[str, Any]]:
    """Returns the lines of log.jsonl; those that a crash damaged are left out."""
    path, lines = out / "log.jsonl", []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file, or where the disk is full, nothing. Raises: OSError that says so."""
    with open(path, "ab", buffering=0) as file:
        size, content = file.tell(), f"{line}\n".encode()
        try:
            if file.write(content) < len(content):  # what was left of the disk took a part of it
                raise OSError("no space for a whole line")
        except OSError as error:
            file.truncate(size)
            raise OSError(f"cannot write {path} ({error}); is the disk full? Checkpoints are whole, and the "
                          "same command goes on from the last one") from None


def plot_log(out: Path, title: str, ylabel: str) -> None:
    """Draws loss.png from log.jsonl: training and held-out loss, the unigram baseline, if any, as a line."""
    with garbage_collector_off():
        content = _draw(out, title, ylabel)
        # A figure is full of cycles: left to Python's own time, each held on to another 1.3 MB.
        gc.collect(0)  # they are young, for with the collector off nothing has grown older
    write_atomically(out / "loss.png", content)


def _draw(out: Path, title: str, ylabel: str) -> bytes:
    from matplotlib.figure import Figure

    lines = read_log(out)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    label = {"ha": "right", "fontsize": 9, "textcoords": "offset points"}

    def curve(name: str) -> list[tuple[int, float]]:
        """Returns its values by step; one that was not finite stands in the log as null."""
        return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]

    train, held = curve("loss"), curve("eval_loss")
    if train:
        axes.plot(*zip(*train, strict=True), color="#9ecae1", linewidth=1, label="training")
    if held:
        axes.plot(*zip(*held, strict=True), color="#08519c", marker="o", markersize=4, label="held-out")
    if (unigrams := curve("unigram_perplexity")) and unigrams[0][1] > 0:
        unigram = math.log(unigrams[0][1])
        axes.axhline(unigram, color="#d94801", linestyle="--", linewidth=1)
        axes.annotate("unigram baseline", (lines[-1]["step"], unigram), (0, 3), color="#d94801", **label)
        if held:
            text = f"perplexity {perplexity(held[-1][1]):.1f}"
            axes.annotate(text, held[-1], (0, 18), color="#08519c", **label)
    axes.set(xlabel="optimiser steps", ylabel=ylabel, title=title)
    if train or held:
        axes.legend(frameon=False, loc="upper center", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    return content.getvalue()


def clock(seconds: float) -> str:
    """Returns a duration for people.

    >>> clock(75), clock(90000)
    ('1:15', '1 d 1:00:00')
    """
    days, seconds = divmod(int(seconds), 86400)
    hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
    short = f"{hours}:{minutes:02d}:{seconds:02d}" if hours or days else f"{minutes}:{seconds:02d}"
    return f"{days} d {short}" if days else short


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------

MAX_SKIPPED = 20  # steps without finite gradients in a row: more of them will not mend what is wrong


class Health:
    """Says, once each, what goes wrong slowly: the gradient norm, the held-out loss, the throughput.

    `state` belongs into the checkpoint, for a resumed run to say what the uninterrupted one would have said;
    throughput is the machine's, which may be another by then.
    """

    LEAP, RISES, SETTLED = 10, 5, 100  # times the average; evaluations in a row; steps that an average takes

    def __init__(self, rank: int):
        self.rank = rank
        self.state = {"steps": 0, "norm": 0.0, "lowest": math.inf, "lowest_step": 0, "above": 0, "said": []}
        self.rates: list[float] = []
        self.is_slow = False  # not in the state: that is the same on a machine that others use, too

    def say_once(self, what: str, message: str) -> None:
        if what not in self.state["said"]:
            self.state["said"].append(what)
            say(f"warning (said once): {message}", self.rank)

    def see_norm(self, step: int, norm: float) -> None:
        """Compares a finite gradient norm with a running average, which a leap may raise only so far."""
        state = self.state
        if state["steps"] >= self.SETTLED and norm > self.LEAP * state["norm"]:
            self.say_once("norm", f"the gradient norm of step {step} is {norm:.3g}, of late it was "
                          f"{state['norm']:.3g}; if the loss suffers: --clip-norm, or a lower --peak-lr")
            norm = self.LEAP * state["norm"]
        state["steps"] += 1
        state["norm"] += (norm - state["norm"]) / min(state["steps"], self.SETTLED)

    def see_loss(self, step: int, loss: float) -> None:
        """Counts the evaluations since the lowest held-out loss."""
        state = self.state
        if loss < state["lowest"]:
            state |= {"lowest": loss, "lowest_step": step, "above": 0}
            return
        state["above"] += 1
        if state["above"] >= self.RISES and loss > 1.02 * state["lowest"]:
            self.say_once("loss", f"the held-out loss of step {step} is {loss:.3f}, that of step "
                          f"{state['lowest_step']} was {state['lowest']:.3f}, none since was lower: too many "
                          "passes over little text, or too high a --peak-lr? The best checkpoint is kept")

    def see_rate(self, step: int, rate: float) -> None:
        """Compares the tokens a second of the last two log lines with what they were at first."""
        self.rates.append(rate)
        usual = statistics.median(self.rates[1:6]) if len(self.rates) > 7 else 0.0  # the first has warming up
        if max(self.rates[-2:]) < usual / 2 and not self.is_slow:
            self.is_slow = True
            say(f"warning (said once): at step {step} training goes at {rate:,.0f} tokens a second, at first "
                f"it was {usual:,.0f}: do other programs run, is the machine hot or failing?", self.rank)


class Run:
    """What pretraining and fine-tuning share: optimiser steps, the log, checkpoints, exact resuming.

    A subclass makes the parts and says what the losses are (`loss_sums`, `loss_counts`), what an evaluation
    finds (`measure`), which of two is better (`score`), and when it is over.

    batches: `step(n)` gives this rank's micro-batches of step n, and the pass over the data it begins at.
    """

    loss_names: tuple[str, ...] = ("loss",)
    save_improvements = False  # whether an evaluation better than all before is a reason to save

    def __init__(self, config: RunConfig, setup: Setup, model: RobertaModelBase, tokenizer: Tokenizer,
                 batches: Any, warmup_steps: int, max_steps: int):
        self.config, self.setup, self.out = config, setup, Path(config.out)
        self.model, self.tokenizer, self.batches = model.to(setup.device), tokenizer, batches
        self.schedule = config.peak_lr, warmup_steps, max_steps
        self.max_steps = max_steps
        self.optimizer = make_optimizer(self.model, config)
        # The loss is a mean over the whole step: a micro-batch's gradients are smaller by their number.
        scale = 2.0 ** (16 + round(math.log2(batches.num_micro_batches)))
        self.scaler = torch.amp.GradScaler(setup.device.type, scale, enabled=setup.precision == "fp16")
        # Since the last log line, on this rank: sums of the losses; real tokens, tokens with padding. What
        # the losses are divided by is the same on all ranks, and part of the state.
        self.window_loss = torch.zeros(len(self.loss_names), dtype=torch.float64, device=setup.device)
        self.window_tokens = [0, 0]
        self.state = {"step": 0, "tokens": 0, "seconds": 0.0, "skipped": 0, "skipped_in_a_row": 0,
                      "score": -math.inf, "eval_step": -1, "best_score": -math.inf, "best_step": -1,
                      "window_counts": [0] * len(self.loss_names)}
        self.health = Health(setup.rank)
        self.grad_norm = self.epoch = 0.0
        self.wrapped: nn.Module = self.model

    def loss_sums(self, batch: Any) -> tuple[Tensor, ...]:
        """Returns the sum of each loss over a micro-batch. Sums: only the whole step knows the counts."""
        raise NotImplementedError

    def loss_counts(self, step: Any) -> list[int]:
        """Returns what each loss is divided by: a count over all micro-batches of all ranks."""
        raise NotImplementedError

    def measure(self) -> dict[str, float]:
        """Returns what an evaluation finds, the same on all ranks."""
        raise NotImplementedError

    def score(self, result: dict[str, float]) -> float:
        """Returns how good an evaluation is, more is better: the best checkpoint is kept."""
        raise NotImplementedError

    def shown(self, result: dict[str, float]) -> str:
        """Returns an evaluation in words."""
        raise NotImplementedError

    def is_over(self) -> bool:
        return self.step >= self.max_steps

    @property
    def step(self) -> int:
        return self.state["step"]

    def resume(self) -> None:
        """Makes ready to train, from the newest whole checkpoint if there is one."""
        self.window_started = time.monotonic()
        self.identity = read_json(self.out / "run.json")["identity"] if self.setup.rank == 0 else ""
        # Rank 0 chooses for all, who add zeros: what one finds damaged another may find whole.
        newest = newest_checkpoint(self.out, self.identity) if self.setup.rank == 0 else 0
        newest = int(self.setup.sum(torch.tensor(newest), "the newest checkpoint's number"))
        self.setup.rest()  # to read and to compile a large model takes its time
        if newest >= 0:
            self._restore(self.out / f"checkpoint-{newest}")
        if self.setup.rank == 0:  # lines written after that checkpoint will be written again
            log = read_log(self.out)
            logged = max((line["step"] for line in log), default=0)
            if logged < self.step - self.config.log_interval:
                say(f"warning: {self.out / 'log.jsonl'} lacks lines up to step {self.step}, which are lost")
            lines = [json.dumps(line) + "\n" for line in log if line["step"] <= self.step]
            write_atomically(self.out / "log.jsonl", "".join(lines).encode())
        # `model` stays what is saved and evaluated; `wrapped` is what the training step calls.
        if self.setup.world_size > 1:
            device_ids = [self.setup.device.index] if self.setup.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.model, device_ids, gradient_as_bucket_view=True)

    def _restore(self, path: Path) -> None:
        """Takes over weights and training state of a checkpoint."""
        if not path.exists():
            raise ValueError(f"rank {self.setup.rank} on {socket.gethostname()} does not see {path}, rank 0 "
                             "does; all machines must see the same files")
        loaded, saved = type(self.model).from_pretrained(path), read_pickle(path / "training.pt")
        if loaded.config != self.model.config:
            raise ValueError(f"{path} holds a model of another shape; choose another --out")
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            self.state |= saved["state"]
            self.health.state |= saved["health"]
            if self.setup.rank == 0:  # one rank goes on with the sums over all
                self.window_loss.copy_(saved["window"][:-2])
                self.window_tokens = saved["window"][-2:].long().tolist()
            self.window_started = time.monotonic() - saved["window_seconds"]
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{path}: training.pt is not this run's ({error!r}); remove {path}, and the "
                             "checkpoint before it is used") from None
        self.model.load_state_dict(loaded.state_dict())
        if self.setup.rank == 0:
            point_to(path)  # a crash may have come between the checkpoint and the link
        say(f"resuming at step {self.step} from {path}", self.setup.rank)

    def train_step(self, step: Any) -> None:
        """One optimiser step: accumulate the micro-batches' gradients, then update."""
        setup = self.setup
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, *self.schedule)
        self.model.train()
        counts = self.loss_counts(step)
        setup.mark(f"in step {self.step + 1}, before the gradients are summed")
        for number, batch in enumerate(step.batches):
            setup.still_at_work()
            # Dropout depends on where in the run we are, not on how often a generator was asked before.
            seed = draw(self.config.seed, DROPOUT_STREAM, self.step, number, setup.rank)
            torch.manual_seed(int(seed >> np.uint64(1)))  # it takes 63 bits
            last = number == len(step.batches) - 1
            unsummed = contextlib.nullcontext() if last or setup.world_size == 1 else self.wrapped.no_sync()
            with unsummed:  # gradients travel between ranks once a step, with the last micro-batch
                with setup.autocast():
                    sums = self.loss_sums(batch)
                loss = sum(part / max(1, count) for part, count in zip(sums, counts))
                if last:
                    setup.mark(f"in step {self.step + 1}, while the gradients are summed")
                # DDP averages over ranks; the sum is what is wanted.
                self.scaler.scale(loss * setup.world_size).backward()
            self.window_loss += torch.stack(sums).detach()
            self.window_tokens = [self.window_tokens[0] + batch.num_tokens,
                                  self.window_tokens[1] + batch.input_ids.size]
        self._update()
        self.epoch = step.epoch
        self.state["window_counts"] = [a + b for a, b in zip(self.state["window_counts"], counts)]
        self.state["step"] += 1

    def _update(self) -> None:
        """Applies the gradients, unless they are not finite: then the step is skipped and counted."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.config.clip_norm > 0:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip_norm, norm)
        finite = bool(norm.isfinite())
        if finite or self.scaler.is_enabled():  # the scaler skips by itself, and lowers its scale
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.grad_norm = norm.item()
        if finite:
            self.health.see_norm(self.step + 1, self.grad_norm)
        self.state["skipped"] += not finite
        self.state["skipped_in_a_row"] = 0 if finite else self.state["skipped_in_a_row"] + 1
        if self.state["skipped_in_a_row"] >= MAX_SKIPPED:
            raise FloatingPointError(
                f"no finite gradient in {MAX_SKIPPED} steps to {self.step + 1}: the run diverges; "
                f"start another --out with a lower --peak-lr than {self.config.peak_lr}, a longer "
                "warm-up, or --precision fp32 or bf16"
            )

    def _window(self) -> Tensor:
        """Returns the sums since the last log line, over all ranks."""
        tokens = torch.tensor(self.window_tokens, dtype=torch.float64)
        return self.setup.sum(torch.cat([self.window_loss.cpu(), tokens]), "the losses")

    def log(self) -> None:
        """Writes and prints a line about the steps since the last one."""
        *sums, tokens, slots = self._window().tolist()
        seconds = time.monotonic() - self.window_started
        means = [part / max(1, count) for part, count in zip(sums, self.state["window_counts"])]
        line = {"step": self.step, "epoch": round(self.epoch, 4), **self.named(means),
                "lr": learning_rate(self.step - 1, *self.schedule), "grad_norm": self.grad_norm,
                "tokens_per_second": tokens / seconds, "padding": 1 - tokens / slots}
        if self.scaler.is_enabled():
            line["scale"] = self.scaler.get_scale()
        if self.scaler.is_enabled() or self.state["skipped"]:
            line["skipped"] = self.state["skipped"]
        self.state["tokens"] += int(tokens)
        self.state["seconds"] += seconds
        self.health.see_rate(self.step, tokens / seconds)
        line["eta_seconds"] = self.state["seconds"] / self.step * (self.max_steps - self.step)
        self._write(line)
        formats = {"epoch": ".2f", "loss": ".3f", "perplexity": ".1f", "lr": ".2e", "grad_norm": ".2f",
                   "nsp_loss": ".3f", "scale": "g", "skipped": "g"}
        parts = [f"{name} {line[name]:{form}}" for name, form in formats.items() if name in line]
        say("  ".join([f"step {self.step}/{self.max_steps}", *parts, f"{line['tokens_per_second']:,.0f} "
                       f"tokens/s  left {clock(line['eta_seconds'])}"]), self.setup.rank)
        self.window_loss.zero_()
        self.window_tokens = [0, 0]
        self.state["window_counts"] = [0] * len(self.loss_names)
        self.window_started = time.monotonic()

    def named(self, means: list[float]) -> dict[str, float]:
        """Returns the mean losses as a log line names them."""
        return dict(zip(self.loss_names, means))

    def evaluate(self) -> dict[str, float]:
        """Evaluates, prints and writes a line about it."""
        started = time.monotonic()
        self.setup.mark(f"in the evaluation of step {self.step}")
        result = self.measure()
        self._write({"step": self.step} | result)
        say(f"step {self.step}  {self.shown(result)}", self.setup.rank)
        self.state |= {"score": self.score(result), "eval_step": self.step}
        self._not_training(started)
        return result

    def _not_training(self, started: float) -> None:
        """Takes the time since `started` out of the throughput, but not out of the run's duration."""
        spent = time.monotonic() - started
        self.window_started += spent
        self.state["seconds"] += spent

    def _write(self, line: dict[str, Any]) -> None:
        if self.setup.rank == 0:
            # JSON has no NaN or infinity.
            line = {key: value if math.isfinite(value) else None for key, value in line.items()}
            append_line(self.out / "log.jsonl", json.dumps(line))

    def _improved(self) -> bool:
        """Returns whether the weights as they are now are the best so far."""
        return self.state["eval_step"] == self.step and self.state["score"] > self.state["best_score"]

    def _note_if_best(self) -> None:
        if self._improved():
            self.state |= {"best_score": self.state["score"], "best_step": self.step}

    def save(self) -> None:
        """Writes a checkpoint of the current step, removes those no longer kept, draws the log."""
        started = time.monotonic()
        window, window_seconds = self._window(), started - self.window_started
        self.setup.mark(f"in the checkpoint of step {self.step}")
        self._note_if_best()
        if self.setup.rank == 0:
            state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                     "state": self.state, "window": window, "window_seconds": window_seconds,
                     "health": self.health.state, "identity": self.identity}
            sync(self.out / "log.jsonl")  # no checkpoint outlives the lines before it
            save_checkpoint(self.out, self.step, self.model, self.tokenizer, state,
                            progress=self.setup.still_at_work)
            for step, path in checkpoints(self.out)[self.config.keep :]:
                if step != self.state["best_step"]:
                    remove_checkpoint(path)
            self.plot()
        self.setup.barrier("who has saved")  # nobody ends while rank 0 is still writing
        self._not_training(started)

    def plot(self) -> None:
        """Draws what the log says."""
        raise NotImplementedError

    def loop(self, eval_interval: int) -> dict[str, float]:
        """Trains from where the run stands to its end; returns the last evaluation's result.

        A signal ends the process at the next step, on all ranks, with a checkpoint of it.
        """
        if self.setup.rank == 0:
            self.plot()  # what that takes of memory is taken from the start
        with stop_signals() as received:
            for step in prefetch(self.batches.step, range(self.step, self.max_steps)):
                self.train_step(step)
                last = self.step == self.max_steps
                if self.step % self.config.log_interval == 0 or last:
                    self.log()
                if evaluated := (self.step % eval_interval == 0 or last):
                    result = self.evaluate()
                # All ranks stop at the same step, whoever got the signal.
                stop = int(self.setup.sum(torch.tensor(len(received)), "the signals"))
                ends = stop > 0 or self.is_over()
                learns = self.state["skipped_in_a_row"] == 0  # else there is nothing new to save
                due = self.step % self.config.checkpoint_interval == 0 and learns
                better = self.save_improvements and evaluated and self._improved()
                if due or better or ends:
                    self.save()
                if ends:
                    break
        self.setup.rest()
        if stop or received:  # the latter: while the last step's checkpoint was written
            say(f"stopped at step {self.step}, saved; the same command goes on from there", self.setup.rank)
            sys.exit(128 + (received[0] if received else signal.SIGTERM))
        return result


def claim_directory(out: Path, described: dict[str, dict], free_to_change: set[str], rank: int) -> None:
    """Writes run.json, or where it is there already, refuses a run that would not continue it.

    The run's identity, a digest of what it was begun with, is added: checkpoints have it, too.
    Raises: ValueError with both values, for the first entry that differs and is no flag of `free_to_change`.
    """
    described = json.loads(json.dumps(described))  # as it will be read back
    path = out / "run.json"
    try:
        before = read_json(path) if path.exists() else {}
        if not all(isinstance(before.get(part, {}), dict) for part in described):
            raise ValueError(f"{path}: damaged")
    except ValueError as error:
        raise ValueError(f"{error}; delete run.json, and the same command writes it anew") from None
    fixed = described | {"flags": {name: value for name, value in described.get("flags", {}).items()
                                   if name not in free_to_change}}
    if before:
        for part, values in fixed.items():
            for name, value in values.items():
                if (found := before.get(part, {}).get(name)) != value:
                    raise ValueError(f"{out} holds a run with {name} {found}, this one has {value}; "
                                     "choose another --out, or delete the directory to start over")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        identity = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]
        described["identity"] = before.get("identity", identity)
        write_atomically(path, (json.dumps(described, indent=1) + "\n").encode())


class Pretraining(Run):
    """A pretraining run: its parts, made from the config and a prepared directory."""

    def __init__(self, config: TrainConfig, data: Path, setup: Setup):
        corpus, self.held_out_corpus = Corpus(data), Corpus(data, "heldout")
        for split in (corpus, self.held_out_corpus):
            split.verify(setup.rank, setup.world_size)
        self.unigram = corpus.unigram
        shape = model_config(config, corpus.vocab_size)
        described = {"flags": asdict(config), "model": asdict(shape),
                     "data": {"tokenizer": corpus.tokenizer.fingerprint, "tokens": corpus.num_tokens}}
        claim_directory(Path(config.out), described, FREE_TO_CHANGE, setup.rank)
        if setup.rank == 0:
            write_atomically(Path(config.out) / "config.json", shape.to_json("RobertaForMaskedLM").encode())
        micro = micro_batch_size(config, setup.world_size)
        shared = {"micro_batch_size": micro, "mlm_probability": config.mlm_probability,
                  "rank": setup.rank, "world_size": setup.world_size}
        sequences = Sequences(corpus, config.input_format, config.seq_len)
        batches = Batches(
            sequences, batch_size=config.batch_size, seed=config.seed, masking=config.masking, **shared
        )
        # CHOICE: every format is evaluated on FULL-SENTENCES, so that runs in different formats compare
        # (§4.2). The seed is no run's own: all runs on the same data are asked for the same masks.
        held_out = Sequences(self.held_out_corpus, "full-sentences", config.seq_len)
        self.held_out = Batches(held_out, batch_size=micro * setup.world_size, seed=2**32, **shared)
        self.loss_names = ("loss", "nsp_loss") if sequences.is_pairs else ("loss",)

        torch.manual_seed(config.seed)
        model = (RobertaForPreTraining if sequences.is_pairs else RobertaForMaskedLM)(shape)
        schedule = config.warmup_steps, config.max_steps
        super().__init__(config, setup, model, corpus.tokenizer, batches, *schedule)
        say(f"{self.model.num_parameters():,} parameters, {self.tokenizer.vocab_size} units, "
            f"{len(sequences.epoch(config.seed, 0)):,} sequences of {corpus.num_tokens:,} tokens; "
            f"{batches.num_micro_batches} x {micro} sequences a rank and step", setup.rank)

    def resume(self) -> None:
        super().resume()
        if self.config.compile:
            self.wrapped = try_to_compile(self.wrapped, self.batches.step(0).batches[0], self.setup)

    def loss_sums(self, batch: Batch) -> tuple[Tensor, ...]:
        return loss_sums(self.wrapped, batch, self.setup.device)[: len(self.loss_names)]

    def loss_counts(self, step: Step) -> list[int]:
        return [step.num_predictions, step.num_sequences][: len(self.loss_names)]

    def named(self, means: list[float]) -> dict[str, float]:
        names = super().named(means)
        return {"loss": names.pop("loss"), "perplexity": perplexity(means[0]), **names}

    def measure(self) -> dict[str, float]:
        return evaluate(self.model, self.held_out, self.unigram, self.config.eval_sequences, self.setup)

    def evaluate(self) -> dict[str, float]:
        result = super().evaluate()
        self.health.see_loss(self.step, result["eval_loss"])
        return result

    def score(self, result: dict[str, float]) -> float:
        return -result["eval_loss"]

    def shown(self, result: dict[str, float]) -> str:
        return ("held-out perplexity {eval_perplexity:.2f}  (unigram {unigram_perplexity:.1f})  masked "
                "accuracy {masked_accuracy:.1%}".format(**result))

    def plot(self) -> None:
        title = f"RoBERTa {self.config.preset}, {self.model.num_parameters():,} parameters"
        plot_log(self.out, title, "masked-LM loss (nats)")

    def finish(self, result: dict[str, float]) -> dict[str, Any]:
        """Writes results.json and shows what the model has learned."""
        self.setup.rest()
        results = result | {
            "steps": self.step, "tokens": self.state["tokens"], "seconds": self.state["seconds"],
            "parameters": self.model.num_parameters(), "peak_memory_bytes": peak_memory(),
        }
        if self.setup.rank == 0:
            write_atomically(self.out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
            ratio = result["unigram_perplexity"] / result["eval_perplexity"]
            verdict = f"{ratio:.1f} times better" if ratio > 1 else "not better yet"
            print(f"\nheld-out perplexity {result['eval_perplexity']:.2f}, unigram baseline "
                  f"{result['unigram_perplexity']:.1f}: {verdict}; "
                  f"{self.state['tokens']:,} tokens in {clock(self.state['seconds'])}\n\nheld-out sentences:")
            show_filled_masks(self.model, self.held_out_corpus)
            example = "Returns a new array of given <mask> and type."
            print(f'\nfill your own:  python roberta.py {shlex.quote(str(self.out))} "{example}"\n'
                  f"curves: {self.out / 'loss.png'}   log: {self.out / 'log.jsonl'}", flush=True)
        return results


def peak_memory() -> int:
    """Returns the most memory this process has held, in bytes: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ----------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and Ctrl-C instead of dying from them; torchrun may send several for one."""
    received: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: received.append(number))
                for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs, or goes on with, the run that `config` describes; returns what results.json holds."""
    config = replace(config, out=config.out or f"runs/{config.preset}")
    check(config)
    with locked(Path(config.out), ranks_of_environment()[0]):
        data = prepared_data(config)
        setup = set_up(config.precision, config.timeout)
        run = Pretraining(replace(config, precision=setup.precision), data, setup)
        run.resume()
        if not run.is_over():
            return run.finish(run.loop(config.eval_interval))
        say(f"{config.out} is finished at step {run.step}. To lengthen it: --max-steps {2 * run.step}, with "
            f"the schedule of the longer run. To start another: another --out, or delete it.", setup.rank)
        with contextlib.suppress(ValueError, FileNotFoundError):  # a damaged one can be made again
            if (results := read_json(run.out / "results.json")).get("steps") == run.step:
                return results
        if setup.rank == 0:
            run.plot()
        return run.finish(run.measure())


def check_values(config: RunConfig) -> None:
    """Raises ValueError for values that no run, of pretraining or fine-tuning, can have."""
    for name in ("batch_size", "log_interval", "checkpoint_interval", "keep"):
        at_least(config, name, 1)
    at_least(config, "micro_batch_size", 0)
    ranges = {"dropout": (0, 1), "adam_beta1": (0, 1), "adam_beta2": (0, 1), "adam_eps": (1e-30, 1),
              "peak_lr": (1e-12, 1e3), "weight_decay": (0, 1e3), "clip_norm": (0, 1e9), "seed": (0, 2**63),
              "timeout": (1, 1e7)}
    for name, (low, high) in ranges.items():
        in_range(config, name, low, high)


def at_least(config: RunConfig, name: str, least: int) -> None:
    if (value := getattr(config, name)) is not None and value < least:
        raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if value is not None and value >= 2**53:  # up to here numbers are exact in JSON, too
        raise ValueError(f"--{name.replace('_', '-')} is beyond 2^53")


def in_range(config: RunConfig, name: str, low: float, high: float) -> None:
    if (value := getattr(config, name)) is not None and not low <= value < high:  # NaN is in no range
        raise ValueError(f"--{name.replace('_', '-')} {value} must be from {low:g} up to {high:g}")


def check(config: TrainConfig) -> None:
    """Raises ValueError for values that no run can have, before anything is read or written."""
    check_values(config)
    for name in ("max_steps eval_interval eval_sequences seq_len hidden_size num_hidden_layers "
                 "num_attention_heads intermediate_size").split():
        at_least(config, name, 1)
    at_least(config, "warmup_steps", 0)
    if config.warmup_steps > config.max_steps:
        raise ValueError(f"--warmup-steps {config.warmup_steps} exceeds --max-steps {config.max_steps}; "
                         f"try --warmup-steps {config.max_steps // 20}")
    in_range(config, "mlm_probability", 1e-9, 1)
    in_range(config, "initializer_range", 0, 1e3)
    room = (config.seq_len - 4) // 2 if config.input_format in PAIR_FORMATS else config.seq_len - 2
    if predictions_of(room, config.mlm_probability) < 1:
        raise ValueError(f"--seq-len {config.seq_len} with --mlm-probability {config.mlm_probability} leaves "
                         "nothing to predict in a sequence; try --seq-len 128")


def parse(argv: Sequence[str] | None) -> TrainConfig:
    """Returns the preset with the flags' changes."""
    changed = {name: value for name, value in asdict(tiny()).items() if value != getattr(base(), name)}
    epilog = "The defaults shown are BASE's. --preset tiny, which is the default, has instead: "
    epilog += ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())
    parser = argparse.ArgumentParser("train.py", None, "Pretrain RoBERTa.", epilog, allow_abbrev=False)
    add_flags(parser, TrainConfig)
    given = vars(parser.parse_args(argv))
    preset = {"tiny": tiny, "base": base, "large": large}[given.get("preset", "tiny")]()
    return replace(preset, **given)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(argv)
    rank = ranks_of_environment()[0]
    say("  ".join(f"{name}={value}" for name, value in asdict(config).items() if value is not None), rank)
    with clean_end():
        train(config)


@contextlib.contextmanager
def clean_end(unfit: int = 1) -> Iterator[None]:
    """Ends the process after a `with` block; with one line and no traceback, where a person can mend it.

    unfit: the exit code where the input, the flags or the disk are to blame.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        fail(f"error: {str(error).splitlines()[0][:100]}; try a smaller --micro-batch-size: it changes the "
             "result by no more than rounding and dropout's noise")
    except (ValueError, OSError) as error:
        fail(f"error: {error}", unfit)
    except FloatingPointError as error:
        fail(f"error: {error}")
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # what torch says on a CPU
            fail("error: out of memory; try a smaller --micro-batch-size, or a smaller model")
        fail(lost_rank(error))
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here", 128 + signal.SIGINT)
    except SystemExit as stopped:
        leave(stopped.code)
        raise
    leave(0)


def lost_rank(error: RuntimeError) -> str:
    """Returns what to say where a collective failed because another rank is gone. Raises: any other error."""
    if not dist.is_initialized() or not re.search("gloo|nccl|process group|TCPStore", str(error), re.I):
        raise error
    return (f"error: lost another rank ({str(error).splitlines()[0][:160]}); look for what that one or "
            "torchrun says. The same command goes on from the last checkpoint")


def leave(code: int) -> None:
    """Ends a rank among others immediately: gloo's threads were seen to abort a process being torn down."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fail(message: str, code: int = 1) -> NoReturn:
    """Ends this process with one line; at once if there are other ranks, for a farewell could block."""
    print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
