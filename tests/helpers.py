"""What the tests share, fixtures apart: a made-up corpus, a way to run the scripts, published files."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# Published files that are too large for the project (GPT-2's merges, books); tests that need them skip
# without.
PUBLISHED = Path(os.environ.get("ROBERTA_DATA", ROOT.parent / "shared" / "data"))


def make_documents(count: int, seed: int = 0) -> list[str]:
    """English-looking documents of Zipf-distributed words in sentences, the same for the same arguments."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 8))) for _ in range(400)]
    weights = [1 / rank for rank in range(1, 401)]

    def sentence() -> str:
        chosen = rng.choices(words, weights, k=rng.randint(3, 18))
        return " ".join(chosen).capitalize() + rng.choice(".!?")

    return [" ".join(sentence() for _ in range(rng.randint(1, 30))) for _ in range(count)]


def same(a, b) -> bool:
    """Returns whether two nested values, with tensors in them, are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def ends(main, arguments, code: int, capsys) -> str:
    """Calls a program's main(), which must exit with this code; returns what it wrote to stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    errors = capsys.readouterr().err
    found = exit.value.code
    if isinstance(found, str):  # which the interpreter prints, to end with 1
        found, errors = 1, f"{found}\n"
    assert found == code, errors
    return errors


def run(*command, **options) -> subprocess.CompletedProcess:
    """Runs a Python script of the project, or `-m module`, from its root; returns output and exit code."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, **options)
