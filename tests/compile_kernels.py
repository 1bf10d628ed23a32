"""Compiles the CPU kernels once, before several test processes would do so at the same time: python -m tests.compile_kernels"""

import torch

from bdh.generate.advance import Advancer, StepInput
from bdh.ops.cpu.train import compile_kernels
from tests.networks import random_network


def main() -> None:
    compile_kernels()
    network = random_network(vocab_size=8, n_embd=16, n_head=2, n_layer=1, mlp_internal_dim_multiplier=8)
    variants = [
        {"weights": weights, "state": state} for weights in ("float32", "bfloat16") for state in ("float32", "bfloat16")
    ]
    for variant in [*variants, {"window": 4}, {"window": 4, "weights": "bfloat16"}]:
        advancer = Advancer(network, path="kernels", **variant)
        advancer.advance([StepInput(advancer.new_state(), [1, 2, 3])])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
