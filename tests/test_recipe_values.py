"""Whatever a recipe's fields are given, it is taken as it was meant or refused in one message that names the field."""

from __future__ import annotations

import math
import os
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from dtr.errors import RecipeError
from dtr.recipe import Recipe, read_recipe
from dtr.recipe.errors import _sections_in
from dtr.recipe.sections import MAY_BE_EMPTY
from dtr.recipe.yaml_values import dump_yaml, load_yaml

BASE = {"teacher": {"source": "somewhere"}}
HUGE = [10**30, -(10**30), 10**6000, 1e308]
NEVER: dict[type, list[Any]] = {
    int: [True, "1", "", 0.5, math.nan, math.inf, -(10**9), *HUGE, [], {}, b"1", {1: 2}],
    float: [True, "0.5", "", math.nan, math.inf, -math.inf, -1.0, *HUGE, [], {}, b"1"],
    bool: [0, 1, "true", "", 0.0, [], {}],
    str: [1, True, 0.5, "\ud800", "a\0b", "x" * 10**6, {}, b"x", *HUGE],
    list: [1, True, {}, [None], [[]], [math.nan], {"\ud800": 1}],
    dict: [1, True, [], "x", {1: 2}, {"": ""}, {"a": "\ud800"}, {"a": 10**30}, {"a": b""}],
}
"""By type, what none of the recipe's fields of that type may hold."""


def leaves(section: type[BaseModel], path: str = ""):
    """Every field of a section and of those inside it."""
    for name, field in section.model_fields.items():
        inner = next(_sections_in(field.annotation), None)
        if inner is not None and field.annotation is inner:
            yield from leaves(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}", field.annotation


def types_in(annotation: Any) -> set[Any]:
    """The plain types that a field takes, those of a list's or mapping's parts left out."""
    found = getattr(annotation, "__origin__", annotation)
    if found in (list, dict) or annotation in NEVER or annotation is type(None):
        return {found}
    values = get_args(annotation)
    return set().union(*(types_in(one) for one in values)) if values else {type(annotation)}


def refused(path: str, value: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(None, [(path, value)], BASE)
    return str(caught.value)


@pytest.mark.parametrize("section", list(Recipe.model_fields))
def test_no_field_takes_what_it_cannot_mean(section):
    fields = [(path, kind) for path, kind in leaves(Recipe) if path.split(".")[0] == section]
    assert fields
    for path, annotation in fields:
        check_field(path, types_in(annotation))


def check_field(path: str, taken: set[Any]) -> None:
    for kind in taken & NEVER.keys():
        for value in NEVER[kind]:
            # What one form refuses may be another's, as a list of sources beside a single one.
            if type(value) in taken - {kind} or (value == "" and path.rpartition(".")[2] in MAY_BE_EMPTY):
                continue
            message = refused(path, value)
            assert path in message, message
            assert message.count(": got ") == 1, message
            assert len(message.splitlines()[0]) == len(message) < 600, message
    if type(None) not in taken:
        assert path in refused(path, None)
    if str in taken and path.rpartition(".")[2] not in MAY_BE_EMPTY:
        assert path in refused(path, "")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("distill.layers", [1, 1]),
        ("distill.layers", [-1]),
        ("distill.layers", []),
        ("mixer.kind", [{"kind": "retention", "layers": [2, 2]}]),
        ("text.source", ["a.txt", ""]),
        ("text.mix", {"": 0.1}),
        ("text.mix", {"a": True}),
        ("text.mix", {"a": 0.6, "b": 0.6}),
        ("task.fields", {"question": ""}),
        ("task.fields", {"question": [1]}),
        ("seed", 2**64),
        ("runtime.num_threads", 1_000_000),
        ("text.writing.temperature", 1e-300),
    ],
)
def test_values_of_the_right_type_that_cannot_be_meant(path, value):
    message = refused(path, value)
    assert path in message
    assert message.count(": got ") == 1


YAML = {
    "a: 1\nb: 2\na: 3": "line 3, column 1 (the key 'a' comes twice)",
    "a: {b: 1, 'b': 2}": "the key 'b' comes twice",
    "a: &a [1, *a]": "unfold to over",
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{n}: &{n} [{', '.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi")): "unfold to over",
    "[" * 500: "nested too deeply",
    "seed: " + "9" * 5000: "a number of too many digits",
    "seed: 0x" + "f" * 5000: "a number of at most 64 bits",
    "a: !!python/object/apply:os.system [ls]": "could not determine a constructor",
    "a: !!binary aGVsbG8=": "got a bytes; expected text",
    "1: 2": "got the key 1; expected names as keys",
    'teacher: {source: "\\ud800"}': "text in UTF-8",
    "teacher: {source: x}\ntask: {subset: 2024}": "Quote it to make it text: '2024'.",
    "#" * 300_000: "a file of 300,000 bytes",
}


@pytest.mark.parametrize("text", YAML, ids=[text[:12] for text in YAML])
def test_files_that_are_refused(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(tmp_path / "recipe.yaml")
    assert YAML[text] in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null", tmp_path, tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(RecipeError, match="expected a readable YAML recipe"):
            read_recipe(path)


def test_values_come_back_as_they_were_written():
    values = [
        "1e-3",
        "1e6",
        "12:30",
        "2024-01-01",
        "2024",
        "true",
        "null",
        "0123",
        "~",
        "a: b",
        "\u00e9",
        "a\nb",
        ".nan",
    ]
    values += [1e-5, 1e300, 0.001, 5, True, None]
    assert load_yaml(dump_yaml({"x": values})) == {"x": values}
    assert load_yaml("[1e-3, 1e6, .5, -2., 12:30, 2024-01-01]") == [0.001, 1000000, 0.5, -2.0, "12:30", "2024-01-01"]


def test_a_quoted_number_stays_text():
    assert read_recipe(None, ['task.subset="2024"'], BASE).task.subset == "2024"
    assert read_recipe(None, ["distill.num_tokens=1e6"], BASE).distill.num_tokens == 1_000_000
    assert read_recipe(None, ["distill.learning_rate=1e-3", "search.p_min=1"], BASE).search.p_min == 1.0
