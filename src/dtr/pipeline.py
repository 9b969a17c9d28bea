"""The whole run, stage by stage: load -> text -> distil -> search -> save -> report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtr.binding import check_search
from dtr.corpus.faults import faults_record
from dtr.corpus.mixing import Text
from dtr.distillation.bank import MixerBank, load_bank
from dtr.distillation.start import check_distillation
from dtr.distillation.trainer import distill
from dtr.distributed import World, current_world, join_world, leave_world
from dtr.errors import RecipeError
from dtr.evaluation.evaluator import evaluate
from dtr.evaluation.examples import differing_items, write_sample
from dtr.evaluation.speed import measure_speed
from dtr.files import write_json
from dtr.preparation import (
    Listener,
    prepare_guards,
    prepare_mixers,
    prepare_task,
    prepare_teacher,
    prepare_text,
    search_settings,
)
from dtr.realigned import Realigned, prepare_realigned
from dtr.recipe import Recipe
from dtr.record import make_record
from dtr.replace import SearchResult, search
from dtr.reporting import render_model_card, write_report
from dtr.runfolder import RunFolder
from dtr.settings import SearchSettings
from dtr.stages import Clock, memory_advice
from dtr.tasks.base import Task
from dtr.teacher import Teacher, load_model, pick_device


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


def join_run(
    folder: RunFolder, recipe: Recipe, *, resume: bool, overwrite: bool, on_event: Listener | None
) -> tuple[World, Listener]:
    """Join the other processes if torchrun started some; the first one looks whether the folder may be used.

    Returns our place among them and where events go: to log and listener on the first rank, nowhere on the others.
    """
    world, _ = join_world(pick_device(recipe.runtime.device))
    if world.is_first:
        folder.check(recipe, resume=resume, overwrite=overwrite)
    world.wait()
    return world, _to_log_and(folder, on_event) if world.is_first else lambda event: None


def open_run(folder: RunFolder, recipe: Recipe, world: World, *, resume: bool, overwrite: bool) -> None:
    """Open the folder, once all that is read is found to be there; the others must not look into it before."""
    if world.is_first:
        folder.open(recipe, resume=resume, overwrite=overwrite)
    world.wait()


def prepare_bank(recipe: Recipe, teacher: Teacher, text: Text, folder: RunFolder, emit: Listener) -> MixerBank:
    """Distil, or take the bank that an earlier run of this recipe has finished."""
    if (folder.bank / "bank.json").exists():
        return load_bank(folder.bank, teacher=teacher)
    emit({"event": "stage", "text": f"preparing {' and '.join(recipe.mixer.names)} for every layer"})
    settings = recipe.distill.model_dump(exclude={"seq_len_tokens"})
    bank = distill(
        teacher,
        text,
        **prepare_mixers(recipe),
        **settings,
        seed=recipe.seed,
        parallel=recipe.runtime.parallel,
        checkpoint=folder.checkpoint,
        on_event=emit,
    )
    if current_world().is_first:
        bank.save(folder.bank)
        # The bank holds all that is needed from here on.
        folder.checkpoint.unlink(missing_ok=True)
    return bank


def prepare_search(
    recipe: Recipe,
    teacher: Teacher,
    bank: MixerBank,
    task: Task,
    settings: SearchSettings,
    folder: RunFolder,
    emit: Listener,
) -> SearchResult:
    emit({"event": "stage", "text": "scoring the teacher"})
    result = search(
        teacher,
        bank,
        task,
        settings,
        test_curve=recipe.search.test_curve,
        journal=folder.journal,
        on_event=emit,
    )
    if current_world().is_first:
        legend = {number: bank.named(number) for number in bank.mixers} if len(bank.kinds) > 1 else {}
        write_json(folder.search, result.trace.to_dict(with_items=True) | ({"mixers": legend} if legend else {}))
    return result


def save(folder: RunFolder, record: dict[str, Any], result: SearchResult, realigned: Realigned | None) -> None:
    """The hybrids as Hugging Face checkpoints with their cards, then the report: a folder with it is finished."""
    models = [(folder.hybrid, result.m_opt, "m_opt"), (folder.hybrid_best, result.m_best, "m_best")]
    if realigned is not None and realigned.is_kept:
        models.append((folder.hybrid_realigned, realigned.model, "realigned"))
    for path, model, which in models:
        model.save_pretrained(path)
        (path / "README.md").write_text(render_model_card(record, which=which), encoding="utf-8")  # type: ignore[arg-type]
    write_report(folder.path, record)


def _to_log_and(folder: RunFolder, listener: Listener | None) -> Listener:
    def emit(event: dict[str, Any]) -> None:
        # Replayed candidates are in the log already, from the run that was interrupted.
        if not event.get("replayed"):
            folder.log(event)
        if listener is not None:
            listener(event)

    return emit


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
