"""§4.2, Table 2: the four input formats, with next-sentence prediction and without.

    python bench/input_format.py --scale cpu --glue glue

The paper, with BASE: pairs of single sentences hurt (MNLI-m 82.9, where pairs of long segments have 84.0),
and without NSP it is as good or better (84.7 for FULL-SENTENCES and for DOC-SENTENCES, which is the best in
all but SST-2). RoBERTa takes FULL-SENTENCES, for the batches of DOC-SENTENCES vary in size.

Varied: what a sequence is made of. Held: real tokens (a format that pads takes more steps), model, text.
Every format is evaluated on the same held-out text, in FULL-SENTENCES, and fine-tuned on the same tasks
(downstream.py): one made of the text, and with --glue SST-2 and QNLI. `nsp_accuracy` is the share of right
answers to BERT's second question, on held-out pairs.

Expected. It agrees with the paper if on the tasks SENTENCE-PAIR is the worst, and the formats without NSP are
as good as SEGMENT-PAIR or better. It contradicts the paper if a pair format wins on the tasks by more than
the seeds' range. Perplexity says less: it favours what was trained in the form it is measured in. And 128
tokens leave little room for two segments, where the paper had 512.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from downstream import fine_tune, tasks
from measure import DEVICE
from study import MODEL, SCALES, Cell, Flags, Panel, Paper, Record, Session, Study, main, prepared, product

import data
import train
from roberta import RobertaForPreTraining

FORMATS = ("segment-pair", "sentence-pair", "full-sentences", "doc-sentences")


def flags(session: Session, cell: Cell) -> Flags:
    text, common = prepared(session), session.scale.flags
    tasks(session)  # are made now, before several runs want them at the same time
    # How many tokens a step has, padding apart, seen on a few steps; then how many steps make equal tokens.
    batches = batches_of(data.Corpus(text), cell["input_format"], common)
    tokens = [sum(batch.num_tokens for batch in batches.step(number).batches) for number in range(8)]
    steps = session.scale.sequences * common["seq_len"] / np.mean(tokens)
    return cell | {"data": text, "max_steps": round(steps)}


def batches_of(corpus: data.Corpus, input_format: data.InputFormat, common: Flags) -> data.Batches:
    sequences, size = data.Sequences(corpus, input_format, common["seq_len"]), common["batch_size"]
    return data.Batches(sequences, batch_size=size, micro_batch_size=size, seed=0)


def measure(session: Session, record: Record, out: Path) -> dict[str, float]:
    """Returns accuracies in per cent: of the fine-tuned model, and with pairs of next-sentence prediction."""
    found = fine_tune(session, out)
    if record["input_format"] in data.PAIR_FORMATS:
        found["nsp_accuracy"] = nsp_accuracy(session, record["input_format"], out)
    return found


@torch.inference_mode()
def nsp_accuracy(session: Session, input_format: data.InputFormat, out: Path) -> float:
    model = RobertaForPreTraining.from_pretrained(out).to(DEVICE)
    held_out = data.Corpus(prepared(session), "heldout")
    right = []
    for batch in batches_of(held_out, input_format, session.scale.flags).held_out(2048):
        _, scores = train.model_outputs(model, batch, DEVICE)
        right += (scores.argmax(1).cpu().numpy() == batch.next_sentence_labels).tolist()
    return 100 * sum(right) / len(right)


LONGER = MODEL | {"hidden_size": 128, "intermediate_size": 512, "peak_lr": 2e-3, "seq_len": 128}
STUDY = Study(
    name="input_format",
    title="The four input formats, at equal tokens",
    cells=dict.fromkeys(SCALES, product(input_format=FORMATS)),
    flags=flags,
    measure=measure,
    panels=tuple(Panel("input_format", name, "input_format")
                 for name in ("eval_perplexity", "word_order", "MNLI-m", "sst-2", "qnli", "SST-2")),
    columns=("eval_perplexity", "word_order", "sst-2", "qnli", "nsp_accuracy"),
    paper=Paper("Table 2, BASE", ("SQuAD 1.1 F1", "SQuAD 2.0 F1", "MNLI-m", "SST-2", "RACE"), {
        ("segment-pair",): (90.4, 78.7, 84.0, 92.9, 64.2),
        ("sentence-pair",): (88.7, 76.2, 82.9, 92.1, 63.0),
        ("full-sentences",): (90.4, 79.1, 84.7, 92.5, 64.8),
        ("doc-sentences",): (90.6, 79.7, 84.7, 92.7, 65.6),
    }),
    changes={
        "cpu": {"flags": LONGER, "sequences": 10_000, "seeds": 5},
        "gpu": {"sequences": 80_000, "seeds": 5},
    },
)


if __name__ == "__main__":
    main(STUDY, __doc__)
