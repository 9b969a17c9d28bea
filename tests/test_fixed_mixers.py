"""Linear attention without gates on its state: a fixed decay (Retention) and learned features (Hedgehog)."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import pico_teacher

from dtr.arch import decoder_layers
from dtr.errors import RecipeError
from dtr.mixers import make_mixer, mixer_from_teacher
from dtr.ops import feature_attention

B, H, K, V = 2, 3, 6, 5


def with_gradients(form, inputs):
    """Outputs and the gradient of every input, for fixed random gradients of the outputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = form(*leaves)
    draw = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(x.shape, generator=draw, dtype=torch.float64) * x).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def assert_close(actual, expected, bound):
    errors = [float(((a.double() - e).norm() / e.norm()).detach()) for a, e in zip(actual, expected, strict=True)]
    assert all(error < bound for error in errors), errors


@pytest.fixture(scope="module")
def teacher():
    return pico_teacher()


def from_teacher(teacher, kind, **options):
    return mixer_from_teacher(kind, teacher.geometry, 1, decoder_layers(teacher.model)[1].self_attn, options)


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 65, 130])
def test_features_in_chunks_equal_those_token_by_token(num_tokens):
    q, k = torch.randn(2, B, num_tokens, H, K, dtype=torch.float64)
    weights = torch.randn(2, H, K, K, dtype=torch.float64)
    v, state = torch.randn(B, num_tokens, H, V, dtype=torch.float64), torch.rand(B, H, 2 * K, V + 1).double()
    inputs = [q, k, v, *weights, state]

    def by(form):
        def run(q, k, v, to_q, to_k, state):
            q, k = feature_attention.features(q, to_q), feature_attention.features(k, to_k)
            return form(q, k, v, state_BHFV=state)

        return run

    expected = with_gradients(by(feature_attention.naive), inputs)
    assert_close(with_gradients(by(feature_attention.chunked), inputs), expected, 1e-10)
    assert_close(with_gradients(by(feature_attention.chunked), [x.float() for x in inputs]), expected, 1e-3)


def test_features_are_shares_and_the_output_a_weighted_mean():
    """Against the formula of the paper, written out over all pairs of tokens."""
    q, k = torch.randn(2, B, 20, H, K, dtype=torch.float64)
    w, v = torch.randn(H, K, K, dtype=torch.float64), torch.randn(B, 20, H, V, dtype=torch.float64)
    for one in range(H):
        mapped = k[0, 3, one] @ w[one].T
        spiky = torch.cat([mapped, -mapped]).exp()
        torch.testing.assert_close(feature_attention.features(k, w)[0, 3, one], spiky / spiky.sum())
    fq, fk = feature_attention.features(q, w), feature_attention.features(k, w)
    weights = torch.einsum("bthf,bshf->bhts", fq, fk).tril()
    expected = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)
    torch.testing.assert_close(feature_attention.chunked(fq, fk, v)[0], expected)
    assert feature_attention.features(q.bfloat16(), w.bfloat16()).dtype == torch.float32


def test_hedgehog_starts_with_the_teachers_scores(teacher):
    mixer = from_teacher(teacher, "hedgehog")
    q, k = torch.randn(2, 1, 1, 4, 16)
    ours = torch.einsum("hij,bthj->bthi", mixer.q_features, q) * torch.einsum("hij,bthj->bthi", mixer.k_features, k)
    torch.testing.assert_close(ours.sum(-1), (q * k).sum(-1) / math.sqrt(16))
    one, other = from_teacher(teacher, "hedgehog", head_copies=2).q_features.chunk(2)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("num_tokens", [1, 7, 65])
def test_retention_equals_the_papers_three_forms(num_tokens, teacher):
    mixer = from_teacher(teacher, "retention", min_half_life_tokens=2.0, max_half_life_tokens=40.0)
    q, k, v = torch.randn(3, B, num_tokens, 4, 16, dtype=torch.float64)
    start = torch.randn(B, 4, 16, 16, dtype=torch.float64)
    gamma = 2 ** -(1 / torch.tensor([2.0 * 20 ** (i / 3) for i in range(4)], dtype=torch.float64))

    def recur(q, k, v, state):
        return mixer.recur(torch.empty(0), q, k, v, None, state)

    def parallel(q, k, v, state):
        """Eq. 5, with the carried state and our scale of what is written."""
        n = torch.arange(num_tokens, dtype=torch.float64)
        age = n[:, None] - n[None]
        d_HNM = torch.where(age >= 0, gamma[:, None, None] ** age.clamp(min=0), 0.0)
        k = k * (1 - gamma)[:, None]
        inner = (torch.einsum("bnhk,bmhk->bhnm", q, k) * d_HNM) @ v.transpose(1, 2)
        faded = gamma[:, None] ** (n + 1)
        out = inner.transpose(1, 2) + torch.einsum("bnhk,bhkv,hn->bnhv", q, state, faded)
        added = torch.einsum("bmhk,bmhv,hm->bhkv", k, v, gamma[:, None] ** (num_tokens - 1 - n))
        return out, state * (gamma**num_tokens)[:, None, None] + added

    def one_by_one(q, k, v, state):
        """Eq. 6."""
        outputs = []
        for t in range(num_tokens):
            out, state = recur(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state)
            outputs.append(out)
        return torch.cat(outputs, dim=1), state

    inputs = [q, k, v, start]
    expected = with_gradients(parallel, inputs)
    # The rates are float32.
    assert_close(with_gradients(recur, inputs), expected, 1e-5)
    assert_close(with_gradients(one_by_one, inputs), expected, 1e-5)


def test_retention_forgets_at_the_pace_it_was_given(teacher):
    mixer = from_teacher(teacher, "retention", min_half_life_tokens=4.0, max_half_life_tokens=4.0)
    assert not any("decay" in name for name, _ in mixer.named_parameters())
    silence = torch.zeros(1, 4, 4, 16)
    _, state = mixer.recur(torch.empty(0), silence, silence, silence, None, torch.ones(1, 4, 16, 16))
    torch.testing.assert_close(state, torch.full_like(state, 0.5))
    # Also in the type of a hybrid: a decay close to 1 has no room in bfloat16.
    _, state = mixer.bfloat16().recur(torch.empty(0), silence, silence, silence, None, torch.ones(1, 4, 16, 16))
    torch.testing.assert_close(state, torch.full_like(state, 0.5))


@pytest.mark.parametrize(
    "bad", [{"min_half_life_tokens": 0.0}, {"min_half_life_tokens": 9.0, "max_half_life_tokens": 4.0}]
)
def test_half_lives_that_make_no_sense_are_told(bad, teacher):
    for kind in ("retention", "gated_deltanet"):
        with pytest.raises(RecipeError, match="half_life"):
            make_mixer(kind, teacher.geometry, 0, bad)


@pytest.mark.parametrize(("kind", "shortest"), [("kimi_delta_attention", 0.17), ("gated_linear_attention", 0.69)])
def test_half_lives_at_which_nothing_is_learned_are_told(kind, shortest, teacher):
    with pytest.raises(RecipeError, match=f"two numbers above {shortest}, the smaller first"):
        make_mixer(kind, teacher.geometry, 0, {"min_half_life_tokens": shortest})
    mixer = from_teacher(teacher, kind, min_half_life_tokens=shortest + 0.01)
    hidden = torch.randn(1, 6, 32)
    out, _ = mixer(hidden, teacher.model.model.rotary_emb(hidden, torch.arange(6)[None]))
    out.square().sum().backward()
    gradient = mixer.decay_up_proj.bias.grad
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0
