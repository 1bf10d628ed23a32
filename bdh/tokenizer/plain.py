"""A tokenizer for generation, by the libraries ``tokenizers`` and ``jinja2`` alone: transformers takes a second to import."""

import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Union

from jinja2 import Template, TemplateError, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from tokenizers import AddedToken, Tokenizer

from bdh.tokenizer.config import TOKENIZER_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AnyTokenizer = Union["PlainTokenizer", "PreTrainedTokenizerFast"]
_CONFIG_FILE = "tokenizer_config.json"
# Classes of transformers that add nothing to tokenizer.json; the others may build their tokenizer anew.
_PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Other names for what a message of the assistant thinks before it answers; the first is what templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class PlainTokenizer:
    """Texts to token ids and back, exactly as transformers' ``PreTrainedTokenizerFast`` of the same files does it.

    What both have carries the same name, so that functions which read only that take either of them.

    Args:
        backend: of the library ``tokenizers``.
        special_tokens: by their role, such as ``eos_token``.
        chat_template: Jinja; several by their names are kept, but not used.
    """

    def __init__(
        self,
        backend: Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | dict[str, str] | None = None,
        *,
        clean_up_tokenization_spaces: bool = False,
    ):
        self.backend_tokenizer = backend
        self.special_tokens_map = dict(special_tokens or {})
        self.chat_template = chat_template
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        """As the files say it, for who asks; :meth:`decode` never does."""

    @classmethod
    def of(cls, tokenizer: Any) -> "PlainTokenizer":
        """The tokenizer itself, or what a ``PreTrainedTokenizerFast`` is made of, whose backend is shared."""
        if isinstance(tokenizer, PlainTokenizer):
            return tokenizer
        return cls(
            tokenizer.backend_tokenizer,
            tokenizer.special_tokens_map,
            tokenizer.chat_template,
            clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        )

    @classmethod
    def load(cls, folder: str | Path) -> Self | None:
        """That of a folder; None where its files say something that only a class of transformers knows to follow.

        Raises:
            ValueError: its files cannot be read.
        """
        folder = Path(folder)
        if not (folder / _CONFIG_FILE).is_file():
            return None
        try:
            facts = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
            if not isinstance(facts, dict) or _needs_transformers(folder, facts):
                return None
            backend = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
            added = facts.get("added_tokens_decoder") or {}
            tokens = [_added_token(token) for _, token in sorted(added.items(), key=lambda item: int(item[0]))]
            special = {
                role: _added_token(facts[role])
                for role in [*_ROLES, *(name for name in facts if name.endswith("_token") and name not in _ROLES)]
                if isinstance(facts.get(role), str | dict)
            }
            known = {*map(str, tokens), *map(str, backend.get_added_tokens_decoder().values())}
            extra = facts.get("extra_special_tokens") or facts.get("additional_special_tokens") or []
            for token in [*special.values(), *map(_added_token, extra)]:
                if str(token) not in known:
                    tokens.append(token)
                    known.add(str(token))
            backend.add_tokens(tokens)
        # The tokenizers library raises plain Exception for a damaged file; there is nothing narrower to catch.
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
            raise ValueError(f"the tokenizer files of {folder} cannot be read: {reason}") from error
        return cls(
            backend,
            {role: str(token) for role, token in special.items()},
            _read_templates(folder, facts.get("chat_template")),
            clean_up_tokenization_spaces=bool(facts.get("clean_up_tokenization_spaces")),
        )

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text, in which nothing is a special token.

        Args:
            add_special_tokens: put around it what the tokenizer puts around texts.
        """
        return self._text_backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    @cached_property
    def _text_backend(self) -> Tokenizer:
        """A copy, since how special tokens are read is a setting of the whole backend."""
        backend = Tokenizer.from_str(self.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        return backend

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id_of("pad_token")

    def _id_of(self, role: str) -> int | None:
        token = self.special_tokens_map.get(role)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return dict(sorted(self.backend_tokenizer.get_added_tokens_decoder().items()))

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.backend_tokenizer.id_to_token(token)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)


def _needs_transformers(folder: Path, facts: dict[str, Any]) -> bool:
    older = any((folder / name).is_file() for name in ("special_tokens_map.json", "added_tokens.json"))
    return (
        facts.get("tokenizer_class") not in _PLAIN_CLASSES
        or any(
            facts.get(name) for name in ("auto_map", "add_bos_token", "add_eos_token", "model_specific_special_tokens")
        )
        or isinstance(facts.get("extra_special_tokens"), dict)
        or (older and not facts.get("added_tokens_decoder"))
    )


def _added_token(token: str | dict[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(token["content"], **{name: token[name] for name in names if name in token})


def _read_templates(folder: Path, in_config: Any) -> Any:
    """The chat template; by their names where there are several. Files count before what the configuration holds."""
    files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    found = {path.stem: path.read_text(encoding="utf-8") for path in files}
    if (path := folder / "chat_template.jinja").is_file():
        found = {"default": path.read_text(encoding="utf-8"), **found}
    if not found and isinstance(in_config, list):
        return {each["name"]: each["template"] for each in in_config}
    if not found:
        return in_config
    return found["default"] if list(found) == ["default"] else found


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the text that a chat template makes of it, as transformers renders it.

    Args:
        variables: what else the template may read: the special tokens by their roles.

    Returns:
        The text, and from where to where in it stands what is within ``{% generation %}``.

    Raises:
        jinja2.TemplateError: the template refuses the conversation, or is wrong itself.
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
    """The tag ``{% generation %}``: notes where in the text stands what is within it."""

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
    """Jinja's, without names that lead into Python's internals: templates of the hub are not to be trusted."""

    def __init__(*args: Any, **values: Any):
        self, *given = args  # so that a template may have a variable named self
        attributes = dict(*given, **values)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not store {name!r} in a namespace: names must not begin with _")


class _Dict:
    """What templates call ``dict``, without the attributes of the type."""

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
    """Unlike Jinja's own, it does not escape what means something in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **form)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
