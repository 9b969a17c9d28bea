"""The recipe: overrides as people type them, hints for near misses, and a run folder after a false start."""

from __future__ import annotations

import json

import pytest
import yaml

from dtr.errors import OutputError, RecipeError
from dtr.pipeline.folder import RunFolder
from dtr.recipe import Recipe, read_recipe

BASE = {"teacher": {"source": "somewhere"}}


def setting(override: str) -> Recipe:
    return read_recipe(None, [override], BASE)


@pytest.mark.parametrize(
    "template", ["{question}", "Question: {question}", "Question: {question}\nAnswer:", "{a} or {b}?", "plain text"]
)
def test_a_template_is_text_and_no_mapping(template):
    assert setting(f"task.prompt={template}").task.prompt == template


def test_mappings_and_lists_can_be_set():
    assert setting("mixer.options={gate_rank: 8}").mixer.options == {"gate_rank": 8}
    assert setting("mixer.options.gate_rank=8").mixer.options == {"gate_rank": 8}
    assert setting("distill.layers=[3,12]").distill.layers == [3, 12]
    assert setting("distill.learning_rate=1e-3").distill.learning_rate == 0.001
    assert setting("task.num_test=null").task.num_test is None


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("p_min=0.9", "Did you mean 'search.p_min'?"),
        ("serach.p_min=0.9", "Did you mean 'search'?"),
        ("search.pmin=0.9", "Did you mean 'p_min'?"),
    ],
)
def test_a_wrong_key_gets_the_right_one(override, hint):
    with pytest.raises(RecipeError) as caught:
        setting(override)
    assert hint in str(caught.value)


def test_a_recipe_without_a_teacher_says_how_to_name_one():
    with pytest.raises(RecipeError, match="--model"):
        read_recipe(None)


def test_all_problems_come_at_once():
    with pytest.raises(RecipeError) as caught:
        read_recipe(None, ["search.p_min=-1", "distill.batch_size=0", "seed=x"], BASE)
    assert all(field in str(caught.value) for field in ("search.p_min", "distill.batch_size", "seed"))


def test_a_saved_recipe_reads_the_same(tmp_path):
    recipe = read_recipe(None, ["task.prompt=Q: {question}\nA:", "distill.layers=[1]", "seed=3"], BASE)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe
    assert yaml.safe_load(recipe.to_yaml())["distill"]["batch_size"] == recipe.distill.batch_size


class TestRunFolder:
    def test_a_run_that_failed_before_it_did_anything_is_not_in_the_way(self, tmp_path):
        folder = RunFolder(tmp_path / "run")
        folder.open(setting("teacher.source=a-typing-error"))
        folder.log({"event": "backend"})
        folder.open(setting("teacher.source=right"))
        assert read_recipe(tmp_path / "run" / "recipe.yaml").teacher.source == "right"
        assert (tmp_path / "run" / "events.jsonl").read_text() == ""

    def test_nothing_is_written_before_the_folder_is_opened(self, tmp_path):
        folder = RunFolder(tmp_path / "deep" / "run")
        folder.check(setting("seed=1"))
        folder.log({"event": "backend"})
        assert not (tmp_path / "deep").exists()
        folder.open(setting("seed=1"))
        folder.log({"event": "done"})
        lines = (folder.path / "events.jsonl").read_text().splitlines()
        assert [json.loads(line)["event"] for line in lines] == ["backend", "done"]
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OutputError, match=r"got a file, '.*/file', in its path"):
            RunFolder(tmp_path / "file" / "run").check(setting("seed=1"))

    def test_a_run_with_results_is(self, tmp_path):
        folder = RunFolder(tmp_path / "run")
        folder.open(setting("seed=1"))
        folder.bank.mkdir()
        with pytest.raises(OutputError, match="--overwrite"):
            folder.open(setting("seed=1"))
        folder.open(setting("seed=1"), resume=True)
        with pytest.raises(OutputError, match="seed=1"):
            folder.open(setting("seed=2"), resume=True)
        folder.open(setting("seed=2"), overwrite=True)
        assert not folder.bank.exists()
