"""The linear mixers by name, and how to make one from a teacher's attention."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

from dtr.arch import BackboneGeometry, HeadGeometry
from dtr.errors import RecipeError, did_you_mean, shown
from dtr.mixers.base import Mixer, set_backend
from dtr.mixers.decaying import DecayingMixer
from dtr.mixers.gated_deltanet import GatedDeltaNet
from dtr.mixers.gated_linear_attention import GatedLinearAttention
from dtr.mixers.hedgehog import Hedgehog
from dtr.mixers.jet_block import JetBlock
from dtr.mixers.kimi_delta_attention import KimiDeltaAttention
from dtr.mixers.linear import LinearMixer
from dtr.mixers.mamba2 import Mamba2
from dtr.mixers.qwen35_gated_deltanet import Qwen35GatedDeltaNet
from dtr.mixers.retention import Retention
from dtr.mixers.sliding_window import SlidingWindow
from dtr.mixers.stand_in import core_class, make_stand_in
from dtr.registry import Registry

MIXERS: Registry[type[Mixer]] = Registry("mixer")
MIXERS.register("gated_deltanet")(GatedDeltaNet)
MIXERS.register("gated_linear_attention")(GatedLinearAttention)
MIXERS.register("hedgehog")(Hedgehog)
MIXERS.register("jet_block")(JetBlock)
MIXERS.register("kimi_delta_attention")(KimiDeltaAttention)
MIXERS.register("mamba2")(Mamba2)
MIXERS.register("qwen35_gated_deltanet")(Qwen35GatedDeltaNet)
MIXERS.register("retention")(Retention)
MIXERS.register("sliding_window")(SlidingWindow)


def make_mixer(kind: str, geometry: HeadGeometry, layer_idx: int, options: dict[str, Any] | None = None) -> Mixer:
    """An uninitialised mixer by name.

    Raises:
        RecipeError: unknown kind, or an option that this kind does not have.
    """
    check_options(kind, options or {})
    if isinstance(geometry, BackboneGeometry):
        kind_of_core: Any = _decaying(kind)
        return core_class(kind_of_core)(geometry, layer_idx, **(options or {}))
    return MIXERS[kind](geometry, layer_idx, **(options or {}))


def misfit(kind: str, geometry: HeadGeometry) -> str:
    """What of the attention a kind has no place for, so that it cannot stand in; empty where it can."""
    found = MIXERS[kind]
    if isinstance(geometry, BackboneGeometry):
        if not issubclass(found, DecayingMixer):
            return "projections of its own family's form"
        if found.mix_tokens is not LinearMixer.mix_tokens:
            # A core is handed heads after their rotary positions, where no convolution belongs.
            return "queries, keys and values that its own module makes"
    return found.misfit(geometry)


def stand_in(
    kind: str, attention: Any, geometry: BackboneGeometry, layer_idx: int, place: str, options: dict[str, Any] | None
) -> Any:
    """An attention module turned into a mixer of this kind (`make_stand_in`), with its start values."""
    made = make_stand_in(attention, _decaying(kind), geometry, layer_idx, place, **(options or {}))
    if not made.core.gate_proj.weight.is_meta:
        made.core.start()
    return made


def _decaying(kind: str) -> type[DecayingMixer]:
    found = MIXERS[kind]
    assert issubclass(found, DecayingMixer), f"{kind} has no core"
    return found


def check_options(kind: str, options: dict[str, Any]) -> None:
    """Whether this kind of mixer has such options; needs no teacher, so that mistakes can be told before one is loaded.

    Raises:
        RecipeError: unknown kind, or an option that it does not have.
    """
    known = _options_with_types(MIXERS[kind])
    for name, value in options.items():
        if name not in known:
            raise RecipeError(
                "mixer.options", got=f"'{name}'", expected=f"an option of {kind}", hint=did_you_mean(name, known)
            )
        expected = _VALUES.get(known[name], "a number, true or false")
        if not _fits(value, known[name]):
            raise RecipeError(f"mixer.options.{name}", got=shown(value), expected=expected)


MAX_OPTION = 2**31 - 1
_VALUES = {
    "bool": "true or false",
    "int": f"a whole number from 0 to {MAX_OPTION:,}",
    "float": f"a number above 0, at most {MAX_OPTION:,}",
}
"""By the type that a mixer's signature names, what such an option may be."""


def _fits(value: Any, kind: str) -> bool:
    """Whether an option of this type may have this value; true is no number, though Python counts with it."""
    if kind == "bool" or isinstance(value, bool):
        return isinstance(value, bool) and kind not in ("int", "float")
    if kind == "int":
        return isinstance(value, int) and 0 <= value <= MAX_OPTION
    return isinstance(value, int | float) and (kind != "float" or 0 < value <= MAX_OPTION)


def options_of(mixer: type[Mixer]) -> list[str]:
    """Names of the options that a mixer and the classes it is built on take."""
    return sorted(_options_with_types(mixer))


def _options_with_types(mixer: type[Mixer]) -> dict[str, str]:
    """Names of those options, each with the type that the signature names."""
    classes = [c for c in reversed(mixer.__mro__) if issubclass(c, Mixer) and "__init__" in vars(c)]
    parameters = [p for c in classes for p in inspect.signature(c.__init__).parameters.values()]
    kinds = {p.name: getattr(p.annotation, "__name__", p.annotation) for p in parameters if p.kind is p.KEYWORD_ONLY}
    return {name: kind.removesuffix(" | None") for name, kind in kinds.items()}


def options_of_new(kind: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Options of a mixer that is made today: what was asked for, and beside it what a new one of this kind gets.

    Raises:
        RecipeError: as `make_mixer`, but before there is a teacher.
    """
    check_options(kind, options or {})
    return {**MIXERS[kind].options_when_new, **(options or {})}


def check_mixer(kind: str, geometry: HeadGeometry, options: dict[str, Any] | None = None) -> None:
    """Whether a kind with these options can stand in for such attention; costs nothing, so that it can come first.

    Raises:
        RecipeError: it cannot, with the kinds that can; or as `make_mixer`.
    """
    check_options(kind, options or {})
    if why := misfit(kind, geometry):
        fitting = ", ".join(name for name in MIXERS if not misfit(name, geometry))
        raise RecipeError(
            "mixer.kind",
            got=f"{kind} for a teacher whose attention has {why}, for which that form has no place",
            expected="a mixer that can stand in for this attention",
            hint=f"Take one of {fitting}.",
        )
    with torch.device("meta"):
        make_mixer(kind, geometry, 0, options)


def mixer_from_teacher(
    kind: str,
    geometry: HeadGeometry,
    layer_idx: int,
    attention: Any,
    options: dict[str, Any] | None = None,
    backend: str = "auto",
    place: str = "self_attn",
) -> Mixer:
    """A float32 mixer that starts from the weights of the teacher's attention module, on its device.

    Raises:
        RecipeError: as `make_mixer`.
        DeviceError: the backend is unknown or cannot run there.
    """
    if isinstance(geometry, BackboneGeometry):
        own = copy.deepcopy(attention).requires_grad_(True)
        device = next(own.parameters()).device
        mixer = stand_in(kind, own, geometry, layer_idx, place, options).float().to(device)
    else:
        mixer = make_mixer(kind, geometry, layer_idx, options).float()
        mixer.start_from(attention)
        mixer = mixer.to(attention.q_proj.weight.device)
    set_backend(mixer, backend)
    return mixer
