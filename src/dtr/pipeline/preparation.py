"""What a run needs before its first stage: device and teacher, task and guards, text, as the recipe says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dtr.corpus import load_text, stream_text
from dtr.corpus.faults import Faults
from dtr.corpus.loading import pack_documents
from dtr.corpus.mixing import MixedBlocks, Part, Text
from dtr.corpus.sources import check_sources
from dtr.corpus.writing import write_documents
from dtr.distillation.bank import MixerBank, find_bank, load_bank, read_specs
from dtr.distillation.start import backends_of, check_distillation, check_segments
from dtr.distributed import join_world, side_world
from dtr.evaluation.encoding import render_turn
from dtr.mixers import MIXERS
from dtr.ops.backend import GATED_DELTA, Backend, choose_backend
from dtr.pipeline.tryout import check_budget, check_step, try_task, try_text
from dtr.recipe import Recipe, TaskSection
from dtr.selection.binding import check_search, check_teacher
from dtr.selection.settings import GuardFloor, SearchSettings
from dtr.tasks import load_task
from dtr.tasks.base import Task, fingerprint, names_apart
from dtr.tasks.training import training_prompts
from dtr.teacher import Teacher, load_teacher, pick_device, tokenizer_fingerprint

Listener = Callable[[dict[str, Any]], None]

TASK, TEACHER = "task", "teacher"
"""Sources of text that are no files: the task's train split, and what the teacher writes."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run works on, all of it read and checked before its folder is opened."""

    teacher: Teacher
    task: Task
    settings: SearchSettings
    bank: MixerBank | None
    """A bank that is given; then nothing is distilled."""
    text: Text | None
    faults: dict[str, Faults]
    """By source, what of the text could not be read."""

    @property
    def tasks(self) -> list[Task]:
        """The one that search looks at, then its guards."""
        return [self.task, *(guard.task for guard in self.settings.guards)]


def prepare_run(recipe: Recipe, bank: str | Path | None, emit: Listener) -> Prepared:
    """Everything that a run reads, what is quick first, so that a mistake is told before a large model is loaded."""
    # A bank needs no text, unless its layers are to be realigned.
    needs_text = bank is None or recipe.realign.num_tokens
    if needs_text:
        check_text(recipe)
    if bank is None:
        read_specs(**prepare_mixers(recipe))
        check_segments(recipe.distill.segment_tokens, seq_len_tokens=recipe.distill.seq_len_tokens)
    else:
        find_bank(bank)
    emit({"event": "stage", "text": f"reading the task {recipe.task.path or recipe.task.source}"})
    task = prepare_task(recipe)
    settings = search_settings(recipe, prepare_guards(recipe))
    for one in (task, *(guard.task for guard in settings.guards)):
        for note in one.notes:
            emit({"event": "note", "task": one.name, "text": note})
    check_search(task, settings)
    teacher = prepare_teacher(recipe, emit)
    given = None if bank is None else load_bank(bank, teacher=teacher, backend=recipe.runtime.backend)
    if given is None:
        check_training(recipe, teacher, settings)
    tell_backends(recipe, teacher, given, emit)
    emit({"event": "stage", "text": "trying an item of each split"})
    for one in (task, *(guard.task for guard in settings.guards)):
        try_task(teacher, one, batch_tokens=settings.batch_tokens)
    check_teacher(teacher, task, settings)
    ready = Prepared(teacher=teacher, task=task, settings=settings, bank=given, text=None, faults={})
    if not needs_text:
        return ready
    text, faults = prepare_text(recipe, teacher, emit, tasks=ready.tasks)
    return replace(ready, text=text, faults=faults)


def check_training(recipe: Recipe, teacher: Teacher, settings: SearchSettings | None = None) -> None:
    """Refuse mixers, layers, sizes and a budget that this teacher and this machine cannot have; raises RecipeError."""
    specs, layers = check_distillation(
        teacher,
        **prepare_mixers(recipe),
        **recipe.distill.model_dump(include={"layers", "segment_tokens", "refit_tokens"}),
        backend=recipe.runtime.backend,
    )
    check_step(recipe, teacher, specs, len(layers))
    if settings is not None:
        check_budget(teacher, specs, len(layers), settings)


def what_was_read(
    teacher: Teacher, text: Text | None, tasks: Sequence[Task] = (), bank: MixerBank | None = None
) -> dict[str, str]:
    """Fingerprints by name, so that a resumed run notices when anything has changed meanwhile."""
    read = {"teacher": teacher.fingerprint, "tokenizer": tokenizer_fingerprint(teacher.tokenizer)}
    read |= {} if text is None else {"text": text.fingerprint}
    # The first is what search looks at, the others are its guards.
    names = ["task", *(f"guard {name}" for name in names_apart(tasks[1:]))]
    read |= {name: fingerprint(task) for name, task in zip(names, tasks)}
    return read | ({} if bank is None else {"bank": bank.fingerprint})


def prepare_teacher(recipe: Recipe, emit: Listener) -> Teacher:
    """Set threads and load the teacher, once it is known that the backend can run here."""
    if recipe.runtime.num_threads:
        torch.set_num_threads(recipe.runtime.num_threads)
    _, device = join_world(pick_device(recipe.runtime.device))
    choose_backend(recipe.runtime.backend, device.type)
    settings = recipe.teacher
    emit({"event": "stage", "text": f"loading {settings.source}"})
    teacher = load_teacher(
        settings.source,
        device=str(device),
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        shard=recipe.runtime.shard_teacher,
    )
    emit({"event": "self_check", "text": teacher.self_check})
    # Again, now that it is known what kernels would get.
    backends_of(teacher, [(GATED_DELTA, recipe.runtime.backend)])
    return teacher


def mixer_backends(recipe: Recipe, teacher: Teacher, bank: MixerBank | None) -> list[Backend]:
    """What the mixers of a bank run with, or those that the recipe asks for, each once."""
    if bank is None:
        return backends_of(teacher, [(MIXERS[kind].operation, recipe.runtime.backend) for kind in recipe.mixer.names])
    return backends_of(teacher, [(mixer.operation, mixer.backend) for mixer in bank.mixers.values()])


def tell_backends(recipe: Recipe, teacher: Teacher, bank: MixerBank | None, emit: Listener) -> None:
    """Say what `mixer_backends` finds, before the work that runs with it."""
    for backend in mixer_backends(recipe, teacher, bank):
        emit({"event": "backend", "name": backend.name, "reason": backend.reason, "device": str(teacher.device)})


def prepare_mixers(recipe: Recipe) -> dict[str, Any]:
    """Kinds and options as `distill` takes them."""
    settings = recipe.mixer.model_dump(exclude_none=True)
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
        **{**dict(recipe.search), "guards": guards},
        seed=recipe.seed,
        batch_tokens=recipe.runtime.eval_batch_tokens,
        cache_bytes=recipe.runtime.cache_bytes,
    )


def _load(task: TaskSection, seed: int) -> Task:
    settings = task.model_dump()
    return load_task(settings.pop("source"), **settings, seed=seed)


def check_text(recipe: Recipe) -> None:
    """Refuse sources of text that are not there or share a file; raises DataError."""
    check_sources([recipe.text.source, *recipe.text.mix], known=(TASK, TEACHER))


def prepare_text(
    recipe: Recipe, teacher: Teacher, emit: Listener, *, tasks: Sequence[Task] | None = None
) -> tuple[Text, dict[str, Faults]]:
    """Text as blocks; what cannot be read of it is told and passed over, as long as something is left.

    Args:
        recipe: its sections text, distill and task, and the seed.
        teacher: gives the tokenizer, and writes where it is a source itself.
        emit: told of stages and faults.
        tasks: those of the recipe, if they are loaded already: their validation and test items are never trained on.

    Returns:
        the blocks, and by source what could not be read; of streamed text that is known at the end of training.
    """
    settings = recipe.text
    main = settings.source if isinstance(settings.source, str) else ", ".join(settings.source)
    faults = {name: Faults(emit) for name in (main, *settings.mix)}

    def part(name: str, source: str | list[str], share: float, num_held_out_tokens: int) -> Part:
        emit({"event": "stage", "text": f"reading and tokenizing {name}"})
        options: dict[str, Any] = {
            "tokenizer": teacher.tokenizer,
            "seq_len_tokens": recipe.distill.seq_len_tokens,
            "num_held_out_tokens": num_held_out_tokens,
            "whole_starts": settings.whole_starts,
            "seed": recipe.seed,
            "faults": faults[name],
            "world": side_world(),
        }
        num_tokens = math.ceil(share * recipe.distill.num_tokens)
        if source == TASK:
            documents = _task_documents(recipe, teacher, tasks)
            return Part(name=name, share=share, text=pack_documents(documents, name, max_tokens=num_tokens, **options))
        if source == TEACHER:
            source = _written(recipe, teacher, emit)
        if settings.streaming:
            return Part(name=name, share=share, text=stream_text(source, **options))
        return Part(name=name, share=share, text=load_text(source, max_tokens=num_tokens, **options))

    parts = [part(main, settings.source, 1 - sum(settings.mix.values()), settings.num_held_out_tokens)]
    # Errors are measured on the main source alone, so nothing is held out of the others.
    parts += [part(name, name, share, 0) for name, share in settings.mix.items()]
    text = MixedBlocks(parts=parts) if settings.mix else parts[0].text
    try_text(text, teacher)
    return text, faults


def _written(recipe: Recipe, teacher: Teacher, emit: Listener) -> list[str]:
    return write_documents(
        teacher,
        seq_len_tokens=recipe.distill.seq_len_tokens,
        **recipe.text.writing.model_dump(),
        seed=recipe.seed,
        on_event=emit,
    )


def _task_documents(recipe: Recipe, teacher: Teacher, tasks: Sequence[Task] | None) -> list[str]:
    """The rows of the task's train split as the task shows them to a model, with the right answer."""
    if tasks is None:
        tasks = [prepare_task(recipe), *(guard.task for guard in prepare_guards(recipe))]
    settings = recipe.task.model_dump()
    prompts = training_prompts(settings.pop("source"), seen=tasks, **settings, seed=recipe.seed)
    if not recipe.task.chat_template:
        return [prompt.context + prompt.target for prompt in prompts]
    return [render_turn(teacher.tokenizer, prompt.context) + prompt.target for prompt in prompts]
