"""Compiles the CPU kernels once, before several test processes would do so at the same time: python -m tests.compile_kernels

Two processes share the work. What they compile is kept in one cache, in which numba bears one writer of a function's at a
time.
"""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from numba.core.caching import Cache

from bdh.generate.advance import Advancer, StepInput
from bdh.ops.cpu.train import compile_kernels
from tests.networks import random_network

SHARES = [
    [{}, {"state": "bfloat16"}, {"window": 4}],
    ["train", {"weights": "bfloat16"}, {"weights": "bfloat16", "state": "bfloat16"}, {"window": 4, "weights": "bfloat16"}],
]  # fmt: skip
"""Of each process, about as long: the kernels of the training, or the settings of an :class:`Advancer`."""


def compile_share(lock: Path, share: list) -> None:
    save = Cache.save_overload

    def save_alone(self, *arguments):
        with FileLock(lock):
            save(self, *arguments)

    Cache.save_overload = save_alone
    torch.set_num_threads(1)
    network = random_network(vocab_size=8, n_embd=16, n_head=2, n_layer=1, mlp_internal_dim_multiplier=8)
    for each in share:
        if each == "train":
            compile_kernels()
        else:
            advancer = Advancer(network, path="kernels", **each)
            advancer.advance([StepInput(advancer.new_state(), [1, 2, 3])])


def main() -> None:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(len(SHARES), context) as pool:
        list(pool.map(partial(compile_share, Path(folder, "lock")), SHARES))


if __name__ == "__main__":
    main()
