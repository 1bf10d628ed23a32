"""A model without transformers, for the programs that tests start."""

import torch

from bdh.model.network import ModelConfig, Network


def random_network(**sizes) -> Network:
    config = ModelConfig(**sizes)
    V, D, H, N = config.vocab_size, config.n_embd, config.n_head, config.neurons_per_head
    shapes = {"embed": (V, D), "encoder": (H * N, D), "decoder": (D, H * N), "lm_head": (V, D)}
    shapes |= {f"encoder_v.{head}": (N, D) for head in range(H)}
    generator = torch.Generator().manual_seed(0)
    return Network(
        config, {f"{name}.weight": 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    )
