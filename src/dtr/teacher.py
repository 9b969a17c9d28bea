"""The frozen teacher: loaded, checked and known by its fingerprint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dtr.arch import (
    HYBRID_PREFIX,
    HeadGeometry,
    check_library,
    check_supported,
    decoder_layers,
    is_family,
    read_geometry,
    replaceable_layers,
    require_family,
)
from dtr.backbone.probe import backbone_of
from dtr.checkpoint import load_model, read_model
from dtr.devices import pick_device, pick_dtype
from dtr.distributed import current_world
from dtr.errors import ModelError
from dtr.identity import earlier_fingerprint, is_earlier, is_same_model, tokenizer_fingerprint
from dtr.identity import model_fingerprint as _fingerprint
from dtr.self_check import self_check

__all__ = [
    "Teacher",
    "as_teacher",
    "load_model",
    "load_teacher",
    "pick_device",
    "pick_dtype",
    "tokenizer_fingerprint",
    "whole_weights",
]

log = logging.getLogger("dtr")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen causal language model with its tokenizer. Nothing in this package changes it."""

    model: Any
    tokenizer: Any
    source: str
    geometry: HeadGeometry
    fingerprint: str
    """Of all weights and of what else decides its attention (`dtr.identity`)."""
    self_check: str = ""
    """What was checked of it, for the log."""
    is_sharded: bool = False
    """Whether each rank holds only its part of every weight; all ranks must then run the same passes together."""

    def is_one_of(self, fingerprint: str) -> bool:
        """Whether a recorded fingerprint is of this model; those of earlier releases are worked out as they were."""
        if is_earlier(fingerprint):
            return fingerprint == earlier_fingerprint(self.model)
        return is_same_model(fingerprint, self.fingerprint)

    @property
    def num_layers(self) -> int:
        return len(decoder_layers(self.model))

    @property
    def replaceable_layers(self) -> list[int]:
        """Layers that a mixer can stand in for; others keep the attention, or whatever else they have."""
        return replaceable_layers(self.model)

    def place(self, layer: int) -> str:
        """Path of the attention in that layer."""
        found = "self_attn" if is_family(self.model.config) else backbone_of(self.model).places[layer]
        assert found is not None, f"layer {layer} has no full attention"
        return found

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def kernel_dtype(self) -> torch.dtype | None:
        """Type of what kernels get; None for float16, in which a model runs and is not trained."""
        return None if self.dtype == torch.float16 else self.dtype


def load_teacher(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    shard: bool = False,
) -> Teacher:
    """Load a pretrained full-attention model, frozen and in evaluation mode.

    Args:
        source: hub name, local folder, GGUF file, or a packaged model such as `smollm2-demo`.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16; auto is bfloat16 where the device multiplies it fast.
        trust_remote_code: run Python code that comes with the model.
        shard: spread every weight over the ranks that torchrun started (FSDP2), for a model larger than one GPU; such
            a teacher can be distilled, not searched with. Does nothing in a world of one.

    Raises:
        ModelError: not found, damaged, of a family whose attention we do not know, or not what its config says.
        DeviceError: a GPU is asked for and there is none.
    """
    place = pick_device(device)
    shard = shard and current_world().size > 1
    if shard:
        # Read into main memory; each layer visits the GPU once as a whole and leaves this rank's part there.
        device, dtype = "cpu", str(pick_dtype(dtype, place)).removeprefix("torch.")
    model, tokenizer = read_model(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    teacher = as_teacher(model, tokenizer, source=str(source))
    if shard:
        hint = "Leave it out; with parallel 'data' each rank holds the whole model."
        require_family(model.config, "runtime.shard_teacher", hint=hint)
    return shard_teacher(teacher, place) if shard else teacher


def shard_teacher(teacher: Teacher, device: torch.device) -> Teacher:
    """Spread a teacher's weights over all ranks by FSDP2; its body only, as the LM head is not run in distillation.

    A layer's weights come together while it runs and part again, so that a rank needs room for its part and one layer.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (current_world().size,))
    body = teacher.model.model
    for layer in decoder_layers(teacher.model):
        fully_shard(layer, mesh=mesh)
    fully_shard(body, mesh=mesh)
    body.to(device)
    return replace(teacher, is_sharded=True)


@contextmanager
def whole_weights(layer: Any) -> Iterator[None]:
    """While open, a layer's weights are plain tensors on every rank, sharded or not."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


def as_teacher(model: Any, tokenizer: Any, *, source: str = "in memory") -> Teacher:
    """Wrap a model that is loaded already; it is frozen and put in evaluation mode.

    Raises:
        ModelError: the model is of an unknown family, or a check of what we rely on fails (`dtr.self_check`).
    """
    check_library()
    check_supported(model.config)
    if model.config.model_type.startswith(HYBRID_PREFIX):
        raise ModelError(
            "teacher.source",
            got=f"a hybrid ({model.config.model_type})",
            expected="a model whose layers all have full attention",
            hint="Give the model that the hybrid was made from.",
        )
    model.requires_grad_(False).eval()
    checked = self_check(model, source=source)
    log.info(checked)
    probed = None if is_family(model.config) else backbone_of(model)
    if probed is not None:
        log.info(f"{probed.describe()}; {len(probed.full_layers)} of {len(probed.kinds)} layers can be replaced")
    return Teacher(
        model=model,
        tokenizer=tokenizer,
        source=source,
        geometry=read_geometry(model.config) if probed is None else probed.head_geometry(),
        fingerprint=_fingerprint(model),
        self_check=checked,
    )
