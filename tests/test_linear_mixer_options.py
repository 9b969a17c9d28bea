"""Convolutions and copied heads of the linear mixers: start, pieces, padding, saving."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from exactness import assert_same_model
from tiny import byte_tokenizer, pico_model, pico_teacher, token_blocks
from transformers import AutoModelForCausalLM

from dtr.arch import decoder_layers
from dtr.distillation.bank import load_bank
from dtr.distillation.trainer import distill
from dtr.errors import RecipeError
from dtr.hybrid.cache import RecurrentStateLayer
from dtr.hybrid.modeling import make_hybrid
from dtr.mixers import make_mixer, mixer_from_teacher
from dtr.mixers.quadratic import STEP_SIZE, QuadraticFeatures
from dtr.ops.short_convolution import dynamic_convolution, short_convolution
from dtr.teacher import as_teacher

KINDS = ("gated_deltanet", "gated_linear_attention", "hedgehog", "kimi_delta_attention", "retention")
OPTIONS = {
    "convolution": {"conv_tokens": 4},
    "one tap": {"conv_tokens": 1},
    "copies": {"head_copies": 2},
    "window": {"window": 5, "sinks": 2},
    "first value": {"exact_first": True},
    "quadratic": {"quadratic": True},
    "all": {"conv_tokens": 4, "head_copies": 2, "window": 3, "sinks": 1, "exact_first": True, "quadratic": True},
    "both": {"conv_tokens": 3, "head_copies": 3},
}


@pytest.fixture(scope="module")
def teacher():
    return pico_teacher("qwen3")


def fitting(kind, options):
    """These options, but for the one that hedgehog has no place for."""
    return {k: v for k, v in options.items() if (kind, k) != ("hedgehog", "quadratic")}


def made(teacher, kind, options):
    return mixer_from_teacher(kind, teacher.geometry, 1, decoder_layers(teacher.model)[1].self_attn, options)


def random_mixer(teacher, kind, options):
    """Every weight random, so that nothing can hide behind a start value."""
    mixer = made(teacher, kind, options).eval().requires_grad_(False)
    for name, weight in mixer.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return mixer


def rotary(teacher, num_tokens):
    return teacher.model.model.rotary_emb(torch.zeros(1), torch.arange(num_tokens)[None])


def test_dynamic_convolution_weighs_the_last_tokens_by_the_current_one():
    x, taps, past = torch.randn(2, 9, 6), torch.randn(2, 9, 6, 3), torch.randn(2, 2, 6)
    out, kept = dynamic_convolution(x, taps, past)
    seen = torch.cat([past, x], dim=1)
    for t in range(9):
        torch.testing.assert_close(out[:, t], (taps[:, t] * seen[:, t : t + 3].mT).sum(-1))
    assert torch.equal(kept, x[:, -2:])


@torch.no_grad()
def test_a_jet_block_starts_as_gated_deltanet_and_agrees_in_pieces(teacher):
    hidden = torch.randn(2, 41, 32)
    cos, sin = rotary(teacher, 41)
    plain, ours = made(teacher, "gated_deltanet", {}), made(teacher, "jet_block", {})
    torch.testing.assert_close(ours(hidden, (cos, sin))[0], plain(hidden, (cos, sin))[0])
    mixer = random_mixer(teacher, "jet_block", {"dynamic_tokens": 3, "head_copies": 2})
    memory = SimpleNamespace(layers=[None, RecurrentStateLayer()])
    parts = [
        mixer(hidden[:, a:b], (cos[:, a:b], sin[:, a:b]), past_key_values=memory)[0]
        for a, b in ((0, 1), (1, 2), (2, 20), (20, 21), (21, 41))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), mixer(hidden, (cos, sin))[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(RecipeError, match="conv_tokens"):
        make_mixer("jet_block", teacher.geometry, 0, {"conv_tokens": 4})


@pytest.mark.parametrize(("kind", "family"), [*((kind, "qwen3") for kind in KINDS), ("gated_deltanet", "qwen2")])
@torch.no_grad()
def test_the_first_token_is_the_teachers(kind, family):
    teacher = pico_teacher(family)
    layer, hidden = decoder_layers(teacher.model)[1], torch.randn(2, 9, 32)
    for name, weight in layer.self_attn.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    angles = rotary(teacher, 9)
    expected, _ = layer.self_attn(hidden, angles, attention_mask=None)
    ours, _ = made(teacher, kind, {"exact_first": True, "head_copies": 2})(hidden, angles)
    torch.testing.assert_close(ours[:, 0], expected[:, 0], rtol=1e-4, atol=1e-5)
    plain, _ = made(teacher, kind, {"head_copies": 2})(hidden, angles)
    assert torch.equal(plain[:, 1:], ours[:, 1:]), "the state is as it was"
    # The weights of hedgehog sum to 1, so that it does so by itself.
    assert torch.allclose(plain[:, 0], expected[:, 0], rtol=1e-2) == (kind == "hedgehog")


def test_short_convolution_is_the_librarys():
    conv = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3)
    x = torch.randn(2, 9, 6)
    out, past = short_convolution(x, conv.weight[:, 0], conv.bias, None)
    torch.testing.assert_close(out, conv(x.mT).mT[:, :9], rtol=1e-5, atol=1e-5)
    assert torch.equal(past, x[:, -3:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_linear_mixer_starts_with_the_teachers_heads_in_float32(family, kind):
    teacher = as_teacher(pico_model(family).bfloat16(), byte_tokenizer(), source="pico")
    attention, hidden = decoder_layers(teacher.model)[1].self_attn, torch.randn(2, 7, 32)
    mixer = mixer_from_teacher(kind, teacher.geometry, 1, attention, {"head_copies": 2})
    assert {weight.dtype for weight in mixer.parameters()} == {torch.float32}, "bfloat16 swallows small updates"
    for name, repeats in (("q_proj", 1), ("k_proj", 2), ("v_proj", 2)):
        theirs = getattr(attention, name).float()(hidden).unflatten(-1, (-1, 16))
        ours = getattr(mixer, name)(hidden).unflatten(-1, (-1, 16))
        # Shared keys and values are there for each head, and each copy of a head has them all.
        for head in range(8):
            torch.testing.assert_close(ours[:, :, head], theirs[:, :, head % 4 // repeats], msg=name)
    assert (2 * torch.sigmoid(mixer.gate_proj(hidden)) == 1).all(), "the gate is open"
    heads = torch.randn(2, 7, 64)
    expected = attention.o_proj.float()(heads)
    torch.testing.assert_close(mixer.o_proj(torch.cat([heads, heads], dim=-1)), expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_convolution_starts_as_nothing(kind, teacher):
    hidden = torch.randn(2, 21, 32)
    plain, ours = made(teacher, kind, {}), made(teacher, kind, {"conv_tokens": 4})
    ours.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(ours(hidden, rotary(teacher, 21))[0], plain(hidden, rotary(teacher, 21))[0])


def test_quadratic_features_by_hand():
    features, x = QuadraticFeatures(3, 4).requires_grad_(False), torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(features(x), x / x.square().mean(-1, keepdim=True).sqrt())
    torch.nn.init.normal_(features.weight)
    one = x[1, 3, 2] / x[1, 3, 2].square().mean().sqrt()
    expected = one * (1 + STEP_SIZE * features.weight[2] @ one)
    torch.testing.assert_close(features(x)[1, 3, 2], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_joined_projection_gives_the_mix_of_features():
    features, projection, hidden = QuadraticFeatures(3, 4), torch.nn.Linear(7, 12), torch.randn(5, 7)
    torch.nn.init.normal_(features.weight)
    mix = torch.einsum("bhk,hjk->bhj", projection(hidden).view(5, 3, 4), STEP_SIZE * features.weight).flatten(1)
    torch.testing.assert_close(features.joined(projection)(hidden), mix)
    assert features.joined(torch.nn.Linear(7, 12, bias=False)).bias is None


@torch.no_grad()
def test_quadratic_features_start_as_nothing(teacher):
    hidden, angles = torch.randn(2, 21, 32), rotary(teacher, 21)
    plain, ours = made(teacher, "gated_deltanet", {}), made(teacher, "gated_deltanet", {"quadratic": True})
    torch.testing.assert_close(ours(hidden, angles)[0], plain(hidden, angles)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(RecipeError, match=r"quadratic.*lengths"):
        make_mixer("hedgehog", teacher.geometry, 0, {"quadratic": True})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_cached_pieces_and_padding_equal_the_whole(kind, options, teacher):
    mixer, hidden = random_mixer(teacher, kind, fitting(kind, options)), torch.randn(2, 41, 32)
    cos, sin = rotary(teacher, 41)
    memory = SimpleNamespace(layers=[None, RecurrentStateLayer()])
    expected, _ = mixer(hidden, (cos, sin))
    parts = [
        mixer(hidden[:, a:b], (cos[:, a:b], sin[:, a:b]), past_key_values=memory)[0]
        for a, b in ((0, 1), (1, 2), (2, 4), (4, 20), (20, 21), (21, 41))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert memory.layers[1].num_bytes() == 2 * mixer.state_bytes(4)

    mask = torch.ones(2, 48)
    mask[:, :7] = 0
    padded = torch.cat([torch.randn(2, 7, 32), hidden], dim=1)
    cos, sin = (torch.cat([x[:, :1].expand(-1, 7, -1), x], dim=1) for x in (cos, sin))
    memory = SimpleNamespace(layers=[None, RecurrentStateLayer()])
    parts = [
        mixer(padded[:, a:b], (cos[:, a:b], sin[:, a:b]), token_mask=mask[:, :b], past_key_values=memory)[0]
        for a, b in ((0, 9), (9, 10), (10, 48))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, 7:], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_copies_of_a_head_differ_in_half_life_alone(teacher):
    hidden, same = torch.randn(2, 21, 32), {"min_half_life_tokens": 9.0, "max_half_life_tokens": 9.0}
    plain, copied = (made(teacher, "gated_deltanet", same | more) for more in ({}, {"head_copies": 2}))
    torch.testing.assert_close(copied(hidden, rotary(teacher, 21))[0], plain(hidden, rotary(teacher, 21))[0])
    one, other = made(teacher, "gated_deltanet", {"head_copies": 2}).decay_proj.bias.chunk(2)
    assert sorted(one.tolist()) == sorted(other.tolist())
    assert (one != other).all()


@pytest.mark.parametrize("kind", KINDS)
def test_they_learn_and_survive_saving(kind, tmp_path):
    teacher, options = pico_teacher(), fitting(kind, OPTIONS["all"])
    settings = {"num_tokens": 8 * 32 * 20, "batch_size": 8, "learning_rate": 2e-3}
    bank = distill(teacher, token_blocks(), mixer=kind, options=options, layers=[1], **settings)
    assert bank.mean_nmse < bank.curve[0]["mean_nmse"]
    for mixer in bank.mixers.values():
        assert (mixer.conv_taps[:, 0] != 0).any()
        assert mixer.window_proj.weight.any()
        assert kind == "hedgehog" or mixer.k_quadratic.weight.any()
    bank.save(tmp_path / "bank")
    assert load_bank(tmp_path / "bank", teacher=teacher).fingerprint == bank.fingerprint

    hybrid = make_hybrid(teacher.model, bank.in_dtype(torch.float32), {i: bank.spec(i) for i in bank.layers})
    hybrid.save_pretrained(tmp_path / "hybrid")
    ids = torch.randint(1, 257, (2, 30))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert_same_model(loaded, hybrid, input_ids=ids)
    prompt = {"inputs": ids, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(loaded.generate(**prompt), loaded.generate(use_cache=False, **prompt))


@pytest.mark.parametrize(
    "options", [{"conv_tokens": -1}, {"conv_tokens": 2.5}, {"head_copies": 0}, {"quadratic": 2}, {"exact_first": 1}]
)
def test_a_bad_value_is_told(options, teacher):
    with pytest.raises(RecipeError, match=next(iter(options))):
        make_mixer("gated_deltanet", teacher.geometry, 0, options)
