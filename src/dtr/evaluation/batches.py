"""Which pairs run together, so that little is run twice: by length, and choices with the question they share.

Shapes: B batch, T tokens, D hidden dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch

from dtr.arch import LayerRunner, Prepared
from dtr.evaluation.branching import Branches, lay_out

BATCH_OVERHEAD_TOKENS = {"cpu": 256, "cuda": 16_384}
"""Padded tokens that take as long as starting the kernels of one more batch: what a split by length must save.
On an H100 starting a layer's kernels took 0.8 to 1.5 ms a batch and a token 60 ns (SmolLM2's shape, dev/LOG.md); that
of a CPU is an estimate."""
PART_SHARE = 0.5
"""Attention's share of a layer's kernels: what each further part costs of a batch's overhead. An estimate."""
BRANCH_TOKENS = 4
"""Tokens that take as long as copying the state for one more branch. An estimate: 12 bytes of traffic for each of H K^2
elements of a state, against a token's products."""


@dataclass(frozen=True, kw_only=True)
class TokenPair:
    """A context and what follows it, as token ids; neither is empty."""

    context: tuple[int, ...]
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.target) - 1

    @property
    def inputs(self) -> tuple[int, ...]:
        """What a model reads: all but the last token."""
        return (self.context + self.target)[:-1]


@dataclass(kw_only=True)
class Batch:
    """Pairs that run together, and the boundaries that are known of the current base."""

    members: list[int]
    hidden: torch.Tensor
    """The first layer's input: right-padded (B, T, D), or (1, all tokens, D) with branches."""
    prepared: Prepared | Branches
    rows: torch.Tensor
    """Flat positions, ascending, whose next token is scored."""
    ends_of_rows: list[int]
    """The targets asked of the first r rows are the first `ends_of_rows[r]`."""
    asked: torch.Tensor
    """The row that each target is asked of, ascending."""
    targets: torch.Tensor
    owners: torch.Tensor
    """Which member each target belongs to; on the CPU."""
    ends: torch.Tensor
    """Flat position of each member's last token."""
    num_tokens: int
    """Tokens that run, without padding."""
    boundaries: dict[int, torch.Tensor] = field(default_factory=dict)
    """Hidden state before layer l, under the current base, shaped as `hidden`."""
    teacher_rows: torch.Tensor | None = None
    """The teacher's last hidden states at `rows`, once a divergence was asked for."""


@dataclass(frozen=True, kw_only=True)
class _Question:
    """Pairs by what they read: a trunk, and after it one branch for each different continuation."""

    trunk: tuple[int, ...]
    branches: dict[tuple[int, ...], list[int]]
    """Continuation, which may be empty, to the pairs that read it."""


def make_batches(
    runner: LayerRunner,
    pairs: Sequence[TokenPair],
    questions: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    device: torch.device,
    batch_tokens: int,
) -> list[Batch]:
    """Batches of these questions, in the layout that is estimated to take less time.

    Args:
        questions: pairs that may begin alike, by index.
        batch_tokens: padded tokens per batch.
    """
    overhead = BATCH_OVERHEAD_TOKENS.get(device.type, 256)
    trees = [tree for members in questions if members for tree in _trees(pairs, members)]
    rows = [(tree.trunk + branch, members) for tree in trees for branch, members in tree.branches.items()]
    lengths = [len(tokens) for tokens, _ in rows]
    whole = group_by_length(lengths, range(len(rows)), batch_tokens, overhead_tokens=overhead)
    if runner.can_branch and len(rows) > len(trees):
        split = _split(trees, batch_tokens, overhead)
        if _cost_of_split(trees, split, overhead) < _cost(lengths, whole) + overhead * len(whole):
            return [_branching_batch(runner, pairs, [trees[i] for i in at], parts, device) for at, parts in split]
    return [_padded_batch(runner, pairs, [rows[i] for i in batch], pad_token_id, device) for batch in whole]


def _trees(pairs: Sequence[TokenPair], members: Sequence[int]) -> list[_Question]:
    """The members as one question, or each alone where what they share is not worth a branch."""
    by_inputs: dict[tuple[int, ...], list[int]] = {}
    for index in members:
        by_inputs.setdefault(pairs[index].inputs, []).append(index)
    trunk = _common_beginning(list(by_inputs))
    if len(by_inputs) > 1 and len(trunk) * (len(by_inputs) - 1) > BRANCH_TOKENS * len(by_inputs):
        return [_Question(trunk=trunk, branches={one[len(trunk) :]: who for one, who in by_inputs.items()})]
    return [_Question(trunk=one, branches={(): who}) for one, who in by_inputs.items()]


def _common_beginning(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    # What the first and the last in order have in common, all between them have too.
    first, last = min(sequences), max(sequences)
    num = next((at for at, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first[:num]


_Split = list[tuple[list[int], list[list[tuple[int, tuple[int, ...]]]]]]
"""Batches of trees: which trees, and parts of branches, each with the place of its tree in the batch."""


def _split(trees: Sequence[_Question], batch_tokens: int, overhead: int) -> _Split:
    trunk_lengths = [len(tree.trunk) for tree in trees]
    num_branch_tokens = sum(len(branch) for tree in trees for branch in tree.branches)
    # As many trunks as leave room for their branches.
    room = max(1, round(batch_tokens * sum(trunk_lengths) / (sum(trunk_lengths) + num_branch_tokens)))
    split: _Split = []
    for chosen in group_by_length(trunk_lengths, range(len(trees)), room, overhead_tokens=overhead):
        rows = [(place, branch) for place, at in enumerate(chosen) for branch in trees[at].branches if branch]
        parts = group_by_length(
            [len(branch) for _, branch in rows],
            range(len(rows)),
            batch_tokens,
            overhead_tokens=round(PART_SHARE * overhead),
        )
        split.append((chosen, [[rows[i] for i in part] for part in parts]))
    return split


def _cost(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> int:
    """Padded tokens."""
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def _cost_of_split(trees: Sequence[_Question], split: _Split, overhead: int) -> float:
    """As tokens of a padded batch; padding passes attention only."""
    total = 0.0
    for chosen, parts in split:
        padded = [[len(trees[at].trunk) for at in chosen], *([len(branch) for _, branch in part] for part in parts)]
        in_attention = sum(len(lengths) * max(lengths) for lengths in padded)
        elsewhere = sum(map(sum, padded))
        total += PART_SHARE * in_attention + (1 - PART_SHARE) * elsewhere
        total += overhead * (1 + PART_SHARE * len(parts)) + BRANCH_TOKENS * sum(map(len, parts))
    return total


def _padded_batch(
    runner: LayerRunner,
    pairs: Sequence[TokenPair],
    rows: Sequence[tuple[tuple[int, ...], list[int]]],
    pad_token_id: int,
    device: torch.device,
) -> Batch:
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.tensor([[*tokens, *[pad_token_id] * (longest - len(tokens))] for tokens, _ in rows])
    places = {
        index: range(at * longest, at * longest + len(tokens))
        for at, (tokens, members) in enumerate(rows)
        for index in members
    }
    prepared = runner.prepare(ids.to(device))
    return _batch(pairs, places, prepared.hidden_BTD, prepared, sum(len(tokens) for tokens, _ in rows))


def _branching_batch(
    runner: LayerRunner,
    pairs: Sequence[TokenPair],
    trees: Sequence[_Question],
    parts: Sequence[Sequence[tuple[int, tuple[int, ...]]]],
    device: torch.device,
) -> Batch:
    ids: list[int] = []

    def put(tokens: tuple[int, ...]) -> range:
        ids.extend(tokens)
        return range(len(ids) - len(tokens), len(ids))

    trunks = [put(tree.trunk) for tree in trees]
    rows = [[(tree, put(branch)) for tree, branch in part] for part in parts]
    at = {
        (tree, branch): row for part, put_part in zip(parts, rows) for (tree, branch), (_, row) in zip(part, put_part)
    }
    places = {
        index: [*trunks[place], *at.get((place, branch), ())]
        for place, tree in enumerate(trees)
        for branch, members in tree.branches.items()
        for index in members
    }
    hidden = runner.embed(torch.tensor([ids], device=device))
    return _batch(pairs, places, hidden, lay_out(runner, hidden, trunks, rows), len(ids))


def _batch(
    pairs: Sequence[TokenPair],
    places: Mapping[int, Sequence[int]],
    hidden: torch.Tensor,
    prepared: Prepared | Branches,
    num_tokens: int,
) -> Batch:
    """A batch whose pairs' inputs lie at these flat places."""
    members, device = list(places), hidden.device
    asked = sorted(
        (places[index][len(pairs[index].context) - 1 + at], owner, at, token)
        for owner, index in enumerate(members)
        for at, token in enumerate(pairs[index].target)
    )
    rows = sorted({place for place, *_ in asked})
    row_of = {place: row for row, place in enumerate(rows)}
    counts = [0] * len(rows)
    for place, *_ in asked:
        counts[row_of[place]] += 1
    return Batch(
        members=members,
        hidden=hidden,
        prepared=prepared,
        rows=torch.tensor(rows, device=device),
        ends_of_rows=[0, *accumulate(counts)],
        asked=torch.tensor([row_of[place] for place, *_ in asked], device=device),
        targets=torch.tensor([token for *_, token in asked], device=device),
        owners=torch.tensor([owner for _, owner, _, _ in asked]),
        ends=torch.tensor([places[index][-1] for index in members], device=device),
        num_tokens=num_tokens,
    )


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
