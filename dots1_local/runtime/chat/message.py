"""What is said in a conversation: messages and who they are by."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Message", "ToolCall"]


@dataclass(frozen=True)
class ToolCall:
    """What the model wants of a tool; `arguments` is a JSON object as text."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn; `tokens` are those the model itself wrote, which text may not reproduce.

    The assistant's may end in `tool_calls`; a tool's tells what one of them came to.
    """

    role: Literal["system", "user", "assistant", "tool"]
    text: str
    tokens: tuple[int, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
