"""Short prompts as CUDA graphs.

A short prompt is bound by launching its kernels, some four hundred of them. A graph launches them at once, but has one
length: prompts are padded on the right, where attention does not see it and a state does not change with it.

Shapes: B sequences, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

MAX_TOKENS = 2**13
"""Tokens of all sequences up to which a prompt is recorded; more keep the GPU busy while kernels are launched."""
_MIN_STEP = 16
_WARMUP_RUNS = 2
Work = Callable[[], torch.Tensor]
ReadPadded = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From ids (B, T), a mask (B, T), 0 where a token is padding, and the last token's index (1,) to logits (B, V)."""


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    last: torch.Tensor
    run: Work


class PromptGraphs:
    """Prompts of `batch_size` sequences, recorded by padded length when that comes for the second time.

    Recording takes as long as reading a few such prompts.

    Args:
        record: makes of some work something that repeats it, with the same tensors; a `GraphRecorder`.
    """

    def __init__(self, *, batch_size: int, capacity_tokens: int, record: Callable[[Work], Work]) -> None:
        self._batch_size, self._capacity_tokens, self._record = batch_size, capacity_tokens, record
        self._met: set[int] = set()
        self._recorded: dict[int, _Recorded] = {}

    def __call__(self, ids_BT: torch.Tensor, read: ReadPadded) -> torch.Tensor | None:
        """The logits after the last token, or None for a prompt to be read without a graph.

        `read` reads a padded prompt into the cache. It is not kept: whose method it is could not be freed in time.
        """
        num_tokens = ids_BT.shape[1]
        length = padded_length(num_tokens)
        if length > self._capacity_tokens or self._batch_size * length > MAX_TOKENS:
            return None
        if length not in self._met:
            self._met.add(length)
            return None
        if length not in self._recorded:
            self._recorded[length] = self._prepare(length, ids_BT, read)
        prompt = self._recorded[length]
        prompt.ids_BT[:, :num_tokens] = ids_BT
        prompt.mask_BT[:, :num_tokens], prompt.mask_BT[:, num_tokens:] = 1, 0
        prompt.last.fill_(num_tokens - 1)
        return prompt.run().clone()

    def _prepare(self, length: int, like: torch.Tensor, read: ReadPadded) -> _Recorded:
        ids = like.new_zeros(self._batch_size, length)
        mask, last = torch.ones_like(ids), like.new_full((1,), length - 1)
        return _Recorded(ids_BT=ids, mask_BT=mask, last=last, run=self._record(lambda: read(ids, mask, last)))


def padded_length(num_tokens: int) -> int:
    """The next of lengths that are an eighth of a power of two apart, so that padding is at most an eighth."""
    step = max(_MIN_STEP, 2 ** (num_tokens.bit_length() - 1) // 8)
    return -(-num_tokens // step) * step


class GraphRecorder:
    """Records graphs that share their memory, as one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    @torch.no_grad()
    def __call__(self, work: Work) -> Work:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Kernels compile here, which a recording does not allow.
                for _ in range(_WARMUP_RUNS):
                    work()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                logits = work()

        def run() -> torch.Tensor:
            graph.replay()
            return logits

        return run
