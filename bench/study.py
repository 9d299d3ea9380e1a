"""What the paper's studies share: a grid of runs with several seeds, a table beside the paper's, a figure.

    python bench/batch_size.py --scale smoke                      # seconds: does it work?
    python bench/batch_size.py --scale cpu                        # about 20 minutes on two cores
    python bench/batch_size.py --scale gpu --corpus books/ wiki/  # minutes on one large GPU, on your own text

A study is data: what is varied, the flags of train.py that follow from it, what is measured, what the paper
found. This file does the rest, in the order in which it stands here: it runs `train.py` for every cell of
the grid and every seed, and writes NAME-SCALE.json (a record for each run), .md and .png. Every run has its
own directory; a second call of the same command takes the finished ones as they are. (After a change of the
code, take a new --out.)
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from measure import ON_GPU, command, machine, texts_of
from report import show

import data
import train

# ----------------------------------------------------------------------------------------------------------
# What a study is
# ----------------------------------------------------------------------------------------------------------

Cell = dict[str, Any]  # one value of each thing that is varied: {"batch_size": 16, "peak_lr": 0.002}
Flags = dict[str, Any]  # of train.py, by name
Record = dict[str, Any]  # of one run: its cell, its seed, what was measured


@dataclass(frozen=True)
class Scale:
    """What all runs of a study have in common."""

    flags: Flags
    vocab_size: int
    sequences: int  # that a run sees
    seeds: int = 3


MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256,
         "seq_len": 64, "batch_size": 16, "peak_lr": 3e-3}
SMALLEST = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 64, "seq_len": 32}
LARGER = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048,
          "seq_len": 128, "batch_size": 64, "peak_lr": 1e-3}
SCALES = {
    "smoke": Scale(MODEL | SMALLEST, vocab_size=1024, sequences=256, seeds=2),
    "cpu": Scale(MODEL, vocab_size=2048, sequences=24_000),
    "gpu": Scale(LARGER, vocab_size=8192, sequences=40_000),
}


class Panel(NamedTuple):
    """A part of the figure: y against x, with a line for each value of `line`; all three are of a record."""

    x: str
    y: str
    line: str
    log: bool = False  # x on a logarithmic scale


class Paper(NamedTuple):
    """A table of the paper's: its figures under its columns, by cell."""

    source: str
    columns: tuple[str, ...]
    rows: dict[tuple, tuple]


@dataclass(frozen=True, eq=False)  # a key of the caches below is the session itself, not its content
class Session:
    """One call of a study."""

    options: argparse.Namespace
    scale: Scale
    data: Path  # where prepared text is kept, for all studies with the same --out
    runs: Path  # where the runs are kept


@dataclass(frozen=True)
class Study:
    """A question of the paper's."""

    name: str
    title: str
    grid: dict[str, dict[str, tuple]]  # by scale: what is varied, its values; the longest runs best first
    flags: Callable[[Session, Cell], Flags]  # at least `data` and `max_steps`
    panels: tuple[Panel, ...]
    paper: Paper
    columns: tuple[str, ...] = ("eval_perplexity",)  # what of the records the table sums up over the seeds
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # by scale: what differs from SCALES
    measure: Callable[[Session, Cell, Path], dict[str, float]] | None = None  # what is added to a record


# ----------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------

# The share of the documents that is held out. prepare() chooses them by their digests, so a part of the
# corpus that has all of them in it holds the same ones out, and runs on different parts compare.
HELD_OUT = 0.05


@functools.cache
def prepared(session: Session) -> Path:
    """Returns the corpus, prepared: that of --corpus, else the documentation installed here."""
    out = session.data / f"units{session.scale.vocab_size}"
    corpus = tuple(session.options.corpus)
    return data.prepare(data.PrepareConfig(corpus, str(out), session.scale.vocab_size, held_out=HELD_OUT))


def prepared_texts(session: Session, name: str, texts: Callable[[], Iterable], **config: Any) -> Path:
    """Returns these texts, prepared under a name; `texts` is called only where that is not done yet."""
    rows, out = session.data / f"{name}.jsonl", session.data / name
    if not rows.exists():
        lines = [json.dumps({"text": text}) + "\n" for text in texts()]
        data.write_atomically(rows, "".join(lines).encode())
    return data.prepare(data.PrepareConfig((str(rows),), str(out), held_out=HELD_OUT, **config))


@functools.cache
def share_of_corpus(session: Session, share: float) -> Path:
    """Returns every k-th document of the training text, and all held-out ones, with the whole's tokenizer.

    Shares are nested: every 16th document is a 4th one, too.
    """
    whole = prepared(session)
    if share == 1:
        return whole

    def texts() -> Iterator[str]:
        yield from texts_of(data.Corpus(whole, "heldout"))
        yield from itertools.islice(texts_of(data.Corpus(whole, "train")), 0, None, round(1 / share))

    return prepared_texts(session, f"{whole.name}-share{share:g}", texts, tokenizer=str(whole / "tokenizer"))


# ----------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------


def complete(scale: Scale, flags: Flags) -> Flags:
    """Returns all flags of a run: what follows from its length, the scale's, and the cell's own."""
    flags = scale.flags | flags
    steps = flags["max_steps"]
    defaults = {
        # The paper tunes the warm-up for each setting (§3); here it is the same share of every run.
        "preset": "tiny", "warmup_steps": round(0.06 * steps), "log_interval": max(1, steps // 20),
        "eval_interval": max(1, steps // 5), "eval_sequences": 1024,
        "checkpoint_interval": max(1, steps // 3),
        "micro_batch_size": min(flags["batch_size"], 512 if ON_GPU else 64), "keep": 1,
    }
    return defaults | flags


def run_script(session: Session, script: str, flags: Flags, log: Path) -> None:
    """Runs train.py or finetune.py. What it says goes into a file: many at once would talk over each other.

    Raises: ValueError with the last line of that.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, data.cores() // session.options.jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(command(script, flags), stdout=file, stderr=file, env=environment)
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
        raise ValueError(f"{script} ended with {done.returncode}: {' '.join(last)} ({log} has all of it)")


def run(study: Study, session: Session, cell: Cell, flags: Flags, seed: int) -> Record:
    """Does one run, or finds it done; returns its record."""
    name = "-".join(f"{name}{value}" for name, value in cell.items()).replace("_", "")
    out = session.runs / f"{name}-seed{seed}"
    flags = flags | {"seed": seed, "out": out}
    # The record is written when all is done, with the flags that it is of: other flags make another run.
    path, described = Path(f"{out}.json"), {name: str(value) for name, value in flags.items()}
    if path.exists():
        finished = data.read_json(path)
        if finished["flags"] == described:
            return finished["record"]
    run_script(session, "train.py", flags, Path(f"{out}.log"))
    record = {**cell, "seed": seed, **data.read_json(out / "results.json"), "curve": curve(out)}
    if study.measure:
        record |= study.measure(session, cell, out)
    data.write_json(path, {"flags": described, "record": record})
    return record


def curve(out: Path) -> list[dict[str, float]]:
    """Returns step, epoch and perplexity of each of a run's evaluations."""
    lines = train.read_log(out)
    # The lines of evaluations do not have the epoch; those of training have that in which their step began.
    last = [line for line in lines if "epoch" in line][-1]
    epochs_per_step = last["epoch"] / max(1, last["step"] - 1)
    found = [(line["step"], line["eval_perplexity"]) for line in lines if "eval_perplexity" in line]
    return [{"step": step, "epoch": step * epochs_per_step, "perplexity": value} for step, value in found]


def run_all(study: Study, session: Session) -> list[Record]:
    """Does all runs, several at a time; returns their records in the order of the grid."""
    grid = study.grid[session.options.scale]
    cells = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    flags = [complete(session.scale, study.flags(session, cell)) for cell in cells]
    # Seed by seed: a study that is stopped early has seen every cell.
    jobs = [(*job, seed) for seed in range(session.scale.seeds) for job in zip(cells, flags)]
    print(f"{study.name}: {len(jobs)} runs, {session.options.jobs} at a time, in {session.runs}", flush=True)
    pool = ThreadPoolExecutor(session.options.jobs)  # of threads, each waiting for a process
    try:
        futures = [pool.submit(run, study, session, *job) for job in jobs]
        for number, future in enumerate(as_completed(futures), 1):
            record = future.result()
            shown = [f"{name} {show(record[name])}" for name in (*grid, "seed", *study.columns)]
            print(f"{number}/{len(jobs)}  {'  '.join(shown)}", flush=True)
    except BaseException:
        # The runs that have begun end first; Ctrl-C has reached them, too, and train.py saves before it goes.
        pool.shutdown(cancel_futures=True)
        raise
    return [future.result() for future in futures]


# ----------------------------------------------------------------------------------------------------------
# Table and figure
# ----------------------------------------------------------------------------------------------------------


def grouped(records: list[Record], *names: str) -> dict[tuple, list[Record]]:
    """Returns the records that agree in `names`, in the order in which these first occur."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return groups


def spread(values: list[float]) -> str:
    """Returns median and range: the paper, too, reports medians over seeds (§5.1, Table 1).

    >>> spread([3.5, 2.0, 7.0]), spread([2048, 2048])
    ('3.5 (2 to 7)', '2,048')
    """
    low, high = min(values), max(values)
    return show(low) if low == high else f"{show(median(values))} ({show(low)} to {show(high)})"


def table(study: Study, records: list[Record]) -> str:
    """Returns the Markdown table: a line for each cell, the paper's figures beside it where it has the same
    cell; below, the paper's other cells."""
    varied, paper = list(study.grid["smoke"]), study.paper
    rows = [[*varied, "steps", *study.columns, *(f"paper: {column}" for column in paper.columns)]]
    rows.append(["---"] * len(rows[0]))
    cells = grouped(records, *varied)
    for cell in cells | paper.rows:
        runs = cells.get(cell, [])
        measured = [spread([run[name] for run in runs]) if runs else "" for name in ("steps", *study.columns)]
        figures = paper.rows.get(cell, [""] * len(paper.columns))
        rows.append([*map(show, cell), *measured, *map(str, figures)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# Okabe and Ito's colours, told apart by colour-blind readers; the markers, in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def draw(study: Study, records: list[Record], path: Path) -> None:
    """Draws the panels side by side."""
    from matplotlib.figure import Figure

    count = len(study.panels)
    figure = Figure(figsize=(2 + 5 * count, 4.2), layout="constrained")
    for number, panel in enumerate(study.panels, 1):
        draw_panel(figure.add_subplot(1, count, number), panel, records)
    figure.suptitle(f"{study.title}: median and range of the seeds")
    figure.savefig(path, dpi=150)


def draw_panel(axes: Any, panel: Panel, records: list[Record]) -> None:
    """Draws medians, and through each a line from the lowest to the highest of the seeds."""
    points = records
    if panel.x not in records[0]:  # it is in the curve, once for each evaluation
        points = [record | point for record in records for point in record["curve"]]
    for i, ((value,), of_line) in enumerate(grouped(points, panel.line).items()):
        groups = grouped(of_line, panel.x)
        xs = [x for (x,) in groups]
        samples = [[point[panel.y] for point in group] for group in groups.values()]
        label = f"{panel.line.replace('_', ' ')} {show(value)}"
        axes.plot(xs, list(map(median, samples)), color=COLORS[i % 7], marker=MARKERS[i % 7], label=label)
        axes.vlines(xs, list(map(min, samples)), list(map(max, samples)), color=COLORS[i % 7])
    if "perplexity" in panel.y:
        # What guessing by frequency alone would reach. (A small share of the text has a worse one.)
        baseline = min(record["unigram_perplexity"] for record in records)
        axes.axhline(baseline, color="#555555", linestyle="--", linewidth=1, label="unigram baseline")
    if panel.log:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(xs, map(show, xs))
    axes.set(xlabel=panel.x.replace("_", " "), ylabel=panel.y.replace("_", " "))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def publish(study: Study, session: Session, records: list[Record]) -> None:
    """Writes NAME-SCALE.json, .md and .png."""
    results = Path(session.options.results or session.options.out)
    stem = f"{study.name}-{session.options.scale}"
    results.mkdir(parents=True, exist_ok=True)
    # The call without the folders of the machine that it was made on.
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    call = shlex.join(["python", f"bench/{study.name}.py", *words])
    tokens = data.Corpus(prepared(session)).num_tokens
    about = {"study": study.name, "command": call, **machine(), "precision": "fp16" if ON_GPU else "fp32",
             "corpus_tokens": tokens, "scale": asdict(session.scale)}
    data.write_json(results / f"{stem}.json", about | {"runs": records})
    draw(study, records, results / f"{stem}.png")
    text = (
        f"# {study.title}\n\n`{call}`, {about['machine']}, {about['date']}, commit "
        f"{about['commit']}, torch {about['torch']}. Median and range of {session.scale.seeds} seeds; the "
        f"paper's figures are from {study.paper.source}.\n\n{table(study, records)}\n\n![]({stem}.png)\n"
    )
    data.write_atomically(results / f"{stem}.md", text.encode())
    print(f"\n{table(study, records)}\n\nin {results}: {stem}.json, .md, .png")


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def main(study: Study, about: str) -> None:
    """Runs a study from the command line; `about` is its file's docstring."""
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"{study.name}.py", description=about, formatter_class=as_it_stands)
    parser.add_argument("--scale", choices=list(SCALES), default="smoke", help="how large; default: smoke")
    parser.add_argument("--corpus", nargs="+", default=[], help="text; none: the documentation installed")
    parser.add_argument("--out", default="runs/studies", help="keeps runs and data; default: %(default)s")
    parser.add_argument("--results", help="where table and figure go; none: --out")
    parser.add_argument("--seeds", type=int, default=0, help="runs of each cell; 0: the scale's")
    # Many processes would fight for one GPU's memory; a small model on the CPU uses one core well.
    jobs = 1 if ON_GPU else data.cores()
    parser.add_argument("--jobs", type=int, default=jobs, help="runs at a time; default: %(default)s here")
    options = parser.parse_args()
    if options.jobs < 1 or options.seeds < 0:
        parser.error(f"--jobs {options.jobs} must be at least 1, --seeds {options.seeds} at least 0")
    scale = replace(SCALES[options.scale], **study.changes.get(options.scale, {}))
    scale = replace(scale, seeds=options.seeds or scale.seeds)
    out = Path(options.out)
    session = Session(options, scale, out / "data", out / f"{study.name}-{options.scale}")
    torch.set_num_threads(max(1, data.cores() // options.jobs))  # for what is measured in this process
    try:
        publish(study, session, run_all(study, session))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
