"""§4.1, Table 1: static against dynamic masking, over so many passes that static masks come back.

    python bench/masking.py --scale cpu

The paper, with BASE, medians of 5 seeds: ten static masks over 40 epochs, so that each is seen four times,
and masks that are drawn anew every time are close, dynamic ones slightly better on two of three tasks: SQuAD
2.0 78.3 and 78.7, MNLI-m 84.3 and 84.0, SST-2 92.5 and 92.9. Dynamic masking is said to matter more the
longer one trains.

Varied: whether a sequence gets one of ten masks in turn, or a new one every epoch; 10 passes or 40. Held:
everything else. Two runs of one seed begin with the same weights and see the same sequences in the same
order, and in the first ten epochs the same masks, for static masking is dynamic masking with `epoch % 10`: up
to there they are equal bit for bit, and what differs later is due to the masks alone.

Expected. It agrees with the paper if after 40 passes dynamic masks are as good or a little better, and the
difference grows with the passes. It contradicts the paper if static masks win by more than the seeds' range.
A large loss of static masks would not be the paper's finding either: it would say that this model can learn
its little text by heart, which BASE can't with 16 GB.
"""

from __future__ import annotations

from study import Cell, Flags, Panel, Paper, Session, Study, main, product, share_of_corpus

import data

SHARE = {"smoke": 1 / 4, "cpu": 1 / 40, "gpu": 1 / 16}  # of the documents
PASSES = {"smoke": (1, 4), "cpu": (40, 10), "gpu": (40, 10)}


def flags(session: Session, cell: Cell) -> Flags:
    text, scale = share_of_corpus(session, SHARE[session.options.scale]), session.scale.flags
    sequences = len(data.Sequences(data.Corpus(text), "full-sentences", scale["seq_len"]).bounds) - 1
    steps = max(1, cell["passes"] * sequences // scale["batch_size"])
    return {"data": text, "masking": cell["masking"], "max_steps": steps,
            "eval_interval": max(1, steps // 20)}


STUDY = Study(
    name="masking",
    title="Static and dynamic masking",
    cells={scale: product(masking=("static", "dynamic"), passes=passes)
           for scale, passes in PASSES.items()},
    flags=flags,
    panels=(Panel("passes", "eval_perplexity", "masking"),
            Panel("masking", "SQuAD 2.0 F1", "masking"), Panel("masking", "SST-2", "masking")),
    paper=Paper("Table 1, BASE", ("SQuAD 2.0 F1", "MNLI-m", "SST-2"), {
        ("static", 40): (78.3, 84.3, 92.5),
        ("dynamic", 40): (78.7, 84.0, 92.9),
    }),
)


if __name__ == "__main__":
    main(STUDY, __doc__)
