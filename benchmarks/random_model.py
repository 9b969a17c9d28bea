"""A model of SmolLM2-135M's shape with random weights and positions up to 68K, to measure speed without a download.

python benchmarks/random_model.py SmolLM2-135M-shape
dtr bench distill SmolLM2-135M-shape
dtr bench generate SmolLM2-135M-shape --num-linear 27
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the model")
    out = parser.parse_args().out
    random_model().bfloat16().save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    print(out)


def random_model(num_layers: int = 30) -> LlamaForCausalLM:
    """SmolLM2-135M's shape, float32 on the CPU."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=65536 + 4096,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: speed does not depend on the words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


if __name__ == "__main__":
    main()
