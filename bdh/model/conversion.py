"""Conversion of weights: from and to checkpoints of the published reference code, averages of models, and ONNX export.

The reference code stores raw parameters: ``encoder`` and ``encoder_v`` (H, D, N), ``decoder`` (H*N, D), ``lm_head``
(D, V), ``embed.weight`` (V, D), and a float32 buffer ``attn.freqs`` (1, 1, 1, N) of rotary frequencies in turns per
token. This package stores them as weights of ``nn.Linear``, output-major. Conversion does not change any value.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from bdh.model.config_fields import ALIASES, ConfigFields
from bdh.model.configuration import BDHConfig
from bdh.model.network import one_line_type_faults
from bdh.model.quantization import check_not_quantized
from bdh.model.state import SynapticState
from bdh.storage import atomic_file, check_file, sync
from bdh.words import counted

WEIGHT_KEYS = ("embed.weight", "encoder", "encoder_v", "decoder", "lm_head")
FREQUENCY_KEY = "attn.freqs"
_WRAPPERS = re.compile(r"^((_orig_mod|module)\.)+")
_CONFIG_FIELDS = ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "dropout", "vocab_size")


def load_reference(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Loads a checkpoint of the published reference code from a ``.pt`` file.

    The file holds a state dict, or a dict with one under ``model`` or ``model_state_dict``. Only tensors and plain
    containers are unpickled, so that loading a file runs no code from it.

    Returns:
        The state dict, and the file's ``config``, or None if it has none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, or cannot be unpickled without running code.
    """
    check_file(Path(path), "checkpoint file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # garbage makes the unpickler raise nearly anything
        raise ValueError(_why_not_loaded(path, error)) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: must be a state dict")
    config = content.get("config")
    for key in ("model", "model_state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    if not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} has no tensors under {sorted(map(str, content))}: must be a state dict")
    return content, config if isinstance(config, dict) else None


def _why_not_loaded(path: str | Path, error: Exception) -> str:
    if unsafe := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"{path} asks for the Python object {unsafe[1]}, which is not loaded since it could run code: save its "
            f"state dict again, with the configuration as a plain dict"
        )
    # PyTorch's message is about its unpickler. It remains visible as the cause of the exception.
    return (
        f"{path} is not a complete PyTorch checkpoint: must be a .pt file that torch.save wrote, with a state dict in it, "
        "neither cut off nor damaged"
    )


def from_reference(
    state_dict: dict[str, torch.Tensor], config: BDHConfig | dict[str, Any] | None = None
) -> tuple[BDHConfig, dict[str, torch.Tensor], torch.dtype]:
    """Converts a state dict of the published reference code for :class:`bdh.BDHForCausalLM`.

    Args:
        state_dict: the keys can have the prefixes that ``torch.compile`` and ``DistributedDataParallel`` add.
        config: a :class:`BDHConfig`, or a dict with its field names. ``n_layer`` is required, because the weights do
            not show the number of layer steps; sizes that follow from the tensors can be omitted. In a dict,
            ``block_size`` is read as ``train_block_size``, and other names, such as training settings, are ignored.

    Returns:
        The configuration, the weights by the names of :class:`bdh.BDHForCausalLM`, and the narrowest dtype that holds
        all of them exactly.

    Raises:
        ValueError: tensors are missing, unknown or of other shapes than the configuration says, or the configuration
            has a value of a wrong type or out of range.
    """
    tensors = {_WRAPPERS.sub("", str(key)): value for key, value in state_dict.items()}
    missing = [key for key in WEIGHT_KEYS if key not in tensors]
    unknown = sorted(set(tensors) - {*WEIGHT_KEYS, FREQUENCY_KEY})
    if missing or unknown:
        lacks, has = missing or "nothing", unknown or "nothing"
        raise ValueError(f"not a BDH reference state dict: it lacks {lacks} and has the unknown {has}")
    if len(tensors) < len(state_dict):
        raise ValueError(f"the state dict has a weight twice, under different prefixes: {sorted(map(str, state_dict))}")
    if not isinstance(config, BDHConfig):
        fields = _complete_fields(tensors, config or {})
        with one_line_type_faults("the checkpoint's configuration is wrong"):
            config = BDHConfig(**fields)
    _check_shapes(tensors, config)
    if FREQUENCY_KEY in tensors:
        _check_frequencies(tensors[FREQUENCY_KEY], config)

    H, D, N = tensors["encoder"].shape
    converted = {
        "embed.weight": tensors["embed.weight"],
        "encoder.weight": tensors["encoder"].transpose(1, 2).reshape(H * N, D),
        **{f"encoder_v.{h}.weight": tensors["encoder_v"][h].T for h in range(H)},
        "decoder.weight": tensors["decoder"].T,
        "lm_head.weight": tensors["lm_head"].T,
    }
    # The narrowest dtype that holds all weights, so that no value changes.
    dtype = functools.reduce(torch.promote_types, (tensors[key].dtype for key in WEIGHT_KEYS))
    return config, converted, dtype


def to_reference(config: BDHConfig, model: Any) -> dict[str, torch.Tensor]:
    """Returns the weights of ``model`` with the names and shapes of the reference code, including ``attn.freqs``.

    Raises:
        ValueError: the model's state decays, which the reference code cannot compute, or another library quantized the
            weights.
    """
    _check_no_decay(config)
    name, reason = config.name_or_path or "the model", "convert the unquantized model"
    check_not_quantized(model, name, reason, allow_ours=True)
    D, H, N = config.n_embd, config.n_head, config.neurons_per_head
    tensors = {
        "embed.weight": model.embed.weight,
        "encoder": model.encoder.weight.view(H, N, D).transpose(1, 2),
        "encoder_v": torch.stack([head.weight for head in model.encoder_v]).transpose(1, 2),
        "decoder": model.decoder.weight.T,
        "lm_head": model.lm_head.weight.T,
        FREQUENCY_KEY: reference_frequencies(N, config.rope_theta),
    }
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def reference_config(config: BDHConfig) -> dict[str, Any]:
    """Returns the fields of ``config`` that the reference code has, as a dict; ``rope_theta`` only if not the default.

    Raises:
        ValueError: the model's state decays, which the reference code cannot compute.
    """
    _check_no_decay(config)
    fields = {field: getattr(config, field) for field in _CONFIG_FIELDS}
    if config.rope_theta != BDHConfig.rope_theta:
        fields["rope_theta"] = config.rope_theta
    return fields


def reference_frequencies(num_neurons: int, theta: float) -> torch.Tensor:
    """Returns the reference code's buffer ``attn.freqs``: float32 (1, 1, 1, N), equal for both neurons of a pair.

    It is computed in float32 with the same operations as there, so that converted files are bit-identical.
    """
    pair = torch.floor(torch.arange(0, num_neurons, 1, dtype=torch.float32) / 2) * 2
    frequencies = 1.0 / (theta ** (pair / num_neurons)) / (2 * math.pi)
    return frequencies.view(1, 1, 1, num_neurons)


def _check_no_decay(config: BDHConfig) -> None:
    if config.decay is not None:
        raise ValueError(
            f"decay is {config.decay}: the reference code has no decay of the state, and would compute other logits "
            "with these weights; only a model with decay None can be written in its layout"
        )


def _complete_fields(tensors: dict[str, torch.Tensor], given: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of the configuration: those given, and the sizes that follow from the tensors."""
    known = {*ConfigFields.__annotations__, *ALIASES}
    fields = {ALIASES.get(name, name): value for name, value in given.items() if name in known}
    if "n_layer" not in fields:
        raise ValueError(
            "the checkpoint has no configuration, and the number of layer steps, n_layer, cannot be read from "
            "the weights: give it (the reference's default is 6)"
        )
    if tensors["encoder"].ndim != 3:
        raise ValueError(f"encoder has shape {tuple(tensors['encoder'].shape)}: must be (heads, width, neurons)")
    H, D, N = tensors["encoder"].shape
    if H * N % D:
        raise ValueError(f"encoder is {(H, D, N)}: its {H} * {N} = {H * N} neurons are not a multiple of its width {D}")
    if isinstance(given.get("block_size"), int):
        fields.setdefault("train_block_size", given["block_size"])
    fields.setdefault("n_head", H)
    fields.setdefault("n_embd", D)
    fields.setdefault("mlp_internal_dim_multiplier", H * N // D)
    fields.setdefault("vocab_size", tensors["embed.weight"].shape[0])
    return fields


def _check_shapes(tensors: dict[str, torch.Tensor], config: BDHConfig) -> None:
    D, H, N, V = config.n_embd, config.n_head, config.neurons_per_head, config.vocab_size
    expected = dict(zip(WEIGHT_KEYS, ((V, D), (H, D, N), (H, D, N), (H * N, D), (D, V)), strict=True))
    found = {key: tuple(tensors[key].shape) for key in expected}
    if faults := [f"{key} is {found[key]}, not {shape}" for key, shape in expected.items() if found[key] != shape]:
        raise ValueError("the tensors do not have the shapes of the configuration: " + "; ".join(faults))


def _check_frequencies(stored: torch.Tensor, config: BDHConfig) -> None:
    expected = reference_frequencies(config.neurons_per_head, config.rope_theta)
    if stored.numel() != expected.numel():
        raise ValueError(
            f"{FREQUENCY_KEY} has {counted(stored.numel(), 'entry', 'entries')}: the configuration needs {expected.numel()}"
        )
    # float32 rounding differs between platforms by a few units in the last place; another theta differs by far more.
    # In files in half precision the buffer is rounded too, in float16 down to subnormal numbers.
    info = torch.finfo(stored.dtype if stored.is_floating_point() else torch.float32)
    wanted = expected.flatten().double()
    difference = (stored.flatten().double() - wanted).abs() - info.smallest_normal * info.eps
    error = (difference.clamp_min(0) / wanted).max().item()
    if error > max(1e-5, info.eps):
        raise ValueError(
            f"{FREQUENCY_KEY} differs from the frequencies of rope_theta = {config.rope_theta:g} by up to "
            f"{error:.1e} of their value: the model was trained with different frequencies, and would not work with "
            "these"
        )


# Averages.

Weights = Mapping[str, torch.Tensor]


def average_weights(models: Iterable[Weights], shares: Sequence[float] | None = None) -> dict[str, torch.Tensor]:
    """Returns the weighted mean of the weights of several models of the same shape.

    Args:
        models: the state dicts; an iterator is consumed one model at a time.
        shares: the weight of each model in the mean, normalized to sum to 1. None for equal shares.

    Returns:
        A state dict with the dtypes of the first model. The sums are computed in float64.

    Raises:
        ValueError: there are no models, the number of shares differs from that of models, a share is negative or all
            are 0, the names or shapes of weights differ between models, or weights are quantized.
    """
    if shares is not None and (not all(share >= 0 for share in shares) or not sum(shares) > 0):
        raise ValueError(f"the shares are {list(shares)}: none may be negative, and their sum must be above 0")
    first: dict[str, torch.dtype] = {}
    total: dict[str, torch.Tensor] = {}
    number = 0
    for number, weights in enumerate(models, start=1):
        if shares is not None and number > len(shares):
            raise ValueError(f"there are more models than the {counted(len(shares), 'share')}: give one share a model")
        if quantized := sorted(name for name, weight in weights.items() if not _is_plain(weight)):
            raise ValueError(
                f"model {number} has quantized weights, which cannot be averaged: {', '.join(quantized)}. Average the "
                "unquantized models"
            )
        if number == 1:
            first = {name: weight.dtype for name, weight in weights.items()}
            total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
        ours, theirs = ({(name, weight.shape) for name, weight in each.items()} for each in (total, weights))
        if differing := sorted({name for name, _ in ours ^ theirs}):
            raise ValueError(
                f"the weights of model {number} differ in name or shape from those of model 1, so they cannot be "
                f"averaged: {', '.join(differing)}"
            )
        for name, weight in weights.items():
            total[name] += (1.0 if shares is None else shares[number - 1]) * weight.double()
    if number == 0:
        raise ValueError("there are no models to average: give at least one")
    if shares is not None and number < len(shares):
        raise ValueError(
            f"{counted(number, 'model has', 'models have')} {counted(len(shares), 'share')}: give one share a model"
        )
    divisor = float(number) if shares is None else sum(shares)
    return {name: (weight / divisor).to(first[name]) for name, weight in total.items()}


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether a tensor holds the weights themselves, and not codes as ours or a tensor subclass as torchao's."""
    return weight.is_floating_point() and type(weight.detach()) is torch.Tensor


def cosine_similarity(first: Weights, second: Weights) -> float:
    """Returns the cosine similarity of two models of the same shape, each as one vector of all weights, in float64."""

    def product(a: Weights, b: Weights) -> float:
        return sum((weight.double() * b[name].double()).sum().item() for name, weight in a.items())

    return product(first, second) / math.sqrt(product(first, first) * product(second, second))


class MovingAverage:
    """An exponential moving average of a model's weights (Polyak averaging).

    After step t (counted from 1) the average becomes ``d * average + (1 - d) * weights``, where d is the smaller of
    ``decay`` and (1 + t) / (10 + t), so that the weights of the first steps lose their influence soon. Frozen weights
    are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in _trained(model)}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, *, unless: torch.Tensor | None = None) -> None:
        """Updates the average with the weights after a step.

        Args:
            model: the model.
            step: the number of the step, from 1.
            unless: bool (): if True, the average stays unchanged. Reading it does not synchronize with a GPU.
        """
        share: float | torch.Tensor = 1 - min(self._decay, (1 + step) / (10 + step))
        if unless is not None and unless.device.type == "cpu":
            if unless:
                return
        elif unless is not None:
            share = torch.where(unless, 0.0, share)
        for name, weight in _trained(model):
            average = self.weights[name]
            average.lerp_(weight, share if isinstance(share, float) else share.to(average.dtype))

    @contextmanager
    def in_place_of_weights(self, model: nn.Module) -> Iterator[None]:
        """A context in which the model has the averaged weights."""
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchanges the model's weights and the average. A second call restores both exactly."""
        for name, weight in _trained(model):
            kept = weight.clone()
            weight.copy_(self.weights[name])
            self.weights[name].copy_(kept)

    def load(self, weights: Weights) -> None:
        """Restores a saved average."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


# ONNX.


class _Reading(nn.Module):
    """Wraps the model for export, with its state as two tensors."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, positions: torch.Tensor, sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        state = SynapticState(list(sums.unbind(0)), positions, 0)
        output = self.model(input_ids, attention_mask=attention_mask, cache=state)
        return output.logits, state.positions, torch.stack(state.sums)


def export_onnx(model: Any, path: str | Path) -> None:
    """Exports a :class:`bdh.BDHForCausalLM` to ONNX, with its state as input and output.

    The number of sequences B and of tokens T are dynamic.

    ==============  =========================  ============================================================
    input           type and shape             meaning
    ==============  =========================  ============================================================
    input_ids       int64 (B, T)               the next tokens: a prompt, or one token for each sequence
    attention_mask  int64 (B, T)               0 marks padding
    positions       int64 (B,)                 the number of tokens read before; 0 starts a text
    sums            float32 (L, B, H, N, D)    the state; zeros start a text
    ==============  =========================  ============================================================

    The outputs are logits (B, T, V), new_positions and new_sums. Pass the last two as inputs of the next call. A call
    computes all T x T scores at once, so read a long text in chunks of a few hundred tokens. The exported model
    computes in float32, in evaluation mode.

    PyTorch writes weights of more than 1.5 GiB to a separate file, ``model.onnx.data`` beside ``model.onnx``. Keep the
    two files together, under these names.

    Args:
        model: the model, in float32.
        path: the ``.onnx`` file to write.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the model is quantized or not in float32.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"the model is in {model.dtype}: must be in float32 to be written as ONNX")
    check_not_quantized(model, "the model", "what model.dequantize() gives can be written as ONNX")
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    state = model.new_state(2)
    ids = torch.zeros(2, 3, dtype=torch.int64, device=model.device)
    was_training = model.training
    try:
        program = torch.onnx.export(
            _Reading(model).eval(),
            (ids, torch.ones_like(ids), state.positions, torch.stack(state.sums)),
            dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: tokens}, {0: batch}, {1: batch}),
            input_names=["input_ids", "attention_mask", "positions", "sums"],
            output_names=["logits", "new_positions", "new_sums"],
            dynamo=True,
            verbose=False,
        )
    finally:
        model.train(was_training)
    assert program is not None
    path = Path(path)
    # The model refers to the data file by name, so both are written under their final names in a temporary folder.
    with atomic_file(path) as temporary, TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        written, data = Path(folder, path.name), Path(folder, f"{path.name}.data")
        program.save(str(written))
        if data.exists():
            sync(data)
            data.replace(path.with_name(data.name))
        written.replace(temporary)
