"""Commands, snippets and messages of the docs, run as a reader would type them.

They run in a folder where `HuggingFaceTB/SmolLM2-135M-Instruct` is a pico model; only sizes are cut.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from docs_pages import FENCE, RECIPES, ROOT, commands, fences, load_script, write_rows
from tiny import byte_tokenizer, pico_model
from transformers import T5Config

from dtr.arch import read_geometry
from dtr.cli import main
from dtr.hybrid.modeling import make_hybrid
from dtr.mixers import MIXERS, mixer_from_teacher
from dtr.pipeline.ownership import Marker
from dtr.recipe import read_recipe

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WORDS = ("red", "green", "blue", "stone", "river", "tree", "cloud", "bird")
SMALL = {
    "distill.num_tokens": 512,
    "distill.seq_len_tokens": 64,
    "distill.batch_size": 4,
    "text.source": "my_text",
    "text.num_held_out_tokens": 512,
    "runtime.num_threads": 1,
}
SMALL_FLAGS = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A working folder with everything the docs name."""
    monkeypatch.chdir(tmp_path)
    pico_model().save_pretrained(HUB_NAME)
    byte_tokenizer().save_pretrained(HUB_NAME)
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=60)) for _ in range(40)]
    for folder in ("my_text", "data/text"):
        Path(folder).mkdir(parents=True)
        Path(folder, "train.txt").write_text("\n<|doc|>\n".join(documents), encoding="utf-8")
    for folder in ("my_task", "data/questions"):
        write_rows(Path(folder), question="{}: which?", choices=["red", "blue", "green"], answer=2)
    Path("recipes").mkdir()
    for recipe in RECIPES:
        Path("recipes", recipe.name).write_text(recipe.read_text(encoding="utf-8"), encoding="utf-8")
    T5Config().save_pretrained("t5")
    return tmp_path


@pytest.fixture
def dtr(capsys, monkeypatch):
    """Call the command line; gives exit code, stdout and stderr."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["dtr", *args])
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        return code, *capsys.readouterr()

    return call


def run_snippet(code: str, names: dict) -> None:
    """Run a snippet as it stands, with a smaller token budget."""
    exec(compile(code.replace("num_tokens=10_000_000", "num_tokens=512"), "snippet", "exec"), names)


def run_commands(page: Path, dtr) -> None:
    for words in commands(page):
        if words[0] != "dtr":
            continue
        sizes = SMALL_FLAGS if words[1] in ("run", "search", "distill") else []
        code, _, err = dtr(*words[1:], *sizes, *(["--progress", "quiet"] if sizes else []))
        assert code == 0, (words, err)


def test_the_tutorial_runs_as_it_stands(newcomer, dtr, capsys):
    page = ROOT / "docs" / "tutorial.md"
    make_task, use_hybrid, from_python = fences(page, "python")
    run_snippet(make_task, {})
    Path("recipe.yaml").write_text(fences(page, "yaml")[0], encoding="utf-8")
    run_commands(page, dtr)
    names = {}
    run_snippet(use_hybrid, names)
    assert names["model"].linear_layers
    run_snippet(from_python, names)
    assert len(names["result"].trace.steps) >= 1
    assert "Which city is the capital of Peru?" in capsys.readouterr().out
    assert Path("compare.html").is_file()
    listed = re.findall(r"^\| (`.*?) \|", page.read_text(encoding="utf-8").split("## 5.")[1], flags=re.MULTILINE)
    for name in re.findall(r"`([\w./-]+)`", " ".join(listed)):
        assert Path("runs/first", name).exists(), name


def test_the_readme_runs_as_it_stands(newcomer, dtr):
    make_hybrid, load_hybrid = fences(ROOT / "README.md", "python")
    with_small_text = (
        'dtr.load_text("my_text", tokenizer=teacher.tokenizer, seq_len_tokens=64, num_held_out_tokens=512)'
    )
    names = {}
    run_snippet(make_hybrid.replace('"my_text"', with_small_text), names)
    assert 0 <= names["result"].m_opt_test.value <= 1
    run_snippet(load_hybrid, names)
    assert names["model"].linear_layers == names["result"].m_opt.linear_layers
    run_commands(ROOT / "README.md", dtr)


def test_contributing_runs_as_it_stands(newcomer, capsys):
    add_mixer, add_task = fences(ROOT / "CONTRIBUTING.md", "python")
    names = {}
    try:
        run_snippet(add_mixer, names)
        check_mixer("gated_retention")
    finally:
        MIXERS._items.pop("gated_retention", None)
    run_snippet(add_task, names)
    assert 0 <= float(capsys.readouterr().out.split()[-1]) <= 1


@torch.no_grad()
def check_mixer(kind: str) -> None:
    """A hybrid with it decodes with a cache as without, behind padding too."""
    model = pico_model()
    mixer = mixer_from_teacher(kind, read_geometry(model.config), 0, model.model.layers[0].self_attn).eval()
    hybrid = make_hybrid(model, {0: mixer}, {0: {"kind": kind}})
    ids = torch.randint(1, 257, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(hybrid.generate(ids, **options), hybrid.generate(ids, **options, use_cache=False))
    alone = hybrid.generate(ids[1:, 4:], max_new_tokens=6, do_sample=False)
    assert torch.equal(hybrid.generate(ids, **options)[1, 9:], alone[0, 5:])


def test_the_example_runs(tmp_path):
    numbers = load_script(ROOT / "examples" / "01_pico_cpu.py").main(tmp_path)
    assert numbers["nmse_after"] < 0.1 * numbers["nmse_before"]
    assert numbers["num_replaced"] >= 2
    # Teacher and hybrid look back for the color.
    assert numbers["written"] == "cat is blue . owl is blue"
    assert numbers["hybrid_test"] < numbers["teacher_test"] / 0.9


def test_a_json_log_is_json_lines(newcomer, dtr):
    code, out, err = dtr("distill", "--model", HUB_NAME, "--out", "runs/json", *SMALL_FLAGS, "--progress", "json")
    assert code == 0, err
    events = [json.loads(line)["event"] for line in err.splitlines()]
    assert {"backend", "distill", "nmse"} <= set(events)
    assert "mean NMSE" in out


def message_cases() -> list[tuple[str, str]]:
    """Command and message of each entry of docs/errors.md that has both."""
    page = ROOT / "docs" / "errors.md"
    found = iter(FENCE.findall(page.read_text(encoding="utf-8")))
    return [(text.strip(), next(found)[2].strip()) for _, language, text in found if language == "bash"]


@pytest.mark.parametrize(("command", "message"), message_cases(), ids=lambda x: x[:60])
def test_messages_are_the_real_ones(command, message, newcomer, dtr):
    if "runtime.device=cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    write_rows(Path("one_choice_short"), question="{}?", choices=["a", "b", "c"], answer=3)
    write_rows(Path("no_answer"), question="{}?", choices=["a", "b", "c"])
    write_rows(Path("test_only"), question="{}?", choices=["a", "b", "c"], answer=0)
    Path("test_only/validation.jsonl").unlink()
    write_rows(Path("sums"), prompt="{} + 1", answer="2")
    Path("own_scores.py").write_text("def share(written, accepted):\n    return float('nan')\n", encoding="utf-8")
    Path("two_words.txt").write_text("two words", encoding="utf-8")
    recipe = {
        "teacher": {"source": HUB_NAME, "dtype": "float32"},
        "text": {"source": "my_text", "num_held_out_tokens": 512},
        "distill": {"num_tokens": 512, "seq_len_tokens": 64, "batch_size": 4},
        "task": {"source": "my_task"},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    Path("runs/first/bank").mkdir(parents=True)
    resolved = read_recipe("recipe.yaml")
    Path("runs/first/recipe.yaml").write_text(resolved.to_yaml(), encoding="utf-8")
    digest = hashlib.sha256(resolved.to_yaml().encode()).hexdigest()
    Marker(recipe=resolved.model_dump(mode="json"), recipe_sha256=digest, read={}).write(Path("runs/first"))
    code, _, err = dtr(*shlex.split(command)[1:])
    assert code == 2
    shown = [line for line in err.splitlines() if line.startswith("dtr: ")]
    pattern = ".*".join(re.escape(" ".join(part.split())) for part in message.split("..."))
    assert len(shown) == 1
    assert re.fullmatch(pattern.replace(r"\ .*", ".*").replace(r".*\ ", ".*"), shown[0]), shown[0]
