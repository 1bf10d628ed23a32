"""From what a request says to tokens: texts, and conversations by a chat template."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from bdh.serve.config import PLAIN, read_template
from bdh.serve.errors import bad_request
from bdh.tokenizer.chat import ChatEncoder

PLAIN_TEMPLATE = """\
{% for message in messages %}
{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}
{%- elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}
{%- else %}{{ 'Assistant: ' + message['content'].lstrip() + '\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""
_AS_TEXT: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}
_SPACES = " \u0120\u2581"  # as vocabularies spell a space
PLAIN_STOPS = ["\nUser:", "\nAssistant:"]

Message = dict[str, str]


class ChatPrompts:
    """Conversations as the model was trained on them.

    Args:
        template: "plain", or a file, for a tokenizer that has none.
        stops: strings that end every reply.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the tokenizer has a template of its own, or the template cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None, stops: Sequence[str]):
        self.stops = list(stops)
        self.template: str | None = None
        """Jinja; None where there is none."""
        self._encoder: ChatEncoder | None = None
        self._tokenizer, self._is_plain = tokenizer, template == PLAIN
        if template is not None and tokenizer.chat_template:
            raise ValueError(f"chat_template is {template!r}: must be left out, the tokenizer has one of its own")
        if template is not None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = _plain_template(tokenizer) if template == PLAIN else read_template(Path(template))
            self.stops += PLAIN_STOPS if template == PLAIN else []
        if tokenizer.chat_template:
            self._encoder = ChatEncoder(tokenizer, tells_answers=False)
            self.template = str(tokenizer.chat_template)

    @property
    def is_possible(self) -> bool:
        return self._encoder is not None

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a reply, beside the model's own."""
        return [self._encoder.turn_end_id] if self._encoder is not None and self._encoder.tells_answers else []

    @property
    def can_go_on(self) -> bool:
        """Whether :meth:`further` knows where an answer ends."""
        return self._is_plain or (self._encoder is not None and self._encoder.tells_answers)

    def reply(self, text: str) -> str:
        """What the model has written as a message: in the plain form, without the space behind the role."""
        return text.lstrip() if self._is_plain else text

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """A conversation's tokens, up to where the model is to write.

        Raises:
            ApiError: 400, there is no template, or it refuses the conversation.
        """
        return self._encode(messages)[0]

    def further(self, before: Sequence[Message], messages: Sequence[Message], stopped_by: str | None) -> list[int]:
        """What follows in the state of a conversation whose last message the model has just written.

        Args:
            before: all of the conversation that the state has read or written.
            stopped_by: the stop string that ended the last message, and which the state has read.

        Raises:
            ApiError: 400, as :meth:`encode`, or the template does not say how an answer ends.
        """
        if self._is_plain:
            text = "\n" + self._rendered(messages)
            ids = self._tokenizer(text.removeprefix(stopped_by or ""), **_AS_TEXT)["input_ids"]
            return list(ids)
        ids, is_answer = self._encode([*before, *messages])
        if self._encoder is not None and self._encoder.tells_answers:
            num_answers = sum(message["role"] == "assistant" for message in before)
            ends = [i for i in range(len(ids)) if is_answer[i] and not is_answer[i + 1 : i + 2].any()]
            if len(ends) >= num_answers > 0:
                return ids[ends[num_answers - 1] :]  # from the token on that ends the answer
        raise bad_request(
            "the chat template does not tell where an answer ends: send the whole conversation, without bdh.from_state",
            "bdh.from_state",
        )

    def _encode(self, messages: Sequence[Message]) -> tuple[list[int], np.ndarray]:
        if self._encoder is None:
            raise bad_request(
                "this model's tokenizer has no chat template: ask /v1/completions, or start the server with "
                "--chat_template plain",
                "messages",
                "no_chat_template",
            )
        try:
            ids, is_answer = self._encoder.encode([messages], add_generation_prompt=True)[0]
        except ValueError as error:
            raise bad_request(str(error), "messages") from error
        return ids.tolist(), is_answer

    def _rendered(self, messages: Sequence[Message]) -> str:
        rendered: Any = render_jinja_template(
            conversations=[list(messages)], chat_template=self.template, add_generation_prompt=True
        )
        return str(rendered[0][0])


def _plain_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The plain form, which ends with ``Assistant: ``, so that the model begins with a word. Where words have their space
    in the same token, it ends with ``Assistant:``, and the model writes the space.
    """
    if any(len(token) > 1 and token[0] in _SPACES for token in tokenizer.get_vocab()):
        return PLAIN_TEMPLATE
    return PLAIN_TEMPLATE.replace("'Assistant:'", "'Assistant: '")
