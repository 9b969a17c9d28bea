"""Gated DeltaNet in Qwen3.5's form: equal to the library's own layer, whole or in pieces, padded or not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import pico_teacher
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from dtr.arch import HeadGeometry, capture_attention, decoder_layers
from dtr.hybrid.cache import RecurrentStateLayer
from dtr.mixers import mixer_from_teacher
from dtr.mixers.qwen35_gated_deltanet import Qwen35GatedDeltaNet

GEOMETRY = HeadGeometry(hidden_dim=32, num_heads=4, num_kv_heads=2, head_dim=16)


def random_mixer() -> Qwen35GatedDeltaNet:
    mixer = Qwen35GatedDeltaNet(GEOMETRY, 0).eval().requires_grad_(False)
    for name, weight in mixer.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.5)
    return mixer


def stock_layer(mixer: Qwen35GatedDeltaNet) -> Qwen3_5GatedDeltaNet:
    """The library's module with the same state dict."""
    config = Qwen3_5TextConfig(
        hidden_size=32,
        num_hidden_layers=1,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention"],
    )
    stock = Qwen3_5GatedDeltaNet(config, 0).eval()
    stock.load_state_dict(mixer.state_dict())
    return stock


@pytest.mark.parametrize("num_tokens", [1, 3, 64, 100])
@torch.no_grad()
def test_the_mixer_is_the_librarys_layer(num_tokens):
    mixer = random_mixer()
    stock, hidden, mask = stock_layer(mixer), torch.randn(2, num_tokens, 32), torch.ones(2, num_tokens)
    mask[0, : num_tokens // 3] = 0
    torch.testing.assert_close(mixer(hidden, None)[0], stock(hidden), rtol=1e-4, atol=1e-4)
    padded, expected = mixer(hidden, None, token_mask=mask)[0], stock(hidden, attention_mask=mask)
    torch.testing.assert_close(padded[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cached_pieces_equal_the_whole_and_leave_the_same_states():
    mixer, hidden = random_mixer(), torch.randn(2, 41, 32)
    whole, pieces = (SimpleNamespace(layers=[RecurrentStateLayer()]) for _ in range(2))
    expected, _ = mixer(hidden, None, past_key_values=whole)
    parts = [
        mixer(hidden[:, first:end], None, past_key_values=pieces)[0]
        for first, end in ((0, 1), (1, 2), (2, 20), (20, 21), (21, 41))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pieces.layers[0].read(), whole.layers[0].read(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pieces.layers[0].read_conv(), whole.layers[0].read_conv(), rtol=1e-4, atol=1e-4)


def test_calibration_opens_the_gate_and_fits_the_output():
    teacher = pico_teacher("qwen3")
    seen = {}
    with torch.no_grad(), capture_attention(teacher.model, [1], lambda *event: seen.update([(event[0], event[1:])])):
        teacher.model(torch.randint(1, 257, (8, 64)))
    hidden, rotary, target = seen[1]
    mixer = mixer_from_teacher("qwen35_gated_deltanet", teacher.geometry, 1, decoder_layers(teacher.model)[1].self_attn)
    # A direction on which all tokens agree, as real hidden states have.
    hidden = hidden + 3.0 * torch.ones(32) / 32**0.5
    assert not mixer(hidden, rotary)[0].any()
    mixer.calibrate(hidden, target)
    gates = torch.nn.functional.silu(mixer.in_proj_z(hidden))
    assert gates.mean().item() == pytest.approx(0.7, abs=0.15)
    out = mixer(hidden, rotary)[0]
    assert (out - target).square().sum() < 0.95 * target.square().sum()
