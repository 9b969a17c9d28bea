"""Layers that are recorded and replayed: the same scores, whatever order they are asked in."""

from __future__ import annotations

import random

import pytest
import torch
from test_branching import mixers_of, scorer
from tiny import pico_model

from dtr.arch import LayerRunner, decoder_layers, with_mixer
from dtr.evaluation.batches import TokenPair
from dtr.evaluation.likelihood import LikelihoodScorer
from dtr.evaluation.recording import LayerPasses


class Rerun:
    """Stands in for a CUDA graph: keeps the function, and runs it where a graph would be launched."""

    num_replays = 0

    def record(self, function):
        self._function = function

    def replay(self):
        Rerun.num_replays += 1
        self._function()


class Refuses:
    def record(self, function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.fixture(scope="module")
def model():
    return pico_model(num_layers=4)


@pytest.fixture(scope="module")
def questions():
    rng = random.Random(1)
    pairs = []
    for _ in range(6):
        context = tuple(rng.randrange(1, 257) for _ in range(rng.randint(20, 40)))
        pairs += [TokenPair(context=context, target=tuple(rng.randrange(1, 257) for _ in range(3))) for _ in range(3)]
    return pairs, [list(range(at, at + 3)) for at in range(0, 18, 3)]


def path(score):
    """What a search asks for: candidates of a base, a commit, candidates above and below, the teacher again."""
    asked = [((), ()), ((2,), ()), ((1,), ()), ((3,), ()), ((2,), ()), ((1, 2), (2,)), ((2, 3), (2,)), ((0, 2), (2,))]
    asked += [
        ((1, 2), (1, 2)),
        ((0, 1, 2), (1, 2)),
        ((1, 2, 3), (1, 2)),
        ((0, 1, 2, 3), (0, 1, 2)),
        ((), ()),
        ((0,), ()),
    ]
    return [[x.log_prob for x in score(frozenset(linear), base=frozenset(base))] for linear, base in asked]


@pytest.mark.parametrize("cache_bytes", [1, 30_000, 10**9])
@pytest.mark.parametrize("shared", [False, True])
def test_replayed_layers_give_the_same_scores(model, questions, cache_bytes, shared):
    mixers = mixers_of(model, "gated_deltanet")
    options = {"cache_bytes": cache_bytes, "batch_tokens": 200, "questions": questions[1] if shared else None}
    plain, recorded = (scorer(model, mixers, questions, **options) for _ in range(2))
    recorded._passes = LayerPasses(LayerRunner(model), Rerun)
    before = Rerun.num_replays
    assert path(recorded) == path(plain)
    assert Rerun.num_replays - before > 50
    assert recorded.pass_equivalents == plain.pass_equivalents


def test_what_cannot_be_recorded_runs_as_it_is(model, questions):
    mixers = mixers_of(model, "gated_deltanet")
    plain, refused = (scorer(model, mixers, questions) for _ in range(2))
    refused._passes = LayerPasses(LayerRunner(model), Refuses)
    with pytest.warns(UserWarning, match="not permitted when stream is capturing$") as told:
        assert path(refused) == path(plain)
    assert len(told) == 1
    assert refused._passes.refusal == "operation not permitted when stream is capturing"


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
def test_cuda_graphs_give_the_same_scores(questions, shared):
    device = torch.device("cuda")
    model = pico_model(num_layers=4).to(device)
    layers = list(decoder_layers(model))
    linear = {i: with_mixer(layers[i], mixer) for i, mixer in mixers_of(model, "gated_deltanet").items()}
    make = {"pad_token_id": 0, "device": device, "questions": questions[1] if shared else None}
    plain, recorded = (LikelihoodScorer(LayerRunner(model), linear, questions[0], **make) for _ in range(2))
    plain._passes = LayerPasses(LayerRunner(model), None)
    for got, want in zip(path(recorded), path(plain), strict=True):
        assert got == pytest.approx(want, abs=1e-4)
    assert recorded._passes.refusal is None
    assert recorded._passes._buffers
