"""Generation: does the model write the right answer, greedily?

Rows `{prompt, answer}`, or `{context, question, answers}` with several accepted answers. Metric `exact_match`: 1 if
the written text equals an accepted answer after `normalize`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from dtr.errors import RecipeError
from dtr.evaluation.score import Grade, Score, mean_score
from dtr.recipe import Section
from dtr.tasks.base import Generation, GenerationRequest, Item, Likelihood, Request, Response
from dtr.tasks.jsonl import Row
from dtr.tasks.prompts import default_target, fill, likelihood_request, question_prompt
from dtr.tasks.spec import TASKS, TaskSpec, choose_metric, read_options
from dtr.tasks.splits import draw_splits, read_splits

ANSWER_FIELDS = ("final", "answers", "answer")


class GenerationOptions(Section):
    """`task.options` of generation."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Longest text a model may write."""
    stop: list[str] = Field(default_factory=lambda: ["\n"])
    """The text ends before the first of these."""
    extract: str | None = None
    """Regular expression; its last match (its first group, if it has one) is compared instead of the whole text."""
    answer_field: str | None = None
    """Field with the accepted answer or a list of them; when left out the first of final, answers, answer."""
    score_answer: bool = True
    """Also ask for the likelihood of the reference answer, so that search can break ties; one more forward pass."""


@dataclass(frozen=True, kw_only=True)
class GenerationTask:
    """A task whose items compare written text; `Item.row` holds the accepted `answers`."""

    name: str
    kind: str = "generation"
    metric: str = "exact_match"
    chat_template: bool
    splits: Mapping[str, Sequence[Item]]
    extract: re.Pattern[str] | None = None

    def grade(self, item: Item, responses: Sequence[Response]) -> Grade:
        """1 where the written text matches an accepted answer, else 0; text without a match of `extract` is wrong."""
        assert len(responses) == len(item.requests), "one response per request"
        written, *rest = responses
        assert isinstance(written, Generation)
        found = written.text if self.extract is None else extract_last(self.extract, written.text)
        accepted = {normalize(answer) for answer in item.row["answers"]}
        log_likelihood = sum(answer.log_prob for answer in rest if isinstance(answer, Likelihood))
        is_right = found is not None and normalize(found) in accepted
        return Grade(value=float(is_right), log_likelihood=log_likelihood)

    def summarize(self, grades: Sequence[Grade]) -> Score:
        return mean_score(self.metric, grades)


def normalize(text: str) -> str:
    """Text as it is compared: case and white space evened, commas between thousands and final punctuation removed.

    >>> normalize(" The  answer: 1,250. ")
    'the answer: 1250'
    """
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", " ".join(text.split()).casefold())
    return text.rstrip(".,;:!? ")


def extract_last(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match (its first group, if it has one), or None."""
    found = None
    for match in pattern.finditer(text):
        found = match[1] if pattern.groups else match[0]
    return found


@TASKS.register("generation")
def load_generation(spec: TaskSpec) -> GenerationTask:
    """Read a generation task.

    Raises:
        DataError: malformed rows or splits.
        RecipeError: settings that do not fit.
    """
    options = read_options(GenerationOptions, spec)
    metric = choose_metric(spec, ("exact_match",), "exact_match")
    try:
        pattern = re.compile(options.extract) if options.extract is not None else None
    except re.error as error:
        raise RecipeError(
            "task.options.extract", got=f"{options.extract!r} ({error})", expected="a regular expression"
        ) from None
    rows = read_splits(spec)
    items = {split: [_make_item(row, spec, options, pattern) for row in rows[split]] for split in rows}
    return GenerationTask(
        name=spec.name,
        metric=metric,
        chat_template=spec.chat_template,
        splits=draw_splits(spec, items),
        extract=pattern,
    )


def _make_item(row: Row, spec: TaskSpec, options: GenerationOptions, pattern: re.Pattern[str] | None) -> Item:
    if spec.prompt is not None:
        context = fill(spec.prompt, row, "task.prompt")
    else:
        context = row.text("prompt") if "prompt" in row.data else question_prompt(row)
    # A space at the end of a prompt would be a token the model has rarely seen there.
    context = context if spec.chat_template else context.rstrip()
    answers = _read_answers(row, options.answer_field)
    requests: list[Request] = [
        GenerationRequest(context=context, max_new_tokens=options.max_new_tokens, stop=tuple(options.stop))
    ]
    if options.score_answer:
        # The reference text, which may hold the way to the answer that is compared.
        reference = {"answer": row.data.get("answer", answers[0])}
        template = spec.target or default_target("answer", chat_template=spec.chat_template)
        target = fill(template, row, "task.target", reference)
        requests.append(likelihood_request(context, target, chat_template=spec.chat_template))
    accepted = [answer if pattern is None else extract_last(pattern, answer) or answer for answer in answers]
    return Item(id=row.id, requests=tuple(requests), row={"answers": accepted})


def _read_answers(row: Row, field: str | None) -> list[str]:
    if field is None:
        field = next((name for name in ANSWER_FIELDS if name in row.data), ANSWER_FIELDS[-1])
    value = row.require(field)
    answers = value if isinstance(value, list) else [value]
    if not answers or not all(isinstance(answer, str | int | float) for answer in answers):
        raise row.wrong(field, value, "a text or a number, or a list of them")
    answers = [str(answer) for answer in answers]
    if not all(normalize(answer) for answer in answers):
        raise row.wrong(field, value, "answers with at least one letter or digit")
    return answers
