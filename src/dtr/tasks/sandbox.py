"""Run a program that a model wrote, with limits: another process, little time and memory, no files, an empty folder.

This keeps accidents small; it is no jail. Whoever scores code of a model that might mean harm needs a container or a
virtual machine around the whole command. Hence `pass_at_1` is off unless the recipe allows it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

MEMORY_BYTES = 1 << 30
_LIMITS = """
import os, sys
try:
    import resource
except ImportError:
    resource = None
seconds = int(sys.argv[1])
limits = {{"CPU": seconds, "AS": {memory}, "FSIZE": 0, "CORE": 0, "NOFILE": 64, "NPROC": 0}}
for name, value in limits.items():
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    except (AttributeError, TypeError, ValueError, OSError):
        pass
source = sys.stdin.read()
try:
    exec(compile(source, "<written>", "exec"), {{"__name__": "__main__"}})
except BaseException:
    os._exit(1)
os._exit({passed})
"""
PASSED = 42
"""Exit code of a program that ran to its end; leaving early with 0 does not count."""


def passes(program: str, *, seconds: int) -> bool:
    """Whether a Python program ends without an error within `seconds`.

    Its output is thrown away. POSIX limits apply where the system has them; elsewhere only the time limit does.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                # Isolated: neither this environment nor the user's packages are seen.
                [sys.executable, "-I", "-S", "-c", _LIMITS.format(memory=MEMORY_BYTES, passed=PASSED), str(seconds)],
                input=program.encode(errors="replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                timeout=seconds + 2,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == PASSED
