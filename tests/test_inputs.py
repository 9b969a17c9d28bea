"""Small inputs that could fill a machine, hang or be misread: each gets one message that names it, at once."""

from __future__ import annotations

import gzip
import json
import os
import warnings

import pytest

from dtr.corpus.reading import find_files, read_documents
from dtr.corpus.sources import check_sources
from dtr.errors import DataError, DtrError, RecipeError
from dtr.json_lines import MAX_ROW_CHARS, parse_object
from dtr.recipe import Section
from dtr.tasks import classification, generation, harness, load_task, long_context, multiple_choice, perplexity, recall
from dtr.tasks.jsonl import Row
from dtr.tasks.prompts import fill
from dtr.tasks.spec import TaskSpec, read_options

ROWS = {
    '{"a": 1, "a": 2}': "the key 'a' twice in one object",
    '{"a": {"b": 1, "c": 2, "b": 1}}': "the key 'b' twice in one object",
    '{"a": "\\ud800"}': "half a character (\\ud800, a lone surrogate)",
    '{"\\udfff": 1}': "a lone surrogate",
    '{"a": %s}' % ("9" * 5000): "exceeds the limit",
    "[" * 100_000: "broken JSON (nested too deeply)",
    "[1]": "a JSON list",
    '{"a": 1': "broken JSON (",
}


@pytest.mark.parametrize("line", ROWS, ids=[line[:16] for line in ROWS])
def test_rows_that_cannot_be_meant(line, tmp_path):
    path = tmp_path / "validation.jsonl"
    path.write_text('{"text": "x"}\n' + line)
    for read in (lambda: load_task(str(tmp_path)), lambda: list(read_documents(path))):
        with pytest.raises(DataError, match=r"validation\.jsonl:2: got ") as caught:
            read()
        assert ROWS[line] in str(caught.value)
        assert len(str(caught.value)) < 400


def test_pairs_of_surrogates_are_text():
    assert parse_object('{"a": "\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}


def test_a_row_too_long_for_any_model(tmp_path, monkeypatch):
    (tmp_path / "validation.jsonl").write_text(json.dumps({"text": "x" * (MAX_ROW_CHARS + 1)}))
    with pytest.raises(DataError, match=r"jsonl:1: got a line of more than 8,000,000 characters"):
        load_task(str(tmp_path))
    monkeypatch.setattr("dtr.corpus.reading.MAX_LINE_CHARS", 1000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"short\n" + b"x" * 100_000))
    with pytest.raises(DataError, match=r"gz:2: got a line of more than 1,000 characters"):
        list(read_documents(tmp_path / "a.txt.gz"))


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "full.txt").write_text("text")
    for name in ("pipe.txt", "pipe.jsonl"):
        with pytest.raises(DataError, match=r"a pipe, device or socket instead of a file"):
            check_sources([str(tmp_path / name)], known=())
        with pytest.raises(DataError, match=r"task\.source: got .*a pipe, device or socket instead of a file"):
            load_task(str(tmp_path / name))
    for path in ("/dev/null", "/dev/zero"):
        with pytest.raises(DtrError, match=r"got .*(device|suffix)"):
            load_task(path)
        with pytest.raises(DtrError, match=r"got .*(device|suffix)"):
            find_files(path)
    # In a folder they are passed over.
    assert find_files(str(tmp_path)) == [(tmp_path / "full.txt").resolve()]


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/x", "a\0b", "\ud800", "x/" * 3000])
def test_names_that_no_file_can_have(name):
    for read in (load_task, find_files):
        with pytest.raises(DataError, match="does not exist"):
            read(name)


TEMPLATES = {
    "{a:>3000000000}": "a short format",
    "{a:0999.9999f}": "a short format",
    "{a:{b}}": "a short format",
    "{a.__class__}": "a part of it as",
    "{a[0].b}": "a part of it as",
    "{a" * 3: "literal braces",
    "{a}" * 101: "101 fields in braces",
    "{}": "does not have",
    "{a!z}": "literal braces",
    "{a[0}": "literal braces",
}


@pytest.mark.parametrize("template", TEMPLATES, ids=[template[:16] for template in TEMPLATES])
def test_templates_only_show_fields(template, tmp_path):
    row = Row(file=tmp_path / "rows.jsonl", line=1, data={"a": "x", "b": 10**9, "c d": [1, 2.5]})
    with pytest.raises(RecipeError, match=r"task\.prompt") as caught:
        fill(template, row, "task.prompt")
    assert TEMPLATES[template] in str(caught.value)
    assert fill("{a:>5}|{b:,}|{c d[1]:.2f}|{a!r}|{{a}}", row, "task.prompt") == "    x|1,000,000,000|2.50|'x'|{a}"


def test_rows_that_ask_the_same_are_no_test(tmp_path):
    def rows(split, numbers):
        return "\n".join(
            json.dumps({"id": f"{split}-{n}", "question": f"Is {n} even?", "choices": ["yes", "no"], "answer": n % 2})
            for n in numbers
        )

    (tmp_path / "validation.jsonl").write_text(rows("validation", range(6)))
    (tmp_path / "test.jsonl").write_text(rows("test", range(6)))
    with pytest.raises(DataError, match=r"only copies of validation rows, as test\.jsonl:1 of validation\.jsonl:1"):
        load_task(str(tmp_path))
    (tmp_path / "test.jsonl").write_text(rows("test", range(5, 9)))
    with pytest.warns(UserWarning, match=r"1 of 4 test items ask the same as validation items \(first: test"):
        load_task(str(tmp_path))
    (tmp_path / "test.jsonl").write_text(rows("test", range(6, 9)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_task(str(tmp_path))


OPTIONS = [
    getattr(module, name)
    for module in (classification, generation, harness, long_context, multiple_choice, perplexity, recall)
    for name in dir(module)
    if name.endswith("Options")
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: x.__name__)
def test_options_of_tasks_are_as_strict_as_settings(options):
    assert issubclass(options, Section)
    for name, field in options.model_fields.items():
        for value in (10**30, -(10**9), 10**6000, float("inf"), "", b"x", {}, [], [[]]):
            if value == [] and isinstance(field.get_default(call_default_factory=True), list):
                continue
            spec = TaskSpec(name="x", kind="x", options={name: value})
            with pytest.raises(RecipeError, match=rf"task\.options\.{name}") as caught:
                read_options(options, spec)
            assert len(str(caught.value)) < 400
