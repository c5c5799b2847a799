from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dots1_local.chat.turns import AnswerText
from dots1_local.errors import UsageError

TEXTS = st.text("ab中", max_size=12)
STOPS = st.lists(st.text("ab中", min_size=1, max_size=4), max_size=3).map(tuple)


def before_first(text: str, stops: tuple[str, ...]) -> str:
    """The text up to the stop string that begins first, by trying every place."""
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
    assert answer.stopped == (expected != text)
    message = answer.message()
    assert message.text == expected
    ends = [len(b"".join(parts[:n])) for n in range(len(parts) + 1)]
    exact = len(expected.encode()) in ends
    assert (message.tokens is not None) == exact
    if message.tokens is not None:
        assert b"".join(parts[token] for token in message.tokens).decode() == expected


@given(text=TEXTS, stop=st.text("ab中", min_size=1, max_size=4))
def test_only_what_begins_the_stop_string_is_held_back(text: str, stop: str) -> None:
    answer, so_far = AnswerText((stop,)), ""
    for token, character in enumerate(text):
        so_far += answer.add(token, character.encode())
        if answer.stopped:
            break
        assert stop.startswith(text[len(so_far) : token + 1])


def test_an_unfinished_character_is_neither_text_nor_kept() -> None:
    answer, given_out = listen([b"a", b"\xe4", b"\xb8"], ())
    assert given_out == ["a", "", "", ""]
    assert answer.message().tokens == (0,)


def test_what_is_no_text_at_all_is_replaced() -> None:
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
