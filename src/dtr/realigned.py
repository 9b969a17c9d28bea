"""After search: M_opt with its layers distilled once more on its own hidden states, and what that changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtr.binding import make_evaluator
from dtr.corpus.mixing import Text
from dtr.distillation.bank import MixerBank, load_bank
from dtr.distillation.realignment import realign
from dtr.distributed import current_world
from dtr.evaluation.score import Score
from dtr.recipe import Recipe
from dtr.replace import SearchResult, hybrid_of
from dtr.runfolder import RunFolder
from dtr.tasks.base import Task
from dtr.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Realigned:
    """M_opt after its layers were distilled once more on the hybrid's own hidden states."""

    model: Any
    """A Hugging Face model; worth keeping where `is_kept`."""
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
        model=hybrid_of(teacher, realigned, layers),
        bank=realigned,
        layers=tuple(layers),
        val_before=score(bank, "validation"),
        val=score(realigned, "validation"),
        test=score(realigned, "test"),
        lost_guards=tuple(guard.name for guard in guards if is_worse(guard)),
    )


def prepare_realigned(
    recipe: Recipe,
    teacher: Teacher,
    bank: MixerBank,
    text: Text,
    tasks: Sequence[Task],
    result: SearchResult,
    folder: RunFolder,
    emit: Callable[[dict[str, Any]], None],
) -> Realigned:
    """Realign the linear layers of M_opt as the recipe says, or take what an earlier run of it has finished; score.

    `tasks` are the one that search looked at and its guards.
    """
    layers = result.trace.m_opt.layers
    emit({"event": "stage", "text": f"realigning {len(layers)} layers on the hybrid's own hidden states"})
    realigned = _load_finished(folder.realigned, teacher, layers)
    if realigned is None:
        apart = {"num_tokens", "seq_len_tokens", "learning_rate", "refit_tokens", "layers"}
        realigned = realign(
            teacher,
            bank,
            text,
            layers,
            **recipe.realign.model_dump(),
            **recipe.distill.model_dump(exclude=apart),
            seed=recipe.seed,
            checkpoint=folder.realign_checkpoint,
            on_event=emit,
        )
        if current_world().is_first:
            realigned.save(folder.realigned)
            folder.realign_checkpoint.unlink(missing_ok=True)
    task, *guards = tasks
    batch_tokens = recipe.runtime.eval_batch_tokens
    found = score_realigned(teacher, bank, realigned, task, layers, guards=guards, batch_tokens=batch_tokens)
    scores = {"val_before": found.val_before.value, "val": found.val.value}
    emit({"event": "realigned", **scores, "kept": found.is_kept})
    return found


def _load_finished(folder: Path, teacher: Teacher, layers: Sequence[int]) -> MixerBank | None:
    """What an earlier run of this recipe has finished, if it was for these layers."""
    if not (folder / "bank.json").exists():
        return None
    bank = load_bank(folder, teacher=teacher)
    return bank if bank.identity["layers"] == sorted(layers) else None
