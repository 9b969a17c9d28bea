"""Fine-tune a causal language model on a task's train split with transformers' Trainer, as a teacher for `dtr`.

    python benchmarks/finetune_teacher.py RECIPE --out teachers/banking77 --epochs 3

It learns to write exactly what the task will ask: each item's prompt, then the right answer and the end of text; only
the answer counts in the loss. The recipe's teacher, task, prompt and target are those of the later run, whose
`teacher.source` is then the folder given by `--out`. The train split must be there; validation and test are not read
for training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from dtr.errors import DataError
from dtr.evaluation.evaluator import evaluate
from dtr.evaluation.generation import encode_context
from dtr.recipe import Recipe, read_recipe
from dtr.tasks import Item, Task, load_task
from dtr.tasks.base import LikelihoodRequest
from dtr.teacher import load_model, pick_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the fine-tuned model")
    parser.add_argument("--set", action="append", default=[], help="section.key=value")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--rate", type=float, default=1e-4, help="peak learning rate")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    recipe = read_recipe(args.recipe, args.set)
    print(json.dumps(finetune(recipe, args.out, epochs=args.epochs, learning_rate=args.rate, batch_size=args.batch)))


def finetune(recipe: Recipe, out: Path, *, epochs: float, learning_rate: float, batch_size: int) -> dict[str, Any]:
    """Train, save model and tokenizer into `out`, and return what was done with the score on validation."""
    settings = recipe.task.model_dump()
    source = settings.pop("source")
    learning = load_task(source, **{**settings, "validation": "train", "num_validation": None}, seed=recipe.seed)
    task = load_task(source, **settings, seed=recipe.seed)
    device = pick_device(recipe.runtime.device)
    # Weights are updated in float32; in bfloat16 small steps would be lost.
    model, tokenizer = load_model(recipe.teacher.source, device=str(device), dtype="float32")
    examples = [encode(item, learning, tokenizer) for item in learning.splits["validation"]]
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, int(0.03 * epochs * len(examples) / batch_size)),
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        seed=recipe.seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=50,
    )
    began = time.monotonic()
    trainer = Trainer(model=model.train(), args=arguments, train_dataset=examples, data_collator=Padding(tokenizer))
    trainer.train()
    seconds = time.monotonic() - began
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    score = evaluate(
        model, task, split="validation", tokenizer=tokenizer, batch_tokens=recipe.runtime.eval_batch_tokens
    )
    return {"out": str(out), "num_examples": len(examples), "seconds": round(seconds, 1), "validation": score.to_dict()}


def encode(item: Item, task: Task, tokenizer: Any) -> dict[str, list[int]]:
    """Prompt, right answer and end of text as ids; the labels of the prompt are -100, which the loss leaves out."""
    request = right_request(item)
    context = encode_context(tokenizer, request.context, chat_template=task.chat_template)
    answer = tokenizer(request.target, add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    return {"input_ids": context + answer, "labels": [-100] * len(context) + answer}


def right_request(item: Item) -> LikelihoodRequest:
    """The request for the likelihood of the right answer.

    Raises:
        DataError: the task asks for none, as generation without `score_answer`.
    """
    requests = [request for request in item.requests if isinstance(request, LikelihoodRequest)]
    answer = item.row.get("answer", -1)
    if not requests:
        raise DataError(item.id, got="no reference answer", expected="one", hint="Set task.options.score_answer: true.")
    return requests[answer if isinstance(answer, int) else -1]


class Padding:
    """Pads a batch on the right."""

    def __init__(self, tokenizer: Any) -> None:
        self._pad = tokenizer.pad_token_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return {"input_ids": padded("input_ids", self._pad), "labels": padded("labels", -100), "attention_mask": mask}


if __name__ == "__main__":
    main()
