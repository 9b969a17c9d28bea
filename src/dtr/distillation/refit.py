"""After training: the output projection of each student, solved for in closed form.

Everything before the output projection stays as trained. With features f (its input) and the attention's output y, the
projection that minimises `sum |W f - y|^2 + ridge |W - W_trained|^2` is

    W = (Y F^T + ridge W_trained) (F F^T + ridge I)^-1

from sums that are streamed over text. The ridge pulls towards the trained weights and not towards zero, so that a
strong one changes nothing; the best of a few is taken by the error on held-out text, "no change" among them.

Shapes: B batch, T tokens, D hidden dim, F features.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from dtr.arch import run_body
from dtr.distillation.targets import capture_targets
from dtr.mixers.base import Mixer
from dtr.teacher import Teacher

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Tried ridges, in units of the mean power of a feature times the number of tokens."""


class _Sums:
    """F F^T, F Y^T and |Y|^2 of one layer, in float64."""

    def __init__(self, num_features: int, hidden_dim: int, device: torch.device) -> None:
        self.features = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(num_features, hidden_dim, dtype=torch.float64, device=device)
        self.power = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, features_BTF: torch.Tensor, target_BTD: torch.Tensor) -> None:
        f, y = features_BTF.flatten(0, 1).float(), target_BTD.flatten(0, 1).float()
        self.features += (f.T @ f).double()
        self.cross += (f.T @ y).double()
        self.power += y.square().sum(dtype=torch.float64)

    def nmse(self, weight_DF: torch.Tensor) -> float:
        """Normalised MSE that a projection would have on the text of these sums."""
        w = weight_DF.double()
        error = self.power - 2 * (w.T * self.cross).sum() + ((w @ self.features) * w).sum()
        return (error / self.power).item()


@torch.no_grad()
def refit_outputs(
    teacher: Teacher,
    mixers: dict[int, Mixer],
    train: Iterable[torch.Tensor],
    held_out: Iterable[torch.Tensor],
) -> dict[int, float | None]:
    """Refit the weight of every output projection; its bias stays as it is.

    Args:
        teacher: gives inputs and targets.
        mixers: changed in place.
        train: batches (B, T) of token ids to fit on; a few hundred tokens per feature are plenty.
        held_out: batches to choose the ridge on.

    Returns:
        the ridge that was taken, by layer; None where nothing helped.
    """
    chosen: dict[int, float | None] = {}
    fit, check = _stream(teacher, mixers, train), _stream(teacher, mixers, held_out)
    for index, mixer in mixers.items():
        trained = mixer.output_projection.weight.double()
        unit = fit[index].features.diagonal().mean()
        identity = torch.eye(trained.shape[1], dtype=torch.float64, device=trained.device)
        best, chosen[index] = check[index].nmse(trained), None
        for ridge in RIDGES:
            left = fit[index].features + ridge * unit * identity
            right = fit[index].cross + ridge * unit * trained.T
            weight = torch.linalg.solve(left, right).T
            if (error := check[index].nmse(weight)) < best:
                best, chosen[index] = error, ridge
                mixer.output_projection.weight.copy_(weight)
    return chosen


def _stream(teacher: Teacher, mixers: dict[int, Mixer], batches: Iterable[torch.Tensor]) -> dict[int, _Sums]:
    last = {index: mixer.output_projection for index, mixer in mixers.items()}
    sums = {i: _Sums(m.in_features, m.out_features, teacher.device) for i, m in last.items()}
    seen: dict[int, torch.Tensor] = {}
    amp = torch.autocast(teacher.device.type, torch.bfloat16, enabled=teacher.dtype != torch.float32)

    def keep(index: int) -> Any:
        return lambda _module, args: seen.__setitem__(index, args[0])

    def visit(index: int, hidden: torch.Tensor, rotary: Any, target: torch.Tensor) -> None:
        with amp:
            mixers[index](hidden, rotary)
        target = target if last[index].bias is None else target - last[index].bias
        # What does not come out of the projection must not be fitted by it.
        first = int(mixers[index].exact_first)
        sums[index].add(seen.pop(index)[:, first:], target[:, first:])

    handles = [linear.register_forward_pre_hook(keep(index)) for index, linear in last.items()]
    try:
        with capture_targets(teacher.model, mixers, visit):
            for batch in batches:
                run_body(teacher.model, batch.to(teacher.device, torch.long))
    finally:
        for handle in handles:
            handle.remove()
    return sums
