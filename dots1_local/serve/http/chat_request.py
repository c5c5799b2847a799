"""Tools in a chat request, and the tool calls in its messages.

The body of POST /v1/chat/completions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dots1_local.chat.dialogue import SYSTEM_PROMPT
from dots1_local.chat.message import Message, ToolCall
from dots1_local.serve.http.body import Fields
from dots1_local.serve.http.errors import invalid
from dots1_local.serve.http.options import MOST_TOKENS, Options, refuse_unsupported, take_options

__all__ = [
    "ChatRequest",
    "take_calls",
    "take_chat",
    "take_tools",
]


_MOST = 128  # as OpenAI's


def take_tools(fields: Fields) -> tuple[dict[str, Any], ...]:
    """The tools that the model may call.

    Raises:
        ApiError: one is malformed, or tool_choice demands a call.
    """
    tools = fields.items("tools", _MOST) or []
    for index, each in enumerate(tools):
        _check_tool(Fields(each, f"tools[{index}]."))
    choice = fields.value("tool_choice")
    if choice not in (None, "auto", "none"):
        raise invalid("tool_choice is auto or none here: a model cannot be made to", "tool_choice")
    return () if choice == "none" else tuple(tools)


def take_calls(message: Fields) -> tuple[ToolCall, ...]:
    """The tool calls at the end of an assistant's message.

    Raises:
        ApiError: one is malformed.
    """
    calls, name = message.items("tool_calls", _MOST) or [], message.name("tool_calls")
    return tuple(_call(Fields(each, f"{name}[{index}].")) for index, each in enumerate(calls))


def _check_tool(tool: Fields) -> None:
    function = _function(tool)
    function.text("description")
    function.group("parameters")


def _call(call: Fields) -> ToolCall:
    function = _function(call)
    arguments = function.text("arguments")
    if arguments is None:
        raise function.required("arguments", "a JSON object as a string")
    return ToolCall(function.text("name") or "", arguments or "{}", call.text("id") or "")


def _function(tool: Fields) -> Fields:
    """The function of a tool or of a call, which must have a name."""
    tool.choice("type", ("function",))
    function = tool.group("function")
    if function is None:
        raise tool.required("function", "an object with a name")
    if not function.text("name"):
        raise function.required("name", "what the function is called")
    return function


_MOST_MESSAGES = 1 << 14
_MOST_PARTS = 1 << 10
_ROLES = ("system", "developer", "user", "assistant", "tool")
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "web_search_options": (),
}


@dataclass(frozen=True)
class ChatRequest:
    """A conversation to answer, and the tools that the model may call."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    options: Options


def take_chat(fields: Fields, n_vocab: int) -> ChatRequest:
    """The request in a body.

    Raises:
        ApiError: a field is not what it must be.
    """
    refuse_unsupported(fields, _UNSUPPORTED)
    tools = take_tools(fields)
    messages = tuple(_messages(fields))
    if not any(message.role == "system" for message in messages):
        messages = (Message("system", SYSTEM_PROMPT), *messages)
    messages = tuple(message for message in messages if message.role != "system" or message.text)
    if not messages:
        raise invalid("messages has nothing to answer", "messages")
    max_tokens = fields.integer("max_completion_tokens", 1, MOST_TOKENS)
    older = fields.integer("max_tokens", 1, MOST_TOKENS)
    options = take_options(
        fields, n_vocab, older if max_tokens is None else max_tokens, _top_logprobs(fields)
    )
    if tools and options.grammar:  # which would let no call be written
        raise invalid("response_format does not go together with tools", "response_format")
    return ChatRequest(messages, tools, options)


def _messages(fields: Fields) -> Iterator[Message]:
    """The messages as given; an empty system message means that there is to be none."""
    raw = fields.items("messages", _MOST_MESSAGES)
    if not raw:
        raise fields.required("messages", "a list of at least one message")
    for index, each in enumerate(raw):
        message = Fields(each, f"messages[{index}].")
        role = message.choice("role", _ROLES)
        if role is None:
            raise message.required("role", f"one of {', '.join(_ROLES)}")
        if message.value("function_call"):
            raise invalid(
                "function_call is not supported; use tool_calls", message.name("function_call")
            )
        yield _message(message, role)


def _message(message: Fields, role: str) -> Message:
    if role == "assistant":
        calls = take_calls(message)
        said = _content(message) if not calls or message.value("content") is not None else ""
        return Message("assistant", said, tool_calls=calls)
    text = _content(message)
    if role == "tool":
        call = message.text("tool_call_id")
        if call is None:
            raise message.required("tool_call_id", "the id of the call that it answers")
        return Message("tool", text, tool_call_id=call)
    return Message("user" if role == "user" else "system", text)


def _content(message: Fields) -> str:
    """The text of a message, with a line break between its parts."""
    content = message.value("content")
    if content is None:
        raise message.required("content", "a string or a list of text parts")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or len(content) > _MOST_PARTS:
        raise message.wrong("content", f"a string or a list of at most {_MOST_PARTS:,} text parts")
    name = message.name("content")
    return "\n".join(_part(Fields(part, f"{name}[{i}].")) for i, part in enumerate(content))


def _part(part: Fields) -> str:
    kind = part.text("type")
    if kind not in ("text", "refusal"):
        raise invalid(
            f"{part.name('type')} is {kind}; this model reads text only", part.name("type")
        )
    text = part.text(kind)
    if text is None:
        raise part.required(kind, "a string")
    return text


def _top_logprobs(fields: Fields) -> int | None:
    """How many likeliest tokens to give for each; None for no logprobs at all."""
    top = fields.integer("top_logprobs", 0, 20)
    if fields.boolean("logprobs"):
        return top or 0
    if top:
        raise invalid("top_logprobs needs logprobs; set that to true", "top_logprobs")
    return None
