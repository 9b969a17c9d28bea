"""What tells sequences apart reaches linear layers or is refused: packing, padding anywhere, masks, caches cut back."""

from __future__ import annotations

import pytest
import torch
from tiny import byte_tokenizer, pico_teacher
from transformers import DynamicCache, GenerationConfig

from dtr.arch import decoder_layers
from dtr.errors import ModelError
from dtr.hybrid.modeling import make_hybrid
from dtr.hybrid.sequences import lay_out
from dtr.mixers import MIXERS, mixer_from_teacher
from dtr.mixers.base import Mixer

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FULL = {"conv_tokens": 3, "window": 3, "sinks": 1, "exact_first": True, "head_copies": 2, "quadratic": True}
CASES = {kind: (kind, {}) for kind in sorted(MIXERS)} | {
    "everything": ("gated_deltanet", FULL),
    "dynamic convolution": ("jet_block", {"exact_first": True}),
}


def trained(kind="gated_deltanet", options=None, layers=(0, 2)):
    """A hybrid whose mixers are away from their start, where convolutions and gates do nothing."""
    teacher, torch_seed = pico_teacher(), torch.manual_seed(1)
    stack, options = decoder_layers(teacher.model), options or {}
    mixers = {i: mixer_from_teacher(kind, teacher.geometry, i, stack[i].self_attn, options).eval() for i in layers}
    for mixer in mixers.values():
        for weight in mixer.parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=torch_seed)
    return make_hybrid(teacher.model, mixers, {i: {"kind": kind, **options} for i in layers})


@pytest.fixture(scope="module", params=CASES)
def hybrid(request):
    return trained(*CASES[request.param])


@pytest.fixture(scope="module")
def plain():
    return trained()


def draw(*lengths):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, 257, (n,), generator=generator) for n in lengths]


def alone(model, text):
    return model(text[None], use_cache=False).logits[0]


def near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_packed_sequences_are_as_if_alone(hybrid):
    rows = [draw(9, 1, 7), draw(3, 12, 2)]
    ids = torch.stack([torch.cat(row) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(len(text)) for text in row]) for row in rows])
    found = hybrid(ids, position_ids=positions)
    assert found.past_key_values is None
    for row, logits in zip(rows, found.logits):
        for text, part in zip(row, logits.split([len(text) for text in row])):
            near(part, alone(hybrid, text))


def test_packed_sequences_train_as_if_alone(plain):
    texts = draw(6, 9)
    mixers = [layer.self_attn for layer in plain.model.layers if isinstance(layer.self_attn, Mixer)]
    weights = [weight for mixer in mixers for weight in mixer.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    packed = plain(torch.cat(texts)[None], position_ids=positions).logits.square().sum()
    apart = sum(alone(plain, text).square().sum() for text in texts)
    for ours, theirs in zip(torch.autograd.grad(packed, weights), torch.autograd.grad(apart, weights)):
        near(ours, theirs)


def test_uneven_sequences_are_laid_out_without_much_padding():
    starts = torch.zeros(2, 600, dtype=torch.bool)
    starts[:, 0] = starts[0, :100] = starts[1, 37] = True
    packed = lay_out(starts)
    assert sum(index.numel() for index in packed.tokens) < 2 * starts.numel()
    flat = torch.cat([index.flatten() for index in packed.tokens])
    assert torch.equal(flat[packed.places_BT].flatten(), torch.arange(starts.numel()))


def padded(rows, pattern):
    """(B, T) ids and mask; `pattern` has a row of "x" for a token and "." for padding for each text."""
    ids, mask = torch.full((len(rows), len(pattern[0])), 99), torch.tensor([[c == "x" for c in row] for row in pattern])
    for place, text in enumerate(rows):
        ids[place, mask[place]] = text
    return ids, mask.long()


TURNS = {
    "in front of a second turn": (["xxxxxxx", "...xxxx"], ["...xxx", "xxxxxx"]),
    "behind a first turn": (["xxxxxxx", "xxxx..."], ["xxx", "xxx"]),
    "inside": (["xx..xxx", ".x.x.x."], ["x.x.x", ".xxx."]),
    "all of a part": (["xxxxx", "....."], ["xxxx", "..xx"]),
    "all of a step": (["xxxxx", "xxxxx"], ["x", "."]),
}


@pytest.mark.parametrize("where", TURNS)
@torch.no_grad()
def test_padding_anywhere_leaves_what_is_remembered(hybrid, where):
    first, second = TURNS[where]
    counts = [[row.count("x") for row in turn] for turn in (first, second)]
    texts = draw(*(a + b for a, b in zip(*counts)))
    cache, masks, outputs = hybrid.new_cache(), [], []
    for turn, pattern in enumerate((first, second)):
        ids, mask = padded([text.split([a, b])[turn] for text, a, b in zip(texts, *counts)], pattern)
        masks.append(mask)
        whole = torch.cat(masks, dim=1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        outputs.append(hybrid(ids, attention_mask=whole, position_ids=positions, past_key_values=cache).logits)
    after = draw(1)[0].expand(2, 1)
    whole = torch.cat([*masks, torch.ones(2, 1, dtype=torch.long)], dim=1)
    step = hybrid(after, attention_mask=whole, position_ids=whole.sum(1, keepdim=True) - 1, past_key_values=cache)
    logits = torch.cat([*outputs, step.logits], dim=1)
    for row, text in enumerate(texts):
        near(logits[row, whole[row] > 0], alone(hybrid, torch.cat([text, after[row]])))


@torch.no_grad()
def test_a_prompt_read_in_parts_is_generated_from_as_ever(plain):
    (short, long), options = draw(3, 11), {**GREEDY, "max_new_tokens": 5}
    ids, mask = padded([short, long], ["........xxx", "xxxxxxxxxxx"])
    found = plain.generate(ids, attention_mask=mask, prefill_chunk_size=4, **options)[:, 11:]
    assert torch.equal(found, plain.generate(ids, attention_mask=mask, **options)[:, 11:])


@torch.no_grad()
def test_beams_carry_along_who_has_yet_to_begin():
    cache = trained(options={"exact_first": True}).new_cache()
    assert cache.starting_rows(torch.tensor([[1], [0]])) is None
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.layers[0].has_previous_state[0] = True
    assert cache.starting_rows(torch.tensor([[0]] * 4)).tolist() == [True, False, False, True]
    cache.reset()
    cache.layers[0].has_previous_state[0] = True
    assert cache.starting_rows(None) is None


@torch.no_grad()
def test_a_body_alone_tells_sequences_apart_too(plain):
    short, long = draw(4, 9)
    ids, mask = padded([short, long], [".....xxxx", "xxxxxxxxx"])
    hidden = plain.model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).last_hidden_state
    near(plain.lm_head(hidden[0, 5:]), alone(plain, short))


@torch.no_grad()
def test_masks_and_positions_as_people_pass_them(plain):
    (text,) = draw(8)
    expected = alone(plain, text)
    same = [
        {"attention_mask": torch.full((1, 8), 3.0)},
        {"position_ids": torch.arange(8)[None], "use_cache": True},
        {"token_type_ids": torch.zeros(1, 8)},
        {"cu_seq_lens_q": torch.tensor([0, 8]), "max_length_q": 8},
        {"cache_position": torch.arange(8), "num_items_in_batch": 8, "return_dict": True, "is_causal": None},
    ]
    for arguments in same:
        near(plain(text[None], **arguments).logits[0], expected)
    two = {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]), "seq_idx": torch.tensor([[0] * 5 + [1] * 3])}
    near(plain(text[None], cu_seq_lens_q=torch.tensor([0, 5, 8]), **two).logits[0, 5:], alone(plain, text[5:]))


AGAIN = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
REFUSED = {
    "4D mask": ({"attention_mask": torch.ones(1, 1, 8, 8).tril().bool()}, "attention_mask.*position_ids"),
    "masks by kind": ({"attention_mask": {"full_attention": None}}, "attention_mask"),
    "short mask": ({"attention_mask": torch.ones(1, 5)}, "attention_mask.*whole text"),
    "mask of other rows": ({"attention_mask": torch.ones(2, 8)}, "attention_mask"),
    "packed beside a mask": ({"position_ids": AGAIN, "attention_mask": torch.ones(1, 8)}, "position_ids"),
    "packed with a cache": ({"position_ids": AGAIN, "use_cache": True}, "position_ids.*use_cache=False"),
    "boundaries alone": ({"cu_seq_lens_q": torch.tensor([0, 4, 8])}, "cu_seq_lens_q"),
    "other boundaries": ({"position_ids": AGAIN, "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])}, "seq_idx"),
    "both directions": ({"is_causal": False}, "is_causal"),
    "weights of attention": ({"output_attentions": True}, "output_attentions"),
    "places that were seen": ({"cache_position": torch.arange(2, 10)}, "cache_position"),
    "a library's cache": ({"past_key_values": DynamicCache()}, "past_key_values.*new_cache"),
    "whatever comes next": ({"segment_ids": torch.zeros(1, 8)}, "segment_ids.*Leave it out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_in_one_line(plain, name):
    arguments, words = REFUSED[name]
    with pytest.raises(ModelError, match=words) as error:
        plain(draw(8)[0][None], **arguments)
    assert "\n" not in str(error.value)


def test_the_teachers_own_layers_take_all_of_that():
    """Without a linear layer a hybrid is the teacher, and answers as it does."""
    model, ids = trained(layers=()), draw(8)[0][None]
    for name in ("4D mask", "packed beside a mask", "whatever comes next"):
        assert torch.equal(model(ids, **REFUSED[name][0]).logits, pico_teacher().model(ids, **REFUSED[name][0]).logits)


def test_generation_that_takes_tokens_back_is_refused_before_it_starts(plain):
    teacher, ids = pico_teacher().model, draw(20)[0].repeat(2)[None]
    for options in ({"assistant_model": teacher}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="not supported with stateful"):
            plain.generate(ids, **GREEDY, max_new_tokens=4, **options)
    with pytest.raises(ModelError, match="assistant without linear layers"):
        teacher.generate(ids, **GREEDY, max_new_tokens=4, assistant_model=plain)
    with pytest.raises(ModelError, match="cannot be rolled back"):
        plain(ids, use_cache=True).past_key_values.crop(-2)
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with pytest.raises(ModelError, match=r"does not support.*dtr export"):
        plain.generate_batch(inputs=[[5, 6, 7]], generation_config=config)
    # What attention alone can, a hybrid of attention alone can.
    bare, asked = trained(layers=()), {**GREEDY, "max_new_tokens": 4}
    assert torch.equal(bare.generate(ids, **asked, prompt_lookup_num_tokens=3), teacher.generate(ids, **asked))


def test_a_mixer_cannot_swallow_what_it_is_told(plain):
    mixer, hidden = plain.model.layers[0].self_attn, torch.randn(1, 4, 32)
    angles = plain.model.rotary_emb(hidden, torch.arange(4)[None])
    with pytest.raises(ModelError, match="document_ids"):
        mixer(hidden, angles, document_ids=torch.zeros(1, 4))
    with pytest.raises(TypeError, match="implement mix"):
        type("Own", (Mixer,), {"forward": lambda self: None})


def test_a_tokenizers_output_goes_in_as_it_is(plain):
    found = byte_tokenizer()(["red river", "a"], return_tensors="pt", padding=True, padding_side="left")
    assert plain(**found, token_type_ids=torch.zeros_like(found["input_ids"])).logits.shape[:2] == (2, 9)


def test_stop_strings_reach_generate_and_not_the_layers(plain):
    tokenizer = byte_tokenizer()
    asked = {**tokenizer("hello", return_tensors="pt"), "max_new_tokens": 4, "do_sample": False}
    free = plain.generate(**asked)[0]
    first = tokenizer.decode(free[5])
    stopped = plain.generate(**asked, stop_strings=[first], tokenizer=tokenizer)[0]
    assert stopped.tolist() == free[:6].tolist()
