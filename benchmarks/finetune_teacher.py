"""Fine-tune a language model on a task's train split with transformers' Trainer, as a teacher for `dtr`.

    python benchmarks/finetune_teacher.py RECIPE --out teachers/banking77 --epochs 3

It learns to write exactly what the task will ask: each item's prompt, then the right answer and the end of text; only
the answer counts in the loss. With `task.options.head` it gets a classification head in place of the LM head and
learns the label. The recipe's teacher, task, prompt and target are those of the later run, whose `teacher.source` is
then the folder given by `--out`. The train split must be there; validation and test are not read for training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from dtr.errors import DataError
from dtr.evaluation.encoding import Encoder
from dtr.evaluation.evaluator import evaluate
from dtr.recipe import Recipe, read_recipe
from dtr.tasks import Item, Task, load_task
from dtr.tasks.base import LabelRequest, LikelihoodRequest
from dtr.teacher import load_model, pick_device, pick_dtype


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
    dtype = pick_dtype(recipe.teacher.dtype, device)
    # Weights are updated in float32; in bfloat16 small steps would be lost.
    model, tokenizer = load_model(recipe.teacher.source, device=str(device), dtype="float32")
    items = learning.splits["validation"]
    if labels := label_names(items):
        model = with_head(model, tokenizer, labels)
    examples = [encode(item, learning, tokenizer) for item in items]
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, int(0.05 * epochs * len(examples) / batch_size)),
        # Little padding: a batch holds rows of about the same length.
        train_sampling_strategy="group_by_length",
        bf16=dtype is torch.bfloat16,
        use_cpu=device.type == "cpu",
        seed=recipe.seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=50,
        # Looking at every loss would make the GPU wait for Python at every step.
        logging_nan_inf_filter=False,
    )
    began = time.monotonic()
    trainer = Trainer(model=model.train(), args=arguments, train_dataset=examples, data_collator=Padding(tokenizer))
    trainer.train()
    seconds = time.monotonic() - began
    # Without the casts around it that trained it, and saved as it will be loaded: the score below is the teacher's.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.eval().to(dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)
    score = evaluate(
        model, task, split="validation", tokenizer=tokenizer, batch_tokens=recipe.runtime.eval_batch_tokens
    )
    return {"out": str(out), "num_examples": len(examples), "seconds": round(seconds, 1), "validation": score.to_dict()}


def label_names(items: Sequence[Item]) -> dict[int, str]:
    """Names of the classes that a head is asked for, by number; empty where the task asks for text."""
    requests = [request for item in items for request in item.requests if isinstance(request, LabelRequest)]
    return {request.label: request.target for request in sorted(requests, key=lambda request: request.label)}


def with_head(model: Any, tokenizer: Any, labels: dict[int, str]) -> Any:
    """The body of a causal language model with a new classification head, which needs no checkpoint of its own."""
    config = model.config
    config.id2label = {label: labels.get(label, str(label)) for label in range(max(labels) + 1)}
    config.label2id = {name: label for label, name in config.id2label.items()}
    # The head reads the last token before the padding.
    config.pad_token_id = tokenizer.pad_token_id
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype).to(model.device)
    classifier.model = model.model
    return classifier


def encode(item: Item, task: Task, tokenizer: Any) -> dict[str, Any]:
    """Prompt, right answer and end of text as ids; the labels of the prompt are -100, which the loss leaves out.

    For a head the prompt alone, and the number of its class.
    """
    request = right_request(item)
    encoder = Encoder(tokenizer, chat_template=task.chat_template)
    if isinstance(request, LabelRequest):
        return {"input_ids": list(encoder.whole(request.context)), "labels": request.label}
    pair = encoder.pair(request.context, request.target)
    answer = [*pair.target, tokenizer.eos_token_id]
    return {"input_ids": [*pair.context, *answer], "labels": [-100] * len(pair.context) + answer}


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

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        is_head = isinstance(rows[0]["labels"], int)
        labels = torch.tensor([row["labels"] for row in rows]) if is_head else padded("labels", -100)
        return {"input_ids": padded("input_ids", self._pad), "labels": labels, "attention_mask": mask}


if __name__ == "__main__":
    main()
