"""Layers over questions whose choices share what they begin with: every token runs once.

The tokens of a batch lie side by side without padding, so norms and the MLP see one long row. Only attention, or the
mixer in its place, has to know who follows whom: it reads the shared beginnings (trunks) first and keeps keys and
values, or its state, as it does when it generates; then each choice (branch) goes on from a copy of its trunk's. This
holds for every mixer that can generate, whatever it carries from token to token.

Shapes: B rows of a part, T tokens, S keys, N tokens of the batch, D hidden dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from dtr.arch import LayerRunner, with_mixer
from dtr.hybrid.cache import RecurrentStateLayer


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows that pass attention together."""

    index_BT: torch.Tensor
    """Places in the batch; 0 for padding."""
    rotary: tuple[torch.Tensor, torch.Tensor]
    masks: dict[str, Any]
    """Attention mask by layer kind."""
    token_mask_BT: torch.Tensor | None = None
    """0 for padding, for mixers that must not remember it; None where nothing that counts comes after it."""
    trunks: torch.Tensor | None = None
    """The row of the first part that each row goes on from; None for that part itself."""


@dataclass(frozen=True, kw_only=True)
class Branches:
    """The order in which a batch's tokens pass attention."""

    parts: tuple[Part, ...]
    """Trunks first, then branches."""
    places_N: torch.Tensor
    """Where each token of the batch is among all tokens of all parts, padding included."""


def lay_out(
    runner: LayerRunner,
    hidden: torch.Tensor,
    trunks: Sequence[Sequence[int]],
    branch_parts: Sequence[Sequence[tuple[int, Sequence[int]]]],
) -> Branches:
    """The parts of a batch.

    Args:
        hidden: any tensor of the model's dtype and device.
        trunks: places in the batch of each shared beginning; none is empty.
        branch_parts: rows that run together, each with its trunk and the places of what follows it.
    """
    # Padded on the left, as for generation: what a mixer carries on must end with each row's last token.
    longest, device = max(map(len, trunks)), hidden.device
    index = torch.tensor([[0] * (longest - len(row)) + list(row) for row in trunks])
    before = torch.tensor([[-1] * (longest - len(row)) + list(range(len(row))) for row in trunks])
    rotary, masks = runner.surroundings(hidden, before.to(device), before.to(device))
    is_padded = bool((before < 0).any())
    mask = (before >= 0).long().to(device) if is_padded else None
    parts = [Part(index_BT=index.to(device), rotary=rotary, masks=masks, token_mask_BT=mask)]
    rows: list[tuple[int, int]] = []
    for place, trunk in enumerate(trunks):
        rows += zip(trunk, range(place * longest + longest - len(trunk), (place + 1) * longest))
    num_so_far = index.numel()
    for part in branch_parts:
        width = max(len(row) for _, row in part)
        index = torch.tensor([[*row, *[0] * (width - len(row))] for _, row in part])
        starts = [len(trunks[trunk]) for trunk, _ in part]
        here = torch.tensor(
            [[*range(at, at + len(row)), *[-1] * (width - len(row))] for at, (_, row) in zip(starts, part)]
        )
        owners = torch.tensor([trunk for trunk, _ in part])
        keys = torch.cat([before[owners], here], dim=1)
        rotary, masks = runner.surroundings(hidden, here.to(device), keys.to(device))
        parts.append(Part(index_BT=index.to(device), rotary=rotary, masks=masks, trunks=owners.to(device)))
        for place, (_, row) in enumerate(part):
            first = num_so_far + place * width
            rows += zip(row, range(first, first + len(row)))
        num_so_far += index.numel()
    places = torch.tensor([at for _, at in sorted(rows)])
    return Branches(parts=tuple(parts), places_N=places.to(device))


class BranchingMixer(nn.Module):
    """Stands in for an attention module or a mixer, and runs it part by part.

    Args:
        inner: the module.
        layer_idx: its place in the model.
        kind: what the teacher's own attention of that layer sees, the name of its mask.
    """

    def __init__(self, inner: nn.Module, layer_idx: int, kind: str) -> None:
        super().__init__()
        self.inner, self.layer_idx, self.kind = inner, layer_idx, kind

    def forward(self, hidden_states: torch.Tensor, branches: Branches, **_: Any) -> tuple[torch.Tensor, None]:
        """As attention: (1, N, D) to (1, N, D), and None in place of attention weights."""
        flat = hidden_states[0]
        # By what it has and not by its class: a hybrid loaded with its own code brings classes of its own.
        first = _Memory(RecurrentStateLayer() if hasattr(self.inner, "state_bytes") else DynamicLayer(), self.layer_idx)
        outputs = []
        for part in branches.parts:
            out, _ = self.inner(
                hidden_states=flat[part.index_BT],
                position_embeddings=part.rotary,
                attention_mask=part.masks[self.kind],
                past_key_values=first if part.trunks is None else first.of_rows(part.trunks),
                token_mask=part.token_mask_BT,
            )
            outputs.append(out.flatten(0, 1))
        return torch.cat(outputs)[branches.places_N][None], None


def with_branches(runner: LayerRunner, index: int, layer: nn.Module) -> nn.Module:
    """A decoder layer that takes `branches`; `layer` itself stays as it is."""
    return with_mixer(layer, BranchingMixer(layer.self_attn, index, runner.kind(index)))  # type: ignore[arg-type]


class _Memory:
    """A cache of one layer, with what attention modules and mixers ask of one."""

    def __init__(self, layer: Any, layer_idx: int) -> None:
        self.layers = {layer_idx: layer}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        return self.layers[layer_idx].update(keys, values)

    def of_rows(self, rows: torch.Tensor) -> _Memory:
        """A copy that holds these rows, each as often as it is named."""
        ((index, layer),) = self.layers.items()
        if isinstance(layer, RecurrentStateLayer):
            copy: Any = RecurrentStateLayer()
            state, conv, window = layer.read(), layer.read_conv(), layer.read_window() or ()
            copy.write(
                None if state is None else state[rows],
                layer.num_seen_tokens,
                None if conv is None else conv[rows],
                tuple(x[rows] for x in window),
            )
        else:
            copy = DynamicLayer()
            copy.update(layer.keys[rows], layer.values[rows])
        return _Memory(copy, index)
