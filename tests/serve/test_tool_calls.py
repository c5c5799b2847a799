import pytest
from hypothesis import given
from hypothesis import strategies as st

from dots1_local.chat.message import ToolCall
from dots1_local.serve.tool_calls import CallPart, Part, ToolCallParser, joined

PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
CALL = ToolCall("weather", '{"city": "Paris"}')


def read(*pieces: str) -> tuple[str, list[ToolCall]]:
    reader = ToolCallParser()
    parts: list[Part] = [part for piece in pieces for part in reader.add(piece)]
    return joined([*parts, *reader.finish()])


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        ("plain", "plain", []),
        (PARIS, "", [CALL]),
        (f"Let me see.\n{PARIS}\n{PARIS}", "Let me see.", [CALL, CALL]),
        (f"a{PARIS}b", "ab", [CALL]),
        (f"a\n{PARIS}\n", "a", [CALL]),
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
        '<tool_call>{"name": "now"}</tool_call>', "<tool_", "\n <",
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


def test_parts_are_returned_as_soon_as_they_are_certain() -> None:
    reader = ToolCallParser()
    assert reader.add("Hello") == ["Hello"]
    assert reader.add(" <") == []
    assert reader.add("b>\n") == [" <b>"]
    assert reader.add("<tool_call>{") == []
    assert reader.add('"name": "f", "argu') == []
    assert reader.add('ments": {"a": "}') == [CallPart(0, "f", ""), CallPart(0, None, '{"a": "}')]
    assert reader.add('\\"", "b": [') == [CallPart(0, None, '\\"", "b": [')]
    assert reader.add("{}]} }</tool") == [CallPart(0, None, "{}]}")]
    assert reader.add("_call> and") == [" and"]
    assert reader.finish() == []
    assert reader.n_calls == 1


def test_arguments_are_passed_on_as_they_are_written() -> None:
    text = '{"name": "f", "arguments": {"a": [1.50, null]}}'
    (call,) = read(f"<tool_call>{text}</tool_call>")[1]
    assert call.arguments == '{"a": [1.50, null]}'


def test_arguments_that_were_cut_off_are_kept() -> None:
    assert read('<tool_call>{"name": "f", "arguments": {"a": "x') == (
        "",
        [ToolCall("f", '{"a": "x')],
    )
