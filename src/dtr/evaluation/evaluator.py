"""A task's score for any choice of linear layers. Teacher and hybrids take the same path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dtr.arch import LayerRunner, with_mixer
from dtr.errors import DataError
from dtr.evaluation.generation import encode_context, generate_texts
from dtr.evaluation.likelihood import LikelihoodScorer, TokenPair
from dtr.evaluation.score import Score
from dtr.hybrid.modeling import make_hybrid
from dtr.tasks.base import Generation, GenerationRequest, Item, LikelihoodRequest, Request, Response, Task


class Evaluator:
    """Scores one split of a task again and again while layers change.

    Args:
        model: the teacher's causal language model, or any hybrid.
        tokenizer: its tokenizer.
        task: what to ask.
        split: validation or test.
        mixers: layer index to the mixer that may replace its attention, in the model's dtype.
        specs: layer index to the mixer's entry in `config.mixers`.
        batch_tokens: padded tokens per batch.
        cache_bytes: memory for hidden states that are reused between candidates.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        split: str,
        *,
        mixers: Mapping[int, nn.Module] | None = None,
        specs: Mapping[int, dict] | None = None,
        batch_tokens: int = 16_384,
        cache_bytes: int = 4_000_000_000,
    ) -> None:
        self._model, self._tokenizer, self._task = model, tokenizer, task
        self._items: Sequence[Item] = task.splits[split]
        self._mixers, self._specs = dict(mixers or {}), dict(specs or {})
        self._batch_tokens = batch_tokens
        self._num_generating_passes = 0
        requests = [request for item in self._items for request in item.requests]
        self._generations = [r for r in requests if isinstance(r, GenerationRequest)]
        runner = LayerRunner(model)
        self._likelihoods = LikelihoodScorer(
            runner,
            {index: with_mixer(runner.layers[index], mixer) for index, mixer in self._mixers.items()},
            [self._pair(r) for r in requests if isinstance(r, LikelihoodRequest)],
            pad_token_id=tokenizer.pad_token_id or 0,
            device=model.device,
            batch_tokens=batch_tokens,
            cache_bytes=cache_bytes,
        )

    @property
    def pass_equivalents(self) -> float:
        """Work so far in full passes over the split (each generating pass counts as one)."""
        return self._likelihoods.pass_equivalents + self._num_generating_passes

    def __call__(self, linear: frozenset[int] = frozenset(), *, base: frozenset[int] | None = None) -> Score:
        """Score with the layers in `linear` replaced; `base` is what the candidate was derived from."""
        return self._task.summarize(
            [self._task.grade(item, responses) for item, responses in zip(self._items, self.respond(linear, base=base))]
        )

    def respond(
        self, linear: frozenset[int] = frozenset(), *, base: frozenset[int] | None = None
    ) -> list[list[Response]]:
        """The responses to each item's requests."""
        likelihoods = iter(self._likelihoods(linear, base=linear if base is None else base))
        texts = iter(self._generate(linear) if self._generations else ())
        return [[self._response(request, likelihoods, texts) for request in item.requests] for item in self._items]

    def _generate(self, linear: frozenset[int]) -> list[str]:
        self._num_generating_passes += 1
        model = self._model
        if linear:
            model = make_hybrid(model, {i: self._mixers[i] for i in linear}, {i: self._specs[i] for i in linear})
        return generate_texts(
            model,
            self._tokenizer,
            self._generations,
            chat_template=self._task.chat_template,
            batch_tokens=self._batch_tokens,
        )

    def _pair(self, request: LikelihoodRequest) -> TokenPair:
        context = encode_context(self._tokenizer, request.context, chat_template=self._task.chat_template)
        target = self._tokenizer(request.target, add_special_tokens=False)["input_ids"]
        if not target:
            raise DataError(
                f"task {self._task.name}",
                got=f"the answer {request.target!r}, which has no tokens",
                expected="answers with text",
                hint="Check the target template and the rows.",
            )
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit and len(context) + len(target) > limit:
            raise DataError(
                f"task {self._task.name}",
                got=f"an item of {len(context) + len(target)} tokens, starting {request.context[:60]!r}",
                expected=f"at most the model's {limit} positions",
                hint="Shorten the context, or leave such rows out.",
            )
        return TokenPair(context=tuple(context), target=tuple(target))

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
