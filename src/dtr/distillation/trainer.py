"""Blockwise local distillation: every linear layer learns alone, all in the same teacher passes.

Source: "Distill-then-Replace" (arXiv 2601.11667), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtr.corpus import load_text
from dtr.corpus.mixing import Text
from dtr.distillation.bank import MixerBank, Spec, read_numbers
from dtr.distillation.calibration import calibrate
from dtr.distillation.loop import memory_advice, train
from dtr.distillation.refit import refit_outputs
from dtr.distillation.start import check_distillation, check_segments, start_mixers, start_students
from dtr.distillation.state import TrainingState
from dtr.distillation.students import ParallelKind, Students
from dtr.distributed import current_world
from dtr.teacher import Teacher

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
    batch_size: int = 8,
    segment_tokens: int | None = None,
    short_fraction: float = 0.5,
    learning_rate: float = 6e-3,
    warmup_fraction: float = 0.05,
    final_lr_fraction: float = 0.1,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    refit_tokens: int = 0,
    layers: list[int] | None = None,
    seed: int = 0,
    parallel: ParallelKind = "data",
    backend: str = "auto",
    checkpoint: str | Path | None = None,
    checkpoint_every_steps: int | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> MixerBank:
    """Train a linear mixer per layer to reproduce its attention's output on the same input.

    Args:
        teacher: from `load_teacher`; it is not changed.
        text: token blocks, streamed or not, or what `load_text` takes.
        mixer: kind of mixer by name; or a list of names and {"kind": name, "options": {...}}, and every layer gets one
            of each, all trained in the same passes. An entry with "layers": [...] is for these alone.
        options: keyword arguments of the one kind.
        num_tokens: budget; every token trains every layer. The text is repeated when it is shorter.
        seq_len_tokens: length of a training sequence (when `text` is not tokenized yet).
        batch_size: sequences per optimizer step.
        segment_tokens: mixers learn on segments of so many tokens, each from an empty state, while the teacher reads
            the sequence whole, so that their targets are those of a long text; it divides the sequence length.
        short_fraction: with segments, the share of steps in which the teacher too reads each segment alone.
        learning_rate: peak rate of AdamW after a linear warm-up; cosine decay to `final_lr_fraction` of it.
        refit_tokens: solve for the output projections in closed form at the end, on this many tokens; 0 leaves it out.
        layers: layers to distil; all by default.
        seed: order of the text and start values.
        parallel: what several processes (torchrun) share out: `data`, the sequences of each batch, or `layers`. The
            bank is the same up to rounding, on all ranks.
        backend: what computes the mixers' recurrences, in training and afterwards: auto, torch, triton, fla or amx.
        checkpoint: safetensors file for the state; if it is there, training goes on from it.
        checkpoint_every_steps: at most this many steps are lost by an interruption; about a minute by default.
        on_event: called with small dicts for logs and live displays.

    Returns:
        the bank, with each layer's held-out error before and after.

    Raises:
        BankError: the checkpoint is damaged or of another distillation.
        DeviceError: the backend cannot run here, or memory ran out; the message names the setting to change.
        Interrupted: Ctrl-C; the state was saved if `checkpoint` is given.
    """
    specs, chosen = check_distillation(
        teacher,
        mixer=mixer,
        options=options,
        layers=layers,
        backend=backend,
        segment_tokens=segment_tokens,
        refit_tokens=refit_tokens,
    )
    tokens = seq_len_tokens if isinstance(text, str | list) else text.seq_len_tokens
    check_segments(segment_tokens, seq_len_tokens=tokens)
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
    if segment_tokens is not None:
        identity |= {"segment_tokens": segment_tokens, "short_fraction": short_fraction}
    bank = _start_bank(teacher, text, specs, identity, backend)
    students = start_students(teacher, bank, world, parallel=parallel)
    state = TrainingState(bank, students, text, Path(checkpoint) if checkpoint else None, world)
    emit = on_event or (lambda event: None)
    with memory_advice(batch_size, text.seq_len_tokens):
        train(bank, students, state, text, checkpoint_every_steps=checkpoint_every_steps, emit=emit, world=world)
        state.share_weights()
        if refit_tokens:
            _refit(teacher, bank, students, text, batch_size, refit_tokens)
    return bank


def _start_bank(teacher: Teacher, text: Text, specs: list[Spec], identity: dict[str, Any], backend: str) -> MixerBank:
    """Untrained mixers for the layers that the identity of a distillation names."""
    num_tokens, batch_size = identity["num_tokens"], identity["batch_size"]
    numbers = read_numbers(identity["mixer"], identity["layers"], teacher.num_layers)
    bank = MixerBank(
        specs=specs,
        mixers=start_mixers(teacher, specs, numbers, identity["seed"], backend),
        num_model_layers=teacher.num_layers,
        teacher_fingerprint=teacher.fingerprint,
        geometry=teacher.geometry,
        identity=identity,
        num_tokens=num_tokens,
        num_steps=math.ceil(num_tokens / (batch_size * text.seq_len_tokens)),
    )
    calibrate(teacher, bank.mixers, text.first(batch_size))
    return bank


def _refit(teacher: Teacher, bank: MixerBank, students: Students, text: Text, batch_size: int, num_tokens: int) -> None:
    """Refit the output projections on the text that training would have gone on with; every rank does the same."""
    num_batches = math.ceil(num_tokens / (batch_size * text.seq_len_tokens))
    seed = bank.identity["seed"]
    train = [text.batch(bank.num_steps + i, batch_size=batch_size, seed=seed) for i in range(num_batches)]
    # The ridge is chosen on one half of the held-out text, so only the other half is free of that choice.
    bank.identity["ridges"] = refit_outputs(teacher, bank.mixers, train, text.held_out[::2].split(batch_size))
    bank.nmse_after = students.held_out_nmse(text.held_out, batch_size)
