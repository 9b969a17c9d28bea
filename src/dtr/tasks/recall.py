"""Recall: a built-in task that asks for one of several facts stated a few words earlier.

What linear attention loses first is looking things up in its context, so this is the sharpest quick test of a hybrid,
and it needs no data. An item reads

    The red lantern smells like honey. The old clock is called tiger. ...
    As said above: The old clock is called

and is right if greedy decoding writes exactly the answer. The words `As said above:` matter: without them small
models take the last line for a new fact and avoid the word they have just read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from dtr.errors import DataError, RecipeError, did_you_mean
from dtr.evaluation.score import Grade, Score, lost_grade, mean_score
from dtr.recipe import Section
from dtr.tasks.base import Item, Likelihood, LikelihoodRequest, Response, all_finite
from dtr.tasks.spec import TASKS, TaskSpec, choose_metric, read_options, refuse_settings

SPLITS = ("train", "validation", "test")
DEFAULT_NUM_ITEMS = {"train": 1024, "validation": 64, "test": 128}

COLORS = ("red", "blue", "green", "yellow", "black", "white", "purple", "orange", "brown", "gray", "silver", "golden")
OBJECTS = (
    *("lantern", "door", "box", "bottle", "basket", "chair", "wagon", "clock", "drawer", "bell", "mirror", "ladder"),
    *("table", "carpet", "curtain", "bucket"),
)
# Common nouns that most tokenizers write as one token and that take "a", not "an".
ANSWERS = (
    *("river", "tiger", "piano", "winter", "copper", "garden", "pepper", "rabbit", "candle", "bridge", "forest"),
    *("window", "lemon", "castle", "dragon", "butter", "flower", "hammer", "jacket", "kitten", "magnet", "needle"),
    *("pencil", "rocket", "saddle", "tunnel", "violin", "walnut", "camera", "desert", "feather", "guitar", "honey"),
    *("jungle", "mango", "parrot", "queen", "ribbon", "salmon", "temple", "valley", "whale", "zebra", "doctor"),
    *("planet", "cotton", "tomato", "turtle"),
)
STATEMENTS = (
    "The {} is called",
    "The {} is hidden behind the",
    "The secret word of the {} is",
    "The {} smells like",
    "The {} was traded for a",
    "The {} stands beside the",
    "The {} was named after a",
    "The {} is covered with",
    "The {} was found under the",
    "The {} has a picture of a",
    "The {} reminds everyone of a",
    "The {} is shaped like a",
)
FILLERS = (
    "The sky was clear that morning.",
    "Nobody spoke for a while.",
    "A cold wind came from the north.",
    "The road was long and quiet.",
    "It rained until the evening.",
    "The children played outside.",
    "Dinner was served at seven.",
    "Someone closed the gate.",
    "The train arrived on time.",
    "The shop was open all day.",
)
QUERY = "\nAs said above: "


class RecallOptions(Section):
    """`task.options` of recall; an item of 6 facts is about 60 tokens, a filler sentence adds 6 or 7."""

    num_facts: int = Field(default=6, ge=2, le=len(ANSWERS))
    """Facts in a passage, each with its own answer: more is harder."""
    num_filler_sentences: int = Field(default=0, ge=0, le=100_000)
    """Sentences without a fact, spread over the passage: a longer way back, and longer items."""


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """A task whose items complete a sentence that stands in their passage."""

    name: str = "recall"
    kind: str = "recall"
    metric: str = "exact_match"
    chat_template: bool = False
    splits: Mapping[str, Sequence[Item]]
    notes: tuple[str, ...] = ()

    def grade(self, item: Item, responses: Sequence[Response]) -> Grade:
        """1 where greedy decoding writes exactly the answer, else 0."""
        (response,) = responses
        assert isinstance(response, Likelihood)
        if not all_finite(responses):
            return lost_grade()
        return Grade(value=float(response.is_greedy), log_likelihood=response.log_prob)

    def summarize(self, grades: Sequence[Grade]) -> Score:
        return mean_score(self.metric, grades)


@TASKS.register("recall")
def load_recall(spec: TaskSpec) -> RecallTask:
    """Make the recall task; `validation` and `test` may name any of the splits train, validation and test.

    Raises:
        RecipeError: settings that do not fit.
        DataError: the same split is asked for twice.
    """
    options = read_options(RecallOptions, spec)

    def make(split: str, num_items: int | None) -> tuple[Item, ...]:
        return recall_items(split, num_items, options=options, seed=spec.seed)

    return make_recall_task(spec, make)


def make_recall_task(spec: TaskSpec, make: Callable[[str, int | None], tuple[Item, ...]]) -> RecallTask:
    """A task that makes its own items: `make` gives those of a split, as many as asked for.

    Raises:
        RecipeError: settings that do not fit.
        DataError: the same split is asked for twice.
    """
    refuse_settings(spec, "prompt", "target", "chat_template", "cut_validation", "fields", "group")
    metric = choose_metric(spec, ("exact_match",), "exact_match")
    for where, split in (("task.validation", spec.validation), ("task.test", spec.test)):
        if split not in SPLITS:
            hint = f"The task makes its own items; set num_validation and num_test. {did_you_mean(split, SPLITS)}"
            raise RecipeError(where, got=f"'{split}'", expected=f"a split of {spec.kind}, without a range", hint=hint)
    if spec.validation == spec.test:
        raise DataError("task.test", got=f"'{spec.test}' as for validation", expected="another split than validation")
    splits = {"validation": make(spec.validation, spec.num_validation), "test": make(spec.test, spec.num_test)}
    return RecallTask(name=spec.name, kind=spec.kind, metric=metric, splits=splits)


def recall_items(
    split: str, num_items: int | None = None, *, options: RecallOptions | None = None, seed: int = 0
) -> tuple[Item, ...]:
    """Items of one split; a longer draw begins with the items of a shorter one.

    No pair of a thing and its answer occurs in two splits, so no passage, question or fact does either.

    Args:
        split: train, validation or test.
        num_items: 64 for validation, 128 for test and 1024 for train when left out.

    Raises:
        DataError: more items than can differ.
    """
    options = options or RecallOptions()
    draw = Draw(f"recall/{seed}/{split}/{options.num_facts}/{options.num_filler_sentences}")
    num_items = DEFAULT_NUM_ITEMS[split] if num_items is None else num_items
    items: dict[str, Item] = {}
    for _ in range(100 * num_items):
        if len(items) == num_items:
            break
        item = _make_item(draw, options, split, len(items))
        items.setdefault(repr(item.requests), item)
    if len(items) < num_items:
        raise DataError(f"task.num_{split}", got=str(num_items), expected=f"at most {len(items)}, all that differ")
    return tuple(items.values())


class Draw:
    """Random choices that are the same on every Python version: only `random()` is promised to be."""

    def __init__(self, key: str) -> None:
        self._random = random.Random(key).random

    def below(self, bound: int) -> int:
        return int(self._random() * bound)

    def sample(self, pool: Sequence[str], size: int) -> list[str]:
        """`size` different members in random order."""
        keys = [self._random() for _ in pool]
        return [pool[i] for i in sorted(range(len(pool)), key=keys.__getitem__)[:size]]

    def stretch(self, pool: Sequence[str], size: int) -> list[str]:
        """`size` members, each again only when all were taken."""
        out: list[str] = []
        while len(out) < size:
            out += self.sample(pool, size - len(out))
        return out


def _make_item(draw: Draw, options: RecallOptions, split: str, number: int) -> Item:
    answers = draw.sample(ANSWERS, options.num_facts)
    statements = draw.stretch(STATEMENTS, options.num_facts)
    facts: dict[str, str] = {}
    for answer, statement in zip(answers, statements):
        thing = draw_thing(draw, answer, split)
        while any(thing in begun for begun in facts):
            thing = draw_thing(draw, answer, split)
        facts[statement.format(thing)] = answer
    asked = list(facts)[draw.below(len(facts))]
    sentences = [f"{begun} {answer}." for begun, answer in facts.items()]
    sentences += draw.stretch(FILLERS, options.num_filler_sentences)
    passage = " ".join(draw.sample(sentences, len(sentences)))
    request = LikelihoodRequest(context=f"{passage}{QUERY}{asked}", target=f" {facts[asked]}")
    row = {"question": asked, "answer": facts[asked], "num_facts": len(facts)}
    return Item(id=f"{split}:{number}", requests=(request,), row=row)


def draw_thing(draw: Draw, answer: str, split: str) -> str:
    """A colored object that may go with this answer in this split: each split has a third of all pairs."""
    color, thing = draw.below(len(COLORS)), draw.below(len(OBJECTS))
    shift = SPLITS.index(split) - ANSWERS.index(answer) - thing - color
    # 12 colors are four full turns of three, so every object keeps a color in each split.
    return f"{COLORS[(color + shift % 3) % len(COLORS)]} {OBJECTS[thing]}"
