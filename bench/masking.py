"""§4.1, Table 1: static against dynamic masking, over so many epochs that static masks come back.

    python bench/masking.py --scale cpu

Varied: whether a sequence gets one of ten masks in turn, or a new one every epoch. Held: everything else. Two
runs of one seed begin with the same weights and see the same sequences in the same order, and in the first
ten epochs the same masks, for static masking is dynamic masking with `epoch % 10`: up to there they are equal
bit for bit, and what differs later is due to the masks alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import study
from study import Arm, Scale, Study, center, compare, grouped, show

from data import Corpus, Sequences
from train import perplexity


class Masking(Study):
    name = "masking"
    title = "Static and dynamic masking over many epochs"
    paper = ("dynamic masking is comparable to ten static masks over 40 epochs or slightly better: SQuAD 2.0 "
             "78.7 against 78.3, MNLI-m 84.0 and 84.3, SST-2 92.9 and 92.5 (Table 1, medians of 5 seeds).")
    caveat = ("The text is cut to a small share so that a small model can repeat it that often; the paper's "
              "40 epochs over 16 GB are a much milder repetition.")
    scales = {
        "smoke": Scale(**study.SMOKE),
        "cpu": Scale(**study.CPU | {"sequences": 100_000, "share": 1 / 128, "seeds": 5}),
        "gpu": Scale(**study.GPU | {"sequences": 200_000, "share": 1 / 128, "seeds": 5}),
    }

    def arms(self) -> Iterable[Arm]:
        data, steps = self.prepared(self.scale.share), self.scale.sequences // self.scale.batch_size
        for masking in ("static", "dynamic"):
            yield Arm({"masking": masking},
                      self.config(data, steps, masking=masking, eval_interval=max(1, steps // 20)))

    def figures(self, records: list[dict]) -> dict[str, Any]:
        figure, axes = study.axes_for(self.title, "epochs", "held-out perplexity")
        for i, ((masking,), runs) in enumerate(grouped(records, "masking")):
            epochs = [step / runs[0]["steps_per_epoch"] for step, _ in runs[0]["curve"]]
            samples = [[perplexity(loss) for loss in losses] for losses in curves(runs)]
            study.draw_line(axes, i, masking, epochs, samples)
        study.draw_baseline(axes, records[0]["unigram_perplexity"])
        study.caption(figure, f"median and range of {self.scale.seeds} seeds")
        return {"": figure}

    def reading(self, records: list[dict]) -> list[str]:
        runs = {masking: found for (masking,), found in grouped(records, "masking")}
        static, dynamic = runs["static"], runs["dynamic"]
        epochs = static[0]["steps"] / static[0]["steps_per_epoch"]
        # Of one seed both have the same weights and order, so the seeds are compared one by one.
        gaps = [a["eval_loss"] - b["eval_loss"] for a, b in zip(static, dynamic, strict=True)]
        sentences = [
            f"After {show(epochs)} epochs, when each static mask has come {show(epochs / 10)} times, dynamic "
            f"masking is {compare(dynamic, static)}. Unigram baseline: "
            f"{show(records[0]['unigram_perplexity'])}.",
            f"Seed by seed, dynamic is better in {sum(gap > 0 for gap in gaps)} of {len(gaps)}: static minus "
            f"dynamic is {show(min(gaps))} to {show(max(gaps))} nats a token.",
        ]
        for masking, found in runs.items():
            lowest = [min(loss for _, loss in run["curve"]) for run in found]
            worse = sum(run["eval_loss"] > least + 0.01 for run, least in zip(found, lowest))
            sentences.append(f"With {masking} masks {worse} of {len(found)} runs end more than 0.01 nats "
                             "above their lowest point.")
        if epochs <= 10:
            verdict = "Both saw the same masks: static ones begin to come back after ten epochs."
        elif max(map(abs, gaps)) < 0.02:
            verdict = "As in the paper, the two are close."
        elif min(gaps) > 0:
            verdict = ("The direction agrees with the paper, where dynamic masking is slightly better on two "
                       "of three tasks. How large the gap is depends on how often the masks come back.")
        elif max(gaps) < 0:
            verdict = "Differs from the paper: static masking is better in every seed."
        else:
            verdict = "The seeds disagree on which is better."
        if center(static, "eval_loss") > math.log(records[0]["unigram_perplexity"]):
            verdict += " Static masking ends worse than the unigram baseline: it knows its masks by heart."
        return [*sentences, verdict]

    def measure(self, arm: Arm, seed: int) -> dict[str, Any]:
        record, sequences = super().measure(arm, seed), Sequences(
            Corpus(arm.config.data), "full-sentences", arm.config.seq_len)
        return record | {"steps_per_epoch": len(sequences.epoch(0, 0)) / arm.config.batch_size}


def curves(runs: list[dict]) -> list[list[float]]:
    """Returns for each evaluation of a run the losses of all seeds."""
    return [[run["curve"][i][1] for run in runs] for i in range(len(runs[0]["curve"]))]


if __name__ == "__main__":
    study.main(Masking)
