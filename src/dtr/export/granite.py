"""A hybrid with Mamba-2 layers as a stock GraniteMoeHybrid with a dense MLP (no experts).

Attention, norms and MLP compute the same in the same order, so an all-attention model stays the same up to rounding;
the names and three shapes differ: gate and up projection are one matrix, a family without output bias gets zeros, and
Granite's attention scale is a setting.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated

from dtr.arch import HeadGeometry, read_geometry
from dtr.errors import ModelError
from dtr.export.source import SHARED_FIELDS, Source, attention_problems, refuse

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
NORMS_BY_GROUP_SINCE = "5.23"
"""Release of transformers whose Granite norms the output of each group of heads by itself, as the weights expect."""
CHUNK_TOKENS = 64
"""Chunk of the stock scan: its sums of decays within a chunk round less than in the usual 256."""


def to_granite(source: Source) -> Any:
    """The stock model with the source's weights in their type; made without running it.

    Raises:
        ModelError: the source has something that Granite cannot express.
    """
    geometry = read_geometry(source.model.config)
    config = _config(source, geometry)
    with torch.device("meta"):
        model = GraniteMoeHybridForCausalLM(config)
    weights = _weights(source, geometry, has_bias=config.attention_bias)
    model.load_state_dict({name: tensor.to(source.dtype) for name, tensor in weights.items()}, assign=True)
    model.tie_weights()
    model.generation_config = source.model.generation_config
    return model


def _config(source: Source, geometry: HeadGeometry) -> GraniteMoeHybridConfig:
    ours = source.model.config
    linear = source.linear
    _refuse_what_granite_lacks(source, geometry)
    inner_dim = geometry.num_heads * geometry.head_dim
    # Stock models take it from the config if it is there; servers may not, so it is left out where it can be.
    unusual_head: dict[str, Any] = {} if inner_dim == geometry.hidden_dim else {"head_dim": geometry.head_dim}
    # Checked by the library even where no layer is linear.
    mamba: dict[str, Any] = {"mamba_expand": 1, "mamba_n_heads": 1, "mamba_d_head": geometry.hidden_dim}
    if linear:
        mixers = [source.model.model.layers[i].self_attn for i in linear]
        mamba = {
            "mamba_expand": inner_dim // geometry.hidden_dim,
            "mamba_n_heads": geometry.num_heads,
            "mamba_d_head": geometry.head_dim,
            "mamba_d_state": geometry.head_dim,
            "mamba_n_groups": mixers[0].num_groups,
            "mamba_d_conv": mixers[0].conv1d.kernel_size[0],
            "mamba_conv_bias": True,
            "mamba_proj_bias": True,
            "mamba_chunk_size": CHUNK_TOKENS,
        }
    return GraniteMoeHybridConfig(
        **{name: getattr(ours, name) for name in SHARED_FIELDS},
        **unusual_head,
        **mamba,
        attention_bias=geometry.qkv_bias or geometry.o_bias,
        attention_multiplier=geometry.head_dim**-0.5,
        embedding_multiplier=1.0,
        logits_scaling=1.0,
        residual_multiplier=1.0,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=ours.intermediate_size,
        position_embedding_type="rope",
        layer_types=["linear_attention" if spec else "full_attention" for spec in source.mixers],
        dtype=source.dtype,
    )


def norms_by_group() -> bool:
    """Whether this release of transformers has Mamba-2 layers of more than one group as they should be."""
    return "group_size" in inspect.signature(GraniteMoeHybridRMSNormGated.__init__).parameters


def _refuse_what_granite_lacks(source: Source, geometry: HeadGeometry) -> None:
    config, linear = source.model.config, source.linear
    problems = attention_problems(source)
    if getattr(config, "mlp_bias", False):
        problems.append("biases in the MLP")
    if linear and config.hidden_act != "silu":
        problems.append(f"{config.hidden_act} beside linear layers, whose convolution needs silu")
    if linear and geometry.num_heads * geometry.head_dim % geometry.hidden_dim:
        problems.append(
            f"{geometry.num_heads} linear heads of {geometry.head_dim} on a hidden size of {geometry.hidden_dim}, "
            "of which they must be a multiple"
        )
    groups = {source.model.model.layers[i].self_attn.num_groups for i in linear}
    if len(groups) > 1:
        problems.append("linear layers with different num_groups")
    refuse(source, problems, "a GraniteMoeHybrid")
    if max(groups, default=1) > 1 and not norms_by_group():
        raise ModelError(
            str(source.folder),
            got=f"transformers {transformers.__version__}, whose Granite norms all groups of heads as one",
            expected=f"transformers {NORMS_BY_GROUP_SINCE} or later, for Mamba-2 layers of several groups",
            hint="Upgrade transformers here and where the model is to run in it; vLLM has its own Granite.",
        )


def _weights(source: Source, geometry: HeadGeometry, *, has_bias: bool) -> dict[str, torch.Tensor]:
    ours = source.model.state_dict()
    theirs: dict[str, torch.Tensor] = {}
    for name, tensor in ours.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            theirs[name] = tensor
            continue
        layer, part = f"model.layers.{match[1]}.", match[2]
        if part == "mlp.gate_proj.weight":
            both = [tensor, ours[f"{layer}mlp.up_proj.weight"]]
            theirs[f"{layer}shared_mlp.input_linear.weight"] = torch.cat(both)
        elif part == "mlp.down_proj.weight":
            theirs[f"{layer}shared_mlp.output_linear.weight"] = tensor
        elif part == "self_attn.gate_bias":
            # Rows that send something to the convolution have no bias of their own.
            rest = len(ours[f"{layer}self_attn.in_proj.weight"]) - len(tensor)
            theirs[f"{layer}mamba.in_proj.bias"] = torch.cat([tensor, tensor.new_zeros(rest)])
        elif part.startswith("self_attn.") and source.mixers[int(match[1])]:
            theirs[layer + part.replace("self_attn.", "mamba.")] = tensor
        elif part != "mlp.up_proj.weight":
            theirs[layer + part] = tensor
    for i, spec in enumerate(source.mixers):
        bias = f"model.layers.{i}.self_attn.o_proj.bias"
        if has_bias and not spec and bias not in theirs:
            theirs[bias] = torch.zeros(geometry.hidden_dim)
    return theirs
