"""Memory that the C library keeps for the next step instead of giving it back to the system after each operation."""

from __future__ import annotations

import ctypes
import functools

MMAP_THRESHOLD_BYTES = 32 * 2**20
"""The most that glibc takes: smaller blocks come from memory that is mapped already."""
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process reuse freed blocks; whether the C library could be told.

    By default glibc maps blocks of some hundred kilobytes afresh each time, and every new page costs a fault: a fifth
    of a training step on a CPU. Memory then stays at its peak until the process ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        # Not glibc: other allocators keep what is freed, or cannot be told.
        return False
    settings = {
        _M_MMAP_THRESHOLD: MMAP_THRESHOLD_BYTES,
        _M_TRIM_THRESHOLD: 2**31 - 1,
        _M_TOP_PAD: MMAP_THRESHOLD_BYTES,
    }
    return all(mallopt(name, value) == 1 for name, value in settings.items())
