"""What would fail after hours is tried in seconds: an item of each split from prompt to grade, and sizes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from dtr.corpus.mixing import MixedBlocks, Text
from dtr.distillation.bank import Spec
from dtr.distributed import current_world
from dtr.environment import hardware
from dtr.errors import DataError, DtrError, RecipeError
from dtr.evaluation.encoding import check_ids
from dtr.evaluation.evaluator import Evaluator, evaluate
from dtr.evaluation.score import Grade, Score
from dtr.mixers import make_mixer
from dtr.recipe import Recipe
from dtr.selection.binding import cache_sizes
from dtr.selection.settings import SearchSettings
from dtr.tasks.base import GenerationRequest, Item, Response, Task
from dtr.teacher import Teacher

BYTES_PER_TRAINED_WEIGHT = 16
"""Weight, gradient and AdamW's two moments, all float32."""


@dataclass(frozen=True, kw_only=True)
class _Excerpt:
    """Some items of a task, graded as it grades them."""

    task: Task
    splits: Mapping[str, Sequence[Item]]
    name: str
    kind: str
    metric: str
    chat_template: bool
    notes: tuple[str, ...] = ()

    def grade(self, item: Item, responses: Sequence[Response]) -> Grade:
        return self.task.grade(item, responses)

    def summarize(self, grades: Sequence[Grade]) -> Score:
        return self.task.summarize(grades)


def try_task(teacher: Teacher, task: Task, *, batch_tokens: int) -> None:
    """Tokenize every item of a task, and ask the teacher the longest and the shortest of each split for one token.

    Raises:
        DtrError: what of the task, its data or the tokenizer does not fit this teacher.
    """
    for split, items in task.splits.items():
        where = f"task {task.name}, {split}"
        with _telling(where, "items that this tokenizer can show to this model"):
            Evaluator(teacher.model, teacher.tokenizer, task, split, cache_bytes=0)
        by_length = sorted(items, key=lambda item: max(len(request.context) for request in item.requests))
        # Of different lengths, so that one is padded.
        ends = by_length[:1] if len(by_length) == 1 else [by_length[0], by_length[-1]]
        excerpt = _Excerpt(
            task=task,
            splits={split: [_one_token(item) for item in ends]},
            name=task.name,
            kind=task.kind,
            metric=task.metric,
            chat_template=task.chat_template,
        )
        with _telling(where, "items that can be asked and graded"):
            evaluate(teacher, excerpt, split=split, batch_tokens=batch_tokens)


def try_text(text: Text, teacher: Teacher) -> None:
    """Refuse text whose tokens the model does not have; of streamed text only what is held out is known yet.

    Raises:
        DataError: names the source and the token.
    """
    if teacher.tokenizer.eos_token_id is None and teacher.tokenizer.bos_token_id is None:
        warnings.warn(
            "the tokenizer names neither an end nor a start token, so documents of the training text follow each other "
            "without anything between them.",
            stacklevel=2,
        )
    for part in [part.text for part in text.parts] if isinstance(text, MixedBlocks) else [text]:
        for blocks in (part.held_out, getattr(part, "train", part.held_out)):
            highest = [int(blocks.max())] if blocks.numel() else []
            check_ids(highest, teacher.model, where=f"text {part.source}")


def check_step(recipe: Recipe, teacher: Teacher, specs: Sequence[Spec], num_layers: int) -> None:
    """Refuse a training that cannot fit into this machine: a bound from below, as what fits is only known by trying.

    Raises:
        RecipeError: mixers, or a step's sequences, that need more than all of its memory.
    """
    settings = recipe.distill
    limit = getattr(teacher.model.config, "max_position_embeddings", None)
    if limit and settings.seq_len_tokens > limit:
        warnings.warn(
            f"distill.seq_len_tokens is {settings.seq_len_tokens:,}, but the teacher was made for {limit:,} positions: "
            "what it does beyond them is what mixers will learn.",
            stacklevel=2,
        )
    check_weights(teacher, specs, num_layers)
    num_sequences = -(-settings.batch_size // current_world().size)
    hint = "Lower distill.batch_size or distill.seq_len_tokens."
    check_activations(teacher, num_sequences, settings.seq_len_tokens, where="distill.batch_size", hint=hint)


def machine_room(device: torch.device) -> int | None:
    """Bytes of memory that there are where models run; None where the system does not say."""
    facts = hardware(device)
    return facts.get("gpu_memory_bytes") or facts["memory_bytes"]


def check_weights(
    teacher: Teacher, specs: Sequence[Spec], num_layers: int, *, bytes_each: int = BYTES_PER_TRAINED_WEIGHT
) -> None:
    """Refuse mixers whose weights need more than all of this machine's memory; raises RecipeError."""
    room = machine_room(teacher.device)
    num_weights = sum(p.numel() for spec in specs for p in _shape(teacher, spec).parameters())
    if room is not None and (needed := bytes_each * num_weights * num_layers) > room:
        raise RecipeError(
            "mixer.options",
            got=f"{num_layers} layers of {num_weights:,} weights, {needed / 1e9:,.1f} GB",
            expected=f"mixers that fit into {room / 1e9:,.1f} GB",
            hint="Choose smaller options, or fewer distill.layers.",
        )


def check_activations(teacher: Teacher, num_sequences: int, num_tokens: int, *, where: str, hint: str) -> None:
    """Refuse a step whose sequences, on this rank, need more than all of this machine's memory.

    Raises:
        RecipeError: of the setting `where`.
    """
    room = machine_room(teacher.device)
    needed = 2 * num_sequences * num_tokens * teacher.geometry.hidden_dim * teacher.dtype.itemsize
    if room is not None and needed > room:
        raise RecipeError(
            where,
            got=f"{num_sequences:,} sequences of {num_tokens:,} tokens, "
            f"{needed / 1e9:,.1f} GB for one layer's input and output",
            expected=f"a step that fits into {room / 1e9:,.1f} GB",
            hint=hint,
        )


def check_budget(teacher: Teacher, specs: Sequence[Spec], num_layers: int, settings: SearchSettings) -> None:
    """Refuse a budget for the cache that all layers linear would not meet either; `search` does the same, later.

    Raises:
        RecipeError: says what would be met.
    """
    if settings.max_cache_bytes is not None:
        state_bytes = max(_shape(teacher, spec).state_bytes(teacher.dtype.itemsize) for spec in specs)
        cache_sizes(teacher, state_bytes, num_layers, settings)


def _shape(teacher: Teacher, spec: Spec) -> Any:
    """A mixer without memory for its weights."""
    options = {key: value for key, value in spec.items() if key != "kind"}
    with torch.device("meta"):
        return make_mixer(spec["kind"], teacher.geometry, 0, options)


def _one_token(item: Item) -> Item:
    requests = (replace(r, max_new_tokens=1) if isinstance(r, GenerationRequest) else r for r in item.requests)
    return replace(item, requests=tuple(requests))


@contextmanager
def _telling(where: str, expected: str) -> Iterator[None]:
    """Word what libraries raise on a tokenizer, template or metric that does not work."""
    try:
        yield
    except (DtrError, AssertionError):
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise DataError(
            where,
            got=f"{type(error).__name__}: {first}".rstrip(": "),
            expected=expected,
            hint="Nothing was trained. --debug shows where it came from.",
        ) from error
