"""`generate` of transformers with our decoder inside: its prompts, processors, sampling and stopping rules stay."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import StoppingCriteriaList, StopStringCriteria

from dtr.errors import ModelError
from dtr.inference.decoder import Decoder


def fast_generate(
    model: Any, input_ids: torch.Tensor, *, decoder: Decoder | None = None, **options: Any
) -> torch.Tensor:
    """As `model.generate`, greedy or sampling, by a `Decoder`.

    Args:
        model: a teacher or hybrid.
        input_ids: (B, T) prompts, padded on the left.
        decoder: one of this model for B sequences, with room for prompts and new tokens, to use again and again while
            the weights stay as they are; made for this call when left out.
        options: those of `generate`: attention_mask, max_new_tokens, do_sample, temperature, stop_strings with their
            tokenizer, ...

    Returns:
        (B, T + new tokens), prompts included.

    Raises:
        ModelError: beam search, a cache from elsewhere, padding on the right, or a model that the fast path cannot run.
    """
    if options.get("stop_strings") and "tokenizer" in options:
        # With a loop of ours inside, `generate` loses the tokenizer before it makes a rule of the strings.
        rule = StopStringCriteria(tokenizer=options.pop("tokenizer"), stop_strings=options.pop("stop_strings"))
        options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), rule])
    return model.generate(input_ids, custom_generate=partial(decode_with_kernels, decoder=decoder), **options)


@torch.no_grad()
def decode_with_kernels(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    decoder: Decoder | None = None,
    **model_kwargs: Any,
) -> torch.Tensor:
    """The decoding loop that `generate(custom_generate=...)` calls; stopping rules are asked after every token."""
    _check_asked(generation_config, model_kwargs)
    batch = len(input_ids)
    if decoder is None:
        decoder = Decoder(model, batch_size=batch, capacity_tokens=generation_config.max_length)
    logits = decoder.prefill(input_ids, model_kwargs.get("attention_mask"))
    pad = generation_config.pad_token_id
    running = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    ids = input_ids
    while True:
        scores = logits_processor(ids, logits.float())
        if generation_config.do_sample:
            token = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            token = scores.argmax(-1)
        if pad is not None:
            # Texts that have ended are filled up, as `generate` does.
            token = torch.where(running, token, torch.as_tensor(pad, device=token.device))
        ids = torch.cat([ids, token[:, None]], dim=1)
        running = running & ~stopping_criteria(ids, None)
        if ids.shape[1] >= generation_config.max_length or not running.any():
            return ids
        logits = decoder.decode(token)


def _check_asked(generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise ModelError for what this loop does not do."""
    asked = {
        "num_beams": generation_config.num_beams not in (None, 1),
        "return_dict_in_generate": bool(generation_config.return_dict_in_generate),
        "past_key_values": _length(model_kwargs.get("past_key_values")) > 0,
        "inputs_embeds": "inputs_embeds" in model_kwargs,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise ModelError(
                name,
                got="a value",
                expected="none on the fast path, which decodes greedily or by sampling from token ids",
                hint="Use model.generate, which takes it.",
            )


def _length(cache: Any) -> int:
    return 0 if cache is None else cache.get_seq_length()
