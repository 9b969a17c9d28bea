"""A layer that fails gets weights back that a later loss has proved, never those of the update that ruined it."""

from __future__ import annotations

import math

import pytest
import torch

from dtr.distillation.divergence_guard import PATIENCE, DivergenceGuard


def played(weights_and_losses):
    """What a layer is left with, and why it was stopped, after checks with these weights and the losses before them."""
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    guard = DivergenceGuard({3: layer})
    for weight, loss in weights_and_losses:
        layer.weight.data.fill_(weight)
        lost = guard.check([3], torch.tensor([loss]))
        if lost:
            return layer.weight.item(), lost[3]
    return layer.weight.item(), None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_update_after_the_last_good_loss_is_taken_back(bad):
    weight, why = played([(1.0, 0.5), (2.0, 0.4), (1e6, 0.3), (1e7, bad)])
    assert (weight, why) == (2.0, "its loss is not a number")
    assert played([(1.0, 0.5), (math.nan, 0.4)]) == (0.0, "its weights are not numbers")
    assert played([(1e6, bad)])[0] == 0.0


def test_a_spike_that_heals_leaves_weights_from_before_it():
    spike = [(1.0, 0.1), (2.0, 0.1), (3.0, 0.1), (50.0, 90.0)]
    assert played([*spike, (4.0, 0.1), (60.0, 90.0), (61.0, 90.0), (62.0, 90.0)][: 5 + PATIENCE])[0] == 2.0
    assert played([*spike, (4.0, 0.1), (5.0, 0.1), *[(60.0, 90.0)] * PATIENCE])[0] == 4.0
    assert played([*spike, (4.0, 0.1)]) == (4.0, None)
