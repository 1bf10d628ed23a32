"""The names under which training logs its measurements, as listed in the reference. Tests compare them with runs."""

import re
from typing import NamedTuple

PLACEHOLDERS = {
    "KIND": "x|y|xy",
    "LAYER": r"\d+",
    "METRIC": "loss|perplexity|bits_per_byte|accuracy",
    "NUMBER": r"\d+",
    "POSITION": r"\d+",
    "SOURCE": ".+",
    "WEIGHT": r"[\w.]+",
}
"""The patterns that the words in capitals stand for."""


class Logged(NamedTuple):
    """A logged value, or a family of values whose names differ in the words in capitals."""

    name: str
    unit: str
    about: str

    def stands_for(self, name: str) -> bool:
        pattern = re.sub("[A-Z]+", lambda word: f"({PLACEHOLDERS[word[0]]})", re.escape(self.name))
        return re.fullmatch(pattern, name) is not None


STEPS = (
    Logged("train/loss", "nats per token", "Loss of this step."),
    Logged("train/learning_rate", "", "Learning rate of this step."),
    Logged("train/grad_norm", "", "L2 norm of all gradients together, before clipping."),
    Logged("train/grad_norm/WEIGHT", "", "L2 norm of the gradient of one weight."),
    Logged("train/tokens", "tokens", "Tokens read so far."),
    Logged("train/skipped_steps", "steps", "Steps so far that left the weights as they were (`train.on_nonfinite`)."),
    Logged(
        "train/tokens_per_second",
        "tokens/s",
        "Speed over about the last twenty steps, without evaluations, samples and checkpoints.",
    ),
    Logged("train/step_seconds", "s", "Time of a step, on average since the last logged step."),
    Logged("train/data_seconds", "s", "Time of a step spent waiting for data, on average since the last logged step."),
    Logged("train/mfu", "share", "Model FLOP utilisation: operations per second, of those of a large matrix product."),
    Logged(
        "train/peak_memory_bytes",
        "bytes",
        "Most memory used so far: by tensors on a GPU, otherwise by the whole process.",
    ),
)
"""Logged every ``monitor.log_every_steps`` steps."""

EVALUATIONS = (
    Logged("val/loss", "nats per token", "Mean cross-entropy on the validation windows."),
    Logged("val/perplexity", "", "e to the power of `val/loss`."),
    Logged("val/bits_per_byte", "bits per byte", "Loss for each byte of text: comparable between tokenizers."),
    Logged("val/accuracy", "share", "Share of the tokens that were the likeliest prediction."),
    Logged(
        "val/loss_at/POSITION",
        "nats per token",
        "Loss by position: `loss_at/8` is the mean of the predictions made from 8 to 15 tokens; 1, 2, 4, 8, ...",
    ),
    Logged("val/SOURCE/METRIC", "", "Loss, perplexity, bits per byte and accuracy on one source of `data.mix`."),
    Logged("val_ema/METRIC", "", "The same four of the moving average of the weights (`train.ema_decay`)."),
    Logged("val/density/KIND/LAYER", "share", "Share of the neurons above 0 for a token, in one layer step."),
    Logged("val/norm/KIND/LAYER", "", "Mean L2 norm of a token's activations, in one layer step."),
    Logged("val/dead_neurons", "share", "Share of the neurons whose x was 0 on every token, in every layer step."),
    Logged("weights/norm/WEIGHT", "", "L2 norm of one weight."),
)
"""Logged every ``train.eval_every_steps`` steps."""
BEST_METRICS = tuple(each for each in EVALUATIONS if each.name.startswith("val") and "SOURCE" not in each.name)
"""The values that ``checkpoint.best_metric`` can name."""

HISTOGRAMS = (
    Logged("weights/WEIGHT", "", "The values of one weight."),
    Logged("val/KIND/LAYER", "", "The activations above 0 in one layer step."),
)
"""Distributions for TensorBoard, W&B and Trackio, logged every ``train.eval_every_steps`` steps."""

TEXTS = (Logged("samples/NUMBER", "", "A prompt and the text that continues it; also in `samples.jsonl`."),)
"""Logged every ``train.sample_every_steps`` steps."""
