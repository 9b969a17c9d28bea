"""From a YAML file and `section.key=value` overrides to a recipe. No torch in here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dtr.errors import RecipeError
from dtr.files import suggest_path
from dtr.recipe.errors import as_recipe_error
from dtr.recipe.sections import Recipe


def read_recipe(path: str | Path | None, overrides: list[str] = (), base: dict[str, Any] | None = None) -> Recipe:  # type: ignore[assignment]
    """Read a YAML recipe and apply `section.key=value` overrides.

    Args:
        path: YAML file, or None for `base` alone.
        overrides: each `section.key=value`; the value is read as YAML.
        base: settings that the file may replace.

    Raises:
        RecipeError: the file cannot be read, a key is unknown, a value does not fit. All problems in one message.
    """
    data: dict[str, Any] = dict(base or {})
    if path is not None:
        for key, value in _read_yaml(Path(path)).items():
            data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
    for override in overrides:
        _apply(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise as_recipe_error(error, Recipe, str(path) if path else "recipe") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        got = (error.strerror or str(error)).lower() if isinstance(error, OSError) else "bytes that are not UTF-8"
        got = "a folder" if path.is_dir() else got
        hint = "Check the path." if path.exists() else suggest_path(str(path))
        raise RecipeError(str(path), got=got, expected="a readable YAML recipe", hint=hint) from None
    except yaml.YAMLError as error:
        problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        got = f"broken YAML{place} ({problem or ' '.join(str(error).split())})"
        raise RecipeError(str(path), got=got, expected="YAML", hint="Mend that line or the one before it.") from None
    if not isinstance(data, dict):
        got = "an empty file" if data is None else f"a {type(data).__name__}"
        raise RecipeError(str(path), got=got, expected="sections such as 'teacher:' and 'task:'")
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    dotted, sep, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not sep or not all(keys):
        raise RecipeError(
            "--set", got=f"'{override}'", expected="section.key=value", hint="As in --set search.p_min=0.9"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    # To YAML a template such as "Question: {question}" is a mapping; one that is meant has braces and values.
    if isinstance(value, dict) and (not text.lstrip().startswith("{") or None in value.values()):
        value = text
    # YAML 1.1 reads 1e-3 as a string.
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass
    for key in keys[:-1]:
        inner = data.get(key)
        data[key] = dict(inner) if isinstance(inner, dict) else {}
        data = data[key]
    data[keys[-1]] = value
