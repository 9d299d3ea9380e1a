"""The tests' fixtures: a prepared directory, and the rule for missing oracles."""

import importlib
import os
from pathlib import Path

import pytest
from helpers import make_documents

import data


@pytest.fixture
def oracle():
    """Imports another people's implementation; its absence skips, or where REQUIRE_ORACLE is set, fails."""

    def load(name: str):
        if os.environ.get("REQUIRE_ORACLE"):
            return importlib.import_module(name)
        return pytest.importorskip(name, reason=f"{name} is in the optional `oracle` extra")

    return load


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A prepared directory: 300 documents, 400 units, a tenth held out."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "text.txt").write_text("\n\n".join(make_documents(300)), encoding="utf-8")
    config = data.PrepareConfig(
        (str(root / "text.txt"),), str(root / "prepared"), 400, workers=1, held_out=0.1
    )
    return data.prepare(config)
