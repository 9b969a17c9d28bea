"""Metrics of a written text against accepted ones: exact match, F1, ROUGE-L, running code, or any Python function."""

from __future__ import annotations

import importlib
import math
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from dtr.errors import DataError, DeviceError, RecipeError, did_you_mean

TextMetric = Callable[[str, Sequence[str]], float]
"""What a model wrote, and the accepted texts, to a number of which more is better and the mean is taken."""


def normalize(text: str) -> str:
    """Text as exact match compares it: case and white space evened, commas between thousands and final punctuation off.

    >>> normalize(" The  answer: 1,250. ")
    'the answer: 1250'
    """
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", " ".join(text.split()).casefold())
    return text.rstrip(".,;:!? ")


def exact_match(written: str, accepted: Sequence[str]) -> float:
    return float(normalize(written) in map(normalize, accepted))


def f1(written: str, accepted: Sequence[str]) -> float:
    """Overlap of words as in SQuAD (Rajpurkar et al. 2016): the best of the accepted answers counts.

    >>> round(f1("the red river", ["Red River!", "a lake"]), 3)
    1.0
    """
    return max(_word_f1(_squad_words(written), _squad_words(answer)) for answer in accepted)


def rouge_l(written: str, accepted: Sequence[str]) -> float:
    """ROUGE-L F-measure with stemming, from the library rouge-score; the best of the accepted answers counts."""
    return max(_rouge_scorer().score(answer, written)["rougeL"].fmeasure for answer in accepted)


TEXT_METRICS: dict[str, TextMetric] = {"exact_match": exact_match, "f1": f1, "rouge_l": rouge_l}


def find_metric(name: str) -> TextMetric:
    """A metric by name, or a function by import path as `mypackage.scores:overlap`.

    Raises:
        RecipeError: an unknown name, or a path that leads to no function.
        DeviceError: the library behind it is not installed.
    """
    if name == "rouge_l":
        _rouge_scorer()
    if name in TEXT_METRICS:
        return TEXT_METRICS[name]
    module, _, attribute = name.partition(":")
    try:
        # As with `python -m`, what lies where the command runs can be imported.
        sys.path.insert(0, str(Path.cwd()))
        function: Any = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise RecipeError(
            "task.metric",
            got=f"'{name}' ({type(error).__name__}: {error})",
            expected="an importable function, as mypackage.scores:overlap",
            hint="It is called with the written text and a list of the accepted ones, and returns a number.",
        ) from None
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise RecipeError("task.metric", got=f"'{name}', which is {function!r}", expected="a function")
    return function


def is_import_path(name: str) -> bool:
    return ":" in name


def choose_text_metric(name: str, *, kind: str, auto: str) -> str:
    """The metric's name: `auto` gives the kind's own.

    Raises:
        RecipeError: neither a known metric nor an import path.
    """
    if name == "auto":
        return auto
    known = [*TEXT_METRICS, "pass_at_1"]
    if name not in known and not is_import_path(name):
        raise RecipeError(
            "task.metric",
            got=f"'{name}' for a {kind} task",
            expected=f"auto or {' or '.join(known)}, or a function as mypackage.scores:overlap",
            hint=did_you_mean(name, known),
        )
    return name


def measure(function: TextMetric, name: str, written: str, accepted: Sequence[str], *, item: str) -> float:
    """The metric of one item.

    Raises:
        DataError: it raised, or returned something that is no finite number.
    """
    try:
        value = function(written, accepted)
    except Exception as error:
        raise DataError(
            f"task.metric {name}",
            got=f"{type(error).__name__}: {error} for item {item}",
            expected="a finite number per item",
            hint="Every finished candidate is saved: mend the function, then go on with --resume.",
        ) from error
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(
            f"task.metric {name}",
            got=f"{value!r} for item {item}",
            expected="a finite number per item",
            hint="Every finished candidate is saved: mend the function, then go on with --resume.",
        )
    return float(value)


def _squad_words(text: str) -> list[str]:
    text = "".join(c for c in text.casefold() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _word_f1(written: list[str], answer: list[str]) -> float:
    if not written or not answer:
        return float(written == answer)
    num_shared = (Counter(written) & Counter(answer)).total()
    return 2 * num_shared / (len(written) + len(answer))


@lru_cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise DeviceError(
            "task.metric",
            got="rouge_l, whose library is not installed",
            expected="the extra rouge",
            hint="pip install 'distill-then-replace[rouge]'",
        ) from None
    return RougeScorer(["rougeL"], use_stemmer=True)
