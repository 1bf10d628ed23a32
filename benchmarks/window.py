"""A window over one long text, against re-reading the last tokens for each token: the loss, and what a token costs.

Reads a text once with `window=W`. At several places of it, up to its end, it also predicts every token of a stretch from
the last W tokens alone, each read from nothing: exact, and what a model that was trained on blocks of W is made for.
Before that it checks that the window of a short text is its banded scores.

    python benchmarks/window.py MODEL --source FILE --window 128
"""

import argparse
import time

import torch
import torch.nn.functional as F

from bdh.data import prepare_corpus
from bdh.data.config import DataConfig
from bdh.generate.advance import Advancer, StepInput
from bdh.model import BDHForCausalLM
from bdh.ops import naive
from bdh.train.models import load_model

READ_AT_ONCE = 2000


def check_window(model: BDHForCausalLM, tokens: list[int]) -> None:
    """Stops where the advancer is not the banded scores of naive.py."""
    names = ("embed.weight", "encoder", "encoder_v", "decoder", "lm_head")
    reference = model.to_reference()
    weights = naive.Weights(*(reference[name].float() for name in names))
    for window in (1, 7, 40, 1000):
        advancer = Advancer(model, window=window)
        logits = advancer.advance([StepInput(advancer.new_state(), tokens, "all")])[0]
        expected = naive.forward(torch.tensor([tokens]), weights, model.config.n_layer, window=window)[0]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)  # float32 sums in another order


def read_once(advancer: Advancer, tokens: list[int]) -> tuple[torch.Tensor, list[float]]:
    """The loss of every token but the first, and the seconds that each piece of the text took."""
    state, losses, seconds = advancer.new_state(), [], []
    for start in range(0, len(tokens) - 1, READ_AT_ONCE):
        targets = tokens[start + 1 : start + 1 + READ_AT_ONCE]
        began = time.perf_counter()
        logits = advancer.advance([StepInput(state, tokens[start : start + len(targets)], "all")])[0]
        seconds.append((time.perf_counter() - began) / len(targets))
        losses.append(F.cross_entropy(logits, torch.tensor(targets), reduction="none"))
    return torch.cat(losses), seconds


@torch.no_grad()
def read_again(model: BDHForCausalLM, tokens: list[int], window: int, places: range) -> torch.Tensor:
    """The loss of the token after each place, from the last ``window`` tokens read from nothing."""
    losses = []
    for start in range(places.start, places.stop, 32):
        rows = range(start, min(start + 32, places.stop))
        ids = torch.tensor([tokens[place - window + 1 : place + 1] for place in rows])
        logits = model(ids, logits_to_keep=1, use_cache=False).logits[:, -1]
        losses.append(F.cross_entropy(logits, torch.tensor([tokens[p + 1] for p in rows]), reduction="none"))
    return torch.cat(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of an exported model or of a run, or a hub id")
    parser.add_argument("--source", required=True, help="text, as data.source; its validation part is read")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--stretches", type=int, default=4, help="places where the text is read again")
    parser.add_argument("--stretch_tokens", type=int, default=1000)
    arguments = parser.parse_args()
    window, length = arguments.window, arguments.stretch_tokens

    model, tokenizer = load_model(arguments.model, device="cpu")
    model.eval()
    corpus = prepare_corpus(DataConfig(source=arguments.source), tokenizer, block_size=0)
    tokens = corpus.validation_tokens().tolist()
    room = len(tokens) - 1 - length - window
    if room < 0:
        raise SystemExit(f"the validation part has {len(tokens)} tokens: at least {length + window + 1} are needed")
    check_window(model, tokens[:100])
    advancer = Advancer(model, window=window)
    print(advancer.description)
    losses, seconds = read_once(advancer, tokens)
    tenth = max(1, len(seconds) // 10)
    first, last = sorted(seconds[1 : 1 + tenth] or seconds), sorted(seconds[-1 - tenth : -1] or seconds)
    print(f"{len(tokens):,} tokens read once: {losses.mean():.4f} nats per token", end="; ")
    print(f"{first[len(first) // 2] * 1e3:.3f} ms per token at first, {last[len(last) // 2] * 1e3:.3f} ms at last")
    print("first token  tokens  window  re-read  difference")
    differences = []
    for number in range(arguments.stretches):
        start = window + room * number // max(1, arguments.stretches - 1)
        places = range(start, start + length)
        by_window, again = losses[start : start + length].mean(), read_again(model, tokens, window, places).mean()
        differences.append((by_window - again).item())
        print(f"{start:>11,}  {length:>6,}  {by_window:.4f}   {again:.4f}     {differences[-1]:+.4f}", flush=True)
    print(f"mean difference {sum(differences) / len(differences):+.4f} nats per token")


if __name__ == "__main__":
    main()
