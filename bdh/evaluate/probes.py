"""Probes beyond the loss: how many neurons fire, and for how long a model remembers a fact that it has read."""

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from bdh.model import BDHForCausalLM
from bdh.model.hook_points import watching
from bdh.model.network import exact_dtype, inference

_SAMPLE = 4096  # the number of values to keep for each name and layer step, for histograms
# The most neurons times tokens that are read at once in several sequences: 128 MiB for each wide tensor in float32.
MAX_WIDE = 2**25


@dataclass(frozen=True)
class Activity:
    """Statistics of the neurons' activations over some tokens. Each list has an entry for each layer step."""

    density: dict[str, list[float]]
    """The fraction of neurons that fire on a token: for ``x``, ``y`` and both (``xy``)."""
    norm: dict[str, list[float]]
    """The mean over tokens of the L2 norm over all neurons: for ``x``, ``y`` and their product ``xy``."""
    dead_neurons: float
    """The fraction of neurons whose x fired on no token in any layer step."""
    samples: dict[str, list[torch.Tensor]]
    """A sample of the values above 0 of ``x``, ``y`` and ``xy``, evenly spaced among all of them."""

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Returns the statistics by names such as ``density/x/0``, the density of x in the first layer step."""
        found = {f"{prefix}dead_neurons": self.dead_neurons}
        for name, table in (("density", self.density), ("norm", self.norm)):
            for kind, values in table.items():
                found |= {f"{prefix}{name}/{kind}/{index}": value for index, value in enumerate(values)}
        return found


def measure_activity(
    model: BDHForCausalLM,
    tokens: torch.Tensor,
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    max_batch_size: int = 16,
) -> Activity:
    """Reads tokens (n, T), each sequence with an empty state, and computes statistics of the activations.

    It takes a forward pass of the eager backend with hooks on the model's ``hook_points``, and a count of each wide
    tensor. It draws no random numbers and leaves the model unchanged.
    """
    num_wide = tokens.shape[1] * model.config.n_head * model.config.neurons_per_head
    batches = tokens.split(max(1, min(max_batch_size, MAX_WIDE // num_wide)))
    counts = {kind: _Counts(model, max(1, _SAMPLE // len(batches))) for kind in ("x", "y", "xy")}
    functions = {"x": counts["x"].add, "y": counts["y"].add, "z": counts["xy"].add}
    with inference(model), autocast(), watching(model, functions):
        for batch in batches:
            model(batch.to(model.device), use_cache=False, logits_to_keep=1)
    num_neurons = len(counts["x"].ever)
    return Activity(
        density={kind: (each.fired / (tokens.numel() * num_neurons)).tolist() for kind, each in counts.items()},
        norm={kind: (each.norm / tokens.numel()).tolist() for kind, each in counts.items()},
        dead_neurons=1 - counts["x"].ever.count_nonzero().item() / num_neurons,
        samples={kind: [torch.cat(found) for found in each.samples] for kind, each in counts.items()},
    )


class _Counts:
    """Accumulates statistics of x, y or x * y for each layer step.

    Args:
        model: the model.
        num_samples: the number of values to keep of each layer step in a forward pass.
    """

    def __init__(self, model: BDHForCausalLM, num_samples: int):
        L = model.config.n_layer
        self._num_samples, self._num_calls = num_samples, 0
        self._dtype = exact_dtype(model.device)
        self.fired, self.norm = torch.zeros(2, L, dtype=self._dtype, device=model.device)
        self.ever = torch.zeros(
            model.config.n_head * model.config.neurons_per_head, dtype=torch.bool, device=model.device
        )
        self.samples: list[list[torch.Tensor]] = [[] for _ in range(L)]

    def add(self, wide: torch.Tensor) -> None:
        """Adds the activations (..., H*N) of the next layer step."""
        index = self._num_calls % len(self.samples)
        self._num_calls += 1
        fires = wide > 0
        self.ever |= fires.flatten(0, -2).any(0)
        self.fired[index] += fires.sum()
        self.norm[index] += torch.linalg.vector_norm(wide, dim=-1, dtype=self._dtype).sum()
        above = wide[fires]
        step = max(1, above.numel() // self._num_samples)
        self.samples[index].append(above[::step][: self._num_samples].float().cpu())


DISTANCES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
_NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jonas", "Karen", "Lukas")
_LEAD_TOKENS = 128  # of filler and fact, so that filler precedes the fact
_STATE_BYTES = 2**30  # the limit on the states of sequences that are read together
_WIDE_VALUES = 2**27  # in a neuron-wide activation: 512 MiB in float32
_CHUNK = 1024  # tokens in a forward pass
Score = tuple[list[float], bool]
"""The log-probabilities of a value's tokens, and whether each was the likeliest."""


@dataclass(frozen=True)
class Recall:
    """How well a model recalls the planted values at one distance."""

    distance: int
    """The number of tokens between the fact and the question."""
    trials: int
    accuracy: float
    """The fraction of trials in which greedy decoding generates the whole value."""
    control_accuracy: float
    """The same without the fact, which is what guessing achieves."""
    log_probability: float
    """The mean log-probability of the value's tokens, in nats."""
    control_log_probability: float
    """The same without the fact. If both are equal, the fact is forgotten."""


@dataclass(frozen=True)
class Question:
    """A planted fact, and the question for its value.

    ``fact`` has the same tokens as ``query + value``, followed by a full stop and a line end.
    """

    fact: list[int]
    query: list[int]
    value: list[int]


def measure_recall(
    reader: "ModelReader",
    tokenizer: PreTrainedTokenizerFast,
    filler: np.ndarray,
    *,
    distances: Sequence[int] = DISTANCES,
    trials: int = 16,
    texts_at_once: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] = lambda num_tokens: None,
) -> list[Recall]:
    """Plants a fact in a text, reads on, and asks for it at each distance. Repeats this without the fact as a control.

    In the control, filler takes the place of the fact. Each trial reads its text once, up to the largest distance, so
    the cost is linear in that distance.

    Args:
        reader: the model.
        tokenizer: its tokenizer.
        filler: (n,), the tokens of a text in which facts are planted; a short one is repeated.
        distances: the numbers of tokens between fact and question.
        trials: the number of facts.
        texts_at_once: the number of texts that are read together. Each trial has two.
        seed: the seed of the facts and of their places in the filler.
        progress: called with the number of tokens of all texts that have been read so far.

    Raises:
        ValueError: there are no distances, one of them or ``trials`` is below 1, or the filler is empty.
    """
    if not distances or min(distances) < 1 or trials < 1:
        raise ValueError(f"distances are {list(distances)} and trials {trials}: there must be some, all at least 1")
    if len(filler) == 0:
        raise ValueError("the filler text has no tokens: at least 1 is needed")
    ordered = sorted(set(distances))
    randomness = random.Random(seed)
    questions = [_question(tokenizer, randomness) for _ in range(trials)]
    starts = [randomness.randrange(len(filler)) for _ in range(trials)]
    num_read, num_together = 0, max(1, texts_at_once // 2)
    scores: dict[int, list[Score]] = {distance: [] for distance in ordered}
    controls: dict[int, list[Score]] = {distance: [] for distance in ordered}
    for first in range(0, trials, num_together):
        asked = questions[first : first + num_together]
        places = np.array(starts[first : first + num_together])[:, None] + np.arange(_LEAD_TOKENS + ordered[-1])
        texts = np.tile(np.take(filler, places, mode="wrap").astype(np.int64), (2, 1))  # with the fact, and without
        for text, question in zip(texts, asked, strict=False):
            text[_LEAD_TOKENS - len(question.fact) : _LEAD_TOKENS] = question.fact
        tokens, done = torch.from_numpy(texts), 0
        reader.start(len(texts))
        for distance in ordered:
            end = _LEAD_TOKENS + distance
            reader.read(tokens[:, done:end])
            num_read, done = num_read + (end - done) * len(texts), end
            progress(num_read)
            found = reader.score([*asked, *asked])
            scores[distance] += found[: len(asked)]
            controls[distance] += found[len(asked) :]
    recalls = []
    for distance in ordered:
        (accuracy, nats), (control, control_nats) = map(_summary, (scores[distance], controls[distance]))
        recalls.append(Recall(distance, trials, accuracy, control, nats, control_nats))
    return recalls


def tokens_to_read(distances: Sequence[int], trials: int) -> int:
    """Returns the number of tokens at which ``progress`` ends."""
    return 2 * trials * (_LEAD_TOKENS + max(distances))


class ModelReader:
    """Reads several texts with a model, which can be asked questions at any time without changing the state."""

    def __init__(self, model: BDHForCausalLM):
        self._model, self._state = model, model.new_state()

    def texts_that_fit(self, most: int) -> int:
        """Returns how many texts to read together: an even number, at least 2, limited by the size of their states."""
        fitting = _STATE_BYTES // self._model.config.state_bytes_per_sequence
        return max(2, min(most, fitting) // 2 * 2)

    def start(self, num_texts: int) -> None:
        """Starts to read this many new texts."""
        self._state = self._model.new_state(num_texts)

    def read(self, tokens: torch.Tensor) -> None:
        """Reads further tokens (num_texts, T) of each text, in chunks between which the state is carried."""
        config = self._model.config
        chunk = _WIDE_VALUES // (len(tokens) * config.n_head * config.neurons_per_head)
        with inference(self._model):
            for part in tokens.split(max(1, min(_CHUNK, chunk)), dim=1):
                self._model(part.to(self._model.device), cache=self._state, logits_to_keep=1)

    def score(self, questions: Sequence[Question]) -> list[Score]:
        """Returns the score of the value in each text's question."""
        found: list[Score] = [([], False)] * len(questions)
        groups: dict[tuple[int, int], list[int]] = {}  # texts whose questions have equal shapes
        for index, question in enumerate(questions):
            groups.setdefault((len(question.query), len(question.value)), []).append(index)
        for (_, num_values), group in groups.items():
            tokens = torch.tensor([questions[index].query + questions[index].value for index in group])
            tokens = tokens.to(self._model.device)
            with inference(self._model):
                logits = self._model(
                    tokens[:, :-1], cache=self._state.filter(group), logits_to_keep=num_values
                ).logits.float()
            values = tokens[:, -num_values:]
            nats = logits.log_softmax(-1).gather(-1, values[..., None])[..., 0].tolist()
            hits = (logits.argmax(-1) == values).all(-1).tolist()
            for index, score in zip(group, zip(nats, hits, strict=True), strict=True):
                found[index] = score
        return found


def _question(tokenizer: PreTrainedTokenizerFast, randomness: random.Random) -> Question:
    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    name = randomness.choice(_NAMES)
    digits = "".join(randomness.sample("0123456789", 4))
    query, value = encoded(f"\nThe secret number of {name} is"), encoded(f" {digits}")
    # Encoded separately, so that the value has the same tokens in the fact and in the answer.
    return Question(fact=[*query, *value, *encoded(".\n")], query=query, value=value)


def _summary(scores: list[Score]) -> tuple[float, float]:
    """Returns the fraction of values that were recalled, and the mean log-probability of their tokens."""
    return sum(hit for _, hit in scores) / len(scores), sum(sum(nats) / len(nats) for nats, _ in scores) / len(scores)
