"""From the figures of `dtr bench generate` to the ratios that it is about."""

from __future__ import annotations

from collections import defaultdict
from typing import Any


def speedups(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios hybrid to teacher, by context length and then by batch ("fill" for the batch that fills the GPU).

    Each model counts with its fastest way at that size; None where one of the two could not run. `cache_ratio` is that
    of the bytes per sequence, by context length alone.
    """
    found: dict[str, Any] = {name: defaultdict(dict) for name in ("decode_speedup", "prefill_speedup")}
    found |= {"cache_ratio": {}, "fill_batch": {}}
    for row in rows:
        context, batch = str(row["context_tokens"]), "fill" if row["is_fill"] else str(row["batch"])
        teacher, hybrid = row["teacher"], row["hybrid"]
        rates = "decode_tokens_per_second", "tokens_per_second"
        found["decode_speedup"][context][batch] = _ratio(hybrid[rates[0]], teacher[rates[0]])
        found["prefill_speedup"][context][batch] = _ratio(hybrid["prefill"][rates[1]], teacher["prefill"][rates[1]])
        ratio = _ratio(hybrid["cache_bytes"], teacher["cache_bytes"])
        found["cache_ratio"][context] = found["cache_ratio"].get(context) or ratio
        if row["is_fill"]:
            found["fill_batch"][context] = row["batch"]
    return found


def _ratio(hybrid: float | None, teacher: float | None) -> float | None:
    return hybrid / teacher if hybrid and teacher else None
