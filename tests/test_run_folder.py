"""The run folder: only what is ours is ever deleted, and a kill at any moment leaves one that can be used."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import pytest

from dtr.errors import OutputError
from dtr.pipeline.folder import RunFolder
from dtr.recipe import read_recipe

HOW = ({}, {"resume": True}, {"overwrite": True})


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    # Sources such as "x" are looked for where the command runs.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def recipe(*changes: str, path: Path | None = None):
    return read_recipe(path, ["teacher.source=x", *changes])


def some_run(path: Path, **options) -> RunFolder:
    """A run folder as a finished run leaves it, with little in its files."""
    folder = RunFolder(path)
    folder.open(recipe(), **options)
    folder.log({"event": "done"})
    for name in ("bank/bank.json", "bank/mixers.safetensors", "hybrid/config.json", "hybrid/model.safetensors"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(name)
    for name in ("journal.jsonl", "search.json", "report.json", "report.html"):
        (path / name).write_text(name)
    folder._log.close()
    return folder


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def accepted(path: Path, plan) -> list[str]:
    """Which ways of starting a run the folder lets through."""
    found = []
    for how in HOW:
        try:
            RunFolder(path).check(plan, **how)
            found.append("plain" if not how else next(iter(how)))
        except OutputError:
            pass
    return found


STRANGE = {
    "a project": {"thesis.tex": "years of work", "bank/notes.txt": "mine", "report.html": "mine"},
    "a recipe": {"recipe.yaml": "teacher: {source: x}  # mine"},
    "a recipe and a log": {"recipe.yaml": "mine", "events.jsonl": "mine"},
    "a marker that is none": {"dtr-run.json": "{}", "recipe.yaml": "mine"},
    "only a journal": {"journal.jsonl": "mine"},
}


@pytest.mark.parametrize("case", sorted(STRANGE))
def test_a_folder_without_our_marker_is_never_touched(case, tmp_path):
    for name, text in STRANGE[case].items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    before = snapshot(tmp_path / "out")
    for how in HOW:
        with pytest.raises(OutputError, match=r"Choose another --out") as told:
            RunFolder(tmp_path / "out").open(recipe(), **how)
        assert "with --overwrite" not in str(told.value)
    assert snapshot(tmp_path / "out") == before


def test_overwrite_takes_known_names_alone(tmp_path):
    some_run(tmp_path / "run")
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    (tmp_path / "run" / ".journal.jsonl.4711.part").write_text("half")
    (tmp_path / "run" / ".hybrid.dtr-part").mkdir()
    RunFolder(tmp_path / "run").open(recipe("seed=2"), overwrite=True)
    assert sorted(os.listdir(tmp_path / "run")) == ["dtr-run.json", "events.jsonl", "recipe.yaml", "thesis.tex"]
    # It has nothing but what a run writes at its start, and a file that is not in the way.
    assert accepted(tmp_path / "run", recipe("seed=2")) == ["resume", "overwrite"]


@pytest.mark.parametrize(
    "name", ["hybrid/notes.md", "hybrid/checkpoint-5/trainer_state.json", "bank/x", "search.json/x"]
)
def test_strange_files_where_a_run_would_delete_are_told(name, tmp_path):
    some_run(tmp_path / "run")
    (tmp_path / "run" / "search.json").unlink()
    (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / name).write_text("mine")
    before = snapshot(tmp_path / "run")
    for how in HOW:
        with pytest.raises(OutputError) as told:
            RunFolder(tmp_path / "run").open(recipe(), **how)
        assert "with --overwrite" not in str(told.value)
    assert f"'{'/'.join(name.split('/')[:2]).removesuffix('.json/x')}" in str(told.value)
    assert snapshot(tmp_path / "run") == before


INPUTS = {
    "recipe": (lambda run: recipe(path=run / "recipe.yaml"), None),
    "teacher": (lambda run: recipe(f"teacher.source={run / 'hybrid'}"), None),
    "text": (lambda run: recipe(f"text.source=[{run / 'journal.jsonl'}]"), None),
    "text of a mix": (lambda run: recipe(f"text.mix={{{run / 'journal.jsonl'}: 0.5}}"), None),
    "task": (lambda run: recipe(f"task.source={run / 'bank'}"), None),
    "data of a task": (lambda run: recipe("task.source=perplexity", f"task.path={run / 'journal.jsonl'}"), None),
    "guard": (lambda run: recipe(f"search.guards=[{{task: {{source: {run / 'bank'}}}}}]"), None),
    "bank": (lambda run: recipe(), "bank"),
    "through a link": (lambda run: recipe(f"teacher.source={run.parent / 'link' / 'hybrid'}"), None),
    "module": (lambda run: recipe("task.metric=own_metric:f"), None),
}


@pytest.mark.parametrize("case", sorted(INPUTS))
def test_a_folder_with_an_input_of_this_run_is_not_cleared(case, tmp_path, monkeypatch):
    run = tmp_path / "run"
    some_run(run)
    (tmp_path / "link").symlink_to(run)
    (run / "own_metric.py").write_text("f = None")
    monkeypatch.syspath_prepend(run)
    before = snapshot(run)
    make, bank = INPUTS[case]
    folder = RunFolder(run, bank=bank and run / bank)
    with pytest.raises(OutputError, match="which this run reads, inside the folder to be cleared"):
        folder.open(make(run), overwrite=True)
    with pytest.raises(OutputError, match="not empty") as told:
        folder.open(make(run))
    assert "--overwrite" not in str(told.value)
    assert snapshot(run) == before


def test_links_are_removed_and_not_followed(tmp_path):
    some_run(tmp_path / "run")
    (tmp_path / "elsewhere" / "bank").mkdir(parents=True)
    (tmp_path / "elsewhere" / "bank" / "bank.json").write_text("mine")
    (tmp_path / "elsewhere" / "journal.jsonl").write_text("mine")
    for name in ("hybrid-best", "realigned", "tensorboard"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere" / "bank")
    (tmp_path / "run" / "journal.jsonl").unlink()
    (tmp_path / "run" / "journal.jsonl").symlink_to(tmp_path / "elsewhere" / "journal.jsonl")
    before = snapshot(tmp_path / "elsewhere")
    RunFolder(tmp_path / "run").open(recipe(), overwrite=True)
    assert sorted(os.listdir(tmp_path / "run")) == ["dtr-run.json", "events.jsonl", "recipe.yaml"]
    assert snapshot(tmp_path / "elsewhere") == before


def test_a_recipe_that_somebody_changed_in_the_folder_is_kept(tmp_path):
    run = tmp_path / "run"
    RunFolder(run).open(recipe())
    (run / "recipe.yaml").write_text("teacher: {source: x}  # with a remark of mine")
    before = snapshot(run)
    with pytest.raises(OutputError, match="not empty"):
        RunFolder(run).open(recipe())
    with pytest.raises(OutputError, match="a recipe that has changed since the run wrote it"):
        RunFolder(run).open(recipe(), resume=True)
    assert snapshot(run) == before
    # Given to the run itself it is what is meant, and what it says is compared with the marker, not with itself.
    RunFolder(run).open(read_recipe(run / "recipe.yaml"), resume=True)
    with pytest.raises(OutputError, match="seed=0; expected seed=3"):
        RunFolder(run).open(read_recipe(run / "recipe.yaml", ["seed=3"]), resume=True)
    assert snapshot(run)["recipe.yaml"] == before["recipe.yaml"]


def test_what_was_read_must_be_the_same_on_resume(tmp_path):
    RunFolder(tmp_path / "run").open(recipe(), read={"text": "1", "tokenizer": "2"})
    with pytest.raises(OutputError, match="another text and another tokenizer than is there now"):
        RunFolder(tmp_path / "run").open(recipe(), resume=True, read={"text": "3", "tokenizer": "4", "task": "5"})
    RunFolder(tmp_path / "run").open(recipe(), resume=True, read={"text": "1", "task": "5"})
    with pytest.raises(OutputError, match="another task than is there now"):
        RunFolder(tmp_path / "run").open(recipe(), resume=True, read={"task": "6"})


def test_a_log_goes_on_without_repeating_itself(tmp_path):
    first = RunFolder(tmp_path / "run")
    first.open(recipe())
    for event in ({"event": "stage", "text": "a"}, {"event": "candidate", "score": 0.5, "replayed": False}):
        first.log(event)
    first._log.close()
    with (tmp_path / "run" / "events.jsonl").open("a") as log:
        log.write('{"time": 5, "event": "torn, with the dis')
    second = RunFolder(tmp_path / "run")
    second.log({"event": "stage", "text": "a"})
    second.open(recipe(), resume=True)
    second.log({"event": "candidate", "score": 0.5, "replayed": True})
    second.log({"event": "candidate", "score": 0.6, "replayed": False})
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    told = [{key: value for key, value in event.items() if key in ("event", "score")} for event in events]
    assert told == [
        {"event": "stage"},
        {"event": "candidate", "score": 0.5},
        {"event": "resumed"},
        {"event": "candidate", "score": 0.6},
    ]


def test_a_marker_with_a_flipped_bit_is_told(tmp_path):
    RunFolder(tmp_path / "run").open(recipe())
    marker = tmp_path / "run" / "dtr-run.json"
    original = marker.read_bytes()
    for at in range(3, 8 * len(original), 401):
        damaged = bytearray(original)
        damaged[at // 8] ^= 1 << at % 8
        marker.write_bytes(damaged)
        with pytest.raises(OutputError, match=r"dtr-run\.json"):
            RunFolder(tmp_path / "run").open(recipe(), resume=True)


def test_names_that_no_file_can_have_are_told(tmp_path):
    for name in ("n" * 300, "x/" + "n" * 300 + "/y", "é" * 200):
        with pytest.raises(OutputError, match="a name of more than 255 bytes"):
            RunFolder(tmp_path / name).check(recipe())


def kill_at(number: int, work) -> bool:
    """Do the work in a process that dies at once before its so manieth change to files; returns whether it died."""
    process = os.fork()
    if process == 0:
        left = number

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"):
                left -= 1
                if left == 0:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 9), "the work failed"
    return code == 9


@pytest.mark.parametrize("how", ["plain", "resume", "overwrite"])
def test_a_kill_at_any_moment_leaves_a_folder_that_can_be_used(how, tmp_path):
    plan = recipe("seed=1" if how == "overwrite" else "seed=0")
    options = {} if how == "plain" else {how: True}
    # Every other moment, to be quick.
    for number in range(1, 1000, 2):
        run = tmp_path / str(number)
        if how != "plain":
            some_run(run)
            (run / "thesis.tex").write_text("years of work")
        died = kill_at(number, functools.partial(RunFolder(run).open, plan, **options))
        assert how in accepted(run, plan), number
        assert how == "plain" or (run / "thesis.tex").exists()
        RunFolder(run).open(plan, **options)
        assert not [name for name in os.listdir(run) if name.endswith("part")]
        if not died:
            break
    assert number > 5
