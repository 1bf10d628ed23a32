"""Mixins that give a model the methods ``generate_text``, ``stream_text`` and ``trace``.

They import :mod:`bdh.generate.texts` and :mod:`bdh.inspect` when called, since these packages build on the model.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdh.inspect.tracing import Text, Trace

Prompt = str | Sequence[int]


class TextMethods:
    """Methods that generate text; :func:`bdh.generate.texts.generate_texts` documents their arguments and exceptions.

    A prompt is a string, in which nothing is parsed as a special token, or a sequence of token ids. Pass sampling
    settings as ``params`` (:class:`bdh.generate.params.SamplingParams`) or as keywords with the names of its fields;
    ``max_new_tokens``, ``num_return_sequences`` and ``num_beams`` of transformers are accepted too.
    """

    def generate_text(self, tokenizer: Any, prompt: Prompt, params: Any = None, **settings: Any) -> str:
        """Returns the continuation of ``prompt``, without the prompt."""
        return self.generate_texts(tokenizer, [prompt], params, **settings)[0][0]

    def generate_texts(
        self, tokenizer: Any, prompts: Sequence[Prompt], params: Any = None, **settings: Any
    ) -> list[list[str]]:
        """Returns ``n`` continuations for each prompt, without the prompts."""
        from bdh.generate.texts import generate_texts

        model: Any = self
        return generate_texts(model, tokenizer, prompts, params, **settings)

    def stream_text(self, tokenizer: Any, prompt: Prompt, params: Any = None, **settings: Any) -> Iterator[str]:
        """Yields the continuation in pieces of whole characters. Each piece is generated when it is requested.

        Raises:
            ValueError: as :meth:`generate_texts`, and for several beams or sequences, which cannot be streamed.
        """
        from bdh.generate.texts import stream_text

        model: Any = self
        return stream_text(model, tokenizer, prompt, params, **settings)


class TraceMethod:
    """The method ``trace`` of a model."""

    def trace(
        self,
        text: "Text",
        names: Sequence[str] = ("x", "y"),
        *,
        tokenizer: Any = None,
        positions: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        layer_steps: Sequence[int] | None = None,
    ) -> "Trace":
        """Reads a text and records what the layer steps compute, as :func:`bdh.inspect.trace` does."""
        from bdh.inspect.tracing import trace

        choice: dict[str, Any] = {"positions": positions, "heads": heads, "layer_steps": layer_steps}
        return trace(self, text, names, tokenizer=tokenizer, **choice)
