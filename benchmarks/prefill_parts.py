"""Where a hybrid's prefill spends its time, and how the kernels of its Gated DeltaNet layers are best cut.

Random weights of SmolLM2-135M's shape, 27 of 30 layers Gated DeltaNet. One JSON line per result: parts of a layer
and their errors against float32, each kernel in several cuts, and the whole prefill of teacher and hybrid.

    python benchmarks/prefill_parts.py
    python benchmarks/prefill_parts.py --device cpu --sizes 2x96 --layers 3 --linear 2
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from random_model import random_model
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtr.arch import read_geometry
from dtr.hybrid.modeling import make_hybrid
from dtr.inference.blocks import DeltaBlock
from dtr.inference.decoder import Decoder
from dtr.mixers import mixer_from_teacher
from dtr.ops import decoding


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", default="8x32768,1x32768,16x2048", help="batch x tokens, comma-separated")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--linear", type=int, default=27)
    parser.add_argument("--parts", default="layer,cuts,whole", help="cuts are of the first size only")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    teacher = random_model(num_layers=args.layers).to(args.device, torch.bfloat16).eval()
    hybrid = as_hybrid(teacher, args.linear)
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
    parts = {"layer": layer_parts, "cuts": cuts, "whole": whole}
    for batch, num_tokens in sizes:
        for name in args.parts.split(","):
            if name != "cuts" or (batch, num_tokens) == sizes[0]:
                for result in guarded(parts[name], teacher, hybrid, batch, num_tokens):
                    print(json.dumps({"part": name, "batch": batch, "tokens": num_tokens} | result), flush=True)


def as_hybrid(teacher: Any, num_linear: int) -> Any:
    """The teacher's twin with linear layers whose gates are open enough to matter."""
    geometry, num_layers = read_geometry(teacher.config), len(teacher.model.layers)
    # The middles of equal stretches keep their attention.
    num_kept = num_layers - num_linear
    kept = [(2 * i + 1) * num_layers // (2 * num_kept) for i in range(num_kept)]
    mixers = {}
    for i in set(range(num_layers)) - set(kept):
        mixer = mixer_from_teacher("gated_deltanet", geometry, i, teacher.model.layers[i].self_attn)
        for name, weight in mixer.named_parameters():
            if name.startswith(("gate_proj", "write_proj", "decay_proj.weight")):
                torch.nn.init.normal_(weight, std=0.05)
        mixers[i] = mixer.to(teacher.device, teacher.dtype).eval()
    return make_hybrid(teacher, mixers, {i: {"kind": "gated_deltanet"} for i in mixers})


def guarded(part: Callable[..., Iterator[dict[str, Any]]], *arguments: Any) -> Iterator[dict[str, Any]]:
    """The part's results, or why there are none."""
    try:
        with torch.no_grad():
            yield from part(*arguments)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        yield {"error": str(error).strip().splitlines()[0][:200]}


def milliseconds(work: Callable[[], Any], *, runs: int = 5) -> float:
    """Median time of `work` after a run that does not count, in milliseconds."""
    work()
    if not torch.cuda.is_available():
        began = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - began)
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def whole(teacher: Any, hybrid: Any, batch: int, num_tokens: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of the whole prefill, of each model in its ways."""
    ids = torch.randint(0, teacher.config.vocab_size, (batch, num_tokens), device=teacher.device)
    best = {}
    for name, model in (("teacher", teacher), ("hybrid", hybrid)):
        decoder = Decoder(model, batch_size=batch, capacity_tokens=num_tokens, use_graph=False)
        kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        if model.device.type == "cpu":
            kernels = {"math": SDPBackend.MATH}
        for kernel, backend in kernels.items():
            with sdpa_kernel(backend):
                found = milliseconds(lambda decoder=decoder: decoder.prefill(ids), runs=3)
            yield {"model": name, "attention": kernel, "ms": found}
            best[name] = min(found, best.get(name, found))
        del decoder
    yield {"speedup": best["teacher"] / best["hybrid"]}


def delta_block(hybrid: Any, batch: int) -> DeltaBlock:
    return DeltaBlock(hybrid.model.layers[hybrid.linear_layers[0]].self_attn, batch)


def rows_of(hybrid: Any, block: DeltaBlock, batch: int, num_tokens: int) -> dict[str, Any]:
    """Arguments of `delta_prompt` for random inputs of a layer."""
    g = read_geometry(hybrid.config)
    hidden = torch.randn(batch, num_tokens, g.hidden_dim, device=hybrid.device, dtype=hybrid.dtype)
    positions = torch.arange(num_tokens, device=hybrid.device)[None]
    cos, sin = hybrid.model.rotary_emb(hidden, positions)
    rows = block.project(hidden)
    return {"hidden": hidden, "args": (rows, cos, sin), "options": {"num_heads": block.state_BHKV.shape[1]}}


def layer_parts(_teacher: Any, hybrid: Any, batch: int, num_tokens: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of what one linear layer does, old kernels and new, and what surrounds it."""
    block = delta_block(hybrid, batch)
    made = rows_of(hybrid, block, batch, num_tokens)
    hidden, args, options = made["hidden"], made["args"], made["options"]
    layer = hybrid.model.layers[hybrid.linear_layers[0]]
    out = decoding.delta_prompt(*args, **options)[0]
    work: dict[str, Callable[[], Any]] = {
        "projection": lambda: block.project(hidden),
        "parts, one after the other": lambda: decoding.delta_prompt_in_parts(*args, **options),
        "fused": lambda: decoding.delta_prompt(*args, **options),
        "rotation": lambda: decoding.rotate_heads(
            args[0][..., : out.shape[-1]].unflatten(-1, (options["num_heads"], -1)), *args[1:], unit_length=True
        ),
        "output projection": lambda: layer.self_attn.o_proj(out),
        "norm": lambda: F.rms_norm(hidden, hidden.shape[-1:], layer.input_layernorm.weight, 1e-5),
        "residual": lambda: hidden + hidden,
        "residual and norm": lambda: decoding.add_and_norm(hidden, hidden, layer.input_layernorm.weight, 1e-5),
    }
    gate_up = hidden.new_ones(batch * num_tokens, 2 * hybrid.config.intermediate_size)
    pair = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
    work["gate and up"] = lambda: F.linear(hidden, pair)
    work["gate, up and their product"] = lambda: decoding.gated_pair(hidden.flatten(0, 1), pair, None)
    work["down"] = lambda: layer.mlp.down_proj(gate_up[:, : hybrid.config.intermediate_size])
    work["gated product"] = lambda: decoding.gated_product(*gate_up.chunk(2, dim=1), activation="silu")
    for name, one in work.items():
        yield {"of_layer": name, "ms": milliseconds(one)}
    for name, one in (("parts", decoding.delta_prompt_in_parts), ("fused", decoding.delta_prompt)):
        yield {"of_layer": name, "relative_error": error(hybrid, one)}
    yield from fla(args, options)


def error(hybrid: Any, operator: Callable[..., Any]) -> dict[str, float]:
    """Relative error of outputs and last state against plain float32, over 2 x 1,100 tokens at most."""
    size = (2, 1100) if hybrid.device.type == "cuda" else (1, 70)
    block = delta_block(hybrid, size[0])
    made = rows_of(hybrid, block, *size)
    got = operator(*made["args"], **made["options"])
    want = exact(*made["args"], **made["options"])
    found = zip(("out", "state"), got, want)
    return {name: float((x.float() - y).norm() / y.norm()) for name, x, y in found}


def exact(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, num_heads: int) -> tuple[torch.Tensor, Any]:
    """Plain float32 on the CPU, for results on the GPU."""
    on_cpu = (x.float().cpu() for x in (rows, cos, sin))
    out, state = decoding.delta_prompt_in_parts(*on_cpu, num_heads=num_heads)
    return out.to(rows.device), state.to(rows.device)


def cuts(_teacher: Any, hybrid: Any, batch: int, num_tokens: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of the fused kernels, cut in different ways."""
    if hybrid.device.type != "cuda":
        return
    from dtr.ops import delta_prompt_triton as kernels

    made = rows_of(hybrid, delta_block(hybrid, batch), batch, num_tokens)
    args, options = made["args"], made["options"]
    maps = kernels.map_chunks(*args, **options)
    inverses = ((1, False), (1, True), (2, False), (2, True), (4, True))
    for (inverse_warps, paired), warps in (*((inverse, 4) for inverse in inverses), ((2, False), 8)):
        cut = kernels.Tuning(inverse_warps=inverse_warps, inverse_paired=paired, map_warps=warps)
        yield from one_cut("maps", cut, lambda cut=cut: kernels.map_chunks(*args, **options, tuning=cut))
    yield from pair_cuts(hybrid, batch * num_tokens)
    for (columns, warps), stages, segments in itertools.product(((16, 2), (16, 4), (32, 4)), (3, 4), (1, 4)):
        cut = kernels.Tuning(scan_columns=columns, scan_warps=warps, scan_stages=stages, segments=segments)
        yield from one_cut("scan", cut, lambda cut=cut: kernels.scan_chunks(args[0], maps, **options, tuning=cut))


def pair_cuts(hybrid: Any, num_rows: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of the gated MLP's first half, cut in different ways."""
    from dtr.ops import mlp_triton as kernels

    mlp = hybrid.model.layers[0].mlp
    weight = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    x = torch.randn(num_rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
    for rows, columns, warps, stages in (
        (128, 128, 8, 3), (128, 128, 8, 4), (128, 64, 4, 3), (128, 64, 8, 4), (256, 64, 8, 3), (64, 128, 4, 4),
    ):  # fmt: skip
        cut = kernels.Tiles(rows=rows, columns=columns, warps=warps, stages=stages)
        yield from one_cut("pair", cut, lambda cut=cut: kernels.gated_pair(x, weight, cut))


def one_cut(kernel: str, cut: Any, work: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    names = {"maps": ("inverse", "map"), "scan": ("scan", "segments")}.get(
        kernel, ("rows", "columns", "warps", "stages")
    )
    described = {key: value for key, value in dataclasses.asdict(cut).items() if key.startswith(names[kernel])}
    try:
        yield {"kernel": kernel, **described, "ms": milliseconds(work)}
    # Too many registers or too much shared memory is an answer too.
    except Exception as failure:
        yield {"kernel": kernel, **described, "error": str(failure).strip().splitlines()[0][:120]}


def fla(args: tuple[torch.Tensor, ...], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The delta rule of fla alone, where it is installed: without rotation, gates and norms."""
    rows, cos, _ = args
    if rows.device.type != "cuda":
        return
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        heads, dim = options["num_heads"], cos.shape[-1]
        q, k, v = (rows[..., i * heads * dim : (i + 1) * heads * dim].unflatten(-1, (heads, dim)) for i in range(3))
        q, k, v = F.normalize(q, dim=-1).contiguous(), F.normalize(k, dim=-1).contiguous(), v.contiguous()
        gates = torch.rand(*rows.shape[:2], heads, device=rows.device)
        yield {
            "of_layer": "fla chunk_gated_delta_rule",
            "ms": milliseconds(
                lambda: chunk_gated_delta_rule(q, k, v, -gates, gates.to(v.dtype), scale=1.0, output_final_state=True)
            ),
        }
    except Exception as failure:
        yield {"of_layer": "fla chunk_gated_delta_rule", "error": str(failure).strip().splitlines()[0][:120]}


if __name__ == "__main__":
    main()
