"""How far hybrids are from their teacher on text, token by token: what they predict, and what each layer gives on.

Predictions: KL(teacher || hybrid) in nats and how often both name the same next token, for any choice of linear layers
and by position in the text. Layers alone: the normalised error of the mixer's output by position.

Shapes: B sequences, T tokens, D hidden dim, N predicted tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dtr.arch import LayerRunner, make_runner, run_body, with_mixer
from dtr.distillation.targets import capture_targets
from dtr.mixers.base import Mixer
from dtr.teacher import Teacher

POSITIONS = (0, 1, 4, 16, 64, 256)
"""First position of each bucket: tasks ask at the start of a text, where blocks to train on have few tokens."""
LOGIT_ROWS = 1024
"""Tokens per slice of the LM head."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Token ids (B, T), padded on the right, and how many of each are real."""

    input_ids: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Sequences:
        lengths = torch.tensor([len(row) for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        return cls(input_ids=padded, lengths=lengths)

    def batches(self, size: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Ids (B, T), no longer than the longest of a batch, and a mask (B, T) of the tokens that are real."""
        # By length, so that little is padding.
        found = []
        for rows in self.lengths.argsort(stable=True).split(size):
            num_tokens = int(self.lengths[rows].max())
            mask = torch.arange(num_tokens)[None] < self.lengths[rows][:, None]
            found.append((self.input_ids[rows, :num_tokens].to(device, torch.long), mask.to(device)))
        return found


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A hybrid's predictions against its teacher's."""

    kl: float
    """Mean over tokens of KL(teacher || hybrid), nats."""
    agreement: float
    """Share of the tokens at which both hold the same next token for the likeliest."""
    by_position: dict[str, float]
    """The mean KL of the tokens of each bucket."""


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """A mixer's error on the teacher's own hidden states."""

    nmse: float
    """sum |o - o'|^2 / sum |o|^2"""
    nmse_by_position: dict[str, float]


@torch.no_grad()
def divergences(
    teacher: Teacher,
    mixers: Mapping[int, Mixer],
    text: Sequences,
    choices: Mapping[str, frozenset[int]],
    *,
    batch_size: int = 8,
) -> dict[str, Divergence]:
    """Read text with the teacher and with each of some hybrids of it.

    Args:
        teacher: whole on its device.
        mixers: in the teacher's dtype, by number.
        text: what to read.
        choices: the mixers in place, by name of the hybrid. A hybrid is run from its lowest linear layer up.
        batch_size: sequences at a time; the teacher's hidden states at all layers are kept for so many.
    """
    runner, num_layers = make_runner(teacher.model), teacher.num_layers
    swapped = {number: with_mixer(runner.layers[mixer.layer_idx], mixer) for number, mixer in mixers.items()}
    sums = {name: _PositionSums(2, teacher.device) for name in choices}
    for input_ids, mask in text.batches(batch_size, teacher.device):
        batch = runner.prepare(input_ids)
        before = [batch.hidden_BTD]
        for index, layer in enumerate(runner.layers):
            before.append(runner.run_layer(index, layer, before[-1], batch))
        for name, linear in choices.items():
            layers = {mixers[number].layer_idx: swapped[number] for number in linear}
            lowest = min(layers, default=num_layers)
            hidden = before[lowest]
            for index in range(lowest, num_layers):
                hidden = runner.run_layer(index, layers.get(index, runner.layers[index]), hidden, batch)
            sums[name].add(_compare(runner, before[-1][mask], hidden[mask]), mask)
    found = {}
    for name, one in sums.items():
        kl, agreement = one.mean().tolist()
        found[name] = Divergence(kl=kl, agreement=agreement, by_position=one.by_position(0))
    return found


@torch.no_grad()
def layer_errors(
    teacher: Teacher,
    mixers: Mapping[int, Mixer],
    text: Sequences,
    *,
    batch_size: int = 8,
    positions: Sequence[int] = POSITIONS,
) -> dict[int, LayerErrors]:
    """Each mixer's error where the teacher shows it its input; `positions` begin buckets, the rest as `divergences`."""
    sums = {number: _PositionSums(2, teacher.device, positions) for number in mixers}
    mask = torch.empty(0)

    def visit(number: int, hidden: torch.Tensor, rotary: Any, target: torch.Tensor) -> None:
        out, _ = mixers[number](hidden, rotary)
        error = (out.float() - target.float()).square().sum(-1)
        sums[number].add(torch.stack([error, target.float().square().sum(-1)], dim=-1)[mask], mask)

    with capture_targets(teacher.model, mixers, visit):
        # `visit` reads the mask.
        for input_ids, mask in text.batches(batch_size, teacher.device):  # noqa: B007
            run_body(teacher.model, input_ids)
    found = {}
    for number, one in sums.items():
        error, power = one.mean().tolist()
        ratios = {name: error / power for name, (error, power) in one.means().items()}
        found[number] = LayerErrors(nmse=error / power, nmse_by_position=ratios)
    return found


def _compare(runner: LayerRunner, theirs_ND: torch.Tensor, ours_ND: torch.Tensor) -> torch.Tensor:
    """KL and agreement of each token (N, 2)."""
    parts = []
    for theirs, ours in zip(theirs_ND.split(LOGIT_ROWS), ours_ND.split(LOGIT_ROWS), strict=True):
        reference, candidate = (runner.logits(hidden).log_softmax(dim=1) for hidden in (theirs, ours))
        kl = ((reference - candidate) * reference.exp()).sum(dim=1)
        same = (reference.argmax(dim=1) == candidate.argmax(dim=1)).float()
        parts.append(torch.stack([kl, same], dim=1))
    return torch.cat(parts)


class _PositionSums:
    """Sums of a few values of each token, by bucket of its position."""

    def __init__(self, num_values: int, device: torch.device, positions: Sequence[int] = POSITIONS) -> None:
        self._positions = positions
        self._sums = torch.zeros(len(positions), num_values, dtype=torch.float64, device=device)
        self._counts = torch.zeros(len(positions), dtype=torch.float64, device=device)

    def add(self, values_NV: torch.Tensor, mask_BT: torch.Tensor) -> None:
        """`values_NV` has a row for each True of the mask, in its order."""
        positions = torch.arange(mask_BT.shape[1], device=mask_BT.device).expand_as(mask_BT)[mask_BT]
        buckets = torch.bucketize(positions, torch.tensor(self._positions[1:], device=mask_BT.device), right=True)
        self._sums.index_add_(0, buckets, values_NV.double())
        self._counts.index_add_(0, buckets, torch.ones_like(buckets, dtype=torch.float64))

    def mean(self) -> torch.Tensor:
        return self._sums.sum(0) / self._counts.sum()

    def means(self) -> dict[str, list[float]]:
        """Mean of each value, by name of the bucket; buckets without a token are left out."""
        ends = [str(end - 1) for end in self._positions[1:]] + [""]
        names = [str(first) if str(first) == end else f"{first}-{end}" for first, end in zip(self._positions, ends)]
        counts = self._counts.tolist()
        return {name: (row / n).tolist() for name, row, n in zip(names, self._sums, counts) if n}

    def by_position(self, value: int) -> dict[str, float]:
        return {name: row[value] for name, row in self.means().items()}
