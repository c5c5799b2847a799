import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dots1_local.chat.message import ToolCall
from dots1_local.serve.http.chat_writer import ToolCallParser

PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
CALL = ToolCall("weather", '{"city": "Paris"}')


def read(*pieces: str) -> tuple[str, list[ToolCall]]:
    reader = ToolCallParser()
    parts = [reader.add(piece) for piece in pieces] + [reader.finish()]
    return "".join(text for text, _ in parts), [call for _, calls in parts for call in calls]


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        ("plain", "plain", []),
        (PARIS, "", [CALL]),
        (f"Let me see.\n{PARIS}\n{PARIS}", "Let me see.", [CALL, CALL]),
        (f"a{PARIS}b", "ab", [CALL]),
        ('<tool_call>{"name": "now"}</tool_call>', "", [ToolCall("now", "{}")]),
        ('<tool_call>{"name": "é", "arguments": {"ü": 1}}', "", [ToolCall("é", '{"ü": 1}')]),
    ],
)
def test_calls_are_separated_from_text(answer: str, text: str, calls: list[ToolCall]) -> None:
    assert read(answer) == (text, calls)


@pytest.mark.parametrize(
    "answer",
    [
        "<tool_call>{}</tool_call>", "<tool_call>nothing</tool_call>", "a <tool_call>",
        '<tool_call>{"name": 1}</tool_call>', '<tool_call>["name"]</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "</tool_call>", "1 < 2  ",
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "<tool_", "\n <",
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
)  # fmt: skip
def test_anything_but_a_call_stays_text(answer: str) -> None:
    assert read(answer) == (answer, [])


PARTS = st.sampled_from([PARIS, "text", " ", "\n", "<", "<tool_call>", "</tool_call>", "{}", "中"])


@given(parts=st.lists(PARTS, max_size=6), data=st.data())
def test_the_pieces_of_an_answer_make_no_difference(parts: list[str], data: st.DataObject) -> None:
    answer = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=5)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert read(*pieces) == read(answer)


def test_text_that_cannot_begin_a_call_is_returned_at_once() -> None:
    reader = ToolCallParser()
    assert reader.add("Hello") == ("Hello", [])
    assert reader.add(" <") == ("", [])
    assert reader.add("b>\n") == (" <b>", [])
    assert reader.add("<tool_call>{") == ("", [])
    assert reader.add('"name": "f"}</tool_call> and') == (" and", [ToolCall("f", "{}")])
    assert reader.finish() == ("", [])


def test_arguments_are_json() -> None:
    text = '{"name": "f", "arguments": {"a": [1.50, null]}}'
    (call,) = read(f"<tool_call>{text}</tool_call>")[1]
    assert json.loads(call.arguments) == {"a": [1.5, None]}
