"""Paired differences and plot intervals, against published or hand-computed numbers and by simulation."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from dtr.evaluation.paired import mean_confidence_interval, paired_difference, relative_drop
from dtr.evaluation.score import Grade, Score, in_groups, mean_score, perplexity_score


def accuracy(items: Sequence[float]) -> Score:
    return mean_score("acc", [Grade(value=float(item)) for item in items])


def test_difference_by_hand():
    # Differences 0, -1, -1, 1, 0: mean -0.2, sample variance 0.7, stderr sqrt(0.14), t(0.975, 4) = 2.776445.
    found = paired_difference(accuracy([1, 0, 0, 1, 0]), accuracy([1, 1, 1, 0, 0]))
    assert found.mean == pytest.approx(-0.2)
    assert found.stderr == pytest.approx(math.sqrt(0.14))
    assert found.ci95_low == pytest.approx(-0.2 - 2.776445 * math.sqrt(0.14), rel=1e-3)
    assert found.ci95_high == pytest.approx(-0.2 + 2.776445 * math.sqrt(0.14), rel=1e-3)
    assert found.num_items == 5
    assert found.relative_drop == pytest.approx(1 / 3)


def test_mean_is_the_difference_of_the_values_and_swapping_flips_it():
    rng = random.Random(0)
    a, b = (accuracy([rng.random() < p for _ in range(80)]) for p in (0.6, 0.7))
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.mean == pytest.approx(a.value - b.value)
    assert (there.mean, there.ci95_low, there.stderr) == pytest.approx((-back.mean, -back.ci95_high, back.stderr))


def test_pairing_narrows_the_interval_of_similar_models():
    rng = random.Random(1)
    teacher = [rng.random() < 0.6 for _ in range(200)]
    hybrid = [item if rng.random() < 0.95 else not item for item in teacher]
    unpaired = math.hypot(accuracy(teacher).stderr, accuracy(hybrid).stderr)
    assert paired_difference(accuracy(hybrid), accuracy(teacher)).stderr < 0.5 * unpaired


def test_interval_covers_the_truth_in_about_95_percent():
    # Each item moves by -1, 0 or 1 with probabilities 0.15, 0.75 and 0.1, so the true mean is -0.05.
    rng = random.Random(2)
    hits = 0
    for _ in range(1000):
        moves = rng.choices((-1, 0, 1), weights=(0.15, 0.75, 0.1), k=100)
        found = paired_difference(accuracy([max(m, 0) for m in moves]), accuracy([max(-m, 0) for m in moves]))
        hits += found.ci95_low <= -0.05 <= found.ci95_high
    assert 930 <= hits <= 970


def test_edges():
    same = paired_difference(accuracy([1, 0]), accuracy([1, 0]))
    assert (same.mean, same.stderr, same.ci95_low, same.ci95_high, same.relative_drop) == (0, 0, 0, 0, 0)
    one = paired_difference(accuracy([0]), accuracy([1]))
    assert one.mean == -1
    assert (one.ci95_low, one.ci95_high) == (-math.inf, math.inf)
    assert json.loads(json.dumps(one.to_dict(), allow_nan=False))["stderr"] is None
    assert relative_drop(accuracy([1]), accuracy([0])) is None
    with pytest.raises(AssertionError, match="2 against 1 items"):
        paired_difference(accuracy([1, 1]), accuracy([1]))
    bare = Score(metric="acc", value=1.0, stderr=0.0, num_items=3, log_likelihood=0.0)
    with pytest.raises(AssertionError, match="per-item"):
        paired_difference(bare, bare)


def test_perplexity_direction():
    teacher, hybrid = (perplexity_score([Grade(value=v, weight=10) for v in nll]) for nll in ((2, 3), (2.1, 3.3)))
    found = paired_difference(hybrid, teacher)
    assert found.mean == pytest.approx(0.2)
    # Goodness is 1/perplexity: a rise by 0.2 nats loses 1 - exp(-0.2) of it.
    assert found.relative_drop == pytest.approx(1 - math.exp(-0.2))
    low, high = mean_confidence_interval(hybrid)
    assert 0 < low < hybrid.value < high
    assert low * high == pytest.approx(hybrid.value**2)


def test_groups_and_weights_widen_the_interval_as_they_should():
    """Twins tell as much as one item, and a window counts by its tokens."""
    ours, theirs = [1, 0, 1, 1, 0, 1], [1, 1, 0, 1, 1, 1]
    once = paired_difference(accuracy(ours), accuracy(theirs))
    names = [str(index) for index in range(6) for _ in range(2)]
    twice = [in_groups(accuracy([x for x in items for _ in range(2)]), names) for items in (ours, theirs)]
    twins = paired_difference(*twice)
    assert (twins.mean, twins.stderr, twins.ci95_low) == pytest.approx((once.mean, once.stderr, once.ci95_low))
    long, short = Grade(value=2.5, weight=300), Grade(value=1.0, weight=100)
    found = paired_difference(*(perplexity_score([replace(long, value=v), short]) for v in (2.5, 2.1)))
    assert found.mean == pytest.approx(0.3)


# Newcombe (1998), Table I: Wilson's interval for 81/263, 15/148, 0/20 and 1/29.
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(hits: int, n: int, low: float, high: float):
    score = accuracy([1] * hits + [0] * (n - hits))
    assert mean_confidence_interval(score) == pytest.approx((low, high), abs=5e-5)
    mirrored = mean_confidence_interval(accuracy([0] * hits + [1] * (n - hits)))
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_fractional_items_use_the_standard_error():
    score = mean_score("f1", [Grade(value=v) for v in (0.2, 0.4, 0.6)])
    low, high = mean_confidence_interval(score)
    assert (low, high) == pytest.approx((0.4 - 1.959964 * score.stderr, 0.4 + 1.959964 * score.stderr))
