"""Tasks of lm-evaluation-harness: its prompts, filters, metrics and splits; the forward passes are ours.

The harness makes each item's requests from its own templates and grades the responses itself, so that a score here is
the score there, item by item. Needs the extra `lm-eval`. No torch in here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from dtr.errors import DataError, RecipeError, did_you_mean
from dtr.evaluation.score import LOST_NATS, Grade, Score, lost_grade, mean_score, perplexity_score
from dtr.recipe import Section
from dtr.tasks.base import (
    EndSpace,
    Generation,
    GenerationRequest,
    Item,
    Likelihood,
    LikelihoodRequest,
    Request,
    Response,
    all_finite,
)
from dtr.tasks.harness_rows import HARNESS_PREFIX, HarnessRows
from dtr.tasks.jsonl import Row
from dtr.tasks.prompts import end_space, end_space_notes, likelihood_request
from dtr.tasks.spec import TaskSpec, read_options, refuse_settings
from dtr.tasks.splits import draw_splits, read_splits

FEWSHOT_SEED = 1234
"""The harness's own default."""
PERPLEXITIES = ("word_perplexity", "byte_perplexity")
MAX_NEW_TOKENS = 256
"""The harness's default for tasks that set none."""


class HarnessOptions(Section):
    """`task.options` of a task of lm-evaluation-harness."""

    num_fewshot: int | None = Field(default=None, ge=0, le=1000)
    """Examples before each question; as the task says when left out."""
    filter: str | None = None
    """Which of the task's filters reads the answer, as `flexible-extract` of gsm8k; its first when left out."""


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """A task that the harness grades; `Item.row` holds its document."""

    name: str
    kind: str = "lm_eval"
    metric: str
    chat_template: bool
    splits: Mapping[str, Sequence[Item]]
    notes: tuple[str, ...] = ()
    task: Any
    filter: Any
    """The harness's filter pipeline that reads the responses."""

    def grade(self, item: Item, responses: Sequence[Response]) -> Grade:
        """What the harness says of the responses.

        Raises:
            DataError: its metric is no finite number on this item.
        """
        doc, num_asked = item.row["doc"], item.row["num_asked"]
        if self.metric not in PERPLEXITIES and not all_finite(responses):
            return lost_grade()
        asked, reference = responses[:num_asked], responses[num_asked:]
        found = self.task.process_results(doc, _filtered(self.task, self.filter, doc, asked)).get(self.metric)
        log_likelihood = _log_likelihood(item, asked, reference)
        if self.metric in PERPLEXITIES:
            log_prob, num_units = found
            if not all_finite(responses):
                return lost_grade(value=LOST_NATS, weight=float(num_units))
            return Grade(value=-log_prob / num_units, log_likelihood=log_likelihood, weight=float(num_units))
        try:
            value = float(found)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(
                f"task.metric {self.metric}",
                got=f"{found!r} for item {item.id}",
                expected="a finite number per item",
                hint="Choose another metric of the task.",
            )
        return Grade(value=value, log_likelihood=log_likelihood)

    def summarize(self, grades: Sequence[Grade]) -> Score:
        if self.metric in PERPLEXITIES:
            return perplexity_score(grades, metric=self.metric)
        return mean_score(self.metric, grades)


def load_harness(spec: TaskSpec) -> HarnessTask:
    """Make the items of a harness task.

    Raises:
        DataError: missing splits.
        RecipeError: settings that do not fit, or a task that one greedy pass cannot score.
    """
    assert isinstance(spec.rows, HarnessRows)
    options = read_options(HarnessOptions, spec)
    refuse_settings(spec, "prompt", "target", "fields")
    task = spec.rows.task
    if options.num_fewshot is not None:
        task.set_config(key="num_fewshot", value=options.num_fewshot)
    metric, pipeline = _choose_metric(spec, task), _choose_filter(task, options.filter)
    found = read_splits(spec)
    items = {split: _make_items(rows, spec, task) for split, rows in found.rows.items()}
    splits = draw_splits(spec, items)
    return HarnessTask(
        name=spec.name,
        metric=metric,
        chat_template=spec.chat_template,
        splits=splits,
        notes=(*found.notes, *end_space_notes(splits)),
        task=task,
        filter=pipeline,
    )


def _choose_metric(spec: TaskSpec, task: Any) -> str:
    """The metric to search with: of those with one number per item, acc_norm for three choices or more."""
    from lm_eval.api.metrics import mean

    higher = task.higher_is_better()
    usable = [
        name
        for name, how in task.aggregation().items()
        if name in PERPLEXITIES or (how is mean and higher.get(name, True))
    ]
    if spec.metric != "auto" and spec.metric in usable:
        return spec.metric
    if spec.metric != "auto" or not usable:
        raise RecipeError(
            "task.metric",
            got=f"'{spec.metric}' for {spec.name}",
            expected=" or ".join(("auto", *usable)) if usable else "a task with a mean of one number per item",
            hint="Paired statistics need metrics that are a mean over items, larger is better, or perplexities.",
        )
    if {"acc", "acc_norm"} <= set(usable) and task.OUTPUT_TYPE == "multiple_choice":
        return "acc_norm" if len(task.doc_to_choice(task.task_docs[0])) > 2 else "acc"
    return usable[0]


def _choose_filter(task: Any, name: str | None) -> Any:
    filters = {pipeline.name: pipeline for pipeline in task._filters}
    if name is None:
        return next(iter(filters.values()))
    if name not in filters:
        raise RecipeError(
            "task.options.filter", got=f"'{name}'", expected="a filter of the task", hint=did_you_mean(name, filters)
        )
    return filters[name]


def _make_items(rows: Sequence[Row], spec: TaskSpec, task: Any) -> list[Item]:
    # Anew for each split: a split then has the examples that a run of the harness on it alone would draw.
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return [_make_item(row, spec, task) for row in rows]


def _make_item(row: Row, spec: TaskSpec, task: Any) -> Item:
    doc = row.data
    context = task.fewshot_context(
        doc,
        num_fewshot=task.config.num_fewshot or 0,
        apply_chat_template=spec.chat_template,
        chat_template=_user_turn if spec.chat_template else None,
        gen_prefix=task.doc_to_prefix(doc),
    )
    made = task.construct_requests(
        doc=doc,
        ctx=context,
        metadata=(spec.name, row.line, task.config.repeats),
        apply_chat_template=spec.chat_template,
        chat_template=_user_turn,
    )
    instances = made if isinstance(made, list) else [made]
    asked = [_request(instance, spec) for instance in instances]
    target = task.doc_to_target(doc)
    requests: list[Request] = list(asked)
    if isinstance(asked[0], GenerationRequest) and isinstance(target, str) and target.strip():
        # The likelihood of the reference answer breaks ties in search; the harness does not see it.
        written = asked[0].context
        between = "" if written[-1:].isspace() else " "
        answer = between + target.strip()
        requests.append(likelihood_request(written, answer, chat_template=spec.chat_template))
    choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else None
    right = target if choices is None or not isinstance(target, int) or target >= len(choices) else choices[target]
    return Item(
        id=f"{spec.name} {row.id}",
        requests=tuple(requests),
        row={"doc": dict(doc), "num_asked": len(asked), "answer": right, "target": target},
        group=None if spec.group is None else str(doc.get(spec.group)),
        end_space=_end_space(instances[0], spec),
    )


def _end_space(instance: Any, spec: TaskSpec) -> EndSpace | None:
    """What is written goes on from the prompt as it is, as in the harness."""
    if instance.request_type == "loglikelihood_rolling":
        return None
    done: EndSpace = "moved" if instance.request_type == "loglikelihood" else "kept"
    return end_space(instance.args[0], done, chat_template=spec.chat_template)


def _user_turn(messages: list[dict[str, str]], **_options: Any) -> str:
    """The one user turn that our evaluation wraps in the tokenizer's chat template."""
    if [message["role"] for message in messages] != ["user"]:
        raise RecipeError(
            "task.chat_template",
            got="a task with a system text or a begun answer",
            expected="one user turn",
            hint="Leave task.chat_template out.",
        )
    return messages[0]["content"]


def _request(instance: Any, spec: TaskSpec) -> Request:
    if instance.request_type == "loglikelihood":
        context, target = instance.args
        return likelihood_request(context, target, chat_template=spec.chat_template)
    if instance.request_type == "loglikelihood_rolling":
        return LikelihoodRequest(context="", target=instance.args[0])
    context, settings = instance.args
    if settings.get("do_sample") or instance.repeats not in (None, 1):
        raise RecipeError(
            f"task.source {HARNESS_PREFIX}{spec.name}",
            got="a task that samples several answers",
            expected="a task that is scored by greedy answers",
            hint="Choose another task.",
        )
    until = settings.get("until") or ()
    return GenerationRequest(
        context=context,
        max_new_tokens=settings.get("max_gen_toks") or settings.get("max_new_tokens") or MAX_NEW_TOKENS,
        stop=(until,) if isinstance(until, str) else tuple(until),
    )


def _filtered(task: Any, pipeline: Any, doc: Mapping[str, Any], asked: Sequence[Response]) -> list[Any]:
    """The responses as the harness's metrics take them, after its filter."""
    from lm_eval.api.instance import Instance

    kind = "loglikelihood" if isinstance(asked[0], Likelihood) else "generate_until"
    instances = [
        Instance(request_type=kind, doc=doc, arguments=(), idx=n, metadata=("", 0, 1), resps=[_plain(response, task)])
        for n, response in enumerate(asked)
    ]
    pipeline.apply(instances)
    return [instance.filtered_resps[pipeline.name] for instance in instances]


def _plain(response: Response, task: Any) -> Any:
    if isinstance(response, Generation):
        return response.text
    return response.log_prob if task.OUTPUT_TYPE == "loglikelihood_rolling" else (response.log_prob, response.is_greedy)


def _log_likelihood(item: Item, asked: Sequence[Response], reference: Sequence[Response]) -> float:
    """Log-probability of the right answer, 0 where the harness does not name one."""
    target = item.row["target"]
    likely = [r.log_prob for r in (reference or asked) if isinstance(r, Likelihood)]
    if reference or len(likely) == 1:
        return likely[0]
    return likely[target] if isinstance(target, int) and 0 <= target < len(likely) else 0.0
