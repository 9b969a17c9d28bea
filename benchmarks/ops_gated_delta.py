"""Time the gated delta rule in each backend, forward and forward plus backward, next to causal softmax attention.

Prints one JSON line per result. A backend is compared with a float64 loop first, output, final state and all gradients,
and is not timed when an error is above the bound. Cold start is the first forward plus backward of the process
in that backend and type (compilation and tuning included); times are medians over runs with a cleared L2 cache.

    python benchmarks/ops_gated_delta.py
    python benchmarks/ops_gated_delta.py --device cpu --sizes 1x64 --heads 2 --backends eager,sdpa
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("sdpa", "eager", "compiled", "triton", "fla")
# bfloat16 keeps 8 bits: intermediates rounded to it give some 4e-3; an operator that is wrong is off by far more.
ERROR_BOUND = {torch.bfloat16: 1.5e-2, torch.float32: 2e-3}
Operator = Callable[..., tuple[Tensor, Tensor]]


def load(backend: str) -> Operator:
    """The backend as f(q, k, v, g, beta, *, state_BHKV) -> (o, final state). ImportError where it is missing."""
    if backend == "triton":
        from dtr.ops.gpu.gated_delta_triton import chunked as triton_chunked

        return triton_chunked
    if backend == "fla":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        def fla_chunked(*tensors: Tensor, state_BHKV: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return chunk_gated_delta_rule(*tensors, initial_state=state_BHKV, output_final_state=True)

        return fla_chunked
    from dtr.ops.gated_delta import chunked

    return torch.compile(chunked, dynamic=False) if backend == "compiled" else chunked


def make_inputs(batch: int, num_tokens: int, args: argparse.Namespace, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v (B, T, H, dim) with unit q and k, g and beta (B, T, H) in float32."""
    generator = torch.Generator(args.device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=args.device)
    shape = (batch, num_tokens, args.heads)
    q, k = (F.normalize(draw(*shape, args.dim), dim=-1) for _ in range(2))
    g, beta = -0.1 * draw(shape).abs(), draw(shape).sigmoid()
    return [x.to(dtype) for x in (q, k, draw(*shape, args.dim))] + [g, beta]


def naive(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence token by token."""
    outputs, state = [], state_BHKV
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", beta[:, t, :, None] * k[:, t], error)
        outputs.append(q.shape[-1] ** -0.5 * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def relative_errors(operator: Operator, args: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    """||result - float64|| / ||float64|| of output, final state and gradients, 2 x 150 tokens with a carried state."""
    inputs = make_inputs(2, 150, args, dtype)
    state = 0.3 * torch.randn(2, args.heads, args.dim, args.dim, device=args.device)
    weights = torch.randn_like(inputs[2]), torch.randn_like(state)
    results = []
    for function, to in ((operator, lambda x: x.clone()), (naive, lambda x: x.double())):
        leaves = [to(x).requires_grad_() for x in (*inputs, state)]
        outputs = function(*leaves[:5], state_BHKV=leaves[5])
        grads = torch.autograd.grad(outputs, leaves, [w.to(x.dtype) for w, x in zip(weights, outputs)])
        results.append([x.detach().double() for x in (*outputs, *grads)])
    names = ("o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dstate")
    return {name: float((a - b).norm() / b.norm()) for name, a, b in zip(names, *results)}


def median_ms(function: Callable[[], Any], args: argparse.Namespace) -> float:
    """Median run time. On the CPU a plain clock over three runs: only there to see that the program works."""
    if args.device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=50, rep=args.rep_ms, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(function: Callable[..., Tensor], inputs: list[Tensor], args: argparse.Namespace) -> dict[str, float]:
    """Forward without autograd, and forward plus backward, in milliseconds; peak memory of the latter on CUDA."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    weight = torch.randn_like(function(*inputs))

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    def both() -> None:
        torch.autograd.grad(function(*leaves), leaves, weight)

    result = {"forward_ms": median_ms(forward, args), "forward_backward_ms": median_ms(both, args)}
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        result["peak_extra_bytes"] = torch.cuda.max_memory_allocated() - before
    return {name: round(value, 4) for name, value in result.items()}


def cold_start_seconds(operator: Operator, args: argparse.Namespace, dtype: torch.dtype) -> float:
    """Seconds for the very first forward plus backward at the first size that is timed."""
    batch, num_tokens = args.sizes[0]
    leaves = [x.requires_grad_() for x in make_inputs(batch, num_tokens, args, dtype)]
    start = time.perf_counter()
    torch.autograd.grad(operator(*leaves)[0].sum(), leaves)
    if args.device == "cuda":
        torch.cuda.synchronize()
    return round(time.perf_counter() - start, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def run(backend: str, args: argparse.Namespace, dtype: torch.dtype) -> None:
    """All lines of one backend; says why where there is nothing to time."""
    line: dict[str, Any] = {"backend": backend, "dtype": args.dtype, "heads": args.heads, "dim": args.dim}
    if backend == "sdpa":
        function, num_inputs = causal_attention, 3
    else:
        try:
            operator = load(backend)
            line["cold_start_seconds"] = cold_start_seconds(operator, args, dtype)
            errors = relative_errors(operator, args, dtype)
        # A backend that is missing or refuses this GPU is a result, not a failure of the comparison.
        except Exception as error:
            print(json.dumps(line | {"failed": f"{type(error).__name__}: {error}"[:300]}), flush=True)
            return
        line["worst_error"] = max(errors.values())
        if not all(error <= ERROR_BOUND[dtype] for error in errors.values()):
            print(json.dumps(line | {"failed": "wrong results, not timed", "errors": errors}), flush=True)
            return
        function, num_inputs = (lambda *tensors: operator(*tensors)[0]), 5
    for batch, num_tokens in args.sizes:
        inputs = make_inputs(batch, num_tokens, args, dtype)[:num_inputs]
        try:
            result: dict[str, Any] = measure(function, inputs, args)
        except torch.OutOfMemoryError:
            result = {"failed": "out of memory"}
        print(json.dumps(line | {"batch": batch, "tokens": num_tokens} | result), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="32x512,8x2048,1x16384", help="batch x tokens, comma separated")
    parser.add_argument("--backends", default=",".join(BACKENDS), help=f"of {', '.join(BACKENDS)}")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--dim", type=int, default=64, help="of keys and of values")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rep-ms", type=int, default=200, help="time spent on each measurement (milliseconds)")
    args = parser.parse_args()
    args.sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
    args.backends = args.backends.split(",")
    if unknown := set(args.backends) - set(BACKENDS):
        parser.error(f"unknown backends {sorted(unknown)}; known: {', '.join(BACKENDS)}")
    return args


def main() -> None:
    args = parse()
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(json.dumps({"device": device, "torch": torch.__version__}), flush=True)
    for backend in args.backends:
        run(backend, args, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
