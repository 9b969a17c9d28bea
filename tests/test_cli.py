"""The whole path on a pico model, through the real command line, and what bad input gets."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import forks
import pytest
import torch
from conftest import heed_signals
from tiny import byte_tokenizer, pico_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtr.cli import main


@pytest.fixture
def dtr(capsys, monkeypatch):
    """Call the command line; gives exit code, stdout and stderr."""

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


@pytest.fixture(scope="session")
def finished(place):
    """One finished run, shared by the tests that only read it."""
    done = forks.run("-m", "dtr", "run", place / "recipe.yaml", "--out", place / "run")
    assert done.returncode == 0, done.stderr
    return place / "run", done.stdout


def test_a_run_leaves_a_folder_that_explains_itself(finished):
    folder, out = finished
    expected = {"recipe.yaml", "events.jsonl", "bank", "journal.jsonl", "search.json", "hybrid", "hybrid-best"}
    expected |= {"report.json", "report.html", "costs.json", "dtr-run.json"}
    assert expected == {p.name for p in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert report["num_layers"] == 4
    assert report["search"]["candidate_evaluations"] == 10
    assert len(report["search"]["steps"]) == 4
    assert [step["index"] for step in report["search"]["steps"]] == [1, 2, 3, 4]
    assert all("test" in step for step in report["search"]["steps"])
    assert report["distill"]["mean_nmse"] < 1
    assert all(entry["after"] < entry["before"] for entry in report["distill"]["nmse"])
    assert report["teacher"]["test"]["num_items"] == 30
    assert report["m_opt"]["num_replaced"] == len(report["m_opt"]["layers"])
    assert 0 < report["search"]["pass_equivalents"] < 11
    for key in ("command", "hardware", "versions", "seconds", "peak_rss_bytes", "commit"):
        assert report[key], key
    assert str((folder / "report.html").resolve()) in out
    assert "The hybrid writes:" in out
    events = [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events[:4] == ["stage", "stage", "self_check", "backend"]
    assert events[-1] == "done"
    assert {"distill", "nmse", "teacher", "candidate", "step", "stop"} <= set(events)


@torch.no_grad()
def test_the_saved_hybrid_scores_what_the_report_says(finished, place, dtr):
    folder, _ = finished
    report = json.loads((folder / "report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "hybrid")
    assert model.linear_layers == sorted(report["m_opt"]["layers"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "hybrid")
    assert model.generate(**tokenizer("red green", return_tensors="pt"), max_new_tokens=3).shape[1] == 12
    for name, expected in (("hybrid", report["m_opt"]["test"]), ("hybrid-best", report["m_best"]["test"])):
        code, out, err = dtr("eval", folder / name, "--task", place / "task", "--set", "teacher.dtype=float32")
        assert code == 0, err
        score = json.loads(out.strip().splitlines()[-1])
        assert (score["value"], score["num_items"]) == (expected["value"], expected["num_items"])
        assert score["log_likelihood"] == pytest.approx(expected["log_likelihood"], abs=1e-5)


def test_the_same_recipe_gives_the_same_result(finished, place, dtr, tmp_path):
    folder, _ = finished
    code, _, err = dtr("run", place / "recipe.yaml", "--out", tmp_path / "again", "--progress", "quiet")
    assert code == 0, err
    first, second = (json.loads((f / "report.json").read_text()) for f in (folder, tmp_path / "again"))
    for key in ("m_opt", "m_best", "teacher"):
        assert first[key] == second[key]
    assert first["distill"]["nmse"] == second["distill"]["nmse"]
    assert first["search"]["steps"] == second["search"]["steps"]


def test_phases_apart_equal_the_run(finished, place, dtr, tmp_path):
    folder, _ = finished
    code, out, err = dtr("distill", place / "recipe.yaml", "--out", tmp_path / "half", "--progress", "quiet")
    assert code == 0, err
    assert "4 mixers" in out
    bank = tmp_path / "half" / "bank"
    code, _, err = dtr(
        "search", place / "recipe.yaml", "--bank", bank, "--out", tmp_path / "search", "--progress", "json"
    )
    assert code == 0, err
    assert '"event": "candidate"' in err
    first, second = (json.loads((f / "report.json").read_text()) for f in (folder, tmp_path / "search"))
    assert first["m_opt"] == second["m_opt"]


def test_ctrl_c_reaches_programs_of_a_suite_that_runs_in_the_background():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        heed_signals()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        # A `sh -c` child keeps an ignored signal ignored: this one must not.
        killed = subprocess.run(["sh", "-c", "kill -INT $$; exit 0"])
        assert killed.returncode == -signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("moment", ["distill", "candidate"])
def test_ctrl_c_and_kill_lose_nothing(finished, place, dtr, tmp_path, moment):
    folder, _ = finished
    out = tmp_path / "run"
    process = forks.start("-m", "dtr", "run", place / "recipe.yaml", "--out", out, "--progress", "json")
    for line in process.stderr:
        if f'"event": "{moment}"' in line:
            break
    if moment == "distill":
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait() == 130
        assert "--resume" in rest
        assert "Traceback" not in rest
    else:
        process.kill()
        process.wait()
        process.stderr.close()
    assert not (out / "report.json").exists()
    code, _, err = dtr("run", place / "recipe.yaml", "--out", out, "--resume", "--progress", "quiet")
    assert code == 0, err
    first, second = (json.loads((f / "report.json").read_text()) for f in (folder, out))
    assert first["m_opt"] == second["m_opt"]
    assert first["search"]["steps"] == second["search"]["steps"]


def test_report_can_be_drawn_again_and_compared(finished, dtr, tmp_path):
    folder, _ = finished
    code, out, _ = dtr("report", folder)
    assert code == 0
    assert "report.html" in out
    code, out, _ = dtr("report", "--compare", folder, folder, "--out", tmp_path / "both.html")
    assert code == 0
    assert (tmp_path / "both.html").read_text().startswith("<!")


def test_doctor_says_what_there_is(dtr):
    code, out, _ = dtr("doctor", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["backends"]["cpu"]["name"] in ("amx", "torch")
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0] or facts["versions"]["torch"]
    code, out, _ = dtr("doctor")
    assert "mixers on cpu" in out


def test_help_is_quick():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "dtr", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in ("run", "demo", "distill", "search", "eval", "report", "doctor"))
    # About 0.4 s on an idle machine; torch alone would take several.
    assert time.monotonic() - began < 3


BAD = {
    "unknown key": (["--set", "distill.learnin_rate=1"], "Did you mean 'learning_rate'"),
    "wrong type": (["--set", "distill.num_tokens=many"], "distill.num_tokens"),
    "p_min above the teacher": (["--set", "search.p_min=1.5"], "p_min"),
    "absolute p_min above the teacher": (
        ["--set", "search.p_min=0.999", "--set", "search.p_min_kind=absolute"],
        "p_min",
    ),
    "no such model": (["--model", "nothing/here"], "teacher.source"),
    "a mistyped packaged model": (["--model", "smollm2-dem"], "'smollm2-dem'; expected a model. Did you mean"),
    "a mistyped path": (["--model", "./nothing/here"], "FileNotFoundError: no such file or folder"),
    "no GPU": (["--set", "runtime.device=cuda"], "runtime.device=cpu"),
    "unknown device": (["--set", "runtime.device=cdua"], "cuda"),
    "unknown mixer": (["--set", "mixer.kind=gated_deltanett"], "Did you mean 'gated_deltanet'"),
    "unknown mixer option": (["--set", "mixer.options.windw=3"], "'window'"),
    "mixer option of a wrong type": (["--set", "mixer.options.window=wide"], "a whole number"),
    "layers out of range": (["--set", "distill.layers=[7]"], "distill.layers"),
    "no such text": (["--set", "text.source=missing.txt"], "missing.txt"),
    "no such task": (["--task", "missing"], "missing"),
    "same rows twice": (["--set", "task.test=validation"], "validation"),
    "malformed --set": (["--set", "nonsense"], "section.key=value"),
    "unknown log": (["--progress", "loud"], "rich, json or quiet"),
    "backend that cannot run": (["--set", "runtime.backend=fla"], "fla needs cuda"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_gets_one_clear_message(case, place, dtr, tmp_path):
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments, expected = BAD[case]
    quick = ["--set", "distill.num_tokens=512"] if case != "wrong type" else []
    code, _, err = dtr(
        "run", place / "recipe.yaml", "--out", tmp_path / "run", "--progress", "quiet", *quick, *arguments
    )
    assert code == 2, err
    message = [line for line in err.splitlines() if line.startswith("dtr: ")]
    assert len(message) == 1
    assert expected in message[0]
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


MISFITS = {
    "qwen2": ("qwen35_gated_deltanet", "attention has biases", "gated_deltanet, gated_linear_attention"),
    "qwen3": ("mamba2", "norms on queries and keys", "qwen35_gated_deltanet"),
}


@pytest.mark.parametrize("family", sorted(MISFITS))
def test_a_mixer_that_cannot_stand_in_is_refused_before_anything_is_read(family, place, dtr, tmp_path):
    kind, why, alternative = MISFITS[family]
    pico_model(family).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.parquet").write_text("no table")
    text = f"text.source={tmp_path / 'text.parquet'}"
    options = ["--model", tmp_path / "model", "--set", text, "--out", tmp_path / "run"]
    for verb in ("run", "distill"):
        code, _, err = dtr(verb, place / "recipe.yaml", *options, "--mixer", f"sliding_window,{kind}")
        assert (code, err.count("dtr: ")) == (2, 1)
        assert all(part in err for part in (f"mixer.kind: got {kind}", why, alternative))
        assert not (tmp_path / "run").exists()


def test_a_run_that_stops_at_its_teacher_leaves_what_was_there(place, finished, dtr, tmp_path):
    out, wrong = tmp_path / "run", ["--model", "./nothing/here", "--progress", "quiet"]
    for verb in ("run", "distill"):
        assert dtr(verb, place / "recipe.yaml", "--out", out, *wrong)[0] == 2
        assert not out.exists()
    shutil.copytree(finished[0], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert dtr("run", place / "recipe.yaml", "--out", out, "--overwrite", *wrong)[0] == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    short = ["--set", "distill.num_tokens=512", "--progress", "quiet"]
    assert dtr("distill", place / "recipe.yaml", "--out", out, "--overwrite", *short)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "bank",
        "costs.json",
        "dtr-run.json",
        "events.jsonl",
        "recipe.yaml",
    ]
    # What happened before the folder was opened is in its log too.
    events = [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert events.index("backend") < events.index("nmse")


def test_output_folders_are_guarded(finished, place, dtr, tmp_path):
    folder, _ = finished
    code, _, err = dtr("run", place / "recipe.yaml", "--out", folder)
    assert (code, "--resume" in err, "--overwrite" in err) == (2, True, True)
    (tmp_path / "precious.txt").write_text("mine")
    code, _, err = dtr("run", place / "recipe.yaml", "--out", tmp_path, "--overwrite")
    assert (code, "dtr-run.json" in err) == (2, True)
    assert (tmp_path / "precious.txt").read_text() == "mine"
    code, _, err = dtr("run", place / "recipe.yaml", "--out", folder, "--resume", "--set", "seed=7")
    assert (code, "seed=0" in err, "seed=7" in err) == (2, True, True)
    code, _, err = dtr("run", place / "recipe.yaml", "--out", tmp_path / "precious.txt")
    assert (code, "a folder" in err) == (2, True)
    assert (folder / "report.json").exists()


def test_damaged_models_are_told(place, dtr, tmp_path):
    pico_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    code, _, err = dtr("run", place / "recipe.yaml", "--model", tmp_path / "model", "--out", tmp_path / "run")
    assert (code, "teacher.source" in err, "Traceback" in err) == (2, True, False)
    config = tmp_path / "model" / "config.json"
    config.write_text(
        json.dumps(
            json.loads(config.read_text()) | {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
        )
    )
    code, _, err = dtr("run", place / "recipe.yaml", "--model", tmp_path / "model", "--out", tmp_path / "run2")
    assert (code, "encoder-decoders are not supported" in err) == (2, True)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    code, _, err = dtr("run", place / "recipe.yaml", "--model", tmp_path / "broken.gguf", "--out", tmp_path / "run3")
    assert (code, "broken.gguf" in err, "Traceback" in err) == (2, True, False)
