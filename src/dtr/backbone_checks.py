"""Checks of a model that is known by a probe: is it what the probe took it for, and do hybrids of it hold together?

As in `dtr.self_check`, each check tries one fact on this very model, and a model that fails one is refused.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import cached_property
from inspect import signature
from typing import Any

import torch

from dtr.anatomy import non_finite_weights, scattered_weights
from dtr.arch import HYBRID_PREFIX, attention_of, decoder_layers, make_runner
from dtr.backbone.probe import (
    Attended,
    backbone_of,
    first_of,
    narrow_window,
    probe_ids,
    softmax_attention,
    watch_attention,
)
from dtr.errors import ModelError
from dtr.hybrid.modeling import make_hybrid
from dtr.mixers import mixer_from_teacher

KIND = "gated_deltanet"
"""Kind of the untrained stand-ins that hybrids are tried with."""

OPTIONS = {"exact_first": True, "head_copies": 2, "quadratic": True}


class Subject:
    """A model under check and what it computes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.ids = probe_ids(model)
        self.num_kept = self.ids.shape[1] * 2 // 3

    @cached_property
    def logits(self) -> torch.Tensor:
        return self.run(self.model, self.ids)

    @staticmethod
    def run(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        return model(ids, use_cache=False, **options).logits

    @cached_property
    def hybrid(self) -> Any:
        """A hybrid with untrained stand-ins in all full layers, or the model itself if it is one."""
        model = self.model
        if model.config.model_type.startswith(HYBRID_PREFIX):
            return model
        backbone, mixers = backbone_of(model), {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for index in backbone.full_layers:
                place = backbone.places[index]
                assert place is not None
                attention, geometry = attention_of(model, index), backbone.head_geometry()
                made = mixer_from_teacher(KIND, geometry, index, attention, OPTIONS, place=place)
                mixers[index] = made.to(model.dtype).requires_grad_(False).eval()
        specs = {index: {"kind": KIND, **OPTIONS} for index in mixers}
        return make_hybrid(model, mixers, specs, share_modules=True)

    def differs(self, got: torch.Tensor, expected: torch.Tensor, *, times: float = 1.0) -> str:
        """How far two results are apart, where that is more than rounding."""
        got, expected = got.float(), expected.float()
        size, far = float(expected.abs().max()), float((got - expected).abs().max())
        tolerance = times * max(1e-4, 2 * torch.finfo(self.model.dtype).eps)
        return "" if far <= tolerance * max(size, 1e-12) else f"up to {far:.2g} apart, of values up to {size:.2g}"


def _finite(subject: Subject) -> str:
    return "" if subject.logits.isfinite().all() else f"logits that are no numbers in {subject.model.dtype}"


def _attention(subject: Subject) -> str:
    calls: list[Attended] = []
    model = subject.model
    with watch_attention(calls):
        subject.run(model, subject.ids)
    full = {attention_of(model, index): index for index in backbone_of(model).full_layers}
    found = {full[call.module]: call for call in calls if call.module in full}
    if len(found) < len(full):
        return f"attention in {len(found)} of {len(full)} full layers"
    for index, call in found.items():
        expected = softmax_attention(call)
        if expected.numel() != call.out.numel():
            return f"an output of {tuple(call.out.shape)} from attention of layer {index}"
        if apart := subject.differs(call.out.reshape(-1), expected.reshape(-1)):
            return f"another output of layer {index} than softmax attention gives, {apart}"
    return ""


def _causality(subject: Subject) -> str:
    changed, kept = subject.ids.clone(), subject.num_kept
    changed[:, kept:] = subject.ids.flip(1)[:, : subject.ids.shape[1] - kept]
    apart = subject.differs(subject.run(subject.model, changed)[:, :kept], subject.logits[:, :kept])
    return apart and f"other results for earlier tokens after a change of later ones, {apart}"


def _layer_by_layer(subject: Subject) -> str:
    """With another output of the first layer, so that arguments that depend on it show."""
    runner, model = make_runner(subject.model), subject.model
    noise = torch.Generator().manual_seed(1)
    shift: list[torch.Tensor] = []

    def move(_module: Any, _args: Any, output: Any) -> Any:
        hidden = first_of(output)
        if not shift:
            shift.append(torch.randn(hidden.shape, generator=noise).to(hidden) * hidden.std())
        moved = hidden + shift[0]
        return moved if hidden is output else (moved, *output[1:])

    handle = decoder_layers(model)[0].register_forward_hook(move)
    try:
        expected = subject.run(model, subject.ids)
        batch = runner.prepare(subject.ids)
        hidden = batch.hidden_BTD
        for index, layer in enumerate(runner.layers):
            hidden = runner.run_layer(index, layer, hidden, batch)
    finally:
        handle.remove()
    apart = subject.differs(runner.logits(hidden[0]), expected[0])
    return apart and f"other logits, {apart}"


def _zero_swap(subject: Subject) -> str:
    hybrid = make_hybrid(subject.model, {}, {}, share_modules=True)
    if not torch.equal(subject.run(hybrid, subject.ids), subject.logits):
        return "other logits from a hybrid without linear layers"
    config = copy.deepcopy(subject.hybrid.config)
    with torch.device("meta"):
        expected = {name: weight.shape for name, weight in type(hybrid)(config).state_dict().items()}
    got = {name: weight.shape for name, weight in subject.hybrid.state_dict().items()}
    if apart := [name for name in {**expected, **got} if got.get(name) != expected.get(name)]:
        return f"{len(apart)} weights that its class has not, or in another shape ({', '.join(apart[:3])})"
    return ""


def _swap(subject: Subject) -> str:
    logits = subject.run(subject.hybrid, subject.ids)
    if not logits.isfinite().all():
        return "logits that are no numbers"
    return (
        "" if subject.differs(logits, subject.logits) else "the logits of the model with all its full layers replaced"
    )


def _cached(subject: Subject, model: Any, expected: torch.Tensor) -> str:
    kept = subject.num_kept
    start = model(subject.ids[:, :kept], use_cache=True)
    parts, cache = [start.logits], start.past_key_values
    for at in range(kept, subject.ids.shape[1]):
        parts.append(model(subject.ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    apart = subject.differs(torch.cat(parts, 1), expected, times=10)
    return apart and f"other logits with a cache than without, {apart}"


def _own_cache(subject: Subject) -> str:
    return _cached(subject, subject.model, subject.logits)


def _hybrid_cache(subject: Subject) -> str:
    return _cached(subject, subject.hybrid, subject.run(subject.hybrid, subject.ids))


def _padding(subject: Subject) -> str:
    hybrid, ids, num = subject.hybrid, subject.ids, 3
    padded = torch.cat([ids[:, :num], ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :num] = 0
    options = {"attention_mask": mask}
    if "position_ids" in signature(subject.model.forward).parameters:
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    got = subject.run(hybrid, padded, **options)[:, num:]
    if not (apart := subject.differs(got, subject.run(hybrid, ids), times=10)):
        return ""
    # Families differ in what padding does to their other layers.
    if subject.differs(subject.run(subject.model, padded, **options)[:, num:], subject.logits, times=10):
        return ""
    return f"other logits of a text after padding, {apart}, where the model itself gives the same"


Check = tuple[str, Callable[[Subject], str], str, bool]
CHECKS: tuple[Check, ...] = (
    ("weights in place", lambda s: scattered_weights(s.model), "all weights in memory of one device", True),
    ("finite weights", lambda s: non_finite_weights(s.model), "numbers in all weights", True),
    ("finite logits", _finite, "numbers", True),
    ("causality", _causality, "a causal model", True),
    ("attention", _attention, "softmax attention that can be worked out from what its function is given", False),
    ("cache", _own_cache, "the same logits with and without a cache", True),
    ("layer by layer", _layer_by_layer, "the model's own results from running its layers one by one", True),
    ("zero swap", _zero_swap, "the teacher itself, bit for bit and weight for weight", False),
    ("swap", _swap, "another model with its full layers replaced", False),
    ("hybrid cache", _hybrid_cache, "the same logits of a hybrid with and without a cache", True),
    ("padding", _padding, "the same logits of a hybrid for a text with padding before it", True),
)
"""Name, what was found instead, what was expected, and whether it is tried on hybrids too."""


@torch.no_grad()
def backbone_check(model: Any, *, source: str) -> str:
    """As `dtr.self_check.self_check`, for a model that is known by a probe."""
    began = time.monotonic()
    is_hybrid = model.config.model_type.startswith(HYBRID_PREFIX)
    try:
        with torch.no_grad():
            subject = Subject(model)
            backbone_of(model)
    except ModelError:
        raise
    except Exception as error:
        raise _refused(
            source, "probe", _told(error), "attention that asks transformers' attention interface"
        ) from error
    checks = [check for check in CHECKS if check[3] or not is_hybrid]
    with narrow_window(model.config.get_text_config(decoder=True)):
        for name, find, expected, _ in checks:
            try:
                found = find(subject)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            # Code that is not ours runs here, and whatever it raises, the fact has not been shown to hold.
            except Exception as error:
                found = _told(error)
            if found:
                raise _refused(source, name, found, expected)
    return f"self-check of {source}: {', '.join(check[0] for check in checks)} ({time.monotonic() - began:.1f} s)"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _refused(source: str, name: str, found: str, expected: str) -> ModelError:
    return ModelError(
        f"teacher.source {source}, self-check '{name}'",
        got=found,
        expected=expected,
        hint="docs/models.md lists the model types that work, and why others do not.",
    )
