"""What people read is true: recipes parse, commands exist, links resolve, made pages are up to date."""

from __future__ import annotations

import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import typer
from docs_pages import FENCE, PAGES, RECIPES, ROOT, commands, fences, load_script, write_rows

from dtr.cli import app
from dtr.mixers import MIXERS
from dtr.recipe import read_recipe
from dtr.tasks import load_task


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_parse(path):
    recipe = read_recipe(path)
    assert recipe.mixer.kind in MIXERS


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("multiple_choice", {"question": "{}?", "choices": ["a", "b", "c"], "answer": 0}),
        ("classification", {"text": "{}", "label": 0, "label_text": "good"}),
        ("generation", {"prompt": "{}", "answer": "so #### 7"}),
        ("perplexity", {"text": "{} red green"}),
    ],
)
def test_the_task_of_a_recipe_loads(name, row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = read_recipe(ROOT / "recipes" / f"{name}.yaml").task.model_dump()
    folder = Path(settings["path"] or settings["source"])
    write_rows(folder, num_rows=100, **row)
    if name == "classification":
        for split in ("validation", "test"):
            with (folder / f"{split}.jsonl").open("a") as file:
                file.write("\n" + json.dumps({"text": f"{split} x", "label": 1, "label_text": "bad"}))
    task = load_task(settings.pop("source"), **settings)
    assert task.kind == name
    assert len(task.splits["validation"]) >= 100


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_recipes_on_pages_parse(page, tmp_path):
    for number, block in enumerate(fences(page, "yaml")):
        (tmp_path / f"{number}.yaml").write_text(block, encoding="utf-8")
        read_recipe(tmp_path / f"{number}.yaml")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_on_pages_are_known(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for words in commands(page):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        elif words[0] != "dtr":
            assert words in (["source", ".venv/bin/activate"], ["pre-commit", "install"]), words
        elif page.name != "errors.md":
            check_usage(words)


def check_usage(words: list[str]) -> None:
    """Every flag is one of the verb's, and every --set names a setting."""
    verb = typer.main.get_command(app).commands[words[1]]
    if hasattr(verb, "commands"):
        verb, words = verb.commands[words[2]], words[1:]
    flags = {name: option for option in verb.params for name in option.opts}
    unknown = [word for word in words[2:] if word.startswith("--") and word not in flags]
    assert not unknown, words
    settings = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    read_recipe(None, settings, {"teacher": {"source": "x"}})
    for word in words[2:]:
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file(), words


def test_the_reference_is_made_from_this_source():
    script = load_script(ROOT / "docs" / "make_reference.py")
    assert script.TARGET.read_text(encoding="utf-8") == script.reference(), "run: make docs"


@pytest.mark.parametrize("maker", ["make_models", "make_long_context"])
def test_a_page_of_results_is_made_from_the_committed_record(maker):
    script = load_script(ROOT / "docs" / f"{maker}.py")
    assert script.TARGET.read_text(encoding="utf-8") == script.page(), "run: make docs"


def test_measured_figures_reach_pages_from_their_records_alone():
    """Blocks of a page are those of today's records, and no figure of speed, share or error stands outside."""
    script = load_script(ROOT / "docs" / "make_results.py")
    figure = re.compile(r"\d(?:\.\d+)? ?(?:times|x\b|%|ms\b|seconds|minutes|[GM]i?B\b|[kM] tokens a second)|\b0\.\d{3}")
    for page in (*script.PAGES, ROOT / "docs" / "recipes.md"):
        text = page.read_text(encoding="utf-8")
        assert text == script.with_blocks(text), f"{page.name}: run make docs"
        prose = re.sub(r"`[^`]*`", "", FENCE.sub("", script.without_blocks(text)))
        assert not figure.findall(prose), page.name
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_a_changed_record_changes_its_page(tmp_path, monkeypatch):
    script = load_script(ROOT / "docs" / "make_results.py")
    record = json.loads((script.RESULTS / "distil_quality.json").read_text())
    record["all_linear_scores"]["piqa"]["hybrid"] = 0.5
    (tmp_path / "distil_quality.json").write_text(json.dumps(record))
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    page = "before\n<!-- quality: made by docs/make_results.py -->\nold\n<!-- end of quality -->\nafter"
    made = script.with_blocks(page)
    assert "| PIQA | 0.639 | 0.500 | 78.2% | 0.0% |" in made
    assert "old" not in made
    assert script.without_blocks(made).split() == ["before", "after"]


def test_the_page_of_measurements_is_made_from_the_committed_ones():
    script = load_script(ROOT / "docs" / "make_measurements.py")
    page = script.page()
    assert script.TARGET.read_text(encoding="utf-8") == page, "run: make docs"
    tables = re.findall(r"(?m)^\|.*\n\| --- .*\n(?:\|.*\n)+", page)
    assert len(tables) == 7
    for lines in map(str.splitlines, tables):
        assert len({line.count(" | ") for line in lines}) == 1, lines[0]
    recipe = json.loads(script.QUALITY.read_text(encoding="utf-8"))
    assert f"| the recipe | 10.7M | {recipe['mean_nmse']:.4f} |" in page
    (of_window,) = (lines for lines in tables if "| `window=64` | 10.7M" in lines and "kept | recall" in lines)
    assert "the recipe" not in of_window, "mixers with a window are reported apart"
    (at_3m,) = (row for row in recipe["ablation"] if row["settings"] == "distill.num_tokens=3000000")
    mixer = "gated_deltanet head_copies=2 quadratic=true"
    assert f"| `{mixer}` | {at_3m['mean_nmse']:.4f} | 1.00 |" in page, "what layers cost is beside what they err"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_resolve(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\[[^\]]*\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_pages_name_exist(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    roots = (ROOT, ROOT / "src" / "dtr", ROOT / "docs")
    for name in re.findall(r"`([\w./-]+)`", text):
        is_ours = re.match(r"(src|docs|tests|recipes|examples|benchmarks|dev|\.ci)/", name) or name.endswith(".py")
        if is_ours:
            found = any((root / name).exists() for root in roots) or list((ROOT / "src").rglob(name.rsplit("/", 1)[-1]))
            assert found, f"{page.name} names {name}"


def test_pages_name_no_path_of_a_single_machine():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"/home/|/root/|/tmp/", text), page.name


@pytest.mark.slow
def test_wheel_and_sdist_install_and_run(tmp_path):
    done = subprocess.run(["make", "wheel", f"WHEEL_DIR={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [wheel], [_] = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    # Built at first use, so that a run without them is slow and says why.
    assert {"dtr/ops/cpu/gated_delta_amx.cpp", "dtr/ops/cpu/amx_matrices.h"} <= set(zipfile.ZipFile(wheel).namelist())
