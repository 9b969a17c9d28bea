"""Start values that follow from a batch of text, in closed form, before training starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dtr.arch import run_body
from dtr.distillation.targets import capture_targets
from dtr.mixers.base import Mixer
from dtr.teacher import Teacher


@torch.no_grad()
def calibrate(teacher: Teacher, mixers: Mapping[int, Mixer], input_ids: torch.Tensor) -> None:
    """One teacher pass over (B, T) tokens, in which each mixer that asks for it sees its attention's input and output.

    Does nothing where no mixer needs it. The same tokens give the same values in every process.
    """
    waiting = {index: mixer for index, mixer in mixers.items() if mixer.needs_calibration}

    def visit(index: int, hidden: torch.Tensor, _rotary: Any, target: torch.Tensor) -> None:
        mixers[index].calibrate(hidden.float(), target.float())

    if waiting:
        with capture_targets(teacher.model, waiting, visit):
            run_body(teacher.model, input_ids.to(teacher.device, torch.long))
