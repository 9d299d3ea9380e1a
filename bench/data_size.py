"""§5, Table 4: more data against longer training.

    python bench/data_size.py --scale cpu

The paper, with LARGE and 8K sequences a step: 160 GB of text in place of 16 GB at equal steps raises MNLI-m
from 89.0 to 89.3, and three and five times the steps raise it to 90.0 and 90.2.

Varied: the share of the documents that are trained on, and the length of the training. Held: the model, the
tokenizer, the held-out documents; at a given length the sequences that are seen, so that less data means
more passes over it.

Expected. It agrees with the paper if more text is as good or better at every length, the more so the longer
the training, and if with all the text longer is better. It contradicts the paper if less text, read more
often, wins. The amounts are megabytes, thousands of times less than the paper's, and the model is as much
smaller: at the longest the smallest share is read some fifty times.
"""

from __future__ import annotations

from study import Cell, Flags, Panel, Paper, Session, Study, main, product, share_of_corpus


def flags(session: Session, cell: Cell) -> Flags:
    steps = round(session.scale.sequences * cell["length"]) // session.scale.flags["batch_size"]
    return {"data": share_of_corpus(session, cell["share"]), "max_steps": steps}


CELLS = product(length=(2.0, 1.0, 0.5), share=(1 / 128, 1 / 16, 1.0))
STUDY = Study(
    name="data_size",
    title="More data, longer training",
    cells={"smoke": product(length=(1.0, 0.5), share=(0.5, 1.0)), "cpu": CELLS, "gpu": CELLS},
    flags=flags,
    panels=(Panel("steps", "eval_perplexity", "share", log=True), Panel("length", "MNLI-m", "share")),
    paper=Paper("Table 4, LARGE", ("SQuAD 1.1 F1", "SQuAD 2.0 F1", "MNLI-m", "SST-2"), {
        (1, "16 GB"): (93.6, 87.3, 89.0, 95.3),  # length 1: 100K steps
        (1, "160 GB"): (94.0, 87.7, 89.3, 95.6),
        (3, "160 GB"): (94.4, 88.7, 90.0, 96.1),
        (5, "160 GB"): (94.6, 89.4, 90.2, 96.4),
    }),
)


if __name__ == "__main__":
    main(STUDY, __doc__)
