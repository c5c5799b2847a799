"""Bodies of OpenAI's Responses API, read as conversations.

Nothing is stored: a conversation is sent whole, and `previous_response_id` is refused.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from dots1_local.serve.http.chat_request import extensions
from dots1_local.serve.http.request import (
    Name,
    Share,
    TokenCount,
    Unsupported,
    invalid,
    read_fields,
    refuse_unsupported,
)
from dots1_local.serve.http.unsupported import OF_RESPONSES

__all__ = ["ResponsesFields", "as_chat"]


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
