"""The students' forward and backward compiled, where that pays and can be done."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

CPU_PARAMETER_TOKENS = 3e12
"""Trained parameters times tokens from which a CPU compiles.

Measured on two cores with AMX, SmolLM2's 30 layers, 8 x 256 tokens: compiling takes 20 to 30 s, and then a step takes
2.1 to 2.7 s instead of 3.3. Both are even at about 2.5e12.
"""


def pays(device: torch.device, *, num_parameters: int, num_tokens: int) -> bool:
    """Whether to compile: always on a GPU, on a CPU where training takes minutes."""
    return device.type == "cuda" or num_parameters * num_tokens >= CPU_PARAMETER_TOKENS


class Compiled:
    """A function compiled at its first call; where that fails, as without a C++ compiler, it runs as it is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        # About its own internals, of no use to whoever reads our log.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")
        self._plain = function
        self._compiled = torch.compile(function, dynamic=False)
        self.refusal: str | None = None
        """Why it is not compiled; it is then slower and gives the same up to rounding."""

    def __call__(self, *args: Any) -> Any:
        if self.refusal is None:
            try:
                return self._compiled(*args)
            # Raised before anything has run, and only while compiling.
            except torch._dynamo.exc.BackendCompilerFailed as error:
                self.refusal = " ".join(str(error).split())[:200]
                warnings.warn(f"the students' step is not compiled: {self.refusal}", stacklevel=2)
        return self._plain(*args)
