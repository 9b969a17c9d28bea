"""A Qwen3 hybrid with Gated DeltaNet layers in Qwen3.5's form as a stock Qwen3.5 (text only, dense).

Qwen3.5's attention has an output gate, which rows of zeros hold at sigmoid(0) = 1/2 and a doubled output projection
undoes, both without rounding. Its norms store the weight less 1; that difference is kept in float32, as 16 bits would
lose digits of a weight that is far below 1.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from dtr.arch import HeadGeometry, read_geometry
from dtr.export.source import SHARED_FIELDS, Source, attention_problems, refuse

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_SHIFTED_NORM = re.compile(r"model\.norm\.weight|.*(layernorm|self_attn\.[qk]_norm)\.weight")


def to_qwen35(source: Source) -> Any:
    """The stock model with the source's weights; made without running it.

    Raises:
        ModelError: the source has something that Qwen3.5 cannot express.
    """
    geometry = read_geometry(source.model.config)
    problems = attention_problems(source)
    if source.linear and source.model.config.hidden_act != "silu":
        problems.append(f"{source.model.config.hidden_act} beside linear layers, whose convolution needs silu")
    refuse(source, problems, "a Qwen3.5")
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(_config(source, geometry))
    model.load_state_dict(_weights(source, geometry), assign=True)
    model.tie_weights()
    model.generation_config = source.model.generation_config
    return model


def _config(source: Source, geometry: HeadGeometry) -> Qwen3_5TextConfig:
    ours = source.model.config
    # Every section gets the same positions where there are no images, but servers check that they add up.
    third = geometry.head_dim // 6
    sections = [geometry.head_dim // 2 - 2 * third, third, third]
    return Qwen3_5TextConfig(
        **{name: getattr(ours, name) for name in SHARED_FIELDS if name != "rope_parameters"},
        rope_parameters={**ours.rope_parameters, "partial_rotary_factor": 1.0, "mrope_section": sections},
        head_dim=geometry.head_dim,
        attention_bias=geometry.qkv_bias,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=geometry.head_dim,
        linear_value_head_dim=geometry.head_dim,
        linear_num_key_heads=geometry.num_heads,
        linear_num_value_heads=geometry.num_heads,
        layer_types=["linear_attention" if spec else "full_attention" for spec in source.mixers],
        dtype=source.dtype,
    )


def _weights(source: Source, geometry: HeadGeometry) -> dict[str, torch.Tensor]:
    theirs: dict[str, torch.Tensor] = {}
    for name, tensor in source.model.state_dict().items():
        match = _LAYER.fullmatch(name)
        is_linear = match is not None and source.mixers[int(match[1])] is not None
        if _SHIFTED_NORM.fullmatch(name):
            theirs[name] = tensor - 1
            continue
        if is_linear:
            name = name.replace(".self_attn.", ".linear_attn.")
        elif name.endswith("self_attn.o_proj.weight"):
            tensor = 2 * tensor
        elif ".self_attn.q_proj." in name:
            # Per head: rows of the query, then rows of its gate.
            heads = tensor.unflatten(0, (geometry.num_heads, geometry.head_dim))
            tensor = torch.cat([heads, torch.zeros_like(heads)], dim=1).flatten(0, 1)
        theirs[name] = tensor.to(source.dtype)
    return theirs
