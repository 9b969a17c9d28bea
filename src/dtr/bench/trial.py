"""One set of students at one size of step: how long it takes, stage by stage, and how much memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dtr.arch import HeadGeometry, decoder_layers
from dtr.distillation.replay import WARMUP_STEPS, Replay
from dtr.distillation.students import Students
from dtr.distributed import World
from dtr.errors import DeviceError
from dtr.mixers.base import Mixer
from dtr.teacher import Teacher

LEARNING_RATE = 1e-4

MixerMaker = Callable[[HeadGeometry, int, Any], Mixer]


class Trial:
    """Students of the first `num_layers` layers, started and run until their step is compiled and recorded.

    Args:
        teacher: from `load_teacher`.
        make: gives a mixer from the teacher's geometry, a layer's number and its attention.
        input_ids: the global batch (B, T).
        num_layers: how many layers are trained.
        fast: compile the students, and on a GPU replay the step as a CUDA graph.
        world: the ranks that share the batch.
    """

    def __init__(
        self, teacher: Teacher, make: MixerMaker, input_ids: torch.Tensor, *, num_layers: int, fast: bool, world: World
    ) -> None:
        self._teacher, self._input_ids, self._fast = teacher, input_ids, fast
        device = teacher.device
        # What an earlier trial left in reference cycles would be counted as held, and then vanish.
        gc.collect()
        held_before = _allocated(device)
        attention = [layer.self_attn for layer in decoder_layers(teacher.model)][:num_layers]
        mixers = {i: make(teacher.geometry, i, a) for i, a in enumerate(attention)}
        self._params = [p for mixer in mixers.values() for p in mixer.parameters()]
        self.students = Students(
            teacher,
            mixers,
            learning_rate=LEARNING_RATE,
            weight_decay=0.0,
            max_grad_norm=1.0,
            fast=fast,
            world=world,
        )
        began = time.perf_counter()
        self.step()
        synchronize(device)
        first = time.perf_counter() - began
        # Tuning of kernels takes memory for a moment in the very first step, which is no part of training.
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        for _ in range(WARMUP_STEPS if fast else 1):
            losses = self.step()
        synchronize(device)
        # After an update, so that wrong gradients show too.
        if not torch.isfinite(losses).all():
            raise DeviceError(
                "the training step",
                got="losses that are not finite after its first updates",
                expected="a step that learns",
                hint="Compare with --slow, which neither compiles nor records.",
            )
        self.cold_start_seconds = first + (time.perf_counter() - began if fast else 0.0)
        self.peak_bytes = self._peak(held_before)
        """Most memory that a step holds beyond teacher, students and optimizer, gradients included; None on a CPU.

        Taken from the steps that ran kernel by kernel and from the recording: a replayed step allocates nothing, as
        all that it needs was set aside when it was recorded.
        """

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self._params)

    @property
    def gradient_bytes(self) -> int:
        return _num_bytes(self._params)

    def step(self) -> torch.Tensor:
        """One training step."""
        return self.students.train_step(self._input_ids, LEARNING_RATE)

    def stage_seconds(self, step_seconds: float, num_runs: int) -> dict[str, float]:
        """Where a step's time goes. The ends are timed alone, recorded like the step; students are what remains."""
        ids = self._input_ids.to(self._teacher.device)
        sums = self.students.accumulate(ids)

        def update(_: torch.Tensor) -> torch.Tensor:
            self.students.update(torch.ones_like(sums))
            return sums

        seconds = {}
        for name, work in (("teacher_forward", self.students.teacher_forward), ("clip_and_optimizer", update)):
            recorded = self._fast and ids.device.type == "cuda"
            run = Replay(work) if recorded else work
            for _ in range(WARMUP_STEPS if recorded else 0):
                run(ids)
            seconds[name] = median_seconds(self._teacher.device, lambda run=run: run(ids), num_runs)  # type: ignore[misc]
        self.students.optimizer.zero_grad()
        return seconds | {"students_forward_backward": step_seconds - sum(seconds.values())}

    def _peak(self, held_before: int) -> int | None:
        if self._teacher.device.type != "cuda":
            return None
        moments = [x for state in self.students.optimizer.state.values() for x in state.values()]
        kept = _num_bytes([*self._params, *moments])
        return torch.cuda.max_memory_allocated(self._teacher.device) - held_before - kept


def median_seconds(device: torch.device, work: Callable[[], Any], num_runs: int) -> float:
    """Median time of `work`, after one run that does not count."""
    work()
    times = []
    for _ in range(num_runs):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
