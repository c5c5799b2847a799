"""OpenAI's Responses API: bodies read as conversations, and responses written as output items.

Nothing is stored: a conversation is sent whole, and `previous_response_id` is refused.
"""

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from dots1_local.serve.generation import Finished, Piece
from dots1_local.serve.http.chat_request import extensions
from dots1_local.serve.http.request import (
    ApiError,
    Name,
    Share,
    TokenCount,
    Unsupported,
    invalid,
    read_fields,
    refuse_unsupported,
)
from dots1_local.serve.http.response import Document, Writer
from dots1_local.serve.http.shared_fields import Options
from dots1_local.serve.http.unsupported import OF_RESPONSES
from dots1_local.serve.tool_calls import CallPart, Part, ToolCallParser

__all__ = ["ResponsesFields", "ResponsesWriter", "as_chat"]


_STORED = ("previous_response_id", "conversation", "prompt")
_LOGPROBS = "message.output_text.logprobs"


class _Text(Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class _InputText(_Text, frozen=True, tag="input_text"): ...


class _OutputText(_Text, frozen=True, tag="output_text"): ...


class _Refusal(Struct, frozen=True, tag_field="type", tag="refusal"):
    refusal: str


class _Tool(Struct, frozen=True):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _NamedTool(Struct, frozen=True):
    type: Literal["function"]
    name: Name


class _ToolChoice(Struct, frozen=True):
    type: Literal["function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[_NamedTool] = []

    def chat(self) -> dict[str, Any]:
        """Return what means the same in /v1/chat/completions."""
        if self.type == "function":
            return _named(self.name)
        tools = [_named(tool.name) for tool in self.tools]
        return {"type": self.type, "allowed_tools": {"mode": self.mode or "auto", "tools": tools}}


class _Format(Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | bool | None = None


class _TextOptions(Struct, frozen=True):
    format: _Format | None = None


class _Item(Struct, frozen=True):
    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[dict[str, Any]] | None = None


class ResponsesFields(Struct, frozen=True, kw_only=True):
    """The body of a request."""

    input: str | Annotated[list[_Item], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: TokenCount | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    stream: bool | None = None
    tools: list[_Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: _TextOptions | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None  # what does not fit is refused in both
    stream_options: dict[str, Any] | None = None

    unsupported: ClassVar[Unsupported] = OF_RESPONSES


def as_chat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of /v1/chat/completions that means the same.

    Raise an ApiError if a field is invalid or unsupported.
    """
    for name in _STORED:
        if raw.get(name):
            message = f"{name} is not supported: this server stores nothing; send all of the input"
            raise invalid(message, name, "unsupported")
    refuse_unsupported(raw, ResponsesFields.unsupported)
    fields = read_fields(raw, ResponsesFields)
    if _LOGPROBS in (fields.include or ()):
        raise invalid("include asks for logprobs, which are not supported here", "include")
    messages: list[dict[str, Any]] = []
    if fields.instructions is not None:
        messages.append({"role": "system", "content": fields.instructions})
    items = (
        [_Item(role="user", content=fields.input)]
        if isinstance(fields.input, str)
        else fields.input
    )
    for number, item in enumerate(items):
        _add(messages, item, f"input[{number}]")
    chat: dict[str, Any] = {
        "messages": messages,
        "max_tokens": fields.max_output_tokens,
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "stream": fields.stream,
        "tools": [{"type": "function", "function": _function(each)} for each in fields.tools or ()],
        "tool_choice": fields.tool_choice,
        "parallel_tool_calls": fields.parallel_tool_calls,
        "response_format": _response_format(fields.text),
    }
    if isinstance(fields.tool_choice, _ToolChoice):
        chat["tool_choice"] = fields.tool_choice.chat()
    return extensions(raw, ResponsesFields, chat)


def _named(name: str | None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name or ""}}


def _add(messages: list[dict[str, Any]], item: _Item, where: str) -> None:
    """Add an item to the messages; calls belong to the assistant's message before them."""
    if item.type == "reasoning":
        return
    if item.type == "function_call_output":
        result = _text(item.output, f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": item.call_id or "", "content": result})
    elif item.type == "function_call":
        function = {"name": item.name or "", "arguments": item.arguments or "{}"}
        call = {"id": item.call_id, "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": "", "tool_calls": []})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif item.role is None:
        raise invalid(f"{where}.role is missing", f"{where}.role")
    else:
        content = _text(item.content, f"{where}.content")
        messages.append({"role": item.role, "content": content})


def _text(content: str | list[dict[str, Any]] | None, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = read_fields(content or [], list[_Text | _InputText | _OutputText | _Refusal], where)
    return "\n".join(part.refusal if isinstance(part, _Refusal) else part.text for part in parts)


def _function(tool: _Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = tool.parameters
    return function


def _response_format(text: _TextOptions | None) -> dict[str, Any] | None:
    if text is None or text.format is None:
        return None
    if text.format.type != "json_schema":
        return {"type": text.format.type}
    return {"type": "json_schema", "json_schema": {"schema": text.format.schema}}


class ResponsesWriter(Writer):
    """Writes one response, whose items are messages and calls of functions."""

    def __init__(
        self, model: str, options: Options, raw: Mapping[str, Any], *, tools: bool
    ) -> None:
        super().__init__(options, 1)
        self._parser = ToolCallParser(tools)
        sampling = options.choice.sampling
        self._head = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": raw.get("instructions"),
            "max_output_tokens": raw.get("max_output_tokens"),
            "metadata": raw.get("metadata") or {},
            "parallel_tool_calls": raw.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": raw.get("text") or {"format": {"type": "text"}},
            "tool_choice": raw.get("tool_choice") or "auto",
            "tools": raw.get("tools") or [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
        }
        self._items: list[Document] = []
        self._is_open = False  # the last item
        self._events_sent = 0

    def begin(self) -> list[Document]:
        """Return the events that begin the response."""
        response = self._response("in_progress")
        return self._numbered(
            {"type": f"response.{name}", "response": response}
            for name in ("created", "in_progress")
        )

    def piece(self, piece: Piece) -> list[Document]:
        return self._numbered(self._events(self._parser.add(piece.text)))

    def finish(self, finished: Finished) -> list[Document]:
        events = [*self._events(self._parser.finish())]
        return self._numbered([*events, *self._close(_status(finished))])

    def end(self, finished: Sequence[Finished]) -> list[Document]:
        """Return the event that ends the response."""
        status = _status(finished[0])
        response = self._response(status, finished[0])
        return self._numbered([{"type": f"response.{status}", "response": response}])

    def whole(self, choices: Sequence[tuple[Piece, Finished]]) -> Document:
        [(piece, finished)] = choices
        for _ in self._events([*self._parser.add(piece.text), *self._parser.finish()]):
            pass  # they fill the items
        for _ in self._close(_status(finished)):
            pass
        return self._response(_status(finished), finished)

    def failure(self, error: ApiError) -> Document:
        document = {"type": "error", "code": error.code, "message": error.detail, "param": None}
        return self._numbered([document])[0]

    def frame(self, document: Document) -> str:
        return f"event: {document['type']}\n{super().frame(document)}"

    def _response(self, status: str, finished: Finished | None = None) -> Document:
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "output": self._items if finished else [],
            "usage": _usage(finished) if finished else None,
        }

    def _numbered(self, events: Iterable[Document]) -> list[Document]:
        """Give events their numbers in the stream."""
        first = self._events_sent
        numbered = [{**event, "sequence_number": n} for n, event in enumerate(events, first)]
        self._events_sent += len(numbered)
        return numbered

    def _events(self, parts: Sequence[Part]) -> Iterator[Document]:
        """Add parts to the items, and yield what tells of it."""
        for part in parts:
            if isinstance(part, CallPart):
                yield from self._call_part(part)
            else:
                yield from self._text_part(part)

    def _call_part(self, part: CallPart) -> Iterator[Document]:
        if part.name is not None:
            yield from self._close("completed")
            yield self._open(
                {
                    "type": "function_call",
                    "id": f"fc_{secrets.token_hex(12)}",
                    "call_id": f"call_{secrets.token_hex(12)}",
                    "name": part.name,
                    "arguments": "",
                    "status": "in_progress",
                }
            )
        if part.arguments:
            self._items[-1]["arguments"] += part.arguments
            yield self._of_item("response.function_call_arguments.delta", delta=part.arguments)

    def _text_part(self, text: str) -> Iterator[Document]:
        if not (self._is_open and self._items[-1]["type"] == "message"):
            yield from self._close("completed")
            item = {"type": "message", "id": f"msg_{secrets.token_hex(12)}", "role": "assistant"}
            yield self._open({**item, "status": "in_progress", "content": []})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._items[-1]["content"] = [part]
            yield self._of_item("response.content_part.added", content_index=0, part={**part})
        self._items[-1]["content"][0]["text"] += text
        yield self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=[])

    def _open(self, item: Document) -> Document:
        self._items.append(item)
        self._is_open = True
        number = len(self._items) - 1
        return {"type": "response.output_item.added", "output_index": number, "item": {**item}}

    def _close(self, status: str) -> Iterator[Document]:
        """End the open item, if there is one."""
        if not self._is_open:
            return
        self._is_open = False
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **done)
        else:
            [part] = item["content"]
            done = {"content_index": 0, "text": part["text"], "logprobs": []}
            yield self._of_item("response.output_text.done", **done)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        number = len(self._items) - 1
        yield {"type": "response.output_item.done", "output_index": number, "item": item}

    def _of_item(self, kind: str, **fields: Any) -> Document:
        number = len(self._items) - 1
        return {"type": kind, "item_id": self._items[-1]["id"], "output_index": number, **fields}


def _status(finished: Finished) -> str:
    return "incomplete" if finished.reason == "length" else "completed"


def _usage(finished: Finished) -> Document:
    return {
        "input_tokens": finished.prompt_tokens,
        "input_tokens_details": {"cached_tokens": finished.cached_tokens},
        "output_tokens": finished.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }
