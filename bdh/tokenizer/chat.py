"""Chat templates: encodes conversations, and marks the tokens that the assistant writes.

A template is in Jinja, as in all of transformers. It marks the text of the assistant and the token that ends its turn
with ``{% generation %}``. The default template gives

    <|system|>Be brief.<|end|><|user|>Hello!<|end|><|assistant|>Hi.<|end|>

where the four names are special tokens. The loss of training counts ``Hi.<|end|>``.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Template, TemplateError, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from tokenizers import AddedToken

from bdh.tokenizer.config import DEFAULT_CHAT_TEMPLATE, read_template
from bdh.tokenizer.plain import AnyTokenizer, copy_of_backend, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant")
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
DEFAULT_TEMPLATE = """\
{% for message in messages %}
{% if message['role'] == 'system' %}{{ '<|system|>' + message['content'] + '<|end|>' }}
{%- elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] + '<|end|>' }}
{%- elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}
{%- generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}
{%- else %}{{ raise_exception('the role ' + message['role'] + ' is none of system, user, assistant') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""

Messages = Sequence[dict[str, str]]
"""The messages of a conversation, each with a role and content."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Noncharacters of Unicode, which are reserved for such internal use. They enclose spellings of special tokens in
# messages.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
# The names of the field with an assistant's reasoning before its answer. Templates read the first one.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def with_chat_template(
    tokenizer: "PreTrainedTokenizerFast", setting: str | None, *, needs_one: bool
) -> "PreTrainedTokenizerFast":
    """Returns the tokenizer with the template of ``tokenizer.chat_template``, and the special tokens that it uses.

    Args:
        tokenizer: the tokenizer.
        setting: "default", a file name, or None for the tokenizer's own template.
        needs_one: whether to use the default template if the tokenizer has none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the template is not suitable for training.
    """
    if setting is None and (tokenizer.chat_template or not needs_one):
        template = tokenizer.chat_template
    elif setting in (None, DEFAULT_CHAT_TEMPLATE):
        template = DEFAULT_TEMPLATE
    else:
        template = read_template(Path(str(setting)))
    if template is None:
        return tokenizer
    if template != tokenizer.chat_template:
        tokenizer.chat_template = template
        add_special_tokens(tokenizer, [token for token in CHAT_TOKENS if token in template])
    if setting is not None or needs_one:
        ChatEncoder(tokenizer)
    return tokenizer


def add_special_tokens(tokenizer: "PreTrainedTokenizerFast", tokens: Sequence[str]) -> None:
    """Appends missing special tokens to the vocabulary, in this order.

    Raises:
        ValueError: the ids of the vocabulary have gaps, for which the library would assign ids that are in use.
    """
    lacking = [token for token in tokens if token not in tokenizer.get_vocab()]
    if lacking and vocabulary_size(tokenizer) > len(tokenizer):
        raise ValueError(
            f"the tokenizer's ids have gaps ({len(tokenizer):,} tokens, ids up to {vocabulary_size(tokenizer) - 1:,}), so "
            f"no tokens can be added to it, but the chat template needs {', '.join(lacking)}: take a tokenizer that has "
            "them, or give tokenizer.chat_template a template of its own tokens"
        )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)


class ChatEncoder:
    """Encodes many conversations with a tokenizer and its chat template."""

    def __init__(self, tokenizer: AnyTokenizer, *, tells_answers: bool = True):
        """Prepares the template.

        Args:
            tokenizer: the tokenizer.
            tells_answers: whether the template must mark what the assistant writes. Prompts do not need it.

        Raises:
            ValueError: there is no template, or it does not mark the assistant's text with a special token at the end.
        """
        template = tokenizer.chat_template
        if not isinstance(template, str):
            raise ValueError(
                "the tokenizer has no chat template, so the model was not trained on conversations: give it text "
                "instead, without --chat, or train it on conversations first, which adds a template (bdh train "
                "--train.init_from MODEL --data.source FILE.jsonl)"
            )
        if tells_answers and _GENERATION.search(template) is None:
            raise ValueError(
                "the chat template does not mark what the assistant writes: put {% generation %} and "
                "{% endgeneration %} around it, its end token included, and give the file with tokenizer.chat_template"
            )
        self._template = template
        self._variables = tokenizer.special_tokens_map
        tokens = tokenizer.added_tokens_decoder
        spelled = [token.content for token in tokens.values()]
        pattern = "|".join(map(re.escape, sorted([*spelled, _OPEN, _CLOSE], key=len, reverse=True)))
        self._special = re.compile(pattern)
        self._marked = re.compile(f"{_OPEN}({pattern}){_CLOSE}")
        self._backend = copy_of_backend(tokenizer)
        self._text_backend = copy_of_backend(tokenizer, special_is_text=True)
        state = f"{self._backend.to_str()}{template}{sorted(self._variables.items())}"
        self.hash: str = hashlib.sha256(state.encode()).hexdigest()
        """A hash that is equal for tokenizers with the same encoding of conversations."""
        ids, is_answer = self.encode([_PROBE])[0]
        last = int(ids[is_answer][-1]) if is_answer.any() else -1
        is_special = last in tokens and tokens[last].special
        if tells_answers and not is_special:
            raise ValueError(
                "the chat template must end what the assistant writes with a special token, within {% generation %}: "
                f"a generated answer ends with it. It may use {', '.join(CHAT_TOKENS)} and the tokenizer's own"
            )
        self._turn_end_id = last if is_special else None

    @property
    def turn_end_id(self) -> int:
        """The id of the token after each of the assistant's messages."""
        assert self._turn_end_id is not None
        return self._turn_end_id

    @property
    def tells_answers(self) -> bool:
        """Whether the template marks the assistant's text and the token that ends it."""
        return self._turn_end_id is not None

    def encode(
        self, conversations: Sequence[Messages], *, add_generation_prompt: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encodes conversations.

        The assistant's text is encoded separately from the text before it, as it is when the model generates it.
        Spellings of special tokens in messages are encoded as text.

        Args:
            conversations: the messages of each conversation.
            add_generation_prompt: whether to add the start of the assistant's next message.

        Returns:
            For each conversation its token ids, int64, and whether the assistant writes each token, bool.

        Raises:
            ValueError: the template rejects a conversation.
        """
        pieces = [
            (number, piece, is_answer, index % 2 == 1)
            for number, messages in enumerate(conversations)
            for text, is_answer in self._segments(messages, add_generation_prompt)
            for index, piece in enumerate(self._marked.split(text))
            if piece
        ]
        encodings = self._backend.encode_batch_fast([piece for _, piece, *_ in pieces], add_special_tokens=False)
        ids: list[list[int]] = [[] for _ in conversations]
        marks: list[list[bool]] = [[] for _ in conversations]
        for (number, piece, is_answer, is_text), encoding in zip(pieces, encodings, strict=True):
            found = self._text_backend.encode(piece, add_special_tokens=False).ids if is_text else encoding.ids
            ids[number] += found
            marks[number] += [is_answer] * len(found)
        return [
            (np.array(each, np.int64), np.array(is_answer, bool)) for each, is_answer in zip(ids, marks, strict=True)
        ]

    def prompt(self, messages: Messages) -> list[int]:
        """Returns the token ids of a conversation with the start of the assistant's next message.

        Raises:
            ValueError: the template rejects the conversation.
        """
        ids, _ = self.encode([messages], add_generation_prompt=True)[0]
        return ids.tolist()

    def _segments(self, messages: Messages, add_generation_prompt: bool) -> list[tuple[str, bool]]:
        """Returns the pieces of the rendered conversation, and whether each is written by the assistant."""
        marked = [
            {**message, "content": self._special.sub(f"{_OPEN}\\g<0>{_CLOSE}", message["content"])}
            for message in messages
        ]
        try:
            text, answers = render_chat(
                self._template, marked, add_generation_prompt=add_generation_prompt, **self._variables
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        segments, position = [], 0
        for start, end in answers:
            segments += [(text[position:start], False), (text[start:end], True)]
            position = end
        return [*segments, (text[position:], False)]


def question(tokenizer: AnyTokenizer, text: str) -> list[int]:
    """Returns the token ids of a conversation with a single message of the user, ready for the assistant's answer.

    Raises:
        ValueError: the tokenizer has no usable chat template.
    """
    return ChatEncoder(tokenizer).prompt([{"role": "user", "content": text}])


def stop_token_ids(tokenizer: AnyTokenizer) -> int | list[int] | None:
    """Returns the ids of the tokens that end generation: the end of a text, and of an answer if it is marked."""
    template = tokenizer.chat_template
    marks_answers = isinstance(template, str) and _GENERATION.search(template)
    found = (tokenizer.eos_token_id, ChatEncoder(tokenizer).turn_end_id if marks_answers else None)
    ends = sorted({token for token in found if token is not None})
    return ends if len(ends) > 1 else next(iter(ends), None)


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation with a chat template, as transformers does.

    Args:
        template: the Jinja template.
        messages: the messages.
        add_generation_prompt: whether to add the start of the assistant's next message.
        **variables: further variables for the template: the special tokens by their roles.

    Returns:
        The text, and the start and end of each part of it within ``{% generation %}``.

    Raises:
        jinja2.TemplateError: the template rejects the conversation, or is invalid.
    """
    given = []
    for message in messages:
        reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
        given.append(
            {**message} if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
        )
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    token = _rendering.set((pieces, spans))
    try:
        for piece in _compiled(template).generate(
            messages=given, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **variables
        ):
            pieces.append(piece)
    finally:
        _rendering.reset(token)
    return "".join(pieces), spans


_rendering: ContextVar[tuple[list[str], list[tuple[int, int]]]] = ContextVar("what has been rendered, and the spans")


class _GenerationExtension(Extension):
    """The Jinja tag ``{% generation %}``, which records the start and end of its content in the text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a class variable)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

    @pass_eval_context
    def note(self, context: Any, caller: Any) -> str:
        text: str = caller()
        pieces, spans = _rendering.get()
        start = sum(map(len, pieces))
        spans.append((start, start + len(text)))
        return text


class _Namespace(Namespace):
    """Jinja's namespace without names that lead to Python internals, since templates from the hub are not trusted."""

    def __init__(*args: Any, **values: Any):
        self, *given = args  # so that a template can have a variable named self
        Namespace.__init__(self, {_checked_name(name): value for name, value in dict(*given, **values).items()})

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_checked_name(name), value)


def _checked_name(name: Any) -> Any:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not store {name!r} in a namespace: names must not begin with _")
    return name


class _Dict:
    """The ``dict`` of templates, without the attributes of the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


@lru_cache
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationExtension, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
    """Converts a value to JSON. Unlike Jinja's filter, it does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **form)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
