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
    rows = []
    for num_tokens in fitting[:1] + fitting:
        # The first one is run twice: compiling and allocating are no part of the speed.
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (1, num_tokens), generator=generator).to(model.device)
        began = _now(model.device)
        out = model(ids, use_cache=True, logits_to_keep=1)
        read = _now(model.device)
        cache = out.past_key_values
        for _ in range(num_new_tokens):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
        done = _now(model.device)
        rows.append(
            {
                "context_tokens": num_tokens,
                "prefill_tokens_per_second": round(num_tokens / (read - began), 1),
                "decode_tokens_per_second": round(num_new_tokens / (done - read), 1),
            }
        )
    return rows[1:]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
