"""Tools for any model: the grammar of calls, and messages for templates that know no tools.

A call is written as models of the Hermes and Qwen families write it:

<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dots1_local.chat.grammar import Grammar, embedded
from dots1_local.chat.message import Message
from dots1_local.engine.engine import Engine

__all__ = ["CALL_END", "CALL_START", "CallGrammar", "ToolChoice", "as_text"]

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
_DESCRIPTION = """\
# Tools
You may call these functions, of which each line describes one:
{tools}

To call a function, write its name and arguments as JSON between tags, for each call anew:
{start}
{{"name": "NAME", "arguments": {{"PARAMETER": "VALUE"}}}}
{end}
The results come between <tool_response> tags. Call a function only if you need its result."""
# `open` is lazy: where the tag is complete, a call begins, and the text before it ends.
_RULES = r"""
call: open tool close
open[lazy]: TEXT "<tool_call>"
bare: "<tool_call>" tool close
close: WS? "</tool_call>"
TEXT: /(.|\n)*/
WS: /[ \n]/
"""


@dataclass(frozen=True)
class ToolChoice:
    """Whether an answer must be calls, of which functions (None means any), and of several."""

    required: bool = False
    names: frozenset[str] | None = None
    parallel: bool = True


class CallGrammar(Grammar):
    """An answer that is text, or ends in calls of tools whose arguments match the tools' schemas.

    `tools` have the form of OpenAI's API. With a `schema`, an answer without calls is a JSON
    document that matches it.

    Raises:
        UsageError: a tool's parameters are not a schema, or use what llguidance does not support.
        Dots1Error: the engine's file does not say which token ends an answer.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]],
        engine: Engine,
        choice: ToolChoice,
        schema: Any = None,
    ) -> None:
        functions = [tool["function"] for tool in tools]
        if choice.names is not None:
            functions = [each for each in functions if each["name"] in choice.names]
        # No text follows a call: it could only be a result that the model makes up.
        more = "(WS? bare)* WS?" if choice.parallel else ""
        rules = [_RULES, *_tool_rules(functions)]
        if choice.required:
            rules.append(f"start: bare {more}")
        elif schema is not None:
            rules += [f"start: document | bare {more}", f"document: {_json_rule(schema)}"]
        else:
            rules.append(f"start: TEXT | call {more}")
        self._compile("\n".join(rules), engine)


def _tool_rules(functions: Sequence[Mapping[str, Any]]) -> list[str]:
    rules = ["tool: " + " | ".join(f"tool_{n}" for n in range(len(functions)))]
    for number, function in enumerate(functions):
        name = json.dumps(function["name"], ensure_ascii=False)
        parts = ("{", '"name"', ":", name, ",", '"arguments"', ":")
        written = " ".join(f"WS? {json.dumps(part, ensure_ascii=False)}" for part in parts)
        rules += [
            f'tool_{number}: {written} WS? arguments_{number} WS? "}}"',
            f"arguments_{number}: {_json_rule(function.get('parameters') or _NO_PARAMETERS)}",
        ]
    return rules


def _json_rule(schema: Any) -> str:
    return f"%json {json.dumps(embedded(schema))}"


def as_text(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> list[Message]:
    """Describe tools in the system message, and write calls and results as text.

    The results of several calls make up one message of the user.
    """
    written: list[Message] = []
    after_result = False
    for message in messages:
        if message.tool_calls:
            calls = "\n".join(
                f'{CALL_START}\n{{"name": {json.dumps(call.name, ensure_ascii=False)}, '
                f'"arguments": {call.arguments}}}\n{CALL_END}'
                for call in message.tool_calls
            )
            text = f"{message.text}\n{calls}" if message.text else calls
            written.append(Message("assistant", text))
        elif message.role == "tool":
            result = f"<tool_response>\n{message.text}\n</tool_response>"
            if after_result:
                result = f"{written.pop().text}\n{result}"
            written.append(Message("user", result))
        else:
            written.append(message)
        after_result = message.role == "tool"
    return _with_description(written, tools) if tools else written


def _with_description(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> list[Message]:
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _DESCRIPTION.format(tools=lines, start=CALL_START, end=CALL_END)
    if messages[0].role == "system":
        return [Message("system", f"{messages[0].text}\n\n{text}"), *messages[1:]]
    return [Message("system", text), *messages]
