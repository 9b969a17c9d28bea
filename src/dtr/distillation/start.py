"""What a distillation starts with: kinds and layers that the teacher can have, and mixers with its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from dtr.arch import attention_of, decoder_layers, is_family, require_family
from dtr.distillation.bank import MixerBank, Spec, read_numbers, read_specs
from dtr.distillation.compiled import pays
from dtr.distillation.students import Students
from dtr.distributed import World
from dtr.errors import RecipeError
from dtr.mixers import MIXERS, check_mixer, mixer_from_teacher
from dtr.ops.backend import Backend, backend_of
from dtr.teacher import Teacher, whole_weights


def check_distillation(
    teacher: Teacher,
    *,
    mixer: str | list[str | dict[str, Any]] = "gated_deltanet",
    options: dict[str, Any] | None = None,
    layers: list[int] | None = None,
    backend: str = "auto",
    segment_tokens: int | None = None,
    refit_tokens: int = 0,
) -> tuple[list[Spec], list[int]]:
    """Refuse what this teacher cannot have, before text is read; `distill` does the same.

    Returns the kinds and the layers. Raises RecipeError, ModelError and DeviceError.
    """
    for name, value in (("segment_tokens", segment_tokens), ("refit_tokens", refit_tokens)):
        if value:
            require_family(teacher.model.config, f"distill.{name}", hint="Leave it out.", given=value)
    specs = read_specs(mixer, options)
    for spec in specs:
        check_mixer(spec["kind"], teacher.geometry, {key: value for key, value in spec.items() if key != "kind"})
    backends_of(teacher, [(MIXERS[spec["kind"]].operation, backend) for spec in specs])
    chosen = _check_layers(layers, teacher)
    read_numbers(mixer, chosen, teacher.num_layers)
    return specs, chosen


def check_segments(segment_tokens: int | None, *, seq_len_tokens: int) -> None:
    """Raise RecipeError unless whole segments make up a sequence."""
    if segment_tokens is not None and seq_len_tokens % segment_tokens:
        raise RecipeError(
            "distill.segment_tokens",
            got=f"{segment_tokens} for sequences of {seq_len_tokens} tokens",
            expected="a length that divides distill.seq_len_tokens",
            hint="As seq_len_tokens: 4096 with segment_tokens: 512.",
        )


def backends_of(teacher: Teacher, wishes: Iterable[tuple[str | None, str]]) -> list[Backend]:
    """What mixers of this teacher run with, each once.

    Args:
        teacher: on whose device, and in whose type, they run.
        wishes: operation and backend of mixers.

    Raises:
        DeviceError: a backend is unknown or cannot run here.
    """
    where: dict[str, Any] = {"device_type": teacher.device.type, "head_dim": teacher.geometry.head_dim}
    found = []
    for operation, backend in dict.fromkeys(wishes):
        # auto goes by each call's type.
        dtype = teacher.kernel_dtype if backend == "auto" else teacher.dtype
        found.append(backend_of(operation, backend, **where, dtype=dtype))
    return list(dict.fromkeys(found))


def _check_layers(layers: list[int] | None, teacher: Teacher) -> list[int]:
    num_layers, full = teacher.num_layers, teacher.replaceable_layers
    chosen = full if layers is None else sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_layers:
        raise RecipeError(
            "distill.layers",
            got=str(layers),
            expected=f"layers from 0 to {num_layers - 1}",
            hint="Leave it out for all.",
        )
    if not set(chosen) <= set(full):
        raise RecipeError(
            "distill.layers",
            got=str(layers),
            expected=f"layers with full attention: {', '.join(map(str, full))}",
            hint="Leave it out for all of them.",
        )
    return chosen


def start_mixers(teacher: Teacher, specs: list[Spec], numbers: list[int], seed: int, backend: str) -> dict[int, Any]:
    """Mixers by number, in the order in which their layers run, with the teacher's weights, computed by `backend`."""
    stack, mixers = decoder_layers(teacher.model), {}
    # Some start values are random; the caller's own random state stays as it is.
    with torch.random.fork_rng(devices=[]):
        for at, spec in enumerate(specs):
            # Anew for each kind, so that its mixers start as in a bank of their own.
            torch.manual_seed(seed)
            options = {key: value for key, value in spec.items() if key != "kind"}
            for number in (number for number in numbers if number // teacher.num_layers == at):
                index = number % teacher.num_layers
                layer: Any = stack[index]
                with whole_weights(layer):
                    attention = attention_of(teacher.model, index)
                    place = teacher.place(index)
                    mixer = mixer_from_teacher(
                        spec["kind"], teacher.geometry, index, attention, options, backend, place=place
                    )
                mixers[number] = mixer
    return dict(sorted(mixers.items(), key=lambda pair: pair[1].layer_idx))


def start_students(teacher: Teacher, bank: MixerBank, world: World, **options: Any) -> Students:
    """Students and optimizer of a bank, with the settings that its identity names; `options` as `Students`."""
    settings = {name: bank.identity[name] for name in ("learning_rate", "weight_decay", "max_grad_norm")}
    settings["segment_tokens"] = bank.identity.get("segment_tokens")
    fast = pays(teacher.device, num_parameters=bank.num_parameters, num_tokens=bank.num_tokens)
    # The calls of a family's own attention hold what no graph takes as an input.
    fast = fast and is_family(teacher.model.config)
    return Students(teacher, bank.mixers, **settings, fast=fast, world=world, **options)
