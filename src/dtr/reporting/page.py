"""The HTML page of a run: one file, no scripts, nothing from the network."""

from __future__ import annotations

import functools
import math
from typing import Any

import yaml
from jinja2 import ChainableUndefined, Environment, PackageLoader

from dtr.reporting import charts, cost_charts
from dtr.reporting.formats import FILTERS, MISSING, dig, is_number
from dtr.reporting.verdict import Which, p_min_on_validation, verdict


class _NotMeasured(ChainableUndefined):
    """A missing entry, at any depth, prints as what it is."""

    def __str__(self) -> str:
        return MISSING

    def __html__(self) -> str:
        return MISSING


@functools.cache
def environment() -> Environment:
    """Templates of this package; pages are escaped, Markdown is not."""
    env = Environment(
        loader=PackageLoader("dtr.reporting"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=_NotMeasured,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(FILTERS)
    env.filters["order"] = replacement_order
    # No line begins with a per cent sign, and none ends between an error and its sign.
    env.filters["together"] = lambda text: str(text).replace(" %", "\u00a0%").replace("\u00b1 ", "\u00b1\u00a0")
    env.filters["yaml"] = lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return env


def render_html(report: dict) -> str:
    """The page of one run, from the contents of its `report.json`."""
    template = environment().get_template("report.html.j2")
    return template.render(
        report=without_nulls(report),
        libraries=_libraries(report),
        verdict=verdict(report),
        gauge=_gauge(report),
        models=[{"name": "M_opt", **_model(report, "m_opt")}, {"name": "M_best", **_model(report, "m_best")}],
        cells=layer_cells(report),
        score_chart=charts.score_chart(report),
        nmse_chart=charts.nmse_chart(report),
        distillation_chart=charts.distillation_chart(report),
        speed_chart=cost_charts.speed_chart(report),
        memory_chart=cost_charts.memory_chart(report),
        p_min_value=p_min_on_validation(report),
        has_steps_on_test=any(step.get("test") for step in dig(report, "search.steps") or []),
    )


def _libraries(report: dict) -> str:
    versions = {**(report.get("versions") or {"libraries": MISSING}), "dtr": report.get("dtr_version") or MISSING}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)


def without_nulls(record: Any) -> Any:
    """The record without entries that are null, so that templates see one kind of missing."""
    if isinstance(record, dict):
        return {key: without_nulls(value) for key, value in record.items() if value is not None}
    return [without_nulls(value) for value in record] if isinstance(record, list) else record


def layer_cells(report: dict) -> list[dict[str, Any]]:
    """One entry per layer for the layer map: its kind, when it was replaced, its error, and all that as a sentence."""
    order = {layer: place for place, layer in enumerate(dig(report, "m_opt.layers") or [], start=1)}
    kinds = kinds_by_layer(report, "m_opt")
    best = set(dig(report, "m_best.layers") or [])
    # Of several mixers for a layer, the one in its place, or else the first.
    rows = sorted(dig(report, "distill.nmse") or [], key=lambda row: kinds.get(row.get("layer")) != row.get("kind"))
    errors: dict[Any, Any] = {}
    for row in rows:
        errors.setdefault(row.get("layer"), row.get("after"))
    logs = [math.log(e) for e in errors.values() if is_number(e) and e > 0]
    cells = []
    for layer in range(report.get("num_layers") or 0):
        error, place = errors.get(layer), order.get(layer)
        shade = None
        if is_number(error) and error > 0:
            span = max(logs) - min(logs)
            shade = round(0.15 + 0.85 * ((math.log(error) - min(logs)) / span if span else 0.5), 2)
        kind = f"linear{_in_brackets(kinds.get(layer))}, replaced as number {place}" if place else "attention"
        also = ", also linear in M_best" if layer in best else ""
        cells.append(
            {
                "layer": layer,
                "place": place,
                "in_best": layer in best,
                "shade": shade,
                "text": f"Layer {layer}: {kind}{also}; error {FILTERS['small'](error)}",
            }
        )
    return cells


def kinds_by_layer(report: dict, which: Which) -> dict[int, str]:
    """The mixer in place of each linear layer; empty where all are of one kind."""
    if len(dig(report, "mixer.kinds") or []) < 2:
        return {}
    return dict(zip(dig(report, f"{which}.layers") or [], dig(report, f"{which}.kinds") or []))


def replacement_order(model: Any, report: dict) -> str:
    """Linear layers of a hybrid's record in order, each with its kind where kinds differ."""
    layers = dig(model, "layers")
    mixed = len(dig(report, "mixer.kinds") or []) > 1
    kinds = (dig(model, "kinds") if mixed else None) or [None] * len(layers or [])
    return ", ".join(f"{layer}{_in_brackets(kind)}" for layer, kind in zip(layers or [], kinds)) or "none"


def _in_brackets(kind: str | None) -> str:
    return f" ({kind})" if kind else ""


def _model(report: dict, which: Which) -> dict[str, Any]:
    record = without_nulls(report.get(which) or {})
    cache = record.get("cache") or {}
    teacher, hybrid = cache.get("teacher_bytes"), cache.get("hybrid_bytes")
    share = hybrid / teacher if is_number(teacher) and is_number(hybrid) and teacher else None
    return {
        "record": record,
        "verdict": verdict(report, which),
        "cache_share": share,
        "above_chance": kept_above_chance(report, which),
    }


def kept_above_chance(report: dict, which: Which) -> str:
    """What the hybrid keeps of the teacher's test score above that of guessing, as text; a teacher that guesses has
    nothing to lose, so that its task says nothing of a hybrid."""
    chance, teacher, hybrid = (dig(report, key) for key in ("task.chance", "teacher.test", f"{which}.test"))
    if not (is_number(chance) and is_number(dig(teacher, "value")) and is_number(dig(hybrid, "value"))):
        return MISSING
    above = teacher["value"] - chance
    if above <= 2 * (teacher.get("stderr") or 0.0):
        return "the teacher is at chance"
    return FILTERS["percent"]((hybrid["value"] - chance) / above)


def _gauge(report: dict) -> dict[str, float] | None:
    """Where the kept score, its interval and the limit lie on a bar, in percent of its width."""
    kept = verdict(report).kept
    if kept is None:
        return None
    ends = [kept.low, kept.high, kept.limit, *([1.0] if kept.is_share else [])]
    room = 0.12 * (max(ends) - min(ends)) or 0.05
    low, high = min(ends) - room, max(ends) + room

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    return {
        "low": place(kept.low),
        "width": round(place(kept.high) - place(kept.low), 2),
        "measured": place(kept.measured),
        "limit": place(kept.limit),
    }
