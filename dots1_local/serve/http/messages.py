"""Anthropic's Messages API: bodies read as conversations, and responses written as blocks."""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from dots1_local.serve.generation import Finished, Piece
from dots1_local.serve.http.chat_request import extensions
from dots1_local.serve.http.request import (
    ApiError,
    Name,
    Share,
    Stops,
    TokenCount,
    Unsupported,
    invalid,
    missing,
    read_fields,
    refuse_unsupported,
)
from dots1_local.serve.http.response import Document, Writer
from dots1_local.serve.http.shared_fields import Options
from dots1_local.serve.http.unsupported import OF_MESSAGES
from dots1_local.serve.tool_calls import CallPart, Part, ToolCallParser, joined

__all__ = ["CountFields", "MessagesFields", "MessagesWriter", "as_chat"]


class _Text(Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class _Thinking(Struct, frozen=True, tag_field="type", tag="thinking"):
    thinking: str = ""


class _Redacted(Struct, frozen=True, tag_field="type", tag="redacted_thinking"):
    data: str = ""


class _ToolUse(Struct, frozen=True, tag_field="type", tag="tool_use"):
    id: str
    name: Name
    input: dict[str, Any]


class _ToolResult(Struct, frozen=True, tag_field="type", tag="tool_result"):
    tool_use_id: str
    content: str | list[_Text] | None = None


_Block = _Text | _Thinking | _Redacted | _ToolUse | _ToolResult


class _Message(Struct, frozen=True):
    role: Literal["user", "assistant"]
    content: str | list[_Block]


class _Tool(Struct, frozen=True):
    name: Name
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None


class _Choice(Struct, frozen=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Format(Struct, frozen=True):
    type: Literal["json_schema"]
    schema: dict[str, Any] | bool


class _OutputConfig(Struct, frozen=True):
    format: _Format | None = None


class _Edit(Struct, frozen=True):
    """An edit of the context, of which only the removal of thinking changes nothing here."""

    type: Literal["clear_thinking_20251015"]


class _ContextManagement(Struct, frozen=True):
    edits: list[_Edit] = []


class CountFields(Struct, frozen=True, kw_only=True):
    """The body of a request to count tokens."""

    messages: Annotated[list[_Message], Meta(min_length=1)]
    max_tokens: TokenCount | None = None
    system: str | list[_Text] | None = None
    temperature: Share | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    stop_sequences: Stops | None = None
    stream: bool | None = None
    tools: list[_Tool] | None = None
    tool_choice: _Choice | None = None
    output_config: _OutputConfig | None = None
    output_format: _Format | None = None  # the former name of output_config.format
    context_management: _ContextManagement | None = None

    unsupported: ClassVar[Unsupported] = OF_MESSAGES

    @property
    def response_format(self) -> dict[str, Any] | None:
        """What asks for the same form of the answer in /v1/chat/completions."""
        form = self.output_format
        if form is None and self.output_config:
            form = self.output_config.format
        if form is None:
            return None
        return {"type": "json_schema", "json_schema": {"schema": form.schema}}


class MessagesFields(CountFields, frozen=True, kw_only=True):
    """The body of a request for a message, which must say how long it may be."""

    max_tokens: TokenCount


def as_chat(raw: Mapping[str, Any], *, counting: bool = False) -> dict[str, Any]:
    """Return the body of /v1/chat/completions that means the same.

    Raise an ApiError if a field is invalid or unsupported or, unless tokens are only counted,
    max_tokens is missing.
    """
    kind = CountFields if counting else MessagesFields
    fields = read_fields(raw, kind)
    refuse_unsupported(raw, kind.unsupported)
    last = fields.messages[-1]
    if last.role == "assistant" and any(isinstance(each, _ToolUse) for each in last.content):
        raise invalid("the last message calls tools; send their results after it", "messages")
    system = [] if fields.system is None else [{"role": "system", "content": _text(fields.system)}]
    chat: dict[str, Any] = {
        "messages": [*system, *(part for each in fields.messages for part in _parts(each))],
        "max_tokens": fields.max_tokens,
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "top_k": fields.top_k,
        "stop": fields.stop_sequences or None,
        "stream": fields.stream,
        "tools": [_tool(each) for each in fields.tools or ()],
        "response_format": fields.response_format,
    }
    return extensions(raw, kind, chat) | _choice(fields.tool_choice)


def _parts(message: _Message) -> Iterator[dict[str, Any]]:
    """Yield a message, after the results of calls in it; thinking is left out."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    blocks = message.content
    for block in blocks:
        if isinstance(block, _ToolResult):
            result = _text(block.content or "")
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": result}
    texts = [block for block in blocks if isinstance(block, _Text)]
    calls = [_call(block) for block in blocks if isinstance(block, _ToolUse)]
    if texts or calls:
        called = {"tool_calls": calls} if calls else {}
        yield {"role": message.role, "content": _text(texts), **called}


def _call(block: _ToolUse) -> dict[str, Any]:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _text(content: str | Sequence[_Text]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _tool(tool: _Tool) -> dict[str, Any]:
    described = {} if tool.description is None else {"description": tool.description}
    function = {"name": tool.name, **described, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _choice(choice: _Choice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    if choice.type == "tool" and choice.name is None:
        raise missing("tool_choice.name")
    wanted: dict[str, Any] = {
        "auto": "auto",
        "none": "none",
        "any": "required",
        "tool": {"type": "function", "function": {"name": choice.name}},
    }
    parallel = not choice.disable_parallel_tool_use
    return {"tool_choice": wanted[choice.type], "parallel_tool_calls": parallel}


class MessagesWriter(Writer):
    """Writes one message, whose blocks are texts and calls of tools."""

    ping = b'event: ping\ndata: {"type": "ping"}\n\n'

    def __init__(self, model: str, options: Options, prompt_tokens: int, *, tools: bool) -> None:
        super().__init__(options, 1)
        self._model, self._prompt_tokens = model, prompt_tokens
        self._parser = ToolCallParser(tools)
        self._block, self._kind = -1, ""  # the number of the last block, and its type while open

    def begin(self) -> list[Document]:
        """Return the event that begins the message."""
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
        return [{"type": "message_start", "message": self._message([], None, usage)}]

    def piece(self, piece: Piece) -> list[Document]:
        return list(self._events(self._parser.add(piece.text)))

    def finish(self, finished: Finished) -> list[Document]:
        return [*self._events(self._parser.finish()), *self._close()]

    def end(self, finished: Sequence[Finished]) -> list[Document]:
        """Return the events that end the message."""
        [each] = finished
        delta = {"stop_reason": self._reason(each), "stop_sequence": each.stop}
        return [
            {"type": "message_delta", "delta": delta, "usage": _usage(each)},
            {"type": "message_stop"},
        ]

    def whole(self, choices: Sequence[tuple[Piece, Finished]]) -> Document:
        [(piece, finished)] = choices
        text, calls = joined([*self._parser.add(piece.text), *self._parser.finish()])
        content: list[Document] = [{"type": "text", "text": text}] if text else []
        content += [_tool_use(call.name) | {"input": _object(call.arguments)} for call in calls]
        return self._message(content, finished, _usage(finished))

    def failure(self, error: ApiError) -> Document:
        return error.anthropic

    def frame(self, document: Document) -> str:
        return f"event: {document['type']}\n{super().frame(document)}"

    def _message(
        self, content: list[Document], finished: Finished | None, usage: Document
    ) -> Document:
        return {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": self._reason(finished) if finished else None,
            "stop_sequence": finished.stop if finished else None,
            "usage": usage,
        }

    def _reason(self, finished: Finished) -> str:
        if finished.reason == "length":
            return "max_tokens"
        if finished.stop is not None:
            return "stop_sequence"
        return "tool_use" if self._parser.n_calls else "end_turn"

    def _events(self, parts: Sequence[Part]) -> Iterator[Document]:
        for part in parts:
            if isinstance(part, CallPart):
                if part.name is not None:
                    yield from self._open("tool_use", _tool_use(part.name))
                delta = {"type": "input_json_delta", "partial_json": part.arguments}
            else:
                if self._kind != "text":
                    yield from self._open("text", {"type": "text", "text": ""})
                delta = {"type": "text_delta", "text": part}
            yield {"type": "content_block_delta", "index": self._block, "delta": delta}

    def _open(self, kind: str, block: Document) -> Iterator[Document]:
        yield from self._close()
        self._block, self._kind = self._block + 1, kind
        yield {"type": "content_block_start", "index": self._block, "content_block": block}

    def _close(self) -> Iterator[Document]:
        if self._kind:
            self._kind = ""
            yield {"type": "content_block_stop", "index": self._block}


def _tool_use(name: str) -> Document:
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": name, "input": {}}


def _object(arguments: str) -> Any:
    """Return arguments as JSON; if they were cut off, an empty object."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def _usage(finished: Finished) -> Document:
    return {
        "input_tokens": finished.prompt_tokens - finished.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": finished.cached_tokens,
        "output_tokens": finished.completion_tokens,
    }
