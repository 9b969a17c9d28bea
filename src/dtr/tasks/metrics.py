"""Metrics of a written text against accepted ones: exact match, F1, ROUGE-L, running code, or any Python function.

Texts of any script are compared: composed and decomposed letters, full and half width, case and final punctuation are
evened by Unicode's own tables. Chinese, Japanese, Thai, Lao, Khmer and Burmese put no space between words, so there F1
and ROUGE-L count characters, as is usual for them. Articles and word stems are those of English.
"""

from __future__ import annotations

import importlib
import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from dtr.errors import DataError, DeviceError, RecipeError, did_you_mean

TextMetric = Callable[[str, Sequence[str]], float]
"""What a model wrote, and the accepted texts, to a number of which more is better and the mean is taken."""


_FINAL = (
    ".,;:!? \u3001\u3002\u0964\u0965\u060c\u061b\u061f\u06d4\u0589\u055d"
    "\u1362\u1363\u1367\u104a\u104b\u17d4\u0e2f\u0f0d"
)
"""What may end a sentence or a part of it: as in English, Chinese, Hindi, Arabic, Armenian, Amharic, Burmese, Khmer."""
_UNSPACED = re.compile(
    # Han, kana, Thai, Lao, Burmese, Khmer: a letter with the marks that belong to it.
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
    "[\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd\u102b-\u103e\u17b4-\u17d3\u3099\u309a]*"
)


def fold(text: str) -> str:
    """Text with what looks alike made alike: NFKC (https://unicode.org/reports/tr15), and no case."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def normalize(text: str) -> str:
    """Text as exact match compares it: `fold`, white space evened, commas between thousands and final punctuation off.

    >>> normalize(" The  answer: 1,250. ")
    'the answer: 1250'
    """
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", " ".join(fold(text).split()))
    return text.rstrip(_FINAL)


def exact_match(written: str, accepted: Sequence[str]) -> float:
    return float(normalize(written) in map(normalize, accepted))


def f1(written: str, accepted: Sequence[str]) -> float:
    """Overlap of words as in SQuAD (Rajpurkar et al. 2016): the best of the accepted answers counts.

    >>> round(f1("the red river", ["Red River!", "a lake"]), 3)
    1.0
    """
    return max(_word_f1(_squad_words(written), _squad_words(answer)) for answer in accepted)


def rouge_l(written: str, accepted: Sequence[str]) -> float:
    """ROUGE-L F-measure with stemming, from the library rouge-score; the best of the accepted answers counts.

    Text in ASCII has the library's own words and stems. It would drop all other letters, so other words are
    those of `words`.
    """
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
    here, path = str(Path.cwd()), sys.path
    try:
        # As with `python -m`, what lies where the command runs can be imported.
        path.insert(0, here)
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
        # The module may have put folders of its own in front.
        if here in path:
            path.remove(here)
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


def words(text: str) -> list[str]:
    """Words between white space, and single characters of scripts that put none between words."""
    return _UNSPACED.sub(lambda found: f" {found[0]} ", text).split()


def _squad_words(text: str) -> list[str]:
    # The marks of Python's list, some of which are symbols to Unicode, and the punctuation of all other scripts.
    kept = (c for c in fold(text) if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    found = words("".join(kept))
    # Articles count for nothing beside other words, and are the answer where there is nothing else, as option A.
    return [word for word in found if word not in ("a", "an", "the")] or found


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
    return RougeScorer(["rougeL"], tokenizer=_RougeWords())


class _RougeWords:
    """What rouge-score takes for a tokenizer: words of letters, digits and the marks on them."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._stem = DefaultTokenizer(use_stemmer=True).tokenize

    def tokenize(self, text: str) -> list[str]:
        kept = (c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in fold(text))
        found = words("".join(kept))
        return [stem for word in found for stem in (self._stem(word) if word.isascii() else [word])]
