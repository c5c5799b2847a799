"""Tools in a chat request, and the tool calls in its messages."""

from typing import Any

from dots1_local.runtime.chat.message import ToolCall
from dots1_local.serve.http.errors import invalid
from dots1_local.serve.http.fields import Fields

__all__ = ["take_calls", "take_tools"]

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
