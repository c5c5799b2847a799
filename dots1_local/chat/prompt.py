"""Messages to prompt tokens, in the format of the model's own chat template or without one.

Only the template's own text can become special tokens: if a person types "<|endofresponse|>", it
stays text. So the template is rendered with a placeholder for each message, and the pieces between
the placeholders are tokenised apart from what people wrote. The template itself writes the tools,
so their descriptions must not contain the text of a special token.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from dots1_local.chat.message import Message, ToolCall
from dots1_local.chat.tools import CALL_START, as_text
from dots1_local.engine.engine import Vocabulary
from dots1_local.errors import GGUFError, UsageError
from dots1_local.files.chat_template import ChatTemplate
from dots1_local.files.json_file import brief

__all__ = ["Prompter", "RawPrompter"]


_NO_VARIABLES: Mapping[str, Any] = {}
_OWN_VARIABLES = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}
_CONTROL, _USER_DEFINED = 3, 4  # of enum llama_token_type
_MARKERS_AT_ONCE = 1000
_MAX_REPEATS = 8  # how often a template may write each message, on average


class RawPrompter:
    """The tokeniser of one model, without a template: messages make up one document."""

    def __init__(self, engine: Vocabulary) -> None:
        self._engine = engine
        source = engine.gguf.keys.get("tokenizer.chat_template")
        self._source = source if isinstance(source, str) else None

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """Return the texts one after another, after BOS if the model's documents begin with it."""
        tokens = [] if self._engine.bos is None else [self._engine.bos]
        for message in messages:
            tokens += self.content(message)
        return tokens

    def content(self, message: Message) -> list[int]:
        """Return the tokens of one message's text, none of them special."""
        if message.tokens is not None:
            return list(message.tokens)
        parts = self._without_markers(message.text)
        return [token for part in parts for token in self._engine.tokenize(part, special=False)]

    def marked(self, text: str, *, bos: bool = True) -> list[int]:
        """Return the tokens of a document in which markers become special tokens.

        With `bos`, it begins with BOS if the model's documents do. It is cut at every thousandth
        marker, because llama.cpp's time grows with the square of the number of markers.
        """
        tokens: list[int] = []
        found = re.finditer("|".join(map(re.escape, self._special_texts)) or "(?!)", text)
        starts = [match.start() for match in found][_MARKERS_AT_ONCE::_MARKERS_AT_ONCE]
        for start, end in pairwise([0, *starts, len(text)]):
            tokens += self._engine.tokenize(
                text[start:end], special=True, add_bos=bos and not start
            )
        return tokens

    @cached_property
    def _special_texts(self) -> list[str]:
        """The texts that could become special tokens, longest first."""
        names = [name for name in self._names(_CONTROL, _USER_DEFINED) if name.strip()]
        return sorted(names, key=len, reverse=True)

    def _without_markers(self, text: str) -> Iterator[str]:
        """Cut `text` inside whatever would be read as a marker.

        llama.cpp keeps control tokens out of plain text, but not the added tokens that a tokenizer
        does not call special, and the markers of a chat may be among those.
        """
        start = 0
        for match in self._markers.finditer(text) if self._markers else ():
            yield text[start : match.start() + 1]
            start = match.start() + 1
        yield text[start:]

    @cached_property
    def _markers(self) -> re.Pattern[str] | None:
        """The template's markers among the user-defined tokens."""
        names = [name for name in self._names(_USER_DEFINED) if name in (self._source or "")]
        # A lookahead, so that markers that overlap are all found.
        return re.compile(f"(?={'|'.join(map(re.escape, names))})") if names else None

    def _names(self, *kinds: int) -> list[str]:
        """Return the texts of the tokens of these kinds."""
        keys = self._engine.gguf.keys
        tokens, types = keys.get("tokenizer.ggml.tokens"), keys.get("tokenizer.ggml.token_type")
        if not isinstance(tokens, list) or not isinstance(types, list):
            return []
        return [str(token) for token, kind in zip(tokens, types, strict=False) if kind in kinds]


class Prompter(RawPrompter):
    """The chat template and the tokeniser of one model; errors call the model `name`.

    Raises:
        GGUFError: the file has no chat template, or one that does not parse.
    """

    def __init__(self, engine: Vocabulary, name: str | None = None) -> None:
        super().__init__(engine)
        self._file = name or str(engine.gguf.files[0])
        if self._source is None:
            raise GGUFError(
                f"{self._file} has no chat template; if it is a base model, complete texts with "
                "--raw, otherwise convert it again with tokenizer_config.json"
            )
        self._template = ChatTemplate(self._source, self._file)

    @property
    def takes_tools(self) -> bool:
        """Whether the template reads tools."""
        return "tools" in self._template.variables

    @cached_property
    def writes_tool_calls(self) -> bool:
        """Whether the model calls tools as JSON between <tool_call> tags that answers show."""
        written = self.takes_tools and CALL_START in self._template.source
        return written and CALL_START not in self._names(_CONTROL)

    def tokens(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        begun: bool = False,
        variables: Mapping[str, Any] = _NO_VARIABLES,
    ) -> list[int]:
        """Return the prompt that makes the model write the next assistant message.

        `tools` have the form of OpenAI's API. With `begun`, the last message is the beginning of
        the answer, and the prompt ends in it. `variables` are further ones of the template, as
        `checked_variables` returns them.

        Raises:
            GGUFError: the template fails on these messages, garbles them or leaves out the last.
            UsageError: the tools or calls are malformed or contain a marker.
        """
        if not self.writes_tool_calls and _uses_tools(messages, tools):
            _check_calls(messages)
            messages, tools = as_text(messages, tools), None
        mark = secrets.token_hex(8)
        names = [f"{mark}.{index}." for index in range(len(messages))]
        named = [_as_variable(m, name) for m, name in zip(messages, names, strict=True)]
        rendered = self.render(named, **variables, **self._tools(messages, tools))
        if names[-1] not in rendered and not messages[-1].tool_calls:
            raise GGUFError(f"the chat template of {self._file} leaves out the last message")
        pieces = re.split(rf"{mark}\.(\d{{1,9}})\.", rendered)
        indices = [int(index) for index in pieces[1::2]]
        if len(indices) > _MAX_REPEATS * len(messages) or max(indices, default=0) >= len(messages):
            raise GGUFError(f"the chat template of {self._file} garbles the messages")
        if begun:  # leave out what the template writes after the last message
            end = len(indices) - indices[::-1].index(len(messages) - 1)
            indices, pieces = indices[:end], [*pieces[: 2 * end], ""]
        tokens = self._engine.tokenize(pieces[0], special=True)
        for index, literal in zip(indices, pieces[2::2], strict=True):
            tokens += self.content(messages[index])
            tokens += self._engine.tokenize(literal, special=True)
        return tokens

    def checked_variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return those variables that the template reads; the others have no effect.

        Raises:
            UsageError: one is the template's own, or contains a marker.
        """
        for name in given.keys() & _OWN_VARIABLES:
            raise UsageError(f"{name} is set by the server; leave it out")
        read = {name: given[name] for name in given.keys() & self._template.variables}
        _refuse_markers(list(read.values()), self._special_texts, "the template's variables")
        return read

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Return what the template writes for messages; a marker in their text is not told apart.

        Raises:
            GGUFError: the template fails on these messages.
        """
        specials = {f"{name}_token": self._special(name) for name in ("bos", "eos")}
        return self._template.render(messages, **specials, **variables)

    def _tools(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> dict[str, Any]:
        """Return the template's variable for tools; check tools and calls for markers."""
        if not _uses_tools(messages, tools):
            return {}
        given = [*(tools or ()), *map(_as_variable, messages)]
        _refuse_markers(given, self._special_texts, "the tools")
        return {"tools": list(tools)} if tools else {}

    def _special(self, name: str) -> str:
        """Return the text of a special token, for templates that use `eos_token` or the like."""
        keys = self._engine.gguf.keys
        names, token = (keys.get(f"tokenizer.ggml.{key}") for key in ("tokens", f"{name}_token_id"))
        if isinstance(names, list) and isinstance(token, int) and 0 <= token < len(names):
            return str(names[token])
        return ""


def _uses_tools(messages: Sequence[Message], tools: Sequence[Any] | None) -> bool:
    return bool(tools) or any(m.role == "tool" or m.tool_calls for m in messages)


def _check_calls(messages: Sequence[Message]) -> None:
    """Raise a UsageError if a call's arguments are not an object."""
    for message in messages:
        for call in message.tool_calls:
            _call_variable(call)


def _as_variable(message: Message, text: str = "") -> dict[str, Any]:
    """Return a message as templates expect it, with `text` in place of its own.

    If a message with tool calls has no text, its content stays empty: templates test for that.
    """
    variable: dict[str, Any] = {"role": message.role, "content": text}
    if message.tool_calls:
        variable["content"] = text if message.text else ""
        variable["tool_calls"] = [_call_variable(call) for call in message.tool_calls]
    if message.role == "tool":
        variable["tool_call_id"] = message.tool_call_id
    return variable


def _refuse_markers(given: Sequence[Any], markers: Sequence[str], what: str) -> None:
    """Raise a UsageError if values, which the template writes, contain a marker."""
    try:
        texts = list(_texts(json.loads(json.dumps(given))))
    except (TypeError, ValueError, RecursionError):
        raise UsageError(f"{what} are not JSON, or nested too deeply") from None
    for marker in markers:
        if any(marker in text for text in texts):
            raise UsageError(
                f"{what} contain {marker}, which the model would not read as text; remove it"
            )


def _call_variable(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise UsageError(f"the arguments of a call of {brief(call.name)} are not a JSON object")
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, as it is and as JSON writes it."""
    if isinstance(value, str):
        yield value
        yield json.dumps(value, ensure_ascii=False)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _texts(name)
            yield from _texts(each)
