"""What tells the sequences of a batch apart: read from a forward's arguments, once for all linear layers.

Attention learns from its mask which tokens belong together. A recurrence reads whatever comes next, so padding, packed
sequences and custom masks have to be told to it, or refused: nothing is ignored.

Shapes: B batch, T tokens, R sequences, S tokens of the longest of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from dtr.errors import ModelError
from dtr.mixers.base import PackedSequences, check_arguments

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""Arguments that say where packed sequences begin, beside position_ids."""


def read_padding(attention_mask: Any, token_mask: torch.Tensor | None, like: torch.Tensor, cache: Any) -> Any:
    """1 for real tokens and 0 for padding (B, T), or None where no padding was mentioned.

    Args:
        attention_mask: as given to the model.
        token_mask: as `prepare_inputs_for_generation` gives it, beside a mask that the library has prepared.
        like: hidden states or ids (B, T, ...).
        cache: the HybridCache, or None.

    Raises:
        ModelError: a mask of another kind, or of another size.
    """
    batch, num_tokens = like.shape[:2]
    if token_mask is not None:
        return token_mask[:, -num_tokens:]
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        kind = type(attention_mask).__name__
        shape = getattr(attention_mask, "shape", None)
        raise ModelError(
            "attention_mask",
            got=f"a {kind}" if shape is None else f"a {kind} of shape {tuple(shape)}",
            expected=f"a padding mask of shape ({batch}, tokens), as linear layers read a text in its order",
            hint="Pass packed sequences by position_ids that start again at 0, without a mask.",
        )
    seen = 0 if cache is None else cache.get_seq_length()
    is_static = isinstance(seen, torch.Tensor)
    columns = attention_mask.shape[1]
    if len(attention_mask) != batch or (columns < num_tokens if is_static else columns != seen + num_tokens):
        raise ModelError(
            "attention_mask",
            got=f"shape {tuple(attention_mask.shape)}",
            expected=f"({batch}, {num_tokens if is_static else seen + num_tokens}): tokens seen before and these",
            hint="Give the mask of the whole text so far, or leave it out where nothing is padding.",
        )
    # As the library reads it: whatever is not 0 is a token.
    return attention_mask[:, columns - num_tokens :].to(like.device).bool().long()


def read_packing(
    position_ids: torch.Tensor | None,
    padding: torch.Tensor | None,
    others: dict[str, Any],
    like: torch.Tensor,
    *,
    has_cache: bool,
    attention: str,
) -> PackedSequences | None:
    """Where each of several sequences side by side is, by the library's own rule; None where each row is one.

    Positions that do not go on by 1 begin a sequence, unless there is a mask or a cache: the library's attention looks
    beyond such places then, and so positions that start again are refused.

    Args:
        position_ids: (B or 1, T) or None.
        padding: from `read_padding`.
        others: the forward's other arguments, with those in `BOUNDARIES`.
        like: hidden states or ids (B, T, ...).
        has_cache: whether a cache is given or asked for.
        attention: implementation of the attention layers.

    Raises:
        ModelError: packed sequences that would not be kept apart.
    """
    batch, num_tokens = like.shape[:2]
    packed = None
    if position_ids is not None and num_tokens > 1 and position_ids.dim() == 2:
        positions = position_ids.expand(batch, -1).to(like.device)
        steps = positions.diff(dim=1)
        if padding is None and not has_cache:
            starts = F.pad(steps != 1, (1, 0), value=True)
            if bool(starts[:, 1:].any()):
                packed = starts
        else:
            again = steps < 1
            if padding is not None:
                again = again & (padding[:, 1:] > 0) & (padding[:, :-1] > 0)
            if bool(again.any()):
                raise _not_apart("positions that start again inside a row, beside an attention_mask or a cache")
    _check_boundaries(packed, others, batch, num_tokens)
    if packed is None:
        return None
    if batch > 1 and "flash" in attention:
        raise _not_apart(f"packed sequences in {batch} rows, which {attention} does not keep apart")
    return lay_out(packed)


def lay_out(starts_BT: torch.Tensor) -> PackedSequences:
    """Packed sequences as rows of their own, those of about the same length together.

    Args:
        starts_BT: where a sequence begins; the first token of each row is such a place.
    """
    device, num_tokens = starts_BT.device, starts_BT.numel()
    begins = starts_BT.flatten().nonzero()[:, 0].tolist()
    lengths = [end - begin for begin, end in zip(begins, [*begins[1:], num_tokens])]
    # Padding within a group at most doubles the work, however uneven the sequences are.
    groups: dict[int, list[tuple[int, int]]] = {}
    for begin, length in zip(begins, lengths):
        groups.setdefault((length - 1).bit_length(), []).append((begin, length))
    tokens, place_of, num_before = [], torch.empty(num_tokens, dtype=torch.long), 0
    for members in groups.values():
        width = max(length for _, length in members)
        first, length = torch.tensor(members).unbind(1)
        offset = torch.arange(width)
        is_real = offset < length[:, None]
        index_RS = torch.where(is_real, first[:, None] + offset, 0)
        place_of[index_RS[is_real]] = num_before + torch.arange(index_RS.numel()).view_as(index_RS)[is_real]
        num_before += index_RS.numel()
        tokens.append(index_RS.to(device))
    return PackedSequences(tuple(tokens), place_of.view(starts_BT.shape).to(device))


def check_forward(config: Any, others: dict[str, Any], like: torch.Tensor, cache: Any) -> None:
    """Refuse arguments that mean something which linear layers cannot do.

    Raises:
        ModelError: such an argument, by name.
    """
    check_arguments(others)
    wanted = others.get("output_attentions")
    if getattr(config, "output_attentions", False) if wanted is None else wanted:
        raise ModelError(
            "output_attentions",
            got="True",
            expected="False, as linear layers have no attention weights",
            hint="Ask the teacher for them, or use output_hidden_states.",
        )
    position = others.get("cache_position")
    if position is not None:
        seen = 0 if cache is None else cache.get_seq_length()
        expected = torch.arange(like.shape[1], device=position.device) + seen
        if position.shape != expected.shape or not bool((position == expected).all()):
            raise ModelError(
                "cache_position",
                got="other places than the next ones",
                expected=f"the {like.shape[1]} that follow what the cache has seen, as a state cannot go back",
                hint="Leave it out.",
            )


def _check_boundaries(starts: torch.Tensor | None, others: dict[str, Any], batch: int, num_tokens: int) -> None:
    for name in BOUNDARIES:
        given = others.get(name)
        if given is None:
            continue
        ours = torch.zeros(batch, num_tokens, dtype=torch.bool)
        ours[:, 0] = True
        ours = ours if starts is None else starts.cpu()
        theirs = torch.zeros_like(ours)
        if name == "seq_idx":
            theirs[:, 0], theirs[:, 1:] = True, (given.diff(dim=-1) != 0).cpu().expand(batch, -1)
        else:
            begins = given.cpu().long()
            theirs.view(-1)[begins[begins < theirs.numel()]] = True
        if not torch.equal(ours, theirs):
            raise _not_apart(f"{name} that begins sequences where position_ids do not")


def _not_apart(got: str) -> ModelError:
    return ModelError(
        "position_ids",
        got=got,
        expected="packed sequences that every layer can tell apart",
        hint="Pass position_ids that start again at 0 with each sequence, with use_cache=False and no attention_mask.",
    )
