"""Layers that go wrong while training: noticed, put back to their last good weights and left out; the others go on."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from dtr.mixers.base import Mixer

CHECK_EVERY_STEPS = 10
DIVERGED_FACTOR = 10.0
"""A loss this many times the layer's best, and above 1 (what an output of zeros gets), counts as bad."""
PATIENCE = 3
"""Bad checks in a row until a layer is given up: single batches may be odd, and a spike may heal."""


class Watch:
    """Keeps a copy of the weights that each layer had when it was last in order.

    A loss is that of the weights before the update that followed it, and that update may have ruined them. So weights
    are kept on trial until a later loss, computed with what has become of them, is found in order.

    Args:
        mixers: those that this process trains.
    """

    def __init__(self, mixers: Mapping[int, Mixer]) -> None:
        self._params: dict[int, list[torch.Tensor]] = {i: list(mixer.parameters()) for i, mixer in mixers.items()}
        self._good = {index: [p.detach().clone() for p in params] for index, params in self._params.items()}
        self._on_trial = {index: [p.clone() for p in params] for index, params in self._good.items()}
        self._best = dict.fromkeys(mixers, math.inf)
        self._num_bad = dict.fromkeys(mixers, 0)

    @torch.no_grad()
    def check(self, layers: list[int], losses: torch.Tensor) -> dict[int, str]:
        """Look at the layers in training; those to be stopped get their last good weights back.

        Args:
            layers: to look at.
            losses: normalised MSE of each on the last batch.

        Returns:
            why, by layer, for those to be stopped.
        """
        if not layers:
            return {}
        # A loss may be finite while its gradient was not; one reading of the device serves both.
        norms = [torch.stack(torch._foreach_norm(self._params[index])).sum() for index in layers]
        readings = torch.stack([losses.float(), torch.stack(norms).float()]).tolist()
        lost: dict[int, str] = {}
        for index, loss, norm in zip(layers, *readings, strict=True):
            if not math.isfinite(loss) or not math.isfinite(norm):
                lost[index] = "its loss is not a number" if not math.isfinite(loss) else "its weights are not numbers"
            elif loss > max(1.0, DIVERGED_FACTOR * self._best[index]):
                self._num_bad[index] += 1
                if self._num_bad[index] == PATIENCE:
                    lost[index] = f"its loss of {loss:.3g} has left its best of {self._best[index]:.3g} far behind"
            else:
                if not self._num_bad[index]:
                    self._good[index], self._on_trial[index] = self._on_trial[index], self._good[index]
                # After a bad loss what was on trial is given up, though the layer has come round.
                torch._foreach_copy_(self._on_trial[index], self._params[index])
                self._best[index], self._num_bad[index] = min(loss, self._best[index]), 0
        for index in lost:
            torch._foreach_copy_(self._params[index], self._good.pop(index))
            del self._on_trial[index]
        return lost
