"""Collects the benchmarks for `pytest --benchmark-only`, and no others; says which peers were left out."""

import measure
import pytest

import train


def pytest_ignore_collect(collection_path, config):
    """Leaves the bench_*.py files to --benchmark-only: plain `pytest` runs the tests."""
    if collection_path.name.startswith("bench_") and not config.getoption("--benchmark-only"):
        return True


def pytest_benchmark_update_machine_info(config, machine_info):
    """Adds what the figures depend on, takes out what names the machine."""
    import study

    for name in ("node", "release"):
        machine_info.pop(name, None)
    machine_info |= {"device": measure.device_name(), **study.machine()}


def pytest_terminal_summary(terminalreporter):
    for peer, why in measure.LEFT_OUT.items():
        terminalreporter.write_line(f"left out of the tables: {peer} ({why})")


@pytest.fixture(autouse=True, scope="session")
def all_cores():
    """Tests that ran before may have changed it."""
    measure.torch.set_num_threads(train.cores())
