"""Time quadratic features with rotation and unit length, and the short convolution: plain, compiled, and our kernels.

Prints one JSON line per result. Each form is compared with float64 first, output and all gradients, and is not timed
when an error is above the bound. A form that cannot run here is skipped, and its line says why. Inputs are as in a
layer: features read a slice of a convolution's output, and the convolution takes queries, keys and values. A time is
the median of forward plus backward; `gb_per_s` counts what the kernels must read and write once.

    python benchmarks/quadratic_features.py
    python benchmarks/quadratic_features.py --cuts features:backward_warps=8 --cuts convolution:tokens=64
    python benchmarks/quadratic_features.py --device cpu --sizes 1x40x2 --dtype float32 --forms plain,compiled,fused
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtr.mixers.quadratic import STEP_SIZE
from dtr.ops.quadratic_features import mix_of_heads, quadratic_features
from dtr.ops.rotary import rotate_to_unit_length
from dtr.ops.short_convolution import short_convolution

FORMS = ("plain", "compiled", "fused")
MODULES = {"features": "dtr.ops.gpu.quadratic_triton", "convolution": "dtr.ops.gpu.convolution_triton"}
OPERATORS = tuple(MODULES)
ERROR_BOUND = {torch.bfloat16: 2e-2, torch.float32: 2e-4}
NUM_TAPS = 4


def plain_features(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return rotate_to_unit_length(
            x * inverse * (1 + inverse * mix_of_heads(x, weight, step_size=STEP_SIZE)), cos, sin
        )
    features = quadratic_features(x, mix_of_heads(x, weight, step_size=STEP_SIZE))
    return rotate_to_unit_length(features, cos, sin).to(x.dtype)


def plain_convolution(x: Tensor, taps: Tensor) -> Tensor:
    return short_convolution(x, taps, None, None)[0].to(x.dtype)


def load(operator: str, form: str) -> Callable[..., Tensor]:
    """The form as a function of `make_inputs`. ImportError where it is missing."""
    plain = {"features": plain_features, "convolution": plain_convolution}[operator]
    if form == "plain":
        return plain
    if form == "compiled":
        return torch.compile(plain, dynamic=False)
    if operator == "features":
        from dtr.ops.gpu.quadratic_triton import rotated_features

        return lambda *inputs: rotated_features(*inputs, step_size=STEP_SIZE)
    from dtr.ops.gpu.convolution_triton import convolution

    return convolution


def make_inputs(operator: str, size: tuple[int, ...], args: argparse.Namespace) -> list[Tensor]:
    """What the operator takes; gradients are those of the first two."""
    (B, T, H), K = size, args.dim
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    wide = torch.randn(B, T, 3 * H * K, generator=generator).to(args.device, dtype)
    if operator == "convolution":
        return [wide, torch.randn(3 * H * K, NUM_TAPS, generator=generator).to(args.device)]
    weight = 0.3 / STEP_SIZE / K**0.5 * torch.randn(H, K, K, generator=generator)
    frequencies = 10_000.0 ** (-torch.arange(K // 2) / (K // 2))
    angles = (torch.arange(T)[:, None] * frequencies).repeat(1, 2)[None]
    cos, sin = (x.to(args.device, dtype) for x in (angles.cos(), angles.sin()))
    return [wide.chunk(3, dim=-1)[1].view(B, T, H, K), weight.to(args.device), cos, sin]


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:2]]
    out = function(*leaves, *inputs[2:])
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


def relative_errors(operator: str, function: Callable[..., Tensor], args: argparse.Namespace) -> dict[str, float]:
    """||result - float64|| / ||float64|| of output and gradients, at 2 x 150 tokens."""
    inputs = make_inputs(operator, (2, 150, args.sizes[0][2]), args)
    d_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    plain = {"features": plain_features, "convolution": plain_convolution}[operator]
    ours = gradients(function, inputs, d_out)
    exact = gradients(plain, [x.double() for x in inputs], d_out)
    names = ("out", "d_input", "d_weight")
    return {name: float((a.double() - b).norm() / b.norm()) for name, a, b in zip(names, ours, exact)}


def median_ms(function: Callable[[], Any], args: argparse.Namespace) -> float:
    """Median run time, replayed as a CUDA graph, as in training: launching takes longer than these kernels. On the CPU
    a plain clock over three runs: only there to see that the program works."""
    if args.device == "cuda":
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(function, rep=args.rep_ms, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(function: Callable[..., Tensor], inputs: list[Tensor], args: argparse.Namespace) -> dict[str, float]:
    leaves = [x.detach().requires_grad_() for x in inputs[:2]]
    d_out = torch.randn_like(inputs[0], memory_format=torch.contiguous_format)

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    def both() -> None:
        torch.autograd.grad(function(*leaves, *inputs[2:]), leaves, d_out)

    times = {"forward_ms": median_ms(forward, args), "forward_backward_ms": median_ms(both, args)}
    # Input and output of the forward pass, two inputs and one output of the backward pass.
    moved = 5 * d_out.numel() * d_out.element_size()
    times["gb_per_s"] = moved / times["forward_backward_ms"] / 1e6
    return {name: round(value, 4) for name, value in times.items()}


def run(operator: str, form: str, args: argparse.Namespace) -> None:
    """All lines of one form; says why where there is nothing to time."""
    line: dict[str, Any] = {"operator": operator, "form": form, "dtype": args.dtype, "dim": args.dim}
    try:
        function = load(operator, form)
        errors = relative_errors(operator, function, args)
    # A form that is missing or refuses this machine is a result, not a failure of the comparison.
    except Exception as error:
        print(json.dumps(line | {"skipped": f"{type(error).__name__}: {error}"[:300]}), flush=True)
        return
    line["worst_error"] = max(errors.values())
    if not all(error <= ERROR_BOUND[getattr(torch, args.dtype)] for error in errors.values()):
        print(json.dumps(line | {"failed": "wrong results, not timed", "errors": errors}), flush=True)
        return
    cuts = [{}, *args.cuts[operator]] if form == "fused" else [{}]
    for size in args.sizes:
        inputs = make_inputs(operator, size, args)
        where = dict(zip(("batch", "tokens", "heads"), size))
        for cut in cuts:
            if form == "fused":
                set_cut(operator, cut)
            named = {"cut": cut} if cut else {}
            try:
                result: dict[str, Any] = measure(function, inputs, args)
            # A cut may ask for more registers or shared memory than there are.
            except Exception as error:
                result = {"failed": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps(line | where | named | result), flush=True)


def set_cut(operator: str, cut: dict[str, int]) -> None:
    module = importlib.import_module(MODULES[operator])
    module.cut = dataclasses.replace(module.Cut(), **cut)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="8x512x18,16x512x27,16x512x36", help="batch x tokens x heads")
    parser.add_argument("--forms", default=",".join(FORMS), help=f"of {', '.join(FORMS)}")
    parser.add_argument("--operators", default=",".join(OPERATORS), help=f"of {', '.join(OPERATORS)}")
    parser.add_argument("--cuts", action="append", help="OPERATOR:name=number,...: also time its kernels cut so")
    parser.add_argument("--dim", type=int, default=64, help="of heads")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rep-ms", type=int, default=100, help="time spent on each measurement (milliseconds)")
    args = parser.parse_args()
    args.sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
    args.forms, args.operators = args.forms.split(","), args.operators.split(",")
    for given, known in ((args.forms, FORMS), (args.operators, OPERATORS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown {sorted(unknown)}; known: {', '.join(known)}")
    cuts: dict[str, list[dict[str, int]]] = {operator: [] for operator in OPERATORS}
    for operator, names in (cut.split(":") for cut in args.cuts or []):
        pairs = (pair.split("=") for pair in names.split(","))
        cuts[operator].append({name: int(number) for name, number in pairs})
    args.cuts = cuts
    return args


def main() -> None:
    args = parse()
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(json.dumps({"device": device, "torch": torch.__version__}), flush=True)
    for operator in args.operators:
        for form in args.forms:
            run(operator, form, args)


if __name__ == "__main__":
    main()
