"""The state space recurrence and the Mamba-2 mixer: agreement of their forms, and with the library's own Mamba-2."""

from __future__ import annotations

import pytest
import torch
from tiny import pico_teacher, token_blocks
from transformers import GraniteMoeHybridConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

from dtr.arch import HeadGeometry, capture_attention, decoder_layers
from dtr.distillation.trainer import distill
from dtr.errors import RecipeError
from dtr.export.granite import norms_by_group
from dtr.hybrid.cache import RecurrentStateLayer
from dtr.mixers import mixer_from_teacher
from dtr.mixers.mamba2 import Mamba2
from dtr.mixers.native import CONV_TOKENS
from dtr.ops import state_space

B, H, K, V = 2, 3, 16, 24
GEOMETRY = HeadGeometry(hidden_dim=32, num_heads=4, num_kv_heads=2, head_dim=8)


def make_inputs(kind: str, num_tokens: int) -> list[torch.Tensor]:
    """q, k, v, g and a state, float64."""
    q, k = torch.randn(2, B, num_tokens, H, K, dtype=torch.float64)
    v = torch.randn(B, num_tokens, H, V, dtype=torch.float64)
    g = -torch.rand(B, num_tokens, H, dtype=torch.float64)
    g *= {"random": 1.0, "weak_decay": 1e-2, "strong_decay": 0.1}[kind]
    if kind == "strong_decay":
        g = torch.where(torch.rand_like(g) < 0.2, -30.0, torch.where(torch.rand_like(g) < 0.5, 0.0, g))
    return [q, k, v, g, torch.randn(B, H, K, V, dtype=torch.float64)]


def run(form, inputs: list[torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """Output, last state and the gradient of every input, for fixed random gradients of both."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o, state = form(*leaves[:-1], state_BHKV=leaves[-1], **options)
    draw = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(x.shape, generator=draw, dtype=torch.float64) * x).sum() for x in (o, state))
    names = ("grad_q", "grad_k", "grad_v", "grad_g", "grad_state")
    return {"o": o, "state": state, **dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    errors = {name: float(((actual[name].double() - x).norm() / x.norm()).detach()) for name, x in expected.items()}
    # A NaN is not below the bound either.
    assert all(error < bound for error in errors.values()), errors


@pytest.mark.parametrize("kind", ["random", "weak_decay", "strong_decay"])
@pytest.mark.parametrize("num_tokens", [1, 7, 63, 64, 65, 130])
def test_chunked_equals_naive_with_every_gradient(kind, num_tokens):
    inputs = make_inputs(kind, num_tokens)
    expected = run(state_space.naive, inputs)
    assert_close(run(state_space.chunked, inputs), expected, 1e-12)
    assert_close(run(state_space.chunked, inputs, chunk_size=16), expected, 1e-12)
    assert_close(run(state_space.chunked, [x.float() for x in inputs]), expected, 1e-5)


def test_naive_is_the_sum_over_earlier_tokens():
    """arXiv 2405.21060, eq. 6: y_t = sum_s C_t^T (a_t ... a_s+1) B_s x_s."""
    q, k, v, g, _ = make_inputs("random", 9)
    o, _ = state_space.naive(q, k, v, g)
    expected = torch.zeros_like(o)
    for t in range(9):
        for s in range(t + 1):
            weight = g[:, s + 1 : t + 1].sum(1).exp() * (q[:, t] * k[:, s]).sum(-1)
            expected[:, t] += weight.unsqueeze(-1) * v[:, s]
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)


def test_the_state_carries_on_at_any_cut():
    q, k, v, g, state = make_inputs("random", 70)
    whole, last = state_space.chunked(q, k, v, g, state_BHKV=state)
    parts = []
    for first, end in ((0, 1), (1, 34), (34, 35), (35, 70)):
        o, state = state_space.chunked(*(x[:, first:end] for x in (q, k, v, g)), state_BHKV=state)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


def random_mixer(**options) -> Mamba2:
    """Every weight random, so that nothing can hide behind a start value."""
    mixer = Mamba2(GEOMETRY, 0, **options).eval().requires_grad_(False)
    for name, weight in mixer.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.5)
    return mixer


def stock_layer(mixer: Mamba2) -> GraniteMoeHybridMambaLayer:
    """The library's module with the mixer's weights under the same names."""
    config = GraniteMoeHybridConfig(
        hidden_size=32,
        num_hidden_layers=1,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_expand=1,
        mamba_n_groups=mixer.num_groups,
        mamba_proj_bias=True,
        mamba_chunk_size=16,
    )
    stock = GraniteMoeHybridMambaLayer(config, 0).eval()
    weights = mixer.state_dict()
    gate_bias = weights.pop("gate_bias")
    weights["in_proj.bias"] = torch.cat([gate_bias, gate_bias.new_zeros(len(weights["in_proj.weight"]) - 32)])
    stock.load_state_dict(weights)
    return stock


@pytest.mark.parametrize(
    "num_groups",
    [
        pytest.param(num, marks=pytest.mark.skipif(not norms_by_group(), reason="this release norms all groups as one"))
        for num in (None, 2)
    ]
    + [1],
)
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 45])
@torch.no_grad()
def test_the_mixer_is_the_librarys_layer(num_groups, num_tokens):
    mixer = random_mixer(num_groups=num_groups)
    hidden = torch.randn(2, num_tokens, 32)
    mask = torch.ones(2, num_tokens)
    mask[0, : num_tokens // 3] = 0
    stock = stock_layer(mixer)
    torch.testing.assert_close(mixer(hidden, None)[0], stock(hidden), rtol=1e-5, atol=1e-5)
    padded, expected = mixer(hidden, None, token_mask=mask)[0], stock(hidden, attention_mask=mask)
    torch.testing.assert_close(padded[mask > 0], expected[mask > 0], rtol=1e-5, atol=1e-5)


class Memory:
    """As much of a cache as a mixer needs."""

    def __init__(self) -> None:
        self.layers = [RecurrentStateLayer()]


@torch.no_grad()
def test_cached_pieces_equal_the_whole_and_leave_the_same_states():
    mixer = random_mixer()
    hidden, whole, pieces = torch.randn(2, 41, 32), Memory(), Memory()
    expected, _ = mixer(hidden, None, past_key_values=whole)
    parts = [
        mixer(hidden[:, first:end], None, past_key_values=pieces)[0]
        for first, end in ((0, 1), (1, 2), (2, 20), (20, 21), (21, 41))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pieces.layers[0].read(), whole.layers[0].read(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pieces.layers[0].read_conv(), whole.layers[0].read_conv(), rtol=1e-5, atol=1e-5)
    assert whole.layers[0].read_conv().shape[1] == CONV_TOKENS - 1


@torch.no_grad()
def test_padding_leaves_no_trace_in_either_state():
    mixer = random_mixer()
    hidden = torch.randn(2, 9, 32)
    alone, padded = Memory(), Memory()
    mixer(hidden, None, past_key_values=alone)
    noise = torch.randn(2, 5, 32)
    mask = torch.cat([torch.zeros(2, 5), torch.ones(2, 9)], dim=1)
    mixer(torch.cat([noise, hidden], dim=1), None, past_key_values=padded, token_mask=mask)
    torch.testing.assert_close(padded.layers[0].read(), alone.layers[0].read(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded.layers[0].read_conv(), alone.layers[0].read_conv(), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_beams_and_copies_take_the_convolution_with_them():
    mixer, memory = random_mixer(), Memory()
    hidden = torch.randn(3, 6, 32)
    mixer(hidden, None, past_key_values=memory)
    layer = memory.layers[0]
    before = layer.read_conv().clone()
    layer.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(layer.read_conv(), before[[2, 0]])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.read_conv(), before[[2, 2, 0, 0]])
    layer.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert torch.equal(layer.read_conv(), before[[0, 2, 2, 0]])
    layer.reset()
    assert layer.read() is None
    assert layer.read_conv() is None


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_start_is_the_teachers_queries_keys_and_values(family):
    """Small inputs pass SiLU as half of themselves, so x, B and C start as multiples of v, k and q."""
    teacher = pico_teacher(family)
    attention = decoder_layers(teacher.model)[1].self_attn
    mixer = Mamba2(teacher.geometry, 1)
    mixer.start_from(attention)
    g = teacher.geometry
    hidden = torch.randn(1, 5, g.hidden_dim)
    rows = mixer.in_proj(hidden)[..., mixer.inner_dim : mixer.inner_dim + mixer.conv_dim]
    x, b, c = (mixer.conv1d.weight[:, 0, -1] * rows + mixer.conv1d.bias).split(mixer.inner_dim, dim=-1)
    repeats = g.num_heads // g.num_kv_heads
    for ours, proj, times in ((x, "v_proj", repeats), (b, "k_proj", repeats), (c, "q_proj", 1)):
        theirs = getattr(attention, proj)(hidden).unflatten(-1, (-1, g.head_dim)).repeat_interleave(times, dim=2)
        ours = ours.unflatten(-1, (g.num_heads, g.head_dim))
        cosine = torch.cosine_similarity(ours, theirs, dim=-1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-5)
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)


def test_calibration_finds_the_best_weight_of_the_norm():
    teacher = pico_teacher()
    seen = {}
    with torch.no_grad(), capture_attention(teacher.model, [1], lambda *event: seen.update([(event[0], event[1:])])):
        teacher.model(torch.randint(1, 257, (8, 64)))
    hidden, rotary, target = seen[1]
    mixer = Mamba2(teacher.geometry, 1)
    mixer.start_from(decoder_layers(teacher.model)[1].self_attn)

    def error() -> float:
        with torch.no_grad():
            return float((mixer(hidden, rotary)[0] - target).square().sum() / target.square().sum())

    mixer.calibrate(hidden, target)
    best = error()
    assert best < 1.0
    for _ in range(5):
        weight = mixer.norm.weight.detach().clone()
        with torch.no_grad():
            mixer.norm.weight.add_(0.05 * weight.abs().mean() * torch.randn_like(weight))
        assert error() > best
        with torch.no_grad():
            mixer.norm.weight.copy_(weight)


def test_groups_must_divide_the_heads():
    with pytest.raises(RecipeError, match=r"num_groups.*divisor of the 4 heads"):
        Mamba2(GEOMETRY, 0, num_groups=3)


def test_distillation_starts_near_one_and_learns():
    blocks = token_blocks()
    bank = distill(
        pico_teacher(), blocks, mixer="mamba2", num_tokens=8 * 32 * 30, batch_size=8, learning_rate=5e-3, seed=3
    )
    for layer in bank.layers:
        assert bank.nmse_before[layer] < 1.2
        assert bank.nmse_after[layer] < 0.8 * bank.nmse_before[layer]


def test_the_loss_compiles_without_a_graph_break():
    teacher = pico_teacher()
    mixer = mixer_from_teacher("mamba2", teacher.geometry, 0, decoder_layers(teacher.model)[0].self_attn)
    hidden = torch.randn(2, 40, 32)

    def loss(x):
        return mixer(x, None)[0].square().mean()

    eager = torch.autograd.grad(loss(hidden), list(mixer.parameters()))
    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled = torch.autograd.grad(whole(hidden), list(mixer.parameters()))
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
