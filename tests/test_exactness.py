"""The tolerance of `exactness.py`: wide enough for weights anywhere in memory, too narrow for one wrong weight."""

from __future__ import annotations

import copy

import pytest
import torch
from exactness import ROUNDING_ULPS, assert_same_model, assert_same_weights, rounding_ulps
from tiny import pico_teacher

from dtr.arch import decoder_layers
from dtr.hybrid.modeling import make_hybrid
from dtr.mixers import mixer_from_teacher

OPTIONS = {"conv_tokens": 4, "head_copies": 2, "window": 3, "sinks": 1, "exact_first": True, "quadratic": True}
NUM_WORDS = 41
KINDS = ["gated_deltanet", "kimi_delta_attention", "retention"]


@pytest.fixture(scope="module")
def ids():
    # Each token once, so that no row of the embedding goes unused.
    return torch.randperm(NUM_WORDS, generator=torch.Generator().manual_seed(0))[None]


def hybrid_of(kind):
    """Two linear layers with all that a mixer can have, every weight random: nothing hides behind a start value."""
    teacher = pico_teacher("qwen3", vocab_size=NUM_WORDS)
    layers, mixers = decoder_layers(teacher.model), {}
    for index in (0, 2):
        mixers[index] = mixer_from_teacher(kind, teacher.geometry, index, layers[index].self_attn, OPTIONS).eval()
        for name, weight in mixers[index].named_parameters():
            torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return make_hybrid(teacher.model, mixers, {i: {"kind": kind, **OPTIONS} for i in mixers}).requires_grad_(False)


def move(weight, num_bytes):
    """The same values, starting so many bytes after a multiple of 64, as in a file that is mapped into memory."""
    room = torch.empty(weight.nbytes + 128, dtype=torch.uint8)
    first = -room.data_ptr() % 64 + num_bytes
    weight.data = room[first : first + weight.nbytes].view(weight.dtype).view(weight.shape).copy_(weight.data)


@pytest.mark.parametrize("kind", KINDS)
def test_where_weights_lie_in_memory_is_rounding(kind, ids):
    hybrid = hybrid_of(kind)
    moved = copy.deepcopy(hybrid)
    for attempt in range(4):
        for number, weight in enumerate(moved.parameters()):
            move(weight, 4 * ((5 * number + attempt) % 16))
        assert_same_model(moved, hybrid, input_ids=ids)


def test_one_wrong_weight_is_far_more_than_rounding(ids):
    hybrid = hybrid_of("gated_deltanet")
    expected, wrong = hybrid(ids).logits, {}
    for name, weight in hybrid.named_parameters():
        right = weight.clone()
        # One element of the tensor, the largest, by two percent.
        weight.view(-1)[weight.abs().argmax()] *= 1.02
        wrong[f"an element of {name}"] = rounding_ulps(hybrid(ids).logits, expected)
        # The whole tensor in a shorter type, where that loses something: norms may be all ones.
        weight.copy_(right.bfloat16())
        if not torch.equal(weight, right):
            wrong[f"{name} in bfloat16"] = rounding_ulps(hybrid(ids).logits, expected)
        weight.copy_(right)
    assert torch.equal(hybrid(ids).logits, expected)
    layers = decoder_layers(hybrid)
    layers[1].mlp, layers[3].mlp = layers[3].mlp, layers[1].mlp
    wrong["one layer in the place of another"] = rounding_ulps(hybrid(ids).logits, expected)
    assert {change: ulps for change, ulps in wrong.items() if ulps < 10 * ROUNDING_ULPS} == {}


def test_weights_are_compared_to_the_bit():
    one, other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    other.load_state_dict(one.state_dict())
    assert_same_weights(one, other)
    other.bias.data[2] = torch.nextafter(other.bias.data[2], torch.tensor(9.0))
    for wrong in (other, copy.deepcopy(one).double(), torch.nn.Linear(3, 4, bias=False)):
        with pytest.raises(AssertionError):
            assert_same_weights(wrong, one)
