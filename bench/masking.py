"""§4.1, Table 1: static against dynamic masking, over so many epochs that static masks come back.

    python bench/masking.py --scale cpu

The paper, with BASE, medians of 5 seeds: ten static masks over 40 epochs and masks that are drawn anew every
time are close, dynamic ones slightly better on two of three tasks: SQuAD 2.0 78.3 and 78.7, MNLI-m 84.3 and
84.0, SST-2 92.5 and 92.9. Dynamic masking is said to matter more the longer one trains.

Varied: whether a sequence gets one of ten masks in turn, or a new one every epoch. Held: everything else.
Two runs of one seed begin with the same weights and see the same sequences in the same order, and in the
first ten epochs the same masks, for static masking is dynamic masking with `epoch % 10`: up to there they
are equal bit for bit, and what differs later is due to the masks alone.

What to mind: so that a small model can repeat its text a hundred times, the text is cut to a small share.
The paper's 40 epochs over 16 GB are a much milder repetition.
"""

from __future__ import annotations

import study
from study import Cell, Flags, Panel, Paper, Session, Study

SHARE = {"smoke": 1, "cpu": 1 / 128, "gpu": 1 / 128}  # of the documents


def flags(session: Session, cell: Cell) -> Flags:
    text = study.share_of_corpus(session, SHARE[session.options.scale])
    steps = session.scale.sequences // session.scale.flags["batch_size"]
    return cell | {"data": text, "max_steps": steps, "eval_interval": max(1, steps // 20)}


STUDY = Study(
    name="masking",
    title="Static and dynamic masking over many epochs",
    grid=dict.fromkeys(study.SCALES, {"masking": ("static", "dynamic")}),
    flags=flags,
    panels=(Panel("epoch", "perplexity", "masking"),),
    paper=Paper("Table 1, BASE", ("SQuAD 2.0 F1", "MNLI-m", "SST-2"), {
        ("static",): (78.3, 84.3, 92.5),
        ("dynamic",): (78.7, 84.0, 92.9),
    }),
    changes={"cpu": {"sequences": 100_000, "seeds": 5}, "gpu": {"sequences": 200_000, "seeds": 5}},
)


if __name__ == "__main__":
    study.main(STUDY, __doc__)
