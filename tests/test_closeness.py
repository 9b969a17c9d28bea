"""How far hybrids are from their teacher, against the plain way of computing it."""

from __future__ import annotations

import pytest
import torch
from tiny import pico_teacher, token_blocks

from dtr.bench.closeness import POSITIONS, Sequences, divergences, layer_errors
from dtr.distillation.trainer import distill
from dtr.hybrid.modeling import make_hybrid

ROWS = [row[:length] for row, length in zip(token_blocks().held_out.tolist(), (32, 3, 17, 1, 25), strict=False)]


@pytest.fixture(scope="module")
def made():
    teacher = pico_teacher()
    return teacher, distill(teacher, token_blocks(), num_tokens=2048, batch_size=4, learning_rate=5e-3)


def plain_divergence(teacher, bank, layers):
    """KL and agreement token by token, one sequence at a time and without padding."""
    hybrid = make_hybrid(teacher.model, {i: bank.mixers[i] for i in layers}, {i: bank.spec(i) for i in layers})
    values = []
    for row in ROWS:
        ids = torch.tensor([row])
        with torch.no_grad():
            theirs, ours = (m(ids, use_cache=False).logits[0].log_softmax(-1) for m in (teacher.model, hybrid))
        kl = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
        values += zip(range(len(row)), kl.tolist(), (theirs.argmax(-1) == ours.argmax(-1)).tolist())
    return values


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (2,), ()])
def test_divergence_is_that_of_the_hybrid_itself(made, layers):
    teacher, bank = made
    expected = plain_divergence(teacher, bank, layers)
    text = Sequences.of(ROWS)
    found = divergences(teacher, bank.mixers, text, {"it": frozenset(layers)}, batch_size=2)["it"]
    assert found.kl == pytest.approx(sum(kl for _, kl, _ in expected) / len(expected), rel=1e-4, abs=1e-7)
    assert found.agreement == pytest.approx(sum(same for *_, same in expected) / len(expected))
    early = [kl for position, kl, _ in expected if 4 <= position < 16]
    assert found.by_position["4-15"] == pytest.approx(sum(early) / len(early), rel=1e-4, abs=1e-7)
    assert list(found.by_position) == ["0", "1-3", "4-15", "16-63"]


def test_errors_of_layers_are_those_of_training(made):
    teacher, bank = made
    held_out = token_blocks().held_out
    found = layer_errors(teacher, bank.mixers, Sequences.of(held_out.tolist()), batch_size=3)
    for layer, error in found.items():
        assert error.nmse == pytest.approx(bank.nmse_after[layer], rel=1e-4)
        assert len(error.nmse_by_position) == sum(first < held_out.shape[1] for first in POSITIONS)
        # The first token is the teacher's.
        assert error.nmse_by_position["0"] == pytest.approx(0, abs=1e-9)
        assert error.nmse_by_position["1-3"] > 1e-3
