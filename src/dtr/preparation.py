"""What a run needs before its first stage: device and teacher, task and guards, text, as the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dtr.corpus import StreamedBlocks, TokenBlocks, load_text, stream_text
from dtr.corpus.faults import Faults
from dtr.distributed import join_world
from dtr.ops.dispatch import use_backend
from dtr.recipe import Recipe, TaskSection
from dtr.settings import GuardFloor, SearchSettings
from dtr.tasks import load_task
from dtr.tasks.base import Task
from dtr.teacher import Teacher, load_teacher, pick_device

Listener = Callable[[dict[str, Any]], None]


def prepare_teacher(recipe: Recipe, emit: Listener) -> Teacher:
    """Set threads and backend, then load the teacher."""
    if recipe.runtime.num_threads:
        torch.set_num_threads(recipe.runtime.num_threads)
    _, device = join_world(pick_device(recipe.runtime.device))
    use_backend(recipe.runtime.backend, device.type)
    settings = recipe.teacher
    emit({"event": "stage", "text": f"loading {settings.source}"})
    teacher = load_teacher(
        settings.source,
        device=str(device),
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        shard=recipe.runtime.shard_teacher,
    )
    head_dim, dtype = teacher.geometry.head_dim, None if recipe.runtime.backend == "auto" else teacher.dtype
    # Again, now that it is known what kernels would get; auto goes by each call's type.
    backend = use_backend(recipe.runtime.backend, device.type, head_dim=head_dim, dtype=dtype)
    emit({"event": "backend", "name": backend.name, "reason": backend.reason, "device": str(device)})
    return teacher


def prepare_mixers(recipe: Recipe) -> dict[str, Any]:
    """Kinds and options as `distill` takes them."""
    settings = recipe.mixer.model_dump()
    return {"mixer": settings["kind"], "options": settings["options"]}


def prepare_task(recipe: Recipe) -> Task:
    return _load(recipe.task, recipe.seed)


def prepare_guards(recipe: Recipe) -> list[GuardFloor]:
    """The guard tasks, loaded before any work so that missing data is found at once."""
    return [
        GuardFloor(task=_load(guard.task, recipe.seed), p_min=guard.p_min, p_min_kind=guard.p_min_kind)
        for guard in recipe.search.guards
    ]


def search_settings(recipe: Recipe, guards: Sequence[GuardFloor]) -> SearchSettings:
    """What the recipe asks of a search, with the guard tasks that it names."""
    return SearchSettings(
        **recipe.search.model_dump(exclude={"guards", "test_curve"}),
        guards=guards,
        seed=recipe.seed,
        batch_tokens=recipe.runtime.eval_batch_tokens,
        cache_bytes=recipe.runtime.cache_bytes,
    )


def _load(task: TaskSection, seed: int) -> Task:
    settings = task.model_dump()
    return load_task(settings.pop("source"), **settings, seed=seed)


def prepare_text(recipe: Recipe, teacher: Teacher, emit: Listener) -> tuple[TokenBlocks | StreamedBlocks, Faults]:
    """Text as blocks; what cannot be read of it is told and passed over, as long as something is left."""
    source = recipe.text.source
    shown = source if isinstance(source, str) else f"{len(source)} sources"
    emit({"event": "stage", "text": f"reading and tokenizing {shown}"})
    faults = Faults(emit)
    settings: dict[str, Any] = {
        "tokenizer": teacher.tokenizer,
        "seq_len_tokens": recipe.distill.seq_len_tokens,
        "num_held_out_tokens": recipe.text.num_held_out_tokens,
        "seed": recipe.seed,
        "faults": faults,
    }
    if recipe.text.streaming:
        return stream_text(recipe.text.source, **settings), faults
    return load_text(recipe.text.source, max_tokens=recipe.distill.num_tokens, **settings), faults
