"""The study, its page, fine-tuned teachers and the example with labels, on a pico model."""

from __future__ import annotations

import json
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import yaml
from docs_pages import ROOT, load_script
from fake_report import fake_report

from dtr.cli import main as dtr_main

KEYS = [
    *("name", "num_layers", "num_replaced", "teacher_test", "test", "test_ci95", "test_drop", "mixer"),
    *("pass_equivalents", "seconds", "command", "hardware", "commit"),
]
WORDS = {"red": "color", "blue": "color", "cat": "animal", "dog": "animal"}


@pytest.fixture
def labels(tmp_path):
    """Texts with labels, made for a pico model with a byte tokenizer."""
    folder = tmp_path / "labels"
    folder.mkdir()
    for split, num_rows in (("train", 16), ("validation", 12), ("test", 16)):
        rows = []
        for number in range(num_rows):
            word = list(WORDS)[number % 4]
            kind = WORDS[word]
            rows.append({"text": f"{split} {number} {word}", "label": int(kind == "animal"), "label_text": kind})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def study_of(place: Path, labels: Path, folder: Path) -> Path:
    base = yaml.safe_load((place / "recipe.yaml").read_text())
    base["distill"]["num_tokens"] = 2048
    base["search"] = {"p_min": 0.5}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    teacher = {"source": base["teacher"]["source"]}
    study = {
        "recipe": str(folder / "base.yaml"),
        "teachers": {"plain": teacher, "tuned": {**teacher, "finetune": {"epochs": 1, "rate": 1e-3, "batch": 8}}},
        "tasks": {
            "choices": {"task": {"source": str(place / "task")}},
            "strict": {"task": {"source": str(place / "task")}, "search": {"p_min": 0.99}},
            "labels": {"teacher": "tuned", "task": {"source": str(labels), "prompt": "{text}:"}},
        },
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / "study.yaml"


def test_the_study_runs_and_writes_the_table_and_its_page(place, labels, tmp_path, monkeypatch, capsys):
    study, tuning = (load_script(ROOT / "benchmarks" / f"{name}.py") for name in ("study", "finetune_teacher"))
    calls, codes = [], []

    def call(arguments):
        """In this process, which has the libraries loaded."""
        calls.append(arguments)
        is_dtr = arguments[:2] == ["-m", "dtr"]
        monkeypatch.setattr(sys, "argv", ["dtr", *arguments[2:], "--progress", "quiet"] if is_dtr else arguments)
        try:
            dtr_main() if is_dtr else tuning.main()
        except SystemExit as stop:
            codes.append(stop.code)

    monkeypatch.setattr(study, "call", call)
    plan, results = study_of(place, labels, tmp_path), tmp_path / "results"
    command = ["study.py", str(plan), "--out", str(tmp_path / "out"), "--results", str(results)]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", command)
        study.main()
    # One bank for each teacher, one fine-tuning, three searches; the second time nothing is left to do.
    assert [c[2] if c[0] == "-m" else "finetune" for c in calls] == [
        *("distill", "search", "search", "finetune", "distill", "search")
    ]
    assert not any(codes)
    rows = json.loads((results / "study.json").read_text())
    assert [row["name"] for row in rows] == ["choices", "strict", "labels"]
    assert all(list(row) == KEYS for row in rows)
    for row in rows:
        assert row["test_ci95"][0] <= row["test"] <= row["test_ci95"][1]
        assert row["seconds"] > 0
    assert json.loads((results / "study" / "labels.json").read_text())["task"]["kind"] == "classification"
    script = load_script(ROOT / "docs" / "make_study.py")
    monkeypatch.setattr(script, "RESULTS", results)
    page = script.page()
    assert "| choices |" in page
    assert "Mean share of layers replaced" in page


def test_the_page_of_results_is_made_from_the_committed_ones():
    script = load_script(ROOT / "docs" / "make_study.py")
    assert script.TARGET.read_text(encoding="utf-8") == script.page(), "run: make docs"


def test_one_result_becomes_one_entry():
    study = load_script(ROOT / "benchmarks" / "study.py")
    record = fake_report()
    entry = study.result_of("arc", record)
    assert list(entry) == KEYS
    assert (entry["num_replaced"], entry["test"]) == (27, record["m_opt"]["test"]["value"])
    low, high = entry["test_ci95"]
    # Wilson's interval at 0.48 of 750.
    assert (low, high) == pytest.approx((0.4444, 0.5158), abs=1e-3)


def test_the_list_of_the_study_names_known_teachers_and_settings(tmp_path):
    from dtr.recipe import read_recipe

    study = load_script(ROOT / "benchmarks" / "study.py")
    plan = study.at_home(yaml.safe_load((ROOT / "benchmarks" / "study.yaml").read_text(encoding="utf-8")), "there")
    for name, entry in plan["tasks"].items():
        teacher = entry.get("teacher", "smollm2")
        recipe = read_recipe(study.write_recipe(plan, name, teacher, tmp_path))
        assert recipe.search.p_min == 0.96
        assert recipe.text.source == "there/text"
        assert (recipe.task.path or recipe.task.source).startswith(("recall", "there/tasks/"))
        assert ("teachers" in recipe.teacher.source) == ("finetune" in plan["teachers"][teacher])


def test_the_example_goes_from_fine_tuning_to_serving(place, labels, tmp_path, capsys):
    example = load_script(ROOT / "examples" / "03_labels.py")
    settings = [
        *("teacher.dtype=float32", "distill.num_tokens=2048", "distill.seq_len_tokens=64", "distill.batch_size=4"),
        *("text.num_held_out_tokens=512", "runtime.device=cpu", "search.strategy=exact", "search.p_min=0.5"),
    ]
    options = {"model": str(place / "model"), "settings": settings, "epochs": 8.0}
    record = example.make_hybrid(str(labels), str(place / "text.txt"), tmp_path / "out", **options)
    assert record["task"]["kind"] == "classification"
    assert "after" in capsys.readouterr().out
    again = example.make_hybrid(str(labels), str(place / "text.txt"), tmp_path / "out", **options)
    assert again["m_opt"] == record["m_opt"]
    classify = example.Classifier(tmp_path / "out" / "run" / "hybrid", str(labels))
    server = example.make_server(classify, 0)
    threading.Thread(target=server.handle_request, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with urllib.request.urlopen(urllib.request.Request(address, data=b"test 3 dog"), timeout=30) as answer:
        assert answer.read().decode().strip() in ("color", "animal")
    server.server_close()
