"""Benchmarks of a model on this machine, compared with other implementations. This module has their options."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class BenchOptions:
    """How much a benchmark does. The defaults are for the 25M model; :meth:`quick` only checks that everything runs."""

    seed: int = 0
    agreement_tokens: int = 2000
    """Number of tokens over which all forms must agree before any is timed."""
    rounds: int = 5
    tokens_in_round: int = 16
    """Number of tokens that each fast form reads in each round. Slower forms read fewer."""
    context: int = 512
    """Number of tokens that are recomputed for each token, and that GPT-2 has in its cache."""
    contexts: tuple[int, ...] = (128, 512, 2048, 8192, 16384)
    """The context lengths at which single tokens are timed: ascending, and at least ``reads`` apart."""
    copy_bytes: int = 1 << 30
    prompt_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """The prompt lengths of the prefill. The naive form reads ``naive_prompt`` tokens."""
    naive_prompt: int = 4096
    prompt_rounds: int = 3
    engine_tokens: int = 64
    """Number of tokens that each request generates."""
    long_prompt: int = 20_000
    """Number of tokens in the prompt that is read while another request runs."""
    shared_prefix: int = 2000
    """Number of tokens that two prompts share at their beginning."""
    busy: int = 0
    """Number of busy programs that run while single tokens and a prompt are timed. If not 0, nothing else is timed."""
    busy_seconds: float = 2
    """Seconds for which a single token, or the prompt, is timed in a round."""

    @property
    def reads(self) -> int:
        """Number of tokens that a fast form reads while it is timed by turns with others, including the warm-up round."""
        return (self.rounds + 1) * self.tokens_in_round

    def quick(self) -> "BenchOptions":
        return replace(
            self,
            agreement_tokens=min(self.agreement_tokens, 100),
            rounds=2,
            tokens_in_round=4,
            context=32,
            contexts=(32, 64, 128, 256),
            copy_bytes=1 << 26,
            prompt_lengths=(64, 128, 256, 512),
            naive_prompt=256,
            prompt_rounds=2,
            engine_tokens=16,
            long_prompt=1000,
            shared_prefix=300,
            busy_seconds=0.1,
        )


QUICK_SIZES = {"n_embd": 64, "n_head": 2, "n_layer": 3, "mlp_internal_dim_multiplier": 32, "vocab_size": 256}
"""The sizes of the model in a quick benchmark."""
