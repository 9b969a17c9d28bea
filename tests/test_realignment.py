"""The optional stage after search: swapped layers learn once more, on the hybrid's own hidden states."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import CHEAP, pico_teacher, token_blocks
from torch.nn import functional as F

from dtr.arch import capture_attention
from dtr.distillation.realignment import HybridPass, realign
from dtr.distillation.trainer import distill
from dtr.errors import Interrupted
from dtr.pipeline import run
from dtr.recipe import read_recipe
from dtr.reporting import render_html, summary_table
from dtr.selection.search import hybrid_of

SETTINGS = {"num_tokens": 24 * 4 * 32, "batch_size": 4, "learning_rate": 5e-3, "seed": 3}


@pytest.fixture(scope="module")
def bank():
    return distill(pico_teacher(), token_blocks(), options=CHEAP, **SETTINGS | {"num_tokens": 10 * 4 * 32})


def captured(model, index: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of the attention of one layer."""
    seen = []
    with torch.no_grad(), capture_attention(model, [index], lambda _i, hidden, _r, out: seen.append((hidden, out))):
        model(ids, use_cache=False)
    return seen[0]


def test_a_pass_shows_the_hybrids_inputs_and_the_teachers_outputs(bank):
    teacher, swapped, ids = pico_teacher(), (1, 2), token_blocks().train[:3].long()
    seen = {}
    HybridPass(teacher, {i: bank.mixers[i] for i in swapped})(
        ids, list(swapped), lambda index, *rest: seen.__setitem__(index, rest)
    )
    hybrid = hybrid_of(teacher, bank, swapped)
    for index in swapped:
        torch.testing.assert_close(seen[index][0], captured(hybrid, index, ids)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[index][2], captured(teacher.model, index, ids)[1], rtol=1e-4, atol=1e-5)
    # Above a swapped layer the two differ.
    assert F.mse_loss(captured(teacher.model, 2, ids)[0], seen[2][0]) > 1e-3


def test_the_error_falls_and_the_first_layer_sees_what_it_saw_before(bank):
    events, before = [], bank.fingerprint
    found = realign(pico_teacher(), bank, token_blocks(), [3, 0, 2], **SETTINGS, on_event=events.append)
    assert bank.fingerprint == before
    assert list(found.mixers) == [0, 2, 3]
    # Nothing below layer 0 is swapped, so its error starts where distillation left it; layer 3 stands on two others.
    assert found.nmse_before[0] == pytest.approx(bank.nmse_after[0], rel=1e-4)
    assert found.nmse_before[3] > bank.nmse_after[3] * 1.02
    assert all(found.nmse_after[i] < found.nmse_before[i] for i in found.mixers)
    assert {event["event"] for event in events} == {"realign", "realign_nmse"}


def test_mixers_of_several_kinds():
    kinds = ["gated_deltanet", "gated_linear_attention"]
    bank = distill(pico_teacher(), token_blocks(), mixer=kinds, **SETTINGS | {"num_tokens": 4 * 4 * 32})
    # Layer 0 by the first kind, layer 2 by the second.
    found = realign(pico_teacher(), bank, token_blocks(), [0, 6], **SETTINGS)
    assert found.layers == [0, 2]
    assert all(found.nmse_after[i] < found.nmse_before[i] for i in (0, 6))
    assert [spec["kind"] for spec in hybrid_of(pico_teacher(), found, [0, 6]).config.mixers if spec] == kinds


def test_an_interrupted_realignment_ends_in_the_same_bits(bank, tmp_path):
    whole = realign(pico_teacher(), bank, token_blocks(), [0, 2], **SETTINGS)

    def stop(event):
        if event["event"] == "realign" and event["step"] >= 10:
            raise KeyboardInterrupt

    state = {"checkpoint": tmp_path / "state.safetensors", "checkpoint_every_steps": 5}
    with pytest.raises(KeyboardInterrupt):
        realign(pico_teacher(), bank, token_blocks(), [0, 2], **SETTINGS, **state, on_event=stop)
    steps = []
    resumed = realign(
        pico_teacher(), bank, token_blocks(), [0, 2], **SETTINGS, **state, on_event=lambda e: steps.append(e["step"])
    )
    assert min(steps) > 5
    assert resumed.fingerprint == whole.fingerprint


def test_a_run_reports_it_apart_and_resumes(place, tmp_path):
    settings = ["search.run_to_end=false", "search.test_curve=false", "search.p_min=0.5", "distill.num_tokens=2048"]
    plain = run(read_recipe(place / "recipe.yaml", settings), tmp_path / "plain")
    assert plain["realigned"] is None
    assert not (tmp_path / "plain" / "realigned").exists()
    recipe = read_recipe(place / "recipe.yaml", [*settings, "realign.num_tokens=4096", "realign.learning_rate=2e-3"])

    def stop(event):
        if event["event"] == "realign" and event["step"] >= 10:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "run", on_event=stop)
    assert (tmp_path / "run" / "realign.safetensors").exists()
    events = []
    record = run(recipe, tmp_path / "run", resume=True, on_event=events.append)
    assert min(event["step"] for event in events if event["event"] == "realign") > 10 - 5
    # The plain method is untouched by the stage, to the bit.
    assert record["m_opt"] == plain["m_opt"]
    ours, theirs = (load_file(tmp_path / name / "hybrid" / "model.safetensors") for name in ("run", "plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    realigned = record["realigned"]
    assert realigned["layers"] == record["m_opt"]["layers"]
    assert realigned["mean_nmse"] < realigned["mean_nmse_before"]
    assert realigned["val_before"]["value"] == record["m_opt"]["val"]["value"]
    assert realigned["kept"] == (realigned["val"]["value"] >= realigned["val_before"]["value"])
    folder = tmp_path / "run" / "hybrid-realigned"
    assert folder.exists() == realigned["kept"]
    if realigned["kept"]:
        assert "on its own hidden states" in (folder / "README.md").read_text()
    assert not (tmp_path / "run" / "realign.safetensors").exists()


@pytest.mark.parametrize("kept", [True, False])
def test_reports_show_both(kept):
    from fake_report import fake_report

    report = fake_report()
    report["realigned"] = json.loads(json.dumps(report["m_opt"])) | {
        "kept": kept,
        "val_before": report["m_opt"]["val"],
        "num_tokens": 3_000_000,
        "seconds": 71.0,
        "mean_nmse_before": 0.123,
        "mean_nmse": 0.0456,
    }
    page = render_html(report)
    assert "Realigned, apart from the method" in page
    assert "0.0456" in page
    assert ("Kept, as" in page) == kept
    assert summary_table(report).row_count == summary_table(fake_report()).row_count + 2
