"""Benchmarks check first, then time; the numbers hang together."""

from __future__ import annotations

import json
import re
import sys

import forks
import pytest
import torch
from docs_pages import ROOT, load_script
from tiny import pico_teacher

from dtr.bench import distillation
from dtr.bench.distillation import bench_distill, check_backend
from dtr.bench.sizes import parse_sizes
from dtr.cli import main
from dtr.distillation import students
from dtr.errors import DeviceError, RecipeError
from dtr.mixers import MIXERS


def test_figures_hang_together():
    (result,) = bench_distill(pico_teacher(), sizes=[(2, 24)], fast=False, num_steps=2)
    rates = result["distill_tokens_per_second"], result["teacher_forward_tokens_per_second"]
    assert result["ratio_to_teacher_forward"] == pytest.approx(rates[0] / rates[1])
    assert 0 < result["ratio_to_teacher_forward"] < 1
    assert 0 < result["flop_utilisation"] < 1
    json.dumps(result)


def test_time_by_stage_adds_up_to_the_step():
    (result,) = bench_distill(pico_teacher(), sizes=[(2, 24)], fast=False, num_steps=2)
    stages = result["stage_seconds"]
    assert stages.keys() == {"teacher_forward", "students_forward_backward", "clip_and_optimizer"}
    assert sum(stages.values()) == pytest.approx(2 * 24 / result["distill_tokens_per_second"])
    assert stages["teacher_forward"] > 0
    assert stages["clip_and_optimizer"] > 0


def test_the_plain_loop_is_timed_beside_ours():
    (result,) = bench_distill(pico_teacher(), sizes=[(2, 24)], fast=False, num_steps=1, baseline=True)
    assert result["baseline_tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("mixer", "rule"),
    [
        ("gated_deltanet", "gated_delta_rule"),
        ("gated_linear_attention", "gated_linear_attention"),
        ("kimi_delta_attention", "channel_delta_rule"),
    ],
)
def test_a_wrong_backend_is_not_timed(monkeypatch, mixer, rule):
    right = getattr(distillation, rule)
    assert 0 < check_backend(torch.device("cpu"), torch.float32, MIXERS[mixer].operation) < 1e-5

    def wrong(*inputs, **options):
        out, state = right(*inputs, **options)
        return out * 1.05, state

    monkeypatch.setattr(distillation, rule, wrong)
    with pytest.raises(DeviceError, match="Nothing was timed"):
        list(bench_distill(pico_teacher(), sizes=[(2, 24)], mixer=mixer))


def test_a_step_with_wrong_gradients_is_not_timed(monkeypatch):
    right = students.squared_sums

    def wrong(*inputs):
        error, power = right(*inputs)
        error.register_hook(lambda gradient: gradient * float("nan"))
        return error, power

    monkeypatch.setattr(students, "squared_sums", wrong)
    with pytest.raises(DeviceError, match="not finite after its first updates"):
        list(bench_distill(pico_teacher(), sizes=[(2, 24)], fast=False))


def test_sizes():
    assert parse_sizes("32x512,8x2048") == [(32, 512), (8, 2048)]
    for text in ("32", "0x5", "axb", "", "2x-4", "1x2x3", "2x4,2x4", "1x" + "9" * 5000, "1x2147483648"):
        with pytest.raises(RecipeError, match="--sizes"):
            parse_sizes(text)


def test_the_verb_prints_a_table_and_one_json_line(place):
    command = ["-m", "dtr", "bench", "distill", place / "model", "--sizes", "2x24", "--steps", "1"]
    command += ["--device", "cpu", "--slow", "--baseline", "--mixer-option", "head_copies=2"]
    done = forks.run(*command)
    assert done.returncode == 0, done.stderr
    assert "2 x 24" in done.stdout
    record = json.loads(done.stdout.strip().splitlines()[-1])
    assert record["backend"]["name"] == "torch"
    assert record["mixer_options"] == {"head_copies": 2}
    assert len(record["sizes"]) == 1


@pytest.mark.parametrize("verb", ["distill", "generate"])
def test_an_unknown_option_of_the_mixer_is_told_before_there_is_a_model(verb, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dtr", "bench", verb, "no/such/model", "--mixer-option", "head_copy=2"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "head_copies" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("verb", "option", "values"),
    [
        ("distill", "--sizes", ("0x8", "-1x8", "9999999999x8", "8", "8x8,8x8")),
        ("distill", "--steps", ("0", "-3", "9" * 30)),
        ("generate", "--contexts", ("0", "-1", "9" * 30, "8,8", "fill")),
        ("generate", "--batch", ("0", "-1", "9" * 30, "fill")),
        ("generate", "--keep", ("-1", "9" * 30, "1,1")),
        ("generate", "--steps", ("0", "-3", "9" * 30)),
        ("generate", "--num-linear", ("0", "-3")),
        ("serve", "--new-tokens", ("1", "9" * 30)),
        ("serve", "--most", ("0", "9" * 30)),
        ("serve", "--contexts", ("0", "9" * 30)),
    ],
)
def test_sizes_out_of_bounds_are_told_before_there_is_a_model(verb, option, values, monkeypatch, capsys):
    for value in values:
        monkeypatch.setattr(sys, "argv", ["dtr", "bench", verb, "no/such/model", f"{option}={value}", "--device=cpu"])
        with pytest.raises(SystemExit) as stopped:
            main()
        told = capsys.readouterr().err
        assert (stopped.value.code, "Traceback" in told) == (2, False), told
        assert option in told, (value, told)


def test_sizes_beyond_the_machine_are_told_before_anything_is_timed(place, monkeypatch, capsys):
    for option, named in (("--sizes=9999999x9999", "--sizes"), ("--mixer-option=head_copies=9999999", "mixer.options")):
        monkeypatch.setattr(sys, "argv", ["dtr", "bench", "distill", str(place / "model"), option, "--device=cpu"])
        with pytest.raises(SystemExit) as stopped:
            main()
        told = capsys.readouterr().err
        assert (stopped.value.code, f"{named}: got" in told, "Traceback" in told) == (2, True, False), told


def test_an_option_without_a_value_names_its_flag(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dtr", "bench", "distill", str(place / "model"), "--mixer-option", "head_copies"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "--mixer-option" in capsys.readouterr().err


def test_two_processes_are_timed_against_one_in_one_run(place):
    options = ["--sizes", "2x24", "--steps", "1", "--device", "cpu", "--slow"]
    first, second = ranks = forks.run_ranks(2, "-m", "dtr", "bench", "distill", place / "model", *options)
    assert [rank.returncode for rank in ranks] == [0, 0], first.stderr + second.stderr
    # One rank alone prints, and its last line is the record.
    assert not second.stdout
    (line,) = [line for line in first.stdout.splitlines() if line.startswith("{")]
    record = json.loads(line)
    # All say what they are about to do, the plainest step first.
    for rank in range(2):
        # Anywhere in a line, as what libraries print in pieces may come before it.
        phases = re.findall(rf"\[rank {rank}, \d+ s\] (.*)", ranks[rank].stderr)
        assert "neither compiled nor recorded" in phases[2]
        assert "2 x 24: 2 processes together, plain" in phases[-2]
    (size,) = record["sizes"]
    assert record["num_processes"] == size["together"]["num_processes"] == 2
    rates = size["together"]["distill_tokens_per_second"], size["distill_tokens_per_second"]
    assert size["together"]["speedup"] == pytest.approx(rates[0] / rates[1])


def test_records_are_gathered_part_by_part(tmp_path):
    program = ROOT / "benchmarks" / "distil_speed.py"
    out = tmp_path / "results" / "distil_speed.json"

    def gather(device: str, num_processes: int, sizes: list[dict]) -> dict:
        record = {
            "hardware": {"device": device},
            "num_processes": num_processes,
            "command": f"dtr on {device}",
            "commit": "abc",
            "sizes": sizes,
        }
        text = "a table\n" + json.dumps(record)
        done = forks.run(program, "--out", out, text=text)
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())

    gather("cpu", 1, [{"distill_tokens_per_second": 900.0}, {"distill_tokens_per_second": 1000.0}])
    gather("cuda", 2, [{"together": {"speedup": 1.9}}, {"together": {"speedup": 1.85}}])
    size = {
        "ratio_to_teacher_forward": 0.5,
        "distill_tokens_per_second": 1.0,
        "teacher_forward_tokens_per_second": 2.0,
        "cold_start_seconds": 3.0,
        "backend_check_seconds": 2.0,
        "peak_bytes_beyond_model_students_and_optimizer": 7,
    }
    merged = gather("cuda", 1, [size | {"seq_len_tokens": 512}, size | {"seq_len_tokens": 2048}])
    sources = {key: merged.pop(key) for key in ("command", "hardware", "commit")}
    assert merged == {
        "ratio_to_teacher_forward": {"512": 0.5, "2048": 0.5},
        "distill_tokens_per_second": {"512": 1.0, "2048": 1.0},
        "teacher_forward_tokens_per_second": {"512": 2.0, "2048": 2.0},
        "cold_start_seconds": 5.0,
        "peak_bytes": 7,
        "two_gpu_speedup": 1.85,
        "cpu_tokens_per_second": 1000.0,
    }
    assert sources["command"] == {"cpu": "dtr on cpu", "two_gpus": "dtr on cuda", "one_gpu": "dtr on cuda"}
    assert json.loads(out.with_name("distil_speed_cpu.json").read_text())["commit"] == "abc"
    done = forks.run(program, "--out", out)
    assert done.returncode != 0
    assert "nothing was written" in done.stderr


def test_costs_of_mixers_are_gathered(tmp_path, monkeypatch):
    # As when a file of that folder is run.
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = load_script(ROOT / "benchmarks" / "mixer_costs.py")
    out, names = tmp_path / "mixer_costs.json", ("recipe", "kda", "served")
    common = {"hardware": {}, "commit": "abc"}
    size = {"batch": 8, "seq_len_tokens": 512}
    options = {"head_copies": 2, "quadratic": True}
    recipe, kda, served = records = [
        {"command": "a", "mixer": "gated_deltanet", "mixer_options": options, "sizes": [size], **common},
        {"command": "b", "mixer": "kimi_delta_attention", "mixer_options": options, "sizes": [dict(size)], **common},
        {"command": "c", "mixers": [{"kind": "kimi_delta_attention", "exact_first": True, **options}], **common},
    ]
    recipe["sizes"][0]["distill_tokens_per_second"], kda["sizes"][0]["distill_tokens_per_second"] = 300.0, 200.0
    served |= {"decode_speedup": {"512": {"1": 1.1}}, "prefill_speedup": {}, "cache_ratio": {"512": 0.4}}
    for name, record in zip(names, records, strict=True):
        (tmp_path / name).write_text("a table\n" + json.dumps(record))
    (tmp_path / "nothing").write_text("a table\n")

    def gather(*names: str) -> None:
        recipe = str(ROOT / "recipes" / "arc_easy_gpu.yaml")
        program.main([recipe, *(str(tmp_path / name) for name in names), "--out", str(out)])

    with pytest.raises(SystemExit, match="no record of the recipe's own mixer with a step of 8 x 512 at commit abc"):
        gather("kda")
    with pytest.raises(SystemExit, match="nothing was written"):
        gather("recipe", "nothing")
    assert not out.exists()
    gather("recipe", "kda")
    gather("served")
    first, second = json.loads(out.read_text())
    assert first["training"]["step_time_over_recipes"] == 1.0
    assert second["training"]["step_time_over_recipes"] == 1.5
    assert second["training"]["recipes_tokens_per_second"] == 300.0
    assert second["training"]["command"] == "b"
    assert second["serving"]["cache_ratio"] == {"512": 0.4}
    assert "serving" not in first
