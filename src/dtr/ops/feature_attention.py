"""Linear attention over learned positive features, divided by its own weights: features, and three forms.

Source: "The Hedgehog & the Porcupine" (arXiv 2402.04347), section 4.2: a linear map per head, its result and its
negative, and a softmax over both, which keeps features positive and lets them be as spiky as attention's weights.

    f(x) = softmax([W x, -W x]);  S_t = S_{t-1} + f(k_t) v_t^T;  z_t = z_{t-1} + f(k_t)
    o_t = S_t^T f(q_t) / (z_t . f(q_t))

Sum and divisor are one recurrence: z is the last column of a state [F, V + 1] whose values end in a 1.

Shapes: B batch, T tokens, H heads, K head dim, F = 2 K features, V value dim. States are float32 (float64 where an
input is); o has the dtype of v.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dtr.ops.state_space import chunked as accumulate
from dtr.ops.state_space import step as accumulate_one

MIN_WEIGHT = 1e-6
"""Smallest divisor: a token that agrees with nothing so far gets little instead of noise, padding gets zeros."""


def features(x_BTHK: torch.Tensor, weight_HKK: torch.Tensor) -> torch.Tensor:
    """Positive features (B, T, H, F) that add up to 1, in float32 or wider."""
    mapped = torch.einsum("bthk,hjk->bthj", x_BTHK, weight_HKK.to(x_BTHK.dtype))
    # The softmax of values and their negatives is told from small differences: never in 16 bits.
    mapped = mapped.to(torch.promote_types(mapped.dtype, torch.float32))
    return torch.cat([mapped, -mapped], dim=-1).softmax(dim=-1)


def step(
    q_BHF: torch.Tensor, k_BHF: torch.Tensor, v_BHV: torch.Tensor, state_BHFV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token; returns o [B, H, V] and the new state [B, H, F, V + 1]. The given state is left as it was."""
    sums, state = accumulate_one(q_BHF, k_BHF, _with_one(v_BHV, q_BHF), q_BHF.new_zeros(q_BHF.shape[:2]), state_BHFV)
    return _divide(sums, v_BHV.dtype), state


def naive(
    q_BTHF: torch.Tensor, k_BTHF: torch.Tensor, v_BTHV: torch.Tensor, *, state_BHFV: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference: `step` for each token. Returns o [B, T, H, V] and the last state [B, H, F, V + 1]."""
    batch, num_tokens, heads, num_features = q_BTHF.shape
    state = q_BTHF.new_zeros(batch, heads, num_features, v_BTHV.shape[-1] + 1) if state_BHFV is None else state_BHFV
    outputs = []
    for t in range(num_tokens):
        o, state = step(q_BTHF[:, t], k_BTHF[:, t], v_BTHV[:, t], state)
        outputs.append(o)
    return torch.stack(outputs, dim=1), state


def chunked(
    q_BTHF: torch.Tensor, k_BTHF: torch.Tensor, v_BTHV: torch.Tensor, *, state_BHFV: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the chunks of `dtr.ops.state_space` without decay; differentiable once in every input."""
    no_decay = q_BTHF.new_zeros(q_BTHF.shape[:3])
    sums, state = accumulate(q_BTHF, k_BTHF, _with_one(v_BTHV, q_BTHF), no_decay, state_BHKV=state_BHFV)
    return _divide(sums, v_BTHV.dtype), state


def _with_one(v: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.pad(v.to(like.dtype), (0, 1), value=1.0)


def _divide(sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (sums[..., :-1] / sums[..., -1:].clamp_min(MIN_WEIGHT)).to(dtype)
