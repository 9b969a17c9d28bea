"""Recurrences that decay per key channel, in Triton, against a float64 loop: output, final state and every gradient.

On a GPU the kernels run for real. Elsewhere `test_in_the_interpreter` runs this file as a program, in its own process
because Triton decides at import time whether it interprets.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_runs import accept_numpy_2_4, needs_gpu, needs_triton, run_in_the_interpreter

from dtr.ops import channel_delta, gated_linear
from dtr.ops.chunking import MIN_LOG_DECAY

DELTA, PLAIN = True, False
KINDS = ("random", "slow", "equal keys", "strong decay", "strongest decay", "below the bound")
deltas = pytest.mark.parametrize("delta", [DELTA, PLAIN], ids=["delta", "plain"])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def make_inputs(length: int, dims: tuple[int, int], kind: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v, g, beta, initial state."""
    generator = torch.Generator().manual_seed(length)
    shape, (key_dim, value_dim) = (2, length, 3), dims

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    q, k, v = randn(*shape, key_dim), randn(*shape, key_dim), randn(*shape, value_dim)
    g, beta = -rand(*shape, key_dim), rand(*shape)
    if kind == "slow":
        g *= 1e-2
    if kind == "equal keys":
        k = randn(2, 1, 3, key_dim) + 0.05 * k
        g, beta = 0.01 * g, 1 - 0.02 * beta
    if kind in ("strong decay", "below the bound"):
        # Beside channels that keep all, and far too strong for float32 but for the bound.
        strong = MIN_LOG_DECAY if kind == "strong decay" else -100.0
        g = torch.where(rand(*g.shape) < 0.2, strong, torch.where(rand(*g.shape) < 0.5, 0.0, 0.1 * g))
    if kind == "strongest decay":
        g = torch.where(torch.arange(key_dim) % 2 == 0, MIN_LOG_DECAY, 0.02 * g)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    state = 0.3 * randn(2, 3, key_dim, value_dim)
    return [x.to(device, dtype) for x in (q, k, v)] + [x.to(device, torch.float32) for x in (g, beta, state)]


def relative_errors(inputs: list[Tensor], *, delta: bool, carried: bool = True) -> dict[str, float]:
    """||ours - float64|| / ||float64|| for each result; without `carried` no state comes in and none is graded."""
    from dtr.ops.gpu.channel_decay_triton import chunked

    scale = 1.0 if delta else 0.7 * inputs[0].shape[-1] ** -0.5
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in (inputs[2], inputs[5])]
    results = []
    for exact in (False, True):
        leaves = dict(zip(["q", "k", "v", "g", "beta", "state"], (x.double() if exact else x.clone() for x in inputs)))
        if not delta:
            del leaves["beta"]
        if not carried:
            del leaves["state"]
        q, k, v, g = (leaves[name].requires_grad_() for name in "qkvg")
        beta, state = (x if x is None else x.requires_grad_() for x in map(leaves.get, ("beta", "state")))
        if not exact:
            o, last = chunked(q, k, v, g, beta, scale=scale, state_BHKV=state)
            assert (o.dtype, last.dtype) == (v.dtype, torch.float32)
        elif delta:
            o, last = channel_delta.naive(q, k, v, g.clamp(min=MIN_LOG_DECAY), beta, state_BHKV=state)
        else:
            o, last = gated_linear.naive(q, k, v, g.clamp(min=MIN_LOG_DECAY), scale=scale, state_BHKV=state)
        outputs = (o, last) if carried else (o,)
        grads = torch.autograd.grad(outputs, leaves.values(), [w.to(x) for w, x in zip(weights, outputs)])
        assert [x.dtype for x in grads] == [x.dtype for x in leaves.values()]
        grads_by_name = {f"d{name}": x for name, x in zip(leaves, grads)}
        results.append({"o": o.detach(), "last state": last.detach(), **grads_by_name})
        if bool((inputs[3] < MIN_LOG_DECAY).any()):
            assert results[-1]["dg"][inputs[3] < MIN_LOG_DECAY].abs().max() == 0
    ours, theirs = results
    return {name: float((ours[name].double() - x).norm() / x.norm()) for name, x in theirs.items()}


def assert_within(errors: dict[str, float], bound: float) -> None:
    # A NaN is not within it either.
    assert all(error <= bound for error in errors.values()), f"above {bound}: {errors}"


@pytest.mark.gpu
@needs_triton
@needs_gpu
@deltas
@dtypes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [1, 7, 32, 33, 130, 512])
def test_matches_float64_on_the_gpu(length: int, dim: int, kind: str, dtype: torch.dtype, delta: bool) -> None:
    errors = relative_errors(make_inputs(length, (dim, dim), kind, dtype, "cuda"), delta=delta)
    # With equal keys a bf16 result is an alternating sum of up to 32 rounded terms, see gated_delta_triton.
    bf16_bound = 5e-2 if delta and kind == "equal keys" else 1e-2
    assert_within(errors, bf16_bound if dtype == torch.bfloat16 else 2e-4)


@pytest.mark.gpu
@needs_triton
@needs_gpu
@deltas
@dtypes
@pytest.mark.parametrize("dims", [(16, 16), (32, 128), (128, 32), (64, 16), (32, 32)])
def test_unequal_dims_without_a_carried_state_on_the_gpu(
    dims: tuple[int, int], dtype: torch.dtype, delta: bool
) -> None:
    errors = relative_errors(make_inputs(130, dims, "random", dtype, "cuda"), delta=delta, carried=False)
    assert_within(errors, 1e-2 if dtype == torch.bfloat16 else 2e-4)


@pytest.mark.gpu
@needs_triton
@needs_gpu
@deltas
@dtypes
@pytest.mark.parametrize("dim", [64, 128])
def test_many_sequences_on_the_gpu(dim: int, dtype: torch.dtype, delta: bool) -> None:
    """Enough sequences for the widest value block, whose kernels the small cases never reach."""
    inputs = make_inputs(130, (dim, dim), "random", dtype, "cuda")
    for copies in (16, 64):
        repeated = [x.repeat(copies, *[1] * (x.ndim - 1)) for x in inputs]
        assert_within(relative_errors(repeated, delta=delta), 1e-2 if dtype == torch.bfloat16 else 2e-4)


def loss_of(delta: bool, inputs: list[Tensor]) -> Tensor:
    from dtr.ops.gpu.channel_decay_triton import chunked

    o, last = chunked(*inputs[:4], inputs[4] if delta else None, state_BHKV=inputs[5])
    return o.float().square().sum() + last.square().sum()


def leaves_of(delta: bool, inputs: list[Tensor]) -> list[Tensor]:
    return [x.requires_grad_() for i, x in enumerate(inputs) if delta or i != 4]


def check_compiles_whole(delta: bool, inputs: list[Tensor]) -> None:
    """In one graph, and again for another length."""
    backend = "inductor" if inputs[0].device.type == "cuda" else "aot_eager"
    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    for length in (inputs[0].shape[1], 40):
        shorter = [*(x.detach()[:, :length].clone() for x in inputs[:5]), inputs[5].detach().clone()]
        leaves = leaves_of(delta, shorter)
        want = torch.autograd.grad(loss_of(delta, shorter), leaves)
        for ours, eager in zip(torch.autograd.grad(compiled(delta, shorter), leaves), want):
            torch.testing.assert_close(ours, eager)


@pytest.mark.gpu
@needs_triton
@needs_gpu
@deltas
@dtypes
def test_compiles_and_replays_on_the_gpu(dtype: torch.dtype, delta: bool) -> None:
    inputs = make_inputs(130, (64, 64), "random", dtype, "cuda")
    check_compiles_whole(delta, inputs)
    leaves = leaves_of(delta, inputs)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(delta, inputs), leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))


@pytest.mark.gpu
@needs_triton
@needs_gpu
@dtypes
@pytest.mark.parametrize("kind", ["gated_linear_attention", "kimi_delta_attention"])
def test_a_mixer_learns_the_same_by_it_on_the_gpu(kind: str, dtype: torch.dtype) -> None:
    """As it is trained, under autocast for bfloat16: output, state and gradients as by the plain form."""
    from dtr.arch import HeadGeometry
    from dtr.mixers import make_mixer
    from dtr.mixers.base import set_backend
    from dtr.ops.dispatch import chosen_backend

    geometry = HeadGeometry(hidden_dim=128, num_heads=2, num_kv_heads=1, head_dim=64)
    torch.manual_seed(0)
    mixer = make_mixer(kind, geometry, 0).cuda()
    for weight in mixer.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    hidden, heads = torch.randn(2, 80, 128, device="cuda"), torch.randn(3, 2, 80, 2, 64, device="cuda")
    q, k = torch.nn.functional.normalize(heads[:2], dim=-1).to(dtype).unbind(0)
    mask = (torch.arange(80, device="cuda") < torch.tensor([[80], [66]], device="cuda")).unsqueeze(-1).float()
    learned = [weight for name, weight in mixer.named_parameters() if name.startswith(("decay_", "write_"))]
    results = []
    for name in ("triton", "torch"):
        set_backend(mixer, name)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            o, last = mixer.recur(hidden, q, k, heads[2].to(dtype), mask, None)
        grads = torch.autograd.grad(o.float().square().sum() + last.square().sum(), learned)
        results.append([o.detach(), last.detach(), *grads])
        assert chosen_backend(mixer.operation, mixer.backend, "cuda", 64, dtype) == name
    errors = {str(i): float((a - b).float().norm() / b.float().norm()) for i, (a, b) in enumerate(zip(*results))}
    assert_within(errors, 3e-2 if dtype == torch.bfloat16 else 2e-4)


@needs_triton
@pytest.mark.timeout(240)
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def run_interpreted() -> None:
    """float32 only, as in `test_ops_triton.py`."""
    from dtr.errors import DeviceError
    from dtr.ops.gpu import channel_decay_triton

    accept_numpy_2_4()
    for delta in (DELTA, PLAIN):
        for length, dims, kind in (
            (1, (16, 32), "random"),
            (33, (32, 16), "equal keys"),
            (70, (16, 16), "strong decay"),
            (64, (16, 16), "strongest decay"),
            (70, (16, 16), "below the bound"),
        ):
            inputs = make_inputs(length, dims, kind, torch.float32, "cpu")
            # Of a channel with the strongest decay the sums of g lose a digit.
            assert_within(relative_errors(inputs, delta=delta), 2e-6 if kind != "strongest decay" else 1e-5)
        assert_within(relative_errors(inputs, delta=delta, carried=False), 2e-6)
        check_compiles_whole(delta, inputs)
        # Several blocks of keys and values for each chunk.
        inputs = make_inputs(40, (64, 32), "slow", torch.float32, "cpu")
        assert_within(relative_errors(inputs, delta=delta), 2e-6)

    q, k, v, g, beta, _ = make_inputs(5, (16, 16), "random", torch.float32, "cpu")
    for narrow in (q[..., :12], q.double()):
        with pytest.raises(DeviceError, match=r"channel_decay_triton.*K and V in \(16, 32, 64, 128\)"):
            channel_decay_triton.chunked(narrow, k, v, g, beta)


if __name__ == "__main__":
    run_interpreted()
