"""Adding gradients up over ranks while later layers still train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dtr.distributed import World

BUCKET_BYTES = 32 * 2**20
"""Gradients that travel together: large enough for full speed, small enough that most of them travel early."""


class GradientExchange:
    """Gradients in a few flat buffers, each added up over all ranks as soon as its layers have been trained.

    Every `.grad` is a view of its buffer, so nothing is copied for the journey. Every rank must name the same layers
    done in the same order, or `finish` early, which sends what is left. All of it can be recorded in a CUDA graph: the
    buffers stay where they are, and torch.distributed ties its own stream to the recorded one.

    Args:
        world: the ranks.
        groups: parameters by layer, in the order in which layers are done; one dtype and device.
    """

    def __init__(self, world: World, groups: list[list[nn.Parameter]]) -> None:
        self._world = world
        self._buffers: list[torch.Tensor] = []
        self._last_layer: list[int] = []
        """By buffer, the position of the last layer in it."""
        self._num_sent = 0
        self._waiting: list[Any] = []
        first, num_bytes = 0, 0
        for position, group in enumerate(groups):
            num_bytes += sum(param.numel() * param.element_size() for param in group)
            if num_bytes >= BUCKET_BYTES or position == len(groups) - 1:
                self._add_buffer([param for layer in groups[first : position + 1] for param in layer])
                self._last_layer.append(position)
                first, num_bytes = position + 1, 0

    def _add_buffer(self, params: list[nn.Parameter]) -> None:
        buffer = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype, device=params[0].device)
        for param, part in zip(params, buffer.split([p.numel() for p in params])):
            param.grad = part.view_as(param)
        self._buffers.append(buffer)

    def begin(self) -> None:
        """Start a step with gradients of zero."""
        for buffer in self._buffers:
            buffer.zero_()
        self._num_sent, self._waiting = 0, []

    def layer_done(self, position: int, *, before_sending: Callable[[], None] = lambda: None) -> None:
        """The layer at `position` has its gradients; send every buffer that is complete by now."""
        while self._num_sent < len(self._buffers) and self._last_layer[self._num_sent] <= position:
            before_sending()
            self._waiting.append(self._world.start_adding_up(self._buffers[self._num_sent]))
            self._num_sent += 1

    def finish(self) -> None:
        """Wait until all gradients are sums over all ranks."""
        self.layer_done(self._last_layer[-1])
        for work in self._waiting:
            work.wait()
        self._waiting = []
