"""What a score carries beside its value: the continuous signal, weights and groups of its items."""

from __future__ import annotations

import pytest

from dtr.evaluation.score import Grade, in_groups, mean_score, perplexity_score
from dtr.tasks.base import Item, Likelihood, LikelihoodRequest
from dtr.tasks.multiple_choice import ChoiceTask


def test_the_signal_of_a_choice_is_its_margin_over_the_best_wrong_one():
    task = ChoiceTask(name="t", kind="multiple_choice", metric="acc", chat_template=False, splits={}, is_normed=False)
    requests = tuple(LikelihoodRequest(context="q", target=f" {x}") for x in "abc")
    responses = [Likelihood(log_prob=x, is_greedy=False, num_tokens=1) for x in (-1.0, -2.5, -7.0)]
    signals = {
        answer: task.grade(Item(id="0", requests=requests, row={"answer": answer}), responses).signal
        for answer in range(3)
    }
    assert signals == {0: 1.5, 1: -1.5, 2: -6.0}


def test_items_without_a_signal_give_their_log_likelihood_and_silent_ones_none():
    assert mean_score("acc", [Grade(value=1.0, log_likelihood=-2.0), Grade(value=0.0, signal=4.0)]).signals == (
        -2.0,
        4.0,
    )
    silent = mean_score("acc", [Grade(value=1.0), Grade(value=0.0)])
    assert silent.signals == ()
    assert silent.signal == 0.0


def test_the_mean_signal_weighs_items_as_the_metric_does():
    score = perplexity_score([Grade(value=1.0, log_likelihood=-1.0, weight=3.0), Grade(value=5.0, log_likelihood=-5.0)])
    assert score.signal == pytest.approx(score.log_likelihood) == pytest.approx(-2.0)


def test_groups_are_numbered_by_first_appearance_and_nameless_items_stand_alone():
    score = mean_score("acc", [Grade(value=1.0)] * 5)
    assert in_groups(score, ["b", "a", None, "b", None]).groups == (0, 1, 2, 0, 3)
    assert in_groups(score, [None] * 5) == score
