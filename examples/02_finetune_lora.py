"""Fine-tune a hybrid on a task with LoRA and the library's Trainer: the paper's step after replacement.

    python examples/02_finetune_lora.py RUN/hybrid rows.jsonl OUT

Rows are {"prompt": ..., "completion": ...}; only completions are learned. Linear layers have q_proj, k_proj, v_proj and
o_proj as attention has, so that one list of names adapts both. The adapters are merged at the end: OUT is a hybrid like
any other, for `dtr eval`, `dtr export` and `generate`. Needs the peft extra.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import dtr  # noqa: F401  (makes AutoModelForCausalLM know hybrids)


def encode(rows: list[dict[str, str]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Token ids, and labels that leave the prompt out."""
    encoded = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        encoded.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return encoded


def pad(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch padded on the right; linear layers skip what the mask leaves out."""
    longest = max(len(item["input_ids"]) for item in batch)
    fill = {"input_ids": 0, "labels": -100}
    padded = {
        key: torch.tensor([item[key] + [value] * (longest - len(item[key])) for item in batch])
        for key, value in fill.items()
    }
    lengths = torch.tensor([len(item["input_ids"]) for item in batch])
    return padded | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def finetune(
    folder: Path, rows: list[dict[str, str]], out: Path, *, num_epochs: int = 3, learning_rate: float = 2e-4
) -> list[float]:
    """Fine-tune the hybrid in `folder` and save it in `out`; returns the loss after every epoch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    adapted = get_peft_model(model, wanted)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        num_train_epochs=num_epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=8,
        gradient_checkpointing=True,
        logging_strategy="epoch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=adapted, args=arguments, train_dataset=encode(rows, tokenizer), data_collator=pad)
    trainer.train()
    merged = adapted.merge_and_unload()
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    source, file, target = map(Path, sys.argv[1:])
    examples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    print("loss by epoch:", finetune(source, examples, target))
