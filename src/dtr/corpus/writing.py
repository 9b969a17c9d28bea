"""Text that the teacher itself writes, for those who have none: sampled from its start token, kept in the cache.

Data-free distillation in the manner of LLM-QAT (arXiv 2305.17888), section 3.1, without its greedy first tokens.
Nothing stops at an end-of-text token: what follows is the next document, as in packed training text.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import torch

from dtr.arch import is_classifier
from dtr.distributed import current_world
from dtr.errors import RecipeError
from dtr.files import write_text
from dtr.pretrained import open_cache
from dtr.teacher import Teacher

MAX_CANDIDATES = 4096
"""Likeliest tokens among which `top_p` chooses: sorting a whole vocabulary would take longer than the model's pass."""


def write_documents(
    teacher: Teacher,
    *,
    num_tokens: int,
    seq_len_tokens: int,
    temperature: float = 1.0,
    top_p: float = 0.95,
    batch_size: int = 64,
    seed: int = 0,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> list[str]:
    """Let the teacher write documents of `seq_len_tokens` tokens; what the cache holds already is not written again.

    The cache is a folder of JSON Lines files, one a batch, each written in one step: an interruption loses one batch.
    Ranks share the batches out; each batch has its own random numbers, so their number changes nothing.

    Args:
        num_tokens: at least so many in all, in whole batches.
        temperature: divides the logits.
        top_p: draw from the likeliest tokens that have this probability together; 1 draws from all.
        batch_size: documents written at a time.
        seed: decides what is drawn.
        on_event: called with {event: written, num_tokens, total_tokens} after each batch.

    Returns:
        the files, in order; `load_text` reads them.

    Raises:
        RecipeError: the teacher cannot write: a classifier, one without a start token, or one spread over processes.
    """
    start = _start_token(teacher)
    facts = [teacher.fingerprint, str(teacher.dtype), seq_len_tokens, temperature, top_p, batch_size, seed, start]
    key = f"{_hash(facts):012x}"
    folder = open_cache("written", key)
    num_batches = math.ceil(num_tokens / (batch_size * seq_len_tokens))
    files = [folder / f"{number:06d}.jsonl" for number in range(num_batches)]
    world, emit = current_world(), on_event or (lambda event: None)
    for number, file in world.share(list(enumerate(files))):
        if not file.exists():
            generator = torch.Generator(teacher.device).manual_seed(_hash([key, number]))
            ids = _sample(teacher, start, batch_size, seq_len_tokens, temperature, top_p, generator)
            texts = teacher.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=False)
            write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in texts))
        done = (number + 1) * batch_size * seq_len_tokens
        emit({"event": "written", "num_tokens": done, "total_tokens": num_batches * batch_size * seq_len_tokens})
    world.wait()
    return [str(file) for file in files]


@torch.no_grad()
def _sample(
    teacher: Teacher,
    start: int,
    batch_size: int,
    num_tokens: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """(B, num_tokens) token ids, the start token first."""
    tokens = [torch.full((batch_size, 1), start, device=teacher.device)]
    cache = None
    for _ in range(num_tokens - 1):
        out = teacher.model(input_ids=tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        tokens.append(draw(out.logits[:, -1].float() / temperature, top_p, generator))
    return torch.cat(tokens, dim=1)


def draw(logits_BV: torch.Tensor, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """One token per row, (B, 1), from the smallest set of likeliest tokens with a probability of `top_p` together."""
    probabilities = logits_BV.softmax(dim=-1)
    if top_p >= 1:
        return torch.multinomial(probabilities, 1, generator=generator)
    candidates, ids = probabilities.topk(min(MAX_CANDIDATES, probabilities.shape[-1]))
    # A token stays if those before it have not reached top_p yet, so that the likeliest always stays.
    candidates[candidates.cumsum(-1) - candidates >= top_p] = 0.0
    return ids.gather(1, torch.multinomial(candidates, 1, generator=generator))


def _hash(facts: list[Any]) -> int:
    return int(hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12], 16)


def _start_token(teacher: Teacher) -> int:
    tokenizer = teacher.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    refusals = {
        "a classifier, which writes nothing": is_classifier(teacher.model),
        "a teacher that is spread over processes (runtime.shard_teacher)": teacher.is_sharded,
        "a tokenizer without a start or end token": start is None,
    }
    for why, holds in refusals.items():
        if holds:
            raise RecipeError(
                "text", got=f"'teacher' with {why}", expected="a source of text", hint="Give files, or python-docs."
            )
    return start
