"""What a task is: items with what to ask a model, and how to grade its responses. No torch in here."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from dtr.evaluation.score import Grade, Score


@dataclass(frozen=True, kw_only=True)
class LikelihoodRequest:
    """How likely is `target` after `context`? The two are tokenized as one text (`dtr.evaluation.encoding`)."""

    context: str
    target: str


@dataclass(frozen=True, kw_only=True)
class LabelRequest(LikelihoodRequest):
    """How likely is a class after `context`, by the model's classification head? `target` only names the class."""

    label: int


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What does the model write after `context`, greedily?"""

    context: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    """Text ends before the first of these."""


Request = LikelihoodRequest | GenerationRequest


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Response to a LikelihoodRequest."""

    log_prob: float
    """Natural log of the probability of the whole target."""
    is_greedy: bool
    """Whether greedy decoding from the context writes exactly the target's tokens."""
    num_tokens: int
    """Tokens of the target."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Response to a GenerationRequest."""

    text: str


Response = Likelihood | Generation


def all_finite(responses: Sequence[Response]) -> bool:
    """Whether every log-probability is a number; a model that gives others has lost the item."""
    return all(math.isfinite(x.log_prob) for x in responses if isinstance(x, Likelihood))


EndSpace = Literal["moved", "left out", "kept"]
"""White space that ends a prompt goes to the answers that are scored, is left to the model to write, or stays."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question: the row it came from and the requests it needs."""

    id: str
    requests: tuple[Request, ...]
    row: Mapping[str, Any] = field(default_factory=dict)
    group: str | None = None
    """Items of one passage or document share a group: they err together, so draws and tests go by group."""
    end_space: EndSpace | None = None
    """What became of white space at the end of the prompt; None where there was none."""


class Task(Protocol):
    """A task is anything with these attributes; see `dtr.tasks.multiple_choice` for a short one."""

    # Properties, as a protocol's plain attributes would rule out frozen tasks.
    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def metric(self) -> str: ...

    @property
    def chat_template(self) -> bool: ...

    @property
    def splits(self) -> Mapping[str, Sequence[Item]]:
        """`validation` (search looks at it) and `test` (scored once at the end): disjoint, never empty."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that belong beside every score, as that validation was cut from the test split."""

    def grade(self, item: Item, responses: Sequence[Response]) -> Grade: ...

    def summarize(self, grades: Sequence[Grade]) -> Score: ...


def names_apart(tasks: Sequence[Task]) -> list[str]:
    """A name for each task, none of them twice: one task at two lengths is `needle` and `needle (2)`.

    Scores in a journal and fingerprints of a run are told apart by it.
    """
    names: list[str] = []
    for task in tasks:
        name, number = task.name, 1
        while name in names:
            number += 1
            name = f"{task.name} ({number})"
        names.append(name)
    return names


def fingerprint(task: Task) -> str:
    """Hash of everything the score depends on: rows, prompts, metric. 16 hex digits."""
    digest = hashlib.sha256(repr((task.kind, task.metric, task.chat_template)).encode())
    for split in sorted(task.splits):
        for item in task.splits[split]:
            digest.update(
                json.dumps(
                    [
                        split,
                        item.id,
                        [repr(r) for r in item.requests],
                        dict(item.row),
                        *([item.group] if item.group else []),
                    ],
                    sort_keys=True,
                    default=str,
                ).encode()
            )
    return digest.hexdigest()[:16]
