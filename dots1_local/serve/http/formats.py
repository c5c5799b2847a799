"""What form an answer is to have, by any of the names that OpenAI, llama-server and vLLM have."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from dots1_local.chat.grammar import Grammar
from dots1_local.chat.text_grammar import TextGrammar, from_choices, from_gbnf, from_regex
from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error
from dots1_local.files.json_file import JsonError, parse_json
from dots1_local.serve.http.request import invalid, missing
from dots1_local.serve.http.sampling_fields import SamplingFields

__all__ = ["AnswerFormat", "FormatFields"]

_Schema = dict[str, Any] | bool
_ANY_OBJECT = {"type": "object"}
_Choices = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=1000)]


class _NamedSchema(Struct, frozen=True):
    schema: _Schema


class _ResponseFormat(Struct, frozen=True):
    """OpenAI's form; with `json_object` too, llama-server takes a schema beside the type."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _NamedSchema | None = None
    schema: _Schema | None = None

    def read(self) -> _Schema | None:
        """Return the schema, or raise an ApiError if there is not exactly one where it belongs."""
        named = None if self.json_schema is None else self.json_schema.schema
        found = self.schema if named is None else named
        if self.schema is not None and named not in (None, self.schema):
            raise invalid("response_format has two schemas; give one", "response_format.schema")
        if self.type == "text" and found is not None:
            message = "response_format has a schema, but its type is text; make it json_schema"
            raise invalid(message, "response_format.type")
        if self.type == "json_schema" and found is None:
            raise missing("response_format.json_schema")
        return found or _ANY_OBJECT if self.type == "json_object" else found


class _StructuredOutputs(Struct, frozen=True):
    """vLLM's form."""

    json: _Schema | str | None = None
    regex: str | None = None
    choice: _Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: None = None
    whitespace_pattern: None = None
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: bool | None = None  # properties are closed anyway


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer must match: a JSON schema, or a text in another notation.

    `param` is the field that asks for it.
    """

    param: str
    schema: Any = None
    convert: Callable[[], str] | None = None  # into llguidance's notation

    def compile(self, engine: Engine) -> Grammar:
        """Compile it, or raise an ApiError if it is not supported."""
        try:
            if self.convert is None:
                return Grammar(self.schema, engine)
            return TextGrammar(self.convert(), engine)
        except Dots1Error as error:
            raise invalid(str(error), self.param) from None


class FormatFields(SamplingFields, frozen=True, kw_only=True):
    """How tokens are sampled, and what form the answer has, which one field may say."""

    response_format: _ResponseFormat | None = None
    json_schema: _Schema | None = None  # llama-server's, and the next one
    grammar: str | None = None
    structured_outputs: _StructuredOutputs | None = None  # vLLM's, and the following
    guided_json: _Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: _Choices | None = None
    guided_grammar: str | None = None

    @property
    def format(self) -> AnswerFormat | None:
        """The form of the answer, or None if it is any text."""
        found = [each for each in self._formats() if each]
        if len(found) > 1:
            names = f"{found[0].param} and {found[1].param}"
            raise invalid(f"{names} both give the answer's form; give one", found[1].param)
        return found[0] if found else None

    def _formats(self) -> Iterator[AnswerFormat | None]:
        wanted = self.response_format
        yield _json("response_format", None if wanted is None else wanted.read())
        yield _json("json_schema", _ANY_OBJECT if self.json_schema == {} else self.json_schema)
        yield _text("grammar", from_gbnf, self.grammar or None)
        yield _json("guided_json", self.guided_json)
        yield from _texts(
            "guided_", self.guided_regex, self.guided_choice, self.guided_grammar or None
        )
        if given := self.structured_outputs:
            where = "structured_outputs."
            yield _json(f"{where}json", given.json)
            yield _json(f"{where}json_object", _ANY_OBJECT if given.json_object else None)
            yield from _texts(where, given.regex, given.choice, given.grammar)


def _json(param: str, schema: _Schema | str | None) -> AnswerFormat | None:
    """Return the form of a schema, which may be written as text, as in vLLM."""
    if schema is None:
        return None
    if isinstance(schema, str):
        try:
            return AnswerFormat(param, parse_json(schema.encode()))
        except JsonError as error:
            raise invalid(f"{param} is not JSON: {error.reason:.200}", param) from None
    return AnswerFormat(param, schema)


def _texts(
    where: str, regex: str | None, choice: list[str] | None, grammar: str | None
) -> Iterator[AnswerFormat | None]:
    yield _text(f"{where}regex", from_regex, regex)
    yield _text(f"{where}choice", from_choices, choice)
    yield _text(f"{where}grammar", from_gbnf, grammar)


def _text(param: str, convert: Callable[[Any], str], given: Any) -> AnswerFormat | None:
    return None if given is None else AnswerFormat(param, convert=lambda: convert(given))
