"""A task's score for any choice of linear layers. Teacher and hybrids take the same path."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dtr.arch import is_classifier, make_runner, with_mixer
from dtr.errors import DataError, ModelError
from dtr.evaluation.batches import TokenPair
from dtr.evaluation.encoding import Encoder, check_ids, check_room, padding_id
from dtr.evaluation.generation import generate_texts
from dtr.evaluation.likelihood import LikelihoodScorer
from dtr.evaluation.probe import impact
from dtr.evaluation.score import Grade, Score, in_groups
from dtr.hybrid.modeling import make_hybrid
from dtr.mixers.base import Mixer
from dtr.tasks.base import (
    Generation,
    GenerationRequest,
    Item,
    LabelRequest,
    Likelihood,
    LikelihoodRequest,
    Request,
    Response,
    Task,
    all_finite,
)

MAX_REMEMBERED = 256
"""Hybrids whose answers to portions of the items are remembered; a larger portion follows soon or never."""


class Evaluator:
    """Scores one split of a task again and again while layers change.

    Args:
        model: the teacher's causal language model, or any hybrid.
        tokenizer: its tokenizer.
        task: what to ask.
        split: validation or test.
        mixers: the mixers that may replace attention, by number (`MixerBank`), in the model's dtype.
        specs: number to the mixer's entry in `config.mixers`.
        batch_tokens: padded tokens per batch.
        cache_bytes: memory for hidden states that are reused between candidates.
        blocks: items that may be scored alone, by index, together all items; one block of all when left out.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        split: str,
        *,
        mixers: Mapping[int, Mixer] | None = None,
        specs: Mapping[int, dict] | None = None,
        batch_tokens: int = 16_384,
        cache_bytes: int = 4_000_000_000,
        blocks: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._model, self._tokenizer, self._task = model, tokenizer, task
        self._items: Sequence[Item] = task.splits[split]
        self._mixers, self._specs = dict(mixers or {}), dict(specs or {})
        self._batch_tokens = batch_tokens
        self._num_generating_passes = 0.0
        self._grades: dict[frozenset[int], dict[int, Grade]] = {}
        self._encoder = Encoder(tokenizer, chat_template=task.chat_template)
        self._check_head()
        pairs: list[TokenPair] = []
        self._pairs_of: list[list[int]] = []
        """By item, where its likelihood requests are among all pairs."""
        for item in self._items:
            self._check_room(item)
            asked = [request for request in item.requests if isinstance(request, LikelihoodRequest)]
            own = [self._pair(request, asked) for request in asked]
            self._pairs_of.append(list(range(len(pairs), len(pairs) + len(own))))
            pairs += own
        runner = make_runner(model)
        self._likelihoods = LikelihoodScorer(
            runner,
            {number: with_mixer(runner.layers[mixer.layer_idx], mixer) for number, mixer in self._mixers.items()},
            pairs,
            pad_token_id=padding_id(tokenizer, model),
            device=model.device,
            batch_tokens=batch_tokens,
            cache_bytes=cache_bytes,
            groups=None if blocks is None else [self._pairs_in(block) for block in blocks],
            questions=self._pairs_of,
            layer_of={number: mixer.layer_idx for number, mixer in self._mixers.items()},
        )

    @property
    def pass_equivalents(self) -> float:
        """Work so far in full passes over the split (each generating pass counts as one)."""
        return self._likelihoods.pass_equivalents + self._num_generating_passes

    @property
    def pass_share(self) -> float:
        """What a score over the whole split costs in that unit, if only likelihoods are asked for."""
        return self._likelihoods.pass_share

    def __call__(
        self,
        linear: frozenset[int] = frozenset(),
        *,
        base: frozenset[int] | None = None,
        items: Sequence[int] | None = None,
    ) -> Score:
        """Score with the layers in `linear` replaced.

        Args:
            linear: the mixers in place, by number, at most one for each layer.
            base: what the candidate was derived from.
            items: a union of blocks to score; all items when left out. What a hybrid answered is remembered, so that a
                larger union costs only what is new in it.
        """
        wanted = range(len(self._items)) if items is None else items
        # Whole splits are asked for once each; only portions come again.
        grades = {} if items is None else self._grades.setdefault(linear, {})
        if len(self._grades) > MAX_REMEMBERED:
            del self._grades[next(iter(self._grades))]
        new = [index for index in wanted if index not in grades]
        if new:
            found = self.respond(linear, base=base, items=None if items is None else new)
            self._check_finite(linear, found)
            for index, responses in zip(new, found):
                grades[index] = self._task.grade(self._items[index], responses)
        score = self._task.summarize([grades[index] for index in wanted])
        return in_groups(score, [self._items[index].group for index in wanted])

    def respond(
        self,
        linear: frozenset[int] = frozenset(),
        *,
        base: frozenset[int] | None = None,
        items: Sequence[int] | None = None,
    ) -> list[list[Response]]:
        """The responses to the requests of each item, or of each of `items`, a union of blocks."""
        only = None if items is None else self._pairs_in(items)
        likelihoods = iter(self._likelihoods(linear, base=linear if base is None else base, only=only))
        chosen = range(len(self._items)) if items is None else items
        texts = iter(self._generate(linear, chosen))
        return [
            [self._response(request, likelihoods, texts) for request in self._items[index].requests] for index in chosen
        ]

    def divergence(self, layer: int, items: Sequence[int] | None = None) -> float | None:
        """Mean KL(teacher || teacher with `layer` linear) in nats over the answers; None where answers are generated.

        `items` is a union of blocks; all items when left out.
        """
        if not any(self._pairs_of):
            return None
        only = None if items is None else self._pairs_in(items)
        return self._likelihoods.divergence(frozenset({layer}), only=only)

    @torch.no_grad()
    def impact(self, layer: int, items: Sequence[int] | None = None) -> float | None:
        """Impact of `layer` by linear probes (`dtr.evaluation.probe`); None unless every item has answers to rank.

        `items` is a union of blocks; all items when left out.
        """
        chosen = range(len(self._items)) if items is None else items
        right = [self._right_answer(self._items[index]) for index in chosen]
        if None in right or len(right) < 2:
            return None
        ends = itertools.accumulate((len(self._pairs_of[index]) for index in chosen), initial=0)
        questions = [range(start, end) for start, end in itertools.pairwise(ends)]
        only = self._pairs_in(chosen)
        full, linear = (self._likelihoods.features(layer, is_linear=x, only=only) for x in (False, True))
        return impact(full, linear, questions, [at for at in right if at is not None])

    def _right_answer(self, item: Item) -> int | None:
        """Which request's answer is the right one: the one that earns the item when it is the likeliest."""
        requests = item.requests
        if len(requests) < 2 or not all(isinstance(request, LikelihoodRequest) for request in requests):
            return None
        for at in range(len(requests)):
            responses = [
                Likelihood(log_prob=0.0 if other == at else -1e9, is_greedy=False, num_tokens=1)
                for other in range(len(requests))
            ]
            if self._task.grade(item, responses).value == 1.0:
                return at
        return None

    def _pairs_in(self, items: Sequence[int]) -> list[int]:
        return [pair for index in items for pair in self._pairs_of[index]]

    def _generate(self, linear: frozenset[int], items: Sequence[int]) -> list[str]:
        requests = [r for index in items for r in self._items[index].requests if isinstance(r, GenerationRequest)]
        if not requests:
            return []
        self._num_generating_passes += len(items) / len(self._items)
        model = self._model
        if linear:
            mixers = [self._mixers[number] for number in linear]
            specs = [self._specs[number] for number in linear]
            layers = [mixer.layer_idx for mixer in mixers]
            model = make_hybrid(model, dict(zip(layers, mixers)), dict(zip(layers, specs)), share_modules=True)
        return generate_texts(
            model,
            self._tokenizer,
            requests,
            chat_template=self._task.chat_template,
            batch_tokens=self._batch_tokens,
        )

    def _check_finite(self, linear: frozenset[int], found: Sequence[Sequence[Response]]) -> None:
        """A model as it was given must answer with numbers; a candidate that does not loses those items."""
        num_lost = sum(not all_finite(responses) for responses in found)
        if not num_lost:
            return
        if not linear:
            raise ModelError(
                f"task {self._task.name}",
                got=f"log-probabilities that are no finite numbers on {num_lost} of {len(found)} items",
                expected="a model that answers with numbers",
                hint="Load it with dtype float32, and look at its weights and at what it answers to one item.",
            )
        layers = sorted(self._mixers[number].layer_idx for number in linear)
        warnings.warn(
            f"log-probabilities with mixers in layers {', '.join(map(str, layers))} are no finite numbers on "
            f"{num_lost} of {len(found)} items, which count as lost.",
            stacklevel=3,
        )

    def _check_head(self) -> None:
        """The task asks for what the model's head gives."""
        num_classes = self._model.config.num_labels if is_classifier(self._model) else 0
        requests = [request for item in self._items for request in item.requests]
        labels = [request.label for request in requests if isinstance(request, LabelRequest)]
        where = f"task {self._task.name}"
        if (num_classes and len(labels) < len(requests)) or (labels and not num_classes):
            raise DataError(
                where,
                got=f"a model {'with' if num_classes else 'without'} a classification head",
                expected=f"{'' if labels else 'no '}classification head, as the task asks",
                hint="Change task.options.head of a classification task, or the model.",
            )
        if labels and max(labels) >= num_classes:
            raise DataError(
                where,
                got=f"the label {max(labels)}",
                expected=f"labels from 0 to {num_classes - 1}, the classes of the model's head",
                hint="Use rows with the labels that the head was trained on.",
            )

    def _check_room(self, item: Item) -> None:
        """What an item writes fits the model's positions."""
        for request in item.requests:
            if isinstance(request, GenerationRequest):
                self._fit(self._encoder.prompt(request.context), request.max_new_tokens, request.context)

    def _fit(self, ids: Sequence[int], num_new_tokens: int, text: str) -> None:
        check_ids(ids, self._model, where=f"task {self._task.name}", text=text)
        limit = getattr(self._model.config, "max_position_embeddings", None)
        check_room(len(ids), num_new_tokens, limit, task=self._task.name, text=text)

    def _pair(self, request: LikelihoodRequest, asked: Sequence[LikelihoodRequest] = ()) -> TokenPair:
        """The request's tokens; `asked` are all those of its item."""
        if isinstance(request, LabelRequest):
            # The head scores classes at the last token of the context, where others score the next token.
            pair = TokenPair(context=self._encoder.whole(request.context), target=(request.label,))
        else:
            beside = [other.target for other in asked if other.context == request.context]
            pair = self._encoder.pair(request.context, request.target, beside=beside)
        if not pair.target:
            raise DataError(
                f"task {self._task.name}",
                got=f"the answer {request.target!r}, which has no tokens",
                expected="answers with text",
                hint="Check the target template and the rows.",
            )
        # A class is no token.
        target = () if isinstance(request, LabelRequest) else pair.target
        self._fit((*pair.context, *target), 0, request.context)
        return pair

    @staticmethod
    def _response(request: Request, likelihoods: Any, texts: Any) -> Response:
        return next(likelihoods) if isinstance(request, LikelihoodRequest) else Generation(text=next(texts))


def evaluate(
    model: Any, task: Task, *, split: str = "test", tokenizer: Any = None, batch_tokens: int = 16_384
) -> Score:
    """Score a model on one split of a task.

    Args:
        model: a Teacher, or a causal language model (hybrids included) together with `tokenizer`.
        task: from `load_task`.
        split: validation or test.
        tokenizer: needed for a bare model.
        batch_tokens: padded tokens per batch.

    Returns:
        the score with its standard error and per-item values.
    """
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    network = model if isinstance(model, nn.Module) else model.model
    if tokenizer is None:
        raise DataError("tokenizer", got="nothing", expected="the model's tokenizer", hint="Pass tokenizer=...")
    with torch.no_grad():
        return Evaluator(network, tokenizer, task, split, batch_tokens=batch_tokens, cache_bytes=0)()
