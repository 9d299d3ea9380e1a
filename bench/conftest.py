"""Collects the benchmarks for `pytest --benchmark-only`, and only then.

    pytest --benchmark-only                                     # minutes, and all cores
    BENCH_QUICK=1 pytest --benchmark-only                       # every case once, and small: does it work?
    BENCH_CORPUS=books/:wiki.jsonl.xz pytest --benchmark-only   # your text, else the documentation installed

Hugging Face's libraries are the peers. Where they are not installed, ours is measured alone.
"""

import os

import measure
import pytest
import report

import data


def pytest_ignore_collect(collection_path, config):
    """Leaves the bench_*.py files to --benchmark-only: plain `pytest` runs the tests."""
    if collection_path.name.startswith("bench_") and not config.getoption("--benchmark-only"):
        return True


def pytest_benchmark_update_machine_info(config, machine_info):
    """Adds what the figures depend on, takes out what names the machine."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
    machine_info |= measure.machine()


def pytest_terminal_summary(terminalreporter):
    """Shows the ratios, which pytest-benchmark's own table does not know."""
    if measure.CASES:
        terminalreporter.write_line("\n" + report.table(measure.CASES))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared corpus of real text, as a user makes it."""
    given = tuple(path for path in os.environ.get("BENCH_CORPUS", "").split(":") if path)
    out = tmp_path_factory.mktemp("bench") / "prepared"
    return data.Corpus(data.prepare(data.PrepareConfig(given, str(out), 8192)))


@pytest.fixture(scope="session")
def texts(corpus):
    """Documents of that corpus, 10 MB of them (1 MB in the quick form)."""
    found, size = [], 0
    for text in measure.texts_of(corpus):
        found.append(text)
        size += len(text.encode())
        if size >= (1_000_000 if measure.QUICK else 10_000_000):
            break
    return found
