"""A training step as a CUDA graph: launched once as a whole instead of kernel by kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

WARMUP_STEPS = 3
"""Steps that run as they are first: they compile, tune, and make the optimizer's state."""


class Replay:
    """Wraps `step(input_ids) -> losses`; every call does one real step, recorded or not.

    All calls must have the same shape. What the step reads besides `input_ids` (weights, learning rate) must stay in
    the same memory and be changed in place.
    """

    def __init__(self, step: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._step = step
        self._num_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self.refusal: str | None = None
        """Why the step could not be recorded; it then runs kernel by kernel, which is slower and gives the same."""

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        self._num_calls += 1
        if self._num_calls <= WARMUP_STEPS:
            return self._warm_up(input_ids)
        if self._graph is None and self.refusal is None:
            self._record(input_ids)
        if self._graph is None:
            return self._step(input_ids)
        assert input_ids.shape == self._input_ids.shape, f"{tuple(input_ids.shape)} was not recorded"
        self._input_ids.copy_(input_ids)
        self._graph.replay()
        return self._losses.clone()

    def _warm_up(self, input_ids: torch.Tensor) -> torch.Tensor:
        # On a side stream, as recording needs; see "CUDA semantics: whole-network capture" in the torch manual.
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            losses = self._step(input_ids)
        torch.cuda.current_stream().wait_stream(self._stream)
        return losses

    def _record(self, input_ids: torch.Tensor) -> None:
        self._input_ids = input_ids.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            # The watchdog of NCCL polls events from a thread of its own, which must not spoil the recording.
            mode = "thread_local" if dist.is_initialized() else "global"
            with torch.cuda.graph(graph, capture_error_mode=mode):
                self._losses = self._step(self._input_ids)
        except RuntimeError as error:
            # Recording runs nothing, so no update is lost; the step only stays slower.
            # With several ranks the others may replay theirs: both send the same in the same order.
            self.refusal = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(f"the training step is not replayed as a CUDA graph: {self.refusal}", stacklevel=2)
            return
        self._graph = graph
