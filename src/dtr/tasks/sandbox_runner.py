"""Runs one program for `dtr.tasks.sandbox`, as a script of its own: SECONDS ISOLATE, with secret and source on stdin.

Nothing but the standard library is imported here. What cannot be had is left out step by step, as the docstring of
`dtr.tasks.sandbox` says; namespaces are entered by the C library's calls, so no other program needs to be installed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

MEMORY_BYTES = 1 << 30
NOBODY = 65534
# Of <sched.h>, <sys/mount.h>, <sys/prctl.h> and <linux/securebits.h>.
NEW_NAMESPACES = 0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000
"""User, mount, network, process, IPC and host name."""
PRIVATE_MOUNTS = 0x40000 | 0x4000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY, NO_SUID = 442, -100, 0x8000, 1, 2
ADOPT_ORPHANS = 36
DEATH_SIGNAL, SECURE_BITS, NO_NEW_PRIVILEGES, ROOT_IS_NOBODY = 1, 28, 38, 0x2F
CAPABILITIES_V3 = 0x20080522


def main() -> None:
    """Read, isolate, limit, run; the secret is written where the program has run to its end."""
    seconds, isolate = int(sys.argv[1]), sys.argv[2] == "1"
    secret, _, source = sys.stdin.buffer.read().partition(b"\n")
    out = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    has_namespaces = isolate and sys.platform == "linux" and enter_namespaces()
    if sys.platform == "linux" and not has_namespaces and (libc := library()) is not None:
        # What the program leaves behind then becomes a child of this process, which ends it.
        libc.prctl(ADOPT_ORPHANS, 1, 0, 0, 0)
    if hasattr(os, "fork") and (child := os.fork()):
        wait_for(child, seconds + 1)
    if has_namespaces:
        hide_processes_and_privileges()
    else:
        become_nobody()
    limit(seconds)
    try:
        exec(compile(source, "<written>", "exec"), {"__name__": "__main__"})
    except BaseException:
        os._exit(1)
    os.write(out, secret)
    os._exit(0)


def wait_for(child: int, seconds: int) -> None:
    """Wait for the program, which can do nothing to this process, and leave with it."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(seconds)
    os.waitpid(child, 0)
    signal.alarm(0)
    while left := children():
        for process in left:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    os._exit(0)


def children() -> list[int]:
    """Own children, as the program's orphans are; none where the system cannot tell, or in namespaces, which end."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(process) for process in file.read().split()]
    except OSError:
        return []


def enter_namespaces() -> bool:
    """Own namespaces for what this process starts, with all files read-only; whether the system allows it."""
    uid, gid, libc = os.getuid(), os.getgid(), library()
    if libc is None or libc.unshare(NEW_NAMESPACES):
        return False
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    if libc.mount(b"none", b"/", None, PRIVATE_MOUNTS, None):
        return False
    # Over /proc lies an empty folder: it would show every process with its environment.
    if libc.mount(b"none", b"/proc", b"tmpfs", 0, None):
        return False
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SUID, 0, 0, 0)
    return not libc.syscall(
        MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)
    )


def hide_processes_and_privileges() -> None:
    """In the first process of the new namespaces: with it all others there end."""
    libc = library()
    assert libc is not None, "namespaces were entered by it"
    libc.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    # Without these it could undo the mounts.
    libc.prctl(SECURE_BITS, ROOT_IS_NOBODY, 0, 0, 0)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.capset((ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0), (ctypes.c_uint32 * 6)())


def become_nobody() -> None:
    """Root obeys no limit on processes, and may read every environment."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return
    try:
        os.setgroups([])
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        with open(os.__file__, "rb"):
            pass
    except OSError:
        # Python itself lies where only root can read it.
        os.seteuid(0)
        os.setegid(0)
        return
    os.seteuid(0)
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def limit(seconds: int) -> None:
    """POSIX limits, as far as the system has them."""
    try:
        import resource
    except ImportError:
        return
    limits = {"CPU": seconds, "AS": MEMORY_BYTES, "FSIZE": 0, "CORE": 0, "NOFILE": 64, "NPROC": 0}
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (AttributeError, TypeError, ValueError, OSError):
            pass


def library() -> Any:
    """The C library; None where it cannot be loaded."""
    try:
        return ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):
        return None


if __name__ == "__main__":
    main()
