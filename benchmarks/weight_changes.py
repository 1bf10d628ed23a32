"""Whether generated text has the weights of the optimizer's last step, and what it costs to know.

Trains a model for some steps with each optimizer, fused and not. After every step, greedy text of ``generate``, the engine
and a conversation must be that of an argmax over the whole text, which keeps nothing from one token to the next.

    python benchmarks/weight_changes.py --config configs/tiny.yaml --config configs/small.yaml --steps 20

With the checkout of another version, decoding and prefill of the 25M configuration are timed in both by turns, each in a
process of its own, on the same weights:

    python benchmarks/weight_changes.py --against CHECKOUT
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
import yaml

from bdh import BDHConfig, BDHForCausalLM
from bdh.generate.advance import Advancer, StepInput
from bdh.generate.chat import Conversation
from bdh.generate.engine import Engine
from bdh.generate.params import SamplingParams
from bdh.tokenizer import byte_tokenizer

NEW_TOKENS = 16
PROMPT = "To be, or not to be, that is"
TIE = 1e-3
"""Logits: two orders of float32 sums may choose either of two tokens that are as close as that."""
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    f"{kind.__name__} {how}": partial(kind, lr=rate, **{how: True})
    for kind, rate in (
        (torch.optim.AdamW, 3e-3),
        (torch.optim.Adam, 3e-3),
        (torch.optim.SGD, 0.5),
        (torch.optim.Adagrad, 3e-3),
    )
    for how in ("fused", "foreach")
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", type=Path, help="a configuration of bdh train; its model is taken")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="time this version beside that one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.measure:
        measure()
        return 0
    if settings.against is not None:
        compare_costs(settings.against, settings.rounds)
        return 0
    torch.manual_seed(0)
    faults = 0
    for path in settings.config or [Path("configs/tiny.yaml"), Path("configs/small.yaml")]:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        for name, make_optimizer in OPTIMIZERS.items():
            faults += follow(
                path.stem, BDHConfig(vocab_size=256, **{**fields, "dropout": 0.0}), name, make_optimizer, settings.steps
            )
    return 1 if faults else 0


def follow(
    stem: str, config: BDHConfig, name: str, make_optimizer: Callable[..., torch.optim.Optimizer], steps: int
) -> int:
    """Trains, compares after every step, prints a line, and returns how many texts were not those of the weights."""
    model, tokenizer = BDHForCausalLM(config), byte_tokenizer()
    optimizer = make_optimizer(model.parameters())
    batches = made_batches()
    engine = Engine(model, tokenizer)
    wrong, ties, texts = dict.fromkeys(("generate", "engine", "chat"), 0), 0, set()
    for _ in range(steps):
        model.train()
        tokens = next(batches)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        expected, logits = by_argmax(model, list(PROMPT.encode()))
        texts.add(tuple(expected))
        chat = Conversation(Engine(model, tokenizer), SamplingParams(temperature=0, max_tokens=NEW_TOKENS), plain=True)
        for _ in chat.say(PROMPT):
            pass
        found = {
            "generate": by_generate(model),
            "engine": engine.generate(PROMPT, SamplingParams(temperature=0, max_tokens=NEW_TOKENS))[0][0].token_ids,
            "chat": chat._now.snapshot.tokens[-NEW_TOKENS:],
        }
        for way, text in found.items():
            first = next((i for i, (a, b) in enumerate(zip(text, expected, strict=True)) if a != b), None)
            if first is None:
                continue
            if float(logits[first][expected[first]] - logits[first][text[first]]) <= TIE:
                ties += 1
            else:
                wrong[way] += 1
    told = ", ".join(f"{way} {count}" for way, count in wrong.items())
    print(
        f"{stem}, {name}: {steps} steps, {len(texts)} different texts; not those of the weights: {told}; ties {ties}",
        flush=True,
    )
    return sum(wrong.values())


def made_batches() -> Iterator[torch.Tensor]:
    text = torch.tensor(list(b"To be, or not to be, that is the question: whether it is nobler in the mind. " * 40))
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(text) - 64, (4,), generator=generator)
        yield torch.stack([text[start : start + 64] for start in starts])


@torch.no_grad()
def by_argmax(model: BDHForCausalLM, text: list[int]) -> tuple[list[int], list[torch.Tensor]]:
    """The greedy continuation, and the logits of each of its tokens."""
    found, logits = [], []
    for _ in range(NEW_TOKENS):
        logits.append(model(torch.tensor([text + found]), use_cache=False).logits[0, -1])
        found.append(int(logits[-1].argmax()))
    return found, logits


def by_generate(model: BDHForCausalLM) -> list[int]:
    ids = torch.tensor([list(PROMPT.encode())])
    return model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None)[
        0, -NEW_TOKENS:
    ].tolist()


def measure() -> None:
    """Prints seconds of 200 tokens one by one, and of a prompt of 512, for this process's version."""
    from bdh.bench.common import sparse_model

    model = sparse_model(BDHConfig(n_embd=256, n_head=4, n_layer=6, mlp_internal_dim_multiplier=128, vocab_size=256))
    tokens = torch.randint(256, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    found = {}
    for storage in ("float32", "bfloat16"):
        advancer = Advancer(model, path="kernels", weights=storage)
        advancer.advance([StepInput(advancer.new_state(), tokens[:70])])
        start = time.perf_counter()
        state = advancer.new_state()
        advancer.advance([StepInput(state, tokens)])
        found[f"prefill {storage}"] = time.perf_counter() - start
        start = time.perf_counter()
        for token in tokens[:200]:
            advancer.advance([StepInput(state, [token])])
        found[f"decode {storage}"] = time.perf_counter() - start
    print(json.dumps(found))


def compare_costs(other: Path, rounds: int) -> None:
    here = Path(__file__).parents[1]
    seconds: dict[str, dict[str, list[float]]] = {"before": {}, "now": {}}
    for _ in range(rounds):
        for name, checkout in (("before", other), ("now", here)):
            environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
            command = [sys.executable, str(Path(__file__).resolve()), "--measure"]
            run = subprocess.run(command, env=environment, cwd=checkout, stdout=subprocess.PIPE, check=True, text=True)
            for what, value in json.loads(run.stdout).items():
                seconds[name].setdefault(what, []).append(value)
    for what in seconds["now"]:
        before, now = (seconds[name][what] for name in ("before", "now"))
        ratios = [b / a for a, b in zip(before, now, strict=True)]
        print(
            f"{what}: before {median(before):.3f} s (least {min(before):.3f}), now {median(now):.3f} s (least {min(now):.3f}), "
            f"now/before {median(ratios):.3f} in the median of the pairs"
        )


if __name__ == "__main__":
    sys.exit(main())
