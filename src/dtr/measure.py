"""What `dtr bench generate` prints: the figures with what they were measured on."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from dtr.bench.generation import bench_generate
from dtr.bench.speedups import speedups
from dtr.bench.subjects import load_subjects
from dtr.environment import hardware, library_versions, own_commit


def bench_generation(
    source: str,
    *,
    num_linear: int | None,
    mixer: str,
    keep: list[int] | None,
    contexts: list[int],
    batches: list[int | str],
    num_steps: int,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """`dtr bench generate`: teacher and hybrid at every size, their ratios, and what they were measured on."""
    subjects = load_subjects(source, num_linear=num_linear, mixer=mixer, keep=keep, device=device, dtype=dtype)
    hybrid = subjects.hybrid
    rows = list(bench_generate(subjects, contexts=contexts, batches=batches, num_steps=num_steps))
    return {
        "command": shlex.join(["dtr", *sys.argv[1:]]),
        "hardware": hardware(hybrid.device),
        "versions": library_versions(),
        "commit": own_commit(),
        "model": source,
        "weights": subjects.note,
        "dtype": str(hybrid.dtype).removeprefix("torch."),
        "num_layers": hybrid.config.num_hidden_layers,
        "linear_layers": hybrid.linear_layers,
        "mixers": sorted({spec["kind"] for spec in hybrid.config.mixers if spec}),
        "max_position_embeddings": hybrid.config.max_position_embeddings,
        **speedups(rows),
        "rows": rows,
    }
