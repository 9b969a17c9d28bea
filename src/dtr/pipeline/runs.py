"""What a recipe makes: a whole run, its first half alone, or one score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtr.distillation.bank import MixerBank, read_specs
from dtr.distributed import leave_world
from dtr.errors import RecipeError
from dtr.evaluation.evaluator import evaluate
from dtr.mixers.base import set_backend
from dtr.pipeline.costs import Costs, memory_advice
from dtr.pipeline.folder import RunFolder
from dtr.pipeline.preparation import (
    Listener,
    check_text,
    check_training,
    prepare_mixers,
    prepare_run,
    prepare_task,
    prepare_teacher,
    prepare_text,
    tell_backends,
    what_was_read,
)
from dtr.pipeline.record import look_closer, make_record
from dtr.pipeline.stages import join_run, open_run, prepare_bank, prepare_realigned, prepare_search, save
from dtr.recipe import Recipe
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
    folder, clock = RunFolder(out, bank=bank), Costs()
    world, emit = join_run(folder, recipe, clock, resume=resume, overwrite=overwrite, on_event=on_event)
    with clock("load"):
        ready = prepare_run(recipe, bank, emit)
    open_run(
        folder,
        recipe,
        clock,
        world,
        what_was_read(ready.teacher, ready.text, ready.tasks, ready.bank),
        resume=resume,
        overwrite=overwrite,
    )
    with clock("distill"), memory_advice("distill.batch_size"):
        mixers = ready.bank
        if mixers is None:
            assert ready.text is not None
            mixers = prepare_bank(recipe, ready.teacher, ready.text, folder, emit)
    with clock("search"), memory_advice("runtime.eval_batch_tokens and runtime.cache_bytes"):
        result = clock.add_search(prepare_search(recipe, ready, mixers, folder, emit))
    realigned = None
    if recipe.realign.num_tokens and result.trace.m_opt.layers:
        with clock("realign"), memory_advice("distill.batch_size"):
            realigned = prepare_realigned(recipe, ready, mixers, result, folder, emit)
    if ready.text is not None:
        ready.text.finish()
    leave_world()
    if not world.is_first:
        # All ranks know the result; the first one measures speed and writes.
        return {}
    emit({"event": "stage", "text": "measuring speed, writing samples"})
    with clock("report"):
        looks = look_closer(recipe, ready, result)
    record = make_record(recipe, ready, mixers, result, realigned, looks, clock)
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
    folder, clock = RunFolder(out), Costs()
    world, emit = join_run(folder, recipe, clock, resume=resume, overwrite=overwrite, on_event=on_event)
    with clock("load"):
        check_text(recipe)
        read_specs(**prepare_mixers(recipe))
        teacher = prepare_teacher(recipe, emit)
        check_training(recipe, teacher)
        tell_backends(recipe, teacher, None, emit)
        text, _ = prepare_text(recipe, teacher, emit)
    read = what_was_read(teacher, text)
    open_run(folder, recipe, clock, world, read, resume=resume, overwrite=overwrite)
    with clock("distill"), memory_advice("distill.batch_size"):
        bank = prepare_bank(recipe, teacher, text, folder, emit)
    text.finish()
    return bank


def evaluate_model(recipe: Recipe, split: str) -> dict[str, Any]:
    """Score `recipe.teacher.source`, which may be a saved hybrid, on one split of the recipe's task."""
    if split not in ("validation", "test"):
        raise RecipeError("--split", got=f"'{split}'", expected="validation or test")
    settings, task = recipe.teacher, prepare_task(recipe)
    model, tokenizer = load_model(
        settings.source,
        device=recipe.runtime.device,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
    )
    set_backend(model, recipe.runtime.backend)
    score = evaluate(model, task, split=split, tokenizer=tokenizer, batch_tokens=recipe.runtime.eval_batch_tokens)
    return {"model": settings.source, "task": recipe.task.source, "split": split, **score.to_dict()}
