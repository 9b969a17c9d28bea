"""Hybrids of models that are known by a probe: classes made from the family's own, with stand-ins in some layers.

`config.backbone` keeps where layers and attentions are, `config.mixers` what stands in each of them, as for the
families whose hybrids are written out (`dtr.hybrid.modeling`). A class is made when its name is first asked for.
"""

import copy
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dtr.arch import FAMILIES, HYBRID_PREFIX, attention_of, decoder_layers, with_mixer
from dtr.backbone.probe import Backbone, backbone_of
from dtr.errors import ModelError
from dtr.hybrid.cache import HybridCache
from dtr.hybrid.modeling import HybridModelMixin
from dtr.hybrid.sequences import check_forward, read_packing, read_padding
from dtr.mixers import stand_in


class BackboneCache(HybridCache):
    """As `HybridCache`, for models that have other layers too, which do not all count tokens."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return next((layer.get_seq_length() for layer in self._counting(layer_idx)), 0)  # type: ignore[union-attr]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return next(layer.get_mask_sizes(query_length) for layer in self._counting(layer_idx))  # type: ignore[union-attr]

    def _counting(self, layer_idx: int) -> list[Any]:
        layers = [*self.layers[layer_idx : layer_idx + 1], *self.layers]
        return [layer for layer in layers if hasattr(layer, "get_mask_sizes")]


class BackboneMixin(HybridModelMixin):
    """What turns a family's causal language model into a hybrid."""

    code_entry = "dtr.hybrid.backbone"
    body_class = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super(HybridModelMixin, self).__init__(config, *args, **kwargs)
        backbone = Backbone(**config.backbone)
        layers: Any = self.get_submodule(backbone.layers)
        if len(config.mixers) != len(layers):
            raise ModelError(
                "config.mixers",
                got=f"{len(config.mixers)} entries",
                expected=f"{len(layers)}, one per layer",
                hint="The checkpoint's config.json was changed or damaged.",
            )
        for index, (spec, place) in enumerate(zip(config.mixers, backbone.places)):
            if spec is not None and place is not None:
                options = {key: value for key, value in spec.items() if key != "kind"}
                geometry = backbone.head_geometry()
                stand_in(spec["kind"], layers[index].get_submodule(place), geometry, index, place, options)

    def new_cache(self, max_cache_len: int | None = None) -> HybridCache:
        """An empty cache for this model.

        Raises:
            ModelError: a static one is asked for.
        """
        if max_cache_len is not None:
            raise ModelError(
                "cache_implementation",
                got="'static'",
                expected="a dynamic cache for a hybrid of this family",
                hint="Leave it out.",
            )
        return BackboneCache(self.config)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As the family's."""
        library: Any = super(HybridModelMixin, self)
        return library.prepare_inputs_for_generation(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's forward, with a `BackboneCache`; tells stand-ins what is padding.

        Raises:
            ModelError: what linear layers cannot honour, by the argument's name.
        """
        family: Any = super()
        names = list(inspect.signature(family.forward).parameters)
        kwargs |= dict(zip(names, args))
        if not self.linear_layers:
            return family.forward(**kwargs)
        memory, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        like: Any = ids if ids is not None else kwargs.get("inputs_embeds")
        if memory is not None and not isinstance(memory, BackboneCache):
            raise ModelError(
                "past_key_values",
                got=type(memory).__name__,
                expected="BackboneCache",
                hint="Leave past_key_values out, or make one with model.new_cache().",
            )
        asked = {name: kwargs.get(name) for name in ("output_attentions", "cache_position")}
        check_forward(self.config, asked, like, memory)
        padding = read_padding(kwargs.get("attention_mask"), None, like, memory)
        use_cache = kwargs.get("use_cache")
        wants = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        if memory is None and wants and not self.training:
            memory = kwargs["past_key_values"] = self.new_cache()
        kwargs["use_cache"] = memory is not None
        positions = kwargs.get("position_ids")
        attention = self.config._attn_implementation
        packed = read_packing(positions, padding, {}, like, has_cache=memory is not None, attention=attention)
        if packed is not None:
            raise ModelError(
                "position_ids",
                got="positions that start again inside a row",
                expected="one sequence a row, as hybrids of this family keep no packed ones apart",
                hint="Give each sequence a row of its own, padded.",
            )
        rows = padding, None if memory is None else memory.starting_rows(padding)
        stand_ins = [attention_of(self, index) for index in self.linear_layers]
        for module in stand_ins:
            module.rows = rows
        try:
            return family.forward(**kwargs)
        finally:
            for module in stand_ins:
                del module.rows


def make_backbone_hybrid(
    model: Any, mixers: Mapping[int, nn.Module], specs: Mapping[int, dict[str, Any]], *, share_modules: bool
) -> Any:
    """As `make_hybrid`, for a model that is known by a probe."""
    family: Any = type(model)
    if family.config_class.model_type != model.config.model_type:
        raise ModelError(
            "model",
            got=f"a {family.__name__} with the config of a {model.config.model_type}",
            expected=f"that of a {family.config_class.model_type}, as a saved hybrid finds its class by it",
            hint="Such a type is not supported.",
        )
    backbone = backbone_of(model)
    cls: Any = hybrid_class(model.config.model_type, type(model).__name__)
    layers = decoder_layers(model)
    stack = nn.ModuleList(with_mixer(layer, mixers.get(index)) for index, layer in enumerate(layers))
    hybrid = _with_layers(model, backbone.layers, stack)
    source = model.config
    fields = {key: value for key, value in source.to_dict().items() if key not in ("model_type", "quantization_config")}
    placed = [dict(specs[i]) if i in specs else None for i in range(len(layers))]
    config = cls.config_class(**fields, mixers=placed, backbone=vars(backbone))
    config._attn_implementation = source._attn_implementation
    # How experts are multiplied, too: another way rounds otherwise.
    if (experts := getattr(source, "_experts_implementation", None)) is not None:
        config._experts_implementation = experts
    config.architectures = [cls.__name__]
    hybrid.__class__, hybrid.config = cls, config
    vars(hybrid).pop("_dtr_backbone", None)
    if not share_modules:
        hybrid = copy.deepcopy(hybrid, {id(source): config})
    return hybrid.eval()


def _with_layers(module: Any, path: str, layers: nn.ModuleList) -> Any:
    """A copy of `module` that shares all but what lies on the way to `path`."""
    twin = copy.copy(module)
    twin._modules, twin._parameters, twin._buffers = (
        dict(module._modules),
        dict(module._parameters),
        dict(module._buffers),
    )
    name, _, rest = path.partition(".")
    twin._modules[name] = _with_layers(module._modules[name], rest, layers) if rest else layers
    return twin


@cache
def hybrid_config_class(model_type: str) -> Any:
    """The config of hybrids of a model type; transformers' `AutoConfig` knows it from then on."""
    family = CONFIG_MAPPING[model_type]
    body = {
        "__module__": __name__,
        "__annotations__": {"mixers": list | None, "backbone": dict | None},
        "model_type": HYBRID_PREFIX + model_type,
        "mixers": None,
        "backbone": None,
    }
    made: Any = type(f"Hybrid{family.__name__}", (family,), body)
    AutoConfig.register(made.model_type, made, exist_ok=True)
    return made


@cache
def hybrid_class(model_type: str, name: str) -> Any:
    """The hybrid of a family's class by its name; transformers' `AutoModelForCausalLM` knows it from then on."""
    family: Any = getattr(transformers, name)

    class Hybrid(BackboneMixin, family):
        config_class = hybrid_config_class(model_type)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    # The library asks it what a model takes.
    Hybrid.forward.__signature__ = inspect.signature(family.forward)  # type: ignore[attr-defined]
    Hybrid.__name__ = Hybrid.__qualname__ = f"Hybrid{name}"
    Hybrid.__module__ = __name__
    AutoModelForCausalLM.register(Hybrid.config_class, Hybrid, exist_ok=True)
    _share_conversion(model_type, name, Hybrid)
    return Hybrid


def _share_conversion(model_type: str, name: str, hybrid: Any) -> None:
    """Have a hybrid's file written and read as the family's, whose names of weights may differ from its modules'."""
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
    except ImportError:
        return
    for ours, theirs in ((hybrid.config_class.model_type, model_type), (hybrid.__name__, name)):
        if (mapping := get_checkpoint_conversion_mapping(theirs)) is not None:
            register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)


def know_hybrid(source: str, options: dict[str, Any]) -> None:
    """Have the library's Auto classes know the hybrid that `source` holds, if it is one of a probed model."""
    found, _ = transformers.PreTrainedConfig.get_config_dict(source, **options)
    model_type = str(found.get("model_type", ""))
    family = model_type.removeprefix(HYBRID_PREFIX)
    if family != model_type and family not in FAMILIES and family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hybrid_class(family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])


def __getattr__(name: str) -> Any:
    """Classes by name, for `trust_remote_code`, which takes them from this module."""
    if name.startswith("Hybrid"):
        family: Any = getattr(transformers, name.removeprefix("Hybrid"), None)
        # Several types may share a class, which has the config of one of them.
        if isinstance(family, type) and issubclass(family, transformers.PreTrainedModel):
            config_class: Any = family.config_class
            return hybrid_class(config_class.model_type, family.__name__)
        if isinstance(family, type) and issubclass(family, transformers.PreTrainedConfig):
            return hybrid_config_class(family.model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
