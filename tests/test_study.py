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
    base["distill"]["num_tokens"] = 1024
    base["search"] = {"p_min": 0.5, "p_min_confidence": None}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    teacher = {"source": base["teacher"]["source"]}
    study = {
        "recipe": str(folder / "base.yaml"),
        "teachers": {"plain": teacher, "tuned": {"base": "plain", "finetune": {"epochs": 1, "rate": 1e-3, "batch": 8}}},
        "tasks": {
            "choices": {"task": {"source": str(place / "task")}, "note": "Only an example."},
            "strict": {"task": {"source": str(place / "task")}, "search": {"p_min": 0.99}},
            "broken": {"task": {"source": str(place / "nothing")}},
            "labels": {"teacher": "tuned", "task": {"source": str(labels), "prompt": "{text}:"}},
        },
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / "study.yaml"


@pytest.fixture
def study(monkeypatch):
    """The program, with its neighbour on the path as when it is started."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load_script(ROOT / "benchmarks" / "study.py")


def call(study, monkeypatch, *arguments) -> str | int | None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/study.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        study.main()
    return stop.value.code


def test_the_study_runs_and_writes_the_table_and_its_page(study, place, labels, tmp_path, monkeypatch, capsys):
    distilled, tuned = [], []
    distill_only, finetune = study.distill_only, study.finetune
    monkeypatch.setattr(study, "distill_only", lambda *a, **k: distilled.append(a[1].name) or distill_only(*a, **k))
    monkeypatch.setattr(study, "finetune", lambda *a, **k: tuned.append(a[1].name) or finetune(*a, **k))
    plan, results = study_of(place, labels, tmp_path), tmp_path / "results"
    arguments = [plan, "--out", tmp_path / "out", "--results", results]
    # The third task's data is not there: it fails, the others do not, and the table has them.
    assert call(study, monkeypatch, *arguments) == "1 of 4 tasks failed"
    assert "broken FAILED:" in capsys.readouterr().err
    rows = json.loads((results / "study.json").read_text())
    assert [row["name"] for row in rows] == ["choices", "strict", "labels"]
    assert call(study, monkeypatch, *arguments, "--only", "strict", "--only", "labels") == 0
    # One bank for each teacher, one fine-tuning; the second time nothing is left to do.
    assert (distilled, tuned) == (["plain", "tuned"], ["tuned"])
    assert all(list(row) == KEYS for row in rows)
    for row in rows:
        assert row["test_ci95"][0] <= row["test"] <= row["test_ci95"][1]
        assert row["seconds"] > 0
        assert row["command"].startswith("python benchmarks/study.py ")
    assert json.loads((results / "study" / "labels.json").read_text())["task"]["kind"] == "classification"
    script = load_script(ROOT / "docs" / "make_study.py")
    monkeypatch.setattr(script, "RESULTS", results)
    monkeypatch.setattr(script, "STUDY", plan)
    monkeypatch.setattr(script, "AIM_SHARE", 1.1)
    page = script.page()
    monkeypatch.setattr(script, "PICTURE", results / "study.png")
    assert script.draw().read_bytes().startswith(b"\x89PNG")
    assert "Not measured: `broken`." in page
    assert "| choices |" in page
    assert "Mean share of layers replaced" in page
    assert "- `choices`: Only an example." in page
    assert "- `strict`: " in page.partition("## Where the aim was missed")[2]


@pytest.mark.slow
def test_banks_and_models_that_are_there_in_a_process_apart(study, place, labels, tmp_path, monkeypatch, capsys):
    plan, results = study_of(place, labels, tmp_path), tmp_path / "results"
    arguments = [plan, "--results", results, "--only", "choices"]
    assert call(study, monkeypatch, *arguments, "--out", tmp_path / "one") == 0
    bank = tmp_path / "one" / "banks" / "plain"
    given = ["--bank", f"plain={bank}", "--model", f"plain={place / 'model'}", "--jobs", 2]
    assert call(study, monkeypatch, *arguments, *given, "--out", tmp_path / "two") == 0
    assert not (tmp_path / "two" / "banks").exists()
    assert "choices: " in (tmp_path / "two" / "logs" / "choices.log").read_text()
    assert call(study, monkeypatch, plan, "--bank", "nobody=there") == 2
    assert "nobody: write TEACHER=VALUE; teachers are plain, tuned" in capsys.readouterr().err


def test_a_fine_tuned_teacher_outlives_a_validation_that_fails(study, place, labels, tmp_path, monkeypatch):
    def fails(*given, **options):
        raise RuntimeError("no validation")

    plan = study_of(place, labels, tmp_path)
    arguments = ["study.py", plan, "--out", tmp_path / "out", "--step", "tune", "--teacher", "tuned"]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    with monkeypatch.context() as patch:
        patch.setattr("finetune_teacher.evaluate", fails)
        with pytest.raises(RuntimeError, match="no validation"):
            study.main()
    weights = tmp_path / "out" / "teachers" / "tuned" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    # The command once more goes on from there.
    study.main()
    assert weights.stat().st_mtime_ns == written


@pytest.mark.slow
def test_teachers_and_tasks_in_processes_apart(study, place, labels, tmp_path, monkeypatch, capfd):
    """`pytest -m slow tests/test_study.py -k processes`: fine-tuned, distilled by two processes, then searched."""
    plan, results = study_of(place, labels, tmp_path), tmp_path / "results"
    changed = yaml.safe_load(plan.read_text())
    changed["teachers"]["tuned"] |= {"gpus": 2, "text": {"mix": {"task": 0.3}}}
    plan.write_text(yaml.safe_dump(changed, sort_keys=False))
    arguments = [plan, "--results", results, "--out", tmp_path / "out", "--jobs", 3]
    assert call(study, monkeypatch, *arguments) == "1 of 4 tasks failed"
    assert [row["name"] for row in json.loads((results / "study.json").read_text())] == ["choices", "strict", "labels"]
    assert "broken FAILED" in capfd.readouterr().err
    log = (tmp_path / "out" / "logs" / "distill-tuned.log").read_text()
    # Told once, by the first of two processes.
    assert log.count("reading and tokenizing task") == 1
    assert log.count("tuned: mean NMSE") == 1


def test_the_jobs_of_the_study(study, tmp_path, monkeypatch):
    plan = yaml.safe_load((ROOT / "benchmarks" / "study.yaml").read_text(encoding="utf-8"))
    there = tmp_path / "bank"
    there.mkdir()
    (there / "bank.json").write_text("{}")
    whole = study.Study(plan=plan, out=tmp_path, results=tmp_path, settings=[], banks={"smollm2": there})
    monkeypatch.setattr(sys, "argv", ["study.py", "study.yaml", "--jobs", "8", "--only=piqa", "--out", "there"])
    jobs = {job.name: job for job in study.jobs_of(whole, ["boolq", "ag_news", "piqa_qwen2", "arc_easy_qwen2"])}
    assert {name: job.needs for name, job in jobs.items()} == {
        "unpack-smollm2": (),
        "tune-ag_news": ("unpack-smollm2",),
        "distill-ag_news": ("tune-ag_news",),
        "unpack-qwen2_coder": (),
        "distill-qwen2_coder": ("unpack-qwen2_coder",),
        "boolq": ("unpack-smollm2",),
        "ag_news": ("distill-ag_news",),
        "piqa_qwen2": ("distill-qwen2_coder",),
        "arc_easy_qwen2": ("distill-qwen2_coder",),
    }
    assert [job.num_gpus for job in jobs.values()] == [1, 1, 1, 1, 2, 1, 1, 1, 1]
    assert jobs["tune-ag_news"].arguments == ["study.yaml", "--out", "there", "--step=tune", "--teacher=ag_news"]
    assert jobs["boolq"].arguments == ["study.yaml", "--out", "there", "--only=boolq"]
    # What is there is not made again.
    folder = tmp_path / "teachers" / "ag_news"
    folder.mkdir(parents=True)
    (folder / "tokenizer_config.json").write_text("{}")
    assert [job.name for job in study.jobs_of(whole, ["ag_news"])] == ["distill-ag_news", "ag_news"]


def test_a_head_is_fine_tuned_too(place, labels, tmp_path):
    from dtr.recipe import read_recipe

    tuning = load_script(ROOT / "benchmarks" / "finetune_teacher.py")
    settings = [f"task.source={labels}", "task.kind=classification", "task.options={head: true}"]
    recipe = read_recipe(place / "recipe.yaml", settings)
    done = tuning.finetune(recipe, tmp_path / "tuned", epochs=8, learning_rate=3e-3, batch_size=8)
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["id2label"] == {"0": "color", "1": "animal"}
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert done["validation"]["value"] > 0.8


def test_the_page_of_results_is_made_from_the_committed_ones():
    script = load_script(ROOT / "docs" / "make_study.py")
    assert script.TARGET.read_text(encoding="utf-8") == script.page(), "run: make docs"


def test_one_result_becomes_one_entry(study):
    record = fake_report()
    entry = study.result_of("arc", record)
    assert list(entry) == KEYS
    assert (entry["num_replaced"], entry["test"]) == (27, record["m_opt"]["test"]["value"])
    low, high = entry["test_ci95"]
    # Wilson's interval at 0.48 of 750.
    assert (low, high) == pytest.approx((0.4444, 0.5158), abs=1e-3)


def test_the_list_of_the_study_names_known_teachers_and_settings(study, tmp_path):
    from dtr.recipe import read_recipe

    plan = study.at_home(yaml.safe_load((ROOT / "benchmarks" / "study.yaml").read_text(encoding="utf-8")), "there")
    whole = study.Study(plan=plan, out=tmp_path, results=tmp_path, settings=[], banks={})
    for name in plan["tasks"]:
        teacher = whole.teacher_of(name)
        recipe = read_recipe(study.write_recipe(whole, name, teacher))
        assert recipe.search.p_min == 0.95
        assert recipe.text.source == "there/text"
        assert (recipe.task.path or recipe.task.source).startswith(("recall", "needle", "there/tasks/"))
        # Fine-tuned, or unpacked once for all of its tasks.
        assert recipe.teacher.source == str(tmp_path / "teachers" / teacher)
        assert plan["teachers"][teacher]["title"]
        if study_mix := read_recipe(study.write_recipe(whole, None, teacher)).text.mix:
            assert study_mix == {"task": 0.3}
            assert "finetune" in plan["teachers"][teacher]


@pytest.mark.parametrize("head", [False, True], ids=["label texts", "head"])
def test_the_example_goes_from_fine_tuning_to_serving(place, labels, tmp_path, capsys, head):
    example = load_script(ROOT / "examples" / "03_labels.py")
    settings = [
        *("teacher.dtype=float32", "distill.num_tokens=2048", "distill.seq_len_tokens=64", "distill.batch_size=4"),
        *("text.num_held_out_tokens=512", "runtime.device=cpu", "search.strategy=exact", "search.p_min=0.5"),
    ]
    options = {"model": str(place / "model"), "settings": settings, "epochs": 8.0, "head": head}
    record = example.make_hybrid(str(labels), str(place / "text.txt"), tmp_path / "out", **options)
    assert record["task"]["kind"] == "classification"
    assert "after" in capsys.readouterr().out
    again = example.make_hybrid(str(labels), str(place / "text.txt"), tmp_path / "out", **options)
    assert again["m_opt"] == record["m_opt"]
    hybrid = tmp_path / "out" / "run" / "hybrid"
    classify = example.HeadClassifier(hybrid) if head else example.LabelRanker(hybrid, str(labels))
    server = example.make_server(classify, 0)
    threading.Thread(target=server.handle_request, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with urllib.request.urlopen(urllib.request.Request(address, data=b"test 3 dog"), timeout=30) as answer:
        assert answer.read().decode().strip() in ("color", "animal")
    server.server_close()
