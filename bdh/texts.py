"""``generate_text`` and its relatives as methods of a model. What they call stands above it: :mod:`bdh.generate.texts`."""

from collections.abc import Iterator, Sequence
from typing import Any


class TextMethods:
    def generate_text(self, tokenizer: Any, prompt: str | Sequence[int], params: Any = None, **settings: Any) -> str:
        """The continuation of ``prompt``, without the prompt.

        Args:
            prompt: a text, in which nothing is a special token, or the ids of tokens.
            params: how to sample (:class:`bdh.generate.params.SamplingParams`); or give its fields as keywords, also by
                transformers' names ``max_new_tokens`` and ``num_return_sequences``, and ``num_beams``.

        Raises:
            ValueError: a setting out of range, or an empty prompt where the tokenizer has no ``<bos>``.
            RuntimeError: the text could not be generated.
        """
        from bdh.generate.texts import generate_text

        model: Any = self
        return generate_text(model, tokenizer, prompt, params, **settings)

    def generate_texts(
        self, tokenizer: Any, prompts: Sequence[str | Sequence[int]], params: Any = None, **settings: Any
    ) -> list[list[str]]:
        """For each prompt its continuations, ``n`` of them. Arguments and errors are those of :meth:`generate_text`."""
        from bdh.generate.texts import generate_texts

        model: Any = self
        return generate_texts(model, tokenizer, prompts, params, **settings)

    def stream_text(
        self, tokenizer: Any, prompt: str | Sequence[int], params: Any = None, **settings: Any
    ) -> Iterator[str]:
        """The continuation piece by piece, in whole characters, each generated when it is asked for.

        Raises:
            ValueError, RuntimeError: as :meth:`generate_text`; also with beams or several sequences, which cannot stream.
        """
        from bdh.generate.texts import stream_text

        model: Any = self
        return stream_text(model, tokenizer, prompt, params, **settings)
