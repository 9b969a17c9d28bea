"""What the teacher's attention reads and writes, handed to every mixer that learns it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dtr.arch import capture_attention
from dtr.mixers.base import Mixer


@contextmanager
def capture_targets(model: Any, mixers: Mapping[int, Mixer], visit: Any) -> Iterator[None]:
    """While open, call `visit(number, hidden_BTD, (cos, sin), target_BTD)` for each mixer as its layer runs.

    Several mixers of one layer come one after the other, in the order that they have in `mixers`.
    """
    by_layer: dict[int, list[int]] = {}
    for number, mixer in mixers.items():
        by_layer.setdefault(mixer.layer_idx, []).append(number)

    def visit_layer(layer: int, *inputs_and_target: Any) -> None:
        for number in by_layer[layer]:
            visit(number, *inputs_and_target)

    with capture_attention(model, list(by_layer), visit_layer):
        yield
