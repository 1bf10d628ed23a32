"""From settings to a corpus that is ready to train on, of one source or a mix of several, or to the texts that it is made of."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from bdh.data.batches import Batch, Loader, check_sequences, check_state, step_generator
from bdh.data.chat import ChatCorpus, chat_texts, holds_chat
from bdh.data.config import DataConfig, MixSource, mix_sources
from bdh.data.corpus import Corpus, ProgressCallback, ValidationPart
from bdh.data.files import file_key
from bdh.data.reading import Chunk, split_document, split_of
from bdh.data.sources import Source, show_columns, training_source, validation_source
from bdh.data.streaming import StreamingCorpus
from bdh.data.tokenized import TextCorpus
from bdh.tokenizer.plain import TextEncoder

# The draws of the sources and those of the windows within one come from Philox with different keys.
_KEY = 1 << 64


def prepare_corpus(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, block_size: int, *, progress: ProgressCallback | None = None
) -> Corpus:
    """Reads, tokenizes, splits and caches a text; or, with ``streaming``, gets ready to do so while training.

    Args:
        block_size: tokens that a sequence predicts; 0 where none will be taken: then either part may be of any length.
        progress: see :data:`bdh.data.corpus.ProgressCallback`.

    Raises:
        FileNotFoundError: a file is missing, or the hub does not give the data set.
        ValueError: settings out of range, or that do not go together, text that cannot be read, or too little of it. Nothing has
            been written then.
        OSError: the cache cannot be written.
    """
    config.validated()
    progress = progress or (lambda step, done_bytes, total_bytes: None)
    if config.mix is not None:
        sources = mix_sources(config)
        check_overlap(sources)
        corpora = [prepare_corpus(each.config, tokenizer, block_size, progress=progress) for each in sources]
        return MixCorpus(sources, corpora, block_size)
    if holds_chat(config):
        return ChatCorpus(config, tokenizer, block_size, progress)
    encoder = TextEncoder(tokenizer)
    if config.pack == "documents" and encoder.eos_token_id is None:
        raise ValueError(
            "data.pack is 'documents', but the tokenizer has no <eos> that would stand between documents: "
            "tokenizer.special_tokens=true gives the byte tokenizer one, data.pack=stream needs none"
        )
    return (StreamingCorpus if config.streaming else TextCorpus)(config, encoder, block_size, progress)


def training_texts(config: DataConfig) -> Iterator[str]:
    """The documents that are trained on, long ones in chunks of at most 256 KiB. Raises as :func:`prepare_corpus`.

    They are split exactly as a corpus is, so that a tokenizer never learns from what a model is validated on.
    """
    return (chunk.utf8.decode() for chunk in _chunks(config, held_out=False))


def validation_texts(config: DataConfig) -> Iterator[str]:
    """The documents that are held out, as :func:`training_texts`."""
    return (chunk.utf8.decode() for chunk in _chunks(config, held_out=True))


def _chunks(config: DataConfig, held_out: bool) -> Iterator[Chunk]:
    if config.mix is not None:  # each source once and as a whole, whatever its weight
        sources = mix_sources(config)
        check_overlap(sources)
        for mixed in sources:
            yield from _chunks(mixed.config, held_out)
        return
    if holds_chat(config):
        for text in chat_texts(config, held_out):
            yield from split_document(text.encode())
        return
    validation = validation_source(config)
    if validation is not None and held_out:  # the training's source need not be there
        yield from validation.open()
        return
    training = training_source(config)
    if not held_out:
        show_columns(config, training)
    if validation is not None:
        yield from training.open()
        return
    split = split_of(training.open, config.val_fraction, streaming=config.streaming)
    yield from (chunk for chunk, is_held_out, _ in split.marked(training.open()) if is_held_out == held_out)


class MixCorpus(Corpus):
    """The corpora of ``data.mix``. A sequence is of one source alone, and validation windows are shared by weight."""

    no_tokens_because = "a mix has no single text: measure its sources one by one, with data.source"

    def __init__(self, sources: Sequence[MixSource], corpora: Sequence[Corpus], block_size: int):
        self.block_size = block_size
        self._sources, self._corpora = sources, corpora
        self._shares = [source.share for source in sources]
        self.is_chat = any(corpus.is_chat for corpus in corpora)
        self.val_bytes_per_token = sum(
            share * corpus.val_bytes_per_token for share, corpus in zip(self._shares, corpora, strict=True)
        )
        self.fingerprint = self._joined(corpus.fingerprint for corpus in corpora)
        facts = [corpus.facts for corpus in corpora]
        skipped: Counter[str] = sum((Counter(each["skipped"]) for each in facts), Counter())
        self.facts = {
            "source": ", ".join(f"{source.share:.1%} {source.label}" for source in sources),
            "streaming": any(each["streaming"] for each in facts),
            **{name: _sum(each.get(name) for each in facts) for name in ("documents", "train_tokens", "val_tokens")},
            "val_bytes": _sum(each.get("val_bytes") for each in facts),
            "skipped": dict(skipped),
            "fingerprint": self.fingerprint,
            "mix": [
                {"label": source.label, "share": source.share, **each}
                for source, each in zip(sources, facts, strict=True)
            ],
        }

    def fingerprint_before(self, loader_state: dict[str, Any]) -> str:
        states = zip(self._corpora, loader_state["sources"], strict=True)
        return self._joined(corpus.fingerprint_before(state) for corpus, state in states)

    def _joined(self, fingerprints: Iterable[str]) -> str:
        identity = list(zip(self._shares, fingerprints, strict=True))
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]

    def train_loader(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, carry_state: bool = False
    ) -> "MixLoader":
        if carry_state:
            raise ValueError(
                "train.carry_state is true, but with data.mix a sequence of the batch is of another source in each step: set false"
            )
        own = check_sequences(batch_size, rank, world_size)
        # Each source gives one sequence at a time, as many as the draws ask of it. Their seeds differ, so that two
        # sources of one length do not go through it in step.
        loaders = [corpus.train_loader(1, seed + number) for number, corpus in enumerate(self._corpora)]
        return MixLoader(loaders, self._shares, batch_size, own, seed)

    def validation_windows(self, num_windows: int) -> torch.Tensor:
        numbers = apportion(num_windows, self._shares)
        return torch.cat([corpus.validation_windows(n) for corpus, n in zip(self._corpora, numbers, strict=True)])

    def validation_parts(self, num_windows: int, document_end: int | None = None) -> list[ValidationPart]:
        """Those of each source, which are shared by weight: the loss over all of them is that of the mix."""
        numbers = apportion(num_windows, self._shares)
        return [
            replace(part, name=source.label)
            for source, corpus, number in zip(self._sources, self._corpora, numbers, strict=True)
            for part in corpus.validation_parts(number, document_end)
        ]


class MixLoader(Loader):
    """Sequences of several loaders. Which one gives sequence i of step s depends on (seed, s, i) alone.

    Each process draws all sequences of the step and keeps its own, so that every source is at the same place in all of
    them.
    """

    def __init__(self, loaders: Sequence[Loader], shares: Sequence[float], batch_size: int, own: slice, seed: int):
        """
        Args:
            loaders: each gives one sequence at a time.
            own: the sequences of the global batch that this process gets.
        """
        self._loaders, self._shares, self._batch_size, self._own, self._seed = loaders, shares, batch_size, own, seed
        self._step = 0
        self._begun: list[Batch] = []  # the first sequences of the next step, where an error ended it

    def _read(self) -> Batch:
        for number in self.sources_of(self._step)[len(self._begun) :]:
            self._begun.append(self._loaders[number].next())
        return Batch.stack(self._begun[self._own])

    def _move_on(self) -> None:
        self._begun = []
        self._step += 1

    def sources_of(self, step: int) -> list[int]:
        """The number of the source of each sequence of the global batch."""
        generator = step_generator(_KEY + self._seed, 0, 0, 0, step)
        bounds = np.cumsum(self._shares)[:-1]  # the last share is what is left: sums of floats may end below 1
        return np.searchsorted(bounds, generator.random(self._batch_size), side="right").tolist()

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "mix",
            "step": self._step,
            "seed": self._seed,
            "shares": list(self._shares),
            "sources": [loader.state_dict() for loader in self._loaders],
            "begun": [asdict(sequence) for sequence in self._begun],
        }

    def _load(self, state: dict[str, Any]) -> None:
        # In checkpoints of several processes, earlier versions repeated the shares for each of them.
        shares = state.get("shares", [])[: len(self._shares)]
        check_state({**state, "shares": shares}, "mix", seed=self._seed, shares=self._shares)
        for loader, inner in zip(self._loaders, state["sources"], strict=True):
            loader.load_state_dict(inner)
        self._step = state["step"]
        self._begun = [Batch(**sequence) for sequence in state.get("begun", [])]


def apportion(number: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to ``number`` in proportion to the shares (largest remainders), but none below 1."""
    exact = [number * share for share in shares]
    found = [int(each) for each in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: found[i] - exact[i])
    for i in by_remainder[: number - sum(found)]:
        found[i] += 1
    return [max(1, each) for each in found]


def _sum(values: Iterable[Any]) -> int | None:
    """None where one of them is unknown."""
    known = list(values)
    return None if None in known else sum(known)


def check_overlap(sources: Sequence[MixSource]) -> None:
    """Files of ``val_source`` are held out of every source; a share of a text is held out of the one source alone.

    Raises:
        ValueError: two sources read the same text, and one of them holds out a share of it; or one is trained on the
            split of a data set that another one is validated on.
        FileNotFoundError, OSError: as of :func:`bdh.data.sources.training_source`.
    """
    if len(sources) < 2:
        return
    texts = [(each, training_source(each.config), validation_source(each.config)) for each in sources]
    for source, training, held_out in texts:
        for other, read, _ in texts:
            if replace(source.config, others=[]) == replace(other.config, others=[]):
                continue  # it holds out the same
            common = _common(held_out or training, read)
            if common is None:
                continue
            what = f"what {source.label!r} holds out"
            remedy = "leave it out of one of them"
            if held_out is None:
                what = f"the share of it that {source.label!r} holds out"
                remedy = "name it in one entry only, or set val_source in each entry that reads it"
            raise ValueError(
                f"data.mix: {source.label!r} and {other.label!r} both read {common}, so {what} would be trained on through "
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
