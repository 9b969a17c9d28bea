"""Python programs as processes of their own, forked from one that has imported torch and transformers already.

Importing them takes 8 s of a core, and tests start some forty programs. `run` and `start` take what follows `python`
and give what `subprocess` gives; `run_ranks` starts several that form a world, as torchrun does. The first call of a
pytest worker starts the process that is forked, which computes nothing, so that no threads or random state are copied.
Where a clean interpreter is what is tested (what is imported, and when), use `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOAD = [
    "dtr.bench",
    "dtr.cli",
    "dtr.pipeline.runs",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
]
Ended = subprocess.CompletedProcess


class Program:
    """A started program; `stderr` can be read line by line while it runs."""

    def __init__(self, arguments: list[object], *, env: dict[str, str] | None, cwd: Path | None, text: str):
        self._folder = Path(tempfile.mkdtemp(prefix="dtr-forks-"))
        (self._folder / "in").write_text(text, encoding="utf-8")
        (self._folder / "out").touch()
        # A pipe by name: it is read while the program runs, and its reader sees the end of it.
        os.mkfifo(self._folder / "err")
        environment = dict(os.environ if env is None else env)
        self.process: BaseProcess = _context().Process(
            target=_become, args=([str(a) for a in arguments], environment, str(cwd or Path.cwd()), str(self._folder))
        )
        self.process.start()
        self.stderr = open(self._folder / "err", encoding="utf-8", errors="replace")  # noqa: SIM115

    def wait(self) -> int:
        """The exit code, minus the number of the signal that ended it."""
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def is_running(self) -> bool:
        return self.process.is_alive()

    def finish(self) -> Ended:
        """What is left of its output, once it has ended."""
        stderr = self.stderr.read()
        self.stderr.close()
        code = self.wait()
        return subprocess.CompletedProcess([], code, (self._folder / "out").read_text(encoding="utf-8"), stderr)


def start(*arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None, text: str = "") -> Program:
    """Start `python ARGUMENTS`: `-m MODULE ...`, `-c CODE ...` or `FILE ...`, with `text` as its input."""
    return Program(list(arguments), env=env, cwd=cwd, text=text)


def run(*arguments: object, **options: object) -> Ended:
    """As `start`, and wait for its end."""
    return start(*arguments, **options).finish()  # type: ignore[arg-type]


def run_ranks(num: int, *arguments: object, env: dict[str, str] | None = None) -> list[Ended]:
    """The same program as so many ranks of one world on this machine, each with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num)}
    common = {**(os.environ if env is None else env), **world, "OMP_NUM_THREADS": "1"}
    ranks = [start(*arguments, env={**common, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(num)]
    return [rank.finish() for rank in ranks]


def _context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "forks"])
    return context


def _become(arguments: list[str], environment: dict[str, str], cwd: str, folder: str) -> None:
    """Run the program in this process, which has just been forked."""
    for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY))):
        os.dup2(os.open(f"{folder}/{name}", flags), number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:0] = [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        sys.path.insert(0, cwd)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, cwd)
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
