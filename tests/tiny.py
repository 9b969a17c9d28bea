"""Pico models and a byte tokenizer, built in a moment and offline."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dtr.arch import FAMILIES, model_class
from dtr.corpus import TokenBlocks
from dtr.teacher import Teacher, as_teacher

NUM_LAYERS = 4
CHEAP = {"head_copies": 1, "quadratic": False}
"""Options of `gated_deltanet` for tests in which the mixer is beside the point: a third of the default's work."""
_CHECKED: set[str] = set()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def pico_model(family: str = "llama", *, num_layers: int = NUM_LAYERS, seed: int = 0, **changes):
    """A random 4-layer model of a family: grouped heads, and biases or norms where the family has them."""
    assert family in FAMILIES
    fields = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "eos_token_id": 0,
        "bos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": family == "llama",
    } | changes
    config = model_class(family, "Config")(**fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(family, "ForCausalLM")(config)
        for name, weight in model.named_parameters():
            if "norm" not in name:
                # The library's start values are so small that every layer would be almost the identity.
                torch.nn.init.normal_(weight, std=0.15)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.eval()


def pico_classifier(family: str = "llama", num_labels: int = 3):
    """The same with a head of random classes."""
    fields = {
        "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
    }  # fmt: skip
    config = model_class(family, "Config")(**fields, num_labels=num_labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(family, "ForSequenceClassification")(config)
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.15)
    return model.eval()


def pico_teacher(family: str = "llama", **changes) -> Teacher:
    """A frozen pico model with the byte tokenizer, checked once for each shape."""
    key = repr((family, sorted(changes.items())))
    known = mock.patch("dtr.teacher.self_check", return_value="as before") if key in _CHECKED else nullcontext()
    with known:
        teacher = as_teacher(pico_model(family, **changes), byte_tokenizer(), source=f"pico-{family}")
    _CHECKED.add(key)
    return teacher


def token_blocks(*, num_train: int = 40, num_held_out: int = 8, num_tokens: int = 32) -> TokenBlocks:
    """Random blocks with enough repetition for a mixer to learn from."""
    ids = torch.randint(1, 257, (num_train + num_held_out, num_tokens), generator=torch.Generator().manual_seed(5))
    ids[:, num_tokens // 2 :] = ids[:, : num_tokens - num_tokens // 2]
    return TokenBlocks.from_tensors(ids[:num_train].int(), ids[num_train:].int(), source="tiny")
