"""The stack of layers of a hybrid: a family's own, with mixers in some places, and told what tells sequences apart."""

from typing import TYPE_CHECKING, Any

import torch

from dtr.arch import read_geometry
from dtr.errors import ModelError
from dtr.hybrid.cache import HybridCache
from dtr.hybrid.sequences import check_forward, read_packing, read_padding
from dtr.mixers import make_mixer

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _FamilyModel
else:
    # The family's own class stands there at run time.
    _FamilyModel = object


class BodyMixin(_FamilyModel):
    """What turns a family's stack of layers into a hybrid's: mixers in it, and all that tells sequences apart read."""

    config: Any
    layers: Any

    def __init__(self, config: Any) -> None:
        if len(config.mixers) != config.num_hidden_layers:
            raise ModelError(
                "config.mixers",
                got=f"{len(config.mixers)} entries",
                expected=f"{config.num_hidden_layers}, one per layer",
                hint="The checkpoint's config.json was changed or damaged.",
            )
        super().__init__(config)
        geometry = read_geometry(config)
        for index, spec in enumerate(config.mixers):
            if spec is not None:
                options = {key: value for key, value in spec.items() if key != "kind"}
                self.layers[index].self_attn = make_mixer(spec["kind"], geometry, index, options)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's forward, with a HybridCache; tells linear layers what is padding and what is packed.

        Args:
            input_ids: (B, T); or `inputs_embeds` (B, T, D).
            attention_mask: (B, tokens seen before and these), 0 for padding.
            position_ids: (B or 1, T). Positions that start again inside a row begin a new sequence, as for the
                library's attention: without a mask and without a cache.
            past_key_values: from `new_cache`; made where a cache is wanted.
            use_cache: as in the config when left out, but not in training and not for packed sequences.
            token_mask: (B, at least T), 0 for padding, beside an `attention_mask` that is prepared already.

        Raises:
            ModelError: what linear layers cannot honour, by the argument's name.
        """
        if past_key_values is not None and not isinstance(past_key_values, HybridCache):
            raise ModelError(
                "past_key_values",
                got=type(past_key_values).__name__,
                expected="HybridCache",
                hint="Leave past_key_values out, or make one with model.new_cache().",
            )
        like: Any = input_ids if input_ids is not None else inputs_embeds
        is_linear = any(spec is not None for spec in self.config.mixers)
        packed = None
        if is_linear and like is not None:
            check_forward(self.config, kwargs, like, past_key_values)
            token_mask = read_padding(attention_mask, token_mask, like, past_key_values)
            has_cache, attention = past_key_values is not None or bool(use_cache), self.config._attn_implementation
            packed = read_packing(position_ids, token_mask, kwargs, like, has_cache=has_cache, attention=attention)
        if packed is not None:
            use_cache = False
        elif past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            # In training the library would make a cache of its own, which linear layers cannot use.
            use_cache = not self.training
            past_key_values = None if self.training else HybridCache(self.config)
        if is_linear:
            rows = None if past_key_values is None else past_key_values.starting_rows(token_mask)
            for name, value in (("token_mask", token_mask), ("packed", packed), ("starting_rows", rows)):
                if value is not None:
                    kwargs[name] = value
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
