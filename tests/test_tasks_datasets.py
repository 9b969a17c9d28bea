"""Rows from parquet, CSV, Arrow, saved and hub data sets, and the mapping of their fields."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pyarrow.ipc
import pyarrow.parquet
import pytest

from dtr.corpus.reading import read_documents
from dtr.errors import DataError, DeviceError, RecipeError
from dtr.recipe import read_recipe
from dtr.tasks import load_task
from dtr.tasks.sources import read_rows

PIQA = {"question": "goal", "choices": ["sol1", "sol2"], "answer": "label"}
ARC = {"choices": "choices.text", "labels": "choices.label", "answer": "answerKey"}


def piqa(split: str, num_rows: int) -> list[dict]:
    return [{"goal": f"{split} {n}", "sol1": "red", "sol2": f"blue {n}", "label": n % 2} for n in range(num_rows)]


def arc(split: str, num_rows: int) -> list[dict]:
    choices = {"text": ["red", "green", "blue"], "label": ["A", "B", "C"]}
    return [{"question": f"{split} {n}?", "choices": choices, "answerKey": "ABC"[n % 3]} for n in range(num_rows)]


def write(folder: Path, kind: str, rows=piqa) -> None:
    for split, num_rows in (("validation", 4), ("test", 6)):
        data = datasets.Dataset.from_list(rows(split, num_rows))
        if kind == "parquet":
            data.to_parquet(folder / f"{split}.parquet")
        elif kind == "csv":
            data.to_csv(folder / f"{split}.csv")
        elif kind == "arrow":
            data.save_to_disk(str(folder / "saved"))
            (next((folder / "saved").glob("*.arrow"))).rename(folder / f"{split}.arrow")
        else:
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows(split, num_rows))))


@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow", "jsonl"])
def test_every_kind_of_file_gives_the_same_items(kind, tmp_path):
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", "jsonl")
    write(tmp_path, kind)
    task, expected = (load_task(str(folder), fields=PIQA) for folder in (tmp_path, tmp_path / "other"))
    assert task.kind == "multiple_choice"
    for split in ("validation", "test"):
        assert [i.requests for i in task.splits[split]] == [i.requests for i in expected.splits[split]]
        assert [i.row["answer"] for i in task.splits[split]] == [n % 2 for n in range(len(task.splits[split]))]


def write_twice(path: Path, table: pyarrow.Table) -> None:
    """A file in which the column `text` comes twice, as joins of tables leave it."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    elif path.suffix == ".csv":
        path.write_text("text,id,text\nfirst,1,second\n")
    else:
        path.write_text('{"text": "first", "id": 1, "text": "second"}\n')


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "jsonl"])
def test_a_name_that_is_there_twice_is_refused_by_name(kind, tmp_path):
    table = pyarrow.Table.from_arrays([["first"], [1], ["second"]], names=["text", "id", "text"])
    path = tmp_path / f"test.{kind}"
    write_twice(path, table)
    message = rf"test\.{kind}(:1)?: got the (column|key) 'text' twice"
    with pytest.raises(DataError, match=message):
        read_rows(path)
    if kind in ("parquet", "jsonl"):
        with pytest.raises(DataError, match=message):
            list(read_documents(path))


def test_answers_by_letter_and_nested_fields(tmp_path):
    write(tmp_path, "parquet", arc)
    task = load_task(str(tmp_path), fields=ARC)
    assert [i.row["answer"] for i in task.splits["test"]] == [0, 1, 2, 0, 1, 2]
    assert [r.target for r in task.splits["test"][0].requests] == [" red", " green", " blue"]
    prompted = load_task(str(tmp_path), fields=ARC, prompt="{question} {labels[1]}")
    assert prompted.splits["test"][0].requests[0].context == "test 0? B"


def test_templates_and_answers_by_text(tmp_path):
    rows = [{"a": "red", "b": f"blue {n}", "right": f"blue {n}"} for n in range(8)]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {"question": "Not {a}, but", "choices": ["a", "b"], "answer": "right"}
    task = load_task(str(tmp_path / "all.jsonl"), fields=fields, cut_validation=0.25)
    assert (len(task.splits["validation"]), len(task.splits["test"])) == (2, 6)
    assert {item.row["answer"] for item in task.splits["test"]} == {1}
    assert "Question: Not red, but\nAnswer:" in task.splits["test"][0].requests[0].context


def test_a_saved_data_set_and_the_names_of_its_classes(tmp_path):
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    splits = {
        split: datasets.Dataset.from_dict({"text": [f"{split} {n}" for n in range(4)], "label": [0, 1] * 2}, names)
        for split in ("train", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"got no split 'validation'.*Splits there: train, test\..*cut_validation"):
        load_task(str(tmp_path / "saved"))
    task = load_task(str(tmp_path / "saved"), validation="train")
    assert task.kind == "classification"
    assert task.splits["test"][1].row == {"choices": ["bad", "good"], "answer": 1}
    cut = load_task(str(tmp_path / "saved"), cut_validation=0.5)
    assert (len(cut.splits["validation"]), len(cut.splits["test"])) == (2, 2)
    assert "of 'test' were drawn" in cut.notes[0]


def test_permission_to_cut_changes_nothing_where_both_splits_are_there(tmp_path):
    write(tmp_path, "jsonl")
    one, two = (load_task(str(tmp_path), fields=PIQA, cut_validation=share) for share in (None, 0.5))
    assert (one.splits, two.notes) == (two.splits, ())


def test_a_cut_is_seeded_and_must_leave_both_sides(tmp_path):
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, piqa("test", 10))))
    ids = [
        [i.id for i in load_task(str(tmp_path), fields=PIQA, cut_validation=0.5, seed=seed).splits["test"]]
        for seed in (0, 0, 1)
    ]
    assert ids[0] == ids[1] != ids[2]
    with pytest.raises(DataError, match=r"task\.cut_validation: got 0\.01 of 10 rows"):
        load_task(str(tmp_path), fields=PIQA, cut_validation=0.01)
    with pytest.raises(DataError, match=r"no file validation\.jsonl.*task\.cut_validation: 0\.3"):
        load_task(str(tmp_path), fields=PIQA)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "datasets:no/such-data"}, r"datasets:no/such-data: got .*needs the network once"),
        ({"fields": {"qestion": "goal"}}, r"task\.fields\.qestion: .*Did you mean 'question'"),
        ({"fields": {**PIQA, "question": "gaol"}}, r"task\.fields\.question: got 'gaol'.*Did you mean 'goal'"),
        ({"fields": {**PIQA, "question": "{gaol}"}}, r"task\.fields\.question: got '\{gaol\}'.*'\{goal\}'"),
        ({"fields": {**PIQA, "answer": "sol1.x"}}, r"task\.fields\.answer: got 'sol1\.x'"),
        ({"fields": {**PIQA, "answer": "goal"}}, r"got 'validation 0' in 'answer'"),
        ({"subset": "ARC-Easy", "fields": PIQA}, r"task\.subset: got 'ARC-Easy'"),
        ({"source": "recall", "fields": PIQA}, r"task\.fields"),
    ],
)
def test_what_cannot_be_meant(settings, message, tmp_path):
    write(tmp_path, "jsonl")
    with pytest.raises((DataError, RecipeError), match=message):
        load_task(**{"source": str(tmp_path), **settings})


def test_a_harness_task_without_the_harness_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(DeviceError, match=r"not installed.*pip install 'distill-then-replace\[lm-eval\]'"):
        load_task("lm_eval:arc_easy")


@pytest.mark.parametrize("name", ["test.parquet", "test.csv", "test.arrow"])
def test_a_damaged_table_is_named(name, tmp_path):
    write(tmp_path, "jsonl")
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / name).write_bytes(b"" if name.endswith("csv") else b"no table")
    with pytest.raises(DataError, match=rf"{name}: got (a file that cannot be read|an empty file)"):
        load_task(str(tmp_path), fields=PIQA)


def test_the_mapping_is_a_setting_of_the_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "teacher: {source: x}\ntask:\n  source: datasets:ybisk/piqa\n  subset: plain\n  cut_validation: 0.3\n"
        "  fields: {question: goal, choices: [sol1, sol2], answer: label}\n"
    )
    assert read_recipe(path).task.fields == PIQA
    assert read_recipe(None, ["task.cut_validation=0.5"], {"teacher": {"source": "x"}}).task.cut_validation == 0.5
