"""Prefill and token-by-token decoding of a teacher or hybrid at full speed.

A step of a small model is bound by launching kernels, of a large batch by reading keys, values and states. Hence fused
kernels, states that are read and written once, and a CUDA graph of the whole step, which needs every tensor at a fixed
address: the token, its position and slot too, which the step itself moves on.

Shapes: B sequences, T tokens of a prompt, D hidden dim, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from dtr.arch import decoder_layers, layer_kind, read_geometry, require_family
from dtr.errors import ModelError
from dtr.inference.blocks import Attend, MixerBlock, Prompt, Step, make_block
from dtr.inference.prompt_graphs import GraphRecorder, PromptGraphs
from dtr.inference.weights import BlockWeights, block_weights, rotary_table
from dtr.mixers.base import Mixer
from dtr.ops import decoding
from dtr.ops.projections import GatedProjection, Norm

PREFILL_TOKENS = 2**18
"""Most tokens of a prompt that run through the layers at once; larger batches go in parts."""
_WARMUP_STEPS = 2


class _Mlp:
    """The norm and the gated MLP of a layer."""

    def __init__(self, weights: BlockWeights) -> None:
        weight, bias = weights.gate_up
        norm = Norm(weight=weights.mlp_norm, eps=weights.norm_eps)
        self.gate_up, self.down = GatedProjection(norm=norm, weight=weight, bias=bias), weights.down


class Decoder:
    """A model with a cache for `batch_size` sequences of up to `capacity_tokens` tokens, prompt included.

    It holds copies of the weights, joined where several matrices have the same input: make a new one when the model's
    weights change.

    Args:
        model: a teacher's or hybrid's causal language model.
        batch_size: number of sequences.
        capacity_tokens: slots of the cache.
        use_graph: record the step, and short prompts whose length recurs, as CUDA graphs; by default on a GPU.
        attend: attention of a step, as `dtr.ops.decoding.attend`.

    Raises:
        ModelError: attention over a window, or another part of the model that the fast path does not know.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch_size: int,
        capacity_tokens: int,
        use_graph: bool | None = None,
        attend: Attend = decoding.attend,
    ) -> None:
        device, geometry = model.device, read_geometry(model.config)
        check_fast(model, capacity_tokens)
        _check_head_dim(geometry.head_dim, device)
        self.batch_size, self.capacity_tokens, self.length_tokens = batch_size, capacity_tokens, 0
        self._embedding, self._lm_head = model.model.embed_tokens.weight, model.lm_head
        self._norm = Norm(weight=model.model.norm.weight, eps=model.model.norm.variance_epsilon)
        self._cos, self._sin = rotary_table(model, capacity_tokens)
        self._mlps, self._blocks = [], []
        for layer in decoder_layers(model):
            weights = block_weights(layer)
            norm = Norm(weight=weights.mixing_norm, eps=weights.norm_eps)
            self._mlps.append(_Mlp(weights))
            self._blocks.append(make_block(layer.self_attn, norm, geometry, batch_size, capacity_tokens, attend))
        self.token_B = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.logits_BV: torch.Tensor = torch.zeros(0)
        self._position_B, self._first_B = (torch.zeros(batch_size, dtype=torch.int32, device=device) for _ in range(2))
        self._slot = torch.zeros((), dtype=torch.int32, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._prompts: PromptGraphs | None = None
        if device.type == "cuda" if use_graph is None else use_graph:
            self._record()
            # Any other mixer's state moves as it reads a prompt, and may depend on what padding follows.
            if not any(isinstance(block, MixerBlock) for block in self._blocks):
                self._prompts = PromptGraphs(
                    batch_size=batch_size, capacity_tokens=capacity_tokens, record=GraphRecorder(device)
                )

    @torch.no_grad()
    def prefill(self, ids_BT: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Run a prompt from an empty cache; the next greedy token is then in `token_B`.

        Args:
            ids_BT: prompts, padded on the left.
            attention_mask: 0 where a token is padding.

        Returns:
            (B, vocabulary), the logits after the last token.

        Raises:
            ModelError: a wrong number of sequences, a prompt beyond the capacity, or padding after the text.
        """
        batch, num_tokens = ids_BT.shape
        mask = None if attention_mask is None or attention_mask.all() else attention_mask.to(ids_BT.device)
        self._check_prompt(batch, num_tokens, mask)
        logits = self._prompts(ids_BT, self._read_padded) if self._prompts is not None and mask is None else None
        if logits is None:
            rows_at_once = max(1, PREFILL_TOKENS // num_tokens)
            parts = [slice(i, min(i + rows_at_once, batch)) for i in range(0, batch, rows_at_once)]
            logits = torch.cat(
                [self._prefill_rows(ids_BT[rows], None if mask is None else mask[rows], rows) for rows in parts]
            )
        num_real = num_tokens if mask is None else mask.sum(1)
        self._begin(num_tokens, num_real)
        self.token_B.copy_(logits.argmax(-1))
        return logits

    @torch.no_grad()
    def decode(self, token_B: torch.Tensor | None = None) -> torch.Tensor:
        """Append one token to every sequence, by default `token_B`; returns the logits (B, vocabulary) after it.

        The logits stand in a buffer that the next call overwrites; `token_B` then holds their greedy token.

        Raises:
            ModelError: the cache is full.
        """
        if self.length_tokens >= self.capacity_tokens:
            raise ModelError(
                "capacity_tokens",
                got=f"a token beyond the {self.capacity_tokens} that fit",
                expected="prompt and new tokens within the capacity",
                hint="Make the Decoder with a larger capacity_tokens.",
            )
        if token_B is not None:
            self.token_B.copy_(token_B)
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        self.length_tokens += 1
        return self.logits_BV

    def greedy(self, num_tokens: int) -> torch.Tensor:
        """After a prompt, the next `num_tokens` greedy tokens (B, num_tokens); nothing waits for the GPU meanwhile."""
        out = self.token_B.new_empty(self.batch_size, num_tokens)
        for i in range(num_tokens):
            out[:, i] = self.token_B
            # The last token's successor is not asked for.
            if i + 1 < num_tokens:
                self.decode()
        return out

    @torch.no_grad()
    def pretend(self, num_tokens: int) -> None:
        """Stand as after a prompt of `num_tokens` tokens, with random contents: enough to time steps."""
        for block in self._blocks:
            block.fill_randomly()
        self._begin(num_tokens, num_tokens)

    def rewind(self, num_tokens: int) -> None:
        """Stand at `num_tokens` tokens again with the contents as they are; for timing, as states do not go back."""
        self._begin(num_tokens, num_tokens)

    def cache_bytes(self) -> int:
        """Bytes of the keys, values and states that the tokens so far take, of all sequences."""
        return sum(block.num_bytes(self.length_tokens) for block in self._blocks)

    def _begin(self, num_tokens: int, num_real: torch.Tensor | int) -> None:
        self.length_tokens = num_tokens
        self._slot.fill_(num_tokens)
        self._position_B.copy_(torch.as_tensor(num_real).expand(self.batch_size))
        self._first_B.copy_(num_tokens - self._position_B)

    def _check_prompt(self, batch: int, num_tokens: int, mask: torch.Tensor | None) -> None:
        if batch != self.batch_size or not 0 < num_tokens <= self.capacity_tokens:
            raise ModelError(
                "input_ids",
                got=f"{batch} sequences of {num_tokens} tokens",
                expected=f"{self.batch_size} sequences of 1 to {self.capacity_tokens} tokens",
                hint="Make the Decoder with the batch_size and capacity_tokens that you need.",
            )
        if mask is not None and (not mask[:, -1].all() or (mask.diff(dim=1) < 0).any()):
            raise ModelError(
                "attention_mask",
                got="padding after or within a text",
                expected="padding on the left only",
                hint="Set tokenizer.padding_side = 'left', or use model.generate.",
            )

    def _prefill_rows(self, ids_BT: torch.Tensor, mask: torch.Tensor | None, rows: slice) -> torch.Tensor:
        num_tokens = ids_BT.shape[1]
        if mask is None:
            prompt = Prompt(
                rotary=(self._cos[None, :num_tokens], self._sin[None, :num_tokens]), token_mask_BT=None, seen_B1TT=None
            )
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=mask.device).tril()
            seen = causal & mask.bool()[:, None, None, :]
            # A padding token sees itself, as a row without any gives NaN.
            seen = seen | torch.eye(num_tokens, dtype=torch.bool, device=mask.device)
            prompt = Prompt(rotary=(self._cos[positions], self._sin[positions]), token_mask_BT=mask, seen_B1TT=seen)
        # Only the last token's output is asked for, unless that is a text's first, which some layers treat apart.
        is_last_enough = num_tokens > 1 and (mask is None or bool(mask[:, -2].all()))
        return self._lm_head(self._norm(self._read(ids_BT, prompt, rows, is_last_enough=is_last_enough)[:, -1]))

    def _read_padded(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """As `_prefill_rows` for all sequences, padded on the right after the token of index `last`."""
        cos, sin = (x[None, : ids_BT.shape[1]] for x in (self._cos, self._sin))
        prompt = Prompt(rotary=(cos, sin), token_mask_BT=mask_BT, seen_B1TT=None)
        hidden = self._read(ids_BT, prompt, slice(0, self.batch_size), is_last_enough=False)
        return self._lm_head(self._norm(hidden.index_select(1, last)[:, 0]))

    def _read(self, ids_BT: torch.Tensor, prompt: Prompt, rows: slice, *, is_last_enough: bool) -> torch.Tensor:
        """Hidden states (B, T, D) after all layers, or of the last token (B, 1, D) if they are enough."""
        hidden = F.embedding(ids_BT, self._embedding)
        for i, (block, mlp) in enumerate(zip(self._blocks, self._mlps)):
            only_last = is_last_enough and i + 1 == len(self._blocks)
            hidden = block.prefill(hidden, prompt, rows, only_last=only_last)
            inner = decoding.gated_pair(hidden.flatten(0, -2), mlp.gate_up)
            decoding.add_linear(hidden, inner, *mlp.down)
        return hidden

    def _step(self) -> None:
        at = Step(
            cos_BK=self._cos.index_select(0, self._position_B),
            sin_BK=self._sin.index_select(0, self._position_B),
            first_B=self._first_B,
            slot=self._slot,
        )
        hidden = F.embedding(self.token_B, self._embedding)
        for block, mlp in zip(self._blocks, self._mlps):
            hidden = hidden + block.step(hidden, at)
            hidden = hidden + F.linear(decoding.gated_pair(hidden, mlp.gate_up), *mlp.down)
        self.logits_BV = self._lm_head(self._norm(hidden))
        self.token_B.copy_(self.logits_BV.argmax(-1))
        self._position_B += 1
        self._slot += 1

    @torch.no_grad()
    def _record(self) -> None:
        """Record the step. Kernels compile in the steps before, which leave contents that the next prompt replaces."""
        self._begin(0, 0)
        stream = torch.cuda.Stream(self.token_B.device)
        stream.wait_stream(torch.cuda.current_stream(self.token_B.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP_STEPS):
                self._step()
                self._begin(0, 0)
        torch.cuda.current_stream(self.token_B.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()
        self._begin(0, 0)


def check_fast(model: Any, capacity_tokens: int) -> None:
    """Raise ModelError unless this is a language model whose every layer the fast path runs."""
    config = model.config
    require_family(config, "model", hint="Use model.generate, which takes every family.")
    if not hasattr(model, "lm_head"):
        raise ModelError("model", got=type(model).__name__, expected="a causal language model, which writes tokens")
    window = getattr(config, "sliding_window", None) or capacity_tokens
    for index, layer in enumerate(decoder_layers(model)):
        module: Any = layer.self_attn
        if isinstance(module, Mixer):
            is_windowed = not module.is_pure_linear
        else:
            is_windowed = layer_kind(config, index) == "sliding_attention" and window < capacity_tokens
        if is_windowed:
            raise ModelError(
                f"layer {index}",
                got="attention over a window",
                expected="full attention or a purely linear mixer",
                hint="Use model.generate, which keeps windows; the fast path does not.",
            )
    if config.hidden_act != "silu":
        raise ModelError(
            "config.hidden_act",
            got=f"'{config.hidden_act}'",
            expected="silu",
            hint="Use model.generate, which takes every activation.",
        )


def _check_head_dim(head_dim: int, device: torch.device) -> None:
    if device.type == "cuda" and head_dim not in (16, 32, 64, 128):
        raise ModelError(
            "config.head_dim",
            got=str(head_dim),
            expected="16, 32, 64 or 128, which the kernels take",
            hint="Use model.generate, which takes every head dim.",
        )
