"""What the tests share: a made-up corpus, a prepared directory of it, the rule for missing oracles."""

import importlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import data

ROOT = Path(__file__).parent.parent
# Published files that are too large for the project (GPT-2's merges, books); tests that need them skip
# without.
PUBLISHED = Path(os.environ.get("ROBERTA_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def oracle():
    """Imports another people's implementation; its absence skips, or where REQUIRE_ORACLE is set, fails."""

    def load(name: str):
        if os.environ.get("REQUIRE_ORACLE"):
            return importlib.import_module(name)
        return pytest.importorskip(name, reason=f"{name} is in the optional `oracle` extra")

    return load


def make_documents(count: int, seed: int = 0) -> list[str]:
    """English-looking documents of Zipf-distributed words in sentences, the same for the same arguments."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 8))) for _ in range(400)]
    weights = [1 / rank for rank in range(1, 401)]

    def sentence() -> str:
        chosen = rng.choices(words, weights, k=rng.randint(3, 18))
        return " ".join(chosen).capitalize() + rng.choice(".!?")

    return [" ".join(sentence() for _ in range(rng.randint(1, 30))) for _ in range(count)]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A prepared directory: 300 documents, 400 units, a tenth held out."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "text.txt").write_text("\n\n".join(make_documents(300)), encoding="utf-8")
    config = data.PrepareConfig(
        (str(root / "text.txt"),), str(root / "prepared"), 400, workers=1, held_out=0.1
    )
    return data.prepare(config)


def run(*command, **options) -> subprocess.CompletedProcess:
    """Runs a Python script of the project, or `-m module`, from its root; returns output and exit code."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, **options)
