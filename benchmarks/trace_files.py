"""Which files of bdh/ one training step and one streamed completion pass through: what a reader has to open to follow them.

    python benchmarks/trace_files.py

A training step is the one after the first, from update to update; a completion the second that a server of the real command
streams, from its request to its end. Every Python function that is called counts, in any thread.
"""

import os
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import bdh
from bdh import BDHConfig, BDHForCausalLM
from bdh.cli.main import main as run_command
from bdh.tokenizer import byte_tokenizer

PACKAGE = str(Path(bdh.__file__).parent) + os.sep
_SIZES = {"n_embd": 16, "n_head": 2, "n_layer": 2, "mlp_internal_dim_multiplier": 8}


class Trace:
    """The files of the package whose functions are called while ``is_on``."""

    def __init__(self) -> None:
        self.is_on = False
        self.files: set[str] = set()
        threading.settrace(self)
        sys.settrace(self)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.is_on and frame.f_code.co_filename.startswith(PACKAGE):
            self.files.add(frame.f_code.co_filename.removeprefix(PACKAGE))

    def lines(self, title: str) -> str:
        return "\n  ".join([f"{title}: {len(self.files)} files", *sorted(self.files)])


def trace_training(folder: Path) -> Trace:
    trace = Trace()
    updates = 0

    def updated(*arguments: Any) -> None:
        nonlocal updates
        updates += 1
        trace.is_on = updates == 2  # from the second update to the third

    hook = register_optimizer_step_post_hook(updated)
    settings = {f"model.{name}": value for name, value in _SIZES.items()}
    settings |= {"data.source": folder / "text.txt", "run_dir": folder / "run", "train.max_steps": 6}
    settings |= {"train.block_size": 32, "train.batch_size": 2, "train.warmup_steps": 1, "train.eval_every_steps": 6}
    settings |= {"train.sample_every_steps": 0, "monitor.log_every_steps": 6, "monitor.backends": "jsonl"}
    settings |= {"checkpoint.every_steps": 6, "checkpoint.export": "none"}
    status = run_command(["train", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))])
    hook.remove()
    if status != 0 or updates != 6:
        raise RuntimeError(f"bdh train ended with status {status} after {updates} updates")
    return trace


def trace_completion(folder: Path) -> Trace:
    torch.manual_seed(0)
    BDHForCausalLM(BDHConfig(**_SIZES)).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{(port := taken.getsockname()[1])}"
    trace = Trace()
    faults = []

    def stream() -> int:
        body = b'{"prompt": "The ", "max_tokens": 8, "stream": true}'
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/completions", body, headers)) as answer:
            return answer.read().count(b"data: ")

    def ask() -> None:
        try:
            while True:
                try:
                    urllib.request.urlopen(f"{address}/health/ready").close()
                    break
                except urllib.error.URLError:
                    time.sleep(0.05)
            stream()
            trace.is_on = True
            if stream() < 2:
                raise RuntimeError("the stream had no text")
        except BaseException as error:
            faults.append(error)
        finally:
            trace.is_on = False
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    status = run_command(["serve", str(folder / "model"), "--port", str(port)])
    if faults:
        raise faults[0]
    print(f"bdh serve ended with status {status}", file=sys.stderr)
    return trace


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
        os.environ.setdefault("BDH_CACHE", str(folder / "cache"))
        training = trace_training(folder)
        sys.settrace(None)
        completion = trace_completion(folder)
        sys.settrace(None)
    print(training.lines("one training step"))
    print(completion.lines("one streamed completion"))


if __name__ == "__main__":
    main()
