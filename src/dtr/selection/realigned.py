"""After search: M_opt with its layers distilled once more on its own hidden states, and what that changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dtr.distillation.bank import MixerBank
from dtr.evaluation.score import Score
from dtr.selection.binding import make_evaluator
from dtr.selection.search import hybrid_of
from dtr.tasks.base import Task, names_apart
from dtr.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Realigned:
    """M_opt after its layers were distilled once more on the hybrid's own hidden states."""

    model: Any
    """A Hugging Face model with the teacher's own modules, to be run or saved; worth keeping where `is_kept`."""
    bank: MixerBank
    """The realigned layers alone."""
    layers: tuple[int, ...]
    val_before: Score
    val: Score
    test: Score
    lost_guards: tuple[str, ...]
    """Guard tasks on which validation got worse."""

    @property
    def is_kept(self) -> bool:
        """Whether validation got worse on no task; test has no say."""
        return not self.lost_guards and self.val.goodness >= self.val_before.goodness


def score_realigned(
    teacher: Teacher,
    bank: MixerBank,
    realigned: MixerBank,
    task: Task,
    layers: Sequence[int],
    *,
    guards: Sequence[Task] = (),
    batch_tokens: int = 16_384,
) -> Realigned:
    """Score the hybrid of the same layers with the bank's mixers and with the realigned ones.

    Args:
        bank: what the search took.
        realigned: from `dtr.distillation.realignment.realign`, of these layers.
        layers: those of M_opt in the order of replacement.
        guards: tasks that must not get worse either.
    """

    def score(mixers: MixerBank, split: str, task: Task = task) -> Score:
        return make_evaluator(teacher, mixers, task, split, batch_tokens=batch_tokens, cache_bytes=0)(frozenset(layers))

    def is_worse(guard: Task) -> bool:
        return score(realigned, "validation", guard).goodness < score(bank, "validation", guard).goodness

    return Realigned(
        model=hybrid_of(teacher, realigned, layers, share_modules=True),
        bank=realigned,
        layers=tuple(layers),
        val_before=score(bank, "validation"),
        val=score(realigned, "validation"),
        test=score(realigned, "test"),
        lost_guards=tuple(name for name, guard in zip(names_apart(guards), guards) if is_worse(guard)),
    )
