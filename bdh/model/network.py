"""A model for generation as plain PyTorch modules with a plain configuration, loaded without transformers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, Self, runtime_checkable

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn

from bdh.model.config_fields import ALIASES, ConfigFields, name_faults
from bdh.model.hook_points import HookPoints
from bdh.model.quantization import (
    Quantization,
    check_packed,
    check_quantization,
    empty_quantized,
    is_ours,
    plain_tensor,
)
from bdh.ops import QuantizedFormat

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
# In the order in which transformers looks for them. A sharded model has an index, which names each weight's file.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class QuantizedWeightsError(ValueError):
    """The weights are quantized by another library, so that only transformers can load them."""


@runtime_checkable
class ModelParts(Protocol):
    """The parts of a language model that generation uses: those of :class:`Network` and :class:`bdh.BDHForCausalLM`.

    Both are ``nn.Module``. The linear modules can be any callables of the same shape: quantized, with adapters, or with
    hooks.
    """

    embed: Any
    encoder: Any
    encoder_v: Any  # one module for each head
    decoder: Any
    lm_head: Any
    hook_points: Any  # HookPoints
    config: Any  # see ConfigFields; Any because a decorator gives transformers' configuration its fields
    generation_config: Any  # only eos_token_id is read
    training: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...


@strict
@dataclass(kw_only=True)
class ModelConfig(ConfigFields):
    """A model configuration that does not need transformers. :class:`bdh.BDHConfig` documents the fields.

    Raises:
        ValueError: sizes do not divide evenly, or a value is out of range.
        StrictDataclassError: a value has the wrong type.
    """

    name_or_path: str = ""
    quantization_config: dict[str, Any] | None = None
    """See :class:`bdh.model.quantization.Quantization`."""

    def __post_init__(self) -> None:
        if faults := self.value_faults():
            raise ValueError("; ".join(faults))

    def quantized_formats(self) -> dict[str, QuantizedFormat]:
        """Returns the format of each quantized module by name. Raises ``ValueError`` for an invalid quantization."""
        facts = self.quantization_config
        return {} if facts is None else Quantization.from_facts(facts).formats(self.n_head)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Self:
        """Returns the configuration for the content of a ``config.json``. Unknown names are ignored.

        Raises:
            ValueError: as the constructor, and if a field and its alias have different values, or a name looks like a
                misspelt field.
        """
        known = {each.name for each in fields(cls)}
        given = {name: value for name, value in facts.items() if name in known}
        others = {name: value for name, value in facts.items() if name not in known}
        unlike_token_ids = {name: value for name, value in others.items() if not name.endswith("token_id")}
        if faults := name_faults(given, unlike_token_ids, known):  # transformers has many fields for token ids
            raise ValueError("; ".join(faults))
        return cls(**{ALIASES[name]: value for name, value in others.items() if name in ALIASES} | given)


@contextmanager
def one_line_type_faults(where: str) -> Iterator[None]:
    """A context in which a field of the wrong type raises a one-line ``ValueError`` that begins with ``where``."""
    try:
        yield
    except StrictDataclassError as error:
        reason = str(error).splitlines()[-1].strip().removeprefix("TypeError: ").split(". Errors: ")[0]
        raise ValueError(f"{where}: {reason}") from error


@dataclass
class GenerationSettings:
    """The settings that are read from ``generation_config.json``."""

    eos_token_id: int | list[int] | None = None
    """The tokens that end a text."""


class Network(nn.Module):
    """A language model for the engine, which loads faster than :class:`bdh.BDHForCausalLM` and has no ``forward``.

    Its modules have the same names and weights as those of :class:`bdh.BDHForCausalLM`. It is in evaluation mode.

    Args:
        config: the configuration.
        weights: the parameters and buffers by name. The tensors are used without a copy; unknown names are ignored.
        name: the model's name, for error messages.
        generation_config: the generation settings; by default those that follow from ``config``.
        dtype: the dtype of the output of a quantized embedding.

    Raises:
        ValueError: weights are missing, damaged, or have other shapes than the configuration says.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        *,
        name: str = "the model",
        generation_config: GenerationSettings | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.config = config
        self.generation_config = generation_config or GenerationSettings(config.eos_token_id)
        V, D, H, N = config.vocab_size, config.n_embd, config.n_head, config.neurons_per_head
        shapes = {"embed": (V, D), "encoder": (H * N, D), "decoder": (D, H * N), "lm_head": (V, D)}
        shapes |= {f"encoder_v.{head}": (N, D) for head in range(H)}
        formats = config.quantized_formats()
        keys = {module: f"{module}.{'packed' if module in formats else 'weight'}" for module in shapes}
        if lacking := sorted(key for key in keys.values() if key not in weights):
            raise ValueError(f"the weights of {name} are not complete: it lacks {', '.join(lacking)}")
        given = {module: weights[key] for module, key in keys.items()}
        packed = {
            module: empty_quantized(module, shapes[module], each, dtype=dtype, device=given[module].device)
            for module, each in formats.items()
        }
        expected = shapes | {module: tuple(each.packed.shape) for module, each in packed.items()}
        if wrong := [
            f"{keys[module]} is {tuple(given[module].shape)}, not {shape}"
            for module, shape in sorted(expected.items())
            if given[module].shape != shape
        ]:
            raise ValueError(f"the weights of {name} do not have the shapes of its {CONFIG_FILE}: {'; '.join(wrong)}")
        for module, each in packed.items():
            each.packed = given[module]
        linear = {each: packed.get(each) or linear_of(given[each]) for each in shapes if each != "embed"}
        self.embed = packed.get("embed") or nn.Embedding.from_pretrained(given["embed"], freeze=False)
        self.encoder = linear["encoder"]
        self.encoder_v = nn.ModuleList(linear[f"encoder_v.{head}"] for head in range(H))
        self.decoder, self.lm_head = linear["decoder"], linear["lm_head"]
        self.hook_points = HookPoints()
        check_packed(self, name)
        self.eval()

    @property
    def device(self) -> torch.device:
        return plain_tensor(self).device

    @property
    def dtype(self) -> torch.dtype:
        return plain_tensor(self).dtype

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> Self:
        """Loads a model from a folder that ``save_pretrained`` wrote.

        The folder has a ``config.json``, and the weights in one or more files. They are converted to the ``dtype`` of
        the configuration; if it names none, they keep their stored dtype.

        Raises:
            FileNotFoundError: the folder contains no weights.
            ValueError: the folder contains no BDH model, or one that another library quantized; its configuration is
                invalid; or the weights are damaged, incomplete, or do not match the configuration.
        """
        folder = Path(folder)
        config, dtype = read_config(folder)
        config.name_or_path = str(folder)
        weights = _read_weights(folder)
        stored = next((each.dtype for each in weights.values() if each.is_floating_point()), torch.float32)
        dtype = dtype or stored
        weights = {
            key: each.to(device, each.dtype if key.endswith(".packed") else dtype, copy=True)
            for key, each in weights.items()
        }
        generation = _read_generation(folder, config)
        return cls(config, weights, name=str(folder), generation_config=generation, dtype=dtype)


def linear_of(weight: torch.Tensor) -> nn.Linear:
    """Returns a ``Linear`` without bias around an existing weight.

    The constructor alone would initialize a weight at random or, on the meta device, import TorchDynamo.
    """
    module = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(module)
    module.out_features, module.in_features = weight.shape
    module.weight = nn.Parameter(weight)
    module.register_parameter("bias", None)
    return module


@contextmanager
def inference(model: ModelParts) -> Iterator[None]:
    """A context with evaluation mode and without gradients. The model's earlier mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def choose_device(name: str) -> torch.device:
    """Returns the device for a name: auto, cpu, cuda, cuda:N or mps.

    Raises:
        ValueError: the device is not available.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.append("mps")
    if torch.cuda.is_available():
        available.extend(["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
    if name == "auto":
        return torch.device("cuda" if "cuda" in available else available[-1])
    if name not in available:
        raise ValueError(f"device is {name!r}: this machine and PyTorch build have {', '.join(available)}")
    return torch.device(name)


def exact_dtype(device: torch.device) -> torch.dtype:
    """Returns float64 or, on MPS, which has no float64, the widest dtype of the device."""
    return torch.float32 if device.type == "mps" else torch.float64


def read_config(folder: Path) -> tuple[ModelConfig, torch.dtype | None]:
    """Reads the configuration of the model in a folder, and the dtype that it names for the weights, if any.

    Raises:
        ValueError: the folder contains no BDH model, or its configuration is invalid.
        QuantizedWeightsError: another library quantized the weights.
    """
    wrong = f"the {CONFIG_FILE} of {folder} is wrong"
    try:
        facts = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{wrong}: it is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{wrong}: it holds {type(facts).__name__}, not an object")
    if facts.get("model_type") != "bdh" or not {"n_embd", "hidden_size"} & facts.keys():
        raise ValueError(f"{folder} is not a BDH model: its model_type is {facts.get('model_type')!r}")
    quantization = facts.get("quantization_config")
    if quantization is not None and not is_ours(quantization):
        raise QuantizedWeightsError(f"{folder} has weights quantized by another library, which only transformers reads")
    dtype = facts.get("dtype", facts.get("torch_dtype"))
    if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(f"{wrong}: module 'torch' has no attribute {str(dtype)!r}")
    check_quantization(quantization, wrong)
    with one_line_type_faults(wrong):
        return ModelConfig.from_facts(facts), None if dtype is None else getattr(torch, dtype)


def _read_generation(folder: Path, config: ModelConfig) -> GenerationSettings:
    path = folder / GENERATION_FILE
    if not path.is_file():
        return GenerationSettings(config.eos_token_id)
    try:
        return GenerationSettings(dict(json.loads(path.read_text(encoding="utf-8"))).get("eos_token_id"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return _read_files(folder, [name])
        if (index := folder / f"{name}.index.json").is_file():
            try:
                files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"the weights of {folder} are damaged: {index.name} has no weight_map") from error
            return _read_files(folder, sorted(set(files)))
    raise FileNotFoundError(f"{folder} holds no weights: it has none of {', '.join(_WEIGHT_FILES)}")


def _read_files(folder: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Reads the tensors of several files in a folder. Tensors of safetensors files are backed by the mapped file."""
    weights: dict[str, torch.Tensor] = {}
    for name in names:
        if not (path := folder / name).is_file():
            raise ValueError(f"the weights of {folder} are not complete: it lacks {name}")
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            else:
                weights |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except SafetensorError as error:
            raise ValueError(f"the weights of {folder} are cut off or damaged: {error}") from error
        except (UnpicklingError, RuntimeError, EOFError) as error:  # their messages are a page of advice
            raise ValueError(
                f"the weights of {folder} are damaged, or hold more than tensors: PyTorch refuses them"
            ) from error
    return weights
