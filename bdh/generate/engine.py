"""The engine: continuous batching of requests, which can join and leave at every step.

A sequence's tokens depend only on its own prompt, settings and seed, not on other sequences in the batch: bit for bit
with the sparse kernels, and up to rounding with PyTorch operations.
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
# At least one in this many tokens of a step is reserved for prompts, so that no prompt waits forever.
_LEAST_PROMPT_SHARE = 8
_INTERRUPTED = "the step that worked on it was interrupted"


class Engine:
    """Generates text for many requests at once, as many as fit into the memory for their states.

    Add requests with :meth:`add_request` and call :meth:`step` until :meth:`has_work` is False, or call
    :meth:`generate`. The engine is not thread-safe; :class:`bdh.generate.async_engine.AsyncEngine` is.

    Args:
        model: a :class:`bdh.BDHForCausalLM` or :class:`bdh.model.network.Network`.
        tokenizer: the model's tokenizer, a ``PreTrainedTokenizerFast`` or a :class:`PlainTokenizer`.
        config: the limits and formats; see :class:`EngineConfig`.
        advancer: used instead of the one that ``config`` describes.

    Raises:
        ValueError: the tokenizer does not fit the model, a setting is invalid, or memory does not suffice for one
            state.
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
        """Compiles grammars. Any thread can use it, so that compiling ahead of a request does not delay a step."""
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
        self._outputs: list[StepOutput] = []  # the outputs of requests that were aborted between two steps
        # The requests that a step is working on. If it is interrupted, their states are unreliable.
        self._in_hand: deque[Request] = deque()
        self._started: list[int] = []
        self._counters = EngineStats()

    @property
    def has_work(self) -> bool:
        """Whether there is anything for :meth:`step` to do."""
        return bool(self._waiting or self._running or self._outputs or (self.prefixes and self.prefixes.marked))

    def knows(self, request_id: int) -> bool:
        """Whether a request is waiting, running, or has outputs that the next step will return."""
        others = (request.id for request in self._waiting), (output.request_id for output in self._outputs)
        return request_id in itertools.chain(self._running, *others)

    def stats(self) -> EngineStats:
        """Returns the current statistics."""
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
        """The limit on the bytes of the states of all running sequences."""
        return self._pool.max_bytes

    @property
    def max_sequences(self) -> int:
        """The number of sequences that can run at once."""
        return min(self._pool.capacity, self.config.max_running)

    @property
    def _num_reserved(self) -> int:
        """The number of states that are in use, or reserved by a running request."""
        return sum(request.num_reserved for request in self._running.values())

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of a prompt. An empty string becomes the token that texts start with, if there is one.

        Raises:
            ValueError: the prompt is empty and the tokenizer has no such token, or ids are outside the vocabulary.
        """
        tokens = encode_prompt(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        if not tokens:
            raise ValueError("the prompt has no tokens: give at least one to start from")
        V = self.model.config.vocab_size
        if wrong := [token for token in tokens if not 0 <= token < V][:3]:
            raise ValueError(f"the prompt has the token ids {wrong}: must be within 0 and {V - 1}")
        return tokens

    def check(self, params: SamplingParams) -> SamplingParams:
        """Returns the settings of a request if they are valid for this engine.

        Raises:
            ValueError: settings are invalid; the message lists all faults.
            ImportError: there is a grammar, and ``llguidance`` is not installed.
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
        """Adds a request, on which :meth:`step` then works.

        Args:
            prompt: a string, in which nothing is parsed as a special token, or a sequence of token ids.
            params: the sampling settings.
            snapshot: a sequence to continue; it is not modified. ``prompt`` is then the text that follows, or None.
            keep_snapshot: whether completions have a snapshot, from which they can be continued.
            record_activations: if given, outputs report which neurons fired, with this many of the strongest. It does
                not change the generated tokens.
            residuals: collects the residual stream of all tokens that are read.
            generator: the random generator of the first continuation, instead of a new one with the seed.

        Returns:
            The request's id, which outputs contain and :meth:`abort` takes.

        Raises:
            ValueError: a setting is out of range, token ids are outside the vocabulary, the prompt is empty, or the
                snapshot has another kind of state. The engine is unchanged then.
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
        """Ends an active request. The next step returns its last outputs, with a snapshot if requested."""
        for request in [*self._waiting, *self._running.values()]:
            if request.id == request_id:
                request.keep_snapshot |= keep_snapshot
                is_broken = request in self._in_hand
                self._end(request, "error" if is_broken else "abort", _INTERRUPTED if is_broken else None)
                return

    def take_started(self) -> list[int]:
        """Returns the ids of the requests that have started running since the last call."""
        started, self._started = self._started, []
        return started

    @torch.inference_mode(False)  # inference tensors could not be used outside of inference mode
    def step(self) -> list[StepOutput]:
        """Runs one step: generates a token for each sequence that is being continued, and reads a chunk of prompts.

        An exception within one request, or one that leaves its state half-written, ends only that request, with the
        finish reason "error". After an exception that leaves this method, such as KeyboardInterrupt, the next step ends
        all requests that were being worked on.

        Returns:
            What the step has added to each continuation.
        """
        while self._in_hand:
            self._end(self._in_hand[0], "error", _INTERRUPTED)
            self._in_hand.popleft()
        for request_id in [each.id for each in self._running.values() if not each.num_reserved]:
            del self._running[request_id]  # a request whose end was interrupted
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
        """Generates the continuations of prompts, and returns them in the order of the prompts.

        Args:
            prompts: one prompt, or several.
            params: the sampling settings of all prompts, or one for each.

        Raises:
            ValueError: as :meth:`add_request`, before anything is generated; or the engine has other requests.
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
        """Yields the continuations of each request, in order. New requests are taken from the iterable as others end.

        Raises:
            ValueError: a request is invalid, in which case those before it are aborted; or the engine has other
                requests.
        """
        if self._waiting or self._running or self._outputs:
            raise ValueError("the engine is running other requests: finish them before generating a whole batch")
        source, ids = iter(requests), deque[int]()
        found: dict[int, list[Completion | None]] = {}
        # Enough that the engine never waits for the next request, and few enough that results do not pile up.
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
        """Starts a request: gives its first sequence a state, from a snapshot or a stored prefix if possible."""
        sequence, snapshot = request.sequences[0], request.snapshot
        wants_all_tokens = sequence.prompt_logprobs is not None or request.residuals is not None
        recheck_weights(self.model)
        if snapshot is not None and snapshot.weights in (None, weights_mark(self.model).content):
            sequence.state = self._pool.take(copy_of=snapshot.state)
            sequence.logits = snapshot.logits
            sequence.pending = sequence.pending[snapshot.state.position :]
        elif snapshot is not None or self.prefixes is None or wants_all_tokens:
            sequence.state = self._pool.take()  # if weights have changed since the snapshot, its text is read again
        else:
            known, state, logits = self.prefixes.find(sequence.tokens)
            if known == len(sequence.tokens) and logits is None:
                known, state = 0, None
            sequence.state = self._pool.take(copy_of=state)
            sequence.logits, sequence.num_cached_tokens = logits, known
            sequence.pending = sequence.pending[known:]
            request.places, request.weights = self.prefixes.places(sequence.tokens, known), self.prefixes.weights

    def _choose_inputs(self) -> list[tuple[Continuation, int]]:
        """Chooses which sequences read how many tokens in this step; 0 for one that already has its logits."""
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
        """Lets each sequence read its tokens, and ends those that fail. Returns None for those with nothing to read."""
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
        """Stores the state, forks further continuations and samples the next token, once the tokens have been read."""
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
        """Returns the further continuations of a prompt that has been read, each with a copy of the state."""
        request = sequence.request
        if len(request.sequences) == request.params.n:
            return []
        if self.prefixes is not None:
            self.prefixes.store_marked()  # first, since the pool may reuse a marked state that was just given back
        for index in range(1, request.params.n):
            other = Continuation(request, index, self.model, self.tokenizer)
            other.state = self._pool.take(copy_of=sequence.state)
            other.logits, other.pending = sequence.logits, []
            other.num_cached_tokens = sequence.num_cached_tokens
            other.prompt_logprobs, other.activity = sequence.prompt_logprobs, sequence.activity
            request.sequences.append(other)
        return request.sequences[1:]

    def _emit(self, request: Request, sequence: Continuation | None, output: StepOutput) -> None:
        """Emits an output. With the last one of a continuation, releases its state."""
        if output.completion is None:
            self._outputs.append(output)
            return
        request.ended.add(output.index)
        try:
            self._outputs.append(output)
        except BaseException:  # so that the end is still reported
            request.ended.discard(output.index)
            raise
        # From now on, the continuation has ended, whatever happens.
        if not request.num_reserved:
            self._running.pop(request.id, None)
        reason = output.completion.finish_reason
        self._counters.finished[reason] = self._counters.finished.get(reason, 0) + 1
        state = None if sequence is None else sequence.state
        if sequence is not None:
            sequence.state = None
        if state is not None and reason != "error":  # after an error the state may be partly advanced
            self._pool.give_back(state)

    def _fail(self, request: Request, error: Exception, *, has_traceback: bool = True) -> None:
        """Ends a request with the finish reason "error", after an exception."""
        traceback = error if has_traceback else None
        _logger.error("request %d ends with an error: %s", request.id, error_text(error), exc_info=traceback)
        self._end(request, "error", error_text(error))

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """Ends all unfinished continuations of a request, including those that have not started."""
        if request in self._waiting:
            self._waiting.remove(request)
        for index in range(request.params.n):
            if index in request.ended:
                continue
            sequence = request.sequences[index] if index < len(request.sequences) else None
            try:
                sequence = sequence or Continuation(request, index, self.model, self.tokenizer)
                output = sequence.end(reason, error)
            except Exception as failure:  # such as out of memory; text that the decoder held back is lost
                _logger.exception("continuation %d of request %d ends with an error", index, request.id)
                completion = Completion(
                    "", [], "error", error=error or error_text(failure), num_prompt_tokens=len(request.tokens)
                )
                if sequence is not None:
                    completion.text, completion.token_ids = sequence.text, sequence.tokens[sequence.num_before :]
                    sequence.completion = completion
                output = StepOutput(request.id, index, completion=completion)
            self._emit(request, sequence, output)
