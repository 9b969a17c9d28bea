"""The whole method on a toy model, from Python, in seconds on a CPU: nothing is downloaded.

    python examples/01_pico_cpu.py [FOLDER]

A Llama of four layers is built from its config and taught a small language. Then come the steps that every run has:
distil linear layers, search which ones can stay, save, load, generate. FOLDER (a temporary one when left out) gets the
hybrid.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dtr

ANIMALS, COLORS = ("cat", "dog", "owl", "fox"), ("red", "blue", "green", "black")
WORDS = ("<eos>", ".", "is", *ANIMALS, *COLORS)


def story(rng: random.Random) -> str:
    """All animals of a story have one color: a model must look back to know it."""
    color = rng.choice(COLORS)
    return " ".join(f"{animal} is {color} ." for animal in rng.choices(ANIMALS, k=12))


def make_teacher() -> dtr.Teacher:
    """A four-layer Llama with one token per word, untrained."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=0,
        bos_token_id=0,
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    return dtr.as_teacher(LlamaForCausalLM(config), wrapped, source="pico")


def pretrain(teacher: dtr.Teacher, text: dtr.TokenBlocks, num_steps: int) -> float:
    """What others did for a real model: plain next-word training. Returns the last loss in nats."""
    model = teacher.model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(num_steps):
        batch = text.batch(step, batch_size=16, seed=0)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False).eval()
    return loss.item()


def main(folder: Path) -> dict:
    """Run everything; returns the numbers that were printed."""
    torch.manual_seed(0)
    rng = random.Random(0)
    (folder / "train.txt").write_text("\n<|doc|>\n".join(story(rng) for _ in range(2000)), encoding="utf-8")
    (folder / "task").mkdir(exist_ok=True)
    for split in ("validation", "test"):
        rows = [json.dumps({"text": story(rng)}) for _ in range(60)]
        (folder / "task" / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")

    untrained = make_teacher()
    text = dtr.load_text(
        str(folder / "train.txt"), tokenizer=untrained.tokenizer, seq_len_tokens=49, num_held_out_tokens=980
    )
    print(f"teacher: loss {pretrain(untrained, text, num_steps=100):.3f} after pretraining")
    # Wrapped again, as a teacher's fingerprint covers its weights.
    teacher = dtr.as_teacher(untrained.model, untrained.tokenizer, source="pico")

    bank = dtr.distill(teacher, text, mixer="gated_deltanet", num_tokens=24_000, batch_size=8, learning_rate=5e-3)
    before = sum(bank.nmse_before.values()) / len(bank.nmse_before)
    print(f"distilled {len(bank.layers)} layers: held-out error {before:.2f} -> {bank.mean_nmse:.2f}")

    task = dtr.load_task("perplexity", path=str(folder / "task"))
    result = dtr.search(teacher, bank, task, p_min=0.95)
    print(f"replaced {len(result.m_opt.linear_layers)} of {teacher.num_layers} layers: {result.trace.stop_text}")
    print(f"test perplexity: teacher {result.teacher_test.value:.3f}, hybrid {result.m_opt_test.value:.3f}")

    result.m_opt.save_pretrained(folder / "hybrid")
    hybrid = AutoModelForCausalLM.from_pretrained(folder / "hybrid")
    prompt = teacher.tokenizer("cat is blue . owl is", return_tensors="pt")
    written = hybrid.generate(**prompt, max_new_tokens=1)
    print("the hybrid writes:", teacher.tokenizer.decode(written[0]))
    return {
        "nmse_before": before,
        "nmse_after": bank.mean_nmse,
        "num_replaced": len(result.m_opt.linear_layers),
        "teacher_test": result.teacher_test.value,
        "hybrid_test": result.m_opt_test.value,
        "written": teacher.tokenizer.decode(written[0]),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
