"""The tests' fixtures: a prepared directory, an undisturbed run on it, the rule for missing oracles."""

import importlib
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # more gain nothing here, and wait for each other on a busy machine

import pytest  # noqa: E402
from helpers import config, make_documents, write_corpus  # noqa: E402

import data  # noqa: E402


@pytest.fixture
def oracle():
    """Imports another people's implementation; its absence skips, or where REQUIRE_ORACLE is set, fails."""

    def load(name: str):
        if os.environ.get("REQUIRE_ORACLE"):
            return importlib.import_module(name)
        return pytest.importorskip(name, reason=f"{name} is in the optional `oracle` extra")

    return load


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A directory of six text files with 40 documents each."""
    return write_corpus(tmp_path / "corpus")


@pytest.fixture(scope="session")
def tokenizer() -> data.Tokenizer:
    """Of 500 units, some of which are of other scripts and white space."""
    return data.train_bpe([*make_documents(100), "Ümläut é日本語 🙂👍🏽 \r\n\t don't it's"] * 2, 500)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A prepared directory: 300 documents, 400 units, a tenth held out."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "text.txt").write_text("\n\n".join(make_documents(300)), encoding="utf-8")
    return data.prepare(data.PrepareConfig((str(root / "text.txt"),), str(root / "prepared"), 400, workers=1,
                                           held_out=0.1))


@pytest.fixture(scope="session")
def straight(prepared, tmp_path_factory) -> Path:
    """The directory of an uninterrupted run of 12 steps in one process; not to be changed."""
    import train

    out = tmp_path_factory.mktemp("straight") / "run"
    train.pretrain(config(prepared, out))
    return out
