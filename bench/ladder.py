"""The paper in one figure: from BERT's recipe to RoBERTa's, one change a rung (§4, §5).

    python bench/ladder.py --scale cpu --glue glue

The paper, with BASE on 16 GB: MNLI-m 84.3 with static masks, 84.0 with dynamic ones (Table 1), 84.7 with full
sentences and no NSP (Table 2), 85.2 with a batch of 2K and its rate tuned (Table 3). With LARGE, ten times
the text add 0.3 and three times the steps another 0.7 (Table 4). In the figure these gains are added up.

Every rung keeps what the one before has changed. Held: model, vocabulary, held-out text, and but for the last
rung steps times batch size: pairs fill it with more tokens than full sentences, a quarter more on a CPU. The
first four read a small share of the text some twenty times, so that static masks come back; BERT's 16 GB were
a tenth of RoBERTa's text, read some forty times. BERT's batch is small and its rate low, as Table 3 has them
for 256 sequences beside 2K.

Expected. It agrees with the paper if no rung loses more than the seeds' range, neither in perplexity nor on
the task, and the top is clearly above the bottom; most is to be gained by steps and by batch and rate. It
contradicts the paper if a rung loses clearly, or the top is not the best.
"""

from __future__ import annotations

from pathlib import Path

from downstream import fine_tune, tasks
from study import SCALES, Cell, Flags, Panel, Paper, Record, Session, Study, main, product, share_of_corpus

# name, what it changes, and the paper's MNLI-m: its gains one on top of the other
RUNGS = {
    "BERT": ({"share": 1 / 128, "masking": "static", "input_format": "segment-pair", "adam_beta2": 0.999},
             84.3),
    "dynamic masks": ({"masking": "dynamic"}, 84.0),
    "full sentences": ({"input_format": "full-sentences"}, 84.7),
    "batch and rate": ({"tuned": True, "adam_beta2": 0.98}, 85.2),
    "all the text": ({"share": 1}, 85.5),
    "3 x the steps": ({"length": 3}, 86.2),
}
# batch size and rate before and after tuning, by scale: near the best of batch_size.py, and before it smaller
# by about as much as BERT's are in Table 3
BATCHES = {"smoke": ((4, 1e-3), (16, 3e-3)), "cpu": ((2, 4e-4), (16, 3e-3)), "gpu": ((16, 3e-4), (64, 1e-3))}


def flags(session: Session, cell: Cell) -> Flags:
    tasks(session)  # are made now, before several runs want them at the same time
    changes: Flags = {}
    for name, (change, _) in RUNGS.items():
        changes |= change
        if name == cell["rung"]:
            break
    batch_size, peak_lr = BATCHES[session.options.scale][changes.pop("tuned", False)]
    sequences = session.scale.sequences * changes.pop("length", 1)
    text = share_of_corpus(session, changes.pop("share"))
    return changes | {"data": text, "max_steps": sequences // batch_size, "batch_size": batch_size,
                      "peak_lr": peak_lr}


def measure(session: Session, record: Record, out: Path) -> dict[str, float]:
    # On one task: GLUE's where it is at hand.
    return fine_tune(session, out, ("sst-2",) if session.options.glue else ("word_order",))


STUDY = Study(
    name="ladder",
    title="From BERT to RoBERTa",
    cells=dict.fromkeys(SCALES, product(rung=RUNGS)),
    flags=flags,
    measure=measure,
    panels=tuple(Panel("rung", name) for name in ("eval_perplexity", "sst-2", "word_order", "MNLI-m")),
    columns=("eval_perplexity", "sst-2", "word_order"),
    paper=Paper("Tables 1 to 4", ("MNLI-m",), {(name,): (figure,) for name, (_, figure) in RUNGS.items()}),
    changes={"cpu": {"sequences": 20_000}},
)


if __name__ == "__main__":
    main(STUDY, __doc__)
