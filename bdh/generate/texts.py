"""Texts of a model by function calls: what :class:`bdh.BDHForCausalLM` has as methods of these names.

They are calls of the engine, but for beam search, which is transformers' ``generate``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from bdh.generate.engine import Engine
from bdh.generate.params import ALIASES, SamplingParams, by_own_names, collect_text_faults
from bdh.generate.sequence import CONTEXT_TOKENS, Prompt, TextDecoder, encode_prompt
from bdh.model.network import ModelParts, inference
from bdh.tokenizer.plain import PlainTokenizer, check_vocabulary, end_token_ids
from bdh.validation import Faults, collect_faults
from bdh.words import nearest


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
        params: how to sample; or give its fields as keywords, also by transformers' names ``max_new_tokens`` and
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
        return _search_beams(model, PlainTokenizer.of(tokenizer), prompts, params, num_beams)
    with inference(model):
        found = Engine(model, tokenizer).generate(prompts, [_with_seed(params) for _ in prompts])
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
    with inference(model):
        engine = Engine(model, tokenizer)
        engine.add_request(prompt, _with_seed(params))
    return _pieces(engine)


def _pieces(engine: Engine) -> Iterator[str]:
    while engine.has_work:
        with inference(engine.model):
            outputs = engine.step()
        for output in outputs:
            if output.text:
                yield output.text
            if output.completion is not None and output.completion.error is not None:
                raise RuntimeError(output.completion.error)


def params_of(params: SamplingParams | None, settings: dict[str, Any], *, num_beams: int) -> SamplingParams:
    """The settings of a call, checked.

    Raises:
        ValueError: something is wrong with them.
        TypeError: one has no such name.
    """
    if params is not None and settings:
        raise ValueError(f"give either params or keywords, not both: got {', '.join(settings)} too")
    known = [*SamplingParams.__dataclass_fields__, *ALIASES]
    for name in settings.keys() - {*known}:
        near = nearest(name, known)
        raise TypeError(f"{name} is no setting of a text{f': did you mean {near}?' if near else ''}")
    if params is None:
        params = SamplingParams(**by_own_names(settings))
    faults = Faults()
    collect_faults(params, faults)
    faults.found = [fault for fault in faults.found if not fault.startswith(("max_tokens is", "n is"))]
    counts = {"max_new_tokens": params.max_tokens, "num_return_sequences": params.n, "num_beams": num_beams}
    collect_text_faults(params, faults, **counts)
    faults.raise_if_any()
    return params


def _with_seed(params: SamplingParams) -> SamplingParams:
    """Without a seed, PyTorch's generator gives one, so that ``torch.manual_seed`` makes texts repeatable."""
    return params if params.seed is not None else replace(params, seed=int(torch.randint(2**62, ())))


def _search_beams(
    model: Any, tokenizer: PlainTokenizer, prompts: Sequence[Prompt], params: SamplingParams, num_beams: int
) -> list[list[str]]:
    """For each prompt the ``params.n`` best continuations that a beam search finds, all prompts in one batch."""
    from transformers import StoppingCriteriaList

    encoded = [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    T = max(map(len, encoded))
    pad = tokenizer.pad_token_id or 0  # never seen: the mask hides it
    ids = torch.tensor([[pad] * (T - len(tokens)) + tokens for tokens in encoded], device=model.device)  # (B, T)
    mask = torch.tensor([[0] * (T - len(tokens)) + [1] * len(tokens) for tokens in encoded], device=model.device)
    eos_token_ids = end_token_ids(model, tokenizer)
    # A token has at least one byte, except special ones, which decode to nothing.
    tail_tokens = max((len(s.encode()) for s in params.stop), default=0) + CONTEXT_TOKENS

    def decoded(sequence: torch.Tensor, start: int) -> tuple[TextDecoder, str]:
        """The text of a sequence's tokens from ``start`` to its end, after which padding stands, and its decoder."""
        context, generated = sequence[max(0, start - CONTEXT_TOKENS) : start].tolist(), sequence[start:].tolist()
        end = next((place for place, token in enumerate(generated) if token in eos_token_ids), len(generated))
        decoder = TextDecoder(tokenizer, params.stop, context)
        return decoder, decoder.push(generated[:end])

    def is_stopped(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Beams change places, so each is decoded anew, but only what a stop string at its end can stand in."""
        start = max(T, input_ids.shape[1] - tail_tokens)
        return torch.tensor([decoded(beam, start)[0].stopped for beam in input_ids], device=input_ids.device)

    # Neutral values are given too: left out, those of the model's generation_config would count.
    arguments: dict[str, Any] = {"do_sample": params.temperature > 0, "repetition_penalty": params.repetition_penalty}
    if params.temperature > 0:
        arguments |= {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
        arguments["min_p"] = params.min_p or None
    # transformers draws from PyTorch's own generator, which then continues as if nothing had been drawn.
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else [], enabled=params.seed is not None):
        if params.seed is not None:
            torch.manual_seed(params.seed)
        found = model.generate(
            ids,
            attention_mask=mask,
            stopping_criteria=StoppingCriteriaList([is_stopped] if params.stop else []),
            pad_token_id=pad,
            eos_token_id=eos_token_ids or None,
            max_new_tokens=params.max_tokens,
            num_beams=num_beams,
            num_return_sequences=params.n,
            **arguments,
        )
    texts = []
    for sequence in found:
        decoder, text = decoded(sequence, T)
        texts.append(text + decoder.flush())
    return [texts[start : start + params.n] for start in range(0, len(texts), params.n)]
