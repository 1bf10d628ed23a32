"""Which sizes of a model fit together. Apart from its configuration, which is slow to import."""


def shape_faults(n_embd: int, n_head: int, n_layer: int, multiplier: int, vocab_size: int) -> list[str]:
    """What is wrong with the sizes of a model, one sentence a fault; empty where they fit together."""
    sizes = {
        "n_embd": n_embd,
        "n_head": n_head,
        "n_layer": n_layer,
        "mlp_internal_dim_multiplier": multiplier,
        "vocab_size": vocab_size,
    }
    faults = [f"{name} is {size}: must be at least 1" for name, size in sizes.items() if size < 1]
    if faults:
        return faults
    neurons = n_embd * multiplier
    if neurons % n_head:
        return [
            f"n_embd * mlp_internal_dim_multiplier = {n_embd} * {multiplier} = {neurons} neurons cannot be split "
            f"over n_head = {n_head} heads: {neurons} % {n_head} = {neurons % n_head}, must be 0"
        ]
    if neurons // n_head % 2:
        return [
            f"n_embd * mlp_internal_dim_multiplier / n_head = {n_embd} * {multiplier} / {n_head} = "
            f"{neurons // n_head} neurons in a head: must be even, since rotary positions turn pairs of neurons"
        ]
    return []
