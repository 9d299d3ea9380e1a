"""Fine-tuning: a pretrained RoBERTa put through GLUE, SQuAD and RACE (§5), by the paper's protocol.

    python finetune.py --task cola --data glue --model runs/tiny --out runs/cola
    python finetune.py --task all --data data --model runs/mine --sweep --out runs/downstream
    python finetune.py --task rte --data glue --model runs/downstream/mnli/batch32-lr2e-05-seed0 --predict
    python finetune.py --task cola --data glue --ensemble runs/a runs/b runs/c --predict --out runs/ensemble
    torchrun --nproc-per-node 8 finetune.py ...

Every task is examples -> inputs -> scores -> predictions -> metrics. The file reads in this order: config and
tasks, reading the published files, inputs and batches, metrics, heads (what a kind of task does with the
encoder), one run, and the commands that make several: sweep, all tasks, ensemble. How a step, a checkpoint
and exact resuming work is train.py's `Run`.

Legend: S inputs of a micro-batch (a text, a pair, a window of a passage, one candidate answer), T tokens,
G groups (inputs that are judged together: the four candidates of a question; elsewhere each input is one).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import math
import re
import statistics
import string
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

from data import (
    BOS,
    EOS,
    PAD,
    Tokenizer,
    add_flags,
    checksum,
    flag,
    locked,
    permute,
    read_json,
    say,
    write_atomically,
)
from roberta import (
    RobertaConfig,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaModel,
    RobertaModelBase,
    check_tokenizer,
    evaluating,
    find_model,
    read_config,
    read_model,
    weight_files,
)
from train import (
    Run,
    RunConfig,
    Setup,
    at_least,
    check_values,
    checkpoints,
    claim_directory,
    clean_end,
    in_range,
    micro_batch_size,
    plot_log,
    point_to,
    ranks_of_environment,
    remove_checkpoint,
    set_up,
    to_tensor,
)

# ----------------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------------

TaskName = Literal[
    "cola", "sst-2", "mrpc", "sts-b", "qqp", "mnli", "qnli", "rte", "wnli", "squad1", "squad2", "race", "all"
]


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """What one command is asked to do. The defaults are GLUE's; `table_10` has the other tasks'.

    CHOICE: of Table 10's sets for GLUE, {16, 32} and {1e-5, 2e-5, 3e-5}, a single run takes 32 and the middle
    rate. CHOICE: the model of the best epoch is kept, for SQuAD and RACE as well, and three epochs without a
    better one end a run. The lengths in a SQuAD input are those of BERT's code.
    """

    task: TaskName = flag("all", "a task, or all that --data holds")
    data: str | None = flag(None, "folder of the tasks (glue/, squad/, RACE/), or the task's own")
    model: str | None = flag(None, "pretrained model or fine-tuned run to start from")
    out: str | None = flag(None, "run directory; none: runs/TASK, or runs/TASK-ensemble")
    batch_size: int = flag(32, "examples (SQuAD: windows; --ranking: groups) a step, all ranks", "Table 10")
    micro_batch_size: int | None = flag(None, "examples a forward pass; none: up to 32 that divide")
    peak_lr: float = flag(2e-5, "learning rate after warm-up", "Table 10")
    weight_decay: float = flag(0.1, "decoupled weight decay of the matrices", "Table 10")
    epochs: int = flag(10, "passes over the training examples, at most", "Table 10")
    warmup_ratio: float = flag(0.06, "share of the steps that warm up", "Table 10")
    patience: int = flag(3, "epochs without a better dev metric that end a run; 0: never", "§5.1")
    keep: int = flag(1, "newest checkpoints kept during a run, beside the best one")
    seq_len: int | None = flag(None, "tokens an input at most; none: what the model takes, up to 512")
    doc_stride: int = flag(128, "tokens between the beginnings of a passage's windows")
    max_question_tokens: int = flag(64, "tokens of a question at most (SQuAD)")
    max_answer_tokens: int = flag(30, "tokens of a predicted answer at most (SQuAD)")
    scratch: bool = flag(False, "start from random weights of the model's shape: the baseline")
    ranking: bool = flag(False, "QNLI, WNLI: rank candidates, as for the paper's test set", "§5.1")
    sweep: bool = flag(False, "run every batch size with every learning rate and report the best", "§5.1")
    sweep_batch_sizes: tuple[int, ...] = flag((16, 32), "batch sizes of --sweep", "Table 10")
    sweep_lrs: tuple[float, ...] = flag((1e-5, 2e-5, 3e-5), "learning rates of --sweep", "Table 10")
    seeds: int | None = flag(None, "runs of each setting; none: 5 with --sweep, else 1", "§5.1")
    ensemble: tuple[str, ...] = flag((), "finished runs to average instead of training", "§5.1")
    predict: bool = flag(False, "write test predictions (no test set: dev) of the run, of several the best")
    skip_bad_rows: bool = flag(False, "leave malformed rows out, and count them, instead of stopping")


# What may differ between two starts of one run: see train.py. The rest is what its result depends on.
FREE_TO_CHANGE = {
    "out", "data", "model", "micro_batch_size", "log_interval", "checkpoint_interval", "keep", "timeout",
    "sweep", "sweep_batch_sizes", "sweep_lrs", "seeds", "ensemble", "predict",
}


def table_10(task: str) -> dict[str, Any]:
    """Returns the settings in which a task differs from GLUE's."""
    if task == "race":
        settings = {"batch_size": 16, "peak_lr": 1e-5, "epochs": 4}
    elif task.startswith("squad"):
        settings = {"batch_size": 48, "peak_lr": 1.5e-5, "epochs": 2, "weight_decay": 0.01}
    else:
        return {}
    # There is one setting to sweep over: only the seeds differ.
    return settings | {"sweep_batch_sizes": (settings["batch_size"],), "sweep_lrs": (settings["peak_lr"],)}


# ----------------------------------------------------------------------------------------------------------
# Tasks
# ----------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A task as its publishers ship it. The first metric decides which of two models is better."""

    folder: str
    paper: dict[str, tuple[float | None, float | None]]  # metric -> the paper's figures, dev: BASE, LARGE
    texts: tuple[str, ...] = ("sentence1", "sentence2")  # columns
    label: str = "label"  # column
    labels: tuple[str, ...] = ("0", "1")  # as the files spell them; none: a number is asked for


TASKS = {
    "cola": Task("CoLA", {"matthews_correlation": (63.6, 68.0)}, ("sentence",)),
    "sst-2": Task("SST-2", {"accuracy": (94.8, 96.4)}, ("sentence",)),
    "mrpc": Task("MRPC", {"accuracy": (90.2, 90.9), "f1": (None, None)}, ("#1 String", "#2 String"),
                 "Quality"),
    "sts-b": Task("STS-B", {"pearson": (91.2, 92.4), "spearman": (None, None)}, label="score", labels=()),
    "qqp": Task("QQP", {"accuracy": (91.9, 92.2), "f1": (None, None)}, ("question1", "question2"),
                "is_duplicate"),
    "mnli": Task("MNLI", {"accuracy": (87.6, 90.2), "accuracy_mismatched": (None, 90.2)}, label="gold_label",
                 labels=("contradiction", "neutral", "entailment")),
    "qnli": Task("QNLI", {"accuracy": (92.8, 94.7)}, ("question", "sentence"),
                 labels=("entailment", "not_entailment")),
    "rte": Task("RTE", {"accuracy": (78.7, 86.6)}, labels=("entailment", "not_entailment")),
    "wnli": Task("WNLI", {"accuracy": (None, 91.3)}),
    "squad1": Task("squad", {"f1": (None, 94.6), "exact_match": (None, 88.9)}),
    "squad2": Task("squad", {"f1": (None, 89.4), "exact": (None, 86.5)}),
    # The paper's figures are for the test set.
    "race": Task("RACE", {"accuracy": (None, 83.2), "accuracy_middle": (None, 86.5),
                          "accuracy_high": (None, 81.3)}, labels=("A", "B", "C", "D")),
}


class Example(NamedTuple):
    """One thing to judge, as it was published.

    texts: a sentence or a pair; SQuAD: question, passage; RACE: passage, question, four answers.
    label: index among the task's labels, or a value; SQuAD: (first character, text) of each gold answer.
    None where it is withheld.
    """

    id: str
    part: str  # of the split: MNLI's matched and mismatched, RACE's middle and high; else ""
    texts: tuple[str, ...]
    label: Any


# ----------------------------------------------------------------------------------------------------------
# Reading the files as published
# ----------------------------------------------------------------------------------------------------------


def task_directories(name: str, data: str | Path) -> list[Path]:
    """Returns where the files of a task may be: below the folder of all tasks, or in its own."""
    folder, data = TASKS[name].folder, Path(data)
    return [data / "glue" / folder, data / folder, data]


def find_task(name: str, data: str | Path) -> Path:
    """Returns the directory of a task. Raises: ValueError where training or dev files are missing."""
    folder, data, directories = TASKS[name].folder, Path(data), task_directories(name, data)
    for directory in directories:
        if split_files(name, directory, "train") and split_files(name, directory, "dev"):
            return directory
    looked = ", ".join(map(str, directories)) if data.is_dir() else f"{data}: no such directory"
    raise ValueError(f"no training and dev files of {name} ({looked}); --data takes the folder of the tasks "
                     f"or {folder}/ itself")


def split_files(name: str, directory: Path, split: str) -> list[tuple[str, Path]]:
    """Returns (part, path) of the files of a split, train, dev or test, that are there."""
    if name.startswith("squad"):
        files = [("", f"{split}-v{name[-1]}{'.1' if name[-1] == '1' else '.0'}.json")]
    elif name == "race":
        files = [(part, f"{split}/{part}") for part in ("middle", "high")]
    elif name == "mnli" and split != "train":
        files = [(part, f"{split}_{part}.tsv") for part in ("matched", "mismatched")]
        if split == "dev" and not all((directory / file).exists() for _, file in files):
            return []  # or the metrics of one would pass for those of the other
        if split == "test":  # GLUE's diagnostic set, by its older or its newer name
            older = (directory / "../diagnostic/diagnostic.tsv").exists()
            files.append(("AX", f"../{'diagnostic/diagnostic' if older else 'AX/AX'}.tsv"))
    elif name == "mrpc" and not (directory / "train.tsv").exists():
        # Microsoft's own files. GLUE's dev set is a part of their training set, listed in dev_ids.tsv.
        # DIFFERS: without that list their test set, which has its labels, serves as dev set.
        own_dev = split != "dev" or (directory / "dev_ids.tsv").exists()
        files = [("", f"msr_paraphrase_{'train' if split != 'test' and own_dev else 'test'}.txt")]
    else:
        files = [("", f"{split}.tsv")]
    return [(part, directory / file) for part, file in files if (directory / file).exists()]


def read_examples(name: str, directory: Path, split: str, skip_bad_rows: bool = False) -> list[Example]:
    """Returns the examples of a split.

    Raises: ValueError naming file and row where one is malformed, its label is not one of the task's, or the
    columns are another task's. `skip_bad_rows` leaves such rows out and says how many: some official files
    (QQP's) are known to have a few. A test set must be whole to be handed in.
    """
    if name.startswith("squad"):
        rows, parse = squad_rows, functools.partial(squad_example, name, split)
    elif name == "race":
        rows, parse = race_rows, functools.partial(race_example, split)
    else:
        rows, parse = functools.partial(tsv_rows, name, split), functools.partial(glue_example, name, split)
    examples = []
    for part, path in split_files(name, directory, split):
        if split == "dev" and path.name == "msr_paraphrase_test.txt":
            say(f"{path} serves as dev set, as there is no dev_ids.tsv to say which examples are GLUE's")
        bad, before = [], len(examples)
        for where, row in rows(path):
            try:
                found = parse(part, row)
                "".join(text for e in found for text in (e.id, *e.texts)).encode()  # no lone surrogates
                examples += found
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                reason = error if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
                bad.append(f"{path}: {where}: {reason}")
                if not skip_bad_rows or split == "test":
                    way_out = "" if split == "test" else ", or leave such rows out with --skip-bad-rows"
                    raise ValueError(f"{bad[0]}; mend or remove it{way_out}") from None
        if bad:
            say(f"left out {len(bad)} malformed rows, the first: {bad[0]}")
        if len(examples) == before:
            raise ValueError(f"{path}: no example in it")
        if name == "race" or name.startswith("squad"):  # their predictions are handed in by the id
            repeated = [id for id, count in Counter(example.id for example in examples).items() if count > 1]
            if repeated:
                raise ValueError(f"{path}: two questions have the id {repeated[0]}")
    return examples


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start} ({error.reason})") from None


def tsv_rows(name: str, split: str, path: Path) -> Iterator[tuple[str, tuple]]:
    """Yields (line, (row by column, columns, cells)) of a GLUE file. Quotation marks are text."""
    lines = read_text(path).split("\n")  # and at no other character that splitlines() takes for a line end
    lines = [line.removesuffix("\r").split("\t") for line in lines]
    headless = name == "cola" and split != "test"
    columns = ["source", "label", "star", "sentence"] if headless else lines.pop(0)
    needed = {*TASKS[name].texts} | ({TASKS[name].label} if split != "test" else set())
    if not needed <= set(columns):
        missing = ", ".join(sorted(needed - set(columns)))
        raise ValueError(f"{path}: line 1: no column {missing}, only {', '.join(columns)[:200]!r}: "
                         f"is this {name}'s file?")
    while lines and not "".join(lines[-1]).strip():
        lines.pop()
    ids = path.parent / "dev_ids.tsv"
    if path.name != "msr_paraphrase_train.txt" or not ids.exists():
        ids = None
    dev_ids = {tuple(line.split()[:2]) for line in read_text(ids).splitlines()} if ids else set()
    for number, cells in enumerate(lines):
        row = {"index": str(number)} | dict(zip(columns, cells))
        if ids and ((row.get("#1 ID"), row.get("#2 ID")) in dev_ids) != (split == "dev"):
            continue  # the list has GLUE's dev set, the rest of the file is its training set
        yield f"line {number + 2 - headless}", (row, columns, cells)


def glue_example(name: str, split: str, part: str, parsed: tuple) -> list[Example]:
    task, label, (row, columns, cells) = TASKS[name], None, parsed
    if cells == [""]:
        raise ValueError("blank")
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} columns, but {name} has {len(columns)} ({', '.join(columns)[:100]})")
    if split != "test":
        written = row[task.label].strip()
        if not task.labels:
            label = float(written)
            if not 0 <= label <= 5:
                raise ValueError(f"{task.label} {written} is not between 0 and 5")
        elif written in task.labels:
            label = task.labels.index(written)
        else:
            raise ValueError(f"{task.label} {written!r} is none of {name}'s ({', '.join(task.labels)}); is "
                             f"this {name}'s file?")
    return [Example(row["index"], part, tuple(row[column].strip() for column in task.texts), label)]


def squad_rows(path: Path) -> Iterator[tuple[str, tuple]]:
    """Yields (question, (it, its passage)) of a SQuAD file."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise ValueError(f'{path}: not a SQuAD file, which is an object with a list "data"')
    for i, article in enumerate(content["data"]):
        try:
            pairs = [(p["context"], qa) for p in article["paragraphs"] for qa in p["qas"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: article {i}: paragraphs with context and qas expected, "
                             f"{type(error).__name__} {error}") from None
        for passage, question in pairs:
            name = question.get("id") if isinstance(question, dict) else question
            yield f"question {str(name)[:100]}", (passage, question)


def squad_example(name: str, split: str, part: str, row: tuple) -> list[Example]:
    passage, entry = row
    if not all(isinstance(text, str) for text in (passage, entry["id"], entry["question"])):
        raise ValueError("context, id and question must be texts")
    if split == "test" and "answers" not in entry:
        return [Example(entry["id"], part, (entry["question"], passage), None)]
    answers = tuple((a["answer_start"], a["text"]) for a in entry["answers"])
    if not all(type(begin) is int and isinstance(text, str) for begin, text in answers):
        raise ValueError("an answer must have an integer answer_start and a text")
    if answers and entry.get("is_impossible"):
        raise ValueError("is_impossible, but it has an answer")
    if name == "squad1" and not answers:
        raise ValueError("no answer, which in v1.1 every question has; is this v2.0, --task squad2?")
    return [Example(entry["id"], part, (entry["question"], passage), answers)]


def race_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields (file, passage with its questions) of RACE/<split>/<middle or high>."""
    for file in sorted(path.glob("*.txt"), key=lambda file: (len(file.name), file.name)):
        yield file.name, read_json(file)


def race_example(split: str, part: str, row: dict) -> list[Example]:
    questions, options = row["questions"], row["options"]
    answers = row.get("answers") or [None] * len(questions)
    if not (isinstance(row["article"], str) and isinstance(questions, list)):
        raise ValueError("article must be a text and questions a list")
    if not len(questions) == len(options) == len(answers):
        raise ValueError(f"{len(questions)} questions, {len(options)} options, {len(answers)} answers")
    if split != "test" and None in answers:
        raise ValueError("no answers")
    examples = []
    for i, (question, four, answer) in enumerate(zip(questions, options, answers)):
        if not isinstance(four, list) or len(four) != 4 or answer not in ("A", "B", "C", "D", None):
            raise ValueError(f"question {i} has {len(four)} options and answer {answer!r}; four and A to D")
        label = None if answer is None else "ABCD".index(answer)
        examples.append(Example(f"{row['id']}-{i}", part, (row["article"], question, *four), label))
    return examples


# ----------------------------------------------------------------------------------------------------------
# Inputs: token ids of <s> A </s></s> B </s>
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Features:
    """The inputs of a split: their ids one behind another, and what the loss and the predictions need."""

    ids: np.ndarray  # int32
    bounds: np.ndarray  # (S + 1,) where each input begins in `ids`
    example: np.ndarray  # (S,) the example it is of
    group: np.ndarray  # (S,) 0, 1, ...: with which others it is judged
    targets: np.ndarray  # (S, 3) label or value, 0, 0; candidates: is it right; SQuAD: see Spans.encode
    passage: np.ndarray  # (S, 2) which of its tokens are the passage's (SQuAD)
    offsets: np.ndarray  # (len(ids), 2) the passage's characters that a token is made of (SQuAD)
    labelled: np.ndarray  # () whether the targets are known
    notes: np.ndarray  # () a remark to print, and below it a line for each oddity

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)

    @property
    def group_begins(self) -> np.ndarray:
        """(G + 1,) which input each group begins with; they are neighbours."""
        return np.append(np.flatnonzero(np.diff(self.group, prepend=-1)), len(self.group))

    @classmethod
    def of(
        cls, inputs: Sequence[np.ndarray], *, example: ArrayLike, group: ArrayLike, targets: ArrayLike,
        labelled: bool, notes: str, passage: ArrayLike | None = None,
        offsets: Sequence[np.ndarray] | None = None,
    ) -> Features:
        """Returns the inputs and, for each, what the fields say; targets: up to three numbers."""
        targets = np.array(targets, dtype=np.float32).reshape(len(inputs), -1)
        return cls(
            np.concatenate(inputs).astype(np.int32), np.cumsum([0, *map(len, inputs)]), np.array(example),
            np.array(group), np.pad(targets, ((0, 0), (0, 3 - targets.shape[1]))),
            np.zeros((len(inputs), 2), np.int64) if passage is None else np.array(passage),
            np.zeros((0, 2), np.int32) if offsets is None else np.concatenate(offsets).astype(np.int32),
            np.array(labelled), np.array(notes),
        )


def join(first: np.ndarray, second: np.ndarray | None, seq_len: int) -> np.ndarray:
    """Returns <s> first </s>, or <s> first </s></s> second </s>; the longer text is cut until it fits.

    >>> join(np.arange(10, 15), np.arange(20, 22), seq_len=9).tolist()
    [0, 10, 11, 12, 2, 2, 20, 21, 2]
    """
    if second is None:
        return np.concatenate([[BOS], first[: seq_len - 2], [EOS]])
    room = seq_len - 4
    first = first[: max(room - len(second), room - room // 2)]
    second = second[: room - len(first)]
    return np.concatenate([[BOS], first, [EOS, EOS], second, [EOS]])


def tokens_of_answer(offsets: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """Returns the first and the last token that hold some of a passage's characters begin to end."""
    first = int(np.searchsorted(offsets[:, 1], begin, side="right"))
    return first, max(first, int(np.searchsorted(offsets[:, 0], end, side="left")) - 1)


def answer_text(passage: str, offsets: np.ndarray, first: int, last: int) -> str:
    """Returns the passage's text from the first to the last token, without the space around it."""
    return passage[offsets[first, 0] : offsets[last, 1]].strip()


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads, padded to its longest input."""

    input_ids: np.ndarray  # (S, T) int64
    attention_mask: np.ndarray  # (S, T) bool, True = real token
    targets: np.ndarray  # (S, 3) float32
    group: np.ndarray  # (S,) 0, 1, ...
    may_answer: np.ndarray  # (S, T) bool, True = <s> and the passage (SQuAD)
    inputs: np.ndarray  # (S,) which of the features' inputs
    weight: float  # of the loss: 1, or 0 where there was no group left for this rank
    num_tokens: int


def collate(features: Features, begins: np.ndarray, groups: np.ndarray) -> Batch:
    """Returns the inputs of some groups as a batch. begins: `features.group_begins`, found once for many."""
    # Ranks wait for each other's gradients, so one without a group computes along, on any, with weight 0.
    weight, groups = (1.0, groups) if len(groups) else (0.0, np.array([0]))
    inputs = np.concatenate([np.arange(begins[g], begins[g + 1]) for g in groups])
    number = np.repeat(np.arange(len(groups)), begins[groups + 1] - begins[groups])
    lengths = features.lengths[inputs]
    ids = np.full((len(inputs), lengths.max()), PAD)
    for row, i in enumerate(inputs):
        ids[row, : lengths[row]] = features.ids[features.bounds[i] : features.bounds[i + 1]]
    column, passage = np.arange(ids.shape[1]), features.passage[inputs]
    may_answer = (column >= passage[:, :1]) & (column < passage[:, 1:]) | (column == 0)
    return Batch(ids, column < lengths[:, None], features.targets[inputs], number, may_answer, inputs, weight,
                 int(lengths.sum() * weight))


class Step(NamedTuple):
    epoch: float
    batches: list[Batch]  # this rank's micro-batches
    num_groups: int  # of all ranks and micro-batches


class LengthBuckets:
    """The order of the training examples: `step(n)` is a pure function of (seed, n, rank).

    An epoch is shuffled; each POOL batches are sorted by length, so that those of similar length are
    neighbours and little is padded; then the batches are shuffled. Their sizes differ by at most one.
    """

    POOL = 50

    def __init__(self, features: Features, batch_size: int, micro_batch_size: int, seed: int, rank: int = 0,
                 world_size: int = 1):
        if batch_size % (micro_batch_size * world_size):
            raise ValueError(f"micro_batch_size {micro_batch_size} x world_size {world_size} does not divide "
                             f"batch_size {batch_size}")
        self.features, self.seed, self.rank, self.world_size = features, seed, rank, world_size
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = batch_size // (micro_batch_size * world_size)
        self.begins = features.group_begins
        self.steps_per_epoch = -(-(len(self.begins) - 1) // batch_size)
        self._order = functools.lru_cache(1)(self._order)  # asked for at every step of an epoch

    def _order(self, epoch: int) -> list[np.ndarray]:
        """Returns the groups of each step of an epoch."""
        number, steps = len(self.begins) - 1, self.steps_per_epoch
        longest = np.maximum.reduceat(self.features.lengths, self.begins[:-1])
        order = permute(np.arange(number), number, self.seed, epoch)
        cuts = np.arange(steps + 1) * number // steps
        for pool in range(0, steps, self.POOL):
            part = slice(cuts[pool], cuts[min(pool + self.POOL, steps)])
            order[part] = order[part][np.argsort(longest[order[part]], kind="stable")]
        batches = np.split(order, cuts[1:-1])
        return [batches[i] for i in permute(np.arange(steps), steps, self.seed + 2**63, epoch)]

    def step(self, step: int) -> Step:
        """Returns this rank's micro-batches of a step."""
        epoch, number = divmod(step, self.steps_per_epoch)
        groups = self._order(epoch)[number]
        number = -(-len(groups) // (self.micro_batch_size * self.world_size))  # on each rank
        parts = np.array_split(groups, number * self.world_size)[self.rank :: self.world_size]
        batches = [collate(self.features, self.begins, part) for part in parts]
        return Step(step / self.steps_per_epoch, batches, len(groups))


# ----------------------------------------------------------------------------------------------------------
# Metrics: scikit-learn's and scipy's definitions, and the official SQuAD scripts'
# ----------------------------------------------------------------------------------------------------------


def accuracy(labels: Sequence[int], predictions: Sequence[int]) -> float:
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def f1_score(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """Returns the harmonic mean of precision and recall of label 1; 0 where neither has one.

    >>> f1_score([1, 1, 0, 0], [1, 0, 1, 0])
    0.5
    """
    labels, predictions = np.asarray(labels) == 1, np.asarray(predictions) == 1
    total = int(labels.sum() + predictions.sum())
    return 2 * int((labels & predictions).sum()) / total if total else 0.0


def matthews_correlation(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """Returns the correlation of two labellings, for any number of classes; 0 where one is constant.

    >>> matthews_correlation([1, 1, 0, 0], [1, 1, 1, 0])
    0.5773502691896258
    """
    classes, both = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
    true, predicted = np.split(np.eye(len(classes))[both], 2)  # (N, classes), one-hot
    true, predicted = true - true.mean(0), predicted - predicted.mean(0)
    spread = (true**2).sum() * (predicted**2).sum()
    return float((true * predicted).sum() / math.sqrt(spread)) if spread else 0.0


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns the linear correlation, NaN where one is constant.

    >>> pearson([1, 2, 3], [1, 2, 6])
    0.944911182523068
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a / np.linalg.norm(a)) @ (b / np.linalg.norm(b)), -1, 1))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns the correlation of the ranks; equal values share the mean of theirs."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    return pearson(ranks(a), ranks(b))


def normalize_answer(text: str) -> str:
    """Returns a text without case, punctuation, articles and surplus white space.

    >>> normalize_answer("The  U.S., an Answer")
    'us answer'
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_exact(gold: str, predicted: str) -> float:
    return float(normalize_answer(gold) == normalize_answer(predicted))


def squad_f1(gold: str, predicted: str, empty_matches: bool) -> float:
    """Returns the F1 of the words of two answers. If both are empty, v2.0 scores 1 and v1.1 scores 0."""
    gold, predicted = normalize_answer(gold).split(), normalize_answer(predicted).split()
    if not gold or not predicted:
        return float(empty_matches and gold == predicted)
    return 2 * sum((Counter(gold) & Counter(predicted)).values()) / (len(gold) + len(predicted))


def squad1_metrics(golds: dict[str, list[str]], predictions: dict[str, str]) -> dict[str, float]:
    """Returns exact match and F1 in per cent, by question the best over its gold answers (v1.1)."""
    exact = [max(squad_exact(g, predictions[id]) for g in golds[id]) for id in golds if id in predictions]
    f1 = [max(squad_f1(g, predictions[id], False) for g in golds[id]) for id in golds if id in predictions]
    return {"exact_match": 100 * sum(exact) / len(golds), "f1": 100 * sum(f1) / len(golds)}


def squad2_metrics(
    golds: dict[str, list[str]], predictions: dict[str, str], na_probs: dict[str, float] | None = None
) -> dict[str, float]:
    """Returns what the official v2.0 script prints, in per cent: EM and F1 of all, of answerable and of
    unanswerable questions, and with `na_probs` the best of them over all thresholds of that probability.

    golds: by question the gold answers, none: unanswerable. One that normalises to nothing is ignored, and so
    is a question without a prediction.
    """
    golds = {id: texts for id, texts in golds.items() if id in predictions}
    answered = {id: bool(texts) for id, texts in golds.items()}
    golds = {id: [g for g in texts if normalize_answer(g)] or [""] for id, texts in golds.items()}
    scores = {"exact": {id: max(squad_exact(g, predictions[id]) for g in gold) for id, gold in golds.items()},
              "f1": {id: max(squad_f1(g, predictions[id], True) for g in gold) for id, gold in golds.items()}}
    metrics = {}
    for prefix, chosen in (("", [True, False]), ("HasAns_", [True]), ("NoAns_", [False])):
        ids = [id for id in golds if answered[id] in chosen]
        if ids:
            metrics |= {prefix + name: 100 * sum(by_id[id] for id in ids) / len(ids)
                        for name, by_id in scores.items()}
            metrics[prefix + "total"] = len(ids)
    for name, by_id in scores.items() if na_probs else ():
        # Answering nothing gets all unanswerable ones right. Then answer the surest, one by one.
        score = best = sum(not has for has in answered.values())
        threshold = 0.0
        for id in sorted(by_id, key=na_probs.get):
            score += by_id[id] if answered[id] else -bool(predictions[id])
            if score > best:
                best, threshold = score, na_probs[id]
        metrics |= {f"best_{name}": 100 * best / len(golds), f"best_{name}_thresh": threshold}
    return metrics


# ----------------------------------------------------------------------------------------------------------
# Heads: what each kind of task does with the encoder
# ----------------------------------------------------------------------------------------------------------


class Head:
    """What a kind of task does with the encoder; one subclass for each kind.

    examples --encode--> features --forward--> scores, (S, columns) --loss--> training
                                               scores --probabilities--> (averaged over an ensemble)
                                               --predictions--> one for each example --> metrics, files
    """

    model_class: type[RobertaModelBase]

    def __init__(self, config: FinetuneConfig):
        self.config, self.task = config, TASKS[config.task]

    def model_changes(self) -> dict[str, Any]:
        """Returns the fields of the model's config that this head sets."""
        raise NotImplementedError

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, seq_len: int) -> Features:
        """Returns the inputs that examples become, none longer than `seq_len` tokens."""
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """Returns the model's scores, (S, `columns`)."""
        raise NotImplementedError

    def columns(self, width: int) -> int:
        """Returns how many scores an input of `width` tokens has."""
        return self.model_changes()["num_labels"]

    def widen(self, scores: Tensor, width: int) -> Tensor:
        """Returns a batch's scores as if its inputs had `width` tokens."""
        return scores

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Returns the sum of the groups' losses."""
        raise NotImplementedError

    def probabilities(self, scores: np.ndarray, features: Features) -> np.ndarray:
        """Returns what an ensemble averages, from the scores of all inputs."""
        raise NotImplementedError

    def predictions(self, probabilities: np.ndarray, features: Features, examples: Sequence[Example]) -> list:
        """Returns for each example what is compared with its label."""
        raise NotImplementedError

    def metrics(self, predictions: list, examples: Sequence[Example]) -> dict[str, float]:
        """Returns the task's metrics."""
        raise NotImplementedError

    def majority(self, examples: Sequence[Example]) -> Any:
        """Returns the prediction that is right most often for these examples: the baseline."""
        return Counter(example.label for example in examples).most_common(1)[0][0]

    def files(self, predictions: list, examples: Sequence[Example]) -> dict[str, str]:
        """Returns name and content of the files in which predictions are handed in."""
        raise NotImplementedError


class Classification(Head):
    """A label for a text or a pair (§5.1), or for STS-B a value. CHOICE: from 0 to 5, as in the file."""

    model_class = RobertaForSequenceClassification

    def model_changes(self) -> dict[str, Any]:
        labels = self.task.labels or ("score",)
        return {"num_labels": len(labels), "id2label": dict(enumerate(labels))}

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, seq_len: int) -> Features:
        inputs, cut = [], 0
        for example in examples:
            first, second = [*map(tokenizer.encode_to_numpy, example.texts), None][:2]
            inputs.append(join(first, second, seq_len))
            whole = len(first) + 2 if second is None else len(first) + len(second) + 4
            cut += whole > seq_len
        labels = [0 if example.label is None else example.label for example in examples]
        index = np.arange(len(examples))
        notes = f"{cut} inputs cut to {seq_len} tokens" if cut else ""
        return Features.of(inputs, example=index, group=index, targets=labels,
                           labelled=examples[0].label is not None, notes=notes)

    def forward(self, model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        return model(to_tensor(batch.input_ids, device), to_tensor(batch.attention_mask, device))

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        targets = to_tensor(batch.targets[:, 0], scores.device)
        if self.task.labels:
            return F.cross_entropy(scores.float(), targets.long(), reduction="sum")
        return F.mse_loss(scores[:, 0].float(), targets, reduction="sum")

    def probabilities(self, scores: np.ndarray, features: Features) -> np.ndarray:
        return softmax(scores) if self.task.labels else scores

    def predictions(self, probabilities: np.ndarray, features: Features, examples: Sequence[Example]) -> list:
        return (probabilities.argmax(1) if self.task.labels else probabilities[:, 0]).tolist()

    def metrics(self, predictions: list, examples: Sequence[Example]) -> dict[str, float]:
        functions = {"accuracy": accuracy, "f1": f1_score, "matthews_correlation": matthews_correlation,
                     "pearson": pearson, "spearman": spearman}
        result = {}
        for number, part in enumerate(dict.fromkeys(example.part for example in examples)):
            mine = [i for i, example in enumerate(examples) if example.part == part]
            labels, chosen = [examples[i].label for i in mine], [predictions[i] for i in mine]
            for name in self.task.paper:
                if name in functions:
                    result[name if number == 0 else f"{name}_{part}"] = functions[name](labels, chosen)
        return result

    def majority(self, examples: Sequence[Example]) -> Any:
        return super().majority(examples) if self.task.labels else statistics.fmean(e.label for e in examples)

    def files(self, predictions: list, examples: Sequence[Example]) -> dict[str, str]:
        """Returns the files that GLUE's server takes."""
        names = {"matched": "MNLI-m", "mismatched": "MNLI-mm", "AX": "AX", "": self.task.folder}
        rows = {names[example.part]: ["index\tprediction"] for example in examples}
        for example, value in zip(examples, predictions):
            shown = self.task.labels[value] if self.task.labels else f"{min(max(value, 0), 5):.3f}"
            rows[names[example.part]].append(f"{example.id}\t{shown}")
        return {f"{name}.tsv": "\n".join(lines) + "\n" for name, lines in rows.items()}


def softmax(scores: np.ndarray) -> np.ndarray:
    """Returns the softmax of the last axis."""
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


class MultipleChoice(Head):
    """The right one of four candidates, each encoded with question and passage (§5.3, RACE)."""

    model_class = RobertaForMultipleChoice

    def model_changes(self) -> dict[str, Any]:
        return {"num_labels": 1, "id2label": {}}

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, seq_len: int) -> Features:
        """Question and answer are cut to 128 tokens, then the passage to what is left (§5.3).

        CHOICE: question and answer come first, then the passage; the blank of a cloze question ("_") is
        filled with the answer, else the answer follows the question.
        """
        encode = functools.lru_cache(64)(tokenizer.encode_to_numpy)  # a passage has several questions
        inputs, cut = [], 0
        for passage, question, *answers in (example.texts for example in examples):
            for answer in answers:
                pieces = re.split("_+", question)
                filled = answer.join(pieces) if len(pieces) > 1 else f"{question} {answer}"
                first, second = encode(" ".join(filled.split())), encode(passage.strip())
                cut += len(first) > 128 or len(first) + len(second) + 4 > seq_len
                first = first[: min(128, seq_len - 4)]
                inputs.append(join(first, second[: seq_len - 4 - len(first)], seq_len))
        right = [example.label == i for example in examples for i in range(4)]
        index = np.repeat(np.arange(len(examples)), 4)
        notes = f"{cut} of {len(inputs)} inputs cut to {seq_len} tokens" if cut else ""
        return Features.of(inputs, example=index, group=index, targets=right,
                           labelled=examples[0].label is not None, notes=notes)

    def forward(self, model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        # One candidate a row: padding is less than with all four of a question in one.
        ids, mask = batch.input_ids[:, None], batch.attention_mask[:, None]
        return model(to_tensor(ids, device), to_tensor(mask, device))  # (S, 1, T) -> (S, 1)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        device = scores.device
        group, right = to_tensor(batch.group, device), to_tensor(batch.targets[:, 0] > 0, device)
        return choice_loss(scores[:, 0].float(), group, right)

    def probabilities(self, scores: np.ndarray, features: Features) -> np.ndarray:
        return softmax(scores.reshape(-1, 4))  # (S, 1) -> (G, 4)

    def predictions(self, probabilities: np.ndarray, features: Features, examples: Sequence[Example]) -> list:
        return probabilities.argmax(1).tolist()

    def metrics(self, predictions: list, examples: Sequence[Example]) -> dict[str, float]:
        labels = np.array([example.label for example in examples])
        parts, predictions = np.array([example.part for example in examples]), np.asarray(predictions)
        result = {"accuracy": accuracy(labels, predictions)}
        for part in np.unique(parts):
            result[f"accuracy_{part}"] = accuracy(labels[parts == part], predictions[parts == part])
        return result

    def files(self, predictions: list, examples: Sequence[Example]) -> dict[str, str]:
        """Returns RACE.json: by passage the letters of its questions, as RACE's own "answers" are."""
        answers: dict[str, list[str]] = {}
        for example, choice in zip(examples, predictions):
            answers.setdefault(example.id.rpartition("-")[0], []).append("ABCD"[choice])
        return {"RACE.json": json.dumps(answers, indent=1) + "\n"}


def choice_loss(scores: Tensor, group: Tensor, right: Tensor) -> Tensor:
    """Returns the summed cross-entropy of picking a right candidate in each group. scores, ...: (S,)."""
    groups = torch.arange(int(group[-1]) + 1, device=scores.device)[:, None]
    other = group != groups  # (G, S)
    every = scores.masked_fill(other, -math.inf).logsumexp(1)  # (G, S) -> (G,)
    return (every - scores.masked_fill(other | ~right, -math.inf).logsumexp(1)).sum()


def margin_loss(scores: Tensor, group: Tensor, right: Tensor, margin: float = 1.0) -> Tensor:
    """Returns how much of the margin is missing, summed over all right and wrong candidates of a group."""
    pairs = (group[:, None] == group) & right[:, None] & ~right  # (S, S): [right one, wrong one]
    return (F.relu(margin - scores[:, None] + scores) * pairs).sum()


class Ranking(Classification):
    """QNLI and WNLI as the paper's test-set treatment has them (§5.1): rows that share their question (QNLI)
    or premise (WNLI) are candidates and compete, in QNLI by cross-entropy, in WNLI by a margin.

    DIFFERS: the paper mines further candidates, for WNLI noun phrases found with spaCy. Here the rows of the
    files are the candidates. CHOICE: "none of them", with score 0, is one more; it is the right one where no
    other is, so that rows alone in their group teach as well. Such a row is right where it beats "none"; of
    several the best is right, as in the paper, though a few groups of the files have none or two.
    """

    def __init__(self, config: FinetuneConfig):
        super().__init__(config)
        if config.task not in ("qnli", "wnli"):
            raise ValueError(f"--ranking is for qnli and wnli, not for {config.task}")
        self.right = {"qnli": 0, "wnli": 1}[config.task]  # the label of a right candidate

    def model_changes(self) -> dict[str, Any]:
        return {"num_labels": 1, "id2label": {0: "right"}}

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, seq_len: int) -> Features:
        features = super().encode(examples, tokenizer, seq_len)
        names = {text: i for i, text in enumerate(dict.fromkeys(example.texts[0] for example in examples))}
        group = np.array([names[example.texts[0]] for example in examples])
        order = np.argsort(group, kind="stable")  # candidates of a group become neighbours
        inputs = np.split(features.ids, features.bounds[1:-1])
        right = features.targets[order, 0] == self.right
        return Features.of([inputs[i] for i in order], example=order, group=group[order], targets=right,
                           labelled=bool(features.labelled), notes=str(features.notes))

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        device = scores.device
        group, right = to_tensor(batch.group, device), to_tensor(batch.targets[:, 0] > 0, device)
        groups = torch.arange(int(batch.group[-1]) + 1, device=device)
        none_right = ~torch.isin(groups, group[right])
        # "None of them" is appended once for each group: (S,) -> (S + G,)
        scores = torch.cat([scores[:, 0].float(), torch.zeros(len(groups), device=device)])
        group, right = torch.cat([group, groups]), torch.cat([right, none_right])
        return (choice_loss if self.config.task == "qnli" else margin_loss)(scores, group, right)

    def probabilities(self, scores: np.ndarray, features: Features) -> np.ndarray:
        """Returns the share of each candidate in its group's softmax, with "none" in it: (S, 1)."""
        highest = np.maximum(np.maximum.reduceat(scores[:, 0], features.group_begins[:-1]), 0)
        shares = np.exp(scores[:, 0] - highest[features.group])
        total = np.bincount(features.group, shares) + np.exp(-highest)
        return (shares / total[features.group])[:, None]

    def predictions(self, probabilities: np.ndarray, features: Features, examples: Sequence[Example]) -> list:
        share, group = probabilities[:, 0], features.group
        best = np.maximum.reduceat(share, features.group_begins[:-1])
        is_right = np.where(np.bincount(group)[group] > 1, share == best[group], share > 0.5)
        predicted = np.empty(len(examples), dtype=np.int64)
        predicted[features.example] = np.where(is_right, self.right, 1 - self.right)
        return predicted.tolist()


class Spans(Head):
    """Where in the passage the answer is (§5.2); for v2.0 also whether there is one, losses summed (§3).

    A long passage is read in overlapping windows, <s> question </s></s> window </s>.
    CHOICE: the softmax over places is of the window's tokens and of `<s>`, to which a window without the
    answer is to give its probability; so windows compare. The span loss is the mean of start's and end's.
    CHOICE: the classifier is trained on windows. A question is answerable if its best window is, with more
    than one half; the answer is the best span of all its windows.
    """

    model_class = RobertaForQuestionAnswering

    def model_changes(self) -> dict[str, Any]:
        return {"answerability": self.config.task == "squad2"}

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, seq_len: int) -> Features:
        """Returns the windows; targets: first and last token of the answer, and whether it is there, or 0s.

        CHOICE: of several gold answers the first one at its offset teaches. A window without the whole of it
        is trained as having none.
        """
        encode = functools.lru_cache(64)(tokenizer.encode_with_offsets)  # a passage has several questions
        inputs, example_of, targets, passages, all_offsets = [], [], [], [], []
        wrong, inside, number = [], [], 0
        for index, example in enumerate(examples):
            question = tokenizer.encode_to_numpy(example.texts[0].strip())
            question = question[: min(self.config.max_question_tokens, seq_len // 2)]
            passage, gold = example.texts[1], None
            ids, offsets = encode(passage)
            for begin, text in example.label or ():
                number += 1
                if not text or begin < 0 or passage[begin : begin + len(text)] != text:
                    wrong.append(f"not at its offset: {text!r} in {example.id}")
                    continue
                span = tokens_of_answer(offsets, begin, begin + len(text))
                gold = gold or span
                if answer_text(passage, offsets, *span) != text:
                    inside.append(f"begins or ends inside a token: {text!r} in {example.id}")
            at = len(question) + 3  # where the window begins in the input
            room = seq_len - at - 1
            stride = min(self.config.doc_stride, max(1, room // 2))  # short windows must overlap, too
            for begin in range(0, max(0, len(ids) - room) + stride, stride):
                end = min(begin + room, len(ids))
                held = gold is not None and begin <= gold[0] and gold[1] < end
                targets.append([gold[0] - begin + at, gold[1] - begin + at, 1] if held else [0, 0, 0])
                inputs.append(np.concatenate([[BOS], question, [EOS, EOS], ids[begin:end], [EOS]]))
                all_offsets.append(np.pad(offsets[begin:end], ((at, 1), (0, 0))))
                passages.append([at, at + end - begin])
                example_of.append(index)
        notes = f"{len(inputs)} windows of up to {seq_len} tokens"
        if wrong or inside:
            notes += (f"; of {number} gold answers {len(wrong)} are not at their offset and left out, "
                      f"{len(inside)} begin or end inside a token: no span is exactly them")
        notes = "\n".join([notes, *wrong, *inside])
        return Features.of(
            inputs, example=example_of, group=np.arange(len(inputs)), targets=targets,
            labelled=examples[0].label is not None, notes=notes, passage=passages, offsets=all_offsets,
        )

    def forward(self, model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """Returns (S, 2 T + 1): start scores, end scores, the answerability score (v1.1: 0)."""
        ids, mask = to_tensor(batch.input_ids, device), to_tensor(batch.attention_mask, device)
        start, end, *answerable = model(ids, mask)
        may_answer = to_tensor(batch.may_answer, device)
        places = [scores.float().masked_fill(~may_answer, -math.inf) for scores in (start, end)]
        answerable = answerable[0].float() if answerable else torch.zeros(len(start), device=device)
        return torch.cat([*places, answerable[:, None]], dim=1)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        targets = to_tensor(batch.targets, scores.device)
        start, end = scores[:, :-1].chunk(2, dim=1)
        loss = sum(F.cross_entropy(places, targets[:, i].long(), reduction="sum") / 2
                   for i, places in enumerate((start, end)))
        if self.config.task == "squad2":
            loss = loss + F.binary_cross_entropy_with_logits(scores[:, -1], targets[:, 2], reduction="sum")
        return loss

    def columns(self, width: int) -> int:
        return 2 * width + 1

    def widen(self, scores: Tensor, width: int) -> Tensor:
        places = scores[:, :-1].unflatten(1, (2, -1))  # (S, 2, T)
        places = F.pad(places, (0, width - places.shape[2]), value=-math.inf)
        return torch.cat([places.flatten(1), scores[:, -1:]], dim=1)

    def probabilities(self, scores: np.ndarray, features: Features) -> np.ndarray:
        start, end = np.split(scores[:, :-1], 2, axis=1)
        return np.concatenate([softmax(start), softmax(end), 1 / (1 + np.exp(-scores[:, -1:]))], axis=1)

    def predictions(self, probabilities: np.ndarray, features: Features, examples: Sequence[Example]) -> list:
        """Returns (span, probability that there is no answer) of each question, over all its windows."""
        width, longest = probabilities.shape[1] // 2, self.config.max_answer_tokens
        spans, surest = [""] * len(examples), [-1.0] * len(examples)
        none = [0.0 if self.config.task == "squad1" else 1.0] * len(examples)
        for i, (index, (begin, end)) in enumerate(zip(features.example, features.passage)):
            none[index] = min(none[index], 1 - float(probabilities[i, -1]))
            if begin == end:
                continue
            start = probabilities[i, begin:end, None]  # (tokens of the window, 1)
            ends = np.pad(probabilities[i, width + begin : width + end], (0, longest - 1))
            ends = np.lib.stride_tricks.sliding_window_view(ends, longest)  # (tokens, how many more)
            first, more = divmod(int((start * ends).argmax()), longest)
            if (sure := float(start[first, 0] * ends[first, more])) > surest[index]:
                first += features.bounds[i] + begin
                surest[index] = sure
                spans[index] = answer_text(examples[index].texts[1], features.offsets, first, first + more)
        return list(zip(spans, none))

    def answers(self, predictions: list, examples: Sequence[Example]) -> dict[str, str]:
        """Returns what is answered: the span, or "" where the question is classed unanswerable (§3)."""
        return {e.id: "" if none > 0.5 else span for e, (span, none) in zip(examples, predictions)}

    def metrics(self, predictions: list, examples: Sequence[Example]) -> dict[str, float]:
        golds = {example.id: [text for _, text in example.label] for example in examples}
        answers = self.answers(predictions, examples)
        if self.config.task == "squad1":
            return squad1_metrics(golds, answers)
        spans = {example.id: span for example, (span, _) in zip(examples, predictions)}
        none = {example.id: probability for example, (_, probability) in zip(examples, predictions)}
        # The best threshold may be above one half: it is looked for among the spans, answered or not.
        return squad2_metrics(golds, spans, none) | squad2_metrics(golds, answers)

    def majority(self, examples: Sequence[Example]) -> Any:
        return "", 1.0  # no answer

    def files(self, predictions: list, examples: Sequence[Example]) -> dict[str, str]:
        """Returns the files that the official scripts read. These print the metrics of results.json: for
        predictions.json, and (the best over thresholds) for spans.json with na_prob.json."""
        files = {"predictions.json": self.answers(predictions, examples)}
        if self.config.task == "squad2":
            files["spans.json"] = {e.id: span for e, (span, _) in zip(examples, predictions)}
            files["na_prob.json"] = {e.id: none for e, (_, none) in zip(examples, predictions)}
        return {name: json.dumps(content, ensure_ascii=False) + "\n" for name, content in files.items()}


def head_of(config: FinetuneConfig) -> Head:
    """Returns what a task does with the encoder."""
    if config.ranking:
        return Ranking(config)
    kinds = {"squad1": Spans, "squad2": Spans, "race": MultipleChoice}
    return kinds.get(config.task, Classification)(config)


@torch.no_grad()
def predict(
    model: nn.Module, head: Head, features: Features, setup: Setup, groups_at_once: int = 32
) -> tuple[np.ndarray, float]:
    """Returns the probabilities of all inputs (`head.probabilities`), and the mean loss of the groups.

    All ranks share the work. The longest inputs come first, so that running out of memory happens at once.
    """
    begins = features.group_begins
    order = np.argsort(-np.maximum.reduceat(features.lengths, begins[:-1]), kind="stable")
    parts = np.split(order, range(groups_at_once, len(order), groups_at_once))
    width = int(features.lengths.max())
    scores, loss = torch.zeros(len(features.group), head.columns(width)), torch.zeros(1, dtype=torch.float64)
    with evaluating(model):
        for groups in parts[setup.rank :: setup.world_size]:
            setup.still_at_work()
            batch = collate(features, begins, groups)
            with setup.autocast():
                found = head.forward(model, batch, setup.device)
                loss += head.loss(found, batch).cpu()
            scores[batch.inputs] = head.widen(found, width).float().cpu()
    loss = float(setup.sum(loss, "the losses")) / len(order) if features.labelled else math.nan
    scores = setup.sum(scores, "the predictions")
    setup.rest()
    return head.probabilities(scores.double().numpy(), features), loss


# ----------------------------------------------------------------------------------------------------------
# One run
# ----------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    examples: list[Example]
    features: Features
    digest: str  # of the examples


def load_split(config: FinetuneConfig, split: str, tokenizer: Tokenizer, cache: Path, setup: Setup) -> Split:
    """Returns a split's examples and inputs; these are made once and then read from `cache`.

    The cache's key is a digest of all that they depend on: examples, tokenizer, task and lengths.
    """
    directory = find_task(config.task, config.data)
    examples = read_examples(config.task, directory, split, config.skip_bad_rows)
    head = head_of(config)
    settings = [config.task, config.ranking, config.seq_len, config.doc_stride, config.max_question_tokens,
                tokenizer.fingerprint, FEATURES_VERSION]
    digest = hashlib.sha256(repr(examples).encode()).hexdigest()[:16]
    key = hashlib.sha256(repr((settings, digest)).encode()).hexdigest()[:16]
    path = cache / f"{config.task}-{split}-{key}.npz"
    if setup.rank > 0:
        dist.barrier()  # rank 0 writes it
    features = read_features(path)
    if features is None:
        features = head.encode(examples, tokenizer, config.seq_len)
        buffer = io.BytesIO()
        np.savez(buffer, **vars(features))
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
        write_atomically(path.with_suffix(".txt"), f"{features.notes}\n".encode())
    if setup.rank == 0 and setup.world_size > 1:
        dist.barrier()
    first, *more = str(features.notes).split("\n")
    say(f"{config.task} {split}: {len(examples):,} examples from {directory}" + f"; {first}" * bool(first) +
        f"; each is named in {path.with_suffix('.txt')}" * bool(more), setup.rank)
    return Split(examples, features, digest)


FEATURES_VERSION = 1  # to be raised when an `encode` changes: caches of before are then no longer found


def read_features(path: Path) -> Features | None:
    """Returns the inputs in a cache file, None where there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Features(**arrays)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def model_shape(config: FinetuneConfig, head: Head) -> RobertaConfig:
    """Returns the config of the model to fine-tune: the pretrained one's with the task's head."""
    changes = head.model_changes()
    if config.dropout is not None:
        changes |= {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    return replace(read_config(config.model), **changes)


def build_model(config: FinetuneConfig, head: Head, setup: Setup) -> RobertaModelBase:
    """Returns the model to fine-tune: a pretrained encoder and a head initialised from the seed.

    A head of the same kind for the same labels, as the files spell them, is kept: an MNLI run gives RTE,
    STS-B and MRPC only its encoder (§5.1), another run on MNLI all it has. --scratch: everything is random.
    """
    shape, source = model_shape(config, head), find_model(config.model)
    torch.manual_seed(config.seed)
    model = head.model_class(shape)
    if config.scratch:
        say(f"random weights of the shape of {config.model}", setup.rank)
        return model
    before, kind = read_config(source), head.model_class
    same_kind = read_model(source)[0].get("architectures") == [kind.__name__]
    keep_head = same_kind and (before.id2label, before.answerability) == (shape.id2label, shape.answerability)
    loaded = (kind if keep_head else RobertaModel).from_pretrained(source)
    (model if keep_head else model.roberta).load_state_dict(loaded.state_dict())
    say(f"encoder from {config.model}, {'its head, too' if keep_head else 'a fresh head'}", setup.rank)
    return model


class Finetuning(Run):
    """One run of one task: one setting, one seed."""

    save_improvements = True

    def __init__(self, config: FinetuneConfig, setup: Setup, head: Head, tokenizer: Tokenizer,
                 train: Split, dev: Split):
        self.head, self.train_split, self.dev = head, train, dev
        micro = micro_batch_size(config, setup.world_size)
        batches = LengthBuckets(
            train.features, config.batch_size, micro, config.seed, setup.rank, setup.world_size
        )
        steps = config.epochs * batches.steps_per_epoch
        model = build_model(config, head, setup)
        super().__init__(config, setup, model, tokenizer, batches, round(config.warmup_ratio * steps), steps)
        self.state |= {"epochs_without_gain": 0, "best": {}}

    def resume(self) -> None:
        super().resume()
        best = self.state["best_step"]
        if best > 0 and not (self.out / f"checkpoint-{best}").exists():  # set aside as damaged, or removed
            say(f"warning: checkpoint-{best}, the best so far, is gone; now the best of the others counts",
                self.setup.rank)
            self.state |= {"best_score": -math.inf, "best_step": -1, "best": {}, "epochs_without_gain": 0}
            if self.step % self.batches.steps_per_epoch == 0:
                self.evaluate()
                self._note_if_best()

    def loss_sums(self, batch: Batch) -> tuple[Tensor, ...]:
        scores = self.head.forward(self.wrapped, batch, self.setup.device)
        return (self.head.loss(scores, batch) * batch.weight,)

    def loss_counts(self, step: Step) -> list[int]:
        return [step.num_groups]

    def measure(self) -> dict[str, float]:
        size = micro_batch_size(self.config, self.setup.world_size)
        probabilities, loss = predict(self.model, self.head, self.dev.features, self.setup, size)
        predictions = self.head.predictions(probabilities, self.dev.features, self.dev.examples)
        return {"eval_loss": loss} | self.head.metrics(predictions, self.dev.examples)

    def score(self, result: dict[str, float]) -> float:
        value = result[next(iter(self.head.task.paper))]
        return value if math.isfinite(value) else -math.inf

    def shown(self, result: dict[str, float]) -> str:
        return "dev: " + "  ".join(f"{name} {value:.4g}" for name, value in result.items())

    def evaluate(self) -> dict[str, float]:
        result = super().evaluate()
        without = 0 if self._improved() else self.state["epochs_without_gain"] + 1
        self.state["epochs_without_gain"] = without
        if without == 0 or self.state["best_step"] < 0:  # a metric may be NaN in all epochs
            self.state["best"] = result
        return result

    def is_over(self) -> bool:
        patience = self.config.patience
        return super().is_over() or 0 < patience <= self.state["epochs_without_gain"]

    def plot(self) -> None:
        plot_log(self.out, f"{self.config.task}, seed {self.config.seed}", "loss")

    def finish(self) -> dict[str, Any]:
        """Points `checkpoint` at the best model, deletes what only training needs, writes results.json."""
        config, state = self.config, self.state
        best_step = state["best_step"] if state["best_step"] > 0 else self.step
        metrics = {name: value for name, value in state["best"].items() if name != "eval_loss"}
        names = ("model scratch ranking batch_size peak_lr epochs warmup_ratio weight_decay dropout patience "
                 "seq_len precision").split()
        results = {
            "task": config.task, "metrics": metrics, "seed": config.seed, "run": self.out.name,
            **{name: getattr(config, name) for name in names},
            "best_epoch": best_step / self.batches.steps_per_epoch, "eval_loss": state["best"]["eval_loss"],
            "majority": majority_metrics(self.head, self.train_split.examples, self.dev.examples),
            "examples": {"train": len(self.train_split.examples), "dev": len(self.dev.examples)},
            "parameters": self.model.num_parameters(), "steps": self.step, "seconds": state["seconds"],
        }
        results = without_nan(results)
        if self.setup.rank == 0:
            # Killed at any point here, the next start trains the epochs behind the best one again, or finds
            # results.json, which says that the rest is no longer needed.
            best = self.out / f"checkpoint-{best_step}"
            point_to(best)
            for _, path in checkpoints(self.out):
                if path != best:
                    remove_checkpoint(path)
            write_json(self.out / "results.json", results)
            digests = read_json(best / "checksums.json")
            write_json(best / "checksums.json", {n: d for n, d in digests.items() if n != "training.pt"})
            (best / "training.pt").unlink(missing_ok=True)
        return results


def majority_metrics(head: Head, train: Sequence[Example], dev: Sequence[Example]) -> dict[str, float]:
    """Returns the metrics of always giving the one answer that is right most often for train."""
    return head.metrics([head.majority(train)] * len(dev), dev)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(without_nan(value), indent=1) + "\n").encode())


def without_nan(value: Any) -> Any:
    """Returns a JSON value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_once(config: FinetuneConfig, setup: Setup, head: Head, tokenizer: Tokenizer, train: Split,
             dev: Split) -> dict[str, Any]:
    """Runs, or goes on with, one run; returns what results.json holds. A finished one is not repeated."""
    out = Path(config.out)
    weights = "random" if config.scratch else weights_of(config.model)
    data = {"tokenizer": tokenizer.fingerprint, "training examples": train.digest,
            "dev examples": dev.digest, "pretrained weights": weights}
    described = {"command": {"kind": f"one run of {config.task}"}, "flags": asdict(config),
                 "model": asdict(model_shape(config, head)), "data": data}
    claim_directory(out, described, FREE_TO_CHANGE, setup.rank)
    if (out / "results.json").exists():
        return finished_results(out, setup.rank)
    say(f"{out}: batch size {config.batch_size}, learning rate {config.peak_lr:g}, seed {config.seed}",
        setup.rank)
    run = Finetuning(config, setup, head, tokenizer, train, dev)
    run.resume()
    if not run.is_over():
        run.loop(run.batches.steps_per_epoch)
    return run.finish()


def finished_results(out: Path, rank: int) -> dict[str, Any]:
    """Returns the results of a finished run. Raises: ValueError where they are damaged."""
    try:
        results = read_json(out / "results.json")
        if lacking := {"run", "metrics", "batch_size", "peak_lr", "seed"} - results.keys():
            raise ValueError(f"{out / 'results.json'}: damaged, has no {min(lacking)}")
    except ValueError as error:
        raise ValueError(f"{error}; delete {out}, and the same command repeats that run") from None
    say(f"{out} is finished", rank)
    return results


@functools.cache
def weights_of(model: str) -> str:
    """Returns a digest of a model's weights: a run that was begun with others must not go on with them."""
    return "".join(map(checksum, weight_files(find_model(model))))


# ----------------------------------------------------------------------------------------------------------
# Several runs: seeds, sweep, ensemble, all tasks
# ----------------------------------------------------------------------------------------------------------


def settings_of(config: FinetuneConfig) -> list[FinetuneConfig]:
    """Returns the runs that one command asks for: each setting with each seed, in a directory of its own.

    CHOICE: §5.1 takes the median of 5 seeds without saying whether each setting had 5. Here each has, so
    that no setting is chosen for one lucky seed.
    """
    count = config.seeds or (5 if config.sweep else 1)
    if count == 1 and not config.sweep:
        return [config]
    batch_sizes = dict.fromkeys(config.sweep_batch_sizes if config.sweep else [config.batch_size])
    lrs = dict.fromkeys(config.sweep_lrs if config.sweep else [config.peak_lr])
    return [
        replace(config, batch_size=size, peak_lr=lr, seed=config.seed + i,
                out=str(Path(config.out) / f"batch{size}-lr{lr:g}-seed{config.seed + i}"))
        for size in batch_sizes for lr in lrs for i in range(count)
    ]


def finetune(config: FinetuneConfig, setup: Setup) -> dict[str, Any]:
    """Does what one command asks for one task, and returns what its results.json holds."""
    head, out = head_of(config), Path(config.out)
    for run in settings_of(config):
        check(run)
    if config.ensemble or len(settings_of(config)) > 1:
        kind = f"{'ensemble' if config.ensemble else 'several runs'} of {config.task}"
        claim_directory(out, {"command": {"kind": kind}}, set(), setup.rank)
    if config.ensemble:
        return ensemble(config, setup)
    most = model_shape(config, head).max_tokens
    config = replace(config, precision=setup.precision, seq_len=config.seq_len or min(most, 512))
    if config.seq_len > most:
        raise ValueError(f"--seq-len {config.seq_len} is more than the {most} tokens {config.model} takes")
    if config.predict:  # a test file that can't be read should not come to light after training
        read_examples(config.task, find_task(config.task, config.data), "test")
    tokenizer = Tokenizer.from_pretrained(find_model(config.model))
    check_tokenizer(tokenizer, model_shape(config, head))
    train, dev = (load_split(config, split, tokenizer, out / "features", setup) for split in ("train", "dev"))
    runs, results = settings_of(config), []
    for run in runs:
        try:
            results.append(run_once(run, setup, head, tokenizer, train, dev))
        except FloatingPointError as error:  # of several runs one may diverge, of which the table will tell
            if len(runs) == 1:
                raise
            say(f"{run.out}: {error}", setup.rank)
            results.append({"task": run.task, "metrics": {}, "run": Path(run.out).name, "error": str(error),
                            "batch_size": run.batch_size, "peak_lr": run.peak_lr, "seed": run.seed})
    summary = summarize(results) if len(runs) > 1 else results[0]
    if len(runs) > 1:
        write_results(out, summary, setup)
    if config.predict:
        best = max(range(len(runs)), key=lambda i: primary(results[i]))
        write_predictions([runs[best].out], config, setup)
    return summary


def primary(results: dict[str, Any]) -> float:
    """Returns the metric that decides, -infinity where there is none."""
    value = results["metrics"].get(next(iter(TASKS[results["task"]].paper)))
    return -math.inf if value is None else value


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the median over the seeds of the setting with the best median, its spread, and all runs."""
    settings: dict[tuple, list[dict]] = {}
    for result in results:
        settings.setdefault((result["batch_size"], result["peak_lr"]), []).append(result)
    medians = {setting: statistics.median(map(primary, runs)) for setting, runs in settings.items()}
    chosen = max(medians, key=medians.get)
    finished = [run for run in settings[chosen] if run["metrics"]]
    if not finished:
        raise FloatingPointError("all runs diverged; try a lower --peak-lr or --sweep-lrs")
    first = finished[0]
    by_name = {name: [run["metrics"][name] for run in finished if run["metrics"][name] is not None]
               for name in first["metrics"]}
    return {
        "task": first["task"], "metrics": {n: statistics.median(v) for n, v in by_name.items() if v},
        "spread": {n: [min(v), max(v)] for n, v in by_name.items() if v}, "seeds": len(settings[chosen]),
        "batch_size": chosen[0], "peak_lr": chosen[1], "scratch": first["scratch"],
        "majority": first["majority"],
        "settings": [{"batch_size": s[0], "peak_lr": s[1], "median": None if m == -math.inf else m}
                     for s, m in medians.items()],
        "runs": results,
    }


def table(summaries: Iterable[dict[str, Any]]) -> str:
    """Returns results beside the paper's as a Markdown table: in per cent, with the range over seeds."""
    columns = ["task", "metric", "here", "majority", "paper BASE", "paper LARGE", "runs", "setting"]
    rows = [columns, ["---"] * len(columns)]
    for summary in summaries:
        task = summary["task"]
        percent = 1 if task.startswith("squad") else 100  # the official scripts print per cent
        run = f"batch {summary['batch_size']}, {summary['peak_lr']:g}" if "peak_lr" in summary else "ensemble"
        for name, paper in TASKS[task].paper.items():
            value, same = (summary[key].get(name) for key in ("metrics", "majority"))
            low_high = summary.get("spread", {}).get(name, [])
            value, same, *low_high = (None if v is None else v * percent for v in (value, same, *low_high))
            here, *others = ("–" if v is None else f"{v:.1f}" for v in (value, same, *paper))
            here += " ({:.1f} to {:.1f})".format(*low_high) if low_high else ""
            runs = summary.get("seeds", len(summary.get("ensemble", "1")))
            rows.append([task, name, here, *others, str(runs), run])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_results(out: Path, results: dict[str, Any], setup: Setup) -> None:
    """Writes results.json and, as a table, results.md."""
    if setup.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "results.json", results)
        write_atomically(out / "results.md", table(results.get("tasks", {"": results}).values()).encode())


def average(
    runs: Sequence[str], config: FinetuneConfig, split: str, setup: Setup
) -> tuple[Head, Split, np.ndarray]:
    """Returns head, split, and the mean over runs of what their models give each input (§5.1, ensembles)."""
    total, first = 0.0, None
    for path in runs:
        described = read_json(Path(path) / "run.json")
        kind, flags = described.get("command", {}).get("kind", "a pretraining run"), described.get("flags")
        if kind != f"one run of {config.task}":
            raise ValueError(f"{path} is {kind}, not one run of {config.task}")
        names = ("seq_len", "ranking", "doc_stride", "max_question_tokens", "skip_bad_rows")
        own = replace(config, **{name: flags[name] for name in names})
        head, tokenizer = head_of(own), Tokenizer.from_pretrained(find_model(path))
        found = load_split(own, split, tokenizer, Path(config.out) / "features", setup)
        model = head.model_class.from_pretrained(find_model(path)).to(setup.device)
        probabilities, _ = predict(model, head, found.features, setup, config.micro_batch_size or 32)
        first = first or (head, found)
        if type(head) is not type(first[0]) or (
            isinstance(head, Spans) and not np.array_equal(found.features.ids, first[1].features.ids)
        ):
            raise ValueError(f"{path} and {runs[0]} cannot be averaged: other tokens, or other scores")
        total = total + probabilities
    return *first, total / len(runs)


def write_predictions(runs: Sequence[str], config: FinetuneConfig, setup: Setup) -> None:
    """Writes what the runs, averaged, answer on the test set; where there is none, on the dev set."""
    has_test = bool(split_files(config.task, find_task(config.task, config.data), "test"))
    head, split, probabilities = average(runs, config, "test" if has_test else "dev", setup)
    predictions = head.predictions(probabilities, split.features, split.examples)
    files = head.files(predictions, split.examples)
    if has_test and split.features.labelled:  # RACE's: the paper's figures are for it
        metrics = head.metrics(predictions, split.examples)
        files["test_metrics.json"] = json.dumps(without_nan(metrics), indent=1) + "\n"
        say("test: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()), setup.rank)
    if setup.rank == 0:
        for name, content in files.items():
            write_atomically(Path(config.out) / name, content.encode())
    say(f"wrote {', '.join(str(Path(config.out) / name) for name in files)}: "
        f"{'test' if has_test else 'no test set, so the dev'} predictions of {' + '.join(runs)}", setup.rank)


def ensemble(config: FinetuneConfig, setup: Setup) -> dict[str, Any]:
    """Averages finished runs; a sweep's directory stands for all runs of its best setting."""
    runs: list[str] = []
    for path in dict.fromkeys(config.ensemble):
        if not (Path(path) / "results.json").exists():
            raise ValueError(f"{path}: no finished run (no results.json)")
        results = read_json(Path(path) / "results.json")
        best = [results.get(name) for name in ("batch_size", "peak_lr")]
        chosen = [r["run"] for r in results.get("runs", []) if [r["batch_size"], r["peak_lr"]] == best]
        runs += [f"{path}/{name}" for name in chosen] or [path]
    head, dev, probabilities = average(runs, config, "dev", setup)
    metrics = head.metrics(head.predictions(probabilities, dev.features, dev.examples), dev.examples)
    train = read_examples(config.task, find_task(config.task, config.data), "train", config.skip_bad_rows)
    results = {"task": config.task, "metrics": metrics, "ensemble": runs,
               "majority": majority_metrics(head, train, dev.examples)}
    write_results(Path(config.out), results, setup)
    if config.predict:
        write_predictions(runs, config, setup)
    return results


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def check(config: FinetuneConfig) -> None:
    """Raises ValueError for values that no run can have."""
    check_values(config)
    for name in ("epochs", "doc_stride", "max_question_tokens", "max_answer_tokens"):
        at_least(config, name, 1)
    at_least(config, "patience", 0)
    in_range(config, "seeds", 1, 1000)
    at_least(config, "seq_len", 16)
    in_range(config, "warmup_ratio", 0, 1)


def parse(argv: Sequence[str] | None) -> dict[str, Any]:
    """Returns the flags that were given."""
    epilog = "The defaults shown are GLUE's. "
    for task, names in (("squad1", "squad1 and squad2"), ("race", "race")):
        changed = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in table_10(task).items()
                            if not name.startswith("sweep"))
        epilog += f"{names}: {changed}. "
    parser = argparse.ArgumentParser("finetune.py", None, "Fine-tune RoBERTa.", epilog, allow_abbrev=False)
    add_flags(parser, FinetuneConfig)
    return vars(parser.parse_args(argv))


def config_of(task: str, given: dict[str, Any]) -> FinetuneConfig:
    """Returns Table 10's settings of a task with the flags' changes."""
    config = replace(FinetuneConfig(), **table_10(task) | given | {"task": task})
    return replace(config, out=config.out or f"runs/{task}{'-ensemble' * bool(config.ensemble)}")


def main(argv: Sequence[str] | None = None) -> None:
    given = parse(argv)
    rank = ranks_of_environment()[0]
    config = config_of(given.get("task", "all"), given)
    shown = {name: value for name, value in asdict(config).items() if value not in (None, ())}
    say("  ".join(f"{name}={value}" for name, value in shown.items()), rank)
    with clean_end(unfit=2):
        summaries = run_command(config, given)
        say("\n" + table(summaries), rank)


def run_command(config: FinetuneConfig, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Does one task or, with --task all, each that --data holds; returns the results of each."""
    if not config.data:
        raise ValueError("--data is missing: the folder of the tasks (glue/, squad/, RACE/) or a task's own")
    if not config.model and not config.ensemble:
        raise ValueError("--model is missing: a run directory of train.py, or a saved model")
    if config.sweep and {"batch_size", "peak_lr"} & given.keys():
        raise ValueError("--sweep has no use for --batch-size and --peak-lr; give --sweep-batch-sizes and "
                         "--sweep-lrs instead")
    check(config)
    setup = set_up(config.precision, config.timeout)
    with locked(Path(config.out), setup.rank):
        return _run_tasks(config, given, setup)


def _run_tasks(config: FinetuneConfig, given: dict[str, Any], setup: Setup) -> list[dict[str, Any]]:
    if config.task != "all":
        return [finetune(config, setup)]
    found = [task for task in TASKS if any(split_files(task, directory, "train") for directory in
                                           task_directories(task, config.data)[:2])]
    if not found:
        raise ValueError(f"{config.data}: none of the tasks {', '.join(TASKS)} is in it")
    if config.ensemble or config.ranking:
        raise ValueError("--ensemble and --ranking are for one --task")
    for task in found:  # what is wrong with the last task's files should not come to light after days
        for split in ("train", "dev"):
            read_examples(task, find_task(task, config.data), split, config.skip_bad_rows)
    claim_directory(Path(config.out), {"command": {"kind": "all tasks"}}, set(), setup.rank)
    results = {}
    for task in found:
        results[task] = finetune(config_of(task, given | {"out": str(Path(config.out) / task)}), setup)
        write_results(Path(config.out), {"tasks": results}, setup)
    return list(results.values())


if __name__ == "__main__":
    main()
