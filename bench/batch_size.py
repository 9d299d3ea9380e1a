"""§4.3, Table 3: held-out perplexity against the batch size, at equal passes over the data.

    python bench/batch_size.py --scale cpu

The paper, with BASE: batches of 256, 2K and 8K sequences in 1M, 125K and 31K steps, the learning rate tuned
for each, reach perplexities of 3.99, 3.68 and 3.77: the middle one is the best, and the largest still better
than BERT's. RoBERTa takes 8K, for large batches are easier to spread over machines.

Varied: sequences a step; for each batch size rate and β2 are tuned with the first seed. Held: the sequences
that are seen, so that a batch four times as large takes a quarter of the steps; model, text, evaluation.

Expected. It agrees with the paper if both ends are worse than the middle: small batches because each step
follows a few noisy predictions, large ones because they leave few steps. It contradicts the paper if the
smallest batch, a single sequence, is the best, or if the largest is. That the best batch is much smaller
than the paper's says nothing: the run is thousands of times shorter.

The cost side: tokens a second, and how many ranks a step can keep busy with 16 sequences each.
"""

from __future__ import annotations

from pathlib import Path

from study import Cell, Flags, Panel, Paper, Record, Session, Study, main, prepared


def cells(batch_sizes: dict[int, float]) -> list[Cell]:
    """Returns three rates around the one given for each batch size, and two values of β2 with each."""
    return [{"batch_size": size, "peak_lr": rate * factor, "adam_beta2": beta2}
            for size, rate in batch_sizes.items() for factor in (0.5, 1, 2) for beta2 in (0.98, 0.999)]


def flags(session: Session, cell: Cell) -> Flags:
    steps = session.scale.sequences // cell["batch_size"]
    return cell | {"data": prepared(session), "max_steps": steps}


def measure(session: Session, record: Record, out: Path) -> dict[str, float]:
    ranks = max(1, record["batch_size"] // 16)
    return {"tokens_per_second": record["tokens"] / record["seconds"], "ranks": ranks}


STUDY = Study(
    name="batch_size",
    title="Batch size, at equal passes over the data",
    cells={
        "smoke": cells({4: 3e-3, 16: 3e-3}),
        "cpu": cells({1: 5e-4, 4: 1e-3, 16: 3e-3, 64: 6e-3, 256: 1e-2}),
        "gpu": cells({8: 3e-4, 32: 5e-4, 128: 1e-3, 512: 2e-3, 2048: 3e-3}),
    },
    flags=flags,
    measure=measure,
    tuned=("peak_lr", "adam_beta2"),
    columns=("eval_perplexity", "tokens_per_second", "ranks"),
    panels=(Panel("batch_size", "eval_perplexity", log=True), Panel("batch_size", "perplexity", log=True),
            Panel("batch_size", "tokens_per_second", log=True)),
    paper=Paper("Table 3, BASE, 16 GB", ("perplexity", "MNLI-m", "SST-2"), {
        (256, 1e-4): (3.99, 84.7, 92.7),
        (2048, 7e-4): (3.68, 85.2, 92.9),
        (8192, 1e-3): (3.77, 84.6, 92.8),
    }),
    changes={"cpu": {"sequences": 20_000}},
)


if __name__ == "__main__":
    main(STUDY, __doc__)
