"""Training steps compiled, where that pays and can be done: students and the teacher's layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from dtr.arch import decoder_layers

CPU_PARAMETER_TOKENS = 6e12
"""Trained parameters times tokens from which a CPU compiles.

Measured on two cores with AMX, SmolLM2's 30 layers: compiling takes 29 s with empty caches, and then a step of 16 x 256
tokens takes 2.5 s instead of 3.5, one of 4 x 256 tokens 1.2 instead of 1.4. Both are even at 5.7e12 and 5.5e12, earlier
once the caches are filled.
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.refusal is None:
            try:
                return self._compiled(*args, **kwargs)
            # Raised before anything has run, and only while compiling.
            except torch._dynamo.exc.BackendCompilerFailed as error:
                self.refusal = " ".join(str(error).split())[:200]
                warnings.warn(f"the training step is not compiled: {self.refusal}", stacklevel=2)
        return self._plain(*args, **kwargs)


class CompiledLayers:
    """A model whose decoder layers can run with their parts compiled; one graph serves the same part of all layers.

    Attention is a part like the others: what is hooked to it is called as ever, outside the graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts = [part for layer in decoder_layers(model) for part in layer.children()]
        # By kind, as each has its own graphs and their number is limited.
        self._forwards = {kind: Compiled(kind.forward) for kind in {type(part) for part in self._parts}}

    @property
    def refusal(self) -> str | None:
        """Why a part is not compiled; None as long as none failed."""
        return next((forward.refusal for forward in self._forwards.values() if forward.refusal), None)

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """While open, the parts' `forward` is compiled; afterwards they are as they were."""
        for part in self._parts:
            part.forward = partial(self._forwards[type(part)], part)
        try:
            yield
        finally:
            for part in self._parts:
                del part.forward
