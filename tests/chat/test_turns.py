from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dots1_local.chat.message import Message
from dots1_local.chat.turns import AnswerText, drop_oldest, last_turn, turns_to_drop
from dots1_local.errors import UsageError

SYSTEM, NOTE = Message("system", "s"), Message("system", "note")
TEXTS = st.text("ab中", max_size=12)
STOPS = st.lists(st.text("ab中", min_size=1, max_size=4), max_size=3).map(tuple)


def before_first(text: str, stops: tuple[str, ...]) -> str:
    """Cut the text at the stop string that begins first, by trying every place."""
    places = (at for at in range(len(text)) if any(text[at:].startswith(stop) for stop in stops))
    return text[: next(places, len(text))]


def pieces(text: str, cuts: list[int]) -> list[bytes]:
    raw = text.encode()
    places = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    return [raw[a:b] for a, b in pairwise(places)]


def listen(parts: list[bytes], stops: tuple[str, ...]) -> tuple[AnswerText, list[str]]:
    answer = AnswerText(stops)
    given_out = []
    for token, part in enumerate(parts):
        given_out.append(answer.add(token, part))
        if answer.stopped:
            break
    given_out.append(answer.finish())
    return answer, given_out


@settings(max_examples=1000)
@given(text=TEXTS, stops=STOPS, cuts=st.lists(st.integers(0, 99), max_size=20))
def test_text_ends_before_the_first_stop_string_wherever_tokens_are_cut(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    parts = pieces(text, cuts)
    answer, given_out = listen(parts, stops)
    expected = before_first(text, stops)
    assert "".join(given_out) == expected
    assert (answer.stopped is not None) == (expected != text)
    assert text.startswith(answer.stopped or "", len(expected))
    message = answer.message()
    assert message.text == expected
    ends = [len(b"".join(parts[:n])) for n in range(len(parts) + 1)]
    exact = len(expected.encode()) in ends
    assert (message.tokens is not None) == exact
    if message.tokens is not None:
        assert b"".join(parts[token] for token in message.tokens).decode() == expected


@given(text=TEXTS, stop=st.text("ab中", min_size=1, max_size=4))
def test_only_the_beginning_of_a_stop_string_is_held_back(text: str, stop: str) -> None:
    answer, so_far = AnswerText((stop,)), ""
    for token, character in enumerate(text):
        so_far += answer.add(token, character.encode())
        if answer.stopped:
            break
        assert stop.startswith(text[len(so_far) : token + 1])


def test_an_unfinished_character_is_dropped() -> None:
    answer, given_out = listen([b"a", b"\xe4", b"\xb8"], ())
    assert given_out == ["a", "", "", ""]
    assert answer.message().tokens == (0,)


def test_invalid_utf8_is_replaced() -> None:
    answer, given_out = listen([b"a\xff", b"b"], ())
    assert given_out == ["a\ufffd", "b", ""]
    assert answer.message().tokens == (0, 1)


def test_an_answer_cut_off_keeps_what_was_shown() -> None:
    answer = AnswerText(("<end>",))
    assert answer.add(5, b"hi <e") == "hi "
    assert answer.message().text == "hi "
    assert answer.message().tokens is None
    assert answer.finish() == "<e"
    assert answer.message().tokens == (5,)


def test_refuses_an_empty_stop_string() -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        AnswerText(("a", ""))


def turn(size: int) -> list[Message]:
    """Return a question of `size` - 1 characters and an answer of one."""
    return [Message("user", "u" * (size - 1)), Message("assistant", "a")]


def size(messages: list[Message]) -> int:
    return sum(len(message.text) for message in messages)


def to_drop(messages: list[Message], limit: int) -> int:
    return turns_to_drop(messages, lambda kept: size(list(kept)), limit)


def test_a_turn_is_a_question_and_what_follows() -> None:
    messages = [SYSTEM, *turn(2), NOTE, *turn(3), Message("user", "now")]
    assert last_turn(messages) == 6
    assert drop_oldest(messages, 0) == messages
    assert drop_oldest(messages, 1) == [SYSTEM, NOTE, *messages[4:]]
    assert drop_oldest(messages, 2) == [SYSTEM, NOTE, messages[-1]]
    assert last_turn([SYSTEM]) is None


def test_the_remaining_turns_take_half_of_the_room() -> None:
    messages = [SYSTEM, *(each for _ in range(20) for each in turn(10)), Message("user", "x" * 9)]
    # Of 110 tokens, system and question take 10; five turns of 10 are half of the other 100.
    assert to_drop(messages, 110) == 15


def test_all_turns_are_dropped_if_all_are_too_many() -> None:
    messages = [SYSTEM, *turn(10), *turn(10), Message("user", "x" * 99)]
    assert to_drop(messages, 50) == 2
    assert to_drop(messages[-1:], 50) == 0
    assert to_drop([SYSTEM], 0) == 0
