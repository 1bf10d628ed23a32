"""bdh doctor: describes this installation on one screen, for users and for bug reports."""

import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bdh
from bdh.cli.settings import command
from bdh.extras import install_command
from bdh.validation import Settings

_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "huggingface_hub", "numba", "numpy")
EXTRAS = {
    "serve": ("bdh serve", ("fastapi", "uvicorn", "h11", "prometheus_client", "llguidance")),
    "monitor": ("TensorBoard, W&B, Trackio", ("tensorboard", "wandb", "trackio")),
    "finetune": ("LoRA", ("peft",)),
    "eval": ("bdh eval --tasks", ("lm_eval",)),
    "report": ("bdh plot", ("matplotlib",)),
    "quantize": ("models of torchao and bitsandbytes", ("torchao", "bitsandbytes")),
}
"""The purpose of each optional set of packages, and the modules that show whether it is installed."""
_GB, _GIB = 1e9, 2**30
_PROMPT_TOKENS, _NEW_TOKENS = 256, 64


@dataclass
class DoctorSettings(Settings):
    speed: bool = True
    """Time a small model. This compiles the kernels if necessary, which takes some seconds."""


@command()
def run_doctor(settings: DoctorSettings) -> int:
    """Show versions, devices, whether the kernels run, which optional packages are missing, and how fast this machine
    is.
    """
    failed = False
    for name, describe in LINES.items():
        if name == "speed" and not settings.speed:
            continue
        try:
            text = describe()
        except Exception as error:  # this command exists to find what is broken
            failed, text = True, f"FAILS: {type(error).__name__}: {str(error) or 'no reason is given'}".splitlines()[0]
        print(f"{name:<9}{text}", flush=True)
    for name, text in _extras():
        print(f"{name:<9}{text}", flush=True)
    return 1 if failed else 0


def _versions() -> str:
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    return f"bdh {bdh.__version__}, Python {platform.python_version()}, {system}"


def _packages() -> str:
    return ", ".join(f"{name} {_version(name) or 'MISSING'}" for name in _PACKAGES)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    import torch

    from bdh.bench.common import machine

    facts = machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{facts['cpu']}, {facts['cores']} cores, {torch.get_num_threads()} threads, {capability}"


def _memory() -> str:
    import psutil
    import torch

    from bdh.memory import available_bytes

    total = psutil.virtual_memory().total
    return f"{total / _GIB:.1f} GiB, {available_bytes(torch.device('cpu')) / _GIB:.1f} GiB for this process"


def _gpu() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        triton = "" if importlib.util.find_spec("triton") else "; Triton is missing, so nothing is compiled for it"
        return f"{', '.join(names)}, CUDA {torch.version.cuda}{triton}"
    if torch.backends.mps.is_available():
        return "Apple's, by MPS"
    built = torch.version.cuda
    return f"none that PyTorch can use ({f'built for CUDA {built}' if built else 'a build without CUDA'})"


def _kernels() -> str:
    from bdh.ops.cpu.runtime import unavailable_reason

    reason = unavailable_reason()
    return "the CPU's sparse kernels run" if reason is None else f"NONE: {reason}"


def _disk() -> str:
    from bdh.data.tokenized import cache_root

    folder = cache_root(None)
    parent = next(each for each in (folder, *folder.parents) if each.exists())
    writable = "" if os.access(parent, os.W_OK) else ", NOT WRITABLE: give another with $BDH_CACHE"
    return f"{shutil.disk_usage(parent).free / _GB:.1f} GB free for the token cache, {folder}{writable}"


def _speed() -> str:
    """Returns the speed of a synthetic model of the size of the configuration `small`.

    Its neurons fire as sparsely as those of trained models.
    """
    import torch

    from bdh.bench.common import sparse_model
    from bdh.generate.engine import Engine
    from bdh.generate.params import EngineConfig, SamplingParams
    from bdh.model.configuration import BDHConfig
    from bdh.tokenizer import byte_tokenizer

    config = BDHConfig(n_embd=128, n_head=4, n_layer=4, mlp_internal_dim_multiplier=32)
    model, tokenizer = sparse_model(config), byte_tokenizer()
    engine = Engine(model, tokenizer, config=EngineConfig(prefix_cache_bytes=0))
    params = SamplingParams(max_tokens=_NEW_TOKENS, temperature=0)
    prompt = torch.arange(_PROMPT_TOKENS).remainder(256).tolist()
    engine.generate([prompt], params)  # compiles the kernels
    read = _seconds(lambda: engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0)))
    both = _seconds(lambda: engine.generate([prompt], params))
    write = max(both - read, 1e-9)
    return (
        f"a model of {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters reads "
        f"{_PROMPT_TOKENS / read:,.0f} and writes {(_NEW_TOKENS - 1) / write:,.0f} tokens/s ({engine.advancer.description})"
    )


def _seconds(run: Callable[[], Any]) -> float:
    """Returns the shortest time of three runs, since other load on the machine can only increase it."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def _extras() -> Iterator[tuple[str, str]]:
    for extra, (purpose, modules) in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            yield extra, f"for {purpose}: {', '.join(missing)} missing: {install_command(extra)}"
        else:
            yield extra, f"for {purpose}: {', '.join(f'{name} {_version(name)}' for name in modules)}"


LINES: dict[str, Callable[[], str]] = {
    "bdh": _versions,
    "from": lambda: f"{Path(bdh.__file__).parent}, {sys.executable}",
    "packages": _packages,
    "CPU": _processor,
    "memory": _memory,
    "GPU": _gpu,
    "kernels": _kernels,
    "disk": _disk,
    "speed": _speed,
}
