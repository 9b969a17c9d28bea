"""Task data: JSON Lines, splits, row ranges, draws, and the kind that the fields tell."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from dtr.errors import DataError, RecipeError
from dtr.tasks import load_task
from dtr.tasks.base import GenerationRequest, LikelihoodRequest
from dtr.tasks.fields import map_row
from dtr.tasks.jsonl import Row
from dtr.tasks.prompts import fill, fill_target


def questions(num: int, start: int = 0) -> list[dict]:
    return [{"question": f"Q{n}?", "choices": ["a", "b"], "answer": n % 2} for n in range(start, start + num)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "validation.jsonl").write_text(lines(questions(10)), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(lines(questions(20, start=100)), encoding="utf-8")
    return tmp_path


def asked(task, split: str) -> list[int]:
    return [int(item.requests[0].context.split("Q", 2)[2].split("?")[0]) for item in task.splits[split]]


def test_a_folder_gives_its_files_in_order(folder):
    task = load_task(str(folder))
    assert task.kind == "multiple_choice"
    assert asked(task, "validation") == list(range(10))
    assert asked(task, "test") == list(range(100, 120))
    assert task.splits["test"][3].id == "test.jsonl:4"


@pytest.mark.parametrize(
    ("validation", "test", "expected"),
    [
        ("test[0:5]", "test[5:]", (range(100, 105), range(105, 120))),
        ("test[-3:]", "test[:-3]", (range(117, 120), range(100, 117))),
        ("validation[2:4]", "test", (range(2, 4), range(100, 120))),
        ("test[0:5]", "validation", (range(100, 105), range(10))),
    ],
)
def test_row_ranges(folder, validation, test, expected):
    task = load_task(str(folder), validation=validation, test=test)
    assert (asked(task, "validation"), asked(task, "test")) == tuple(map(list, expected))


def test_a_single_file_is_divided_by_ranges(folder):
    task = load_task(str(folder / "test.jsonl"), validation="rows[0:4]", test="test[4:6]")
    assert (asked(task, "validation"), asked(task, "test")) == ([100, 101, 102, 103], [104, 105])
    with pytest.raises(
        DataError, match=r"task\.validation: got the split 'validation' of the single file.*rows\[0:250\]"
    ):
        load_task(str(folder / "test.jsonl"))


@pytest.mark.parametrize(
    ("validation", "test", "count"),
    [("test", "test", 20), ("test[0:6]", "test[5:]", 1), ("test[-5:]", "test[0:17]", 2)],
)
def test_rows_in_both_splits_are_refused(folder, validation, test, count):
    with pytest.raises(DataError, match=rf"task\.test: got {count} rows that are validation rows as well"):
        load_task(str(folder), validation=validation, test=test)


def test_copied_rows_are_counted_and_whole_copies_refused(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_task(str(folder))
    (folder / "test.jsonl").write_text(lines(questions(20, start=8)), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"^2 of 20 test items ask the same.*test\.jsonl:1 as validation\.jsonl:9"):
        load_task(str(folder))
    (folder / "test.jsonl").write_text(lines(questions(10)), encoding="utf-8")
    with pytest.raises(DataError, match="only copies of validation rows"):
        load_task(str(folder))


def test_a_draw_is_seeded_and_keeps_the_order(folder):
    one, two, other = (load_task(str(folder), num_validation=4, num_test=6, seed=seed) for seed in (0, 0, 1))
    assert asked(one, "test") == sorted(asked(one, "test"))
    assert len(asked(one, "validation")) == 4
    assert asked(one, "test") == asked(two, "test") != asked(other, "test")
    # The same on every Python version.
    assert asked(one, "test") == [102, 105, 107, 109, 115, 118]
    with pytest.raises(DataError, match=r"task\.num_test: got 21; expected at most the 20 items"):
        load_task(str(folder), num_test=21)


@pytest.mark.parametrize(
    ("expression", "error", "message"),
    [
        ("test[0-5]", RecipeError, r"task\.validation: got 'test\[0-5\]'.*test\[0:250\]"),
        ("", RecipeError, r"task\.validation: got ''"),
        ("test[0:21]", DataError, r"task\.validation: got 20 rows in .*test\.jsonl.*bound 21"),
        ("test[5:5]", DataError, r"task\.validation: got no row between 5 and 5"),
        ("dev", DataError, r"task\.validation: got no file dev\.jsonl.*Files there: test\.jsonl, validation\.jsonl\."),
    ],
)
def test_split_expressions_that_mean_nothing(folder, expression, error, message):
    with pytest.raises(error, match=message):
        load_task(str(folder), validation=expression)


GOOD = '{"question": "Q50?", "choices": ["a", "b"], "answer": 1}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Q2?"', "broken JSON"),
        ("[1, 2]", "a JSON list; expected one JSON object"),
        ('{"question": "Q2?", "answer": 1}', "a row without 'choices'.*Fields of this row: question, answer"),
        ('{"choices": ["a", "b"], "answer": 1}', "a row without 'question'"),
        ('{"question": "Q2?", "choices": ["a", "b"], "answer": 2}', "got 2 in 'answer'.*from 0 to 1, one of 2 choices"),
        ('{"question": "Q2?", "choices": ["a", "b"], "answer": -1}', "got -1 in 'answer'"),
        ('{"question": "Q2?", "choices": ["a", "b"], "answer": "B"}', "got 'B' in 'answer'.*whole number from 0"),
        ('{"question": "Q2?", "choices": ["a", "b"], "answer": true}', "got True in 'answer'"),
        ('{"question": "Q2?", "choices": "ab", "answer": 0}', "got 'ab' in 'choices'.*a list of texts"),
        ('{"question": "Q2?", "choices": ["a"], "answer": 0}', "at least two choices"),
        ('{"question": "Q2?", "choices": ["a", " "], "answer": 0}', "at least one visible character"),
        ('{"question": "", "choices": ["a", "b"], "answer": 0}', "a question or a context"),
        ('{"question": 7, "choices": ["a", "b"], "answer": 0}', "got 7 in 'question'; expected text"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(folder, line, message):
    (folder / "test.jsonl").write_text(f"{GOOD}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"test\.jsonl:3: got .*{message}|test\.jsonl:3: .*{message}"):
        load_task(str(folder))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "answer": ""}, "at least one letter or digit"),
        ({"prompt": "p", "answer": {"a": 1}}, "a text or a number, or a list"),
        ({"question": "q", "answers": []}, "a text or a number, or a list"),
        ({"prompt": "p"}, "a row without 'answer'"),
        ({"prompt": 3, "answer": "x"}, "got 3 in 'prompt'; expected text"),
    ],
)
def test_bad_generation_rows(tmp_path, row, message):
    (tmp_path / "validation.jsonl").write_text(lines([{"prompt": "p", "answer": "x"}]), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(lines([row]), encoding="utf-8")
    with pytest.raises(DataError, match=rf"test\.jsonl:1: .*{message}"):
        load_task(str(tmp_path))


def test_files_that_cannot_be_read(folder):
    (folder / "test.jsonl").write_text("\n\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"test\.jsonl: got an empty file"):
        load_task(str(folder))
    (folder / "test.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(DataError, match=r"test\.jsonl: .*UTF-8"):
        load_task(str(folder))
    with pytest.raises(DataError, match=r"task\.source: got .*validatio\.jsonl'.*Did you mean '.*validation\.jsonl'"):
        load_task(str(folder / "validatio.jsonl"))
    with pytest.raises(DataError, match=r"task\.source: got 'recalls'.*Did you mean 'recall'"):
        load_task("recalls")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"context": "c", "question": "q", "choices": ["a", "b"], "answer": 0}, "multiple_choice"),
        ({"text": "t", "label": 0, "label_text": "x"}, "classification"),
        ({"prompt": "p", "answer": "a", "final": "1"}, "generation"),
        ({"context": "c", "question": "q", "answers": ["a"], "label": 1}, "generation"),
        ({"title": "t", "text": "words"}, "perplexity"),
    ],
)
def test_the_fields_of_the_first_row_tell_the_kind(tmp_path, row, kind):
    other = {**row, "label": 1, "label_text": "y"} if kind == "classification" else {**row, "number": 2}
    (tmp_path / "validation.jsonl").write_text(lines([row, other]), encoding="utf-8")
    asked = next(name for name in ("context", "question", "prompt", "text") if name in row)
    (tmp_path / "test.jsonl").write_text(lines([{**row, asked: f"{row[asked]} And so?"}]), encoding="utf-8")
    assert load_task(str(tmp_path)).kind == kind


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "t", "label": 1}, r"fields text, label; .*multiple_choice: \{question, choices, answer\}"),
        ({"sentence": "t"}, r"classification: \{text, label, label_text\}.*set task\.kind"),
        ({"prompt": "p", "question": "q", "choices": ["a"], "answer": 0}, "fits multiple_choice and generation"),
    ],
)
def test_fields_that_fit_no_kind_or_several(folder, row, message):
    (folder / "validation.jsonl").write_text(lines([row]), encoding="utf-8")
    with pytest.raises(DataError, match=rf"validation\.jsonl:1: got .*{message}"):
        load_task(str(folder))


def test_contexts_are_joined_by_their_id(tmp_path):
    for split, name in (("validation", "m1"), ("test", "m2")):
        row = {"context_id": name, "question": "Who?", "answers": ["Ann"]}
        (tmp_path / f"{split}.jsonl").write_text(lines([row]), encoding="utf-8")
        (tmp_path / f"docs_{split}.jsonl").write_text(
            lines([{"context_id": name, "context": f"Ann spoke in {name}."}]), encoding="utf-8"
        )
    task = load_task(str(tmp_path))
    assert task.splits["test"][0].requests[0].context == "Ann spoke in m2.\nQuestion: Who?\nAnswer:"
    (tmp_path / "docs_test.jsonl").write_text(lines([{"context_id": "m3", "context": "x"}]), encoding="utf-8")
    with pytest.raises(DataError, match=r"test\.jsonl:1: got 'm2' in 'context_id'.*docs_test\.jsonl"):
        load_task(str(tmp_path))


def table(folder: Path, text: str | bytes) -> str:
    for split in ("validation", "test"):
        raw = text if isinstance(text, bytes) else text.replace("SPLIT", split).encode()
        (folder / f"{split}.csv").write_bytes(raw)
    return str(folder)


def test_a_csv_file_is_text_and_digits_are_numbers_where_one_is_meant(tmp_path):
    answers = 'prompt,answer\nSPLIT?,02116\n\nSPLIT!,1.50\nSPLIT.,"a, ""b""\nc"\nSPLIT;,NA\n'
    task = load_task(table(tmp_path, answers))
    assert [i.row["answers"] for i in task.splits["test"]] == [["02116"], ["1.50"], ['a, "b"\nc'], ["NA"]]
    choices = "question,one,two,answer\nSPLIT,007,8,1\n"
    task = load_task(table(tmp_path, choices), kind="multiple_choice", fields={"choices": ["one", "two"]})
    assert task.splits["test"][0].row == {"choices": ["007", "8"], "answer": 1}
    labels = "".join(f"SPLIT {n},{n},l{n}\n" for n in (10, 9))
    task = load_task(table(tmp_path, "text,label,label_text\n" + labels))
    assert task.splits["test"][0].row == {"choices": ["l9", "l10"], "answer": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,answer\nSPLIT,a,b\n", r"validation\.csv:1: got 3 cells; expected 2, one for each column"),
        ("prompt,answer,answer\nSPLIT,a,b\n", "got the column 'answer' twice; expected each column once"),
        ('prompt,answer\nSPLIT,"a\n', "broken CSV at line 2"),
        ("prompt,answer\nSPLIT,gr\u00fcn\n".encode("utf-16"), "text that is not UTF-8 .*CSV UTF-8"),
        ("prompt,answer\nx,gr\u00fcn\n".encode("utf-16-le"), "not UTF-8 .zero bytes, as UTF-16 has them"),
        ("prompt,answer\nx,gr\u00fcn\n".encode("latin-1"), "not UTF-8 .*CSV UTF-8"),
    ],
)
def test_csv_files_that_cannot_be_meant(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load_task(table(tmp_path, text))


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), ["a"], {"a": "b"}, b"abc"])
def test_what_is_no_text_is_refused_wherever_a_model_would_read_it(tmp_path, value):
    """Not only what a prompt names: targets, mapped fields and answers too."""
    row = Row(file=tmp_path / "rows.parquet", line=3, data={"question": "q", "note": value})
    message = r"rows\.parquet:3: got .* in 'note'; expected text or a number"
    for use in (
        lambda: fill("{question} {note}", row, "task.prompt"),
        lambda: fill_target("{answer} {note}", "answer", "a", row, "", chat_template=False),
        lambda: map_row(row, {"context": "{note}"}),
    ):
        with pytest.raises(DataError, match=message):
            use()
    assert fill("{question} {note}", replace(row, data={"question": "q", "note": 0.5}), "task.prompt") == "q 0.5"


@pytest.mark.parametrize(
    ("source", "prompt", "scored", "shown", "said"),
    [
        ("multiple_choice", "Q: {question} A: ", ("Q: a A:", " red"), None, "put before the answers"),
        ("classification", "{question}\n\n", ("a", "\n\nred"), None, "put before the answers"),
        ("generation", "{question}\n", ("a", "\nred"), "a", "left out, and the model writes it"),
    ],
)
def test_white_space_at_the_end_of_prompts_is_told_with_its_number(tmp_path, source, prompt, scored, shown, said):
    row = {"question": "a", "choices": ["red", "green"], "label_text": "red", "answer": 0}
    row |= {"answer": "red"} if source == "generation" else {}
    for split, letters in (("validation", "abc"), ("test", "de")):
        rows = [row | {"question": letter, "label": 0} for letter in letters]
        rows[1] |= {"label": 1, "label_text": "green"}
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match=f"prompts of 3 of 3 validation and 2 of 2 test items.*{said}"):
        task = load_task(source, path=str(tmp_path), prompt=prompt)
    assert said in task.notes[-1]
    requests = task.splits["validation"][0].requests
    likely = [request for request in requests if isinstance(request, LikelihoodRequest)]
    assert (likely[0].context, likely[0].target) == scored
    assert [r.context for r in requests if isinstance(r, GenerationRequest)] == ([shown] if shown else [])


def test_an_answer_brings_its_own_space_or_gets_one():
    row = Row(file=Path("rows.jsonl"), line=1, data={})
    given = [("bad", "Q:"), (" bad", "Q:"), ("\nbad", "Q:"), ("bad", "Q: "), ("bad", "Q:\n")]
    texts = [fill_target(None, "answer", text, row, context, chat_template=False) for text, context in given]
    assert texts == [" bad", " bad", "\nbad", "bad", "bad"]
    assert fill_target(None, "answer", " bad", row, "Q:", chat_template=True) == "bad"
