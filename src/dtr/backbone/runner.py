"""Runs the layers of any model one by one, by its own forward pass around them.

Shapes: B batch, T tokens, D hidden dim, N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from dtr.arch import LayerRunner, Prepared, decoder_layers
from dtr.backbone.probe import Call, backbone_of, first_of


@dataclass(frozen=True, kw_only=True)
class PreparedCalls(Prepared):
    """A batch on its way through the layers, with what each layer is called with."""

    calls: list[Call]


class BackboneRunner(LayerRunner):
    """As `LayerRunner`, for models that are known by a probe.

    What surrounds the layers is never looked at: the model's own forward runs with layers that only note their
    arguments (embeddings, masks, positions), or give hidden states that were worked out before (final norm, head).
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.layers = list(decoder_layers(model))
        self._backbone = backbone_of(model)

    def prepare(self, input_ids: torch.Tensor) -> Prepared:
        """As `LayerRunner.prepare`."""
        calls: list[Call] = []

        def note(_number: int, call: Call) -> torch.Tensor:
            calls.append(call)
            return call.hidden

        with self._instead(note):
            self._model(input_ids, use_cache=False, **self._last_alone)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        nothing = calls[0].hidden.new_empty(0)
        return PreparedCalls(
            hidden_BTD=calls[0].hidden,
            positions=positions,
            rotary=(nothing, nothing),
            masks={},
            # The hidden states are given anew for each layer.
            calls=[call.replaced(nothing) for call in calls],
        )

    @property
    def _last_alone(self) -> dict[str, int]:
        """What tells the head to score the last position alone, where it can be told."""
        return {"logits_to_keep": 1} if "logits_to_keep" in signature(self._model.forward).parameters else {}

    def prepare_for_recording(self, input_ids: torch.Tensor) -> Prepared:
        return self.prepare(input_ids)

    @property
    def can_branch(self) -> bool:
        return False

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.prepare(input_ids).hidden_BTD

    def kind(self, index: int) -> str:
        return self._backbone.kinds[index]

    def run_layer(self, index: int, layer: nn.Module, hidden_BTD: torch.Tensor, batch: Prepared) -> torch.Tensor:
        """As `LayerRunner.run_layer`."""
        assert isinstance(batch, PreparedCalls)
        call = batch.calls[index].replaced(hidden_BTD)
        return first_of(layer(*call.args, **call.kwargs))

    @property
    def num_outputs(self) -> int:
        return self._model.config.get_text_config(decoder=True).vocab_size

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and head of chosen positions (N, D) -> (N, vocabulary), by the model's own forward."""
        last = len(self.layers) - 1

        def give(number: int, call: Call) -> torch.Tensor:
            return hidden[:, None] if number == last else call.hidden

        ids = torch.ones(len(hidden), 1, dtype=torch.long, device=hidden.device)
        with self._instead(give):
            return self._model(ids, use_cache=False).logits[:, 0].float()

    @contextmanager
    def _instead(self, give: Callable[[int, Call], torch.Tensor]) -> Iterator[None]:
        """While open, a layer's output is `give(number, call)`, in the form that its class gives outputs in."""

        def forward_for(number: int) -> Any:
            num_more = self._backbone.num_outputs[number] - 1

            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = give(number, Call(args, kwargs))
                return hidden if num_more < 0 else (hidden, *[None] * num_more)

            return forward

        for number, layer in enumerate(self.layers):
            vars(layer)["forward"] = forward_for(number)
        try:
            yield
        finally:
            for layer in self.layers:
                del vars(layer)["forward"]
