"""Did the promise of the recipe hold on test? One answer, used by the page, the model card and the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from dtr.reporting.formats import change, dig, is_number, metric, percent, signed

Which = Literal["m_opt", "m_best", "realigned"]
Status = Literal["held", "not held", "within noise", "nothing replaced", "not measured"]

_Z95 = 1.96
MORE_MAY_GO = "more layers may go"
"""What a search says that a budget ended (`dtr.selection.auto`)."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a hybrid keeps on test against the limit `p_min`, with a 95 % interval."""

    measured: float
    low: float
    high: float
    limit: float
    is_share: bool
    """True: hybrid divided by teacher. False: values of the metric itself."""
    higher_is_better: bool = True
    held: bool | None = None
    """Tested at 2.5 % on each side: True where it is above the limit, False below, None where the items cannot tell."""

    @staticmethod
    def from_interval(**fields: Any) -> Kept:
        """By an interval alone: on one side of the limit, or around it."""
        found = Kept(**fields)
        low, high = (found.low, found.high) if found.higher_is_better else (-found.high, -found.low)
        limit = found.limit if found.higher_is_better else -found.limit
        return replace(found, held=True if low >= limit else False if high < limit else None)

    def show(self, value: float) -> str:
        """One of the values with its unit."""
        if not self.is_share:
            return metric(value)
        return percent(value) if self.higher_is_better else f"{value:.3f} times"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer in one word, one line and a few sentences, all ASCII."""

    held: bool | None
    """None: within noise, or not measured; `status` tells which."""
    status: Status
    headline: str
    promise: str
    """What was asked for, as "keep at least 95 % of the teacher's acc"."""
    sentence: str
    kept: Kept | None = None


def p_min_on_validation(report: dict) -> float | None:
    """The limit of the search in units of the metric: as reported, or else from p_min and the teacher's score."""
    if is_number(given := dig(report, "search.p_min_value")):
        return given
    p_min, base = dig(report, "search.p_min"), dig(report, "teacher.val.value")
    if not is_number(p_min) or dig(report, "search.p_min_kind") == "absolute":
        return p_min
    if not is_number(base):
        return None
    return base * p_min if dig(report, "teacher.val.higher_is_better") is not False else base / p_min


def verdict(report: dict, which: Which = "m_opt") -> Verdict:
    """Judge one hybrid of a report by its test score.

    The promise held where a test at 2.5 % says so (`dtr.evaluation.paired.kept_against`, worked out when the record was
    made), and did not hold where the opposite one does. Between the two the test set is too small to tell, an answer
    of its own, as search always ends at a hybrid near the limit.
    """
    num_replaced, num_layers = dig(report, f"{which}.num_replaced"), report.get("num_layers")
    promise = _promise(report)
    kept = _kept(report, which)
    if num_replaced == 0:
        reason = "No replacement kept the teacher's full score on validation"
        if which == "m_opt":
            reason = "The first replacement already missed the limit on validation"
            if dig(report, "search.certificate"):
                reason = "Nothing could be certified (the search says what that takes)"
        return Verdict(
            held=kept.held if kept else None,
            status="nothing replaced",
            headline="No layer is linear",
            promise=promise,
            sentence=f"{reason}, so this model is the teacher itself.",
            kept=kept,
        )
    headline = f"{_known(num_replaced)} of {_known(num_layers)} layers are linear"
    if MORE_MAY_GO in str(dig(report, "search.stop_reason")):
        headline += "; search budget exhausted, more layers may go"
    if kept is None:
        return Verdict(
            held=None,
            status="not measured",
            headline=headline,
            promise=promise,
            sentence=f"{_cost(report, which)} Whether it does what was asked ({promise}) was not measured on test.",
        )
    status: Status = "within noise" if kept.held is None else "held" if kept.held else "not held"
    sentence = f"{_cost(report, which)} {_judgement(kept, status, promise)}"
    if which != "m_opt" and dig(report, "search.certificate"):
        sentence += " The certificate is of M_opt, not of this hybrid."
    return Verdict(held=kept.held, status=status, headline=headline, promise=promise, sentence=sentence, kept=kept)


def _kept(report: dict, which: Which) -> Kept | None:
    base, hybrid = dig(report, "teacher.test") or {}, dig(report, f"{which}.test") or {}
    t, h, p_min = base.get("value"), hybrid.get("value"), dig(report, "search.p_min")
    if not (is_number(h) and is_number(p_min)):
        return None
    higher = hybrid.get("higher_is_better") is not False
    promise = dig(report, f"{which}.promise")
    if promise and is_number(promise.get("low")) and is_number(promise.get("high")):
        return Kept(**promise)
    # Reports of older versions, and scores without items, have an interval by their standard errors alone.
    if dig(report, "search.p_min_kind") == "absolute":
        half = _Z95 * (hybrid.get("stderr") or 0.0)
        return Kept.from_interval(
            measured=h, low=h - half, high=h + half, limit=p_min, is_share=False, higher_is_better=higher
        )
    if not is_number(t) or t <= 0 or h < 0 or (h == 0 and not higher):
        return None
    if dig(report, f"{which}.num_replaced") == 0:
        limit = p_min if higher else 1 / p_min
        return Kept.from_interval(measured=1.0, low=1.0, high=1.0, limit=limit, is_share=True, higher_is_better=higher)
    if higher:
        half = _half_width_of_share(report, which, p_min)
        return Kept.from_interval(measured=h / t, low=h / t - half, high=h / t + half, limit=p_min, is_share=True)
    # Ratios of perplexities are differences of log-losses, which is also what is paired.
    se = dig(report, f"{which}.paired.stderr")
    if not is_number(se):
        se = math.hypot((base.get("stderr") or 0.0) / t, (hybrid.get("stderr") or 0.0) / h)
    ratio, spread = h / t, math.exp(_Z95 * se)
    return Kept.from_interval(
        measured=ratio,
        low=ratio / spread,
        high=ratio * spread,
        limit=1 / p_min,
        is_share=True,
        higher_is_better=False,
    )


def _half_width_of_share(report: dict, which: Which, p: float) -> float:
    """Half the 95 % interval of h - p t, in units of the teacher's score t.

    var(h - p t) = var(h) + p^2 var(t) - 2 p cov(h, t), and the paired error gives the covariance:
    var(h - t) = var(h) + var(t) - 2 cov(h, t). Without it the two count as independent, which is too wide for models
    that agree on most items.
    """
    base, hybrid = dig(report, "teacher.test"), dig(report, f"{which}.test")
    var_t, var_h = (base.get("stderr") or 0.0) ** 2, (hybrid.get("stderr") or 0.0) ** 2
    paired = dig(report, f"{which}.paired.stderr")
    if not is_number(paired):
        return _Z95 * math.sqrt(var_h + p * p * var_t) / base["value"]
    half = _Z95 * math.sqrt(max(0.0, p * paired**2 + (1 - p) * (var_h - p * var_t)))
    if paired == 0 and is_number(num_items := hybrid.get("num_items")) and num_items > 0:
        # No item differs: the normal interval has no width, the rule of three says how many might differ elsewhere.
        half = max(half, 3 / num_items)
    return half / base["value"]


def _promise(report: dict) -> str:
    p_min, higher = dig(report, "search.p_min"), dig(report, "teacher.val.higher_is_better") is not False
    name = dig(report, "task.metric") or "score"
    if not is_number(p_min):
        return "keep a share of the teacher's score that the report does not name"
    if dig(report, "search.p_min_kind") == "absolute":
        return f"{name} of {'at least' if higher else 'at most'} {metric(p_min)}"
    if higher:
        return f"keep at least {percent(p_min)} of the teacher's {name}"
    return f"{name} of at most {1 / p_min:.3f} times the teacher's"


def _cost(report: dict, which: Which) -> str:
    base, hybrid, paired = (dig(report, key) or {} for key in ("teacher.test", f"{which}.test", f"{which}.paired"))
    name = dig(report, "task.metric") or "score"
    if not is_number(hybrid.get("value")):
        return "The test score of the hybrid was not measured."
    lower = " (lower is better)" if hybrid.get("higher_is_better") is False else ""
    text = (
        f"On test ({_known(hybrid.get('num_items'))} items that search never saw) the hybrid has {name} "
        f"{metric(hybrid['value'])} against the teacher's {metric(base.get('value'))}{lower}"
    )
    if is_number(drop := dig(report, f"{which}.relative_test_drop")):
        text += f", {change(drop)}"
    if all(is_number(paired.get(key)) for key in ("mean", "ci95_low", "ci95_high")):
        unit = "paired difference in nats" if lower else "paired difference"
        text += f"; {unit} {signed(paired['mean'])}, 95 % interval {signed(paired['ci95_low'])} to "
        text += signed(paired["ci95_high"])
    else:
        text += "; the paired interval was not measured"
    return text + "."


def _judgement(kept: Kept, status: Status, promise: str) -> str:
    what = f"It was asked {'to ' if promise.startswith('keep') else 'for '}{promise}"
    measured = f"{kept.show(kept.measured)} (95 % interval {kept.show(kept.low)} to {kept.show(kept.high)})"
    if status == "within noise":
        return f"{what}; measured is {measured}, so whether that held on test is within noise: more items would tell."
    return f"{what}; measured is {measured}, so that {'held' if status == 'held' else 'did not hold'} on test."


def _known(value: object) -> str:
    return f"{value:,}" if is_number(value) else "an unknown number"  # type: ignore[str-format,unused-ignore]
