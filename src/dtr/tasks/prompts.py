"""From a row to the text a model reads: templates of the recipe, and the default prompts."""

from __future__ import annotations

import difflib
import re
import string
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dtr.errors import DataError, RecipeError
from dtr.tasks.base import EndSpace, Item, LikelihoodRequest
from dtr.tasks.jsonl import Row

MAX_PLACEHOLDERS = 100
_NAME = re.compile(r"(?P<field>[^.\[\]]+)(?:\[[^\[\]]+\])*")
"""A field, or a part of it as `choices[text]` or `labels[0]`; no attributes."""
_FORMAT = re.compile(r"(?:.?[<>=^])?[-+ ]?0?\d{0,2}[,_]?(?:\.\d{1,2})?[a-zA-Z%]?", re.DOTALL)
"""What may follow a colon, as `.2f` or `>10`: not so wide that one row fills the memory."""


def fill(template: str, row: Row, where: str, extra: Mapping[str, Any] | None = None) -> str:
    """Put a row's fields into a template; `{{` and `}}` are literal braces.

    Args:
        where: recipe field of the template, as `task.prompt`.
        extra: further fields, as `choice`.

    Raises:
        RecipeError: a malformed template, or a field that the row does not have; names those it has.
        DataError: a field that is neither text nor a number, as a missing value or a list.
    """
    fields = {**row.data, **(extra or {})}
    try:
        _check_placeholders(template, fields, row, where)
        for _, name, _, _ in string.Formatter().parse(template):
            if name is not None:
                row.as_text(name, string.Formatter().get_field(name, (), fields)[0])
        return template.format_map(fields)
    except (RecipeError, DataError):
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise RecipeError(
            where,
            got=f"{template!r} ({error})",
            expected="text with fields in braces, as 'Question: {question}\\nAnswer:'",
            hint="Write literal braces doubled, as {{ and }}.",
        ) from None


def _check_placeholders(template: str, fields: Mapping[str, Any], row: Row, where: str) -> None:
    """Refuse placeholders that are no fields of the row, or ask for more than to show one."""
    parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    if len(parts) > MAX_PLACEHOLDERS:
        raise RecipeError(where, got=f"{len(parts)} fields in braces", expected=f"at most {MAX_PLACEHOLDERS}")
    for _, name, form, _ in parts:
        match = _NAME.fullmatch(name or "")
        if (match["field"] if match else re.split(r"[.\[]", name or "")[0]) not in fields:
            near = difflib.get_close_matches(name or "", fields, n=1)
            raise RecipeError(
                where,
                got=f"'{{{name}}}', a field that {row.where} does not have",
                expected=f"fields of the rows: {', '.join(map(str, fields))}",
                hint=f"Did you mean '{{{near[0]}}}'?" if near else "Write literal braces doubled, as {{ and }}.",
            )
        if match is None:
            raise RecipeError(where, got=f"'{{{name}}}'", expected="a field, or a part of it as {labels[0]}")
        if not _FORMAT.fullmatch(form or ""):
            raise RecipeError(
                where,
                got=f"'{{{name}:{form}}}'",
                expected="a field, or with it a short format as {score:.2f} or {name:>10}",
                hint="Write literal braces doubled, as {{ and }}.",
            )


def question_prompt(row: Row) -> str:
    """The default prompt of questions: context, `Question: ...` and `Answer:` on a line each; empty parts are left out.

    With a question alone this is the prompt of lm-evaluation-harness for ARC and PIQA, and with a context that for
    BoolQ; with a context alone it is that for HellaSwag, whose rows here need the template '{context}', as their
    question says nothing.

    Raises:
        DataError: the row has neither, or they are no text.
    """
    context = row.text("context") if "context" in row.data else ""
    question = row.text("question") if "question" in row.data or not context.strip() else ""
    if not (context.strip() or question.strip()):
        raise row.wrong("question", question, "a question or a context", "Fill in the row, or set task.prompt.")
    parts = [context] if context.strip() else []
    parts += [f"Question: {question}\nAnswer:"] if question.strip() else []
    return "\n".join(parts)


def likelihood_request(context: str, target: str, *, chat_template: bool) -> LikelihoodRequest:
    """Ask for `target` after `context`.

    White space at the end of the context goes to the target, as lm-evaluation-harness does: tokenizers glue a space
    to the word after it, so a context that ends in one is text the model has rarely seen. A chat template closes the
    context itself.
    """
    if not chat_template:
        kept = context.rstrip()
        context, target = kept, context[len(kept) :] + target
    return LikelihoodRequest(context=context, target=target)


def end_space(context: str, done: EndSpace, *, chat_template: bool) -> EndSpace | None:
    """`done` if the context ends in white space; a chat template closes the context itself."""
    return done if not chat_template and context[-1:].isspace() else None


_DONE: dict[EndSpace, str] = {
    "moved": "It was put before the answers that are scored, as lm-evaluation-harness does.",
    "left out": "It was left out, and the model writes it.",
    "kept": "It was left there: scores by writing may be far below what the model can do.",
}


def end_space_notes(splits: Mapping[str, Sequence[Item]]) -> tuple[str, ...]:
    """Warn of prompts that end in white space, with their number; what is said, for the report."""
    notes = []
    for done, what in _DONE.items():
        numbers = Counter(split for split, items in splits.items() for item in items if item.end_space == done)
        if numbers:
            counts = " and ".join(f"{num} of {len(splits[split])} {split}" for split, num in numbers.items())
            note = f"White space ends the prompts of {counts} items, which tokenizers join to the next word. {what}"
            warnings.warn(note, stacklevel=3)
            notes.append(note)
    return tuple(notes)


def fill_target(template: str | None, field: str, value: str, row: Row, context: str, *, chat_template: bool) -> str:
    """The answer's text: a template of the recipe with the row's fields and `field`, or `value` itself.

    Without a template one space goes before it, unless it or the end of the context brings white space of its own; a
    chat turn starts without.
    """
    if template is not None:
        return fill(template, row, "task.target", {field: value})
    if chat_template:
        return value.lstrip(" ")
    return value if value[:1].isspace() or context[-1:].isspace() else f" {value}"
