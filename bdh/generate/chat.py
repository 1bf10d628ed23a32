"""Conversations that continue from a state, so that no earlier turn is read again."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bdh.generate.advance import StepInput
from bdh.generate.engine import Engine
from bdh.generate.params import SamplingParams
from bdh.generate.sequence import Completion, StepOutput, TextDecoder, encode_prompt, generator_of, text_of
from bdh.generate.snapshot import Snapshot
from bdh.model.weights import weights_mark
from bdh.tokenizer.chat import ChatEncoder
from bdh.tokenizer.plain import end_token_ids

Message = dict[str, str]

REPLY_TOKENS = 500
"""The default limit on the tokens of a reply."""


@dataclass
class ChatStats:
    """The numbers of tokens read and generated in this process, and the times that this took."""

    tokens_read: int = 0
    tokens_written: int = 0
    seconds_reading: float = 0.0
    seconds_writing: float = 0.0


@dataclass(frozen=True)
class _Point:
    """A conversation between two turns. Its snapshot is never advanced, so that undo can return to it."""

    snapshot: Snapshot | None = None  # None before anything has been read
    messages: tuple[Message, ...] = ()
    lengths: tuple[int, ...] = ()  # the lengths of its spans of tokens, alternately given and generated
    system: str | None = None  # the system message that has been read

    @property
    def spans(self) -> list[list[int]]:
        if self.snapshot is None:
            return []
        tokens = iter(self.snapshot.tokens)
        return [[next(tokens) for _ in range(length)] for length in self.lengths]


class Conversation:
    """A conversation between a user and a model.

    If the tokenizer has a chat template, each turn is a message, and only the text that the template adds for it is
    read. Otherwise the user's text is appended to the conversation, and the model continues it. The state keeps the
    model's tokens as they were generated, including a stop string. Only the token that ends an answer comes from the
    template.

    Args:
        engine: the engine of the model. Do not use it for anything else meanwhile.
        params: the sampling settings of replies. All replies are drawn from one generator, which starts from ``seed``.
        system: the system message; without a template, text before the conversation.
        plain: whether to ignore the chat template and continue text.
        max_undo_bytes: the limit on the states that are kept for :meth:`undo`, one for each turn.
        notify: called with a line of text about unexpected events.

    Raises:
        ValueError: the chat template is unusable, or rejects the system message.
    """

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams | None = None,
        *,
        system: str | None = None,
        plain: bool = False,
        max_undo_bytes: int = 1 << 30,
        notify: Callable[[str], None] = lambda line: None,
    ):
        self.engine, self.max_undo_bytes, self._notify = engine, max_undo_bytes, notify
        self.params = params or SamplingParams(max_tokens=REPLY_TOKENS)
        self.set_params()
        self.stats = ChatStats()
        self._tokenizer = tokenizer = engine.tokenizer
        self._encoder = None if plain or not tokenizer.chat_template else ChatEncoder(tokenizer)
        self._end_token_ids = set(end_token_ids(engine.model, tokenizer))
        if self._encoder is not None:
            self._end_token_ids.add(self._encoder.turn_end_id)
        self._interrupted = self._told_of_rewriting = False
        self._now = _Point()
        self._earlier: deque[tuple[_Point, torch.Tensor]] = deque()  # for undo, with the state of the generator
        self.set_system(system)
        self.reset()

    @property
    def is_plain(self) -> bool:
        """Whether the conversation is continued as text, without a chat template."""
        return self._encoder is None

    @property
    def messages(self) -> list[Message]:
        """The messages so far, without the system message; without a template, the pieces of the text."""
        return [dict(message) for message in self._now.messages]

    @property
    def position(self) -> int:
        """The number of tokens that the state has read."""
        return self._now.snapshot.state.position if self._now.snapshot else 0

    @property
    def num_undoable(self) -> int:
        """The number of turns that :meth:`undo` can take back."""
        return len(self._earlier)

    def say(self, text: str) -> Iterator[str]:
        """Sends a message, and yields the reply in pieces of whole characters.

        The turn starts when the first piece is requested. Closing the iterator, or calling :meth:`interrupt`, ends the
        reply and keeps the generated part. If nothing was generated, or after an exception, the turn is undone.

        Raises:
            ValueError: the text is empty and the tokenizer has no token to start from, or the template rejects the
                message.
        """
        self._interrupted = False
        return self._turn(text, *self._spans_with(text))

    def interrupt(self) -> None:
        """Ends the reply after the current token. Signal handlers can call it."""
        self._interrupted = True

    def undo(self) -> list[Message]:
        """Takes back the last turn, and returns its messages. With a seed, the same message gets the same reply again.

        Raises:
            ValueError: there is no turn, or the state before it is no longer kept.
        """
        if not self._now.messages:
            raise ValueError("there is no turn to undo")
        if not self._earlier:
            raise ValueError(
                f"the state before that turn is not available: undo keeps at most {self.max_undo_bytes:,} bytes of "
                f"states ({self.engine.advancer.state_bytes:,} each), and none from before a conversation was loaded"
            )
        undone = self._now.messages
        self._now, generator_state = self._earlier.pop()
        if self.params.seed is not None:
            self._generator.set_state(generator_state)
        return [dict(message) for message in undone[len(self._now.messages) :]]

    def reset(self) -> None:
        """Clears the conversation. The system message stays."""
        self._now = _Point()
        self._earlier.clear()
        self.set_seed(self.params.seed)

    def set_params(self, **changes: Any) -> None:
        """Changes the sampling settings of later replies. Use :meth:`set_seed` for the seed.

        Raises:
            ValueError: a setting is invalid.
        """
        params = replace(self.params, **changes).validated()
        if params.max_tokens < 1:
            raise ValueError(f"max_tokens is {params.max_tokens}: must be at least 1 token")
        self.params = params

    def set_seed(self, seed: int | None) -> None:
        """Restarts the generator from a seed; None for a random one.

        Raises:
            ValueError: the seed is out of range.
        """
        self.set_params(seed=seed)
        self._generator = generator_of(seed)

    def set_system(self, system: str | None) -> None:
        """Changes or removes the system message. The next turn reads the whole conversation again after it.

        Raises:
            ValueError: the chat template rejects the message; the conversation is unchanged.
        """
        if self._encoder is not None and system is not None:
            self._encoder.prompt([{"role": "system", "content": system}, {"role": "user", "content": "a"}])
        self.system: str | None = system

    def save(self, path: str | Path) -> None:
        """Saves the conversation, without the sampling settings, to a file as :meth:`Snapshot.save` does."""
        now = self._now
        notes = {
            "tokenizer": self._tokenizer_hash(),
            "messages": now.messages,
            "lengths": now.lengths,
            "system": self.system,
            "system_read": now.system,
        }
        snapshot = now.snapshot or Snapshot(self.engine.advancer.new_state(), [], None)
        if self._is_stale():
            snapshot = self._read_again(snapshot)
        snapshot = replace(snapshot, generator_state=self._generator.get_state(), notes={"conversation": notes})
        snapshot.save(path, self.engine.model)

    def load(self, path: str | Path) -> None:
        """Loads a conversation that :meth:`save` wrote, and continues it exactly. Its turns cannot be undone.

        After an exception the current conversation is unchanged.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: as :meth:`Snapshot.load`, and if the file contains no conversation, or one with another
                tokenizer or template.
        """
        snapshot = Snapshot.load(path, self.engine.model)
        notes = snapshot.notes.get("conversation")
        if notes is None:
            raise ValueError(f"{path} is a snapshot of a plain sequence, not of a conversation")
        if notes["tokenizer"] != self._tokenizer_hash():
            raise ValueError(
                f"{path} was saved with another tokenizer or chat template, or with a template where this "
                "conversation has none"
            )
        assert snapshot.generator_state is not None  # `save` stores it
        state = self.engine.advancer.new_state()
        try:
            state.copy_(snapshot.state)
        except ValueError:
            self._notify(
                f"the file's state is of another kind, {snapshot.state.kind!r} and not {state.kind!r}: its "
                f"{snapshot.state.position:,} tokens are read again, and what follows may differ by rounding"
            )
            state = self._read_again(snapshot).state
        snapshot.state = state
        messages, lengths = tuple(notes["messages"]), tuple(notes["lengths"])
        self._now = _Point(snapshot if snapshot.tokens else None, messages, lengths, notes["system_read"])
        self._earlier.clear()
        self._generator.set_state(snapshot.generator_state)
        self.system = notes["system"]

    def _turn(self, text: str, spans: list[list[int]], is_anew: bool) -> Iterator[str]:
        generator_state, system = self._generator.get_state(), self.system
        is_anew |= self._is_stale()
        read = [token for span in spans for token in span]
        # The engine continues from a copy, so that the earlier state remains whatever happens.
        snapshot = None if is_anew else self._now.snapshot
        # The end of a reply is detected here: stop strings by a decoder that, with a template, starts at the reply.
        params = replace(self.params, stop=[], stop_token_ids=sorted(self._end_token_ids))
        decoder = TextDecoder(self._tokenizer, self.params.stop, context=read if self.is_plain else ())
        reply: list[int] = []
        request = None
        try:
            request = self.engine.add_request(
                read if snapshot is None else spans[-1],
                params,
                snapshot=snapshot,
                keep_snapshot=True,
                generator=self._generator,
            )
            completion = None
            with suppress(GeneratorExit):  # the caller closed the iterator, between two tokens
                for output in self._outputs(request):
                    completion = output.completion
                    reply += output.token_ids
                    if piece := decoder.push(output.token_ids):
                        yield piece
                    if decoder.stopped:
                        break
                if rest := decoder.flush():
                    yield rest
            completion = completion or self._stopped(request)
            if not reply and completion.finish_reason == "abort":  # before a token was generated
                return
            if completion.snapshot is None:
                raise RuntimeError(f"the state after the reply could not be kept: {completion.snapshot_error}")
            said = text_of(self._tokenizer, reply, read if self.is_plain else ())
            messages = ({"role": "user", "content": text}, {"role": "assistant", "content": said})
            self._earlier.append((self._now, generator_state))
            self._now = _Point(
                completion.snapshot, (*self._now.messages, *messages), (*map(len, spans), len(reply)), system
            )
            while sum(point.snapshot.nbytes for point, _ in self._earlier if point.snapshot) > self.max_undo_bytes:
                self._earlier.popleft()
        except BaseException:
            if request is not None:
                self.engine.abort(request)
            self._generator.set_state(generator_state)
            raise

    def _outputs(self, request: int) -> Iterator[StepOutput]:
        """Yields the engine's outputs until the reply has ended. Raises ``RuntimeError`` if it ends with an error."""
        has_begun = False
        while True:
            if self._interrupted:
                self.engine.abort(request, keep_snapshot=True)
            start, num_read = time.perf_counter(), self.engine.stats().prompt_tokens
            outputs = [output for output in self.engine.step() if output.request_id == request]
            seconds = time.perf_counter() - start
            if has_begun:
                self.stats.seconds_writing += seconds
                self.stats.tokens_written += 1
            else:
                self.stats.seconds_reading += seconds
                self.stats.tokens_read += self.engine.stats().prompt_tokens - num_read
            has_begun |= bool(outputs)
            for output in outputs:
                if output.completion is not None and output.completion.error is not None:
                    raise RuntimeError(output.completion.error)
                yield output
                if output.completion is not None:
                    return

    def _stopped(self, request: int) -> Completion:
        """Aborts the reply, and returns its completion."""
        self.engine.abort(request, keep_snapshot=True)
        (completion,) = (output.completion for output in self.engine.step() if output.request_id == request)
        assert completion is not None
        return completion

    def _spans_with(self, text: str) -> tuple[list[list[int]], bool]:
        """Returns the spans of tokens before the reply, and whether all must be read again, not only the last one."""
        read = self._now.spans
        is_same_system = self._now.system == self.system
        if self._encoder is None:
            system, encode = self.system or "", self._tokenizer.encode
            if not read:
                return [encode_prompt(self._tokenizer, system + text)], True
            first = read[0] if is_same_system else encode(system + self._now.messages[0]["content"])
            return [first, *read[1:], encode(text)], not is_same_system
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages += [*self._now.messages, {"role": "user", "content": text}]
        wanted = self._template_spans(self._encoder, messages)
        # Generated spans need only have the same text: the model may have split it into other tokens than the
        # tokenizer.
        for index in range(1, min(len(read), len(wanted)), 2):
            if text_of(self._tokenizer, read[index]) == text_of(self._tokenizer, wanted[index]):
                wanted[index] = read[index]
        if not read or wanted[:-1] == read:
            return wanted, not read
        if is_same_system and not self._told_of_rewriting:
            self._told_of_rewriting = True
            self._notify("the chat template changes what was said before: all of it is read again for every reply")
        return wanted, True

    def _template_spans(self, encoder: ChatEncoder, messages: Sequence[Message]) -> list[list[int]]:
        """Returns a conversation's spans of tokens by the template. The end of an answer belongs to the next span."""
        ids, is_answer = encoder.encode([messages], add_generation_prompt=True)[0]
        spans: list[list[int]] = [[]]
        was_answer = False
        for token, of_answer in zip(ids.tolist(), is_answer.tolist(), strict=True):
            if of_answer != was_answer:
                ended = was_answer and spans[-1][-1] == encoder.turn_end_id
                spans.append([spans[-1].pop()] if ended else [])
                was_answer = of_answer
            spans[-1].append(token)
        return spans

    def _read_again(self, snapshot: Snapshot) -> Snapshot:
        """Reads the tokens of a snapshot again with the current weights, and returns the new snapshot."""
        state, logits = self.engine.advancer.new_state(), None
        if num_read := len(snapshot.tokens) - len(snapshot.pending):
            (logits,) = self.engine.advancer.advance([StepInput(state, snapshot.tokens[:num_read])])
        return replace(snapshot, state=state, logits=logits, weights=weights_mark(self.engine.model).content)

    def _is_stale(self) -> bool:
        """Whether the conversation was read with other weights than the current ones. Notifies the user if so."""
        weights = weights_mark(self.engine.model).content
        is_stale = self._now.snapshot is not None and self._now.snapshot.weights != weights
        if is_stale:
            self._notify("the model's weights have changed since: the conversation is read again")
        return is_stale

    def _tokenizer_hash(self) -> str:
        if self._encoder is not None:
            return self._encoder.hash
        return hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
