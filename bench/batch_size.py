"""§4.3, Table 3: held-out perplexity against the batch size, at equal passes over the data.

    python bench/batch_size.py --scale cpu

Varied: sequences a step, and for each the peak learning rate. Held: the sequences seen, that is, the passes
over the data, so a batch four times as large takes a quarter of the steps; model, text, evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import study
from study import Arm, Study, apart, center, compare, grouped, show, values

from train import perplexity


@dataclass(frozen=True)
class Scale(study.Scale):
    batch_sizes: tuple[int, ...] = (4, 16, 64, 256)
    peak_lrs: tuple[float, ...] = (6e-4, 2e-3, 6e-3, 2e-2)


class BatchSize(Study):
    name = "batch_size"
    title = "Perplexity against batch size, at equal passes over the data"
    paper = ("of batches of 256, 2K and 8K sequences (1M, 125K and 31K steps, learning rates tuned), 2K "
             "reached the lowest held-out perplexity: 3.99, 3.68, 3.77 (Table 3).")
    caveat = ("The paper's smallest batch took 1M steps. Here even the smallest takes few, and a model that "
              "makes few updates is short of updates first of all: what the paper says of thousands of "
              "sequences a step, this figure can neither show nor refute.")
    scales = {
        "smoke": Scale(**study.SMOKE, batch_sizes=(4, 16), peak_lrs=(3e-3, 9e-3)),
        "cpu": Scale(**study.CPU | {"sequences": 18_000}),
        "gpu": Scale(**study.GPU, batch_sizes=(32, 128, 512, 2048), peak_lrs=(3e-4, 1e-3, 3e-3)),
    }

    def arms(self) -> Iterable[Arm]:
        data = self.prepared(self.scale.share)
        for batch_size in self.scale.batch_sizes:  # the smallest take the longest
            steps = self.scale.sequences // batch_size
            for peak_lr in self.scale.peak_lrs:
                yield Arm({"batch_size": batch_size, "peak_lr": peak_lr},
                          self.config(data, steps, batch_size=batch_size, peak_lr=peak_lr))

    def best(self, records: list[dict]) -> dict[int, list[dict]]:
        """Returns for each batch size the runs with the learning rate whose median is lowest."""
        return {size: min((runs for _, runs in grouped(of_size, "peak_lr")), key=center)
                for (size,), of_size in grouped(records, "batch_size")}

    def figures(self, records: list[dict]) -> dict[str, Any]:
        best, about = self.best(records), f"median and range of {self.scale.seeds} seeds"
        figure, axes = study.axes_for(self.title, "sequences a step", "held-out perplexity")
        sizes = list(best)
        for i, ((peak_lr,), runs) in enumerate(grouped(records, "peak_lr")):
            samples = [values(of_size) for _, of_size in grouped(runs, "batch_size")]
            study.draw_line(axes, i, f"lr {peak_lr:g}", sizes, samples)
        lowest = [center(runs) for runs in best.values()]
        axes.plot(sizes, lowest, "o", markersize=13, fillstyle="none", color="k")
        study.draw_baseline(axes, records[0]["unigram_perplexity"])
        study.plain_ticks(axes, sizes)
        study.caption(figure, about + "; ring: the best learning rate")

        by_steps, axes = study.axes_for("The same runs against optimiser steps, each batch at its best rate",
                                        "optimiser steps", "held-out perplexity")
        for i, (size, runs) in enumerate(best.items()):
            points = [step for step, _ in runs[0]["curve"]]
            samples = [[perplexity(run["curve"][j][1]) for run in runs] for j in range(len(points))]
            study.draw_line(axes, i, f"{size} sequences", points, samples)
        study.draw_baseline(axes, records[0]["unigram_perplexity"])
        axes.set_xscale("log")
        study.caption(by_steps, about)
        return {"": figure, "-steps": by_steps}

    def reading(self, records: list[dict]) -> list[str]:
        best = self.best(records)
        sizes, rates = sorted(best), sorted({record["peak_lr"] for record in records})
        winner = min(sizes, key=lambda size: center(best[size]))
        sentences = [f"Lowest at {winner} sequences a step and learning rate {best[winner][0]['peak_lr']:g}: "
                     f"perplexity {show(center(best[winner]))}, unigram baseline "
                     f"{show(records[0]['unigram_perplexity'])}."]
        for other in sizes:
            if other != winner:
                sentences.append(f"{winner} against {other}, which takes {best[other][0]['steps']:,} steps: "
                                 f"{compare(best[winner], best[other])}.")
        rising = [best[size][0]["peak_lr"] for size in sizes]
        if rising == sorted(rising) and rising[0] < rising[-1]:
            sentences.append("As in the paper, the best learning rate rises with the batch: "
                             f"{', '.join(f'{rate:g}' for rate in rising)}.")
        else:
            sentences.append("The best learning rate does not rise steadily with the batch as in the paper: "
                             f"{', '.join(f'{rate:g}' for rate in rising)}.")
        edges = [str(size) for size in sizes if best[size][0]["peak_lr"] in (rates[0], rates[-1])]
        if edges:
            sentences.append("Not tuned to the end: the best rate is at an edge of those tried for batch "
                             f"{', '.join(edges)}, so these could be better than shown.")
        level = [str(size) for size in sizes if size != winner
                 and not apart(best[winner], best[size])]
        if sizes[0] < winner < sizes[-1] and not {str(sizes[0]), str(sizes[-1])} & set(level):
            verdict = "Agrees with the paper: neither the smallest nor the largest batch is the best."
        elif level:
            verdict = (f"In the paper the middle batch was best. Here {winner} has the lowest median, but "
                       f"the seeds cannot tell it from {', '.join(level)}.")
        else:
            verdict = (f"Differs from the paper, where the middle batch was best: here it is the "
                       f"{'smallest' if winner == sizes[0] else 'largest'}.")
        return [*sentences, verdict]


if __name__ == "__main__":
    study.main(BatchSize)
