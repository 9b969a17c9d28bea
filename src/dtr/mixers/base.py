"""What every mixer has in common: it takes the place of an attention module, with the same inputs and kind of output.

Shapes: B batch, T tokens, D hidden dim, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from dtr.arch import HeadGeometry
from dtr.errors import ModelError, RecipeError
from dtr.ops.backend import backend_of

WITHOUT_EFFECT = {
    # Positions arrive as angles; the others are asked of the whole model.
    *("position_ids", "use_cache", "cache_position", "return_dict"),
    *("output_hidden_states", "output_attentions", "output_router_logits"),
    # These say again where packed sequences begin, and a hybrid has compared them with the positions.
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
    # Of the loss; and without effect in the families' own layers either.
    *("num_items_in_batch", "shift_labels", "ignore_index", "token_type_ids"),
    # `generate` hands on what its stop strings and its assistant are read with.
    *("tokenizer", "assistant_tokenizer"),
}
"""Arguments of a family's forward that arrive at its layers and need not change what a mixer does."""


class PackedSequences(NamedTuple):
    """Several sequences that lie side by side in the rows of a batch (B, T), as rows of their own.

    A tuple, as hooks that move a layer's inputs to its device look into those.
    """

    tokens: tuple[torch.Tensor, ...]
    """Groups of sequences: the place of each of their tokens (R, S) in the batch's B * T; 0 for padding at the end."""
    places_BT: torch.Tensor
    """Where each token of the batch is among those of all groups, one group after the other."""


def check_arguments(others: Mapping[str, Any]) -> None:
    """Refuse what nobody here knows: it may say which tokens belong together.

    Raises:
        ModelError: an argument that linear layers cannot answer for, by name.
    """
    if others.get("is_causal") is False:
        raise ModelError(
            "is_causal", got="False", expected="True, as a recurrence looks back alone", hint="Leave it out."
        )
    for name, value in others.items():
        if value is not None and name not in WITHOUT_EFFECT and name != "is_causal":
            raise ModelError(
                name,
                got="an argument that linear layers do not know",
                expected="arguments of the family's forward",
                hint="Leave it out, or use the teacher.",
            )


class HeadNorm(nn.Module):
    """RMS norm over the head dim with a weight, as Qwen3 applies it to queries and keys."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))
        self.eps = eps

    def forward(self, x_BTHK: torch.Tensor) -> torch.Tensor:
        x = x_BTHK.float()
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)).to(x_BTHK.dtype)


class Mixer(nn.Module):
    """Stands in for one attention module of the teacher.

    Args:
        geometry: shape of the attention that is replaced.
        layer_idx: its place in the model, where the cache keeps its state.
    """

    needs_calibration = False
    """Whether `calibrate` wants to see a batch of the teacher's inputs and outputs before training."""
    is_pure_linear = True
    """False where softmax attention on a window takes part: on shorter prompts that is full attention."""
    exact_first = False
    """Whether the output at a sequence's first token is the teacher's and passes by the output projection."""
    operation: ClassVar[str | None] = None
    """Its recurrence by the name that `dtr.ops.backend` has for it; None where there are plain operations alone."""
    options_when_new: ClassVar[dict[str, Any]] = {}
    """Options that a new bank gives this kind unless told otherwise, and names; those that a bank or hybrid does not
    name are as `__init__` has them."""

    def __init__(self, geometry: HeadGeometry, layer_idx: int) -> None:
        super().__init__()
        self.geometry, self.layer_idx = geometry, layer_idx
        self.backend = "auto"
        """What computes its operations, as `dtr.ops.backend.backend_of` takes it; copies of a mixer keep it."""

    @classmethod
    def misfit(cls, geometry: HeadGeometry) -> str:
        """What of the attention this kind has no place for, so that it cannot stand in; empty where it can."""
        return ""

    @property
    def output_projection(self) -> nn.Linear:
        """The last linear map, from all heads to the hidden dim."""
        raise NotImplementedError

    def state_bytes(self, bytes_per_element: int) -> int:
        """Bytes that a cache keeps for one sequence: float32 states, and other tensors of the given element size."""
        return 4 * self.geometry.num_heads * self.geometry.head_dim**2

    def start_from(self, attention: Any) -> None:
        """Set all weights from those of the Hugging Face attention module that this mixer will stand in for."""
        raise NotImplementedError

    def calibrate(self, hidden_BTD: torch.Tensor, target_BTD: torch.Tensor) -> None:
        """Fit start values in closed form to the teacher's output on its input; called once, before training."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            raise TypeError(f"{cls.__name__}: implement mix(); forward() tells sequences apart for all mixers.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        token_mask: torch.Tensor | None = None,
        starting_rows: torch.Tensor | None = None,
        packed: PackedSequences | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """Stand in for an attention module.

        Args:
            hidden_states: (B, T, D), the input of the attention.
            position_embeddings: cos and sin, (B or 1, T, K) each.
            attention_mask: that of attention layers, not read: what it says of padding and packing comes apart.
            past_key_values: a HybridCache, or None.
            token_mask: (B, at least T), 0 where a token is padding; the last T columns belong to these tokens.
            starting_rows: (B,), True where the cache has seen nothing but padding; None where every row has begun.
            packed: sequences that each begin with an empty state; without a cache and without padding.
            others: what the library gives to all attention modules.

        Returns:
            (B, T, D) and None in place of attention weights.

        Raises:
            ModelError: an argument that a mixer does not know.
        """
        check_arguments(others)
        memory = past_key_values.layers[self.layer_idx] if past_key_values is not None else None
        if packed is None:
            mask = None if token_mask is None else token_mask[:, -hidden_states.shape[1] :]
            return self.mix(hidden_states, position_embeddings, mask, memory, starting_rows), None
        assert memory is None, "a cache holds one sequence a row"
        assert token_mask is None, "padding is no part of packed sequences"
        batch, num_tokens = hidden_states.shape[:2]
        whole = [hidden_states, *(x.expand(batch, -1, -1) for x in position_embeddings)]
        flat = [x.reshape(batch * num_tokens, -1) for x in whole]
        outputs = []
        for index_RS in packed.tokens:
            hidden, cos, sin = (x[index_RS] for x in flat)
            outputs.append(self.mix(hidden, (cos, sin), None, None, None).flatten(0, 1))
        return torch.cat(outputs)[packed.places_BT], None

    def mix(
        self,
        hidden_BTD: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        token_mask_BT: torch.Tensor | None,
        memory: Any,
        starting_rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """What takes the place of attention's output (B, T, D), for one sequence a row.

        Args:
            hidden_BTD: the input of the attention.
            angles: cos and sin, (B or 1, T, K) each.
            token_mask_BT: 0 where a token is padding, which must leave what is remembered as it is.
            memory: this layer's place in the cache, read and written; None where nothing is remembered.
            starting_rows: as in `forward`.
        """
        raise NotImplementedError

    def _repeat_heads(self, weight: torch.Tensor, times: int) -> torch.Tensor:
        """Repeat each key/value head's rows as grouped-query attention does: head h uses group h // times."""
        per_head = weight.unflatten(0, (-1, self.geometry.head_dim)) if times > 1 else weight
        return per_head.repeat_interleave(times, dim=0).flatten(0, 1) if times > 1 else weight


def set_backend(modules: nn.Module | Iterable[nn.Module], backend: str) -> None:
    """Have all mixers in a model, or in several modules, compute by this backend from now on.

    Args:
        modules: a mixer, a hybrid, the mixers of a bank.
        backend: auto, torch, triton, fla or amx.

    Raises:
        DeviceError: there is no such backend, or it cannot run where a mixer's weights are.
    """
    roots = [modules] if isinstance(modules, nn.Module) else modules
    for mixer in [part for root in roots for part in root.modules() if isinstance(part, Mixer)]:
        # auto runs everywhere; to ask would build a kernel that the type of the weights may have no use for.
        if backend != "auto":
            device = next(mixer.parameters()).device
            backend_of(mixer.operation, backend, device.type, head_dim=mixer.geometry.head_dim)
        mixer.backend = backend


def check_number(name: str, value: Any, lowest: int) -> None:
    if not isinstance(value, int) or value < lowest:
        raise RecipeError(f"mixer.options.{name}", got=repr(value), expected=f"a whole number from {lowest} up")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise RecipeError(f"mixer.options.{name}", got=repr(value), expected="true or false")
