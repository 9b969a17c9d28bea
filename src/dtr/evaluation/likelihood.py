"""Log-likelihoods of fixed answers under any choice of linear layers, running as few layers as possible.

A candidate that differs from its base first at layer l needs layers l and above only. The base's hidden states are
kept at layer boundaries, within a memory budget; where they do not all fit, every n-th boundary is kept and the layers
between are run again. Work is counted in layer-tokens, so that the saving can be reported.

Choices of one question share its prompt, which runs once where that saves time (`dtr.evaluation.batches`).

Shapes: B batch, T tokens, D hidden dim.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dtr.allocation import keep_freed_memory
from dtr.arch import LayerRunner
from dtr.evaluation.batches import Batch, TokenPair, make_batches
from dtr.evaluation.recording import GraphRecorders, LayerPasses
from dtr.evaluation.score import LOST_NATS
from dtr.tasks.base import Likelihood

LOGIT_BYTES = {"cpu": 200_000_000, "cuda": 1_600_000_000}
"""Logits in float32 that are there at a time: for a large vocabulary they are the biggest tensor here."""


class LikelihoodScorer:
    """Scores the same pairs again and again while layers change."""

    def __init__(
        self,
        runner: LayerRunner,
        linear_layers: Mapping[int, nn.Module],
        pairs: Sequence[TokenPair],
        *,
        pad_token_id: int,
        device: torch.device,
        batch_tokens: int = 16_384,
        cache_bytes: int = 4_000_000_000,
        groups: Sequence[Sequence[int]] | None = None,
        questions: Sequence[Sequence[int]] | None = None,
        layer_of: Mapping[int, int] | None = None,
    ) -> None:
        """Args:

        linear_layers: number of a mixer to a decoder layer with it.
        batch_tokens: padded tokens per batch.
        cache_bytes: memory for hidden states of the base.
        groups: pairs that may be asked for alone; no batch holds pairs of two groups, so that a pair's result does
            not depend on which others are asked for. One group of all when left out.
        questions: pairs that may begin alike; each within one group. Every pair is one when left out.
        layer_of: the layer that each mixer stands in for; its number itself when left out.
        """
        if device.type == "cpu":
            keep_freed_memory()
        self._runner, self._linear = runner, linear_layers
        self._layer_of = layer_of or {number: number for number in linear_layers}
        self._num_layers = len(runner.layers)
        self._device = device
        self._num_rows = max(1, LOGIT_BYTES.get(device.type, LOGIT_BYTES["cpu"]) // (4 * runner.num_outputs))
        self._base: frozenset[int] = frozenset()
        self._passes = LayerPasses(runner, GraphRecorders() if device.type == "cuda" else None)
        parts = groups if groups is not None else [range(len(pairs))]
        group_of = {index: number for number, members in enumerate(parts) for index in members}
        in_group: list[list[Sequence[int]]] = [[] for _ in parts]
        for members in questions if questions is not None else [[index] for index in group_of]:
            if members:
                in_group[group_of[members[0]]].append(members)
        common: dict[str, Any] = {"pad_token_id": pad_token_id, "device": device, "batch_tokens": batch_tokens}
        with torch.no_grad():
            self._batches = [batch for own in in_group for batch in make_batches(runner, pairs, own, **common)]
        per_boundary = sum(b.hidden.numel() * b.hidden.element_size() for b in self._batches)
        num_kept = max(1, min(self._num_layers, cache_bytes // max(per_boundary, 1)))
        self._stride = math.ceil(self._num_layers / num_kept)
        self._tokens_per_pass = sum(len(pair) for pair in pairs)
        self._layer_tokens = 0

    @property
    def pass_equivalents(self) -> float:
        """Layer-tokens run so far, in units of one full pass over all pairs, each with its whole context."""
        return self._layer_tokens / (self._num_layers * max(self._tokens_per_pass, 1))

    @property
    def pass_share(self) -> float:
        """What one pass over all pairs costs, in the same unit: below 1 where pairs share what they begin with."""
        num_tokens = sum(batch.num_tokens for batch in self._batches)
        return num_tokens / self._tokens_per_pass if self._tokens_per_pass else 1.0

    @torch.no_grad()
    def __call__(
        self, linear: frozenset[int], *, base: frozenset[int], only: Sequence[int] | None = None
    ) -> list[Likelihood]:
        """Likelihoods with the layers in `linear` replaced, of all pairs in order, or of `only` these groups' pairs."""
        batches = self._batches_of(only)
        # All batches are started before the first result is waited for.
        read = [self._read(batch, self._last_hidden(batch, linear, base)) for batch in batches]
        if not read:
            return []
        log_probs, misses = torch.cat([x for x, _ in read]).double().cpu(), torch.cat([x for _, x in read]).long().cpu()
        members = [index for batch in batches for index in batch.members]
        ends = torch.tensor([0, *(len(batch.members) for batch in batches)]).cumsum(0)
        owner = torch.cat([batch.owners + first for batch, first in zip(batches, ends.tolist())])
        # Sums in float64 on the CPU: the same order on every device, and no rounding that depends on the batch.
        sums = torch.zeros(len(members), dtype=torch.float64).index_add_(0, owner, log_probs).tolist()
        num_missed = torch.zeros(len(members), dtype=torch.long).index_add_(0, owner, misses).tolist()
        counts = owner.bincount(minlength=len(members)).tolist()
        results = {
            index: Likelihood(
                log_prob=sums[at], is_greedy=num_missed[at] == 0 and math.isfinite(sums[at]), num_tokens=counts[at]
            )
            for at, index in enumerate(members)
        }
        return [results[index] for index in (range(len(results)) if only is None else only)]

    @torch.no_grad()
    def features(self, number: int, *, is_linear: bool, only: Sequence[int] | None = None) -> torch.Tensor:
        """What a layer hands on at the last token of each pair (num_pairs, D), in the teacher, or with that mixer.

        Pairs in order, or as in `only`, these groups' pairs.
        """
        found: dict[int, torch.Tensor] = {}
        layer, linear = self._layer_of[number], frozenset({number} if is_linear else ())
        self._rebase(frozenset())
        for batch in self._batches_of(only):
            hidden = self._run(batch, self._hidden_before(batch, layer), range(layer, layer + 1), linear)
            found |= zip(batch.members, hidden.flatten(0, 1)[batch.ends].float())
        return torch.stack([found[index] for index in (range(len(found)) if only is None else only)])

    @torch.no_grad()
    def divergence(self, linear: frozenset[int], *, only: Collection[int] | None = None) -> float:
        """Mean KL(teacher || hybrid) in nats over the scored positions, with the teacher as the base."""
        total, num_positions, teacher = 0.0, 0, frozenset[int]()
        for batch in self._batches_of(only):
            if batch.teacher_rows is None:
                batch.teacher_rows = self._last_hidden(batch, teacher, teacher).flatten(0, 1)[batch.rows]
            rows = self._last_hidden(batch, linear, teacher).flatten(0, 1)[batch.rows]
            # A position counts as often as a target is asked of it, however many choices share it.
            counts = batch.asked.bincount(minlength=len(rows))
            slices = (x.split(self._num_rows) for x in (batch.teacher_rows, rows, counts))
            for theirs, ours, weights in zip(*slices):
                reference, candidate = (self._runner.logits(part).log_softmax(dim=1) for part in (theirs, ours))
                total += (((reference - candidate) * reference.exp()).sum(dim=1) * weights).sum().item()
            num_positions += len(batch.targets)
        # A mixer whose output is no number is as far from the teacher as one can be.
        return total / max(num_positions, 1) if math.isfinite(total) else LOST_NATS

    def _batches_of(self, only: Collection[int] | None) -> list[Batch]:
        if only is None:
            return self._batches
        wanted = set(only)
        chosen = [batch for batch in self._batches if batch.members[0] in wanted]
        assert sum(len(batch.members) for batch in chosen) == len(wanted), "only whole groups can be asked for"
        return chosen

    def _last_hidden(self, batch: Batch, linear: frozenset[int], base: frozenset[int]) -> torch.Tensor:
        self._rebase(base)
        start = self._lowest(linear ^ base)
        return self._run(batch, self._hidden_before(batch, start), range(start, self._num_layers), linear)

    def _rebase(self, base: frozenset[int]) -> None:
        """Forget what does not hold for the new base."""
        if base == self._base:
            return
        first_change = self._lowest(base ^ self._base)
        for batch in self._batches:
            batch.boundaries = {at: hidden for at, hidden in batch.boundaries.items() if at <= first_change}
        self._base = base

    def _lowest(self, numbers: frozenset[int]) -> int:
        return min((self._layer_of[number] for number in numbers), default=self._num_layers)

    def _hidden_before(self, batch: Batch, layer: int) -> torch.Tensor:
        """The base's hidden state before `layer`, from the nearest known boundary below."""
        known = max((at for at in batch.boundaries if at <= layer), default=0)
        hidden = batch.boundaries.get(known, batch.hidden)
        for index in range(known, layer):
            hidden = self._run(batch, hidden, range(index, index + 1), self._base)
            if (index + 1) % self._stride == 0 and index + 1 < self._num_layers:
                batch.boundaries[index + 1] = self._passes.keep(hidden, batch)
        return hidden

    def _run(self, batch: Batch, hidden: torch.Tensor, layers: range, linear: frozenset[int]) -> torch.Tensor:
        swapped = {self._layer_of[number]: self._linear[number] for number in linear}
        for index in layers:
            hidden = self._passes(index, swapped.get(index, self._runner.layers[index]), hidden, batch)
        self._layer_tokens += len(layers) * batch.num_tokens
        return hidden

    def _read(self, batch: Batch, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each target, and whether another token is likelier."""
        scored = hidden.flatten(0, 1)[batch.rows]
        log_probs, misses = [], []
        for first in range(0, len(scored), self._num_rows):
            last = min(first + self._num_rows, len(scored))
            here = slice(batch.ends_of_rows[first], batch.ends_of_rows[last])
            logits = self._runner.logits(scored[first:last])
            # Several targets may be asked of one row, the first tokens of a question's choices.
            asked, targets = batch.asked[here] - first, batch.targets[here]
            log_probs.append(logits[asked, targets] - logits.logsumexp(dim=1)[asked])
            misses.append(logits.argmax(dim=1)[asked] != targets)
        return torch.cat(log_probs), torch.cat(misses)
