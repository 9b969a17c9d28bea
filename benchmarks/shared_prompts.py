"""What it saves to run a question's prompt once for all of its choices.

    python benchmarks/shared_prompts.py [--device cuda] [--questions 250] [--prompt-tokens 52] [--choice-tokens 9]

Random weights of SmolLM2-135M's shape, four choices to a question, lengths drawn around those of ARC-easy. Times a
pass of the teacher, of the model with every layer linear, and of a candidate whose lower half is cached, with and
without sharing; the scores must agree. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from functools import partial

import torch
from random_model import random_model
from transformers import LlamaForCausalLM

from dtr.arch import LayerRunner, decoder_layers, read_geometry, with_mixer
from dtr.bench.measure import hardware
from dtr.evaluation.batches import TokenPair
from dtr.evaluation.likelihood import LikelihoodScorer
from dtr.evaluation.recording import LayerPasses
from dtr.mixers import mixer_from_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mixer", default="gated_deltanet")
    parser.add_argument("--questions", type=int, default=250)
    parser.add_argument("--prompt-tokens", type=int, default=52, help="mean length of a prompt")
    parser.add_argument("--choice-tokens", type=int, default=9, help="mean length of a choice")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    model, mixers = make_model(args.mixer, device)
    pairs, questions = make_questions(args.questions, args.prompt_tokens, args.choice_tokens)
    layers = list(decoder_layers(model))
    every, half = frozenset(mixers), frozenset(range(len(layers) // 2))
    record = {**vars(args), "hardware": hardware(), "seconds": {}, "tokens": {}}
    scores = {}
    for name, shared in (("repeated", None), ("shared", questions)):
        score = LikelihoodScorer(
            LayerRunner(model),
            {i: with_mixer(layers[i], mixer) for i, mixer in mixers.items()},
            pairs,
            pad_token_id=0,
            device=device,
            questions=shared,
        )
        scores[name] = [response.log_prob for response in score(every, base=every)]
        record["tokens"][name] = sum(batch.num_tokens for batch in score._batches)
        record["seconds"][name] = {
            which: seconds(partial(score, linear, base=base), args.repeats)
            for which, (linear, base) in {
                "teacher": (frozenset(), frozenset()),
                "all_linear": (every, every),
                "candidate": (half | {len(layers) // 2}, half),
            }.items()
        }
        # The same without CUDA graphs; on a CPU both run kernel by kernel.
        score._passes = LayerPasses(LayerRunner(model), None)
        plain = seconds(partial(score, half | {len(layers) // 2}, base=half), args.repeats)
        record["seconds"][name]["candidate_kernel_by_kernel"] = plain
        print(name, record["tokens"][name], record["seconds"][name], flush=True)
    record["largest_difference"] = max(abs(a - b) for a, b in zip(scores["repeated"], scores["shared"]))
    print(json.dumps(record))


def make_model(kind: str, device: torch.device) -> tuple[LlamaForCausalLM, dict[int, torch.nn.Module]]:
    model = random_model().to(device, torch.bfloat16).eval()
    geometry = read_geometry(model.config)
    mixers = {
        index: mixer_from_teacher(kind, geometry, index, layer.self_attn).to(device, torch.bfloat16).eval()
        for index, layer in enumerate(decoder_layers(model))
    }
    return model, mixers


def make_questions(num: int, prompt_tokens: int, choice_tokens: int) -> tuple[list[TokenPair], list[list[int]]]:
    rng = random.Random(0)

    def draw(mean: int) -> tuple[int, ...]:
        length = max(1, round(rng.lognormvariate(0.0, 0.4) * mean))
        return tuple(rng.randrange(1, 49_152) for _ in range(length))

    pairs = []
    for _ in range(num):
        context = draw(prompt_tokens)
        pairs += [TokenPair(context=context, target=draw(choice_tokens)) for _ in range(4)]
    return pairs, [list(range(4 * at, 4 * at + 4)) for at in range(num)]


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The fastest of several; scores are read on the CPU, so nothing is left running."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return round(min(times), 4)


if __name__ == "__main__":
    main()
