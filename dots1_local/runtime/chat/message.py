"""What is said in a conversation: messages and who they are by."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Message", "ToolCall"]


@dataclass(frozen=True)
class ToolCall:
    """The model's call of a tool; `arguments` is a JSON object as text."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One message; `tokens` are those the model wrote, which its text may not tokenise to again.

    An assistant's may end in `tool_calls`. A tool's is the result of the call `tool_call_id`.
    """

    role: Literal["system", "user", "assistant", "tool"]
    text: str
    tokens: tuple[int, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
