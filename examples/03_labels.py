"""Sort texts into labels, the whole way: fine-tune with transformers' Trainer, distil, search, save, serve.

    python examples/03_labels.py data/banking77 --text data/text --out runs/banking77 --serve 8000

The folder holds train.jsonl, validation.jsonl and test.jsonl with text, label and label_text, as banking77 or ag_news.
By default the model keeps its LM head and ranks the labels as text; with `--head` it gets the classification head of
AutoModelForSequenceClassification, which answers with one pass whatever the number of labels. What is finished in
`--out` is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from transformers import pipeline

import dtr
from dtr.evaluation.evaluator import Evaluator
from dtr.tasks import Item
from dtr.tasks.base import LikelihoodRequest
from dtr.teacher import load_model

# The program that also makes the teachers of the study.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from finetune_teacher import finetune

PROMPT = "{text}\nIntent:"


def make_hybrid(
    data: str, text: str, out: Path, *, model: str, settings: list[str], epochs: float, head: bool = False
) -> dict[str, Any]:
    """Fine-tune, distil, search and save; returns the record of the run."""
    task: dict[str, Any] = {"source": data, "kind": "classification"}
    plan = {
        "teacher": {"source": model},
        "text": {"source": text},
        "task": task | ({"options": {"head": True}} if head else {"prompt": PROMPT}),
        # Three points of the 5 % are left for what selection gains on validation by luck.
        "search": {"p_min": 0.98, "strategy": "auto"},
    }
    tuned, run = out / "teacher", out / "run"
    if not (tuned / "tokenizer_config.json").is_file():
        done = finetune(dtr.read_recipe(None, settings, plan), tuned, epochs=epochs, learning_rate=2e-4, batch_size=32)
        print(f"teacher: {done['validation']['value']:.3f} on validation after {done['seconds']:.0f} s of fine-tuning")
    if (run / "report.json").is_file():
        return json.loads((run / "report.json").read_text(encoding="utf-8"))
    recipe = dtr.read_recipe(None, [*settings, f"teacher.source={json.dumps(str(tuned))}"], plan)
    return dtr.run(recipe, run, resume=run.is_dir())


class HeadClassifier:
    """A saved hybrid with a classification head: the library's own pipeline runs it."""

    def __init__(self, folder: Path) -> None:
        # `import dtr` has made the Auto classes know hybrids.
        self._classify = pipeline("text-classification", model=str(folder))

    def __call__(self, text: str) -> str:
        """The likeliest label of a text."""
        return self._classify(text)[0]["label"]


class LabelRanker:
    """A saved hybrid with an LM head, and the labels of its task."""

    def __init__(self, folder: Path, data: str) -> None:
        self._model, self._tokenizer = load_model(folder)
        self._task = dtr.load_task(data, kind="classification", prompt=PROMPT)
        self._labels = self._task.splits["test"][0].row["choices"]

    def __call__(self, text: str) -> str:
        """The likeliest label of a text."""
        context = PROMPT.format(text=text)
        requests = tuple(LikelihoodRequest(context=context, target=f" {label}") for label in self._labels)
        task = replace(self._task, splits={"test": [Item(id="asked", requests=requests)]})
        (answers,) = Evaluator(self._model, self._tokenizer, task, "test", cache_bytes=0).respond()
        scores = [answer.log_prob for answer in answers]  # type: ignore[union-attr]
        return self._labels[scores.index(max(scores))]


def make_server(classify: Callable[[str], str], port: int) -> HTTPServer:
    """Answers a POST of plain text with the label: curl -d 'Where is my card?' localhost:PORT"""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"{classify(text)}\n".encode())

    return HTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder with train, validation and test rows")
    parser.add_argument("--text", default="python-docs", help="general text to distil on")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=Path("runs/labels"))
    parser.add_argument("--head", action="store_true", help="a classification head in place of label texts")
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--set", action="append", default=[], help="section.key=value of the recipe")
    parser.add_argument("--serve", type=int, help="answer on this port until Ctrl-C")
    args = parser.parse_args()
    options = {"model": args.model, "settings": args.set, "epochs": args.epochs, "head": args.head}
    record = make_hybrid(args.data, args.text, args.out, **options)
    opt, teacher = record["m_opt"], record["teacher"]
    print(
        f"hybrid: {opt['num_replaced']} of {record['num_layers']} layers are linear, test accuracy "
        f"{opt['test']['value']:.3f} (teacher {teacher['test']['value']:.3f})"
    )
    print(f"report: {args.out / 'run' / 'report.html'}")
    if args.serve is not None:
        hybrid = args.out / "run" / "hybrid"
        classify = HeadClassifier(hybrid) if args.head else LabelRanker(hybrid, args.data)
        make_server(classify, args.serve).serve_forever()


if __name__ == "__main__":
    main()
