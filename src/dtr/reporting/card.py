"""The Hugging Face model card of a saved hybrid: YAML front matter, how to load it, its numbers and its limits."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import yaml

from dtr.reporting.formats import dig, is_number
from dtr.reporting.page import environment, without_nulls
from dtr.reporting.verdict import Which, verdict

_IS_PATH = re.compile(r"(?:~[^/\\]*|[A-Za-z]:|\.{1,2})?[/\\]")
_PATH = re.compile(r"(?<![\w/\\.:<])(?:~|[A-Za-z]:|\.{1,2})?[/\\](?:[^\s'\"`<>|/\\]+[/\\])*([^\s'\"`<>|/\\,;]+)")
_SPECIAL = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\n": " ", "\r": " ", **{c: f"\\{c}" for c in "\\`*[]|"}}
)


class _Code(str):
    """Text between backticks, in which nothing but a backtick or a new line has a meaning."""


def render_model_card(report: dict, *, which: Which = "m_opt") -> str:
    """Markdown for the README.md beside the weights of M_opt or M_best.

    A card is made to be published: of paths on this machine it keeps the last part, and text that comes from recipes,
    tasks and models is shown as text, whatever HTML or Markdown is in it.
    """
    report = _without_paths(report)
    front = yaml.safe_dump(_front_matter(report, which), sort_keys=False, allow_unicode=True)
    cards = environment().overlay(finalize=_as_text)
    cards.filters = {**cards.filters, "code": lambda text: _Code(" ".join(str(text).replace("`", "'").split()))}
    settings = {key: value for key, value in (report.get("recipe") or {}).items() if key != "runtime"}
    body = cards.get_template("model_card.md.j2").render(
        report=(known := without_nulls(report)),
        model=known.get(which, {}),
        which=which,
        verdict=verdict(report, which),
        name=_name(report),
        # Indented text is shown as it is.
        recipe=_Code(textwrap.indent(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "    ")),
    )
    return f"---\n{front}---\n\n{body}"


def _as_text(value: Any) -> Any:
    return value.translate(_SPECIAL) if isinstance(value, str) and not isinstance(value, _Code) else value


def _without_paths(value: Any) -> Any:
    """A record in which paths of this machine are their last part."""
    if isinstance(value, dict):
        return {_without_paths(key): _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    # A value that is a path may hold spaces.
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if _IS_PATH.match(value) else _PATH.sub(r"\1", value)


def _front_matter(report: dict, which: Which) -> dict[str, Any]:
    kind = "text-classification" if dig(report, "recipe.task.options.head") else "text-generation"
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": kind}
    if (source := dig(report, "teacher.source")) and _is_hub_name(source):
        front["base_model"] = source
    if license_name := dig(report, "teacher.license"):
        front["license"] = license_name
    front["tags"] = ["dtr", "hybrid", "linear-attention", *_mixers(report)]
    value, unit, task = dig(report, f"{which}.test.value"), dig(report, "task.metric"), dig(report, "task.name")
    if is_number(value) and unit and task:
        result = {
            "task": {"type": kind},
            "dataset": {"name": task, "type": task, "split": "test"},
            "metrics": [{"type": unit, "value": value}],
        }
        front["model-index"] = [{"name": _name(report), "results": [result]}]
    return front


def _mixers(report: dict) -> list[str]:
    """The kinds of mixer that search could choose from."""
    kind = dig(report, "mixer.kind")
    return dig(report, "mixer.kinds") or ([kind] if kind else [])


def _is_hub_name(source: str) -> bool:
    """Whether a source reads as owner/name; a folder on this machine means nothing to a reader of the card."""
    return (
        bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source))
        and not source.endswith(".gguf")
        and not Path(source).exists()
    )


def _name(report: dict) -> str:
    source = str(dig(report, "teacher.source") or "teacher").rstrip("/\\")
    stem = re.split(r"[/\\]", source)[-1].removesuffix(".gguf")
    return f"{stem}-{dig(report, 'task.name') or 'task'}-hybrid"
