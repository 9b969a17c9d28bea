"""What every linear layer must know of a batch in vLLM, made once for a step and a group of layers.

vLLM packs the tokens of all sequences one after the other, those with a single token first. A sequence of one token may
be one that goes on, or a prompt of one token, which vLLM counts as the same kind; whether it starts here is on the
device, as the lengths are. The tensors stay at their addresses, so that a recorded step reads those of the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor, split_decodes_and_prefills

from dtr.ops.chunk_layout import ChunkLayout, lay_out


@dataclass(kw_only=True)
class StateMetadata:
    """A batch: `num_steps` sequences with one token each, then those whose tokens begin at `starts`."""

    num_steps: int
    starts: np.ndarray
    """Where the tokens of each longer sequence begin, and where the last one ends."""
    slots: torch.Tensor
    """int64, where each sequence's states are; 0, which belongs to no sequence, for padding."""
    is_new: torch.Tensor
    """bool, whether a sequence's first token is in this batch."""
    layout: ChunkLayout | None
    """The longer sequences cut into chunks; None if there are none."""


class StateBackend(AttentionBackend):
    """How vLLM finds the builder."""

    @staticmethod
    def get_name() -> str:
        return "DTR_STATE"

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        return StateMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class StateMetadataBuilder(AttentionMetadataBuilder[StateMetadata]):
    """Makes the metadata of a step without waiting for the device."""

    reorder_batch_threshold: int = 1
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        recorded = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        most = max(vllm_config.scheduler_config.max_num_seqs, recorded)
        self._num_heads = kv_cache_spec.shapes[0][0]
        self._slots = torch.zeros(most, dtype=torch.int64, device=device)
        self._is_new = torch.zeros(most, dtype=torch.bool, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StateMetadata:
        m = common_attn_metadata
        starts, lengths = m.query_start_loc[: m.num_reqs + 1], m.seq_lens[: m.num_reqs]
        slots, is_new = self._slots[: m.num_reqs], self._is_new[: m.num_reqs]
        mode = self.vllm_config.cache_config.mamba_cache_mode
        table = mamba_get_block_table_tensor(m.block_table_tensor, m.seq_lens, self.kv_cache_spec, mode)
        # A recorded step runs over more rows than there are sequences: those of length 0.
        slots.copy_(table[: m.num_reqs, 0] * (lengths > 0))
        torch.eq(lengths, starts[1:] - starts[:-1], out=is_new)
        num_steps, num_longer, num_step_tokens, _ = split_decodes_and_prefills(m, decode_threshold=1)
        places = m.query_start_loc_cpu[num_steps : m.num_reqs + 1].numpy()
        return StateMetadata(
            num_steps=num_steps if num_longer else num_step_tokens,
            starts=places,
            slots=slots,
            is_new=is_new,
            layout=lay_out(places, self.device, num_heads=self._num_heads) if num_longer else None,
        )
