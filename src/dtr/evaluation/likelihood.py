"""Log-likelihoods of fixed answers under any choice of linear layers, running as few layers as possible.

A candidate that differs from its base first at layer l needs layers l and above only. The base's hidden states are
kept at layer boundaries, within a memory budget; where they do not all fit, every n-th boundary is kept and the layers
between are run again. Work is counted in layer-tokens, so that the saving can be reported.

Choices of one question repeat its prompt. Running it once for all of them would need every mixer to go on from a state
in the middle of a sequence, at the same rounding; it is not done, and the repeated tokens are counted.

Shapes: B batch, T tokens, D hidden dim.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from dtr.arch import LayerRunner, Prepared
from dtr.tasks.base import Likelihood

LOGIT_ROWS = {"cpu": 1024, "cuda": 8192}
"""Scored positions per slice of the LM head: logits in float32 for a large vocabulary are the biggest tensor here."""
BATCH_OVERHEAD_TOKENS = {"cpu": 256, "cuda": 4096}
"""Padded tokens that take as long as starting the kernels of one more batch: what a split by length must save.
An estimate, not measured: 50 ns a token and layer on an H100, and 0.2 ms to start a layer's kernels."""


@dataclass(frozen=True, kw_only=True)
class TokenPair:
    """A context and what follows it, as token ids; neither is empty."""

    context: tuple[int, ...]
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.target) - 1


@dataclass(kw_only=True)
class _Batch:
    """Pairs of similar length, right-padded, and the boundaries that are known of the current base."""

    members: list[int]
    prepared: Prepared
    rows: torch.Tensor
    """Flat positions (into B * T) whose next token is scored."""
    targets: torch.Tensor
    owners: torch.Tensor
    """Which member each scored position belongs to; on the CPU."""
    ends: torch.Tensor
    """Flat position of each member's last token."""
    num_tokens: int
    """Real tokens, without padding."""
    boundaries: dict[int, torch.Tensor] = field(default_factory=dict)
    """Hidden state (B, T, D) before layer l, under the current base."""
    teacher_rows: torch.Tensor | None = None
    """The teacher's last hidden states at `rows`, once a divergence was asked for."""


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
    ) -> None:
        """Args:

        linear_layers: layer index to a decoder layer with a mixer.
        batch_tokens: padded tokens per batch.
        cache_bytes: memory for hidden states of the base.
        groups: pairs that may be asked for alone; no batch holds pairs of two groups, so that a pair's result does
            not depend on which others are asked for. One group of all when left out.
        """
        self._runner, self._linear = runner, linear_layers
        self._num_layers = len(runner.layers)
        self._device = device
        self._base: frozenset[int] = frozenset()
        overhead = BATCH_OVERHEAD_TOKENS.get(device.type, 256)
        with torch.no_grad():
            self._batches = [
                self._prepare(pairs, members, pad_token_id)
                for group in (groups if groups is not None else [range(len(pairs))])
                for members in group_by_length(
                    [len(pair) for pair in pairs], group, batch_tokens, overhead_tokens=overhead
                )
            ]
        per_boundary = sum(b.prepared.hidden_BTD.numel() * b.prepared.hidden_BTD.element_size() for b in self._batches)
        num_kept = max(1, min(self._num_layers, cache_bytes // max(per_boundary, 1)))
        self._stride = math.ceil(self._num_layers / num_kept)
        self._tokens_per_pass = sum(len(pair) for pair in pairs)
        self._layer_tokens = 0

    @property
    def pass_equivalents(self) -> float:
        """Layer-tokens run so far, in units of one full pass over all pairs."""
        return self._layer_tokens / (self._num_layers * max(self._tokens_per_pass, 1))

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
            index: Likelihood(log_prob=sums[at], is_greedy=num_missed[at] == 0, num_tokens=counts[at])
            for at, index in enumerate(members)
        }
        return [results[index] for index in (range(len(results)) if only is None else only)]

    @torch.no_grad()
    def features(self, layer: int, *, is_linear: bool, only: Sequence[int] | None = None) -> torch.Tensor:
        """What `layer` hands on at the last token of each pair (num_pairs, D), in the teacher, itself linear or not.

        Pairs in order, or as in `only`, these groups' pairs.
        """
        found: dict[int, torch.Tensor] = {}
        self._rebase(frozenset())
        for batch in self._batches_of(only):
            linear = frozenset({layer} if is_linear else ())
            hidden = self._run(batch, self._hidden_before(batch, layer), range(layer, layer + 1), linear)
            found |= zip(batch.members, hidden.flatten(0, 1)[batch.ends].float())
        return torch.stack([found[index] for index in (range(len(found)) if only is None else only)])

    @torch.no_grad()
    def divergence(self, linear: frozenset[int], *, only: Collection[int] | None = None) -> float:
        """Mean KL(teacher || hybrid) in nats over the scored positions, with the teacher as the base."""
        total, num_positions, teacher = 0.0, 0, frozenset[int]()
        step = LOGIT_ROWS.get(self._device.type, 1024)
        for batch in self._batches_of(only):
            if batch.teacher_rows is None:
                batch.teacher_rows = self._last_hidden(batch, teacher, teacher).flatten(0, 1)[batch.rows]
            rows = self._last_hidden(batch, linear, teacher).flatten(0, 1)[batch.rows]
            for theirs, ours in zip(batch.teacher_rows.split(step), rows.split(step)):
                reference, candidate = (self._runner.logits(part).float().log_softmax(dim=1) for part in (theirs, ours))
                total += ((reference - candidate) * reference.exp()).sum().item()
            num_positions += len(rows)
        return total / max(num_positions, 1)

    def _batches_of(self, only: Collection[int] | None) -> list[_Batch]:
        if only is None:
            return self._batches
        wanted = set(only)
        chosen = [batch for batch in self._batches if batch.members[0] in wanted]
        assert sum(len(batch.members) for batch in chosen) == len(wanted), "only whole groups can be asked for"
        return chosen

    def _last_hidden(self, batch: _Batch, linear: frozenset[int], base: frozenset[int]) -> torch.Tensor:
        self._rebase(base)
        start = min(linear ^ base, default=self._num_layers)
        return self._run(batch, self._hidden_before(batch, start), range(start, self._num_layers), linear)

    def _rebase(self, base: frozenset[int]) -> None:
        """Forget what does not hold for the new base."""
        if base == self._base:
            return
        first_change = min(base ^ self._base, default=self._num_layers)
        for batch in self._batches:
            batch.boundaries = {at: hidden for at, hidden in batch.boundaries.items() if at <= first_change}
        self._base = base

    def _hidden_before(self, batch: _Batch, layer: int) -> torch.Tensor:
        """The base's hidden state before `layer`, from the nearest known boundary below."""
        known = max((at for at in batch.boundaries if at <= layer), default=0)
        hidden = batch.boundaries.get(known, batch.prepared.hidden_BTD)
        for index in range(known, layer):
            hidden = self._run(batch, hidden, range(index, index + 1), self._base)
            if (index + 1) % self._stride == 0 and index + 1 < self._num_layers:
                batch.boundaries[index + 1] = hidden
        return hidden

    def _run(self, batch: _Batch, hidden: torch.Tensor, layers: range, linear: frozenset[int]) -> torch.Tensor:
        for index in layers:
            layer = self._linear[index] if index in linear else self._runner.layers[index]
            hidden = self._runner.run_layer(index, layer, hidden, batch.prepared)
        self._layer_tokens += len(layers) * batch.num_tokens
        return hidden

    def _prepare(self, pairs: Sequence[TokenPair], members: list[int], pad_token_id: int) -> _Batch:
        longest = max(len(pairs[i]) for i in members)
        ids = torch.full((len(members), longest), pad_token_id)
        rows: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        for place, index in enumerate(members):
            pair = pairs[index]
            tokens = pair.context + pair.target
            ids[place, : len(pair)] = torch.tensor(tokens[:-1])
            rows += [place * longest + at for at in range(len(pair.context) - 1, len(pair))]
            targets += pair.target
            owners += [place] * len(pair.target)
        device = self._device
        return _Batch(
            members=members,
            prepared=self._runner.prepare(ids.to(device)),
            rows=torch.tensor(rows, device=device),
            targets=torch.tensor(targets, device=device),
            owners=torch.tensor(owners),
            ends=torch.tensor([at * longest + len(pairs[i]) - 1 for at, i in enumerate(members)], device=device),
            num_tokens=sum(len(pairs[i]) for i in members),
        )

    def _read(self, batch: _Batch, hidden_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each scored position's token, and whether another token is likelier."""
        scored = hidden_BTD.flatten(0, 1)[batch.rows]
        log_probs, misses = [], []
        step = LOGIT_ROWS.get(self._device.type, 1024)
        for part, targets in zip(scored.split(step), batch.targets.split(step)):
            logits = self._runner.logits(part).float()
            log_probs.append(logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1))
            misses.append(logits.argmax(dim=1) != targets)
        return torch.cat(log_probs), torch.cat(misses)


def group_by_length(
    lengths: Sequence[int], members: Sequence[int], batch_tokens: int, *, overhead_tokens: int = 0
) -> list[list[int]]:
    """Batches of similar length, longest first, with the least work: padded tokens, and an overhead for each batch.

    The best cut of the lengths into ranges, by dynamic programming over the lengths that occur; a range that exceeds
    `batch_tokens` is dealt out in even batches.
    """
    order = sorted(members, key=lambda i: (-lengths[i], i))
    starts = [at for at in range(len(order)) if at == 0 or lengths[order[at]] != lengths[order[at - 1]]]
    starts.append(len(order))

    def num_batches(first: int, last: int) -> int:
        return math.ceil((last - first) / max(1, batch_tokens // lengths[order[first]]))

    best: list[tuple[float, int]] = [(0.0, 0)] * len(starts)
    for end in range(1, len(starts)):
        best[end] = min(
            (
                best[begin][0]
                + lengths[order[starts[begin]]] * (starts[end] - starts[begin])
                + overhead_tokens * num_batches(starts[begin], starts[end]),
                begin,
            )
            for begin in range(end)
        )
    cuts = [len(starts) - 1]
    while cuts[0] > 0:
        cuts.insert(0, best[cuts[0]][1])
    batches = []
    for begin, end in pairwise(cuts):
        first, last = starts[begin], starts[end]
        num = num_batches(first, last)
        edges = [first + (last - first) * at // num for at in range(num + 1)]
        batches += [order[low:high] for low, high in pairwise(edges)]
    return batches
