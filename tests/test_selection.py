"""Algorithm 1 on score functions that are dictionaries; every expected trace is worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_tables import Table, acc, ppl, random_table, search, table

from dtr.errors import ModelError, RecipeError
from dtr.evaluation.score import Score


def test_stops_below_p_min_and_keeps_the_best_on_the_way():
    score = table(full=0.60, l0=0.55, l1=0.62, l2=0.50, l01=0.56, l12=0.45, l012=0.40)
    trace = search(score)
    # Step 1 takes 1 (0.62), step 2 takes 0 (0.56 against 0.45), step 3 has only 2 left and falls to 0.40 < 0.5.
    assert [(s.index, s.layer, s.linear, s.accepted) for s in trace.steps] == [
        (1, 1, (1,), True),
        (2, 0, (0, 1), True),
        (3, 2, (0, 1, 2), False),
    ]
    assert [{layer: c.value for layer, c in s.candidates.items()} for s in trace.steps] == [
        {0: 0.55, 1: 0.62, 2: 0.50},
        {0: 0.56, 2: 0.45},
        {2: 0.40},
    ]
    assert (trace.m_opt.layers, trace.m_opt.score.value) == ((1, 0), 0.56)
    assert (trace.m_best.layers, trace.m_best.score.value) == ((1,), 0.62)
    assert trace.stop_reason == "p_min"
    assert trace.stop_text == "Step 3: the best candidate, layer 2, has acc 0.4, below the limit of 0.5."
    assert trace.num_candidate_evaluations == 6


def test_score_function_gets_each_set_once_with_the_hybrid_it_came_from():
    score = table(full=0.60, l0=0.55, l1=0.62, l2=0.50, l01=0.56, l12=0.45, l012=0.40)
    search(score, layers=(2, 0, 1))
    assert [(sorted(linear), sorted(base)) for linear, base in score.calls] == [
        ([], []), ([0], []), ([1], []), ([2], []), ([0, 1], [1]), ([1, 2], [1]), ([0, 1, 2], [0, 1])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("likelihoods", "first"), [((-2.0, -1.0, -3.0), 1), ((-2.0, -1.0, -1.0), 1), ((-1.0, -1.0, -1.0), 0)]
)
def test_ties_go_to_likelihood_then_to_the_lower_index(likelihoods: tuple[float, ...], first: int):
    singles = {f"l{layer}": acc(0.4, value) for layer, value in enumerate(likelihoods)}
    assert search(table(full=0.6, **singles)).steps[0].layer == first


def test_a_tie_by_rounding_is_a_tie():
    trace = search(table(full=0.6, l0=acc(0.1 + 0.2, -2.0), l1=acc(0.3, -1.0)), layers=(0, 1))
    assert trace.steps[0].layer == 1


def test_m_best_moves_on_equal_scores():
    trace = search(table(full=0.6, l0=0.6, l1=0.5, l01=0.6), layers=(0, 1))
    assert trace.m_best.layers == trace.m_opt.layers == (0, 1)


def test_all_linear_end():
    trace = search(table(full=0.6, l0=0.55, l1=0.52, l01=0.51), layers=(0, 1))
    assert (trace.stop_reason, trace.stop_text) == ("all_linear", "All 2 candidate layers are linear.")
    assert trace.m_opt.layers == (0, 1)
    assert (trace.m_best.layers, trace.m_best.score.value) == ((), 0.6)


def test_nothing_can_be_replaced():
    trace = search(table(full=0.6, l0=0.4, l1=0.3), layers=(0, 1))
    assert trace.m_opt == trace.m_best
    assert trace.m_opt.layers == ()
    assert [s.accepted for s in trace.steps] == [False]


def test_run_to_end_draws_the_curve_and_changes_nothing_else():
    # {0, 1} falls below 0.5; {0, 1, 2} is above it again, and even above the teacher.
    score = table(full=0.60, l0=0.55, l1=0.40, l2=0.30, l01=0.45, l02=0.44, l012=0.70)
    short, whole = search(score), search(score, run_to_end=True)
    assert [(s.layer, s.score.value, s.accepted) for s in whole.steps] == [
        (0, 0.55, True),
        (1, 0.45, False),
        (2, 0.70, False),
    ]
    assert whole.steps[:2] == short.steps
    assert (whole.m_opt, whole.m_best, whole.stop_text) == (short.m_opt, short.m_best, short.stop_text)
    assert (whole.m_opt.layers, whole.m_best.layers, whole.stop_reason) == ((0,), (), "p_min")
    assert (short.num_candidate_evaluations, whole.num_candidate_evaluations) == (5, 6)


def test_perplexity_is_better_when_lower():
    score = table(full=ppl(20), l0=ppl(19), l1=ppl(24), l2=ppl(21), l01=ppl(26), l02=ppl(22), l012=ppl(25))
    trace = search(score, p_min=22.0)
    assert trace.m_opt.layers == (0, 2)
    assert trace.m_best.layers == (0,)
    assert trace.stop_text == "Step 3: the best candidate, layer 1, has perplexity 25, above the limit of 22."
    # Relative 0.8 lets perplexity grow to 20 / 0.8 = 25, so layer 1 passes on the border.
    relative = search(score, p_min=0.8, p_min_kind="relative")
    assert relative.p_min_value == pytest.approx(25.0)
    assert relative.m_opt.layers == (0, 2, 1)


@pytest.mark.parametrize(("num_right", "num_opt"), [(18, 1), (17, 0)])
def test_relative_p_min_is_not_missed_by_rounding(num_right: int, num_opt: int):
    # 90 % of 20/25 is 18/25 exactly, but not in double precision.
    assert 0.9 * (20 / 25) > 18 / 25
    trace = search(table(full=20 / 25, l0=num_right / 25), layers=(0,), p_min=0.9, p_min_kind="relative")
    assert trace.p_min_value == pytest.approx(0.72)
    assert len(trace.m_opt.layers) == num_opt


def test_57_of_100_keeps_95_percent_of_60():
    trace = search(table(full=60 / 100, l0=57 / 100), layers=(0,), p_min=0.95, p_min_kind="relative")
    assert trace.m_opt.layers == (0,)


def test_m_best_moves_on_a_tie_by_rounding():
    trace = search(table(full=0.1 + 0.2, l0=0.3), layers=(0,), p_min=0.1)
    assert trace.m_best.layers == (0,)


def test_every_share_of_items_reaches_itself():
    for n in range(1, 60):
        for right in range(1, n + 1):
            trace = search(table(full=1.0, l0=right / n), layers=(0,), p_min=right * (1 / n), p_min_kind="relative")
            assert trace.m_opt.layers == (0,), (right, n)


def test_nan_never_wins():
    trace = search(table(full=0.6, l0=float("nan"), l1=0.55, l01=float("nan")), layers=(0, 1))
    assert trace.m_opt.layers == (1,)
    assert trace.stop_reason == "p_min"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"p_min": 1.01, "p_min_kind": "relative"}, "share of at most 1"),
        ({"p_min": 0.0}, "positive number"),
        ({"p_min": float("nan")}, "positive number"),
        ({"p_min_kind": "share"}, "'relative' or 'absolute'"),
        ({"layers": ()}, "at least one layer"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_scored(options: dict[str, Any], words: str):
    score = table(full=0.6)
    with pytest.raises(RecipeError, match=words):
        search(score, **options)
    assert score.calls == []


@pytest.mark.parametrize(
    ("teacher", "p_min", "words"),
    [(acc(0.6), 0.61, "at most 0.6, the teacher's acc"), (ppl(20), 19.9, "at least 20, the teacher's perplexity")],
)
def test_p_min_beyond_the_teacher_is_refused_before_any_candidate(teacher: Score, p_min: float, words: str):
    score = table(full=teacher)
    with pytest.raises(RecipeError, match=words):
        search(score, p_min=p_min)
    assert len(score.calls) == 1


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_a_share_of_nothing_is_refused_with_the_next_step(value: float):
    with pytest.raises(RecipeError, match=f"the teacher's acc on validation, which is {value:g}.*p_min_kind=absolute"):
        search(table(full=value), p_min=0.95, p_min_kind="relative")


def test_a_teacher_without_a_score_is_refused():
    with pytest.raises(ModelError, match="finite"):
        search(table(full=float("nan")))


def test_events():
    events: list[dict[str, Any]] = []
    search(table(full=0.6, l0=0.55, l1=0.52, l01=0.3), layers=(0, 1), on_event=events.append)
    assert [e["event"] for e in events] == ["teacher", "candidate", "candidate", "step", "candidate", "step", "stop"]
    assert events[2] == {
        "event": "candidate", "step": 1, "layer": 1, "score": 0.52, "done": 2, "total": 3, "replayed": False
    }  # fmt: skip
    assert events[5] == {"event": "step", "step": 2, "layer": 1, "score": 0.3, "accepted": False, "num_layers": 2}
    assert (events[6]["reason"], events[6]["num_opt"], events[6]["num_best"]) == ("p_min", 1, 0)
    assert json.loads(json.dumps(events)) == events


def test_to_dict_is_plain_json():
    trace = search(random_table(3, 3), p_min=0.1)
    out = trace.to_dict()
    assert json.loads(json.dumps(out)) == out
    assert "per_item" not in json.dumps(out)
    assert list(out["steps"][0]["candidates"]) == ["0", "1", "2"]
    kept = trace.to_dict(with_items=True)
    assert kept["m_opt"]["score"]["per_item"] == list(trace.m_opt.score.per_item)
    assert json.dumps(kept).count("per_item") == 3


def brute_force(score: Table, num_layers: int, p_min: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Algorithm 1 in other words: fractions as integers, one sort per step, sets recomputed from scratch."""

    def sixths(linear) -> int:
        return round(6 * score.scores[frozenset(linear)].value)

    order: list[int] = []
    best: list[int] = []
    while len(order) < num_layers:
        ranked = sorted(
            (-sixths([*order, x]), -score.scores[frozenset([*order, x])].log_likelihood, x)
            for x in set(range(num_layers)) - set(order)
        )
        grown = [*order, ranked[0][2]]
        if sixths(grown) >= sixths(best):
            best = grown
        if sixths(grown) < p_min * sixths([]) - 1e-6:
            break
        order = grown
    return tuple(order), tuple(best)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), num_layers=st.integers(1, 5), p_min=st.sampled_from((0.2, 0.5, 2 / 3, 0.95, 1.0)))
def test_equals_brute_force(seed: int, num_layers: int, p_min: float):
    score = random_table(seed, num_layers)
    trace = search(score, layers=range(num_layers), p_min=p_min, p_min_kind="relative")
    assert (trace.m_opt.layers, trace.m_best.layers) == brute_force(score, num_layers, p_min)
    assert trace.m_opt.score.value >= trace.p_min_value - 1e-9
    assert trace.m_best.score.value >= trace.teacher.value
    assert trace.m_best.layers == trace.m_opt.layers[: len(trace.m_best.layers)]
    assert trace.m_opt.score == score.scores[frozenset(trace.m_opt.layers)]
    calls = len(score.calls)
    whole = search(score, layers=range(num_layers), p_min=p_min, p_min_kind="relative", run_to_end=True)
    assert whole.num_candidate_evaluations == num_layers * (num_layers + 1) // 2 == len(score.calls) - calls - 1
    assert (whole.m_opt, whole.m_best, whole.stop_reason) == (trace.m_opt, trace.m_best, trace.stop_reason)
