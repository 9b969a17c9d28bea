"""Perplexity of plain text: how surprised is the model by each token?

Rows `{text}`, or plain text files. A document is cut at white space into windows of at most `window_chars` characters
(tasks know no tokenizer); each window is read on its own, from an empty context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from dtr.corpus.cutting import cut_text
from dtr.evaluation.score import LOST_NATS, Grade, Score, lost_grade, perplexity_score
from dtr.recipe import Section
from dtr.tasks.base import Item, Likelihood, LikelihoodRequest, Response, all_finite
from dtr.tasks.jsonl import Row
from dtr.tasks.spec import TASKS, TaskSpec, choose_metric, read_options, refuse_settings
from dtr.tasks.splits import draw_splits, group_of, read_splits


class PerplexityOptions(Section):
    """`task.options` of perplexity."""

    window_chars: int = Field(default=2000, ge=1, le=10**8)
    """Longest window; 2000 characters of English are about 450 tokens."""


@dataclass(frozen=True, kw_only=True)
class PerplexityTask:
    """A task whose items are windows of text."""

    name: str
    kind: str = "perplexity"
    metric: str = "perplexity"
    chat_template: bool = False
    splits: Mapping[str, Sequence[Item]]
    notes: tuple[str, ...] = ()

    def grade(self, item: Item, responses: Sequence[Response]) -> Grade:
        """Mean negative log-likelihood per token in nats, weighted by the number of tokens."""
        (response,) = responses
        assert isinstance(response, Likelihood)
        if not all_finite(responses):
            return lost_grade(value=LOST_NATS, weight=float(response.num_tokens))
        mean_nll = -response.log_prob / response.num_tokens
        return Grade(value=mean_nll, log_likelihood=-mean_nll, weight=float(response.num_tokens))

    def summarize(self, grades: Sequence[Grade]) -> Score:
        return perplexity_score(grades)


@TASKS.register("perplexity")
def load_perplexity(spec: TaskSpec) -> PerplexityTask:
    """Read a perplexity task.

    Raises:
        DataError: malformed rows or splits.
        RecipeError: settings that do not fit.
    """
    options = read_options(PerplexityOptions, spec)
    refuse_settings(spec, "prompt", "target", "chat_template")
    metric = choose_metric(spec, ("perplexity",), "perplexity")
    found = read_splits(spec)
    items = {
        split: [item for row in found.rows[split] for item in _windows(row, spec, options)] for split in found.rows
    }
    return PerplexityTask(name=spec.name, metric=metric, splits=draw_splits(spec, items), notes=found.notes)


def _windows(row: Row, spec: TaskSpec, options: PerplexityOptions) -> list[Item]:
    text = row.text("text").strip()
    if not text:
        raise row.wrong("text", row.data["text"], "text with at least one visible character")
    group = group_of(row, spec)
    return [
        Item(
            id=f"{row.id}/{number}",
            requests=(LikelihoodRequest(context="", target=window),),
            row={"window": number, "num_chars": len(window)},
            group=row.id if group is None else group,
        )
        for number, window in enumerate(cut_text(text, options.window_chars))
    ]
