"""`dtr bench search`, the benchmark script, and recipes with guards, budgets and certificates, on a pico model."""

from __future__ import annotations

import json
import sys

import forks
import pytest
import yaml
from docs_pages import ROOT, load_script

from dtr.cli import main

BENCHMARK = ROOT / "benchmarks" / "search_bench.py"


@pytest.fixture(scope="module")
def recipe(place):
    return yaml.safe_load((place / "recipe.yaml").read_text())


@pytest.fixture(scope="module")
def bank(place, recipe, tmp_path_factory):
    from dtr.pipeline import distill_only
    from dtr.recipe import read_recipe

    folder = tmp_path_factory.mktemp("bench") / "distilled"
    distill_only(read_recipe(None, base=recipe), folder)
    return folder / "bank"


@pytest.fixture
def dtr(capsys, monkeypatch):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["dtr", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_bench_search_prints_a_table_and_one_json_line(dtr, place, bank):
    code, out, err = dtr(
        "bench", "search", place / "recipe.yaml", "--bank", bank, "--strategies", "exact,uniform", "--p-min", "0.5"
    )
    assert code == 0, err
    record = json.loads(out.splitlines()[-1])
    assert list(record["strategies"]) == ["exact", "uniform"]
    assert record["strategies"]["exact"]["num_candidates"] >= 4
    assert all(0 < row["pass_equivalents"] < 12 for row in record["strategies"].values())
    assert {"hardware", "commit", "num_validation", "num_test"} <= record.keys()
    assert "uniform" in out.split("{")[0]


def test_bench_search_on_two_processes_finds_what_one_does(dtr, place, bank):
    arguments = [
        "bench",
        "search",
        place / "recipe.yaml",
        "--bank",
        bank,
        "--strategies",
        "exact,auto",
        "--p-min",
        "0.5",
    ]
    _, out, _ = dtr(*arguments)
    alone = json.loads(out.splitlines()[-1])
    first, second = ranks = forks.run_ranks(2, "-m", "dtr", *arguments)
    assert [rank.returncode for rank in ranks] == [0, 0], first.stderr + second.stderr
    # The first rank alone speaks.
    assert '"strategies"' not in second.stdout
    together = json.loads(first.stdout.splitlines()[-1])
    assert list(together["strategies"]) == ["exact", "auto"]
    for name, row in together["strategies"].items():
        for key in ("layers", "order", "val", "test", "at_share"):
            assert row[key] == alone["strategies"][name][key]


def test_bench_search_refuses_unknown_strategies_at_once(dtr, place, bank):
    code, _, err = dtr("bench", "search", place / "recipe.yaml", "--bank", bank, "--strategies", "exact,aut")
    assert code == 2
    assert "Did you mean 'auto'?" in err


def test_the_benchmark_script_keeps_what_it_does_not_measure(tmp_path, monkeypatch, capsys, place, recipe, bank):
    script = load_script(BENCHMARK)
    out = tmp_path / "search.json"
    common = ["search_bench.py", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*common, "--simulate", "1", "--simulated-items", "60"])
    script.main()
    task = f"choices={recipe['task']['source']}"
    model = ["--model", str(place / "model"), "--bank", str(bank)]
    wanted = ["--strategies", "auto,uniform,exact", "--confidence", "0.95", "--items", "20", "--num-subsets", "2"]
    wanted += ["--tables", str(tmp_path / "tables")]
    monkeypatch.setattr(sys, "argv", [*common, *model, "--task", task, *wanted])
    script.main()
    record = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
    assert record["certificate_simulation"]["runs"] == 1
    found = record["tasks"]["choices 20"]
    assert list(found["strategies"]) == ["auto", "auto_certified", "uniform", "exact"]
    # The rows before it are paired with exact as well.
    assert all(row["test_minus_exact"]["num_items"] == 30 for row in found["strategies"].values())
    assert found["strategies"]["auto_certified"]["certificate"]["num_items"] == 16
    head, *lines = map(json.loads, (tmp_path / "tables" / "choices_20.jsonl").read_text().splitlines())
    assert (head["num_items"], {len(line["signals"]) for line in lines}) == (20, {20})
    assert {line["kind"] for line in lines} == {"teacher", "all", "alone", "restored", "by error", "random"}
    row = found["strategies"]["auto"]
    wanted = {"num_replaced", "val", "test", "test_drop", "pass_equivalents", "seconds", "order"}
    assert wanted <= row.keys()
    assert {"command", "hardware", "commit"} <= record.keys()
    assert (tmp_path / "search_order.png").stat().st_size > 1000


def test_results_of_several_runs_become_one(tmp_path, monkeypatch, capsys):
    script = load_script(BENCHMARK)
    row = {"num_replaced": 2, "order": [1, 0]}
    for file, names, commit in (("old", ["a", "b"], "1"), ("x", ["b"], "2"), ("y", ["c"], "2")):
        tasks = {name: {"num_layers": 2, "made": file, "strategies": {"exact": row}} for name in names}
        record = {"command": f"python {file}", "commit": commit, "hardware": {"gpu": "one"}, "tasks": tasks}
        extra = {"certificate_simulation": {"runs": 5}} if file == "old" else {}
        (tmp_path / f"{file}.json").write_text(json.dumps(record | extra))
    paths = [str(tmp_path / f"{file}.json") for file in ("x", "y")]
    monkeypatch.setattr(sys, "argv", ["search_bench.py", "--out", str(tmp_path / "old.json"), "--merge", *paths])
    script.main()
    merged = json.loads((tmp_path / "old.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == merged
    assert {name: task["made"] for name, task in merged["tasks"].items()} == {"a": "old", "b": "x", "c": "y"}
    assert (merged["command"], merged["commit"]) == ("python x; python y", "2")
    assert merged["certificate_simulation"] == {"runs": 5}
    assert (tmp_path / "old_order.png").stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", ["search_bench.py", "--merge", str(tmp_path / "nothing.json")])
    with pytest.raises(SystemExit):
        script.main()
    assert "no such file" in capsys.readouterr().err


def test_a_run_with_guard_and_budget_reports_them(dtr, tmp_path, place, recipe, bank):
    changed = {**recipe, "search": {"p_min": 0.3, "max_linear_layers": 2, "strategy": "auto"}}
    changed["search"]["guards"] = [{"task": recipe["task"], "p_min": 0.3}]
    path = tmp_path / "guarded.yaml"
    path.write_text(yaml.safe_dump(changed))
    code, _, err = dtr("search", path, "--bank", bank, "--out", tmp_path / "run", "--progress", "quiet")
    assert code == 0, err
    found = json.loads((tmp_path / "run" / "report.json").read_text())["search"]
    assert found["strategy"] == "auto"
    assert len(found["steps"][-1]["linear"]) <= 2
    assert found["guards"][0]["m_opt"]["value"] >= found["guards"][0]["floor"] - 1e-9
    assert "Guard tasks" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"guards": [{"task": {"source": "nowhere"}}]}, "nowhere"),
        ({"p_min_confidence": 95}, "less than 1"),
        ({"strategy": "greedy"}, "search.strategy: got 'greedy'; expected 'auto', 'exact'"),
        ({"max_linear_layers": 0}, "search.max_linear_layers"),
        # What only the teacher's own score can tell is told before anything is distilled, too.
        ({"p_min": 0.99, "p_min_kind": "absolute"}, "search.p_min: got an acc_norm of 0.99, which the teacher itself"),
        ({"guards": [{"task": "the recipe's", "p_min": 0.99, "p_min_kind": "absolute"}]}, "which the teacher itself"),
    ],
)
def test_bad_settings_are_refused_before_any_work(dtr, tmp_path, recipe, search, words):
    path = tmp_path / "bad.yaml"
    for guard in search.get("guards", []):
        guard["task"] = recipe["task"] if guard["task"] == "the recipe's" else guard["task"]
    path.write_text(yaml.safe_dump({**recipe, "search": {**recipe["search"], **search}}))
    code, _, err = dtr("run", path, "--out", tmp_path / "run")
    assert code == 2
    assert words in " ".join(err.split())
    assert not (tmp_path / "run").exists()
