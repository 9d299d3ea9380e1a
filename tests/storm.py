"""Kills a program before the n-th of its writes, the same moment on any machine, and starts it again.

    python tests/storm.py chain N OUT train.py ARGUMENTS...    every start is killed before its N-th write
    python tests/storm.py every N OUT train.py ARGUMENTS...    begun anew for each N-th write, killed there,
                                                               then finished, and kept as OUT-killed-<write>

A write is a call that changes the directory: a rename, a flush, a new or a deleted file. The starts are
forked from a process that has imported torch already, so each takes milliseconds. Prints the number of kills.
"""

import io
import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import train  # noqa: E402

WRITES = [(os, name) for name in ("replace", "fsync", "sync", "mkdir", "unlink", "rmdir")]
WRITES += [(data.TokenFiles, "append"), (data.TokenFiles, "note"), (train, "append_line")]


def killed_before(number: int, script: str, arguments: list[str]) -> bool:
    """Runs a program until its `number`-th write (0: to its end); returns whether it came so far."""
    process = os.fork()
    if not process:
        counter = itertools.count(1)

        def counted(function):
            def call(*positional, **named):
                if next(counter) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*positional, **named)

            return call

        for owner, name in WRITES:
            setattr(owner, name, counted(getattr(owner, name)))
        code = 0
        try:
            {"data.py": data, "train.py": train}[script].main(arguments)
        except BaseException as error:
            code = getattr(error, "code", repr(error))  # SystemExit has one
        if code:
            print(code, file=sys.stderr, flush=True)
        os._exit(bool(code))
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("a start failed that was not killed")
    return os.WIFSIGNALED(status)


def main() -> None:
    mode, stride, out, script, *arguments = sys.argv[1:]
    stride, out, kills = int(stride), Path(out), 0
    data.BLOCK_BYTES = 5000  # many jobs for `prepare`
    train.plot_log = lambda *_: None  # drawing would take most of the time
    train.torch.optim.AdamW([train.torch.zeros(1)])  # has torch import what it imports late
    sys.stdout = io.StringIO()
    if mode == "chain":
        while killed_before(stride, script, arguments):
            kills += 1
    else:
        begun = out.with_name(f"{out.name}-begun")
        shutil.copytree(out, begun)
        for number in itertools.count(1, stride):
            shutil.rmtree(out)
            shutil.copytree(begun, out)
            if not killed_before(number, script, arguments):
                break
            killed_before(0, script, arguments)
            shutil.copytree(out, out.with_name(f"{out.name}-killed-{number}"))
            kills += 1
    print(kills, file=sys.__stdout__)


if __name__ == "__main__":
    main()
