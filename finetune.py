"""Fine-tuning: a pretrained RoBERTa put through GLUE, SQuAD and RACE (§5), by the paper's protocol.

    python finetune.py --task cola --data glue --model runs/tiny --out runs/cola
    python finetune.py --task mnli --data glue --model runs/mine --sweep --out runs/mnli
    python finetune.py --task rte --data glue --model runs/mnli/batch32-lr2e-05-seed0 --predict
    python finetune.py --task cola --data glue --ensemble runs/a runs/b runs/c --predict --out runs/ensemble
    python finetune.py --task cola --data glue --model runs/cola --eval-only --out runs/again
    torchrun --nproc-per-node 8 finetune.py ...

Pretraining leaves an encoder that turns every token into a vector which depends on the token's context. A
task adds one or two small layers that turn such vectors into scores, and then takes a few passes over its
own examples. All weights are trained, the encoder's too, but at a rate so low that they move only a little.
What differs between the tasks is how a text becomes tokens and how scores become an answer. The path is the
same for all of them:

    example --inputs--> item --model--> scores --probabilities--> (mean of an ensemble) --decide--> prediction

The third command above starts RTE from a model fine-tuned on MNLI, whose encoder it takes, as the paper does
for its test results on RTE, STS-B and MRPC (§5.1). DIFFERS: for the test sets of QNLI and WNLI the paper
ranks candidates against each other (§5.1). That trick is not implemented, since the published files hold no
candidates: here both are classified like every other task.

Part I follows the path. Part II reads the published files, and has the commands that run one setting several
times. What Part I uses of it: a `TaskBatch` is what one forward pass reads, items padded to one length.
`TaskBatches.step` gives the micro-batches of a step. `predict` gives the probabilities of all items, and
`metrics_of` compares predictions with labels. `build_model` puts a head's layers on the pretrained encoder.
`first_answer` gives the characters of the first gold answer that stands where the file says, None if there is
none.

From train.py Part I takes what pretraining is made of. `begin` makes the optimiser and all else that a step
changes. `resume` takes over the newest checkpoint, if there is one. `accumulate` adds up a step's gradients.
`update` applies them. `log` writes a line about the last steps. `save` writes a checkpoint.

`DIFFERS:` tags a departure from the paper, `CHOICE:` what it leaves open. Legend: B items of a micro-batch,
N candidates (RACE: 4), T tokens, L labels; in code, F is torch.nn.functional.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import json
import math
import re
import statistics
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import data
import roberta
import train
from data import Tokenizer, flag, join, say
from roberta import RobertaConfig
from train import Ranks, RunConfig, Training, recipe, to_tensor

# ----------------------------------------------------------------------------------------------------------
# Part I: what the paper says
# ----------------------------------------------------------------------------------------------------------

# ----------------------------------------------------------------------------------------------------------
# Table 10: the settings
# ----------------------------------------------------------------------------------------------------------


# Each field is a flag of the command line, too: `flag` takes its default, meaning, source and range. `recipe`
# does the same and lists it in --help with the training recipe. may_change: the command that resumes a run
# may give another value.
@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """What one command is asked to do. The defaults are GLUE's; `table_10` has the other tasks'.

    Rates are some thirty times lower than in pretraining; the schedule's shape is the same, up, then down.
    CHOICE: of Table 10's sets for GLUE, {16, 32} and {1e-5, 2e-5, 3e-5}, a single run takes 32 and the middle
    rate. CHOICE: the model of the best epoch is kept, for SQuAD and RACE as well, and three epochs without a
    better one end a run. The lengths in a SQuAD input are those of BERT's code. A seq_len that is not given
    is filled in by `finetune`, as soon as it knows the model.
    """

    task: TaskName | None = flag(None, "what is to be learned")
    data: str | None = flag(None, "folder of the tasks (glue/, squad/, RACE/) or of this", may_change=True)
    model: str | None = flag(None, "pretrained model or fine-tuned run to start from", may_change=True)
    out: str | None = flag(None, "run directory; none: runs/TASK, or runs/TASK-ensemble", may_change=True)
    predict: bool = flag(False, "write predictions for the test set, or else for dev", may_change=True)
    scratch: bool = flag(False, "start from random weights of the model's shape: the baseline")
    eval_only: bool = flag(False, "evaluate --model, which has the task's head, instead of training")
    skip_bad_rows: bool = flag(False, "leave malformed rows out, and count them, instead of stopping")
    ensemble: tuple[str, ...] = flag((), "finished runs to average instead of training", "§5.1")
    sweep: bool = flag(False, "run each batch size with each rate and report the best", may_change=True)
    sweep_batch_sizes: tuple[int, ...] = flag((16, 32), "that --sweep tries", low=1, may_change=True)
    sweep_lrs: tuple[float, ...] = flag((1e-5, 2e-5, 3e-5), "that --sweep tries", low=1e-12, may_change=True)
    seeds: int | None = flag(None, "runs per setting; none: 5 with --sweep, else 1", low=1, may_change=True)
    batch_size: int = recipe(32, "examples (SQuAD: windows) a step", "Table 10", low=1)
    peak_lr: float = recipe(2e-5, "learning rate after warm-up", "Table 10", low=1e-12, high=1e3)
    weight_decay: float = recipe(0.1, "decoupled decay of every parameter", "Table 10", low=0)
    epochs: int = recipe(10, "passes over the training examples, at most", "Table 10", low=1)
    warmup_ratio: float = recipe(0.06, "share of steps that warm up", "Table 10", low=0, high=1)
    patience: int = recipe(3, "epochs without gain that end a run; 0: never", "§5.1", low=0)
    seq_len: int | None = flag(None, "tokens an input at most; none: the model's most, up to 512", low=16)
    doc_stride: int = flag(128, "tokens from one window to the next, at most half a window (SQuAD)", low=1)
    max_question_tokens: int = flag(64, "tokens of a question at most (SQuAD)", low=1)
    max_answer_tokens: int = flag(30, "tokens of a predicted answer at most (SQuAD)", low=1)


def table_10(task: str) -> dict[str, Any]:
    """The settings in which a task differs from GLUE's.

    >>> table_10("rte"), table_10("race")["peak_lr"]
    ({}, 1e-05)
    """
    if task == "race":
        settings = {"batch_size": 16, "peak_lr": 1e-5, "epochs": 4}
    elif task.startswith("squad"):
        settings = {"batch_size": 48, "peak_lr": 1.5e-5, "epochs": 2, "weight_decay": 0.01}
    else:
        return {}
    # For these the paper names one setting, so in a sweep nothing differs but the seeds.
    return settings | {"sweep_batch_sizes": (settings["batch_size"],), "sweep_lrs": (settings["peak_lr"],)}


# ----------------------------------------------------------------------------------------------------------
# The tasks beside the paper's figures
# ----------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A task as its publishers ship it, and what the paper reached on it.

    texts and label are columns of a table; SQuAD and RACE come as JSON and have none. labels: as the files
    spell them; none where the answer is not one of a list, but a number (STS-B) or a span of text (SQuAD).
    paper: for each metric the paper's figures on the dev set, in per cent, of BASE and of LARGE; the first
    metric decides which of two models is better. parts: the metrics that are taken on a part of the split
    only, and which. mean, deviation: of the numbers to predict, where `Classification` takes them out.
    """

    name: str
    folder: str
    texts: tuple[str, ...]  # columns with a sentence, or with a pair
    label: str  # column
    labels: tuple[str, ...]
    paper: dict[str, tuple[float | None, float | None]]
    parts: dict[str, str] = {}
    mean: float = 0.0
    deviation: float = 1.0

    @property
    def metric(self) -> str:
        # The first one: a dict keeps the order in which it was written.
        return next(iter(self.paper))


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
TASKS = {task.name: task for task in (
    # Is it good English? Is the review positive?
    Task("cola", "CoLA", ("sentence",), "label", ("0", "1"), {"matthews_correlation": (63.6, 68.0)}),
    Task("sst-2", "SST-2", ("sentence",), "label", ("0", "1"), {"accuracy": (94.8, 96.4)}),
    # Do two sentences (two questions) mean the same? How much, from 0 to 5?
    Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"),
         {"accuracy": (90.2, 90.9), "f1": (None, None)}),
    Task("qqp", "QQP", ("question1", "question2"), "is_duplicate", ("0", "1"),
         {"accuracy": (91.9, 92.2), "f1": (None, None)}),
    Task("sts-b", "STS-B", PAIR, "score", (), {"pearson": (91.2, 92.4), "spearman": (None, None)}),
    # Does the first text imply the second (QNLI: does the sentence answer the question)?
    Task("mnli", "MNLI", PAIR, "gold_label", ("contradiction", "neutral", "entailment"),
         {"accuracy": (87.6, 90.2), "accuracy_mismatched": (None, 90.2)},
         {"accuracy": "matched", "accuracy_mismatched": "mismatched"}),
    Task("qnli", "QNLI", ("question", "sentence"), "label", ENTAILMENT, {"accuracy": (92.8, 94.7)}),
    Task("rte", "RTE", PAIR, "label", ENTAILMENT, {"accuracy": (78.7, 86.6)}),
    Task("wnli", "WNLI", PAIR, "label", ("0", "1"), {"accuracy": (None, 91.3)}),
    # Where in the passage is the answer? In v2.0: is it there at all?
    Task("squad1", "squad", (), "", (), {"f1": (None, 94.6), "exact_match": (None, 88.9)}),
    Task("squad2", "squad", (), "", (), {"f1": (None, 89.4), "exact": (None, 86.5)}),
    # Which of (here up to ten) answers is right? These figures of the paper's are for the test set.
    Task("race", "RACE", (), "", tuple("ABCDEFGHIJ"),
         {"accuracy": (None, 83.2), "accuracy_middle": (None, 86.5), "accuracy_high": (None, 81.3)},
         {"accuracy_middle": "middle", "accuracy_high": "high"}),
    # One's own: which of the labels that the training set has (Part II fills them in)? What number?
    Task("classification", "", ("text", "text_b"), "label", ("",),
         {"accuracy": (None, None), "f1_macro": (None, None), "matthews_correlation": (None, None)}),
    Task("regression", "", ("text", "text_b"), "label", (),
         {"pearson": (None, None), "spearman": (None, None)}),
)}
TaskName = Literal[tuple(TASKS)]  # "cola", "sst-2", ...: the type from which --task has its choices


class Example(NamedTuple):
    """One question to the model, as it was published.

    part: the part of the split, in MNLI matched or mismatched, in RACE middle or high; else "".
    texts: a sentence or a pair; SQuAD: question, passage; RACE: passage, question, and the answers.
    label: the index of the right label, or a number. SQuAD: a (first character, text) for each gold answer,
    and () for a question of v2.0 that has none. Where the label is withheld, as in a test set, it is None.
    """

    id: str
    part: str
    texts: tuple[str, ...]
    label: Any


# ----------------------------------------------------------------------------------------------------------
# Inputs: <s> A </s></s> B </s>
# ----------------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """What the model scores at once, and what counts once in the loss.

    It is a text or a pair, a question with its four candidates (RACE), or one window of a passage (SQuAD).
    target: label or number. SQuAD: the answer's first and last token in the sequence, both included, and 1;
    0, 0, 0 where the window does not hold the answer. Where labels are withheld it means nothing.
    begin (SQuAD): the position in the sequence of the window's first token.
    offsets (SQuAD): each token's range of characters in the passage, (tokens of the window, 2).
    """

    sequences: list[np.ndarray]  # token ids, `<s>` and `</s>` included; RACE has four, the others one
    example: int  # the index of its example: SQuAD's windows share one
    target: Any
    begin: int = 0
    offsets: np.ndarray | None = None


def cut_longer(first: np.ndarray, second: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Two texts that together have no more than `room` tokens.

    Only the longer one is cut, down to the other's length if need be: a short question is kept whole beside a
    long passage, and of two long texts each has half of the room.

    >>> [text.tolist() for text in cut_longer(np.arange(3), np.arange(20), room=8)]
    [[0, 1, 2], [0, 1, 2, 3, 4]]
    """
    # Half of the room is the first one's in any case, and so is what the second leaves of the other half.
    half = (room + 1) // 2
    first = first[: max(half, room - len(second))]
    return first, second[: room - len(first)]


def fill_blank(question: str, answer: str) -> str:
    """A RACE question with one of its answers: in the place of its blank, or behind it where it has none.

    >>> fill_blank("Tom is _ .", "tired"), fill_blank("Why?", "It rained.")
    ('Tom is tired .', 'Why? It rained.')
    """
    # About half of the questions have a blank, some written as several underscores. Of two blanks each gets
    # the whole answer.
    pieces = re.split("_+", question)
    filled = answer.join(pieces) if len(pieces) > 1 else f"{question} {answer}"
    return " ".join(filled.split())


def windows(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """The parts in which a passage of `length` tokens is read where an input has `room` for fewer.

    Each part, (begin, end) without the end, makes one input. They overlap by `room - stride` tokens: an
    answer no longer than that is whole in at least one of them, even if another cuts it in two. A longer
    answer may be whole in none; then every window is taught that it holds no answer.

    >>> windows(length=10, room=6, stride=3)
    [(0, 6), (3, 9), (6, 10)]
    """
    # A window is needed as long as the one before it, which began a stride earlier, has not reached the end:
    # as long as begin - stride + room < length.
    begins = range(0, max(1, length - room + stride), stride)
    # The last one ends with the passage; it may be shorter than the others.
    return [(begin, min(begin + room, length)) for begin in begins]


def tokens_of_answer(offsets: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """The first and the last token that overlap a passage's characters begin to end (exclusive).

    SQuAD's answers are given in characters, the model's in tokens. "Rome" in "Ann is in Rome":

    >>> tokens_of_answer(np.array([[0, 3], [3, 6], [6, 9], [9, 14]]), 10, 14)  # "Ann", " is", " in", " Rome"
    (3, 3)
    """
    # An answer may begin or end inside a token. Then the tokens hold a little more than the answer.
    touched = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end))
    return int(touched[0]), int(touched[-1])


def answer_text(passage: str, offsets: np.ndarray, first: int, last: int) -> str:
    """The way back: the passage's text from the first to the last token, both included."""
    # A word's token includes the space before the word, which is no part of an answer.
    return passage[offsets[first, 0] : offsets[last, 1]].strip()


# ----------------------------------------------------------------------------------------------------------
# Three kinds of tasks: inputs, loss, probabilities, decide
# ----------------------------------------------------------------------------------------------------------


class Head:
    """What a task needs beside the network, in one of the three classes below.

    The layers that a task adds to the encoder are in roberta.py, in the class that each of these names as its
    `model_class`. What stands here is all that happens before the network and after it, in four methods:

        inputs          examples -> items
        loss            the model's scores for a batch, and the batch's targets -> the sum over its items
        probabilities   the model's scores for a batch -> what an ensemble averages, a row for each item
        decide          the probabilities of all items -> a prediction for each example

    Below, `finetune_once` calls `loss` for every batch of a step, and `measure` the last two after every
    epoch. Scores are a tensor, (B, L) or (B, N). SQuAD's are a tuple: of beginning and end, (B, T) each; in
    v2.0 also of whether there is an answer, (B,).
    """

    def __init__(self, task: Task, config: FinetuneConfig):
        self.task, self.config = task, config


class Classification(Head):
    """A label for a text or a pair (§5.1), read off the vector h of `<s>`, which has seen all tokens.

        P(label | text) = softmax(W2 tanh(W1 h))        loss = -ln P(right label)

    W1 and W2 are the weights of `dense` and `out_proj` in roberta.py, whose biases are left out here.
    Scores 2 and 0 give the probabilities e² / (e² + 1) = 0.88 and 0.12: the loss is 0.13 where the first
    label is right and 2.13 where the second is.

    STS-B asks for a number, so there is one score and the loss is its squared distance from the number.
    CHOICE: the number is learned as it stands in the file, from 0 to 5. One's own numbers may be thousands,
    which steps of 2e-5 would never reach: they are learned less their mean, in units of their deviation.
    """

    model_class = roberta.RobertaForSequenceClassification

    def inputs(self, examples: Sequence[Example], tokenizer: Tokenizer) -> Iterator[Item]:
        seq_len = self.config.seq_len
        for number, example in enumerate(examples):
            # `join` makes <s> A </s> of a text, which adds two tokens, and <s> A </s></s> B </s> of a pair,
            # which adds four. What is too long is cut: unlike in SQuAD, the beginning mostly tells enough.
            texts = [tokenizer.encode_to_numpy(text)[: seq_len - 2] for text in example.texts]
            if len(texts) == 2:
                texts = cut_longer(*texts, seq_len - 4)
            # A test set's label is None. The batch needs a number in its place.
            yield Item([join(*texts)], number, example.label or 0)

    def loss(self, scores: Tensor, batch: TaskBatch) -> Tensor:
        # A sum: later it is divided by the number of items of the step, over all ranks and micro-batches.
        targets = to_tensor(batch.targets, scores.device)
        if self.task.labels:
            return F.cross_entropy(scores.float(), targets, reduction="sum")
        # STS-B: of a pair valued 4.5 a score of 4.0 costs 0.25.
        targets = (targets.float() - self.task.mean) / self.task.deviation
        return F.mse_loss(scores[:, 0].float(), targets, reduction="sum")

    def probabilities(self, scores: Tensor, batch: TaskBatch) -> Tensor:
        # An ensemble averages these (§5.1); for STS-B, the numbers.
        if self.task.labels:
            return scores.float().softmax(-1)  # (B, L)
        return scores.float() * self.task.deviation + self.task.mean  # (B, 1)

    def decide(self, probabilities: np.ndarray, items: list[Item], examples: Sequence[Example]) -> list:
        # One item is one example here, in the same order.
        return (probabilities.argmax(1) if self.task.labels else probabilities[:, 0]).tolist()


class MultipleChoice(Classification):
    """The right one of some candidate answers, in RACE of four (§5.3).

    Each candidate is read in a sequence of its own, <s> question and answer </s></s> passage </s>, and its
    vector of `<s>` becomes one score. The four scores compete:

        P(candidate i) = exp(score i) / (sum over the four of exp(score j))        loss = -ln P(right one)

    With four equal scores each has 1/4, and the loss is ln 4 = 1.39: that of a model which knows nothing.
    Only the inputs differ from a classification's. From there on the four candidates' scores, (B, N), are
    treated like the scores of L labels.
    CHOICE: question and answer come first, then the passage; a question's blank is filled in.
    """

    model_class = roberta.RobertaForMultipleChoice

    def inputs(self, examples: Sequence[Example], tokenizer: Tokenizer) -> Iterator[Item]:
        seq_len = self.config.seq_len
        encode = functools.lru_cache(64)(tokenizer.encode_to_numpy)  # a passage has several questions
        for number, example in enumerate(examples):
            # Four sequences that differ in a few words at the front. What makes one of them right is in the
            # passage, which all of them contain: attention has to find it.
            passage, question, *answers = example.texts
            sequences = []
            for answer in answers:
                # §5.3: question and answer are cut to 128 tokens, then the passage to what is left of 512.
                first = encode(fill_blank(question, answer))[: min(128, seq_len - 4)]
                second = encode(passage.strip())[: seq_len - 4 - len(first)]
                sequences.append(join(first, second))
            yield Item(sequences, number, example.label or 0)


class Answer(NamedTuple):
    """The answer given to a SQuAD question, with what is needed to try other thresholds than one half."""

    text: str  # "" where the question is classed unanswerable
    span: str  # the best span, even where `text` is ""
    no_answer: float  # the probability that the passage does not answer it


class Spans(Head):
    """Where in the passage the answer is (§5.2); in v2.0 also whether there is one.

    Two vectors s and e are learned, the two rows of `qa_outputs` in roberta.py. With h_t the vector of the
    token at position t,

        P(begins at t) = softmax over t of (s · h_t)        P(ends at t) = softmax over t of (e · h_t)
        loss = -(ln P(begins at first) + ln P(ends at last)) / 2

    CHOICE: t runs over the window's passage tokens and `<s>`. A window without the answer is taught to give
    all its probability to `<s>`, so the spans it offers are weak, and windows of one passage can be compared.
    CHOICE: the paper does not say how the two parts are weighed; here they are averaged, as in BERT's code.

    v2.0 (§3): a classifier on the vector of `<s>` says whether the window answers the question. Both are
    trained jointly, their losses are summed. The decision over all windows of a question:

        window   answerable   its best span   begins · ends
        1        0.80         "Rome"          0.2 · 0.3 = 0.06
        2        0.30         "Oslo"          0.5 · 0.9 = 0.45

    The question is as answerable as its most answerable window, 0.80. That is at least one half, so there is
    an answer, and it is the best span of all windows, "Oslo", whichever window was the most answerable. With
    0.40 in place of 0.80 the answer would be "", and 0.60 the probability that there is none.
    CHOICE: this rule; the paper speaks of one input for each question.
    """

    model_class = roberta.RobertaForQuestionAnswering

    def inputs(self, examples: Sequence[Example], tokenizer: Tokenizer) -> Iterator[Item]:
        seq_len = self.config.seq_len
        encode = functools.lru_cache(64)(tokenizer.encode_with_offsets)  # a passage has several questions
        for number, example in enumerate(examples):
            # The question is in front of every window of its passage, so it must not fill them.
            question = tokenizer.encode_to_numpy(example.texts[0].strip())
            question = question[: min(self.config.max_question_tokens, seq_len // 2)]
            # The passage is encoded as it stands, spaces and all, because offsets count its characters: for
            # each token of ids they have (begin, end), the end exclusive. gold is the answer's first and last
            # token, or None where there is no answer.
            ids, offsets = encode(example.texts[1])
            characters = first_answer(example)
            gold = tokens_of_answer(offsets, *characters) if characters else None

            # `join` puts <s> question </s></s> before a window and </s> behind it. The stride is at most half
            # a window, so that windows overlap even where seq_len is small.
            begin = len(question) + 3
            room = seq_len - begin - 1
            stride = min(self.config.doc_stride, max(1, room // 2))
            for start, end in windows(len(ids), room, stride):
                # CHOICE: a window that holds only a part of the answer is taught that it holds none: its
                # target is `<s>`, at 0, for the first token as for the last. (gold includes its last token,
                # the window excludes its end.)
                target = (0, 0, 0)
                if gold and start <= gold[0] and gold[1] < end:
                    target = (begin + gold[0] - start, begin + gold[1] - start, 1)
                sequence = join(question, ids[start:end])
                yield Item([sequence], number, target, begin, offsets[start:end])

    def loss(self, scores: tuple[Tensor, ...], batch: TaskBatch) -> Tensor:
        # Two classifications in which positions take the part of labels, and in v2.0 a third, yes or no.
        start, end, *answerable = scores
        first, last, has_answer = to_tensor(batch.targets, start.device).unbind(1)  # (B, 3) -> three of (B,)
        start_loss = F.cross_entropy(of_passage(start, batch.items), first, reduction="sum")
        end_loss = F.cross_entropy(of_passage(end, batch.items), last, reduction="sum")
        loss = (start_loss + end_loss) / 2
        # In v2.0: -ln σ(score) where the window has the answer, -ln (1 - σ(score)) where it has not.
        if answerable:
            score, target = answerable[0].float(), has_answer.float()
            loss = loss + F.binary_cross_entropy_with_logits(score, target, reduction="sum")
        return loss

    def probabilities(self, scores: tuple[Tensor, ...], batch: TaskBatch) -> Tensor:
        start, end, *answerable = scores
        # Beginning and end are two distributions over the same positions, independent of each other.
        scores = torch.stack([of_passage(start, batch.items), of_passage(end, batch.items)], dim=1)
        # Column 0, before the positions, is the probability that the window answers the question: the same in
        # both rows. In v1.1 every question has an answer.
        rows = F.pad(scores.softmax(-1), (1, 0))  # (B, 2, T) -> (B, 2, 1 + T)
        rows[:, :, 0] = answerable[0].float().sigmoid()[:, None] if answerable else 1.0
        return rows

    def decide(self, probabilities: np.ndarray, items: list[Item], examples: Sequence[Example]) -> list:
        answerable = [0.0] * len(examples)
        best, spans = [-1.0] * len(examples), [""] * len(examples)  # -1: even a span of probability 0 is more
        for item, (start, end) in zip(items, probabilities):
            # One window that answers is enough: most windows of a long passage do not.
            question = item.example
            answerable[question] = max(answerable[question], float(start[0]))
            # The window's tokens begin at item.begin of the sequence; `probabilities` put a column before.
            inside = slice(1 + item.begin, 1 + item.begin + len(item.offsets))
            first, last, probability = best_span(start[inside], end[inside], self.config.max_answer_tokens)
            if probability > best[question]:
                best[question] = probability
                spans[question] = answer_text(examples[question].texts[1], item.offsets, first, last)
        return [Answer(span if sure >= 0.5 else "", span, 1 - sure) for sure, span in zip(answerable, spans)]


def of_passage(scores: Tensor, items: Sequence[Item]) -> Tensor:
    """Scores of positions, (B, T), with -∞ where no answer can be: softmax makes that probability 0."""
    # `<s>` is allowed, too: it means "not in this window".
    allowed = torch.zeros(scores.shape, dtype=torch.bool)
    allowed[:, 0] = True
    # The question is not, although it may contain the answer's words.
    for row, item in enumerate(items):
        allowed[row, item.begin : item.begin + len(item.offsets)] = True
    return scores.float().masked_fill(~allowed.to(scores.device), -math.inf)


def best_span(start: np.ndarray, end: np.ndarray, longest: int) -> tuple[int, int, float]:
    """First token, last token and probability of the best span of up to `longest` tokens.

    The best beginning and the best end by themselves may not fit together: here those are tokens 1 and 0.

    >>> best_span(np.array([0.1, 0.6, 0.3]), np.array([0.5, 0.1, 0.4]), longest=3)
    (1, 2, 0.24)
    """
    # Every first token (row) with every last one (column). The spans of 1 to `longest` tokens are on the
    # diagonal of this table and up to `longest` - 1 steps above it; all others become 0.
    products = np.tril(np.triu(np.outer(start, end)), longest - 1)
    first, last = divmod(int(products.argmax()), len(end))
    return first, last, float(products[first, last])


# ----------------------------------------------------------------------------------------------------------
# The loop, with early stopping
# ----------------------------------------------------------------------------------------------------------


def measure(model: nn.Module, head: Head, dev: Split, ranks: Ranks) -> dict[str, float]:
    """The dev loss and the task's metrics: the whole path of the drawing at the top."""
    # `predict` runs the model over the items in batches: head.probabilities(model(batch.input_ids), batch).
    probabilities, loss = predict(model, head, dev, ranks)
    predictions = head.decide(probabilities, dev.items, dev.examples)
    return {"eval_loss": loss} | metrics_of(head.task, predictions, dev.examples)


# The best epoch's model stays in its checkpoint. When the run has ended, Part II moves it into the run
# directory.


def finetune_once(head: Head, ranks: Ranks, tokenizer: Tokenizer, splits: dict, fingerprint: str) -> Training:
    """Trains one model with one setting and seed, or resumes that; returns the state after the last step."""
    # Table 10: the rate rises over the first warmup_ratio of the steps, then falls linearly. It is 0 after
    # the last of them, which a run that is stopped early does not reach.
    config, out = head.config, Path(head.config.out)
    order = TaskBatches(splits["train"].items, config, ranks)
    max_steps = config.epochs * order.steps_per_epoch
    warmup_steps = round(config.warmup_ratio * max_steps)

    # All weights are trained: the pretrained encoder's and the head's.
    training = train.begin(config, ranks, build_model(head), max_steps)
    train.resume(training, out, fingerprint)
    progress = training.progress

    def loss_sums(model: nn.Module, batch: TaskBatch) -> tuple[Tensor]:
        # The weight is 0 where this rank has no item left, and computes a dummy for the others' sake, else 1.
        # A tuple and [num_items] have one element each here: pretraining may have two losses.
        scores = model(to_tensor(batch.input_ids, ranks.device))
        return (head.loss(scores, batch) * batch.weight,)

    with train.stop_signals() as received:
        for batches, num_items in data.prefetch(order.step, range(progress.step, max_steps)):
            # Early stopping (§5.1). Of 70, 72, 71, 72 and 71 % the second is best; the fourth only equals
            # it. With a patience of 3 that run ends here, and leaves the second epoch's model.
            if 0 < config.patience <= (progress.step - progress.best_step) // order.steps_per_epoch:
                break

            # One step. num_items counts all ranks' items: the sum of their losses is divided by it.
            rate = train.learning_rate(progress.step, config.peak_lr, warmup_steps, max_steps)
            train.accumulate(training, batches, loss_sums, [num_items])
            train.update(training, rate)

            must_stop = train.stop_asked(received, ranks)
            must_save = must_stop or progress.step % config.checkpoint_interval == 0
            ends_epoch = progress.step % order.steps_per_epoch == 0
            if ends_epoch or must_save or progress.step % config.log_interval == 0:
                train.log(training, out, progress.step / order.steps_per_epoch)
            if ends_epoch:
                # The dev set judges. A model better than all before is saved at once. `progress` notes its
                # step, so `save` never removes that checkpoint; in the end it is what the run leaves.
                result = train.log_result(training, out, measure(training.model, head, splits["dev"], ranks))
                is_best = progress.note_result(result, result[head.task.metric])
                must_save = must_save or is_best
                train.plot_log(out, f"{head.task.name}, seed {config.seed}", ranks)
            if must_save:
                train.save(training, out, tokenizer, fingerprint)
            if must_stop:
                train.end_after_signal(progress.step, received)
    return training


# ----------------------------------------------------------------------------------------------------------
# Metrics: scikit-learn's and scipy's definitions
# ----------------------------------------------------------------------------------------------------------

# SQuAD's (`squad_metrics`, Part II) are exact match, whether an answer equals a gold answer but for case,
# punctuation and articles, and F1, the harmonic mean of precision and recall of the words that it shares with
# a gold answer; of several gold answers the best counts, and both are averaged over the questions. Their
# names are those that the official scripts print: exact match is "exact_match" in v1.1 and "exact" in v2.0.


def accuracy(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """The share that is right.

    >>> accuracy([1, 1, 0, 0], [1, 1, 1, 0])
    0.75
    """
    # Read it beside the majority baseline: in QQP 63 % are right without looking at a question.
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def f1_score(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """The harmonic mean of precision and recall of label 1; 0 if neither list contains a 1.

    Two are predicted to be 1, and one of them is (precision 1/2). Three are 1, and one of them is found
    (recall 1/3):

    >>> f1_score([1, 1, 1, 0], [1, 0, 0, 1])
    0.4
    """
    # 2 / (1 / precision + 1 / recall) = 2 · both / (predicted + true), with no division by 0 on the way.
    true, predicted = np.asarray(labels) == 1, np.asarray(predictions) == 1
    total = int(true.sum() + predicted.sum())
    return 2 * int((true & predicted).sum()) / total if total else 0.0


def f1_macro(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """The mean over the labels of each one's F1, so that a rare label counts as much as a frequent one.

    >>> f1_macro([0, 0, 0, 2], [0, 0, 0, 0])  # 6/7 for label 0, nothing for label 2
    0.42857142857142855
    """
    occurring = sorted({*labels, *predictions})
    scores = [f1_score(np.equal(labels, label), np.equal(predictions, label)) for label in occurring]
    return sum(scores) / len(scores)


def matthews_correlation(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """The correlation of two lists of labels, CoLA's metric; 0 where one is constant.

    >>> matthews_correlation([1, 1, 0, 0], [1, 1, 1, 0]), matthews_correlation([1, 1, 1, 0], [1, 1, 1, 1])
    (0.5773502691896258, 0.0)
    """
    # Always giving the more frequent label earns 0 here. In CoLA its accuracy would be 70 %. With more than
    # two labels each has an axis, 1 where it is given and else 0, and the correlation is over all of these.
    every = sorted({*labels, *predictions})
    true, predicted = np.equal.outer(labels, every), np.equal.outer(predictions, every)
    true, predicted = true - true.mean(0), predicted - predicted.mean(0)
    scale = np.sqrt((true**2).sum() * (predicted**2).sum())
    return float((true * predicted).sum() / scale) if scale > 0 else 0.0


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    """The linear correlation, from -1 to 1; NaN where it is undefined.

    It is the cosine of the angle between the two lists as vectors, after subtracting from each its mean.

    >>> round(pearson([1, 2, 3], [1, 2, 6]), 4), pearson([1, 2, 3], [5, 5, 5])
    (0.9449, nan)
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    # A list of equal values becomes the zero vector, which has no direction. NaN also ends here.
    if not (np.ptp(a) > 0 and np.ptp(b) > 0):
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a / np.linalg.norm(a)) @ (b / np.linalg.norm(b)), -1, 1))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The correlation of the ranks: do both lists sort things alike, whatever the distances between values?

    >>> round(spearman([1, 2, 3], [1, 2, 600]), 6)
    1.0
    """
    # Both are undefined in the same cases: a list of equal values has equal ranks, and NaN has no rank.
    return math.nan if math.isnan(pearson(a, b)) else pearson(ranks_of(a), ranks_of(b))


def ranks_of(values: Sequence[float]) -> np.ndarray:
    """The rank of each value in the sorted list, from 1; equal values share the mean of their ranks.

    >>> ranks_of([30, 10, 20, 20]).tolist()
    [4.0, 1.0, 2.5, 2.5]
    """
    # A value that occurs `count` times has the ranks last - count + 1 to last.
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


# ----------------------------------------------------------------------------------------------------------
# Part II: the machinery
# ----------------------------------------------------------------------------------------------------------

# ----------------------------------------------------------------------------------------------------------
# Batches: what one forward pass reads, and their order
# ----------------------------------------------------------------------------------------------------------


class TaskBatch(NamedTuple):
    """What one forward pass reads, padded to its longest sequence; the model knows padding by its id."""

    input_ids: np.ndarray  # (B, T) int64; RACE: (B, N, T)
    targets: np.ndarray  # (B,); SQuAD: (B, 3)
    items: list[Item]
    weight: float  # of the loss: 1, or 0 where there was no item left for this rank
    num_tokens: int  # real ones


def longest(item: Item) -> int:
    # What an item costs: its batch is padded to the longest sequence in it.
    return max(map(len, item.sequences))


def collate(items: list[Item], weight: float = 1.0) -> TaskBatch:
    """The items as arrays, with padding behind shorter sequences, and in place of candidates too few."""
    candidates = max(len(item.sequences) for item in items)
    ids = np.full((len(items), candidates, max(map(longest, items))), data.PAD)
    for row, item in enumerate(items):
        for candidate, sequence in enumerate(item.sequences):
            ids[row, candidate, : len(sequence)] = sequence
    # Only RACE has the axis of candidates.
    ids = ids[:, 0] if candidates == 1 else ids
    targets = np.array([item.target for item in items])
    return TaskBatch(ids, targets, items, weight, int((ids != data.PAD).sum() * weight))


class TaskBatches:
    """The order of the training examples: `step(n)` is a pure function of (seed, n, rank).

    An epoch is shuffled. Then every 50 steps' worth of items is sorted by length, so that those of similar
    length meet in a step and little is padded, and the steps are shuffled. Their sizes differ by at most one.
    """

    def __init__(self, items: list[Item], config: FinetuneConfig, ranks: Ranks):
        self.items, self.config, self.ranks = items, config, ranks
        self.lengths = np.array([longest(item) for item in items])
        self.steps_per_epoch = math.ceil(len(items) / config.batch_size)
        self.steps_of = functools.lru_cache(1)(self.steps_of)  # the steps of an epoch are asked for in a row

    def steps_of(self, epoch: int) -> list[np.ndarray]:
        """The items of each step of an epoch."""
        count, seed = len(self.items), self.config.seed
        shuffled = data.epoch_order(count, seed, epoch)
        # lexsort goes by its last key first: by the pool in which the shuffle put an item, then by length.
        pool = np.arange(count) // (50 * self.config.batch_size)
        shuffled = shuffled[np.lexsort((self.lengths[shuffled], pool))]
        steps = [shuffled[part] for part in data.equal_parts(np.ones(count), self.steps_per_epoch)]
        return [steps[i] for i in data.epoch_order(len(steps), seed + 1, epoch)]

    def step(self, number: int) -> tuple[list[TaskBatch], int]:
        """This rank's micro-batches of a step, and the number of items in those of all ranks."""
        epoch, place = divmod(number, self.steps_per_epoch)
        chosen, world_size = self.steps_of(epoch)[place], self.ranks.world_size
        # Micro-batch i of rank r is part i * world_size + r, so all ranks make the same number of passes.
        passes = math.ceil(len(chosen) / (train.micro_batch_size(self.config, world_size) * world_size))
        parts = data.equal_parts(np.ones(len(chosen)), passes * world_size)
        batches = []
        for part in parts[self.ranks.rank :: world_size]:
            # Ranks wait for each other's gradients, so one without an item left computes a spare one, which
            # counts for nothing: its weight is 0.
            mine = [self.items[i] for i in chosen[part]]
            batches.append(collate(mine) if mine else collate([self.items[0]], weight=0.0))
        return batches, len(chosen)


# ----------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """The training, dev or test set: as published, and as the model reads it."""

    examples: list[Example]
    items: list[Item]


@torch.no_grad()
def predict(model: nn.Module, head: Head, split: Split, ranks: Ranks) -> tuple[np.ndarray, float]:
    """The probabilities of all items, and their mean loss. All ranks share the work."""
    # The longest items come first: if the memory does not suffice, that shows at once.
    items, size = split.items, head.config.micro_batch_size or 32
    order = np.argsort([-longest(item) for item in items], kind="stable")
    parts = [order[begin : begin + size] for begin in range(0, len(order), size)]
    shape = (2, 1 + head.config.seq_len) if isinstance(head, Spans) else (max(1, len(head.task.labels)),)
    # What another rank computes stays 0 here, so that the sum over ranks has it all.
    probabilities, loss = torch.zeros(len(items), *shape), torch.zeros(1, dtype=torch.float64)
    with roberta.evaluating(model), ranks.autocast():
        for part in parts[ranks.rank :: ranks.world_size]:
            batch = collate([items[i] for i in part])
            scores = model(to_tensor(batch.input_ids, ranks.device))
            found = head.probabilities(scores, batch).cpu()
            # A batch of short windows (SQuAD), or of few candidates (RACE), has shorter rows. Behind them
            # zeros stay, so that all rows fit into one array, in which an ensemble can be averaged.
            probabilities[part, ..., : found.shape[-1]] = found
            loss += head.loss(scores, batch).cpu()
    loss = ranks.sum(loss, "the losses of an evaluation")
    return ranks.sum(probabilities, "the predictions").numpy(), float(loss) / len(items)


METRICS = {"accuracy": accuracy, "f1": f1_score, "f1_macro": f1_macro, "matthews_correlation":
           matthews_correlation, "pearson": pearson, "spearman": spearman}


def metrics_of(task: Task, predictions: list, examples: Sequence[Example]) -> dict[str, float]:
    """The task's metrics, as fractions; SQuAD's in per cent, as the official scripts print them; where labels
    are withheld, none.
    """
    if not examples or any(example.label is None for example in examples):
        return {}
    if task.name.startswith("squad"):
        golds = [[text for _, text in example.label] for example in examples]
        return squad_metrics(golds, predictions, task.name == "squad2")
    result = {}
    # "accuracy_mismatched" is the accuracy of the part "mismatched".
    for name in task.paper:
        part = task.parts.get(name)
        pairs = [(e.label, p) for e, p in zip(examples, predictions) if part in (None, e.part)]
        result[name] = METRICS[name.removesuffix(f"_{part}")](*zip(*pairs))
    return result


def majority_metrics(task: Task, training: Sequence[Example], dev: Sequence[Example]) -> dict[str, float]:
    """The metrics of the baseline: to every example the most frequent answer of the training set."""
    # For STS-B any number would do, since a constant correlates with nothing; for SQuAD it is no answer.
    constant = Answer("", "", 1.0) if task.folder == "squad" else statistics.mode(e.label for e in training)
    return metrics_of(task, [constant] * len(dev), dev)


# ----------------------------------------------------------------------------------------------------------
# SQuAD's figures: the official scripts' definitions
# ----------------------------------------------------------------------------------------------------------


def normalize_answer(text: str) -> str:
    """A text without case, punctuation, articles and surplus white space.

    >>> normalize_answer("The  U.S., an Answer")
    'us answer'
    """
    # The official scripts' rule: an answer is not wrong for "the", for a full stop or for a capital letter.
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(gold: str, predicted: str, empty_matches: bool) -> float:
    """The F1 of the words that two answers share. If both are empty, v2.0 scores 1 and v1.1 scores 0.

    >>> squad_f1("in the year 1999", "1999", empty_matches=False)
    0.5
    """
    gold, predicted = normalize_answer(gold).split(), normalize_answer(predicted).split()
    if not gold or not predicted:
        return float(empty_matches and gold == predicted)
    # In the example: in, year and 1999 against 1999, so 2 · 1 / (3 + 1). Repeated words count repeatedly.
    common = sum((Counter(gold) & Counter(predicted)).values())
    return 2 * common / (len(gold) + len(predicted))


def squad_metrics(golds: list[list[str]], answers: list[Answer], version2: bool) -> dict[str, float]:
    """What the official script of the version prints, in per cent. A question without golds has no answer."""
    has_answer = np.array([bool(texts) for texts in golds])
    given = squad_scores(golds, [answer.text for answer in answers], version2)
    if not version2:
        return {"exact_match": 100 * given["exact"].mean(), "f1": 100 * given["f1"].mean()}
    # The script prints its figures for all questions, for those with an answer, and for those without.
    metrics = {}
    for prefix, chosen in (("", has_answer | True), ("HasAns_", has_answer), ("NoAns_", ~has_answer)):
        if chosen.any():
            metrics |= {prefix + name: 100 * scores[chosen].mean() for name, scores in given.items()}
            metrics[prefix + "total"] = int(chosen.sum())
    # It also prints the best that any threshold for `no_answer` would have given. Begin by answering nothing:
    # that gets the unanswerable questions right. Then answer the surest question with its span, then the
    # next, and so on. Each wins its score, or loses the point that an unanswerable question had.
    order = np.argsort([answer.no_answer for answer in answers], kind="stable")
    spans = [answer.span for answer in answers]
    for name, scores in squad_scores(golds, spans, version2).items():
        gains = np.where(has_answer, scores, [-float(span != "") for span in spans])[order]
        totals = np.cumsum([float((~has_answer).sum()), *gains])
        best = int(totals.argmax())
        metrics[f"best_{name}"] = 100 * totals[best] / len(golds)
        metrics[f"best_{name}_thresh"] = answers[order[best - 1]].no_answer if best else 0.0
    return metrics


def squad_scores(golds: list[list[str]], predictions: list[str], version2: bool) -> dict[str, np.ndarray]:
    """Exact match and F1 of each question, for the gold answer with which it is highest.

    v2.0's script ignores gold answers of which normalising leaves nothing. A question without any is one
    that has no answer, and "" is right.
    """
    exact, f1 = [], []
    for texts, predicted in zip(golds, predictions):
        if version2:
            texts = [text for text in texts if normalize_answer(text)] or [""]
        exact.append(normalize_answer(predicted) in map(normalize_answer, texts))
        f1.append(max(squad_f1(text, predicted, version2) for text in texts))
    return {"exact": np.array(exact, dtype=float), "f1": np.array(f1)}


# ----------------------------------------------------------------------------------------------------------
# One run: its model, its beginning and its end
# ----------------------------------------------------------------------------------------------------------


def head_of(task: Task, config: FinetuneConfig) -> Head:
    """The object for a task's kind (see "Three kinds of tasks"). `config.seq_len` must be a number by now."""
    return {"squad": Spans, "RACE": MultipleChoice}.get(task.folder, Classification)(task, config)


def load_split(head: Head, name: str, tokenizer: Tokenizer) -> Split:
    """Reads and encodes the training, dev or test set, and says how much there is."""
    examples = read_examples(head.task, head.config, name)
    if isinstance(head, Spans) and name == "train":
        examples = with_answers(examples)
    items = list(head.inputs(examples, tokenizer))
    say(f"{head.task.name} {name}: {len(examples):,} examples, {len(items):,} items")
    return Split(examples, items)


def with_answers(examples: list[Example]) -> list[Example]:
    """SQuAD's training questions but for those whose answers are not where the file says they are.

    Some of the published ones are not, and would teach that the passage has no answer.
    Raises: ValueError where they are more than one in a hundred: then it is the file that counts otherwise.
    """
    lost = [example for example in examples if example.label and not first_answer(example)]
    if lost:
        passage, (begin, text) = lost[0].texts[1], lost[0].label[0]
        cause = ""
        for unit, encoding, size in (("bytes of UTF-8", "utf-8", 1), ("units of UTF-16", "utf-16-le", 2)):
            if passage.encode(encoding)[size * begin :].startswith(text.encode(encoding)):
                cause = f": its answer_start counts {unit}, but must count characters"
        message = f"{len(lost):,} of {len(examples):,} questions have no answer where the file says it is"
        if 100 * len(lost) > len(examples):
            raise ValueError(f"{message}; the first is {lost[0].id}{cause}")
        say(f"left out: {message}; the first is {lost[0].id}{cause}")
    return [example for example in examples if not example.label or first_answer(example)]


def head_fields(head: Head) -> dict[str, Any]:
    """The fields of the model's config that say what its head is for."""
    # Only a classification's labels have names, as the files spell them.
    names = (head.task.labels or ("score",)) if type(head) is Classification else ()
    return {"num_labels": len(names) or None, "id2label": dict(enumerate(names)),
            "answerability": head.task.name == "squad2"}


def fit_head(head: Head, model: nn.Module) -> str:
    """Puts the rows of a model's head into the order of the task's labels; returns why it can't, or "".

    Equal shapes are not enough: QNLI and CoLA have two labels each, which mean different things. (CoLA and
    SST-2 both call theirs 0 and 1, so between them a head is kept.)
    """
    if type(model) is not head.model_class:
        return f"the model is a {type(model).__name__}"
    if type(head) is not Classification:
        return ""
    wanted, found = head.task.labels or ("score",), tuple(model.config.id2label.values())
    if sorted(wanted) != sorted(found):  # CONTRADICTION is contradiction
        wanted, found = [label.lower() for label in wanted], [label.lower() for label in found]
    if len(wanted) == len(found) and all(re.fullmatch(r"label_\d+", label) for label in found):
        say(f"its head calls the labels {', '.join(found)}: they are taken for {', '.join(wanted)}")
        found = wanted
    if sorted(wanted) != sorted(found) or len({*found}) < len(found):  # yes and YES may be two labels
        return f"its labels are {', '.join(found)}, not {', '.join(wanted)}"
    rows = [found.index(label) for label in wanted]
    for parameter in model.classifier.out_proj.parameters():
        parameter.data = parameter.data[rows]
    model.config = replace(model.config, **head_fields(head))
    return ""


def build_model(head: Head) -> nn.Module:
    """The model to fine-tune: a pretrained encoder, and a head drawn from the seed unless one fits.

    A head for the same labels is kept, so a run on MNLI gives another one on MNLI all its weights, but RTE,
    STS-B and MRPC, which have other labels, only its encoder (§5.1). --scratch: everything is random.
    """
    # The shape is the pretrained model's, but for the head, and for dropout where a flag sets it.
    config, found = head.config, roberta.open_model(head.config.model)
    # All weights are drawn from the seed, the same on all ranks. Then those that are kept replace theirs.
    torch.manual_seed(config.seed)
    model = head.model_class(replace(found.config, **head_fields(head), **train.dropout_changes(config)))
    if config.scratch:
        return model
    reason = fit_head(head, found)
    if reason:  # an encoder that was saved by itself is the whole model
        model.roberta.load_state_dict(getattr(found, "roberta", found).state_dict())
    else:  # only v2.0 asks whether there is an answer, so this part of a head may be missing or too much
        if head.task.name == "regression":  # trained without mean and deviation, saved with them
            scale_head(found, -head.task.mean / head.task.deviation, 1 / head.task.deviation)
        model.load_state_dict(found.state_dict(), strict=False)
    say(f"encoder from {config.model}, {f'a fresh head: {reason}' if reason else 'its head, too'}")
    return model


def scale_head(model: nn.Module, mean: float, deviation: float) -> None:
    """Makes a model that gives numbers x give x * deviation + mean."""
    layer = model.classifier.out_proj
    layer.weight.data = layer.weight.data * deviation
    layer.bias.data = layer.bias.data * deviation + mean


def run_or_read(head: Head, ranks: Ranks, tokenizer: Tokenizer, splits: dict[str, Split]) -> dict[str, Any]:
    """Does one run, or what is missing of it; a finished one is not repeated. Returns results.json: the
    flags, the best epoch's metrics, and the baseline's.
    """
    config, out = head.config, Path(head.config.out)
    # A run that was begun with other weights, texts or tokens must not go on with these: the fingerprint, of
    # all that the result depends on, would differ.
    weights = [data.checksum(path) for path in roberta.weight_files(roberta.find_model(config.model))]
    origin = {f"{name} examples": data.fingerprint_of(split.examples) for name, split in splits.items()}
    origin |= {"tokenizer": tokenizer.fingerprint, "pretrained weights": data.fingerprint_of(weights)}
    fingerprint = claim(config, ranks, f"one run of {head.task.name}", flags=asdict(config), data=origin)
    # results.json is the last file that a run writes.
    if not (out / "results.json").exists():
        say(f"{out}: batch size {config.batch_size}, learning rate {config.peak_lr:g}, seed {config.seed}")
        progress = finetune_once(head, ranks, tokenizer, splits, fingerprint).progress
        metrics = dict(progress.best_result)
        results = asdict(config) | {
            "run": out.name, "eval_loss": metrics.pop("eval_loss"), "metrics": metrics,
            "majority": majority_metrics(head.task, splits["train"].examples, splits["dev"].examples),
            "steps": progress.step, "best_step": progress.best_step, "seconds": progress.seconds}
        if ranks.rank == 0:
            # From here on the directory is a model like any other; the checkpoint stays whole until it goes.
            model = roberta.open_model(out / f"checkpoint-{progress.best_step}")
            if head.task.name == "regression":
                scale_head(model, head.task.mean, head.task.deviation)
            model.save_pretrained(out, tokenizer)
            data.write_json(out / "results.json", results)
        ranks.meet("the end of a run")
    say(f"{out} is finished")
    # The model is in the run directory now. A run that was killed here before has some checkpoints left.
    for _, path in train.checkpoints(out) if ranks.rank == 0 else ():
        train.remove_checkpoint(path)
    return data.read_json(out / "results.json")


def claim(config: FinetuneConfig, ranks: Ranks, kind: str, **described: dict) -> str:
    """Takes --out for a command of this kind, which may have begun it before; returns its fingerprint."""
    out, parts = Path(config.out), {"command": {"kind": kind}, "flags": {}, "data": {}} | described
    data.check_ours(out, "run.json")
    out.mkdir(parents=True, exist_ok=True)
    return train.claim_directory(out, parts, config, ranks)


# ----------------------------------------------------------------------------------------------------------
# Reading the files as published
# ----------------------------------------------------------------------------------------------------------

# Each kind of file has a reader, which knows where things stand and judges nothing. It gives rows of four:
# the place in the file, for messages; the id; the texts, None where one is missing; and what is written as
# the label, None where there is none. `example_of` makes an example of any row, or says what is wrong.


def read_examples(task: Task, config: FinetuneConfig, split: str) -> list[Example]:
    """The examples of the training, dev or test set; of a test set that is not there, none.

    Raises: ValueError naming file and row where one is malformed, its label is not one of the task's, or the
    columns are another task's. --skip-bad-rows leaves such rows out and says how many: some official files
    (QQP's) are known to have a few. A test set must be whole to be handed in.
    """
    examples, bad, files = [], Counter(), find_files(task, config.data, split)
    withheld = split == "test" or config.eval_only  # new texts may be without labels
    if not files and split != "test":
        there = sorted(path.name for path in Path(config.data).glob("*"))[:9]
        names = ", ".join(name for _, name in names_of(task, split))
        below = f" or its [glue/]{task.folder}" if task.folder else ""
        raise ValueError(f"{config.data}: no {split} set of {task.name} ({names}) in it{below}, but "
                         f"{', '.join(there) or 'nothing'}")
    if not task.folder and len(files) > 1:
        raise ValueError(f"{files[0][1]} and {files[1][1].name}: which is the {split} set? Keep one of them")
    for part, path in files:
        for where, *row in rows_of(task, split, path):
            try:
                examples.append(example_of(task, withheld, part, *row))
            except (ValueError, TypeError, AttributeError) as error:
                if not config.skip_bad_rows or split == "test":
                    raise ValueError(f"{path}: {where}: {error}; mend it, or (test sets apart) use "
                                     "--skip-bad-rows") from None
                bad[f"with label {row[-1]!r:.40}: {error}"] += 1
        if not bad and (not examples or examples[-1].part != part):
            raise ValueError(f"{path}: no example in it")
    for reason, count in bad.most_common():
        say(f"left out of {split} {count:,} rows {reason}")
    if 20 * bad.total() > len(examples) + bad.total():
        raise ValueError(f"more than one row in twenty of {split} is malformed; is this {task.name}?")
    counts = Counter(example.id for example in examples if task.folder == "squad" and split != "train")
    if counts and max(counts.values()) > 1:  # predictions are by id
        raise ValueError(f"{path}: the id {counts.most_common(1)[0][0]} occurs twice; give each its own")
    return examples


def rows_of(task: Task, split: str, path: Path) -> list[tuple]:
    """The rows of a file. Raises: ValueError where it is not what a file of the task is like."""
    read = {"squad": squad_rows, "RACE": race_rows, "": own_rows}.get(task.folder, table_rows)
    try:
        return list(read(task, split, path))
    except (ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        kind = f"{task.name} as it is published" if task.folder else f"a {path.suffix} that can be read"
        raise ValueError(f"{path}: not {kind} ({error!r})") from None


def find_files(task: Task, place: str, split: str) -> list[tuple[str, Path]]:
    """(part, file) of a split, below the folder of all tasks or in the task's own; none if not there."""
    names = names_of(task, split)
    for root in (Path(place) / "glue" / task.folder, Path(place) / task.folder, Path(place)):
        found = [(part, path) for part, name in names for path in sorted(root.glob(name))]
        # MNLI's dev set has two parts; of a test set, or of what is one's own, any will do.
        is_whole = all(any(root.glob(name)) for _, name in names)
        if found and (is_whole or split == "test" or not task.folder):
            return found
    return []


def names_of(task: Task, split: str) -> list[tuple[str, str]]:
    """(part, name) of a split's files; RACE has one for each passage."""
    if task.folder == "squad":
        return [("", f"{split}-v{'1.1' if task.name == 'squad1' else '2.0'}.json")]
    if task.name == "race":
        return [(part, f"{split}/{part}/*.txt") for part in ("middle", "high")]
    if not task.folder:
        return [("", f"{split}{ending}") for ending in (".tsv", ".csv", ".jsonl")]
    if task.name != "mnli" or split == "train":
        return [("", f"{split}.tsv")]
    names = [(part, f"{split}_{part}.tsv") for part in ("matched", "mismatched")]
    # GLUE's diagnostic set is handed in with MNLI's test set. It has an older and a newer name.
    diagnostic = [("AX", "../diagnostic/diagnostic.tsv"), ("AX", "../AX/AX.tsv")]
    return names + diagnostic if split == "test" else names


def table_rows(task: Task, split: str, path: Path) -> Iterator[tuple]:
    """The rows of a GLUE file: a line each, cells between tabs. Quotation marks are text."""
    # Lines end with \n or \r\n. Some texts contain other characters that splitlines() takes for line ends.
    # Bytes that are no UTF-8 become halves of characters, which `example_of` finds.
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape").rstrip("\r\n")
    lines = re.split("\r?\n", text)
    # CoLA's files have no header, but for the test set's.
    headless = task.name == "cola" and split != "test"
    columns = ["source", "label", "star", "sentence"] if headless else lines.pop(0).split("\t")
    for number, line in enumerate(lines):
        # With a column too many or too few nobody can say which cell is what.
        cells = [cell.strip() for cell in line.split("\t")]
        row = dict(zip(columns, cells)) if len(cells) == len(columns) else dict.fromkeys(columns)
        label = row.get(task.label) if split != "test" else None
        texts = [row[column] for column in task.texts]
        yield f"line {number + 2 - headless}", row.get("index", str(number)), texts, label


def own_rows(task: Task, split: str, path: Path) -> Iterator[tuple]:
    """The rows of one's own file: .tsv as GLUE's, .csv as of spreadsheets, .jsonl with an object a line."""
    csv.field_size_limit(1 << 30)
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    else:
        form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {"strict": True}
        rows = list(csv.DictReader(io.StringIO(text, newline=""), **form))
    # The first text goes by three names, the second by two; capital letters make no difference.
    rows = [{name and name.strip().lower(): value for name, value in row.items()} for row in rows]
    columns = rows[0] if rows else {}
    first = [name for name in ("text", "sentence", "sentence1") if name in columns]
    second = [name for name in ("text_b", "sentence2") if name in columns]
    if not first:
        raise ValueError(f"no column text (or sentence), but {', '.join(columns) or 'no row'}")
    for number, row in enumerate(rows):
        # Surplus cells are under None. A label that is no text or number (NaN: pandas' missing one) is none.
        label = row.get(task.label) if split != "test" and None not in row else None
        is_given = isinstance(label, str | int | float) and str(label).strip() not in ("", "nan")
        texts = [None if None in row else row.get(name) for name in first[:1] + second[:1]]
        texts = [text.strip() if isinstance(text, str) else text for text in texts]
        texts[0] = texts[0] or None  # a blank text is none; as in GLUE's files, blanks around one are no text
        yield f"row {number + 1}", str(row.get("id", number)), texts, str(label).strip() if is_given else None


def labels_of(config: FinetuneConfig, shape: RobertaConfig) -> tuple[str, ...]:
    """The labels of one's own classification: those of the training set in their order, or the model's."""
    if config.eval_only or config.ensemble:
        return tuple(shape.id2label.values())
    task = TASKS[config.task]
    files = find_files(task, config.data, "train")
    labels = {row[-1] for _, path in files for row in rows_of(task, "train", path)} - {None}
    if files and len(labels) < 2:
        raise ValueError(f"{files[0][1]}: its column label has {len(labels)} different labels; it takes two")
    are_numbers = all(re.fullmatch(r"-?\d+", label) for label in labels)
    return tuple(sorted(sorted(labels), key=int if are_numbers else None))  # 01 and 1 in an order, too


def squad_rows(task: Task, split: str, path: Path) -> Iterator[tuple]:
    """The rows of a SQuAD file: a question each."""
    for passage in (p for article in data.read_json(path)["data"] for p in article["paragraphs"]):
        for entry in passage["qas"]:
            # An empty passage is none.
            texts = (entry.get("question"), passage["context"] or None)
            answers = [] if entry.get("is_impossible") else entry.get("answers")
            yield f"question {entry['id']}"[:100], str(entry["id"]), texts, answers


def race_rows(task: Task, split: str, path: Path) -> Iterator[tuple]:
    """The rows of a RACE file, which is a passage with its questions."""
    row = data.read_json(path)
    answers = row["answers"] if split != "test" else [None] * len(row["questions"])
    for i, (question, four, answer) in enumerate(zip(row["questions"], row["options"], answers, strict=True)):
        yield f"question {i}", f"{row['id']}-{i}", (row["article"], question, *four), answer


def example_of(task: Task, withheld: bool, part: str, id: str, texts: Sequence, written: Any) -> Example:
    """The example in a row; withheld: it may lack a label. Raises: ValueError and others where it is none."""
    if None in texts or (written is None and not withheld):
        raise ValueError("a text or label is missing, or there are not as many columns as in the first line")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"no text, but {texts!r:.80}")
    "".join((id, *texts)).encode()  # raises where there are halves of characters, which no file can hold
    label = None if written is None else label_of(task, written)
    if task.name == "race" and not max(1, label or 0) < len(texts) - 2 <= len(task.labels):
        raise ValueError(f"answer {written} of {len(texts) - 2} options; it takes 2 to {len(task.labels)}")
    return Example(id, part, tuple(texts), label)


def label_of(task: Task, written: Any) -> Any:
    """A label as `Example` has it, from what is written in the file."""
    # In v2.0 the list of answers is empty where the passage has none.
    if task.folder == "squad":
        if isinstance(written, dict):  # as Hugging Face's datasets have them
            written = [dict(zip(written, values)) for values in zip(*written.values(), strict=True)]
        answers = tuple((answer.get("answer_start"), answer.get("text")) for answer in written)
        if not all(type(begin) is int and isinstance(text, str) for begin, text in answers):
            raise ValueError("an answer without integer answer_start and text")
        if task.name == "squad1" and not answers:
            raise ValueError("no answer, which in v1.1 every question has; is this v2.0, --task squad2?")
        return answers
    # The order of `Task.labels` gives the model's labels their numbers. A model's may be in capitals.
    if written in task.labels:
        return task.labels.index(written)
    alike = [number for number, label in enumerate(task.labels) if label.lower() == str(written).lower()]
    if len(alike) == 1:
        return alike[0]
    if task.labels:
        raise ValueError(f"label {written!r} is none of {task.name}'s ({', '.join(task.labels)})")
    number = float(written)
    low, high = (0, 5) if task.name == "sts-b" else (-1e30, 1e30)
    if not low <= number <= high:
        raise ValueError(f"{task.label} {written} is not between {low} and {high}")
    return number


def first_answer(example: Example) -> tuple[int, int] | None:
    """Where the gold answer that training uses begins and ends, in characters; None where there is none.

    CHOICE: of several gold answers it is the first that is where the file says it is; some published ones
    are not.
    """
    for begin, text in example.label or ():
        if text and begin >= 0 and example.texts[1].startswith(text, begin):
            return begin, begin + len(text)
    return None


# ----------------------------------------------------------------------------------------------------------
# Several runs: seeds and sweep (§5.1)
# ----------------------------------------------------------------------------------------------------------


def settings_of(config: FinetuneConfig) -> list[FinetuneConfig]:
    """The runs that one command asks for: each setting with each seed, in a directory of its own.

    CHOICE: §5.1 takes the median of 5 seeds without saying whether each setting had 5. Here each has, so
    that no setting is chosen for one lucky seed.
    """
    count = config.seeds or (5 if config.sweep else 1)
    if count == 1 and not config.sweep:
        return [config]
    runs = []
    for batch_size in config.sweep_batch_sizes if config.sweep else (config.batch_size,):
        for lr in config.sweep_lrs if config.sweep else (config.peak_lr,):
            for seed in range(config.seed, config.seed + count):
                out = str(Path(config.out) / f"batch{batch_size}-lr{lr:g}-seed{seed}")
                runs.append(replace(config, batch_size=batch_size, peak_lr=lr, seed=seed, out=out))
    return runs


def finetune(config: FinetuneConfig, ranks: Ranks) -> dict[str, Any]:
    """Does what one command asks for; returns what its results.json holds, which says that all is done."""
    task, models, out = TASKS[config.task], config.ensemble or (config.model,), Path(config.out)
    shape = roberta.read_config(models[0])
    if task.name == "classification":
        task = task._replace(labels=labels_of(config, shape))
    config = replace(config, precision=ranks.precision, seq_len=config.seq_len or min(shape.max_tokens, 512))
    if config.seq_len > shape.max_tokens:
        raise ValueError(f"--seq-len {config.seq_len} exceeds the {shape.max_tokens} that {models[0]} takes")
    if config.predict:  # what is wrong with the test set should not come to light after days of training
        read_examples(task, config, "test")
    head = head_of(task, config)
    if config.ensemble or config.eval_only:
        results = evaluate_models(head, models, ranks)
    else:
        results, models = train_models(head, ranks)
    if config.predict:
        write_predictions(head, models, ranks)
    if ranks.rank == 0:
        data.write_atomically(out / "results.md", table(results).encode())
        data.write_json(out / "results.json", results)
    return results


def train_models(head: Head, ranks: Ranks) -> tuple[dict[str, Any], list[str]]:
    """Does all runs, or what is missing of them; returns results, and where the best run is."""
    # Texts are read and encoded once for all runs. Each run keeps its own directory inside --out, so the same
    # command goes on in the run that was interrupted.
    config, runs = head.config, settings_of(head.config)
    tokenizer = Tokenizer.from_pretrained(config.model)
    roberta.check_tokenizer(tokenizer, roberta.read_config(config.model))
    splits = {name: load_split(head, name, tokenizer) for name in ("train", "dev")}
    if head.task.name == "regression":
        numbers = [example.label for example in splits["train"].examples]
        mean, deviation = float(np.mean(numbers)), float(np.std(numbers)) or 1.0
        if deviation < 1e-5 * abs(mean):  # the model's 32 bits hold seven digits
            raise ValueError(f"train's labels, {mean:.9g} ± {deviation:.3g}, are too close for 32 bits; "
                             f"subtract {mean:.0f} from all of them")
        head = head_of(head.task._replace(mean=mean, deviation=deviation), config)
    if runs == [config]:
        return run_or_read(head, ranks, tokenizer, splits), [config.out]
    claim(config, ranks, f"several runs of {head.task.name}")
    results = [run_or_read(head_of(head.task, run), ranks, tokenizer, splits) for run in runs]
    best = runs[results.index(max(results, key=primary))]
    return summarize(results), [best.out]


def primary(results: dict[str, Any]) -> float:
    """The metric that decides, -infinity where it is undefined."""
    value = results["metrics"][TASKS[results["task"]].metric]
    return -math.inf if value is None else value


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The median over the seeds of the setting with the best median, its spread, and all runs."""
    settings: dict[tuple, list[dict]] = {}
    for result in results:
        settings.setdefault((result["batch_size"], result["peak_lr"]), []).append(result)
    runs = max(settings.values(), key=lambda runs: statistics.median(map(primary, runs)))
    # A correlation may be undefined in a run; it is left out.
    metrics, spread = {}, {}
    for name in runs[0]["metrics"]:
        values = [run["metrics"][name] for run in runs if run["metrics"][name] is not None]
        metrics[name] = statistics.median(values) if values else None
        spread[name] = [min(values, default=None), max(values, default=None)]
    return {name: runs[0][name] for name in ("task", "scratch", "batch_size", "peak_lr", "majority")} | {
        "metrics": metrics, "spread": spread, "seeds": len(runs), "runs": results}


def table(results: dict[str, Any]) -> str:
    """Results beside the paper's as a Markdown table: in per cent, with the range over seeds."""
    task = TASKS[results["task"]]
    unit = 1 if task.name.startswith("squad") else 100  # of a metric, in per cent
    setting = "batch {batch_size}, {peak_lr:g}".format(**results) if "peak_lr" in results else "as trained"
    lines = ["| task | metric | here | majority | paper-BASE | paper-LARGE | setting |", "|---" * 7 + "|"]

    def shown(value: float | None, unit: int = 1) -> str:
        return "–" if value is None else f"{value * unit:.1f}"

    for name, (base, large) in task.paper.items():
        here, majority = (shown(results[key].get(name), unit) for key in ("metrics", "majority"))
        if "spread" in results:
            low, high = (shown(value, unit) for value in results["spread"][name])
            here += f" ({low} to {high}, {results['seeds']} seeds)"
        cells = [task.name, name, here, majority, shown(base), shown(large), setting]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------
# Finished models: evaluation, ensembles (§5.1), predictions to hand in
# ----------------------------------------------------------------------------------------------------------


def evaluate_models(head: Head, models: Sequence[str], ranks: Ranks) -> dict:
    """--eval-only: one model on the dev set. --ensemble: the average of several."""
    task, config = head.task, head.config
    # A run that is not finished would give some checkpoint of its own.
    for path in config.ensemble:
        if not (Path(path) / "results.json").exists():
            raise ValueError(f"{path} is no finished run; it has no results.json")
    claim(config, ranks, f"an evaluation on {task.name}")
    results = {"task": task.name, "models": list(models), "metrics": {}, "majority": {}}
    if config.predict and not find_files(task, config.data, "dev"):
        return results  # a test set alone
    dev, _, predictions = average(head, models, "dev", ranks)
    results["metrics"] = metrics_of(task, predictions, dev.examples)
    if not results["metrics"]:
        say("the dev set is without labels, or some are missing: no metrics")
    elif find_files(task, config.data, "train"):
        training = read_examples(task, config, "train")
        results["majority"] = majority_metrics(task, training, dev.examples)
    return results


def average(head: Head, models: Sequence[str], name: str, ranks: Ranks) -> tuple[Split, np.ndarray, list]:
    """A split, the mean over the models of their probabilities (§5.1), and what is predicted from it."""
    tokenizer = Tokenizer.from_pretrained(models[0])
    split, probabilities = None, []
    # One model in memory at a time. They are to agree in what an item is, so in the tokenizer.
    for path in models:
        model = roberta.open_model(path)
        reason = fit_head(head, model)
        if not reason and head.task.name == "squad2" and not model.config.answerability:
            reason = "it does not judge whether there is an answer"
        if reason:
            raise ValueError(f"{path} has no head for {head.task.name} ({reason}); train one first")
        if Tokenizer.from_pretrained(path).fingerprint != tokenizer.fingerprint:
            raise ValueError(f"{path} and {models[0]} cannot be averaged: they have different tokenizers")
        split = split or load_split(head, name, tokenizer)
        probabilities.append(predict(model.to(ranks.device), head, split, ranks)[0])
    mean = np.mean(probabilities, axis=0)
    return split, mean, head.decide(mean, split.items, split.examples)


def write_predictions(head: Head, models: Sequence[str], ranks: Ranks) -> None:
    """Writes what the models, averaged, answer on the test set; where there is none, on the dev set."""
    task, out = head.task, Path(head.config.out)
    which = "test" if find_files(task, head.config.data, "test") else "dev"
    split, probabilities, predictions = average(head, models, which, ranks)
    files: dict[str, list[str]] = {}
    if task.folder == "squad":
        # The official scripts read these; of predictions.json, and of spans.json with na_prob.json (the best
        # over thresholds), they print the metrics of results.json. Each has one of the fields of `Answer`.
        ids = [example.id for example in split.examples]
        for file, values in zip(("predictions", "spans", "na_prob"), zip(*predictions)):
            files[f"{file}.json"] = [json.dumps(dict(zip(ids, values)), ensure_ascii=False)]
    else:
        # What GLUE's server takes, and for RACE the like.
        names = {"matched": "MNLI-m", "mismatched": "MNLI-mm", "AX": "AX"}
        labels = [" ".join(label.split()) for label in task.labels]  # a tab would begin another cell
        for example, value, scores in zip(split.examples, predictions, probabilities):
            value = min(max(value, 0), 5) if task.name == "sts-b" else value
            row = [" ".join(example.id.split()), labels[value] if labels else f"{value:.12g}"]
            sure = [f"{score:.6f}" for score in scores] if task.labels else []
            name = names.get(example.part, task.folder or "predictions")
            if task.folder:
                files.setdefault(f"{name}.tsv", ["index\tprediction"]).append("\t".join(row))
                name += "-probabilities"
            if sure or not task.folder:
                header = "\t".join(["index", "prediction", *labels])
                files.setdefault(f"{name}.tsv", [header]).append("\t".join(row + sure))
    for file, lines in files.items() if ranks.rank == 0 else ():
        data.write_atomically(out / file, "".join(f"{line}\n" for line in lines).encode())
    say(f"predictions of {', '.join(models)} for the {which} set are in {out}: {', '.join(files)}")


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> FinetuneConfig:
    """Table 10's settings of the task with the flags' changes. Raises: ValueError for what makes no sense.

    --help shows the defaults of the task that is named, else GLUE's.
    """
    # The task is looked for first, since the other flags' defaults depend on it.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--task", choices=TASKS, default="cola")
    defaults = replace(FinetuneConfig(), **table_10(finder.parse_known_args(argv)[0].task))
    parser = argparse.ArgumentParser("finetune.py", None, "Fine-tune RoBERTa.", allow_abbrev=False)
    data.add_flags(parser, defaults)
    given = vars(parser.parse_args(argv))
    for name in ("task", "data") if given.get("ensemble") else ("task", "data", "model"):
        if not given.get(name):
            raise ValueError(f"--{name} is missing; --help says what it takes")
    if given.get("sweep") and {"batch_size", "peak_lr"} & given.keys():
        raise ValueError("--sweep goes by --sweep-batch-sizes and --sweep-lrs; drop --batch-size, --peak-lr")
    out = f"runs/{given['task']}{'-ensemble' if given.get('ensemble') else ''}"
    config = replace(defaults, **{"out": out} | given)
    data.check_flags(config)
    return config


def main(argv: Sequence[str] | None = None) -> None:
    with train.clean_end(unfit=2):
        config = parse(argv)
        say("  ".join(f"{name}={value}" for name, value in asdict(config).items() if value not in (None, ())))
        with train.held_by_first_rank(Path(config.out)):
            say("\n" + table(finetune(config, train.set_up(config))))


if __name__ == "__main__":
    main()
