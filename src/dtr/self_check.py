"""Is the model that was loaded the one that we take it for? Named checks on a short text, before any work.

Mixers start from an attention's weights, layers run one by one, hybrids are made of the family's own class: all of this
rests on facts that a config, an adapter, remote code or a hook can change without an error anywhere. Each check tries
one such fact on this very model and refuses the model if it does not hold. A new fact is one more entry in `CHECKS`.

Shapes: B batch (1), T tokens, D hidden dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dtr.anatomy import (
    first_token_output,
    ignored_settings,
    missing_parts,
    non_finite_weights,
    scattered_weights,
    strange_projections,
)
from dtr.arch import (
    HYBRID_PREFIX,
    capture_attention,
    decoder_layers,
    is_classifier,
    is_family,
    make_runner,
    with_mixer,
)
from dtr.backbone.probe import narrow_window
from dtr.errors import ModelError
from dtr.hybrid.modeling import make_hybrid

NUM_TOKENS = 24
"""Length of the text that checks run on."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a model makes of a text."""

    logits: torch.Tensor
    """(B, T, vocabulary), or (B, classes)."""
    hidden_BTD: torch.Tensor
    """After the final norm."""
    firsts: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """By layer, input and output (B, 1, D) of the attention at the first token; of a teacher only."""


class Subject:
    """A model under check and what it computes; a pass is run once, and only if a check asks for it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # Before windows are narrowed.
        self.ignored_settings = ignored_settings(model.config)

    @property
    def is_hybrid(self) -> bool:
        return self.model.config.model_type.startswith(HYBRID_PREFIX)

    @cached_property
    def ids(self) -> torch.Tensor:
        """(B, T) tokens, none of them padding, which a classification head takes for the end of the text."""
        config = self.model.config
        limits = (NUM_TOKENS, getattr(config, "max_position_embeddings", None) or NUM_TOKENS)
        choice = torch.tensor([i for i in range(min(config.vocab_size, 4096)) if i != config.pad_token_id])
        chosen = torch.randint(len(choice), (1, max(2, min(limits))), generator=torch.Generator().manual_seed(0))
        return choice[chosen].to(self.model.device)

    @property
    def num_kept(self) -> int:
        """Tokens before the first one that `own_changed` sees changed."""
        return self.ids.shape[1] * 2 // 3

    @cached_property
    def own(self) -> Seen:
        """The model's own pass over `ids`."""
        firsts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(index: int, hidden_BTD: torch.Tensor, _rotary: Any, out_BTD: torch.Tensor) -> None:
            firsts[index] = hidden_BTD[:, :1], out_BTD[:, :1]

        with capture_attention(self.model, range(0 if self.is_hybrid else len(decoder_layers(self.model))), keep):
            return run_model(self.model, self.ids, firsts)

    @cached_property
    def own_changed(self) -> Seen:
        """Its pass over other tokens from number `num_kept` on: those before them in reverse order."""
        changed = self.ids.clone()
        changed[:, self.num_kept :] = self.ids.flip(1)[:, : self.ids.shape[1] - self.num_kept]
        return run_model(self.model, changed)

    def differs(self, got: torch.Tensor, expected: torch.Tensor, *, rounding: float = 0.0) -> str:
        """How far two results are apart, where that is more than a few last digits, or a measured share of the size."""
        got, expected = got.float(), expected.to(got.device).float()
        size, far = float(expected.abs().max()), float((got - expected).abs().max())
        tolerance = max(1e-4, 2 * torch.finfo(self.model.dtype).eps, rounding)
        # NaN is no distance at all.
        return "" if far <= tolerance * max(size, 1e-12) else f"up to {far:.2g} apart, of values up to {size:.2g}"


def run_model(model: Any, ids: torch.Tensor, firsts: dict | None = None) -> Seen:
    """One pass without a cache."""
    hidden: list[torch.Tensor] = []
    handle = model.model.register_forward_hook(lambda _module, _args, out: hidden.append(out[0]))
    try:
        logits = model(ids, use_cache=False).logits
    finally:
        handle.remove()
    return Seen(logits=logits, hidden_BTD=hidden[0], firsts=firsts or {})


@dataclass(frozen=True, kw_only=True)
class Check:
    """One fact: how it is tried, and what to say where it does not hold."""

    name: str
    find: Callable[[Subject], str]
    """What was found instead; nothing where the fact holds."""
    expected: str
    hint: str
    is_for_hybrids: bool = True
    """Whether it holds of saved hybrids too, which are evaluated and never distilled."""


@torch.no_grad()
def self_check(model: Any, *, source: str = "in memory") -> str:
    """Try every check, in their order; returns a line for the log.

    Args:
        model: a causal language model or classifier in evaluation mode, or a hybrid.
        source: where it is from, for the message.

    Raises:
        ModelError: the first check that fails, by name, with what was found and what to do.
    """
    if not is_family(model.config):
        from dtr.backbone_checks import backbone_check

        return backbone_check(model, source=source)
    began, subject = time.monotonic(), Subject(model)
    checks = [check for check in CHECKS if check.is_for_hybrids or not subject.is_hybrid]
    with narrow_window(model.config):
        for check in checks:
            if found := _found(check, subject):
                raise ModelError(
                    f"teacher.source {source}, self-check '{check.name}'",
                    got=found,
                    expected=check.expected,
                    hint=check.hint,
                )
    return f"self-check of {source}: {', '.join(check.name for check in checks)} ({time.monotonic() - began:.1f} s)"


def _found(check: Check, subject: Subject) -> str:
    try:
        return check.find(subject)
    except (ModelError, torch.OutOfMemoryError, MemoryError):
        raise
    # Code that is not ours runs here, and whatever it raises, the fact has not been shown to hold.
    except Exception as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _first_tokens(subject: Subject) -> str:
    for index, (hidden, out) in subject.own.firsts.items():
        attention = decoder_layers(subject.model)[index].self_attn
        if found := subject.differs(first_token_output(subject.model.config, attention, hidden), out):
            return f"another output of layer {index} than its weights give, {found}"
    return ""


def _finite_logits(subject: Subject) -> str:
    return "" if subject.own.logits.isfinite().all() else f"logits that are no numbers in {subject.model.dtype}"


def _causality(subject: Subject) -> str:
    own, changed, kept = subject.own, subject.own_changed, subject.num_kept
    found = subject.differs(changed.hidden_BTD[:, :kept], own.hidden_BTD[:, :kept])
    if not found and not is_classifier(subject.model):
        found = subject.differs(changed.logits[:, :kept], own.logits[:, :kept])
    return found and f"other results for earlier tokens after a change of later ones, {found}"


def _layer_by_layer(subject: Subject) -> str:
    model, runner = subject.model, make_runner(subject.model)
    batch = runner.prepare(subject.ids)
    hidden = batch.hidden_BTD
    for index, layer in enumerate(runner.layers):
        hidden = runner.run_layer(index, layer, hidden, batch)
    if found := subject.differs(model.model.norm(hidden), subject.own.hidden_BTD):
        return f"other hidden states, {found}"
    logits = runner.logits(hidden[:, -1] if is_classifier(model) else hidden[0])
    found = subject.differs(logits.reshape(subject.own.logits.shape), subject.own.logits)
    return found and f"other logits, {found}"


def _zero_swap(subject: Subject) -> str:
    hybrid, own = make_hybrid(subject.model, {}, {}, share_modules=True), subject.own
    if not torch.equal(run_model(hybrid, subject.ids).logits, own.logits):
        return "other logits from a hybrid without linear layers"
    with torch.device("meta"):
        expected = {name: weight.shape for name, weight in type(hybrid)(hybrid.config).state_dict().items()}
    got = {name: weight.shape for name, weight in hybrid.state_dict().items()}
    if apart := [name for name in {**expected, **got} if got.get(name) != expected.get(name)]:
        return f"{len(apart)} weights that its class has not, or in another shape ({', '.join(apart[:3])})"
    return ""


def _swap(subject: Subject) -> str:
    runner = make_runner(subject.model)
    batch = runner.prepare(subject.ids)
    for index, layer in enumerate(runner.layers):
        try:
            runner.run_layer(index, with_mixer(layer, _StandIn()), batch.hidden_BTD, batch)
        except _Reached:
            continue
        return f"layer {index} running its own attention after that was replaced"
    return ""


class _Reached(Exception):
    """Raised where an attention would run, so that the rest of the layer need not."""


class _StandIn(nn.Module):
    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        raise _Reached


def _cache(subject: Subject) -> str:
    model, ids, kept = subject.model, subject.ids, subject.num_kept
    if is_classifier(model):
        return ""
    with _attentions(model) as whole:
        model(ids, use_cache=False)
    # Each layer is given what it was given in one pass: roundings of one layer say nothing of the next, so that a fault
    # of a single state shows in few bits too.
    with _attentions(model, [hidden[:, :kept] for hidden, _ in whole]) as start:
        cache = model(ids[:, :kept], use_cache=True).past_key_values
    with _attentions(model, [hidden[:, kept:] for hidden, _ in whole]) as rest:
        model(ids[:, kept:], past_key_values=cache, use_cache=True)
    moved: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index, (_, out) in enumerate(whole):
        for rows, part in ((slice(None, kept), start), (slice(kept, None), rest)):
            if not subject.differs(part[index][1], out[:, rows]):
                continue
            # In pieces, other kernels run: as far apart as they may be, a rounding of the input moves the output too.
            if not moved:
                with _attentions(model, [_moved_by_a_rounding(hidden) for hidden, _ in whole]) as moved:
                    model(ids, use_cache=False)
            far = (moved[index][1] - out)[:, rows].float().abs().max() / out[:, rows].float().abs().max()
            if found := subject.differs(part[index][1], out[:, rows], rounding=2 * float(far)):
                return f"another output of layer {index} with a cache than without, {found}"
    return ""


@contextmanager
def _attentions(
    model: Any, inputs: list[torch.Tensor] | None = None
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """While open, gather what every attention or mixer is given, or `inputs`, and what it makes of it (B, T, D)."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def replace(index: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs if inputs is None else kwargs | {"hidden_states": inputs[index]}

        return hook

    def keep(_module: nn.Module, _args: Any, kwargs: dict[str, Any], out: Any) -> None:
        found.append((kwargs["hidden_states"], out[0]))

    handles = []
    for index, layer in enumerate(decoder_layers(model)):
        attention: Any = layer.self_attn
        handles.append(attention.register_forward_pre_hook(replace(index), with_kwargs=True))
        handles.append(attention.register_forward_hook(keep, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _moved_by_a_rounding(x: torch.Tensor) -> torch.Tensor:
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return x * (1 + torch.finfo(x.dtype).eps * signs.to(x))


WHOLE = "Load the model whole onto one device, without device_map or offloading."
PLAIN = "Merge adapters first (merge_and_unload), or take weights that are not quantised; save the model and give that."
OWN_CODE = "A config or remote code changes what its family computes, for which there is no way here."

CHECKS = (
    Check(
        name="parts",
        find=lambda subject: missing_parts(subject.model),
        expected="embeddings, layers with attention, final norm and head where the family has them",
        hint="Give the plain model, not a wrapper of it (PeftModel, torch.compile, a body without its head).",
    ),
    Check(
        name="weights in place",
        find=lambda subject: scattered_weights(subject.model),
        expected="all weights in memory of one device",
        hint=WHOLE,
    ),
    Check(
        name="finite weights",
        find=lambda subject: non_finite_weights(subject.model),
        expected="numbers in every weight",
        hint="The checkpoint is damaged, or its training failed: take another.",
    ),
    Check(
        name="settings",
        find=lambda subject: subject.ignored_settings,
        expected="settings that this family heeds",
        hint="Take it out of config.json (or set it to null), if the model was trained without it.",
    ),
    Check(
        name="plain projections",
        find=lambda subject: strange_projections(subject.model),
        expected="plain linear projections q, k, v and o in every layer",
        hint=PLAIN,
        is_for_hybrids=False,
    ),
    Check(name="finite logits", find=_finite_logits, expected="finite logits", hint="Try dtype float32 or bfloat16."),
    Check(
        name="causality",
        find=_causality,
        expected="a causal model",
        hint="Models that see later tokens (is_causal false in config.json) are not supported.",
    ),
    Check(
        name="first token",
        find=_first_tokens,
        expected="the first token's own value, as of softmax over one key",
        hint=f"{PLAIN} Attention with sinks, or with hooks of its own, is not supported.",
        is_for_hybrids=False,
    ),
    Check(
        name="layer by layer",
        find=_layer_by_layer,
        expected="the model's own results from running its layers one by one",
        hint=OWN_CODE,
    ),
    Check(
        name="zero swap",
        find=_zero_swap,
        expected="the teacher itself, bit for bit and weight for weight",
        hint=OWN_CODE,
        is_for_hybrids=False,
    ),
    Check(
        name="swap",
        find=_swap,
        expected="what was put in its place",
        hint="Something holds on to the layer's own forward pass, as hooks do: load the model without them.",
        is_for_hybrids=False,
    ),
    Check(
        name="cache",
        find=_cache,
        expected="the same outputs with and without a cache",
        hint=OWN_CODE,
    ),
)
