"""From a YAML file and `section.key=value` overrides to a recipe. No torch in here."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dtr.errors import RecipeError, shown
from dtr.files import require_file, suggest_path
from dtr.recipe.errors import as_recipe_error
from dtr.recipe.sections import Recipe
from dtr.recipe.yaml_values import load_yaml

MAX_FILE_BYTES = 256_000
MAX_TEXT_CHARS = 100_000
"""Of one value; a prompt with many examples has a few thousand."""
MAX_DEPTH = 20


def read_recipe(
    path: str | Path | None,
    overrides: Sequence[str | tuple[str, Any]] = (),
    base: dict[str, Any] | None = None,
) -> Recipe:
    """Read a YAML recipe and apply `section.key=value` overrides.

    Args:
        path: YAML file, or None for `base` alone.
        overrides: each `section.key=value`, the value read as YAML; or a pair of `section.key` and the value itself.
        base: settings that the file may replace.

    Raises:
        RecipeError: the file cannot be read, a key is unknown, a value does not fit. All problems in one message.
    """
    data: dict[str, Any] = dict(base or {})
    if path is not None:
        for key, value in _read_yaml(Path(path)).items():
            data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
    for override in overrides:
        if isinstance(override, str):
            _apply(data, *_parse(override))
        else:
            _apply(data, override[0].split("."), override[1])
    where = str(path) if path else "recipe"
    _check_plain(data, where)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise as_recipe_error(error, Recipe, where) from None
    recipe._path = None if path is None else str(path)
    return recipe


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        require_file(path)
        if path.stat().st_size > MAX_FILE_BYTES:
            got = f"a file of {path.stat().st_size:,} bytes"
            raise RecipeError(str(path), got=got, expected=f"a YAML recipe, which has at most {MAX_FILE_BYTES:,}")
        data = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        got = (error.strerror or str(error)).lower() if isinstance(error, OSError) else "bytes that are not UTF-8"
        hint = "Check the path." if os.path.exists(path) else suggest_path(str(path))
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


def _parse(override: str) -> tuple[list[str], Any]:
    """Keys and value of `section.key=value`."""
    dotted, sep, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not sep or not all(keys):
        raise RecipeError(
            "--set", got=f"'{override}'", expected="section.key=value", hint="As in --set search.p_min=0.9"
        )
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        value = text
    # To YAML a template such as "Question: {question}" is a mapping; one that is meant has braces and values.
    if isinstance(value, dict) and (not text.lstrip().startswith("{") or None in value.values()):
        value = text
    return keys, value


def _apply(data: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = data.get(key)
        data[key] = dict(inner) if isinstance(inner, dict) else {}
        data = data[key]
    data[keys[-1]] = value


def _check_plain(value: Any, where: str, path: tuple[str, ...] = ()) -> None:
    """Refuse what no setting may hold, in sections and in free options alike: text that no file can be written with,
    integers that no library takes, values that are not plain.

    Raises:
        RecipeError: names the field.
    """

    def refuse(got: str, expected: str) -> RecipeError:
        return RecipeError(f"{where}: {'.'.join(path) or 'recipe'}", got=got, expected=expected)

    if isinstance(value, dict | list) and len(path) > MAX_DEPTH:
        raise refuse("lists or sections inside each other", f"at most {MAX_DEPTH} of them")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise refuse(f"the key {shown(key)}", "names as keys; quote a number")
            _check_plain(key, where, path)
            _check_plain(inner, where, (*path, key[:100]))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_plain(inner, where, (*path, str(number)))
    elif isinstance(value, str):
        if len(value) > MAX_TEXT_CHARS:
            raise refuse(f"text of {len(value):,} characters", f"at most {MAX_TEXT_CHARS:,}")
        if not value.isprintable() and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise refuse(shown(value), "text in UTF-8 without null characters")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise refuse(shown(value), "a number of at most 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise refuse(shown(value), "a finite number")
    elif not (value is None or isinstance(value, int | float)):
        raise refuse(f"a {type(value).__name__}", "text, a number, true, false, a list or a section")
