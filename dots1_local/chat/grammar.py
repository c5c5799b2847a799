"""What an answer must be: a JSON schema, compiled by llguidance for the tokens of one model."""

import json
from collections.abc import Iterator, Sequence
from copy import copy
from threading import Lock
from typing import Any, Self
from urllib.parse import unquote
from weakref import WeakKeyDictionary, ref

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.json_file import brief

__all__ = ["Grammar", "Matcher", "embedded"]

_MAX_BYTES = 1 << 18
# llguidance compiles recursively and overflows a stack of 8 MiB after some 4,000 levels.
_MAX_LEVELS = 800
# Without a bound on white space, models are known to write line breaks without end.
_OPTIONS: Any = {"whitespace_pattern": r" |\n[ \t]{0,32}"}
# A schema compiles in at most a second or two, and one step takes at most a tenth of a second.
_LIMITS = LLParserLimits(max_items_in_row=10_000, max_grammar_size=50_000, verbose_errors=False)
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
_COMBINING = ("anyOf", "oneOf", "$ref")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # names to schemas
_LISTS = ("anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")


class Matcher:
    """The state of one answer that is constrained by a grammar.

    `accept` and `mask` raise Dots1Error if the answer exceeds llguidance's limits.
    """

    def __init__(self, matcher: LLMatcher, ends: frozenset[int], n_vocab: int) -> None:
        self._matcher, self._ends, self._n_vocab = matcher, ends, n_vocab

    def accept(self, token: int) -> bool:
        """Append a token to the answer; return False if the grammar does not allow the token.

        A token that ends the answer is allowed where the text is complete.
        """
        if token in self._ends:
            return self._matcher.is_accepting()
        allowed = self._matcher.validate_tokens([token]) == 1
        if allowed:
            self._matcher.consume_token(token)
        self._check()
        return allowed

    def mask(self) -> NDArray[np.bool_]:
        """Return which tokens (n_vocab,) may come next."""
        if self._matcher.is_stopped():  # the text is complete, and llguidance computes no mask
            allowed = np.zeros(self._n_vocab, np.bool_)
            allowed[list(self._ends)] = self._matcher.is_accepting()
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(bits, count=self._n_vocab, bitorder="little").view(np.bool_)
        self._check()
        return allowed

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _sentence(self._matcher.get_error())
            raise Dots1Error(f"the answer cannot be kept to its schema any longer: {reason}")


class Grammar:
    """A compiled JSON schema; each answer needs a new `matcher()`.

    Documents have their properties in the schema's order. Errors call it by its `noun`.

    Raises:
        UsageError: the value is not a schema, uses what llguidance does not support, is too large,
            or allows no document.
        Dots1Error: the engine's file does not say which token ends an answer.
    """

    noun = "schema"

    def __init__(self, schema: Any, engine: Engine) -> None:
        self._compile(_source(schema), engine)

    def _compile(self, source: str, engine: Engine) -> None:
        """Compile a grammar in a notation of llguidance's."""
        tokenizer = _tokenizer(engine)
        self._compiled = LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
        self._ends, self._n_vocab = frozenset(tokenizer.eos_tokens), engine.n_vocab
        if self._compiled.is_error():
            reason = _sentence(self._compiled.get_error())
            raise UsageError(f"the {self.noun} is not supported: {reason}")
        self._try_beginning(self._compiled.deep_copy())

    def _try_beginning(self, matcher: LLMatcher) -> None:
        """Refuse a schema that allows nothing, or exceeds llguidance's limits at once."""
        empty = not any(matcher.compute_bitmask())
        matcher.consume_tokens(matcher.compute_ff_tokens())  # what every document begins with
        if not matcher.is_stopped():
            matcher.compute_bitmask()
        if empty or matcher.is_error():
            reason = _sentence(matcher.get_error()) or "it allows none"
            raise UsageError(f"no text matches the {self.noun}: {reason}")

    def after(self, beginning: Sequence[int]) -> Self:
        """Return the grammar of what may follow these tokens; UsageError if nothing may."""
        matcher = self._compiled.deep_copy()
        if matcher.validate_tokens(list(beginning)) < len(beginning):
            raise UsageError("the beginning of the answer does not match what was asked for")
        matcher.consume_tokens(list(beginning))
        later = copy(self)
        later._compiled = matcher
        return later

    def matcher(self) -> Matcher:
        """Return the state of an answer that has no tokens yet."""
        return Matcher(self._compiled.deep_copy(), self._ends, self._n_vocab)


def _source(schema: Any) -> str:
    """Return a schema in llguidance's notation, once it is checked."""
    text = json.dumps(_checked(schema))
    try:
        return LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)
    except ValueError as error:  # such as a number that no float holds
        raise UsageError(f"the schema is not supported: {_sentence(str(error))}") from None


def embedded(schema: Any) -> dict[str, Any]:
    """Return a schema as a part of a grammar in Lark's notation, once it is checked.

    Between two elements of a document there may be one space.

    Raises:
        UsageError: it is not a schema, or too large.
    """
    return {**_checked(schema), "x-guidance": {"whitespace_pattern": " "}}


def _checked(schema: Any) -> Any:
    """Return a schema with closed objects."""
    try:
        length = len(json.dumps(schema, allow_nan=False, ensure_ascii=False).encode())
        levels = _levels(schema)
        closed = schema if _combines(schema) else _closed(schema)
    except (TypeError, ValueError, RecursionError):
        raise UsageError("the schema is not JSON, or it is nested too deeply") from None
    if length > _MAX_BYTES:
        raise UsageError(f"the schema has {length:,} bytes; at most {_MAX_BYTES:,} are supported")
    if levels > _MAX_LEVELS:
        raise UsageError(
            f"the schema and its references nest up to {levels:,} levels deep; at most "
            f"{_MAX_LEVELS} are supported"
        )
    if schema is False or not isinstance(schema, bool | dict):
        raise UsageError(f"the schema is {brief(schema)}, not an object")
    _check_bounds(schema)
    return {} if schema is True else closed


class _Vocabulary:
    """A model's tokens as llguidance reads them; it does not keep the engine alive."""

    bos_token_id = None

    def __init__(self, engine: Engine) -> None:
        self._engine = ref(engine)
        tokens = range(engine.n_vocab)
        self.special_token_ids = [token for token in tokens if engine.is_end(token)]
        self.eos_token_id = self.special_token_ids[0]
        self.tokens = [engine.piece(token) for token in tokens]
        for token in self.special_token_ids:
            self.tokens[token] = b"\xff<end %d>" % token  # 0xff marks what is not text

    def __call__(self, text: str) -> list[int]:
        engine = self._engine()
        return engine.tokenize(text, special=False) if engine and engine.vocab else []


_tokenizers: WeakKeyDictionary[Engine, LLTokenizer] = WeakKeyDictionary()
_building = Lock()


def _tokenizer(engine: Engine) -> LLTokenizer:
    """Return the engine's tokens in llguidance's form, made once; that takes 10 µs per token."""
    if not engine.says_end:  # llama.cpp would take id 11 for it
        raise Dots1Error(
            f"{engine.gguf.files[0]} does not say which token ends an answer, so answers cannot be "
            "kept to a schema; leave out response_format and tools"
        )
    with _building:
        if engine not in _tokenizers:
            vocabulary = _Vocabulary(engine)
            _tokenizers[engine] = LLTokenizer(
                TokenizerWrapper(vocabulary), eos_token=vocabulary.special_token_ids
            )
        return _tokenizers[engine]


def _levels(schema: Any) -> int:
    """Return a bound on the depth of a schema when each reference is followed once."""
    depths: dict[int, int] = {}

    def measure(value: Any) -> int:
        parts = value.values() if isinstance(value, dict) else value
        below = max(map(measure, parts), default=0) if isinstance(value, dict | list) else -1
        depths[id(value)] = below + 1
        return below + 1

    whole = measure(schema)
    targets = {part["$ref"] for part in _objects(schema) if isinstance(part.get("$ref"), str)}
    return whole + sum(depths[id(_target(schema, target))] for target in targets)


def _target(schema: Any, reference: str) -> Any:
    """Return the part that a reference such as "#/$defs/node" names; if none, the whole schema."""
    found = schema
    for part in unquote(reference).removeprefix("#/").split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return schema
    return found


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every JSON object in a value."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _objects(part)


def _check_bounds(schema: Any) -> None:
    """Refuse bounds for which llguidance 1.9 allows the excluded one: 0 if 0 < x <= 0.5."""
    for part in _objects(schema):
        more = part["allOf"] if isinstance(part.get("allOf"), list) else []
        given = [
            (key, each[key])
            for each in (part, *more)
            for key in _BOUNDS
            if isinstance(each, dict) and type(each.get(key)) in (int, float)
            if abs(each[key]) < 1 << 53  # larger ones are further apart, or no float at all
        ]
        values = [value for _, value in given]
        excluded = [value for key, value in given if "exclusive" in key and value % 1 == 0]
        near = len(values) > 1 and max(values) - min(values) < 1
        if excluded and near and part.get("type") != "integer":
            raise UsageError(
                f"the schema excludes {excluded[0]} from a range of numbers narrower than 1, which "
                "is not supported; give other bounds"
            )


def _combines(schema: Any) -> bool:
    """Whether an object must satisfy several schemas at once, which cannot be closed one by one."""
    return any(
        "allOf" in part or ("properties" in part and any(key in part for key in _COMBINING))
        for part in _objects(schema)
    )


def _closed(schema: Any) -> Any:
    """Return the schema with no properties beyond those it names, and with `nullable` applied.

    JSON Schema allows further properties by default, which invites a model to invent some.
    `nullable` is OpenAPI's.
    """
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            closed[key] = {name: _closed(part) for name, part in schema[key].items()}
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            closed[key] = [_closed(part) for part in schema[key]]
    for key in _SINGLE:
        if key in schema:
            closed[key] = _closed(schema[key])
    if "properties" in schema and "patternProperties" not in schema:
        closed.setdefault("additionalProperties", False)
    if schema.get("nullable") is True and isinstance(schema.get("type"), str):
        closed["type"] = [schema["type"], "null"]
    return closed


def _sentence(error: str) -> str:
    """Return llguidance's reason in one line."""
    advice = "Enable 'coerce_one_of' option to approximate oneOf with anyOf"
    return " ".join(error.split()).replace(advice, "Use anyOf instead")[:300]
