"""Chat templates, and the names of tokens in log-probabilities."""

import copy
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bdh.serve.config import PLAIN, read_template
from bdh.serve.middleware import bad_request
from bdh.tokenizer.chat import ChatEncoder, render_chat
from bdh.tokenizer.plain import PlainTokenizer, byte_of_character, vocabulary_size

_PLAIN_TEMPLATE = """\
{% for message in messages %}
{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}
{%- elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}
{%- else %}{{ 'Assistant: ' + message['content'].lstrip() + '\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'START' }}{% endif %}
"""
_SPACES = " \u0120\u2581"  # the spellings of a space in vocabularies

Message = dict[str, str]


def tokenizer_info(tokenizer: PlainTokenizer, template: str | None, max_length: int) -> dict[str, Any]:
    """Returns a tokenizer's settings by their names in tokenizer_config.json. Missing special tokens are None."""
    attributes = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        "tokenizer_class": "TokenizersBackend",  # the class of transformers that reads the same files
        "vocab_size": vocabulary_size(tokenizer),
        "model_max_length": max_length,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token")),
        **tokenizer.special_tokens_map,
        "chat_template": template,
        "added_tokens_decoder": {
            str(token): {name: getattr(each, name) for name in attributes}
            for token, each in tokenizer.added_tokens_decoder.items()
        },
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
    }


class ChatPrompts:
    """Encodes conversations with a chat template.

    Args:
        tokenizer: the model's tokenizer.
        template: "plain" or the path of a file, for a tokenizer without a template; else None.
        stops: strings that end every reply.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the tokenizer already has a template, or the template cannot be used.
    """

    def __init__(self, tokenizer: PlainTokenizer, template: str | None, stops: Sequence[str]):
        self.stops = list(stops)
        self._is_plain = template == PLAIN
        if template is not None:
            if tokenizer.chat_template:
                raise ValueError(f"chat_template is {template!r}: must be left out, the tokenizer has one of its own")
            tokenizer = copy.deepcopy(tokenizer)
            if self._is_plain:
                # The reply begins with a word. If the space before a word is in the same token, the model writes it too.
                has_spaces = any(len(token) > 1 and token[0] in _SPACES for token in tokenizer.get_vocab())
                tokenizer.chat_template = _PLAIN_TEMPLATE.replace(
                    "START", "Assistant:" if has_spaces else "Assistant: "
                )
                self.stops += ["\nUser:", "\nAssistant:"]
            else:
                tokenizer.chat_template = read_template(Path(template))
        self._tokenizer = tokenizer
        self.template = str(tokenizer.chat_template) if tokenizer.chat_template else None
        """The Jinja template; None if there is none, so that chats are not possible."""
        self._encoder = ChatEncoder(tokenizer, tells_answers=False) if self.template else None
        self.end_ids = [self._encoder.turn_end_id] if self._encoder and self._encoder.tells_answers else []
        """Tokens that end a reply, besides the model's own."""

    @property
    def can_continue(self) -> bool:
        """Whether :meth:`further` knows where an answer ends."""
        return self._is_plain or bool(self.end_ids)

    def reply(self, text: str) -> str:
        """Returns the generated text as a message. With the plain template, leading white space is removed."""
        return text.lstrip() if self._is_plain else text

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens of a conversation, up to where the reply begins.

        Raises:
            ApiError: 400 if there is no template, or if it refuses the conversation.
        """
        return self._encode(messages)[0]

    def further(self, before: Sequence[Message], messages: Sequence[Message], stopped_by: str | None) -> list[int]:
        """Returns the tokens that continue the state after the model's last message.

        Args:
            before: the whole conversation that the state has read or generated.
            messages: the new messages.
            stopped_by: the stop string that ended the last message, which the state has read.

        Raises:
            ApiError: 400 as :meth:`encode`, or if the template does not show where an answer ends.
        """
        if self._is_plain:
            text, _ = render_chat(str(self.template), messages, add_generation_prompt=True)
            return self._tokenizer.encode(f"\n{text}".removeprefix(stopped_by or ""))
        ids, is_answer = self._encode([*before, *messages])
        if self.end_ids:
            num_answers = sum(message["role"] == "assistant" for message in before)
            ends = [i for i in range(len(ids)) if is_answer[i] and not is_answer[i + 1 : i + 2].any()]
            if len(ends) >= num_answers > 0:
                return ids[ends[num_answers - 1] :]  # from the token that ends the answer
        raise bad_request(
            "the chat template does not mark where an answer ends: send the whole conversation, without bdh.from_state",
            "bdh.from_state",
        )

    def _encode(self, messages: Sequence[Message]) -> tuple[list[int], np.ndarray]:
        if self._encoder is None:
            raise bad_request(
                "this model's tokenizer has no chat template: use /v1/completions, or start the server with "
                "--chat_template plain",
                "messages",
                "no_chat_template",
            )
        try:
            ids, is_answer = self._encoder.encode([messages], add_generation_prompt=True)[0]
        except ValueError as error:
            raise bad_request(str(error), "messages") from error
        return ids.tolist(), is_answer


class TokenNames:
    """The names of tokens in log-probabilities: their text, or their bytes if these are not whole characters."""

    def __init__(self, tokenizer: PlainTokenizer):
        self._tokenizer = tokenizer
        self._added = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items()}
        self._byte_of = byte_of_character() if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder) else None
        self.bytes_of = lru_cache(maxsize=65536)(self._bytes_of)

    def name(self, token: int) -> str:
        """Returns a token's name, such as ``bytes:\\xf0``. Tokens with different bytes have different names."""
        found = self.bytes_of(token)
        try:
            return found.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens))

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode("utf-8")
        if self._byte_of is not None:
            characters = self._tokenizer.convert_ids_to_tokens(token) or ""  # for an id without a token
            return bytes(self._byte_of[character] for character in characters)
        return self.text([token]).encode("utf-8")
