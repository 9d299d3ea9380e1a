"""From text to masked batches: everything RoBERTa reads passes through this file.

One sentence's journey, each step a section of Part I:

    >>> text = "He was low. She was lower. He was the lowest of the low, and she was not."
    >>> tokenizer = train_bpe([text], vocab_size=268)     # five specials, 256 bytes, seven merges to learn:
    >>> tokenizer.merges                                  # "Ġ" is how GPT-2 writes the space before a word
    [('a', 's'), ('h', 'e'), ('l', 'o'), ('w', 'as'), ('Ġ', 'lo'), ('Ġ', 'was'), ('Ġlo', 'w')]
    >>> split_sentences(text)
    ['He was low.', ' She was lower.', ' He was the lowest of the low, and she was not.']
    >>> ids = tokenizer.encode(" She was lower.")
    >>> [tokenizer.decode([i]) for i in ids]
    [' ', 'S', 'he', ' was', ' low', 'e', 'r', '.']
    >>> row = join(ids)                                   # <s> ... </s>
    >>> row.tolist()
    [0, 224, 54, 261, 265, 266, 72, 85, 17, 2]
    >>> masked, labels = mask_tokens(row[None], sequence=[0], epoch=[5], seed=1, vocab_size=268)
    >>> masked.tolist()                                   # 267 is <mask>: one token is hidden ...
    [[0, 224, 54, 261, 267, 266, 72, 85, 17, 2]]
    >>> labels.tolist()                                   # ... and the model is to say that it was " was"
    [[-100, -100, -100, -100, 265, -100, -100, -100, -100, -100]]

Two ideas carry the file. Text becomes numbers once, in `prepare`, and is memory-mapped from then on. And
every random choice is a pure function of integers, `draw`, never of how far some generator has run: so
resuming is exact, any number of machines sees the same data, and the static masks of §4.1 are dynamic ones
with `epoch % 10`.

    python data.py prepare --corpus books/ wiki.jsonl.xz --out prepared
    torchrun train.py --data prepared

Part I is what the paper says; Part II is files, processes, errors and the command line. What Part I needs of
it: `Corpus` holds a text's token ids and says where its sentences and documents end; `in_order` calls a
function in several processes; `read_tokenizer`, `write_tokenizer` and `rank_tokens` know other programs'
files. `DIFFERS:` tags a departure from the paper, `CHOICE:` what it leaves open. Legend: B sequences of a
micro-batch, T tokens of a sequence, M predicted places, V vocabulary, N sequences.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import contextlib
import dataclasses
import fcntl
import functools
import gc
import gzip
import hashlib
import heapq
import itertools
import json
import lzma
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import regex  # Unicode classes for the pre-tokenisation; tiktoken brings it along
import tiktoken

# ----------------------------------------------------------------------------------------------------------
# Part I: what the paper says
# ----------------------------------------------------------------------------------------------------------

# ----------------------------------------------------------------------------------------------------------
# Byte-level BPE: how the units are learned (§4.4, GPT-2 §2.2)
# ----------------------------------------------------------------------------------------------------------

BOS, PAD, EOS, UNK = range(4)  # <s>, <pad>, </s>, <unk>: the order of fairseq's dictionary
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# GPT-2 first cuts text into pre-tokens: contractions ('s, 'll), then words, numbers and runs of punctuation,
# each with the one space before it. Of other white space the last character is left to the word behind it, as
# in "a   dog": "a", two spaces, " dog". No merge crosses a pre-token's border, so "dog." and "dog!" share
# their dog. (The ++ is a possessive +: it matches the same text, but never tries shorter matches.)
PRETOKEN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# The smallest units are the 256 bytes, so any text has ids and there is no unknown word. Files spell each
# byte as a visible character: printable Latin-1 as itself, the other 68 from U+0100 on (the space becomes
# "Ġ"). BYTE_ORDER is the order of these characters, in which GPT-2 and Hugging Face number the bytes.
BYTE_ORDER = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_ORDER += [byte for byte in range(256) if byte not in BYTE_ORDER]
BYTE_CHARS = [*map(chr, BYTE_ORDER[:188]), *map(chr, range(0x100, 0x100 + 68))]
BYTE_TO_CHAR, CHAR_TO_BYTE = dict(zip(BYTE_ORDER, BYTE_CHARS)), dict(zip(BYTE_CHARS, BYTE_ORDER))


def spell(token: bytes) -> str:
    """Returns a token as vocab.json and merges.txt write it.

    >>> spell(" é".encode())
    'ĠÃ©'
    """
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def count_pretokens(documents: Iterable[str]) -> Counter[str]:
    """Returns how often each pre-token occurs. BPE needs no more: it never looks across a pre-token's border.

    >>> count_pretokens(["a dog, a dog"])
    Counter({' dog': 2, 'a': 1, ',': 1, ' a': 1})
    """
    pieces, counts = Counter(), Counter()
    pretokens = regex.compile(PRETOKEN).findall
    for document in documents:
        # The Unicode pattern is slow, and most words occur often. In front of every space that leads to text
        # there is a border, so cutting there first, by faster means, is safe. (str.split is the fastest,
        # where no space follows another.) Then the pattern has to see each different piece only once.
        has_runs_of_spaces = re.search(r" (?:\s|\Z)", document)
        start, *others = re.split(r" (?=\S)", document) if has_runs_of_spaces else document.split(" ")
        counts.update(pretokens(start))
        pieces.update(others)
    # Pieces of equal count are joined again, with the spaces they lost, so the pattern runs once per count.
    for count, equally_frequent in itertools.groupby(sorted(pieces, key=pieces.get), pieces.get):
        for pretoken, times in Counter(pretokens(" " + " ".join(equally_frequent))).items():
            counts[pretoken] += times * count
    return counts


def train_bpe(documents: Iterable[str], vocab_size: int, workers: int = 1) -> Tokenizer:
    """Learns byte-level BPE: five specials, 256 bytes, and as many merges as fill `vocab_size`.

    BPE (Sennrich et al. 2016, §3.2) makes the most frequent pair of neighbours one unit, and does so again
    and again. The whole idea, naively, on three words seen five, two and six times:

    >>> words = {("l", "o", "w"): 5, ("l", "o", "w", "e", "r"): 2, ("n", "e", "w"): 6}
    >>> for _ in range(3):
    ...     pairs = Counter()
    ...     for word, count in words.items():
    ...         for pair in zip(word, word[1:]):
    ...             pairs[pair] += count
    ...     best = max(pairs, key=pairs.get)
    ...     print(*best, "seen", pairs[best], "times")
    ...     merged = {}
    ...     for word, count in words.items():
    ...         new, place = [], 0
    ...         while place < len(word):
    ...             size = 2 if word[place : place + 2] == best else 1
    ...             new.append("".join(word[place : place + size]))
    ...             place += size
    ...         merged[tuple(new)] = count
    ...     words = merged
    l o seen 7 times
    lo w seen 7 times
    n e seen 6 times

    Pre-tokens are counted in `workers` processes. A pair that occurs only once is not merged, so a small
    corpus yields fewer units. Raises: ValueError where `vocab_size` can't hold the bytes.
    """
    # All that the merges depend on is how often each pre-token occurs, so that is counted first, in parallel.
    documents, counts = iter(documents), Counter()
    batches = iter(lambda: list(itertools.islice(documents, 1000)), [])  # a thousand at once, till [] comes
    for part in in_order(count_pretokens, batches, workers):
        counts.update(part)
    return learn_merges(counts, vocab_size)


def learn_merges(counts: Counter[str], vocab_size: int) -> Tokenizer:
    """The same, fast: counts of pairs are kept, and corrected only in the words that hold the merged pair.

    Merges, also where counts tie, equal those of Hugging Face's trainer. (Of equal counts the naive loop
    above takes the pair it saw first, this one the lower unit numbers.)
    """
    if vocab_size < len(SPECIAL_TOKENS) + 256:
        raise ValueError(f"vocab_size {vocab_size} is too small: specials and bytes make 261; give more")
    # The first 256 units are the bytes; every merge adds one, with the next number.
    units = list(BYTE_CHARS)
    number_of = {unit: number for number, unit in enumerate(units)}

    # A word is kept as a string in which chr(n) stands for unit number n: then finding a pair, and putting a
    # unit in its place, are string operations, which run in C. Such a word is for the machine, not for
    # people.
    as_numbers = {byte: number for number, byte in enumerate(BYTE_ORDER)}
    words = [pretoken.encode("utf-8").decode("latin-1").translate(as_numbers) for pretoken in counts]
    frequency, merges = list(counts.values()), []
    gc.disable()  # the cycle collector would walk through millions of new objects, again and again
    pair_count, words_of = count_pairs(words, frequency)

    # A heap has the most frequent pair on top. Merges change the counts of pairs inside it, which a heap
    # can't follow: a pair that comes up with an outdated count is put back with its true one. Ties go to
    # the pair of lower unit numbers, as strings compare by their characters' numbers.
    heap = [(-pair_count[pair], pair, where) for pair, where in words_of.items()]
    heapq.heapify(heap)
    while heap and len(units) < vocab_size - len(SPECIAL_TOKENS):
        negative_count, pair, where = heapq.heappop(heap)
        if -negative_count != pair_count[pair]:
            heapq.heappush(heap, (-pair_count[pair], pair, where))
            continue
        if -negative_count < 2:
            break  # the most frequent pair occurs once, so no other occurs twice

        # This pair is the next merge.
        left, right = (units[ord(character)] for character in pair)
        merges.append((left, right))
        if left + right not in number_of:  # two merges can make the same unit, as ab + c and a + bc do
            number_of[left + right] = len(units)
            units.append(left + right)
        arose = merge_pair(pair, chr(number_of[left + right]), where, words, frequency, pair_count)
        for new_pair, seen_in in arose.items():
            heapq.heappush(heap, (-pair_count[new_pair], new_pair, seen_in))
    gc.enable()
    tokens = [*SPECIAL_TOKENS[:4], *units, "<mask>"]
    return Tokenizer({token: number for number, token in enumerate(tokens)}, merges)


def count_pairs(words: list[str], frequency: list[int]) -> tuple[defaultdict[str, int], dict[str, list[int]]]:
    """Returns how often each pair of neighbours occurs, and in which words."""
    pair_count, words_of = defaultdict(int), defaultdict(list)
    for index, word in enumerate(words):
        # A pair is a string of two characters. A word that occurs ten times counts ten times, and is read
        # once.
        for pair in map(str.__add__, word, word[1:]):
            pair_count[pair] += frequency[index]
            words_of[pair].append(index)
    return pair_count, words_of


def merge_pair(pair: str, unit: str, where: list[int], words: list[str], frequency: list[int],
               pair_count: defaultdict[str, int]) -> dict[str, list[int]]:
    """Makes `pair` one unit in the words `where`; returns the pairs that arose, each with its words.

    `pair_count` is kept true, but for `pair` itself, which no word holds any more. Two words, and what
    changes:

    >>> words, counts = ["then", "hehe"], defaultdict(int)
    >>> merge_pair("he", "H", [0, 1], words, [1, 1], counts)
    {'tH': [0], 'HH': [1], 'Hn': [0], 'Hh': [1]}
    >>> words, dict(counts)
    (['tHn', 'HH'], {'th': -1, 'tH': 1, 'Hh': 0, 'HH': 1, 'en': -1, 'Hn': 1, 'eh': -1})
    """
    first, second = pair
    # With "h e" merged in "t h e n", the pairs (t, h) and (e, n) go, (t, he) and (he, n) come. So what
    # matters is the neighbour on either side: collected here with the words in which it stands there.
    words_left, words_right = defaultdict(list), defaultdict(list)
    # A word of a million "a" is listed a million times in a row for the pair "aa": groupby gives it once.
    for index, _ in itertools.groupby(where):
        # (Where an earlier merge took the pair out of this word, it is a single piece, and nothing happens.)
        pieces = words[index].split(pair)
        words[index] = unit.join(pieces)
        # From left to right. Of two merges in a row, "h e h e", the first still has an "h" to its right when
        # its neighbours change, and the second has the new unit to its left.
        left = pieces[0]
        for number, right in enumerate(pieces[1:], 2):
            is_end = number == len(pieces) and not right
            if left:
                words_left[left[-1]].append(index)
            if not is_end:
                words_right[right[0] if right else first].append(index)
            left = right or unit
    # For each neighbour: the pair that goes, the pair that comes; how often: a word's frequency each time.
    changes = [(neighbour + first, neighbour + unit, seen_in) for neighbour, seen_in in words_left.items()]
    changes += [(second + neighbour, unit + neighbour, seen_in) for neighbour, seen_in in words_right.items()]
    arose: dict[str, list[int]] = {}
    for old_pair, new_pair, seen_in in changes:
        times = sum(map(frequency.__getitem__, seen_in))
        pair_count[old_pair] -= times
        pair_count[new_pair] += times
        arose[new_pair] = seen_in
    return arose


# ----------------------------------------------------------------------------------------------------------
# The tokenizer: text to ids and back (§4.4)
# ----------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Byte-level BPE: any string to ids and back, exactly; no unknown token, no normalisation (§4.4).

    (But units that fairseq's dictionary lacks have the id of `<unk>`, as they have there.)

    tiktoken applies the merges. It knows a token by its rank, the order in which the merges were learned. The
    published RoBERTa numbers tokens by frequency instead, so one table turns whole arrays of ranks into ids:
    a GPT-2 id is not a RoBERTa id.

    vocab: token, spelled as by `spell`, to id, with the specials. merges: pairs so spelled, in order.
    Raises: ValueError where the specials are not at RoBERTa's places, or vocabulary and merges disagree.
    """

    def __init__(self, vocab: dict[str, int], merges: Iterable[tuple[str, str]]):
        self.vocab, self.merges = dict(vocab), [tuple(pair) for pair in merges]
        # In the order of their ranks: the 256 bytes first, then what each merge makes.
        ranks = rank_tokens(self.vocab, self.merges)
        self.vocab_size, self.mask_id = len(set(vocab.values())), vocab["<mask>"]
        self.rank_to_id = np.array([vocab[spell(token)] for token in ranks], dtype=np.int64)
        self.rank_to_length = np.array([len(token) for token in ranks])  # in bytes
        # For decoding. Ids that no rank leads to, such as the specials, decode to their names.
        self.id_to_bytes = {index: name.encode("utf-8") for name, index in vocab.items()}
        self.id_to_bytes |= {vocab[spell(token)]: token for token in ranks} | {UNK: b"<unk>"}
        # Tokenizers that share a fingerprint give the same ids.
        self.fingerprint = fingerprint_of([sorted(vocab.items(), key=lambda item: item[1]), self.merges])
        # tiktoken is told of no special tokens: a document with the characters "</s>" means these characters.
        self._bpe = tiktoken.Encoding("roberta", pat_str=PRETOKEN, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without `<s>` and `</s>`. Raises: ValueError for lone surrogates."""
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Returns the same as an int64 array, made without a Python object for each token."""
        return self.encode_with_lengths(text)[0]

    def encode_with_lengths(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of a text, and how many of its bytes each is made of."""
        try:
            ranks = self._bpe.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} is {text[error.start]!a}, a lone surrogate") from None
        except ValueError:
            # tiktoken's regex engine overflows on white space of a million characters that leads to text. The
            # last such character begins a pre-token, so the text may be cut before it.
            pieces = re.split(r"(?=\s\S)(?<=\s{1000})", text)
            ranks = np.concatenate([self._bpe.encode_to_numpy(p, disallowed_special=()) for p in pieces])
        return self.rank_to_id[ranks], self.rank_to_length[ranks]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of a text, and (T, 2) the characters each token is made of: text[begin:end].

        SQuAD needs them: its answers are places in a text. The space before a word is part of its token.
        """
        ids, lengths = self.encode_with_lengths(text)
        ends = np.cumsum(lengths)  # in bytes
        begins = ends - lengths
        # In UTF-8 a byte 10xxxxxx goes on with the character before it: counting the others counts
        # characters. A token may be part of a character of several bytes; then it stands for the whole of it.
        data = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        character_of_byte = np.cumsum((data & 0xC0) != 0x80) - 1
        return ids, np.stack([character_of_byte[begins], character_of_byte[ends - 1] + 1], axis=1)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, exactly what was encoded; specials by name, invalid UTF-8 as U+FFFD."""
        # Bytes are joined before they are decoded: a token may end in the midst of a character.
        return b"".join(self.id_to_bytes[index] for index in ids).decode("utf-8", errors="replace")

    def save_pretrained(self, directory: str | Path, model_max_length: int | None = None) -> None:
        """Writes vocab.json and merges.txt, GPT-2's two files, and what Hugging Face's programs want.

        model_max_length: the length at which their tokenizer truncates, in tokens with `<s>` and `</s>`.
        """
        write_tokenizer(self, Path(directory), model_max_length)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Tokenizer:
        """Reads vocab.json and merges.txt, a tokenizer.json, or fairseq's encoder.json, vocab.bpe, dict.txt.

        They may also lie where a run directory or a prepared directory has them.
        Raises: ValueError where there are none, or what they describe is no tokenizer of RoBERTa's kind.
        """
        return read_tokenizer(Path(directory))


def join(first: Sequence[int] | np.ndarray, second: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """Returns a model's input, `<s> first </s>` or `<s> first </s></s> second </s>`, as int64.

    >>> join([10, 11]).tolist(), join([10, 11], [12]).tolist()
    ([0, 10, 11, 2], [0, 10, 11, 2, 2, 12, 2])
    """
    # Two separators between segments, where BERT has one: what was `[CLS] A [SEP] B [SEP]`.
    parts = [[BOS], first, [EOS]]
    if second is not None:
        parts += [[EOS], second, [EOS]]
    return np.concatenate(parts).astype(np.int64)


# ----------------------------------------------------------------------------------------------------------
# Sentences, and how they fill a sequence (§4.2)
# ----------------------------------------------------------------------------------------------------------

# Where does a sentence end? After . ! or ? with any closing quotes and brackets, if white space follows, and
# then anything but an ASCII lowercase letter. After a full stop of another script, of which Unicode has a
# list, also where the next word follows at once, as in Chinese. And at a blank line (unless a stop stands
# right before it), in front of the last of its white space. "|" marks the cuts, and "/" a line's end:
#
#     He left. Then it rained.       He left.| Then it rained.
#     "Why?" (Really!) So            "Why?"| (Really!)| So
#     i.e. at 3.5 p.m. it rained     i.e. at 3.5 p.m. it rained
#     他走了。下雨了。 वह गया। बारिश      他走了。|下雨了。| वह गया।| बारिश
#     A heading//Its text            A heading/|/Its text
#
# All these places are borders of pre-tokens. White space is SPACE, the tokenizer's: Python's \s has four
# characters more. Every match begins with a character of one class, which the regex engine finds fast; then
# come the three cases, by what this character was: . ! or ?, another stop, the end of a line.
SPACE = r"[^\S\x1c-\x1f]"
STOPS = "".join(regex.findall(r"\p{Sentence_Terminal}", "".join(map(chr, range(0x80, 0x10000)))))
CLOSERS = r"""["'”’)\]»›」』】〉》）｣]*"""
AFTER_STOP = rf"(?<=[.!?]){CLOSERS}(?={SPACE}+[^\sa-z])"
AFTER_OTHER_STOP = rf"(?<=[{STOPS}]){CLOSERS}(?={SPACE}|[^\W_])"
AFTER_LINE = rf"(?<=[^.!?{STOPS}]\n)[^\S\n\x1c-\x1f]*(?=\n){SPACE}*(?={SPACE}\S)"
SENTENCE_END = re.compile(rf"[.!?\n{STOPS}](?:{AFTER_STOP}|{AFTER_OTHER_STOP}|{AFTER_LINE})")
LONG_STRETCH, SHORT_PIECE = 600, 64  # bytes

InputFormat = Literal["full-sentences", "doc-sentences", "segment-pair", "sentence-pair"]
PAIR_FORMATS = ("segment-pair", "sentence-pair")
WINDOW = 1 << 18  # sentences that are packed at once: what bounds the memory


def split_sentences(document: str) -> list[str]:
    """Returns the document's sentences. Joined they are the document; each boundary is a pre-token's, too.

    CHOICE: the paper packs "full sentences" without saying how they are found. This rule also cuts after
    "Mr.", which costs a boundary and no token. Thai marks no ends, and many a table has none: what is longer
    than any usual sentence is cut into short pieces, for in large ones it would leave sequences half empty.

    >>> split_sentences('He left. "Why?" she asked. At 3.5 it rained.')
    ['He left.', ' "Why?" she asked.', ' At 3.5 it rained.']
    >>> split_sentences("他走了。下雨了。"), len(split_sentences("ten words " * 100))
    (['他走了。', '下雨了。'], 16)
    """
    # At the end, blank lines lead to no text. (The pattern would look for some from each of them: a million
    # would take hours.)
    matches = SENTENCE_END.finditer(document, 0, len(document.rstrip()))
    bounds = [0, *(match.end() for match in matches), len(document)]
    sentences = []
    for begin, end in zip(bounds, bounds[1:]):
        stretch = document[begin:end]
        if 4 * len(stretch) > LONG_STRETCH and len(stretch.encode()) > LONG_STRETCH:
            sentences += cut_stretch(stretch)
        elif stretch:
            sentences.append(stretch)
    return sentences


def cut_stretch(stretch: str) -> list[str]:
    """Returns a text in pieces of about SHORT_PIECE bytes, cut at borders of pre-tokens."""
    pieces = [""]
    for pretoken in regex.findall(PRETOKEN, stretch):
        if len(pieces[-1].encode()) >= SHORT_PIECE:
            pieces.append("")
        pieces[-1] += pretoken
    return pieces


def room_for_text(seq_len: int, input_format: InputFormat) -> int:
    """Returns how many text tokens fit beside the special ones: in a sequence, or in each segment of a pair.

    CHOICE: BERT cuts a pair at a random place. Here each of the two gets half of the room, so that segments
    can be exchanged between pairs, for NSP's negatives, without one being too long.
    """
    # Special tokens take two places of a sequence, four of a pair.
    room = (seq_len - 4) // 2 if input_format in PAIR_FORMATS else seq_len - 2
    if room < 1:
        raise ValueError(f"seq_len {seq_len} leaves no room for text beside the special tokens; try 128")
    return room


def pack(sentences: np.ndarray, documents: np.ndarray, seq_len: int, input_format: InputFormat) -> np.ndarray:
    """Returns (N + 1,) where each sequence (or segment of a pair) of a corpus begins, and the last ends.

    sentences, documents: where each ends, in tokens of the corpus laid end to end. A sequence is the longest
    run of whole sentences that fits; a sentence that does not fit alone is cut. FULL-SENTENCES runs on across
    documents, at the cost of a separator. DOC-SENTENCES and the segments of SEGMENT-PAIR stop where a
    document does. A segment of SENTENCE-PAIR is one sentence.

    Ten words in two documents of two sentences each, "a b c | d" and "e f | g h i j", for sequences of 12:

    >>> sentences, documents = np.array([3, 4, 6, 10]), np.array([4, 10])
    >>> for input_format in get_args(InputFormat):
    ...     print(f"{input_format:15}", pack(sentences, documents, 12, input_format).tolist())
    full-sentences  [0, 6, 10]
    doc-sentences   [0, 4, 10]
    segment-pair    [0, 4, 6, 10]
    sentence-pair   [0, 3, 4, 6, 10]

    There are 10 places for text in a single sequence, 4 in each half of a pair. As rows
    (`Sequences.token_ids`):

        full-sentences  <s> a b c d </s> e f </s>     <s> g h i j </s>
        doc-sentences   <s> a b c d </s>              <s> e f g h i j </s>
        segment-pair    <s> e f </s></s> g h i j </s>, or <s> a b c d </s></s> e f </s>, which is a negative
        sentence-pair   <s> a b c </s></s> d </s>, ...
    """
    room = room_for_text(seq_len, input_format)
    # In windows: a corpus of billions of tokens has more sentences than fit into memory several times over.
    parts, begin = [np.zeros(1, np.int64)], 0
    while begin < sentences[-1]:
        parts.append(pack_window(sentences, documents, begin, room, input_format))
        begin = parts[-1][-1]
    return np.concatenate(parts)


def pack_window(sentences: np.ndarray, documents: np.ndarray, begin: int, room: int,
                input_format: InputFormat) -> np.ndarray:
    """Returns where the sequences end that are packed from token `begin` on, within a window of sentences."""
    first = np.searchsorted(sentences, begin, side="right")  # the sentence that `begin` lies in
    window = max(WINDOW, 2 * room)  # in sentences: even of one token each they make a sequence
    ends = sentences[first : first + window].astype(np.int64)
    begins, ends = split_long(np.concatenate([[begin], ends[:-1]]), ends, room)
    if input_format == "sentence-pair":
        return ends

    # If a sequence begins with sentence i, with which one does the next begin? Sentence j still fits if the
    # text up to its end, and a separator for each document that ends in between, takes no more than `room`.
    # Text and separators grow with j, so one search finds the answer for every i at once.
    document = np.searchsorted(documents, begins, side="right")
    separators = document if input_format == "full-sentences" else np.zeros_like(document)
    following = np.searchsorted(ends + separators, begins + separators + room, side="right")
    if input_format != "full-sentences":
        of_next_document = np.searchsorted(document, document, side="right")
        following = np.minimum(following, of_next_document)

    # Now step from sequence to sequence. The one that reaches the window's end may go on after it: it is
    # left to the next window, unless this one is the last.
    following, count = following.tolist(), len(ends)
    is_last_window = first + window >= len(sentences)
    last_sentences, sentence = [], 0
    while sentence < count and (following[sentence] < count or is_last_window):
        sentence = following[sentence]
        last_sentences.append(sentence - 1)
    return ends[last_sentences]


def split_long(begins: np.ndarray, ends: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns begins and ends of sentences in a row, those longer than `room` cut into pieces of `room`.

    >>> [places.tolist() for places in split_long(np.array([0, 7]), np.array([7, 9]), room=3)]
    [[0, 3, 6, 7], [3, 6, 7, 9]]
    """
    # Few are too long, so a loop over these will do. As each ends where the next begins, it is enough to know
    # where pieces begin.
    is_long = ends - begins > room
    cuts = [np.arange(begin + room, end, room) for begin, end in zip(begins[is_long], ends[is_long])]
    piece_begins = np.sort(np.concatenate([begins, *cuts]))
    return piece_begins, np.append(piece_begins[1:], ends[-1])


@dataclasses.dataclass
class Sequences:
    """A corpus's sequences in one of §4.2's formats. In the pair formats they are paired anew every epoch.

    Eight bytes for each are all that this object keeps: the text stays where it is, in the file.
    """

    corpus: Corpus
    input_format: InputFormat
    seq_len: int

    def __post_init__(self) -> None:
        self.is_pairs = self.input_format in PAIR_FORMATS
        self.special_tokens = 4 if self.is_pairs else 2
        # (segments + 1,) where each begins, and the last ends.
        self.bounds = pack(self.corpus.sentences, self.corpus.documents, self.seq_len, self.input_format)

    def pairs(self, seed: int, epoch: int) -> Pairs | None:
        """Returns the pairs of an epoch, None in a format without pairs."""
        if not self.is_pairs:
            return None
        document_of_segment = np.searchsorted(self.corpus.documents, self.bounds[:-1], side="right")
        return pair_up(document_of_segment, seed, epoch)

    def lengths(self, pairs: Pairs | None) -> np.ndarray:
        """Returns (N,) how many text tokens each sequence has: those that may be masked."""
        of_segment = np.diff(self.bounds)
        return of_segment if pairs is None else of_segment[pairs.first] + of_segment[pairs.second]

    def token_ids(self, pairs: Pairs | None, index: int) -> np.ndarray:
        """Returns a sequence with its special tokens. Without pairs it is one segment, one piece of the file.
        """
        numbers = [index] if pairs is None else [pairs.first[index], pairs.second[index]]
        has_separators = self.input_format == "full-sentences"  # "an extra separator token", §4.2
        bounds = self.bounds
        return join(*[self.corpus.read(bounds[i], bounds[i + 1], has_separators) for i in numbers])


# ----------------------------------------------------------------------------------------------------------
# Pairs: what next-sentence prediction asks (§2, §4.2)
# ----------------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Which segments make the pairs of an epoch. BERT asks of each: does the second follow the first?"""

    first: np.ndarray  # (N,)
    second: np.ndarray  # (N,)
    is_random: np.ndarray  # (N,) NSP's label: 0 = it follows, 1 = it is from another document


def pair_up(document: np.ndarray, seed: int, epoch: int) -> Pairs:
    """Returns an epoch's pairs: a coin, then the segment that follows or one of another document (§2).

    document: (segments,) which document each is from, ascending. Raises: ValueError if there are not two
    documents, or none has two segments. Eight segments of three documents; each triple is first, second, and
    the label:

    >>> pairs = pair_up(np.array([0, 0, 0, 0, 1, 1, 2, 2]), seed=1, epoch=0)
    >>> [list(map(int, pair)) for pair in zip(*pairs)]
    [[0, 1, 0], [2, 5, 1], [4, 5, 0], [6, 4, 1]]
    """
    count = len(document)
    document_begin = np.searchsorted(document, document, side="left")
    document_end = np.searchsorted(document, document, side="right")

    # Every other segment of a document begins a pair: the one after it is there to be its second. (If a coin
    # decides otherwise, that one is fed only where another pair draws it: as in BERT's data, not all is fed
    # in every epoch.)
    first = np.flatnonzero((np.arange(count) - document_begin) % 2 == 0)
    has_next = first + 1 < document_end[first]
    if 10 * has_next.sum() < len(first) or document_end[0] == count:
        raise ValueError("next-sentence prediction needs documents of two segments, but the "
                         f"{document[-1] + 1:,} here have {has_next.sum():,} such pairs; try full-sentences")

    # Half of all pairs are to be real ones (§2). A document's last segment may have none after it and can
    # only be a negative, so the others stay together more often than every second time. And where most
    # documents have a single segment, only as many of these are fed, drawn anew each epoch, as there are
    # others: else a model would be right by always answering no.
    lone = ~has_next
    share = has_next.sum() / max(1, lone.sum())
    is_fed = has_next | (uniform(seed, PAIR_LONE, epoch, first) < share)
    first, has_next = first[is_fed], has_next[is_fed]
    chance = 0.5 * len(first) / has_next.sum()
    follows = has_next & (uniform(seed, PAIR_COIN, epoch, first) < chance)

    # A negative's second comes from any other document, each segment equally likely: number the segments
    # without those of the first's own document, draw one of these numbers, and step over the gap.
    own_begin, own_size = document_begin[first], (document_end - document_begin)[first]
    drawn = (uniform(seed, PAIR_OTHER, epoch, first) * (count - own_size)).astype(np.int64)
    other = np.where(drawn < own_begin, drawn, drawn + own_size)
    return Pairs(first, np.where(follows, first + 1, other), (~follows).astype(np.int64))


# ----------------------------------------------------------------------------------------------------------
# Draws: randomness without state
# ----------------------------------------------------------------------------------------------------------

# The second key, after the seed, says what a draw is for, so that no two purposes share draws.
ORDER, MASK_WHICH, MASK_FATE, MASK_OTHER, PAIR_COIN, PAIR_OTHER, DROPOUT, PAIR_LONE = range(8)


def draw(*keys: int | np.ndarray) -> np.ndarray:
    """Returns 64 random bits for the keys, which broadcast: always the same ones for the same keys.

    A generator remembers how often it was asked, so a run that resumes, or has another number of ranks, must
    bring it to the right place again. A hash has nothing to remember: the mask of token 7 of sequence 3 in
    epoch 2 is what it is, whoever asks and when. This one is the finaliser of splitmix64 (Steele et al.
    2014), once a key.

    >>> draw(0, MASK_WHICH, np.arange(2)) >> np.uint64(56)
    array([148, 172], dtype=uint64)
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        for key in keys:
            # Shifts carry high bits down, products low bits up: in the end each bit depends on all of the
            # key.
            state = state + np.asarray(key).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """Returns a number from 0 up to but not 1 for every combination of the keys: 53 bits of `draw`."""
    return (draw(*keys) >> np.uint64(11)) * 2.0**-53


@functools.lru_cache(4)  # asked for at every step of an epoch
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the numbers below `count` in an epoch's random order: the lowest ticket drawn comes first.

    >>> epoch_order(5, seed=1, epoch=0).tolist(), epoch_order(5, seed=1, epoch=1).tolist()
    ([2, 4, 1, 0, 3], [3, 1, 0, 4, 2])
    """
    # Sorting random tickets shuffles; and unlike a shuffle it can be asked for again, in any epoch, by any
    # rank.
    return np.argsort(draw(seed, ORDER, epoch, np.arange(count)), kind="stable")


# ----------------------------------------------------------------------------------------------------------
# Masking: 15 %, of them 80/10/10 (§2), static or dynamic (§4.1)
# ----------------------------------------------------------------------------------------------------------

NOT_PREDICTED = -100  # the label of a place where nothing is predicted; torch's cross-entropy ignores it
STATIC_MASKS = 10  # §4.1: for static masking the data is duplicated ten times


def predictions_of(lengths: int | np.ndarray, mlm_probability: float) -> np.ndarray:
    """Returns how many of a sequence's text tokens are predicted: the rounded share, not a coin for each.

    So the number over all ranks and micro-batches, by which the loss is divided, is known from the lengths.
    In a sequence of three tokens or fewer none is predicted.
    """
    # BERT's code rounds, too. A coin for each token would give the same share with another number every time.
    return np.rint(mlm_probability * np.asarray(lengths)).astype(np.int64)


def mask_tokens(input_ids: np.ndarray, sequence: np.ndarray, epoch: np.ndarray, *, seed: int,
                vocab_size: int, masking: Literal["dynamic", "static"] = "dynamic",
                mlm_probability: float = 0.15, mask_id: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns input_ids with masks, and labels, both (B, T): pure in (seed, epoch, sequence, place).

    input_ids: (B, T), padded. sequence, epoch: (B,) which sequence a row is, and how often it was fed before.
    labels: the original id where a token is predicted, else NOT_PREDICTED. mask_id: none: the last id.

    `<s>`, ten words and `</s>`: two words are predicted, round(0.15 * 10), different ones each epoch. 49 is
    `<mask>`; in epoch 0 the first of the two became a random word, as one in ten does:

    >>> row = np.array([[0, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 2]])
    >>> for epoch in range(3):
    ...     masked, labels = mask_tokens(row, [3], [epoch], seed=0, vocab_size=50)
    ...     print(masked[0].tolist(), np.flatnonzero(labels != NOT_PREDICTED).tolist())
    [0, 10, 35, 12, 13, 14, 15, 16, 17, 18, 49, 2] [2, 10]
    [0, 49, 11, 12, 13, 14, 15, 16, 49, 18, 19, 2] [1, 8]
    [0, 10, 11, 12, 13, 14, 15, 49, 17, 49, 19, 2] [7, 9]
    """
    input_ids, sequence, epoch = np.asarray(input_ids), np.asarray(sequence), np.asarray(epoch)
    # Dynamic masking draws anew whenever a sequence is fed; static masking has ten masks, made in advance,
    # and takes them in turn. With draws that depend on the epoch, this line is all that distinguishes the two
    # (Table 1).
    epoch = epoch % STATIC_MASKS if masking == "static" else epoch
    mask_id = vocab_size - 1 if mask_id is None else mask_id

    # Which tokens? Each draws a ticket, and the lowest `count` of a row are chosen. Special tokens have none.
    # (But `<unk>`, where a tokenizer has units it can't name, stands for text. So every token of a text
    # counts, as in `Sequences.lengths`.)
    maskable = (input_ids >= UNK) & (input_ids != mask_id)
    count = predictions_of(maskable.sum(1), mlm_probability)
    # (B, T)
    ticket = draw(seed, MASK_WHICH, sequence[:, None], epoch[:, None], np.arange(input_ids.shape[1]))
    ticket = np.where(maskable, ticket, np.uint64(2**64 - 1))
    last_chosen = np.take_along_axis(np.sort(ticket, axis=1), np.maximum(count - 1, 0)[:, None], axis=1)
    chosen = maskable & (ticket <= last_chosen) & (count > 0)[:, None]
    labels = np.where(chosen, input_ids, NOT_PREDICTED)

    # What becomes of a chosen token? 80 % are hidden. But fine-tuning will never show the model a <mask>, so
    # it must not learn to think only where it sees one: 10 % are left as they are and 10 % become a random
    # word, and any word may have to be predicted (BERT §3.1). One draw decides, another names the random
    # word, which is no special token: four of these have lower ids, and <mask> is stepped over.
    row, column = np.nonzero(chosen)
    keys = sequence[row], epoch[row], column
    fate = uniform(seed, MASK_FATE, *keys)
    other = UNK + 1 + (uniform(seed, MASK_OTHER, *keys) * (vocab_size - len(SPECIAL_TOKENS))).astype(np.int64)
    other += other >= mask_id
    masked = input_ids.copy()
    masked[chosen] = np.select([fate < 0.8, fate < 0.9], [mask_id, other], default=input_ids[chosen])
    return masked, labels


# ----------------------------------------------------------------------------------------------------------
# Batches: the order of the data as a function (§4.2, §4.3)
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one forward pass reads. Shapes are constant in FULL-SENTENCES and vary in the other formats."""

    input_ids: np.ndarray  # (B, T) int64
    attention_mask: np.ndarray  # (B, T) bool, True = real token
    predicted: np.ndarray  # (M,) int64, where predictions are made, as b * T + t
    # In FULL-SENTENCES `predicted` and `labels` are filled up to a constant M: NOT_PREDICTED at place 0,
    # which no loss counts.
    labels: np.ndarray  # (M,) int64, the tokens that stood there
    token_type_ids: np.ndarray | None  # (B, T) int64, 1 in the second segment; None without pairs
    next_sentence_labels: np.ndarray | None  # (B,) int64, 1 = random; None without pairs
    num_tokens: int  # real tokens, padding apart


class Step(NamedTuple):
    """A rank's share of an optimiser step, and what the losses of the whole step are divided by."""

    epoch: float  # passes over the data before this step
    batches: list[Batch]  # this rank's micro-batches
    num_predictions: int  # over all ranks and micro-batches
    num_sequences: int


def equal_parts(weights: np.ndarray, parts: int) -> list[np.ndarray]:
    """Returns 0, 1, ... as `parts` runs of about equal weight: an epoch's steps, a step's micro-batches.

    >>> [part.tolist() for part in equal_parts(np.array([1, 1, 1, 1, 4, 4]), 3)]
    [[0, 1, 2, 3], [4], [5]]
    """
    # Lay the weights end to end, cut the whole into equal lengths, and see behind which item each cut falls.
    cuts = np.arange(1, parts) * (np.sum(weights) / parts)
    return np.split(np.arange(len(weights)), np.searchsorted(np.cumsum(weights), cuts, side="right"))


@dataclasses.dataclass
class Batches:
    """The order of the data: `step(n)` is a pure function of (seed, n, rank), whatever was asked before.

    An epoch feeds every sequence once, in a new order. FULL-SENTENCES takes `batch_size` sequences a step and
    runs on over the end of an epoch. The other formats have shorter sequences, so a step takes as many as
    hold at least the tokens of `batch_size` full ones (§4.2), sorted by length to pad little.

    batch_size: sequences a step over all ranks, Table 9's. Raises: ValueError unless micro_batch_size x
    world_size divides it.
    """

    sequences: Sequences
    batch_size: int
    micro_batch_size: int  # full sequences a forward pass, or shorter ones of as many tokens (train.py)
    seed: int
    masking: Literal["dynamic", "static"] = "dynamic"
    mlm_probability: float = 0.15
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        at_once = self.micro_batch_size * self.world_size
        if self.batch_size % at_once:
            smaller = range(1, self.micro_batch_size)
            fitting = [size for size in smaller if self.batch_size % (size * self.world_size) == 0]
            advice = f"micro_batch_size {fitting[-1]}" if fitting else f"batch_size {at_once}"
            raise ValueError(f"micro_batch_size {self.micro_batch_size} x world_size {self.world_size} = "
                             f"{at_once} does not divide batch_size {self.batch_size}; try {advice}")
        self.num_micro_batches = self.batch_size // at_once
        self.is_full = self.sequences.input_format == "full-sentences"
        # Asked for at every step of an epoch, so remembered.
        self._epoch = functools.lru_cache(2)(self._epoch)
        self._steps_of = functools.lru_cache(1)(self._steps_of)
        # In the formats of varying length, a step is to hold the tokens of `batch_size` full sequences: here
        # by epoch 0. Pairs of later epochs are a little longer or shorter, and so are their steps.
        tokens = self._epoch(0)[1] + self.sequences.special_tokens
        self.steps_per_epoch = max(1, int(tokens.sum()) // (self.batch_size * self.sequences.seq_len))

    def _epoch(self, epoch: int) -> tuple[Pairs | None, np.ndarray]:
        """Returns an epoch's pairs, which with static masking recur with the masks, and how many text tokens
        each of its sequences has. Without pairs all epochs are alike.
        """
        pairs = self.sequences.pairs(self.seed, epoch % STATIC_MASKS if self.masking == "static" else epoch)
        return pairs, self.sequences.lengths(pairs)

    def _steps_of(self, epoch: int) -> list[np.ndarray]:
        """Returns the sequences of each of an epoch's steps, which hold about equally many tokens."""
        tokens = self._epoch(epoch)[1] + self.sequences.special_tokens
        # Shuffled first, then cut: a step has long and short sequences alike.
        order = epoch_order(len(tokens), self.seed, epoch)
        return [order[part] for part in equal_parts(tokens[order], self.steps_per_epoch)]

    def step(self, step: int) -> Step:
        """Returns this rank's micro-batches of step 0, 1, ..."""
        if self.is_full:
            # The epochs in their orders make one endless row of sequences; a step is `batch_size` of them.
            all_lengths = self._epoch(0)[1]
            count = len(all_lengths)
            epochs, places = np.divmod(step * self.batch_size + np.arange(self.batch_size), count)
            index = np.array([epoch_order(count, self.seed, int(epoch))[place]
                              for epoch, place in zip(epochs, places)])
            passes = step * self.batch_size / count
        else:
            # An epoch is so many steps. Within a step, rows of like length come together, to pad little.
            epoch, number = divmod(step, self.steps_per_epoch)
            all_lengths, index = self._epoch(epoch)[1], self._steps_of(epoch)[number]
            index = index[np.argsort(all_lengths[index], kind="stable")]
            epochs, passes = np.full(len(index), epoch), step / self.steps_per_epoch

        # Every rank knows the lengths of the whole step, so it knows how many predictions are made in all.
        lengths = all_lengths[index]
        num_predictions = int(predictions_of(lengths, self.mlm_probability).sum())

        # Micro-batches are runs of about equal tokens (in FULL-SENTENCES: of equal rows, for a steady shape).
        # Ranks take them in turn, so that in the sorted formats all have rows of similar length at the same
        # time.
        weights = np.ones_like(lengths) if self.is_full else lengths
        groups = equal_parts(weights, self.num_micro_batches * self.world_size)[self.rank :: self.world_size]
        batches = [self.assemble(index[group], epochs[group]) for group in groups]
        return Step(passes, batches, num_predictions, len(index))

    def assemble(self, index: np.ndarray, epochs: np.ndarray) -> Batch:
        """Reads, pads and masks the sequences `index`, each as it is in its epoch."""
        sequences, corpus = self.sequences, self.sequences.corpus
        pairs = self._epoch(int(epochs.max(initial=0)))[0]  # all are of one epoch, where there are pairs
        # With fewer sequences than micro-batches one may be empty: then a row of padding, which predicts
        # nothing (and does no harm: see RobertaModel).
        rows = [sequences.token_ids(pairs, i) for i in index] or [np.array([PAD])]
        index, epochs = np.resize(index, len(rows)), np.resize(epochs, len(rows))
        width = sequences.seq_len if self.is_full else max(map(len, rows))
        input_ids = np.full((len(rows), width), PAD)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = ids
        is_real = input_ids != PAD  # (B, T)

        # BERT tells segments apart by a type as well: 0 up to the first `</s>`, 1 from the second `</s>` on.
        token_types = next_labels = None
        if sequences.is_pairs:
            separators = np.cumsum(input_ids == EOS, axis=1)  # (B, T) how many there were up to here
            token_types = (is_real & (separators >= 2)).astype(np.int64)
            next_labels = np.where(is_real[:, 0], pairs.is_random[index], NOT_PREDICTED)

        # Masks are the last thing: drawn for this epoch, kept as the few places and labels predicted.
        masked, labels = mask_tokens(
            input_ids, index, epochs, seed=self.seed, vocab_size=corpus.vocab_size, masking=self.masking,
            mlm_probability=self.mlm_probability, mask_id=corpus.tokenizer.mask_id)
        predicted = np.flatnonzero(labels != NOT_PREDICTED)
        labels = labels.reshape(-1)[predicted]
        if self.is_full:  # fill up to the number that full sequences have: compilers like a steady shape
            full = len(rows) * int(predictions_of(width - 2, self.mlm_probability))
            predicted = np.pad(predicted, (0, full - len(predicted)))
            labels = np.pad(labels, (0, full - len(labels)), constant_values=NOT_PREDICTED)
        return Batch(masked, is_real, predicted, labels, token_types, next_labels, int(is_real.sum()))

    def held_out(self, limit: int) -> Iterator[Batch]:
        """Yields this rank's share of `limit` sequences in a fixed order, once: for evaluation."""
        # A sample that is spread over the whole text, the same one every time.
        order = epoch_order(len(self._epoch(0)[1]), self.seed, 0)[:limit]
        batches = [order[i : i + self.micro_batch_size] for i in range(0, len(order), self.micro_batch_size)]
        for index in batches[self.rank :: self.world_size]:
            yield self.assemble(index, np.zeros_like(index))


# ----------------------------------------------------------------------------------------------------------
# Part II: the machinery
# ----------------------------------------------------------------------------------------------------------

# ----------------------------------------------------------------------------------------------------------
# Documents: text as people have it
# ----------------------------------------------------------------------------------------------------------

OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
# In a folder, files with these endings are taken: rows of JSON, and text.
ROW_ENDINGS, TEXT_ENDINGS = {".jsonl", ".ndjson", ".json"}, {"", ".txt", ".text", ".md"}
# What holds no plain text is refused by name: its markup or its bytes would be learned as if they were text.
NOT_READ = {*".csv .tsv .parquet .arrow .html .htm .xml .pdf .epub .docx .zip .tar .zst .7z .npy".split()}
CONVERT = """make it .jsonl, as with pandas: read_csv("F").to_json("F.jsonl", orient="records", lines=True)"""
BLOCK_BYTES = 8 << 20  # what a worker gets at once
MAX_ROW_BYTES = 32 << 20  # a row of .jsonl has to be held whole to be understood
MAX_WHOLE_BYTES = 1 << 30  # and so has a .json list, or a file that is one document
MAX_DOCUMENT = 100_000  # characters after which a text without blank lines is cut, at a line's end or a space


class Block(NamedTuple):
    """A piece of a file, from one border of documents to another."""

    path: Path
    line: int  # how many lines of the file are before it
    content: bytes
    is_rows: bool = False  # whether each line is a row of JSON
    damage: str = ""  # why no more of the file could be read


DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)  # of packed files; bz2's is an OSError
LeftOut = dict[str, list]  # what is no text: kind of reason -> [how many lines, where the first is]


def ending(path: Path) -> str:
    """Returns a file's ending, which says what it holds: in small letters, that of packing apart.

    >>> ending(Path("Wiki.JSONL.gz")), ending(Path("wiki_00"))
    ('.jsonl', '')
    """
    path = Path(path.name.lower())
    return Path(path.stem).suffix if path.suffix in OPENERS else path.suffix


def find_files(corpus: Iterable[str | Path]) -> list[Path]:
    """Returns the files of a corpus, those of a directory in the order of their names.

    A file that is named is read if it can hold text. Of a directory only those are that look like text by
    their endings; how many others it has is said. Raises: ValueError where there is nothing to read.
    """
    def stop_at(error: OSError) -> None:
        raise error  # a directory that can't be read would be passed over

    files: list[Path] = []
    for path in map(Path, corpus):
        if not path.exists():
            raise ValueError(f"{path}: no such file or directory")
        if path.is_file():
            if ending(path) in NOT_READ:
                raise ValueError(f"{path}: {ending(path)} is not read; {CONVERT}")
            files.append(path)
            continue
        walk = os.walk(path, onerror=stop_at)
        every = sorted(Path(place, name) for place, _, names in walk for name in names)
        seen = [file for file in every if file.is_file()  # no pipe, which would be waited for
                and not any(part[0] == "." for part in file.relative_to(path).parts)]
        found = [file for file in seen if ending(file) in ROW_ENDINGS | TEXT_ENDINGS]
        others = Counter(map(ending, seen)) - Counter(map(ending, found))
        passed_over = ", ".join(f"{count:,} {name}" for name, count in others.most_common())
        if not found:
            raise ValueError(f"{path}: no text (.txt, .md, .jsonl, .json, also .gz, .xz, .bz2) but "
                             f"{passed_over or 'nothing'}; {CONVERT}")
        if passed_over:
            say(f"{path}: passed over {passed_over}; {CONVERT}")
        files += found
    return files


def opened(path: Path) -> Any:
    """Returns a file to read, unpacked."""
    return OPENERS.get(path.suffix.lower(), open)(path, "rb")


def kind_of(path: Path) -> str:
    """Returns what a file holds: "list" (one of JSON), "rows" (a JSON object a line) or "text"."""
    # By its look, and else by its name: WikiExtractor's wiki_00 has rows, too.
    with contextlib.suppress(*DAMAGE), opened(path) as file:
        start = file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.startswith(b'{"'):
            return "rows"
        if start.startswith(b"[") and ending(path) == ".json":
            return "list"
    return "rows" if ending(path) in ROW_ENDINGS else "text"


def read_blocks(path: Path, documents: str = "blank-line") -> Iterator[Block]:
    """Yields a file, unpacked, in blocks of some 8 MB that can be understood apart, whatever its size.

    What can't be cut, a list of JSON or a file that is one document, is one block. Raises: ValueError where
    it is too large for that, or a list that is damaged.
    """
    kind, line, rest, damage, is_last = kind_of(path), 0, b"", "", False
    is_whole = kind == "list" or (kind == "text" and documents == "file")
    is_lines = kind == "rows" or documents == "line"
    block_bytes = MAX_WHOLE_BYTES if is_whole else BLOCK_BYTES
    borders = [b"\n"] if is_lines else [b"\n\n", b"\n\r\n", b"\n", b" "]
    with opened(path) as file:
        while not is_last:
            try:
                content = rest + file.read(block_bytes - len(rest))
                if is_lines and b"\n" not in content:
                    content += file.readline(MAX_ROW_BYTES)
            except DAMAGE as error:
                content, damage = rest, str(error)
            is_last = len(content) < block_bytes
            if is_whole and not is_last:
                raise ValueError(f"{path}: over {MAX_WHOLE_BYTES >> 20} MB, too much for one piece; split it")
            # Cut behind the last blank line, so that no document is torn; else behind a line; else behind a
            # space (a "line" of gigabytes is none). What follows the cut begins the next block.
            cuts = [content.rfind(border) + len(border) for border in borders if border in content]
            cut = len(content) if is_last or not cuts else cuts[0]
            block = content[:cut] if kind != "list" else rows_of_list(path, content)
            yield Block(path, line, block, kind != "text", damage)
            line += content.count(b"\n", 0, cut)
            rest = content[cut:]


def rows_of_list(path: Path, content: bytes) -> bytes:
    """Returns a list of JSON as rows, one a line. Raises: ValueError where it is damaged."""
    try:
        return "\n".join(map(json.dumps, json.loads(content or b"[]"))).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not a list of JSON ({error})") from None


def jobs_of(files: list[Path], config: PrepareConfig, what: str) -> Iterator[list[Block]]:
    """Yields the blocks of the files in jobs of some 8 MB: a thousand small files become one job.

    It shows how far the reading is.
    """
    job, size, blocks = [], 0, (block for file in files for block in read_blocks(file, config.documents))
    for block in counted(blocks, what, text_bytes(files), lambda block: len(block.content)):
        if job and size + len(block.content) > BLOCK_BYTES:
            yield job
            job, size = [], 0
        job.append(block)
        size += len(block.content)
    yield job


def text_bytes(files: list[Path]) -> int:
    """Returns about how much text files hold: packed text is some four times as long as its file."""
    return max(1, sum(file.stat().st_size * (4 if file.suffix.lower() in OPENERS else 1) for file in files))


def documents_of(block: Block, config: PrepareConfig, left_out: LeftOut) -> Iterator[str]:
    """Yields the documents of a block: the rows of JSON have one each, in a field; text as `documents` says.
    What is longer than MAX_DOCUMENT without a blank line is cut.
    """
    texts = []
    for number, raw in enumerate(block.content.split(b"\n"), block.line + 1):
        where = f"{block.path}: line {number}"
        reason, advice = "not UTF-8 text", "convert it, as with iconv -f LATIN1 -t UTF-8"
        try:
            # A file from Windows may begin with a mark, U+FEFF, that is no text, and has \r before each \n.
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
            if "\0" in text:
                raise ValueError("a NUL character; is the file binary, or UTF-16?")
            if block.is_rows and text.strip():
                reason = f"without a text in the field {config.text_field!r}"
                advice = "see data.py prepare --text-field"
                text = text_of_row(json.loads(text), config.text_field)
            texts.append(text)
        except (ValueError, RecursionError) as error:
            # `reason` says how far it came.
            first = f"{where}, which begins {raw[:80]!r} ({error}); {advice}"
            left_out.setdefault(reason, [0, first])[0] += 1
    if block.damage:
        first = f"{where} and the rest ({block.damage})"
        left_out.setdefault("behind damage in a packed file", [0, first])[0] += 1
    # A row, a line or a file is what its maker takes for a document.
    longest = MAX_DOCUMENT if config.documents == "blank-line" and not block.is_rows else math.inf
    if not block.is_rows and config.documents != "line":
        lines = [line if line.strip() else "" for line in texts]
        whole = "\n".join(lines).strip("\n")
        texts = [whole] if config.documents == "file" else re.split("\n\n+", whole)
    for text in texts:
        # Text without blank lines, such as a book's, would be one endless document. A cut at a line's end
        # drops that end; at a space, where a line is too long, it drops nothing.
        while len(text) > longest:
            line_end = text.rfind("\n", 1, MAX_DOCUMENT + 1)
            end = line_end if line_end > 0 else text.rfind(" ", 0, MAX_DOCUMENT) + 1 or MAX_DOCUMENT
            yield text[:end]
            text = text[end:].removeprefix("\n")
        if text.strip():
            yield text


def text_of_row(row: Any, text_field: str) -> str:
    """Returns a row's text: the row itself, or a field of it. Raises: ValueError naming the fields it has."""
    text = row.get(text_field) if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise ValueError(f"its fields are {', '.join(row)}" if isinstance(row, dict) else "it is no object")
    text.encode()  # raises for half a surrogate pair, which JSON can spell
    return text


# A first run needs nothing but the machine: these are packages that the requirements bring along.
DOCUMENTED_PACKAGES = """torch sympy networkx numpy matplotlib fontTools mpmath setuptools pip PIL pyparsing
    fsspec jinja2 packaging urllib3 dateutil requests pygments _pytest contourpy tiktoken""".split()


def documentation_files() -> list[Path]:
    """Returns the Python sources whose docstrings are the default corpus: standard library and dependencies.

    Tests and vendored copies are left out: they hold little English and take much of the parsing time.
    """
    roots = [Path(os.__file__).parent]
    roots += [Path(place, name) for name in DOCUMENTED_PACKAGES for place in sys.path]  # most do not exist
    skip = {"tests", "test", "testing", "_vendor", "idlelib", "site-packages", "dist-packages"}
    files = [(root, file) for root in roots for file in sorted(root.rglob("*.py"))]
    return [file for root, file in files if not skip & set(file.relative_to(root).parts)]


def docstrings(path: Path) -> str:
    """Returns the docstrings of a Python source, in order. It is parsed, never imported."""
    tree = ast.Module([], [])  # stays empty where the source is of another Python's syntax
    with contextlib.suppress(SyntaxError, ValueError, RecursionError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other people's invalid escapes
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # a module has none
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def harvest(out: Path, workers: int) -> Path:
    """Writes the documentation installed here as a .jsonl file, a module a document; returns where."""
    path = out / "documentation.jsonl"
    if not path.exists():
        files = documentation_files()
        say(f"reading the documentation in {len(files):,} Python files")
        texts = in_order(docstrings, files, workers)
        texts = filter(None, counted(texts, "reading the documentation", len(files)))
        write_atomically(path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    return path


# ----------------------------------------------------------------------------------------------------------
# prepare: one ordered stream from text to token files, which may be cut off anywhere
# ----------------------------------------------------------------------------------------------------------

FORMAT_VERSION = 2
SPLITS = ("train", "heldout")


def flag(default: Any, help: str, source: str = "", *, group: str = "everyday", low: float = -math.inf,
         high: float = 2.0**53, may_change: bool = False) -> Any:
    """A dataclass field that is also a command-line flag: default, meaning with its unit, source.

    low, high: the range, both ends included. may_change: whether a second start of the same run may differ.
    """
    return dataclasses.field(default=default, metadata={
        "help": help, "source": source, "group": group, "low": low, "high": high, "may_change": may_change})


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What `python data.py prepare` is asked to do."""

    corpus: tuple[str, ...] = flag((), "text files or directories; none: the documentation installed here")
    out: str = flag("prepared", "directory to write")
    vocab_size: int = flag(50265, "units of the tokenizer to train, specials included", "§4.4", low=261)
    tokenizer: str | None = flag(None, "directory of a tokenizer to use instead of training one")
    workers: int | None = flag(None, "processes; none: one a core", low=1)
    # By their hash; where none is given, `encode_corpus` takes 0.01, of less than 100 MB of text up to 0.05.
    held_out: float | None = flag(None, "share to evaluate on; none: 0.01 to 0.05", low=1e-9, high=0.999)
    bpe_megabytes: int = flag(100, "MB of text, spread over the corpus, to train the tokenizer on", low=1)
    documents: Literal["blank-line", "file", "line"] = flag("blank-line", "what parts documents")
    text_field: str = flag("text", "field of a .jsonl row that holds its text")
    strict: bool = flag(False, "stop at a line that is no text, instead of leaving it out")


def prepare(config: PrepareConfig) -> Path:
    """Turns a corpus into token files in `config.out`; returns that directory, at once if it is complete.

    The corpus is read as one stream of blocks in a fixed order. Workers turn blocks into tokens, and this
    process alone writes: it drops exact duplicates, chooses what is held out, and appends to one file per
    split and kind. After each job it notes how long the files are; killed anywhere, the same call cuts them
    to that length and goes on. So the bytes are the same for any number of workers and interruptions.

    Raises: ValueError for bad input, with `strict` for the first line that is no text, or where `out` holds
    something else or another process is at work in it; OSError where the disk is full.
    """
    check_flags(config)
    out, workers = Path(config.out), config.workers or cores()
    check_ours(out, "manifest.json")
    with locked(out):
        files = find_files(config.corpus)
        settings = settings_of(config, files)
        output = TokenFiles(out, settings)
        # Half of one corpus and half of another would look like a corpus, so a second call must ask for the
        # same as the first did. What was not finished, perhaps as the text had to be mended, begins again.
        changed = [name for name, now in settings.items() if output.state.get(name) != now]
        if changed and "checksums" in output.state:
            name, before = changed[0].replace("_", " "), output.state.get(changed[0])
            raise ValueError(f"{out} was prepared with another {name}: {before}, not {settings[changed[0]]}; "
                             "choose another --out or delete it")
        if changed:
            say(f"{out} was not finished, and with another {changed[0].replace('_', ' ')}: it begins again")
            shutil.rmtree(out / "tokenizer", ignore_errors=True)
            tokenizer_of_worker.cache_clear()
            output.path.unlink()
            output = TokenFiles(out, settings)
        if "checksums" in output.state:
            say(f"{out} is prepared already")
        else:
            output.note()
            files = files or [harvest(out, workers)]
            if not (out / "tokenizer").exists():
                learn_tokenizer(config, files, workers).save_pretrained(out / ".tokenizer.tmp")
                os.replace(out / ".tokenizer.tmp", out / "tokenizer")
            encode_corpus(config, files, workers, output)
            finish(output)
        # Only now, as what is complete needs it no longer; also if a kill came just before this line.
        (out / "hashes.bin").unlink(missing_ok=True)
    return out


def settings_of(config: PrepareConfig, files: list[Path]) -> dict[str, Any]:
    """Returns what the result depends on: calls with equal settings may share work."""
    states = [[os.path.abspath(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    corpus = f"{len(files)} files, with their dates {fingerprint_of(states)}" if files else "documentation"
    given = config.tokenizer and Tokenizer.from_pretrained(config.tokenizer).fingerprint
    return {"format_version": FORMAT_VERSION, "corpus": corpus, "vocabulary": given or config.vocab_size,
            "held_out": config.held_out, "bpe_megabytes": config.bpe_megabytes,
            "documents": config.documents, "text_field": config.text_field}


def learn_tokenizer(config: PrepareConfig, files: list[Path], workers: int) -> Tokenizer:
    """Returns the tokenizer asked for, or one trained on the beginning of every block of the corpus."""
    if config.tokenizer is not None:
        return Tokenizer.from_pretrained(config.tokenizer)
    tokenizer = train_bpe(sample_of(config, files), config.vocab_size, workers)
    # There are fewer than asked for where no other pair occurs twice in the corpus.
    say(f"trained a tokenizer of {tokenizer.vocab_size} units, of {config.vocab_size} asked for")
    return tokenizer


def sample_of(config: PrepareConfig, files: list[Path]) -> Iterator[str]:
    """Yields the documents that the tokenizer is trained on."""
    # A share is taken of every block, not all of the first files: the tokenizer is to know all of the corpus.
    share = min(1.0, config.bpe_megabytes * 1e6 / text_bytes(files))
    for block in (block for job in jobs_of(files, config, "reading for the tokenizer") for block in job):
        # Up to the end of the line that this share reaches into: a row of .jsonl is only understood whole.
        end = block.content.find(b"\n", int(share * len(block.content))) + 1 or len(block.content)
        yield from documents_of(block._replace(content=block.content[:end]), config, {})


class Encoded(NamedTuple):
    """What a worker makes of a job."""

    tokens: np.ndarray
    tokens_of_sentence: np.ndarray  # how many
    sentences_of_document: np.ndarray
    hashes: np.ndarray  # (documents,) uint64
    left_out: LeftOut


tokenizer_of_worker = functools.lru_cache(1)(Tokenizer.from_pretrained)


def encode_job(job: list[Block], tokenizer: Path, config: PrepareConfig) -> Encoded:
    """Returns the tokens of some blocks.

    A document is encoded in one call, which is faster than a call for each sentence. Sentences are found
    again by their bytes: their borders are borders of pre-tokens, so none lies inside a token.
    """
    bpe, left_out = tokenizer_of_worker(tokenizer), {}
    documents = [document for block in job for document in documents_of(block, config, left_out)]
    hashes = [hashlib.blake2b(document.encode(), digest_size=8).digest() for document in documents]
    encoded = [(np.zeros(0, np.int64),) * 2, *map(bpe.encode_with_lengths, documents)]
    tokens, lengths = map(np.concatenate, zip(*encoded))
    sentences = [split_sentences(document) for document in documents]
    sentence_bytes = [len(sentence.encode()) for in_document in sentences for sentence in in_document]
    # Where tokens and sentences end in the documents laid end to end: in bytes; then sentences in tokens.
    sentence_ends = np.searchsorted(np.cumsum(lengths), np.cumsum(sentence_bytes, dtype=np.int64)) + 1
    return Encoded(tokens.astype(token_dtype(bpe.vocab_size)), np.diff(sentence_ends, prepend=0),
                   np.array([len(in_document) for in_document in sentences], np.int64),
                   np.frombuffer(b"".join(hashes), np.uint64), left_out)


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


class TokenFiles:
    """The files of a preparation, appended to, and manifest.json, the state of them.

    What `note` has not noted was never written: a start that finds more in a file cuts it off.
    """

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.out, self.path = out, out / "manifest.json"
        names = [f"{split}.{kind}.bin" for split in SPLITS for kind in ("tokens", "sentences", "documents")]
        names += ["hashes.bin"]  # of all documents, to know duplicates by after a restart
        fresh = {"jobs": 0, "bytes": dict.fromkeys(names, 0), "duplicates": 0, "left_out": {}}
        self.state = read_json(self.path) if self.path.exists() else settings | fresh

    def append(self, name: str, array: np.ndarray) -> None:
        with open(self.out / name, "ab") as file:
            file.write(array.tobytes())
        self.state["bytes"][name] += array.nbytes

    def note(self) -> None:
        write_json(self.path, self.state)


def encode_corpus(config: PrepareConfig, files: list[Path], workers: int, output: TokenFiles) -> None:
    """Encodes all that is not yet encoded."""
    out, state = output.out, output.state
    for name, size in state["bytes"].items():
        (out / name).touch()
        if (out / name).stat().st_size < size:
            raise ValueError(f"{out / name} was cut since it was written; delete {out} and prepare again")
        os.truncate(out / name, size)
    # CHOICE: 1 % is held out, but of a small corpus more, about 1 MB or 5 %: a few documents are no fair
    # sample, and a curve of easy ones would lie below the training curve. A document's hash decides, so the
    # same document in another corpus, or twice in this one, is never on both sides.
    share = config.held_out or min(0.05, max(0.01, 1e6 / text_bytes(files)))
    seen = set(np.fromfile(out / "hashes.bin", np.uint64).tolist())
    encode = functools.partial(encode_job, tokenizer=out / "tokenizer", config=config)
    jobs = itertools.islice(jobs_of(files, config, "encoding"), state["jobs"], None)
    for encoded in in_order(encode, jobs, workers):
        for kind, (count, first) in encoded.left_out.items():
            if config.strict:
                raise ValueError(f"{first}: {kind}; without --strict such a line is left out")
            state["left_out"].setdefault(kind, [0, first])[0] += count
        append_documents(output, encoded, share, seen)
        state["jobs"] += 1
        output.note()


def append_documents(output: TokenFiles, encoded: Encoded, share: float, seen: set[int]) -> None:
    """Appends a job's documents to the files of their splits, but for those whose hash was `seen` before."""
    # Hashes are uniform below 2^64. The first document always: no corpus is without one held out.
    is_held_out = encoded.hashes < share * 2**64
    is_held_out[:1] |= not seen
    is_new = np.zeros(len(encoded.hashes), dtype=bool)
    for number, value in enumerate(encoded.hashes.tolist()):
        is_new[number] = value not in seen
        seen.add(value)
    output.append("hashes.bin", encoded.hashes)
    output.state["duplicates"] += int((~is_new).sum())
    # Which documents, sentences and tokens go to a split ...
    for split, has_document in zip(SPLITS, (is_new & ~is_held_out, is_new & is_held_out)):
        has_sentence = np.repeat(has_document, encoded.sentences_of_document)
        has_token = np.repeat(has_sentence, encoded.tokens_of_sentence)
        # ... and where these sentences and documents end in the split's file.
        before = output.state["bytes"][f"{split}.tokens.bin"] // encoded.tokens.itemsize
        sentence_ends = before + np.cumsum(encoded.tokens_of_sentence[has_sentence])
        last_sentence = np.cumsum(encoded.sentences_of_document[has_document]) - 1
        output.append(f"{split}.tokens.bin", encoded.tokens[has_token])
        output.append(f"{split}.sentences.bin", sentence_ends.astype("<i8"))
        output.append(f"{split}.documents.bin", sentence_ends[last_sentence].astype("<i8"))


def finish(output: TokenFiles) -> None:
    """Notes the checksums, last of all: a directory that has them is complete. Says what was found."""
    out, state = output.out, output.state
    for kind, (count, first) in state["left_out"].items():
        say(f"left out {count:,} lines {kind}, the first: {first}")
    if not all(state["bytes"][f"{split}.tokens.bin"] for split in SPLITS):
        raise ValueError("fewer than 2 different documents, but one is held out; blank lines part them, or "
                         "what data.py prepare --documents says")
    tokenizer = Tokenizer.from_pretrained(out / "tokenizer")
    tokens = np.memmap(out / "train.tokens.bin", token_dtype(tokenizer.vocab_size), "r")
    unigram = np.zeros(tokenizer.vocab_size, np.int64)
    for begin in range(0, len(tokens), 1 << 24):
        unigram += np.bincount(tokens[begin : begin + (1 << 24)], minlength=len(unigram))
    state |= {"tokenizer": tokenizer.fingerprint, "unigram": unigram.tolist()}
    state["checksums"] = {name: checksum(out / name) for name in state["bytes"] if name != "hashes.bin"}
    os.sync()  # all of it is on the disk before the file that says so
    output.note()
    say(f"{len(tokens):,} tokens to train on, {state['duplicates']:,} duplicates dropped; all is in {out}")


# ----------------------------------------------------------------------------------------------------------
# The prepared directory
# ----------------------------------------------------------------------------------------------------------


class Corpus:
    """One split of a prepared directory. Opening it maps files and reads none, whatever their size.

    Places are token numbers in the split laid end to end.
    Raises: ValueError, with both values, for another version or vocabulary, or a file of the wrong size.
    """

    def __init__(self, directory: str | Path, split: Literal["train", "heldout"] = "train"):
        self.directory, self.split = Path(directory), split
        path = self.directory / "manifest.json"
        self.manifest = read_json(path) if path.is_file() else {}
        if "checksums" not in self.manifest:
            raise ValueError(f"{directory}: not prepared, or not to its end; run `data.py prepare` (again)")
        self.tokenizer = Tokenizer.from_pretrained(self.directory / "tokenizer")
        found = {"tokenizer": self.tokenizer.fingerprint, "format_version": FORMAT_VERSION}
        expected = {name: self.manifest.get(name) for name in found}
        if found != expected:
            raise ValueError(f"{directory}: its tokens are of {expected}, its tokenizer/ and this program "
                             f"are of {found}; delete it and prepare again")
        self.vocab_size = self.tokenizer.vocab_size
        self.unigram = np.array(self.manifest["unigram"])  # (V,) how often each id is in the train split
        self.tokens = self._map("tokens", token_dtype(self.vocab_size))
        self.sentences = self._map("sentences", "<i8")  # where each ends
        self.documents = self._map("documents", "<i8")
        self.num_tokens = len(self.tokens)
        # Corpora that share it hold the same tokens, sentences and documents.
        self.fingerprint = fingerprint_of([self.manifest["tokenizer"], self.manifest["checksums"]])

    def _map(self, kind: str, dtype: str) -> np.ndarray:
        path = self.directory / f"{self.split}.{kind}.bin"
        expected = self.manifest["bytes"].get(path.name)
        # The size costs nothing to compare, and a copy that broke off is the most frequent damage.
        found = path.stat().st_size if path.is_file() else "no"
        if found != expected or not found:
            raise ValueError(f"{path}: {found} bytes, not the manifest's {expected}; prepare it again")
        return np.memmap(path, dtype, "r")

    def verify(self) -> None:
        """Compares the split's files with their checksums. Raises: ValueError naming the altered one."""
        for name, expected in self.manifest["checksums"].items():
            if name.startswith(self.split) and checksum(self.directory / name) != expected:
                raise ValueError(f"{self.directory / name}: altered since it was written; prepare again")

    def read(self, begin: int, end: int, separators: bool = False) -> np.ndarray:
        """Returns the ids from place `begin` up to `end`; with `</s>` between documents if asked."""
        ids = self.tokens[begin:end].astype(np.int64)
        if separators:
            inside = slice(*np.searchsorted(self.documents, [begin + 1, end]))
            ids = np.insert(ids, self.documents[inside] - begin, EOS)
        return ids


# ----------------------------------------------------------------------------------------------------------
# Tokenizer files: GPT-2's, Hugging Face's, fairseq's
# ----------------------------------------------------------------------------------------------------------


def rank_tokens(vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[bytes, int]:
    """Returns the rank of each token: the bytes, then the merges in order.

    Raises: ValueError where the specials are not at RoBERTa's places, or vocabulary and merges disagree.
    """
    ids = [index for token, index in vocab.items() if index != UNK or token == "<unk>"]
    if set(ids) != set(range(len(ids))):
        raise ValueError(f"the ids of {len(ids)} tokens must be 0 to {len(ids) - 1}, each once")
    # The mask is the last unit of the published models, and the fifth where people list five specials first.
    mask_id = 4 if vocab.get("<mask>") == 4 else len(ids) - 1
    for token, place in zip(SPECIAL_TOKENS, (BOS, PAD, EOS, UNK, mask_id)):
        if vocab.get(token) != place:
            raise ValueError(f"{token} has id {vocab.get(token)}, for RoBERTa {place}; it is another model's")
    # tiktoken merges the pair whose result has the lowest rank, as GPT-2 takes the merge learned first.
    ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_ORDER)}
    for pair in merges:
        token = bytes(CHAR_TO_BYTE[character] for character in "".join(pair))
        ranks.setdefault(token, len(ranks))  # two merges may make the same token
    # Both files must be of one tokenizer: if half of one is lost, ids still come out, and they are wrong. So
    # beside the specials (and GPT-2's, unused here) there must be the bytes and what merges make, no more.
    odd = {spell(token) for token in ranks}.symmetric_difference(vocab) - {*SPECIAL_TOKENS, "<|endoftext|>"}
    if odd := sorted(token for token in odd if not token.startswith("madeupword")):
        raise ValueError(f"{odd[0]!r} is in vocabulary or merges only: one was cut, or tokens were added")
    return ranks


def write_tokenizer(tokenizer: Tokenizer, directory: Path, model_max_length: int | None) -> None:
    """Writes a tokenizer's files; see Tokenizer.save_pretrained."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab = dict(sorted(tokenizer.vocab.items(), key=lambda item: item[1]))
    merges = [" ".join(pair) for pair in tokenizer.merges]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    # <mask> takes the space before it along, so that "a <mask>" has one space, that of the hidden word.
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    specials = [flags | {"content": t, "id": vocab[t], "lstrip": t == "<mask>"} for t in SPECIAL_TOKENS]
    everything = {  # tokenizer.json, from which Hugging Face's library needs no other file
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": specials, "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": {"type": "RobertaProcessing", "sep": ["</s>", EOS], "cls": ["<s>", BOS],
                           "trim_offsets": True, "add_prefix_space": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges}}
    settings = {"tokenizer_class": "RobertaTokenizer", "model_max_length": model_max_length}
    for name, content in (("vocab", vocab), ("tokenizer", everything), ("tokenizer_config", settings)):
        write_atomically(directory / f"{name}.json", json.dumps(content, ensure_ascii=False).encode())
    write_atomically(directory / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]).encode())


def read_tokenizer(directory: Path) -> Tokenizer:
    """Returns a directory's tokenizer; see Tokenizer.from_pretrained."""
    readers = {("tokenizer.json",): read_tokenizer_json, ("vocab.json", "merges.txt"): read_gpt2_tokenizer,
               ("encoder.json", "vocab.bpe", "dict.txt"): read_fairseq_tokenizer}
    # An unfinished run has its tokenizer in its checkpoints only, a prepared directory in tokenizer/; and
    # Hugging Face's Trainer may have put it beside the checkpoints only.
    checkpoints = sorted(directory.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[-1]))
    above = [directory.parent] if directory.name.startswith("checkpoint-") else []
    for place in (directory, directory / "tokenizer", *reversed(checkpoints), *above):
        for names, read in readers.items():
            if all((place / name).is_file() for name in names):
                try:
                    vocab, merges = read(*map(place.joinpath, names))
                    return Tokenizer(vocab | added_tokens(place), merges)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise ValueError(f"{place}: not RoBERTa's: {' and '.join(names)} ({error})") from None
    raise ValueError(f"{directory}: no tokenizer here; it takes tokenizer.json, GPT-2's or fairseq's files")


def added_tokens(place: Path) -> dict[str, int]:
    """Returns the tokens that Hugging Face's settings beside a tokenizer add to it: the specials.

    One that people added would be cut out of the text before the merges see it, which nothing here would do.
    Raises: ValueError for such a token.
    """
    path = place / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if settings.get("add_prefix_space"):
        raise ValueError("add_prefix_space is not built; take it out, begin each text with a space")
    added = {token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    if others := added.keys() - {*SPECIAL_TOKENS, "<|endoftext|>"}:
        raise ValueError(f"tokens were added, such as {min(others)!r}; only RoBERTa's own are built")
    return added


def read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Reads the one file of Hugging Face's tokenizers library. Early ones do not name the model's type."""
    content = read_json(path)
    model, before = content["model"], content["pre_tokenizer"]
    kinds = (model.get("type", "BPE"), before["type"], before["add_prefix_space"], content["normalizer"])
    if kinds != ("BPE", "ByteLevel", False, None):
        raise ValueError(f"model, pre-tokenizer, space, normalizer are {kinds}; only byte-level BPE is built")
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    return model["vocab"] | added, merges


def read_gpt2_tokenizer(vocab: Path, merges: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    lines = [line for line in merges.read_text("utf-8").split("\n") if line.strip()]
    return read_json(vocab), [tuple(line.split()) for line in lines if not line.startswith("#version:")]


def read_fairseq_tokenizer(encoder: Path, merges: Path, dictionary: Path) -> tuple[dict[str, int], list]:
    """Reads fairseq's: a line of dict.txt is a GPT-2 id and a count; its number plus four is RoBERTa's id."""
    ids, pairs = read_gpt2_tokenizer(encoder, merges)
    # fairseq encodes twice: text to GPT-2's ids, then these, as if they were words, to its dictionary's.
    names = {str(index): token for token, index in ids.items()}
    entries = [line.rsplit(" ", 1)[0] for line in dictionary.read_text("utf-8").splitlines()]
    tokens = [*SPECIAL_TOKENS[:4], *(names.get(entry, entry) for entry in entries), "<mask>"]
    if len(tokens) != len(set(tokens)):
        raise ValueError(f"{dictionary.name} has a unit twice: its ids cannot be told")
    # A dictionary made of a small corpus lacks what never occurred in it.
    lacking = {*BYTE_CHARS, *map("".join, pairs)} - {*tokens}
    if lacking:
        say_once(f"{len(lacking):,} units that merges make are not in {dictionary.name}: they become <unk>")
    return dict.fromkeys(sorted(lacking), UNK) | {token: i for i, token in enumerate(tokens)}, pairs


# ----------------------------------------------------------------------------------------------------------
# Files, locks, processes, flags
# ----------------------------------------------------------------------------------------------------------


def say(message: str, end: str = "\n") -> None:
    """Prints for the person watching, once however many ranks there are."""
    if int(os.environ.get("RANK", 0)) == 0:
        clear_line()
        print(message, end=end, flush=True)


def clear_line() -> None:
    """Removes what `say_now` shows on a terminal."""
    print(CLEAR_LINE if sys.stdout.isatty() else "", end="", flush=True)


say_once = functools.cache(say)


def say_now(message: Callable[[], str]) -> None:
    """Shows where something stands, on a terminal in a line that renews itself, and goes when something is
    said; elsewhere, as in a file, in a line once a minute.
    """
    now, is_terminal = time.monotonic(), sys.stdout.isatty()
    if now - said_at[-1] > (0.2 if is_terminal else 60):
        said_at[-1] = now
        width = shutil.get_terminal_size().columns - 1 if is_terminal else None
        say(message()[:width], end="" if is_terminal else "\n")


CLEAR_LINE, said_at = "\r\033[K", [time.monotonic()]


def counted(items: Iterable, what: str, total: int, size: Callable = lambda item: 1) -> Iterator:
    """Passes items on; shows how many of `total` are taken, and how long the rest takes at that pace."""
    began, done = time.monotonic(), 0
    for item in items:
        yield item
        done += size(item)
        left = (time.monotonic() - began) / max(1, done) * max(0, total - done)
        say_now(lambda: f"{what}: {min(100, 100 * done // total)} %, {clock(left)} left")  # noqa: B023


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises: ValueError naming the file where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged, no object but {type(content).__name__}")
    return content


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(without_nan(value)) + "\n").encode())


def without_nan(value: Any) -> Any:
    """Returns a value for JSON, which has no NaN or infinity: null is in their place."""
    # Python's json does write them, and asks when it reads them what they are to become.
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def write_atomically(path: Path, *content: bytes | memoryview) -> None:
    """Writes a file that after any crash is the old one or the whole new one.

    Written under another name, brought to the disk, and only then renamed: a rename happens or does not.
    """
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk, perhaps: leave no more on it than there was
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def temporary_beside(path: Path) -> Path:
    """Returns a name for what is to become `path`. What a killed process left under it is written over."""
    return path.with_name(f".{path.name}.tmp")


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_of(value: Any) -> str:
    """Returns 16 hexadecimal digits that name a value of JSON's kinds: others have others."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def check_ours(out: Path, mark: str, may_hold: Iterable[str] = ()) -> None:
    """Raises ValueError where a directory holds something but no `mark` of this program: it is someone's."""
    others = set(os.listdir(out)) - {".lock", f".{mark}.tmp", *may_hold} if out.is_dir() else set()
    if others and not (out / mark).exists():
        raise ValueError(f"{out} holds {min(others)!r} and no {mark} of this program; choose another --out")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps a directory, which is made if need be, to this process for the time of a `with` block.

    The lock is the kernel's: it ends with the process, however that ends, and is not handed on to workers, so
    a crashed run locks nobody out. Raises: ValueError naming the process that has the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Not through a link: a directory from elsewhere could have one to a file of the user's.
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with open(descriptor, "r+", errors="replace") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read(500)
            raise ValueError(f"{directory} is in use by {holder}; wait, or choose another --out") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def cores() -> int:
    """Returns how many cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def made_ahead(pool: Any, function: Callable, jobs: Iterable, ahead: int) -> Iterator:
    """Yields function(job) for every job, in order, from a pool; only a few are taken ahead of time."""
    # Without a bound the pool would take all jobs at once, and a corpus would have to fit into memory.
    jobs, waiting = iter(jobs), deque()
    try:
        for job in itertools.islice(jobs, ahead):
            waiting.append(pool.submit(function, job))
        while waiting:
            # Each result that is taken makes room for one job more.
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, job) for job in itertools.islice(jobs, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def prefetch(make: Callable[[int], Any], numbers: Iterable[int], ahead: int = 4) -> Iterator:
    """Yields make(n) for every number, made by a thread a few numbers early."""
    return made_ahead(ThreadPoolExecutor(1), make, numbers, ahead)


def in_order(function: Callable, jobs: Iterable, workers: int) -> Iterator:
    """Yields function(job) for every job, in their order, from `workers` processes (1: this one)."""
    if workers <= 1:
        yield from map(function, jobs)
        return
    # A forked worker begins at once, but with a copy of a GPU driver's state, if the parent has one, which
    # the driver forbids; then workers begin as new programs.
    torch = sys.modules.get("torch")
    start = "spawn" if torch and torch.cuda.is_initialized() else None
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(start), end_with_parent)
    try:
        yield from made_ahead(pool, function, jobs, ahead=2 * workers)
    except BrokenExecutor:
        raise OSError("a worker was killed, perhaps for want of memory; try fewer --workers") from None


def end_with_parent() -> None:
    """Ends a worker when its parent has ended, even by SIGKILL: it would wait for jobs for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def clock(seconds: float) -> str:
    """Returns a duration for people.

    >>> clock(75), clock(90000)
    ('0:01:15', '25:00:00')
    """
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def check_flags(config: Any) -> None:
    """Raises ValueError for a field that lies outside its range, before anything is read or written."""
    for field in dataclasses.fields(config):
        value, low, high = getattr(config, field.name), field.metadata["low"], field.metadata["high"]
        for entry in value if isinstance(value, tuple) else (value,):
            # Texts and None have no range. Asked this way round, NaN is in none.
            if isinstance(entry, int | float) and not low <= entry <= high:
                limit = f"at least {low:g}" if entry < low else f"from {low:g} to {high:g}"
                raise ValueError(f"--{field.name.replace('_', '-')} {entry} must be {limit}")


def may_change(config: Any) -> set[str]:
    """Returns the fields that a second start of the same run may give another value."""
    return {field.name for field in dataclasses.fields(config) if field.metadata["may_change"]}


def add_flags(parser: argparse.ArgumentParser, config: Any) -> None:
    """Adds a --flag for each field of a config, whose value is the default; flags not given stay absent."""
    types = get_type_hints(type(config))
    group = functools.cache(parser.add_argument_group)  # a title's first flag makes the group, others join it
    for field in dataclasses.fields(config):
        kind, default, about = types[field.name], getattr(config, field.name), field.metadata
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]  # T | None: the flag takes a T
        text = about["help"] + (f" [{about['source']}]" if about["source"] else "")
        if default not in (None, ()):
            text += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
        arguments: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            arguments["choices"] = get_args(kind)
        else:
            if get_origin(kind) is tuple:
                kind, arguments["nargs"] = get_args(kind)[0], "+"
            arguments |= {"type": kind, "metavar": {int: "N", float: "X", str: "DIR"}[kind]}
        group(about["group"]).add_argument("--" + field.name.replace("_", "-"), **arguments)


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="data.py", description="Turns text into token files.")
    command = parser.add_subparsers(required=True).add_parser("prepare", allow_abbrev=False)
    add_flags(command, PrepareConfig())
    config = dataclasses.replace(PrepareConfig(), **vars(parser.parse_args(argv)))
    try:
        with contextlib.ExitStack() as at_the_end:
            at_the_end.callback(clear_line)
            prepare(config)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error}; once that is mended, the same command goes on with {config.out}")


if __name__ == "__main__":
    main()
