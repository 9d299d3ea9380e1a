"""The README says what is there: names, tags, flags and commands."""

import json
import re
import shlex
import shutil

import pytest
from helpers import PUBLISHED, ROOT, make_documents, run, write_corpus
from test_finetune import write_glue
from test_formats import CONFIG_OF_2019

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
    configs = (train.TrainConfig, data.PrepareConfig, finetune.FinetuneConfig)
    names = [field.name for config in configs for field in data.dataclasses.fields(config)]
    names += ["no-compile"]  # argparse makes it
    flags = {"--" + name.replace("_", "-") for name in names}
    torchruns = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"}
    benchmarks = {"--benchmark-only", "--benchmark-json", "--scale", "--corpus", "--out", "--glue",
                  "--second-language", "--results"}
    named = set(re.findall(r"(?<!\S)`?(--[a-z][a-z-]+)", README))
    assert named <= flags | torchruns | benchmarks | {"--help"}


def numbers_in(value):
    """All numbers of a JSON file, its texts apart."""
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(entry)
    elif isinstance(value, int | float):
        yield from (value, 100 * value, value / 60, value / 1e6)  # per cent, minutes, millions


@pytest.mark.parametrize("document", ["README.md", "bench/RESULTS.md"])
def test_figures_are_those_of_the_files_they_name(document):
    """Every number of a line that links to results is in one of these, rounded as it is quoted."""
    folder, lines = (ROOT / document).parent, (ROOT / document).read_text(encoding="utf-8").splitlines()
    checked = 0
    for line in lines:
        names = re.findall(r"\]\(([\w/.-]+\.json)\)", line)
        found = [number for name in names for number in numbers_in(json.loads((folder / name).read_text()))]
        text = re.sub(r"`[^`]*`|\([^)]*\)", "", line) if names else ""  # commands, paths and remarks apart
        for quoted in re.findall(r"(?<![\w.§-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w-])", text):
            digits = len(quoted.partition(".")[2])
            assert any(f"{number:,.{digits}f}" == quoted for number in found), (quoted, line)
            checked += 1
    assert checked >= 3


def test_commands_parse():
    """Every command of the README that runs one of the four files, as far as its flags go."""
    prepare = data.argparse.ArgumentParser()
    prepare.add_argument("command", choices=["prepare"])
    data.add_flags(prepare, data.PrepareConfig())
    parsers = {"roberta.py": roberta.parse, "data.py": prepare.parse_args, "train.py": train.parse,
               "finetune.py": finetune.parse}
    found = 0
    for line in re.findall(r"^(?:pip .* && )?((?:torchrun|python) .*)$", README, re.MULTILINE):
        words = shlex.split(line.split("  #")[0].replace(" ...", ""))
        for script in parsers.keys() & words:
            parsers[script](words[words.index(script) + 1 :])
            found += 1
    assert found >= 9


@pytest.mark.slow
def test_published_models_go_through_every_command_of_their_section(tmp_path):
    """With roberta-base's tokenizer files and its config.json of 2019, smaller, and random weights."""
    if not (PUBLISHED / "roberta_base").exists():
        pytest.skip(f"not in {PUBLISHED}: roberta_base; set ROBERTA_DATA")
    base = tmp_path / "roberta-base"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    shape = roberta.RobertaConfig.base(**sizes)
    roberta.RobertaForMaskedLM(shape).save_pretrained(base)
    shutil.copytree(PUBLISHED / "roberta_base", base, dirs_exist_ok=True)
    sizes |= {"vocab_size": shape.vocab_size, "max_position_embeddings": shape.max_position_embeddings}
    (base / "config.json").write_text(json.dumps(CONFIG_OF_2019 | sizes))
    write_glue(tmp_path / "glue", "mnli", (8, 4, 2))
    write_corpus(tmp_path / "papers", files=1, documents=60)
    (tmp_path / "other.txt").write_text("\n\n".join(make_documents(40, seed=1)))
    smaller = {"roberta.py": "", "finetune.py": " --epochs 1 --seq-len 32",
               "train.py": " --max-steps 2 --warmup-steps 1 --batch-size 4 --seq-len 32 --eval-sequences 8"}
    section = README.split("## Published models")[1].split("```")[1]
    commands = re.findall(r"(?:torchrun|python) (\S+\.py) (.*)", section)
    assert len(commands) == 4
    for script, flags in commands:
        run(ROOT / script, *shlex.split(flags + smaller[script]), cwd=tmp_path)
    log = [json.loads(line) for line in (tmp_path / "runs/papers/log.jsonl").read_text().splitlines()]
    assert log[0]["step"] == 0 and log[0]["eval_perplexity"] > 1
    assert json.loads((tmp_path / "runs/mnli/results.json").read_text())["metrics"].keys() >= {"accuracy"}
    assert [path.name for path in (tmp_path / "runs/other").iterdir()] == ["results.json"]


def test_requirements_pin_what_the_project_allows():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert pins["torch"] == "2.13.0"
    allowed = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{name}>=' in allowed for name in pins)
