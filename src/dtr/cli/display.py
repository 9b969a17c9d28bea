"""What is on the screen while a run goes on: bars for people, JSON lines for logs, or nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dtr.errors import RecipeError, did_you_mean

Listener = Callable[[dict[str, Any]], None]
KINDS = ("rich", "json", "quiet")


@contextmanager
def open_display(kind: str) -> Iterator[Listener]:
    """A listener for a run's events, on stderr, so that stdout stays for results.

    Raises:
        RecipeError: an unknown kind.
    """
    if kind not in KINDS:
        raise RecipeError("--progress", got=f"'{kind}'", expected="rich, json or quiet", hint=did_you_mean(kind, KINDS))
    if kind == "quiet":
        yield lambda event: None
    elif kind == "json":
        yield lambda event: print(json.dumps(event, default=str), file=sys.stderr, flush=True)
    else:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            yield _Bars(progress, console)


class _Bars:
    """Turns events into two bars and a few lines."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress, self._console = progress, console
        self._tasks: dict[str, Any] = {}
        self._linear, self._best = 0, ""
        self._stage: Any = None

    def __call__(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _on_stage(self, event: dict[str, Any]) -> None:
        """A line for what may take long without a count, with a bar that moves until something is counted."""
        self._console.print(f"{event['text']} ...", highlight=False)
        self._end_stage()
        self._stage = self._progress.add_task("working", total=None, note=event["text"])

    def _end_stage(self) -> None:
        if self._stage is not None:
            self._progress.remove_task(self._stage)
        self._stage = None

    def _bar(self, name: str, done: int, total: int, note: str) -> None:
        self._end_stage()
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note="")
        self._progress.update(self._tasks[name], completed=done, total=total, note=note)

    def _on_self_check(self, event: dict[str, Any]) -> None:
        self._console.print(event["text"], highlight=False)

    def _on_backend(self, event: dict[str, Any]) -> None:
        self._console.print(f"backend {event['name']} on {event['device']}: {event['reason']}", highlight=False)

    def _on_text_fault(self, event: dict[str, Any]) -> None:
        self._console.print(f"passed over: {event['where']}: {event['got']}", highlight=False, markup=False)

    def _on_written(self, event: dict[str, Any]) -> None:
        self._bar("write", event["num_tokens"], event["total_tokens"], "tokens by the teacher")

    def _on_distill(self, event: dict[str, Any]) -> None:
        self._bar("distil", event["step"], event["num_steps"], f"loss {event['mean_loss']:.4f}")

    def _on_nmse(self, event: dict[str, Any]) -> None:
        self._console.print(f"{event['num_tokens']:>12,} tokens: held-out NMSE {_by_kind(event)}", highlight=False)

    def _on_realign(self, event: dict[str, Any]) -> None:
        self._bar("realign", event["step"], event["num_steps"], f"loss {event['mean_loss']:.4f}")

    def _on_realign_nmse(self, event: dict[str, Any]) -> None:
        self._on_nmse(event)

    def _on_realign_stopped(self, event: dict[str, Any]) -> None:
        self._on_stopped(event)

    def _on_realigned(self, event: dict[str, Any]) -> None:
        verdict = "kept" if event["kept"] else "not kept, as validation got worse"
        self._console.print(
            f"realigned: validation {event['val_before']:.4f} -> {event['val']:.4f}, {verdict}", highlight=False
        )

    def _on_stopped(self, event: dict[str, Any]) -> None:
        self._console.print(
            f"{event['num_tokens']:>12,} tokens: layer {_named(event)} is given up and keeps its last good weights, "
            f"as {event['why']}",
            highlight=False,
        )

    def _on_teacher(self, event: dict[str, Any]) -> None:
        self._best = f", score {event['score']:.4f}"
        self._console.print(f"teacher on validation: {event['score']:.4f}", highlight=False)

    def _on_candidate(self, event: dict[str, Any]) -> None:
        self._bar("search", event["done"], event["total"], f"{self._linear} layers replaced{self._best}")

    def _on_step(self, event: dict[str, Any]) -> None:
        if event["accepted"]:
            self._linear, self._best = event["step"], f", score {event['score']:.4f}"
        verdict = "" if event["accepted"] else " (below p_min)"
        layers = event.get("layers", [event["layer"]])
        what = f"layer {_named(event):>3}" if len(layers) == 1 else f"{len(layers)} layers more"
        self._console.print(f"step {event['step']:>3}: {what} -> {event['score']:.4f}{verdict}", highlight=False)

    def _on_refused(self, event: dict[str, Any]) -> None:
        layers = ", ".join(map(str, event["layers"]))
        self._console.print(f"refused for {event['guard']}: layers {layers}", highlight=False)

    def _on_warning(self, event: dict[str, Any]) -> None:
        self._console.print(event["text"], highlight=False)

    def _on_certificate(self, event: dict[str, Any]) -> None:
        self._console.print(event["text"], highlight=False)

    def _on_stop(self, event: dict[str, Any]) -> None:
        # What a certificate says has been told.
        if event["reason"] != "certificate":
            self._console.print(event["text"], highlight=False)


def _by_kind(event: dict[str, Any]) -> str:
    means = event.get("by_kind") or {"": event["mean_nmse"]}
    return ", ".join(f"{value:.4f} {kind}".strip() for kind, value in means.items())


def _named(event: dict[str, Any]) -> str:
    """The layer, with the kind of mixer where the bank has several."""
    return f"{event['layer']} ({event['kind']})" if "kind" in event else str(event["layer"])


def doctor_table(facts: dict[str, Any]) -> Table:
    """`dtr doctor` for people."""
    table = Table(title="dtr doctor", show_header=False)
    machine = facts["hardware"]
    table.add_row("processor", f"{machine['cpu']}, {machine['num_cores']} cores")
    table.add_row("memory", f"{(machine['memory_bytes'] or 0) / 1e9:.1f} GB")
    table.add_row("GPUs", ", ".join(facts["gpus"]) or "none that torch sees")
    table.add_row("default", f"{facts['default_dtype']} on {facts['default_device']}")
    for device, backend in facts["backends"].items():
        table.add_row(f"mixers on {device}", f"{backend['name']}: {backend['reason']}")
    for name, found in facts["versions"].items():
        table.add_row(name, found or "not installed")
    missing = ", ".join(facts["missing_extras"])
    hint = f"{missing}; as in: pip install 'distill-then-replace[{facts['missing_extras'][0]}]'" if missing else "none"
    # Escaped, as rich would read the extra's brackets as markup.
    table.add_row("missing extras", escape(hint))
    return table


def model_table(facts: dict[str, Any]) -> Table:
    """`dtr doctor MODEL` for people."""
    table = Table(title=facts["model_type"], show_header=False)
    table.add_row("layers", ", ".join(f"{number} {kind}" for kind, number in facts["layers"].items()))
    num_layers = sum(facts["layers"].values())
    table.add_row("can be replaced", f"{len(facts['replaceable_layers'])} of {num_layers}")
    table.add_row("attention", facts["attention"])
    table.add_row("mixers that fit", ", ".join(facts["mixers"]))
    table.add_row("fast paths", ", ".join(facts["fast_paths"]) or "none; training and generation run as they are")
    table.add_row("checked", escape(facts["self_check"]))
    return table


def speed_table(record: dict[str, Any]) -> Table:
    """`dtr bench distill` for people."""
    machine = record["hardware"]
    table = Table(title=f"{record['teacher']}, {record['mixer']} by {record['backend']['name']}, {record['dtype']}")
    table.caption = machine.get("gpu") or f"{machine['cpu']}, {machine['num_threads']} threads"
    names = ["step", "teacher forward", "distillation", "ratio", "utilisation", "cold start", "peak memory"]
    if record["num_processes"] > 1:
        names += [f"{record['num_processes']} processes", "speed-up"]
    if "baseline_tokens_per_second" in record["sizes"][0]:
        names += ["plain fp32 loop", "gain"]
    for name in names:
        table.add_column(name, justify="right")
    for size in record["sizes"]:
        table.add_row(*_speed_row(size))
    return table


def _speed_row(size: dict[str, Any]) -> list[str]:
    ours, peak = size["distill_tokens_per_second"], size["peak_bytes_beyond_model_students_and_optimizer"]
    row = [
        f"{size['batch']} x {size['seq_len_tokens']}",
        f"{size['teacher_forward_tokens_per_second']:,.0f} tok/s",
        f"{ours:,.0f} tok/s",
        f"{size['ratio_to_teacher_forward']:.3f}",
        f"{size['flop_utilisation']:.1%}",
        f"{size['cold_start_seconds']:.1f} s",
        "not measured" if peak is None else f"{peak / 1e9:.2f} GB",
    ]
    if together := size.get("together"):
        row += [f"{together['distill_tokens_per_second']:,.0f} tok/s", f"{together['speedup']:.2f}x"]
    if plain := size.get("baseline_tokens_per_second"):
        row += [f"{plain:,.0f} tok/s", f"{ours / plain:.2f}x"]
    return row


def strategy_table(record: dict[str, Any]) -> Table:
    """`dtr bench search` for people."""
    table = Table(title=f"{record['teacher']} on {record['task']}, P_min {record['p_min']:g}")
    table.caption = "test with its 95 % interval; work in passes of the whole model over validation"
    table.add_column("strategy")
    for name in ("replaced", "validation", "test", "passes", "seconds"):
        table.add_column(name, justify="right")
    for name, row in record["strategies"].items():
        low, high = row["test_ci95"]
        table.add_row(
            name,
            f"{row['num_replaced']}/{record['num_layers']}",
            f"{row['val']:.4f}",
            f"{row['test']:.4f} ({low:.3f} to {high:.3f})",
            f"{row['pass_equivalents']:.1f}",
            f"{row['seconds']:.1f}",
        )
    for name in record["left_out"]:
        table.add_row(name, "left out")
    return table


def generation_table(record: dict[str, Any]) -> Table:
    """`dtr bench generate` for people."""
    machine = record["hardware"]
    kinds = ", ".join(spec["kind"] for spec in record["mixers"])
    linear = f"{len(record['linear_layers'])} of {record['num_layers']} layers {kinds}"
    table = Table(title=f"{record['model']}, {linear}, {record['dtype']}")
    table.caption = f"{machine.get('gpu') or machine['cpu']}; teacher, hybrid and their ratio, each model's fastest way"
    for name in ("context", "batch", "decode tok/s", "", "x", "prefill tok/s", "", "x", "first token", "cache"):
        table.add_column(name, justify="right")
    for row in record["rows"]:
        context, batch = str(row["context_tokens"]), "fill" if row["is_fill"] else str(row["batch"])
        both = row["teacher"], row["hybrid"]
        table.add_row(
            f"{row['context_tokens']:,}",
            f"{row['batch']:,}{' (fill)' if row['is_fill'] else ''}",
            *(_or_dash(model["decode_tokens_per_second"], "{:,.0f}") for model in both),
            _or_dash(record["decode_speedup"][context][batch], "{:.2f}"),
            *(_or_dash(model["prefill"]["tokens_per_second"], "{:,.0f}") for model in both),
            _or_dash(record["prefill_speedup"][context][batch], "{:.2f}"),
            _or_dash(both[1]["time_to_first_token_seconds"], "{:.3f} s"),
            _or_dash(record["cache_ratio"][context], "{:.1%}"),
        )
    return table


def serving_table(record: dict[str, Any]) -> Table:
    """`dtr bench serve` for people."""
    machine = record["hardware"]
    table = Table(title=f"{record['hybrid']} in vLLM {(record['vllm'] or ('', '?'))[1]}")
    table.caption = f"{machine.get('gpu') or machine['cpu']}; times are medians, p99 in brackets"
    for name in ("context", "model", "fit", "open", "requests/s", "tokens/s", "per token", "first token, alone"):
        table.add_column(name, justify="right")
    for row in record["rows"]:
        fill, alone = row["fill"], row["alone"]
        table.add_row(
            f"{row['context_tokens']:,}",
            row["model"],
            f"{row['most_sequences']:,.1f}",
            f"{fill['at_once']:,}",
            f"{fill['requests_per_second']:.2f}",
            f"{fill['output_tokens_per_second']:,.0f}",
            f"{1e3 * fill['tpot_p50_seconds']:.1f} ms ({1e3 * fill['tpot_p99_seconds']:.1f})",
            f"{1e3 * alone['ttft_p50_seconds']:.0f} ms ({1e3 * alone['ttft_p99_seconds']:.0f})",
        )
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
