"""What the tests share, fixtures apart: made-up text, small runs, ways to call the programs."""

import dataclasses
import hashlib
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

# A run so small that a step takes milliseconds, without dropout: ranks and micro-batches may be compared.
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "dropout": 0.0, "seq_len": 32, "batch_size": 8, "micro_batch_size": 8, "max_steps": 12,
         "warmup_steps": 3, "log_interval": 4, "eval_interval": 6, "checkpoint_interval": 6}


def config(data, out, **changes):
    """The small run on `data`, as train.py's config."""
    import train

    return dataclasses.replace(train.tiny(), data=str(data), out=str(out), **SMALL | changes)


def command(data, out, **changes) -> list[str]:
    """The same as command-line arguments."""
    flags = {"data": data, "out": out} | SMALL | changes
    return [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]


def make_documents(count: int, seed: int = 0) -> list[str]:
    """English-looking documents of Zipf-distributed words in sentences, the same for the same arguments."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 8))) for _ in range(400)]
    weights = [1 / rank for rank in range(1, 401)]

    def sentence() -> str:
        chosen = rng.choices(words, weights, k=rng.randint(3, 18))
        return " ".join(chosen).capitalize() + rng.choice(".!?")

    return [" ".join(sentence() for _ in range(rng.randint(1, 30))) for _ in range(count)]


def write_corpus(directory: Path, files: int = 6, documents: int = 40) -> Path:
    directory.mkdir(exist_ok=True)
    for i in range(files):
        (directory / f"{i}.txt").write_text("\n\n".join(make_documents(documents, seed=i)))
    return directory


def same(a, b) -> bool:
    """Returns whether two nested values, with tensors in them, are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def contents(directory: Path) -> dict[str, str]:
    """Returns a checksum of what each file holds, locks apart: what differs is then named in a line."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files}


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


def run(*command, code=0, cwd=ROOT, timeout=240, **options) -> subprocess.CompletedProcess:
    """Runs a Python script of the project, or `-m module`, from its root, which must exit with this code."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, **options)
    assert done.returncode == code, done.stderr
    return done


def holds_no_pickle(directory: Path) -> None:
    """Every file below is text, a picture or safetensors, by its content and not only by its name."""
    import roberta

    for path in (path for path in directory.rglob("*") if path.is_file()):
        if path.suffix == ".safetensors":
            assert roberta.read_safetensors(path)
        elif path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert path.read_text("utf-8").isprintable() or path.suffix in (".json", ".jsonl", ".txt", ".md")
