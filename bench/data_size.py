"""§5, Table 4: more data against longer training.

    python bench/data_size.py --scale cpu

The paper, with LARGE and 8K sequences a step: 160 GB of text in place of 16 GB at equal steps raises MNLI-m
from 89.0 to 89.3, and three and five times the steps raise it to 90.0 and 90.2.

Varied: the share of the documents that are trained on, and the length of the training. Held: the model, the
tokenizer, the held-out documents; at a given length the sequences that are seen, so that less data means
more passes over it.

What to mind: the amounts here are megabytes, thousands of times less than the paper's, and the model is as
much smaller.
"""

from __future__ import annotations

import study
from study import Cell, Flags, Panel, Paper, Session, Study


def flags(session: Session, cell: Cell) -> Flags:
    text = study.share_of_corpus(session, cell["share"])
    sequences = round(session.scale.sequences * cell["length"])
    return {"data": text, "max_steps": sequences // session.scale.flags["batch_size"]}


STUDY = Study(
    name="data_size",
    title="More data, longer training",
    grid={
        "smoke": {"length": (1.0, 0.5), "share": (0.5, 1.0)},
        "cpu": {"length": (2.0, 1.0, 0.5), "share": (1 / 128, 1 / 16, 1.0)},
        "gpu": {"length": (2.0, 1.0, 0.5), "share": (1 / 128, 1 / 16, 1.0)},
    },
    flags=flags,
    panels=(Panel("steps", "eval_perplexity", "share", log=True),),
    paper=Paper("Table 4, LARGE", ("SQuAD 1.1 F1", "SQuAD 2.0 F1", "MNLI-m", "SST-2"), {
        ("100K steps", "16 GB"): (93.6, 87.3, 89.0, 95.3),
        ("100K steps", "160 GB"): (94.0, 87.7, 89.3, 95.6),
        ("300K steps", "160 GB"): (94.4, 88.7, 90.0, 96.1),
        ("500K steps", "160 GB"): (94.6, 89.4, 90.2, 96.4),
    }),
)


if __name__ == "__main__":
    study.main(STUDY, __doc__)
