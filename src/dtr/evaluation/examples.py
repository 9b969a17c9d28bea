"""A few things to read beside the numbers: a sample of each model's writing, and items on which they differ."""

from __future__ import annotations

from typing import Any

from dtr.arch import is_classifier
from dtr.evaluation.evaluator import Evaluator
from dtr.evaluation.generation import generate_texts
from dtr.tasks.base import Generation, GenerationRequest, Item, Likelihood, LikelihoodRequest, Response, Task
from dtr.teacher import Teacher

SAMPLE_PROMPT = "The most important thing to know about rivers is"
MAX_DIFFERENCES = 5
MAX_TEXT_CHARS = 400


def write_sample(
    teacher: Teacher, hybrid: Any, *, prompt: str = SAMPLE_PROMPT, max_new_tokens: int = 40
) -> dict[str, str]:
    """What teacher and hybrid write after the same prompt, greedily; nothing for models that do not write."""
    if is_classifier(teacher.model):
        return {}
    request = GenerationRequest(context=prompt, max_new_tokens=max_new_tokens)
    texts = {
        name: generate_texts(model, teacher.tokenizer, [request], chat_template=False, batch_tokens=4096)[0].strip()
        for name, model in (("teacher", teacher.model), ("hybrid", hybrid))
    }
    return {"prompt": prompt, **texts}


def differing_items(teacher: Teacher, hybrid: Any, task: Task, *, batch_tokens: int = 16_384) -> list[dict[str, Any]]:
    """The first few validation items that one model gets right and the other does not."""
    answers = {
        name: Evaluator(
            model, teacher.tokenizer, task, "validation", cache_bytes=0, batch_tokens=batch_tokens
        ).respond()
        for name, model in (("teacher", teacher.model), ("hybrid", hybrid))
    }
    found = []
    for item, ours, theirs in zip(task.splits["validation"], answers["hybrid"], answers["teacher"]):
        right = {"hybrid": task.grade(item, ours).value, "teacher": task.grade(item, theirs).value}
        if right["hybrid"] == right["teacher"]:
            continue
        found.append(
            {
                "prompt": item.requests[0].context[-MAX_TEXT_CHARS:],
                "answer": _right_answer(item)[:MAX_TEXT_CHARS],
                "teacher": _describe(item, theirs, right["teacher"]),
                "hybrid": _describe(item, ours, right["hybrid"]),
            }
        )
        if len(found) == MAX_DIFFERENCES:
            break
    return found


def _right_answer(item: Item) -> str:
    """The right answer as a text, empty where an item has none."""
    answer = item.row.get("answer", "")
    if isinstance(answer, int) and "choices" in item.row:
        answer = item.row["choices"][answer]
    return str(answer) or " / ".join(map(str, item.row.get("answers", ())))


def _describe(item: Item, responses: list[Response], value: float) -> str:
    """The text a model wrote, or the answer it finds likeliest, and the item's value."""
    first = responses[0]
    if isinstance(first, Generation):
        text = first.text
    elif len(responses) > 1:
        likeliest = max(range(len(responses)), key=lambda i: _log_prob(responses[i]))
        request = item.requests[likeliest]
        assert isinstance(request, LikelihoodRequest)
        text = request.target
    else:
        text = f"log-probability {_log_prob(first):.2f}"
    return f"{text.strip()[:MAX_TEXT_CHARS]} ({value:g})"


def _log_prob(response: Response) -> float:
    assert isinstance(response, Likelihood)
    return response.log_prob
