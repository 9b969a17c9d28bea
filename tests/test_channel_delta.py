"""The delta rule with a decay per channel: its forms agree, also on correlated keys and strong decays."""

from __future__ import annotations

import pytest
import torch

from dtr.ops import channel_delta, gated_delta

B, H, K, V = 2, 3, 8, 12


def make_inputs(kind: str, num_tokens: int) -> list[torch.Tensor]:
    """q, k, v, g, beta and a state, float64."""
    q, k = torch.randn(2, B, num_tokens, H, K, dtype=torch.float64)
    if kind == "correlated":
        k = k * 0.1 + torch.randn(K, dtype=torch.float64)
    k = k / k.norm(dim=-1, keepdim=True)
    g = -torch.rand(B, num_tokens, H, K, dtype=torch.float64) * (1e-2 if kind == "correlated" else 0.3)
    if kind == "strong decay":
        g = torch.where(torch.rand_like(g) < 0.2, -40.0, g)
    v, beta = torch.randn(B, num_tokens, H, V, dtype=torch.float64), torch.rand(B, num_tokens, H, dtype=torch.float64)
    return [q, k, v, g, beta, torch.randn(B, H, K, V, dtype=torch.float64)]


def run(form, inputs: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """Output, last state and the gradient of every input, for fixed random gradients of both."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o, state = form(*leaves[:-1], state_BHKV=leaves[-1], **options)
    draw = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(x.shape, generator=draw, dtype=torch.float64) * x).sum() for x in (o, state))
    return [o, state, *torch.autograd.grad(loss, leaves)]


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor], bound: float) -> None:
    errors = [float(((a.double() - e).norm() / e.norm()).detach()) for a, e in zip(actual, expected, strict=True)]
    # A NaN is not below the bound either.
    assert all(error < bound for error in errors), errors


@pytest.mark.parametrize("kind", ["random", "correlated", "strong decay"])
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 65, 130])
def test_chunked_equals_naive_with_every_gradient(kind, num_tokens):
    inputs = make_inputs(kind, num_tokens)
    expected = run(channel_delta.naive, inputs)
    assert_close(run(channel_delta.chunked, inputs), expected, 1e-10)
    assert_close(run(channel_delta.chunked, inputs, chunk_size=16), expected, 1e-10)
    assert_close(run(channel_delta.chunked, [x.float() for x in inputs]), expected, 2e-4)


def test_with_one_decay_for_all_channels_it_is_the_gated_delta_rule():
    q, k, v, g, beta, state = make_inputs("random", 40)
    ours = channel_delta.chunked(q, k, v, g[..., :1].expand_as(g), beta, state_BHKV=state)
    theirs = gated_delta.naive(q, k, v, g[..., 0], beta, scale=1.0, state_BHKV=state)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_state_carries_on_at_any_cut():
    q, k, v, g, beta, state = make_inputs("random", 70)
    whole, last = channel_delta.chunked(q, k, v, g, beta, state_BHKV=state)
    parts = []
    for first, end in ((0, 1), (1, 34), (34, 35), (35, 70)):
        o, state = channel_delta.chunked(*(x[:, first:end] for x in (q, k, v, g, beta)), state_BHKV=state)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, last)
