"""The tests' fixtures: a prepared directory, the rule for missing oracles, the count of injected faults."""

import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from helpers import ROOT, make_documents

import data


def pytest_addoption(parser):
    parser.addoption(
        "--faults-json", type=Path, help="where to write which faults were survived, and how many"
    )


@pytest.fixture(scope="session")
def faults(request):
    """What was injected and survived, by fault; written at the end where --faults-json says."""
    counts, path = defaultdict(Counter), request.config.getoption("--faults-json")
    yield counts
    if path and counts:
        import torch

        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
        lost = counts.pop("lost", Counter())
        survived = sum(entry["injected"] for entry in counts.values())
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit.stdout.strip(),
            "command": "pytest " + " ".join(sys.argv[1:]),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "injected": survived + lost.total(),
            "recovered": survived,
            "data_lost": lost.total(),
            "lost": lost,
            "faults": counts,
        }
        path.write_text(json.dumps(record, indent=1) + "\n")


@pytest.fixture
def tally(faults, request):
    """Notes faults that a test has injected and, after its last assertion, found survived."""
    noted = []

    def note(fault: str, injected: int = 1, **more: int) -> None:
        faults[fault].update(injected=injected, **more)  # sums up what several tests note
        noted.append(fault)

    yield note
    if not noted:
        faults["lost"][request.node.name] += 1


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
