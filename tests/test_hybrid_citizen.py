"""What people do with any model of the library works with a hybrid: its own tools, untouched."""

from __future__ import annotations

import pytest
import torch
from docs_pages import ROOT, load_script
from exactness import assert_same_model
from test_hybrid import hybrid_of
from tiny import byte_tokenizer, pico_teacher
from transformers import AutoModelForCausalLM, pipeline

from dtr.mixers import MIXERS

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def hybrid():
    made = hybrid_of(pico_teacher(), (0, 2))
    made.tokenizer = byte_tokenizer()
    return made


@pytest.fixture
def saved(hybrid, tmp_path):
    hybrid.save_pretrained(tmp_path / "hybrid")
    return tmp_path / "hybrid"


@pytest.fixture
def ids():
    return torch.randint(1, 257, (2, 11))


def test_sampling_with_cache_equals_sampling_without(hybrid, ids):
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        texts.append(hybrid.generate(ids, do_sample=True, max_new_tokens=8, pad_token_id=0, use_cache=use_cache))
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", sorted(MIXERS))
@torch.no_grad()
def test_a_prompt_leaves_the_state_of_its_tokens_one_by_one(kind, ids):
    model = hybrid_of(pico_teacher(), (0, 2), kind)
    whole, steps = model.new_cache(), model.new_cache()
    model(ids, past_key_values=whole)
    for token in ids.split(1, dim=1):
        model(token, past_key_values=steps)
    for layer in (0, 2):
        torch.testing.assert_close(steps.layers[layer].read(), whole.layers[layer].read(), rtol=1e-4, atol=1e-4)


def test_a_conversation_goes_on_with_its_cache(hybrid, ids):
    first = hybrid.generate(ids, **GREEDY, max_new_tokens=4, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.randint(1, 257, (2, 5))], dim=1)
    again = hybrid.generate(longer, **GREEDY, max_new_tokens=6, past_key_values=first.past_key_values)
    assert torch.equal(again, hybrid.generate(longer, **GREEDY, max_new_tokens=6))


def test_pipeline(hybrid):
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    write = pipeline("text-generation", model=hybrid, tokenizer=byte_tokenizer())
    texts = [found[0]["generated_text"] for found in write(["red river", "a"], batch_size=2, **options)]
    for prompt, text in zip(["red river", "a"], texts):
        alone = hybrid.generate(**byte_tokenizer()(prompt, return_tensors="pt"), **options)
        assert text == byte_tokenizer().decode(alone[0], skip_special_tokens=True)


def test_device_map(hybrid, saved, ids):
    model = AutoModelForCausalLM.from_pretrained(saved, device_map={"": "cpu"})
    assert_same_model(model, hybrid, input_ids=ids)
    # Layers may be told apart, as for several GPUs: none of ours has to stay together with another.
    assert "LlamaDecoderLayer" in model._no_split_modules


@torch.no_grad()
def test_compiled_forward(hybrid, ids):
    compiled = torch.compile(hybrid, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, hybrid(ids).logits, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(hybrid, ids):
    def gradients():
        hybrid.zero_grad()
        hybrid(ids, labels=ids).loss.backward()
        return {name: weight.grad.clone() for name, weight in hybrid.named_parameters() if weight.grad is not None}

    hybrid.requires_grad_(True).train()
    plain = gradients()
    assert "model.layers.0.self_attn.decay_proj.weight" in plain
    hybrid.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6)


def test_lora_with_the_trainer_learns_and_leaves_a_plain_hybrid(saved, tmp_path):
    pytest.importorskip("peft")
    script = load_script(ROOT / "examples" / "02_finetune_lora.py")
    rows = [{"prompt": f"{word}: ", "completion": word[::-1]} for word in ("stone", "river", "cloud", "lamp")] * 4
    losses = script.finetune(saved, rows, tmp_path / "tuned", num_epochs=6, learning_rate=1e-2)
    assert losses[-1] < 0.7 * losses[0]
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert tuned.linear_layers == [0, 2]
    before = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    changed = {name for name, weight in tuned.state_dict().items() if not torch.equal(weight, before[name])}
    # Attention and linear layers both, and nothing else.
    assert {name.split("self_attn.")[1] for name in changed} == {f"{x}_proj.weight" for x in "qkvo"}
    assert {name.split(".")[2] for name in changed} == {"0", "1", "2", "3"}


@torch.no_grad()
def test_lm_eval_takes_a_hybrid(hybrid):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = [("red river", " is blue"), ("a", " fish and a bird")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
    judge = HFLM(pretrained=hybrid, tokenizer=byte_tokenizer(), batch_size=2, device="cpu")
    tokenizer = byte_tokenizer()
    for (context, end), (value, _) in zip(asked, judge.loglikelihood(requests)):
        before, tokens = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (context, context + end))
        scores = hybrid(tokens).logits.log_softmax(-1)[0, before.shape[1] - 1 : -1]
        want = scores.gather(1, tokens[0, before.shape[1] :, None]).sum().item()
        assert value == pytest.approx(want, abs=1e-3)
