"""Strategy `exact`: Algorithm 1 of "Distill-then-Replace" (https://arxiv.org/abs/2601.11667), as printed.

Every step scores every remaining layer, L(L+1)/2 candidates for L layers when run to the end. Added to the paper: a
tie rule and a tolerance against rounding (`dtr.selection.criteria`), a journal, and the curve below P_min.
"""

from __future__ import annotations

from dtr.selection.registry import strategy
from dtr.selection.state import Search


@strategy("exact")
def exact(search: Search) -> None:
    """Replace one layer after another, always the one whose replacement scores best."""
    while search.goes_on():
        remaining = search.remaining()
        search.expect_candidates(remaining)
        search.take_best({layer: search.candidate(layer) for layer in remaining})
