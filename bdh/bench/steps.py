"""The forms of a training step (forward and backward pass) that ``bdh bench train`` compares, and the time of its parts."""

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_all_start_methods, get_context
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from bdh.bench.common import gpt2_config, naive_forward, naive_weights, sparse_model
from bdh.memory import peak_bytes, reset_peak, used_bytes
from bdh.model.configuration import BDHConfig
from bdh.model.forward import draw_seeds, plan_for
from bdh.model.modeling import BDHForCausalLM
from bdh.ops import naive
from bdh.ops.blocks import train
from bdh.ops.blocks.block import is_kept, make_dropout
from bdh.ops.blocks.plan import LayerOptions, LayerPlan
from bdh.train.config import TrainSettings
from bdh.train.optim import Optimizers

# How many tensors autograd keeps for a layer step of the plain equations: neuron-wide ones, and T x T scores.
_WIDE_KEPT, _SCORES_KEPT = 12, 3
_HEAD_WIDTH = 64  # in GPT-2

_METHODS = {
    "fire": "x = relu(E v), and its rotation",
    "rotated": "the rotation of a kept x",
    "gated_mlp": "y = relu(Ev a), dropout(x * y) and the decoder",
    "gated_mlp_backward": "the same backwards",
    "fire_backward": "x backwards: gradients of E and v",
}
_FUNCTIONS = {
    "read_block": "attention: scores, what they and the state give",
    "learn_block": "attention: the state after a block",
    "read_block_backward": "attention backwards",
}
REST = "the rest: embedding, norms, head, loss"


@dataclass(frozen=True)
class TrainCase:
    """The model of a training step, its batch, and how it is computed."""

    config: BDHConfig
    batch_size: int
    block_size: int
    device: str = "cpu"
    dtype: str = "float32"
    """The precision of the matrix products. The weights are float32."""
    density: float | None = None
    """Share of the neurons that fire in x; None uses ``weights``, or fresh ones."""
    seed: int = 0
    threads: int | None = None
    """Number of threads of torch and the kernels; None for torch's default."""
    options: LayerOptions = field(default_factory=LayerOptions)
    weights: dict[str, torch.Tensor] | None = None
    """The weights of an existing model, used only without ``density``."""

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.block_size

    def naive_bytes(self) -> int:
        """Returns about how many bytes the plain equations keep for the backward pass."""
        config, T = self.config, self.block_size
        each = _WIDE_KEPT * config.neurons_per_head * T + _SCORES_KEPT * T * T
        return 4 * config.n_layer * config.n_head * self.batch_size * each

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=getattr(torch, self.dtype), enabled=self.dtype != "float32")


def make_model(case: TrainCase) -> BDHForCausalLM:
    """Returns the model in training mode, on the device. The same case gives the same model."""
    torch.manual_seed(case.seed)
    if case.density is None:
        model = BDHForCausalLM(case.config)
        if case.weights is not None:
            model.load_state_dict(case.weights)
    else:
        model = sparse_model(case.config, case.seed, x_density=case.density, xy_density=case.density / 4)
    model.layer_options = case.options
    return model.requires_grad_(True).train().to(case.device)


def plan_step(case: TrainCase) -> LayerPlan | None:
    """Returns how the case's step computes the layer; None if ``case.options`` request the whole layer by autograd.

    Raises:
        LayerOptionError: ``case.options`` require something that is not available.
    """
    model = make_model(replace(case, density=None, weights=None))  # the plan does not depend on the weights
    with case.autocast(), torch.enable_grad():
        return plan_for(model, case.batch_size, case.block_size, case.config.attention_form)


class Step(ABC):
    """A training step (forward and backward pass) in one form."""

    name: str
    model: torch.nn.Module

    def __init__(self, case: TrainCase):
        self.case, self.model = case, self.make_model(case)
        generator = torch.Generator().manual_seed(case.seed + 1)
        shape = (case.batch_size, case.block_size + 1)
        tokens = torch.randint(case.config.vocab_size, shape, generator=generator).to(case.device)
        self.tokens, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # (B, T)

    def make_model(self, case: TrainCase) -> torch.nn.Module:
        return make_model(case)

    @abstractmethod
    def loss(self) -> torch.Tensor:
        """Returns the loss of the batch, with its graph."""

    def clear(self) -> None:
        self.model.zero_grad()

    def __call__(self) -> float:
        """Computes the gradients of the weights, and returns the loss."""
        self.clear()
        with self.case.autocast():
            loss = self.loss()
        loss.backward()
        return loss.item()  # waits for the device


class BlocksStep(Step):
    """The step as ``bdh train`` computes it."""

    name = "bdh"
    model: BDHForCausalLM

    def loss(self) -> torch.Tensor:
        found = self.model(self.tokens, shift_labels=self.targets).loss
        assert found is not None
        return found


class NaiveStep(Step):
    """``ops/naive.py`` with autograd. If no dropout masks are given, it draws one for each layer step."""

    name = "ops/naive.py"
    model: BDHForCausalLM

    def __init__(self, case: TrainCase):
        super().__init__(case)
        self.weights = naive.Weights(*(w.detach().contiguous().requires_grad_() for w in naive_weights(self.model)))
        self.masks: list[torch.Tensor] | None = None

    def clear(self) -> None:
        for weight in self.weights:
            weight.grad = None

    def loss(self) -> torch.Tensor:
        return naive_loss(self.model, self.weights, self.tokens, self.targets, self.masks)


class CompiledStep(NaiveStep):
    """The same with ``torch.compile``."""

    name = "ops/naive.py, compiled"

    def __init__(self, case: TrainCase):
        super().__init__(case)
        self._compiled = torch.compile(naive_loss)

    def loss(self) -> torch.Tensor:
        return self._compiled(self.model, self.weights, self.tokens, self.targets, self.masks)


class Gpt2Step(Step):
    """A GPT-2 of transformers with about as many parameters, and the same dropout and vocabulary."""

    def make_model(self, case: TrainCase) -> torch.nn.Module:
        wanted = sum(weight.numel() for weight in make_model(replace(case, density=None, weights=None)).parameters())
        model = GPT2LMHeadModel(gpt2_of_size(case, wanted)).train().to(case.device)
        self.name = f"GPT-2 of {sum(weight.numel() for weight in model.parameters()) / 1e6:.2f}M parameters"
        return model

    def loss(self) -> torch.Tensor:
        logits = self.model(self.tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), self.targets.flatten())


STEPS: dict[str, type[Step]] = {"bdh": BlocksStep, "naive": NaiveStep, "compiled": CompiledStep, "gpt2": Gpt2Step}


def naive_loss(
    model: BDHForCausalLM,
    weights: naive.Weights,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    masks: list[torch.Tensor] | None,
) -> torch.Tensor:
    """Returns the loss by the plain equations. ``masks`` are the dropout masks, (B, H, T, N); None draws them."""
    config, (B, T) = model.config, tokens.shape
    if masks is None and config.dropout > 0:
        shape = (B, config.n_head, T, config.neurons_per_head)
        masks = [F.dropout(weights.embed.new_ones(shape), config.dropout) for _ in range(config.n_layer)]
    logits = naive_forward(
        model,
        tokens,
        weights,
        window=T if config.decay is not None else None,  # all tokens; without it, decay is a loop over the tokens
        dropout_masks=masks or (),
    )
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def dropout_masks(
    model: BDHForCausalLM, batch_size: int, num_tokens: int, plain_dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Returns the masks (B, H, T, N) that the model's next forward pass draws, divided by the keep probability.

    This advances the random number generator: seed it again before that pass.

    Args:
        plain_dtype: the dtype of the products on the plain path, which draws other masks; None for other paths.
    """
    config, device = model.config, model.embed.weight.device
    H, N = config.n_head, config.neurons_per_head
    if plain_dtype is not None:
        ones = torch.ones(batch_size, num_tokens, H * N, dtype=plain_dtype, device=device)
        drawn = [F.dropout(ones, config.dropout) for _ in range(config.n_layer)]
        return [mask.float().unflatten(-1, (H, N)).transpose(1, 2) for mask in drawn]
    masks = []
    for seed in draw_seeds(config.n_layer, device):
        dropout = make_dropout(config.dropout, seed, H * N, batch_size, num_tokens)
        mask = is_kept(dropout, dropout.neuron_keys, dropout.token_keys).float() * dropout.scale  # (H * N, B, T)
        masks.append(mask.view(H, N, batch_size, num_tokens).permute(2, 0, 3, 1))
    return masks


def gpt2_of_size(case: TrainCase, num_parameters: int) -> GPT2Config:
    """Returns the GPT-2 closest to this number of parameters, with at least 2 layers, and heads of width 64 if possible."""
    V, T = case.config.vocab_size, case.block_size

    def count(layers: int, width: int) -> int:
        return layers * (12 * width**2 + 13 * width) + (V + T + 2) * width

    shapes = [(layers, width) for layers in range(2, 25) for width in range(16, 2049, 16) if width >= 16 * layers]
    layers, width = min(shapes, key=lambda shape: abs(count(*shape) - num_parameters))
    heads = width // (_HEAD_WIDTH if width % _HEAD_WIDTH == 0 else 16)
    return gpt2_config(V, T, layers, width, heads, case.config.dropout)


class Memory(NamedTuple):
    """The memory of a process or a GPU in bytes, and the time of a step."""

    before: int
    """Before the first step, with the model and the batch."""
    peak: int
    """The peak during the steps."""
    seconds: float
    """The seconds of the last step."""


def measure_memory(case: TrainCase, form: str, *, update: bool = False) -> Memory:
    """Runs steps of a form, one of :data:`STEPS`, in a fresh process.

    Args:
        update: whether to run a single step with an update of the weights by AdamW, instead of two steps without.
    """
    # With a fork server, if there is one, that has already imported PyTorch, which takes seconds.
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, case, form, update).result()


def _measured(case: TrainCase, form: str, update: bool) -> Memory:
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    step = STEPS[form](case)
    optimizers = Optimizers(step.model, TrainSettings()).all if update else []
    device = torch.device(case.device)
    before = used_bytes(device)
    reset_peak(device)
    seconds = 0.0
    for _ in range(1 if update else 2):
        start = time.perf_counter()
        step()
        if update:
            torch.nn.utils.clip_grad_norm_(step.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        seconds = time.perf_counter() - start
    return Memory(before, peak_bytes(device) or before, seconds)


Clock = Callable[[], float]


def device_clock(device: str) -> Clock:
    """Returns a clock that first waits until the device has finished its work."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return now


def median_step(step: Callable[[], object], clock: Clock, rounds: int) -> tuple[float, dict[str, float]]:
    """Returns the seconds of the median step, and of its parts and the rest, which add up to it."""
    found = []
    for _ in range(rounds):
        with timed_parts(clock) as parts:
            start = clock()
            step()
            seconds = clock() - start
        found.append((seconds, {**parts, REST: seconds - sum(parts.values())}))
    return sorted(found, key=lambda each: each[0])[(rounds - 1) // 2]


@contextmanager
def timed_parts(clock: Clock) -> Iterator[dict[str, float]]:
    """Yields the seconds of each part. The functions that compute the parts are wrapped until the end of the block."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*arguments: Any, **others: Any) -> Any:
            start = clock()
            try:
                return call(*arguments, **others)
            finally:
                seconds[part] += clock() - start

        return run

    plain_neurons = train.make_neurons

    def make_neurons(*arguments: Any, **others: Any) -> Any:
        made = plain_neurons(*arguments, **others)
        for name, part in _METHODS.items():
            setattr(made, name, timed(getattr(made, name), part))
        return made

    functions: dict[str, Any] = {name: timed(getattr(train, name), part) for name, part in _FUNCTIONS.items()}
    with patch.multiple(train, **functions, make_neurons=make_neurons):
        yield seconds
