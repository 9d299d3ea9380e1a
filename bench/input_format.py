"""§4.2, Table 2: the four input formats, with next-sentence prediction and without.

    python bench/input_format.py --scale cpu
    python bench/input_format.py --scale cpu --task mnli --task-data glue

Varied: what a sequence is made of. Held: real tokens (the formats of short sequences have more of them in a
step; FULL-SENTENCES, which pads, takes more steps), model, text. Every format is evaluated on the same
held-out set, in FULL-SENTENCES, and fine-tuned on the same downstream task.

CHOICE: without --task the task is made of the text itself, so that the study needs no other data: is a
sentence as it was written, or are its words shuffled, but for the first and the last? It is about single
sentences, which no format consists of, and a model that has learned no syntax stays at one half.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import study
from study import Arm, Study, apart, compare, grouped, show, values

import finetune
from data import Corpus, Sequences, draw, write_atomically

FORMATS = ("segment-pair", "sentence-pair", "full-sentences", "doc-sentences")


@dataclass(frozen=True)
class Scale(study.Scale):
    examples: int = 6000  # of the downstream task; a sixth of them is its dev set
    epochs: int = 3


class InputFormats(Study):
    name = "input_format"
    title = "The four input formats at equal tokens"
    paper = ("single sentences hurt, and without NSP it is as good or better: MNLI-m 84.0 for SEGMENT-PAIR, "
             "82.9 for SENTENCE-PAIR, 84.7 for FULL-SENTENCES and DOC-SENTENCES (Table 2).")
    caveat = ("Perplexity on FULL-SENTENCES favours what was trained on it. Sequences of a few dozen tokens "
              "leave little room for two segments, where the paper had 512.")
    scales = {
        "smoke": Scale(**study.SMOKE, examples=120, epochs=1),
        "cpu": Scale(**study.CPU | {"hidden_size": 128, "sequences": 36_000, "peak_lr": 2e-3}),
        "gpu": Scale(**study.GPU | {"sequences": 80_000}, examples=24_000),
    }

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        tasks = [name for name in finetune.TASKS if "squad" not in name]  # whose scores are per cent
        parser.add_argument("--task", choices=tasks,
                            help="downstream task of finetune.py; none: word order, made of the text")
        parser.add_argument("--task-data", help="folder of the task's files")

    def arms(self) -> Iterable[Arm]:
        data = self.prepared(self.scale.share)
        self.task, self.task_data = self.options.task, self.options.task_data
        if self.task is None:
            self.task, self.task_data = "sst-2", str(self.data / f"word-order-{self.scale.examples}")
            write_word_order(data, Path(self.task_data), self.scale.examples)
        for input_format in FORMATS:
            # The others fill a step up to the tokens of full sequences; FULL-SENTENCES has so many sequences,
            # and where the next sentence does not fit, padding.
            sequences = Sequences(Corpus(data), input_format, self.scale.seq_len)
            epoch = sequences.epoch(0, 0)
            lengths = epoch.sizes(np.arange(len(epoch))) + sequences.special_tokens
            filled = lengths.mean() / self.scale.seq_len if input_format == "full-sentences" else 1.0
            steps = round(self.scale.sequences / self.scale.batch_size / filled)
            yield Arm({"input_format": input_format}, self.config(data, steps, input_format=input_format))

    def measure(self, arm: Arm, seed: int) -> dict[str, Any]:
        record, out = super().measure(arm, seed), self.runs / f"{arm.name}-seed{seed}"
        name = f"-{self.options.task}" if self.options.task else ""
        config = finetune.FinetuneConfig(
            task=self.task, data=self.task_data, model=str(out), out=f"{out}-downstream{name}", seed=seed,
            epochs=self.scale.epochs, peak_lr=self.scale.peak_lr / 2, checkpoint_interval=10**9,
        )
        with study.quietly(Path(f"{out}.log")):
            results = finetune.finetune(config, study.setup())
        return record | {"task": results["task"], "score": finetune.primary(results)}

    def table(self, records: list[dict]) -> list[list[str]]:
        rows = [["format", "steps", "tokens", "held-out perplexity", "range", self.describe(), "range"]]
        for (name,), runs in grouped(records, "input_format"):
            rows.append([name, show(runs[0]["steps"]), show(runs[0]["tokens"]),
                         *study.spread(runs, "eval_perplexity"), *study.spread(runs, "score")])
        return rows

    def figures(self, records: list[dict]) -> dict[str, Any]:
        figure, panels = study.axes_for(self.title, "", "", panels=2)
        measures = {"eval_perplexity": "held-out perplexity: lower is better",
                    "score": f"{self.describe()}: higher is better"}
        for axes, (measure, label) in zip(panels, measures.items()):
            for i, (_, runs) in enumerate(grouped(records, "input_format")):
                study.draw_line(axes, i, "", [i], [values(runs, measure)])
            axes.set_xticks(range(len(FORMATS)), [name.replace("-", "-\n") for name in FORMATS])
            axes.set_xlabel(label)
        study.caption(figure, f"median and range of {self.scale.seeds} seeds; the two on the left with NSP")
        return {"": figure}

    def describe(self) -> str:
        return f"{self.task}, dev" if self.options.task else "word order, dev accuracy"

    def reading(self, records: list[dict]) -> list[str]:
        runs = {name: found for (name,), found in grouped(records, "input_format")}
        # `compare` is about what is better when it is less.
        errors = {name: [{"error": 1 - run["score"]} for run in found] for name, found in runs.items()}
        others = [name for name in FORMATS if name != "full-sentences"]
        sentences = [f"Held-out perplexity, FULL-SENTENCES against {other.upper()}: "
                     f"{compare(runs['full-sentences'], runs[other])}." for other in others]
        sentences += [f"Errors downstream ({self.describe()}), FULL-SENTENCES against {other.upper()}: "
                      f"{compare(errors['full-sentences'], errors[other], 'error')}." for other in others]
        words = {1: "that agrees", 0: "the seeds cannot tell", -1: "that differs"}
        without = apart(errors["full-sentences"], errors["segment-pair"], "error")
        single = apart(errors["segment-pair"], errors["sentence-pair"], "error")
        sentences.append("The paper, by its tasks: FULL-SENTENCES, without NSP, is better than SEGMENT-PAIR: "
                         f"{words[without]}; SENTENCE-PAIR is worse than SEGMENT-PAIR: {words[single]}.")
        return sentences


def write_word_order(prepared: Path, directory: Path, count: int) -> None:
    """Writes a task in SST-2's files: sentences, half of them with their inner words shuffled.

    Training examples come from training documents, dev examples from held-out ones. Label 1: as written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for split, name, share in (("heldout", "dev", 6), ("train", "train", 1.2)):
        if (directory / f"{name}.tsv").exists():
            continue
        rows = []
        for i, words in enumerate(plain_sentences(Corpus(prepared, split))):
            if len(rows) >= count / share:
                break
            label, inner = int(draw(0, i, 0)) % 2, words[1:-1]
            if not label:
                words[1:-1] = [inner[j] for j in np.argsort(draw(0, i, 1, np.arange(len(inner))))]
                if words[1:-1] == inner:
                    continue
            rows.append(f"{' '.join(words)}\t{label}\n")
        write_atomically(directory / f"{name}.tsv", "".join(["sentence\tlabel\n", *rows]).encode())


def plain_sentences(corpus: Corpus) -> Iterator[list[str]]:
    """Yields the words of sentences of 5 to 25 words that are mostly plain words, in random order."""
    places = [(shard, i) for shard in corpus.shards for i in range(len(shard.sentences))]
    for place in np.argsort(draw(0, np.arange(len(places)))):
        shard, i = places[place]
        begin = shard.sentences[i - 1] if i else 0
        words = corpus.tokenizer.decode(shard.tokens[begin : shard.sentences[i]].tolist()).split()
        plain = sum(word.strip(".,;:()'").isalpha() for word in words)
        if 5 <= len(words) <= 25 and plain >= 0.9 * len(words) and words[0][0].isupper():
            yield words


if __name__ == "__main__":
    study.main(InputFormats)
