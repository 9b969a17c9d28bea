"""The record of a run: what goes into report.json, gathered from the stages' results. Plain types only."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dtr.corpus.faults import faults_record
from dtr.corpus.mixing import MixedBlocks, Text
from dtr.distillation.bank import MixerBank
from dtr.environment import command_line, hardware, library_versions, own_commit, own_version, peak_rss_bytes
from dtr.evaluation.examples import differing_items, write_sample
from dtr.evaluation.paired import kept_against, paired_difference
from dtr.evaluation.score import Score
from dtr.evaluation.speed import measure_speed
from dtr.hybrid.cache import decode_cache_bytes
from dtr.pipeline.costs import Costs
from dtr.pipeline.preparation import Prepared, mixer_backends
from dtr.recipe import Recipe
from dtr.selection.realigned import Realigned
from dtr.selection.search import SearchResult
from dtr.selection.trace import Chosen
from dtr.tasks.base import Task, fingerprint
from dtr.tasks.long_context import score_map
from dtr.teacher import Teacher

FORMAT = 1
CACHE_CONTEXT_TOKENS = 2048
"""Context length at which the cache of teacher and hybrid is compared (the paper's decode length)."""
MEMORY_CONTEXTS_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)


@dataclass(frozen=True, kw_only=True)
class CloserLook:
    """Teacher and M_opt side by side, beyond their scores."""

    sample: dict[str, str]
    differences: list[dict[str, Any]]
    speed: dict[str, list[dict[str, float]]]


def look_closer(recipe: Recipe, ready: Prepared, result: SearchResult) -> CloserLook:
    """Let both write, list the items on which they differ, and time them."""
    teacher, hybrid = ready.teacher, result.borrowed("m_opt")
    return CloserLook(
        sample=write_sample(teacher, hybrid),
        differences=differing_items(teacher, hybrid, ready.task, batch_tokens=recipe.runtime.eval_batch_tokens),
        speed={"teacher": measure_speed(teacher.model), "m_opt": measure_speed(hybrid)},
    )


def make_record(
    recipe: Recipe,
    ready: Prepared,
    bank: MixerBank,
    result: SearchResult,
    realigned: Realigned | None,
    looks: CloserLook,
    costs: Costs,
) -> dict[str, Any]:
    """Everything a reader needs to judge and to repeat the run; see `docs/report.md` for each field."""
    teacher = ready.teacher
    text = None if ready.bank else ready.text
    return {
        **_origin(recipe, teacher, costs),
        "teacher": _teacher(teacher, result),
        "num_layers": teacher.num_layers,
        "mixer": _mixer(recipe, teacher, bank),
        "text": {**_text(text, bank), "faults": faults_record(ready.faults)},
        "distill": {**_distill(bank), "reused": ready.bank is not None},
        "task": _task(ready.task),
        "search": _search(bank, result),
        "speed": looks.speed,
        "memory": _memory(teacher, bank, result.trace.m_opt.layers),
        "length_by_depth": _length_by_depth(ready.task, result),
        "m_opt": _model(teacher, bank, result.trace.m_opt, result.m_opt_test, result),
        "m_best": _model(teacher, bank, result.trace.m_best, result.m_best_test, result),
        "realigned": None if realigned is None else _realigned(teacher, realigned, result),
        "sample": looks.sample,
        "differences": looks.differences,
    }


def _origin(recipe: Recipe, teacher: Teacher, costs: Costs) -> dict[str, Any]:
    """Where and how the run was made, and what it took."""
    cuda = teacher.device.type == "cuda"
    return {
        "format": FORMAT,
        "dtr_version": own_version(),
        "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "hardware": hardware(teacher.device),
        "commit": own_commit(),
        "versions": {name: value or "not installed" for name, value in library_versions().items()},
        "seed": recipe.seed,
        "seconds": {key: round(value, 2) for key, value in costs.seconds().items()},
        "num_processes": costs.num_processes,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(teacher.device) if cuda else None,
        "recipe": recipe.model_dump(),
    }


def _teacher(teacher: Teacher, result: SearchResult) -> dict[str, Any]:
    geometry = teacher.geometry
    return {
        "source": teacher.source,
        "family": teacher.model.config.model_type,
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "num_layers": teacher.num_layers,
        "hidden_dim": geometry.hidden_dim,
        "num_heads": geometry.num_heads,
        "num_kv_heads": geometry.num_kv_heads,
        "head_dim": geometry.head_dim,
        "num_parameters": sum(p.numel() for p in teacher.model.parameters()),
        "fingerprint": teacher.fingerprint,
        "val": result.trace.teacher.to_dict(),
        "test": result.teacher_test.to_dict(),
    }


def _mixer(recipe: Recipe, teacher: Teacher, bank: MixerBank) -> dict[str, Any]:
    backends = mixer_backends(recipe, teacher, bank)
    return {
        "kind": ", ".join(bank.kinds),
        "kinds": bank.kinds,
        "options": _options(bank),
        "backend": ", ".join(dict.fromkeys(backend.name for backend in backends)),
        "backend_reason": "; ".join(dict.fromkeys(backend.reason for backend in backends)),
        "is_pure_linear": all(mixer.is_pure_linear for mixer in bank.mixers.values()),
    }


def _task(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "kind": task.kind,
        "metric": task.metric,
        "num_validation": len(task.splits["validation"]),
        "num_test": len(task.splits["test"]),
        "fingerprint": fingerprint(task),
        "notes": list(task.notes),
        "chance": _chance(task),
    }


def _chance(task: Task) -> float | None:
    """Expected test score of guessing among an item's choices; None for metrics and heads that have no such level."""
    if task.metric not in ("acc", "acc_norm") or any(len(item.requests) < 2 for item in task.splits["test"]):
        return None
    return sum(1 / len(item.requests) for item in task.splits["test"]) / len(task.splits["test"])


def _text(text: Text | None, bank: MixerBank) -> dict[str, Any]:
    """What the bank was distilled on; a bank from elsewhere knows its fingerprint alone."""
    if text is None:
        return {"source": None, "num_tokens": None, "fingerprint": bank.identity.get("text"), "mix": []}
    parts = text.parts if isinstance(text, MixedBlocks) else ()
    return {
        "source": text.source,
        "num_tokens": text.num_tokens,
        "fingerprint": text.fingerprint,
        "mix": [{"source": part.name, "share": part.share, "num_tokens": part.text.num_tokens} for part in parts],
    }


def _memory(teacher: Teacher, bank: MixerBank, linear: Sequence[int]) -> list[dict[str, int]]:
    """Cache of one sequence at contexts up to the longest that the model was made for, by arithmetic."""
    limit = getattr(teacher.model.config, "max_position_embeddings", None) or MEMORY_CONTEXTS_TOKENS[-1]
    contexts = [n for n in MEMORY_CONTEXTS_TOKENS if n <= limit] or [limit]
    rows = [(n, _cache(teacher, bank, linear, n)) for n in contexts]
    return [{"context_tokens": n, "teacher": c["teacher_bytes"], "m_opt": c["hybrid_bytes"]} for n, c in rows]


def _cache(teacher: Teacher, bank: MixerBank, linear: Sequence[int], context_tokens: int) -> dict[str, int]:
    """Bytes of keys, values and states of one sequence."""
    num_bytes = teacher.dtype.itemsize
    count = {"context_tokens": context_tokens, "bytes_per_element": num_bytes}
    state_bytes = sum(bank.mixers[layer].state_bytes(num_bytes) for layer in linear)
    num_attention = teacher.num_layers - len(linear)
    return {
        "context_tokens": context_tokens,
        "teacher_bytes": decode_cache_bytes(teacher.geometry, teacher.num_layers, **count),
        "hybrid_bytes": decode_cache_bytes(teacher.geometry, num_attention, state_bytes=state_bytes, **count),
    }


def _length_by_depth(task: Task, result: SearchResult) -> dict[str, Any] | None:
    """Test scores by length and depth of what is asked for; None for tasks without them."""
    items = task.splits["test"]
    teacher, hybrid = score_map(items, result.teacher_test), score_map(items, result.m_opt_test)
    if teacher is None or hybrid is None:
        return None
    axes = {"lengths": teacher["lengths"], "depths": teacher["depths"]}
    return {**axes, "teacher": teacher["values"], "m_opt": hybrid["values"]}


def _distill(bank: MixerBank) -> dict[str, Any]:
    return {
        "num_tokens": bank.num_tokens,
        "num_steps": bank.num_steps,
        "seconds": round(bank.seconds, 2),
        "tokens_per_second": round(bank.num_tokens / bank.seconds, 1) if bank.seconds else None,
        "nmse": [
            {**bank.named(number), "before": bank.nmse_before[number], "after": bank.nmse_after[number]}
            for number in bank.mixers
        ],
        "mean_nmse": bank.mean_nmse,
        "mean_nmse_by_kind": bank.mean_nmse_by_kind,
        "curve": bank.curve,
        "stopped": [{**bank.named(number), **facts} for number, facts in sorted(bank.stopped.items())],
    }


def _options(bank: MixerBank) -> Any:
    """Of the one kind, or a list for several."""
    each = [{key: value for key, value in spec.items() if key != "kind"} for spec in bank.specs]
    return each[0] if len(each) == 1 else each


def _realigned(teacher: Teacher, realigned: Realigned, result: SearchResult) -> dict[str, Any]:
    """As M_opt's entry, with what the stage took and what it changed."""
    bank, chosen = realigned.bank, Chosen(layers=realigned.layers, score=realigned.val)
    return {
        **_model(teacher, bank, chosen, realigned.test, result),
        "kept": realigned.is_kept,
        "lost_guards": list(realigned.lost_guards),
        "val_before": realigned.val_before.to_dict(),
        "num_tokens": bank.num_tokens,
        "seconds": round(bank.seconds, 2),
        "mean_nmse_before": sum(bank.nmse_before.values()) / len(bank.nmse_before),
        "mean_nmse": bank.mean_nmse,
        "stopped": [{**bank.named(number), **facts} for number, facts in sorted(bank.stopped.items())],
    }


def _search(bank: MixerBank, result: SearchResult) -> dict[str, Any]:
    trace, layer_of = result.trace.to_dict(), bank.layer_of
    steps = trace["steps"]
    for index, step in enumerate(steps):
        step |= bank.named(step["layer"])
        step["added"] = [layer_of[number] for number in step["added"]]
        step["linear"] = sorted(layer_of[number] for number in step["linear"])
        step["candidates"] = {
            " ".join(map(str, bank.named(int(number)).values())): score["value"]
            for number, score in step["candidates"].items()
        }
        if result.test_curve:
            step["test"] = result.test_curve[index].to_dict()
    return {
        "p_min": trace["p_min"],
        "p_min_kind": trace["p_min_kind"],
        "p_min_value": trace["p_min_value"],
        "candidate_evaluations": trace["num_candidate_evaluations"],
        "pass_equivalents": round(result.pass_equivalents, 2),
        "guard_pass_equivalents": round(result.guard_pass_equivalents, 2),
        "strategy": trace["strategy"],
        "strategy_reason": trace["reason"],
        "certificate": trace["certificate"],
        "guards": trace["guards"],
        "seconds": round(result.seconds, 2),
        "stop_reason": trace["stop_text"],
        "steps": steps,
    }


def _model(teacher: Teacher, bank: MixerBank, chosen: Chosen, test: Score, result: SearchResult) -> dict[str, Any]:
    paired, trace = paired_difference(test, result.teacher_test), result.trace
    promise = kept_against(test, result.teacher_test, p_min=trace.p_min, p_min_kind=trace.p_min_kind)
    return {
        "num_replaced": len(chosen.layers),
        "layers": [bank.layer_of[number] for number in chosen.layers],
        "kinds": [bank.kind_of(number) for number in chosen.layers],
        "val": chosen.score.to_dict(),
        "test": test.to_dict(),
        "relative_test_drop": paired.relative_drop,
        "paired": paired.to_dict(),
        "promise": None if promise is None else promise.to_dict(),
        "cache": _cache(teacher, bank, chosen.layers, CACHE_CONTEXT_TOKENS),
    }
