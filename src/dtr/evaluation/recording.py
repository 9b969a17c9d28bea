"""Decoder layers over the same batches again and again: recorded as CUDA graphs, then launched as a whole.

Search runs each layer over each batch hundreds of times. On a GPU that is bound by launching a layer's forty or so
small kernels, so from the second time on the layer is replayed: 75 instead of 113 ms for a candidate of 250 questions
on an H100 (dev/LOG.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dtr.arch import LayerRunner, Prepared
from dtr.evaluation.batches import Batch
from dtr.evaluation.branching import with_branches

MAX_RECORDINGS = 20_000
"""Graphs kept, as each takes some of the device's memory. Further layers and batches run as they are."""


class LayerPasses:
    """Runs one decoder layer over one batch.

    Args:
        runner: the model whose layers, or twins of them with mixers, are run.
        make_recorder: makes what records a function without arguments and replays it; None never records.
    """

    def __init__(self, runner: LayerRunner, make_recorder: Callable[[], Any] | None) -> None:
        self._runner = runner
        self._make_recorder = make_recorder
        self._branching: dict[nn.Module, nn.Module] = {}
        """Decoder layers to those that take branches."""
        self._recordings: dict[tuple[nn.Module, int], Any] = {}
        """Layer and batch to what replays them; None after the first run."""
        self._buffers: dict[int, torch.Tensor] = {}
        """Batch to the hidden states that its recordings read and overwrite."""
        self.refusal: str | None = None
        """Why nothing more is recorded; layers then run kernel by kernel, which is slower and gives the same."""

    @torch.no_grad()
    def __call__(self, index: int, layer: nn.Module, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The layer's output, in memory that the next layer over this batch may overwrite (see `keep`)."""
        key = layer, id(batch)
        if self._make_recorder is None or self.refusal or len(self._recordings) >= MAX_RECORDINGS:
            return self._run(index, layer, hidden, batch)
        if key not in self._recordings:
            # The first time compiles and tunes kernels, which cannot be recorded; and what runs once is not worth it.
            self._recordings[key] = None
            return self._run(index, layer, hidden, batch)
        buffer = self._buffers.setdefault(id(batch), torch.empty_like(batch.hidden))
        if hidden is not buffer:
            buffer.copy_(hidden)
        if self._recordings[key] is None:
            recorder = self._make_recorder()
            try:
                recorder.record(lambda: buffer.copy_(self._run(index, layer, buffer, batch)))
            except RuntimeError as error:
                self.refusal = next(iter(str(error).splitlines()), type(error).__name__)
                warnings.warn(f"evaluation is not replayed as CUDA graphs: {self.refusal}", stacklevel=2)
                return self._run(index, layer, buffer, batch)
            self._recordings[key] = recorder
        self._recordings[key].replay()
        return buffer

    def keep(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The same hidden states where no later layer overwrites them."""
        return hidden.clone() if hidden is self._buffers.get(id(batch)) else hidden

    def _run(self, index: int, layer: nn.Module, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        if isinstance(batch.prepared, Prepared):
            return self._runner.run_layer(index, layer, hidden, batch.prepared)
        if layer not in self._branching:
            self._branching[layer] = with_branches(self._runner, index, layer)
        return self._branching[layer](hidden, branches=batch.prepared)


class GraphRecorders:
    """Makes recorders that share one pool of memory, as they run one after the other and keep nothing there."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def __call__(self) -> GraphRecorder:
        return GraphRecorder(self)


class GraphRecorder:
    """One CUDA graph.

    Without `torch.cuda.graph`, which collects garbage and empties the allocator's cache each time: with hundreds of
    graphs that takes longer than what they save.
    """

    def __init__(self, shared: GraphRecorders) -> None:
        self._shared = shared
        self._graph = torch.cuda.CUDAGraph()

    def record(self, function: Callable[[], Any]) -> None:
        """Record what `function` launches; nothing runs yet.

        Raises:
            RuntimeError: it does something that cannot be recorded, such as waiting for the device.
        """
        stream = self._shared.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Other threads, such as the one that watches over NCCL, may go on calling CUDA.
            self._graph.capture_begin(pool=self._shared.pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> None:
        """Launch it on the current stream."""
        self._graph.replay()
