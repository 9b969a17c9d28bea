"""Attention on a window with sinks: equal to masked softmax attention, in pieces, padded, kept small, reported."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tiny import pico_teacher

from dtr.arch import FAMILIES, decoder_layers
from dtr.errors import RecipeError
from dtr.hybrid.cache import RecurrentStateLayer
from dtr.mixers import MIXERS, make_mixer, mixer_from_teacher
from dtr.ops.window_attention import Kept, token_positions, window_attention

NUM_TOKENS = 150
WINDOWS = [(16, 4), (1, 0), (7, 0), (5, 9), (400, 3), (64, 4)]


def naive(q, k, v, window, sinks):
    """Softmax attention under a mask, all pairs at once."""
    index = torch.arange(q.shape[1])
    distance = index[:, None] - index
    in_sight = (distance >= 0) & ((distance < window) | (index < sinks))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~in_sight, -torch.inf).softmax(-1), v)


def make_inputs():
    q = torch.randn(2, NUM_TOKENS, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, NUM_TOKENS, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return q, k, v


def in_pieces(q, k, v, window, sinks, cuts, mask=None):
    kept, outputs = None, []
    for a, b in pairwise(cuts):
        part = None if mask is None else mask[:, a:b]
        new = Kept(k[:, a:b], v[:, a:b], token_positions(part, kept, (len(q), b - a), q.device))
        out, kept = window_attention(q[:, a:b], new, kept, window=window, sinks=sinks)
        outputs.append(out)
        assert kept.positions.shape[1] == window + sinks
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
@pytest.mark.parametrize("cuts", [(0, NUM_TOKENS), (0, 1, 2, 9, 140, 141, NUM_TOKENS)], ids=["whole", "pieces"])
def test_it_is_masked_attention_with_every_gradient(window, sinks, cuts):
    inputs = make_inputs()
    draw = torch.randn(inputs[0].shape, dtype=torch.float64)
    ours, expected = in_pieces(*inputs, window, sinks, cuts), naive(*inputs, window, sinks)
    torch.testing.assert_close(ours, expected)
    for got, want in zip(*(torch.autograd.grad((x * draw).sum(), inputs) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_padding_takes_no_place_in_the_window():
    q, k, v = make_inputs()
    mask = torch.ones(2, NUM_TOKENS)
    mask[0, :20], mask[1, -9:] = 0, 0
    out = in_pieces(q, k, v, 16, 4, (0, 12, 40, NUM_TOKENS), mask)
    torch.testing.assert_close(out[:1, 20:], naive(q[:1, 20:], k[:1, 20:], v[:1, 20:], 16, 4))
    torch.testing.assert_close(out[1:, :-9], naive(q[1:, :-9], k[1:, :-9], v[1:, :-9], 16, 4))
    assert not out[0, :20].any()


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_a_wide_window_is_the_teachers_attention(family):
    teacher = pico_teacher(family)
    attention = decoder_layers(teacher.model)[1].self_attn
    hidden, rotary = torch.randn(2, 30, 32), teacher.model.model.rotary_emb(torch.zeros(1), torch.arange(30)[None])
    mask = torch.ones(30, 30).tril().log()[None, None]
    expected, _ = attention(hidden, position_embeddings=rotary, attention_mask=mask)
    wide, narrow = (
        mixer_from_teacher("sliding_window", teacher.geometry, 1, attention, {"window": n, "sinks": 2}) for n in (30, 8)
    )
    torch.testing.assert_close(wide(hidden, rotary)[0], expected, rtol=1e-4, atol=1e-4)
    out = narrow(hidden, rotary)[0]
    torch.testing.assert_close(out[:, :10], expected[:, :10], rtol=1e-4, atol=1e-4)
    assert (out[:, 12:] - expected[:, 12:]).abs().max() > 1e-2


@torch.no_grad()
def test_the_mixers_cache_keeps_the_window_alone():
    teacher = pico_teacher()
    attention = decoder_layers(teacher.model)[0].self_attn
    mixer = mixer_from_teacher("sliding_window", teacher.geometry, 0, attention, {"window": 6, "sinks": 2})
    hidden = torch.randn(2, 41, 32)
    cos, sin = teacher.model.model.rotary_emb(torch.zeros(1), torch.arange(41)[None])
    memory = SimpleNamespace(layers=[RecurrentStateLayer()])
    parts = []
    for a, b in ((0, 1), (1, 3), (3, 30), (30, 31), (31, 41)):
        parts.append(mixer(hidden[:, a:b], (cos[:, a:b], sin[:, a:b]), past_key_values=memory)[0])
        assert memory.layers[0].num_bytes() == 2 * mixer.state_bytes(4)
        assert memory.layers[0].get_seq_length() == b
    torch.testing.assert_close(torch.cat(parts, dim=1), mixer(hidden, (cos, sin))[0], rtol=1e-4, atol=1e-4)


def test_which_mixers_are_pure_linear():
    geometry = pico_teacher().geometry
    assert [kind for kind in MIXERS if not make_mixer(kind, geometry, 0).is_pure_linear] == ["sliding_window"]
    assert not make_mixer("gated_deltanet", geometry, 0, {"window": 8}).is_pure_linear
    with pytest.raises(RecipeError, match=r"mixer\.options\.window"):
        make_mixer("sliding_window", geometry, 0, {"window": 0})
