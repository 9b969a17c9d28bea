"""The training loop: steps, measuring, checkpoints, layers that fail, and Ctrl-C at a safe point."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dtr.corpus.mixing import Text
from dtr.distillation.bank import MixerBank
from dtr.distillation.divergence_guard import CHECK_EVERY_STEPS, DivergenceGuard
from dtr.distillation.state import TrainingState
from dtr.distillation.students import Students
from dtr.distributed import World, lost_rank
from dtr.errors import DeviceError, Interrupted, ModelError, RecipeError
from dtr.interrupt import stop_at_safe_point

NUM_MEASURES = 8
"""Times that held-out error is measured on the way."""
CHECKPOINT_SECONDS = 60.0
"""Work that may be lost where nobody says. Writing a gigabyte takes as long as a hundred steps of a GPU."""


def train(
    bank: MixerBank,
    students: Students,
    state: TrainingState,
    text: Text,
    *,
    first_step: int = 0,
    checkpoint_every_steps: int | None,
    emit: Callable[[dict[str, Any]], None],
    world: World,
) -> None:
    """Train the bank's mixers for `bank.num_steps` steps, from where `state` says.

    Args:
        bank: its identity holds batch size, seed and the schedule of the learning rate; errors and curve are filled in.
        students: the bank's mixers under training.
        state: saves and restores.
        text: step n takes its batch number `first_step + n`.
        first_step: how many batches of the text are passed over.
        checkpoint_every_steps: at most this many steps are lost by an interruption; None saves about once a minute.
        emit: told of progress.
        world: the ranks that take part.

    Raises:
        RecipeError: every layer failed.
        Interrupted: Ctrl-C; the state was saved.
    """
    identity, started = bank.identity, time.monotonic()
    guard = DivergenceGuard({index: bank.mixers[index] for index in students.active})
    step = state.restore(guard)
    spent_before = bank.seconds
    measure_every = max(1, bank.num_steps // NUM_MEASURES)
    saved_at = started

    if step == 0:
        _measure(bank, students, text, 0, emit)
    with stop_at_safe_point() as stop:
        while step < bank.num_steps:
            batch = text.batch(first_step + step, batch_size=identity["batch_size"], seed=identity["seed"])
            if is_short_step(step, identity):
                batch = batch.reshape(-1, identity["segment_tokens"])
            losses = students.train_step(batch, learning_rate_at(step, bank.num_steps, identity))
            step += 1
            is_due = checkpoint_every_steps is None and time.monotonic() - saved_at >= CHECKPOINT_SECONDS
            stopping, saving = (wish and world.size == 1 for wish in (stop.requested, is_due))
            measuring = step % measure_every == 0 or step == bank.num_steps
            saving |= step == bank.num_steps or bool(checkpoint_every_steps and step % checkpoint_every_steps == 0)
            checking = step % CHECK_EVERY_STEPS == 0 or measuring
            # Reading the loss waits for the device, and asking all ranks waits for them; not at every step.
            if checking or saving or stopping:
                emit(_progress(step, bank.num_steps, batch, losses))
                if checking:
                    # Never for the sake of a checkpoint alone: when those are written must not change the result.
                    _give_up_lost_layers(bank, students, guard, losses, step * batch.numel(), world, emit)
                # Clocks differ, and all ranks save together.
                wishes = world.collect((stop.requested, is_due))
                stopping, saving = any(stop for stop, _ in wishes), saving or any(due for _, due in wishes)
            if measuring:
                _measure(bank, students, text, step, emit)
            bank.seconds = spent_before + time.monotonic() - started
            if saving or stopping:
                state.save(step, guard)
                saved_at = time.monotonic()
            if stopping:
                raise Interrupted(f"Stopped after step {step} of {bank.num_steps}; {state.how_to_go_on()}")


def _measure(
    bank: MixerBank, students: Students, text: Text, step: int, emit: Callable[[dict[str, Any]], None]
) -> None:
    """Held-out error after so many steps, for the bank's record and whoever listens."""
    batch_size = bank.identity["batch_size"]
    nmse = students.held_out_nmse(text.held_out, batch_size)
    odd = [bank.layer_of[number] for number, value in nmse.items() if not math.isfinite(value)]
    if step == 0 and odd:
        raise ModelError(
            "teacher",
            got=f"attention of layer {odd[0]} that gives no finite numbers on the held-out text, or too large ones",
            expected="outputs that a mixer can learn",
            hint="Its weights are damaged, or overflow in this type: try another teacher.dtype.",
        )
    mean = sum(nmse.values()) / len(nmse)
    tokens = min(step * batch_size * text.seq_len_tokens, bank.num_tokens)
    bank.curve.append({"num_tokens": tokens, "mean_nmse": mean, "nmse": list(nmse.values())})
    bank.nmse_before = bank.nmse_before or nmse
    bank.nmse_after = nmse
    by_kind = {"by_kind": bank.mean_nmse_by_kind} if len(bank.specs) > 1 else {}
    emit({"event": "nmse", "step": step, "num_tokens": tokens, "mean_nmse": mean, **by_kind})


@contextmanager
def memory_advice(batch_size: int, seq_len_tokens: int) -> Iterator[None]:
    """Say which settings to change when memory runs out, and what to do when another rank is gone.

    Raises:
        DeviceError: it did, or is.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            "distill.batch_size",
            got=f"out of memory at {batch_size} sequences of {seq_len_tokens} tokens",
            expected="a step that fits",
            hint="Lower distill.batch_size or distill.seq_len_tokens and go on with --resume.",
        ) from error
    except RuntimeError as error:
        lost = lost_rank(error)
        if lost is None:
            raise
        raise lost from error


def _give_up_lost_layers(
    bank: MixerBank,
    students: Students,
    guard: DivergenceGuard,
    losses: torch.Tensor,
    num_tokens: int,
    world: World,
    emit: Callable[[dict[str, Any]], None],
) -> None:
    """Stop layers whose training has failed, on all ranks.

    Raises:
        RecipeError: there is no layer left.
    """
    for lost in world.collect(guard.check(students.active, losses)):
        for index, why in lost.items():
            if index not in bank.stopped:
                bank.stopped[index] = {"num_tokens": num_tokens, "why": why}
                emit({"event": "stopped", **bank.named(index), "num_tokens": num_tokens, "why": why})
            if index in students.active:
                students.stop(index)
    if len(bank.stopped) == len(bank.mixers):
        number, facts = next(iter(bank.stopped.items()))
        failed = f"layer {bank.layer_of[number]}: {facts['why']}"
        raise RecipeError(
            "distill.learning_rate",
            got=f"{bank.identity['learning_rate']}, at which every layer failed ({failed})",
            expected="a rate at which layers learn",
            hint="Lower it.",
        )


def _progress(step: int, num_steps: int, batch: torch.Tensor, losses: torch.Tensor) -> dict[str, Any]:
    return {
        "event": "distill",
        "step": step,
        "num_steps": num_steps,
        "num_tokens": step * batch.numel(),
        "mean_loss": losses.mean().item(),
        "worst_loss": losses.max().item() if len(losses) else math.nan,
    }


def is_short_step(step: int, settings: dict[str, Any]) -> bool:
    """Whether the teacher reads the segments of this step each alone; such steps lie evenly among the others."""
    if settings.get("segment_tokens") is None:
        return False
    share = settings["short_fraction"]
    return math.floor((step + 1) * share) > math.floor(step * share)


def learning_rate_at(step: int, num_steps: int, settings: dict[str, Any]) -> float:
    """Linear warm-up, then cosine decay to a share of the peak."""
    peak, warmup = settings["learning_rate"], max(1, round(settings["warmup_fraction"] * num_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    floor = settings["final_lr_fraction"]
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
