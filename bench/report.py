"""Turns saved benchmarks into a Markdown table.

    pytest --benchmark-only --benchmark-json bench/results/benchmarks-cpu.json
    python bench/report.py bench/results/benchmarks-cpu.json > bench/results/benchmarks-cpu.md

"times ours": how many times as long as ours a contestant takes, the ratio of the medians. "of matmul rate":
the FLOP/s that the task's matrix products need, beside those of a large matrix product in the same run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEAD = ["case", "who", "median", "rate", "times ours", "of matmul rate", "peak memory"]


def table(cases: list[dict]) -> str:
    """Returns the Markdown table of benchmarks, each as measure.compare() notes it: a line a contestant."""
    rows = [HEAD, ["---"] * len(HEAD)]
    for info in cases:
        for who, seconds in info["seconds"].items():
            rate = f"{show(info['per_second'][who])} {info['unit']}/s" if "per_second" in info else ""
            ratio = f"{info['times_ours'][who]:.2f}" if who in info["times_ours"] else ""
            share = f"{info['share_of_matmul_rate'][who]:.0%}" if "share_of_matmul_rate" in info else ""
            peak = f"{show(info['peak_bytes'][who] / 1e9)} GB" if "peak_bytes" in info else ""
            rows.append([info["case"], who, duration(seconds), rate, ratio, share, peak])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def show(value: float | str) -> str:
    """Returns a number in three digits, or in all that stand before the point; a word as it is.

    >>> show(0.01234), show(43.602), show(12345.6), show(1250), show("static")
    ('0.0123', '43.6', '12,346', '1,250', 'static')
    """
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Returns seconds for people.

    >>> duration(0.0123), duration(2.5)
    ('12.3 ms', '2.5 s')
    """
    return f"{show(seconds * 1000)} ms" if seconds < 1 else f"{show(seconds)} s"


def main(paths: list[str]) -> None:
    if not paths:
        sys.exit("usage: python bench/report.py BENCHMARKS.json [...]")
    for path in paths:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            machine = content["machine_info"]
            about = [machine[name] for name in ("machine", "date", "commit", "torch", "python")]
            cases = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
            print(f"{'; '.join(about)}; {Path(path).name}\n\n{table(cases)}\n")
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"error: {path}: not from `pytest --benchmark-only --benchmark-json` ({error!r})")


if __name__ == "__main__":
    main(sys.argv[1:])
