"""What a mixer keeps of a sequence, as a server allocates it, and as a mixer sees it in a forward pass.

Shapes: B sequences, T tokens, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from dtr.mixers import Mixer


@dataclass(frozen=True, kw_only=True)
class StateForm:
    """Shapes and types of what one sequence leaves in one layer: its state, and perhaps inputs of a convolution."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of one sequence."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in zip(self.shapes, self.dtypes))


class Memory:
    """Stands in for a mixer's layer of a cache, with the states of the sequences at hand; the caller copies them."""

    def __init__(self, state: torch.Tensor | None = None, conv_inputs: torch.Tensor | None = None) -> None:
        self.state, self.conv_inputs = state, conv_inputs

    def read(self) -> torch.Tensor | None:
        return self.state

    def read_conv(self) -> torch.Tensor | None:
        return self.conv_inputs

    def read_window(self) -> None:
        return None

    def write(
        self,
        state: torch.Tensor | None,
        num_new_tokens: int,
        conv_inputs: torch.Tensor | None = None,
        window: tuple[torch.Tensor, ...] = (),
    ) -> None:
        assert not window, "mixers with a window are refused before"
        self.state, self.conv_inputs = state, conv_inputs

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The state, then the inputs of a convolution if there is one."""
        return [x for x in (self.state, self.conv_inputs) if x is not None]


def as_cache(memory: Memory, layer_idx: int) -> Any:
    """What a mixer's forward takes as `past_key_values`."""
    return SimpleNamespace(layers={layer_idx: memory})


def state_form(mixer: Mixer, dtype: torch.dtype) -> StateForm:
    """What `mixer`, made on the device "meta", keeps when hidden states are of type `dtype`.

    The state comes first: of four bytes an element, it must not lie behind an odd number of halves.
    """
    mixer = mixer.to(dtype)
    hidden = torch.zeros(1, 1, mixer.geometry.hidden_dim, dtype=dtype, device="meta")
    angle = torch.zeros(1, 1, mixer.geometry.head_dim, dtype=dtype, device="meta")
    memory = Memory()
    with torch.no_grad():
        mixer(hidden, (angle, angle), past_key_values=as_cache(memory, mixer.layer_idx))
    assert memory.state is not None, "a token leaves a state"
    # Inputs of a convolution are of the type of what is convolved.
    dtypes = (torch.float32, dtype)[: len(memory.tensors)]
    return StateForm(shapes=tuple(tuple(x.shape[1:]) for x in memory.tensors), dtypes=dtypes)


def run_from_slots(
    mixer: Mixer,
    hidden_BTD: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    states: tuple[torch.Tensor, ...],
    slots_B: torch.Tensor,
    is_new_B: torch.Tensor,
) -> torch.Tensor:
    """A mixer's own forward over sequences whose states lie at `slots_B` of `states`, which are replaced.

    Nothing is asked of the device, so that it can be recorded as a CUDA graph. What a slot holds is not read where
    `is_new_B` says that a sequence starts here.

    Returns:
        (B, T, D), as the mixer's.
    """
    held = [state.index_select(0, slots_B) for state in states]
    # Not multiplied: what an earlier sequence or no one left there may be infinite.
    held = [x.masked_fill(is_new_B.view(-1, *[1] * (x.dim() - 1)), 0.0) for x in held]
    memory = Memory(*held)
    out, _ = mixer(hidden_BTD, angles, past_key_values=as_cache(memory, mixer.layer_idx))
    for state, new in zip(states, memory.tensors):
        state.index_copy_(0, slots_B, new.to(state.dtype))
    first_token = getattr(mixer, "first_token", None)
    if first_token is None:
        return out
    # A state is there, of zeros: the mixer took no token for a first one.
    first = torch.where(is_new_B[:, None], first_token.value(hidden_BTD[:, 0]).to(out.dtype), out[:, 0])
    return torch.cat([first[:, None], out[:, 1:]], dim=1)
