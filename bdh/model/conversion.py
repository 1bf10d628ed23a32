"""Reads and writes checkpoints of the published reference code.

That code keeps raw parameters: ``encoder`` and ``encoder_v`` (H, D, N), ``decoder`` (H*N, D), ``lm_head``
(D, V), ``embed.weight`` (V, D), and a float32 buffer ``attn.freqs`` (1, 1, 1, N) of rotary frequencies in
turns per token. Here they are ``nn.Linear`` weights, which are stored output-major. Converting moves numbers
and changes none of them.
"""

import functools
import math
import re
from pathlib import Path
from typing import Any

import torch

from bdh.model.configuration import BDHConfig
from bdh.model.network import one_line_type_faults
from bdh.storage import check_file

WEIGHT_KEYS = ("embed.weight", "encoder", "encoder_v", "decoder", "lm_head")
FREQUENCY_KEY = "attn.freqs"
_WRAPPER_PREFIXES = ("_orig_mod.", "module.")
_CONFIG_FIELDS = (
    "n_layer",
    "n_embd",
    "n_head",
    "mlp_internal_dim_multiplier",
    "dropout",
    "vocab_size",
)


def load_reference(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Reads a published ``.pt`` file: a bare state dict, or a dict with ``model`` or ``model_state_dict``.

    Only tensors and plain containers are unpickled.

    Returns:
        The state dict, and the file's ``config`` where it holds one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or needs code to be unpickled.
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
    text = str(error).strip() or type(error).__name__
    # PyTorch puts the reason into a page of advice.
    reason = found[1] if (found := re.search(r"WeightsUnpickler error:\s*(.+)", text)) else text.splitlines()[0]
    return f"{path} is not a complete PyTorch checkpoint: {reason}"


def from_reference(
    state_dict: dict[str, torch.Tensor], config: BDHConfig | dict[str, Any] | None = None
) -> tuple[BDHConfig, dict[str, torch.Tensor], torch.dtype]:
    """The configuration, the weights by the names of :class:`bdh.BDHForCausalLM`, and the dtype that holds them all.

    Args:
        state_dict: keys may carry the prefixes that ``torch.compile`` and ``DistributedDataParallel`` add.
        config: a :class:`BDHConfig`, or a dict with its field names, of which the reference's are the first
            ones; others, such as settings of the training, are not read, but for its ``block_size``. The sizes that the tensors show may
            be left out; the number of layer steps, ``n_layer``, shows nowhere and may not.

    Raises:
        ValueError: tensors are missing, or unknown, or do not have the shapes of the configuration; or it has a value
            of a wrong type or out of range.
    """
    tensors = {_without_wrappers(str(key)): value for key, value in state_dict.items()}
    missing = [key for key in WEIGHT_KEYS if key not in tensors]
    unknown = sorted(set(tensors) - {*WEIGHT_KEYS, FREQUENCY_KEY})
    if missing or unknown:
        raise ValueError(
            f"not a BDH reference state dict: it lacks {missing or 'nothing'} and has the unknown "
            f"{unknown or 'nothing'}"
        )
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
    # Weights of several dtypes take the narrowest that holds them all, so that no number changes.
    dtype = functools.reduce(torch.promote_types, (tensors[key].dtype for key in WEIGHT_KEYS))
    return config, converted, dtype


def to_reference(config: BDHConfig, model: Any) -> dict[str, torch.Tensor]:
    """The weights of ``model`` under the reference's names and shapes, its ``attn.freqs`` buffer included.

    Raises:
        ValueError: the model's state decays, which that code cannot compute.
    """
    _check_no_decay(config)
    D, H, N = config.n_embd, config.n_head, config.neurons_per_head
    tensors = {
        "embed.weight": model.embed.weight,
        "encoder": model.encoder.weight.view(H, N, D).transpose(1, 2),
        "encoder_v": torch.stack(list(model.encoder_v.parameters())).transpose(1, 2),
        "decoder": model.decoder.weight.T,
        "lm_head": model.lm_head.weight.T,
        FREQUENCY_KEY: reference_frequencies(N, config.rope_theta),
    }
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def reference_config(config: BDHConfig) -> dict[str, Any]:
    """The fields of ``config`` that the reference code knows, as a plain dict; ``rope_theta`` if it is another.

    Raises:
        ValueError: the model's state decays, which that code cannot compute.
    """
    _check_no_decay(config)
    fields = {field: getattr(config, field) for field in _CONFIG_FIELDS}
    if config.rope_theta != BDHConfig.rope_theta:
        fields["rope_theta"] = config.rope_theta
    return fields


def reference_frequencies(num_neurons: int, theta: float) -> torch.Tensor:
    """The reference's buffer: float32 (1, 1, 1, N), both neurons of a pair with the same frequency.

    Computed in float32, step by step as that code does, so that files come out equal to the last bit.
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


def _without_wrappers(key: str) -> str:
    while key.startswith(_WRAPPER_PREFIXES):
        key = key.split(".", 1)[1]
    return key


def _complete_fields(tensors: dict[str, torch.Tensor], given: dict[str, Any]) -> dict[str, Any]:
    """The configuration's fields: what is given, and what the tensors show."""
    known = {*BDHConfig.__annotations__, *BDHConfig.attribute_map} - {"attribute_map"}
    fields = {BDHConfig.attribute_map.get(name, name): value for name, value in given.items() if name in known}
    if "n_layer" not in fields:
        raise ValueError(
            "the checkpoint has no configuration, and the number of layer steps, n_layer, does not show in the "
            "weights: give it (the reference's default is 6)"
        )
    if tensors["encoder"].ndim != 3:
        raise ValueError(f"encoder has shape {tuple(tensors['encoder'].shape)}: must be (heads, width, neurons)")
    H, D, N = tensors["encoder"].shape
    if H * N % D:
        raise ValueError(f"encoder is {(H, D, N)}: its {H} * {N} = {H * N} neurons are no multiple of its width {D}")
    if isinstance(given.get("block_size"), int):
        fields.setdefault("train_block_size", given["block_size"])
    fields.setdefault("n_head", H)
    fields.setdefault("n_embd", D)
    fields.setdefault("mlp_internal_dim_multiplier", H * N // D)
    fields.setdefault("vocab_size", tensors["embed.weight"].shape[0])
    return fields


def _check_shapes(tensors: dict[str, torch.Tensor], config: BDHConfig) -> None:
    D, H, N, V = config.n_embd, config.n_head, config.neurons_per_head, config.vocab_size
    expected = {
        "embed.weight": (V, D),
        "encoder": (H, D, N),
        "encoder_v": (H, D, N),
        "decoder": (H * N, D),
        "lm_head": (D, V),
    }
    faults = [
        f"{key} is {tuple(tensors[key].shape)}, not {shape}"
        for key, shape in expected.items()
        if tuple(tensors[key].shape) != shape
    ]
    if faults:
        raise ValueError("the tensors do not have the shapes of the configuration: " + "; ".join(faults))


def _check_frequencies(stored: torch.Tensor, config: BDHConfig) -> None:
    expected = reference_frequencies(config.neurons_per_head, config.rope_theta)
    if stored.numel() != expected.numel():
        raise ValueError(f"{FREQUENCY_KEY} has {stored.numel()} entries: the configuration needs {expected.numel()}")
    # float32 rounding differs between platforms by a few units in the last place, another theta by far more; and
    # files in half precision have the buffer rounded too, in float16 down to its smallest numbers.
    info = torch.finfo(stored.dtype) if stored.is_floating_point() else torch.finfo(torch.float32)
    rounding = max(1e-5, info.eps)
    smallest = info.smallest_normal * info.eps
    difference = (stored.flatten().double() - expected.flatten().double()).abs()
    error = ((difference - smallest).clamp_min(0) / expected.flatten().double()).max().item()
    if error > rounding:
        raise ValueError(
            f"{FREQUENCY_KEY} differs from the frequencies of rope_theta = {config.rope_theta:g} by up to "
            f"{error:.1e} of their value: the model was trained with other ones, and would not work with these"
        )
