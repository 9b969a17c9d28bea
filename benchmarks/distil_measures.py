"""What `distil_quality.py` measures of a bank: tasks with all layers linear, recall by share, where hybrids part."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from dtr.bench.closeness import Sequences, divergences, layer_errors
from dtr.distillation.bank import MixerBank
from dtr.evaluation.encoding import Encoder
from dtr.evaluation.evaluator import Evaluator, evaluate
from dtr.recipe import Recipe
from dtr.selection.search import search
from dtr.tasks.base import Task
from dtr.tasks.training import right_answer
from dtr.teacher import Teacher

SHARES = (0.5, 0.75)
"""Shares of the layers that search replaces for the recall task."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Measures one bank after the other; what they have in common is asked of the teacher once."""

    teacher: Teacher
    tasks: dict[str, Task]
    recall: Task | None
    """None leaves out what is only for a final report, and scores the tasks on validation instead of test."""
    num_text_blocks: int
    """Held-out blocks on which hybrids are compared with the teacher; 0 leaves that out."""
    num_layer_blocks: int
    """Those on which each layer is looked at alone."""
    _teacher_scores: dict[tuple[str, int], float] = field(default_factory=dict)
    _prompts: dict[str, Sequences] = field(default_factory=dict)

    def __call__(self, recipe: Recipe, bank: MixerBank, held_out: torch.Tensor) -> dict[str, Any]:
        """The facts of one row; `held_out` are blocks (num_blocks, T), the same for every bank."""
        numbers = closest(bank)
        kept = {name: self._all_linear(recipe, bank, numbers, name) for name in self.tasks}
        retention = {name: share_of(scores["hybrid"], scores["teacher"]) for name, scores in kept.items()}
        if retention and None not in retention.values():
            retention["mean"] = sum(retention.values()) / len(retention)
        prefix = "all_linear" if self.recall is not None else "validation_all_linear"
        facts: dict[str, Any] = {
            "mixer": recipe.mixer.model_dump(),
            "is_pure_linear": all(mixer.is_pure_linear for mixer in bank.mixers.values()),
            "mean_nmse": bank.mean_nmse,
            "nmse": [bank.nmse_after[number] for number in numbers],
            "num_tokens": bank.num_tokens,
            "distill_seconds": bank.seconds,
            **({"stopped": bank.stopped} if bank.stopped else {}),
            f"{prefix}_retention": retention,
            f"{prefix}_scores": kept,
        }
        if self.recall is not None:
            scores = by_share(recipe, self.teacher, bank, self.recall)
            shares = {share: share_of(value, scores["teacher"]) for share, value in scores["hybrid"].items()}
            facts |= {"recall_retention": shares, "recall_scores": scores}
        return facts | (self._partings(bank, numbers, held_out) if self.num_text_blocks else {})

    def _all_linear(self, recipe: Recipe, bank: MixerBank, numbers: list[int], name: str) -> dict[str, float]:
        """Scores of the teacher and of the hybrid without any attention."""
        teacher, batch_tokens = self.teacher, recipe.runtime.eval_batch_tokens
        evaluator = Evaluator(
            teacher.model,
            teacher.tokenizer,
            self.tasks[name],
            "validation" if self.recall is None else "test",
            mixers=bank.in_dtype(teacher.dtype),
            specs={number: bank.spec(number) for number in bank.mixers},
            batch_tokens=batch_tokens,
        )
        if (name, batch_tokens) not in self._teacher_scores:
            self._teacher_scores[name, batch_tokens] = evaluator(frozenset()).value
        hybrid = evaluator(frozenset(numbers)).value
        return {"teacher": self._teacher_scores[name, batch_tokens], "hybrid": hybrid}

    def _partings(self, bank: MixerBank, numbers: list[int], held_out: torch.Tensor) -> dict[str, Any]:
        """KL(teacher || hybrid) on text and on right answers of the tasks' validation items; errors of the layers."""
        teacher, in_place = self.teacher, bank.in_dtype(self.teacher.dtype)
        mixers = {bank.layer_of[number]: in_place[number] for number in numbers}
        layers = frozenset(mixers)
        everything = {"all_linear": layers}
        alone = {f"only {layer}": frozenset({layer}) for layer in mixers}
        without = {f"without {layer}": layers - {layer} for layer in mixers}
        for name, task in self.tasks.items():
            if name not in self._prompts:
                self._prompts[name] = Sequences.of(validation_prompts(teacher, task))
        texts = {"held_out": Sequences.of(held_out[: self.num_text_blocks].tolist()), **self._prompts}
        some = Sequences.of(held_out[: self.num_layer_blocks].tolist())
        found = {name: divergences(teacher, mixers, text, everything)["all_linear"] for name, text in texts.items()}
        by_layer = divergences(teacher, mixers, some, {**everything, **alone, **without})
        errors = layer_errors(teacher, mixers, texts["held_out"])
        buckets = {name for error in errors.values() for name in error.nmse_by_position}
        return {
            # In blocks of one length, whatever a trial trains on; `mean_nmse` is in the trial's own.
            "text_nmse": sum(error.nmse for error in errors.values()) / len(errors),
            "all_linear_kl": {name: one.kl for name, one in found.items()},
            "all_linear_agreement": {name: one.agreement for name, one in found.items()},
            "all_linear_kl_by_position": {name: one.by_position for name, one in found.items()},
            # Both on the same few blocks.
            "kl_by_layer": {name: by_layer[name].kl for name in ("all_linear", *alone, *without)},
            "nmse_by_position": {
                bucket: [error.nmse_by_position[bucket] for error in errors.values()]
                for bucket in sorted(buckets, key=lambda name: int(name.partition("-")[0]))
            },
        }


def closest(bank: MixerBank) -> list[int]:
    """The mixer of each layer, by number; where a layer has several, the one of least error."""
    ranked = sorted(bank.mixers, key=bank.nmse_after.__getitem__, reverse=True)
    best = {bank.layer_of[number]: number for number in ranked}
    return [best[layer] for layer in bank.layers]


def validation_prompts(teacher: Teacher, task: Task) -> list[list[int]]:
    """Token ids of each validation item with its right answer."""
    rows = []
    encoder = Encoder(teacher.tokenizer, chat_template=task.chat_template)
    for item in task.splits["validation"]:
        request = right_answer(item)
        pair = encoder.pair(request.context, request.target)
        rows.append([*pair.context, *pair.target])
    return rows


def share_of(hybrid: float, teacher: float) -> float | None:
    """None where the teacher scores nothing, so that there is nothing to keep."""
    return hybrid / teacher if teacher else None


def by_share(recipe: Recipe, teacher: Teacher, bank: MixerBank, recall: Task) -> dict[str, Any]:
    """Test scores on recall with shares of the layers replaced, in the order that search finds on validation."""
    wanted = {str(share): math.ceil(share * teacher.num_layers) for share in SHARES}
    if not evaluate(teacher, recall, split="validation", batch_tokens=recipe.runtime.eval_batch_tokens).value:
        # Nothing to keep, so that there is no order either.
        return {"teacher": 0.0, "chance": 1 / 6, "hybrid": dict.fromkeys(wanted, 0.0)}
    found = search(
        teacher,
        bank,
        recall,
        strategy=recipe.search.strategy,
        # The search goes on to the largest share wherever the limit is. With a limit that no hybrid breaks `auto` would
        # see nothing to choose and give an order without meaning.
        p_min=recipe.search.p_min,
        p_min_confidence=None,
        run_to_end=True,
        max_linear_layers=max(wanted.values()),
        test_curve=True,
        seed=recipe.seed,
        batch_tokens=recipe.runtime.eval_batch_tokens,
        cache_bytes=recipe.runtime.cache_bytes,
    )
    on_path = {len(step.linear): score.value for step, score in zip(found.trace.steps, found.test_curve, strict=True)}
    return {
        "teacher": found.teacher_test.value,
        # Whoever names one of the six answers that the passage holds, without looking which.
        "chance": 1 / 6,
        "hybrid": {share: on_path[min(n for n in on_path if n >= num)] for share, num in wanted.items()},
    }
