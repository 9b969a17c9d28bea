"""One linear layer in vLLM: a mixer of ours with its states in vLLM's cache.

Shapes: T tokens of all sequences, B sequences, D hidden dim, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.layers.mamba.linear.minimax_linear_attn  # noqa: F401  registers vllm::linear_attention
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from dtr.serving.checks import mixer_of
from dtr.serving.delta import DeltaPath
from dtr.serving.metadata import StateBackend, StateMetadata
from dtr.serving.sharding import keep_own_heads, own_part
from dtr.serving.states import run_from_slots, state_form


class RotaryTable(nn.Module):
    """Cosines and sines of all positions, made once for all layers and by the teacher's own rule."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, rotary: Any, num_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        like = torch.empty(1, dtype=dtype, device=device)
        with torch.device(device):
            cos, sin = rotary(like, torch.arange(num_positions, device=device)[None])
        self.register_buffer("cos", cos[0].contiguous(), persistent=False)
        self.register_buffer("sin", sin[0].contiguous(), persistent=False)


class DtrLinearAttention(nn.Module, MambaBase):
    """Stands in for the attention of a vLLM decoder layer.

    Args:
        vllm_config: vLLM's settings.
        prefix: the layer's name in the model, e.g. model.layers.3.self_attn.
        rotary: shared by all layers.
    """

    def __init__(self, vllm_config: Any, prefix: str, rotary: RotaryTable) -> None:
        super().__init__()
        config, self.prefix = vllm_config.model_config.hf_config, prefix
        self.dtype = vllm_config.model_config.dtype
        self.model_config, self.cache_config = vllm_config.model_config, vllm_config.cache_config
        self._rank, self._num_ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        index = extract_layer_index(prefix)
        with torch.device("meta"):
            probe = keep_own_heads(mixer_of(config, index), self._rank, self._num_ranks)
        self._form = state_form(probe, self.dtype)
        self.mixer = keep_own_heads(mixer_of(config, index), self._rank, self._num_ranks)
        self._rotary = [rotary]
        self._delta = DeltaPath.of(self.mixer, rotary.cos)
        layers = vllm_config.compilation_config.static_forward_context
        assert prefix not in layers, f"{prefix} is there already"
        layers[prefix] = self
        self.kv_cache = (torch.tensor([]),)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        # One kind for each number of states, as vLLM asks by kind how to copy them.
        return MambaAttentionBackendEnum.LINEAR if len(self._form.shapes) == 1 else MambaAttentionBackendEnum.SHORT_CONV

    def get_attn_backend(self) -> type[StateBackend]:
        return StateBackend

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self._form.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self._form.dtypes

    @torch.no_grad()
    def load_weight(self, name: str, weight: torch.Tensor) -> None:
        """Take a tensor of the checkpoint, or this device's heads of it."""
        target = self.mixer.get_parameter(name) if name in dict(self.mixer.named_parameters()) else self._buffer(name)
        part = own_part(name, weight, self.mixer, self._rank, self._num_ranks)
        assert part.shape == target.shape, f"{self.prefix}.{name}: {tuple(part.shape)} for {tuple(target.shape)}"
        target.copy_(part)

    def _buffer(self, name: str) -> torch.Tensor:
        return self.mixer.get_buffer(name)

    def weight_names(self) -> set[str]:
        """Names of all that a checkpoint must hold for this layer."""
        buffers = {name for name, x in self.mixer.named_buffers() if x is not None}
        return {name for name, _ in self.mixer.named_parameters()} | buffers

    def finish_loading(self) -> None:
        """Call once all weights are there."""
        if self._delta is not None:
            self._delta.finish_loading()

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, D) for (T, D); one opaque operation, around which vLLM compiles and records what it likes."""
        output = torch.empty_like(hidden_states)
        torch.ops.vllm.linear_attention(hidden_states, output, positions, self.prefix)
        return output if self._num_ranks == 1 else tensor_model_parallel_all_reduce(output)

    @torch.no_grad()
    def _forward(self, hidden_states: torch.Tensor, output: torch.Tensor, positions: torch.Tensor) -> None:
        """What vllm::linear_attention calls."""
        metadata = get_forward_context().attn_metadata
        at: StateMetadata | None = metadata.get(self.prefix) if isinstance(metadata, dict) else None
        if at is None:
            # vLLM finds out how much memory is needed.
            self._measure(hidden_states, output, positions)
            return
        if at.num_steps:
            here = slice(0, at.num_steps)
            output[here] = self._step(hidden_states[here], positions[here], at.slots[here], at.is_new[here])
        if at.layout is not None:
            here = slice(int(at.starts[0]), int(at.starts[-1]))
            self._read(hidden_states[here], output[here], positions[here], at)

    def _step(
        self, hidden_BD: torch.Tensor, positions_B: torch.Tensor, slots_B: torch.Tensor, is_new_B: torch.Tensor
    ) -> torch.Tensor:
        if self._delta is not None:
            return self._delta.step(hidden_BD, self._angles, positions_B, self.kv_cache[0], slots_B, is_new_B)
        cos, sin = (table[positions_B][:, None] for table in self._angles)
        return run_from_slots(self.mixer, hidden_BD[:, None], (cos, sin), self.kv_cache, slots_B, is_new_B)[:, 0]

    def _read(
        self, hidden_TD: torch.Tensor, output_TD: torch.Tensor, positions_T: torch.Tensor, at: StateMetadata
    ) -> None:
        slots, is_new = at.slots[at.num_steps :], at.is_new[at.num_steps :]
        assert at.layout is not None, "there are sequences to read"
        cos, sin = (table[positions_T] for table in self._angles)
        if self._delta is not None:
            self._delta.read(hidden_TD, output_TD, (cos, sin), self.kv_cache[0], slots, is_new, at.layout)
            return
        # Sequences have lengths of their own, and what a convolution needs of a padded one depends on its padding.
        bounds = at.starts - at.starts[0]
        for i in range(len(bounds) - 1):
            rows, one = slice(int(bounds[i]), int(bounds[i + 1])), slice(i, i + 1)
            angles = (cos[None, rows], sin[None, rows])
            hidden = hidden_TD[None, rows]
            output_TD[rows] = run_from_slots(self.mixer, hidden, angles, self.kv_cache, slots[one], is_new[one])[0]

    def _measure(self, hidden_states: torch.Tensor, output: torch.Tensor, positions: torch.Tensor) -> None:
        cos, sin = (table[positions][None] for table in self._angles)
        output.copy_(self.mixer(hidden_states[None], (cos, sin))[0][0])

    @property
    def _angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rotary[0].cos, self._rotary[0].sin
