"""A model of a known shape with random weights and positions up to 68K, to measure speed without a download.

python benchmarks/random_model.py SmolLM2-135M-shape
python benchmarks/random_model.py Qwen2.5-1.5B-shape --shape qwen2.5-1.5b
dtr bench distill SmolLM2-135M-shape
dtr bench generate SmolLM2-135M-shape --num-linear 27
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SHAPES = {
    "smollm2-135m": {
        "classes": (LlamaForCausalLM, LlamaConfig),
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
    },
    "qwen2.5-1.5b": {
        "classes": (Qwen2ForCausalLM, Qwen2Config),
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the model")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    args = parser.parse_args()
    out = args.out
    random_model(shape=args.shape).bfloat16().save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    print(out)


def random_model(num_layers: int | None = None, shape: str = "smollm2-135m") -> PreTrainedModel:
    """Float32 on the CPU; with another number of layers if one is given."""
    fields = dict(SHAPES[shape])
    if num_layers is not None:
        fields["num_hidden_layers"] = num_layers
    model_class, config_class = fields.pop("classes")
    torch.manual_seed(0)
    return model_class(config_class(**fields, max_position_embeddings=65536 + 4096, tie_word_embeddings=True))


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
