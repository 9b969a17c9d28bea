"""The vLLM model of each family: vLLM's own, whose linear layers are ours.

vLLM imports this module when it meets one of these classes; `plugin.py` says under which names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from dtr.arch import HYBRID_PREFIX, model_class
from dtr.errors import ModelError
from dtr.serving.checks import check_servable, has_state, is_window, mixer_of
from dtr.serving.layer import DtrLinearAttention, RotaryTable
from dtr.serving.sharding import keep_own_heads
from dtr.serving.states import StateForm, state_form


class HybridMixin:
    """What turns a family's vLLM model into a hybrid's."""

    # As vLLM's own protocols for hybrids have them, whose empty constructors would stand before the family's.
    has_inner_state = True
    is_hybrid = True
    # An adapter's share in our layers would be dropped without a word.
    supports_lora = False
    config: Any
    model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config, device = vllm_config.model_config.hf_config, next(self.parameters()).device  # type: ignore[attr-defined]
        family = config.model_type.removeprefix(HYBRID_PREFIX)
        with device:
            rotary = model_class(family, "RotaryEmbedding")(config)
        table = RotaryTable(rotary, vllm_config.model_config.max_model_len, vllm_config.model_config.dtype, device)
        for index, (layer, spec) in enumerate(zip(self.model.layers, config.mixers)):
            name = f"{prefix}{'.' if prefix else ''}model.layers.{index}"
            if isinstance(layer, PPMissingLayer):
                continue
            if has_state(spec):
                _replace_attention(layer, vllm_config, name, table)
            elif is_window(spec):
                _narrow_attention(layer, vllm_config, name, mixer_of(config, index).window)  # type: ignore[arg-type]

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        return largest_state(vllm_config).shapes

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return largest_state(vllm_config).dtypes

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        # Whole states are copied, inputs of a convolution too, as no draft is ever taken back.
        return (get_temporal_copy_spec, get_temporal_copy_spec)

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types: set[Any]) -> dict[Any, tuple[Any, ...]]:
        """What later versions ask instead."""
        both = cls.get_mamba_state_copy_func()
        return {kind: both[:1] if kind is MambaAttentionBackendEnum.LINEAR else both for kind in mamba_types}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        ours = {
            name: module
            for name, module in self.named_modules()  # type: ignore[attr-defined]
            if isinstance(module, DtrLinearAttention)
        }
        missing = {f"{name}.{part}" for name, module in ours.items() for part in module.weight_names()}
        loaded = set()

        def rest() -> Iterator[tuple[str, torch.Tensor]]:
            # Ours first: vLLM would take some of their names for parts of its own joined projections.
            for name, weight in weights:
                owner = next((layer for layer in ours if name.startswith(layer + ".")), None)
                if owner is None:
                    if not self._is_elsewhere(name):
                        yield name, weight
                    continue
                part = name.removeprefix(owner + ".")
                if name not in missing:
                    raise ModelError(name, got="a tensor that this mixer has not", expected="a folder saved by dtr")
                ours[owner].load_weight(part, weight)
                missing.discard(name)
                loaded.add(f"{owner}.mixer.{part}")

        theirs = super().load_weights(rest())  # type: ignore[misc]
        if missing:
            raise ModelError("checkpoint", got=f"no tensor {min(missing)}", expected="all weights of the linear layers")
        for module in ours.values():
            module.finish_loading()
        return theirs | loaded

    def _is_elsewhere(self, name: str) -> bool:
        """Whether a linear layer's tensor belongs to another device's part of the layers."""
        parts = name.split(".")
        if not name.startswith("model.layers.") or ".self_attn." not in name:
            return False
        return has_state(self.config.mixers[int(parts[2])])


def _replace_attention(layer: nn.Module, vllm_config: Any, prefix: str, table: RotaryTable) -> None:
    # The attention that vLLM has made is of no use, and must not get a cache.
    del vllm_config.compilation_config.static_forward_context[f"{prefix}.self_attn.attn"]
    layer.self_attn = None  # type: ignore[assignment]
    layer.self_attn = DtrLinearAttention(vllm_config, f"{prefix}.self_attn", table)


def _narrow_attention(layer: Any, vllm_config: Any, prefix: str, window: int) -> None:
    # Weights and their names are those of full attention.
    stock, name = layer.self_attn.attn, f"{prefix}.self_attn.attn"
    del vllm_config.compilation_config.static_forward_context[name]
    layer.self_attn.attn = Attention(
        stock.num_heads,
        stock.head_size,
        stock.head_size**-0.5,
        num_kv_heads=stock.num_kv_heads,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        per_layer_sliding_window=window,
        prefix=name,
    )


def largest_state(vllm_config: Any) -> StateForm:
    """Of all layers' states the one with the most bytes, by which vLLM sizes the blocks of its cache.

    The first that vLLM asks a model, and so the place where what cannot be served is refused.

    Raises:
        ModelError: a layer, or a setting, that cannot be served.
    """
    config, num_ranks = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
    check_servable(config, num_ranks=num_ranks)
    if vllm_config.speculative_config is not None:
        raise ModelError(
            "speculative_config",
            got="speculative decoding",
            expected="none, as a state cannot take a token back",
            hint="Leave it out.",
        )
    forms = []
    for index, spec in enumerate(config.mixers):
        if has_state(spec):
            with torch.device("meta"):
                mixer = keep_own_heads(mixer_of(config, index), 0, num_ranks)
            forms.append(state_form(mixer, vllm_config.model_config.dtype))
    if not forms:
        raise ModelError("config.mixers", got="no linear layer", expected="at least one", hint="Serve the teacher.")
    return max(forms, key=lambda form: form.num_bytes)


class DtrLlamaForCausalLM(HybridMixin, LlamaForCausalLM):
    """Llama and SmolLM2."""


class DtrMistralForCausalLM(HybridMixin, MistralForCausalLM):
    """Mistral."""


class DtrQwen2ForCausalLM(HybridMixin, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class DtrQwen3ForCausalLM(HybridMixin, Qwen3ForCausalLM):
    """Qwen3."""
