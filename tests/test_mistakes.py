"""What people do wrong before and during a run: one clear line each, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import resource
import shutil
import sys

import forks
import pytest

import dtr
from dtr.cli import main

SHORT = ["--progress", "quiet", "--set", "distill.num_tokens=1024"]


@pytest.fixture
def message(capsys, monkeypatch):
    """Call the command line with a mistake; gives the one line that it writes about it."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["dtr", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            main()
        err = capsys.readouterr().err
        told = [line for line in err.splitlines() if line.startswith("dtr: ")]
        assert (left.value.code, len(told), "Traceback" in err) == (2, 1, False), err
        return told[0]

    return call


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("mistakes") / "run"
    recipe = dtr.read_recipe(place / "recipe.yaml", ["distill.num_tokens=1024"])
    dtr.run(recipe, out)
    return out


RECIPES = {
    "missing": (None, "got no such file or directory; expected a readable YAML recipe. Did you mean "),
    "empty": ("", "got an empty file; expected sections"),
    "broken": ("teacher:\n  source: [a\ntask: x", "got broken YAML in line 3, column 5 (expected"),
    "a list": ("- a", "got a list; expected sections"),
    "a value for a section": ("teacher: some/model", "expected a section. Its settings are teacher.source, "),
}


@pytest.mark.parametrize("case", sorted(RECIPES))
def test_a_recipe_that_is_none(case, message, tmp_path):
    text, expected = RECIPES[case]
    (tmp_path / ("recipe.yaml" if text is not None else "my_recipe.yaml")).write_text(text or "")
    assert expected in message("run", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_values_are_suggested(place, message, tmp_path):
    def told(*args):
        return message("run", place / "recipe.yaml", "--out", tmp_path / "run", *args)

    assert told("--set", "search.strategy=exat").endswith("Did you mean 'exact'?")
    assert told("--set", "runtime.device=gpu").endswith("Write cuda for a GPU.")
    for device in ("meta", "mps", "cpu:7", "cuda:-1", "cuda:x"):
        assert f"runtime.device: got '{device}'; expected auto, cpu or cuda." in told(
            "--set", f"runtime.device={device}"
        )
    assert told("--set", "search.p_min=95%").endswith("expected a valid number.")
    assert "search.guards.0.task: got 'recall'; expected a section." in told("--set", "search.guards=[{task: recall}]")


def test_mistakes_are_told_before_a_model_is_loaded(place, message, tmp_path):
    def told(verb, *args):
        # No model has this name: to load it would fail, later and otherwise.
        return message(
            verb, place / "recipe.yaml", "--model", "./nothing/here", "--out", tmp_path / "run", *SHORT, *args
        )

    for verb in ("run", "distill"):
        assert "Did you mean 'gated_deltanet'?" in told(verb, "--mixer", "gated_deltnet")
        assert "text.source: got 'missing.txt'" in told(verb, "--set", "text.source=missing.txt")
        assert "Did you mean 'head_copies'?" in told(verb, "--set", "mixer.options.head_copy=2")
    assert "Did you mean 'recall'?" in told("run", "--task", "recalls")
    assert "search.p_min: got 95 of the teacher's score" in told("run", "--p-min", "95")
    assert "got no such folder; expected a bank" in told("search", "--bank", tmp_path / "nowhere")
    assert "Did you mean 'recall'?" in message("eval", "./nothing/here", "--task", "recalls")


def test_the_folder_above_the_one_that_is_meant(place, finished, message, tmp_path):
    recipe, out = place / "recipe.yaml", tmp_path / "run"
    assert f"Did you mean '{finished / 'bank'}'?" in message("search", recipe, "--bank", finished, "--out", out)
    hint = f"got a folder without config.json; expected a saved model. Did you mean '{finished / 'hybrid'}'?"
    assert hint in message("eval", finished, "--task", place / "task")
    assert "got a folder without config.json" in message("run", recipe, "--model", place / "task", "--out", out)
    assert "--compare" in message("report", finished, "--out", tmp_path / "page.html")


def test_names_that_are_too_long(place, message, tmp_path):
    recipe, name = place / "recipe.yaml", "x" * 300
    assert "teacher.source: got " in message("eval", name)
    assert "teacher.source: got " in message("bench", "generate", name)
    assert "file name too long" in message("run", name, "--out", tmp_path / "run")
    for told in (
        message("search", recipe, "--bank", name, "--out", tmp_path / "run"),
        message("run", recipe, "--out", tmp_path / name),
        message("report", name),
        message("export", name, "--out", tmp_path / "stock"),
    ):
        assert "; expected " in told


def test_a_type_of_weights_that_is_none(place, message):
    with pytest.raises(dtr.DtrError, match="Did you mean 'float16'"):
        dtr.load_teacher(place / "model", dtype="flot16")
    assert "teacher.dtype: got 'fp8'" in message("bench", "generate", place / "model", "--dtype", "fp8")


SAVED = {"broken": b"a: [b", "of another program": b"a: b", "empty": b"", "binary": b"\xff\xfe\x00"}


@pytest.mark.parametrize("case", sorted(SAVED))
def test_a_saved_recipe_that_cannot_be_read(case, place, finished, message, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_bytes(SAVED[case])
    told = message("run", place / "recipe.yaml", "--out", tmp_path / "run", "--resume", *SHORT)
    assert "run/recipe.yaml" in told
    assert told.endswith("Undo the change to go on, or start again with --overwrite.")


def test_a_folder_is_not_promised_what_it_cannot_have(place, finished, message, tmp_path):
    recipe = place / "recipe.yaml"
    (tmp_path / "mine.txt").write_text("precious")
    assert "--resume" not in message("run", recipe, "--out", tmp_path, *SHORT)
    both = message("run", recipe, "--out", finished, "--resume", "--overwrite", *SHORT)
    assert "got --resume and --overwrite; expected one of them." in both
    assert (finished / "report.json").exists()


def test_a_folder_that_another_process_works_in(place, message, tmp_path):
    out = tmp_path / "run"
    command = ["-m", "dtr", "distill", place / "recipe.yaml", "--out", out, "--progress", "json"]
    process = forks.start(*command, "--set", "distill.num_tokens=2000000")
    try:
        assert any('"event": "distill"' in line for line in process.stderr)
        for more in ([], ["--resume"], ["--overwrite"]):
            told = message("distill", place / "recipe.yaml", "--out", out, *SHORT, *more)
            assert "got a folder that another process is working in" in told
        assert process.is_running()
        assert {"recipe.yaml", "events.jsonl"} <= {path.name for path in out.iterdir()}
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


FULL = {
    "recipe": ("backend", 100),
    "log": ("scoring the teacher", 1000),
    "distil": ("backend", 20_000),
    "save": ("writing samples", 20_000),
}
"""After which event no file may grow beyond how many bytes, as on a full disk."""


@pytest.mark.parametrize("what", sorted(FULL))
def test_a_full_disk_stops_a_run_that_goes_on_later(what, place, tmp_path):
    changes = ["distill.num_tokens=2048"]
    recipe, out = dtr.read_recipe(place / "recipe.yaml", changes), tmp_path / "run"
    moment, num_bytes = FULL[what]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event):
        if moment in json.dumps(event):
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))

    try:
        with pytest.raises(dtr.DtrError, match=r"File too large; expected a f\w+ that can be written") as told:
            dtr.run(recipe, out, on_event=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    wheres = {"recipe": "dtr-run.json", "log": "run", "distil": "distill.safetensors", "save": "hybrid"}
    assert told.value.where.endswith(f"/{wheres[what]}")
    left = {path.name for path in out.iterdir()}
    assert not any(name.endswith(".part") for name in left)
    assert not {"hybrid", "report.json"} & left
    dtr.run(recipe, out, resume=True)
    assert json.loads((out / "report.json").read_text())["num_layers"] == 4


def test_a_cache_that_cannot_be_written(place, message, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DTR_CACHE", str(tmp_path / "file" / "cache"))
    for more in (["--model", "smollm2-demo"], ["--set", "text.source=teacher"]):
        told = message("run", place / "recipe.yaml", "--out", tmp_path / "run", *SHORT, *more)
        assert "got Not a directory; expected a folder that can be written. Name another folder for the cache" in told
        assert not (tmp_path / "run").exists()
