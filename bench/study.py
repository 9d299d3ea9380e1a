"""What the paper's studies share: a grid of runs with several seeds each, then a table, a figure, a reading.

    python bench/batch_size.py --scale smoke                      # seconds: does it work?
    python bench/batch_size.py --scale cpu                        # up to 20 minutes on two cores
    python bench/batch_size.py --scale gpu --corpus books/ wiki/  # minutes on one large GPU, on your own text

A study is `train.py` run many times, nothing else: every run has its own directory, with its log and its
checkpoints, and a second call of the same command finishes what is missing. Runs share the cores, by default
a thread each, for a small model gains little from a second one.

A reading is written by the program from the numbers, by rules that stand in the study's file: it says what
was seen and whether the paper saw the same, and it cannot be tuned without the rule being changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import (  # noqa: E402
    HELD_OUT,
    TRAIN,
    Corpus,
    PrepareConfig,
    assign_splits,
    digest,
    find_parts,
    prepare,
    read_documents,
    read_json,
    run_jobs,
    say,
    write_atomically,
)

# ----------------------------------------------------------------------------------------------------------
# How large a study is made
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """The model and the data that all runs of a study have in common; a study adds what it varies."""

    vocab_size: int = 2048
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    seq_len: int = 64
    batch_size: int = 16
    peak_lr: float = 3e-3
    sequences: int = 24_000  # that a run sees
    share: float = 1.0  # of the corpus's documents that are trained on
    seeds: int = 3


SMOKE = {"vocab_size": 1024, "hidden_size": 16, "num_hidden_layers": 1, "seq_len": 32, "seeds": 2,
         "sequences": 256}
CPU: dict[str, Any] = {}
GPU = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
       "seq_len": 128, "batch_size": 64, "peak_lr": 1e-3, "sequences": 40_000}


class Arm(NamedTuple):
    """One cell of a study's grid: what it varies, for the records, and the run that follows from it."""

    values: dict[str, Any]
    config: train.TrainConfig

    @property
    def name(self) -> str:
        return "-".join(f"{name}{value:g}" if isinstance(value, float) else f"{name}{value}"
                        for name, value in self.values.items()).replace("_", "")


# ----------------------------------------------------------------------------------------------------------
# A study
# ----------------------------------------------------------------------------------------------------------


class Study:
    """A question of the paper's. Subclasses say what is run (`arms`), what is drawn, and how it is read.

    A record is a dict of one run: what was varied, the seed, and what `measure` returns.
    """

    name: str  # of its files
    title: str
    paper: str  # what the paper found, with the numbers
    caveat: str  # what this scale cannot show
    scales: dict[str, Scale]

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Adds the flags that only this study has."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.scale = self.scales[options.scale]
        if options.seeds:
            self.scale = replace(self.scale, seeds=options.seeds)
        self.data = Path(options.out) / "data"
        self.runs = Path(options.out) / f"{self.name}-{options.scale}"

    def arms(self) -> Iterable[Arm]:
        """Yields the cells of the grid; best the longest runs first: the cores are then busy to the end."""
        raise NotImplementedError

    def figures(self, records: list[dict]) -> dict[str, Any]:
        """Returns matplotlib figures by the ending of their file name; "" is the main one."""
        raise NotImplementedError

    def reading(self, records: list[dict]) -> list[str]:
        """Returns sentences on what was seen, and whether it agrees with the paper."""
        raise NotImplementedError

    def table(self, records: list[dict]) -> list[list[str]]:
        """Returns the rows of a table, its head first."""
        varied = list(self.varied(records))
        rows = [[*varied, "steps", "held-out perplexity, median", "range"]]
        for values, runs in grouped(records, *varied):
            rows.append([*map(show, values), show(runs[0]["steps"]), *spread(runs, "eval_perplexity")])
        return rows

    # What the runs are made of.

    def prepared(self, share: float = 1.0) -> Path:
        """Returns a prepared directory with a share of the documents, and always the same held-out ones.

        The tokenizer is that of the whole corpus. Shares are nested: what 1/4 has, 1/2 has too.
        """
        vocab_size = self.scale.vocab_size
        whole = self.data / f"units{vocab_size}"
        config = PrepareConfig(tuple(self.options.corpus), str(whole), vocab_size, workers=self.options.jobs)
        with quietly(self.data / f"{whole.name}.log"):
            prepare(config)  # returns at once if it is there; refuses, if it is of another corpus
        if share == 1:
            return whole
        part = self.data / f"{whole.name}-share{share:g}"
        if not (part / "manifest.json").exists():
            text = self.data / f"{part.name}.jsonl"
            chosen = sample(self.documents, share, config.held_out)
            lines = [json.dumps({"text": document}) + "\n" for document in chosen]
            write_atomically(text, "".join(lines).encode())
            with quietly(self.data / f"{part.name}.log"):
                prepare(replace(config, corpus=(str(text),), out=str(part),
                                tokenizer=str(whole / "tokenizer")))
        return part

    def documents(self) -> Iterator[str]:
        """Yields the documents of the whole corpus."""
        corpus = self.options.corpus or [self.prepared() / "documentation"]
        return (document for part in find_parts(corpus) for document in read_documents(*part))

    def config(self, data: Path, max_steps: int, **changes: Any) -> train.TrainConfig:
        """Returns a pretraining run at this scale: 6 % of it warm-up, evaluated five times if not changed."""
        scale = self.scale
        shape = {name: getattr(scale, name) for name in ("hidden_size", "num_hidden_layers",
                 "num_attention_heads", "seq_len", "batch_size", "peak_lr")}
        shape |= {"intermediate_size": 4 * scale.hidden_size, "eval_interval": -(-max_steps // 5)} | changes
        micro = min(shape["batch_size"], 512 if torch.cuda.is_available() else 64)
        return train.TrainConfig(
            preset="tiny", data=str(data), max_steps=max_steps, warmup_steps=round(0.06 * max_steps),
            micro_batch_size=micro, log_interval=max(1, max_steps // 20), keep=1, eval_sequences=1024,
            checkpoint_interval=-(-max_steps // 3), **shape,
        )

    # What is done with them.

    def measure(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Does one run, or finds it done; returns its record."""
        torch.set_num_threads(max(1, train.cores() // self.options.jobs))
        out = self.runs / f"{arm.name}-seed{seed}"
        with quietly(Path(f"{out}.log")):
            try:
                results = train.train(replace(arm.config, out=str(out), seed=seed))
            except FloatingPointError as error:
                raise ValueError(f"{out.name} diverged: {error}") from None
        curve = [[line["step"], line["eval_loss"]] for line in train.read_log(out) if "eval_loss" in line]
        return {**arm.values, "seed": seed, **results, "curve": curve}

    def run(self) -> None:
        """Does all runs, several at a time; then writes the records, the figures and the reading."""
        started, records = time.monotonic(), []
        self.prepared()  # refuses an --out that holds another corpus, before anything is made from it
        arms = list(self.arms())
        jobs = [(arm, seed) for seed in range(self.scale.seeds) for arm in arms]
        say(f"{self.name}: {len(jobs)} runs, {self.options.jobs} at a time, in {self.runs}")
        for record in run_jobs(self.measure, jobs, self.options.jobs):
            records.append(record)
            what = "  ".join(f"{name} {show(record[name])}" for name in arms[0].values)
            say(f"{len(records)}/{len(jobs)}  {time.monotonic() - started:.0f} s  {what}  seed "
                f"{record['seed']}: perplexity {record['eval_perplexity']:.1f}")
        order = {tuple(arm.values.values()): i for i, arm in enumerate(arms)}
        records.sort(key=lambda r: (order[tuple(r[name] for name in arms[0].values)], r["seed"]))
        self.write(records, time.monotonic() - started)

    def files(self) -> tuple[Path, str]:
        """Returns the folder of the results and the stem of their names."""
        return Path(self.options.results or self.runs), f"{self.name}-{self.options.scale}"

    def write(self, records: list[dict], seconds: float) -> None:
        """Writes the records into NAME-SCALE.json, then the rest from it."""
        results, stem = self.files()
        results.mkdir(parents=True, exist_ok=True)
        corpus = Corpus(self.prepared(self.scale.share))
        about = {
            "study": self.name, "paper": self.paper, "command": command(), **machine(),
            "corpus": {"text": "given" if self.options.corpus else "documentation",
                       **corpus.manifest["counts"]},
            "scale": asdict(self.scale), "parameters": records[0]["parameters"], "jobs": self.options.jobs,
            "seconds_of_this_call": round(seconds),
            "seconds_of_all_runs": round(sum(record["seconds"] for record in records)),
        }
        records = rounded(records)
        content = json.dumps(about | {"runs": []}, indent=1)
        rows = ",\n".join("  " + json.dumps(record) for record in records)
        content = content.removesuffix("[]\n}") + f"[\n{rows}\n ]\n}}\n"  # a run a line
        write_atomically(results / f"{stem}.json", content.encode())
        self.publish()

    def publish(self) -> None:
        """Draws the figures and writes the reading, from NAME-SCALE.json."""
        results, stem = self.files()
        about = read_json(results / f"{stem}.json")
        self.scale = replace(self.scale, seeds=about["scale"]["seeds"])
        records, pictures = about["runs"], []
        reading = self.reading(records)
        for ending, figure in self.figures(records).items():
            name = f"{stem}{ending}.png"
            for axes in figure.axes:
                keep_labels_apart(axes)
            figure.savefig(results / f".{name}", dpi=150, format="png")
            os.replace(results / f".{name}", results / name)
            pictures.append(f"![{self.title}]({name})")
        head, *rows = self.table(records)
        sizes = sorted({record["parameters"] for record in records})
        lines = [f"# {self.title}", "", f"{self.scale.seeds} seeds, "
                 f"{' to '.join(f'{size:,}' for size in dict.fromkeys((sizes[0], sizes[-1])))} parameters, "
                 f"{about['machine']}, torch {about['torch']}; `{about['command']}`", "", *pictures, "",
                 *(f"- {sentence}" for sentence in [f"The paper: {self.paper}", *reading, self.caveat]), "",
                 "| " + " | ".join(head) + " |", "|---" * len(head) + "|",
                 *("| " + " | ".join(row) + " |" for row in rows), ""]
        write_atomically(results / f"{stem}.md", "\n".join(lines).encode())
        say("\n".join(["", *reading, "", f"in {results}: {stem}.json, .md, .png"]))

    def varied(self, records: list[dict]) -> list[str]:
        """Returns the names of what the study varies: what stands before the seed in a record."""
        return list(records[0])[: list(records[0]).index("seed")]


def sample(documents: Callable[[], Iterator[str]], share: float, held_out: float) -> Iterator[str]:
    """Yields a share of the documents to train on, chosen by their digests, and all that are held out."""
    digests = digest(documents())
    [splits] = assign_splits([digests], held_out)  # as prepare() will assign them
    lowest = np.uint64(int((1 - share) * 2**64))
    keep = (splits == HELD_OUT) | (splits == TRAIN) & (digests >= lowest)
    return (document for document, kept in zip(documents(), keep, strict=True) if kept)


def setup() -> train.Setup:
    """Returns what train.py's functions need to know of this process, and says nothing of it."""
    with contextlib.redirect_stdout(None):
        return train.set_up(None)


@contextlib.contextmanager
def quietly(log: Path) -> Iterator[None]:
    """Sends what is printed into a file: many runs at once would talk over each other."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file), \
            contextlib.redirect_stderr(file):
        yield


# ----------------------------------------------------------------------------------------------------------
# Numbers and words
# ----------------------------------------------------------------------------------------------------------


def grouped(records: list[dict], *names: str) -> list[tuple[tuple, list[dict]]]:
    """Returns the records that agree in `names`, in the order in which these first occur."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return list(groups.items())


def values(runs: list[dict], name: str = "eval_perplexity") -> list[float]:
    return [run[name] for run in runs]


def center(runs: list[dict], name: str = "eval_perplexity") -> float:
    """Returns the median over the seeds, the paper's own summary (§5.1, Table 1)."""
    return float(median(values(runs, name)))


def show(value: Any) -> str:
    """Returns a number in three digits or so.

    >>> show(43.602), show(0.003), show(1250), show("static")
    ('43.6', '0.003', '1,250', 'static')
    """
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def spread(runs: list[dict], name: str) -> list[str]:
    found = values(runs, name)
    return [show(float(median(found))), f"{show(float(min(found)))} to {show(float(max(found)))}"]


def apart(a: list[dict], b: list[dict], name: str = "eval_perplexity") -> int:
    """Returns 1 if every seed of `a` has less of a measure than any of `b`, -1 if more, 0 if the ranges meet.

    That is what three to five seeds can show: by chance alone, three against three are apart in one of ten.
    """
    first, second = values(a, name), values(b, name)
    return (max(first) < min(second)) - (min(first) > max(second))


def compare(a: list[dict], b: list[dict], name: str = "eval_perplexity") -> str:
    """Returns in words how `a` stands to `b`, of a measure of which less is better; with both medians."""
    words = {1: "better in every seed", -1: "worse in every seed", 0: "not told apart by the seeds' ranges"}
    return f"{words[apart(a, b, name)]} ({show(center(a, name))} against {show(center(b, name))})"


def rounded(value: Any) -> Any:
    """Returns the value with floats of six digits: what a reader of the JSON needs."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def machine() -> dict[str, str]:
    """Returns what a figure depends on beside the code: date, commit, hardware, versions."""
    commit = "unknown"
    with contextlib.suppress(OSError):  # no git on this machine
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or commit
    gpu = torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if gpu else f"{train.cores()} CPU cores ({processor()})"
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit, "machine": hardware,
            "torch": torch.__version__, "python": platform.python_version(),
            "precision": "fp16" if gpu else "fp32"}


def processor() -> str:
    """Returns the processor's name, as far as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def command() -> str:
    """Returns this call without the folders of the machine it was made on."""
    words = [word.removeprefix(f"{ROOT}/") for word in sys.argv[1:]]
    words = [Path(word).name if os.path.isabs(word) else word for word in words]
    return shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *words])


# ----------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart by colour-blind readers; the markers, and labels on the lines, in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def axes_for(title: str, xlabel: str, ylabel: str, panels: int = 1) -> tuple[Any, Any]:
    """Returns a figure and its axes, one or several side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(7 if panels == 1 else 10, 4.2), layout="constrained")
    for each in np.atleast_1d(axes):
        each.set(xlabel=xlabel, ylabel=ylabel)
        each.spines[["top", "right"]].set_visible(False)
        each.margins(x=0.12)
    figure.suptitle(title, fontsize=11)
    return figure, axes


def draw_line(axes: Any, i: int, label: str, xs: Sequence[float], samples: Sequence[Sequence[float]]) -> None:
    """Draws line `i`: medians, bars from the lowest to the highest of the seeds, and its name at the end."""
    middle = np.array([median(sample) for sample in samples])
    below = middle - np.array([min(sample) for sample in samples])
    above = np.array([max(sample) for sample in samples]) - middle
    style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
    axes.errorbar(xs, middle, (below, above), capsize=3, linewidth=1.4, **style)
    axes.annotate(label, (xs[-1], middle[-1]), (7, 0), textcoords="offset points", va="center", fontsize=9,
                  color=style["color"], gid="line")


def keep_labels_apart(axes: Any, points: float = 11) -> None:
    """Moves the names of lines that end close together up, so that none is written over another."""
    labels = [text for text in axes.texts if text.get_gid() == "line"]
    pixels = points * axes.figure.dpi / 72
    taken: list[tuple[float, float]] = []
    for label in sorted(labels, key=lambda label: axes.transData.transform(label.xy)[1]):
        x, y = axes.transData.transform(label.xy)
        near = [other + pixels for at, other in taken if abs(at - x) < 20 * pixels]
        place = max([y, *near])
        taken.append((x, place))
        label.set_position((7, (place - y) * 72 / axes.figure.dpi))


def draw_baseline(axes: Any, value: float, label: str = "unigram baseline") -> None:
    axes.axhline(value, color="#555555", linestyle="--", linewidth=1)
    axes.annotate(label, (0.01, value), (0, 3), xycoords=("axes fraction", "data"), fontsize=9,
                  color="#555555", textcoords="offset points",
                  bbox={"color": "white", "alpha": 0.8, "pad": 0.5})


def plain_ticks(axes: Any, xs: Sequence[float], axis: str = "x") -> None:
    """Puts the axis on a logarithmic scale with the values themselves as ticks."""
    getattr(axes, f"set_{axis}scale")("log")
    getattr(axes, f"set_{axis}ticks")(xs, [show(x) for x in xs])
    getattr(axes, f"{axis}axis").minorticks_off()


def caption(figure: Any, text: str) -> None:
    figure.supxlabel(text, fontsize=8, color="#555555")


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def main(study: type[Study], argv: Sequence[str] | None = None) -> None:
    """Runs a study from the command line."""
    parser = argparse.ArgumentParser(f"{study.name}.py", None, f"{study.title}. The paper: {study.paper}")
    parser.add_argument("--scale", choices=list(study.scales), default="smoke",
                        help="smoke: seconds; cpu: 20 minutes on 2 cores; gpu: 8 minutes (default smoke)")
    parser.add_argument("--corpus", nargs="+", default=[],
                        help="text; none: the documentation installed here")
    parser.add_argument("--out", default="runs/studies",
                        help="where runs and data are kept (default %(default)s)")
    parser.add_argument("--results", help="where JSON, figures and reading go; none: beside the runs")
    parser.add_argument("--seeds", type=int, help="runs of each setting; none: the scale's")
    parser.add_argument("--redraw", action="store_true",
                        help="run nothing: figures and reading from the JSON that is there")
    # Many processes would fight for one GPU's memory; a small model on the CPU uses one core well.
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else train.cores(),
                        help="runs at a time (default: one a core, one on a GPU)")
    study.add_flags(parser)
    options = parser.parse_args(argv)
    if options.jobs < 1 or (options.seeds is not None and options.seeds < 1):
        parser.error(f"--jobs {options.jobs} and --seeds {options.seeds or 0} must be at least 1")
    try:
        study(options).publish() if options.redraw else study(options).run()
    except (ValueError, OSError, FloatingPointError) as error:
        train.fail(f"error: {error}")
    except KeyboardInterrupt:
        train.fail("interrupted; the same command goes on from here", 130)
