"""Where the teacher's heads look in long texts: at the place of the answer, and far back. One pass, nothing is trained.

Linear layers that keep a state of fixed size lose what few heads fetch from far back ("retrieval heads", Wu et al.,
arXiv 2404.15574); the layers of these heads are the ones that should keep attention.

Shapes: T tokens, H heads, K head dim, D hidden dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dtr.arch import attention_of, capture_attention, require_family, run_body
from dtr.errors import DataError
from dtr.ops.rotary import rotate
from dtr.tasks.base import Item, LikelihoodRequest
from dtr.teacher import Teacher

DISTANCES = (512, 2048, 8192)
"""Tokens beyond which attention counts as far."""
NUM_SINKS = 4
"""First tokens, which heads look at when they look for nothing (arXiv 2309.17453)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionReach:
    """Shares of the attention that the last token before an answer gives, means over the items; 0 to 1."""

    to_answer: torch.Tensor
    """(num_layers, H): to where the answer stands in the text."""
    beyond: dict[int, torch.Tensor]
    """By distance in tokens, (num_layers, H): to tokens further back, without the first few."""
    num_items: int

    def layers(self) -> list[int]:
        """All layers, those first whose heads together look most at the answer: the ones to keep attention in."""
        return self.to_answer.sum(1).argsort(descending=True, stable=True).tolist()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: tables of rounded numbers, a row for each layer."""
        tables = {"to_answer": self.to_answer} | {f"beyond_{far}": table for far, table in self.beyond.items()}
        rounded = {name: [[round(x, 4) for x in row] for row in table.tolist()] for name, table in tables.items()}
        return {"num_items": self.num_items} | rounded


@torch.no_grad()
def attention_reach(teacher: Teacher, items: Iterable[Item]) -> AttentionReach:
    """Read each item's context with the teacher and look at every head's attention from its last token.

    Args:
        teacher: whole on its device.
        items: with one likelihood request each, whose target stands somewhere in its context, as in `needle`.

    Raises:
        DataError: no item has its answer in its text.
        ModelError: a model whose projections are not known by name.
    """
    config = teacher.model.config
    require_family(config, "attention_reach", hint="The projections of other types have names of their own.")
    geometry, found = teacher.geometry, _Shares(teacher)
    for item in items:
        [request] = [one for one in item.requests if isinstance(one, LikelihoodRequest)]
        ids, answer = _tokens_and_places(teacher.tokenizer, request)
        if not answer.any():
            continue
        answer = answer.to(teacher.device)

        def visit(layer: int, hidden_BTD: torch.Tensor, rotary: Any, _output: torch.Tensor) -> None:
            weights = _last_weights(attention_of(teacher.model, layer), hidden_BTD, rotary, geometry.head_dim)
            found.add(layer, weights, answer)  # noqa: B023  called before the next item

        with capture_attention(teacher.model, range(teacher.num_layers), visit):
            run_body(teacher.model, torch.tensor([ids], device=teacher.device))
        found.num_items += 1
    if not found.num_items:
        raise DataError("items", got="none with its answer in its text", expected="a task like needle")
    return found.means()


class _Shares:
    def __init__(self, teacher: Teacher) -> None:
        size = (teacher.num_layers, teacher.geometry.num_heads)
        self.to_answer = torch.zeros(size, dtype=torch.float64)
        self.beyond = {far: torch.zeros(size, dtype=torch.float64) for far in DISTANCES}
        self.num_items = 0

    def add(self, layer: int, weights_HT: torch.Tensor, answer_T: torch.Tensor) -> None:
        num_tokens = weights_HT.shape[1]
        self.to_answer[layer] += weights_HT[:, answer_T].sum(1).double().cpu()
        for far, table in self.beyond.items():
            table[layer] += weights_HT[:, NUM_SINKS : max(NUM_SINKS, num_tokens - far)].sum(1).double().cpu()

    def means(self) -> AttentionReach:
        beyond = {far: table / self.num_items for far, table in self.beyond.items()}
        return AttentionReach(to_answer=self.to_answer / self.num_items, beyond=beyond, num_items=self.num_items)


def _tokens_and_places(tokenizer: Any, request: LikelihoodRequest) -> tuple[list[int], torch.Tensor]:
    """Token ids of the context, and which of them (T,) touch the first place where the target stands."""
    encoded = tokenizer(request.context, return_offsets_mapping=True)
    wanted = request.target.strip()
    start = request.context.find(wanted)
    end = start + len(wanted)
    touches = [start >= 0 and first < end and last > start for first, last in encoded["offset_mapping"]]
    return encoded["input_ids"], torch.tensor(touches)


def _last_weights(
    attention: Any, hidden_BTD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], head_dim: int
) -> torch.Tensor:
    """Softmax weights (H, T) of the last token's query over all keys, in float32."""
    cos, sin = rotary

    def heads(name: str, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        projected = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, head_dim))
        norm = getattr(attention, f"{name}_norm", None)
        return rotate(projected if norm is None else norm(projected), *angles)[0].float()

    q_1HK = heads("q", hidden_BTD[:, -1:], (cos[:, -1:], sin[:, -1:]))
    k_TGK = heads("k", hidden_BTD, rotary)
    k_TGK = k_TGK.repeat_interleave(q_1HK.shape[1] // k_TGK.shape[1], dim=1)
    scores_HT = torch.einsum("hk,thk->ht", q_1HK[0], k_TGK) * attention.scaling
    return scores_HT.softmax(-1)
