"""Blockwise local distillation: every linear layer learns alone, all in the same teacher passes.

Source: "Distill-then-Replace" (arXiv 2601.11667), section 3.1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dtr.corpus import load_text
from dtr.corpus.mixing import Text
from dtr.distillation.bank import MixerBank
from dtr.distillation.calibration import calibrate
from dtr.distillation.refit import refit_outputs
from dtr.distillation.start import check_distillation, start_mixers
from dtr.distillation.state import TrainingState
from dtr.distillation.students import ParallelKind, Students
from dtr.distillation.watch import CHECK_EVERY_STEPS, Watch
from dtr.distributed import World, current_world
from dtr.errors import DeviceError, Interrupted, RecipeError
from dtr.interrupt import stop_at_safe_point
from dtr.teacher import Teacher

NUM_MEASURES = 8
"""Times that held-out error is measured on the way."""
HELD_OUT_TOKENS = 16_384
"""Tokens set aside for measuring where the caller gives plain text instead of blocks."""


def distill(
    teacher: Teacher,
    text: Text | str | list[str],
    *,
    mixer: str | list[str | dict[str, Any]] = "gated_deltanet",
    options: dict[str, Any] | None = None,
    num_tokens: int = 10_000_000,
    seq_len_tokens: int = 512,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    warmup_fraction: float = 0.05,
    final_lr_fraction: float = 0.1,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    refit_tokens: int = 0,
    layers: list[int] | None = None,
    seed: int = 0,
    parallel: ParallelKind = "data",
    checkpoint: str | Path | None = None,
    checkpoint_every_steps: int = 200,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> MixerBank:
    """Train a linear mixer per layer to reproduce its attention's output on the same input.

    Args:
        teacher: from `load_teacher`; it is not changed.
        text: token blocks, streamed or not, or what `load_text` takes.
        mixer: kind of mixer by name; or a list of names and {"kind": name, "options": {...}}, and every layer gets one
            of each, all trained in the same passes.
        options: keyword arguments of the one kind.
        num_tokens: budget; every token trains every layer. The text is repeated when it is shorter.
        seq_len_tokens: length of a training sequence (when `text` is not tokenized yet).
        batch_size: sequences per optimizer step.
        learning_rate: peak rate of AdamW after a linear warm-up; cosine decay to `final_lr_fraction` of it.
        refit_tokens: solve for the output projections in closed form at the end, on this many tokens; 0 leaves it out.
        layers: layers to distil; all by default.
        seed: order of the text and start values.
        parallel: what several processes (torchrun) share out: `data`, the sequences of each batch, or `layers`. The
            bank is the same up to rounding, on all ranks.
        checkpoint: safetensors file for the state; if it is there, training goes on from it.
        checkpoint_every_steps: at most this many steps are lost by an interruption.
        on_event: called with small dicts for logs and live displays.

    Returns:
        the bank, with each layer's held-out error before and after.

    Raises:
        BankError: the checkpoint is damaged or of another distillation.
        DeviceError: out of memory; the message names the setting to change.
        Interrupted: Ctrl-C; the state was saved if `checkpoint` is given.
    """
    specs, chosen = check_distillation(teacher, mixer=mixer, options=options, layers=layers)
    if isinstance(text, str | list):
        text = load_text(
            text,
            tokenizer=teacher.tokenizer,
            seq_len_tokens=seq_len_tokens,
            num_held_out_tokens=HELD_OUT_TOKENS,
            max_tokens=num_tokens,
            seed=seed,
        )
    world = current_world()
    identity = {
        "teacher": teacher.fingerprint,
        "text": text.fingerprint,
        "mixer": mixer,
        "options": options or {},
        "num_tokens": num_tokens,
        "seq_len_tokens": text.seq_len_tokens,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup_fraction": warmup_fraction,
        "final_lr_fraction": final_lr_fraction,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "refit_tokens": refit_tokens,
        "layers": chosen,
        "seed": seed,
    }
    bank = MixerBank(
        specs=specs,
        mixers=start_mixers(teacher, specs, chosen, seed),
        num_model_layers=teacher.num_layers,
        teacher_fingerprint=teacher.fingerprint,
        geometry=teacher.geometry,
        identity=identity,
        num_tokens=num_tokens,
        num_steps=math.ceil(num_tokens / (batch_size * text.seq_len_tokens)),
    )
    calibrate(teacher, bank.mixers, text.first(batch_size))
    students = Students(
        teacher,
        bank.mixers,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        fast=teacher.device.type == "cuda",
        world=world,
        parallel=parallel,
    )
    state = TrainingState(bank, students, text, Path(checkpoint) if checkpoint else None, world)
    try:
        _train(bank, students, state, text, batch_size, checkpoint_every_steps, on_event or (lambda _: None), world)
        state.share_weights()
        if refit_tokens:
            _refit(teacher, bank, students, text, batch_size, refit_tokens)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            "distill.batch_size",
            got=f"out of memory at {batch_size} sequences of {text.seq_len_tokens} tokens",
            expected="a step that fits",
            hint="Lower distill.batch_size or distill.seq_len_tokens and go on with --resume.",
        ) from error
    return bank


def _train(
    bank: MixerBank,
    students: Students,
    state: TrainingState,
    text: Text,
    batch_size: int,
    checkpoint_every_steps: int,
    emit: Callable[[dict[str, Any]], None],
    world: World,
) -> None:
    identity, started = bank.identity, time.monotonic()
    step = state.restore()
    watch = Watch({index: bank.mixers[index] for index in students.active})
    spent_before = bank.seconds
    measure_every = max(1, bank.num_steps // NUM_MEASURES)

    def measure(done: int) -> None:
        nmse = students.held_out_nmse(text.held_out, batch_size)
        mean = sum(nmse.values()) / len(nmse)
        tokens = min(done * batch_size * text.seq_len_tokens, bank.num_tokens)
        bank.curve.append({"num_tokens": tokens, "mean_nmse": mean, "nmse": list(nmse.values())})
        bank.nmse_before = bank.nmse_before or nmse
        bank.nmse_after = nmse
        by_kind = {"by_kind": bank.mean_nmse_by_kind} if len(bank.specs) > 1 else {}
        emit({"event": "nmse", "step": done, "num_tokens": tokens, "mean_nmse": mean, **by_kind})

    if step == 0:
        measure(0)
    with stop_at_safe_point() as stop:
        while step < bank.num_steps:
            batch = text.batch(step, batch_size=batch_size, seed=identity["seed"])
            losses = students.train_step(batch, _learning_rate(step, bank.num_steps, identity))
            step += 1
            stopping = stop.requested and world.size == 1
            measuring = step % measure_every == 0 or step == bank.num_steps
            saving = step % checkpoint_every_steps == 0 or step == bank.num_steps
            # Reading the loss waits for the device, and asking all ranks waits for them; not at every step.
            if step % CHECK_EVERY_STEPS == 0 or measuring or saving or stopping:
                emit(_progress(step, bank.num_steps, batch, losses))
                _give_up_lost_layers(bank, students, watch, losses, step * batch.numel(), world, emit)
                stopping = any(world.collect(stop.requested))
            if measuring:
                measure(step)
            bank.seconds = spent_before + time.monotonic() - started
            if saving or stopping:
                state.save(step)
            if stopping and step < bank.num_steps:
                raise Interrupted(f"Stopped after step {step} of {bank.num_steps}; {state.how_to_go_on()}")


def _give_up_lost_layers(
    bank: MixerBank,
    students: Students,
    watch: Watch,
    losses: torch.Tensor,
    num_tokens: int,
    world: World,
    emit: Callable[[dict[str, Any]], None],
) -> None:
    """Stop layers whose training has failed, on all ranks.

    Raises:
        RecipeError: there is no layer left.
    """
    for lost in world.collect(watch.check(students.active, losses)):
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


def _refit(teacher: Teacher, bank: MixerBank, students: Students, text: Text, batch_size: int, num_tokens: int) -> None:
    """Refit the output projections on the text that training would have gone on with; every rank does the same."""
    num_batches = math.ceil(num_tokens / (batch_size * text.seq_len_tokens))
    seed = bank.identity["seed"]
    train = [text.batch(bank.num_steps + i, batch_size=batch_size, seed=seed) for i in range(num_batches)]
    # The ridge is chosen on one half of the held-out text, so only the other half is free of that choice.
    bank.identity["ridges"] = refit_outputs(teacher, bank.mixers, train, text.held_out[::2].split(batch_size))
    bank.nmse_after = students.held_out_nmse(text.held_out, batch_size)


def _progress(step: int, num_steps: int, batch: torch.Tensor, losses: torch.Tensor) -> dict[str, Any]:
    return {
        "event": "distill",
        "step": step,
        "num_steps": num_steps,
        "num_tokens": step * batch.numel(),
        "mean_loss": losses.mean().item(),
        "worst_loss": losses.max().item() if len(losses) else math.nan,
    }


def _learning_rate(step: int, num_steps: int, settings: dict[str, Any]) -> float:
    """Linear warm-up, then cosine decay to a share of the peak."""
    peak, warmup = settings["learning_rate"], max(1, round(settings["warmup_fraction"] * num_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    floor = settings["final_lr_fraction"]
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
