"""Functions that generate text; :class:`bdh.BDHForCausalLM` has methods of the same names.

They call the engine, except for beam search, which uses transformers' ``generate``.
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
    """Generates continuations for each prompt, and returns them without the prompt.

    Args:
        model: a :class:`bdh.BDHForCausalLM` or :class:`bdh.model.network.Network`.
        tokenizer: the model's tokenizer.
        prompts: strings, in which nothing is parsed as a special token, or sequences of token ids.
        params: the sampling settings. A seed applies to each prompt; without one, PyTorch's generator draws it.
        num_beams: the number of beams of a beam search, which requires :class:`bdh.BDHForCausalLM`; 1 for no beam
            search.
        **settings: the fields of :class:`bdh.generate.params.SamplingParams` instead of ``params``; ``max_new_tokens``
            and ``num_return_sequences`` of transformers are accepted too.

    Raises:
        ValueError: a setting is out of range, there are no prompts, or a prompt is empty and the tokenizer has no
            ``<bos>``.
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
    """Generates the continuation of one prompt, and returns it without the prompt.

    The arguments and exceptions are those of :func:`generate_texts`.
    """
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
    """Yields the continuation in pieces of whole characters. Each piece is generated when it is requested.

    Raises:
        ValueError: as :func:`generate_texts`, and for several beams or sequences, which cannot be streamed.
        RuntimeError: as :func:`generate_texts`.
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
    """Returns the checked settings of a call.

    Raises:
        ValueError: a setting is invalid.
        TypeError: a setting is unknown.
    """
    if params is not None and settings:
        raise ValueError(f"give either params or keywords, not both: got {', '.join(settings)} too")
    known = [*SamplingParams.__dataclass_fields__, *ALIASES]
    for name in settings.keys() - {*known}:
        near = nearest(name, known)
        raise TypeError(f"{name} is not a generation parameter{f': did you mean {near}?' if near else ''}")
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
    """Draws a missing seed from PyTorch's generator, so that ``torch.manual_seed`` makes texts reproducible."""
    return params if params.seed is not None else replace(params, seed=int(torch.randint(2**62, ())))


def _search_beams(
    model: Any, tokenizer: PlainTokenizer, prompts: Sequence[Prompt], params: SamplingParams, num_beams: int
) -> list[list[str]]:
    """For each prompt the ``params.n`` best continuations that a beam search finds, all prompts in one batch."""
    from transformers import StoppingCriteriaList

    encoded = [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    T = max(map(len, encoded))
    pad = tokenizer.pad_token_id or 0  # has no effect, because it is masked
    ids = torch.tensor([[pad] * (T - len(tokens)) + tokens for tokens in encoded], device=model.device)  # (B, T)
    mask = torch.tensor([[0] * (T - len(tokens)) + [1] * len(tokens) for tokens in encoded], device=model.device)
    eos_token_ids = end_token_ids(model, tokenizer)
    # A token has at least one byte, except special ones, which decode to nothing.
    tail_tokens = max((len(s.encode()) for s in params.stop), default=0) + CONTEXT_TOKENS

    def decoded(sequence: torch.Tensor, start: int) -> tuple[TextDecoder, str]:
        """Returns the text of a sequence's tokens from ``start`` on, without padding after its end, and the decoder."""
        context, generated = sequence[max(0, start - CONTEXT_TOKENS) : start].tolist(), sequence[start:].tolist()
        end = next((place for place, token in enumerate(generated) if token in eos_token_ids), len(generated))
        decoder = TextDecoder(tokenizer, params.stop, context)
        return decoder, decoder.push(generated[:end])

    def is_stopped(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Decodes the end of each beam, as far as a stop string can reach. Uncached, since beams change places."""
        start = max(T, input_ids.shape[1] - tail_tokens)
        return torch.tensor([decoded(beam, start)[0].stopped for beam in input_ids], device=input_ids.device)

    # Neutral values are passed explicitly, since those of the model's generation_config would apply otherwise.
    arguments: dict[str, Any] = {"do_sample": params.temperature > 0, "repetition_penalty": params.repetition_penalty}
    if params.temperature > 0:
        arguments |= {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
        arguments["min_p"] = params.min_p or None
    # transformers samples from PyTorch's global generator, which is restored afterwards.
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
