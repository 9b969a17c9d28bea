"""A hybrid that is handed out is its own: nothing done to it reaches the teacher, the bank or another hybrid."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers.modeling_utils
from test_hybrid import hybrid_of
from tiny import byte_tokenizer, pico_teacher, token_blocks

import dtr
from dtr.arch import FAMILIES
from dtr.errors import DeviceError
from dtr.hybrid.modeling import make_hybrid


def lora_merged(hybrid):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(hybrid, config).merge_and_unload()


def a_step_of_training(hybrid):
    hybrid.requires_grad_(True).train()
    ids = torch.randint(1, 257, (1, 9))
    hybrid(ids, labels=ids).loss.backward()
    torch.optim.SGD(hybrid.parameters(), lr=1.0).step()


@torch.no_grad()
def weights_in_place(hybrid):
    for weight in [*hybrid.parameters(), *hybrid.buffers()]:
        weight.zero_()


def its_surroundings(hybrid):
    hybrid.config.rms_norm_eps, hybrid.generation_config.max_new_tokens = 7.0, 3
    hybrid.config.mixers[0]["kind"] = "retention"
    hybrid.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    hybrid.tokenizer.add_tokens(["<new>"])


CHANGES = {
    "lora, merged": lora_merged,
    "a step of training": a_step_of_training,
    "weights in place": weights_in_place,
    "half": lambda hybrid: hybrid.half(),
    "another device": lambda hybrid: hybrid.to("meta"),
    "more tokens": lambda hybrid: hybrid.resize_token_embeddings(300),
    "another attention": lambda hybrid: hybrid.set_attn_implementation("eager"),
    "checkpointing": lambda hybrid: hybrid.gradient_checkpointing_enable(),
    "its surroundings": its_surroundings,
}


@pytest.fixture(scope="module")
def found():
    """Makes a search result: one search, whose teacher and bank every call copies nothing of."""
    teacher = pico_teacher()
    bank = dtr.distill(teacher, token_blocks(), num_tokens=256, batch_size=4, layers=[0, 2])
    return teacher, bank


def state_of(teacher, bank):
    weights = {**teacher.model.state_dict(), **bank.mixers[0].state_dict(prefix="mixer.")}
    kinds = {name: (type(module), module.training) for name, module in teacher.model.named_modules()}
    asked = {name: weight.requires_grad for name, weight in teacher.model.named_parameters()}
    config = (teacher.model.config.to_dict(), teacher.model.config._attn_implementation, [*bank.specs])
    return {name: weight.clone() for name, weight in weights.items()}, (kinds, asked, config, len(teacher.tokenizer))


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_a_hybrid_stays_with_it(found, change):
    from dtr.selection.search import hybrid_of as hand_out

    teacher, bank = found
    ids = torch.arange(1, 10)[None]
    other = hand_out(teacher, bank, [0, 2])
    weights, facts = state_of(teacher, bank)
    with torch.no_grad():
        logits = [model(ids).logits for model in (teacher.model, other)]
    CHANGES[change](hand_out(teacher, bank, [0, 2]))
    after, facts_after = state_of(teacher, bank)
    assert facts_after == facts
    assert all(torch.equal(weights[name], weight) for name, weight in after.items())
    with torch.no_grad():
        assert all(torch.equal(model(ids).logits, was) for model, was in zip((teacher.model, other), logits))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_copies_share_nothing_and_stay_tied(family):
    teacher = pico_teacher(family)
    hybrid = hybrid_of(teacher, (0, 2))
    tensors = lambda model: [*model.parameters(), *model.buffers()]  # noqa: E731
    theirs = {tensor.data_ptr() for tensor in tensors(teacher.model)}
    assert not theirs & {tensor.data_ptr() for tensor in tensors(hybrid)}
    assert not set(map(id, teacher.model.modules())) & set(map(id, hybrid.modules()))
    assert (hybrid.lm_head.weight is hybrid.model.embed_tokens.weight) is teacher.model.config.tie_word_embeddings
    assert all(layer.self_attn.config is hybrid.config for layer in hybrid.model.layers[1::2])


def test_a_borrowed_hybrid_copies_nothing():
    teacher = pico_teacher()
    hybrid = make_hybrid(teacher.model, {}, {}, share_modules=True)
    assert hybrid.model.layers[0].self_attn is teacher.model.model.layers[0].self_attn


def test_no_memory_for_copies_is_told_with_what_to_do(monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = pico_teacher().model
    monkeypatch.setattr("dtr.hybrid.modeling.copy", SimpleNamespace(deepcopy=no_room))
    with pytest.raises(DeviceError, match=r"second model of the teacher's size.*Save the hybrid"):
        make_hybrid(model, {}, {})


@pytest.mark.parametrize("again", [False, True], ids=["new folder", "same folder again"])
def test_what_is_uploaded_is_what_the_folder_holds(monkeypatch, tmp_path, again):
    """The library uploads what is new or newer in the folder; a stand-in for the hub notes which files."""
    uploaded = set()

    class Hub:
        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})()

        def create_commit(self, operations, **_):
            uploaded.update(operation.path_in_repo for operation in operations)

    hybrid = hybrid_of(pico_teacher(), (0, 2))
    hybrid.tokenizer = byte_tokenizer()
    (tmp_path / "notes.txt").write_text("not of the model")
    if again:
        hybrid.save_pretrained(tmp_path)
    for module in (transformers.modeling_utils, transformers.utils.hub):
        monkeypatch.setattr(module, "hf_api", Hub, raising=False)
    hybrid.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/hybrid")
    assert uploaded == {path.name for path in tmp_path.iterdir()} - {"notes.txt"}
    assert {"dtr_hybrid_modeling.py", "dtr_hybrid_sequences.py", "tokenizer.json"} <= uploaded
