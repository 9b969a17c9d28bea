"""Around the stages of a run: how long each took, and what to change when memory runs out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dtr.errors import DeviceError


class Clock:
    """Seconds spent in named stages and in all."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._stages[stage] = time.monotonic() - began

    def seconds(self) -> dict[str, float]:
        return {**self._stages, "total": time.monotonic() - self._started}


@contextmanager
def memory_advice(knob: str) -> Iterator[None]:
    """Say which setting to change when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # On a CPU torch raises a plain RuntimeError.
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
        if not is_memory:
            raise
        raise DeviceError(
            "memory",
            got=next(iter(str(error).splitlines()), "out of memory"),
            expected="a step that fits",
            hint=f"Lower {knob}, then go on with --resume.",
        ) from error
