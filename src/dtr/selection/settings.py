"""What a search is asked for, as one frozen record: its limit, its budgets, and how it works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dtr.selection.criteria import Limits, PMinKind
from dtr.selection.items import CONFIRMATION_SHARE
from dtr.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class GuardFloor:
    """A task that must keep a share of the teacher's score, or a value of its metric, whatever the search gains."""

    task: Task
    p_min: float
    p_min_kind: PMinKind = "relative"


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of `search`; each can also be given to it by name."""

    strategy: str = "exact"
    """auto, exact, or a baseline: uniform, random, lowest_mse, one_shot, kl, impact."""
    p_min: float = 0.95
    """Share of the teacher's validation score to keep, or a value of the metric (`p_min_kind`)."""
    p_min_kind: PMinKind = "relative"
    """`relative` or `absolute`."""
    p_min_confidence: float | None = None
    """Commit only what is certified at this confidence on items that selection never saw, as 0.95."""
    confirmation_share: float = CONFIRMATION_SHARE
    """Share of the validation items that are kept for that."""
    guards: Sequence[GuardFloor] = ()
    """Tasks with a floor; a swap that breaks one is refused."""
    hold_each: str | None = None
    """A field of the rows, as length_tokens: the limit must hold over the items of each of its values."""
    max_linear_layers: int | None = None
    """Stop once so many layers are linear."""
    max_cache_bytes: int | None = None
    """Stop once the cache of one sequence of `cache_context_tokens` tokens fits."""
    cache_context_tokens: int = 2048
    """Context length for `max_cache_bytes`."""
    max_seconds: float | None = None
    """Stop the search after this time; the only limit whose result depends on the machine."""
    run_to_end: bool = False
    """Go on below P_min to draw the whole curve; M_opt and M_best are not affected."""
    seed: int = 0
    """Draws the confirmation items, the portions that rank, and the random baseline."""
    batch_tokens: int = 16_384
    """Padded tokens per evaluation batch."""
    cache_bytes: int = 4_000_000_000
    """Memory for hidden states that candidates share."""

    @property
    def limits(self) -> Limits:
        """The part that says when a hybrid is good enough."""
        return Limits(
            p_min=self.p_min,
            p_min_kind=self.p_min_kind,
            p_min_confidence=self.p_min_confidence,
        )
