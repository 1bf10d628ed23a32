"""Benchmarks of the time of a token and the memory of the text at several context lengths.

A state of fixed size is compared with the KV cache of a GPT-2. Both models read one text, from each length to the next,
so that the longest is read only once.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from bdh.bench import BenchOptions
from bdh.bench.common import Progress, Report, gpt2_shape, interleaved, naive_logits, random_tokens
from bdh.bench.decoders import Decoder, Gpt2Decoder, StateDecoder, allowed_difference, made_gpt2, num_millions, reader
from bdh.model.modeling import BDHForCausalLM
from bdh.storage import atomic_file

_BDH, _GPT2, _STATIC = "BDH", "GPT-2", "GPT-2, static cache"
_SINGLE_TOKENS = 16
"""Number of tokens at the end of the compared text that are read one by one. Those before are read at once."""


def bench_context(model: BDHForCausalLM, options: BenchOptions, progress: Progress = lambda stage: None) -> Report:
    """Returns times and bytes by context.

    Nothing is timed unless the kernels agree with ``ops/naive.py``, and the GPT-2 with each of its caches agrees with the
    GPT-2 without a cache.
    """
    report = Report("context")
    report.introduce(model, options.seed)
    bdh = StateDecoder(model, _BDH, path="kernels")
    num_positions = max(options.contexts[-1] + options.reads, options.agreement_tokens)
    layers, width, heads = shape = gpt2_shape(model)
    gpt2 = made_gpt2(model.config.vocab_size, num_positions, shape, options.seed)
    of_positions = num_millions(gpt2.transformer.wpe)
    report.say(f"path      {bdh.advancer.description}")
    report.say(
        f"beside    GPT-2 in transformers, {layers} layers of width {width}, {heads} heads: "
        f"{num_millions(gpt2) - of_positions:.1f}M parameters, and {of_positions:.1f}M of {num_positions:,} positions"
    )
    report.figures["gpt2"] = {"layers": layers, "width": width, "heads": heads, "positions": num_positions}
    progress(f"agreement: {options.agreement_tokens:,} tokens")
    _compare(report, model, gpt2, random_tokens(model.config.vocab_size, options.agreement_tokens, options.seed + 2))
    if not report.failed:
        text = random_tokens(model.config.vocab_size, num_positions, options.seed + 3).tolist()
        report.figures["contexts"] = _at_contexts(bdh, Gpt2Decoder(gpt2, name=_GPT2), text, options, progress)
        _tabulate(report, options)
    return report


def _compare(report: Report, model: BDHForCausalLM, gpt2_model: GPT2LMHeadModel, tokens: torch.Tensor) -> None:
    """Compares the logits after each of the last tokens, with and without a state or cache of those before."""
    num_single = min(_SINGLE_TOKENS, len(tokens) - 1)
    text = tokens.tolist()
    begin, rest = text[: len(text) - num_single], text[len(text) - num_single :]
    bdh, gpt2 = StateDecoder(model, path="kernels"), Gpt2Decoder(gpt2_model)
    after_begin = gpt2.read_on(begin)
    static = gpt2.with_static_cache(max(1, num_single))
    with torch.inference_mode():
        whole = gpt2_model(tokens[None], use_cache=False, logits_to_keep=num_single + 1).logits[0]

    def logits(decoder: Decoder, first: torch.Tensor) -> torch.Tensor:
        return torch.stack([first, *map(decoder.read, rest)])

    of_naive = naive_logits(model, tokens[None])[0, -num_single - 1 :]
    pairs = {
        "BDH: kernels and ops/naive.py": (logits(bdh, bdh.read_on(begin)), of_naive),
        "GPT-2: with its cache and without": (logits(gpt2, after_begin), whole),
        "GPT-2: with a static cache and without": (logits(static, after_begin), whole),
    }
    found = {name: (a - b).abs().max().item() for name, (a, b) in pairs.items()}
    allowed = {name: allowed_difference(b) for name, (_, b) in pairs.items()}
    # Not `>`: NaN must not count as agreement.
    report.failed = not all(found[name] <= allowed[name] for name in found)
    report.figures["agreement"] = {
        "tokens": len(tokens),
        "agrees": not report.failed,
        "largest_difference": found,
        "allowed": allowed,
    }
    report.table(
        f"agreement: largest difference of logits after {len(begin):,} tokens at once and {len(rest)} one by one",
        ["", "difference", "allowed"],
        [[name, f"{found[name]:.1e}", f"{allowed[name]:.1e}"] for name in found],
    )
    if report.failed:
        report.say("the forms do not agree: nothing was timed")


def _at_contexts(
    bdh: StateDecoder, gpt2: Gpt2Decoder, text: list[int], options: BenchOptions, progress: Progress
) -> list[dict[str, Any]]:
    figures = []
    seconds = {_BDH: 0.0, _GPT2: 0.0}
    for context in options.contexts:
        # From a little below the context to a little above it: the mean is at the context.
        begin = context - options.reads // 2
        found: dict[str, dict[str, float]] = {_BDH: {}, _GPT2: {}, _STATIC: {}}
        for decoder in (bdh, gpt2):
            tokens = text[decoder.num_tokens : begin]
            progress(f"{decoder.name} reads on from {decoder.num_tokens:,} tokens to {begin:,}")
            start = time.perf_counter()
            decoder.read_on(tokens)
            took = time.perf_counter() - start
            seconds[decoder.name] += took
            rate = len(tokens) / took
            found[decoder.name] |= {"prompt_tokens_per_s": rate, "prompt_seconds_so_far": seconds[decoder.name]}
        progress(f"timing: single tokens around {context:,}")
        decoders = (bdh, gpt2, gpt2.with_static_cache(options.reads, _STATIC))
        timings = interleaved(
            {each.name: reader(each, text[begin : begin + options.reads]) for each in decoders},
            rounds=options.rounds,
            repeats=dict.fromkeys(found, options.tokens_in_round),
        )
        for name, timing in timings.items():
            found[name] |= timing.figures("token")
        found[_BDH]["memory_bytes"] = bdh.memory_bytes
        found[_GPT2]["memory_bytes"] = gpt2.memory_bytes * context // gpt2.num_tokens
        figures.append({"context": context, **found})
    return figures


def _tabulate(report: Report, options: BenchOptions) -> None:
    tokens, prompts = [], []
    for each in report.figures["contexts"]:
        context, bdh, gpt2 = f"{each['context']:,}", each[_BDH], each[_GPT2]
        cells = [context, f"{bdh['ms_per_token']:,.2f}", f"{bdh['least_ms']:,.2f}"]
        for other in (gpt2, each[_STATIC]):
            times = other["ms_per_token"] / bdh["ms_per_token"]
            cells += [f"{other['ms_per_token']:,.2f}", f"{other['least_ms']:,.2f}", f"{times:.2f}"]
        tokens.append(cells)
        cells = [context]
        for of in (bdh, gpt2):
            cells += [f"{of['prompt_tokens_per_s']:,.0f}", f"{of['prompt_seconds_so_far']:,.1f}"]
        prompts.append([*cells, *(f"{of['memory_bytes'] / 2**20:,.1f}" for of in (bdh, gpt2))])
    report.table(
        f"one token around each context, in ms: medians of {options.rounds} rounds by turns, {options.tokens_in_round} tokens in each",
        ["context", "BDH", "least", "GPT-2", "least", "times BDH", "static cache", "least", "times BDH"],
        tokens,
    )
    report.table(
        f"prompts from each context on to the next, but for the {options.reads} tokens read one by one there; and the memory",
        ["context", "BDH tokens/s", "s so far", "GPT-2 tokens/s", "s so far", "state MiB", "KV cache MiB"],
        prompts,
    )


def draw(contexts: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots the time of a token and the memory by context, as .svg or .png.

    Args:
        contexts: ``report.figures["contexts"]`` of :func:`bench_context`.
        path: the file to write.
    """
    import matplotlib
    from matplotlib.figure import Figure

    lengths = [each["context"] for each in contexts]
    colours = {_BDH: "teal", _GPT2: "darkorange", _STATIC: "peru"}
    panels = {
        "ms_per_token": ("time of one token, ms", 1.0),
        "memory_bytes": ("memory of the text, MiB", 2**20),
    }
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (key, (words, unit)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, colour in colours.items():
            if key in contexts[0][name]:
                values = [each[name][key] / unit for each in contexts]
                style = "--" if name == _STATIC else "-"
                axes.plot(lengths, values, style, marker="o", markersize=4, color=colour, label=name)
        axes.set(xlabel="tokens read before", ylabel=words, ylim=(0, None))
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.legend()
    with matplotlib.rc_context({"svg.fonttype": "none"}), atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:])
