"""Many sequences at once, each at constant cost: requests join and leave at every step.

A sequence's tokens depend on its own prompt, settings and seed, and not on what runs beside it: with the sparse kernels
to the bit, with torch's operations up to rounding.
"""

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from bdh.generate.advance import MOST_NEURONS, Advancer, Residuals, StatePool, StepInput, WantedLogits
from bdh.generate.grammar import Grammars
from bdh.generate.params import EngineConfig, EngineStats, SamplingParams
from bdh.generate.prefix_cache import PrefixStore
from bdh.generate.sequence import (
    Completion,
    Continuation,
    FinishReason,
    Prompt,
    Request,
    StepOutput,
    encode_prompt,
    error_text,
)
from bdh.generate.snapshot import Snapshot
from bdh.memory import available_bytes
from bdh.model.network import ModelParts
from bdh.model.weights import recheck_weights, weights_mark
from bdh.tokenizer.plain import PlainTokenizer, check_vocabulary, end_token_ids
from bdh.words import counted

_logger = logging.getLogger(__name__)
# What prompts get of a step however many sequences are being continued, so that none waits for ever.
_LEAST_PROMPT_SHARE = 8
_INTERRUPTED = "the step that worked on it was interrupted"


class Engine:
    """Continues prompts, as many at a time as the memory for their states allows.

    Not for several threads at once; :class:`bdh.generate.async_engine.AsyncEngine` is.

    Args:
        tokenizer: the model's, a ``PreTrainedTokenizerFast`` or a :class:`PlainTokenizer`.
        config: what it may use; see :class:`EngineConfig`.
        advancer: instead of the one that the configuration describes.

    Raises:
        ValueError: the tokenizer is another model's, a setting is wrong, or not one state fits.
    """

    def __init__(
        self,
        model: ModelParts,
        tokenizer: Any,
        *,
        config: EngineConfig | None = None,
        advancer: Advancer | None = None,
    ):
        check_vocabulary(tokenizer, model.config.vocab_size)
        self.config = (config or EngineConfig()).validated()
        self.model, self.tokenizer = model, PlainTokenizer.of(tokenizer)
        self.grammars = Grammars(self.tokenizer, model.config.vocab_size)
        """For any thread: what is compiled there ahead of a request holds up no step."""
        settings = {name: getattr(self.config, name) for name in ("path", "weights", "state", "window")}
        self.advancer = advancer or Advancer(model, **settings)
        max_bytes = self.config.max_state_bytes
        if max_bytes is None:
            max_bytes = max(available_bytes(model.device) // 2, self.advancer.state_bytes)
        self._pool = StatePool(self.advancer, max_bytes)
        if self._pool.capacity < 1:
            raise ValueError(
                f"max_state_bytes is {max_bytes:,}: must be at least {self.advancer.state_bytes:,}, the state of one sequence"
            )
        self.prefixes: PrefixStore | None = None
        if self.config.prefix_cache_bytes:
            self.prefixes = PrefixStore(self.config.prefix_cache_bytes, lambda: weights_mark(model))
        self._end_token_ids = frozenset(end_token_ids(model, tokenizer))
        self._numbers = itertools.count()
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._outputs: list[StepOutput] = []  # of requests that were aborted between two steps
        # What a step is working on: where it does not come to its end, nobody can vouch for these.
        self._in_hand: deque[Request] = deque()
        self._started: list[int] = []
        self._counters = EngineStats()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running or self._outputs or (self.prefixes and self.prefixes.marked))

    def knows(self, request_id: int) -> bool:
        """Whether a request waits, runs, or has outputs that the next step gives."""
        others = (request.id for request in self._waiting), (output.request_id for output in self._outputs)
        return request_id in itertools.chain(self._running, *others)

    def stats(self) -> EngineStats:
        """Sequences, bytes and counters as they are now."""
        return replace(
            self._counters,
            running=sum(1 for request in self._running.values() for s in request.sequences if s.state is not None),
            waiting=len(self._waiting),
            state_bytes=self._num_reserved * self.advancer.state_bytes,
            finished=dict(self._counters.finished),
            **(self.prefixes.stats() if self.prefixes else {}),
        )

    @property
    def max_state_bytes(self) -> int:
        """Of all running sequences."""
        return self._pool.max_bytes

    @property
    def max_sequences(self) -> int:
        """That can run at once."""
        return min(self._pool.capacity, self.config.max_running)

    @property
    def _num_reserved(self) -> int:
        """States that are in use, or promised to a running request."""
        return sum(request.num_reserved for request in self._running.values())

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt; an empty text is the token that texts begin with, where the tokenizer has one.

        Raises:
            ValueError: there is nothing to start from, or ids outside of the vocabulary.
        """
        tokens = encode_prompt(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        if not tokens:
            raise ValueError("the prompt has no tokens: give at least one to start from")
        V = self.model.config.vocab_size
        if wrong := [token for token in tokens if not 0 <= token < V][:3]:
            raise ValueError(f"the prompt has the token ids {wrong}: must be within 0 and {V - 1}")
        return tokens

    def check(self, params: SamplingParams) -> SamplingParams:
        """The settings of a request, or a ``ValueError`` with all that is wrong with them for this engine.

        Raises:
            ImportError: they have a grammar, and ``llguidance`` is not installed.
        """
        params.validated(self.model.config.vocab_size)
        if params.grammar is not None:
            self.grammars.compile(params.grammar)
        most = self.max_sequences
        if params.n > most:
            raise ValueError(
                f"n is {params.n}: must be at most {most}, the states of {self.advancer.state_bytes:,} bytes each that "
                f"max_state_bytes, {self._pool.max_bytes:,}, and max_running, {self.config.max_running}, allow"
            )
        return params

    def add_request(
        self,
        prompt: Prompt | None,
        params: SamplingParams | None = None,
        *,
        snapshot: Snapshot | None = None,
        keep_snapshot: bool = False,
        record_activations: int | None = None,
        residuals: Residuals | None = None,
        generator: torch.Generator | None = None,
    ) -> int:
        """Takes up a request; :meth:`step` works on it.

        Args:
            prompt: a text, in which nothing is a special token, or the ids of tokens.
            params: how to sample.
            snapshot: a sequence to continue; it stays as it is. ``prompt`` is what follows there, or None for nothing.
            keep_snapshot: completions have a snapshot, from which they can be continued.
            record_activations: outputs say which neurons fired, and name so many of the strongest. The tokens are the same.
            residuals: takes those of all tokens that are read.
            generator: draw the first continuation from this one, instead of one that begins with the seed.

        Returns:
            The number that outputs and :meth:`abort` name it by.

        Raises:
            ValueError: a setting out of range, tokens that are not in the vocabulary, nothing to start from, or a
                snapshot of another kind of state. Nothing has changed then.
        """
        params = self.check(params or SamplingParams())
        if snapshot is None:
            tokens = self.encode(prompt if prompt is not None else "")
            num_prompt_tokens = len(tokens)
        else:
            snapshot.check_for(self.advancer.pattern, prompt_logprobs=params.prompt_logprobs is not None)
            added = self.encode(prompt) if prompt else []
            tokens = snapshot.tokens + added
            num_prompt_tokens = len(tokens) if added else snapshot.num_prompt_tokens
        if record_activations is not None and not 0 <= record_activations <= MOST_NEURONS:
            raise ValueError(
                f"record_activations is {record_activations}: must be within 0 and {MOST_NEURONS}, or None"
            )
        request = Request(
            next(self._numbers),
            params,
            tokens,
            num_prompt_tokens,
            end_token_ids=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else self._end_token_ids),
            grammar=None if params.grammar is None else self.grammars.compile(params.grammar),
            snapshot=snapshot,
            keep_snapshot=keep_snapshot,
            record_activations=record_activations,
            residuals=residuals,
            generator=generator,
        )
        request.sequences.append(Continuation(request, 0, self.model, self.tokenizer))
        self._waiting.append(request)
        return request.id

    def abort(self, request_id: int, *, keep_snapshot: bool = False) -> None:
        """Ends a request, if it has not ended; what it has written comes with the next step, and a snapshot of it if asked for."""
        for request in [*self._waiting, *self._running.values()]:
            if request.id == request_id:
                request.keep_snapshot |= keep_snapshot
                is_broken = request in self._in_hand
                self._end(request, "error" if is_broken else "abort", _INTERRUPTED if is_broken else None)
                return

    def take_started(self) -> list[int]:
        """The requests that have got a state since this was asked before."""
        started, self._started = self._started, []
        return started

    @torch.inference_mode(False)  # states are kept for later steps, which may come outside of it
    def step(self) -> list[StepOutput]:
        """One step of all that runs: a token for each sequence that is being continued, a piece of prompts.

        An exception within one request, or one that leaves its state half-written in a call for several, ends that request
        with the reason "error". What leaves the step, such as KeyboardInterrupt, ends with the next step all requests that
        were being worked on.
        """
        while self._in_hand:
            self._end(self._in_hand[0], "error", _INTERRUPTED)
            self._in_hand.popleft()
        for request_id in [each.id for each in self._running.values() if not each.num_reserved]:
            del self._running[request_id]  # whose end was interrupted
        if self.prefixes is not None:
            self.prefixes.store_marked()
        self._admit()
        chosen = self._choose_inputs()
        self._in_hand.extend(sequence.request for sequence, _ in chosen)
        for (sequence, count), step_input in zip(chosen, self._run_model(chosen), strict=True):
            if sequence.completion is None:
                self._draw_next(sequence, count, step_input)
            self._in_hand.popleft()
            self.advancer.mark_progress()
        outputs, self._outputs = self._outputs, []
        return outputs

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[list[Completion]]:
        """The continuations of each prompt, in their order; ``params`` are for all of them, or one for each.

        Raises:
            ValueError: as :meth:`add_request`, before anything is generated; or the engine has other work.
        """
        encoded = [self.encode(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]  # type: ignore[arg-type]
        if isinstance(params, SamplingParams) or params is None:
            params = [params or SamplingParams()] * len(encoded)
        if len(params) != len(encoded):
            raise ValueError(
                f"there are {len(params)} params for {counted(len(encoded), 'prompt')}: must be one for each, or one"
            )
        for each in params:
            self.check(each)
        return list(self.map(zip(encoded, params, strict=True)))

    def map(self, requests: Iterable[tuple[Prompt, SamplingParams]]) -> Iterator[list[Completion]]:
        """The continuations of each request, in their order, as they are ready; further requests are taken as earlier ones end.

        Raises:
            ValueError: a request is wrong: those before it are ended; or the engine has other work.
        """
        if self._waiting or self._running or self._outputs:
            raise ValueError("the engine has other requests: end them before a whole batch is generated")
        source, ids = iter(requests), deque[int]()
        found: dict[int, list[Completion | None]] = {}
        # So many that none has to wait for one that is still to be read, and not so many that results pile up.
        most = 2 * self.max_sequences
        try:
            while True:
                for prompt, params in itertools.islice(source, max(0, most - len(ids))):
                    ids.append(self.add_request(prompt, params))
                    found[ids[-1]] = [None] * params.n
                if not ids:
                    return
                for output in self.step():
                    if output.completion is not None:
                        found[output.request_id][output.index] = output.completion
                while ids and None not in found[ids[0]]:
                    yield [each for each in found.pop(ids.popleft()) if each is not None]
        finally:
            for request_id in ids:
                self.abort(request_id)
            self._outputs.clear()

    def _admit(self) -> None:
        while self._waiting:
            request = self._waiting[0]
            if self._num_reserved + request.params.n > self.max_sequences:
                return
            self._in_hand.append(request)
            self._waiting.popleft()
            self._running[request.id] = request
            self._started.append(request.id)
            try:
                self._begin(request)
            except Exception as error:
                self._fail(request, error)
            self._in_hand.pop()
            self.advancer.mark_progress()

    def _begin(self, request: Request) -> None:
        """Gives a request's first sequence its state, as far on as one is known."""
        sequence, snapshot = request.sequences[0], request.snapshot
        wants_all_tokens = sequence.prompt_logprobs is not None or request.residuals is not None
        recheck_weights(self.model)
        if snapshot is not None and snapshot.weights in (None, weights_mark(self.model).content):
            sequence.state = self._pool.take(copy_of=snapshot.state)
            sequence.logits = snapshot.logits
            sequence.pending = sequence.pending[snapshot.state.position :]
        elif snapshot is not None or self.prefixes is None or wants_all_tokens:
            sequence.state = self._pool.take()  # what other weights have read is read again
        else:
            known, state, logits = self.prefixes.find(sequence.tokens)
            if known == len(sequence.tokens) and logits is None:
                known, state = 0, None
            sequence.state = self._pool.take(copy_of=state)
            sequence.logits, sequence.num_cached_tokens = logits, known
            sequence.pending = sequence.pending[known:]
            request.places, request.weights = self.prefixes.places(sequence.tokens, known), self.prefixes.weights

    def _choose_inputs(self) -> list[tuple[Continuation, int]]:
        """Which sequences read how many of their tokens in this step; 0 where logits are there already."""
        active = [each for request in self._running.values() for each in request.sequences]
        active = [each for each in active if each.completion is None and each.state is not None]
        reading = [each for each in active if each.pending and not each.num_generated]
        chosen = [(each, len(each.pending)) for each in active if each.num_generated or not each.pending]
        available = max(
            self.config.tokens_per_step - len(chosen), self.config.tokens_per_step // _LEAST_PROMPT_SHARE, 1
        )
        for sequence in reading:
            if available < 1:
                break
            assert sequence.state is not None
            position = sequence.state.position
            to_places = (place - position for place in sequence.request.places if place > position)
            count = min(available, len(sequence.pending), *to_places)
            chosen.append((sequence, count))
            available -= count
        return chosen

    def _run_model(self, chosen: list[tuple[Continuation, int]]) -> list[StepInput | None]:
        """Has the sequences read so many tokens each, and ends those that cannot; None where nothing was to be read."""
        inputs: list[StepInput | None] = []
        for sequence, count in chosen:
            if not count:
                inputs.append(None)
                continue
            request, state, is_last = sequence.request, sequence.state, count == len(sequence.pending)
            assert state is not None
            logits: WantedLogits = "last" if is_last or state.position + count in request.places else "none"
            if sequence.prompt_logprobs is not None and not sequence.num_generated:
                logits = "all"
            recorded = request.record_activations if is_last else None
            inputs.append(StepInput(state, sequence.pending[:count], logits, recorded, request.residuals))
        self.advancer.advance_isolating_faults([each for each in inputs if each is not None])
        for (sequence, _), step_input in zip(chosen, inputs, strict=True):
            if step_input is not None and step_input.error is not None:
                self._fail(sequence.request, step_input.error, has_traceback=False)
        return inputs

    def _draw_next(self, sequence: Continuation, count: int, step_input: StepInput | None) -> None:
        """What follows from tokens that have been read: a stored state, further continuations, the next token."""
        request, state = sequence.request, sequence.state
        try:
            if sequence.num_generated == 0:
                self._counters.prompt_tokens += count
            if step_input is not None:
                sequence.activity = step_input.activity
                sequence.note_read(count, step_input.result())
            if self.prefixes is not None and state is not None and state.position in request.places:
                request.places.discard(state.position)
                self.prefixes.mark(sequence.tokens[: state.position], state, sequence.logits, request.weights)
            if sequence.pending:
                return
            for each in [sequence, *self._fork(sequence)]:
                output = each.end("length") if each.params.max_tokens == 0 else each.draw()
                self._counters.generated_tokens += len(output.token_ids)
                self._emit(request, each, output)
        except Exception as error:
            self._fail(request, error)

    def _fork(self, sequence: Continuation) -> list[Continuation]:
        """The further continuations of a prompt, once it has been read: each with a copy of the state."""
        request = sequence.request
        if len(request.sequences) == request.params.n:
            return []
        if self.prefixes is not None:
            self.prefixes.store_marked()  # before a state that another request has just left is taken
        for index in range(1, request.params.n):
            other = Continuation(request, index, self.model, self.tokenizer)
            other.state = self._pool.take(copy_of=sequence.state)
            other.logits, other.pending = sequence.logits, []
            other.num_cached_tokens = sequence.num_cached_tokens
            other.prompt_logprobs, other.activity = sequence.prompt_logprobs, sequence.activity
            request.sequences.append(other)
        return request.sequences[1:]

    def _emit(self, request: Request, sequence: Continuation | None, output: StepOutput) -> None:
        """Hands out an output, and with the last one of a continuation what it has held."""
        if output.completion is None:
            self._outputs.append(output)
            return
        request.ended.add(output.index)
        try:
            self._outputs.append(output)
        except BaseException:  # or nobody would hear of the end
            request.ended.discard(output.index)
            raise
        # From here on it has ended, whatever happens.
        if not request.num_reserved:
            self._running.pop(request.id, None)
        reason = output.completion.finish_reason
        self._counters.finished[reason] = self._counters.finished.get(reason, 0) + 1
        state = None if sequence is None else sequence.state
        if sequence is not None:
            sequence.state = None
        if state is not None and reason != "error":  # else it may be half advanced
            self._pool.give_back(state)

    def _fail(self, request: Request, error: Exception, *, has_traceback: bool = True) -> None:
        """Ends a request after an exception."""
        traceback = error if has_traceback else None
        _logger.error("request %d ends with an error: %s", request.id, error_text(error), exc_info=traceback)
        self._end(request, "error", error_text(error))

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """Ends all continuations of a request that have not ended, those that have not begun included."""
        if request in self._waiting:
            self._waiting.remove(request)
        for index in range(request.params.n):
            if index in request.ended:
                continue
            sequence = request.sequences[index] if index < len(request.sequences) else None
            try:
                sequence = sequence or Continuation(request, index, self.model, self.tokenizer)
                output = sequence.end(reason, error)
            except Exception as failure:  # no memory, say: without what the text still holds back
                _logger.exception("continuation %d of request %d ends with an error", index, request.id)
                completion = Completion(
                    "", [], "error", error=error or error_text(failure), num_prompt_tokens=len(request.tokens)
                )
                if sequence is not None:
                    completion.text, completion.token_ids = sequence.text, sequence.tokens[sequence.num_before :]
                    sequence.completion = completion
                output = StepOutput(request.id, index, completion=completion)
            self._emit(request, sequence, output)
