"""`dtr bench generate`: figures hang together, what is wrong is not timed, what does not fit is recorded."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tiny import byte_tokenizer, pico_teacher

from dtr.bench import generation
from dtr.bench.generation import bench_generate, check_decoder, fill_batch
from dtr.bench.sizes import numbers, pick_batches
from dtr.bench.speedups import speedups
from dtr.bench.subjects import Subjects, load_subjects
from dtr.cli import main
from dtr.errors import DeviceError, RecipeError
from dtr.hybrid.cache import decode_cache_bytes


def test_figures_of_generation_hang_together(place, monkeypatch):
    monkeypatch.setattr(generation, "_TIMED_SECONDS", 0.0)
    subjects = load_subjects(
        str(place / "model"), num_linear=3, mixer="gated_deltanet", keep=None, device="cpu", dtype="float32"
    )
    assert subjects.hybrid.linear_layers == [0, 1, 3]
    rows = list(bench_generate(subjects, contexts=[8, 24], batches=[3], num_steps=2))
    assert [(row["context_tokens"], row["batch"]) for row in rows] == [(8, 3), (24, 3)]
    mixer = subjects.hybrid.model.layers[0].self_attn
    for row in rows:
        for name, num_linear in (("teacher", 0), ("hybrid", 3)):
            figures = row[name]
            for way in figures["decode"].values():
                count = decode_cache_bytes(
                    mixer.geometry,
                    4 - num_linear,
                    context_tokens=row["context_tokens"],
                    bytes_per_element=4,
                    state_bytes=num_linear * mixer.state_bytes(4),
                )
                assert way["cache_bytes"] == row["batch"] * count
            best = min(way["step_seconds"] for way in figures["decode"].values())
            assert figures["decode_tokens_per_second"] == pytest.approx(row["batch"] / best)
            assert figures["time_to_first_token_seconds"] == figures["prefill"]["seconds"]
    ratios = speedups(rows)
    first = rows[0]
    rate = "decode_tokens_per_second"
    assert ratios["decode_speedup"]["8"]["3"] == pytest.approx(first["hybrid"][rate] / first["teacher"][rate])
    assert set(ratios["prefill_speedup"]) == set(ratios["cache_ratio"]) == {"8", "24"}


def test_what_was_measured_before_a_failure_is_kept(monkeypatch, place, tmp_path):
    monkeypatch.setattr(generation, "_TIMED_SECONDS", 0.0)
    right, out = generation._decode, tmp_path / "speed.json"

    def fail_later(model, batch, context, num_steps):
        if context == 16:
            raise KeyboardInterrupt
        return right(model, batch, context, num_steps)

    monkeypatch.setattr(generation, "_decode", fail_later)
    command = ["dtr", "bench", "generate", str(place / "model"), "--num-linear", "3", "--contexts", "8,16"]
    command += ["--batch", "1", "--steps", "2", "--device", "cpu", "--dtype", "float32", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code
    record = json.loads(out.read_text())
    monkeypatch.setattr(sys, "argv", [*command[:-1], str(tmp_path / "nowhere" / "speed.json")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert list(record["decode_speedup"]) == ["8"]
    assert len(record["rows"]) == 1


def test_what_does_not_fit_is_recorded(monkeypatch, place):
    def burst(*_, **__):
        raise torch.OutOfMemoryError("too much")

    subjects = load_subjects(
        str(place / "model"), num_linear=None, mixer="mamba2", keep=[1], device="cpu", dtype="float32"
    )
    monkeypatch.setattr(generation, "_decode_fast", burst)
    monkeypatch.setattr(generation, "_decode_plain", burst)
    (row,) = bench_generate(subjects, contexts=[8], batches=[1], num_steps=2)
    assert row["hybrid"]["decode"]["graph"] == {"error": "out of memory"}
    assert speedups([row])["decode_speedup"] == {"8": {"1": None}}


def test_a_wrong_fast_path_is_not_timed(monkeypatch, place):
    model = pico_teacher().model
    assert check_decoder(model) < 1e-5
    right = generation.Decoder.decode
    monkeypatch.setattr(generation.Decoder, "decode", lambda *args: right(*args) * 1.01)
    with pytest.raises(DeviceError, match="Nothing was timed"):
        list(bench_generate(Subjects(teacher=model, hybrid=model, note=""), contexts=[8], batches=[1]))


def test_in_16_bits_the_fast_path_is_judged_by_the_rounding_of_the_plain_one(monkeypatch):
    model = pico_teacher().model.bfloat16()
    assert 1e-4 < check_decoder(model) < 0.1
    right = generation.Decoder.decode
    monkeypatch.setattr(generation.Decoder, "decode", lambda *args: right(*args) * 1.2)
    with pytest.raises(DeviceError, match="Nothing was timed"):
        check_decoder(model)


def test_sizes_and_layers_of_generation_are_checked(place):
    assert numbers("--batch", "1, 16,fill", words=("fill",)) == [1, 16, "fill"]
    assert pick_batches(None, "cpu") == [1, 16]
    assert pick_batches(None, "cuda") == [1, 16, "fill"]
    for text in ("", "0", "1,x", "1.5", "-1", "8,8", "2147483648", "9" * 5000, "\u0661"):
        with pytest.raises(RecipeError, match="--contexts"):
            numbers("--contexts", text)
    options = {"mixer": "gated_deltanet", "device": "cpu", "dtype": "float32"}
    with pytest.raises(RecipeError, match="--num-linear"):
        load_subjects(str(place / "model"), num_linear=9, keep=None, **options)
    with pytest.raises(RecipeError, match="--keep"):
        load_subjects(str(place / "model"), num_linear=3, keep=[0, 1], **options)
    model = pico_teacher().model
    with pytest.raises(DeviceError, match="on a CPU"):
        fill_batch(model, 8)
    with pytest.raises(RecipeError, match=r"--contexts: got 2,000,000,002 tokens in 8 sequences, [\d,.]+ GB"):
        list(
            bench_generate(
                Subjects(teacher=model, hybrid=model, note=""), contexts=[8, 2 * 10**9], batches=[8, 1], num_steps=2
            )
        )


def test_the_command_takes_a_saved_hybrid(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generation, "_TIMED_SECONDS", 0.0)
    options = {"device": "cpu", "dtype": "float32", "options": {"head_copies": 2}}
    subjects = load_subjects(str(place / "model"), num_linear=2, mixer="gated_deltanet", keep=None, **options)
    subjects.hybrid.tokenizer = byte_tokenizer()
    subjects.hybrid.save_pretrained(tmp_path / "hybrid")
    command = ["dtr", "bench", "generate", str(tmp_path / "hybrid"), "--contexts", "8", "--batch", "2", "--steps", "2"]
    out = ["--out", str(tmp_path / "speed.json")]
    monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu", "--dtype", "float32", *out])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert json.loads((tmp_path / "speed.json").read_text()) == record
    assert record["linear_layers"] == [0, 2]
    assert record["mixers"] == [{"kind": "gated_deltanet", "exact_first": True, "head_copies": 2, "quadratic": True}]
    assert record["decode_speedup"]["8"]["2"] > 0
    assert record["cache_ratio"]["8"] > 0
