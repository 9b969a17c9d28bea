"""Distillation against the teacher's bare forward pass, in one process, on one device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dtr.arch import decoder_layers
from dtr.distillation.replay import WARMUP_STEPS
from dtr.distillation.students import Students
from dtr.errors import DeviceError, RecipeError
from dtr.mixers import mixer_from_teacher
from dtr.ops import gated_delta
from dtr.ops.dispatch import gated_delta_rule
from dtr.teacher import Teacher

MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Largest relative error of output and gradients that a backend may have and still be timed."""


def bench_distill(
    teacher: Teacher,
    *,
    sizes: list[tuple[int, int]],
    mixer: str = "gated_deltanet",
    num_steps: int = 10,
    fast: bool | None = None,
) -> Iterator[dict[str, Any]]:
    """Time whole training steps of all layers and the teacher's body (no LM head), medians in one process.

    The text is random tokens, on which speed does not depend.

    Args:
        teacher: from `load_teacher`.
        sizes: (sequences, tokens each) of a step.
        mixer: kind of mixer.
        num_steps: timed steps per size.
        fast: compile the students and replay the step as a CUDA graph; by default on a GPU.

    Yields:
        one dict per size: tokens per second of both, their ratio, cold start in seconds (until the step is compiled
        and recorded), achieved FLOP/s over those of a large matrix product, and peak memory beyond model, students and
        optimizer.

    Raises:
        DeviceError: the backend's results are wrong on this machine.
    """
    check_backend(teacher.device, teacher.dtype)
    fast = teacher.device.type == "cuda" if fast is None else fast
    ceiling = matmul_flops_per_second(teacher.device, teacher.dtype)
    for batch, tokens in sizes:
        yield _measure(teacher, mixer, batch, tokens, num_steps, fast, ceiling)


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """`32x512,8x2048` to [(32, 512), (8, 2048)]."""
    try:
        sizes = [tuple(int(n) for n in part.split("x")) for part in text.split(",")]
        if any(len(size) != 2 or min(size) < 1 for size in sizes):
            raise ValueError
    except ValueError:
        raise RecipeError("--sizes", got=f"'{text}'", expected="sequences x tokens, as 32x512,8x2048") from None
    return sizes  # type: ignore[return-value]


def check_backend(device: torch.device, dtype: torch.dtype) -> float:
    """Compare the chosen backend with the token-by-token form in float64; returns the worst relative error.

    Raises:
        DeviceError: it is off by more than `MAX_ERROR`.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, 130, 3, 64)
    # Strongly correlated keys, on which an unstable inverse shows.
    common = torch.randn(2, 1, 3, 64, generator=generator)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    k = torch.nn.functional.normalize(common + 0.3 * k, dim=-1)
    q = torch.nn.functional.normalize(q, dim=-1)
    g = -0.1 * torch.rand(shape[:3], generator=generator)
    beta = torch.rand(shape[:3], generator=generator)

    def run(op: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        out, _ = op(*inputs, scale=1.0)
        return [out.detach(), *torch.autograd.grad(out.double().square().sum(), inputs)]

    cast = [x.to(device, dtype) for x in (q, k, v)] + [x.to(device) for x in (g, beta)]
    ours = run(gated_delta_rule, cast)
    exact = run(gated_delta.naive, [x.double().cpu() for x in cast])
    worst = max(((a.double().cpu() - b).norm() / b.norm()).item() for a, b in zip(ours, exact))
    if not worst <= MAX_ERROR.get(dtype, MAX_ERROR[torch.float32]):
        raise DeviceError(
            "runtime.backend",
            got=f"a relative error of {worst:.2g}",
            expected="a backend whose results are right on this machine",
            hint="Nothing was timed. Take --backend torch, and report this with what 'dtr doctor' says.",
        )
    return worst


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """What a large matrix product reaches here: the ceiling that utilisation is measured against."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _median_seconds(device, lambda: a @ b, 10)


def _measure(
    teacher: Teacher, kind: str, batch: int, tokens: int, num_steps: int, fast: bool, ceiling: float
) -> dict[str, Any]:
    device = teacher.device
    attention = [layer.self_attn for layer in decoder_layers(teacher.model)]
    mixers = {i: mixer_from_teacher(kind, teacher.geometry, i, a) for i, a in enumerate(attention)}
    students = Students(teacher, mixers, learning_rate=1e-4, weight_decay=0.0, max_grad_norm=1.0, fast=fast)
    ids = torch.randint(0, teacher.model.config.vocab_size, (batch, tokens), device=device)

    @torch.no_grad()
    def forward() -> None:
        teacher.model.model(input_ids=ids, use_cache=False)

    began = time.perf_counter()
    for _ in range(WARMUP_STEPS + 1 if fast else 1):
        students.train_step(ids, 1e-4)
    _synchronize(device)
    cold_start = time.perf_counter() - began
    held = _start_peak(device)
    step = _median_seconds(device, lambda: students.train_step(ids, 1e-4), num_steps)
    peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None
    bare = _median_seconds(device, forward, num_steps)
    # Two operations per weight and token forward, four more backward; attention itself is left out.
    body = sum(p.numel() for p in teacher.model.model.layers.parameters())
    students_size = sum(p.numel() for mixer in mixers.values() for p in mixer.parameters())
    return {
        "batch": batch,
        "seq_len_tokens": tokens,
        "teacher_forward_tokens_per_second": batch * tokens / bare,
        "distill_tokens_per_second": batch * tokens / step,
        "ratio_to_teacher_forward": bare / step,
        "flop_utilisation": (2 * body + 6 * students_size) * batch * tokens / step / ceiling,
        "cold_start_seconds": cold_start,
        "peak_bytes_beyond_model_students_and_optimizer": peak,
    }


def _median_seconds(device: torch.device, work: Callable[[], Any], num_runs: int) -> float:
    work()
    times = []
    for _ in range(num_runs):
        _synchronize(device)
        began = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
