"""The form that an answer must have, as requests name it."""

from typing import Any, Literal

from pydantic import Field, model_validator

from bdh.serve.fields import RequestModel

Grammar = dict[str, Any]


class JsonSchema(RequestModel):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="None for any object.")
    strict: bool | None = Field(default=None, description="The schema is held exactly, whatever this says.")


class ResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema", "regex"] | None = Field(
        default=None, description="None for text."
    )
    json_schema: JsonSchema | None = Field(default=None, description="With the type json_schema.")
    pattern: str | None = Field(default=None, description="With the type regex, of the whole text.")

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        for name, kind in (("json_schema", "json_schema"), ("pattern", "regex")):
            if (getattr(self, name) is not None) != (self.type == kind):
                raise ValueError(f"{name}: must be given with the type {kind}, and with no other")
        return self

    def grammar(self) -> Grammar | None:
        """The field of ``SamplingParams`` that holds it; None for any text."""
        schema = None if self.json_schema is None else self.json_schema.schema_
        return grammar_of(self.type or "text", schema=schema, pattern=self.pattern)


class TextFormat(JsonSchema):
    """The same of ``text.format`` in a request to /v1/responses, where the schema stands beside the type."""

    type: Literal["text", "json_object", "json_schema", "regex"] | None = Field(
        default=None, description="None for text."
    )
    pattern: str | None = Field(default=None, description="With the type regex, of the whole text.")

    @model_validator(mode="after")
    def _check(self) -> "TextFormat":
        if self.schema_ is not None and self.type != "json_schema":
            raise ValueError("schema: must be given with the type json_schema only")
        if (self.pattern is not None) != (self.type == "regex"):
            raise ValueError("pattern: must be given with the type regex, and with no other")
        return self

    def grammar(self) -> Grammar | None:
        """As :meth:`ResponseFormat.grammar`."""
        return grammar_of(self.type or "text", schema=self.schema_, pattern=self.pattern)

    def shown(self) -> dict[str, Any]:
        """As an answer repeats it."""
        return {"type": "text", **self.model_dump(by_alias=True, exclude_none=True)}


def grammar_of(kind: str, *, schema: dict[str, Any] | None = None, pattern: str | None = None) -> Grammar | None:
    """``SamplingParams.grammar`` for a format of this type: text, json_object, json_schema or regex."""
    if kind == "text":
        return None
    if kind == "regex":
        return {"regex": pattern}
    return {"json_schema": {"type": "object"} if schema is None else schema}
