"""A conversation that lives in a state: what has been said is never read twice."""

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
"""Of a reply at most, unless the settings say otherwise."""


@dataclass
class ChatStats:
    """Of this process: what was read and written, and how long it took."""

    tokens_read: int = 0
    tokens_written: int = 0
    seconds_reading: float = 0.0
    seconds_writing: float = 0.0


@dataclass(frozen=True)
class _Point:
    """A conversation between two turns. The snapshot is not advanced, so that undo may come back to it."""

    snapshot: Snapshot | None = None  # None where nothing has been read yet
    messages: tuple[Message, ...] = ()
    lengths: tuple[int, ...] = ()  # its tokens in spans: so many given, so many written by the model, given, and so on
    system: str | None = None  # the system message that has been read

    @property
    def spans(self) -> list[list[int]]:
        if self.snapshot is None:
            return []
        tokens = iter(self.snapshot.tokens)
        return [[next(tokens) for _ in range(length)] for length in self.lengths]


class Conversation:
    """Turns of a user and a model.

    Where the tokenizer has a chat template, a turn is a message, and the state reads what the template adds for it.
    Elsewhere what the user says is appended to the text, and the model continues. What the model has written stays in its
    memory as it wrote it, a stop string included; only the token that ends an answer is left to the template.

    Args:
        engine: of the model, for nothing else meanwhile.
        params: how replies are sampled. All of them are drawn from one generator, which ``seed`` starts.
        system: the system message; without a template, text before everything.
        plain: continue text though there is a chat template.
        max_undo_bytes: of the states kept for :meth:`undo`, a whole one for each turn.
        notify: called with a line where something is otherwise than expected.

    Raises:
        ValueError: the chat template cannot be used, or it refuses the system message.
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
        self._earlier: deque[tuple[_Point, torch.Tensor]] = deque()  # for undo, with the generator's states
        self.set_system(system)
        self.reset()

    @property
    def is_plain(self) -> bool:
        """Whether the text is continued without a chat template."""
        return self._encoder is None

    @property
    def messages(self) -> list[Message]:
        """What has been said, without the system message. Without a template, the pieces of the text."""
        return [dict(message) for message in self._now.messages]

    @property
    def position(self) -> int:
        """Tokens that the state has read."""
        return self._now.snapshot.state.position if self._now.snapshot else 0

    @property
    def num_undoable(self) -> int:
        """Turns that :meth:`undo` can take back."""
        return len(self._earlier)

    def say(self, text: str) -> Iterator[str]:
        """One turn: the reply piece by piece, in whole characters.

        The turn begins when the first piece is asked for. Closing the iterator, or :meth:`interrupt`, ends the
        reply: what has been written stays. If nothing has, or with an error, the turn has never been.

        Raises:
            ValueError: there is nothing to start from, or the template refuses the message.
        """
        self._interrupted = False
        return self._turn(text, *self._spans_with(text))

    def interrupt(self) -> None:
        """Ends the reply after the token that is being worked on. May be called by a signal's handler."""
        self._interrupted = True

    def undo(self) -> list[Message]:
        """Takes back the last turn, and returns its messages. With a seed, the same message gets the same reply again.

        Raises:
            ValueError: there is none, or the state before it is not kept.
        """
        if not self._now.messages:
            raise ValueError("there is no turn to undo")
        if not self._earlier:
            raise ValueError(
                f"the state before that turn is not kept: undo keeps {self.max_undo_bytes:,} bytes of states, of "
                f"{self.engine.advancer.state_bytes:,} each, and none from before a conversation was loaded"
            )
        undone = self._now.messages
        self._now, generator_state = self._earlier.pop()
        if self.params.seed is not None:
            self._generator.set_state(generator_state)
        return [dict(message) for message in undone[len(self._now.messages) :]]

    def reset(self) -> None:
        """Forgets all that was said; the system message stays."""
        self._now = _Point()
        self._earlier.clear()
        self.set_seed(self.params.seed)

    def set_params(self, **changes: Any) -> None:
        """Other settings for the replies that follow, or a ``ValueError``; for the seed there is :meth:`set_seed`."""
        params = replace(self.params, **changes).validated()
        if params.max_tokens < 1:
            raise ValueError(f"max_tokens is {params.max_tokens}: must be at least 1 token")
        self.params = params

    def set_seed(self, seed: int | None) -> None:
        """What follows is drawn from this seed, unless it is a ``ValueError``; None for a different one each time."""
        self.set_params(seed=seed)
        self._generator = generator_of(seed)

    def set_system(self, system: str | None) -> None:
        """Another system message, or none; what was said before is read again after it, with the next turn.

        Raises:
            ValueError: the chat template refuses it; nothing has changed.
        """
        if self._encoder is not None and system is not None:
            self._encoder.prompt([{"role": "system", "content": system}, {"role": "user", "content": "a"}])
        self.system: str | None = system

    def save(self, path: str | Path) -> None:
        """Writes the conversation, but not how replies are sampled, to a file as :meth:`Snapshot.save` does."""
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
        """Continues from a file that :meth:`save` wrote, exactly. The turns in it cannot be undone.

        Raises:
            FileNotFoundError, ValueError: as :meth:`Snapshot.load`; also where the file holds no conversation, or
                one with another tokenizer or template. The present conversation stays.
        """
        snapshot = Snapshot.load(path, self.engine.model)
        notes = snapshot.notes.get("conversation")
        if notes is None:
            raise ValueError(f"{path} is the snapshot of a sequence, but not of a conversation")
        if notes["tokenizer"] != self._tokenizer_hash():
            raise ValueError(
                f"{path} is a conversation with another tokenizer or chat template, or with one where here is none"
            )
        assert snapshot.generator_state is not None  # `save` puts it there
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
        # The engine continues from a copy: whatever happens, the earlier state is there.
        snapshot = None if is_anew else self._now.snapshot
        # What ends a reply is decided here: strings by a decoder which, for a template, begins with the reply.
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
            with suppress(GeneratorExit):  # the reader wants no more: we stand between two tokens
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
            if not reply and completion.finish_reason == "abort":  # before the model has chosen a token
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
        """What the engine's steps give until the reply has ended; a ``RuntimeError`` where that is with an error."""
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
        """The end of a reply that is to be written no further."""
        self.engine.abort(request, keep_snapshot=True)
        (completion,) = (output.completion for output in self.engine.step() if output.request_id == request)
        assert completion is not None
        return completion

    def _spans_with(self, text: str) -> tuple[list[list[int]], bool]:
        """What has to be read before the reply, in spans, and whether all of it, not only the last span, is to be read anew."""
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
        # What the model wrote has to be the same text only: it may have put it into other tokens than the tokenizer.
        for index in range(1, min(len(read), len(wanted)), 2):
            if text_of(self._tokenizer, read[index]) == text_of(self._tokenizer, wanted[index]):
                wanted[index] = read[index]
        if not read or wanted[:-1] == read:
            return wanted, not read
        if is_same_system and not self._told_of_rewriting:
            self._told_of_rewriting = True
            self._notify("the chat template changes what was said before: the conversation is read anew each time")
        return wanted, True

    def _template_spans(self, encoder: ChatEncoder, messages: Sequence[Message]) -> list[list[int]]:
        """A conversation's tokens as the template has them. What ends an answer begins the next given span."""
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
        """The snapshot as this engine reads it with the weights of now."""
        state, logits = self.engine.advancer.new_state(), None
        if num_read := len(snapshot.tokens) - len(snapshot.pending):
            (logits,) = self.engine.advancer.advance([StepInput(state, snapshot.tokens[:num_read])])
        return replace(snapshot, state=state, logits=logits, weights=weights_mark(self.engine.model).content)

    def _is_stale(self) -> bool:
        """Whether what has been read was read with other weights than the model's of now; says so."""
        weights = weights_mark(self.engine.model).content
        is_stale = self._now.snapshot is not None and self._now.snapshot.weights != weights
        if is_stale:
            self._notify("the model's weights have changed since: the conversation is read anew")
        return is_stale

    def _tokenizer_hash(self) -> str:
        if self._encoder is not None:
            return self._encoder.hash
        return hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
