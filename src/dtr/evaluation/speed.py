"""How fast teacher and hybrid read and write at several context lengths: a short measurement for the report's curves.

One sequence at a time, a few tokens: enough to see where the lines cross on this machine, not a benchmark of serving.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from dtr.arch import is_classifier

CONTEXTS_TOKENS = (256, 1024, 4096)
NUM_NEW_TOKENS = 8


@torch.no_grad()
def measure_speed(
    model: Any, *, contexts_tokens: tuple[int, ...] = CONTEXTS_TOKENS, num_new_tokens: int = NUM_NEW_TOKENS
) -> list[dict[str, float]]:
    """Tokens per second of prefill and of cached decoding, batch 1, for each context that fits the model's positions.

    Returns:
        one entry per context: `context_tokens`, `prefill_tokens_per_second`, `decode_tokens_per_second`; none for a
        model that does not write.
    """
    if is_classifier(model):
        return []
    limit = getattr(model.config, "max_position_embeddings", None) or max(contexts_tokens) + num_new_tokens
    fitting = [n for n in contexts_tokens if n + num_new_tokens <= limit]
    return [_faster_of_two(model, num_tokens, num_new_tokens) for num_tokens in fitting]


def _faster_of_two(model: Any, num_tokens: int, num_new_tokens: int) -> dict[str, float]:
    """Each length is run twice and the faster run counts: a first run also compiles, tunes and allocates for it."""
    ids = torch.randint(model.config.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    runs = [_time(model, ids.to(model.device), num_new_tokens) for _ in range(2)]
    read_seconds, write_seconds = (min(times) for times in zip(*runs))
    return {
        "context_tokens": num_tokens,
        "prefill_tokens_per_second": round(num_tokens / read_seconds, 1),
        "decode_tokens_per_second": round(num_new_tokens / write_seconds, 1),
    }


def _time(model: Any, ids_BT: torch.Tensor, num_new_tokens: int) -> tuple[float, float]:
    """Seconds to read these tokens, and to write that many more."""
    began = _now(model.device)
    out = model(ids_BT, use_cache=True, logits_to_keep=1)
    read = _now(model.device)
    cache = out.past_key_values
    for _ in range(num_new_tokens):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
    return read - began, _now(model.device) - read


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
