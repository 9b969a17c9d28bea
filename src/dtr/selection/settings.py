"""What a search is asked for, as one frozen record: the recipe's section of it, and what other sections say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import InstanceOf, ValidationError

from dtr.recipe.errors import as_recipe_error
from dtr.recipe.sections import RuntimeSection, SearchSection
from dtr.selection.criteria import Limits, PMinKind
from dtr.tasks.base import Task, names_apart

_RUNTIME = RuntimeSection()


@dataclass(frozen=True, kw_only=True)
class GuardFloor:
    """A task that must keep a share of the teacher's score, or a value of its metric, whatever the search gains."""

    task: Task
    p_min: float
    p_min_kind: PMinKind = "relative"


class SearchSettings(SearchSection):
    """Settings of `search`: those of the recipe's `search` section with its defaults, and the ones below.

    Each can also be given to `search` by name.
    """

    guards: Sequence[InstanceOf[GuardFloor]] = ()  # type: ignore[assignment]
    """Loaded tasks with a floor; a swap that breaks one is refused."""
    seed: int = 0
    """Draws the confirmation items, the portions that rank, and the random baseline."""
    batch_tokens: int = _RUNTIME.eval_batch_tokens
    """Padded tokens per evaluation batch."""
    cache_bytes: int = _RUNTIME.cache_bytes
    """Memory for hidden states that candidates share."""

    def changed(self, **changes: Any) -> SearchSettings:
        """The same settings but for these, checked as a recipe is; raises RecipeError."""
        try:
            return SearchSettings(**{**dict(self), **changes})
        except ValidationError as error:
            raise as_recipe_error(error, SearchSettings, "dtr.search") from error

    @property
    def guard_names(self) -> list[str]:
        """A name for each guard, none of them twice."""
        return names_apart([guard.task for guard in self.guards])

    @property
    def limits(self) -> Limits:
        """The part that says when a hybrid is good enough."""
        return Limits(
            p_min=self.p_min,
            p_min_kind=self.p_min_kind,
            p_min_confidence=self.p_min_confidence,
        )
