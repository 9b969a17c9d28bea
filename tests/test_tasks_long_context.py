"""Needle and variable tracking: seeded, as long and as deep as they say, answerable, disjoint over splits."""

from __future__ import annotations

import re

import pytest
from tiny import pico_teacher

from dtr.errors import DataError, RecipeError
from dtr.evaluation.evaluator import evaluate
from dtr.evaluation.score import Grade, mean_score
from dtr.tasks import load_task
from dtr.tasks.long_context import score_map
from dtr.tasks.recall import QUERY

SMALL = {"lengths_tokens": [256, 512], "depths": [0.0, 0.5, 1.0]}


def passage_of(item) -> str:
    return item.requests[0].context.split(QUERY)[0]


@pytest.mark.parametrize("kind", ["needle", "variables"])
def test_every_cell_has_its_items(kind):
    task = load_task(kind)
    assert {split: len(items) for split, items in task.splits.items()} == {"validation": 30, "test": 60}
    cells = [(item.row["length_tokens"], item.row["depth"]) for item in task.splits["test"]]
    assert {cells.count(cell) for cell in cells} == {4}
    assert {length for length, _ in cells} == {1024, 2048, 4096}


@pytest.mark.parametrize("kind", ["needle", "variables"])
def test_length_and_depth_are_as_said(kind):
    # In short texts the other statements take their share of the place before it.
    for item in load_task(kind, options={**SMALL, "lengths_tokens": [1024, 2048]}).splits["test"]:
        (request,) = item.requests
        counted = len(re.findall(r"[A-Za-z]+|\d|[^\w\s]", request.context + request.target))
        assert abs(counted - item.row["length_tokens"]) < 0.1 * item.row["length_tokens"]
        answer = item.row["answer"]
        assert request.target == f" {answer}"
        passage = passage_of(item)
        assert passage.count(f" {answer}.") == 1
        assert passage.index(answer) / len(passage) == pytest.approx(item.row["depth"], abs=0.08)


def test_a_needle_stands_among_others_of_its_form():
    item = load_task("needle", options={**SMALL, "num_facts": 6}).splits["test"][1]
    assert passage_of(item).count("The code word of the") == 6
    assert passage_of(item).count(f"{item.row['question']} {item.row['answer']}.") == 1


@pytest.mark.parametrize("num_hops", [0, 1, 4])
def test_a_chain_of_variables_leads_to_the_answer_in_order(num_hops):
    options = {**SMALL, "depths": [0.0, 0.5], "num_hops": num_hops, "num_facts": 3}
    for item in load_task("variables", options=options).splits["test"]:
        values = {}
        for name, word, other in re.findall(
            r"The (\w+ \w+) holds the (?:word (\w+)|same word as the (\w+ \w+))\.", passage_of(item)
        ):
            assert name not in values
            values[name] = word or values[other]
        assert len(values) == 3 * (num_hops + 1)
        assert values[re.search(r"The (\w+ \w+) holds the word$", item.requests[0].context)[1]] == item.row["answer"]


@pytest.mark.parametrize("kind", ["needle", "variables"])
def test_seeded_and_disjoint(kind):
    one, two, other = (load_task(kind, options=SMALL, seed=seed) for seed in (0, 0, 1))
    assert one.splits == two.splits
    assert one.splits["test"][0].requests != other.splits["test"][0].requests
    pairs = {split: {(i.row["question"], i.row["answer"]) for i in items} for split, items in one.splits.items()}
    assert not pairs["validation"] & pairs["test"]


def test_the_map_of_a_score():
    items = load_task("needle", options=SMALL, num_test=7).splits["test"]
    score = mean_score("exact_match", [Grade(value=float(n % 2)) for n in range(7)])
    found = score_map(items, score)
    assert (found["lengths"], found["depths"]) == ([256, 512], [0.0, 0.5, 1.0])
    # The seventh item is in the first cell again.
    assert found["values"] == [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    assert score_map(load_task("recall", num_test=7).splits["test"], score) is None


def test_a_model_is_scored():
    task = load_task("needle", options={"lengths_tokens": [128], "depths": [0.5]}, num_validation=2, num_test=2)
    assert evaluate(pico_teacher(max_position_embeddings=2048), task).num_items == 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"options": {"depths": [1.5]}}, RecipeError, "depths from 0 to 1"),
        ({"options": {"lengths_tokens": [64]}}, RecipeError, "at least 128 tokens"),
        ({"options": {"num_fact": 2}}, RecipeError, "Did you mean 'num_facts'"),
        ({"test": "validation"}, DataError, "another split than validation"),
        ({"prompt": "{x}"}, RecipeError, r"task\.prompt"),
        ({"validation": "dev"}, RecipeError, "a split of needle"),
    ],
)
def test_what_cannot_be_meant(settings, error, message):
    with pytest.raises(error, match=message):
        load_task("needle", **settings)
