"""Does a model still know a fact after so many tokens? A fact is planted in filler text, and asked for later."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from bdh.generate.texts import inference
from bdh.model import BDHForCausalLM

DISTANCES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
_NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jonas", "Karen", "Lukas")
_LEAD_TOKENS = 128  # filler and fact together, so that the fact is not the first that is read
_STATE_BYTES = 2**30  # of the states of all rows that are read together
_WIDE_VALUES = 2**27  # of one wide activation: 512 MiB in float32
_CHUNK = 1024  # tokens of one forward pass


@dataclass(frozen=True)
class Recall:
    """What is known of the planted values at one distance."""

    distance: int
    """Tokens between the fact and the question."""
    trials: int
    accuracy: float
    """Share of the trials in which greedy decoding gives the whole value."""
    control_accuracy: float
    """The same without the fact: what guessing gives."""
    log_probability: float
    """Mean over the value's tokens, nats."""
    control_log_probability: float
    """The same without the fact. Where the two are equal, the fact is forgotten."""


@dataclass(frozen=True)
class Question:
    """``fact`` ends with the same tokens as ``query + value``, and a full stop."""

    fact: list[int]
    query: list[int]
    value: list[int]


class Reader(Protocol):
    """Reads rows of text, and can be asked at any time without remembering that it was."""

    def start(self, num_rows: int) -> None: ...

    def read(self, tokens: torch.Tensor) -> None:
        """Further tokens (rows, T) of each row."""
        ...

    def score(self, questions: Sequence[Question]) -> list[tuple[list[float], bool]]:
        """For each row the log-probabilities of its value's tokens, and whether each was the likeliest."""
        ...


def measure_recall(
    reader: Reader,
    tokenizer: PreTrainedTokenizerFast,
    filler: np.ndarray,
    *,
    distances: Sequence[int] = DISTANCES,
    trials: int = 16,
    rows_at_once: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] = lambda num_tokens: None,
) -> list[Recall]:
    """Plants a fact, reads on, and asks for it at each distance; and the same with filler in place of the fact.

    A trial reads its text once, up to the largest distance: the cost is linear in it.

    Args:
        filler: (n,) tokens of a text to plant the facts in; a short one is repeated.
        rows_at_once: texts that are read together, of which each trial has two.
        progress: called with the number of tokens read so far, of all rows.

    Raises:
        ValueError: distances or trials below 1, or an empty filler.
    """
    if not distances or min(distances) < 1 or trials < 1:
        raise ValueError(f"distances are {list(distances)} and trials {trials}: there must be some, all at least 1")
    if len(filler) == 0:
        raise ValueError("the filler text has no tokens: at least 1 is needed")
    ordered = sorted(set(distances))
    randomness = random.Random(seed)
    questions = [_question(tokenizer, randomness) for _ in range(trials)]
    starts = [randomness.randrange(len(filler)) for _ in range(trials)]
    num_read = 0
    scores: dict[int, list[tuple[list[float], bool]]] = {distance: [] for distance in ordered}
    controls: dict[int, list[tuple[list[float], bool]]] = {distance: [] for distance in ordered}
    step = max(1, rows_at_once // 2)
    for first in range(0, trials, step):
        asked = questions[first : first + step]
        texts = [_filler(filler, start, _LEAD_TOKENS + ordered[-1]) for start in starts[first : first + step]]
        rows = np.stack([*texts, *texts])  # the first half with the fact, the second without
        for row, question in zip(rows, asked, strict=False):
            row[_LEAD_TOKENS - len(question.fact) : _LEAD_TOKENS] = question.fact
        tokens = torch.from_numpy(rows)
        reader.start(len(rows))
        done = 0
        for distance in ordered:
            end = _LEAD_TOKENS + distance
            reader.read(tokens[:, done:end])
            num_read, done = num_read + (end - done) * len(rows), end
            progress(num_read)
            found = reader.score([*asked, *asked])
            scores[distance] += found[: len(asked)]
            controls[distance] += found[len(asked) :]
    return [
        Recall(
            distance=distance,
            trials=trials,
            accuracy=_share(scores[distance]),
            control_accuracy=_share(controls[distance]),
            log_probability=_mean(scores[distance]),
            control_log_probability=_mean(controls[distance]),
        )
        for distance in ordered
    ]


def tokens_to_read(distances: Sequence[int], trials: int) -> int:
    """What ``progress`` counts up to."""
    return 2 * trials * (_LEAD_TOKENS + max(distances))


class ModelReader:
    """A model, its state handed on from chunk to chunk."""

    def __init__(self, model: BDHForCausalLM):
        self._model = model
        self._state = model.new_state()

    def rows_that_fit(self, most: int) -> int:
        """How many rows can be read together: an even number, as states of large models are large."""
        fitting = _STATE_BYTES // self._model.config.state_bytes_per_sequence
        return max(2, min(most, fitting) // 2 * 2)

    def start(self, num_rows: int) -> None:
        self._state = self._model.new_state(num_rows)

    def read(self, tokens: torch.Tensor) -> None:
        config = self._model.config
        chunk = _WIDE_VALUES // (len(tokens) * config.n_head * config.neurons_per_head)
        with inference(self._model):
            for part in tokens.split(max(1, min(_CHUNK, chunk)), dim=1):
                self._model(part.to(self._model.device), past_key_values=self._state, logits_to_keep=1)

    def score(self, questions: Sequence[Question]) -> list[tuple[list[float], bool]]:
        found: list[tuple[list[float], bool]] = [([], False)] * len(questions)
        groups: dict[tuple[int, int], list[int]] = {}  # rows of one shape
        for row, question in enumerate(questions):
            groups.setdefault((len(question.query), len(question.value)), []).append(row)
        with inference(self._model):
            for (_, num_values), rows in groups.items():
                tokens = torch.tensor([questions[row].query + questions[row].value for row in rows])
                tokens = tokens.to(self._model.device)
                logits = self._model(
                    tokens[:, :-1], past_key_values=self._state.filter(rows), logits_to_keep=num_values
                ).logits.float()
                values = tokens[:, -num_values:]
                nats = logits.log_softmax(-1).gather(-1, values[..., None])[..., 0].tolist()
                hits = (logits.argmax(-1) == values).all(-1).tolist()
                for row, *score in zip(rows, nats, hits, strict=True):
                    found[row] = (score[0], score[1])
        return found


def _question(tokenizer: PreTrainedTokenizerFast, randomness: random.Random) -> Question:
    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    name = randomness.choice(_NAMES)
    digits = "".join(randomness.sample("0123456789", 4))
    query, value = encoded(f"\nThe secret number of {name} is"), encoded(f" {digits}")
    # Encoded apart, so that the value has the same tokens where it is planted and where it is asked for.
    return Question(fact=[*query, *value, *encoded(".\n")], query=query, value=value)


def _filler(tokens: np.ndarray, start: int, length: int) -> np.ndarray:
    return np.take(tokens, range(start, start + length), mode="wrap").astype(np.int64)


def _share(scores: list[tuple[list[float], bool]]) -> float:
    return sum(hit for _, hit in scores) / len(scores)


def _mean(scores: list[tuple[list[float], bool]]) -> float:
    return sum(sum(nats) / len(nats) for nats, _ in scores) / len(scores)
