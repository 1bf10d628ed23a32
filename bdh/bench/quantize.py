"""Benchmarks of formats of weights and states, compared with those of other libraries, also for a GPT-2.

The toolkit's formats are timed only if the kernels give the logits of the dequantized weights. Rounded formats are compared
with float32: by the divergence of the next token's distribution and, if there is a text, by the perplexity.
"""

import copy
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import DynamicCache

from bdh.bench import BenchOptions
from bdh.bench.common import Progress, Report, Timing, gpt2_shape, interleaved, milliseconds, random_tokens
from bdh.bench.decoders import TOLERANCE, made_gpt2, num_millions
from bdh.evaluate.loss import perplexity
from bdh.generate.advance import Advancer, StepInput
from bdh.model.modeling import BDHForCausalLM
from bdh.model.weights import layer_modules, recurrence_of
from bdh.ops import STATE_FORMATS, StateFormat, WeightFormat
from bdh.quantize import quantize

_REFERENCE = "float32"
_OWN: tuple[tuple[WeightFormat, StateFormat], ...] = (
    ("float32", "float32"),
    ("bfloat16", "float32"),
    ("int8", "float32"),
    ("int4", "float32"),
    ("mixed", "float32"),
    *((weights, STATE_FORMATS[-1]) for weights in ("float32", "int8", "int4", "mixed")),
)


class _Form(ABC):
    """A model in some format that reads texts."""

    name: str
    disk_bytes: int
    """The size of the weights in a safetensors file."""
    memory_bytes: int
    """The size of the weights in memory, while the model reads."""

    @abstractmethod
    def read(self, tokens: Sequence[int], *, all_logits: bool = False, begin: bool = False) -> torch.Tensor:
        """Reads tokens, and returns the logits after the last one (V,) or after each. ``begin`` starts a new text."""


class _Bdh(_Form):
    def __init__(self, name: str, model: Any, memory_bytes: int, **settings: Any):
        self.name, self.memory_bytes, self.advancer = name, memory_bytes, Advancer(model, **settings)
        self.disk_bytes = _stored_bytes(model)
        self._state = self.advancer.new_state()

    def read(self, tokens: Sequence[int], *, all_logits: bool = False, begin: bool = False) -> torch.Tensor:
        if begin:
            self._state.clear()
        (logits,) = self.advancer.advance([StepInput(self._state, tokens, "all" if all_logits else "last")])
        assert logits is not None
        return logits


class _Gpt2(_Form):
    def __init__(self, name: str, model: Any):
        self.name, self.model = name, model
        self.disk_bytes = self.memory_bytes = _stored_bytes(model)
        self._cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], *, all_logits: bool = False, begin: bool = False) -> torch.Tensor:
        if begin:
            self._cache = DynamicCache(config=self.model.config)
        output = self.model(
            torch.tensor([tokens]), cache=self._cache, use_cache=True, logits_to_keep=0 if all_logits else 1
        )
        return output.logits[0] if all_logits else output.logits[0, -1]


@dataclass
class _Quality:
    """The quality of next-token predictions."""

    kl: float
    """The mean KL divergence from the distribution of float32, in nats."""
    loss: float
    """Nats per token."""


def bench_quantize(
    model: BDHForCausalLM,
    options: BenchOptions,
    progress: Progress = lambda stage: None,
    *,
    text: Sequence[int] | None = None,
) -> Report:
    """Returns figures of formats. Nothing is timed unless the kernels agree with dequantized weights.

    Args:
        text: held-out tokens on which the formats are compared; None for random ones, without a perplexity.
    """
    report = Report("quantize")
    report.introduce(model, options.seed)
    progress("agreement: kernels and dequantized weights")
    tokens = random_tokens(model.config.vocab_size, max(options.context, options.agreement_tokens), options.seed + 7)
    _compare_with_dequantized(report, model, tokens[: options.agreement_tokens].tolist())
    if report.failed:
        report.say("the kernels do not agree with dequantized weights: nothing was timed")
        return report
    forms = list(_own_forms(model))
    others, left_out = _other_forms(model, options)
    reading = (
        list(text)[: options.agreement_tokens] if text is not None else tokens[: options.agreement_tokens].tolist()
    )
    progress(f"quality: {len(reading):,} tokens")
    of_bdh = [form for form in [*forms, *others] if isinstance(form, _Bdh)]
    quality = _qualities(of_bdh, reading)
    progress("timing: a token at a time")
    decode = _time_decoding([*forms, *others], options)
    progress("timing: prompts")
    prefill = _time_prompts([*forms, *others], options)
    _tabulate(report, [*forms, *others], quality, decode, prefill, options, has_text=text is not None)
    for line in left_out:
        report.say(line)
    report.figures["left_out"] = left_out
    return report


def _compare_with_dequantized(report: Report, model: BDHForCausalLM, tokens: list[int]) -> None:
    """Compares the kernels on a quantized model with the kernels on the float32 weights that its codes represent."""
    found = {}
    for weights in ("int8", "int4", "mixed"):
        quantized = quantize(model, weights)
        plain = copy.deepcopy(model)
        with torch.no_grad():
            for module, other in zip(layer_modules(plain), layer_modules(quantized), strict=True):
                cast(nn.Linear, module).weight.copy_(cast(nn.Linear, other).weight)
        logits = [
            _Bdh("", each, 0, path="kernels").read(tokens, all_logits=True, begin=True) for each in (quantized, plain)
        ]
        found[weights] = (logits[0] - logits[1]).abs().max().item(), max(1.0, logits[1].std().item())
    # Not `>`: NaN must not count as agreement.
    report.failed = not all(value <= TOLERANCE * spread for value, spread in found.values())
    report.figures["agreement"] = {
        "tokens": len(tokens),
        "largest_difference": {name: value for name, (value, _) in found.items()},
        "agrees": not report.failed,
    }
    report.table(
        f"agreement: largest difference of logits of the kernels and dequantized weights over {len(tokens):,} tokens",
        ["weights", "difference", "allowed"],
        [[name, f"{value:.1e}", f"{TOLERANCE * spread:.1e}"] for name, (value, spread) in found.items()],
    )


def _own_forms(model: BDHForCausalLM) -> Iterator[_Form]:
    made: dict[WeightFormat, Any] = {}
    for weights, state in _OWN:
        if weights not in made:
            if weights == "float32":
                made[weights] = model
            elif weights == "bfloat16":
                made[weights] = copy.deepcopy(model).bfloat16()
            else:
                made[weights] = quantize(model, weights)
        of_weights = made[weights]
        # The kernels would copy a bfloat16 model to float32.
        copies: WeightFormat = "bfloat16" if weights == "bfloat16" else "float32"
        name = weights if state == "float32" else f"{weights}, state {state}"
        memory_bytes = sum(each.nbytes for each in recurrence_of(of_weights, copies).weights.tensors)
        yield _Bdh(name, of_weights, memory_bytes, path="kernels", state=state, weights=copies)


def _other_forms(model: BDHForCausalLM, options: BenchOptions) -> tuple[list[_Form], list[str]]:
    """Returns what other libraries make of the model and of a GPT-2, and what was left out and why."""
    positions = 2 * max(options.context, options.prompt_lengths[0])
    gpt2 = made_gpt2(model.config.vocab_size, positions, gpt2_shape(model), options.seed)
    gpt2_name = f"GPT-2 of {num_millions(gpt2):.3g}M"
    forms: list[_Form] = [_Gpt2(f"{gpt2_name}, float32", gpt2)]
    left_out = []
    for name, convert in _LIBRARIES.items():
        try:
            ours = convert(model)
            pair = (
                _Bdh(name, ours, _stored_bytes(ours), path="torch"),
                _Gpt2(f"{gpt2_name}, {name}", convert(_without_conv1d(gpt2))),
            )
            for form in pair:
                form.read([0], begin=True)
        except (
            ImportError,
            RuntimeError,
            NotImplementedError,
        ) as error:  # missing, or not for this shape or processor
            left_out.append(f"left out: {name}: {error}")
            continue
        forms += pair
    return forms, left_out


def _by_torchao(config: str) -> Callable[[Any], Any]:
    def convert(model: Any) -> Any:
        from torchao import quantization

        converted = copy.deepcopy(model)
        quantization.quantize_(converted, getattr(quantization, config)())
        return converted

    return convert


def _by_bitsandbytes(bits: int) -> Callable[[Any], Any]:
    def convert(model: Any) -> Any:
        from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

        converted = copy.deepcopy(model)
        for name, module in list(converted.named_modules()):
            if type(module) is nn.Linear and name != "lm_head":
                sizes, has_bias = (module.in_features, module.out_features), module.bias is not None
                linear: Any
                if bits == 8:
                    linear = Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False)
                    linear.weight = Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
                else:
                    linear = Linear4bit(*sizes, bias=has_bias, compute_dtype=torch.float32)
                    linear.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
                linear.bias = module.bias
                converted.set_submodule(name, linear.to("cpu"))
        return converted

    return convert


_LIBRARIES: dict[str, Callable[[Any], Any]] = {
    "torchao int8, weight only": _by_torchao("Int8WeightOnlyConfig"),
    "torchao int8, dynamic": _by_torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes int8": _by_bitsandbytes(8),
    "bitsandbytes nf4": _by_bitsandbytes(4),
}


def _without_conv1d(gpt2: Any) -> Any:
    """Returns the GPT-2 with ``nn.Linear`` instead of transformers' ``Conv1D``, which the libraries do not convert."""
    converted = copy.deepcopy(gpt2)
    for name, module in list(converted.named_modules()):
        if type(module).__name__ == "Conv1D":
            linear = nn.Linear(*module.weight.shape)
            with torch.no_grad():
                linear.weight.copy_(module.weight.t())
                linear.bias.copy_(module.bias)
            converted.set_submodule(name, linear)
    return converted


def _stored_bytes(model: Any) -> int:
    """Returns the size of the weights in a safetensors file. Tensor subclasses are stored as the tensors inside them."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        for part, plain in _plain_parts(name, tensor):
            tensors[part] = plain.contiguous().clone()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path)
        return path.stat().st_size


def _plain_parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor.data
        return
    for part in flatten()[0]:
        yield from _plain_parts(f"{name}.{part}", getattr(tensor, part))


def _qualities(forms: Sequence[_Bdh], tokens: Sequence[int]) -> dict[str, _Quality]:
    """Returns the quality of each form, compared with the first."""
    targets = torch.tensor(tokens[1:])
    found, expected = {}, None
    for form in forms:
        logs = form.read(tokens, all_logits=True, begin=True)[:-1].double().log_softmax(-1)
        expected = logs if expected is None else expected
        kl = (expected.exp() * (expected - logs)).sum(-1).mean().item()
        found[form.name] = _Quality(kl, -logs.gather(1, targets[:, None]).mean().item())
    return found


def _time_decoding(forms: Sequence[_Form], options: BenchOptions) -> dict[str, Timing]:
    text = random_tokens(256, options.context, options.seed + 3).tolist()
    slow = max(1, options.tokens_in_round // 8)
    repeats = {form.name: options.tokens_in_round if _is_fast(form) else slow for form in forms}
    candidates = {}
    for form in forms:
        # From a little below the context to a little above it: the mean is at the context.
        reads = (options.rounds + 1) * repeats[form.name]
        form.read(text[: max(1, options.context - reads // 2)], begin=True)
        candidates[form.name] = _next_token(form, text)
    return interleaved(candidates, rounds=options.rounds, repeats=repeats)


def _is_fast(form: _Form) -> bool:
    return not isinstance(form, _Bdh) or form.advancer.backend == "cpu"


def _next_token(form: _Form, text: Sequence[int]) -> Callable[[], int]:
    tokens = cycle(text)
    return lambda: int(form.read([next(tokens)]).argmax())


def _time_prompts(forms: Sequence[_Form], options: BenchOptions) -> dict[str, Timing]:
    text = random_tokens(256, options.prompt_lengths[0], options.seed + 4).tolist()
    candidates = {form.name: (lambda form=form: form.read(text, begin=True)) for form in forms}
    return interleaved(candidates, rounds=options.prompt_rounds, warm_up=0)


def _tabulate(
    report: Report,
    forms: Sequence[_Form],
    quality: Mapping[str, _Quality],
    decode: Mapping[str, Timing],
    prefill: Mapping[str, Timing],
    options: BenchOptions,
    *,
    has_text: bool,
) -> None:
    rows, figures = [], []
    reference, prompt = forms[0], options.prompt_lengths[0]
    for form in forms:
        ms, tokens_per_s = 1000 * decode[form.name].median, prompt / prefill[form.name].median
        times = decode[form.name].median / decode[reference.name].median
        found: dict[str, Any] = {
            "name": form.name,
            "disk_bytes": form.disk_bytes,
            "memory_bytes": form.memory_bytes,
            "ms_per_token": ms,
            "times_float32": times,
            "prefill_tokens_per_s": tokens_per_s,
        }
        cells = [
            f"{form.disk_bytes / 1e6:,.1f}",
            f"{form.disk_bytes / reference.disk_bytes:.3f}",
            f"{form.memory_bytes / 1e6:,.1f}",
            milliseconds(decode[form.name].median),
            f"{times:.2f}",
            f"{tokens_per_s:,.0f}",
        ]
        if form.name in quality:
            found |= {"kl": quality[form.name].kl}
            cells.append(f"{quality[form.name].kl:.2e}")
            if has_text:
                found |= {"perplexity": perplexity(quality[form.name].loss)}
                cells.append(f"{perplexity(quality[form.name].loss):.4f}")
        figures.append(found)
        rows.append([form.name, *cells, *[""] * (7 + has_text - len(cells))])
    report.figures["forms"] = figures
    columns = ["", "MB on disk", "of float32", "MB in memory", "ms/token", "times float32", "prompt tokens/s", "KL"]
    report.table(
        f"medians by turns: a token at context {options.context}, a prompt of {prompt:,}",
        [*columns, *(["perplexity"] if has_text else [])],
        rows,
    )
