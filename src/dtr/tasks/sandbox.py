"""Run a program that a model wrote, away from the user's files, processes and network as far as the system allows.

Everywhere: another process with an empty environment, no output, and limits on time and, on POSIX, memory, open files,
written bytes and processes. Whatever it started is gone when this returns.

On Linux with user namespaces (most systems, not all containers) also: all files are read-only, there is no network,
other processes and /proc are not there, and no privilege can be had. `is_isolated` says whether that works here.
Without them a program runs as this user (root as nobody, where nobody can read Python's own files) and can do to files,
network and processes what that user can.

What is never there: protection against a program that knows this one. It runs in the Python that reports its success,
so one that looks for the report's secret can pass without solving anything; it can read the user's files, though it has
nowhere to send them; a hole in the kernel is open to it. Code of a model that might mean harm needs a virtual machine
around the whole command. Hence `pass_at_1` is off unless the recipe allows it.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

RUNNER = Path(__file__).with_name("sandbox_runner.py")
GRACE_SECONDS = 2
"""For starting Python, beside the program's own time."""
_PROBE = "import os\nassert os.getpid() == 1 and not os.path.exists('/proc/self')"


def passes(program: str, *, seconds: int, isolate: bool = True) -> bool:
    """Whether a Python program runs to its end without an error within `seconds`; leaving early does not count.

    Args:
        program: its source.
        seconds: of computing and of waiting, each.
        isolate: with namespaces where the system has them.
    """
    # Only the end of the program gives this back: no exit code or output can be taken for it.
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            # Isolated: neither this environment nor the user's packages are seen.
            [sys.executable, "-I", "-S", str(RUNNER), str(seconds), str(int(isolate))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            told, _ = process.communicate(f"{secret}\n{program}".encode(errors="replace"), seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            told = b""
        finally:
            _end(process)
    return told == secret.encode()


@lru_cache
def is_isolated() -> bool:
    """Whether programs run in namespaces of their own here."""
    return sys.platform == "linux" and passes(_PROBE, seconds=5)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all of its group, whether it has ended or not."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
