"""The gate at the end of an export: the stock model must say what ours says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dtr.errors import ModelError

MAX_LOGIT_DIFF = 1e-4
NUM_GREEDY_TOKENS = 64
NUM_PROMPT_TOKENS = 32
NUM_TEXT_TOKENS = 160
"""More than two chunks of an exported Mamba-2 (64), so that states are handed on."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model says to fixed random tokens."""

    logits: torch.Tensor
    """(2, tokens, vocab), float32, on the questions."""
    greedy: list[int]
    """64 tokens after a prompt, chosen with a cache."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far two models are apart."""

    max_abs_logit_diff: float
    same_tokens: bool
    num_same_tokens: int
    """Length of the common beginning of the two greedy texts."""


@torch.no_grad()
def questions(model: Any) -> torch.Tensor:
    """Two texts (2, tokens) that the model itself writes by sampling, from where texts begin; the same each time.

    Text it would never meet, such as random tokens, is no fair question: a model's answers there may hang on the last
    bit of its sums, and two right implementations would differ.
    """
    config = model.config
    num_tokens = min(NUM_TEXT_TOKENS, config.max_position_embeddings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        begin = getattr(config, "bos_token_id", None)
        start = torch.randint(config.vocab_size, (2, 1)) if begin is None else torch.full((2, 1), begin)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return _generate(model, start, num_tokens - start.shape[1], **options)


@torch.no_grad()
def ask(model: Any, questions_BT: torch.Tensor) -> Answers:
    """Answers of a float32 model to `questions`."""
    prompt = questions_BT[:1, :NUM_PROMPT_TOKENS]
    text = _generate(model, prompt, NUM_GREEDY_TOKENS, do_sample=False)
    return Answers(logits=model(questions_BT).logits.float(), greedy=text[0, prompt.shape[1] :].tolist())


def _generate(model: Any, ids: torch.Tensor, num_tokens: int, **options: Any) -> torch.Tensor:
    # Without an end token all texts have the full length.
    options |= {"num_beams": 1, "max_new_tokens": num_tokens, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def compare(ours: Answers, theirs: Answers) -> Parity:
    """The largest difference of a logit, and where the greedy texts part."""
    pairs = list(zip(ours.greedy, theirs.greedy, strict=True))
    num_same = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
    difference = (ours.logits - theirs.logits).abs().max().item()
    return Parity(max_abs_logit_diff=difference, same_tokens=num_same == len(pairs), num_same_tokens=num_same)


def insist(parity: Parity, where: str) -> None:
    """Raise ModelError unless the models agree."""
    # Written so that NaN is refused too.
    if not (parity.max_abs_logit_diff <= MAX_LOGIT_DIFF and parity.same_tokens):
        raise ModelError(
            where,
            got=f"a logit difference of {parity.max_abs_logit_diff:.1e} and {parity.num_same_tokens} of "
            f"{NUM_GREEDY_TOKENS} greedy tokens the same",
            expected=f"at most {MAX_LOGIT_DIFF:.0e} and all the same",
            hint="Nothing was kept. "
            + (
                "So small a difference may be rounding alone, as barely trained layers have it: distil longer, or let "
                "other layers keep their attention."
                if parity.same_tokens and parity.max_abs_logit_diff < 10 * MAX_LOGIT_DIFF
                else "The model uses something that this target computes otherwise; please report it."
            ),
        )
