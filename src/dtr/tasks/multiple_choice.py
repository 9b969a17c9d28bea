"""Multiple choice: which of the given answers is the likeliest after the question?

Rows `{context, question, choices, answer}` with the answer's index from 0. Metrics as in lm-evaluation-harness:
`acc` takes the choice with the highest log-probability, `acc_norm` the one with the highest log-probability per
character of the choice. `auto` is acc_norm where a row has more than two choices, else acc. A function by import path
is called with the choice that ranks first as `auto` would rank them, and with a list of the right one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from dtr.evaluation.score import Grade, Score, lost_grade, mean_score
from dtr.recipe import Section
from dtr.tasks.base import Item, Likelihood, LikelihoodRequest, Response, all_finite
from dtr.tasks.jsonl import Row
from dtr.tasks.metrics import TextMetric, find_metric, is_import_path, measure
from dtr.tasks.prompts import (
    end_space,
    end_space_notes,
    fill,
    fill_target,
    likelihood_request,
    question_prompt,
)
from dtr.tasks.spec import TASKS, TaskSpec, choose_metric, read_options
from dtr.tasks.splits import draw_splits, group_of, read_splits


class MultipleChoiceOptions(Section):
    """`task.options` of multiple choice."""

    choices: list[str] | None = Field(default=None, min_length=2, max_length=1000)
    """The choices of every row, for rows that hold none, as [no, yes]."""
    answer_field: str = "answer"
    """Field with the index of the right choice, from 0."""


@dataclass(frozen=True, kw_only=True)
class ChoiceTask:
    """A task whose items rank fixed choices; `Item.row` holds `choices` and `answer`."""

    name: str
    kind: str
    metric: str
    chat_template: bool
    splits: Mapping[str, Sequence[Item]]
    notes: tuple[str, ...] = ()
    is_normed: bool
    """Whether choices rank by log-probability per character."""
    function: TextMetric | None = None
    """Grades the first-ranked choice instead of plain agreement."""

    def grade(self, item: Item, responses: Sequence[Response]) -> Grade:
        """1 where the right choice ranks first (the earliest of equals counts as first), else 0."""
        assert len(responses) == len(item.requests), "one response per choice"
        if not all_finite(responses):
            return lost_grade()
        scores = []
        for request, response in zip(item.requests, responses):
            assert isinstance(request, LikelihoodRequest)
            assert isinstance(response, Likelihood)
            num_characters = len(request.target.strip()) if self.is_normed else 1
            scores.append(response.log_prob / num_characters)
        answer, first = item.row["answer"], scores.index(max(scores))
        value = float(first == answer)
        if self.function is not None:
            choices = item.row["choices"]
            value = measure(self.function, self.metric, choices[first], [choices[answer]], item=item.id)
        best_wrong = max((x for index, x in enumerate(scores) if index != answer), default=scores[answer])
        return Grade(value=value, log_likelihood=scores[answer], signal=scores[answer] - best_wrong)

    def summarize(self, grades: Sequence[Grade]) -> Score:
        return mean_score(self.metric, grades)


@TASKS.register("multiple_choice")
def load_multiple_choice(spec: TaskSpec) -> ChoiceTask:
    """Read a multiple-choice task.

    Raises:
        DataError: malformed rows or splits.
        RecipeError: settings that do not fit.
    """
    options = read_options(MultipleChoiceOptions, spec)
    found = read_splits(spec)
    items = {split: [_make_item(row, spec, options) for row in found.rows[split]] for split in found.rows}
    num_choices = max(len(item.requests) for split in items for item in items[split])
    return make_choice_task(spec, items, "acc_norm" if num_choices > 2 else "acc", found.notes)


def make_choice_task(
    spec: TaskSpec, items: Mapping[str, Sequence[Item]], auto: str, notes: tuple[str, ...]
) -> ChoiceTask:
    """A task over these items; `auto` is the metric, or the ranking below a function, where the recipe names none.

    Raises:
        RecipeError: a metric that is not known or cannot be imported.
        DataError: fewer items than asked for, or a function that cannot grade a right answer.
    """
    is_function = is_import_path(spec.metric)
    metric = spec.metric if is_function else choose_metric(spec, ("acc", "acc_norm"), auto)
    function = find_metric(metric) if is_function else None
    if function is not None:
        first = items["validation"][0]
        right = first.row["choices"][first.row["answer"]]
        measure(function, metric, right, [right], item=first.id)
    splits = draw_splits(spec, items)
    return ChoiceTask(
        name=spec.name,
        kind=spec.kind,
        metric=metric,
        chat_template=spec.chat_template,
        splits=splits,
        notes=(*notes, *end_space_notes(splits)),
        is_normed=(auto if is_function else metric) == "acc_norm",
        function=function,
    )


def _make_item(row: Row, spec: TaskSpec, options: MultipleChoiceOptions) -> Item:
    choices = options.choices if options.choices is not None else _read_choices(row)
    field = options.answer_field
    answer = row.whole_number(field)
    # A bool is an int in Python; it is meant as an index only where the recipe gives the choices, as [no, yes].
    if not isinstance(answer, int) or (isinstance(answer, bool) and options.choices is None):
        raise row.wrong(field, answer, "the index of the right choice, a whole number from 0")
    answer = int(answer)
    if not 0 <= answer < len(choices):
        raise row.wrong(field, answer, f"an index from 0 to {len(choices) - 1}, one of {len(choices)} choices")
    context = question_prompt(row) if spec.prompt is None else fill(spec.prompt, row, "task.prompt")
    return choice_item(row, spec, context, "choice", choices, {"choices": list(choices), "answer": answer})


def choice_item(
    row: Row, spec: TaskSpec, context: str, field: str, choices: Sequence[str], answer: dict[str, Any]
) -> Item:
    """An item that ranks choices after a context; `field` holds each one in the target template.

    Raises:
        DataError: a choice is blank.
    """
    is_chat = spec.chat_template
    targets = [fill_target(spec.target, field, text, row, context, chat_template=is_chat) for text in choices]
    for target in targets:
        if not target.strip():
            raise row.wrong("choices", target, "a choice with at least one visible character")
    return Item(
        id=row.id,
        requests=tuple(likelihood_request(context, target, chat_template=is_chat) for target in targets),
        row=answer,
        group=group_of(row, spec),
        end_space=end_space(context, "moved", chat_template=is_chat),
    )


def _read_choices(row: Row) -> list[str]:
    choices = row.require("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise row.wrong("choices", choices, "a list of texts")
    if len(choices) < 2:
        raise row.wrong("choices", choices, "at least two choices")
    return choices
