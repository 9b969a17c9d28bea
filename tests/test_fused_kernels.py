"""Rotated quadratic features and the short convolution in Triton against their plain forms in float64.

On a GPU the kernels run for real. Elsewhere `test_in_the_interpreter` runs this file as a program, in its own process
because Triton decides at import time whether it interprets.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from docs_pages import ROOT, load_script
from torch import Tensor
from triton_runs import accept_numpy_2_4, needs_gpu, needs_triton, run_in_the_interpreter

from dtr.ops.quadratic_features import mix_of_heads
from dtr.ops.rotary import rotate_to_unit_length
from dtr.ops.short_convolution import short_convolution

STEP_SIZE = 8.0
# float32 on a GPU: products of three tf32 parts.
BOUND = {torch.bfloat16: 1e-2, torch.float32: 5e-5 if torch.cuda.is_available() else 1e-5}


def plain_features(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As dispatched without kernels, though in the type of x: the features by themselves round to float32."""
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    features = x * inverse * (1 + inverse * mix_of_heads(x, weight, step_size=STEP_SIZE))
    return rotate_to_unit_length(features, cos, sin)


def plain_convolution(x: Tensor, taps: Tensor) -> Tensor:
    return short_convolution(x, taps, None, None)[0]


def make_features(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, *, tables: int = 1, strided: bool = True
) -> list[Tensor]:
    """x, weight, cos and sin; x is the middle one of three parts of the rows of something wider, unless told not."""
    B, T, H, K = shape
    generator = torch.Generator().manual_seed(T + K)
    wide = torch.randn(B, T + 2, 3 * H * K, generator=generator)
    weight = 0.3 / STEP_SIZE * torch.randn(H, K, K, generator=generator) / K**0.5
    angles = 6.3 * torch.rand(tables, T, K // 2, generator=generator).repeat(1, 1, 2)
    # Scaled, as some families have them for long texts.
    cos, sin = (1.1 * x.to(device, dtype) for x in (angles.cos(), angles.sin()))
    x = wide.to(device, dtype)[:, 1:-1].chunk(3, dim=-1)[1].view(shape)
    return [x if strided else x.contiguous(), weight.to(device), cos, sin]


def make_convolution(shape: tuple[int, int, int], num_taps: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, as the last third of wider rows, and taps."""
    generator = torch.Generator().manual_seed(shape[1])
    B, T, C = shape
    x = torch.randn(B, T, 3 * C, generator=generator).to(device, dtype).chunk(3, dim=-1)[2]
    return [x, torch.randn(C, num_taps, generator=generator).to(device)]


def relative_errors(ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]) -> list[float]:
    """||ours - float64|| / ||float64|| of the output and the gradients of the first two inputs."""
    generator = torch.Generator().manual_seed(0)
    d_out = torch.randn(inputs[0].shape, generator=generator).to(inputs[0])
    results = []
    for function, dtype in ((ours, None), (plain, torch.float64)):
        # Not cloned where the type stays, which would make rows contiguous.
        leaves = [x.detach() if dtype is None else x.detach().to(dtype) for x in inputs]
        out = function(*(x.requires_grad_(i < 2) for i, x in enumerate(leaves)))
        results.append([out, *torch.autograd.grad(out, leaves[:2], d_out.to(out.dtype))])
        if dtype is None:
            assert [x.dtype for x in results[0]] == [inputs[0].dtype, inputs[0].dtype, inputs[1].dtype]
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(*(map(torch.Tensor.detach, r) for r in results))]


def check_features(inputs: list[Tensor], bound: float) -> None:
    errors = relative_errors(fused_features, plain_features, inputs)
    assert max(errors) <= bound, errors


def check_convolution(inputs: list[Tensor], bound: float) -> None:
    from dtr.ops.gpu.convolution_triton import convolution

    errors = relative_errors(convolution, plain_convolution, inputs)
    assert max(errors) <= bound, errors


def fused_features(*inputs: Tensor) -> Tensor:
    from dtr.ops.gpu.quadratic_triton import rotated_features

    return rotated_features(*inputs, step_size=STEP_SIZE)


def check_padding(dtype: torch.dtype, device: str, head_dim: int) -> None:
    """Heads of zeros give zeros, and their gradients are numbers."""
    x, *rest = make_features((1, 70, 2, head_dim), dtype, device)
    x = x.clone()
    x[:, 40:] = 0
    x.requires_grad_()
    rest[0].requires_grad_()
    out = fused_features(x, *rest)
    assert out[:, 40:].abs().max() == 0
    out.float().sum().backward()
    assert all(y.grad.isfinite().all() for y in (x, rest[0]))


def check_repeated(ours: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Bit for bit the same a second time."""
    runs = []
    for _ in range(2):
        leaves = [x.detach().requires_grad_() for x in inputs[:2]]
        out = ours(*leaves, *inputs[2:])
        runs.append([out, *torch.autograd.grad(out, leaves, inputs[0].detach())])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def check_compiles_whole(ours: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """In one graph, with the strided view made inside it."""
    x, weight, *rest = [y.detach() for y in inputs]
    wide = torch.cat([x, x], dim=1).requires_grad_()
    weight.requires_grad_()

    def loss(wide: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        return (2 * ours((3 * wide)[:, : x.shape[1]], weight, *rest)).float().square().mul(x.float()).sum()

    backend = "inductor" if x.device.type == "cuda" else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=False)
    got, want = (torch.autograd.grad(f(wide, weight, *rest), (wide, weight)) for f in (compiled, loss))
    for a, b in zip(got, want):
        assert float((a - b).norm() / b.norm()) < BOUND[x.dtype]


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("length", [1, 7, 64, 130, 700])
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.bfloat16, 64), (torch.float32, 16), (torch.float32, 32), (torch.float32, 64)],
)
def test_features_on_the_gpu(dtype: torch.dtype, dim: int, length: int, tables: int) -> None:
    for strided in (True, False):
        inputs = make_features((3, length, 5, dim), dtype, "cuda", tables=tables, strided=strided)
        check_features(inputs, BOUND[dtype])
    check_padding(dtype, "cuda", dim)


@pytest.mark.gpu
@needs_triton
@needs_gpu
def test_many_tokens_on_the_gpu() -> None:
    """Several blocks for each program; cosines and sines in float32 too."""
    inputs = make_features((16, 512, 27, 64), torch.bfloat16, "cuda")
    check_features(inputs, BOUND[torch.bfloat16])
    check_features([*inputs[:2], *(x.float() for x in inputs[2:])], BOUND[torch.bfloat16])
    check_repeated(fused_features, inputs)


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("num_taps", [1, 3, 4, 8])
@pytest.mark.parametrize("shape", [(3, 2, 72), (2, 130, 320), (16, 512, 1728)], ids=str)
def test_convolution_on_the_gpu(shape: tuple[int, int, int], num_taps: int, dtype: torch.dtype) -> None:
    from dtr.ops.gpu.convolution_triton import convolution

    inputs = make_convolution(shape, num_taps, dtype, "cuda")
    check_convolution(inputs, BOUND[dtype])
    check_repeated(convolution, inputs)


@pytest.mark.gpu
@needs_triton
@needs_gpu
def test_fused_parts_compile_and_replay_on_the_gpu() -> None:
    from dtr.ops.gpu.convolution_triton import convolution

    cases: list[tuple[Any, list[Tensor]]] = [
        (fused_features, make_features((2, 130, 3, 64), torch.bfloat16, "cuda")),
        (convolution, make_convolution((2, 130, 192), 4, torch.bfloat16, "cuda")),
    ]
    for ours, inputs in cases:
        check_compiles_whole(ours, inputs)
        leaves = [x.detach().requires_grad_() for x in inputs[:2]]

        def step() -> tuple[Tensor, ...]:
            return torch.autograd.grad(ours(*leaves, *inputs[2:]).float().pow(3).sum(), leaves)  # noqa: B023

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


def test_the_benchmark_times_the_plain_forms_and_finds_the_kernels(monkeypatch, capsys) -> None:
    script = load_script(ROOT / "benchmarks" / "quadratic_features.py")
    arguments = ["--device", "cpu", "--sizes", "1x40x2", "--dim", "16", "--dtype", "float32", "--forms", "plain"]
    monkeypatch.setattr(sys, "argv", ["quadratic_features.py", *arguments])
    script.main()
    _, *lines = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["operator"] for line in lines] == list(script.OPERATORS)
    assert all(line["worst_error"] < 1e-5 and line["forward_backward_ms"] > 0 for line in lines)
    # Kernels are opened by name, without Triton never.
    assert all(importlib.util.find_spec(module) for module in script.MODULES.values())


@needs_triton
@pytest.mark.timeout(240)
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def run_interpreted() -> None:
    """float32 only, as in `test_ops_triton.py`."""
    from dtr.errors import DeviceError
    from dtr.ops.gpu import convolution_triton, quadratic_triton

    accept_numpy_2_4()
    for shape, tables, strided in (
        ((2, 1, 3, 16), 2, True),
        ((3, 50, 2, 16), 1, True),
        ((2, 130, 2, 32), 2, True),
        ((1, 65, 1, 64), 1, False),
    ):
        inputs = make_features(shape, torch.float32, "cpu", tables=tables, strided=strided)
        assert inputs[0].is_contiguous() != strided
        check_features(inputs, BOUND[torch.float32])
    # What is not laid out row by row is copied.
    x, weight, cos, sin = make_features((2, 70, 2, 16), torch.float32, "cpu", tables=2)
    turned = x.transpose(1, 3).contiguous().transpose(1, 3)
    swapped = sin.transpose(0, 1).contiguous().transpose(0, 1)
    check_features([turned, weight.mT.contiguous().mT, cos, swapped], BOUND[torch.float32])
    check_padding(torch.float32, "cpu", 16)
    # Several blocks for each program.
    quadratic_triton.cut = quadratic_triton.Cut(forward_programs=2, backward_programs=4)
    inputs = make_features((3, 130, 2, 16), torch.float32, "cpu", tables=3)
    check_features(inputs, BOUND[torch.float32])
    check_repeated(fused_features, inputs)
    check_compiles_whole(fused_features, inputs)
    assert quadratic_triton.supports(inputs[0])
    assert not quadratic_triton.supports(inputs[0].bfloat16())
    with pytest.raises(DeviceError, match=r"K=12, .*heads of bfloat16 \(64,\); float32"):
        fused_features(inputs[0][..., :12], *inputs[1:])

    for sizes, num_taps in (((2, 1, 5), 4), ((3, 50, 72), 3), ((2, 40, 130), 4), ((1, 20, 16), 1)):
        check_convolution(make_convolution(sizes, num_taps, torch.float32, "cpu"), BOUND[torch.float32])
    convolution_triton.cut = convolution_triton.Cut(backward_programs=3)
    pair = make_convolution((2, 70, 72), 4, torch.float32, "cpu")
    check_convolution(pair, BOUND[torch.float32])
    check_repeated(convolution_triton.convolution, pair)
    check_compiles_whole(convolution_triton.convolution, pair)
    with pytest.raises(DeviceError, match="float64"):
        convolution_triton.convolution(pair[0].double(), pair[1])


if __name__ == "__main__":
    run_interpreted()
