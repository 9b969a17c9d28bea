"""The whole run, stage by stage: load -> text -> distil -> search -> save -> report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dtr.bench.distillation import bench_distill
from dtr.bench.strategies import compare_strategies
from dtr.binding import GuardFloor, check_search
from dtr.corpus import StreamedBlocks, TokenBlocks, load_text, stream_text
from dtr.corpus.faults import Faults
from dtr.distillation.bank import MixerBank, load_bank
from dtr.distillation.trainer import distill
from dtr.distributed import World, current_world, join_world, leave_world
from dtr.environment import command_line, compile_caches, hardware, library_versions, own_commit
from dtr.errors import RecipeError
from dtr.evaluation.evaluator import evaluate
from dtr.evaluation.examples import differing_items, write_sample
from dtr.evaluation.speed import measure_speed
from dtr.files import write_json
from dtr.ops.dispatch import use_backend
from dtr.recipe import Recipe, TaskSection
from dtr.record import make_record
from dtr.replace import SearchResult, search
from dtr.reporting import render_model_card, write_report
from dtr.runfolder import RunFolder
from dtr.stages import Clock, memory_advice
from dtr.tasks import load_task
from dtr.tasks.base import Task
from dtr.teacher import Teacher, load_model, load_teacher, pick_device

Listener = Callable[[dict[str, Any]], None]


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
        bank: folder of a bank to search with; distillation is left out.
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
    world, emit = open_run(folder, recipe, resume=resume, overwrite=overwrite, on_event=on_event)
    with clock("load"):
        teacher = prepare_teacher(recipe, emit)
        emit({"event": "stage", "text": f"reading the task {recipe.task.path or recipe.task.source}"})
        task = prepare_task(recipe)
        guards = prepare_guards(recipe)
        check_search(task, **recipe.search.model_dump())
        text, faults = prepare_text(recipe, teacher, emit)
    with clock("distill"), memory_advice("distill.batch_size"):
        mixers = load_bank(bank, teacher=teacher) if bank else prepare_bank(recipe, teacher, text, folder, emit)
    if not world.is_first:
        # Only distillation is shared out; the first rank does the rest.
        return {}
    with clock("search"), memory_advice("runtime.eval_batch_tokens and runtime.cache_bytes"):
        result = prepare_search(recipe, teacher, mixers, task, guards, folder, emit)
    emit({"event": "stage", "text": "measuring speed, writing samples"})
    with clock("report"):
        sample = write_sample(teacher, result.m_opt)
        differences = differing_items(teacher, result.m_opt, task)
        speed = {"teacher": measure_speed(teacher.model), "m_opt": measure_speed(result.m_opt)}
    record = make_record(
        recipe,
        teacher,
        text,
        mixers,
        task,
        result,
        faults=faults.to_dict(),
        seconds=clock.seconds(),
        sample=sample,
        differences=differences,
        speed=speed,
    )
    save(folder, record, result)
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
    _, emit = open_run(folder, recipe, resume=resume, overwrite=overwrite, on_event=on_event)
    teacher = prepare_teacher(recipe, emit)
    with memory_advice("distill.batch_size"):
        return prepare_bank(recipe, teacher, prepare_text(recipe, teacher, emit)[0], folder, emit)


def open_run(
    folder: RunFolder, recipe: Recipe, *, resume: bool, overwrite: bool, on_event: Listener | None
) -> tuple[World, Listener]:
    """Join the other processes if torchrun started some, and open the folder on the first one.

    Returns our place among them and where events go: to log and listener on the first rank, nowhere on the others.
    """
    world, _ = join_world(pick_device(recipe.runtime.device))
    if world.is_first:
        folder.open(recipe, resume=resume, overwrite=overwrite)
    world.wait()
    return world, _to_log_and(folder, on_event) if world.is_first else lambda event: None


def prepare_teacher(recipe: Recipe, emit: Listener) -> Teacher:
    """Set threads and backend, then load the teacher."""
    if recipe.runtime.num_threads:
        torch.set_num_threads(recipe.runtime.num_threads)
    _, device = join_world(pick_device(recipe.runtime.device))
    backend = use_backend(recipe.runtime.backend, device.type)
    emit({"event": "backend", "name": backend.name, "reason": backend.reason, "device": str(device)})
    settings = recipe.teacher
    emit({"event": "stage", "text": f"loading {settings.source}"})
    return load_teacher(
        settings.source,
        device=str(device),
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        shard=recipe.runtime.shard_teacher,
    )


def prepare_task(recipe: Recipe) -> Task:
    return _load(recipe.task, recipe.seed)


def prepare_guards(recipe: Recipe) -> list[GuardFloor]:
    """The guard tasks, loaded before any work so that missing data is found at once."""
    return [
        GuardFloor(task=_load(guard.task, recipe.seed), p_min=guard.p_min, p_min_kind=guard.p_min_kind)
        for guard in recipe.search.guards
    ]


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


def prepare_bank(
    recipe: Recipe, teacher: Teacher, text: TokenBlocks | StreamedBlocks, folder: RunFolder, emit: Listener
) -> MixerBank:
    """Distil, or take the bank that an earlier run of this recipe has finished."""
    if (folder.bank / "bank.json").exists():
        return load_bank(folder.bank, teacher=teacher)
    emit({"event": "stage", "text": f"preparing {recipe.mixer.kind} for every layer"})
    settings = recipe.distill.model_dump(exclude={"seq_len_tokens"})
    bank = distill(
        teacher,
        text,
        mixer=recipe.mixer.kind,
        options=recipe.mixer.options,
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
    guards: list[GuardFloor],
    folder: RunFolder,
    emit: Listener,
) -> SearchResult:
    emit({"event": "stage", "text": "scoring the teacher"})
    result = search(
        teacher,
        bank,
        task,
        **recipe.search.model_dump(exclude={"guards"}),
        guards=guards,
        seed=recipe.seed,
        batch_tokens=recipe.runtime.eval_batch_tokens,
        cache_bytes=recipe.runtime.cache_bytes,
        journal=folder.journal,
        on_event=emit,
    )
    write_json(folder.search, result.trace.to_dict(with_items=True))
    return result


def save(folder: RunFolder, record: dict[str, Any], result: SearchResult) -> None:
    """The hybrids as Hugging Face checkpoints with their cards, then the report: a folder with it is finished."""
    for path, model, which in ((folder.hybrid, result.m_opt, "m_opt"), (folder.hybrid_best, result.m_best, "m_best")):
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


def bench_strategies(
    recipe: Recipe,
    bank: str | Path,
    strategies: list[str],
    *,
    teacher: Teacher | None = None,
    time_limit_seconds: float | None = None,
    on_event: Listener | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """`dtr bench search`: each strategy on the recipe's task, with what it was measured on.

    Args:
        recipe: teacher, task and limits.
        bank: folder of the bank.
        strategies: names.
        teacher: one that is loaded already, to compare on several tasks.
        time_limit_seconds: as in `compare_strategies`.
        on_event: called with the events of every search.
        on_row: called with the record so far after every strategy.
    """
    emit = on_event or (lambda event: None)
    task = prepare_task(recipe)
    for strategy in strategies:
        check_search(task, **{**recipe.search.model_dump(), "strategy": strategy})
    guards = prepare_guards(recipe)
    teacher = teacher or prepare_teacher(recipe, emit)
    record: dict[str, Any] = {
        "hardware": hardware(teacher.device),
        "versions": library_versions(),
        "commit": own_commit(),
        "teacher": teacher.source,
        "num_layers": teacher.num_layers,
        "task": task.name,
        "metric": task.metric,
        "num_validation": len(task.splits["validation"]),
        "num_test": len(task.splits["test"]),
        "p_min": recipe.search.p_min,
        "strategies": {},
    }
    for row in compare_strategies(
        teacher,
        load_bank(bank, teacher=teacher),
        task,
        strategies=strategies,
        time_limit_seconds=time_limit_seconds,
        on_event=emit,
        **recipe.search.model_dump(exclude={"guards", "strategy", "run_to_end", "test_curve"}),
        guards=guards,
        seed=recipe.seed,
        batch_tokens=recipe.runtime.eval_batch_tokens,
        cache_bytes=recipe.runtime.cache_bytes,
    ):
        record["strategies"][row["strategy"]] = row
        if on_row is not None:
            on_row(record)
    return record


def bench_distillation(
    source: str,
    sizes: list[tuple[int, int]],
    *,
    mixer: str,
    backend: str,
    device: str,
    num_steps: int,
    slow: bool,
    baseline: bool = False,
) -> dict[str, Any]:
    """`dtr bench distill`: the figures of every size, with what they were measured on.

    Under torchrun every rank takes part; nothing is returned on any but the first.
    """
    caches = compile_caches()
    world, place = join_world(pick_device(device))
    choice = use_backend(backend, place.type)
    teacher = load_teacher(source, device=str(place))
    results = list(
        bench_distill(
            teacher,
            sizes=sizes,
            mixer=mixer,
            num_steps=num_steps,
            fast=False if slow or place.type != "cuda" else None,
            baseline=baseline,
            world=world,
        )
    )
    leave_world()
    if not world.is_first:
        return {}
    return {
        "hardware": hardware(teacher.device),
        "versions": library_versions(),
        "commit": own_commit(),
        "command": command_line(),
        "teacher": teacher.source,
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "mixer": mixer,
        "backend": {"name": choice.name, "reason": choice.reason},
        "num_processes": world.size,
        "compile_caches": caches,
        "sizes": results,
    }
