"""The stages of a run, each resumable: open the folder, distil, search, realign, save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtr.corpus.mixing import Text
from dtr.distillation.bank import MixerBank, load_bank
from dtr.distillation.realignment import NOT_OF_DISTILLATION, realign
from dtr.distillation.trainer import distill
from dtr.distributed import World, current_world, join_world
from dtr.files import replacing_folder, write_checksums, write_json
from dtr.pipeline.costs import Costs
from dtr.pipeline.folder import RunFolder
from dtr.pipeline.preparation import Listener, Prepared, prepare_mixers
from dtr.recipe import Recipe
from dtr.reporting import render_model_card, write_report
from dtr.selection.realigned import Realigned, score_realigned
from dtr.selection.search import SearchResult, search
from dtr.teacher import Teacher, pick_device


def join_run(
    folder: RunFolder, recipe: Recipe, costs: Costs, *, resume: bool, overwrite: bool, on_event: Listener | None
) -> tuple[World, Listener]:
    """Join the other processes if torchrun started some; the first one looks whether the folder may be used.

    Returns our place among them and where events go: to log and listener on the first rank, nowhere on the others.
    """
    world, _ = join_world(pick_device(recipe.runtime.device))
    if world.is_first:
        folder.check(recipe, resume=resume, overwrite=overwrite)
    world.wait()
    return world, _to_log_and(folder, costs, on_event) if world.is_first else lambda event: None


def open_run(
    folder: RunFolder,
    recipe: Recipe,
    costs: Costs,
    world: World,
    read: Mapping[str, str],
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Open the folder, once all that is read is found to be there; the others must not look into it before."""
    if world.is_first:
        folder.open(recipe, resume=resume, overwrite=overwrite, read=read)
        costs.open(folder.costs)
    world.wait()


def prepare_bank(recipe: Recipe, teacher: Teacher, text: Text, folder: RunFolder, emit: Listener) -> MixerBank:
    """Distil, or take the bank that an earlier run of this recipe has finished."""
    if (folder.bank / "bank.json").exists():
        bank = load_bank(folder.bank, teacher=teacher, backend=recipe.runtime.backend)
        _finish(folder.checkpoint)
        return bank
    emit({"event": "stage", "text": f"preparing {' and '.join(recipe.mixer.names)} for every layer"})
    settings = recipe.distill.model_dump(exclude={"seq_len_tokens"})
    bank = distill(
        teacher,
        text,
        **prepare_mixers(recipe),
        **settings,
        seed=recipe.seed,
        parallel=recipe.runtime.parallel,
        backend=recipe.runtime.backend,
        checkpoint=folder.checkpoint,
        on_event=emit,
    )
    if current_world().is_first:
        bank.save(folder.bank)
        _finish(folder.checkpoint)
    return bank


def _finish(checkpoint: Path) -> None:
    """The bank holds all that is needed from here on; a process that was killed may have left its checkpoint too."""
    if current_world().is_first:
        checkpoint.unlink(missing_ok=True)


def prepare_search(recipe: Recipe, ready: Prepared, bank: MixerBank, folder: RunFolder, emit: Listener) -> SearchResult:
    """Search, or go on from the journal of an earlier run of this recipe."""
    emit({"event": "stage", "text": "scoring the teacher"})
    result = search(
        ready.teacher,
        bank,
        ready.task,
        ready.settings,
        journal=folder.journal,
        on_event=emit,
    )
    if current_world().is_first:
        legend = {number: bank.named(number) for number in bank.mixers} if len(bank.kinds) > 1 else {}
        write_json(folder.search, result.trace.to_dict(with_items=True) | ({"mixers": legend} if legend else {}))
    return result


def prepare_realigned(
    recipe: Recipe, ready: Prepared, bank: MixerBank, result: SearchResult, folder: RunFolder, emit: Listener
) -> Realigned:
    """Realign the linear layers of M_opt as the recipe says, or take what an earlier run of it has finished; score."""
    teacher, layers = ready.teacher, result.trace.m_opt.layers
    emit({"event": "stage", "text": f"realigning {len(layers)} layers on the hybrid's own hidden states"})
    realigned = _load_finished(folder.realigned, teacher, layers, recipe.runtime.backend)
    if realigned is None:
        assert ready.text is not None
        realigned = realign(
            teacher,
            bank,
            ready.text,
            layers,
            **recipe.realign.model_dump(),
            **recipe.distill.model_dump(exclude=set(NOT_OF_DISTILLATION)),
            seed=recipe.seed,
            checkpoint=folder.realign_checkpoint,
            on_event=emit,
        )
        if current_world().is_first:
            realigned.save(folder.realigned)
    _finish(folder.realign_checkpoint)
    task, *guards = ready.tasks
    batch_tokens = recipe.runtime.eval_batch_tokens
    found = score_realigned(teacher, bank, realigned, task, layers, guards=guards, batch_tokens=batch_tokens)
    scores = {"val_before": found.val_before.value, "val": found.val.value}
    emit({"event": "realigned", **scores, "kept": found.is_kept})
    return found


def save(folder: RunFolder, record: dict[str, Any], result: SearchResult, realigned: Realigned | None) -> None:
    """The hybrids as Hugging Face checkpoints with their cards, then the report: a folder with it is finished."""
    borrowed = result.borrowed
    models = [(folder.hybrid, borrowed("m_opt"), "m_opt"), (folder.hybrid_best, borrowed("m_best"), "m_best")]
    if realigned is not None and realigned.is_kept:
        models.append((folder.hybrid_realigned, realigned.model, "realigned"))
    for path, model, which in models:
        with replacing_folder(path) as beside:
            model.save_pretrained(beside)
            (beside / "README.md").write_text(render_model_card(record, which=which), encoding="utf-8")  # type: ignore[arg-type]
            write_checksums(beside)
    write_report(folder.path, record)


def _to_log_and(folder: RunFolder, costs: Costs, listener: Listener | None) -> Listener:
    def emit(event: dict[str, Any]) -> None:
        costs.hear(event)
        folder.log(event)
        if listener is not None:
            listener(event)

    return emit


def _load_finished(folder: Path, teacher: Teacher, layers: Sequence[int], backend: str) -> MixerBank | None:
    """What an earlier run of this recipe has finished, if it was for these layers."""
    if not (folder / "bank.json").exists():
        return None
    bank = load_bank(folder, teacher=teacher, backend=backend)
    return bank if bank.identity["layers"] == sorted(layers) else None
