"""Time distillation against the teacher's bare forward pass, in one process, on one device.

    python benchmarks/distill_speed.py smollm2-demo --sizes 32x512,8x2048

Prints one JSON line per size: tokens per second of the teacher's body (no LM head) and of a whole training step of all
layers, their ratio, cold start (until the step is compiled and recorded) and peak memory. The text is random tokens, of
which speed does not depend. Medians over steps after warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from dtr.arch import decoder_layers
from dtr.distillation.replay import WARMUP_STEPS
from dtr.distillation.students import Students
from dtr.environment import hardware, library_versions, own_commit
from dtr.mixers import mixer_from_teacher
from dtr.ops.backend import choose_backend
from dtr.ops.dispatch import use_backend
from dtr.teacher import load_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="hub name, folder, GGUF file or packaged model")
    parser.add_argument("--sizes", default="32x512,8x2048", help="batch x tokens, comma-separated")
    parser.add_argument("--mixer", default="gated_deltanet")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--slow", action="store_true")
    args = parser.parse_args()

    teacher = load_teacher(args.model, device=args.device)
    backend = use_backend(args.backend, teacher.device.type)
    facts = {
        "hardware": hardware(teacher.device),
        "versions": library_versions(),
        "commit": own_commit(),
        "mixer": args.mixer,
        "backend": choose_backend(args.backend, teacher.device.type).name,
        "backend_reason": backend.reason,
        "fast": teacher.device.type == "cuda" and not args.slow,
    }
    print(json.dumps(facts), flush=True)
    for size in args.sizes.split(","):
        batch, tokens = map(int, size.split("x"))
        print(json.dumps(measure(teacher, args, batch, tokens)), flush=True)


def measure(teacher, args, batch: int, tokens: int) -> dict:
    attention = [layer.self_attn for layer in decoder_layers(teacher.model)]
    mixers = {i: mixer_from_teacher(args.mixer, teacher.geometry, i, a) for i, a in enumerate(attention)}
    students = Students(
        teacher,
        mixers,
        learning_rate=1e-3,
        weight_decay=0.0,
        max_grad_norm=1.0,
        fast=teacher.device.type == "cuda" and not args.slow,
    )
    ids = torch.randint(0, teacher.model.config.vocab_size, (batch, tokens), device=teacher.device)

    @torch.no_grad()
    def forward() -> None:
        teacher.model.model(input_ids=ids, use_cache=False)

    began = time.perf_counter()
    for _ in range(WARMUP_STEPS + 1):
        students.train_step(ids, 1e-4)
    synchronize(teacher)
    cold = time.perf_counter() - began
    if teacher.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    step = median_seconds(teacher, lambda: students.train_step(ids, 1e-4), args.steps)
    peak = torch.cuda.max_memory_allocated() - held if teacher.device.type == "cuda" else None
    bare = median_seconds(teacher, forward, args.steps)
    return {
        "batch": batch,
        "seq_len_tokens": tokens,
        "teacher_forward_tokens_per_second": batch * tokens / bare,
        "distill_tokens_per_second": batch * tokens / step,
        "ratio_to_teacher_forward": bare / step,
        "cold_start_seconds": cold,
        "peak_bytes_beyond_model_students_and_optimizer": peak,
    }


def median_seconds(teacher, work, steps: int) -> float:
    work()
    times = []
    for _ in range(steps):
        synchronize(teacher)
        began = time.perf_counter()
        work()
        synchronize(teacher)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def synchronize(teacher) -> None:
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
