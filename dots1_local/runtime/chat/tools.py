"""Tools and tool calls in the form that chat templates take."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from dots1_local.documents import brief
from dots1_local.errors import UsageError
from dots1_local.runtime.chat.message import Message, ToolCall

__all__ = ["as_variable", "refuse_markers"]


def as_variable(message: Message, text: str = "") -> dict[str, Any]:
    """A message as templates expect it, with `text` in place of its own.

    The content stays empty where a message with tool calls has no text: templates test for that.

    Raises:
        UsageError: the arguments of a call are no JSON object.
    """
    variable: dict[str, Any] = {"role": message.role, "content": text}
    if message.tool_calls:
        variable["content"] = text if message.text else ""
        variable["tool_calls"] = [_called(call) for call in message.tool_calls]
    if message.role == "tool":
        variable["tool_call_id"] = message.tool_call_id
    return variable


def refuse_markers(said: Sequence[Any], markers: Sequence[str]) -> None:
    """Make sure that what a template writes about tools contains none of its markers.

    Raises:
        UsageError: it contains one, or is not JSON.
    """
    try:
        texts = list(_texts(json.loads(json.dumps(said))))
    except (TypeError, ValueError, RecursionError):
        raise UsageError("the tools are not JSON, or nested too deeply") from None
    for marker in markers:
        if any(marker in text for text in texts):
            raise UsageError(
                f"the tools contain {marker}, which to the model is no text; write it otherwise"
            )


def _called(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise UsageError(f"the arguments of a call of {brief(call.name)} are no JSON object")
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, as it is and as JSON writes it."""
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
