"""The built-in recall task: the same everywhere, disjoint over splits, answerable from the passage alone."""

from __future__ import annotations

import re

import pytest

from dtr.errors import DataError
from dtr.tasks import load_task
from dtr.tasks.base import Likelihood
from dtr.tasks.recall import ANSWERS, QUERY, RecallOptions, recall_items

GOLDEN = (
    "The secret word of the green lantern is window. The purple drawer was traded for a desert. "
    "The gray door stands beside the cotton. The red bottle is hidden behind the tomato. "
    "The white box smells like river. The yellow bell was named after a camera.\n"
    "As said above: The yellow bell was named after a",
    " camera",
)


def pairs(items) -> set[tuple[str, str]]:
    """(thing, answer) of every fact of every passage."""
    found = set()
    for item in items:
        passage = item.requests[0].context.split(QUERY)[0]
        for sentence in passage.split(". "):
            words = sentence.rstrip(".").split()
            if words[-1] in ANSWERS:
                colored = re.search(r"[Tt]he (\w+ \w+) (?:is|smells|was|stands|has|reminds)", sentence)
                assert colored, sentence
                found.add((colored[1], words[-1]))
    return found


def test_items_are_the_same_on_every_machine():
    request = recall_items("validation", 1)[0].requests[0]
    assert (request.context, request.target) == GOLDEN


def test_the_answer_stands_in_the_passage_once_after_the_asked_words():
    for item in recall_items("test", 200):
        (request,) = item.requests
        passage, asked = request.context.split(QUERY)
        assert asked == item.row["question"]
        assert passage.count(f"{asked}{request.target}.") == 1
        assert passage.count(asked) == 1
        assert passage.count(request.target) == 1
        assert not request.context.endswith(" ")
        assert request.target.startswith(" ")


@pytest.mark.parametrize("options", [RecallOptions(), RecallOptions(num_facts=20, num_filler_sentences=3)])
def test_no_fact_occurs_in_two_splits(options):
    splits = {split: recall_items(split, 300, options=options) for split in ("train", "validation", "test")}
    facts = {split: pairs(items) for split, items in splits.items()}
    assert all(len(found) > 500 for found in facts.values())
    assert not facts["train"] & facts["validation"]
    assert not facts["train"] & facts["test"]
    assert not facts["validation"] & facts["test"]
    assert len({item.requests for items in splits.values() for item in items}) == 900


def test_the_first_items_do_not_depend_on_how_many_there_are():
    assert recall_items("test", 20)[:5] == recall_items("test", 5)
    assert recall_items("test", 5, seed=1) != recall_items("test", 5)


def test_passages_have_as_many_facts_and_fillers_as_asked():
    items = recall_items("test", 10, options=RecallOptions(num_facts=15, num_filler_sentences=12))
    for item in items:
        passage = item.requests[0].context.split(QUERY)[0]
        assert passage.count(".") == 27
        assert len(pairs([item])) == 15


def test_sizes_and_grades():
    task = load_task("recall")
    assert {split: len(items) for split, items in task.splits.items()} == {"validation": 64, "test": 128}
    item = task.splits["test"][0]
    hit = task.grade(item, [Likelihood(log_prob=-0.5, is_greedy=True, num_tokens=1)])
    miss = task.grade(item, [Likelihood(log_prob=-0.9, is_greedy=False, num_tokens=1)])
    assert (hit.value, hit.log_likelihood, miss.value) == (1.0, -0.5, 0.0)
    assert task.summarize([hit, miss]).value == 0.5
    small = load_task("recall", num_validation=3, num_test=4, validation="train", options={"num_facts": 2})
    assert {split: len(items) for split, items in small.splits.items()} == {"validation": 3, "test": 4}
    assert small.splits["validation"][0].id == "train:0"


def test_the_same_split_twice_is_refused():
    with pytest.raises(DataError, match=r"task\.test: got 'validation' as for validation"):
        load_task("recall", test="validation")
