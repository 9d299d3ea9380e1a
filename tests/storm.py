"""Kills a program again and again, at random moments or at every step of a checkpoint's write.

    python tests/storm.py random train.py KILLS LONGEST_SECONDS SEED ARGUMENTS...
    python tests/storm.py every train.py ARGUMENTS...

Its children are forked from a process that has imported torch already, so that hundreds of starts take
seconds. It prints what it did as JSON; the tests compare what the program left with an uninterrupted run.
"""

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import train  # noqa: E402


def start(work: Callable[[], None]) -> int:
    """Returns the process that does the work; its output is thrown away, but for errors."""
    process = os.fork()
    if process:
        return process
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def was_killed(process: int) -> bool:
    """Waits for a process to end. Raises: RuntimeError where it failed by itself."""
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"a child failed with exit code {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status)


def at_random(
    work: Callable[[int], None], out: Path, kills: int, longest: float, seed: int
) -> dict[str, int]:
    """Kills the work `kills` times, each after up to `longest` seconds; then lets it come to its end."""
    rng, counts = random.Random(seed), {"kills": 0, "inside_a_write": 0}

    def half_written() -> set[tuple[Path, int]]:
        found = set()
        for path in out.rglob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # a worker of the one killed, in its last moment
                found.add((path, path.stat().st_mtime_ns))
        return found

    while counts["kills"] < kills:
        before = half_written()
        process = start(lambda: work(counts["kills"]))
        time.sleep(rng.uniform(0, longest))
        os.kill(process, signal.SIGKILL)
        if not was_killed(process):
            break  # it was over before
        counts["kills"] += 1
        counts["inside_a_write"] += bool(half_written() - before)
    was_killed(start(lambda: work(0)))
    return counts


def at_every_step(work: Callable[[], None], out: Path) -> dict[str, int]:
    """Begins the work anew as often as it renames, flushes, links or deletes, killed one such call later."""
    begun = out.with_name(out.name + "-begun")
    shutil.copytree(out, begun, symlinks=True)
    for number in itertools.count(1):
        shutil.rmtree(out)
        shutil.copytree(begun, out, symlinks=True)
        if not was_killed(start(functools.partial(killed_before, number, work))):
            return {"kills": number - 1}
        was_killed(start(work))
        shutil.copytree(out, out.with_name(f"{out.name}-killed-{number}"), symlinks=True)


def killed_before(number: int, work: Callable[[], None]) -> None:
    """Does the work until it changes the directory for the number-th time."""
    calls = 0

    def counted(function: Callable) -> Callable:
        def call(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    for name in ("replace", "fsync", "symlink", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    train.torch.save = counted(train.torch.save)
    work()


def main() -> None:
    mode, script, *arguments = sys.argv[1:]
    if mode == "random":
        kills, longest, seed, *arguments = arguments
    out = Path(arguments[arguments.index("--out") + 1])

    train.Pretraining.plot = lambda _: None  # drawing would take most of the time, and most of the kills
    train.torch.optim.AdamW([train.torch.zeros(1)])  # has torch import what it imports late

    def work(attempt: int = 0) -> None:
        if script == "train.py":
            train.train(train.parse(arguments))
        else:  # with another number of workers each time
            data.main([*arguments, "--workers", str(attempt % 4 + 1)])

    if mode == "random":
        print(json.dumps(at_random(work, out, int(kills), float(longest), int(seed))))
    else:
        print(json.dumps(at_every_step(work, out)))


if __name__ == "__main__":
    main()
