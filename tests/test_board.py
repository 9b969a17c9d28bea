"""What a run shows while it goes on: stages, bars, TensorBoard files."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from dtr.cli.board import open_board
from dtr.cli.display import _Bars
from dtr.errors import DeviceError, with_article

EVENTS = [
    {"event": "backend", "name": "torch", "reason": "r", "device": "cpu"},
    {"event": "stage", "text": "loading a model"},
    {"event": "distill", "step": 3, "num_steps": 9, "mean_loss": 0.25},
    {"event": "nmse", "step": 3, "num_tokens": 512, "mean_nmse": 0.5},
    {"event": "stage", "text": "scoring the teacher"},
    {"event": "teacher", "score": 0.75},
    {"event": "candidate", "done": 1, "total": 4},
    {"event": "step", "step": 1, "layer": 2, "score": 0.7, "accepted": True},
    {"event": "candidate", "done": 2, "total": 4},
]


def test_a_stage_shows_until_something_is_counted():
    console = Console(file=io.StringIO(), width=100)
    progress = Progress(TextColumn("{task.fields[note]}"), console=console)
    bars, seen = _Bars(progress, console), []
    for event in EVENTS:
        bars(event)
        seen.append([task.fields["note"] for task in progress.tasks])
    assert seen[1] == ["loading a model"]
    assert seen[2] == ["loss 0.2500"]
    assert seen[6] == ["loss 0.2500", "0 layers replaced, score 0.7500"]
    assert seen[8][-1] == "1 layers replaced, score 0.7000"
    assert "scoring the teacher ..." in console.file.getvalue()


def test_events_become_scalars(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_board(tmp_path / "board") as draw:
        for event in EVENTS:
            draw(event)
    found = EventAccumulator(str(tmp_path / "board")).Reload()
    assert set(found.Tags()["scalars"]) == {"distill/loss", "distill/held_out_nmse", "search/score", "search/layer"}
    (point,) = found.Scalars("distill/held_out_nmse")
    assert (point.step, point.value) == (512, 0.5)


def test_a_board_without_its_library_is_refused_and_one_without_scalars_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(DeviceError, match=r"distill-then-replace\[tensorboard\]"), open_board(tmp_path / "board"):
        pass
    assert not (tmp_path / "board").exists()


def test_articles():
    assert [with_article(name) for name in ("acc", "exact_match", "perplexity")] == [
        *("an acc", "an exact_match", "a perplexity")
    ]
