"""Turns saved benchmarks into bench/RESULTS.md, its figures beside them.

    pytest --benchmark-only --benchmark-json bench/results/benchmarks-cpu.json
    python bench/report.py                                    # all bench/results/benchmarks-*.json
    python bench/report.py --out DIR DIR/benchmarks-gpu.json  # elsewhere
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from study import COLORS, ROOT, show

RATES = {"tokens": "tokens/s", "bytes": "MB/s", "texts": "texts/s", "questions": "questions/s",
         "pairs": "pairs/s", "steps": "steps/s"}

ABOUT = """Written by bench/report.py from the JSON files in bench/results. Times are medians; "times ours" is
the median over the rounds of a peer's time by ours in the same round. Rates are of real tokens. FLOP/s count
the matrix products that the task needs, the head at predicted positions only, and are compared with a large
matrix product measured in the same run."""


def read(path: Path) -> tuple[dict[str, Any], dict[str, list[dict]]]:
    """Returns what a file says of its machine, and its benchmarks by case. Raises: ValueError naming it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cases: dict[str, list[dict]] = {}
        for benchmark in content["benchmarks"]:
            info = benchmark["extra_info"]
            cases.setdefault(info["case"], []).append(info | {"seconds": benchmark["stats"]["median"]})
        return content["machine_info"], cases
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not from `pytest --benchmark-only --benchmark-json` ({error!r})") from None


def rate(info: dict) -> str:
    """Returns what was processed in a second, bytes in MB.

    >>> rate({"tokens_per_second": 5000.0}), rate({"bytes_per_second": 2.5e6})
    ('5,000 tokens/s', '2.5 MB/s')
    """
    for name, unit in RATES.items():
        if (found := info.get(f"{name}_per_second")) is not None:
            return f"{show(found / 1e6 if name == 'bytes' else found)} {unit}"
    return ""


def duration(seconds: float) -> str:
    """Returns seconds for people.

    >>> duration(0.0123), duration(2.5)
    ('12.3 ms', '2.5 s')
    """
    return f"{show(seconds * 1000)} ms" if seconds < 1 else f"{show(seconds)} s"


def table(cases: dict[str, list[dict]]) -> list[str]:
    """Returns the rows of a Markdown table: a case, then who took part."""
    lines = ["| case | who | median | rate | times ours | of matmul rate | peak memory |", "|---" * 7 + "|"]
    for case, infos in cases.items():
        for i, info in enumerate(infos):
            share, memory = info.get("share_of_matmul_rate"), info["peak_memory_bytes"]
            lines.append(" | ".join(["| " + (case if i == 0 else ""), info["who"], duration(info["seconds"]),
                         rate(info), f"{info['times_ours']:.2f}" if "times_ours" in info else "",
                         f"{share:.0%}" if share else "", f"{memory / 1e9:.2f} GB |" if memory else " |"]))
    return lines


def outside(cases: dict[str, list[dict]]) -> list[str]:
    """Returns a sentence on train.py's time outside the model, and one on its ranks."""
    lines = []
    for info in cases.get("train.py, whole run", []):
        shares = [f"{name.removeprefix('share_of_')} takes {value:.1%}" for name, value in info.items()
                  if name.startswith("share_of_")]
        lines.append(f"Of a run of train.py {', '.join(shares)} (wait: for data, and what the loop itself "
                     "does).")
    infos = cases.get("train.py, ranks of a core each", [])
    ranks = {info["who"]: info["tokens_per_second"] for info in infos}
    if len(ranks) == 2:
        one, two = ranks.values()
        lines.append(f"Two ranks, a core each, do {two / one:.2f} times the tokens of one: "
                     f"{two / one / 2:.0%} of perfect scaling.")
    return lines


def draw(cases: dict[str, list[dict]], machine: dict[str, Any], peers: Path, roofline: Path) -> None:
    """Draws bars: how much longer each peer takes, and the share of the matmul rate that models reach."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    about = f"{machine['machine']}, torch {machine['torch']}"
    rows = [(f"{case}: {info['who']}", info["times_ours"]) for case, infos in cases.items() for info in infos
            if "times_ours" in info]
    shares = [(f"{case}: {info['who']}", info["share_of_matmul_rate"]) for case, infos in cases.items()
              for info in infos if "share_of_matmul_rate" in info]
    for path, bars, label, form in (
        (peers, rows, "time, as a multiple of ours: beyond 1 it is slower", "{:.2g}×"),
        (roofline, shares, "model FLOP/s, share of a large matrix product's in the same run", "{:.0%}"),
    ):
        if not bars:
            continue
        figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.36 * len(bars)), layout="constrained")
        for i, (name, value) in enumerate(reversed(bars)):
            ours = ": ours" in name
            style = {"color": COLORS[0]} if ours else {"color": COLORS[4], "hatch": "//"}
            axes.barh(i, value, edgecolor="white", **style)
            axes.annotate(form.format(value), (value, i), (3, 0), textcoords="offset points", fontsize=8,
                          va="center")
        axes.axvline(1, color="#555555", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(bars)), [name for name, _ in reversed(bars)], fontsize=7)
        axes.set_xlabel(f"{label}\n{about}", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.1)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("report.py", None, "Write bench/RESULTS.md from saved benchmarks.")
    parser.add_argument("files", nargs="*", help="JSON of pytest-benchmark (default: all in bench/results)")
    parser.add_argument("--out", default=str(ROOT / "bench"), help="where RESULTS.md and results/*.png go")
    options = parser.parse_args(argv)
    out, results = Path(options.out), Path(options.out) / "results"
    files = [Path(name) for name in options.files] or sorted(results.glob("benchmarks-*.json"))
    if not files:
        sys.exit(f"error: no benchmarks-*.json in {results}; make one with "
                 "`pytest --benchmark-only --benchmark-json bench/results/benchmarks-cpu.json`")
    results.mkdir(parents=True, exist_ok=True)
    lines = ["# Results", "", ABOUT]
    for path in files:
        try:
            machine, cases = read(path)
        except ValueError as error:
            sys.exit(f"error: {error}")
        name = path.stem.removeprefix("benchmarks-")
        peers, roofline = results / f"{name}-peers.png", results / f"{name}-roofline.png"
        draw(cases, machine, peers, roofline)
        lines += ["", f"## Throughput, {machine['machine']}", "",
                  f"{machine['date']}, commit {machine['commit']}, torch {machine['torch']}, Python "
                  f"{machine['python']}; {path.name}.", "",
                  *(f"![](results/{picture.name})" for picture in (peers, roofline) if picture.exists()), "",
                  *table(cases), "", *outside(cases)]
    lines += ["", "## Studies"]
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "study" in record:
            reading = path.with_suffix(".md").read_text(encoding="utf-8").splitlines()
            lines += ["", f"[{record['study']}]({Path('results') / path.stem}.md), {record['machine']}, "
                      f"{record['scale']['seeds']} seeds:", "",
                      *(line for line in reading if line.startswith("- "))]
    (out / "RESULTS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {out / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
