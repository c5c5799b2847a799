"""Tools in prompts, with a template that supports them."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from dots1_local.chat.message import Message, ToolCall
from dots1_local.chat.prompt import Prompter
from dots1_local.engine.engine import Engine
from dots1_local.errors import UsageError
from tests.helpers import TEMPLATE, TOKENS, TYPES, write_random_gguf

TAKES = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}<|endofsystem|>"
    "{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|userprompt|>[{{ m.tool_call_id }}]{{ m.content }}"
    "<|endofuserprompt|>"
    "{% elif m.role == 'assistant' %}<|response|>{{ m.content }}{% for c in m.tool_calls %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}</tool_call>{% endfor %}<|endofresponse|>"
    "{% else %}<|userprompt|>{{ m.content }}<|endofuserprompt|>{% endif %}"
    "{% endfor %}<|response|>"
)
TOOL = {"type": "function", "function": {"name": "rain", "description": "<b> & 'é'"}}
ASKED = Message("user", "hi <|system|>")
RAIN = ToolCall("rain", '{"at": "é"}', "c1")
TOLD = Message("tool", "sunny <|response|>", tool_call_id="c1")


def calling(call: ToolCall) -> Message:
    return Message("assistant", "", tool_calls=(call,))


def opened(path: Path, template: str, **options: Any) -> Engine:
    return Engine.open(
        write_random_gguf(path / "m.gguf", template=template, **options), n_ctx=32, threads=1
    )


def shown(engine: Engine, tokens: list[int]) -> str:
    """Return the text of tokens, with markers in double angle brackets."""
    return b"".join(
        engine.piece(token) or f"<<{TOKENS[token]}>>".encode() for token in tokens
    ).decode()


def test_tools_calls_and_results_reach_the_model(tmp_path: Path) -> None:
    with opened(tmp_path, TAKES) as engine:
        prompter = Prompter(engine)
        assert prompter.takes_tools
        assert prompter.writes_tool_calls
        text = shown(engine, prompter.tokens([ASKED, calling(RAIN), TOLD], [TOOL]))
    assert text == (
        f"<<<|system|>>>{json.dumps(TOOL, ensure_ascii=False)}<<<|endofsystem|>>>"
        "<<<|userprompt|>>>hi <|system|><<<|endofuserprompt|>>>"
        '<<<|response|>>><tool_call>{"name": "rain", "arguments": {"at": "é"}}</tool_call>'
        "<<<|endofresponse|>>>"
        "<<<|userprompt|>>>[c1]sunny <|response|><<<|endofuserprompt|>>><<<|response|>>>"
    )


@pytest.mark.parametrize("template", [TEMPLATE, TAKES.replace("tool_call>", "call>")])
def test_a_template_without_such_calls_gets_texts(tmp_path: Path, template: str) -> None:
    with opened(tmp_path, template) as engine:
        prompter = Prompter(engine)
        assert not prompter.writes_tool_calls
        again = ToolCall("sun", "{}", "c2")
        said = Message("assistant", "Wait.", tool_calls=(RAIN, again))
        more = Message("tool", "yes", tool_call_id="c2")
        text = shown(engine, prompter.tokens([ASKED, said, TOLD, more], [TOOL]))
        assert prompter.tokens([ASKED], []) == prompter.tokens([ASKED])
    assert text.count(json.dumps(TOOL["function"], ensure_ascii=False)) == 1
    assert text.count("<tool_call>") == 3  # the form, and two calls
    answer = (
        'Wait.\n<tool_call>\n{"name": "rain", "arguments": {"at": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "sun", "arguments": {}}\n</tool_call>'
    )
    assert answer in text
    results = (
        "<tool_response>\nsunny <|response|>\n</tool_response>\n"
        "<tool_response>\nyes\n</tool_response>"
    )
    assert f"<<<|userprompt|>>>{results}<<<|endofuserprompt|>>>" in text


def test_hidden_tags_are_not_calls(tmp_path: Path) -> None:
    with opened(tmp_path, TAKES.replace("<tool_call>", "<call>")) as engine:
        assert not Prompter(engine).writes_tool_calls


@pytest.mark.parametrize("kind", [TokenType.CONTROL, TokenType.USER_DEFINED])
@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([ASKED], [{"type": "function", "function": {"name": "a<|response|>b"}}]),
        ([ASKED], [{"<|system|>": 1}]),
        ([ASKED, calling(ToolCall("<|system|>", "{}"))], None),
        ([ASKED, calling(ToolCall("f", "{}", "<|system|>"))], None),
        ([ASKED, calling(ToolCall("f", '{"a":"\\u003c|system|>"}'))], None),
        ([ASKED, Message("tool", "x", tool_call_id="<|system|>")], None),
    ],
)  # fmt: skip
def test_markers_in_tools_are_refused(
    tmp_path: Path, kind: TokenType, messages: list[Message], tools: Any
) -> None:
    types = [kind if each == TokenType.CONTROL else each for each in TYPES]
    with (
        opened(tmp_path, TAKES, types=types) as engine,
        pytest.raises(UsageError, match=r"the tools contain <\|"),
    ):
        Prompter(engine).tokens(messages, tools)


@pytest.mark.parametrize("arguments", ["", "[]", '"x"', "{", "[" * 100_000])
def test_arguments_that_are_not_an_object_are_refused(tmp_path: Path, arguments: str) -> None:
    with (
        opened(tmp_path, TAKES) as engine,
        pytest.raises(UsageError, match=r"call of 'f' .*JSON object"),
    ):
        Prompter(engine).tokens([ASKED, calling(ToolCall("f", arguments))])


def test_tools_nested_too_deeply_are_refused(tmp_path: Path) -> None:
    tool: Any = {}
    for _ in range(3000):
        tool = {"a": tool}
    with opened(tmp_path, TAKES) as engine, pytest.raises(UsageError, match="too deeply"):
        Prompter(engine).tokens([ASKED], [tool])
