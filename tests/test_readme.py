"""The README says what is there: names, tags, flags and commands."""

import re
import shlex

import pytest
from helpers import ROOT

import data
import finetune
import roberta
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = {"roberta.py": roberta, "data.py": data, "train.py": train, "finetune.py": finetune}


def test_every_row_from_paper_to_code_names_something_that_exists():
    rows = re.findall(r"^\| (§[\d.]+|Table \d+) .*\| (\w+\.py): `(\w+)` \|$", README, re.MULTILINE)
    assert len(rows) >= 20
    for reference, file, name in rows:
        assert hasattr(MODULES[file], name), (reference, file, name)


@pytest.mark.parametrize("tag", ["DIFFERS", "CHOICE"])
def test_tags_in_the_code_are_listed(tag):
    files = [*(ROOT / file for file in MODULES), *(ROOT / "bench").glob("*.py")]
    in_code = sum(file.read_text(encoding="utf-8").count(f"{tag}: ") for file in files)
    assert len(re.findall(rf"^- {tag} \(", README, re.MULTILINE)) == in_code > 0


def test_files_and_flags_that_are_named_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    flags = {
        "--" + field.name.replace("_", "-")
        for config in (train.TrainConfig, data.PrepareConfig, finetune.FinetuneConfig)
        for field in data.dataclasses.fields(config)
    }
    torchruns = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"}
    benchmarks = {"--benchmark-only", "--benchmark-json", "--scale", "--corpus", "--out"}
    named = set(re.findall(r"(?<!\S)`?(--[a-z][a-z-]+)", README))
    assert named <= flags | torchruns | benchmarks | {"--help"}


def test_commands_parse():
    """Every command of the README that runs one of the four files, as far as its flags go."""
    found = 0
    for line in re.findall(r"^(?:pip .* && )?((?:torchrun|python) .*)$", README, re.MULTILINE):
        words = shlex.split(line.split("  #")[0].replace(" ...", ""))
        if "train.py" in words:
            train.parse(words[words.index("train.py") + 1 :])
            found += 1
        if "finetune.py" in words:
            finetune.parse(words[words.index("finetune.py") + 1 :])
            found += 1
        if "roberta.py" in words:
            roberta.parse(words[words.index("roberta.py") + 1 :])
            found += 1
        if "data.py" in words:
            parser = data.argparse.ArgumentParser()
            data.add_flags(parser, data.PrepareConfig())
            parser.parse_args(words[words.index("data.py") + 2 :])
            found += 1
    assert found >= 9


def test_requirements_pin_what_the_project_allows():
    pins = dict(
        line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line
    )
    assert pins["torch"] == "2.13.0"
    allowed = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{name}>=' in allowed for name in pins)
