"""A made-up report with the shape of a real one, for the tests of the report room."""

from __future__ import annotations

import copy
import math
import os
import random
from typing import Any

from rich.console import Console

from dtr.reporting import summary_table


def score(value: float, n: int, *, stderr: float | None = None, metric: str = "acc_norm") -> dict:
    if stderr is None:
        stderr = math.sqrt(max(value * (1 - value), 0) / n)
    return {
        "metric": metric, "value": value, "stderr": stderr, "num_items": n, "log_likelihood": -1.234,
        "higher_is_better": metric != "perplexity",
    }  # fmt: skip


def hybrid(layers: list[int], num_layers: int, val: dict, test: dict, base: dict, *, stderr: float) -> dict:
    hybrid_bytes = 188_743_680 * (num_layers - len(layers)) // num_layers + 102_000 * len(layers)
    mean = test["value"] - base["value"]
    drop = 1 - test["value"] / base["value"]
    if not test["higher_is_better"]:
        mean, drop = math.log(test["value"] / base["value"]), 1 - base["value"] / test["value"]
    return {
        "num_replaced": len(layers), "layers": layers, "val": val, "test": test, "relative_test_drop": drop,
        "paired": {
            "mean": mean, "stderr": stderr, "ci95_low": mean - 1.96 * stderr, "ci95_high": mean + 1.96 * stderr,
            "num_items": test["num_items"],
        },
        "cache": {"teacher_bytes": 188_743_680, "hybrid_bytes": hybrid_bytes, "context_tokens": 4096},
    }  # fmt: skip


def distilled(num_layers: int, draw: random.Random) -> dict:
    after = [0.03 + 0.15 * draw.random() ** 2 for _ in range(num_layers)]
    curve = []
    for i in range(21):
        each = [a + (1.7 - a) * math.exp(-i / 3) for a in after]
        curve.append({"num_tokens": 530_000 * i, "mean_nmse": sum(each) / num_layers, "nmse": each})
    return {
        "num_tokens": 10_600_000, "num_steps": 1294, "seconds": 288.5, "tokens_per_second": 36_741.0,
        "nmse": [{"layer": i, "before": 1.2 + 0.9 * draw.random(), "after": a} for i, a in enumerate(after)],
        "mean_nmse": 0.0981, "curve": curve,
    }  # fmt: skip


def fake_report(
    *, num_layers: int = 30, num_replaced: int = 27, test: float = 0.48, paired_stderr: float = 0.013,
    metric: str = "acc_norm", run_to_end: bool = True, num_test: int = 750,
) -> dict:  # fmt: skip
    """A report with the shape of a real one: a curve that rises, holds and falls, made from a seeded generator."""
    draw = random.Random(7)
    order = draw.sample(range(num_layers), num_layers)
    ppl = metric == "perplexity"
    base_val, base_test = (20.0, 19.5) if ppl else (0.432, 0.497)

    def val_at(k: int) -> float:
        share = 1 + 0.12 * math.sin(2.2 * k / num_layers) - 0.25 * (k / num_layers) ** 5 + draw.uniform(-0.01, 0.01)
        return base_val / share if ppl else base_val * share

    def sc(value: float, n: int) -> dict:
        return score(value, n, metric=metric, stderr=0.03 * value if ppl else None)

    steps: list[dict[str, Any]] = []
    for k in range(1, num_layers + 1 if run_to_end else num_replaced + 2):
        value = val_at(k)
        steps.append({
            "index": k, "layer": order[k - 1], "accepted": k <= num_replaced, "score": sc(value, 250),
            "candidates": {str(layer): value - 0.01 for layer in order[k - 1:]},
        })  # fmt: skip
        if k % 5 == 0:
            steps[-1]["test"] = sc(base_test * value / base_val, num_test)
    teacher_test = sc(base_test, num_test)
    best = min(num_replaced, 18)
    chosen = [sc(base_val, 250), *(step["score"] for step in steps)]
    return {
        "format": 1, "dtr_version": "0.1.0", "created_at": "2026-01-31T12:34:56+00:00",
        "command": "dtr run recipes/arc-easy.yaml --out run-1",
        "hardware": {"device": "cuda", "cpu": "AMD EPYC 9654", "num_cores": 16, "gpu": "NVIDIA H100",
                     "memory_bytes": 137_000_000_000},
        "commit": "970c114", "versions": {"torch": "2.13.0", "transformers": "5.23.0"}, "seed": 20260131,
        "seconds": {"total": 512.3, "load": 6.1, "distill": 291.0, "search": 171.2, "report": 44.0},
        "peak_rss_bytes": 4_210_000_000, "peak_gpu_bytes": 9_870_000_000,
        "recipe": {"teacher": {"source": "HuggingFaceTB/SmolLM2-135M-Instruct"}, "distill": {"num_tokens": 10_600_000}},
        "teacher": {
            "source": "HuggingFaceTB/SmolLM2-135M-Instruct", "family": "llama", "num_layers": num_layers,
            "hidden_dim": 576, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "num_parameters": 134_515_008,
            "fingerprint": "8badf00d12345678", "val": sc(base_val, 250), "test": teacher_test,
        },
        "num_layers": num_layers,
        "mixer": {"kind": "gated_deltanet", "options": {"chunk": 64}, "backend": "torch",
                  "backend_reason": "fla is not installed", "is_pure_linear": True},
        "text": {"source": "python-docs", "num_tokens": 12_345_678, "fingerprint": "cafe0123cafe0123"},
        "distill": distilled(num_layers, draw),
        "task": {"name": "arc-easy", "kind": "multiple_choice", "metric": metric, "num_validation": 250,
                 "num_test": num_test, "fingerprint": "feedc0de00112233"},
        "search": {
            "p_min": 0.95, "p_min_kind": "relative", "p_min_value": base_val / 0.95 if ppl else base_val * 0.95,
            "candidate_evaluations": 465, "pass_equivalents": 131.7, "seconds": 170.9,
            "stop_reason": "every layer is linear", "steps": steps,
        },
        "speed": {
            who: [
                {"context_tokens": n, "prefill_tokens_per_second": 9e3, "decode_tokens_per_second": base - slope * n}
                for n in (256, 1024, 4096)
            ]
            for who, base, slope in (("teacher", 61.0, 0.007), ("m_opt", 58.0, 0.001))
        },
        "memory": [
            {"context_tokens": n, "teacher": 23_040 * n, "m_opt": 23_040 * n // 10 + 3_981_312}
            for n in (128, 1024, 8192)
        ],
        "length_by_depth": {
            "lengths": [1024, 2048, 4096], "depths": [0.0, 0.25, 0.5, 0.75, 1.0],
            "teacher": [[1.0, 1.0, 0.75, 0.75, 1.0]] * 3,
            "m_opt": [[1.0, 0.75, 0.5, 0.5, 1.0], [0.75, 0.5, 0.25, 0.5, 1.0], [0.5, 0.25, 0.0, None, 1.0]],
        },
        "m_opt": hybrid(order[:num_replaced], num_layers, chosen[num_replaced], sc(test, num_test), teacher_test,
                        stderr=paired_stderr),
        "m_best": hybrid(order[:best], num_layers, chosen[best], sc(base_test, num_test), teacher_test, stderr=0.010),
        "sample": {"prompt": "Why is the sky blue?", "teacher": "Because air scatters blue light.",
                   "hybrid": "Blue light is scattered by air."},
        "differences": [{"prompt": "Which gas do plants take in?", "answer": "carbon dioxide", "teacher": "oxygen",
                         "hybrid": "carbon dioxide"}],
    }  # fmt: skip


def without(report: dict, path: str) -> dict:
    report = copy.deepcopy(report)
    *parents, last = path.split(".")
    inner = report
    for key in parents:
        inner = inner[key]
    del inner[last]
    return report


def show(report: dict, width: int = 100) -> str:
    """The summary table as a terminal of this width prints it."""
    console = Console(width=width, record=True, file=open(os.devnull, "w"), force_terminal=False)  # noqa: SIM115
    console.print(summary_table(report))
    return console.export_text()
