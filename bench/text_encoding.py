"""§4.4: byte-level BPE of several sizes against BERT's character-level BPE after heuristic tokenisation.

    python bench/text_encoding.py --scale cpu

The paper: byte-level BPE of 50K units in place of character-level BPE of 30K costs 15M parameters in BASE
(20M in LARGE) and does slightly worse on some tasks. It was taken because it encodes any text, without
preprocessing and without unknown tokens.

Varied: the encoding. Held: the text that is read, so a larger vocabulary makes fewer tokens and takes fewer
steps; the encoder's shape, though not its embedding table; the held-out documents. Vocabularies differ, so
perplexities do not compare: what is compared is the loss on the same text in bits for a byte of it.

Character-level BPE is here what data.py trains, over text that is first tokenised by BERT's heuristics:
accents dropped, punctuation apart, a word with a character outside the alphabet unknown. CHOICE: the
alphabet is ASCII, so that a character is a byte, and byte-level BPE over such text is character-level BPE.

Expected. It agrees with the paper if byte-level BPE costs a little at most, in bits a byte, and leaves no
word unknown, in a second language neither (--second-language FILE, of which the units have learned nothing).
It contradicts the paper if byte-level BPE is clearly worse at every size.

What to mind: bits a byte are the loss of a masked token times the number of tokens, over the bytes. That is
no probability of the text, and it is kind to small units, for the rest of a masked word gives a part of it
away. What character-level BPE throws away (accents, unknown words, where spaces were) it need not predict.
"""

from __future__ import annotations

import math
import re
import unicodedata
from pathlib import Path

import numpy as np
import torch
from measure import DEVICE, texts_of
from study import Cell, Flags, Panel, Paper, Record, Session, Study, main, prepared, prepared_texts, product
from torch.nn.functional import cross_entropy

import data
from roberta import RobertaForMaskedLM

PASSES = {"smoke": 0.1, "cpu": 0.2, "gpu": 1.0}  # over the text
UNKNOWN = "\x1a"  # ASCII's "substitute": a word with a character that is not of the alphabet


def flags(session: Session, cell: Cell) -> Flags:
    texts = map(CHANGES[cell["encoding"]], texts_of(data.Corpus(prepared(session))))
    name = f"{cell['encoding']}-units{cell['units']}"
    # Nothing more is held out: both encodings are to read the same documents.
    text = prepared_texts(session, name, texts, vocab_size=cell["units"], held_out=1e-9)
    common = session.scale.flags
    sequences = len(data.Sequences(data.Corpus(text), "full-sentences", common["seq_len"]).bounds) - 1
    steps = PASSES[session.options.scale] * sequences / common["batch_size"]
    return {"data": text, "max_steps": max(1, round(steps))}


def measure(session: Session, record: Record, out: Path) -> dict[str, float]:
    """Returns what the run's model makes of the held-out documents: bits for a byte of them as written."""
    texts = list(texts_of(data.Corpus(prepared(session), "heldout")))
    changed = [CHANGES[record["encoding"]](text) for text in texts]
    size, words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
    model = RobertaForMaskedLM.from_pretrained(out).to(DEVICE)
    tokenizer = data.Tokenizer.from_pretrained(out)
    ids = np.concatenate([tokenizer.encode_to_numpy(text) for text in changed])
    nats = len(ids) * masked_loss(model, tokenizer, ids, session.scale.flags["seq_len"])
    found = {
        "bits_per_byte": nats / math.log(2) / size,
        "tokens_per_word": len(ids) / words,
        "unknown_words": unknown_share(" ".join(changed)),
    }
    if session.options.second_language:
        text = Path(session.options.second_language).read_text(encoding="utf-8")
        changed = CHANGES[record["encoding"]](text)
        found |= {"second_tokens_per_byte": len(tokenizer.encode(changed)) / len(text.encode()),
                  "second_unknown_words": unknown_share(changed)}
    return found


def unknown_share(text: str) -> float:
    """Returns the share of a text's words, punctuation apart, that are unknown.

    >>> unknown_share(as_for_bert("Tokyo (東京), said he"))
    0.25
    """
    words = [word for word in text.split() if word == UNKNOWN or word.isalnum()]
    return words.count(UNKNOWN) / len(words)


@torch.inference_mode()
def masked_loss(model: RobertaForMaskedLM, tokenizer: data.Tokenizer, ids: np.ndarray, seq_len: int) -> float:
    """Returns the mean loss in nats of masked tokens, in a text that is cut every `seq_len - 2` ids."""
    count = min(4096, len(ids) // (seq_len - 2))
    pieces = ids[: count * (seq_len - 2)].reshape(count, seq_len - 2)
    input_ids = np.stack([data.join(piece) for piece in pieces])  # (N, T)
    rows, epochs = np.arange(count), np.zeros(count, int)
    masked, labels = data.mask_tokens(
        input_ids, rows, epochs, seed=0, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id)
    loss = 0.0
    for batch, targets in zip(torch.from_numpy(masked).split(64), torch.from_numpy(labels).split(64)):
        logits = model(batch.to(DEVICE)).flatten(0, 1)  # (B * T, V)
        # cross_entropy leaves out labels of -100, which is what NOT_PREDICTED is.
        loss += float(cross_entropy(logits, targets.to(DEVICE).flatten(), reduction="sum"))
    return loss / int((labels != data.NOT_PREDICTED).sum())


def as_for_bert(text: str) -> str:
    """Returns a text as BERT's heuristic tokenisation leaves it, here in ASCII.

    >>> as_for_bert('Café (naïve)...  déjà vu: 日本 x')
    'Cafe ( naive ) . . . deja vu : \\x1a x'
    """
    # In Unicode's decomposed form an accent is a character of its own, of category "Mn".
    plain = "".join(char for char in unicodedata.normalize("NFD", text) if unicodedata.category(char) != "Mn")
    lines = []
    for line in plain.split("\n"):
        words = re.sub(r"([^\w\s]|_)", r" \1 ", line).split()
        lines.append(" ".join(word if word.isascii() else UNKNOWN for word in words))
    return "\n".join(lines)


CHANGES = {"byte": str, "character": as_for_bert}  # byte-level BPE reads a text as it is

STUDY = Study(
    name="text_encoding",
    title="Byte-level and character-level BPE, for one text",
    cells={scale: product(encoding=("byte", "character"), units=units) for scale, units in (
        ("smoke", (512, 1024)), ("cpu", (1024, 4096, 8192)), ("gpu", (2048, 8192, 32768)))},
    flags=flags,
    measure=measure,
    panels=(Panel("units", "bits_per_byte", "encoding", log=True),
            Panel("units", "tokens_per_word", "encoding", log=True)),
    columns=("bits_per_byte", "tokens_per_word", "unknown_words", "second_tokens_per_byte",
             "second_unknown_words", "parameters"),
    paper=Paper("§4.4 and Table 9, BASE", ("parameters",), {
        ("byte", "50K"): ("15M more",),
        ("character", "30K"): ("",),
    }),
)


if __name__ == "__main__":
    main(STUDY, __doc__)
