"""Binds selection to a teacher, a bank and a task: evaluators, budgets in bytes, numbers per layer, the journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtr.distillation.bank import MixerBank
from dtr.distributed import World, current_world
from dtr.errors import BankError, RecipeError
from dtr.evaluation.evaluator import Evaluator
from dtr.hybrid.cache import decode_cache_bytes
from dtr.selection.certificate import check_num_items
from dtr.selection.criteria import PMinKind, check_p_min
from dtr.selection.items import ItemSplit, split_items
from dtr.selection.journal import Journal
from dtr.selection.state import Budget
from dtr.selection.strategies import STRATEGIES, GuardTask, select_layers
from dtr.selection.trace import SearchTrace
from dtr.spreading import SpreadEvaluator, clock_of, shared_journal
from dtr.tasks.base import Task, fingerprint
from dtr.teacher import Teacher

RACING = ("auto",)
"""Strategies that score portions of the items; for the others each portion would only be one more batch."""


@dataclass(frozen=True, kw_only=True)
class GuardFloor:
    """A task that must keep a share of the teacher's score, or a value of its metric, whatever the search gains."""

    task: Task
    p_min: float
    p_min_kind: PMinKind = "relative"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a search found on validation, and what that took."""

    trace: SearchTrace
    pass_equivalents: float
    """Work in full passes over the validation split, guard tasks left out."""
    guard_pass_equivalents: float
    """Work on the guard tasks, in passes over theirs."""
    seconds: float


def check_search(
    task: Task,
    *,
    p_min: float = 0.95,
    p_min_kind: PMinKind = "relative",
    p_min_confidence: float | None = None,
    confirmation_share: float = 0.5,
    strategy: str = "exact",
    **_others: Any,
) -> None:
    """Refuse a search that cannot end well, before anything is distilled; `search` does the same, later.

    Raises:
        RecipeError: an unknown strategy, or a P_min that no teacher reaches.
        DataError: too few validation items for the confidence asked for.
    """
    STRATEGIES[strategy]
    check_p_min(p_min, p_min_kind)
    if p_min_confidence is not None:
        split = split_items(len(task.splits["validation"]), confirmation_share=confirmation_share)
        check_num_items(
            len(split.confirmation), confidence=p_min_confidence, p_min=p_min, p_min_kind=p_min_kind, teacher=None
        )


def make_evaluator(teacher: Teacher, bank: MixerBank, task: Task, split: str, **options: Any) -> SpreadEvaluator:
    """An evaluator that knows the bank's mixers, spread over the ranks; `options` as `Evaluator` takes them."""
    own = Evaluator(
        teacher.model,
        teacher.tokenizer,
        task,
        split,
        mixers=bank.in_dtype(teacher.dtype),
        specs={layer: bank.spec() for layer in bank.layers},
        **options,
    )
    return SpreadEvaluator(own, current_world())


def find_layers(
    teacher: Teacher,
    bank: MixerBank,
    task: Task,
    *,
    p_min: float = 0.95,
    p_min_kind: PMinKind = "relative",
    strategy: str = "exact",
    p_min_confidence: float | None = None,
    confirmation_share: float = 0.5,
    guards: Sequence[GuardFloor] = (),
    max_linear_layers: int | None = None,
    max_cache_bytes: int | None = None,
    cache_context_tokens: int = 2048,
    max_seconds: float | None = None,
    run_to_end: bool = False,
    seed: int = 0,
    batch_tokens: int = 16_384,
    cache_bytes: int = 4_000_000_000,
    journal: str | Path | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Selection:
    """The search alone, without its test scores; arguments and errors as in `dtr.replace.search`."""
    if bank.teacher_fingerprint != teacher.fingerprint:
        raise BankError(
            "bank",
            got=f"one of teacher {bank.teacher_fingerprint}",
            expected=f"one of {teacher.source} ({teacher.fingerprint})",
            hint="Give the teacher that the bank was made from, or distil again.",
        )
    limits: dict[str, Any] = {"p_min": p_min, "p_min_kind": p_min_kind, "p_min_confidence": p_min_confidence}
    check_search(task, **limits, confirmation_share=confirmation_share, strategy=strategy)
    budget = _budget(teacher, bank, max_linear_layers, max_cache_bytes, cache_context_tokens, max_seconds)
    items = split_items(
        len(task.splits["validation"]),
        confirmation_share=confirmation_share if p_min_confidence is not None else 0.0,
        in_blocks=strategy in RACING,
        seed=seed,
    )
    started = time.monotonic()
    options = {"batch_tokens": batch_tokens, "cache_bytes": cache_bytes}
    world = current_world()
    with _open_journal(world, journal, teacher, bank, task, guards, seed) as book:
        validation = make_evaluator(teacher, bank, task, "validation", **options, blocks=items.groups)
        options["cache_bytes"] = 0
        guarding = [make_evaluator(teacher, bank, guard.task, "validation", **options) for guard in guards]
        trace = select_layers(
            validation,
            layers=bank.layers,
            num_model_layers=teacher.num_layers,
            **limits,
            strategy=strategy,
            # Without portions and confirmation, all items need no names: the journal stays as short as it can be.
            items=items if len(items.groups) > 1 else None,
            guards=[
                GuardTask(name=guard.task.name, score=score, p_min=guard.p_min, p_min_kind=guard.p_min_kind)
                for guard, score in zip(guards, guarding)
            ],
            budget=budget,
            facts=_facts(bank, validation, items),
            run_to_end=run_to_end,
            seed=seed,
            clock=clock_of(world),
            journal=book,
            on_event=on_event,
        )
    return Selection(
        trace=trace,
        pass_equivalents=validation.pass_equivalents(),
        guard_pass_equivalents=sum(score.pass_equivalents() for score in guarding),
        seconds=time.monotonic() - started,
    )


def _budget(
    teacher: Teacher,
    bank: MixerBank,
    max_linear_layers: int | None,
    max_cache_bytes: int | None,
    context_tokens: int,
    max_seconds: float | None,
) -> Budget:
    num_wanted, text = max_linear_layers, ""
    if max_cache_bytes is not None:
        state_bytes = max(mixer.state_bytes(teacher.dtype.itemsize) for mixer in bank.mixers.values())
        sizes = {
            num: decode_cache_bytes(
                teacher.geometry,
                teacher.num_layers - num,
                context_tokens=context_tokens,
                bytes_per_element=teacher.dtype.itemsize,
                state_bytes=num * state_bytes,
            )
            for num in range(len(bank.layers) + 1)
        }
        fitting = [num for num, size in sizes.items() if size <= max_cache_bytes]
        if not fitting:
            raise RecipeError(
                "search.max_cache_bytes",
                got=f"{max_cache_bytes:,} bytes at {context_tokens:,} tokens",
                expected=f"at least {min(sizes.values()):,}, with all {len(bank.layers)} layers of the bank linear",
                hint="Raise the budget, or lower search.cache_context_tokens.",
            )
        if num_wanted is None or fitting[0] < num_wanted:
            num_wanted = max(1, fitting[0])
            text = f"the cache takes {sizes[fitting[0]]:,} bytes at {context_tokens:,} tokens, within the budget"
    return Budget(num_linear=num_wanted, num_linear_text=text, seconds=max_seconds)


def _facts(bank: MixerBank, validation: SpreadEvaluator, items: ItemSplit) -> Callable[[str], Mapping[int, float]]:
    def facts(name: str) -> Mapping[int, float]:
        if name == "nmse":
            return bank.nmse_after
        if name in ("kl", "impact"):
            found = validation.measure({"kl": "divergence"}.get(name, name), bank.layers, items.selection)
            return {layer: value for layer, value in found.items() if value is not None}
        return {}

    return facts


def _open_journal(
    world: World,
    path: str | Path | None,
    teacher: Teacher,
    bank: MixerBank,
    task: Task,
    guards: Sequence[GuardFloor],
    seed: int,
) -> Any:
    if path is None:
        return nullcontext()
    # P_min and the strategy are not part of it: the same scores serve any.
    identity = {
        "teacher": teacher.fingerprint,
        "dtype": str(teacher.dtype),
        "bank": bank.fingerprint,
        "task": fingerprint(task),
        "guards": {guard.task.name: fingerprint(guard.task) for guard in guards},
        "seed": seed,
    }
    return shared_journal(world, lambda: Journal(path, identity=identity, resume=True))
