"""Classification: which of the task's labels is the likeliest after the text?

Rows `{text, label, label_text}`. The labels are those of the train split (where the folder has one) and of the
validation rows, so that nothing is learned from the test split. Metrics `acc` (auto), `acc_norm` and functions, as in
multiple choice. With `head` the model's own classification head is asked instead of the label texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dtr.errors import DataError
from dtr.evaluation.score import Grade, Score, lost_grade, mean_score
from dtr.recipe import Section
from dtr.tasks.base import Item, LabelRequest, Likelihood, Response, all_finite
from dtr.tasks.jsonl import Row
from dtr.tasks.multiple_choice import ChoiceTask, choice_item, make_choice_task
from dtr.tasks.prompts import fill
from dtr.tasks.spec import TASKS, TaskSpec, choose_metric, read_options, refuse_settings
from dtr.tasks.splits import SplitRows, draw_splits, group_of, read_splits, rows_of

DEFAULT_PROMPT = "{text}\nCategory:"


class ClassificationOptions(Section):
    """`task.options` of classification."""

    head: bool = False
    """Ask the head of an AutoModelForSequenceClassification, whose classes are the rows' `label` numbers."""


@dataclass(frozen=True, kw_only=True)
class HeadTask:
    """A task whose items ask a classification head for the right class; `Item.row` holds its name as `answer`."""

    name: str
    kind: str
    metric: str = "acc"
    chat_template: bool
    splits: Mapping[str, Sequence[Item]]
    notes: tuple[str, ...] = ()

    def grade(self, item: Item, responses: Sequence[Response]) -> Grade:
        """1 where the right class has the highest score, else 0."""
        (response,) = responses
        assert isinstance(response, Likelihood)
        if not all_finite(responses):
            return lost_grade()
        return Grade(value=float(response.is_greedy), log_likelihood=response.log_prob)

    def summarize(self, grades: Sequence[Grade]) -> Score:
        return mean_score(self.metric, grades)


@TASKS.register("classification")
def load_classification(spec: TaskSpec) -> ChoiceTask | HeadTask:
    """Read a classification task.

    Raises:
        DataError: malformed rows or splits, a label with two texts, or a test label that was never seen before.
        RecipeError: settings that do not fit.
    """
    options = read_options(ClassificationOptions, spec)
    found = read_splits(spec)
    if options.head:
        return _load_head_task(spec, found)
    assert spec.rows is not None, "labels come with rows"
    train = rows_of(spec, "train", "task.train") if "train" in spec.rows.names() else []
    labels = _collect_labels([*train, *found.rows["validation"]])
    items = {split: [_make_item(row, spec, labels) for row in found.rows[split]] for split in found.rows}
    return make_choice_task(spec, items, "acc", found.notes)


def _load_head_task(spec: TaskSpec, found: SplitRows) -> HeadTask:
    refuse_settings(spec, "target")
    metric = choose_metric(spec, ("acc",), "acc")
    items = {split: [_make_head_item(row, spec) for row in rows] for split, rows in found.rows.items()}
    return HeadTask(
        name=spec.name,
        kind=spec.kind,
        metric=metric,
        chat_template=spec.chat_template,
        splits=draw_splits(spec, items),
        notes=found.notes,
    )


def _make_head_item(row: Row, spec: TaskSpec) -> Item:
    label = row.whole_number("label")
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise row.wrong("label", label, "the number of a class of the model's head, from 0")
    context = row.text("text") if spec.prompt is None else fill(spec.prompt, row, "task.prompt")
    name = row.as_text("label_text", row.data.get("label_text", label))
    request = LabelRequest(context=context, target=name, label=label)
    return Item(id=row.id, requests=(request,), row={"answer": name}, group=group_of(row, spec))


def _collect_labels(rows: Iterable[Row]) -> list[str]:
    """Label texts in the order of their labels."""
    texts: dict[int | str, str] = {}
    first: dict[int | str, Row] = {}
    for row in rows:
        label, text = row.whole_number("label"), row.text("label_text")
        if not isinstance(label, int | str):
            raise row.wrong("label", label, "a number or a text")
        if texts.setdefault(label, text) != text:
            raise row.wrong("label_text", text, f"'{texts[label]}', the text of label {label} at {first[label].where}")
        first.setdefault(label, row)
    labels = [texts[label] for label in sorted(texts, key=lambda label: (isinstance(label, str), label))]
    row = next(iter(first.values()))
    if len({label.strip() for label in labels}) < max(len(labels), 2):
        raise DataError(
            str(row.file.parent),
            got=f"labels with the texts {', '.join(labels[:10])}",
            expected="at least two labels, each with its own text",
            hint="Choices are told apart by their text alone.",
        )
    return labels


def _make_item(row: Row, spec: TaskSpec, labels: list[str]) -> Item:
    label_text = row.text("label_text")
    if label_text not in labels:
        raise row.wrong(
            "label_text",
            label_text,
            f"one of the {len(labels)} labels of the train and validation rows",
            "Add a train.jsonl or validation rows with every label.",
        )
    if spec.prompt is None:
        row.text("text")
    context = fill(spec.prompt if spec.prompt is not None else DEFAULT_PROMPT, row, "task.prompt")
    answer = {"choices": labels, "answer": labels.index(label_text)}
    return choice_item(row, spec, context, "label_text", labels, answer)
