"""From text to masked batches: everything RoBERTa reads passes through this file, top to bottom.

    text files -> documents -> sentences -> token ids -> shards on disk -> sequences -> masked batches

    python data.py prepare --corpus books/ wiki.jsonl.xz --out prepared    # train a tokenizer, write shards
    python data.py prepare --out prepared             # the same from the documentation installed here
    torchrun train.py --data prepared

Two ideas carry the file. Text becomes numbers once, in `prepare`, and is memory-mapped afterwards. And every
random draw (which tokens are masked, in which order sequences come) is a pure function of integers, `draw`,
never of how far some generator has run: resuming is exact, any number of ranks sees the same data, and the
static masking of §4.1 is dynamic masking with `epoch % 10`.

Legend: B sequences of a micro-batch, T tokens of a sequence, M predicted positions, V vocabulary, S sequences
of an epoch. This file needs no torch, so that its worker processes start at once and stay small.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import gc
import gzip
import hashlib
import heapq
import importlib.util
import io
import json
import lzma
import mmap
import multiprocessing
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import sys
import sysconfig
import threading
import time
import typing
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import regex  # Unicode classes for the pre-tokenisation; tiktoken brings it along
import tiktoken

# ----------------------------------------------------------------------------------------------------------
# Documents: .txt, .jsonl, either of them compressed, or the documentation installed on this machine
# ----------------------------------------------------------------------------------------------------------

TEXT_ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.xz", ".jsonl.xz")
MAX_DOCUMENT_BYTES = 100_000  # a .txt without blank lines is cut at line ends: memory stays constant
MAX_ROW_BYTES = 32 << 20  # a row of .jsonl has to be held whole to be understood
PART_BYTES = 64 << 20  # a larger plain file is read by several workers, each a part of about this size


class Part(NamedTuple):
    """A byte range of an input file, from one document boundary to another; a compressed file is whole."""

    path: str
    begin: int
    end: int


def find_parts(corpus: Iterable[str | Path], part_bytes: int = PART_BYTES) -> list[Part]:
    """Returns the corpus as parts for parallel workers, files in the order of their names, large ones cut.

    Raises: ValueError where a path is missing or a directory holds no text.
    """
    files: list[Path] = []
    for path in map(Path, corpus):
        if not path.exists():
            raise ValueError(f"{path}: no such file or directory")
        found = [path] if path.is_file() else _find_texts(path)
        if not found:
            raise ValueError(f"{path}: no text here; files must end in one of {' '.join(TEXT_ENDINGS)}")
        files += sorted(found)
    return [part for file in files for part in _cut(file, part_bytes)]


def _find_texts(directory: Path) -> list[Path]:
    """Returns the texts below a directory, links to directories apart. Raises: OSError, ValueError."""

    def unreadable(error: OSError) -> NoReturn:  # which os.walk would pass over
        raise error

    found = [Path(place, name) for place, _, names in os.walk(directory, onerror=unreadable)
             for name in names if name.endswith(TEXT_ENDINGS)]
    if broken := [path for path in found if not path.is_file()]:
        raise ValueError(f"{broken[0]}: no file, but perhaps a link that leads nowhere; remove it")
    return found


def _cut(path: Path, part_bytes: int) -> Iterator[Part]:
    """Cuts a plain file behind a blank line, .jsonl behind any line; a compressed one can't be cut."""
    size, begin = path.stat().st_size, 0
    with open(path, "rb") as file:
        while size - begin > 2 * part_bytes and path.suffix not in (".gz", ".xz"):
            file.seek(begin + part_bytes)
            _pass_line(file)
            give_up = file.tell() + MAX_DOCUMENT_BYTES  # a document so long is cut at a line's end anyway
            while path.suffix != ".jsonl" and file.tell() < give_up and _pass_line(file):
                pass
            if file.tell() >= size:
                break
            yield Part(str(path), begin, file.tell())
            begin = file.tell()
    yield Part(str(path), begin, size)


def _pass_line(file: typing.BinaryIO) -> bool:
    """Goes to the end of a line, which may be longer than memory; returns whether it was not blank."""
    has_text = False
    while piece := file.readline(1 << 20):
        has_text |= bool(piece.strip())
        if piece.endswith(b"\n"):
            break
    return has_text


class LeftOut(NamedTuple):
    """What no text can be made of: a line; a piece of a very long one; the rest of a damaged file."""

    path: str
    line: int
    byte: int  # where the line begins, in the unpacked file
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}: line {self.line}, at byte {self.byte}, {self.reason} {self.detail}".rstrip()


def read_documents(path: str | Path, begin: int = 0, end: int | None = None,
                   leave_out: Callable[[LeftOut], Any] | None = None) -> Iterator[str]:
    """Yields the documents of a file, or of a byte range of it, holding one of them at a time.

    `.jsonl`: one object a line, its "text" field. Anything else is text: blank lines separate documents, line
    ends become "\\n", and what is longer than MAX_DOCUMENT_BYTES without a blank line is cut at the end of a
    line, or where a line is so long at a space. `.gz` and `.xz` are unpacked on the way.

    `leave_out` is told of each line that is left out: what is not UTF-8 or holds a NUL, a row that is no
    object with a "text" string or longer than MAX_ROW_BYTES, and the rest of a damaged packed file.
    Raises: ValueError for the first of these where `leave_out` is None; OSError where the disk can't be read.
    """
    path = Path(path)
    packed = path.suffix in (".gz", ".xz")
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    is_json = (path.with_suffix("") if packed else path).suffix == ".jsonl"
    position, number = begin, 0  # of the line at hand: its first byte, the lines of this part before it

    def unusable(reason: str, detail: object = "") -> None:
        line = _count_lines(path, begin) + number + 1
        problem = LeftOut(str(path), line, position, reason, str(detail))
        if leave_out is None:
            raise ValueError(problem)
        leave_out(problem)

    lines, size = [], 0
    try:
        with opener(path, "rb") as file:
            file.seek(begin)
            for raw, length, is_whole in (_read_rows if is_json else _read_lines)(file):
                if end is not None and not packed and position >= end:
                    break
                line = raw.removeprefix(b"\xef\xbb\xbf") if position == 0 else raw  # a byte-order mark
                is_blank = False
                try:
                    text = _text_of_row(line) if is_json else _text_of_line(line)
                    is_blank = not text.strip()
                    if is_json and not is_blank:
                        yield text
                    elif not is_blank:
                        lines.append(text)
                        size += length
                except _NoText as problem:
                    unusable(*problem.args)
                if lines and (is_blank or not is_whole or size > MAX_DOCUMENT_BYTES):
                    yield "\n".join(lines)
                    lines, size = [], 0
                position, number = position + length, number + is_whole
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        unusable("and what follows is damaged or cut short", f"({error})")
    if lines:
        yield "\n".join(lines)


def _read_lines(file: typing.BinaryIO) -> Iterator[tuple[bytes, int, bool]]:
    """Yields the lines of a text, a very long one in pieces: bytes, their number, whether the line is over.

    A piece ends behind a space, or, where there is none, in front of a character.
    """
    rest = b""
    while raw := rest + file.readline(MAX_DOCUMENT_BYTES + 1 - len(rest)):
        rest = b""
        is_whole = raw.endswith(b"\n") or len(raw) <= MAX_DOCUMENT_BYTES  # the last line may have no end
        if not is_whole:
            beginnings = [i for i in range(len(raw) - 4, len(raw)) if raw[i] & 0xC0 != 0x80]  # of characters
            cut = raw.rfind(b" ", 0, MAX_DOCUMENT_BYTES) + 1 or max(beginnings, default=len(raw))
            raw, rest = raw[:cut], raw[cut:]
        yield raw, len(raw), is_whole


def _read_rows(file: typing.BinaryIO) -> Iterator[tuple[bytes, int, bool]]:
    """Yields the same for .jsonl. Of a row that is too long only the beginning is kept, which shows that."""
    while raw := file.readline(MAX_ROW_BYTES + 1):
        length, piece = len(raw), raw
        while len(piece) > MAX_ROW_BYTES and not piece.endswith(b"\n"):
            piece = file.readline(MAX_ROW_BYTES + 1)
            length += len(piece)
        yield raw, length, True


class _NoText(ValueError):
    """No text can be made of a line. Its arguments are LeftOut's reason and detail."""


def _text_of_line(raw: bytes) -> str:
    try:
        line = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise _NoText("is not UTF-8", f"({error.reason}); convert the file first, for example with: "
                      "iconv -f LATIN1 -t UTF-8") from None
    if "\0" in line:
        raise _NoText("holds a NUL", "character; is the file binary, or UTF-16?")
    return line


def _text_of_row(raw: bytes) -> str:
    if len(raw) > MAX_ROW_BYTES:
        raise _NoText(f"is longer than {MAX_ROW_BYTES} bytes")
    line = _text_of_line(raw)
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _NoText("is no JSON", f"({error})") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise _NoText('is no object with a "text" string')
    if re.search("[\ud800-\udfff]", text):  # JSON can spell what is no text
        raise _NoText("holds half a surrogate pair")
    return text


@functools.lru_cache(maxsize=1)
def _count_lines(path: Path, end: int) -> int:
    """Returns how many lines of a file end before byte `end`."""
    count = 0
    with open(path, "rb") as file:
        while end > 0 and (block := file.read(min(end, 1 << 20))):
            count, end = count + block.count(b"\n"), end - len(block)
    return count


# A first run needs nothing but the machine: these are packages that the requirements bring along.
DOCUMENTED_PACKAGES = """torch sympy networkx numpy matplotlib fontTools mpmath setuptools pip PIL pyparsing
    fsspec jinja2 packaging urllib3 dateutil requests pygments _pytest contourpy tiktoken""".split()


def documentation_files() -> list[Path]:
    """Returns the Python sources whose docstrings are the default corpus: standard library and dependencies.

    Tests and vendored copies are left out: they hold little English and take much of the parsing time.
    """
    roots = [Path(sysconfig.get_path("stdlib"))]
    for name in DOCUMENTED_PACKAGES:
        spec = importlib.util.find_spec(name)  # finds a top-level package without running any of its code
        roots += map(Path, spec.submodule_search_locations or []) if spec else []
    skip = {"tests", "test", "testing", "_vendor", "idlelib", "site-packages", "dist-packages"}
    files = [(root, file) for root in roots for file in sorted(root.rglob("*.py"))]
    return [file for root, file in files if not skip & set(file.relative_to(root).parts)]


def docstrings(path: Path) -> str:
    """Returns the docstrings of a Python source as one document, in their order.

    The source is parsed, never imported. A file without triple quotes, or of another
    Python's syntax, gives "".
    """
    source = path.read_text(encoding="utf-8", errors="ignore")
    if 3 * '"' not in source and 3 * "'" not in source:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners) and ast.get_docstring(node)]
    nodes.sort(key=lambda node: node.body[0].lineno)
    return "\n\n".join(map(ast.get_docstring, nodes))


# A sentence ends after . ! or ? with any closing quotes and brackets, before white space that leads to
# anything but a lowercase letter; and before a blank line. The white space begins the next sentence.
# (White space is written [^\S\x1c-\x1f], since Python's \s has four characters more than the tokenizer's.)
SENTENCE_END = re.compile(
    r"""[.!?]["'”’)\]]*(?=[^\S\x1c-\x1f]+[^\sa-z])|\S(?=[^\S\n\x1c-\x1f]*\n[^\S\n\x1c-\x1f]*\n\s*\S)"""
)


def split_sentences(document: str) -> list[str]:
    """Returns the document's sentences. Joined they are the document; each boundary is a pre-token's, too.

    CHOICE: the paper packs "full sentences" without saying how they are found. This rule also cuts behind
    "Mr.", which costs a boundary and no token.

    >>> split_sentences('He left. "Why?" she asked. At 3.5 it rained.')
    ['He left.', ' "Why?" she asked.', ' At 3.5 it rained.']
    """
    bounds = [0, *(match.end() for match in SENTENCE_END.finditer(document)), len(document)]
    return [document[a:b] for a, b in zip(bounds, bounds[1:]) if a < b]


# ----------------------------------------------------------------------------------------------------------
# The tokenizer: byte-level BPE (§4.4, GPT-2 §2.2) in RoBERTa's id layout
# ----------------------------------------------------------------------------------------------------------

BOS, PAD, EOS, UNK = range(4)  # fairseq's order; the mask is the vocabulary's last id
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
NUM_SPECIALS = len(SPECIAL_TOKENS)

# GPT-2's pre-tokenisation: contractions, then words, numbers and punctuation, each with one space before it,
# then the rest of the white space. Possessive quantifiers (++) match the same text as
# GPT-2's, without backtracking.
PRETOKEN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# GPT-2 writes each byte as a visible character: printable Latin-1 as itself, the others from U+0100 on. This
# list is in the order of those characters, in which GPT-2 and Hugging Face number the 256 byte units.
BYTE_ORDER = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_ORDER += [byte for byte in range(256) if byte not in BYTE_ORDER]
BYTE_TO_CHAR = {byte: chr(byte if i < 188 else 0x100 + i - 188) for i, byte in enumerate(BYTE_ORDER)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def spell(token: bytes) -> str:
    """Returns a token as vocab.json and merges.txt write it.

    >>> spell(" é".encode())
    'ĠÃ©'
    """
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def unspell(token: str) -> bytes:
    """Returns the token that `spell` wrote. Raises: ValueError for a character that stands for no byte."""
    try:
        return bytes(map(CHAR_TO_BYTE.__getitem__, token))
    except KeyError as error:
        raise ValueError(f"token {token!r} holds {error}, which spells no byte: not byte-level BPE") from None


class Tokenizer:
    """Byte-level BPE: any string to ids and back, exactly; no unknown token, no normalisation (§4.4).

    tiktoken does the work. It knows a token by its rank, the order in which the merges were learned; one
    table turns whole arrays of ranks into ids, for fairseq ordered RoBERTa's ids by frequency, not by rank.

    vocab: token, spelled as by `spell`, to id; with the specials. merges: pairs so spelled, in order.
    Raises: ValueError where the specials are not at RoBERTa's places, or a merge makes a token without an id.
    """

    def __init__(self, vocab: dict[str, int], merges: Iterable[tuple[str, str]]):
        self.vocab, self.merges = dict(vocab), [tuple(pair) for pair in merges]
        self.vocab_size = len(vocab)
        ids = vocab.values()
        if not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
            raise ValueError(f"the ids of {len(vocab)} tokens must be 0 to {len(vocab) - 1}, each once")
        self.mask_id = self.vocab_size - 1
        for token, place in zip(SPECIAL_TOKENS, (BOS, PAD, EOS, UNK, self.mask_id)):
            if vocab.get(token) != place:
                raise ValueError(f"{token} has id {vocab.get(token)} in this vocabulary of {self.vocab_size} "
                                 f"units, in RoBERTa's layout {place}; it is another model's")
        ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_ORDER)}
        for left, right in self.merges:
            ranks.setdefault(unspell(left) + unspell(right), len(ranks))  # two merges may make the same token
        if missing := [spell(token) for token in ranks if spell(token) not in vocab]:
            raise ValueError(f"the merges make {missing[0]!r}, which the {self.vocab_size} units lack")
        made = {*map(spell, ranks), *SPECIAL_TOKENS, "<|endoftext|>"}  # the last is GPT-2's, unused here
        if lost := [token for token in vocab if token not in made and not token.startswith("madeupword")]:
            raise ValueError(f"no merge makes {lost[0]!r} and {len(lost) - 1} other units: the merges are "
                             "cut short, or tokens were added")
        self.rank_to_id = np.array([vocab[spell(token)] for token in ranks], dtype=np.int64)
        # Ids that no rank leads to, the specials and fairseq's madeupword padding, decode to their names.
        self.id_to_bytes = [b""] * self.vocab_size
        for token, index in vocab.items():
            self.id_to_bytes[index] = token.encode("utf-8")
        for token, index in zip(ranks, self.rank_to_id):
            self.id_to_bytes[index] = token
        self.byte_lengths = np.array([len(token) for token in self.id_to_bytes])
        # tiktoken is told of no special tokens: a document with the characters "</s>" means these characters.
        self._bpe = tiktoken.Encoding("roberta", pat_str=PRETOKEN, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without `<s>` and `</s>`. Raises: ValueError for lone surrogates."""
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Returns the same as an int64 array, made without a Python object for each token."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} is {text[error.start]!a}, a lone surrogate, no text; "
                             'text.encode("utf-8", "replace").decode() has a "?" in its place') from None
        try:
            ranks = self._bpe.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # tiktoken's regex engine overflows on white space of a million characters that leads to text. The
            # last such character begins a pre-token, so the text may be cut before it.
            cuts = [0, *(match.end() - 1 for match in re.finditer(r"\s{1000,}(?=\S)", text)), len(text)]
            pieces = [text[a:b] for a, b in zip(cuts, cuts[1:])]
            ranks = np.concatenate([self._bpe.encode_to_numpy(p, disallowed_special=()) for p in pieces])
        return self.rank_to_id[ranks]

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[np.ndarray]:
        """Returns `encode_to_numpy` of every text, from several threads; none given: one a core.

        tiktoken releases Python's lock while it works, so threads do run side by side.
        """
        threads = threads or os.cpu_count() or 1
        size = max(1, len(texts) // (8 * threads))  # a few shares a thread: they are not of equal length

        def encode(begin: int) -> list[np.ndarray]:
            return [self.encode_to_numpy(text) for text in texts[begin : begin + size]]

        with ThreadPoolExecutor(threads) as pool:
            return [ids for share in pool.map(encode, range(0, len(texts), size)) for ids in share]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of a text, and (T, 2) which characters each token is made of: text[begin:end].

        The space before a word is part of its token. A token may be a part of a character of several bytes:
        then it counts as the whole of it.
        """
        ids = self.encode_to_numpy(text)
        ends = np.cumsum(self.byte_lengths[ids])  # in bytes, as everything in the next line
        begins, data = ends - self.byte_lengths[ids], np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        character = np.cumsum((data & 0xC0) != 0x80) - 1  # of each byte: 10xxxxxx goes on with the one before
        return ids, np.stack([character[begins], character[ends - 1] + 1], axis=1)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, exactly what was encoded; specials by name, invalid UTF-8 as U+FFFD."""
        return b"".join(self.id_to_bytes[index] for index in ids).decode("utf-8", errors="replace")

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of vocabulary and merges: tokenizers that share it give the same ids."""
        content = json.dumps([list(self._sorted_vocab().items()), self.merges])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def save_pretrained(self, directory: str | Path, model_max_length: int | None = None) -> None:
        """Writes vocab.json and merges.txt, GPT-2's two files, and what Hugging Face's programs want.

        model_max_length: where their tokenizer shall cut, in tokens with `<s>` and `</s>`.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        settings = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": False,
                    "mask_token": {"__type": "AddedToken", **self._special("<mask>")}}
        if model_max_length is not None:
            settings["model_max_length"] = model_max_length
        for name, content in (("vocab.json", self._sorted_vocab()), ("tokenizer.json", self._everything()),
                              ("tokenizer_config.json", settings)):
            write_atomically(directory / name, json.dumps(content, ensure_ascii=False).encode())
        write_atomically(directory / "merges.txt", self._merges_file())

    def _everything(self) -> dict[str, Any]:
        """Returns the content of tokenizer.json, from which their library needs no other file."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "added_tokens": [{"id": self.vocab[token], **self._special(token), "special": True}
                             for token in SPECIAL_TOKENS],
            "pre_tokenizer": byte_level, "decoder": byte_level,
            "post_processor": {"type": "RobertaProcessing", "sep": ["</s>", EOS], "cls": ["<s>", BOS],
                               "trim_offsets": True, "add_prefix_space": False},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "vocab": self._sorted_vocab(),
                      "merges": [" ".join(pair) for pair in self.merges]},
        }

    @staticmethod
    def _special(token: str) -> dict[str, Any]:
        """Returns how their library is to find a special token: <mask> together with the space before it."""
        return {"content": token, "single_word": False, "lstrip": token == "<mask>", "rstrip": False,
                "normalized": False}

    def _sorted_vocab(self) -> dict[str, int]:
        return dict(sorted(self.vocab.items(), key=lambda item: item[1]))

    def _merges_file(self) -> bytes:
        return "\n".join(["#version: 0.2", *(" ".join(pair) for pair in self.merges), ""]).encode()

    def save_fairseq(self, directory: str | Path) -> None:
        """Writes encoder.json, vocab.bpe and dict.txt, as fairseq takes them.

        encoder.json numbers the tokens as GPT-2 does, by rank; dict.txt holds these numbers in the order of
        our ids, with a count that nobody reads. Names that no rank leads to follow the ranks, as GPT-2's
        <|endoftext|> does, but for fairseq's own madeupword padding: that stands in dict.txt by its name.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tokens = list(self._sorted_vocab())[len(SPECIAL_TOKENS) - 1 : -1]
        ranks = {spell(self.id_to_bytes[index]): rank for rank, index in enumerate(self.rank_to_id)}
        padding = {token for token in tokens if token.startswith("madeupword") and token not in ranks}
        for token in tokens:
            if token not in padding:
                ranks.setdefault(token, len(ranks))
        lines = [f"{token if token in padding else ranks[token]} 1\n" for token in tokens]
        write_atomically(directory / "encoder.json", json.dumps(ranks).encode())
        write_atomically(directory / "vocab.bpe", self._merges_file())
        write_atomically(directory / "dict.txt", "".join(lines).encode())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Tokenizer:
        """Reads vocab.json and merges.txt, a tokenizer.json, or fairseq's encoder.json, vocab.bpe, dict.txt.

        They may also lie where a run directory or a prepared directory has them.
        Raises: ValueError where there are none, or what they describe is no tokenizer of RoBERTa's kind.
        """
        directory = Path(directory)
        for place in (directory, directory / "checkpoint", directory / "tokenizer"):
            found = [names for names in TOKENIZER_FILES if all((place / name).is_file() for name in names)]
            if not found:
                continue
            try:
                _check_settings(place)
                contents = [TOKENIZER_FILES[names](*map(place.joinpath, names)) for names in found]
                if any(content != contents[0] for content in contents):
                    raise ValueError("they do not say the same")
                return cls(*contents[0])
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                files = " and ".join(name for names in found for name in names)
                raise ValueError(f"{place}: no tokenizer of RoBERTa's kind in {files} ({error})") from None
        raise ValueError(f"{directory}: no tokenizer here; it takes vocab.json and merges.txt, or "
                         "tokenizer.json, or fairseq's encoder.json, vocab.bpe and dict.txt")


def _check_settings(place: Path) -> None:
    """Raises ValueError for what Hugging Face's settings beside a tokenizer would change."""
    settings, added = place / "tokenizer_config.json", place / "added_tokens.json"
    content = read_json(settings) if settings.is_file() else {}
    if content.get("add_prefix_space"):
        raise ValueError("add_prefix_space is not built; take it out of tokenizer_config.json and begin each "
                         "text with a space instead")
    tokens = [*(read_json(added) if added.is_file() else ()),
              *(token["content"] for token in content.get("added_tokens_decoder", {}).values())]
    _check_added(tokens)


def _check_added(tokens: Iterable[str]) -> None:
    if others := set(tokens) - {*SPECIAL_TOKENS, "<|endoftext|>"}:
        raise ValueError(f"tokens were added, such as {min(others)!r}; only RoBERTa's own are built")


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns vocabulary and merges of a file of Hugging Face's tokenizers library."""
    content = read_json(path)
    model, before = content["model"], content["pre_tokenizer"]
    kinds = (model["type"], before["type"], before["add_prefix_space"], content["normalizer"])
    if kinds != ("BPE", "ByteLevel", False, None):
        raise ValueError(f"model, pre-tokenizer, added space and normalizer are {kinds}, not ('BPE', "
                         "'ByteLevel', False, None)")
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    _check_added(added)
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    return model["vocab"] | added, merges


def _read_vocab_and_merges(vocab: Path, merges: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    return read_json(vocab), _read_merges(merges)


def _read_fairseq(encoder: Path, merges: Path,
                  dictionary: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A line of dict.txt is a GPT-2 id and a count; its number plus four is RoBERTa's id."""
    names = {str(index): token for token, index in read_json(encoder).items()}
    entries = [line.rsplit(" ", 1)[0] for line in dictionary.read_text("utf-8").split("\n")]
    entries = entries[:-1] if not entries[-1] else entries
    if broken := [number for number, entry in enumerate(entries, 1) if not entry]:
        raise ValueError(f"line {broken[0]} of {dictionary.name} is empty")
    tokens = [*SPECIAL_TOKENS[:4], *(names.get(entry, entry) for entry in entries), "<mask>"]
    if twice := [token for token, count in Counter(tokens).items() if count > 1]:
        raise ValueError(f"{twice[0]!r} stands twice in {dictionary.name}, or is one that fairseq adds")
    return {token: i for i, token in enumerate(tokens)}, _read_merges(merges)


# What reads which files. Where a directory has several kinds, they must say the same.
TOKENIZER_FILES = {
    ("tokenizer.json",): _read_tokenizer_json,
    ("vocab.json", "merges.txt"): _read_vocab_and_merges,
    ("encoder.json", "vocab.bpe", "dict.txt"): _read_fairseq,
}


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file. Raises: ValueError naming the file where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged, no object but {type(content).__name__}")
    return content


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    if broken := [merge for merge in merges if len(merge) != 2]:
        raise ValueError(f"{path}: a merge has two parts, but a line holds {' '.join(broken[0])!r}")
    return merges


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that after any crash is the old one or the whole new one."""
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk, perhaps: leave no more on it than there was
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def temporary_beside(path: Path, mark: str | None = None) -> Path:
    """Returns a name for what is to become `path`, in the same directory.

    mark: eight hexadecimal digits; random, unless one process at a time writes this file.
    """
    return path.with_name(f".{path.name}.{mark or secrets.token_hex(4)}.tmp")


def remove_leftovers(directory: Path) -> None:
    """Removes what a killed process left half written. Only for who has the directory to itself."""
    for path in directory.glob(".?*." + 8 * "[0-9a-f]" + ".tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


LOCK_PATIENCE = 5  # seconds in which the workers of a process that was just killed are gone, too


@contextlib.contextmanager
def locked(directory: Path, rank: int = 0) -> Iterator[None]:
    """Keeps a directory, which is made if need be, to this process for the time of a `with` block.

    Of several ranks the first has the lock.

    The lock is the kernel's, on an open file: it ends with the process, however that ends, so a crashed
    run leaves none behind. Raises: ValueError naming the process that has the directory.
    """
    if rank > 0:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    path, give_up = directory / ".lock", time.monotonic() + LOCK_PATIENCE
    while True:
        # Not through a link: a directory from elsewhere could have one to a file of the user's.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 500).decode(errors="replace") or "another process"
            os.close(file)
            if time.monotonic() > give_up:
                raise ValueError(f"{directory} is in use by {holder}; wait until it ends, or choose another "
                                 "--out") from None
            time.sleep(0.1)
            continue
        except OSError as error:
            say(f"warning: {directory} can't be locked ({error.strerror}); let no other run write there")
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file)):
            break
        os.close(file)  # its holder has removed it meanwhile
    with contextlib.suppress(OSError):  # a full disk: who comes second is refused all the same
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


# ----------------------------------------------------------------------------------------------------------
# Learning the merges
# ----------------------------------------------------------------------------------------------------------


def count_pretokens(documents: Iterable[str]) -> Counter[str]:
    """Returns how often each pre-token occurs: all that BPE needs, since it never merges across pre-tokens.

    Before every space that leads to a non-space there is a boundary, whatever stands before it. So the text
    is cut there by faster means, and the Unicode pattern sees each different piece only once; all pieces that
    are equally frequent, joined again, in a single call.
    """
    pieces: Counter[str] = Counter()  # without their leading spaces
    counts: Counter[str] = Counter()
    pretokens = regex.compile(PRETOKEN).findall
    for document in documents:
        every_space_leads_on = not re.search(r" (?:\s|\Z)", document)
        start, *others = document.split(" ") if every_space_leads_on else re.split(r" (?=\S)", document)
        counts.update(pretokens(start))  # may begin without a space: must not be joined to anything
        pieces.update(others)
    by_count = defaultdict(list)
    for piece, count in pieces.items():
        by_count[count].append(piece)
    for count, joined in by_count.items():
        for pretoken, times in Counter(pretokens(" " + " ".join(joined))).items():
            counts[pretoken] += times * count
    return counts


def train_bpe(
    documents: Iterable[str], vocab_size: int, min_frequency: int = 2, workers: int = 1
) -> Tokenizer:
    """Learns byte-level BPE (§4.4): 5 specials, 256 bytes, and as many merges as fill `vocab_size`.

    Pre-tokens are counted in `workers` processes. A pair seen fewer than `min_frequency` times is not merged,
    so a small corpus yields fewer units. Merges, ties included, equal those of Hugging Face's trainer.
    Raises: ValueError where `vocab_size` leaves no room for the bytes.
    """

    def batches(characters: int = 1_500_000) -> Iterator[tuple[list[str]]]:
        batch, size = [], 0
        for document in documents:
            batch.append(document)
            size += len(document)
            if size > characters:
                yield (batch,)
                batch, size = [], 0
        yield (batch,)

    counts: Counter[str] = Counter()
    for part in run_jobs(count_pretokens, batches(), workers):
        counts.update(part)
    return learn_merges(counts, vocab_size, min_frequency)


def learn_merges(counts: Counter[str], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """BPE proper (Sennrich et al. 2016, §3.2): merge the most frequent pair of neighbours, again and again.

    Three things make it fast. A unit is one character, chr(its number), and a word a string of them: counting
    and merging are string operations. Each pair knows the words it occurs in, and no others are touched. A
    heap holds the pairs by count; an entry that is out of date is put back with its true count when it comes
    up. Ties go to the lower unit numbers, the bytes being numbered in BYTE_ORDER, as in Hugging Face's
    trainer.
    """
    if vocab_size < NUM_SPECIALS + 256:
        raise ValueError(f"vocab_size {vocab_size} is too small: {NUM_SPECIALS} specials and 256 bytes make "
                         f"{NUM_SPECIALS + 256}, and every merge adds one")
    units = [BYTE_TO_CHAR[byte] for byte in BYTE_ORDER]
    number = {unit: i for i, unit in enumerate(units)}
    as_units = {byte: i for i, byte in enumerate(BYTE_ORDER)}
    words = [pretoken.encode("utf-8").decode("latin-1").translate(as_units) for pretoken in counts]
    frequency = list(counts.values())

    pair_count: defaultdict[str, int] = defaultdict(int)
    words_of: defaultdict[str, list[int]] = defaultdict(list)
    merges: list[tuple[str, str]] = []
    with garbage_collector_off():
        for index, word in enumerate(words):
            for pair in map(str.__add__, word, word[1:]):
                pair_count[pair] += frequency[index]
                words_of[pair].append(index)
        heap = [(-pair_count[pair], pair, where) for pair, where in words_of.items()]
        heapq.heapify(heap)
        while heap and len(units) < vocab_size - NUM_SPECIALS:
            negative_count, pair, where = heapq.heappop(heap)
            if -negative_count != pair_count[pair]:
                heapq.heappush(heap, (-pair_count[pair], pair, where))
                continue
            if -negative_count < min_frequency:
                break
            left, right = (units[ord(unit)] for unit in pair)
            merges.append((left, right))
            if left + right not in number:  # else two merges make the same unit, as ab+c and a+bc do
                number[left + right] = len(units)
                units.append(left + right)
            arose = _merge(pair, chr(number[left + right]), where, words, frequency, pair_count)
            for new_pair, seen_in in arose.items():
                if pair_count[new_pair] > 0:  # in "aaaa" a pair may arise and go again
                    heapq.heappush(heap, (-pair_count[new_pair], new_pair, seen_in))

    tokens = [*SPECIAL_TOKENS[:4], *units, "<mask>"]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, merges)


def _merge(pair: str, new: str, where: list[int], words: list[str], frequency: list[int],
           pair_count: defaultdict[str, int]) -> dict[str, list[int]]:
    """Makes `pair` one unit in the words `where`; returns the pairs that arose, each with its words.

    `pair_count` is kept true, but for `pair` itself, which nobody asks for again.
    """
    first, second = pair
    behind, ahead = defaultdict(list), defaultdict(list)  # neighbour -> the words in which it stands there
    for index in where:
        pieces = words[index].split(pair)
        if len(pieces) == 1:
            continue  # an earlier merge took the pair out of this word
        words[index] = new.join(pieces)
        # Pairs merge from left to right: of two in a row, the first still has the pair's first unit after it,
        # and the second already has `new` before it.
        before = pieces[0]
        for number, after in enumerate(pieces[1:], 2):
            if before:
                behind[before[-1]].append(index)
            if after or number < len(pieces):
                ahead[after[0] if after else first].append(index)
            before = after or new
    arose: dict[str, list[int]] = {}
    changes = [(unit + first, unit + new, seen_in) for unit, seen_in in behind.items()]
    changes += [(second + unit, new + unit, seen_in) for unit, seen_in in ahead.items()]
    for old_pair, new_pair, seen_in in changes:
        count = sum(map(frequency.__getitem__, seen_in))
        pair_count[old_pair] -= count
        pair_count[new_pair] += count
        arose[new_pair] = seen_in
    return arose


@contextlib.contextmanager
def garbage_collector_off() -> Iterator[None]:
    """Pauses Python's cycle collector, which would walk millions of new objects again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# ----------------------------------------------------------------------------------------------------------
# prepare: documents become token shards, in parallel, restartable at any point
# ----------------------------------------------------------------------------------------------------------

FORMAT_VERSION = 1
WORK = "prepare-work"  # what an unfinished preparation has, in its directory
TRAIN, HELD_OUT, DUPLICATE = range(3)  # what becomes of a document
SPLITS = ("train", "heldout")


def flag(default: Any, help: str, source: str = "") -> Any:
    """A dataclass field that is also a command-line flag: default, meaning with its unit, source."""
    return dataclasses.field(default=default, metadata={"help": help + (f" [{source}]" if source else "")})


@dataclass(frozen=True)
class PrepareConfig:
    """What `python data.py prepare` is asked to do."""

    corpus: tuple[str, ...] = flag((), "text files or directories; none: the documentation installed here")
    out: str = flag("prepared", "directory to write")
    vocab_size: int = flag(50265, "units of the tokenizer to train, specials and bytes included", "§4.4")
    tokenizer: str | None = flag(None, "directory of a tokenizer to use instead of training one")
    workers: int = flag(0, "processes; 0: one a core")
    held_out: float = flag(0.01, "share of the documents kept apart for evaluation, chosen by their hash")
    bpe_megabytes: int = flag(100, "MB of text, spread over the corpus, to train the tokenizer on")
    strict: bool = flag(False, "stop at a line that is no text, instead of leaving it out")


def prepare(config: PrepareConfig, rank: int = 0, world_size: int = 1) -> Path:
    """Turns a corpus into token shards in `config.out`; returns that directory, at once if it is complete.

    Digest every document (to drop exact duplicates, and to choose the held-out ones so that no copy of them
    is trained on), train the tokenizer, encode. The first and the last are a job for each part of the corpus,
    whose result appears under its name only when it is whole, and which is not done again if that is there:
    killed anywhere, the same call finishes the rest. Under torchrun each rank takes its share of the parts
    and waits for the others' results to appear in the directory, which all must see.

    Lines of which no text can be made (`read_documents`) are left out, counted in the manifest and named in
    left-out.jsonl, the first MAX_NAMED of each part.

    Raises: ValueError for bad input, with `strict` for the first such line, or where `out` holds something
    else or another process is at work in it; OSError where the disk is full.
    """
    with locked(Path(config.out), rank):
        return _prepare(config, rank, world_size)


def _prepare(config: PrepareConfig, rank: int, world_size: int) -> Path:
    out, work, settings = Path(config.out), Path(config.out) / WORK, _settings(config)
    if (out / "manifest.json").exists():
        manifest = read_json(out / "manifest.json")
        _compare_settings(out, manifest.get("settings", {}), settings)
        if config.strict and manifest.get("left_out"):
            first = (out / "left-out.jsonl").read_text(encoding="utf-8").split("\n")[0]
            raise ValueError(LeftOut(**json.loads(first)))
        say(f"{out} is prepared already", rank)
        if rank == 0:
            _clean_up(out)  # there is something only if the end came in between
        return out
    if rank == 0 and not (out / "tokenizer").exists() and (work / "settings.json").exists():
        if read_json(work / "settings.json") != settings:
            shutil.rmtree(work)  # of a call that came to nothing: there is no work to lose
    if rank == 0 and not (work / "settings.json").exists():
        if (out / "tokenizer").exists():
            raise ValueError(f"{out} holds the tokenizer/ of something else; choose another --out")
        work.mkdir(parents=True, exist_ok=True)
        write_atomically(work / "settings.json", json.dumps(settings).encode())
    if rank == 0:
        write_atomically(work / "start", this_start().encode())
    while rank > 0 and _read_start(work) != this_start():  # till rank 0 has the lock: others may be at work
        if (out / "manifest.json").exists():
            return out
        time.sleep(0.2)
    try:
        _compare_settings(out, read_json(work / "settings.json"), settings)
        _run_passes(config, settings, rank, world_size)
    except OSError:
        if rank == 0 or not (out / "manifest.json").exists():
            raise  # else rank 0 needed nothing more of this one, and has cleaned up
    return out


def _run_passes(config: PrepareConfig, settings: dict, rank: int, world_size: int) -> None:
    out, work = Path(config.out), Path(config.out) / WORK
    workers = config.workers or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    parts = find_parts(config.corpus or [_harvest(out, workers, rank)])
    mine = range(rank, len(parts), world_size)
    digests = [work / f"digests-{i:05d}.npy" for i in range(len(parts))]
    jobs = [(parts[i], digests[i], config.strict) for i in mine if not digests[i].exists()]
    _run_parts("digest", _digest_part, jobs, workers)
    wait_for(digests, out)
    left_out = [read_json(left_out_beside(path)) for path in digests]
    if config.strict and any(record["counts"] for record in left_out):  # of a call that was not strict
        raise ValueError(next(LeftOut(**entry) for record in left_out for entry in record["first"]))
    if rank == 0:
        _write_left_out(out, left_out)
    splits = assign_splits([np.load(path) for path in digests], config.held_out)

    if rank == 0 and not (out / "tokenizer").exists():
        given = config.tokenizer and Tokenizer.from_pretrained(config.tokenizer)
        (given or _learn(config, parts, workers)).save_pretrained(work / "tokenizer")
        os.replace(work / "tokenizer", out / "tokenizer")
    wait_for([out / "tokenizer"], out)

    records = [work / f"encoded-{i:05d}.json" for i in range(len(parts))]
    jobs = [(parts[i], i, splits[i], out) for i in mine if not records[i].exists()]
    _run_parts("encode", _encode_part, jobs, workers)
    wait_for(records, out)
    if rank == 0:
        encoded = [read_json(path) for path in records]
        _write_manifest(out, settings, encoded, np.concatenate(splits), left_out)
        _clean_up(out)
    wait_for([out / "manifest.json"], out)


def this_start() -> str:
    """Returns what the ranks of one start have in common, and those of no other: torchrun sets these."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    return " ".join(os.environ.get(name, "") for name in names)


def _read_start(work: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return (work / "start").read_text()
    return None


def _clean_up(out: Path) -> None:
    """Removes what a finished preparation needs no longer, and what killed ones left."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    remove_leftovers(out)


def wait_for(paths: Sequence[Path], out: Path) -> None:
    """Returns when the paths exist, or `out` is complete: so ranks wait for each other without a network."""
    while not all(path.exists() for path in paths) and not (out / "manifest.json").exists():
        time.sleep(0.2)


def _settings(config: PrepareConfig) -> dict:
    """Returns what the result depends on: calls with equal settings may share work. Checks the values."""
    if not 0 < config.held_out < 1:
        raise ValueError(f"held_out {config.held_out} must lie between 0 and 1, for example 0.01")
    if config.tokenizer is None and config.vocab_size < NUM_SPECIALS + 256:
        learn_merges(Counter(), config.vocab_size)  # raises now, not after an hour of reading
    given = config.tokenizer and Tokenizer.from_pretrained(config.tokenizer).fingerprint
    if config.bpe_megabytes < 1:
        raise ValueError(f"bpe_megabytes {config.bpe_megabytes} must be at least 1")
    corpus = [(os.path.abspath(part.path), part.begin, part.end) for part in find_parts(config.corpus)]
    settings = {"format_version": FORMAT_VERSION, "corpus": corpus or "documentation",
                "tokenizer": given or config.vocab_size,
                "held_out": config.held_out, "bpe_megabytes": config.bpe_megabytes}
    return json.loads(json.dumps(settings))  # as it will be read back, with lists for tuples


def _compare_settings(out: Path, before: dict, now: dict) -> None:
    for key in now:
        if before.get(key) != now[key]:
            change = f"with {key} {before.get(key)}, this call asks for {now[key]}"
            if key == "corpus":
                change = "from other files, or they have changed since"
            raise ValueError(f"{out} was prepared {change}; choose another --out or delete it")


def say(message: str, rank: int | None = None) -> None:
    """Prints for the person watching, once however many ranks there are."""
    if (int(os.environ.get("RANK", 0)) if rank is None else rank) == 0:
        print(message, flush=True)


def run_jobs(function: Callable, jobs: Iterable[tuple], workers: int) -> Iterator:
    """Yields function(*job) for every job, as they finish, from `workers` processes (1: this one).

    Only a few jobs are taken ahead of time. The processes end with this one, even if it is killed.
    """
    if workers <= 1:
        yield from (function(*job) for job in jobs)
        return
    # fork starts in milliseconds, and what runs here uses no thread of the parent's. Elsewhere it is unsafe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(os.getpid(),))
    interrupted: list[int] = []

    def finished(running: set) -> Iterator:
        """Waits for at least one job to end; removes those that have from `running`, yields their results."""
        done: set = set()
        while not done:
            done = wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done
            if interrupted:
                raise KeyboardInterrupt
        running -= done
        yield from (future.result() for future in done)

    # Ctrl-C is only noted, and `finished` looks: inside fork or the pool it was seen to get lost, or to hang.
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(1)) if in_main_thread else None
    try:
        running: set = set()
        for job in jobs:
            running.add(pool.submit(function, *job))
            if len(running) > 2 * workers:
                yield from finished(running)
        while running:
            yield from finished(running)
    except BrokenProcessPool:
        raise OSError("a worker was killed, perhaps for want of memory; try fewer --workers") from None
    finally:
        for process in multiprocessing.active_children() if interrupted else ():
            process.terminate()  # what it was at is begun anew by the next call
        pool.shutdown(cancel_futures=True)
        if in_main_thread:
            signal.signal(signal.SIGINT, before)
        if interrupted:
            raise KeyboardInterrupt


def _start_worker(parent: int) -> None:
    """Ties a worker's life to its parent's: an orphan would go on writing where the next run writes too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # where the kernel can do it, at once
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_parts(what: str, function: Callable, jobs: list[tuple], workers: int) -> None:
    """Runs a pass over parts of the corpus; reports progress, rate and time left every five seconds or so."""
    total = sum(part.end - part.begin for part, *_ in jobs)
    done, started, reported = 0, time.monotonic(), time.monotonic()
    for count, part in enumerate(run_jobs(function, jobs, min(workers, len(jobs))), 1):
        done += part.end - part.begin
        now = time.monotonic()
        if now - reported > 5 or count == len(jobs):
            reported, rate = now, max(done, 1) / max(now - started, 1e-9)
            say(f"{what}: {count}/{len(jobs)} parts, {done / 1e6:.1f}/{total / 1e6:.1f} MB, "
                f"{rate / 1e6:.1f} MB/s, {(total - done) / rate:.0f} s left")


def _harvest(out: Path, workers: int, rank: int) -> Path:
    """Writes the documentation installed here as .jsonl files, a module a document; returns where."""
    directory, temporary = out / "documentation", out / ".documentation.tmp"
    if rank == 0 and not directory.exists():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        files, parts = documentation_files(), 32
        say(f"reading the documentation in {len(files)} Python files")
        jobs = [(files[i::parts], temporary / f"part-{i:02d}.jsonl") for i in range(parts)]
        say(f"found {sum(run_jobs(_harvest_files, jobs, workers)) / 1e6:.1f} MB of it")
        os.replace(temporary, directory)
    wait_for([directory], out)
    return directory


def _harvest_files(files: list[Path], destination: Path) -> int:
    with garbage_collector_off():
        documents = [text for text in map(docstrings, files) if text]
    content = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    write_atomically(destination, content)
    return len(content)


MAX_NAMED = 1000  # lines left out that are named, of a part; all are counted


def _digest_part(part: Part, destination: Path, strict: bool) -> Part:
    """Writes which lines of a part are left out, then the digest of each document."""
    counts: Counter[str] = Counter()
    first: list[dict] = []

    def leave_out(problem: LeftOut) -> None:
        counts[problem.reason] += 1
        if len(first) < MAX_NAMED:
            first.append(problem._asdict())

    digests = digest(read_documents(*part, None if strict else leave_out))
    record = {"counts": counts, "first": first}
    write_atomically(left_out_beside(destination), json.dumps(record).encode())
    save_array(destination, digests)
    return part


def left_out_beside(digests: Path) -> Path:
    return digests.with_name(digests.name.replace("digests", "left-out")).with_suffix(".json")


def ignore(_: LeftOut) -> None:
    """Leaves out what the first pass has counted and named."""


def _write_left_out(out: Path, records: list[dict]) -> None:
    """Writes and shows which lines were left out, if any were."""
    entries = [entry for record in records for entry in record["first"]]
    if not entries:
        return
    write_atomically(out / "left-out.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries).encode())
    for entry in entries[:3]:
        say(f"left out: {LeftOut(**entry)}")
    counts = sum((Counter(record["counts"]) for record in records), Counter())
    kinds = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    say(f"left out {counts.total():,} lines: {kinds}; {out / 'left-out.jsonl'} names them")


def digest(documents: Iterable[str]) -> np.ndarray:
    """Returns 8 bytes of hash for each document, (N,) uint64."""
    hashes = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in documents)
    return np.frombuffer(b"".join(hashes), dtype="<u8")


def save_array(path: Path, array: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, array)
    write_atomically(path, content.getvalue())


def assign_splits(digests: list[np.ndarray], held_out: float) -> list[np.ndarray]:
    """Returns TRAIN, HELD_OUT or DUPLICATE for each document of each part; the first of equals is kept."""
    everything = np.concatenate(digests)
    unique, first = np.unique(everything, return_index=True)
    if len(unique) < 2:
        raise ValueError(f"the corpus holds {len(unique)} different documents, it needs 2, one to hold out "
                         "(blank lines separate the documents of a .txt file)")
    # Digests are uniform below 2^64. CHOICE: if none of a small corpus is below the share, the lowest is.
    threshold = max(int(held_out * 2**64), int(unique[0]) + 1)
    if threshold > int(unique[-1]):
        raise ValueError(f"held_out {held_out} leaves none of {len(unique)} documents to train on; lower it")
    splits = np.full(len(everything), DUPLICATE, dtype=np.uint8)
    splits[first] = np.where(unique < np.uint64(threshold), HELD_OUT, TRAIN)
    return np.split(splits, np.cumsum([len(array) for array in digests])[:-1])


def _learn(config: PrepareConfig, parts: list[Part], workers: int) -> Tokenizer:
    """Trains the tokenizer on the first documents of every part, `bpe_megabytes` in all."""
    # The share of a part goes by its size; packed text is some four times as long as its file.
    sizes = [(p.end - p.begin) * (4 if p.path.endswith((".gz", ".xz")) else 1) for p in parts]
    shares = [1_000_000 * config.bpe_megabytes * size // max(1, sum(sizes)) for size in sizes]
    counts: Counter[str] = Counter()
    for part_counts in run_jobs(_count_part, zip(parts, shares), workers):
        counts.update(part_counts)
    tokenizer = learn_merges(counts, config.vocab_size)
    say(f"trained a tokenizer of {tokenizer.vocab_size} units on {len(counts):,} different pre-tokens")
    if tokenizer.vocab_size < config.vocab_size:
        say(f"fewer than the {config.vocab_size} asked for: no other pair occurs twice in this corpus")
    return tokenizer


def _count_part(part: Part, characters: int) -> Counter[str]:
    """Returns the pre-tokens of a part's first documents, about so many characters of them."""

    def sample() -> Iterator[str]:
        left = characters
        for document in read_documents(*part, ignore):
            yield document
            left -= len(document)
            if left <= 0:
                return

    return count_pretokens(sample())


def encode_document(document: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Returns a document's ids and, for each of its sentences, where it ends among them.

    The document is encoded in one call; the sentences are found again by their bytes, for their boundaries
    are boundaries of pre-tokens.
    """
    sentences, ids = split_sentences(document), tokenizer.encode_to_numpy(document)
    sizes = map(len, sentences) if document.isascii() else (len(sentence.encode()) for sentence in sentences)
    token_ends, sentence_ends = np.cumsum(tokenizer.byte_lengths[ids]), np.cumsum(list(sizes))
    ends = np.searchsorted(token_ends, sentence_ends)
    assert np.array_equal(token_ends[ends], sentence_ends), "a sentence ends inside a token"
    return ids, ends + 1


class ShardWriter:
    """Writes a shard: ids, and where among them sentences and documents end. Invisible until `close`."""

    KINDS = ("tokens", "sentences", "documents")

    def __init__(self, directory: Path, name: str, vocab_size: int):
        self.name, self.dtype = name, token_dtype(vocab_size)
        self.paths = {kind: directory / f"{name}.{kind}.bin" for kind in self.KINDS}
        # What a killed process left of the same shard is written over: else it would add up.
        self.files = {kind: open(temporary_beside(path, 8 * "0"), "wb") for kind, path in self.paths.items()}
        self.hashes = {kind: hashlib.sha256() for kind in self.KINDS}
        self.counts = dict.fromkeys(self.KINDS, 0)
        self.unigram = np.zeros(vocab_size, dtype=np.int64)
        self.pending: list[tuple[np.ndarray, np.ndarray]] = []
        self.pending_tokens = 0

    def add(self, ids: np.ndarray, sentence_ends: np.ndarray) -> None:
        """Takes one document; writes now and then, a million tokens at once."""
        self.pending.append((ids, sentence_ends))
        self.pending_tokens += len(ids)
        if self.pending_tokens > 1_000_000:
            self._write()

    def _write(self) -> None:
        if not self.pending:
            return
        ids = np.concatenate([ids for ids, _ in self.pending])
        sizes = np.array([len(ids) for ids, _ in self.pending])
        document_ends = self.counts["tokens"] + np.cumsum(sizes)
        sentence_ends = [start + ends for start, (_, ends) in zip(document_ends - sizes, self.pending)]
        for kind, array, dtype in (("tokens", ids, self.dtype), ("documents", document_ends, "<i8"),
                                   ("sentences", np.concatenate(sentence_ends), "<i8")):
            content = array.astype(dtype).tobytes()
            self.files[kind].write(content)
            self.hashes[kind].update(content)
            self.counts[kind] += len(array)
        self.unigram += np.bincount(ids, minlength=len(self.unigram))
        self.pending, self.pending_tokens = [], 0

    def close(self) -> dict:
        """Puts the files under their names; returns the shard's entry in the manifest."""
        self._write()
        for kind, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, self.paths[kind])
        return {"name": self.name, "counts": self.counts,
                "sha256": {kind: value.hexdigest() for kind, value in self.hashes.items()}}


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def _encode_part(part: Part, index: int, splits: np.ndarray, out: Path) -> Part:
    """Writes the part's shards, train and held-out, then the record that says they are whole."""
    tokenizer = Tokenizer.from_pretrained(out / "tokenizer")
    writers = [ShardWriter(out, f"{split}-{index:05d}", tokenizer.vocab_size) for split in SPLITS]
    number = -1
    for number, document in enumerate(read_documents(*part, ignore)):
        if number < len(splits) and splits[number] != DUPLICATE:
            writers[splits[number]].add(*encode_document(document, tokenizer))
    if number + 1 != len(splits):
        raise ValueError(f"{part.path} had {len(splits)} documents when preparation began, {number + 1} now; "
                         f"delete {out} and start over")
    record = {split: writer.close() for split, writer in zip(SPLITS, writers)}
    save_array(out / WORK / f"unigram-{index:05d}.npy", writers[TRAIN].unigram)
    write_atomically(out / WORK / f"encoded-{index:05d}.json", json.dumps(record).encode())
    return part


def _write_manifest(out: Path, settings: dict, records: list[dict], splits: np.ndarray,
                    left_out: list[dict]) -> None:
    """Writes manifest.json, last of all: a directory that has one is complete."""
    tokenizer = Tokenizer.from_pretrained(out / "tokenizer")
    counts = {split: {kind: sum(record[split]["counts"][kind] for record in records)
                      for kind in ShardWriter.KINDS} for split in SPLITS}
    duplicates = int((splits == DUPLICATE).sum())
    manifest = {
        "format_version": FORMAT_VERSION,
        "dtype": token_dtype(tokenizer.vocab_size),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "counts": counts | {"duplicate_documents_dropped": duplicates},
        "left_out": sum((Counter(record["counts"]) for record in left_out), Counter()),
        "settings": settings,
        "shards": {split: [record[split] for record in records if record[split]["counts"]["tokens"]]
                   for split in SPLITS},
    }
    save_array(out / "unigram.npy", sum(map(np.load, sorted((out / WORK).glob("unigram-*.npy")))))
    write_atomically(out / "manifest.json", json.dumps(manifest, indent=1).encode())
    for split in SPLITS:
        say(f"{split}: " + ", ".join(f"{counts[split][kind]:,} {kind}" for kind in ShardWriter.KINDS))
    say(f"dropped {duplicates} duplicate documents; everything is in {out}")


# ----------------------------------------------------------------------------------------------------------
# Reading a prepared directory
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """Memory-mapped arrays of a shard; `base` is the address of its first token in the whole split."""

    tokens: np.ndarray
    sentences: np.ndarray  # where each sentence ends, in tokens of this shard
    documents: np.ndarray  # where each document ends
    base: int


class Corpus:
    """One split of a prepared directory. Opening it maps files and reads none, whatever their size.

    Addresses are 64-bit token offsets into the split's shards laid end to end.
    Raises: ValueError, with both values, for another version or vocabulary, or a shard of wrong size.
    """

    def __init__(self, directory: str | Path, split: Literal["train", "heldout"] = "train"):
        self.directory, self.split = Path(directory), split
        if not (self.directory / "manifest.json").is_file():
            unfinished = (self.directory / WORK / "settings.json").exists()
            raise ValueError(f"{directory}: " + ("unfinished; run the same `data.py prepare` again"
                             if unfinished else "no manifest.json; make one with `python data.py prepare`"))
        self.manifest = _read_manifest(self.directory)
        self.tokenizer = Tokenizer.from_pretrained(self.directory / "tokenizer")
        if (found := self.tokenizer.fingerprint) != self.manifest["tokenizer"]:
            raise ValueError(f"{directory}: tokenizer/ holds {found}, the shards were made with "
                             f"{self.manifest['tokenizer']}; put it back, or delete all and prepare again")
        self.vocab_size = self.tokenizer.vocab_size
        self.unigram = self._unigram()  # (V,) counts of ids in the train split
        self.shards: list[Shard] = []
        self.num_tokens = 0
        for entry in self.manifest["shards"][split]:
            arrays = tokens, sentences, documents = [self._map(entry, kind) for kind in ShardWriter.KINDS]
            if not len(tokens) == sentences[-1] == documents[-1]:
                raise ValueError(f"{directory}: {entry['name']} has {len(tokens)} tokens, sentences up to "
                                 f"{sentences[-1]}, documents up to {documents[-1]}; prepare it again")
            self.shards.append(Shard(*arrays, base=self.num_tokens))
            self.num_tokens += entry["counts"]["tokens"]
        if not self.shards:
            raise ValueError(f"{directory}: the {split} split is empty; prepare more text")
        self._bases = np.array([shard.base for shard in self.shards])

    def _unigram(self) -> np.ndarray:
        path, tokens = self.directory / "unigram.npy", self.manifest["counts"]["train"]["tokens"]
        try:
            counts = np.array(np.load(path, mmap_mode="r"))  # mapped: no header can claim more than there is
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path}: damaged ({error}); delete {self.directory}, prepare again") from None
        if counts.shape != (self.vocab_size,) or counts.sum() != tokens:
            raise ValueError(f"{path}: {counts.sum()} tokens of {counts.shape[:1]} units, the manifest has "
                             f"{tokens} of {self.vocab_size}; delete {self.directory}, prepare again")
        return counts

    def _path(self, entry: dict, kind: str) -> Path:
        return self.directory / f"{entry['name']}.{kind}.bin"

    def _map(self, entry: dict, kind: str) -> np.ndarray:
        path, dtype = self._path(entry, kind), np.dtype(self.manifest["dtype"] if kind == "tokens" else "<i8")
        expected = entry["counts"][kind] * dtype.itemsize
        found = path.stat().st_size if path.exists() else "no"
        if found != expected:
            raise ValueError(f"{path}: {found} bytes, not the manifest's {expected}; delete {self.directory} "
                             "and prepare it again")
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if kind == "tokens" and hasattr(mmap, "MADV_RANDOM"):  # sequences are read here and there
            mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, dtype)

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compares this rank's share of the shards with their checksums. Raises: ValueError naming it."""
        for entry in self.manifest["shards"][self.split][rank::world_size]:
            for kind in ShardWriter.KINDS:
                path, expected = self._path(entry, kind), entry["sha256"][kind]
                if (found := checksum(path)) != expected:
                    raise ValueError(f"{path}: altered since it was written (sha256 {found[:12]}, the "
                                     f"manifest: {expected[:12]}); delete {self.directory}, prepare it again")

    def read(self, begin: int, end: int, separators: bool = False) -> np.ndarray:
        """Returns the ids at addresses [begin, end) of one shard; with `</s>` between documents if asked."""
        shard = self.shards[np.searchsorted(self._bases, begin, side="right") - 1]
        begin, end = begin - shard.base, end - shard.base
        ids = shard.tokens[begin:end].astype(np.int64)
        if separators:
            inside = slice(*np.searchsorted(shard.documents, [begin + 1, end]))
            ids = np.insert(ids, shard.documents[inside] - begin, EOS)
        return ids


def _read_manifest(directory: Path) -> dict:
    """Returns the manifest. Raises: ValueError where it leads out of the directory, or lacks an entry."""
    manifest, again = read_json(directory / "manifest.json"), "delete it and prepare again"
    if (version := manifest.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"{directory}: format version {version}, this program reads {FORMAT_VERSION}; "
                         f"{again}")
    try:
        if manifest["dtype"] != token_dtype(manifest["vocab_size"]):
            raise ValueError(f"dtype {manifest['dtype']} for {manifest['vocab_size']} units")
        for split in SPLITS:
            for entry in manifest["shards"][split]:
                if not re.fullmatch(rf"{split}-\d+", entry["name"]):
                    raise ValueError(f"a shard is named {entry['name']!r}")
                if not all(entry["counts"][kind] > 0 and entry["sha256"][kind] for kind in ShardWriter.KINDS):
                    raise ValueError(f"{entry['name']} has counts {entry['counts']}")
        manifest["tokenizer"], manifest["counts"]["train"]["tokens"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory}: manifest.json is damaged ({error!r}); {again}") from None
    return manifest


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------
# Random draws as pure functions
# ----------------------------------------------------------------------------------------------------------

# The key after the seed says what a draw is for, so that no two purposes share one.
ORDER_STREAM, MASK_STREAM, PAIR_STREAM, DROPOUT_STREAM = range(4)


def draw(*keys: int | np.ndarray) -> np.ndarray:
    """Returns 64 random bits for every combination of the keys, which broadcast: always the same ones.

    A hash in place of a generator: the finaliser of splitmix64 (Steele et al. 2014), once for each key.

    >>> draw(0, MASK_STREAM, np.arange(2)) >> np.uint64(56)
    array([148, 172], dtype=uint64)
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        for key in keys:
            state = state + np.asarray(key).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the numbers in [0, size) that stand at the places `index` of an epoch's random order.

    A Feistel network permutes the numbers below the next power of four; a result beyond `size` is permuted
    again until it falls inside (cycle walking). The order of a billion sequences costs no memory this way,
    and any place in it can be looked up alone.

    >>> sorted(permute(np.arange(5), 5, seed=1, epoch=0).tolist())
    [0, 1, 2, 3, 4]
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    result = np.asarray(index).astype(np.uint64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & low
        for round_ in range(6):
            left, right = right, left ^ (draw(seed, ORDER_STREAM, epoch, round_, right) & low)
        result[outside] = left << half | right
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


# ----------------------------------------------------------------------------------------------------------
# pack: sentences become sequences of at most T tokens, in the four formats of §4.2
# ----------------------------------------------------------------------------------------------------------

InputFormat = Literal["full-sentences", "doc-sentences", "segment-pair", "sentence-pair"]
PAIR_FORMATS = ("segment-pair", "sentence-pair")
STRETCH = 1 << 20  # tokens after which FULL-SENTENCES begins a fresh sequence, see `_stretches`
SLICE = 1 << 18  # sentences that are packed at once: what bounds the memory


def pack(sentences: np.ndarray, documents: np.ndarray, seq_len: int, input_format: InputFormat) -> np.ndarray:
    """Returns the tokens in each of a shard's sequences, or segments of pairs, (S,): end to end they are it.

    sentences, documents: where each ends, in tokens. A sequence is the longest run of whole sentences that
    fits. A sentence that does not fit alone is split.

    FULL-SENTENCES runs on across documents, at the cost of a separator. DOC-SENTENCES and the segments of
    SEGMENT-PAIR stop at a document's end. A segment of SENTENCE-PAIR is one sentence.
    CHOICE: BERT cuts a pair at a random place. Here each segment gets half of the room, so that segments can
    be exchanged between pairs, for NSP's negatives, without one being too long or a token being lost.

    >>> pack(np.array([3, 5, 9]), np.array([5, 9]), seq_len=8, input_format="full-sentences").tolist()
    [5, 4]
    """
    # <s> A </s></s> B </s>, or <s> A </s>
    room = (seq_len - 4) // 2 if input_format in PAIR_FORMATS else seq_len - 2
    if room < 1:
        raise ValueError(f"seq_len {seq_len} leaves no room for text beside the special tokens; try 128")
    cuts = _stretches(sentences, documents, room)
    pieces = np.searchsorted(sentences, cuts) + cuts // room  # up to each cut: no fewer than there will be
    begin, sizes = 0, []
    for stop in cuts[np.flatnonzero(np.diff(pieces // SLICE, append=-1))]:
        inside = slice(*np.searchsorted(sentences, [begin + 1, stop]))
        ends = np.append(sentences[inside], stop)
        inside = slice(*np.searchsorted(documents, [begin + 1, stop + 1]))
        for kind, rising in (("sentence", ends), ("document", documents[inside])):
            if (np.diff(rising, prepend=begin) <= 0).any():
                raise ValueError(f"{kind} ends from {begin} to {stop} do not rise; the shard is damaged")
        ends = _pack_slice(begin, ends, documents[inside], cuts, room, input_format)
        sizes.append(np.diff(ends, prepend=begin).astype(np.min_scalar_type(seq_len)))
        begin = stop
    return np.concatenate(sizes)


def _stretches(sentences: np.ndarray, documents: np.ndarray, room: int) -> np.ndarray:
    """Returns where a fresh sequence begins in any case, ascending, up to the end of the shard.

    What lies between two such places can be packed alone. That is the case after the documents that end
    within the same million tokens, which costs one short sequence in thousands; and within a document of
    millions of tokens at the end of a sentence, or of a piece of a sentence as long as that.
    """
    marks = np.arange(STRETCH, sentences[-1], STRETCH)
    before = np.searchsorted(documents, marks)  # the documents that end before each mark
    cuts = np.unique(np.concatenate([np.where(before, documents[before - 1], 0), sentences[-1:]]))
    cuts = cuts[cuts > 0]
    if cuts[-1] > sentences[-1]:
        raise ValueError(f"a document ends at {cuts[-1]}, the shard at {sentences[-1]}; the shard is damaged")
    place = np.searchsorted(cuts, marks)
    marks = marks[np.diff(cuts, prepend=0)[place] > 2 * STRETCH]  # in long documents
    if not len(marks):
        return cuts
    sentence = np.searchsorted(sentences, marks)
    begin = np.where(sentence, sentences[sentence - 1], 0)
    pieces = room * max(1, STRETCH // room)
    ends = np.minimum(sentences[sentence], begin - (begin - marks) // pieces * pieces)
    return np.unique(np.concatenate([cuts, ends]))


def _pack_slice(begin: int, sentences: np.ndarray, documents: np.ndarray, cuts: np.ndarray, room: int,
                input_format: InputFormat) -> np.ndarray:
    """Returns where the sequences end that the sentences from `begin` on make.

    A run that begins with sentence i may include j if reach[j], which counts a separator for each document
    before j, is within the limit. So for each sentence the one is looked up that the next run would begin
    with. Runs follow from each other, but independently in each stretch: all stretches advance together.
    """
    begins, ends = _split_long(begin, sentences, room)
    if input_format == "sentence-pair":
        return ends
    stretch, document = (np.searchsorted(places, begins, side="right") for places in (cuts, documents))
    separators = document
    if input_format != "full-sentences":
        stretch, separators = stretch + document, np.zeros_like(document)
    first = np.flatnonzero(np.diff(stretch, prepend=-1))
    last = np.append(first[1:], len(stretch))
    after = np.searchsorted(ends + separators, begins + separators + room, side="right")
    is_end = np.zeros(len(ends) + 1, dtype=bool)
    is_end[last] = True
    while len(first):
        first = after[first]
        inside = first < last
        first, last = first[inside], last[inside]
        is_end[first] = True
    return ends[is_end[1:]]


def _split_long(begin: int, sentences: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns begins and ends of the sentences, those longer than `room` cut into pieces of `room`."""
    begins = np.concatenate([[begin], sentences[:-1]])
    pieces = -(-(sentences - begins) // room)
    owner = np.repeat(np.arange(len(sentences)), pieces)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    piece_begins = begins[owner] + number * room
    return piece_begins, np.minimum(piece_begins + room, sentences[owner])


@dataclass(frozen=True)
class EpochSequences:
    """One epoch's sequences: ranges of tokens, or in the pair formats two of them each."""

    bounds: np.ndarray  # (N + 1,) range n is the tokens from bounds[n] to bounds[n + 1]
    first: np.ndarray | None = None  # (S,) the number of a pair's first range; None: sequence n is range n
    second: np.ndarray | None = None
    is_random: np.ndarray | None = None  # (S,) NSP's label: 0 = it follows the first, 1 = it does not

    def __len__(self) -> int:
        return len(self.bounds) - 1 if self.first is None else len(self.first)

    def segments(self, index: int | np.ndarray) -> list[np.ndarray]:
        """Returns [begin, end) of the sequences `index`, (..., 2): of their only segment, or of both."""
        ranges = [index] if self.first is None else [self.first[index], self.second[index]]
        return [np.stack([self.bounds[n], self.bounds[n + 1]], axis=-1) for n in ranges]

    def sizes(self, index: int | np.ndarray) -> np.ndarray:
        """Returns the text tokens of the sequences `index`: those that may be masked."""
        return sum(segment[..., 1] - segment[..., 0] for segment in self.segments(index))


class Sequences:
    """The sequences of a corpus in one input format; in the pair formats they are paired anew every epoch.

    Eight bytes for each are all that is kept in memory.
    """

    def __init__(self, corpus: Corpus, input_format: InputFormat, seq_len: int):
        self.corpus, self.input_format, self.seq_len = corpus, input_format, seq_len
        try:
            packed = [pack(s.sentences, s.documents, seq_len, input_format) for s in corpus.shards]
        except ValueError as error:
            raise ValueError(f"{corpus.directory}: {error}") from None
        self.bounds = np.concatenate([[0], *packed], dtype=np.int64)
        np.cumsum(self.bounds, out=self.bounds)
        self.is_pairs = input_format in PAIR_FORMATS
        self.special_tokens = 4 if self.is_pairs else 2  # of a sequence, separators between documents apart
        self._last_epoch = (0, 0), EpochSequences(self.bounds)  # of all epochs, but for the pair formats
        if self.is_pairs:
            self._last_epoch = None, None
            ends = np.concatenate([shard.documents + shard.base for shard in corpus.shards])
            if len(ends) < 2:
                raise ValueError(f"{corpus.directory}: NSP's negatives need two documents, the "
                                 f"{corpus.split} split has one; prepare more text")
            self.documents = np.searchsorted(ends, self.bounds[:-1], side="right")  # (N,) of each range

    def epoch(self, seed: int, epoch: int) -> EpochSequences:
        """Returns an epoch's sequences, a pure function of (seed, epoch)."""
        if self.is_pairs and self._last_epoch[0] != (seed, epoch):
            found = EpochSequences(self.bounds, *pair_up(self.documents, seed, epoch))
            self._last_epoch = (seed, epoch), found
        return self._last_epoch[1]

    def token_ids(self, sequences: EpochSequences, index: int) -> tuple[np.ndarray, int]:
        """Returns a sequence with its special tokens, and where its second segment begins (or would)."""
        first, *second = sequences.segments(index)
        ids = [[BOS], self.corpus.read(*first, separators=self.input_format == "full-sentences"), [EOS]]
        second_at = sum(map(len, ids))
        for segment in second:
            ids += [[EOS], self.corpus.read(*segment), [EOS]]
        return np.concatenate(ids), second_at


def pair_up(documents: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns an epoch's NSP pairs: first segments, second segments, and 1 where the second is a random one.

    Neighbours in a document make the positives. So many of these pairs, drawn anew each epoch, are broken up
    that both kinds are equally frequent (§2): their segments, and those without a neighbour, are shuffled and
    make the negatives, always from two documents. Every segment is fed once; one left without a partner is
    fed beside a repeated one. Where most documents have one segment, negatives prevail, as by BERT's own
    rule.

    documents: (N,) which document each segment is from, ascending, at least two different ones.
    """
    count = len(documents)
    place = np.arange(count) - np.searchsorted(documents, documents)  # of a segment in its document
    has_next = np.append(documents[1:] == documents[:-1], False)
    pairs = np.flatnonzero((place % 2 == 0) & has_next)
    singles = np.flatnonzero((place % 2 == 0) & ~has_next)
    broken = max(0, (len(pairs) - len(singles) // 2) // 2)  # then pairs - broken = singles / 2 + broken
    pairs = pairs[np.argsort(draw(seed, PAIR_STREAM, epoch, 0, pairs))]
    singles = np.concatenate([singles, pairs[:broken], pairs[:broken] + 1])
    pairs = np.sort(pairs[broken:])

    singles = singles[np.argsort(draw(seed, PAIR_STREAM, epoch, 1, singles))]
    half = len(singles) // 2
    first, second, alone = singles[:half], singles[half : 2 * half], list(singles[2 * half :])
    for i in np.flatnonzero(documents[first] == documents[second]):
        # Exchange second segments with the next pair where both pairs are of two documents then. (That is `i`
        # itself if an earlier exchange has mended it.) Look near first: a match is rarely far.
        for width in (min(half, 1000), half):
            others = (i + np.arange(width)) % half
            fits = documents[second[others]] != documents[first[i]]
            fits &= documents[first[others]] != documents[second[i]]
            if fits.any():
                other = others[fits.argmax()]
                second[[i, other]] = second[[other, i]]
                break
    unlike = documents[first] != documents[second]
    alone += [*first[~unlike], *second[~unlike]]
    # Beside a segment left alone: the first of the next document, or of the first one, behind the last.
    beside = np.searchsorted(documents, documents[alone], side="right") % count
    first = np.concatenate([pairs, first[unlike], np.array(alone, dtype=np.int64)])
    second = np.concatenate([pairs + 1, second[unlike], beside])
    return first, second, (np.arange(len(first)) >= len(pairs)).astype(np.int64)


# ----------------------------------------------------------------------------------------------------------
# Masking (§2, §4.1)
# ----------------------------------------------------------------------------------------------------------

IGNORED = -100  # the label of a position that is not predicted
STATIC_MASKS = 10  # §4.1: for static masking the data is duplicated ten times


def predictions_of(sizes: np.ndarray, mlm_probability: float) -> np.ndarray:
    """Returns how many of a sequence's text tokens are predicted: the rounded share, not a coin for each."""
    return np.rint(mlm_probability * np.asarray(sizes)).astype(np.int64)


def mask_tokens(
    input_ids: np.ndarray,
    sequence: np.ndarray,
    epoch: int | np.ndarray,
    *,
    seed: int,
    vocab_size: int,
    masking: Literal["dynamic", "static"] = "dynamic",
    mlm_probability: float = 0.15,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns input_ids with masks, and labels, both (B, T): pure in (seed, epoch, sequence, position).

    Of the n text tokens in a row exactly round(0.15 n) are predicted (§2): 80 % of these become `<mask>`, 10
    % stay, 10 % become a random token. Special tokens are neither chosen nor drawn. labels hold the original
    id where a token is predicted and -100 elsewhere.

    input_ids: (B, T), padded. sequence, epoch: (B,) which sequence a row is and how often it was fed before.

    >>> ids = np.array([[0, 10, 11, 12, 13, 14, 15, 16, 2, 1]])
    >>> masked, labels = mask_tokens(ids, np.array([3]), 0, seed=0, vocab_size=50)
    >>> masked.tolist(), np.flatnonzero(labels != -100).tolist()
    ([[0, 10, 49, 12, 13, 14, 15, 16, 2, 1]], [2])
    """
    if masking == "static":
        epoch = np.asarray(epoch) % STATIC_MASKS  # all that sets the two apart (§4.1, Table 1)
    mask_id, first_unit = vocab_size - 1, UNK + 1
    positions = np.arange(input_ids.shape[1])
    keys = np.asarray(sequence)[:, None], np.broadcast_to(epoch, len(input_ids))[:, None]
    bits = draw(seed, MASK_STREAM, *keys, positions)  # (B, T)

    # The text tokens with the lowest draws are chosen. The position in the low bits leaves no ties.
    maskable = (input_ids >= first_unit) & (input_ids != mask_id)
    count = predictions_of(maskable.sum(1), mlm_probability)
    priority = ((bits >> np.uint64(20)) << np.uint64(20)) | positions.astype(np.uint64)
    priority = np.where(maskable, priority, np.uint64(2**64 - 1))
    highest = np.take_along_axis(np.sort(priority, axis=1), np.maximum(count - 1, 0)[:, None], axis=1)
    chosen = (priority <= highest) & (count > 0)[:, None]
    labels = np.where(chosen, input_ids, IGNORED)

    # What becomes of a chosen token: the upper half of a second draw decides; the lower half has the token.
    fate = draw(bits[chosen])  # (M,)
    share = (fate >> np.uint64(32)) / 2**32
    random_token = (fate & np.uint64(2**32 - 1)) % np.uint64(mask_id - first_unit) + np.uint64(first_unit)
    original = input_ids[chosen]
    masked = input_ids.copy()
    other = np.where(share < 0.9, random_token.astype(np.int64), original)
    masked[chosen] = np.where(share < 0.8, mask_id, other)
    return masked, labels


# ----------------------------------------------------------------------------------------------------------
# Order and batches
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads. Shapes are constant in FULL-SENTENCES and vary in the other formats."""

    input_ids: np.ndarray  # (B, T) int64
    attention_mask: np.ndarray  # (B, T) bool, True = real token
    positions: np.ndarray  # (M,) int64, where predictions are made, as b * T + t
    labels: np.ndarray  # (M,) int64, the tokens that stood there; -100 fills up to a constant M
    token_type_ids: np.ndarray | None  # (B, T) int64, 1 in the second segment; None without pairs
    next_sentence_labels: np.ndarray | None  # (B,) int64, 1 = random; None without pairs
    num_tokens: int  # real tokens, padding apart


class Step(NamedTuple):
    """A rank's share of an optimiser step, and what the losses of the whole step are divided by."""

    epoch: float  # passes over the data before this step
    batches: list[Batch]  # this rank's micro-batches
    num_predictions: int  # of all ranks and micro-batches: each rank can tell from the order, none has to ask
    num_sequences: int


class Batches:
    """The order of the data: `step(n)` is a pure function of (seed, n, rank), whatever was asked before.

    An epoch feeds every sequence once, in a new order. FULL-SENTENCES takes `batch_size` sequences a step and
    runs on over the end of an epoch. The other formats have shorter sequences, so a step takes as many as
    hold the tokens of `batch_size` full ones (§4.2), sorted by length to pad little.

    batch_size: sequences a step, over all ranks. Raises: ValueError where it does not divide.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        masking: Literal["dynamic", "static"] = "dynamic",
        mlm_probability: float = 0.15,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size % (micro_batch_size * world_size):
            fitting = [n for n in range(1, micro_batch_size) if batch_size % (n * world_size) == 0]
            product = micro_batch_size * world_size
            advice = f"micro_batch_size {fitting[-1]}" if fitting else f"batch_size {product}"
            raise ValueError(f"micro_batch_size {micro_batch_size} x world_size {world_size} = {product} "
                             f"does not divide batch_size {batch_size}; try {advice}")
        self.sequences, self.batch_size, self.micro_batch_size = sequences, batch_size, micro_batch_size
        self.seed, self.masking, self.mlm_probability = seed, masking, mlm_probability
        self.rank, self.world_size = rank, world_size
        self.num_micro_batches = batch_size // (micro_batch_size * world_size)
        self.fixed = sequences.input_format == "full-sentences"
        self._last_order: tuple[int, np.ndarray, np.ndarray] | None = None

    def _sequences(self, epoch: int) -> EpochSequences:
        """Returns an epoch's sequences; with static masking the pairs recur with the masks."""
        return self.sequences.epoch(self.seed, epoch % STATIC_MASKS if self.masking == "static" else epoch)

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """In the formats whose steps vary. Rounded down, so that none is smaller than one sequence can be."""
        tokens = self._lengths(0).sum()
        return max(1, int(tokens) // (self.batch_size * self.sequences.seq_len))

    def _lengths(self, epoch: int) -> np.ndarray:
        """Returns the tokens of each of an epoch's sequences, special ones included, (S,)."""
        sequences = self._sequences(epoch)
        return sequences.sizes(np.arange(len(sequences))) + self.sequences.special_tokens

    def step(self, step: int) -> Step:
        """Returns this rank's micro-batches of a step."""
        if self.fixed:
            size = len(self._sequences(0))
            epochs, places = np.divmod(step * self.batch_size + np.arange(self.batch_size), size)
            index = [permute(places[epochs == e], size, self.seed, int(e)) for e in np.unique(epochs)]
            index, passes = np.concatenate(index), step * self.batch_size / size
        else:
            epoch, number = divmod(step, self.steps_per_epoch)
            order, bounds = self._variable_order(epoch)
            index, passes = order[bounds[number] : bounds[number + 1]], step / self.steps_per_epoch
            index = index[np.argsort(self._sequences(epoch).sizes(index), kind="stable")]
            epochs = np.full(len(index), epoch)
        sizes = self._sequences(int(epochs[0])).sizes(index)  # a step over two epochs has no pairs
        groups = self._groups(sizes)[self.rank :: self.world_size]
        batches = [self.assemble(index[group], epochs[group]) for group in groups]
        return Step(passes, batches, int(predictions_of(sizes, self.mlm_probability).sum()), len(index))

    def _variable_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns an epoch's order and where in it each step begins, for steps of equal token count."""
        if self._last_order is None or self._last_order[0] != epoch:
            lengths = self._lengths(epoch)
            order = permute(np.arange(len(lengths)), len(lengths), self.seed, epoch)
            ends = np.cumsum(lengths[order])
            cuts = np.linspace(0, ends[-1], self.steps_per_epoch + 1)[1:-1]
            bounds = np.concatenate([[0], np.searchsorted(ends, cuts, side="right"), [len(order)]])
            self._last_order = epoch, order, bounds
        return self._last_order[1:]

    def _groups(self, sizes: np.ndarray) -> list[np.ndarray]:
        """Divides a step's rows into a group for each micro-batch of each rank, with about equal tokens.

        Ranks take groups in turn, so that in the sorted formats all ranks have similar rows at the same time.
        """
        number = self.num_micro_batches * self.world_size
        if self.fixed:
            return np.split(np.arange(len(sizes)), number)
        ends = np.cumsum(sizes)
        cuts = np.arange(1, number) * (ends[-1] / number)
        return np.split(np.arange(len(sizes)), np.searchsorted(ends, cuts))

    def assemble(self, index: np.ndarray, epochs: np.ndarray) -> Batch:
        """Reads, pads and masks the sequences `index`, each as it is in its epoch."""
        chosen = [self._sequences(int(epoch)) for epoch in epochs]
        rows = [self.sequences.token_ids(sequences, i) for sequences, i in zip(chosen, index)]
        lengths = np.array([len(ids) for ids, _ in rows], dtype=np.int64)
        # With fewer sequences than micro-batches one may be empty: a row of padding, which predicts nothing.
        width = self.sequences.seq_len if self.fixed else lengths.max(initial=1)
        input_ids = np.full((max(len(rows), 1), width), PAD)
        types = np.zeros_like(input_ids) if self.sequences.is_pairs else None
        next_labels = np.full(len(input_ids), IGNORED) if self.sequences.is_pairs else None
        for row, (ids, second_at) in enumerate(rows):
            input_ids[row, : len(ids)] = ids
            if self.sequences.is_pairs:
                types[row, second_at : len(ids)] = 1
                next_labels[row] = chosen[row].is_random[index[row]]
        if (highest := input_ids.max()) >= self.sequences.corpus.vocab_size:
            raise ValueError(f"{self.sequences.corpus.directory}: id {highest} in a vocabulary of "
                             f"{self.sequences.corpus.vocab_size} units: a damaged shard; prepare again")
        index, epochs = np.resize(index, len(input_ids)), np.resize(epochs, len(input_ids))
        masked, labels = mask_tokens(
            input_ids, index, epochs, seed=self.seed, vocab_size=self.sequences.corpus.vocab_size,
            masking=self.masking, mlm_probability=self.mlm_probability,
        )
        positions = np.flatnonzero(labels != IGNORED)
        labels = labels.reshape(-1)[positions]
        if self.fixed:  # fill up to the number that full sequences would have: compilers and caches like it
            missing = len(input_ids) * int(predictions_of(width - 2, self.mlm_probability)) - len(positions)
            positions = np.pad(positions, (0, missing))
            labels = np.pad(labels, (0, missing), constant_values=IGNORED)
        return Batch(masked, input_ids != PAD, positions, labels, types, next_labels, int(lengths.sum()))

    def held_out(self, limit: int) -> Iterator[Batch]:
        """Yields this rank's share of the first `limit` sequences of a fixed order, once: for evaluation."""
        size = len(self._sequences(0))
        order = permute(np.arange(min(limit, size)), size, self.seed, epoch=0)
        batches = [order[i : i + self.micro_batch_size] for i in range(0, len(order), self.micro_batch_size)]
        for index in batches[self.rank :: self.world_size]:
            yield self.assemble(index, np.zeros_like(index))


def prefetch(make: Callable[[int], Any], steps: range, ahead: int = 4) -> Iterator:
    """Yields make(step) for every step, made by a thread some `ahead` steps early; passes its errors on."""
    ready: queue.Queue = queue.Queue(ahead)
    stop = threading.Event()

    def put(*item: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            for step in steps:
                put(make(step), None)
                if stop.is_set():
                    return
        except BaseException as error:  # whatever it is, the reader raises it
            put(None, error)

    threading.Thread(target=work, daemon=True).start()
    try:
        for _ in steps:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Adds a --flag for each field of a dataclass made with `flag`; flags not given stay absent."""
    types = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = types[field.name]
        if type(None) in typing.get_args(kind):
            kind = typing.get_args(kind)[0]  # T | None: the flag takes a T
        default = "none" if field.default in (None, ()) else field.default
        default = " ".join(map(str, default)) if isinstance(default, tuple) else default
        arguments = {"help": f"{field.metadata['help']} (default: {default})".replace("%", "%%")}
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
            arguments |= {"nargs": "+", "type": kind, "metavar": {int: "N", float: "X", str: "PATH"}[kind]}
        elif typing.get_origin(kind) is Literal:
            arguments["choices"] = typing.get_args(kind)
        else:
            arguments |= {"type": kind, "metavar": {int: "N", float: "X", str: "DIR"}[kind]}
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **arguments)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="data.py", description="Prepare text for pretraining.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare", help="text to tokenizer and token shards", allow_abbrev=False)
    add_flags(command, PrepareConfig)
    config = PrepareConfig(**vars(parser.parse_args(argv)))
    try:
        prepare(config, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error}; once that is mended, the same command goes on with {config.out}")


if __name__ == "__main__":
    main()
