"""The two models of `dtr bench generate`: a teacher and a hybrid of the same shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dtr.arch import HYBRID_PREFIX, decoder_layers, model_class, require_family
from dtr.errors import RecipeError
from dtr.hybrid.modeling import make_hybrid
from dtr.mixers import mixer_from_teacher, options_of_new
from dtr.pipeline.tryout import check_weights
from dtr.teacher import as_teacher, load_model


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """What is timed side by side."""

    teacher: Any
    hybrid: Any
    note: str
    """Whose weights are real; speed does not depend on them."""


def load_subjects(
    source: str,
    *,
    num_linear: int | None,
    mixer: str,
    keep: list[int] | None,
    device: str,
    dtype: str,
    options: dict[str, Any] | None = None,
) -> Subjects:
    """Teacher and hybrid from a saved hybrid, or from a teacher and a number of linear layers.

    Args:
        source: saved hybrid, or teacher (hub name, folder, GGUF file, packaged model).
        num_linear: layers to make linear, untrained; by default 9 of 10. Not for a saved hybrid.
        mixer: kind of those layers.
        options: that mixer's.
        keep: layers that keep their attention; by default spread evenly.
        device: as for `load_teacher`; `dtype` likewise.

    Raises:
        RecipeError: numbers of layers that do not go together.
    """
    # Here, as mistakes are told before a model is loaded.
    options = options_of_new(mixer, options)
    model, _ = load_model(source, device=device, dtype=dtype)
    config = model.config
    require_family(config, "dtr bench generate", hint="Other models and their hybrids run by model.generate alone.")
    if config.model_type.startswith(HYBRID_PREFIX):
        if num_linear is not None or keep is not None:
            raise RecipeError(
                "--num-linear", got="a saved hybrid", expected="none, as its layers are fixed", hint="Leave it out."
            )
        return Subjects(
            teacher=_plain_twin(model), hybrid=model, note="saved hybrid; teacher of its shape, random weights"
        )
    kept = _kept_layers(config.num_hidden_layers, num_linear, keep)
    teacher = as_teacher(model, None, source=source)
    linear = [i for i in range(teacher.num_layers) if i not in kept]
    check_weights(teacher, [{"kind": mixer, **options}], len(linear), bytes_each=4)
    attention = [layer.self_attn for layer in decoder_layers(model)]
    mixers = {i: mixer_from_teacher(mixer, teacher.geometry, i, attention[i], options) for i in linear}
    for made in mixers.values():
        made.to(model.dtype).eval().requires_grad_(False)
    specs = {i: {"kind": mixer, **options} for i in linear}
    hybrid = make_hybrid(model, dict(mixers), specs, share_modules=True)
    return Subjects(teacher=model, hybrid=hybrid, note="linear layers untrained")


def _kept_layers(num_layers: int, num_linear: int | None, keep: list[int] | None) -> list[int]:
    if keep is None:
        num_linear = num_layers * 9 // 10 if num_linear is None else num_linear
        num_kept = num_layers - num_linear
        if not 0 <= num_kept < num_layers:
            raise RecipeError("--num-linear", got=str(num_linear), expected=f"1 to {num_layers}")
        # The middles of equal stretches.
        return [(2 * i + 1) * num_layers // (2 * num_kept) for i in range(num_kept)]
    if num_linear not in (None, num_layers - len(keep)) or any(not 0 <= i < num_layers for i in keep):
        raise RecipeError(
            "--keep",
            got=f"layers {', '.join(map(str, keep))}",
            expected=f"layers of 0 to {num_layers - 1} that agree with --num-linear",
        )
    return keep


def _plain_twin(hybrid: Any) -> Any:
    """A model of the hybrid's family and shape with attention in every layer and random weights."""
    family = hybrid.config.model_type.removeprefix(HYBRID_PREFIX)
    apart = ("model_type", "mixers", "auto_map", "architectures")
    fields = {key: value for key, value in hybrid.config.to_dict().items() if key not in apart}
    with torch.device(hybrid.device):
        twin = model_class(family, "ForCausalLM")(model_class(family, "Config")(**fields))
    return twin.to(hybrid.dtype).eval().requires_grad_(False)
