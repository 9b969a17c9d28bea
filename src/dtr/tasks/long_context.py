"""Long context: a needle among look-alikes, and variables to follow, in the manner of RULER (Hsieh et al. 2024).

`needle` states the code words of several things in a long text and asks for one of them. In `variables` things hold
words, or what other things hold, and the word at the end of one chain is asked for. Each item has a nominal length and
a depth, the place of what is asked for (0 begins the text, 1 ends it), so that a score can be drawn as a map of both.
The wording, the lists and the vocabulary are our own, so scores compare between models here, not with published ones.
Built in and seeded; right if greedy decoding writes exactly the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from pydantic import Field, field_validator

from dtr.evaluation.score import Score
from dtr.recipe import Section
from dtr.tasks.base import Item, LikelihoodRequest
from dtr.tasks.recall import ANSWERS, QUERY, Draw, RecallTask, draw_thing, make_recall_task
from dtr.tasks.spec import TASKS, TaskSpec, read_options

ITEMS_PER_CELL = {"train": 8, "validation": 2, "test": 4}
TIMES = ("In the morning", "After lunch", "Late at night", "On Monday", "Last summer", "Before the storm", "At noon")
PEOPLE = ("the baker", "a young nurse", "her uncle", "the old sailor", "my neighbor", "the teacher", "a tall farmer")
ACTS = ("washed the dishes", "wrote a letter", "walked home", "sang a song", "fed the horses", "read the news")
ACTS_TOO = ("painted a fence", "waited for the bus", "cut some wood", "closed the shop", "slept for an hour")
PLACES = ("near the station", "by the lake", "in the kitchen", "behind the church", "on the hill", "at the market")


class LongContextOptions(Section):
    """`task.options` of needle and variables."""

    lengths_tokens: list[int] = Field(default_factory=lambda: [1024, 2048, 4096], min_length=1, max_length=100)
    """Nominal lengths; words and marks are counted, which common tokenizers meet within a few percent."""
    depths: list[float] = Field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0], min_length=1, max_length=1000)
    """Places of what is asked for, from 0 at the beginning to 1 at the end."""
    num_facts: int = Field(default=4, ge=1, le=16)
    """Statements of one form, or chains of variables, of which one is asked for: more is harder."""
    num_hops: int = Field(default=1, ge=0, le=4)
    """Of `variables`: how many times the value is handed on."""

    @field_validator("lengths_tokens")
    @classmethod
    def _long_enough(cls, lengths: list[int]) -> list[int]:
        if min(lengths) < 128 or max(lengths) > 2**22:
            raise ValueError("lengths of at least 128 tokens and at most 4,194,304")
        return lengths

    @field_validator("depths")
    @classmethod
    def _within(cls, depths: list[float]) -> list[float]:
        if not all(0 <= depth <= 1 for depth in depths):
            raise ValueError("depths from 0 to 1")
        return depths


@TASKS.register("needle")
def load_needle(spec: TaskSpec) -> RecallTask:
    """Make the needle task.

    Raises:
        RecipeError: settings that do not fit.
        DataError: the same split is asked for twice.
    """
    return _load(spec)


@TASKS.register("variables")
def load_variables(spec: TaskSpec) -> RecallTask:
    """Make the variable-tracking task; as `load_needle`."""
    return _load(spec)


def score_map(items: Sequence[Item], score: Score) -> dict[str, list] | None:
    """Mean score by length (rows) and depth (columns); None where the items have neither.

    Returns:
        `lengths`, `depths` and `values`, where a cell without an item is None.
    """
    cells: dict[tuple[int, float], list[float]] = {}
    for item, value in zip(items, score.per_item):
        if "depth" not in item.row:
            return None
        cells.setdefault((item.row["length_tokens"], item.row["depth"]), []).append(value)
    lengths, depths = sorted({length for length, _ in cells}), sorted({depth for _, depth in cells})
    mean = {cell: sum(values) / len(values) for cell, values in cells.items()}
    return {"lengths": lengths, "depths": depths, "values": [[mean.get((n, d)) for d in depths] for n in lengths]}


def _load(spec: TaskSpec) -> RecallTask:
    options = read_options(LongContextOptions, spec)
    cells = [(length, depth) for length in options.lengths_tokens for depth in options.depths]
    facts = _needle_facts if spec.kind == "needle" else _variable_facts

    def make(split: str, num_items: int | None) -> tuple[Item, ...]:
        draw = Draw(f"{spec.kind}/{spec.seed}/{split}/{options}")
        num_items = ITEMS_PER_CELL[split] * len(cells) if num_items is None else num_items
        items = []
        for number in range(num_items):
            length, depth = cells[number % len(cells)]
            groups, asked, answer = facts(draw, options, split)
            passage = _passage(draw, groups, length, depth)
            request = LikelihoodRequest(context=f"{passage}{QUERY}{asked}", target=f" {answer}")
            row = {"question": asked, "answer": answer, "length_tokens": length, "depth": depth}
            items.append(Item(id=f"{split}:{number}", requests=(request,), row=row))
        return tuple(items)

    return make_recall_task(spec, make)


def _needle_facts(draw: Draw, options: LongContextOptions, split: str) -> tuple[list[list[str]], str, str]:
    """Statements, the asked one first; the words that ask for it; its answer."""
    answers = draw.sample(ANSWERS, options.num_facts)
    things: list[str] = []
    for answer in answers:
        things.append(_new_thing(draw, answer, split, things))
    groups = [[f"The code word of the {thing} is {answer}."] for thing, answer in zip(things, answers)]
    return groups, f"The code word of the {things[0]} is", answers[0]


def _variable_facts(draw: Draw, options: LongContextOptions, split: str) -> tuple[list[list[str]], str, str]:
    """Chains of assignments, the asked one first; the words that ask for its last variable; its value.

    The variables are things, as small models hardly recall names such as X17 at all, even without a hop.
    """
    answers = draw.sample(ANSWERS, options.num_facts)
    names: list[str] = []
    groups, last = [], ""
    for answer in answers:
        chain: list[str] = []
        for _ in range(options.num_hops + 1):
            chain.append(_new_thing(draw, answer, split, names))
            names.append(chain[-1])
        steps = [f"The {chain[0]} holds the word {answer}."]
        steps += [f"The {after} holds the same word as the {before}." for before, after in pairwise(chain)]
        groups.append(steps)
        last = last or chain[-1]
    return groups, f"The {last} holds the word", answers[0]


def _new_thing(draw: Draw, answer: str, split: str, taken: Sequence[str]) -> str:
    thing = draw_thing(draw, answer, split)
    while thing in taken:
        thing = draw_thing(draw, answer, split)
    return thing


def _passage(draw: Draw, groups: list[list[str]], length_tokens: int, depth: float) -> str:
    """Statements among filler: the first group from `depth` on, the others anywhere, each group in its order."""
    taken = sum(_count_tokens(statement) for group in groups for statement in group) + 24
    filler: list[str] = []
    while taken < length_tokens:
        filler.append(_filler(draw))
        taken += _count_tokens(filler[-1])
    first = depth * len(filler)
    places: list[tuple[float, int, str]] = []
    for number, group in enumerate(groups):
        start = first if number == 0 else draw.below(len(filler) + 1)
        for step, statement in enumerate(group):
            # The rest of a chain spreads over what is left of the text.
            at = start + (len(filler) - start) * step / len(group)
            places.append((at, len(places), statement))
    for at, _, statement in sorted(places, reverse=True):
        filler.insert(round(at), statement)
    return " ".join(filler)


def _filler(draw: Draw) -> str:
    time, person, act, place = (pool[draw.below(len(pool))] for pool in (TIMES, PEOPLE, ACTS + ACTS_TOO, PLACES))
    return f"{time} {person} {act} {place}."


def _count_tokens(text: str) -> int:
    return len(re.findall(r"[A-Za-z]+|\d|[^\w\s]", text))
