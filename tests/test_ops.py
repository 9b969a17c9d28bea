"""The two recurrences: the chunked form against the naive one, and that against formulas written elsewhere."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from dtr.ops import gated_delta, gated_linear
from dtr.ops.chunking import chunk_length
from dtr.ops.rotary import rotate, rotate_to_unit_length

B, H, K, V = 2, 3, 16, 24
DELTA, LINEAR = gated_delta, gated_linear
LENGTHS = (1, 7, 63, 64, 65, 130)
CASES = [(DELTA, "random"), (DELTA, "correlated"), (DELTA, "strong_decay"), (LINEAR, "random"), (LINEAR, "weak_decay"),
         (LINEAR, "strong_decay")]  # fmt: skip
cases = pytest.mark.parametrize(("op", "kind"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__[8:])
ops = pytest.mark.parametrize("op", [DELTA, LINEAR], ids=lambda x: x.__name__[8:])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return request.param


def make_inputs(op: ModuleType, kind: str, num_tokens: int, device: str = "cpu") -> list[torch.Tensor]:
    """q, k, v, g, beta (delta rule only) and a state, float64."""
    q, k, noise = (torch.randn(B, num_tokens, H, K, dtype=torch.float64) for _ in range(3))
    if kind == "correlated":
        k = torch.randn(B, 1, H, K, dtype=torch.float64) + 0.05 * noise
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    v = torch.randn(B, num_tokens, H, V, dtype=torch.float64)
    g = -torch.rand(B, num_tokens, H, K, dtype=torch.float64)
    g *= {"random": 1.0, "weak_decay": 1e-2, "correlated": 1e-3, "strong_decay": 0.1}[kind]
    if kind == "strong_decay":
        g = torch.where(torch.rand_like(g) < 0.2, -30.0, torch.where(torch.rand_like(g) < 0.5, 0.0, g))
    state = torch.randn(B, H, K, V, dtype=torch.float64)
    if op is LINEAR:
        inputs = [q, k, v, g, state]
    else:
        beta = torch.rand(B, num_tokens, H, dtype=torch.float64)
        inputs = [q, k, v, g[..., 0], 1 - 0.01 * beta if kind == "correlated" else beta, state]
    return [x.to(device) for x in inputs]


def cast(inputs: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """All in `dtype` but the state, which is never below float32."""
    return [*(x.to(dtype) for x in inputs[:-1]), inputs[-1].to(torch.promote_types(dtype, torch.float32))]


def run(form, inputs: list[torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """Output, last state and the gradient of every input, for fixed random gradients of both."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o, state = form(*leaves[:-1], state_BHKV=leaves[-1], **options)
    draw = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.device) * x).sum() for x in (o, state))
    grads = torch.autograd.grad(loss, leaves)
    names = ["q", "k", "v", "g", "beta"][: len(leaves) - 1]
    return {"o": o, "last_state": state, **dict(zip([f"grad_{name}" for name in [*names, "state"]], grads))}


def relative_errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(((actual[name].double() - x).norm() / x.norm()).detach()) for name, x in expected.items()}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    errors = relative_errors(actual, expected)
    # A NaN is not below the bound either.
    assert all(error < bound for error in errors.values()), errors


@cases
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_chunked_float32_equals_naive_float64(op, kind, num_tokens, device):
    inputs = make_inputs(op, kind, num_tokens, device)
    actual = run(op.chunked, cast(inputs, torch.float32))
    assert_close(actual, run(op.naive, inputs), 1e-5)
    assert actual["o"].shape == (B, num_tokens, H, V)
    assert actual["last_state"].shape == (B, H, K, V)


@cases
@pytest.mark.parametrize("num_tokens", [7, 130])
def test_chunked_bfloat16_loses_only_what_its_type_must(op, kind, num_tokens, device):
    inputs = cast(make_inputs(op, kind, num_tokens, device), torch.bfloat16)
    actual = run(op.chunked, inputs)
    expected = run(op.naive, [x.double() for x in inputs])
    # On a CPU the delta rule multiplies in bfloat16; elsewhere only results are rounded.
    multiplies_low = op is DELTA and device == "cpu"
    bound, state_bound = ((5e-2 if kind == "correlated" else 2e-2), 1e-2) if multiplies_low else (1e-2, 1e-5)
    assert_close(actual, expected, bound)
    assert actual["o"].dtype == torch.bfloat16
    assert actual["last_state"].dtype == torch.float32
    assert relative_errors(actual, expected)["last_state"] < state_bound


@cases
def test_chunked_float64_is_exact(op, kind):
    inputs = make_inputs(op, kind, 130)
    assert_close(run(op.chunked, inputs), run(op.naive, inputs), 1e-12)
    assert_close(run(op.chunked, inputs, chunk_size=16), run(op.naive, inputs), 1e-12)
    assert_close(run(op.chunked, inputs, scale=0.3), run(op.naive, inputs, scale=0.3), 1e-12)


@ops
def test_gradcheck(op):
    # 18 tokens in chunks of 16: a whole chunk and a padded one. One sequence, one head, K = V = 2.
    inputs = make_inputs(op, "random", 18)
    small = [x[(slice(1), slice(None), slice(1), slice(2))[: x.dim()]] for x in inputs[:-1]] + [
        inputs[-1][:1, :1, :2, :2]
    ]
    small = [x.contiguous().requires_grad_() for x in small]
    assert torch.autograd.gradcheck(lambda *x: op.chunked(*x[:-1], state_BHKV=x[-1], chunk_size=16), small)


def test_delta_step_is_equation_10():
    """arXiv 2412.06464, eq. 10, with the state [V, K] as printed."""
    q, k, v, g, beta, state = make_inputs(DELTA, "random", 1)
    o, new = DELTA.step(*(x[:, 0] for x in (q, k, v, g, beta)), state, scale=0.5)
    for b in range(B):
        for h in range(H):
            k_, v_, strength = k[b, 0, h], v[b, 0, h], beta[b, 0, h]
            forget = torch.eye(K, dtype=torch.float64) - strength * torch.outer(k_, k_)
            printed = state[b, h].T @ (g[b, 0, h].exp() * forget) + strength * torch.outer(v_, k_)
            torch.testing.assert_close(new[b, h], printed.T)
            torch.testing.assert_close(o[b, h], 0.5 * printed @ q[b, 0, h])


def test_naive_linear_is_decayed_attention():
    """o_t is the sum over j <= t of (q_t * exp(g_{j+1} + ... + g_t)) . k_j v_j, with no state in between."""
    q, k, v, g, _ = make_inputs(LINEAR, "random", 20)
    o, _ = LINEAR.naive(q, k, v, g)
    total = g.cumsum(1)
    decay = (total.unsqueeze(2) - total.unsqueeze(1)).exp()
    scores = torch.einsum("bthk,bjhk,btjhk->bhtj", q, k, decay).tril()
    torch.testing.assert_close(o, K**-0.5 * torch.einsum("bhtj,bjhv->bthv", scores, v))


@pytest.mark.parametrize("kind", ["random", "correlated"])
def test_delta_equals_transformers(kind):
    from transformers.models.auto import modeling_auto  # noqa: F401
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

    *inputs, state = cast(make_inputs(DELTA, kind, 130), torch.float32)
    theirs, their_state = qwen3_next.torch_recurrent_gated_delta_rule(
        *inputs, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=False
    )
    o, last = DELTA.chunked(*inputs, state_BHKV=state)
    assert_close({"o": o, "last": last}, {"o": theirs.double(), "last": their_state.double()}, 1e-5)


@cases
@pytest.mark.parametrize("num_first", [1, 64, 100])
def test_two_passes_with_a_carried_state_equal_one(op, kind, num_first):
    *inputs, state = cast(make_inputs(op, kind, 130), torch.float32)
    whole, last = op.chunked(*inputs, state_BHKV=state)
    first, middle = op.chunked(*(x[:, :num_first] for x in inputs), state_BHKV=state)
    second, end = op.chunked(*(x[:, num_first:] for x in inputs), state_BHKV=middle)
    actual = {"o": torch.cat([first, second], dim=1), "last": end}
    assert_close(actual, {"o": whole.double(), "last": last.double()}, 1e-5)


@ops
def test_steps_continue_a_chunked_prefill(op):
    *inputs, state = cast(make_inputs(op, "random", 70), torch.float32)
    whole, last = op.chunked(*inputs, state_BHKV=state)
    _, state = op.chunked(*(x[:, :66] for x in inputs), state_BHKV=state)
    outputs = []
    for t in range(66, 70):
        given = state.clone()
        o, new = op.step(*(x[:, t] for x in inputs), state)
        assert torch.equal(state, given)
        state = new
        outputs.append(o)
    actual = {"o": torch.stack(outputs, dim=1), "last": state}
    assert_close(actual, {"o": whole[:, 66:].double(), "last": last.double()}, 1e-5)


@ops
@pytest.mark.parametrize(("num_left", "num_right"), [(5, 0), (0, 5), (60, 70)])
def test_padding_tokens_change_nothing(op, num_left, num_right):
    """Padding has g = 0 and nothing to write (beta = 0, or k = 0); its q and v may be anything."""
    *inputs, state = cast(make_inputs(op, "random", 67), torch.float32)
    left, right = (
        [torch.zeros_like(x[:, :1]).expand(-1, n, *x.shape[2:]) + (i in (0, 2)) for i, x in enumerate(inputs)]
        for n in (num_left, num_right)
    )
    if op is DELTA:
        left[1], right[1] = left[1] + 1, right[1] + 1
    o, last = op.chunked(*inputs, state_BHKV=state)
    padded, padded_last = op.chunked(*(torch.cat(x, dim=1) for x in zip(left, inputs, right)), state_BHKV=state)
    actual = {"o": padded[:, num_left : num_left + 67], "last": padded_last}
    assert_close(actual, {"o": o.double(), "last": last.double()}, 1e-6)


@pytest.mark.parametrize("inverse", [DELTA.unit_lower_inverse, DELTA.inverse_by_halving])
def test_inverse_is_stable_where_all_entries_are_near_one(inverse):
    a = (1 - 0.01 * torch.rand(10, 64, 64)).tril(-1)
    expected = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + a.double())
    # What is on and above the diagonal is not looked at.
    actual = inverse(a + torch.ones(64, 64).triu())
    assert float((actual - expected).norm() / expected.norm()) < 1e-6


@ops
def test_compiles_without_a_graph_break(op):
    inputs = cast(make_inputs(op, "random", 70), torch.float32)
    compiled = torch.compile(op.chunked, fullgraph=True, dynamic=False, backend="aot_eager")
    assert_close(run(compiled, inputs), {name: x.double() for name, x in run(op.chunked, inputs).items()}, 1e-6)


@ops
def test_autocast_does_not_lower_the_precision(op):
    inputs = cast(make_inputs(op, "strong_decay", 70), torch.float32)
    expected = run(op.chunked, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(op.chunked, inputs)
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


@ops
def test_memory_kept_for_the_backward_is_linear_in_length(op):
    def kept_bytes(num_tokens: int) -> int:
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.setdefault(x.data_ptr(), x), lambda x: x):
            inputs = cast(make_inputs(op, "random", num_tokens), torch.float32)
            o, _ = op.chunked(*(x.requires_grad_() for x in inputs[:-1]))
        assert o.requires_grad
        return sum(x.numel() * x.element_size() for x in seen.values())

    assert kept_bytes(1024) < 2.05 * kept_bytes(512)


def test_splitting_the_batch_for_the_cache_changes_nothing(monkeypatch):
    inputs = make_inputs(DELTA, "random", 70)
    expected = run(DELTA.chunked, inputs)
    monkeypatch.setattr(DELTA, "CACHE_ELEMENTS_PER_THREAD", 1)
    assert_close(run(DELTA.chunked, inputs), expected, 1e-14)


def test_short_sequences_take_short_chunks():
    lengths = {n: chunk_length(n, 64) for n in (1, 16, 17, 33, 63, 64, 65, 1000)}
    assert lengths == {1: 16, 16: 16, 17: 32, 33: 64, 63: 64, 64: 64, 65: 64, 1000: 64}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotation_to_unit_length_in_few_passes_equals_the_plain_form(dtype):
    x = torch.randn(2, 5, 3, 8, dtype=dtype, requires_grad=True)
    # Halves with angles of their own, which the library never has, so that a mix-up shows.
    cos, sin = torch.randn(2, 5, 8, dtype=dtype), torch.randn(2, 5, 8, dtype=dtype)
    grad = torch.randn(2, 5, 3, 8, dtype=dtype)
    ours = rotate_to_unit_length(x, cos, sin)
    plain = torch.nn.functional.normalize(rotate(x, cos, sin), dim=-1)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(ours, plain, **tolerance)
    (ours_grad,), (plain_grad,) = (torch.autograd.grad(y, x, grad) for y in (ours, plain))
    torch.testing.assert_close(ours_grad, plain_grad, **tolerance)
    # Where a vector has no length, neither form divides by zero.
    assert rotate_to_unit_length(torch.zeros_like(x), cos, sin).abs().max() == 0
