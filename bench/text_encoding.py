"""§4.4: byte-level BPE of several sizes against BERT's character-level BPE after heuristic tokenisation.

    python bench/text_encoding.py --scale cpu

Varied: the encoding. Held: the text that is read, so a larger vocabulary makes fewer tokens and takes fewer
steps; the encoder's shape, though not its embedding table; the held-out documents. Vocabularies differ, so
perplexities do not compare: what is compared is the loss on the same text in bits for a byte of it.

Character-level BPE is here what data.py trains, over text that is first tokenised by BERT's heuristics:
accents dropped, punctuation apart, a word with a character outside the alphabet unknown. CHOICE: the alphabet
is ASCII, so that a character is a byte, and byte-level BPE over such text is character-level BPE.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import study
from study import Arm, Study, apart, compare, grouped, show, spread, values

import train
from data import (
    HELD_OUT,
    SPLITS,
    TRAIN,
    Batches,
    Corpus,
    PrepareConfig,
    Sequences,
    assign_splits,
    digest,
    prepare,
    write_atomically,
)
from roberta import RobertaForMaskedLM

UNKNOWN = "\x1a"  # ASCII's "substitute": a character that is not of the alphabet
MEASURES = ("bits_per_byte", "tokens_per_word", "parameters")


@dataclass(frozen=True)
class Scale(study.Scale):
    byte_units: tuple[int, ...] = (1024, 2048, 4096, 8192)
    character_units: tuple[int, ...] = (1024, 4096)
    passes: float = 0.2  # over the text


class TextEncoding(Study):
    name = "text_encoding"
    title = "Byte-level and character-level BPE of several sizes"
    paper = ("byte-level BPE of 50K units in place of character-level BPE of 30K costs 15M parameters (BASE) "
             "and does slightly worse on some tasks; it was taken because it encodes any text (§4.4).")
    caveat = ("Bits a byte are the loss of a masked token times the number of tokens, over the bytes: no "
              "probability of the text, and kind to small units, for the rest of a masked word gives a part "
              "of it away. What character-level BPE throws away (accents, unknown words, where spaces were) "
              "it need not predict.")
    scales = {
        "smoke": Scale(**study.SMOKE, byte_units=(512, 1024), character_units=(512,), passes=0.002),
        "cpu": Scale(**study.CPU),
        "gpu": Scale(**study.GPU, byte_units=(2048, 8192, 32768), character_units=(2048, 8192), passes=1.0),
    }

    def arms(self) -> Iterable[Arm]:
        self.texts, self.facts = self.split_text()
        for encoding, sizes in (("byte", self.scale.byte_units), ("character", self.scale.character_units)):
            for units in sizes:
                data = self.encoded("train", encoding, units)
                sequences = len(Sequences(Corpus(data), "full-sentences", self.scale.seq_len).epoch(0, 0))
                steps = max(1, round(self.scale.passes * sequences / self.scale.batch_size))
                self.encoded("heldout", encoding, units)
                yield Arm({"encoding": encoding, "units": units}, self.config(data, steps))

    def split_text(self) -> tuple[dict[tuple[str, str], Path], dict[str, float]]:
        """Returns the files of each split's text, as it is and prepared for characters; and its measures."""
        documents = list(self.documents())
        [splits] = assign_splits([digest(documents)], PrepareConfig.held_out)
        texts, facts = {}, {}
        for split, number in zip(SPLITS, (TRAIN, HELD_OUT)):
            chosen = [document for document, found in zip(documents, splits) if found == number]
            for encoding, change in (("byte", str), ("character", as_for_bert)):
                path = texts[split, encoding] = self.data / f"{encoding}-{split}.jsonl"
                changed = [change(document) for document in chosen]
                rows = [json.dumps({"text": text}) + "\n" for text in changed]
                if not path.exists():
                    write_atomically(path, "".join(rows).encode())
            facts = {"bytes": sum(len(text.encode()) for text in chosen),  # in the end, of the held-out split
                     "words": sum(len(text.split()) for text in chosen),
                     "unknown": sum(text.count(UNKNOWN) for text in changed)}
        return texts, facts

    def encoded(self, split: str, encoding: str, units: int) -> Path:
        """Returns a prepared directory of a split, with the tokenizer of the training text."""
        out = self.data / f"{encoding}-{split}-units{units}"
        if not (out / "manifest.json").exists():
            text = str(self.texts[split, encoding])
            config = PrepareConfig((text,), str(out), units, workers=self.options.jobs)
            if split == "heldout":
                tokenizer = self.data / f"{encoding}-train-units{units}" / "tokenizer"
                config = replace(config, tokenizer=str(tokenizer), held_out=1e-9)  # gives up one document
            with study.quietly(self.data / f"{out.name}.log"):
                prepare(config)
        return out

    def measure(self, arm: Arm, seed: int) -> dict[str, Any]:
        record = super().measure(arm, seed)
        model = RobertaForMaskedLM.from_pretrained(self.runs / f"{arm.name}-seed{seed}")
        data, setup, nats, tokens = self.encoded("heldout", **arm.values), study.setup(), 0.0, 0
        model.to(setup.device)
        for split in SPLITS:  # of the held-out documents, which prepare() has split again
            corpus = Corpus(data, split)
            sequences = Sequences(corpus, "full-sentences", self.scale.seq_len)
            batches = Batches(sequences, batch_size=64, micro_batch_size=64, seed=2**32)
            result = train.evaluate(model, batches, corpus.unigram, 4096, setup)
            nats += corpus.num_tokens * result["eval_loss"]
            tokens += corpus.num_tokens
        unknown = self.facts["unknown"] if arm.values["encoding"] == "character" else 0
        return record | {"bits_per_byte": nats / math.log(2) / self.facts["bytes"],
                         "tokens_per_word": tokens / self.facts["words"],
                         "unknown_words": unknown / self.facts["words"]}

    def table(self, records: list[dict]) -> list[list[str]]:
        rows = [["encoding", "units", "steps", "parameters", "tokens a word", "bits a byte, median", "range"]]
        for (encoding, _), runs in grouped(records, "encoding", "units"):
            rows.append([encoding, *(show(runs[0][name]) for name in ("units", "steps", "parameters",
                         "tokens_per_word")), *spread(runs, "bits_per_byte")])
        return rows

    def figures(self, records: list[dict]) -> dict[str, Any]:
        figure, panels = study.axes_for(self.title, "units of the vocabulary", "", panels=2)
        for axes, name, label in zip(panels, MEASURES, ("loss, bits a byte of text", "tokens a word")):
            for i, ((encoding,), runs) in enumerate(grouped(records, "encoding")):
                units = [units for (units,), _ in grouped(runs, "units")]
                samples = [values(of_size, name) for _, of_size in grouped(runs, "units")]
                study.draw_line(axes, i, f"{encoding}-level", units, samples)
            axes.set_ylabel(label)
            study.plain_ticks(axes, sorted({record["units"] for record in records}))
        study.caption(figure, f"median and range of {self.scale.seeds} seeds; every run reads the same text")
        return {"": figure}

    def reading(self, records: list[dict]) -> list[str]:
        cells, measure = dict(grouped(records, "encoding", "units")), "bits_per_byte"
        both = sorted(set(self.scale.byte_units) & set(self.scale.character_units))
        pairs = [(cells["byte", units], cells["character", units]) for units in both]
        sentences = [f"With {units:,} units, byte-level against character-level: "
                     f"{compare(byte, character, measure)} bits a byte; "
                     f"{show(byte[0]['tokens_per_word'])} and {show(character[0]['tokens_per_word'])} tokens "
                     "a word." for units, (byte, character) in zip(both, pairs)]
        fewest, most = (cells["byte", of(self.scale.byte_units)] for of in (min, max))
        sentences.append(f"Byte-level, {most[0]['units']:,} units against {fewest[0]['units']:,}: "
                         f"{compare(most, fewest, measure)} bits a byte; "
                         f"{show(most[0]['tokens_per_word'])} and {show(fewest[0]['tokens_per_word'])} "
                         f"tokens a word; {most[0]['parameters']:,} and {fewest[0]['parameters']:,} "
                         "parameters.")
        unknown = max(record["unknown_words"] for record in records)
        sentences.append(f"Of the held-out words {unknown:.2%} are unknown to character-level BPE, none to "
                         "byte-level BPE.")
        seen = [apart(byte, character, measure) for byte, character in pairs]
        sentences.append("The paper's finding, byte-level slightly worse but able to encode anything, is "
                         f"seen in the loss of {seen.count(-1)} of {len(pairs)} sizes; byte-level is "
                         f"better in {seen.count(1)}.")
        return sentences


def as_for_bert(text: str) -> str:
    """Returns a text as BERT's heuristic tokenisation leaves it, here in ASCII.

    >>> as_for_bert("Café (naïve)...  déjà vu: 日本 x")
    'Cafe ( naive ) . . . deja vu : \\x1a x'
    """
    plain = "".join(char for char in unicodedata.normalize("NFD", text) if unicodedata.category(char) != "Mn")
    lines = (re.sub(r"([^\w\s]|_)", r" \1 ", line).split() for line in plain.split("\n"))
    return "\n".join(" ".join(word if word.isascii() else UNKNOWN for word in line) for line in lines)


if __name__ == "__main__":
    study.main(TextEncoding)
