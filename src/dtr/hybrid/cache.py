"""The cache of a hybrid: keys and values for attention layers, a recurrent state for linear ones.

Built on the library's own layers. What is added: a linear layer counts its tokens, so that a model whose layers are
all linear still knows its position (the stock cache raises there), and no convolution state is needed to mark a state
as present. A mixer with a short convolution keeps its last inputs beside the state, one with a window its last keys and
values.

A static cache has a fixed number of slots, and every tensor stays at its address, as a compiled forward pass needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer, StaticCache

from dtr.arch import HeadGeometry
from dtr.errors import ModelError


class RecurrentStateLayer(LinearAttentionLayer):
    """State of one linear layer, with the number of tokens it has seen.

    Args:
        max_cache_len: slots of the attention layers in a static cache; None in one that grows.
    """

    is_croppable = False

    def __init__(self, max_cache_len: int | None = None) -> None:
        super().__init__()
        self._max_cache_len = max_cache_len
        # Every linear layer could be compiled, but `generate` is to compile with a static cache alone.
        self.is_compileable = max_cache_len is not None
        # A compiled forward pass would be compiled anew for each value of a Python number.
        self.num_seen_tokens: Any = 0 if max_cache_len is None else torch.tensor(0)
        self._window: list[torch.Tensor] = []

    @property
    def has_seen_tokens(self) -> bool:
        return self.has_previous_state[0]

    def read(self) -> torch.Tensor | None:
        """The carried state (B, H, K, V), or None before the first token."""
        return self.recurrent_states[0] if self.has_seen_tokens else None

    def read_conv(self) -> torch.Tensor | None:
        """The last inputs of a short convolution (B, num, channels), or None before the first token."""
        return self.conv_states[0] if self.has_seen_tokens else None

    def read_window(self) -> tuple[torch.Tensor, ...] | None:
        """Keys, values and positions that a window needs, each (B, num, ...), or None before the first token."""
        return tuple(self._window) if self.has_seen_tokens else None

    def write(
        self,
        state: torch.Tensor | None,
        num_new_tokens: int,
        conv_inputs: torch.Tensor | None = None,
        window: tuple[torch.Tensor, ...] = (),
    ) -> None:
        """Replace the state, the last inputs of a short convolution and a window after `num_new_tokens` more tokens."""
        if self._max_cache_len is not None and not self.has_seen_tokens:
            self._fix_addresses(state, window)
        if state is not None:
            self.device, self.dtype = state.device, state.dtype  # type: ignore[assignment]
            self.update_recurrent_state(state)
        if self._max_cache_len is None:
            self._window = list(window)
        else:
            for ours, new in zip(self._window, window):
                ours.copy_(new)
        if conv_inputs is not None:
            if not self.is_conv_states_initialized[0]:
                self.lazy_initialization(conv_states=conv_inputs)
            kept = self.conv_states[0]
            assert kept is not None
            kept.copy_(conv_inputs)
        self.has_previous_state[0] = True
        # In place where it is a tensor.
        self.num_seen_tokens += num_new_tokens

    def _fix_addresses(self, state: torch.Tensor | None, window: tuple[torch.Tensor, ...]) -> None:
        """What the library does not: the number of tokens and the window of a static cache stay where they are."""
        device = window[0].device if state is None else state.device
        self.num_seen_tokens = self.num_seen_tokens.to(device)
        self._window = self._window or [torch.empty_like(x) for x in window]
        if not torch.compiler.is_compiling():
            for x in (self.num_seen_tokens, *self._window):
                torch._dynamo.mark_static_address(x)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:  # type: ignore[override]
        """What a family's own attention module asks for; there is nothing to keep, so these alone are attended to."""
        return keys, values

    def get_seq_length(self) -> int:
        return self.num_seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self._max_cache_len is not None:
            return self._max_cache_len, 0
        return self.num_seen_tokens + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.num_seen_tokens *= 0
        if self._max_cache_len is None:
            self._window = []

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._window = [x.index_select(0, beam_idx.to(x.device)) for x in self._window]

    def num_bytes(self) -> int:
        """Bytes of the states, the convolution's inputs and the window."""
        tensors = [*self._window, self.read(), self.read_conv()]
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._replace(lambda state: state[indices])

    def _replace(self, change: Any) -> None:
        if self.has_seen_tokens:
            for states in (self.recurrent_states, self.conv_states):
                states[0] = None if states[0] is None else change(states[0])
            self._window = [change(x) for x in self._window]


class HybridCache(DynamicCache):
    """Cache of a hybrid model, from its config: attention layers as the library makes them, ours where linear.

    Args:
        config: a hybrid's.
        max_cache_len: tokens that a static cache holds; None for a cache that grows.
    """

    def __init__(self, config: Any, max_cache_len: int | None = None) -> None:
        if max_cache_len is None:
            stock = DynamicCache(config=config).layers
        else:
            stock = StaticCache(config=config, max_cache_len=max_cache_len).layers
        layers = [RecurrentStateLayer(max_cache_len) if mixer else stock[i] for i, mixer in enumerate(config.mixers)]
        Cache.__init__(self, layers=layers)
        self._waiting: torch.Tensor | None = None

    def starting_rows(self, token_mask_BT: torch.Tensor | None) -> torch.Tensor | None:
        """Rows (B,) of which nothing but padding has been seen so far, as in prompts that are read in parts.

        None where there is no such row, and before anything was seen. Called once before the tokens of `token_mask_BT`
        are read.
        """
        before = self._waiting
        states = [layer for layer in self.layers if isinstance(layer, RecurrentStateLayer)]
        is_new = bool(states) and not states[0].has_seen_tokens
        if token_mask_BT is None or (before is None and not is_new):
            self._waiting = None
            return before
        after = (token_mask_BT == 0).all(dim=1)
        after = after if before is None else after & before.to(after.device)
        # While compiling nothing can be asked of a tensor; prompts are not compiled.
        self._waiting = after if torch.compiler.is_compiling() or bool(after.any()) else None
        return before

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a negative number), which attention layers can do.

        Raises:
            ModelError: there are linear layers, whose states cannot go back.
        """
        is_linear = any(isinstance(layer, RecurrentStateLayer) for layer in self.layers)
        if not is_linear:
            super().crop(tokens_to_remove)
        # Older releases of the library give the length to keep, a positive number.
        elif tokens_to_remove < 0 or 0 < tokens_to_remove < self.get_seq_length():
            raise ModelError(
                "past_key_values.crop",
                got=f"{tokens_to_remove} for a cache of {self.get_seq_length()} tokens",
                expected="nothing to take back, as a linear layer's state cannot be rolled back",
                hint="Assisted generation is not supported with linear layers, be they the model's or the assistant's.",
            )

    def reset(self) -> None:
        super().reset()
        self._waiting = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._change_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_rows(lambda rows: rows[indices])

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._waiting is not None:
            self._waiting = change(self._waiting)

    # The stock methods look for an attention layer and raise where there is none; ours all know their length.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx].get_seq_length()  # type: ignore[union-attr]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.layers[layer_idx].get_mask_sizes(query_length)  # type: ignore[union-attr]

    def num_bytes(self) -> int:
        """Bytes held by keys, values and states."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, RecurrentStateLayer):
                total += layer.num_bytes()
            else:
                tensors = [getattr(layer, "keys", None), getattr(layer, "values", None)]
                total += sum(t.numel() * t.element_size() for t in tensors if t is not None)
        return total


def decode_cache_bytes(
    geometry: HeadGeometry,
    num_attention: int,
    *,
    context_tokens: int,
    bytes_per_element: int,
    state_bytes: int = 0,
) -> int:
    """Bytes per sequence after `context_tokens` tokens: keys and values, and `state_bytes` of all linear layers."""
    keys_and_values = 2 * geometry.num_kv_heads * geometry.head_dim * context_tokens * bytes_per_element
    return num_attention * keys_and_values + state_bytes
