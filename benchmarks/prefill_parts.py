"""Where a hybrid's prefill spends its time, and how the kernels of its Gated DeltaNet layers are best cut.

Random weights of SmolLM2-135M's shape, 27 of 30 layers Gated DeltaNet. One JSON line per result: parts of a layer
and their errors against float32, each kernel in several cuts, and the whole prefill of teacher and hybrid.

    python benchmarks/prefill_parts.py
    python benchmarks/prefill_parts.py --device cpu --sizes 2x96 --layers 3 --linear 2
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from random_model import SHAPES, random_model
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtr.arch import read_geometry
from dtr.hybrid.modeling import make_hybrid
from dtr.inference.blocks import DeltaBlock
from dtr.inference.decoder import Decoder
from dtr.mixers import mixer_from_teacher
from dtr.ops import decoding
from dtr.ops.chunk_layout import lay_out
from dtr.ops.packed_prompts import delta_sequences
from dtr.ops.projections import GatedProjection, Norm


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", default="8x32768,1x32768,16x2048", help="batch x tokens, comma-separated")
    parser.add_argument("--shape", default="smollm2-135m", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--linear", type=int, default=27)
    parser.add_argument("--options", type=json.loads, default={}, help="of the mixer, as JSON")
    parser.add_argument("--parts", default="layer,cuts,whole", help="cuts are of the first size only; or profile")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    teacher = random_model(num_layers=args.layers, shape=args.shape).to(args.device, torch.bfloat16).eval()
    hybrid = as_hybrid(teacher, args.linear, args.options)
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
    parts = {"layer": layer_parts, "cuts": cuts, "whole": whole, "profile": profile_parts}
    for batch, num_tokens in sizes:
        for name in args.parts.split(","):
            if name != "cuts" or (batch, num_tokens) == sizes[0]:
                for result in guarded(parts[name], teacher, hybrid, batch, num_tokens):
                    print(json.dumps({"part": name, "batch": batch, "tokens": num_tokens} | result), flush=True)


def as_hybrid(teacher: Any, num_linear: int, options: dict[str, Any]) -> Any:
    """The teacher's twin with linear layers whose gates are open enough to matter."""
    geometry, num_layers = read_geometry(teacher.config), len(teacher.model.layers)
    # The middles of equal stretches keep their attention.
    num_kept = num_layers - num_linear
    kept = [(2 * i + 1) * num_layers // (2 * num_kept) for i in range(num_kept)]
    mixers = {}
    for i in set(range(num_layers)) - set(kept):
        mixer = mixer_from_teacher("gated_deltanet", geometry, i, teacher.model.layers[i].self_attn, options)
        for name, weight in mixer.named_parameters():
            if name.startswith(("gate_proj", "write_proj", "decay_proj.weight")):
                torch.nn.init.normal_(weight, std=0.05)
        mixers[i] = mixer.to(teacher.device, teacher.dtype).eval()
    return make_hybrid(teacher, mixers, {i: {"kind": "gated_deltanet", **options} for i in mixers})


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


def profile_parts(_teacher: Any, hybrid: Any, batch: int, num_tokens: int) -> Iterator[dict[str, Any]]:
    """A linear layer over packed sequences, as in a server: its time, that of launching it, and its kernels."""
    p = delta_block(hybrid, 1).projection
    hidden = torch.randn(batch * num_tokens, hybrid.config.hidden_size, device=hybrid.device, dtype=hybrid.dtype)
    positions = torch.arange(num_tokens, device=hybrid.device).repeat(batch)[None]
    cos, sin = (x[0] for x in hybrid.model.rotary_emb(hidden, positions))
    starts = np.arange(batch + 1) * num_tokens
    layout = lay_out(starts, hybrid.device, num_heads=p.num_heads)
    initial = hidden.new_zeros(batch, p.num_heads, p.head_dim, p.head_dim, dtype=torch.float32)

    def work() -> None:
        delta_sequences(hidden, p, cos, sin, layout, initial)

    yield {"ms": milliseconds(work)}
    begin = time.perf_counter()
    for _ in range(10):
        work()
    yield {"ms_to_launch": 100 * (time.perf_counter() - begin)}
    with torch.profiler.profile() as found:
        for _ in range(10):
            work()
    is_cuda = hybrid.device.type == "cuda"
    rows = [(e.self_device_time_total if is_cuda else e.self_cpu_time_total, e) for e in found.key_averages()]
    for microseconds, event in sorted(rows, key=lambda row: -row[0])[:30]:
        if microseconds:
            yield {"of": event.key[:80], "microseconds": microseconds / 10, "times": event.count / 10}


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
    layer = hybrid.model.layers[hybrid.linear_layers[0]]
    norm = Norm(weight=layer.input_layernorm.weight, eps=layer.input_layernorm.variance_epsilon)
    return DeltaBlock(layer.self_attn, norm, batch)


def arguments(hybrid: Any, block: DeltaBlock, batch: int, num_tokens: int) -> tuple[Any, ...]:
    """Those of `delta_prompt`, for random inputs of a layer."""
    hidden = torch.randn(batch, num_tokens, hybrid.config.hidden_size, device=hybrid.device, dtype=hybrid.dtype)
    cos, sin = hybrid.model.rotary_emb(hidden, torch.arange(num_tokens, device=hybrid.device)[None])
    return hidden, block.projection, cos, sin


def layer_parts(_teacher: Any, hybrid: Any, batch: int, num_tokens: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of what one linear layer does, in fused kernels and in parts."""
    for name, one in (("parts", decoding.delta_prompt_in_parts), ("fused", decoding.delta_prompt)):
        yield {"of_layer": name, "relative_error": error(hybrid, one)}
    args = arguments(hybrid, delta_block(hybrid, batch), batch, num_tokens)
    hidden, projection = args[:2]
    norm = projection.norm
    layer = hybrid.model.layers[hybrid.linear_layers[0]]
    heads = torch.randn(*hidden.shape[:2], projection.num_heads * projection.head_dim, device=hidden.device).to(hidden)
    work: dict[str, Callable[[], Any]] = {
        "norm, projections and mixer in parts": lambda: decoding.delta_prompt_in_parts(*args),
        "norm, projections and mixer fused": lambda: decoding.delta_prompt(*args),
        "projections": lambda: F.linear(hidden, projection.weight[: projection.num_head_rows]),
        "norm": lambda: norm(hidden),
        "output projection and sum": lambda: decoding.add_linear(hidden, heads, layer.self_attn.o_proj.weight, None),
    }
    if hidden.is_cuda:
        from dtr.ops.gpu import delta_prompt_triton as kernels

        head_rows, gate_rows = kernels.split_rows(projection)
        gates = kernels.read_gates(hidden, gate_rows, projection)
        rows = F.linear(hidden, head_rows)
        maps = kernels.map_chunks(rows, gates, *args[1:])
        work |= {
            "gates": lambda: kernels.read_gates(hidden, gate_rows, projection),
            "maps": lambda: kernels.map_chunks(rows, gates, *args[1:]),
            "scan": lambda: kernels.scan_chunks(rows, gates, maps, projection),
        }
    x, inner = hidden.flatten(0, 1), hidden.new_ones(batch * num_tokens, hybrid.config.intermediate_size)
    pair = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
    gated = GatedProjection(norm=norm, weight=pair)
    work["gate and up"] = lambda: F.linear(x, pair)
    work["norm, gate, up and their product"] = lambda: decoding.gated_pair(x, gated)
    work["down and sum"] = lambda: decoding.add_linear(hidden, inner, layer.mlp.down_proj.weight, None)
    for name, one in work.items():
        yield {"of_layer": name, "ms": milliseconds(one)}
    yield from fla(projection, batch, num_tokens, hidden)


def error(hybrid: Any, operator: Callable[..., Any]) -> dict[str, float]:
    """Relative error of outputs and last state against plain float32, over 2 x 1,100 tokens at most."""
    size = (2, 1100) if hybrid.device.type == "cuda" else (1, 70)
    args = arguments(hybrid, delta_block(hybrid, size[0]), *size)
    want = decoding.delta_prompt_in_parts(*(as_float32(x) for x in args))
    found = zip(("out", "state"), operator(*args), want)
    return {name: float((x.cpu().float() - y).norm() / y.norm()) for name, x, y in found}


def as_float32(x: Any) -> Any:
    """The same on the CPU in float32."""
    if dataclasses.is_dataclass(x):
        fields = {field.name: as_float32(getattr(x, field.name)) for field in dataclasses.fields(x)}
        return dataclasses.replace(x, **fields)
    if isinstance(x, tuple):
        return tuple(as_float32(part) for part in x)
    return x.float().cpu() if isinstance(x, torch.Tensor) else x


def cuts(_teacher: Any, hybrid: Any, batch: int, num_tokens: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of the fused kernels, cut in different ways."""
    if hybrid.device.type != "cuda":
        return
    from dtr.ops.gpu import delta_prompt_triton as kernels

    hidden, projection, *angles = arguments(hybrid, delta_block(hybrid, batch), batch, num_tokens)
    head_rows, gate_rows = kernels.split_rows(projection)
    gates = kernels.read_gates(hidden, gate_rows, projection)
    rows = F.linear(hidden, head_rows)
    maps = kernels.map_chunks(rows, gates, projection, *angles)
    for registers in (None, 208, 168):
        cut = kernels.Tuning(map_registers=registers)
        yield from one_cut(
            "maps", cut, lambda cut=cut: kernels.map_chunks(rows, gates, projection, *angles, tuning=cut)
        )
    for columns, warps, stages, segments in (
        (64, 4, 3, 1), (64, 4, 4, 1), (64, 4, 5, 1), (64, 8, 4, 1), (32, 4, 3, 1), (16, 4, 3, 1), (64, 4, 4, 2),
    ):  # fmt: skip
        cut = kernels.Tuning(scan_columns=columns, scan_warps=warps, scan_stages=stages, segments=segments)
        yield from one_cut("scan", cut, lambda cut=cut: kernels.scan_chunks(rows, gates, maps, projection, tuning=cut))
    yield from pair_cuts(hybrid, batch * num_tokens)


def pair_cuts(hybrid: Any, num_rows: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of the gated MLP's first half, cut in different ways."""
    from dtr.ops.gpu import mlp_triton as kernels

    mlp = hybrid.model.layers[0].mlp
    weight = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    x = torch.randn(num_rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
    for rows, columns, warps, stages in (
        (128, 128, 8, 3), (128, 128, 8, 4), (128, 64, 4, 3), (128, 64, 8, 4), (256, 64, 8, 3), (64, 128, 4, 4),
    ):  # fmt: skip
        cut = kernels.Tiles(rows=rows, columns=columns, warps=warps, stages=stages)
        yield from one_cut("pair", cut, lambda cut=cut: kernels.gated_pair(x, weight, 1e-5, cut))


def one_cut(kernel: str, cut: Any, work: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    names = {"maps": ("map",), "scan": ("scan", "segments")}.get(kernel, ("rows", "columns", "warps", "stages"))
    described = {key: value for key, value in dataclasses.asdict(cut).items() if key.startswith(names)}
    try:
        yield {"kernel": kernel, **described, "ms": milliseconds(work)}
    # Too many registers or too much shared memory is an answer too.
    except Exception as failure:
        yield {"kernel": kernel, **described, "error": str(failure).strip().splitlines()[0][:120]}


def fla(projection: Any, batch: int, num_tokens: int, like: torch.Tensor) -> Iterator[dict[str, Any]]:
    """The delta rule of fla alone, where it is installed: without rotation, gates and norms."""
    if not like.is_cuda:
        return
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        shape = (batch, num_tokens, projection.num_heads)
        q, k, v = (torch.randn(*shape, projection.head_dim, device=like.device, dtype=like.dtype) for _ in range(3))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        gates = torch.rand(*shape, device=like.device)
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
