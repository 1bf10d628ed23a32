"""Prepares a corpus from the settings, of one source or a mix of several, and gives access to its texts."""

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

# The key of Philox for drawing sources. Windows within a source are drawn with other keys.
_KEY = 1 << 64


def prepare_corpus(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, block_size: int, *, progress: ProgressCallback | None = None
) -> Corpus:
    """Reads, tokenizes, splits and caches a text or, with ``streaming``, prepares to do so during training.

    Args:
        config: the settings.
        tokenizer: the tokenizer.
        block_size: the number of tokens that each sequence predicts. With 0, for a corpus from which no sequences are
            drawn, the training and validation texts can have any length.
        progress: see :data:`bdh.data.corpus.ProgressCallback`.

    Raises:
        FileNotFoundError: a file does not exist, or the data set cannot be loaded from the hub.
        ValueError: settings are out of range or incompatible, or the text is unreadable or too short. Nothing has been
            written then.
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
    """Yields the training documents, long ones in chunks of at most 256 KiB. Raises as :func:`prepare_corpus`.

    The split is that of the corpus, so that a tokenizer is never trained on the validation set.
    """
    return (chunk.utf8.decode() for chunk in _chunks(config, held_out=False))


def validation_texts(config: DataConfig) -> Iterator[str]:
    """Yields the documents of the validation set, as :func:`training_texts` does."""
    return (chunk.utf8.decode() for chunk in _chunks(config, held_out=True))


def _chunks(config: DataConfig, held_out: bool) -> Iterator[Chunk]:
    if config.mix is not None:  # each source is read once as a whole, regardless of its weight
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
    if validation is not None and held_out:  # the training source need not exist
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
    """The corpora of ``data.mix``. Each sequence comes from one source; validation windows are divided by weight."""

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
                "train.carry_state is true, but data.mix draws the source of each sequence anew in "
                "every step: set it to false"
            )
        own = check_sequences(batch_size, rank, world_size)
        # Each loader gives one sequence at a time. Their seeds differ, so that sources of the same length are not read
        # in the same order.
        loaders = [corpus.train_loader(1, seed + number) for number, corpus in enumerate(self._corpora)]
        return MixLoader(loaders, self._shares, batch_size, own, seed)

    def validation_windows(self, num_windows: int) -> torch.Tensor:
        numbers = apportion(num_windows, self._shares)
        return torch.cat([corpus.validation_windows(n) for corpus, n in zip(self._corpora, numbers, strict=True)])

    def validation_parts(self, num_windows: int, document_end: int | None = None) -> list[ValidationPart]:
        """Returns the parts of each source, divided by weight, so that the loss over all is that of the mix."""
        numbers = apportion(num_windows, self._shares)
        return [
            replace(part, name=source.label)
            for source, corpus, number in zip(self._sources, self._corpora, numbers, strict=True)
            for part in corpus.validation_parts(number, document_end)
        ]


class MixLoader(Loader):
    """Draws sequences from several loaders. The source of sequence i in step s depends only on (seed, s, i).

    Each process draws all sequences of the step and keeps its own, so that the position in every source is the same in
    all processes.
    """

    def __init__(self, loaders: Sequence[Loader], shares: Sequence[float], batch_size: int, own: slice, seed: int):
        """Combines loaders.

        Args:
            loaders: a loader for each source, which gives one sequence at a time.
            shares: the fraction of each source.
            batch_size: the number of sequences of the global batch.
            own: the sequences of the global batch that belong to this process.
            seed: the seed of the draws.
        """
        self._loaders, self._shares, self._batch_size, self._own, self._seed = loaders, shares, batch_size, own, seed
        self._step = 0
        self._begun: list[Batch] = []  # the first sequences of the next step, if an error interrupted it

    def _read(self) -> Batch:
        for number in self.sources_of(self._step)[len(self._begun) :]:
            self._begun.append(self._loaders[number].next())
        return Batch.stack(self._begun[self._own])

    def _move_on(self) -> None:
        self._begun = []
        self._step += 1

    def sources_of(self, step: int) -> list[int]:
        """Returns the index of the source of each sequence of the global batch."""
        generator = step_generator(_KEY + self._seed, 0, 0, 0, step)
        bounds = np.cumsum(self._shares)[:-1]  # the last source gets the rest: the rounded sum may be below 1
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
        # With several processes, earlier versions stored the shares once for each process.
        shares = state.get("shares", [])[: len(self._shares)]
        check_state({**state, "shares": shares}, "mix", seed=self._seed, shares=self._shares)
        for loader, inner in zip(self._loaders, state["sources"], strict=True):
            loader.load_state_dict(inner)
        self._step = state["step"]
        self._begun = [Batch(**sequence) for sequence in state.get("begun", [])]


def apportion(number: int, shares: Sequence[float]) -> list[int]:
    """Divides ``number`` into integers in proportion to the shares (largest remainders), each at least 1."""
    exact = [number * share for share in shares]
    found = [int(each) for each in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: found[i] - exact[i])
    for i in by_remainder[: number - sum(found)]:
        found[i] += 1
    return [max(1, each) for each in found]


def _sum(values: Iterable[Any]) -> int | None:
    """Returns the sum, or None if a value is None."""
    known = list(values)
    return None if None in known else sum(known)


def check_overlap(sources: Sequence[MixSource]) -> None:
    """Checks that no source of a mix is trained on text that another one holds out.

    Files of ``val_source`` are held out of every source, but a fraction of a text only of its own source.

    Raises:
        ValueError: two sources read the same text, of which one holds out a fraction; or one is trained on a split of a
            data set that another one validates on.
        FileNotFoundError: as :func:`bdh.data.sources.training_source`.
        OSError: as :func:`bdh.data.sources.training_source`.
    """
    if len(sources) < 2:
        return
    texts = [(each, training_source(each.config), validation_source(each.config)) for each in sources]
    for source, training, held_out in texts:
        for other, read, _ in texts:
            if replace(source.config, others=[]) == replace(other.config, others=[]):
                continue  # both hold out the same text
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
    """Returns the name of a text that both sources read, or None."""
    for name in sorted(one.names & other.names, key=str):
        return name[0] if len(name) == 1 else f"split {name[-1]!r} of {name[1]}"
    if one.is_hub and other.is_hub:
        return None  # different splits, even if from the same files
    known = {file_key(path) for path in one.files}
    return next((str(path) for path in other.files if file_key(path) in known), None)
