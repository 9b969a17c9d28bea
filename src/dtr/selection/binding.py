"""Binds selection to a teacher, a bank and a task: evaluators, budgets in bytes, numbers per layer, the journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtr.distillation.bank import MixerBank, check_same_teacher
from dtr.distributed import World, current_world
from dtr.errors import RecipeError
from dtr.evaluation.evaluator import Evaluator, evaluate
from dtr.hybrid.cache import decode_cache_bytes
from dtr.selection.criteria import check_p_min, resolve_p_min
from dtr.selection.items import ItemSplit, split_items
from dtr.selection.journal import Journal
from dtr.selection.looks import count_look
from dtr.selection.ranking import likelihood_task
from dtr.selection.select import GuardTask, select_layers
from dtr.selection.settings import SearchSettings
from dtr.selection.spreading import SpreadEvaluator, clock_of, shared_journal
from dtr.selection.state import Budget
from dtr.selection.strategies import STRATEGIES
from dtr.selection.trace import SearchTrace
from dtr.tasks.base import Task, fingerprint
from dtr.teacher import Teacher

SEARCH_VERSION = 2
"""Changes with what is scored, so that a journal of an older search is not mixed with this one's."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a search found on validation, and what that took."""

    trace: SearchTrace
    pass_equivalents: float
    """Work in full passes over the validation split, guard tasks left out."""
    guard_pass_equivalents: float
    """Work on the guard tasks, in passes over theirs."""
    seconds: float


def check_search(task: Task, settings: SearchSettings) -> None:
    """Refuse a search that cannot end well, before anything is distilled; `search` does the same, later.

    Raises:
        RecipeError: an unknown strategy, or a P_min that no teacher reaches.
    """
    STRATEGIES[settings.strategy]
    check_p_min(settings.p_min, settings.p_min_kind)
    _parts(task, settings)


def check_teacher(teacher: Teacher, task: Task, settings: SearchSettings) -> None:
    """Refuse limits that this teacher misses, before anything is distilled or written; `search` does the same, later.

    Scores the teacher on validation, as it may get nothing right, or give no numbers at all.

    Raises:
        ModelError: log-probabilities that are no numbers.
        RecipeError: a P_min or floor that the teacher itself does not reach, or a share of a score of 0.
    """
    limits = [(task, settings.p_min, settings.p_min_kind, "search")]
    named = zip(settings.guard_names, settings.guards)
    limits += [(x.task, x.p_min, x.p_min_kind, f"search.guards ({name})") for name, x in named]
    for one, p_min, kind, where in limits:
        score = evaluate(teacher, one, split="validation", batch_tokens=settings.batch_tokens)
        resolve_p_min(p_min, kind, score, where=where)


def make_evaluator(teacher: Teacher, bank: MixerBank, task: Task, split: str, **options: Any) -> SpreadEvaluator:
    """An evaluator that knows the bank's mixers, spread over the ranks; `options` as `Evaluator` takes them."""
    own = Evaluator(
        teacher.model,
        teacher.tokenizer,
        task,
        split,
        mixers=bank.in_dtype(teacher.dtype),
        specs={number: bank.spec(number) for number in bank.mixers},
        **options,
    )
    return SpreadEvaluator(own, current_world())


def make_validation(teacher: Teacher, bank: MixerBank, task: Task, settings: SearchSettings) -> SpreadEvaluator:
    """The evaluator that a search with these settings asks, batched as it batches; with its `ranking`."""
    options = {
        "batch_tokens": settings.batch_tokens,
        "cache_bytes": settings.cache_bytes,
        "blocks": _split_items(task, settings).groups,
    }
    found = make_evaluator(teacher, bank, task, "validation", **options)
    ranked_by = likelihood_task(task, found.respond)
    if ranked_by is not None:
        found.ranking = make_evaluator(teacher, bank, ranked_by, "validation", **options)
    return found


def find_layers(
    teacher: Teacher,
    bank: MixerBank,
    task: Task,
    settings: SearchSettings,
    *,
    journal: str | Path | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Selection:
    """The search alone, without its test scores; arguments and errors as in `dtr.selection.search.search`."""
    check_same_teacher(bank.teacher_fingerprint, teacher, where="bank")
    check_search(task, settings)
    budget, items = _budget(teacher, bank, settings), _split_items(task, settings)
    started = time.monotonic()
    world = current_world()
    with _open_journal(world, journal, teacher, bank, task, settings) as book:
        validation = make_validation(teacher, bank, task, settings)
        options = {"batch_tokens": settings.batch_tokens, "cache_bytes": 0}
        guarding = [make_evaluator(teacher, bank, guard.task, "validation", **options) for guard in settings.guards]
        trace = select_layers(
            validation,
            layers=list(bank.mixers),
            num_model_layers=teacher.num_layers,
            layer_of=bank.layer_of,
            limits=settings.limits,
            strategy=settings.strategy,
            # Without portions and confirmation, all items need no names: the journal stays as short as it can be.
            items=items if len(items.groups) > 1 else None,
            guards=[
                GuardTask(name=name, score=score, p_min=guard.p_min, p_min_kind=guard.p_min_kind)
                for name, guard, score in zip(settings.guard_names, settings.guards, guarding)
            ],
            parts=_parts(task, settings),
            budget=budget,
            facts=_facts(bank, validation, items),
            run_to_end=settings.run_to_end,
            seed=settings.seed,
            clock=clock_of(world),
            journal=book,
            on_event=on_event and _in_words(bank, _with_work(validation, guarding, on_event)),
            earlier_looks=lambda: world.collect(_count_look(teacher, bank, task, settings) if world.is_first else 0)[0],
        )
    return Selection(
        trace=trace,
        pass_equivalents=validation.pass_equivalents(),
        guard_pass_equivalents=sum(score.pass_equivalents() for score in guarding),
        seconds=time.monotonic() - started,
    )


def _with_work(
    validation: SpreadEvaluator, guarding: Sequence[SpreadEvaluator], listener: Callable[[dict[str, Any]], None]
) -> Callable[[dict[str, Any]], None]:
    """A listener that hears with each score how much work the search has been so far."""

    def hear(event: dict[str, Any]) -> None:
        if event["event"] in ("teacher", "candidate"):
            guards = sum(score.pass_equivalents_about for score in guarding)
            event = {**event, "pass_equivalents": validation.pass_equivalents_about, "guard_pass_equivalents": guards}
        listener(event)

    return hear


def _in_words(bank: MixerBank, listener: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """A listener that hears of layers and kinds where the search speaks of numbers."""

    def hear(event: dict[str, Any]) -> None:
        if event.get("layer") is not None:
            event = {**event, **bank.named(event["layer"])}
        if "layers" in event:
            event = {**event, "layers": [bank.layer_of[number] for number in event["layers"]]}
        listener(event)

    return hear


def _parts(task: Task, settings: SearchSettings) -> list[Any]:
    """What `hold_each` names of every validation item."""
    field, items = settings.hold_each, task.splits["validation"]
    if field is None:
        return []
    if missing := next((item for item in items if field not in item.row), None):
        raise RecipeError(
            "search.hold_each",
            got=f"'{field}', which validation item {missing.id} does not have",
            expected="a field that every item has",
            hint=f"It has {', '.join(map(str, missing.row)) or 'none'}.",
        )
    return [item.row[field] for item in items]


def _split_items(task: Task, settings: SearchSettings) -> ItemSplit:
    items = task.splits["validation"]
    return split_items(
        len(items),
        names=[item.group for item in items] if any(item.group for item in items) else (),
        confirmation_share=settings.confirmation_share if settings.p_min_confidence is not None else 0.0,
        seed=settings.seed,
    )


def cache_sizes(teacher: Teacher, state_bytes: int, num_layers: int, settings: SearchSettings) -> dict[int, int]:
    """Bytes of a sequence's cache by number of linear layers, up to `num_layers` of them.

    Raises:
        RecipeError: none of them is within `settings.max_cache_bytes`.
    """
    sizes = {
        num: decode_cache_bytes(
            teacher.geometry,
            teacher.num_layers - num,
            context_tokens=settings.cache_context_tokens,
            bytes_per_element=teacher.dtype.itemsize,
            state_bytes=num * state_bytes,
        )
        for num in range(num_layers + 1)
    }
    if settings.max_cache_bytes is not None and min(sizes.values()) > settings.max_cache_bytes:
        raise RecipeError(
            "search.max_cache_bytes",
            got=f"{settings.max_cache_bytes:,} bytes at {settings.cache_context_tokens:,} tokens",
            expected=f"at least {min(sizes.values()):,}, with {num_layers} layers of the bank linear",
            hint="Raise the budget, or lower search.cache_context_tokens.",
        )
    return sizes


def _budget(teacher: Teacher, bank: MixerBank, settings: SearchSettings) -> Budget:
    num_wanted, text = settings.max_linear_layers, ""
    context_tokens = settings.cache_context_tokens
    if settings.max_cache_bytes is not None:
        state_bytes = max(mixer.state_bytes(teacher.dtype.itemsize) for mixer in bank.mixers.values())
        sizes = cache_sizes(teacher, state_bytes, len(bank.layers), settings)
        fitting = [num for num, size in sizes.items() if size <= settings.max_cache_bytes]
        if num_wanted is None or fitting[0] < num_wanted:
            num_wanted = max(1, fitting[0])
            text = f"the cache takes {sizes[fitting[0]]:,} bytes at {context_tokens:,} tokens, within the budget"
    return Budget(num_linear=num_wanted, num_linear_text=text, seconds=settings.max_seconds)


def _count_look(teacher: Teacher, bank: MixerBank, task: Task, settings: SearchSettings) -> int:
    # As looks of earlier releases are digested.
    asked = settings.model_dump(exclude={"guards", "test_curve"}) | {"guards": [], "batch_tokens": 0, "cache_bytes": 0}
    return count_look({"teacher": teacher.fingerprint, "task": fingerprint(task)}, {"bank": bank.fingerprint, **asked})


def _facts(bank: MixerBank, validation: SpreadEvaluator, items: ItemSplit) -> Callable[[str], Mapping[int, float]]:
    def facts(name: str) -> Mapping[int, float]:
        if name == "nmse":
            return bank.nmse_after
        if name in ("kl", "impact"):
            found = validation.measure({"kl": "divergence"}.get(name, name), list(bank.mixers), items.selection)
            return {number: value for number, value in found.items() if value is not None}
        return {}

    return facts


def _open_journal(
    world: World,
    path: str | Path | None,
    teacher: Teacher,
    bank: MixerBank,
    task: Task,
    settings: SearchSettings,
) -> Any:
    if path is None:
        return nullcontext()
    # P_min and the strategy are not part of it: the same scores serve any.
    identity = {
        "search": SEARCH_VERSION,
        # As the bank has it, which an earlier release may have written.
        "teacher": bank.teacher_fingerprint,
        "dtype": str(teacher.dtype),
        "bank": bank.fingerprint,
        "task": fingerprint(task),
        "guards": {name: fingerprint(guard.task) for name, guard in zip(settings.guard_names, settings.guards)},
        "seed": settings.seed,
    }
    return shared_journal(world, lambda: Journal(path, identity=identity, resume=True))
