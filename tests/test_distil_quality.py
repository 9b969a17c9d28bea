"""The benchmarks of distillation, from a recipe to their results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

KEYS = {"mean_nmse", "num_tokens", "all_linear_retention", "recall_retention", "ablation", "command", "hardware"}


def load_program(name):
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sweep_prints_a_line_per_trial(place, capsys, monkeypatch):
    trials = ["--try", "mixer.options.head_copies=2", "--try", "seed=1", "--set", "distill.num_tokens=1024"]
    monkeypatch.setattr("sys.argv", ["distill_sweep.py", str(place / "recipe.yaml"), *trials])
    load_program("distill_sweep").main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("trial") for line in lines] == [None, "mixer.options.head_copies=2", "seed=1"]
    assert lines[1]["mean_nmse"] != lines[2]["mean_nmse"]


def test_the_result_file_holds_the_recipe_and_its_rivals(place, tmp_path):
    program = load_program("distil_quality")
    out = tmp_path / "quality.json"
    common = [str(place / "recipe.yaml"), "--task", f"words={place / 'task'}", "--out", str(out)]
    common += ["--recall-fillers", "0", "--recall-items", "4", "6", "--set", "distill.num_tokens=2048"]
    common += ["--set", "search.strategy=uniform"]
    program.main([*common, "--try", "mixer.options.window=8"])
    result = json.loads(out.read_text())
    assert result.keys() > KEYS | {"commit", "seeds"}
    assert result["is_pure_linear"]
    assert set(result["all_linear_retention"]) == {"words", "mean"}
    scores = result["all_linear_scores"]["words"]
    assert result["all_linear_retention"]["mean"] == scores["hybrid"] / scores["teacher"]
    assert set(result["recall_retention"]) == {"0.5", "0.75"}
    (row,) = result["ablation"]
    assert (row["settings"], row["is_pure_linear"]) == ("mixer.options.window=8", False)
    assert row["mean_nmse"] != result["mean_nmse"]
    # A row of the same settings is replaced, the main entry is left alone.
    rows = ["--try", "mixer.options.window=8", "--try", "mixer.options.window=-1", "--try", "seed=1"]
    with pytest.raises(SystemExit, match=r"1 rows failed: mixer\.options\.window=-1"):
        program.main([*common, "--only-tries", *rows])
    again = json.loads(out.read_text())
    assert [row["settings"] for row in again["ablation"]] == ["mixer.options.window=8", "seed=1"]
    assert again["ablation"][1]["seeds"] == [1]
    assert again["mean_nmse"] == result["mean_nmse"]


def test_where_hybrids_part_from_the_teacher(place, tmp_path):
    out = tmp_path / "quality.json"
    arguments = [str(place / "recipe.yaml"), "--task", f"words={place / 'task'}", "--out", str(out), "--for-choosing"]
    arguments += ["--by-position", "--only-tries", "--set", "distill.num_tokens=2048"]
    load_program("distil_quality").main(
        [*arguments, "--try", "seed=1 realign.num_tokens=1024", "--try", "distill.seq_len_tokens=32"]
    )
    rows = json.loads(out.read_text())["ablation"]
    assert rows[0]["realigned"]["all_linear_kl"] != rows[0]["all_linear_kl"]
    assert "realigned" not in rows[1]
    for row in [*rows, rows[0]["realigned"]]:
        assert set(row["validation_all_linear_retention"]) == {"words", "mean"}
        assert not {"all_linear_retention", "recall_retention"} & row.keys(), "test is for the final report"
        assert set(row["all_linear_kl"]) == {"held_out", "words"}
        by_layer = row["kl_by_layer"]
        assert list(by_layer) == [
            "all_linear",
            *(f"{way} {layer}" for way in ("only", "without") for layer in range(4)),
        ]
        assert by_layer["only 2"] < by_layer["all_linear"]
        # In the base recipe's blocks of 64 tokens, whatever the trial's are.
        assert list(row["nmse_by_position"]) == ["0", "1-3", "4-15", "16-63"]
