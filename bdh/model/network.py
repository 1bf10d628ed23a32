"""A model as plain PyTorch modules and a plain configuration: what generation works on, without transformers."""

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
# In the order in which transformers looks for them; the index of a model in several files names each weight's file.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class QuantizedWeightsError(ValueError):
    """A model's weights are in a format of another library, which a quantizer of transformers reads."""


@runtime_checkable
class ModelParts(Protocol):
    """A language model, as far as generation has to know it: :class:`Network`, and :class:`bdh.BDHForCausalLM`.

    Both are ``nn.Module``. The linear modules may be anything callable that has their shape: quantized, with adapters,
    with hooks.
    """

    embed: Any
    encoder: Any
    encoder_v: Any  # one module for each head
    decoder: Any
    lm_head: Any
    hook_points: Any  # HookPoints
    config: Any  # see ConfigFields; Any, since that of transformers has its fields from a decorator
    generation_config: Any  # of which eos_token_id is read
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
    """A configuration without transformers.

    Raises:
        ValueError: sizes that do not divide, or a value out of range.
        StrictDataclassError: a value of another type.
    """

    name_or_path: str = ""
    quantization_config: dict[str, Any] | None = None
    """See :class:`bdh.model.quantization.Quantization`."""

    def __post_init__(self) -> None:
        if faults := self.value_faults():
            raise ValueError("; ".join(faults))

    def quantized_formats(self) -> dict[str, QuantizedFormat]:
        """The quantized modules of the model by their names. Raises ``ValueError`` where that cannot be read."""
        facts = self.quantization_config
        return {} if facts is None else Quantization.from_facts(facts).formats(self.n_head)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Self:
        """From what ``config.json`` holds; names that mean nothing to this class are left aside.

        Raises:
            ValueError: as the constructor; or a name beside its alias with another value, or a misspelt name.
        """
        known = {each.name for each in fields(cls)}
        given = {name: value for name, value in facts.items() if name in known}
        others = {name: value for name, value in facts.items() if name not in known}
        unlike_token_ids = {name: value for name, value in others.items() if not name.endswith("token_id")}
        if faults := name_faults(given, unlike_token_ids, known):  # transformers has many token ids
            raise ValueError("; ".join(faults))
        return cls(**{ALIASES[name]: value for name, value in others.items() if name in ALIASES} | given)


@contextmanager
def one_line_type_faults(where: str) -> Iterator[None]:
    """Within it, a field of a wrong type is a ``ValueError`` of one line; ``where`` says whose configuration it is."""
    try:
        yield
    except StrictDataclassError as error:
        reason = str(error).splitlines()[-1].strip().removeprefix("TypeError: ").split(". Errors: ")[0]
        raise ValueError(f"{where}: {reason}") from error


@dataclass
class GenerationSettings:
    """What is read of ``generation_config.json``."""

    eos_token_id: int | list[int] | None = None
    """The tokens that end a text."""


class Network(nn.Module):
    """The modules of :class:`bdh.BDHForCausalLM` under the same names, without its ``forward``, for generation,
    in evaluation mode.

    Args:
        weights: by the names of the parameters, and of what quantized modules hold, which become these tensors themselves; others
            are left aside.
        name: of the model, for messages.
        generation_config: that of its folder; by default what the configuration says.
        dtype: what an embedding in a quantized format gives.

    Raises:
        ValueError: weights are missing, or of other shapes than the configuration says; or quantized ones are damaged.
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
        """Reads what ``save_pretrained`` wrote: ``config.json``, and the weights in one file or several.

        The weights have the ``dtype`` of the configuration; where it names none, that in which they are stored.

        Raises:
            FileNotFoundError: the folder holds no weights.
            ValueError: it is no BDH model, or one quantized by another library; its configuration is wrong; or the weights are
                damaged, not complete, or not those of the configuration.
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
    """Around a weight that is there: the constructor would fill one with random numbers, and on meta load TorchDynamo."""
    module = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(module)
    module.out_features, module.in_features = weight.shape
    module.weight = nn.Parameter(weight)
    module.register_parameter("bias", None)
    return module


@contextmanager
def inference(model: ModelParts) -> Iterator[None]:
    """Evaluation mode without gradients; the mode before comes back at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def choose_device(name: str) -> torch.device:
    """The device of a name: auto, cpu, cuda, cuda:N or mps.

    Raises:
        ValueError: it is not there.
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
    """Float64, or the widest that a device has: MPS has no float64, and raises where one is asked for."""
    return torch.float32 if device.type == "mps" else torch.float64


def read_config(folder: Path) -> tuple[ModelConfig, torch.dtype | None]:
    """The configuration of a folder's model, and the dtype that it names for the weights.

    Raises:
        ValueError: it is no BDH model, or its configuration is wrong.
        QuantizedWeightsError: the weights are in a format of another library.
    """
    wrong = f"the {CONFIG_FILE} of {folder} is wrong"
    try:
        facts = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{wrong}: it is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{wrong}: it holds {type(facts).__name__}, not an object")
    if facts.get("model_type") != "bdh" or not {"n_embd", "hidden_size"} & facts.keys():
        raise ValueError(f"{folder} is no BDH model: its model_type is {facts.get('model_type')!r}")
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
        raise ValueError(f"{path} is no object of JSON: {error}") from error


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
    """The tensors of files in a folder; those of safetensors lie in the mapped file."""
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
        except (UnpicklingError, RuntimeError, EOFError) as error:  # whose text is a page of advice
            raise ValueError(
                f"the weights of {folder} are damaged, or hold more than tensors: PyTorch refuses them"
            ) from error
    return weights
