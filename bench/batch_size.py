"""§4.3, Table 3: held-out perplexity against the batch size, at equal passes over the data.

    python bench/batch_size.py --scale cpu

The paper, with BASE: batches of 256, 2K and 8K sequences in 1M, 125K and 31K steps, the learning rate tuned
for each, reach perplexities of 3.99, 3.68 and 3.77: the middle one is the best, and the largest still better
than BERT's. RoBERTa takes 8K, for large batches are easier to spread over machines.

Varied: sequences a step, and for each the peak learning rate. Held: the sequences that are seen, so that a
batch four times as large takes a quarter of the steps; model, text, evaluation.

What to mind: the paper's smallest batch makes 1M updates. Here even the smallest makes few, and a model that
is short of updates gains from a small batch first of all.
"""

from __future__ import annotations

import study
from study import Cell, Flags, Panel, Paper, Session, Study


def flags(session: Session, cell: Cell) -> Flags:
    steps = session.scale.sequences // cell["batch_size"]
    return cell | {"data": study.prepared(session), "max_steps": steps}


STUDY = Study(
    name="batch_size",
    title="Batch size, at equal passes over the data",
    grid={
        "smoke": {"batch_size": (4, 16), "peak_lr": (3e-3, 9e-3)},
        "cpu": {"batch_size": (4, 16, 64, 256), "peak_lr": (6e-4, 2e-3, 6e-3, 2e-2)},
        "gpu": {"batch_size": (32, 128, 512, 2048), "peak_lr": (3e-4, 1e-3, 3e-3)},
    },
    flags=flags,
    panels=(Panel("batch_size", "eval_perplexity", "peak_lr", log=True),),
    paper=Paper("Table 3, BASE, 16 GB", ("steps", "perplexity", "MNLI-m", "SST-2"), {
        (256, 1e-4): ("1M", 3.99, 84.7, 92.7),
        ("2K", 7e-4): ("125K", 3.68, 85.2, 92.9),
        ("8K", 1e-3): ("31K", 3.77, 84.6, 92.8),
    }),
    changes={"cpu": {"sequences": 18_000}},
)


if __name__ == "__main__":
    study.main(STUDY, __doc__)
