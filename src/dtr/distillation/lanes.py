"""Students side by side on a GPU.

A student's kernels are too small to fill a GPU when a batch has few tokens, and no student waits for another: each
needs only what the teacher's layer has read and written. So they take turns on a few CUDA streams beside the teacher's
own. Recorded into a CUDA graph the streams become its branches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

NUM_LANES = 2
"""Students under way at once. More take more memory and no less time (dev/LOG.md)."""


class Lanes:
    """Runs what is inside `with lanes.next(inputs):` beside the current stream; without CUDA where it stands."""

    def __init__(self, device: torch.device) -> None:
        self._streams = [torch.cuda.Stream(device) for _ in range(NUM_LANES)] if device.type == "cuda" else []
        self._under_way: deque[tuple[torch.cuda.Stream, Any]] = deque()

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Around all lanes of a pass: at its end the current stream waits for them, and none is left under way."""
        try:
            yield
        except BaseException:
            # Streams of a recording that failed take no orders until it is over. It has run nothing, so that there is
            # nothing to wait for; and whatever else went wrong is to be told, not this.
            with suppress(RuntimeError):
                self.join()
            self._under_way.clear()
            raise
        self.join()

    @contextmanager
    def next(self, *inputs: Any) -> Iterator[None]:
        """`inputs` come from the current stream and are kept until it has waited for the lane: freed earlier, their
        memory would be written anew while the lane still reads it."""
        if not self._streams:
            yield
            return
        here = torch.cuda.current_stream()
        if len(self._under_way) == len(self._streams):
            stream, _ = self._under_way.popleft()
            here.wait_stream(stream)
        else:
            stream = self._streams[len(self._under_way)]
        stream.wait_stream(here)
        # First, so that the lane is waited for whatever happens in it.
        self._under_way.append((stream, inputs))
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for all lanes."""
        for stream, _ in self._under_way:
            torch.cuda.current_stream().wait_stream(stream)
        self._under_way.clear()
