"""Texts of a model by function calls: what :class:`bdh.BDHForCausalLM` has as methods of these names."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from bdh.generate.decoder import Prompt
from bdh.generate.engine import Engine
from bdh.generate.params import SamplingParams, collect_text_faults
from bdh.generate.sequence import StepOutput
from bdh.model.network import ModelParts
from bdh.validation import Faults, collect_faults
from bdh.vocabulary import check_vocabulary

_ALIASES = {"max_new_tokens": "max_tokens", "num_return_sequences": "n"}
"""The names that transformers has for fields of :class:`SamplingParams`."""


def generate_texts(
    model: ModelParts,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    params: SamplingParams | None = None,
    *,
    num_beams: int = 1,
    **settings: Any,
) -> list[list[str]]:
    """For each prompt its continuations, without the prompt.

    Args:
        prompts: texts, in which nothing is a special token, or ids of tokens.
        params: how to sample; or give its fields as keywords, or by transformers' names ``max_new_tokens`` and
            ``num_return_sequences``. A seed is that of each prompt; without one, PyTorch's generator gives it.
        num_beams: of a beam search, which takes :class:`bdh.BDHForCausalLM`; 1 for none.

    Raises:
        ValueError: a setting out of range, no prompts, or an empty one where the tokenizer has no ``<bos>``.
        RuntimeError: a text could not be generated.
    """
    params = params_of(params, settings, num_beams=num_beams)
    check_vocabulary(tokenizer, model.config.vocab_size)
    if not prompts:
        raise ValueError("there are no prompts: give at least one")
    if num_beams > 1:
        from bdh.generate.beams import search_beams  # with transformers

        return search_beams(model, tokenizer, prompts, params, num_beams)
    seeds = [params.seed] * len(prompts) if params.seed is not None else [_drawn_seed() for _ in prompts]
    with _in_evaluation(model):
        engine = Engine(model, tokenizer)
        found = engine.generate(prompts, [replace(params, seed=seed) for seed in seeds])
    for completion in (each for several in found for each in several):
        if completion.error is not None:
            raise RuntimeError(completion.error)
    return [[completion.text for completion in several] for several in found]


def generate_text(
    model: ModelParts, tokenizer: Any, prompt: Prompt, params: SamplingParams | None = None, **settings: Any
) -> str:
    """The continuation of one prompt; arguments and errors are those of :func:`generate_texts`."""
    return generate_texts(model, tokenizer, [prompt], params, **settings)[0][0]


def stream_text(
    model: ModelParts,
    tokenizer: Any,
    prompt: Prompt,
    params: SamplingParams | None = None,
    *,
    num_beams: int = 1,
    **settings: Any,
) -> Iterator[str]:
    """The continuation piece by piece, in whole characters; each is generated when it is asked for.

    Raises:
        ValueError, RuntimeError: as :func:`generate_texts`; also with beams or several sequences, which cannot stream.
    """
    params = params_of(params, settings, num_beams=num_beams)
    if num_beams > 1 or params.n > 1:
        raise ValueError(
            f"a stream carries one text: num_beams is {num_beams} and num_return_sequences {params.n}, both must be 1"
        )
    if params.seed is None:
        params = replace(params, seed=_drawn_seed())
    with _in_evaluation(model):
        engine = Engine(model, tokenizer)
        engine.add_request(prompt, params)
    return _pieces(engine)


def _pieces(engine: Engine) -> Iterator[str]:
    while engine.has_work:
        with _in_evaluation(engine.model):
            outputs: list[StepOutput] = engine.step()
        for output in outputs:
            if output.text:
                yield output.text
            if output.completion is not None and output.completion.error is not None:
                raise RuntimeError(output.completion.error)


def params_of(params: SamplingParams | None, settings: dict[str, Any], *, num_beams: int) -> SamplingParams:
    """The settings of a call, checked.

    Raises:
        ValueError: something is wrong with them.
    """
    if params is not None and settings:
        raise ValueError(f"give either params or keywords, not both: got {', '.join(settings)} too")
    if params is None:
        params = SamplingParams(**{_ALIASES.get(name, name): value for name, value in settings.items()})
    faults = Faults()
    collect_faults(params, faults)
    faults.found = [fault for fault in faults.found if not fault.startswith(("max_tokens is", "n is"))]
    counts = {"max_new_tokens": params.max_tokens, "num_return_sequences": params.n, "num_beams": num_beams}
    collect_text_faults(params, faults, **counts)
    faults.raise_if_any()
    return params


@contextmanager
def _in_evaluation(model: ModelParts) -> Iterator[None]:
    """Within it nothing is dropped out; the model is as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def _drawn_seed() -> int:
    """From PyTorch's generator, so that ``torch.manual_seed`` makes texts repeatable."""
    return int(torch.randint(2**62, ()))
