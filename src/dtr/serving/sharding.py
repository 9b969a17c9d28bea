"""A mixer's heads shared out over devices, as vLLM shares those of attention.

Each device keeps a run of heads of all that is per head and adds up what their output projections give. What is not per
head is whole everywhere, but where it would be added up too, on the first device alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dtr.mixers import Mixer
from dtr.mixers.decaying import DecayingMixer
from dtr.mixers.linear import LinearMixer

_BY_HEAD = (
    "q_proj",
    "k_proj",
    "v_proj",
    "gate_proj",
    "decay_proj",
    "write_proj",
    "decay_up_proj",
    "taps_up_proj",
    "q_quadratic",
    "k_quadratic",
    "q_features",
    "k_features",
)
"""Parts whose first dim is that of the heads, or of their channels."""
_ADDED = ("o_proj.bias", "first_token.out_weight", "first_token.out_bias")
"""Tensors whose effect does not pass through heads."""


def own_part(name: str, weight: torch.Tensor, mixer: Mixer, rank: int, num_ranks: int) -> torch.Tensor:
    """What device `rank` keeps of a mixer's tensor of that name."""
    if num_ranks == 1:
        return weight
    assert isinstance(mixer, LinearMixer), "others are refused before"
    if name.startswith(_BY_HEAD):
        return weight.chunk(num_ranks)[rank]
    if name == "o_proj.weight":
        return weight.chunk(num_ranks, dim=1)[rank]
    if name == "conv_taps":
        return torch.cat([part.chunk(num_ranks)[rank] for part in weight.chunk(3)])
    if name in _ADDED and rank:
        return torch.zeros_like(weight)
    return weight


def keep_own_heads(mixer: Mixer, rank: int, num_ranks: int) -> Mixer:
    """The mixer with the heads of device `rank` alone; its weights are to be loaded afterwards."""
    if num_ranks == 1:
        return mixer
    assert isinstance(mixer, LinearMixer), "others are refused before"
    tensors: list[tuple[str, Any]] = [*mixer.named_parameters(), *mixer.named_buffers()]
    for name, whole in tensors:
        owner, _, last = name.rpartition(".")
        module, part = mixer.get_submodule(owner), own_part(name, whole.detach(), mixer, rank, num_ranks).clone()
        if isinstance(whole, nn.Parameter):
            setattr(module, last, nn.Parameter(part))
        else:
            module.register_buffer(last, part)
    num_heads = mixer.num_heads // num_ranks
    if isinstance(mixer, DecayingMixer):
        mixer.heads = slice(rank * num_heads, (rank + 1) * num_heads)
    mixer.num_heads = num_heads
    return mixer
