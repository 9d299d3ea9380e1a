"""§5, Table 4: more data against longer training.

    python bench/data_size.py --scale cpu

Varied: the share of the documents that are trained on, and the length of the training. Held: the model, the
tokenizer, the held-out documents, the sequences of a given length: less data means more passes over it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import study
from study import Arm, Study, apart, center, compare, grouped, show, values


@dataclass(frozen=True)
class Scale(study.Scale):
    shares: tuple[float, ...] = (1 / 128, 1 / 16, 1.0)
    lengths: tuple[float, ...] = (2.0, 1.0, 0.5)  # times the sequences of the scale


class DataSize(Study):
    name = "data_size"
    title = "Perplexity against training length, for several amounts of data"
    paper = ("ten times the data at equal steps is better (MNLI-m 89.0, then 89.3), and three and five times "
             "the steps are better again (90.0, 90.2; Table 4, LARGE).")
    caveat = ("The amounts here are a few megabytes of text, thousands of times less than the paper's 16 and "
              "160 GB, and the model is as much smaller.")
    scales = {
        "smoke": Scale(**study.SMOKE, shares=(0.5, 1.0), lengths=(1.0, 0.5)),
        "cpu": Scale(**study.CPU),
        "gpu": Scale(**study.GPU),
    }

    def arms(self) -> Iterable[Arm]:
        for length in self.scale.lengths:
            for share in self.scale.shares:
                steps = round(self.scale.sequences * length) // self.scale.batch_size
                yield Arm({"share": share, "length": length}, self.config(self.prepared(share), steps))

    def figures(self, records: list[dict]) -> dict[str, Any]:
        figure, axes = study.axes_for(self.title, "optimiser steps", "held-out perplexity")
        records = sorted(records, key=lambda record: record["steps"])
        for i, ((share,), runs) in enumerate(grouped(records, "share")):
            steps = [steps for (steps,), _ in grouped(runs, "steps")]
            samples = [values(of_length) for _, of_length in grouped(runs, "steps")]
            study.draw_line(axes, i, share_of(share), steps, samples)
        study.draw_baseline(axes, unigram(records))
        study.plain_ticks(axes, steps)
        study.caption(figure, f"median and range of {self.scale.seeds} seeds; label: share of the documents")
        return {"": figure}

    def reading(self, records: list[dict]) -> list[str]:
        cells = {cell: runs for cell, runs in grouped(records, "share", "length")}
        small, large = min(self.scale.shares), max(self.scale.shares)
        short, long = min(self.scale.lengths), max(self.scale.lengths)
        more = [f"At {cells[small, length][0]['steps']:,} steps, all documents against {share_of(small)} of "
                f"them: {compare(cells[large, length], cells[small, length])}."
                for length in sorted(self.scale.lengths)]
        longer = [f"With {share_of(share)} of the documents, {show(long / short)} times the steps: "
                  f"{compare(cells[share, long], cells[share, short])}." for share in self.scale.shares]
        gain_of_data = center(cells[small, long], "eval_loss") - center(cells[large, long], "eval_loss")
        gain_of_steps = center(cells[large, short], "eval_loss") - center(cells[large, long], "eval_loss")
        verdict = (f"From the least to all of the data, at the longest training: {show(gain_of_data)} nats a "
                   f"token; from the shortest to the longest, with all of the data: {show(gain_of_steps)}. ")
        best = cells[large, long]
        helps = [apart(best, cells[small, long]), apart(best, cells[large, short])]
        if helps == [1, 1]:
            verdict += "Both help, as in the paper"
            verdict += "; there, too, longer training gave more." if gain_of_steps > gain_of_data else (
                ", where longer training gave more; here data does.")
        else:
            verdict += "The paper saw both help; here not both do in every seed."
        return [*more, *longer, verdict]


def share_of(share: float) -> str:
    """Returns a share in words.

    >>> share_of(1.0), share_of(1 / 16)
    ('all', '1/16')
    """
    return "all" if share == 1 else f"1/{1 / share:g}"


def unigram(records: list[dict]) -> float:
    """Returns the unigram baseline of the runs with all documents; that of a small share is worse."""
    return max(records, key=lambda record: record["share"])["unigram_perplexity"]


if __name__ == "__main__":
    study.main(DataSize)
