"""Fine-tuning a study's models: on GLUE's tasks where they are at hand, and on one that is made of the text.

CHOICE: the made-up task asks whether a sentence is as it was written, or its words are shuffled, but for the
first and the last. It needs no other data, and a model that has learned nothing of word order stays at one
half.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from measure import texts_of
from study import Session, prepared, run_script

import data

EXAMPLES = {"smoke": 120, "cpu": 4000, "gpu": 24_000}  # of a task at most; of the made-up one a sixth is dev


def fine_tune(session: Session, out: Path, names: Sequence[str] = ()) -> dict[str, float]:
    """Fine-tunes a run's model on the tasks at hand, or on those of `names`; returns the accuracies
    on the dev sets, in per cent.
    """
    accuracies = {}
    for name, task, folder in [task for task in tasks(session) if not names or task[0] in names]:
        tuned, common = Path(f"{out}-{name}"), session.scale.flags
        # A very small model wants larger rates than Table 10's.
        flags = {"task": task, "data": folder, "model": out, "out": tuned, "epochs": 3,
                 "seq_len": min(64, common["seq_len"]), "peak_lr": common["peak_lr"] / 2,
                 "seed": out.name.rsplit("seed", 1)[1]}
        run_script(session, "finetune.py", flags, Path(f"{out}.log"))
        accuracies[name] = 100 * data.read_json(tuned / "results.json")["metrics"]["accuracy"]
    return accuracies


@functools.cache
def tasks(session: Session) -> list[tuple[str, str, Path]]:
    """Returns for each task its name, finetune.py's name for it, and where it is."""
    found = [("word_order", "sst-2", word_order(session))]
    for folder in ("SST-2", "QNLI") if session.options.glue else ():
        source, cut = Path(session.options.glue) / folder, session.data / f"{folder}-{session.options.scale}"
        if not source.is_dir():
            continue
        cut.mkdir(parents=True, exist_ok=True)
        for name in ("train.tsv", "dev.tsv"):
            rows = (source / name).read_text(encoding="utf-8").split("\n")[: EXAMPLES[session.options.scale]]
            data.write_atomically(cut / name, ("\n".join(rows).rstrip("\n") + "\n").encode())
        found.append((folder.lower(), folder.lower(), cut))
    return found


def word_order(session: Session) -> Path:
    """Returns the folder of the made-up task in SST-2's files. Label 1: as written.

    Training examples come from training documents, dev examples from held-out ones.
    """
    count = EXAMPLES[session.options.scale]
    directory = session.data / f"word-order-{count}"
    directory.mkdir(parents=True, exist_ok=True)
    for split, name, wanted in (("heldout", "dev", count // 6), ("train", "train", count - count // 6)):
        random = np.random.default_rng(0)
        rows = ["sentence\tlabel"]
        for words in itertools.islice(plain_sentences(data.Corpus(prepared(session), split)), wanted):
            label = len(rows) % 2
            if label == 0:
                words[1:-1] = random.permutation(words[1:-1])
            rows.append(f"{' '.join(words)}\t{label}")
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
