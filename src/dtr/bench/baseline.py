"""The loop that one would write first, in float32: what our step is compared with on a CPU."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dtr.arch import capture_attention, decoder_layers
from dtr.bench.trial import LEARNING_RATE, MixerMaker, median_seconds
from dtr.teacher import Teacher


def baseline_tokens_per_second(teacher: Teacher, make: MixerMaker, input_ids: torch.Tensor, *, num_steps: int) -> float:
    """Speed of the straightforward loop over all layers at (B, T) tokens.

    It keeps every attention's input and output from one float32 pass of the teacher, then takes the layers one after
    the other: forward, backward by autograd, clip, a plain AdamW each. It is given the chunked form of the recurrence
    too, as the form token by token would only make it slower.
    """
    model = copy.deepcopy(teacher.model).float()
    attention = [layer.self_attn for layer in decoder_layers(model)]
    mixers = {i: make(teacher.geometry, i, a) for i, a in enumerate(attention)}
    optimizers = {i: torch.optim.AdamW(m.parameters(), lr=LEARNING_RATE, foreach=False) for i, m in mixers.items()}
    ids = input_ids.to(model.device)

    def step() -> None:
        seen: dict[int, tuple[Any, ...]] = {}
        with torch.no_grad(), capture_attention(model, list(mixers), lambda i, *rest: seen.__setitem__(i, rest)):
            model.model(input_ids=ids, use_cache=False)
        for index, mixer in mixers.items():
            hidden, rotary, target = seen[index]
            out, _ = mixer(hidden, rotary)
            loss = (out - target).square().mean() / target.square().mean()
            optimizers[index].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
            optimizers[index].step()

    return ids.numel() / median_seconds(model.device, step, num_steps)
