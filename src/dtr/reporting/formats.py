"""Numbers to text. What a report does not hold is printed as "not measured", never as a blank or a zero."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeGuard

from jinja2 import Undefined

MISSING = "not measured"

# As report.json spells them.
_NOT_FINITE = ("nan", "inf", "-inf")


def dig(record: Any, path: str) -> Any:
    """The value at a dotted path of nested dicts, or None where any part of the path is missing."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number, so that it can be drawn and compared."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _says_what_is_missing(convert: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(convert)
    def guarded(value: Any, *args: Any) -> str:
        if value is None or isinstance(value, Undefined):
            return MISSING
        # A loss that diverged was measured: it must not look like one that was never taken.
        if value in _NOT_FINITE or (isinstance(value, float) and not math.isfinite(value)):
            return "not finite"
        return convert(value, *args)

    return guarded


@_says_what_is_missing
def metric(value: float) -> str:
    """A task metric: three decimals for shares, fewer for large perplexities."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


@_says_what_is_missing
def small(value: float) -> str:
    """Three significant digits, for errors that span decades."""
    return f"{value:.3g}"


@_says_what_is_missing
def signed(value: float) -> str:
    return f"{value:+.3f}"


@_says_what_is_missing
def count(value: float) -> str:
    return f"{value:,.0f}"


@_says_what_is_missing
def percent(value: float) -> str:
    """A share as a percentage with one decimal, none where it is whole."""
    text = f"{100 * value:.1f}"
    return f"{text.removesuffix('.0')} %"


@_says_what_is_missing
def byte_size(value: float) -> str:
    """Decimal units, as recipes count them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} bytes"


@_says_what_is_missing
def duration(value: float) -> str:
    """Seconds as a person would say them."""
    if value < 120:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


@_says_what_is_missing
def score(value: dict, plus_minus: str = "\u00b1") -> str:
    """A SCORE as "0.480 +/- 0.018": the value and its standard error."""
    if not is_number(value.get("stderr")):
        return f"{metric(value.get('value'))} (error {MISSING})"
    return f"{metric(value.get('value'))} {plus_minus} {metric(value['stderr'])}"


@_says_what_is_missing
def interval(value: dict) -> str:
    """The paired difference as "-0.017 (95 %: -0.040 to +0.006)"."""
    low, high = value.get("ci95_low"), value.get("ci95_high")
    return f"{signed(value.get('mean'))} (95 %: {signed(low)} to {signed(high)})"


@_says_what_is_missing
def change(drop: float) -> str:
    """A relative drop in words that fit metrics of either direction."""
    if abs(drop) < 5e-4:
        return "the same"
    return f"{percent(abs(drop))} {'worse' if drop > 0 else 'better'}"


@_says_what_is_missing
def options(value: dict | list) -> str:
    """Options of a mixer as they are set, `window=64, sinks=4`; of several mixers, one after the other."""
    if isinstance(value, list):
        return "; ".join(options(one) if one else "no options" for one in value)
    return ", ".join(f"{name}={setting}" for name, setting in value.items())


FILTERS = {
    "metric": metric,
    "small": small,
    "signed": signed,
    "count": count,
    "percent": percent,
    "byte_size": byte_size,
    "duration": duration,
    "score": score,
    "interval": interval,
    "change": change,
    "options": options,
}
