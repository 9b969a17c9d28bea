"""What a model's attention is made of, learned from one forward pass instead of from its family's name.

Most families of transformers hand queries, keys and values, after projections, norms and rotary positions, to a
function that they ask `ALL_ATTENTION_FUNCTIONS.get_interface` for. Watching those calls tells where attention sits and
what shape it has; the family's own code for all that surrounds it stays in use.

Shapes: B batch, T tokens, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from dtr.arch import BackboneGeometry
from dtr.errors import ModelError

NUM_TOKENS = 24
"""Length of the text of a probe."""
WINDOW_TOKENS = 8
"""Sliding windows are narrowed to this meanwhile, so that the text is longer than they are."""


class Call(NamedTuple):
    """The arguments that a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states among them."""
        return self.kwargs["hidden_states"] if "hidden_states" in self.kwargs else self.args[0]

    def replaced(self, hidden: torch.Tensor) -> Call:
        """The same call with other hidden states."""
        if "hidden_states" in self.kwargs:
            return Call(self.args, {**self.kwargs, "hidden_states": hidden})
        return Call((hidden, *self.args[1:]), self.kwargs)


@dataclass(kw_only=True)
class Attended:
    """One call of an attention function: what it was given and what it gave (B, T, H, V)."""

    module: nn.Module
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    options: dict[str, Any]
    out: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Where a model's layers and attentions are; plain values, which a hybrid's config keeps."""

    layers: str
    """Path of the list of layers in the model."""
    places: list[str | None]
    """By layer, the path in it of the attention that a mixer can stand in for; None where there is none."""
    kinds: list[str]
    """By layer: full_attention, another kind of attention, or other."""
    num_outputs: list[int]
    """By layer, how many values its forward gives as a tuple; 0 for hidden states alone."""
    geometry: dict[str, Any] = field(default_factory=dict)
    """Fields of the `BackboneGeometry` that all full layers share."""

    @property
    def full_layers(self) -> list[int]:
        """Layers that can be distilled and searched."""
        return [index for index, place in enumerate(self.places) if place is not None]

    def head_geometry(self) -> BackboneGeometry:
        return BackboneGeometry(**self.geometry)

    def describe(self) -> str:
        """A line for logs: how many layers of each kind, and what a full one is like."""
        g, counts = self.head_geometry(), {kind: self.kinds.count(kind) for kind in dict.fromkeys(self.kinds)}
        kinds = ", ".join(f"{number} {kind}" for kind, number in counts.items())
        place = self.places[self.full_layers[0]]
        heads = f"{g.num_heads} query and {g.num_kv_heads} key/value heads of {g.head_dim}"
        return f"{kinds}; attention at {self.layers}.*.{place}, {heads}, values of {g.value_dim}"


def backbone_of(model: Any) -> Backbone:
    """What `model` is made of, from its config if it is a hybrid, or else from a probe that is kept on the model.

    Raises:
        ModelError: no attention was found that a mixer could stand in for, with the reason.
    """
    kept = getattr(model.config, "backbone", None)
    if kept:
        return Backbone(**kept)
    if "_dtr_backbone" not in vars(model):
        vars(model)["_dtr_backbone"] = _look(model)
    return vars(model)["_dtr_backbone"]


def probe_ids(model: Any) -> torch.Tensor:
    """(1, T) tokens of the vocabulary, none of them one that may have a meaning of its own."""
    config = model.config.get_text_config(decoder=True)
    special = {getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    choice = torch.tensor([i for i in range(min(config.vocab_size, 4096)) if i not in special])
    length = max(2, min(NUM_TOKENS, getattr(config, "max_position_embeddings", None) or NUM_TOKENS))
    chosen = torch.randint(len(choice), (1, length), generator=torch.Generator().manual_seed(0))
    return choice[chosen].to(model.device)


@contextmanager
def watch_attention(calls: list[Attended]) -> Iterator[None]:
    """While open, whatever an attention function is asked for is added to `calls`."""
    original = AttentionInterface.get_interface

    def watched(self: Any, name: str, default: Any) -> Any:
        function = original(self, name, default)

        def call(module: Any, q: Any, k: Any, v: Any, attention_mask: Any = None, *args: Any, **options: Any) -> Any:
            result = function(module, q, k, v, attention_mask, *args, **options)
            seen = Attended(module=module, q=q, k=k, v=v, mask=attention_mask, options=options, out=result[0])
            calls.append(seen)
            return result

        return call

    AttentionInterface.get_interface = watched  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        AttentionInterface.get_interface = original  # type: ignore[method-assign]


@contextmanager
def watch_modules(modules: list[nn.Module], visit: Any) -> Iterator[None]:
    """While open, call `visit(number, call, output)` after each of `modules` has run."""

    def hook_for(number: int) -> Any:
        return lambda _module, args, kwargs, output: visit(number, Call(args, kwargs), output)

    handles = [m.register_forward_hook(hook_for(i), with_kwargs=True) for i, m in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_of(output: Any) -> torch.Tensor:
    """The hidden states that a module gives, alone or before other things."""
    return output[0] if isinstance(output, tuple | list) else output


@contextmanager
def narrow_window(config: Any) -> Iterator[None]:
    """While open, a sliding window is short enough for a short text to show whether it is heeded."""
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or window <= WINDOW_TOKENS:
        yield
        return
    config.sliding_window = WINDOW_TOKENS
    try:
        yield
    finally:
        config.sliding_window = window


def softmax_attention(call: Attended) -> torch.Tensor:
    """What softmax attention gives for such a call (B, T, H, V), worked out here in float32."""
    options, (q, k, v) = call.options, (call.q.float(), call.k.float(), call.v.float())
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.transpose(-1, -2) * (options.get("scaling") or q.shape[-1] ** -0.5)
    if cap := options.get("softcap"):
        scores = torch.tanh(scores / cap) * cap
    if options.get("position_bias") is not None:
        scores = scores + options["position_bias"]
    if call.mask is None:
        if is_causal(call):
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
    elif call.mask.dtype == torch.bool:
        scores = scores.masked_fill(~call.mask, -torch.inf)
    else:
        scores = scores + call.mask
    if (sinks := options.get("s_aux")) is not None:
        sink = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return (torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v).transpose(1, 2)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def is_causal(call: Attended) -> bool:
    """Whether attention without a mask looks back alone."""
    given = call.options.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if given is None else given)


def _look(model: Any) -> Backbone:
    if not isinstance(model, PreTrainedModel):
        raise _refusal(f"a {type(model).__name__}", "a causal language model of transformers")
    calls: list[Attended] = []
    with torch.no_grad(), narrow_window(model.config.get_text_config(decoder=True)), watch_attention(calls):
        model(probe_ids(model), use_cache=False)
    if not calls:
        raise _refusal(f"{type(model).__name__}, which never asks the attention interface", "attention that does")
    modules = [call.module for call in calls]
    names = {module: name for name, module in model.named_modules()}
    if len(set(modules)) < len(modules):
        raise _refusal(f"attention at {names[modules[0]]} that runs several times", "one call for each attention")
    path, layers = _layers(model, [names[module] for module in modules])
    by_layer = {int(names[call.module][len(path) + 1 :].split(".")[0]): call for call in calls}
    if len(by_layer) < len(calls):
        raise _refusal("several attentions in one layer", "one in each layer")
    hiddens, num_outputs = _check_layers(model, layers, {i: call.module for i, call in by_layer.items()})
    declared = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    kinds = [_kind(by_layer.get(i), declared[i] if len(declared) == len(layers) else None) for i in range(len(layers))]
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    if not full:
        raise _refusal(f"layers of {', '.join(sorted(set(kinds)))} alone", "some layers with full causal attention")
    shapes = [_geometry(by_layer[i], hiddens[i]) for i in full]
    if any(shape != shapes[0] for shape in shapes):
        raise _refusal("full attentions of different shapes", "one shape in all full layers")
    for i in full:
        module: Any = by_layer[i].module
        if getattr(module, "layer_idx", None) != i or not hasattr(module, "config"):
            raise _refusal(f"attention at {names[module]} without its config or place", "both, for the cache")
    in_layer = {i: names[call.module].removeprefix(f"{path}.{i}.") for i, call in by_layer.items()}
    places = [in_layer[i] if i in full else None for i in range(len(layers))]
    return Backbone(layers=path, places=places, kinds=kinds, num_outputs=num_outputs, geometry=asdict(shapes[0]))


def _layers(model: nn.Module, paths: list[str]) -> tuple[str, list[nn.Module]]:
    """The list of modules that all attentions lie in."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(path.startswith(name + ".") for path in paths):
            return name, list(module)
    raise _refusal("attentions outside of one list of layers", "layers in one list")


def _check_layers(
    model: Any, layers: list[nn.Module], attentions: dict[int, nn.Module]
) -> tuple[dict[int, torch.Tensor], list[int]]:
    """Inputs of attentions and numbers of outputs of layers; raises where layers do not run once each, in order."""
    num_outputs: list[int] = []
    order: list[int] = []
    seen: dict[int, torch.Tensor] = {}

    def visit(number: int, call: Call, output: Any) -> None:
        order.append(number)
        hidden, out = call.hidden, first_of(output)
        if not isinstance(out, torch.Tensor) or not isinstance(hidden, torch.Tensor) or out.shape != hidden.shape:
            raise _refusal(f"layer {number} whose output is not shaped as its input", "hidden states in and out")
        num_outputs.append(len(output) if isinstance(output, tuple | list) else 0)

    def visit_attention(number: int, call: Call, output: Any) -> None:
        seen[list(attentions)[number]] = call.hidden

    with torch.no_grad(), watch_modules(layers, visit), watch_modules(list(attentions.values()), visit_attention):
        model(probe_ids(model), use_cache=False)
    if order != list(range(len(layers))):
        raise _refusal("layers that do not run once each in their order", "a plain stack of layers")
    return seen, num_outputs


def _kind(call: Attended | None, declared: str | None) -> str:
    if call is None:
        return declared if declared not in (None, "full_attention", "attention") else "other"  # type: ignore[return-value]
    num_queries, num_keys = call.q.shape[2], call.k.shape[2]
    if num_queries != num_keys:
        return "cross_attention"
    if declared is not None and declared not in ("full_attention", "attention", "hybrid"):
        return declared
    if call.options.get("sliding_window") is not None:
        return "sliding_attention"
    if call.mask is None:
        return "full_attention" if is_causal(call) else "bidirectional_attention"
    seen = (call.mask if call.mask.dtype == torch.bool else call.mask > -1e4)[0, 0]
    causal = torch.ones_like(seen).tril()
    if bool((seen & ~causal).any()):
        return "bidirectional_attention"
    return "full_attention" if torch.equal(seen, causal) else "sliding_attention"


def _geometry(call: Attended, hidden: torch.Tensor) -> BackboneGeometry:
    return BackboneGeometry(
        hidden_dim=hidden.shape[-1],
        num_heads=call.q.shape[1],
        num_kv_heads=call.k.shape[1],
        head_dim=call.q.shape[-1],
        value_dim=call.v.shape[-1],
    )


def _refusal(got: str, expected: str) -> ModelError:
    return ModelError(
        "teacher.source",
        got=got,
        expected=expected,
        hint="docs/models.md lists the model types that work, and why others do not.",
    )
