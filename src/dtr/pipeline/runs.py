"""What a recipe makes: a whole run, its first half alone, or one score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtr.corpus.faults import faults_record
from dtr.distillation.bank import MixerBank, load_bank
from dtr.distillation.start import check_distillation
from dtr.distributed import leave_world
from dtr.errors import RecipeError
from dtr.evaluation.evaluator import evaluate
from dtr.evaluation.examples import differing_items, write_sample
from dtr.evaluation.speed import measure_speed
from dtr.pipeline.costs import Clock, memory_advice
from dtr.pipeline.folder import RunFolder
from dtr.pipeline.preparation import (
    Listener,
    prepare_guards,
    prepare_mixers,
    prepare_task,
    prepare_teacher,
    prepare_text,
    search_settings,
)
from dtr.pipeline.record import make_record
from dtr.pipeline.stages import join_run, open_run, prepare_bank, prepare_realigned, prepare_search, save
from dtr.recipe import Recipe
from dtr.replacement.binding import check_search
from dtr.teacher import load_model


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    bank: str | Path | None = None,
    on_event: Listener | None = None,
) -> dict[str, Any]:
    """Do everything a recipe says and leave a run folder that explains itself.

    Args:
        recipe: from `read_recipe`.
        out: run folder; refused if it holds something, unless `resume` or `overwrite`.
        resume: go on where an interrupted run of the same recipe stopped.
        overwrite: delete an earlier run in `out` first.
        bank: folder of a bank to search with; distillation is left out and the text is not read.
        on_event: called with small dicts for live displays; all of them are in events.jsonl too.

    Returns:
        the record that is in report.json; nothing on any but the first rank of several processes.
    """
    if recipe.runtime.shard_teacher:
        raise RecipeError(
            "runtime.shard_teacher",
            got="true",
            expected="false, as the search needs the whole teacher on one device",
            hint="Distil with 'dtr distill', then give its bank to 'dtr search' on a device that holds the teacher.",
        )
    folder, clock = RunFolder(out), Clock()
    world, emit = join_run(folder, recipe, resume=resume, overwrite=overwrite, on_event=on_event)
    with clock("load"):
        teacher = prepare_teacher(recipe, emit)
        if bank is None:
            check_distillation(teacher, **prepare_mixers(recipe), layers=recipe.distill.layers)
        emit({"event": "stage", "text": f"reading the task {recipe.task.path or recipe.task.source}"})
        task = prepare_task(recipe)
        guards = prepare_guards(recipe)
        settings = search_settings(recipe, guards)
        check_search(task, settings)
        given = load_bank(bank, teacher=teacher) if bank else None
        tasks = [task, *(guard.task for guard in guards)]
        # A bank needs no text, unless its layers are to be realigned.
        needs_text = not bank or recipe.realign.num_tokens
        text, faults = prepare_text(recipe, teacher, emit, tasks=tasks) if needs_text else (None, {})
    open_run(folder, recipe, world, resume=resume, overwrite=overwrite)
    with clock("distill"), memory_advice("distill.batch_size"):
        if given is not None:
            mixers = given
        else:
            assert text is not None
            mixers = prepare_bank(recipe, teacher, text, folder, emit)
    with clock("search"), memory_advice("runtime.eval_batch_tokens and runtime.cache_bytes"):
        result = prepare_search(recipe, teacher, mixers, task, settings, folder, emit)
    realigned = None
    if recipe.realign.num_tokens and result.trace.m_opt.layers:
        assert text is not None
        with clock("realign"), memory_advice("distill.batch_size"):
            realigned = prepare_realigned(recipe, teacher, mixers, text, tasks, result, folder, emit)
    if text is not None:
        text.finish()
    leave_world()
    if not world.is_first:
        # All ranks know the result; the first one measures speed and writes.
        return {}
    emit({"event": "stage", "text": "measuring speed, writing samples"})
    with clock("report"):
        sample = write_sample(teacher, result.m_opt)
        differences = differing_items(teacher, result.m_opt, task, batch_tokens=recipe.runtime.eval_batch_tokens)
        speed = {"teacher": measure_speed(teacher.model), "m_opt": measure_speed(result.m_opt)}
    record = make_record(
        recipe,
        teacher,
        None if bank else text,
        mixers,
        task,
        result,
        realigned,
        faults=faults_record(faults),
        seconds=clock.seconds(),
        sample=sample,
        differences=differences,
        speed=speed,
    )
    save(folder, record, result, realigned)
    emit({"event": "done", "report": str(folder.path / "report.html")})
    return record


def distill_only(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_event: Listener | None = None,
) -> MixerBank:
    """The first half of `run`: leaves OUT/bank, with which `run(..., bank=...)` or `--resume` goes on."""
    folder = RunFolder(out)
    world, emit = join_run(folder, recipe, resume=resume, overwrite=overwrite, on_event=on_event)
    teacher = prepare_teacher(recipe, emit)
    check_distillation(teacher, **prepare_mixers(recipe), layers=recipe.distill.layers)
    text, _ = prepare_text(recipe, teacher, emit)
    open_run(folder, recipe, world, resume=resume, overwrite=overwrite)
    with memory_advice("distill.batch_size"):
        return prepare_bank(recipe, teacher, text, folder, emit)


def evaluate_model(recipe: Recipe, split: str) -> dict[str, Any]:
    """Score `recipe.teacher.source`, which may be a saved hybrid, on one split of the recipe's task."""
    if split not in ("validation", "test"):
        raise RecipeError("--split", got=f"'{split}'", expected="validation or test")
    settings = recipe.teacher
    model, tokenizer = load_model(
        settings.source,
        device=recipe.runtime.device,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
    )
    score = evaluate(
        model, prepare_task(recipe), split=split, tokenizer=tokenizer, batch_tokens=recipe.runtime.eval_batch_tokens
    )
    return {"model": settings.source, "task": recipe.task.source, "split": split, **score.to_dict()}
