"""All that is wrong with a recipe in one message: which field, what it holds, what it may hold, what is near."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dtr.errors import RecipeError, did_you_mean, shown

FORMS = ("one", "several")
"""Tags of the forms that a value may take; pydantic puts them into the path of a problem."""


def as_recipe_error(error: ValidationError, recipe: type[BaseModel], where: str) -> RecipeError:
    """What pydantic found in the fields of `recipe`, as one error of ours; `where` is the file."""
    problems = [_describe(problem, recipe) for problem in error.errors()]
    first, *others = problems
    hint = first[3] + "".join(
        f" Also: {field}: got {got}; expected {want}. {hint}" for field, got, want, hint in others
    )
    return RecipeError(f"{where}: {first[0]}", got=first[1], expected=first[2], hint=hint.strip())


def _describe(problem: Any, recipe: type[BaseModel]) -> tuple[str, str, str, str]:
    path, section = _walk(problem["loc"], recipe)
    field = ".".join(path)
    if problem["type"] == "extra_forbidden":
        # Most often a setting without its section, as --set p_min=0.9.
        inside = [
            f"{name}.{field}"
            for name, info in recipe.model_fields.items()
            for known in _sections_in(info.annotation)
            if field in known.model_fields
        ]
        hint = f"Did you mean '{inside[0]}'?" if inside else did_you_mean(path[-1], section.model_fields)
        return field, f"unknown key '{path[-1]}'", "a known key", hint
    if problem["type"] == "missing":
        if field == "teacher":
            return field, "nothing", "a model", "Name one with --model, or as teacher.source in a recipe."
        return field, "nothing", "a value", f"Add '{path[-1]}:' or --set {field}=..."
    if problem["type"] == "model_type" and path:
        known = section.model_fields.get(path[-1])
        # An entry of a list has a number in place of a field's name, and `section` is already what it should be.
        inner = section if known is None else next(_sections_in(known.annotation))
        hint = f"Its settings are {', '.join(f'{field}.{name}' for name in list(inner.model_fields)[:3])} and so on."
        return field, shown(problem["input"]), "a section", hint
    message = problem["msg"].replace("Input should be", "").removeprefix("Value error,").strip()
    if problem["type"] == "string_type" and isinstance(problem["input"], int | float | bool):
        return field, shown(problem["input"]), "text", f"Quote it to make it text: '{problem['input']}'."
    near = difflib.get_close_matches(str(problem["input"]), re.findall(r"'([^']+)'", message), n=1)
    hint = f"Did you mean '{near[0]}'?" if problem["type"] == "literal_error" and near else ""
    return field, shown(problem["input"]), message.partition(", unable to")[0], hint


def _walk(loc: tuple[str | int, ...], recipe: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """The path to a problem as people write it, and the section that its last part is in."""
    path: list[str] = []
    section, inner = recipe, recipe
    for part in loc:
        section = inner
        if part in FORMS:
            continue
        path.append(str(part))
        known = section.model_fields.get(str(part))
        inner = next(_sections_in(known.annotation), section) if known is not None else section
    return path, section


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Sections that a field's type names, in lists and unions too; nothing for a plain type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)
