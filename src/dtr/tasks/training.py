"""A task's own training rows as text to distil on: prompt and right answer, as the task would show them to a model.

Never a row of validation or test: copies of those are left out. No torch in here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from dtr.errors import DataError
from dtr.tasks.base import Item, LabelRequest, LikelihoodRequest, Task
from dtr.tasks.loading import load_task

TRAIN = "train"


def training_prompts(source: str, *, seen: Iterable[Task], **settings: Any) -> list[LikelihoodRequest]:
    """What a model reads and should write for every row of the train split, in its order.

    Args:
        source: as for `load_task`, which takes `settings` too; built-in tasks make as many items as they do by default.
        seen: tasks whose validation and test items must not be among them: this one, and guards.

    Raises:
        DataError: no train split, or nothing in it that validation and test do not hold.
    """
    items = _train_items(source, settings)
    held_back = {item.requests for task in seen for split in task.splits.values() for item in split}
    prompts = [right_answer(item) for item in items if item.requests not in held_back]
    if not prompts:
        raise DataError(
            "text.mix", got=f"no training row of {source} besides those of validation and test", expected="some"
        )
    return prompts


def _train_items(source: str, settings: dict[str, Any]) -> Iterable[Item]:
    # The rows to train on take the place of validation; where test is missing, as validation was to be cut, the other
    # split takes its place.
    apart = {"validation", "test", "num_validation", "num_test", "cut_validation"}
    others = {name: value for name, value in settings.items() if name not in apart}
    refusal: DataError | None = None
    for test in (settings.get("test", "test"), settings.get("validation", "validation")):
        try:
            with warnings.catch_warnings():
                # Of copies in both splits, which are left out here.
                warnings.simplefilter("ignore")
                return load_task(source, validation=TRAIN, test=test, **others).splits["validation"]
        except DataError as error:
            if error.where not in ("task.validation", "task.test"):
                raise
            refusal = refusal or error
    assert refusal is not None
    raise DataError(
        "text.mix",
        got=f"'task', but {source} has no rows to train on ({refusal.got})",
        expected=f"a split '{TRAIN}' besides the rows of validation and test",
        hint="Only training rows are ever trained on. Add such a split, or leave 'task' out.",
    ) from None


def right_answer(item: Item) -> LikelihoodRequest:
    """Context and right answer; the context alone where the answer is no text of the task's."""
    likely = [request for request in item.requests if isinstance(request, LikelihoodRequest)]
    answer = item.row.get("target", item.row.get("answer"))
    if not likely or isinstance(likely[0], LabelRequest):
        return LikelihoodRequest(context=item.requests[0].context, target="")
    if len(likely) == 1:
        return likely[0]
    if isinstance(answer, int) and 0 <= answer < len(likely):
        return likely[answer]
    return LikelihoodRequest(context=likely[0].context, target="")
