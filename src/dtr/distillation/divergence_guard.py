"""Layers that go wrong while training: noticed, put back to their last good weights and left out; the others go on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from dtr.mixers.base import Mixer

CHECK_EVERY_STEPS = 10
DIVERGED_FACTOR = 10.0
"""A loss this many times the layer's best, and above 1 (what an output of zeros gets), counts as bad."""
PATIENCE = 3
"""Bad checks in a row until a layer is given up: single batches may be odd, and a spike may heal."""


class DivergenceGuard:
    """Keeps a copy of the weights that each layer had when it was last in order.

    A loss is that of the weights before the update that followed it, and that update may have ruined them. So weights
    are kept on trial until a later loss, computed with what has become of them, is found in order.

    All that it knows is saved with a checkpoint, and what it looks at depends on the step alone, so that a run that
    was interrupted gives up the same layers, with the same weights.

    Args:
        mixers: those that this process trains.
    """

    def __init__(self, mixers: Mapping[int, Mixer]) -> None:
        self._params = {i: dict(mixer.named_parameters()) for i, mixer in mixers.items()}
        self.proved = {i: {n: p.detach().clone() for n, p in params.items()} for i, params in self._params.items()}
        """Weights that a layer gets back, by number and name."""
        self.on_trial = {i: {n: p.clone() for n, p in params.items()} for i, params in self.proved.items()}
        """Weights of the last check that was in order; the next one decides about them."""
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
        norms = [torch.stack(torch._foreach_norm(list(self._params[index].values()))).sum() for index in layers]
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
                    self.proved[index], self.on_trial[index] = self.on_trial[index], self.proved[index]
                # After a bad loss what was on trial is given up, though the layer has come round.
                _copy(self._params[index], to=self.on_trial[index])
                self._best[index], self._num_bad[index] = min(loss, self._best[index]), 0
        for index in lost:
            _copy(self.proved[index], to=self._params[index])
            self.drop(index)
        return lost

    def drop(self, index: int) -> None:
        """Forget a layer that is trained no more."""
        del self.proved[index], self.on_trial[index]

    def counts(self) -> dict[int, dict[str, Any]]:
        """What is kept of each layer beside weights, for JSON; a best of None is that of a layer not looked at yet."""
        return {
            index: {"best": best if math.isfinite(best) else None, "num_bad": self._num_bad[index]}
            for index, best in self._best.items()
            if index in self.proved
        }

    @torch.no_grad()
    def restore(
        self,
        index: int,
        counts: dict[str, Any] | None,
        proved: Mapping[str, torch.Tensor],
        on_trial: Mapping[str, torch.Tensor],
    ) -> None:
        """Go on from what was saved of a layer; without `counts` from the weights that it has now."""
        if counts is None:
            proved = on_trial = self._params[index]
        else:
            self._best[index] = math.inf if counts["best"] is None else float(counts["best"])
            self._num_bad[index] = int(counts["num_bad"])
        _copy(proved, to=self.proved[index])
        _copy(on_trial, to=self.on_trial[index])


def _copy(weights: Mapping[str, torch.Tensor], *, to: Mapping[str, torch.Tensor]) -> None:
    torch._foreach_copy_(list(to.values()), [weights[name] for name in to])
