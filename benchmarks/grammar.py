"""What a grammar costs: making it ready, its masks, and the engine's tokens per second with and without one.

Before anything is timed, answers to a schema must parse and follow it, and a grammar that allows every text must leave
the model's text as it is.

    python benchmarks/grammar.py [--model MODEL] [--bpe 16384]

Without a model, ones of random weights are made, with a vocabulary of bytes and one of BPE, learned from Python's library:
the 25M parameters of the base configuration for the engine's speed, and a small one for all else.
"""

import argparse
import json
import time

import torch
from transformers import PreTrainedTokenizerFast

from bdh import BDHConfig, BDHForCausalLM
from bdh.bench.common import interleaved
from bdh.data.sources import stdlib_files
from bdh.generate.engine import Engine
from bdh.generate.grammar import Grammars, Matcher
from bdh.generate.params import EngineConfig, SamplingParams
from bdh.tokenizer import byte_tokenizer, train_tokenizer
from bdh.tokenizer.plain import token_bytes
from bdh.train.models import load_model

BIRD = {
    "type": "object",
    "properties": {
        "bird": {"enum": ["crow", "gull", "jackdaw"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "place": {"type": "string", "maxLength": 8},
    },
    "required": ["bird", "count", "place"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": BIRD, "minItems": 10**6}
SCHEMAS = {"one object": BIRD, "any JSON": {}, "endless list": ENDLESS}
BATCHES = (1, 8)
TRAINED_ON_BYTES = 4 << 20


def made_model(tokenizer: PreTrainedTokenizerFast, n_embd: int) -> BDHForCausalLM:
    torch.manual_seed(0)
    sizes = {"n_embd": n_embd, "n_head": 4, "n_layer": 6, "mlp_internal_dim_multiplier": 128}
    return BDHForCausalLM(BDHConfig(vocab_size=len(tokenizer), dropout=0.0, **sizes)).eval()


def made_bpe(vocab_size: int) -> PreTrainedTokenizerFast:
    texts, size = [], 0
    for path in stdlib_files():
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1])
        if size > TRAINED_ON_BYTES:
            break
    return train_tokenizer(texts, "bpe", vocab_size)


def no_text(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that may be no text: special ones, and those with parts of characters."""
    return [number for number, each in enumerate(token_bytes(tokenizer)) if not each or max(each) > 127]


def check(engine: Engine) -> None:
    """Stops where a grammar is not held, or changes what it need not."""
    params = [SamplingParams(max_tokens=400, seed=seed, grammar={"json_schema": BIRD}) for seed in range(8)]
    found = [each[0] for each in engine.generate(["The "] * 8, params)]
    whole = [json.loads(each.text) for each in found if each.finish_reason == "stop"]
    if not whole or any(list(each) != BIRD["required"] or len(each["place"]) > 8 for each in whole):
        raise SystemExit(f"the schema is not held: {[each.text for each in found]}")
    bias = dict.fromkeys(no_text(engine.tokenizer), -100.0)
    free = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logit_bias=bias)
    held = SamplingParams(**{**vars(free), "grammar": {"regex": "(?s:.*)"}})
    if engine.generate("The ", free)[0][0].token_ids != engine.generate("The ", held)[0][0].token_ids:
        raise SystemExit("a grammar that allows everything changes the text")
    print(
        f"  agree                 {len(whole)} of 8 answers ended, and all of those follow the schema; free text stays as it is"
    )


def time_masks(engine: Engine) -> None:
    """The parts of a token's cost, along texts that the model writes."""
    began = time.perf_counter()
    grammars = Grammars(engine.tokenizer, engine.model.config.vocab_size)
    grammars.compile({"regex": "a"})
    print(f"  tokens made ready     {1000 * (time.perf_counter() - began):8.1f} ms, once for a tokenizer")
    for name, schema in SCHEMAS.items():
        params = SamplingParams(max_tokens=300, seed=1, grammar={"json_schema": schema})
        tokens = engine.generate("The ", params)[0][0].token_ids
        began = time.perf_counter()
        grammars.compile(params.grammar or {})
        compiled = time.perf_counter() - began
        seconds = []
        for _ in range(3):
            matcher = Matcher(grammars.compile(params.grammar or {}), engine.model.config.vocab_size)
            for number in range(len(tokens)):
                began = time.perf_counter()
                matcher.allowed()
                matcher.read(tokens[: number + 1])
                seconds.append(time.perf_counter() - began)
        mean, worst = sum(seconds) / len(seconds), max(seconds)
        print(
            f"  {name:21s} {1000 * compiled:8.1f} ms, once; then {1e6 * mean:6.0f} us a token, at most {1e6 * worst:6.0f}"
        )


def time_engine(model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast, rounds: int, steps: int) -> None:
    """Steps of running requests without a grammar and with one that leaves their texts as they are, by turns."""
    bias = dict.fromkeys(no_text(tokenizer), -100.0)
    candidates = {}
    for count in BATCHES:
        for name, grammar in (("free", None), ("held", {"regex": "(?s:.*)"})):
            engine = Engine(model, tokenizer, config=EngineConfig(max_running=count))
            for seed in range(count):
                endless = SamplingParams(max_tokens=10**6, ignore_eos=True, seed=seed, logit_bias=bias, grammar=grammar)
                engine.add_request("The ", endless)
            while engine.stats().generated_tokens < 2 * count:
                engine.step()
            candidates[f"{name}, {count}"] = engine.step
    timings = interleaved(candidates, rounds=rounds, repeats=dict.fromkeys(candidates, steps))
    for count in BATCHES:
        free, held = timings[f"free, {count}"].median, timings[f"held, {count}"].median
        print(
            f"  {count} at once             {count / free:8.1f} tokens/s without, {count / held:8.1f} with, the same texts: "
            f"{1000 * (held - free) / count:+.3f} ms a token ({100 * (held / free - 1):+.1f} %)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of an exported model or of a run, or a hub id")
    parser.add_argument("--bpe", type=int, default=16384, help="entries of the vocabulary of BPE")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    arguments = parser.parse_args()
    if arguments.model is not None:
        pairs = [load_model(arguments.model, device="cpu")]
    else:
        tokenizers = [byte_tokenizer(special_tokens=True), made_bpe(arguments.bpe)]
        pairs = [(made_model(tokenizer, 256), tokenizer) for tokenizer in tokenizers]
    for model, tokenizer in pairs:
        engine = Engine(made_model(tokenizer, 32) if arguments.model is None else model, tokenizer)
        path = engine.advancer.description
        print(
            f"a vocabulary of {len(tokenizer):,}, {model.num_parameters() / 1e6:.1f}M parameters, steps by {path}",
            flush=True,
        )
        check(engine)
        time_masks(engine)
        time_engine(model, tokenizer, arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
