"""What a score carries beside its value: the continuous signal, weights and groups of its items."""

from __future__ import annotations

import json

import pytest

from dtr.errors import DataError
from dtr.evaluation.score import Grade, in_groups, mean_score, perplexity_score
from dtr.tasks.base import Item, Likelihood, LikelihoodRequest
from dtr.tasks.loading import load_task
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


def test_a_field_names_the_groups_of_items_and_windows_have_their_document(tmp_path):
    rows = [{"question": f"q {i}?", "choices": ["a", "b"], "answer": i % 2, "passage": f"p{i // 2}"} for i in range(8)]
    texts = [{"text": f"{name} " * 40} for name in ("one", "two", "three")]
    for folder, chosen in (("choices", rows), ("texts", texts)):
        (tmp_path / folder).mkdir()
        for split, part in (("validation", chosen[: len(chosen) // 2]), ("test", chosen[len(chosen) // 2 :])):
            (tmp_path / folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    items = load_task(str(tmp_path / "choices"), group="passage").splits["validation"]
    assert [item.group for item in items] == ["p0", "p0", "p1", "p1"]
    assert {item.group for item in load_task(str(tmp_path / "choices")).splits["validation"]} == {None}
    with pytest.raises(DataError, match="the field 'pasage'"):
        load_task(str(tmp_path / "choices"), group="pasage")
    windows = load_task("perplexity", path=str(tmp_path / "texts"), options={"window_chars": 60}).splits["test"]
    assert [item.group for item in windows] == ["test.jsonl:1"] * 3 + ["test.jsonl:2"] * 4
