"""What a decoding step or a prompt knows of a layer's weights: norms, and projections with the norm before them.

Shapes: C outputs, D hidden dim, H query heads, K head dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.nn import functional as F

KEPT_BYTES = 2**23
"""Weights of up to so many bytes are kept a second time, scaled by the norm before them."""


@dataclass(frozen=True, kw_only=True)
class HeadNorms:
    """Weights (K,) of the RMS norms that Qwen3 applies to queries and keys before they are rotated."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


@dataclass(frozen=True, kw_only=True)
class Norm:
    """An RMS norm of hidden states (..., D)."""

    weight: torch.Tensor
    eps: float

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, kw_only=True)
class NormedProjection:
    """A linear map (C, D) of hidden states and the norm before it."""

    norm: Norm
    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def scaled_weight(self) -> torch.Tensor:
        """The weight times the norm's, for kernels that divide by the root mean square afterwards.

        Small ones are kept: a short prompt is bound by how many kernels it launches.
        """
        is_small = self.weight.numel() * self.weight.element_size() <= KEPT_BYTES
        return self._kept if is_small else self.weight * self.norm.weight

    @functools.cached_property
    def _kept(self) -> torch.Tensor:
        return self.weight * self.norm.weight


@dataclass(frozen=True, kw_only=True)
class DeltaProjection(NormedProjection):
    """The norm and the joined input projections of a `GatedDeltaNet` layer.

    Rows are those of q, k, v, output gate (H K each), with `quadratic` the mixes of q and k (H K each, see
    `dtr.mixers.quadratic`), decay and write strength (H each), and perhaps padding.
    """

    num_heads: int
    head_dim: int
    norms: HeadNorms | None = None
    has_head_bias: bool = True
    """Whether the biases of q, k and v need not be zero."""
    quadratic: bool = False
    """Whether queries and keys have quadratic features."""
    mixes: tuple[torch.Tensor, torch.Tensor] | None = None
    """Weights (H, K, K) of the mixes of q and k, applied to the projected heads: a twelfth of the work of the rows that
    make them of hidden states, which a step takes, as it is bound by launching kernels."""
    backend: str = "auto"
    """What computes the recurrence over a prompt where no kernel of generation does, as the mixer holds it."""

    @property
    def num_head_rows(self) -> int:
        """Rows of all that has a value per feature of a head; those of the gates per head follow."""
        return (6 if self.quadratic else 4) * self.num_heads * self.head_dim

    @property
    def num_rows(self) -> int:
        """All rows but the padding."""
        return self.num_head_rows + 2 * self.num_heads


class GatedProjection(NormedProjection):
    """The norm, gate and up projection of a gated MLP: the gate's rows, then the up projection's."""

    @functools.cached_property
    def streamed_rows(self) -> torch.Tensor:
        """`scaled_weight` with rows in the order in which the kernel of `mlp_gluon.py` takes them.

        In 64 rows, pair 4 i + t of neighbours is gate and up of output 8 t + i: what thread t of four is left with.
        """
        blocks = (self.weight * self.norm.weight).unflatten(0, (2, -1, 4, 8))
        return blocks.permute(1, 3, 2, 0, 4).flatten(0, 3).contiguous()
