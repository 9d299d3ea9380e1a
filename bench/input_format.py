"""§4.2, Table 2: the four input formats, with next-sentence prediction and without.

    python bench/input_format.py --scale cpu

The paper, with BASE: pairs of single sentences hurt (MNLI-m 82.9, where pairs of long segments have 84.0),
and without NSP it is as good or better (84.7 for FULL-SENTENCES and for DOC-SENTENCES, which is the best in
all but SST-2). RoBERTa takes FULL-SENTENCES, for the batches of DOC-SENTENCES vary in size.

Varied: what a sequence is made of. Held: real tokens (a format that pads takes more steps), model, text.
Every format is evaluated on the same held-out text, in FULL-SENTENCES, and fine-tuned on the same downstream
task.

CHOICE: the downstream task is made of the text itself, so that the study needs no other data: is a sentence
as it was written, or are its words shuffled, but for the first and the last? A model that has learned
nothing of word order stays at one half. (Runs are kept as model directories, which finetune.py takes for any
other task.)

What to mind: perplexity on FULL-SENTENCES favours what was trained on it, and sequences of a few dozen
tokens leave little room for two segments, where the paper had 512.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import study
from measure import texts_of
from study import Cell, Flags, Panel, Paper, Session, Study

import data

FORMATS = ("segment-pair", "sentence-pair", "full-sentences", "doc-sentences")
EXAMPLES = {"smoke": 120, "cpu": 6000, "gpu": 24_000}  # of the made-up task; a sixth of them is its dev set


def flags(session: Session, cell: Cell) -> Flags:
    text, common = study.prepared(session), session.scale.flags
    word_order(session)  # is made now, before several runs want it at the same time
    # How many tokens a step has, padding apart, seen on a few steps; then how many steps make equal tokens.
    sequences = data.Sequences(data.Corpus(text), cell["input_format"], common["seq_len"])
    batches = data.Batches(sequences, batch_size=common["batch_size"], micro_batch_size=common["batch_size"],
                           seed=0, masking="dynamic", mlm_probability=0.15)
    tokens = [sum(batch.num_tokens for batch in batches.step(number).batches) for number in range(8)]
    steps = session.scale.sequences * common["seq_len"] / np.mean(tokens)
    return cell | {"data": text, "max_steps": round(steps)}


def measure(session: Session, cell: Cell, out: Path) -> dict[str, float]:
    """Fine-tunes the run's model; returns the accuracy on the task's dev set."""
    tuned = Path(f"{out}-finetuned")
    flags = {"task": "sst-2", "data": word_order(session), "model": out, "out": tuned, "epochs": 3,
             "peak_lr": session.scale.flags["peak_lr"] / 2}
    study.run_script(session, "finetune.py", flags, Path(f"{out}.log"))
    return {"accuracy": data.read_json(tuned / "results.json")["metrics"]["accuracy"]}


@functools.cache
def word_order(session: Session) -> Path:
    """Returns the folder of a task in SST-2's files: sentences, half of them with their inner words shuffled.

    Training examples come from training documents, dev examples from held-out ones. Label 1: as written.
    """
    count = EXAMPLES[session.options.scale]
    directory = session.data / f"word-order-{count}"
    directory.mkdir(parents=True, exist_ok=True)
    for split, name, wanted in (("heldout", "dev", count // 6), ("train", "train", count - count // 6)):
        random = np.random.default_rng(0)
        rows = ["sentence\tlabel"]
        for words in plain_sentences(data.Corpus(study.prepared(session), split)):
            label = len(rows) % 2
            if label == 0:
                words[1:-1] = random.permutation(words[1:-1])
            rows.append(f"{' '.join(words)}\t{label}")
            if len(rows) > wanted:
                break
        data.write_atomically(directory / f"{name}.tsv", ("\n".join(rows) + "\n").encode())
    return directory


def plain_sentences(corpus: data.Corpus) -> Iterator[list[str]]:
    """Yields the words of sentences of 5 to 25 words that are mostly plain words."""
    for document in texts_of(corpus):
        for sentence in data.split_sentences(document):
            words = sentence.split()
            plain = sum(word.strip(".,;:()'").isalpha() for word in words)
            if 5 <= len(words) <= 25 and plain >= 0.9 * len(words) and words[0][0].isupper():
                yield words


STUDY = Study(
    name="input_format",
    title="The four input formats, at equal tokens",
    grid=dict.fromkeys(study.SCALES, {"input_format": FORMATS}),
    flags=flags,
    measure=measure,
    panels=(Panel("input_format", "eval_perplexity", "input_format"),
            Panel("input_format", "accuracy", "input_format")),
    columns=("eval_perplexity", "accuracy"),
    paper=Paper("Table 2, BASE", ("SQuAD 1.1 F1", "SQuAD 2.0 F1", "MNLI-m", "SST-2", "RACE"), {
        ("segment-pair",): (90.4, 78.7, 84.0, 92.9, 64.2),
        ("sentence-pair",): (88.7, 76.2, 82.9, 92.1, 63.0),
        ("full-sentences",): (90.4, 79.1, 84.7, 92.5, 64.8),
        ("doc-sentences",): (90.6, 79.7, 84.7, 92.7, 65.6),
    }),
    changes={
        "cpu": {"flags": study.MODEL | {"hidden_size": 128, "intermediate_size": 512, "peak_lr": 2e-3},
                "sequences": 36_000},
        "gpu": {"sequences": 80_000},
    },
)


if __name__ == "__main__":
    study.main(STUDY, __doc__)
