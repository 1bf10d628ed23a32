"""``generate_text``, ``trace`` and their relatives as methods of a model. What they call stands above it: :mod:`bdh.generate.texts`
and :mod:`bdh.inspect`."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdh.inspect.tracing import Text, Trace

Prompt = str | Sequence[int]


class TextMethods:
    """Arguments and errors are those of :func:`bdh.generate.texts.generate_texts`.

    A prompt is a text, in which nothing is a special token, or the ids of tokens. How to sample is ``params``
    (:class:`bdh.generate.params.SamplingParams`), or its fields as keywords, also by transformers' names ``max_new_tokens``
    and ``num_return_sequences``, and ``num_beams``.
    """

    def generate_text(self, tokenizer: Any, prompt: Prompt, params: Any = None, **settings: Any) -> str:
        """The continuation of ``prompt``, without the prompt."""
        return self.generate_texts(tokenizer, [prompt], params, **settings)[0][0]

    def generate_texts(
        self, tokenizer: Any, prompts: Sequence[Prompt], params: Any = None, **settings: Any
    ) -> list[list[str]]:
        """For each prompt its continuations, ``n`` of them."""
        from bdh.generate.texts import generate_texts

        model: Any = self
        return generate_texts(model, tokenizer, prompts, params, **settings)

    def stream_text(self, tokenizer: Any, prompt: Prompt, params: Any = None, **settings: Any) -> Iterator[str]:
        """The continuation piece by piece, in whole characters, each generated when it is asked for.

        Raises:
            ValueError: also with beams or several sequences, which cannot stream.
        """
        from bdh.generate.texts import stream_text

        model: Any = self
        return stream_text(model, tokenizer, prompt, params, **settings)


class TraceMethod:
    """``trace`` of a model."""

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
        """What the layer steps compute while the model reads a text; arguments and errors are those of :func:`bdh.inspect.trace`."""
        from bdh.inspect.tracing import trace

        choice: dict[str, Any] = {"positions": positions, "heads": heads, "layer_steps": layer_steps}
        return trace(self, text, names, tokenizer=tokenizer, **choice)
