"""Which model, which tokenizer: fingerprints of what decides a result, and of nothing else.

A bank belongs to the teacher whose attention it learned. What counts is every weight, the shape of attention, rotary
positions and what each layer sees; a field that a newer release adds to a config computes nothing and does not count.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from dtr.arch import is_family, layer_kind, read_geometry
from dtr.backbone.probe import backbone_of

SCHEME = "w2"
"""First part of a fingerprint that is made this way; earlier ones are 16 hex digits alone (`earlier_fingerprint`)."""
BLOCK_BYTES = 1 << 25
"""Weights are hashed in blocks of this size, side by side."""
ROTARY = (
    *("rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
)
"""Settings that decide the angles of rotary positions, in the library's names."""


def model_fingerprint(model: Any) -> str:
    """Hash of what a model computes: all weights, head geometry, rotary positions, what each layer sees.

    Returns:
        `w2-` and 16 hex digits of the weights as bfloat16, which is the same in whatever precision a checkpoint is
        loaded; where the weights in memory are finer, another 16 of them as they are.
    """
    named = list(model.named_parameters())
    settings = json.dumps(_settings(model), sort_keys=True, default=str)
    shapes = "".join(f"{name}{tuple(weight.shape)}" for name, weight in named)
    rounded, exact = (hashlib.sha256(f"{settings}{shapes}".encode()) for _ in range(2))
    is_finer = False
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        # A few blocks ahead of the threads, so that no copy of the whole model is made.
        for digest, fine_digest in _in_order(threads, (block for _, weight in named for block in _blocks(weight))):
            rounded.update(digest)
            exact.update(fine_digest)
            is_finer |= digest != fine_digest
    parts = [SCHEME, rounded.hexdigest()[:16]]
    return "-".join([*parts, exact.hexdigest()[:16]] if is_finer else parts)


def is_same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of one model, if need be at the precision of the coarser."""
    ours, theirs = one.split("-"), other.split("-")
    return all(a == b for a, b in zip(ours, theirs)) and min(len(ours), len(theirs)) > 1


def is_earlier(fingerprint: str) -> bool:
    """Whether a fingerprint is of the scheme before this one."""
    return not fingerprint.startswith(SCHEME)


def earlier_fingerprint(model: Any) -> str:
    """As banks had it before: hash of the whole config, as the installed release writes it, and some of each weight."""
    apart = ("transformers_version", "_name_or_path", "dtype", "quantization_config")
    fields = {k: v for k, v in model.config.to_dict().items() if k not in apart}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        sample = flat[:: max(1, flat.numel() // 1024)].bfloat16().float()
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of what a tokenizer makes of texts and chats, 16 hex digits."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts: list[Any] = [
        json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items()),
        {name: str(token) for name, token in sorted(dict(tokenizer.special_tokens_map).items())},
        getattr(tokenizer, "chat_template", None),
    ]
    if backend is not None:
        # Set by the last call, not by the tokenizer.
        facts[0] = {key: value for key, value in facts[0].items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _settings(model: Any) -> dict[str, Any]:
    config = model.config
    if not is_family(config):
        apart = ("transformers_version", "_name_or_path", "dtype", "quantization_config", "architectures")
        fields = {key: value for key, value in config.to_diff_dict().items() if key not in apart}
        return {"backbone": asdict(backbone_of(model)), "config": fields}
    rope = getattr(config, "rope_parameters", None) or {}
    rotary = {name: rope[name] for name in ROTARY if rope.get(name) is not None}
    kind = rotary.get("rope_type", "default")
    if kind != "default":
        rotary["max_position_embeddings"] = config.max_position_embeddings
    kinds = [layer_kind(config, index) for index in range(config.num_hidden_layers)]
    window = config.sliding_window if "sliding_attention" in kinds else None
    return {
        "geometry": asdict(read_geometry(config)),
        "rotary": rotary,
        "layers": kinds,
        "window": window,
        "activation": config.hidden_act,
    }


def _blocks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = weight.detach().flatten()
    return iter(flat.split(max(1, BLOCK_BYTES // flat.element_size())))


def _in_order(threads: ThreadPoolExecutor, blocks: Iterator[torch.Tensor]) -> Iterator[tuple[bytes, bytes]]:
    """Digests of all blocks in their order."""
    waiting: list[Any] = []
    for block in blocks:
        waiting.append(threads.submit(_digests, block))
        if len(waiting) > 2 * (os.cpu_count() or 1):
            yield waiting.pop(0).result()
    for one in waiting:
        yield one.result()


def _digests(block: torch.Tensor) -> tuple[bytes, bytes]:
    """Of a block as bfloat16, and as it is; the same twice where nothing is lost by rounding."""
    rounded = block.bfloat16()
    coarse = _sha256(rounded)
    if block.dtype == torch.bfloat16 or torch.equal(rounded.to(block.dtype), block):
        return coarse, coarse
    return coarse, _sha256(block)


def _sha256(block: torch.Tensor) -> bytes:
    return hashlib.sha256(block.cpu().contiguous().view(torch.uint8).numpy().data).digest()
