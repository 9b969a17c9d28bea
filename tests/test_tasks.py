"""Task kinds: what they ask, how they grade, and what `load_task` refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from dtr.errors import DataError, RecipeError
from dtr.tasks import extraction, load_task
from dtr.tasks.base import Generation, GenerationRequest, Likelihood, fingerprint
from dtr.tasks.generation import normalize

ARC = [
    {"context": "", "question": "What is cold?", "choices": ["ice", "a very hot fire", "steam"], "answer": 0},
    {"context": "", "question": "What is wet?", "choices": ["sand", "rain", "dust"], "answer": 1},
]
NEWS = [
    {"text": "The team won.", "label": 1, "label_text": "Sports"},
    {"text": "Shares fell.", "label": 2, "label_text": "Business"},
    {"text": "A vote was held.", "label": 0, "label_text": "World"},
]
QA = [{"context": "Ann is five.", "question": "How old is Ann?", "answers": ["five", "5 years"]}]
SUMS = [{"prompt": "2 + 2 * 500?", "answer": "2 * 500 = 1000.\n#### 1,002", "final": "1,002"}]


def write(folder: Path, **splits: list[dict]) -> str:
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def pair(folder: Path, rows: list[dict]) -> str:
    """A folder whose validation rows ask for more than the test rows do."""
    more = {"context", "question", "text", "prompt"}
    other = [
        {key: f"{value} And so?" if key in more and value else value for key, value in row.items()} for row in rows
    ]
    return write(folder, validation=other, test=rows)


def likely(log_prob: float, *, is_greedy: bool = False, num_tokens: int = 1) -> Likelihood:
    return Likelihood(log_prob=log_prob, is_greedy=is_greedy, num_tokens=num_tokens)


def test_loading_a_task_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from dtr.tasks import load_task; load_task('recall'); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("row", "settings", "context", "target"),
    [
        ({"context": "", "question": "Why?"}, {}, "Question: Why?\nAnswer:", " yes"),
        ({"question": "Why?"}, {}, "Question: Why?\nAnswer:", " yes"),
        ({"context": "It rains.", "question": "Why?"}, {}, "It rains.\nQuestion: Why?\nAnswer:", " yes"),
        ({"context": "It rains, so"}, {}, "It rains, so", " yes"),
        ({"context": "She", "question": "Which ending?"}, {"prompt": "{context}"}, "She", " yes"),
        ({"question": "Why?"}, {"prompt": "Q: {question} ", "target": "{choice}."}, "Q: Why?", " yes."),
        ({"question": "Why?"}, {"prompt": "{{{question}}}"}, "{Why?}", " yes"),
        ({"question": "Why?"}, {"chat_template": True}, "Question: Why?\nAnswer:", "yes"),
    ],
)
def test_multiple_choice_prompts(tmp_path, row, settings, context, target):
    task = load_task(
        pair(tmp_path, [{**row, "choices": ["yes", "no"], "answer": 0}]), kind="multiple_choice", **settings
    )
    first, second = task.splits["test"][0].requests
    assert (first.context, first.target) == (context, target)
    assert second.target == target.replace("yes", "no")


def test_acc_takes_the_likeliest_choice_and_acc_norm_the_likeliest_per_character(tmp_path):
    source = pair(tmp_path, ARC)
    responses = [likely(-4.0), likely(-9.0), likely(-6.0)]
    acc, norm = load_task(source, metric="acc"), load_task(source)
    item = norm.splits["test"][0]
    assert norm.metric == "acc_norm"
    assert acc.grade(item, responses).value == 1.0
    assert acc.grade(item, responses).log_likelihood == -4.0
    # Per character: -4/3, -9/15 and -6/5.
    assert norm.grade(item, responses).value == 0.0
    assert norm.grade(item, responses).log_likelihood == pytest.approx(-4 / 3)
    score = norm.summarize([norm.grade(item, responses), norm.grade(item, [likely(-1), likely(-9), likely(-6)])])
    assert (score.value, score.num_items, score.metric) == (0.5, 2, "acc_norm")


def test_the_earliest_of_equal_choices_counts_as_chosen(tmp_path):
    task = load_task(pair(tmp_path, ARC), metric="acc")
    first, second = task.splits["test"]
    assert task.grade(first, [likely(-1.0)] * 3).value == 1.0
    assert task.grade(second, [likely(-1.0)] * 3).value == 0.0


def test_two_choices_are_scored_by_acc(tmp_path):
    rows = [{"question": "Why?", "choices": ["yes", "no"], "answer": 1}]
    assert load_task(pair(tmp_path, rows)).metric == "acc"


def test_rows_without_choices_can_take_them_from_the_recipe(tmp_path):
    rows = [{**QA[0], "label": 1}, {**QA[0], "label": False}]
    options = {"choices": ["no", "yes"], "answer_field": "label"}
    task = load_task(pair(tmp_path, rows), kind="multiple_choice", options=options)
    assert [request.target for request in task.splits["test"][0].requests] == [" no", " yes"]
    assert [item.row["answer"] for item in task.splits["test"]] == [1, 0]


def test_classification_ranks_the_labels_in_order(tmp_path):
    task = load_task(pair(tmp_path, NEWS))
    assert (task.kind, task.metric) == ("classification", "acc")
    item = task.splits["test"][0]
    assert [request.target for request in item.requests] == [" World", " Sports", " Business"]
    assert item.requests[0].context == "The team won.\nCategory:"
    assert task.grade(item, [likely(-3), likely(-2), likely(-4)]).value == 1.0
    assert task.grade(item, [likely(-3), likely(-2), likely(-1)]).value == 0.0


def test_labels_come_from_train_and_validation_but_never_from_test(tmp_path):
    source = write(tmp_path, validation=NEWS[:2], test=NEWS[2:])
    with pytest.raises(DataError, match=r"test\.jsonl:1: got 'World'.*one of the 2 labels.*train\.jsonl"):
        load_task(source)
    write(tmp_path, train=NEWS)
    assert len(load_task(source).splits["test"][0].requests) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([NEWS[0], {**NEWS[1], "label": 1}], r"validation\.jsonl:2: got 'Business'.*'Sports', the text of label 1"),
        ([NEWS[0], {**NEWS[1], "label_text": "Sports"}], "at least two labels, each with its own text"),
        ([NEWS[0]], "at least two labels"),
        ([NEWS[0], {**NEWS[1], "label": None}], r":2: got None in 'label'.*a number or a text"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_told_apart_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_task(pair(tmp_path, rows), kind="classification")


def test_generation_accepts_any_of_several_answers(tmp_path):
    task = load_task(pair(tmp_path, QA))
    assert (task.kind, task.metric) == ("generation", "exact_match")
    item = task.splits["test"][0]
    context = "Ann is five.\nQuestion: How old is Ann?\nAnswer:"
    assert item.requests[0] == GenerationRequest(context=context, max_new_tokens=64, stop=("\n",))
    assert item.requests[1].target == " five"
    for text, value in [(" Five.", 1.0), ("5  YEARS", 1.0), ("six", 0.0), ("five years", 0.0), ("", 0.0)]:
        grade = task.grade(item, [Generation(text=text), likely(-2.5)])
        assert (grade.value, grade.log_likelihood) == (value, -2.5)


def test_generation_can_do_without_the_likelihood(tmp_path):
    task = load_task(pair(tmp_path, QA), options={"score_answer": False, "max_new_tokens": 3, "stop": []})
    (request,) = task.splits["test"][0].requests
    assert (request.max_new_tokens, request.stop) == (3, ())
    assert task.grade(task.splits["test"][0], [Generation(text="five")]).value == 1.0


@pytest.mark.parametrize("field", [None, "answer", "final"])
@pytest.mark.parametrize("pattern", [r"#### (\S+)", r"-?\d[\d,]*"])
def test_the_last_number_is_extracted_from_text_and_reference(tmp_path, field, pattern):
    options = {"extract": pattern, "answer_field": field, "stop": ["Question:"]}
    task = load_task(pair(tmp_path, SUMS), prompt="Question: {prompt}\nAnswer:", options=options)
    item = task.splits["test"][0]
    assert item.row["answers"] == ["1,002"]
    # The likelihood is that of the whole reference text, not of the number alone.
    assert item.requests[1].target == " 2 * 500 = 1000.\n#### 1,002"
    grades = [task.grade(item, [Generation(text=t), likely(-1)]).value for t in ("7 + 9\n#### 1002", "#### 7", "none")]
    assert grades == [1.0, 0.0, 0.0]


def test_a_pattern_that_never_ends_names_itself_and_the_item(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "SECONDS", 0.02)
    hard = "a" * 60 + "b"
    task = load_task(pair(tmp_path, QA), options={"extract": "(a|aa)+$", "score_answer": False})
    item = task.splits["test"][0]
    assert task.grade(item, [Generation(text="aaa")]).value == 0.0
    message = (
        r"task\.options\.extract: got '\(a\|aa\)\+\$', which is not done after 0\.02 s with 61 characters of item "
    )
    with pytest.raises(DataError, match=message + item.id):
        task.grade(item, [Generation(text=hard)])
    with pytest.raises(DataError, match=message + r"validation\.jsonl:1"):
        load_task(pair(tmp_path, [{"prompt": "p", "answer": hard}]), options={"extract": "(a|aa)+$"})


@pytest.mark.parametrize("pattern", ["(?:(?:a{1000}){1000}){1000}", "a{999999999999999999999999}", "[ab]{1000000000}"])
def test_a_pattern_that_would_fill_the_memory_is_refused(tmp_path, pattern):
    with pytest.raises(RecipeError, match=r"task\.options\.extract: got '.*whose repeats multiply to [\d,]{9,}"):
        load_task(pair(tmp_path, QA), options={"extract": pattern})


@pytest.mark.parametrize(
    ("text", "normal"),
    [(" A\n  b. ", "a b"), ("1,234,567", "1234567"), ("1,2", "1,2"), ("Stop!?", "stop"), ("3.5", "3.5"), ("...", "")],
)
def test_normalize(text, normal):
    assert normalize(text) == normal


def test_perplexity_windows_join_to_the_text_and_break_at_white_space(tmp_path):
    text = " ".join(f"word{n}" for n in range(60))
    rows = [{"text": text}, {"text": "short"}]
    task = load_task(pair(tmp_path, rows), options={"window_chars": 100})
    items = task.splits["test"]
    windows = [item.requests[0].target for item in items[:-1]]
    assert "".join(windows) == text
    assert len(windows) == 5
    assert all(len(window) <= 100 and not window.endswith(" ") for window in windows)
    assert all(window.startswith(" word") for window in windows[1:])
    assert items[-1].requests[0].target == "short"
    assert all(item.requests[0].context == "" for item in items)
    assert len({item.id for item in items}) == len(items)


def test_perplexity_weighs_windows_by_tokens(tmp_path):
    task = load_task(pair(tmp_path, [{"text": "a b"}, {"text": "c"}]))
    grades = [
        task.grade(item, [response])
        for item, response in zip(task.splits["test"], [likely(-6, num_tokens=3), likely(-4, num_tokens=1)])
    ]
    assert [(grade.value, grade.weight) for grade in grades] == [(2.0, 3.0), (4.0, 1.0)]
    score = task.summarize(grades)
    assert score.value == pytest.approx(math.exp(10 / 4))
    assert (score.higher_is_better, score.metric) == (False, "perplexity")


def test_perplexity_reads_plain_text(tmp_path):
    (tmp_path / "book.txt").write_text("one two\n<|doc|>\nthree\n<|doc|>\nfour\n", encoding="utf-8")
    task = load_task("perplexity", path=str(tmp_path / "book.txt"), validation="book[0:1]", test="rows[-2:]")
    assert [item.requests[0].target for item in task.splits["test"]] == ["three", "four"]
    assert (task.name, task.kind) == ("book", "perplexity")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "{questions}"}, r"task\.prompt: got '\{questions\}'.*choices, answer.*mean '\{question\}'"),
        ({"prompt": "{question.real}"}, r"task\.prompt: got '\{question\.real\}'"),
        ({"prompt": "{question"}, r"task\.prompt.*literal braces doubled"),
        ({"prompt": "{question:d}"}, r"task\.prompt.*literal braces doubled"),
        ({"target": "{}"}, r"task\.target: got '\{\}'.*choice"),
        ({"metric": "exact_match"}, r"task\.metric: got 'exact_match' for a multiple_choice task.*auto or acc"),
        ({"options": {"anser_field": "x"}}, r"task\.options\.anser_field.*'answer_field'"),
        ({"options": {"choices": "no", "x": 1}}, r"task\.options\.choices: got 'no'.*list.*Also task\.options\.x"),
        ({"kind": "recall"}, r"task\.kind.*Set task\.source: recall"),
        ({"kind": "multiple_choices"}, "Did you mean 'multiple_choice'"),
        ({"path": "elsewhere"}, r"task\.path: got 'elsewhere' next to the source"),
        ({"num_test": 0}, r"task\.num_test: got 0; expected at least 1"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_recipe_errors(tmp_path, settings, message):
    with pytest.raises(RecipeError, match=message):
        load_task(pair(tmp_path, ARC), **settings)


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("perplexity", {}, r"task\.path: got nothing.*Add task\.path"),
        ("perplexity", {"path": ".", "kind": "recall"}, r"task\.kind: got 'recall'; expected auto or perplexity"),
        ("recall", {"kind": "generation"}, r"task\.kind: got 'generation'; expected auto or recall"),
        ("recall", {"path": "."}, r"task\.path"),
        ("recall", {"prompt": "{x}"}, r"task\.prompt.*Leave task\.prompt out"),
        ("recall", {"chat_template": True}, r"task\.chat_template"),
        ("recall", {"validation": "test[0:5]"}, r"task\.validation.*without a range.*num_validation"),
        ("recall", {"options": {"num_facts": 100}}, r"task\.options\.num_facts: got 100.*48"),
    ],
)
def test_sources_that_are_kinds(source, settings, message):
    with pytest.raises(RecipeError, match=message):
        load_task(source, **settings)


def test_generation_and_perplexity_refuse_what_they_would_ignore(tmp_path):
    with pytest.raises(RecipeError, match=r"task\.options\.extract.*regular expression"):
        load_task(pair(tmp_path, QA), options={"extract": "("})
    with pytest.raises(RecipeError, match=r"task\.prompt.*no such setting for a perplexity task"):
        load_task(pair(tmp_path, [{"text": "a"}]), prompt="{text}")


def test_the_fingerprint_follows_rows_prompts_and_metric(tmp_path):
    source = pair(tmp_path, ARC)
    same, again = fingerprint(load_task(source)), fingerprint(load_task(source))
    others = {
        fingerprint(load_task(source, **s)) for s in ({"metric": "acc"}, {"prompt": "{question}"}, {"num_test": 1})
    }
    assert same == again
    assert len(others | {same}) == 4
