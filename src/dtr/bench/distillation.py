"""Distillation against the teacher's bare forward pass, in one process, on one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dtr.arch import require_family
from dtr.bench.baseline import baseline_tokens_per_second
from dtr.bench.trial import MixerMaker, Trial, median_seconds
from dtr.distributed import World
from dtr.errors import DeviceError
from dtr.mixers import MIXERS, mixer_from_teacher, options_of_new
from dtr.ops import channel_delta, gated_delta, gated_linear
from dtr.ops.backend import CHANNEL_DELTA, GATED_DELTA, GATED_LINEAR
from dtr.ops.dispatch import channel_delta_rule, gated_delta_rule, gated_linear_attention
from dtr.teacher import Teacher

MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Largest relative error of output and gradients that a backend may have and still be timed."""


def bench_distill(
    teacher: Teacher,
    *,
    sizes: list[tuple[int, int]],
    mixer: str = "gated_deltanet",
    options: dict[str, Any] | None = None,
    backend: str = "auto",
    num_steps: int = 10,
    fast: bool = True,
    baseline: bool = False,
    world: World | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Time whole training steps of all layers and the teacher's body (no LM head), medians in one process.

    The text is random tokens, on which speed does not depend. Of several ranks the first measures alone, then all
    together at the same batch for each; all must call this with the same arguments.

    Args:
        teacher: from `load_teacher`.
        sizes: (sequences, tokens each) of a step of one process.
        mixer: kind of mixer.
        options: that mixer's.
        backend: what computes the mixers' recurrences, as in `distill`.
        num_steps: timed steps per size.
        fast: compile the students, and on a GPU replay the step as a CUDA graph; so by default.
        baseline: time the straightforward float32 loop as well (`bench/baseline.py`).
        world: the ranks that take part.
        on_phase: called, on every rank, with what is about to be done: most of it takes long or waits for others.

    Yields:
        one dict per size, on the first rank with what it measured alone: tokens per second of both, their ratio, cold
        start in seconds (until the step is compiled and recorded), seconds by stage, achieved FLOP/s over those of a
        large matrix product, peak memory beyond model, students and optimizer with all layers and with half of them;
        with several ranks the speed of all together, on every rank.

    Raises:
        DeviceError: the backend's results are wrong on this machine.
    """
    require_family(teacher.model.config, "dtr bench distill", hint="Other teachers are distilled without a fast step.")
    world, say = world or World(), on_phase or (lambda phase: None)
    say("comparing the kernels with a reference in float64")
    make = partial(mixer_from_teacher, mixer, options=options_of_new(mixer, options), backend=backend)
    began = time.perf_counter()
    check_backend(teacher.device, teacher.dtype, MIXERS[mixer].operation, backend)
    check_seconds = time.perf_counter() - began
    if world.size > 1:
        # The plainest step first: if it hangs, neither compiling nor recording is to blame.
        say(f"a step of {world.size} processes together, neither compiled nor recorded")
        _one_plain_step(teacher, make, *sizes[0], world)
    ceiling = matmul_flops_per_second(teacher.device, teacher.dtype) if world.is_first else 0.0
    for batch, tokens in sizes:
        # Kernels are compiled and tuned by the check, which is part of a cold start.
        size: dict[str, Any] = {"batch": batch, "seq_len_tokens": tokens, "backend_check_seconds": check_seconds}
        if world.is_first:
            size |= _alone(teacher, make, batch, tokens, num_steps, fast, ceiling, say)
        if world.is_first and baseline:
            say(f"{batch} x {tokens}: the plain float32 loop")
            size["baseline_tokens_per_second"] = baseline_tokens_per_second(
                teacher, make, _random_ids(teacher, batch, tokens), num_steps=num_steps
            )
        if world.size > 1:
            say(f"{batch} x {tokens}: waiting for all processes")
        world.wait()
        if world.size > 1:
            say(f"{batch} x {tokens}: {world.size} processes together, {_way(fast, teacher.device)}")
            size["together"] = _together(teacher, make, batch, tokens, num_steps, fast, world)
            if world.is_first:
                size["together"]["speedup"] = (
                    size["together"]["distill_tokens_per_second"] / size["distill_tokens_per_second"]
                )
        yield size


def check_backend(device: torch.device, dtype: torch.dtype, operation: str | None, backend: str = "auto") -> float:
    """Compare a backend with the token-by-token form in float64; returns the worst relative error.

    Args:
        device: where kernels run.
        dtype: of queries, keys and values.
        backend: as a mixer holds it.
        operation: a mixer's; 0 is returned for None, plain operations, which the tests compare.

    Raises:
        DeviceError: it is off by more than `MAX_ERROR`.
    """
    if operation is None:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    shape = (2, 130, 3, 64)
    # Strongly correlated keys, on which an unstable inverse shows.
    common = torch.randn(2, 1, 3, 64, generator=generator)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    k = torch.nn.functional.normalize(common + 0.3 * k, dim=-1)
    q = torch.nn.functional.normalize(q, dim=-1)
    g = -0.1 * torch.rand(shape[:3] if operation == GATED_DELTA else shape, generator=generator)
    beta = torch.rand(shape[:3], generator=generator)
    forms: dict[str, tuple[Callable, Callable]] = {
        GATED_DELTA: (partial(gated_delta_rule, scale=1.0), partial(gated_delta.naive, scale=1.0)),
        GATED_LINEAR: (partial(gated_linear_attention, scale=1.0), partial(gated_linear.naive, scale=1.0)),
        CHANNEL_DELTA: (channel_delta_rule, channel_delta.naive),
    }
    rule, reference = forms[operation]
    chosen = partial(rule, backend=backend)

    def run(op: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        out, _ = op(*inputs)
        return [out.detach(), *torch.autograd.grad(out.double().square().sum(), inputs)]

    gates = (g,) if operation == GATED_LINEAR else (g, beta)
    cast = [x.to(device, dtype) for x in (q, k, v)] + [x.to(device) for x in gates]
    ours = run(chosen, cast)
    exact = run(reference, [x.double().cpu() for x in cast])
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
    return 2 * size**3 / median_seconds(device, lambda: a @ b, 10)


def _one_plain_step(teacher: Teacher, make: MixerMaker, batch: int, tokens: int, world: World) -> None:
    ids = _random_ids(teacher, batch * world.size, tokens).to(teacher.device)
    Trial(teacher, make, ids, num_layers=teacher.num_layers, fast=False, world=world)
    world.wait()


def _alone(
    teacher: Teacher,
    make: MixerMaker,
    batch: int,
    tokens: int,
    num_steps: int,
    fast: bool,
    ceiling: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    ids = _random_ids(teacher, batch, tokens).to(teacher.device)
    say(f"{batch} x {tokens}: this process alone, {_way(fast, teacher.device)}")
    trial = Trial(teacher, make, ids, num_layers=teacher.num_layers, fast=fast, world=World())

    @torch.no_grad()
    def forward() -> None:
        teacher.model.model(input_ids=ids, use_cache=False)

    say(f"{batch} x {tokens}: timing steps, the teacher's forward pass and stages")
    step = median_seconds(teacher.device, trial.step, num_steps)
    bare = median_seconds(teacher.device, forward, num_steps)
    # Two operations per weight and token forward, four more backward; attention itself is left out.
    body = sum(p.numel() for p in teacher.model.model.layers.parameters())
    stages = trial.stage_seconds(step, num_steps)
    result = {
        "teacher_forward_tokens_per_second": batch * tokens / bare,
        "distill_tokens_per_second": batch * tokens / step,
        "ratio_to_teacher_forward": bare / step,
        # Of the pass as the step runs it, compiled and recorded where the step is.
        "ratio_to_own_forward": stages["teacher_forward"] / step,
        "flop_utilisation": (2 * body + 6 * trial.num_parameters) * batch * tokens / step / ceiling,
        "cold_start_seconds": trial.cold_start_seconds,
        "compiled": trial.students.is_compiled,
        "recorded": trial.students.refusal is None,
        "stage_seconds": stages,
        "peak_bytes_beyond_model_students_and_optimizer": trial.peak_bytes,
        "of_which_gradient_bytes": trial.gradient_bytes,
    }
    if trial.peak_bytes is not None:
        num_layers = max(1, teacher.num_layers // 2)
        del trial
        say(f"{batch} x {tokens}: memory with half of the layers")
        half = Trial(teacher, make, ids, num_layers=num_layers, fast=fast, world=World())
        result["half_of_the_layers"] = {
            "num_layers": num_layers,
            "peak_bytes_beyond_model_students_and_optimizer": half.peak_bytes,
            "of_which_gradient_bytes": half.gradient_bytes,
        }
    return result


def _together(
    teacher: Teacher, make: MixerMaker, batch: int, tokens: int, num_steps: int, fast: bool, world: World
) -> dict[str, Any]:
    """All ranks on one batch that grows with their number; the slowest rank counts."""
    ids = _random_ids(teacher, batch * world.size, tokens)
    trial = Trial(teacher, make, ids.to(teacher.device), num_layers=teacher.num_layers, fast=fast, world=world)
    world.wait()
    step = max(world.collect(median_seconds(teacher.device, trial.step, num_steps)))
    refusals = world.collect(trial.students.refusal)
    return {
        "num_processes": world.size,
        "distill_tokens_per_second": batch * world.size * tokens / step,
        "recorded": not any(refusals),
        "refusal": next((why for why in refusals if why), None),
    }


def _way(fast: bool, device: torch.device) -> str:
    return "plain" if not fast else "compiling and recording" if device.type == "cuda" else "compiling"


def _random_ids(teacher: Teacher, batch: int, tokens: int) -> torch.Tensor:
    """(B, T) token ids on the CPU, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, teacher.model.config.vocab_size, (batch, tokens), generator=generator)
