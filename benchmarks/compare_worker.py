"""One process of benchmarks/compare.py: drives the ``bdh`` of one checkout, which PYTHONPATH names.

    python benchmarks/compare_worker.py SIZE      # reads commands from the standard input, and answers in JSON, line by line

It knows the names of both checkouts: what differs between them stands in the functions of the first section.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from statistics import median
from typing import Any

import numpy as np
import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.generate.engine import Engine
from bdh.generate.params import SamplingParams
from bdh.tokenizer import byte_tokenizer

# What has other names in other checkouts. -------------------------------------------------------------------------------

try:
    from bdh.ops.blocks.plan import LayerOptions
except ModuleNotFoundError:  # before ops/layer became ops/blocks
    from bdh.ops.layer.plan import LayerOptions

try:
    from bdh.generate.params import EngineConfig
except ImportError:  # before generate/config.py was part of generate/params.py
    from bdh.generate.config import EngineConfig

Read = Callable[[list[tuple[Any, list[int]]], str], list[Any]]

try:
    from bdh.generate.advance import Advancer, StepInput

    def reader(model: BDHForCausalLM, **settings: Any) -> tuple[Callable[[], Any], Read]:
        """What makes states, and what reads tokens of several into theirs and gives the logits that are wanted."""
        advancer = Advancer(model, **settings)
        return advancer.new_state, lambda rows, logits: advancer.advance(
            [StepInput(state, tokens, logits) for state, tokens in rows]
        )

    def tensors_of(state: Any) -> dict[str, torch.Tensor]:
        """With one layer step after the other in the first dimension."""
        return {name: torch.cat(tensors) for name, tensors in state.tensors.items()}

except ModuleNotFoundError:  # before states were batched
    from bdh.generate.stepper import Feed, make_stepper

    def reader(model: BDHForCausalLM, **settings: Any) -> tuple[Callable[[], Any], Read]:
        of_model = make_stepper(model, **settings)
        return of_model.new_state, lambda rows, logits: of_model.step(
            [Feed(state, tokens, logits) for state, tokens in rows]
        )

    def tensors_of(state: Any) -> dict[str, torch.Tensor]:
        return dict(state.tensors)


# Models. ----------------------------------------------------------------------------------------------------------------

SIZES: dict[str, dict[str, Any]] = {
    "25M": {"n_embd": 256, "n_head": 4, "n_layer": 6, "mlp_internal_dim_multiplier": 128},
    "small": {"n_embd": 128, "n_head": 4, "n_layer": 4, "mlp_internal_dim_multiplier": 32},
    "odd": {"n_embd": 21, "n_head": 3, "n_layer": 3, "mlp_internal_dim_multiplier": 6},
}


def make_model(size: str, *, lean: float = 1.0, **fields: Any) -> BDHForCausalLM:
    """The same weights in every checkout. Few neurons fire, as in a trained model: rows of E and Ev lean against a direction
    of the residual stream that all tokens have in common."""
    config = BDHConfig(vocab_size=256, **{**SIZES[size], "dropout": 0.0, **fields})
    model = BDHForCausalLM(config).eval()
    random = np.random.RandomState(1)
    D = config.n_embd
    direction = torch.from_numpy(random.standard_normal(D)).float()
    direction = (direction - direction.mean()) / direction.norm()
    leans = {"embed": 2.0 * D**0.5, "encoder": -1.2 * lean / D**0.5, "encoder_v": -0.6 * lean / D**0.5}
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            weight.copy_(torch.from_numpy(random.standard_normal(weight.shape) / (1 if "embed" in name else D**0.5)))
            kind = name.split(".")[0]
            if kind in leans:
                weight += direction * leans[kind]
            elif kind == "decoder":
                weight += direction[:, None] * 0.02
    return model


def text(count: int, seed: int = 3) -> list[int]:
    return np.random.RandomState(seed).randint(0, 256, count).tolist()


# Figures: each makes what is timed. -------------------------------------------------------------------------------------


def _decode(size: str, num_sequences: int) -> Callable[[], object]:
    new_state, read = reader(make_model(size), path="kernels")
    states = [new_state() for _ in range(num_sequences)]
    tokens: Iterator[int] = cycle(text(997))

    def step() -> None:
        read([(state, [next(tokens)]) for state in states], "last")

    return step


def _prefill(size: str) -> Callable[[], object]:
    new_state, read = reader(make_model(size), path="kernels")
    tokens = text(512)
    return lambda: read([(new_state(), tokens)], "last")


def _engine(size: str, num_requests: int) -> Callable[[], object]:
    model = make_model(size)
    engine = Engine(model, byte_tokenizer(), config=EngineConfig(path="kernels", max_state_bytes=2 * 10**9))
    for number in range(num_requests):
        params = SamplingParams(max_tokens=10**6, ignore_eos=True, seed=number, top_p=0.9)
        engine.add_request(text(4, seed=number), params)
    return engine.step


def _train(size: str, path: str) -> Callable[[], object]:
    """Of the small model, as it trains on a laptop: 16 sequences; 4 where all is to be quick."""
    torch.manual_seed(0)
    num_sequences = 16 if size == "25M" else 4
    model = BDHForCausalLM(BDHConfig(vocab_size=256, **SIZES["small"], dropout=0.1)).train()
    model.layer_options = LayerOptions(path=path)
    tokens = torch.tensor(text(num_sequences * 128)).view(num_sequences, 128)

    def step() -> None:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()

    return step


FIGURES: dict[str, Callable[[str], Callable[[], object]]] = {
    "decode, 1 sequence": lambda size: _decode(size, 1),
    "decode, 8 sequences": lambda size: _decode(size, 8),
    "prefill of 512 tokens": _prefill,
    "engine step, 1 request": lambda size: _engine(size, 1),
    "engine step, 8 requests": lambda size: _engine(size, 8),
    "train step, kernels": lambda size: _train(size, "kernels"),
    "train step, torch in blocks": lambda size: _train(size, "torch"),
    "train step, plain": lambda size: _train(size, "plain"),
}


def serve(size: str) -> None:
    """Answers ``{"figure": NAME, "seconds": S}`` with the median seconds of what fits into S, at least 2 calls."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    made: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        command = json.loads(line)
        name = command["figure"]
        if name not in made:
            made[name] = FIGURES[name](size)
            for _ in range(2):  # compiles, warms caches up
                made[name]()
        found: list[float] = []
        while len(found) < 2 or sum(found) < command["seconds"]:
            start = time.perf_counter()
            made[name]()
            found.append(time.perf_counter() - start)
        answers.write(json.dumps(median(found)) + "\n")


# Bits. ------------------------------------------------------------------------------------------------------------------


def bits() -> dict[str, torch.Tensor]:
    """What the CPU kernels compute: logits, states and gradients, by name."""
    found: dict[str, torch.Tensor] = {}
    for size in ("odd", "small"):
        for decay in (None, [3.5, None, 80.0, 1.0][: SIZES[size]["n_head"]]):
            model = make_model(size, decay=decay, chunk_size=16)
            for settings in (
                {},
                {"weights": "bfloat16"},
                {"state": "bfloat16"},
                {"weights": "bfloat16", "state": "bfloat16"},
                {"window": 20},
                {"window": 20, "weights": "bfloat16"},
            ):
                name = f"{size}, decay {decay}, {settings}"
                found |= {f"{name}: {key}": value for key, value in _read_bits(model, settings).items()}
            for form in ("parallel", "chunked"):
                for dropout in (0.0, 0.2):
                    name = f"{size}, decay {decay}, {form}, dropout {dropout}"
                    model.config.attention_form, model.config.dropout = form, dropout
                    found |= {f"{name}: {key}": value for key, value in _gradient_bits(model).items()}
                model.config.attention_form, model.config.dropout = "auto", 0.0
    return found


def _read_bits(model: BDHForCausalLM, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Two sequences: a prompt in pieces beside single tokens, then single tokens of both."""
    new_state, read = reader(model.eval(), path="kernels", **settings)
    first, second, tokens = new_state(), new_state(), text(200)
    logits = []
    for at, count in ((0, 1), (1, 37), (38, 150), (188, 2)):
        logits += read([(first, tokens[at : at + count]), (second, [tokens[at]])], "all")
    for token in tokens[:12]:
        logits += [row[None] for row in read([(first, [token]), (second, [token + 1 & 255])], "last")]
    states = {
        f"state {n} {name}": t for n, state in enumerate((first, second)) for name, t in tensors_of(state).items()
    }
    return {"logits": torch.cat(logits), **{name: tensor.clone() for name, tensor in states.items()}}


def _gradient_bits(model: BDHForCausalLM) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model.layer_options = LayerOptions(path="kernels")
    tokens = torch.tensor(text(4 * 75)).view(4, 75)
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    starts[1, 30] = starts[2, 0] = True
    torch.manual_seed(9)
    loss = model(tokens, labels=tokens, document_starts=starts).loss
    loss.backward()
    gradients = {f"gradient {name}": weight.grad.clone() for name, weight in model.named_parameters()}  # type: ignore[union-attr]
    return {"loss": loss.detach()[None], **gradients}


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("BDH_COMPARE_THREADS", os.cpu_count() or 1)))
    torch.manual_seed(0)
    if sys.argv[1] == "bits":
        torch.save(bits(), sys.argv[2])
    elif sys.argv[1] == "save":
        make_model(sys.argv[2]).save_pretrained(sys.argv[3])
        byte_tokenizer().save_pretrained(sys.argv[3])
    else:
        serve(sys.argv[1])
