"""What the paper's studies share: cells of runs with several seeds, a table beside the paper's, a figure.

    python bench/batch_size.py --scale smoke                      # seconds: does it work?
    python bench/batch_size.py --scale cpu                        # 10 to 45 minutes on two cores
    python bench/batch_size.py --scale gpu --corpus books/ wiki/  # minutes on one large GPU, on your own text

A study is data: its cells, the flags of train.py that follow from each, what is measured, what the paper
found. This file does the rest, in the order in which it stands here: it runs `train.py` for every cell and
every seed, and writes NAME-SCALE.json (a record for each run), .md and .png. Every run has its own directory;
a second call of the same command takes the finished ones as they are and goes on with the others. (After a
change of the code, take a new --out.) What a study expects stands at the head of its file, written before it
was run; what came out, in bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from measure import ON_GPU, command, machine, texts_of
from report import show

import data

# ----------------------------------------------------------------------------------------------------------
# What a study is
# ----------------------------------------------------------------------------------------------------------

Cell = dict[str, Any]  # one value of each thing that is varied: {"batch_size": 16, "peak_lr": 0.002}
Flags = dict[str, Any]  # of train.py, by name
Record = dict[str, Any]  # of one run: its cell, its seed, what was measured


def product(**values: Iterable) -> list[Cell]:
    """Returns a cell for each combination.

    >>> product(masking=("static", "dynamic"), passes=(10,))
    [{'masking': 'static', 'passes': 10}, {'masking': 'dynamic', 'passes': 10}]
    """
    return [dict(zip(values, combination)) for combination in itertools.product(*values.values())]


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
LARGER = {"preset": "small", "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
          "intermediate_size": 2048, "seq_len": 128, "batch_size": 64, "peak_lr": 1e-3}
SCALES = {
    "smoke": Scale(MODEL | SMALLEST, vocab_size=1024, sequences=256, seeds=2),
    "cpu": Scale(MODEL, vocab_size=2048, sequences=24_000),
    "gpu": Scale(LARGER, vocab_size=8192, sequences=40_000),
}


class Panel(NamedTuple):
    """A part of the figure: y against x, with a line for each value of `line`; all three are of a record.

    If y is a column of the paper's table, the panel shows the paper's figures.
    """

    x: str
    y: str
    line: str = ""  # "": one line
    log: bool = False  # x on a logarithmic scale


class Paper(NamedTuple):
    """A table of the paper's: its figures under its columns, by the values of a cell."""

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
    cells: dict[str, list[Cell]]  # by scale; the longest runs best first
    flags: Callable[[Session, Cell], Flags]  # at least `data` and `max_steps`
    panels: tuple[Panel, ...]
    paper: Paper
    columns: tuple[str, ...] = ("eval_perplexity",)  # what of the records the table sums up over the seeds
    tuned: tuple[str, ...] = ()  # of a cell: the first seed tries all values, the others take the best
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # by scale: what differs from SCALES
    measure: Callable[[Session, Record, Path], dict[str, float]] = lambda *run: {}  # added to a record


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


def prepared_texts(session: Session, name: str, texts: Iterable[str], **config: Any) -> Path:
    """Returns these texts, prepared under a name; they are read only where that is not done yet."""
    rows, out = session.data / f"{name}.jsonl", session.data / name
    if not rows.exists():
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        data.write_atomically(rows, "".join(lines).encode())
    return data.prepare(data.PrepareConfig((str(rows),), str(out), **{"held_out": HELD_OUT} | config))


@functools.cache
def share_of_corpus(session: Session, share: float) -> Path:
    """Returns every k-th document of the training text, and all held-out ones, with the whole's tokenizer.

    Shares are nested: every 16th document is a 4th one, too.
    """
    whole = prepared(session)
    if share == 1:
        return whole

    kept = itertools.islice(texts_of(data.Corpus(whole, "train")), 0, None, round(1 / share))
    texts = itertools.chain(texts_of(data.Corpus(whole, "heldout")), kept)
    return prepared_texts(session, f"{whole.name}-share{share:g}", texts, tokenizer=str(whole / "tokenizer"))


# ----------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------


def complete(scale: Scale, flags: Flags) -> Flags:
    """Returns all flags of a run: what follows from its length, the scale's, and the cell's own."""
    flags = scale.flags | flags
    steps = flags["max_steps"]
    defaults = {
        # The preset adds no dropout, positions that start wider, the bias at the unigram's logs, and β2 0.99
        # where no flag names another. The paper tunes the warm-up for each setting (§3); here it is the same
        # share of every run.
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
    name = re.sub(r"[^\w.-]", "", "-".join(f"{name}{value}" for name, value in cell.items()).replace("_", ""))
    out = session.runs / f"{name}-seed{seed}"
    flags = flags | {"seed": seed, "out": out}
    # The record is written when all is done, with all that was asked for: with another task it is made again.
    asked = flags | {name: getattr(session.options, name) for name in ("glue", "second_language")}
    path, described = Path(f"{out}.json"), {name: str(value) for name, value in asked.items()}
    finished = data.read_json(path) if path.exists() else {}
    if finished.get("flags") == described:
        return finished["record"]
    run_script(session, "train.py", flags, Path(f"{out}.log"))
    record = {**cell, "seed": seed, **data.read_json(out / "results.json")}
    record |= study.measure(session, record, out)
    data.write_json(path, {"flags": described, "record": record})
    return record


def run_all(study: Study, session: Session) -> list[Record]:
    """Does all runs, seed by seed: what was stopped can make its table with fewer --seeds. Of values that
    are tuned, only the best of the first seed go on; a record says whether its cell was `chosen`.
    """
    cells, records = study.cells[session.options.scale], []
    for seed in range(session.scale.seeds):
        records += run_seed(study, session, cells, seed)
        cells = best_cells(study, records)
    return [record | {"chosen": {name: record[name] for name in cells[0]} in cells} for record in records]


def best_cells(study: Study, records: list[Record]) -> list[Cell]:
    """Returns of the cells that differ only in what is tuned the best one; a run that diverged has none."""
    names = list(next(iter(study.cells.values()))[0])
    groups = grouped([record for record in records if record["seed"] == 0],
                     *[name for name in names if name not in study.tuned])
    best = [min(group, key=lambda record: record["eval_perplexity"] or math.inf) for group in groups.values()]
    return [{name: record[name] for name in names} for record in best]


def run_seed(study: Study, session: Session, cells: list[Cell], seed: int) -> list[Record]:
    """Does the runs of a seed, several at a time; returns their records in the order of the cells."""
    flags = [complete(session.scale, study.flags(session, cell)) for cell in cells]
    print(f"{study.name}, seed {seed}: {len(cells)} runs, {session.options.jobs} at a time, in "
          f"{session.runs}", flush=True)
    pool = ThreadPoolExecutor(session.options.jobs)  # of threads, each waiting for a process
    try:
        futures = [pool.submit(run, study, session, *job, seed) for job in zip(cells, flags)]
        for number, future in enumerate(as_completed(futures), 1):
            record = future.result()
            names = [name for name in (*cells[0], *study.columns) if record.get(name) is not None]
            shown = [f"{name} {show(record[name])}" for name in names]
            print(f"{number}/{len(cells)}  {'  '.join(shown)}", flush=True)
    finally:
        # The runs that have begun end first; Ctrl-C has reached them, too, and train.py saves before it goes.
        pool.shutdown(cancel_futures=True)
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
    cell; below, the paper's other cells.
    """
    varied, paper = list(study.cells["smoke"][0]), study.paper
    columns = [name for name in ("steps", *study.columns) if any(name in record for record in records)]
    rows = [[*varied, *columns, *(f"paper: {column}" for column in paper.columns)]]
    rows.append(["---"] * len(rows[0]))
    cells = grouped(records, *varied)
    for cell in cells | paper.rows:
        values = [[run[name] for run in cells.get(cell, []) if name in run] for name in columns]
        figures = paper.rows.get(cell, [""] * len(paper.columns))
        shown = [*cell, *[""] * (len(varied) - len(cell))]  # the paper's cells may leave the tuned ones out
        rows.append([*map(show, shown), *(spread(found) if found else "" for found in values),
                     *map(str, figures)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# Okabe and Ito's colours, told apart by colour-blind readers; the markers, in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def draw(study: Study, records: list[Record], path: Path) -> None:
    """Draws the panels side by side."""
    from matplotlib.figure import Figure

    varied = list(study.cells["smoke"][0])
    of_paper = [dict(zip(varied, cell)) | dict(zip(study.paper.columns, figures))
                for cell, figures in study.paper.rows.items()]
    # A study may measure less than it could, such as without --glue.
    panels = [panel for panel in study.panels if panel.y in study.paper.columns or panel.y in records[0]]
    rows, columns = math.ceil(len(panels) / 3), min(3, len(panels))
    figure = Figure(figsize=(4.5 * columns, 0.5 + 3.7 * rows), layout="constrained")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        is_papers = panel.y in study.paper.columns
        draw_panel(axes, panel, of_paper if is_papers else records)
        axes.set_title(f"the paper ({study.paper.source})" if is_papers else "here", fontsize=10)
    figure.suptitle(f"{study.title} (line: median of the seeds, band: their range)")
    figure.savefig(path, dpi=150)


def draw_panel(axes: Any, panel: Panel, records: list[Record]) -> None:
    """Draws a line through the medians of the seeds, a band from the lowest to the highest, and beside each
    line what it is.
    """
    ends = []
    for i, (value, of_line) in enumerate(grouped(records, *filter(None, [panel.line])).items()):
        groups = grouped([record for record in of_line if panel.y in record], panel.x)
        if all(isinstance(x, int | float) for (x,) in groups):
            groups = dict(sorted(groups.items()))
        xs = [x for (x,) in groups]
        samples = [[record[panel.y] for record in group] for group in groups.values()]
        middle, low, high = (list(map(which, samples)) for which in (median, min, max))
        color = COLORS[i % 7]
        axes.plot(xs, middle, color=color, marker=MARKERS[i % 7])
        axes.fill_between(xs, low, high, color=color, alpha=0.2)
        axes.vlines(xs, low, high, color=color)  # a single point has no band
        if value and panel.line != panel.x:
            ends.append((middle[-1], xs[-1], f"{panel.line.replace('_', ' ')} {show(*value)}", color))
    if panel.log:
        axes.set_xscale("log")
        axes.minorticks_off()
        xs = sorted({record[panel.x] for record in records})
        axes.set_xticks(xs, map(show, xs))
    if "perplexity" in panel.y and "unigram_perplexity" in records[0]:
        # What guessing by frequency alone would reach. (A small share of the text has a worse one.)
        baseline = min(record["unigram_perplexity"] for record in records)
        axes.axhline(baseline, color="#555555", linestyle="--", linewidth=1)
        axes.annotate("unigram", (0.02, baseline), xycoords=("axes fraction", "data"), fontsize=8)
    # Beside the end of each line what it is, moved up where it would cover another.
    bottom, top = axes.get_ylim()
    before = -math.inf
    for y, x, text, color in sorted(ends, key=lambda end: end[0]):
        before = max(y, before + 0.05 * (top - bottom))
        axes.annotate(f"  {text}", (x, before), color=color, fontsize=8, va="center")
    axes.tick_params(axis="x", labelrotation=0 if isinstance(records[0][panel.x], int | float) else 30)
    better = "(less is better)" if re.search("perplexity|bits", panel.y) else ""
    axes.set(xlabel=panel.x.replace("_", " "), ylabel=f"{panel.y.replace('_', ' ')} {better}")
    axes.spines[["top", "right"]].set_visible(False)


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
    records = [record for record in records if record["chosen"]]
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
    parser.add_argument("--glue", help="folder with SST-2 and perhaps QNLI, for the studies that fine-tune")
    parser.add_argument("--second-language", help="a text file, for text_encoding")
    parser.add_argument("--out", default="runs/studies", help="keeps runs and data; default: %(default)s")
    parser.add_argument("--results", help="where table and figure go; none: --out")
    parser.add_argument("--seeds", type=int, default=0, help="runs of each cell; 0: the scale's")
    # Many processes would fight for one GPU's memory; a small model on the CPU uses one core well.
    jobs = 1 if ON_GPU else data.cores()
    parser.add_argument("--jobs", type=int, default=jobs, help="runs at a time; default: %(default)s here")
    options = parser.parse_args()
    if options.jobs < 1 or options.seeds < 0:
        parser.error(f"--jobs {options.jobs} must be at least 1, --seeds {options.seeds} at least 0")
    if options.glue and not Path(options.glue, "SST-2").is_dir():
        parser.error(f"--glue {options.glue} has no SST-2 in it")
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
