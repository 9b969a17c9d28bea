"""The paper's impact of a layer, from linear probes: 1 - (A_linear + A_cross) / (2 A_full).

Source: "Distill-then-Replace" (https://arxiv.org/abs/2601.11667). A probe reads from what the layer hands on at the
last token whether an answer is the right one. A_full: trained and tested with the layer's full attention; A_linear:
trained and tested with its mixer; A_cross: trained with full attention, tested with the mixer. The paper leaves open
what is probed and how; here it is ridge regression on features centred within each question, and the share of
questions whose right answer ranks first, by two-fold cross-fitting over questions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

RIDGE = 0.1
"""Added to the features' covariance, as a share of its mean diagonal."""


def impact(
    full_ND: torch.Tensor, linear_ND: torch.Tensor, questions: Sequence[Sequence[int]], right: list[int]
) -> float:
    """Impact of one layer; below 0 where the mixer's features serve the probe better.

    Args:
        full_ND: features of each answer with full attention (num_answers, D).
        linear_ND: the same with the mixer.
        questions: rows of the answers of each question.
        right: the right one's position within each question.
    """
    if not torch.isfinite(linear_ND).all():
        # From what is no number nothing can be read.
        return 1.0
    full, linear = (_centred(x.double(), questions) for x in (full_ND, linear_ND))
    targets = torch.zeros(len(full), dtype=torch.float64, device=full.device)
    targets[torch.tensor([rows[at] for rows, at in zip(questions, right)], device=full.device)] = 1.0
    targets = _centred(targets[:, None], questions)[:, 0]
    hits = {"full": 0, "linear": 0, "cross": 0}
    for fold in range(2):
        train = torch.tensor([row for rows in questions[1 - fold :: 2] for row in rows], device=full.device)
        on_full, on_linear = (_ridge(x[train], targets[train]) for x in (full, linear))
        for name, features, weights in (
            ("full", full, on_full),
            ("linear", linear, on_linear),
            ("cross", linear, on_full),
        ):
            scores = (features @ weights).cpu()
            held_out = zip(questions[fold::2], right[fold::2])
            hits[name] += sum(int(scores[list(rows)].argmax()) == at for rows, at in held_out)
    return 1.0 - (hits["linear"] + hits["cross"]) / (2.0 * max(hits["full"], 1))


def _centred(x_ND: torch.Tensor, questions: Sequence[Sequence[int]]) -> torch.Tensor:
    """Minus the mean over the answers of the same question."""
    owner = torch.empty(len(x_ND), dtype=torch.long)
    for index, rows in enumerate(questions):
        owner[list(rows)] = index
    owner = owner.to(x_ND.device)
    sums = x_ND.new_zeros(len(questions), x_ND.shape[1]).index_add_(0, owner, x_ND)
    counts = owner.bincount(minlength=len(questions))[:, None]
    return x_ND - (sums / counts)[owner]


def _ridge(x_ND: torch.Tensor, y_N: torch.Tensor) -> torch.Tensor:
    covariance = x_ND.T @ x_ND
    strength = RIDGE * covariance.diagonal().mean().clamp_min(1e-30)
    return torch.linalg.solve(
        covariance + strength * torch.eye(len(covariance), dtype=x_ND.dtype, device=x_ND.device), x_ND.T @ y_N
    )
