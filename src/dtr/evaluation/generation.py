"""What a model writes: batched greedy generation with the cache, for teacher and hybrid alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dtr.errors import ModelError
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

    Prompts are padded on the left and batched by length; `batch_tokens` counts prompt, padding and new tokens. With
    `fast`, by default on a GPU, models that `dtr.inference` can run are run by it: token by token, starting kernels
    takes the library's own `generate` far longer than their work.
    """
    fast = model.device.type == "cuda" if fast is None else fast
    prompts = [encode_context(tokenizer, r.context, chat_template=chat_template) for r in requests]
    order = sorted(range(len(requests)), key=lambda i: (requests[i].max_new_tokens, -len(prompts[i]), i))
    texts = [""] * len(requests)
    while order:
        longest = len(prompts[order[0]]) + requests[order[0]].max_new_tokens
        batch = [i for i in order[: max(1, batch_tokens // longest)] if _alike(requests[i], requests[order[0]])]
        order = order[len(batch) :]
        written = _generate(model, tokenizer, [prompts[i] for i in batch], requests[batch[0]], fast)
        for index, text in zip(batch, written):
            texts[index] = cut(text, requests[index].stop)
    return texts


def encode_context(tokenizer: Any, text: str, *, chat_template: bool) -> list[int]:
    """Token ids of a prompt; never empty, so that the first token of an answer has something to follow."""
    if chat_template:
        text = render_turn(tokenizer, text)
    ids = tokenizer(text, add_special_tokens=not chat_template)["input_ids"]
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    assert start is not None, "a tokenizer without bos and eos cannot start an empty prompt"
    return [start]


def render_turn(tokenizer: Any, text: str) -> str:
    """The text as a user turn in the tokenizer's chat template, up to where the model answers."""
    turn = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min([text.find(s) for s in stop if s in text], default=len(text))]


def _decoded(model: Any, options: dict[str, Any]) -> torch.Tensor | None:
    """What the fast path writes; None for a model that it does not know, as one with windows."""
    try:
        return fast_generate(model, **options)
    except ModelError:
        return None


def _alike(a: GenerationRequest, b: GenerationRequest) -> bool:
    return a.max_new_tokens == b.max_new_tokens and a.stop == b.stop


def _generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], request: GenerationRequest, fast: bool
) -> list[str]:
    longest = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    options = {
        "input_ids": ids.to(model.device),
        "attention_mask": mask.to(model.device),
        "max_new_tokens": request.max_new_tokens,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
        **({"stop_strings": list(request.stop), "tokenizer": tokenizer} if request.stop else {}),
    }
    out = _decoded(model, options) if fast else None
    if out is None:
        out = model.generate(**options)
    return tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
