"""The benchmarks of distillation, from a recipe to their results."""

from __future__ import annotations

import json

import pytest
from docs_pages import ROOT, load_script

from dtr.distillation import loop

KEYS = {"mean_nmse", "num_tokens", "all_linear_retention", "recall_retention", "ablation", "command", "hardware"}


@pytest.fixture(autouse=True)
def _programs(monkeypatch):
    """As when a file of that folder is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(loop, "NUM_MEASURES", loop.NUM_MEASURES)


def load_program(name):
    return load_script(ROOT / "benchmarks" / f"{name}.py")


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
    common += ["--recall-fillers", "0", "--recall-items", "4", "6", "--set", "distill.num_tokens=512"]
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
    arguments += ["--by-position", "--only-tries", "--set", "distill.num_tokens=512"]
    kinds = '["retention",{"kind":"gated_deltanet","options":{"head_copies":2},"layers":[1,2]}]'
    trials = ["seed=1 realign.num_tokens=1024", f"distill.seq_len_tokens=32 mixer.options={{}} mixer.kind={kinds}"]
    load_program("distil_quality").main([*arguments, "--try", trials[0], "--try", trials[1]])
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
        assert 0 < row["text_nmse"] < 2
        assert by_layer["only 2"] < by_layer["all_linear"]
        # In the base recipe's blocks of 64 tokens, whatever the trial's are.
        assert list(row["nmse_by_position"]) == ["0", "1-3", "4-15", "16-63"]


def test_rows_made_in_parts_are_those_made_together(place, tmp_path):
    program = load_program("distil_quality")
    common = [str(place / "recipe.yaml"), "--task", f"words={place / 'task'}", "--for-choosing"]
    common += ["--only-tries", "--set", "distill.num_tokens=512"]
    trials = ["seed=1", "distill.learning_rate=1e-3", "distill.learning_rate=2e-3"]
    common += [argument for settings in trials for argument in ("--try", settings)]

    def rows(name, *options):
        program.main([*common, "--out", str(tmp_path / name), *options])
        return json.loads((tmp_path / name).read_text())["ablation"]

    def figures(rows):
        return [{key: value for key, value in row.items() if key not in ("distill_seconds", "command")} for row in rows]

    # The text is the same in two of the rows, and the teacher's scores in all.
    together = rows("all.json")
    assert [row["settings"] for row in together] == trials
    assert together[1]["mean_nmse"] != together[2]["mean_nmse"]
    first, second = rows("1.json", "--part", "1/2"), rows("2.json", "--part", "2/2")
    assert figures(first) == figures(together[::2])
    assert figures(second) == figures(together[1::2])
    # Rows of the same settings are replaced, others stay.
    (tmp_path / "2.json").write_text(json.dumps({"mean_nmse": 0.5, "ablation": [*second, {"settings": "seed=1"}]}))
    merged = rows("2.json", "--merge", str(tmp_path / "1.json"))
    assert figures(merged) == figures([together[1], together[0], together[2]])
    assert json.loads((tmp_path / "2.json").read_text())["mean_nmse"] == 0.5
    for part in ("0/2", "3/2", "1"):
        with pytest.raises(SystemExit, match="2"):
            program.main([*common, "--part", part])
