"""Several corpora as one, whose rows come from each in proportion to its weight."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from bdh.data.config import DataConfig, MixSource, mix_sources
from bdh.data.corpus import Batch, Corpus, Loader, ValidationPart, check_rows, check_state, step_generator
from bdh.data.files import file_key
from bdh.data.sources import Source, training_source, validation_source

# The draws of the sources and those of the windows within one come from Philox with different keys.
_KEY = 1 << 64


class MixCorpus(Corpus):
    """The corpora of ``data.mix``. A row is of one source alone, and validation windows are shared by weight."""

    def __init__(self, config: DataConfig, prepare: Callable[[DataConfig], Corpus], block_size: int):
        """
        Args:
            prepare: makes the corpus of one source.
        """
        self.block_size = block_size
        self._sources = mix_sources(config)
        check_overlap(self._sources)
        self._shares = [source.share for source in self._sources]
        self._corpora = [prepare(source.config) for source in self._sources]
        self.is_chat = any(corpus.is_chat for corpus in self._corpora)
        self.val_bytes_per_token = sum(
            share * corpus.val_bytes_per_token for share, corpus in zip(self._shares, self._corpora, strict=True)
        )
        self.fingerprint = self._joined([corpus.fingerprint for corpus in self._corpora])
        facts = [corpus.facts for corpus in self._corpora]
        skipped: dict[str, int] = {}
        for each in facts:
            for what, number in each["skipped"].items():
                skipped[what] = skipped.get(what, 0) + number
        self.facts = {
            "source": ", ".join(f"{source.share:.1%} {source.label}" for source in self._sources),
            "streaming": any(each["streaming"] for each in facts),
            **{name: _sum(each.get(name) for each in facts) for name in ("documents", "train_tokens", "val_tokens")},
            "val_bytes": _sum(each.get("val_bytes") for each in facts),
            "skipped": skipped,
            "fingerprint": self.fingerprint,
            "mix": [
                {"label": source.label, "share": source.share, **each}
                for source, each in zip(self._sources, facts, strict=True)
            ],
        }

    def fingerprint_before(self, loader_state: dict[str, Any]) -> str:
        states = loader_state["sources"]
        return self._joined(
            [corpus.fingerprint_before(state) for corpus, state in zip(self._corpora, states, strict=True)]
        )

    def _joined(self, fingerprints: list[str]) -> str:
        identity = list(zip(self._shares, fingerprints, strict=True))
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]

    def train_loader(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, carry_state: bool = False
    ) -> "MixLoader":
        if carry_state:
            raise ValueError(
                "train.carry_state is true, but a row of data.mix is of another source in each step: set false"
            )
        rows = check_rows(batch_size, rank, world_size)
        # Each source gives one row at a time, as many as the draws ask of it. Their seeds differ, so that two sources
        # of one length do not go through it in step.
        loaders = [corpus.train_loader(1, seed + number) for number, corpus in enumerate(self._corpora)]
        return MixLoader(loaders, self._shares, batch_size, rows, seed)

    def train_tokens(self) -> np.ndarray:
        raise ValueError("a mix has no single text: measure its sources one by one, with data.source")

    def validation_tokens(self) -> np.ndarray:
        raise ValueError("a mix has no single text: measure its sources one by one, with data.source")

    def validation_windows(self, num_windows: int) -> torch.Tensor:
        numbers = apportion(num_windows, self._shares)
        windows = [corpus.validation_windows(n) for corpus, n in zip(self._corpora, numbers, strict=True)]
        return torch.cat(windows)

    def validation_parts(self, num_windows: int, document_end: int | None = None) -> list[ValidationPart]:
        """Those of each source, which are shared by weight: the loss over all of them is that of the mix."""
        numbers = apportion(num_windows, self._shares)
        return [
            ValidationPart(source.label, part.batch, part.bytes_per_token)
            for source, corpus, number in zip(self._sources, self._corpora, numbers, strict=True)
            for part in corpus.validation_parts(number, document_end)
        ]


class MixLoader:
    """Rows of several loaders. Which one gives row i of step s depends on (seed, s, i) alone.

    Each process draws all rows of the step and keeps its own, so that every source is at the same place in all of
    them.
    """

    def __init__(self, loaders: Sequence[Loader], shares: Sequence[float], batch_size: int, rows: slice, seed: int):
        """
        Args:
            loaders: each gives one row at a time.
        """
        self._loaders = loaders
        self._shares = list(shares)
        self._batch_size = batch_size
        self._rows = rows
        self._seed = seed
        self._step = 0
        self._begun: list[Batch] = []  # the first rows of the next step, where an error ended it

    def prepare(self) -> None:
        for number in self.sources_of(self._step)[len(self._begun) :]:
            self._begun.append(self._loaders[number].next())

    def next(self) -> Batch:
        """The rows of the next step."""
        self.prepare()
        rows, self._begun = self._begun, []
        self._step += 1
        return Batch.stack(rows[self._rows])

    def sources_of(self, step: int) -> list[int]:
        """The number of the source of each row of the global batch."""
        generator = step_generator(_KEY + self._seed, 0, 0, 0, step)
        bounds = np.cumsum(self._shares)[:-1]  # the last share is what is left: sums of floats may end below 1
        return np.searchsorted(bounds, generator.random(self._batch_size), side="right").tolist()

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "mix",
            "step": self._step,
            "seed": self._seed,
            "shares": self._shares,
            "sources": [loader.state_dict() for loader in self._loaders],
            "begun": [asdict(row) for row in self._begun],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is of another kind of loader, of another seed, or of other shares.
        """
        check_state(state, "mix", seed=self._seed, shares=self._shares)
        for loader, inner in zip(self._loaders, state["sources"], strict=True):
            loader.load_state_dict(inner)
        self._step = state["step"]
        self._begun = [Batch(**row) for row in state.get("begun", [])]


def apportion(number: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to ``number`` in proportion to the shares (largest remainders), but none below 1."""
    exact = [number * share for share in shares]
    found = [int(each) for each in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: found[i] - exact[i])
    for i in by_remainder[: number - sum(found)]:
        found[i] += 1
    return [max(1, each) for each in found]


def _sum(values: Any) -> int | None:
    """None where one of them is unknown."""
    known = list(values)
    return None if None in known else sum(known)


def check_overlap(sources: list[MixSource]) -> None:
    """Files of ``val_source`` are held out of every source; a share of a text is held out of the one source alone.

    Raises:
        ValueError: two sources read the same text, and one of them holds out a share of it; or one is trained on the
            split of a data set that another one is validated on.
        FileNotFoundError, OSError: as of :func:`bdh.data.sources.training_source`.
    """
    if len(sources) < 2:
        return
    training = [training_source(source.config) for source in sources]
    validation = [validation_source(source.config) for source in sources]
    for first, source in enumerate(sources):
        for second, other in enumerate(sources):
            if replace(source.config, others=[]) == replace(other.config, others=[]):
                continue  # it holds out the same
            held_out = validation[first]
            common = _common(held_out or training[first], training[second])
            if common is None:
                continue
            if held_out is None:
                share = f"the share of it that {source.label!r} holds out"
                remedy = "name it in one entry only, or set val_source in each entry that reads it"
            else:
                share, remedy = f"what {source.label!r} holds out", "leave it out of one of them"
            raise ValueError(
                f"data.mix: {source.label!r} and {other.label!r} both read {common}, so {share} would be trained on through "
                f"{other.label!r}: {remedy}"
            )


def _common(one: Source, other: Source) -> str | None:
    """A text that both read, or None."""
    for name in sorted(one.names & other.names, key=str):
        return name[0] if len(name) == 1 else f"split {name[-1]!r} of {name[1]}"
    if one.is_hub and other.is_hub:
        return None  # other splits, perhaps of the same files
    known = {file_key(path) for path in one.files}
    return next((str(path) for path in other.files if file_key(path) in known), None)
