"""Generation: does the model write the right answer, greedily?

Rows `{prompt, answer}`, or `{context, question, answers}` with several accepted answers. Metrics: `exact_match` (auto:
1 if the written text equals an accepted answer after `normalize`), `f1`, `rouge_l`, any function by import path, and
`pass_at_1` for rows `{prompt, tests}`: 1 if prompt, written text and tests run as one Python program, which
`dtr.tasks.code` puts together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from dtr.errors import RecipeError
from dtr.evaluation.score import Grade, Score, lost_grade, mean_score
from dtr.recipe import Section
from dtr.tasks import code
from dtr.tasks.base import Generation, GenerationRequest, Item, Likelihood, Request, Response, all_finite
from dtr.tasks.extraction import Extractor
from dtr.tasks.jsonl import Row
from dtr.tasks.metrics import (
    TextMetric,
    choose_text_metric,
    exact_match,
    find_metric,
    is_import_path,
    measure,
    normalize,
)
from dtr.tasks.prompts import (
    end_space,
    end_space_notes,
    fill,
    fill_target,
    likelihood_request,
    question_prompt,
)
from dtr.tasks.sandbox import passes
from dtr.tasks.spec import TASKS, TaskSpec, read_options
from dtr.tasks.splits import draw_splits, group_of, read_splits

ANSWER_FIELDS = ("final", "answers", "answer")


class GenerationOptions(Section):
    """`task.options` of generation."""

    max_new_tokens: int = Field(default=64, ge=1, le=2**20)
    """Longest text a model may write; 512 for `pass_at_1` when left out."""
    stop: list[str] = Field(default_factory=lambda: ["\n"], max_length=100)
    """The text ends before the first of these. For `pass_at_1`, when left out, where a function is over (the next line
    that begins with def, class, # and others); with a chat template nowhere."""
    extract: str | None = Field(default=None, max_length=10_000)
    """Regular expression; its last match (its first group, if it has one) is compared instead of the whole text. For
    `pass_at_1` with a chat template, when left out, the first code block that defines the function asked for."""
    max_context_chars: int | None = Field(default=None, ge=2, le=10**9)
    """Longer `context` fields lose their middle, as for meetings that do not fit the model; whole when left out."""
    answer_field: str | None = None
    """Field with the accepted answer or a list of them; when left out the first of final, answers, answer."""
    allow_code_execution: bool = False
    """Run what models write, in a process with limits, which `pass_at_1` needs; see docs/recipes.md for the risk."""
    code_seconds: int = Field(default=5, ge=1, le=3600)
    """Longest time that a written program may run."""
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
    notes: tuple[str, ...] = ()
    extract: Extractor | None = None
    function: TextMetric = exact_match
    """What `metric` names; for `pass_at_1` not used."""
    code_seconds: int = 5

    def grade(self, item: Item, responses: Sequence[Response]) -> Grade:
        """The metric of the written text; text without a match of `extract` counts as none.

        Raises:
            DataError: the metric is no finite number on this item, or `extract` takes too long on it.
        """
        assert len(responses) == len(item.requests), "one response per request"
        written, *rest = responses
        assert isinstance(written, Generation)
        if not all_finite(responses):
            return lost_grade()
        found = written.text if self.extract is None else self.extract.last(written.text, item=item.id)
        log_likelihood = sum(answer.log_prob for answer in rest if isinstance(answer, Likelihood))
        if found is None:
            value = 0.0
        elif self.metric == "pass_at_1":
            prompt, tests = item.row["program"], item.row["tests"]
            if self.chat_template:
                program = code.answered(prompt, found, tests=tests, entry_point=item.row["entry_point"])
            else:
                program = code.continued(prompt, found)
            value = float(passes(f"{program}\n{tests}", seconds=self.code_seconds))
        else:
            value = measure(self.function, self.metric, found, item.row["answers"], item=item.id)
        return Grade(value=value, log_likelihood=log_likelihood)

    def summarize(self, grades: Sequence[Grade]) -> Score:
        return mean_score(self.metric, grades)


@TASKS.register("generation")
def load_generation(spec: TaskSpec) -> GenerationTask:
    """Read a generation task.

    Raises:
        DataError: malformed rows or splits.
        RecipeError: settings that do not fit.
    """
    options = read_options(GenerationOptions, spec)
    metric = choose_text_metric(spec.metric, kind=spec.kind, auto="exact_match")
    if metric == "pass_at_1":
        _check_execution(options)
        options = _for_code(options, chat_template=spec.chat_template)
    pattern = Extractor(options.extract) if options.extract is not None else None
    found = read_splits(spec)
    items = {
        split: [_make_item(row, spec, options, pattern, metric) for row in found.rows[split]] for split in found.rows
    }
    function = find_metric(metric) if metric != "pass_at_1" else exact_match
    if is_import_path(metric):
        # A function that cannot grade a right answer is told before any work is done.
        first = items["validation"][0]
        measure(function, metric, first.row["answers"][0], first.row["answers"], item=first.id)
    splits = draw_splits(spec, items)
    return GenerationTask(
        name=spec.name,
        metric=metric,
        chat_template=spec.chat_template,
        splits=splits,
        notes=(*found.notes, *end_space_notes(splits)),
        extract=pattern,
        function=function,
        code_seconds=options.code_seconds,
    )


def _for_code(options: GenerationOptions, *, chat_template: bool) -> GenerationOptions:
    """The options with defaults that suit code; what the recipe sets stays."""
    defaults = {"max_new_tokens": code.MAX_NEW_TOKENS, "stop": [] if chat_template else list(code.STOP)}
    changes = {name: value for name, value in defaults.items() if name not in options.model_fields_set}
    return options.model_copy(update=changes)


def _check_execution(options: GenerationOptions) -> None:
    if not options.allow_code_execution:
        raise RecipeError(
            "task.metric",
            got="pass_at_1, which runs code that models write",
            expected="permission to run it",
            hint="In a container or on a machine you can lose, set task.options.allow_code_execution: true.",
        )


def _make_item(row: Row, spec: TaskSpec, options: GenerationOptions, pattern: Extractor | None, metric: str) -> Item:
    if options.max_context_chars is not None and isinstance(row.data.get("context"), str):
        row = replace(row, data={**row.data, "context": _cut_middle(row.data["context"], options.max_context_chars)})
    runs_code = metric == "pass_at_1"
    if spec.prompt is not None:
        written = fill(spec.prompt, row, "task.prompt")
    else:
        written = row.text("prompt") if "prompt" in row.data else question_prompt(row)
        written = code.chat_question(written) if runs_code and spec.chat_template else written
    context = written
    if not spec.chat_template:
        # White space at the end of a prompt would be a token the model has rarely seen there.
        context = code.open_end(written, options.stop) if runs_code else written.rstrip()
    end = end_space(written, "kept" if context == written else "left out", chat_template=spec.chat_template)
    answers = [] if runs_code and "answer" not in row.data else _read_answers(row, options.answer_field)
    requests: list[Request] = [
        GenerationRequest(context=context, max_new_tokens=options.max_new_tokens, stop=tuple(options.stop))
    ]
    if options.score_answer and answers:
        # The reference text, which may hold the way to the answer that is compared.
        given = row.data.get("answer", answers[0])
        reference = answers[0] if isinstance(given, list) else row.as_text("answer", given)
        target = fill_target(spec.target, "answer", reference, row, written, chat_template=spec.chat_template)
        requests.append(likelihood_request(written, target, chat_template=spec.chat_template))
    if runs_code:
        # A completion goes on where the prompt's code stops, so both belong to the program.
        entry_point = row.text("entry_point") if "entry_point" in row.data else None
        program = {"program": row.text("prompt"), "tests": row.text("tests"), "entry_point": entry_point}
        return Item(id=row.id, requests=tuple(requests), row=program, group=group_of(row, spec), end_space=end)
    accepted = [answer if pattern is None else pattern.last(answer, item=row.id) or answer for answer in answers]
    row_kept = {"answers": accepted}
    return Item(id=row.id, requests=tuple(requests), row=row_kept, group=group_of(row, spec), end_space=end)


def _cut_middle(text: str, num_chars: int) -> str:
    """The first and last halves of `num_chars`: what matters stands more often near the ends than in between."""
    half = num_chars // 2
    return text if len(text) <= num_chars else f"{text[:half]}\n...\n{text[-half:]}"


def _read_answers(row: Row, field: str | None) -> list[str]:
    if field is None:
        field = next((name for name in ANSWER_FIELDS if name in row.data), ANSWER_FIELDS[-1])
    value = row.require(field)
    answers = value if isinstance(value, list) else [value]
    if not answers or not all(isinstance(answer, str | int | float) for answer in answers):
        raise row.wrong(field, value, "a text or a number, or a list of them")
    answers = [row.as_text(field, answer) for answer in answers]
    if not all(normalize(answer) for answer in answers):
        raise row.wrong(field, value, "answers with at least one letter or digit")
    return answers
