"""What a server must know of a hybrid before it reads weights: what it cannot serve, in one line. No vllm here."""

from __future__ import annotations

from typing import Any

import torch

from dtr.arch import HYBRID_PREFIX, HeadGeometry, read_geometry, require_family
from dtr.errors import ModelError
from dtr.mixers import Mixer, make_mixer

GENERATE = "Use model.generate, which takes every mixer and every kind of positions."


def mixer_of(config: Any, index: int, geometry: HeadGeometry | None = None) -> Mixer:
    """An uninitialised mixer as `config.mixers` names it for a layer."""
    options = {key: value for key, value in config.mixers[index].items() if key != "kind"}
    return make_mixer(config.mixers[index]["kind"], geometry or read_geometry(config), index, options)


def is_window(spec: dict[str, Any] | None) -> bool:
    """Whether a layer is attention over a window, which a server's own attention computes."""
    return spec is not None and spec["kind"] == "sliding_window"


def has_state(spec: dict[str, Any] | None) -> bool:
    """Whether an entry of `config.mixers` is a mixer that keeps a state instead of keys and values."""
    return spec is not None and not is_window(spec)


def check_servable(config: Any, *, num_ranks: int = 1) -> None:
    """Raise ModelError unless every layer of the hybrid can be served on so many devices that share its heads."""
    mixers = getattr(config, "mixers", None)
    if not config.model_type.startswith(HYBRID_PREFIX) or not mixers:
        raise ModelError(
            "config.json",
            got=f"model type '{config.model_type}' without linear layers of ours",
            expected="a hybrid that dtr has saved",
            hint="Other models are served by vLLM as they are.",
        )
    require_family(config, "config.json", hint=GENERATE)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ModelError(
            "rope_parameters.rope_type",
            got=f"'{rope}', whose angles change with the length of the text",
            expected="angles that depend on the position alone",
            hint=GENERATE,
        )
    for index, spec in enumerate(mixers):
        if spec is not None:
            _check_layer(config, index, num_ranks)


def _check_layer(config: Any, index: int, num_ranks: int) -> None:
    spec = config.mixers[index]
    with torch.device("meta"):
        mixer = mixer_of(config, index)
    where = f"layer {index} ({spec['kind']})"
    if is_window(spec):
        if mixer.sinks:  # type: ignore[attr-defined]
            raise ModelError(
                where,
                got=f"a window with sinks={mixer.sinks}",  # type: ignore[attr-defined]
                expected="sinks: 0, as the server's own attention over a window has none",
                hint=GENERATE,
            )
        return
    if not mixer.is_pure_linear:
        raise ModelError(
            where, got="attention over a window beside the state", expected="a state of fixed size alone", hint=GENERATE
        )
    num_heads = getattr(mixer, "num_heads", None)
    if num_ranks > 1 and (num_heads is None or num_heads % num_ranks):
        why = "a mixer that is not cut by heads" if num_heads is None else f"{num_heads} heads"
        raise ModelError(
            where,
            got=f"{why} for {num_ranks} devices",
            expected="a number of heads that they can share",
            hint="Take another --tensor-parallel-size.",
        )
