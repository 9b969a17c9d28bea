"""Where kernels written in Triton run."""

from __future__ import annotations

import torch
import triton

_INTERPRETED = bool(triton.knobs.runtime.interpret)


def runs_on(x: torch.Tensor) -> bool:
    """Whether kernels run where `x` is: on a CUDA device, or on a CPU in Triton's interpreter."""
    return x.device.type == "cuda" or (_INTERPRETED and x.device.type == "cpu")
