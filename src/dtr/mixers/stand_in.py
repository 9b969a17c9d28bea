"""A family's own attention module with a linear core, for models that are known by a probe (`dtr.backbone`).

Projections, norms, rotary positions, fused or latent queries and keys, gates behind attention: all of it stays the
family's code. Only the function that it asks for attention is ours, and keeps a state instead of keys and values.

Shapes: B batch, T tokens, D hidden dim, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import AttentionInterface

from dtr.arch import BackboneGeometry
from dtr.backbone.probe import Call, first_of
from dtr.errors import RecipeError
from dtr.mixers.linear import LinearMixer

INTERFACE = "dtr_state"
"""Name of our attention function in the library."""


class Core(LinearMixer):
    """What stands between projected queries, keys and values and the output projection; mixed into a `LinearMixer`.

    As the whole mixers: `head_copies` states for each query head with half-lives of their own, quadratic features, an
    output gate that starts as the identity, and the value itself at a sequence's first token.
    """

    geometry: BackboneGeometry

    def __init__(self, geometry: BackboneGeometry, layer_idx: int, **options: Any) -> None:
        for name in ("conv_tokens", "window"):
            if options.get(name):
                raise RecipeError(
                    f"mixer.options.{name}",
                    got=str(options[name]),
                    expected="0 for this teacher, whose own attention module projects queries and keys",
                    hint="Leave it out.",
                )
        super().__init__(geometry, layer_idx, **options)
        self.gate_proj = nn.Linear(geometry.hidden_dim, self.num_heads * geometry.value_dim)
        self.first_token = None

    def _make_projections(self, inner_dim: int) -> None:
        """Those of the family's module are in use."""

    @torch.no_grad()
    def start(self) -> None:
        """Start values, all of them: the gate and the features as the identity."""
        nn.init.zeros_(self.gate_proj.weight)
        nn.init.zeros_(self.gate_proj.bias)
        if self.quadratic:
            nn.init.zeros_(self.q_quadratic.weight)
            nn.init.zeros_(self.k_quadratic.weight)
        self.reset_gates()

    def state_bytes(self, bytes_per_element: int) -> int:
        return 4 * self.num_heads * self.geometry.head_dim * self.geometry.value_dim

    def attend(
        self,
        hidden_BTD: torch.Tensor,
        q_BHTK: torch.Tensor,
        k_BGTK: torch.Tensor,
        v_BGTV: torch.Tensor,
        memory: Any,
        token_mask_BT: torch.Tensor | None,
        starting_rows: torch.Tensor | None,
        first_share: torch.Tensor | None,
    ) -> torch.Tensor:
        """Heads' output (B, T, H, V).

        Args:
            hidden_BTD: the attention's input, which gates are made of.
            memory: this layer's place in the cache; None where nothing is remembered.
            token_mask_BT: 0 for padding.
            starting_rows: (B,), rows whose sequence has not begun before; None where all began with an empty memory.
            first_share: what softmax gives a lone key beside a sink, (B, T, H, 1); all of it when left out.
        """
        repeats = q_BHTK.shape[1] // k_BGTK.shape[1]
        q, k, v = (x.transpose(1, 2) for x in (q_BHTK, k_BGTK, v_BGTV))
        k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
        own = v if first_share is None else v * first_share.to(v.dtype)
        q, k, v = (torch.cat([x] * self.head_copies, dim=2) for x in (q, k, v))
        if self.quadratic:
            q, k = self.q_quadratic(q), self.k_quadratic(k)
        if self.has_unit_keys:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        state = None if memory is None else memory.read()
        mask = None if token_mask_BT is None else token_mask_BT[..., None]
        out, last = self.recur(hidden_BTD, q, k, v, mask, state)
        if memory is not None:
            memory.write(last, hidden_BTD.shape[1])
        gate = 2 * torch.sigmoid(self.gate_proj(hidden_BTD)).view(out.shape)
        out = (out * gate).unflatten(2, (self.head_copies, -1)).mean(2)
        if not self.exact_first or not (state is None or starting_rows is not None):
            return out
        is_real = torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)
        is_real = is_real if token_mask_BT is None else token_mask_BT > 0
        is_first = is_real & (is_real.cumsum(1) == 1)
        if state is not None and starting_rows is not None:
            is_first = is_first & starting_rows.to(is_first.device)[:, None]
        return torch.where(is_first[..., None, None], own.to(out.dtype), out)


@cache
def core_class(kind: Any) -> type[Core]:
    """The core of a kind of mixer: its gates and recurrence, without projections."""
    return type(f"{kind.__name__}Core", (Core, kind), {"__module__": __name__})


def make_stand_in(
    attention: Any, kind: Any, geometry: BackboneGeometry, layer_idx: int, place: str, **options: Any
) -> Any:
    """Turn this attention module, which is nobody else's, into one with a core of that kind; returns it."""
    # Its own config names our function; the model's stays as it is.
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation_internal = INTERFACE
    family: Any = type(attention)
    attention.__class__ = _stand_in_class(family)
    attention.core = core_class(kind)(geometry, layer_idx, **options)
    attention.place = place
    return attention


class StandIn:
    """What makes a family's attention module a mixer. It is called as the family calls it; students, with `Call`."""

    core: Core
    place: str
    """Its path in its layer."""
    needs_calibration = False
    is_pure_linear = True
    rows: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    """What a hybrid says of the batch: its token mask (B, T), and the rows that have not begun before."""

    layer_idx: int
    _at_work: tuple[torch.Tensor, Any] | None = None

    @property
    def geometry(self) -> BackboneGeometry:
        return self.core.geometry

    @property
    def operation(self) -> str | None:
        return self.core.operation

    @property
    def backend(self) -> str:
        return self.core.backend

    @property
    def exact_first(self) -> bool:
        return self.core.exact_first

    @property
    def output_projection(self) -> nn.Linear:
        """None that we would know of."""
        raise RecipeError(
            "distill.refit_tokens",
            got="a budget for it",
            expected="0 for a teacher whose own attention modules hold the output projections",
            hint="Leave it out.",
        )

    def state_bytes(self, bytes_per_element: int) -> int:
        return self.core.state_bytes(bytes_per_element)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 2 and isinstance(args[1], Call):
            call = args[1].replaced(args[0])
            return first_of(self.forward(*call.args, **call.kwargs)), None
        call = Call(args, kwargs)
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        self._at_work = call.hidden, None if cache is None else cache.layers[self.layer_idx]
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._at_work = None


@cache
def _stand_in_class(family: Any) -> type:
    return type(f"Linear{family.__name__}", (StandIn, family), {"__module__": family.__module__})


def _attend(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: Any = None, **options: Any
) -> tuple[torch.Tensor, None]:
    """The attention function of stand-ins; the mask is not read, as hybrids say what is padding."""
    hidden, memory = module._at_work
    mask, starting = module.rows
    share = None
    if (sinks := options.get("s_aux")) is not None:
        repeated = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        score = (q.float() * repeated.float()).sum(-1) * (options.get("scaling") or q.shape[-1] ** -0.5)
        share = torch.sigmoid(score - sinks.float().view(1, -1, 1)).transpose(1, 2)[..., None]
    out = module.core.attend(hidden, q, k, v, memory, mask, starting, share)
    return out.to(v.dtype).contiguous(), None


AttentionInterface.register(INTERFACE, _attend)
