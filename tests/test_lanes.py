"""Students side by side on streams: the same results, and nothing left under way where a step fails."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny import byte_tokenizer, pico_teacher, token_blocks

from dtr.arch import decoder_layers
from dtr.distillation import lanes, replay
from dtr.distillation.students import Students
from dtr.mixers import mixer_from_teacher
from dtr.teacher import as_teacher


@pytest.fixture(scope="module")
def blocks():
    return token_blocks()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("fast", [False, True])
def test_lanes_change_nothing_but_the_time(blocks, monkeypatch, fast):
    model = pico_teacher().model.to("cuda", torch.bfloat16)
    teacher = as_teacher(model, byte_tokenizer(), source="pico")
    attention = [layer.self_attn for layer in decoder_layers(teacher.model)]

    def trained(num_lanes):
        monkeypatch.setattr(lanes, "NUM_LANES", num_lanes)
        mixers = {i: mixer_from_teacher("gated_deltanet", teacher.geometry, i, a) for i, a in enumerate(attention)}
        students = Students(teacher, mixers, learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1.0, fast=fast)
        losses = [students.train_step(blocks.batch(i, batch_size=8, seed=0), 1e-3).clone() for i in range(8)]
        return torch.stack(losses), [p.detach().clone() for mixer in mixers.values() for p in mixer.parameters()]

    (losses, params), (expected_losses, expected) = trained(2), trained(0)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=0)
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-3, atol=1e-5)


class FakeCuda:
    """Stands in for `torch.cuda`: notes who waits for whom, and takes no orders in a recording that has failed."""

    def __init__(self):
        self.waits, self.num_streams, self.now, self.recording_failed = [], 0, "main", False

    def current_stream(self):
        return self._named(self.now)

    def _named(self, name):
        return SimpleNamespace(name=name, wait_stream=lambda other: self._wait(name, other.name))

    def _wait(self, who, whom):
        if self.recording_failed:
            raise RuntimeError("the recording is invalid")
        self.waits.append((who, whom))

    def Stream(self, *_):
        self.num_streams += 1
        return self._named(f"lane {self.num_streams - 1}")

    def CUDAGraph(self):
        return None

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream.name
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, *_, **__):
        try:
            yield
        finally:
            self.recording_failed = False


@pytest.mark.parametrize("in_recording", [True, False])
def test_a_step_that_fails_leaves_no_lane_under_way(in_recording, monkeypatch):
    cuda, kept = FakeCuda(), []
    monkeypatch.setattr(torch, "cuda", cuda)
    side_by_side = lanes.Lanes(torch.device("cuda"))

    def step(input_ids, fails=False):
        with side_by_side.joined():
            for student in range(3):
                hidden = torch.zeros(1)
                kept.append(weakref.ref(hidden))
                with side_by_side.next(hidden):
                    if student == 1 and (fails or (in_recording and len(kept) == 3 * replay.WARMUP_STEPS + 2)):
                        cuda.recording_failed = in_recording
                        raise RuntimeError("no memory for this")
        return torch.zeros(1)

    recorded = replay.Replay(step)
    if in_recording:
        for _ in range(replay.WARMUP_STEPS):
            recorded(torch.zeros(1))
        with pytest.warns(UserWarning, match="not replayed as a CUDA graph: no memory for this"):
            recorded(torch.zeros(1))
    else:
        with pytest.raises(RuntimeError, match="no memory for this"):
            step(torch.zeros(1), fails=True)
        assert cuda.waits[-2:] == [("main", "lane 0"), ("main", "lane 1")]
    gc.collect()
    del cuda.waits[:]
    step(torch.zeros(1))
    # As if nothing had failed before: a lane starts behind the pass, and the pass waits for it once.
    starts = [("lane 0", "main"), ("lane 1", "main")]
    assert cuda.waits == [*starts, ("main", "lane 0"), ("lane 0", "main"), ("main", "lane 1"), ("main", "lane 0")]
    assert not any(ref() is not None for ref in kept), "inputs are let go"
