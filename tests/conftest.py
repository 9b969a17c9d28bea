import json
import os
import random
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A source archive has no history; where there is one, it wins.
os.environ.setdefault("DTR_COMMIT", "of the source archive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Else the compiler starts processes that import torch anew: some to compile in, and one per instruction set to try it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest
import torch
import yaml
from tiny import CHEAP, byte_tokenizer, pico_model

from dtr.interrupt import SIGNALS


def heed_signals():
    """Take back what a shell's background job and nohup hand down, that Ctrl-C and its like are ignored.

    Programs that tests start inherit it, and there is nothing to test of a signal that never arrives.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


heed_signals()


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_looks_of_other_tests(tmp_path, monkeypatch):
    """Certificates count searches on this machine; a test must not see those of another one."""
    from dtr.selection import looks

    monkeypatch.setattr(looks, "open_cache", lambda name: tmp_path)


WORDS = ["red", "green", "blue", "stone", "river", "tree", "cloud", "bird", "fish", "lamp", "door", "road"]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a model, a text, a task and a recipe."""
    folder = tmp_path_factory.mktemp("place")
    pico_model().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=60)) for _ in range(60)]
    (folder / "text.txt").write_text("\n<|doc|>\n".join(documents))
    (folder / "task").mkdir()
    for split, num_rows in (("validation", 24), ("test", 30)):
        rows = [
            {
                "context": "",
                "question": f"{split} {i} {rng.choice(WORDS)}?",
                "choices": rng.sample(WORDS, 3),
                "answer": i % 3,
            }
            for i in range(num_rows)
        ]
        (folder / "task" / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = {
        "teacher": {"source": str(folder / "model"), "dtype": "float32"},
        "text": {"source": str(folder / "text.txt"), "num_held_out_tokens": 512},
        "distill": {
            "num_tokens": 4096,
            "seq_len_tokens": 64,
            "batch_size": 4,
            "learning_rate": 5e-3,
            "checkpoint_every_steps": 5,
        },
        "mixer": {"options": CHEAP},
        "task": {"source": str(folder / "task")},
        # The plain limit, as nothing could be certified with so few items.
        "search": {
            "strategy": "exact",
            "p_min": 0.8,
            "p_min_confidence": None,
            "run_to_end": True,
            "test_curve": True,
        },
        "runtime": {"device": "cpu", "num_threads": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder
