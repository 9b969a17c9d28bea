"""Prefill and decoding of a teacher and a hybrid, side by side in one process.

Every size is measured in several ways, and each model is judged by its fastest: our `Decoder` with its own attention
kernel (`graph`), the same with the attention of torch (`graph_sdpa`), and the library's model with its own cache
(`transformers`). Decoding starts from a cache with random contents, on which speed does not depend.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from dtr.arch import read_geometry
from dtr.bench.sizes import FILL, check_caches, pick_batches
from dtr.bench.subjects import Subjects
from dtr.errors import DeviceError
from dtr.hybrid.cache import HybridCache, RecurrentStateLayer
from dtr.inference.decoder import PREFILL_TOKENS, Decoder
from dtr.inference.prompt_graphs import MAX_TOKENS, padded_length

MAX_ERROR = 1e-3
"""Largest relative error of the fast path's float32 logits with which it is still timed."""
MAX_ERROR_RATIO = 1.5
"""In 16-bit types the fast path may be this much further from float32 than the plain model is in its own type.

Rounding grows through the layers, by how much depends on the weights: 0.01 for a teacher, 0.3 for an untrained hybrid.
"""
_FILLED = 0.9
_TIMED_SECONDS = 0.3
_SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def bench_generate(
    subjects: Subjects, *, contexts: list[int], batches: list[int | str], num_steps: int = 16
) -> Iterator[dict[str, Any]]:
    """Time both models at every context length and batch size.

    Args:
        subjects: from `load_subjects`.
        contexts: tokens in the cache while decoding, and of the prompt in a prefill.
        batches: numbers of sequences, or "fill".
        num_steps: tokens that are decoded per measurement.

    Yields:
        per context and batch, {"context_tokens", "batch", "is_fill", "teacher": figures, "hybrid": figures}. A way
        that runs out of memory or cannot run is kept with its `error`.

    Raises:
        DeviceError: the fast path's logits are wrong on this machine, or "fill" is asked for without a GPU.
        RecipeError: a size whose cache cannot fit into this machine.
    """
    batches = pick_batches(batches, subjects.teacher.device.type)
    check_caches(subjects.teacher, contexts, batches, num_steps)
    models = {"teacher": subjects.teacher, "hybrid": subjects.hybrid}
    for model in models.values():
        check_decoder(model)
    for context in contexts:
        prefills: dict[tuple[str, int], dict[str, Any]] = {}
        for batch in batches:
            size = fill_batch(subjects.teacher, context + num_steps) if isinstance(batch, str) else batch
            row: dict[str, Any] = {"context_tokens": context, "batch": size, "is_fill": batch == FILL}
            for name, model in models.items():
                # Larger batches are prefilled in parts of this size, so that a part tells their rate.
                part = min(size, max(1, PREFILL_TOKENS // context))
                if (name, part) not in prefills:
                    prefills[name, part] = _prefill(model, part, context)
                prefill = prefills[name, part]
                first = prefill["seconds"] and prefill["seconds"] * math.ceil(size / part)
                row[name] = _decode(model, size, context, num_steps)
                row[name] |= {"prefill": prefill, "time_to_first_token_seconds": first}
            yield row


@torch.no_grad()
def check_decoder(model: Any) -> float:
    """Relative error of the fast path's logits against the model in float32, over a prompt and four steps.

    Raises:
        DeviceError: it is above `MAX_ERROR`, in 16-bit types above `MAX_ERROR_RATIO` times that of the plain model.
    """
    # Long enough for a prefill in segments.
    ids = torch.randint(0, model.config.vocab_size, (2, 1100), generator=torch.Generator().manual_seed(0))
    ids = ids[:, :40] if model.device.type == "cpu" else ids
    ids = ids.to(model.device)
    decoder = Decoder(model, batch_size=2, capacity_tokens=ids.shape[1])
    ours = [decoder.prefill(ids[:, :-4]).clone()] + [decoder.decode(ids[:, i]).clone() for i in range(-4, 0)]

    def forward(plain: Any) -> torch.Tensor:
        return plain(ids, use_cache=False, logits_to_keep=5).logits.transpose(0, 1).float()

    limit = MAX_ERROR
    exact = forward(model)
    if model.dtype != torch.float32:
        plain, exact = exact, forward(copy.deepcopy(model).float())
        limit = MAX_ERROR + MAX_ERROR_RATIO * _relative_error(plain, exact)
    error = _relative_error(torch.stack(ours).float(), exact)
    if not error <= limit:
        raise DeviceError(
            "dtr.inference",
            got=f"a relative error of {error:.2g} in the logits",
            expected=f"at most {limit:.2g}: a fast path that is right on this machine",
            hint="Nothing was timed. Report this with what 'dtr doctor' says.",
        )
    return error


def _relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def fill_batch(teacher: Any, num_tokens: int) -> int:
    """Sequences of `num_tokens` tokens whose keys and values fit beside the model on this GPU."""
    pick_batches([FILL], teacher.device.type)
    _free()
    g = read_geometry(teacher.config)
    keys_and_values = 2 * g.num_kv_heads * g.head_dim * num_tokens * teacher.config.num_hidden_layers * 2
    # Logits, their copy and what a layer holds meanwhile.
    per_sequence = keys_and_values + 6 * teacher.config.vocab_size + 40 * g.hidden_dim
    free, _ = torch.cuda.mem_get_info(teacher.device)
    return max(1, int(_FILLED * free) // per_sequence)


def _decode(model: Any, batch: int, context: int, num_steps: int) -> dict[str, Any]:
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "graph": lambda: _decode_fast(model, batch, context, num_steps),
        "transformers": lambda: _decode_plain(model, batch, context, num_steps),
    }
    if model.device.type == "cuda":

        def attend(q_BHK: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: Any, scale: float) -> Any:
            # A recorded step has one length; a token more or less makes no difference to its time.
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                seen = keys[:, :, :context], values[:, :, :context]
                q = q_BHK[:, :, None]
                return F.scaled_dot_product_attention(q, seen[0], seen[1], scale=scale, enable_gqa=True)[:, :, 0]

        ways["graph_sdpa"] = lambda: _decode_fast(model, batch, context, num_steps, attend=attend)
    measured = {name: _guarded(model, way) for name, way in ways.items()}
    done = {name: found for name, found in measured.items() if "error" not in found}
    best = min(done, key=lambda name: done[name]["step_seconds"]) if done else None
    return {
        "decode_tokens_per_second": batch / done[best]["step_seconds"] if best else None,
        "decode_way": best,
        "cache_bytes": next((found["cache_bytes"] for found in done.values()), None),
        "peak_bytes": done[best]["peak_bytes"] if best else None,
        "decode": measured,
    }


def _decode_fast(model: Any, batch: int, context: int, num_steps: int, **options: Any) -> dict[str, Any]:
    decoder = Decoder(model, batch_size=batch, capacity_tokens=context + num_steps, **options)

    def run() -> None:
        # Back to the same context each time; the contents stay.
        decoder.rewind(context)
        for _ in range(num_steps):
            decoder.decode()

    decoder.pretend(context)
    seconds = _median_seconds(model.device, run) / num_steps
    decoder.rewind(context)
    return {"step_seconds": seconds, "cache_bytes": decoder.cache_bytes()}


@torch.no_grad()
def _decode_plain(model: Any, batch: int, context: int, num_steps: int) -> dict[str, Any]:
    cache = _random_cache(model, batch, context)
    num_bytes = _cache_bytes(cache)
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    times = []
    for _ in range(min(num_steps, 6)):
        began = _now(model.device)
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        times.append(_now(model.device) - began)
    return {"step_seconds": statistics.median(times[1:] or times), "cache_bytes": num_bytes}


def _random_cache(model: Any, batch: int, context: int) -> Any:
    """The library's cache as after `context` tokens; its layout is taken from a prompt of one token."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    is_hybrid = hasattr(model, "new_cache")
    cache = model.new_cache() if is_hybrid else DynamicCache(config=model.config)
    model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
    whole = model.new_cache() if is_hybrid else DynamicCache(config=model.config)
    for ours, sample in zip(whole.layers, cache.layers):
        if isinstance(sample, RecurrentStateLayer):
            state, conv = sample.read(), sample.read_conv()
            spread = [None if x is None else x.expand(batch, *x.shape[1:]).contiguous() for x in (state, conv)]
            ours.write(spread[0], context, spread[1])  # type: ignore[union-attr]
        else:
            shape = (batch, sample.keys.shape[1], context, sample.keys.shape[-1])
            ours.update(*(torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2)))
    return whole


def _cache_bytes(cache: Any) -> int:
    if isinstance(cache, HybridCache):
        return cache.num_bytes()
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def _prefill(model: Any, batch: int, context: int) -> dict[str, Any]:
    """Rates of reading prompts of `context` tokens; with one sequence the time is that to the first token."""
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)

    def fast(*, use_graph: bool = False) -> dict[str, Any]:
        decoder = Decoder(model, batch_size=batch, capacity_tokens=padded_length(context), use_graph=use_graph)
        if use_graph:
            # A length is recorded when it comes again.
            decoder.prefill(ids)
            decoder.prefill(ids)
        return {"seconds": _median_seconds(model.device, lambda: decoder.prefill(ids))}

    @torch.no_grad()
    def plain() -> dict[str, Any]:
        return {"seconds": _median_seconds(model.device, lambda: model(ids, use_cache=True, logits_to_keep=1))}

    def with_kernel(kernel: SDPBackend, *, use_graph: bool) -> dict[str, Any]:
        with sdpa_kernel(kernel):
            return fast(use_graph=use_graph)

    ways: dict[str, Callable[[], dict[str, Any]]] = {"fused": fast, "transformers": plain}
    if model.device.type == "cuda":
        ways = {"transformers": plain}
        for name, kernel in _SDPA.items():
            ways[f"fused_{name}"] = functools.partial(with_kernel, kernel, use_graph=False)
            if batch * padded_length(context) <= MAX_TOKENS:
                ways[f"graph_{name}"] = functools.partial(with_kernel, kernel, use_graph=True)
    measured = {name: _guarded(model, way) for name, way in ways.items()}
    done = {name: found["seconds"] for name, found in measured.items() if "error" not in found}
    best = min(done, key=lambda name: done[name]) if done else None
    return {
        "batch": batch,
        "way": best,
        "seconds": done[best] if best else None,
        "tokens_per_second": batch * context / done[best] if best else None,
        "ways": measured,
    }


def _guarded(model: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run one measurement with its peak memory; where it cannot run, say why instead."""
    _free()
    is_cuda = model.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    try:
        found = work()
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    # An attention kernel that does not take these shapes on this machine.
    except RuntimeError as error:
        return {"error": str(error).strip().splitlines()[0][:200]}
    return found | {"peak_bytes": torch.cuda.max_memory_allocated(model.device) if is_cuda else None}


def _median_seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Median of up to five runs after one that does not count; one run where that takes longer than it should."""
    began = _now(device)
    work()
    times = [_now(device) - began]
    while (len(times) < 6 and sum(times) < _TIMED_SECONDS) or len(times) < 2:
        began = _now(device)
        work()
        times.append(_now(device) - began)
    return statistics.median(times[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
