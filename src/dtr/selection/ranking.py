"""What ranks layers where a task's own score is of written text: how likely an answer is, by one forward pass.

Writing costs a pass for every token and gives one number that seldom changes. The reference answer where the task asks
for its likelihood, or else what the teacher itself writes, says in one pass how much a layer matters; the search then
writes only to decide how many layers may go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dtr.evaluation.score import Grade, Score, mean_score
from dtr.tasks.base import Generation, GenerationRequest, Item, Likelihood, LikelihoodRequest, Response, Task


@dataclass(frozen=True, kw_only=True)
class LikelihoodTask:
    """The validation items of another task, asked only how likely an answer is, in nats a token."""

    name: str
    chat_template: bool
    splits: Mapping[str, Sequence[Item]]
    kind: str = "likelihood"
    metric: str = "log_likelihood"
    notes: tuple[str, ...] = ()

    def grade(self, item: Item, responses: Sequence[Response]) -> Grade:
        """Mean log-probability of a token; 0 for an item without an answer, which then says nothing."""
        asked = [response for response in responses if isinstance(response, Likelihood)]
        num_tokens = sum(response.num_tokens for response in asked)
        value = sum(response.log_prob for response in asked) / max(num_tokens, 1)
        return Grade(value=value, log_likelihood=value)

    def summarize(self, grades: Sequence[Grade]) -> Score:
        return mean_score(self.metric, grades)


def likelihood_task(task: Task, write: Callable[[], Sequence[Sequence[Response]]]) -> LikelihoodTask | None:
    """The task that ranks in place of one that is answered by writing; None where there is nothing to write.

    Args:
        task: the search's task.
        write: what the teacher answers to each validation item; only called where an item has no reference.
    """
    items = task.splits["validation"]
    if not any(isinstance(request, GenerationRequest) for item in items for request in item.requests):
        return None
    asked = [tuple(r for r in item.requests if isinstance(r, LikelihoodRequest)) for item in items]
    if not all(asked):
        written = write()
        asked = [own or _as_written(item, answer) for own, item, answer in zip(asked, items, written)]
    ranked = [Item(id=item.id, requests=own, row=item.row, group=item.group) for item, own in zip(items, asked)]
    return LikelihoodTask(name=task.name, chat_template=task.chat_template, splits={"validation": ranked})


def _as_written(item: Item, responses: Sequence[Response]) -> tuple[LikelihoodRequest, ...]:
    pairs = zip(item.requests, responses)
    return tuple(
        LikelihoodRequest(context=request.context, target=response.text)
        for request, response in pairs
        if isinstance(request, GenerationRequest) and isinstance(response, Generation) and response.text.strip()
    )
