"""The Triton gated delta rule against a float64 loop: output, final state and every gradient.

On a GPU the kernels run for real. Elsewhere `test_in_the_interpreter` runs this file as a program, in its own process
because Triton decides at import time whether it interprets.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_runs import accept_numpy_2_4, needs_gpu, needs_triton, run_in_the_interpreter

GPU_LENGTHS = (1, 7, 64, 65, 130, 512)
NAMES = ("o", "final state", "dq", "dk", "dv", "dg", "dbeta", "dstate")


def naive(inputs: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Token by token: decay, write the prediction error, read. (B, T, H, dim) in, output and final state out."""
    q, k, v, g, beta, state = inputs
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", beta[:, t, :, None] * k[:, t], error)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def make_inputs(length: int, dims: tuple[int, int], keys: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v, g, beta, initial state; "correlated" keys differ by 5 % with beta near 1 and almost no decay."""
    generator = torch.Generator().manual_seed(length)
    shape, (key_dim, value_dim) = (2, length, 3), dims

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    q, k, v = randn(*shape, key_dim), randn(*shape, key_dim), randn(*shape, value_dim)
    g, beta = -torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    if keys == "correlated":
        k = randn(2, 1, 3, key_dim) + 0.05 * k
        g, beta = 0.01 * g, 1 - 0.02 * beta
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    state = 0.3 * randn(2, 3, key_dim, value_dim)
    return [x.to(device, dtype) for x in (q, k, v)] + [x.to(device, torch.float32) for x in (g, beta, state)]


def relative_errors(inputs: list[Tensor], *, carried: bool = True) -> dict[str, float]:
    """||ours - float64|| / ||float64|| for each result; without `carried` no state comes in and none is graded."""
    from dtr.ops.gpu.gated_delta_triton import chunked

    q, v = inputs[0], inputs[2]
    scale = 0.7 * q.shape[-1] ** -0.5
    do, dfinal = torch.randn_like(v), torch.randn_like(inputs[5])
    exact = [x.double().requires_grad_() for x in inputs]
    ours = [x.clone().requires_grad_() for x in inputs]
    if carried:
        o, final = chunked(*ours[:5], scale=scale, state_BHKV=ours[5])
        o_exact, final_exact = naive(exact, scale)
        grads = torch.autograd.grad((o, final), ours, (do, dfinal))
        grads_exact = torch.autograd.grad((o_exact, final_exact), exact, (do.double(), dfinal.double()))
    else:
        o, final = chunked(*ours[:5], scale=scale)
        o_exact, final_exact = naive([*exact[:5], torch.zeros_like(exact[5])], scale)
        grads = torch.autograd.grad(o, ours[:5], do)
        grads_exact = torch.autograd.grad(o_exact, exact[:5], do.double())
    assert o.dtype == v.dtype
    assert final.dtype == torch.float32
    assert all(gradient.dtype == x.dtype for gradient, x in zip(grads, ours))
    pairs = zip(NAMES, (o, final, *grads), (o_exact, final_exact, *grads_exact))
    return {name: float((ours - exact).detach().norm() / exact.detach().norm()) for name, ours, exact in pairs}


def assert_within(errors: dict[str, float], bound: float) -> None:
    assert all(error <= bound for error in errors.values()), f"above {bound}: {errors}"


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("keys", ["random", "correlated"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", GPU_LENGTHS)
def test_matches_float64_on_the_gpu(length: int, dim: int, keys: str, dtype: torch.dtype) -> None:
    errors = relative_errors(make_inputs(length, (dim, dim), keys, dtype, "cuda"))
    # With correlated keys a bf16 result is an alternating sum of up to 64 rounded terms, see gated_delta_triton.
    bf16_bound = 5e-2 if keys == "correlated" else 1e-2
    assert_within(errors, bf16_bound if dtype == torch.bfloat16 else 2e-4)


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("dims", [(16, 16), (32, 128), (128, 32), (64, 16)])
def test_unequal_dims_without_a_carried_state_on_the_gpu(dims: tuple[int, int]) -> None:
    inputs = make_inputs(130, dims, "random", torch.bfloat16, "cuda")
    assert_within(relative_errors(inputs, carried=False), 1e-2)


@pytest.mark.gpu
@needs_triton
@needs_gpu
def test_many_sequences_on_the_gpu() -> None:
    """Enough sequences for the widest value block, whose kernels the small cases never reach."""
    inputs = make_inputs(130, (64, 64), "random", torch.bfloat16, "cuda")
    for copies in (16, 64):
        assert_within(relative_errors([x.repeat(copies, *[1] * (x.ndim - 1)) for x in inputs]), 1e-2)


@pytest.mark.gpu
@needs_triton
@needs_gpu
def test_cuda_graph_replays_forward_and_backward() -> None:
    from dtr.ops.gpu.gated_delta_triton import chunked

    inputs = [x.requires_grad_() for x in make_inputs(130, (64, 64), "random", torch.bfloat16, "cuda")]

    def step() -> tuple[Tensor, ...]:
        o, final = chunked(*inputs[:5], state_BHKV=inputs[5])
        return o, *torch.autograd.grad(o.float().square().sum() + final.square().sum(), inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, expected):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@needs_triton
@needs_gpu
def test_compiles_without_a_graph_break() -> None:
    assert_compiles_whole("cuda")


def assert_compiles_whole(device: str) -> None:
    from dtr.ops.gpu.gated_delta_triton import chunked

    inputs = [x.requires_grad_() for x in make_inputs(65, (16, 16), "random", torch.float32, device)]

    def loss(*tensors: Tensor) -> Tensor:
        o, final = chunked(*tensors[:5], state_BHKV=tensors[5])
        return o.square().sum() + final.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    want = torch.autograd.grad(loss(*inputs), inputs)
    for ours, eager in zip(torch.autograd.grad(compiled(*inputs), inputs), want):
        torch.testing.assert_close(ours, eager)


@needs_triton
@pytest.mark.timeout(240)
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def run_interpreted() -> None:
    """float32 only: the interpreter of Triton 3.6 multiplies the bits of bfloat16 numbers as if they were integers."""
    from dtr.errors import DeviceError
    from dtr.ops.gpu.gated_delta_triton import chunked, supports

    accept_numpy_2_4()
    for length, dims, keys in ((1, (16, 32), "random"), (65, (32, 16), "correlated"), (130, (16, 16), "random")):
        inputs = make_inputs(length, dims, keys, torch.float32, "cpu")
        assert_within(relative_errors(inputs), 1e-5)
    assert_within(relative_errors(inputs, carried=False), 1e-5)
    assert_within(relative_errors(make_inputs(7, (128, 64), "correlated", torch.float32, "cpu")), 1e-5)
    assert_compiles_whole("cpu")

    q, v = inputs[0], inputs[2]
    assert supports(q, v)
    assert not supports(q.double(), v.double())
    assert not supports(q[..., :12], v)
    with pytest.raises(DeviceError, match="K=12, V=16"):
        chunked(q[..., :12], q[..., :12], *inputs[2:5])


if __name__ == "__main__":
    run_interpreted()
