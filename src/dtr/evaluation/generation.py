"""What a model writes: batched greedy generation with the cache, for teacher and hybrid alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria

from dtr.errors import ModelError
from dtr.evaluation.encoding import Encoder, padding_id
from dtr.inference.decoder import Decoder
from dtr.inference.generate import fast_generate
from dtr.tasks.base import GenerationRequest


@torch.no_grad()
def generate_texts(
    model: Any,
    tokenizer: Any,
    requests: Sequence[GenerationRequest],
    *,
    chat_template: bool,
    batch_tokens: int,
    fast: bool | None = None,
) -> list[str]:
    """Greedy continuations of all requests, in order.

    Only where a text ends is taken from the model's own `generation_config`; its penalties, beams, sampling and
    whatever else would give another text than the greedy one have no part in it.

    Prompts are padded on the left and batched by length; `batch_tokens` counts prompt, padding and new tokens. With
    `fast`, by default on a GPU, models that `dtr.inference` can run are run by it: token by token, starting kernels
    takes the library's own `generate` far longer than their work.
    """
    fast = model.device.type == "cuda" if fast is None else fast
    encoder = Encoder(tokenizer, chat_template=chat_template)
    prompts = [encoder.prompt(request.context) for request in requests]
    order = sorted(range(len(requests)), key=lambda i: (requests[i].max_new_tokens, -len(prompts[i]), i))
    writer = _Writer(model=model, tokenizer=tokenizer, is_fast=fast)
    texts = [""] * len(requests)
    with _greedy_only(model, padding_id(tokenizer, model)):
        while order:
            longest = len(prompts[order[0]]) + requests[order[0]].max_new_tokens
            num = writer.rows_at_once(longest, max(1, batch_tokens // longest))
            batch = [i for i in order[:num] if _alike(requests[i], requests[order[0]])]
            order = order[len(batch) :]
            written = writer.write([prompts[i] for i in batch], requests[batch[0]], num)
            for index, text in zip(batch, written):
                texts[index] = cut(text, requests[index].stop)
    return texts


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min([text.find(s) for s in stop if s in text], default=len(text))]


def _alike(a: GenerationRequest, b: GenerationRequest) -> bool:
    return a.max_new_tokens == b.max_new_tokens and a.stop == b.stop


@contextmanager
def _greedy_only(model: Any, pad_token_id: int) -> Iterator[None]:
    """The model with nothing in its generation settings but where a text ends.

    It is taken away and not passed to `generate`, which fills a configuration up with whatever the model's own has.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=pad_token_id, do_sample=False
    )
    try:
        yield
    finally:
        model.generation_config = own


@dataclass(kw_only=True)
class _Writer:
    """Writes the texts of one batch after the other; the fast path's copies of the weights serve several of them."""

    model: Any
    tokenizer: Any
    is_fast: bool
    decoder: Decoder | None = None

    def rows_at_once(self, num_tokens: int, num_fitting: int) -> int:
        """How many texts of up to `num_tokens` tokens to write together, where so many would fit.

        As many as a decoder that is there takes, until twice as many fit: a new one copies the weights and records
        its step.
        """
        if not self.is_fast:
            return num_fitting
        held = self.decoder
        if held is not None and num_tokens <= held.capacity_tokens and num_fitting < 2 * held.batch_size:
            return held.batch_size
        # What the last one holds must be free before the next one is made.
        self.decoder = None
        try:
            self.decoder = Decoder(self.model, batch_size=num_fitting, capacity_tokens=num_tokens)
        except ModelError:
            # A model that the fast path does not know, as one with windows.
            self.is_fast = False
        return num_fitting

    def write(self, prompts: Sequence[Sequence[int]], request: GenerationRequest, num_rows: int) -> list[str]:
        """Texts after these prompts, of which there are at most `num_rows`."""
        # A decoder takes its number of sequences, no less; the last prompt fills up.
        rows = [*prompts, *[prompts[-1]] * (num_rows - len(prompts) if self.is_fast else 0)]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), padding_id(self.tokenizer, self.model))
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(rows):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        options: dict[str, Any] = {
            "input_ids": ids.to(self.model.device),
            "attention_mask": mask.to(self.model.device),
            "max_new_tokens": request.max_new_tokens,
        }
        if request.stop:
            rule = StopStringCriteria(tokenizer=self.tokenizer, stop_strings=list(request.stop))
            options["stopping_criteria"] = StoppingCriteriaList([rule])
        if self.is_fast:
            out = fast_generate(self.model, decoder=self.decoder, **options)
        else:
            out = self.model.generate(**options)
        return self._texts(out[: len(prompts)], longest)

    def _texts(self, out: torch.Tensor, num_prompt: int) -> list[str]:
        """What was written behind the prompts, with the space that a tokenizer drops where a text begins."""

        def decode(ids: torch.Tensor) -> list[str]:
            return self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        alone, prompts, wholes = decode(out[:, num_prompt:]), decode(out[:, :num_prompt]), decode(out)
        return [
            whole[len(prompt) :] if prompt and whole.startswith(prompt) else text
            for text, prompt, whole in zip(alone, prompts, wholes)
        ]
