"""Requests that a server refuses until old turns, long answers or extensions are left out."""

import pytest

from dots1_local.chat.message import Message
from dots1_local.errors import Dots1Error
from tests.chat.remote.conftest import Talk, say, texts
from tests.openai_server import answer, as_json, refused

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
TOO_LONG = (
    "This model's maximum context length is 2048 tokens. However, your request has 3000 input "
    "tokens. Please reduce the length of the input messages."
)
TOO_LARGE = (
    "'max_tokens' or 'max_completion_tokens' is too large: 4096. This model's maximum context "
    "length is 2048 tokens and your request has 26 input tokens (4096 > 2048 - 26)."
)


def test_raw_asks_for_as_much_as_the_context_holds(talk: Talk) -> None:
    session, server = talk(refused(TOO_LARGE), answer("a"), raw=True)
    say(session, "ab")
    assert [each["max_tokens"] for each in server.bodies] == [2048, 2022]
    wants = as_json({"detail": [{"loc": ["body", "max_tokens"], "msg": "not an integer"}]}, 422)
    nameless = as_json({"data": [{"id": "m"}]})
    session, server = talk(wants, answer("a"), models=nameless, raw=True)
    say(session, "ab")
    assert [each["max_tokens"] for each in server.bodies] == [None, 1024]


def test_the_oldest_turns_are_dropped(talk: Talk) -> None:
    session, server = talk(*[answer("a", prompt=50)] * 3, refused(TOO_LONG), answer("b"))
    for number in range(3):
        say(session, f"question {number}" + "." * 1000)
    assert say(session, "the last " + "x" * 2000) == "b"
    *_, whole, shortened = (len(body["messages"]) for body in server.bodies)
    assert whole == 8
    assert shortened < 8
    assert session.stats is not None
    assert session.stats.dropped_turns == (8 - shortened) // 2
    assert len(session.context) == shortened + 1
    assert len(session.messages) == whole + 1  # the record keeps all turns
    assert texts(session)[0] == SYSTEM["content"]


def test_without_numbers_half_the_turns_are_dropped_at_a_time(talk: Talk) -> None:
    silent = as_json({"error": {"code": "context_length_exceeded"}}, 400)
    nameless = as_json({"data": [{"id": "m"}]})
    session, server = talk(silent, silent, answer("b"), silent, models=nameless)
    session.messages += [Message(r, "x") for r in ("user", "assistant") * 5]
    assert session.n_ctx is None
    say(session, "last")
    assert [len(body["messages"]) // 2 for body in server.bodies] == [6, 3, 2]
    session.overflow = "stop"
    with pytest.raises(Dots1Error, match="context"):
        say(session, "next")


def test_turns_are_dropped_in_time_if_the_server_counts_tokens(talk: Talk) -> None:
    session, server = talk(answer("a", prompt=1000), answer("b", prompt=1000), answer("c"))
    for text in ("x" * 1000, "y" * 500, "z"):
        say(session, text)
    # 1,500 bytes and the template were 1,000 tokens; the limit is three quarters of 2,048.
    assert [len(body["messages"]) for body in server.bodies] == [2, 4, 6]
    session, server = talk(answer("a", prompt=1500), answer("b"))
    say(session, "x" * 1000)
    say(session, "y" * 500)
    assert [len(body["messages"]) for body in server.bodies] == [2, 2]


@pytest.mark.parametrize(("before", "remedy"), [(1, "overflow"), (0, "shorten")])
def test_a_question_that_does_not_fit_is_refused_with_both_numbers(
    talk: Talk, before: int, remedy: str
) -> None:
    session, _ = talk(
        *[answer("a")] * before, refused(TOO_LONG), overflow="stop" if before else "drop"
    )
    for _ in range(before):
        say(session, "hi")
    said = texts(session)
    with pytest.raises(Dots1Error, match=f"3,000 .*2,048; .*{remedy}"):
        say(session, "long")
    assert texts(session) == said


def test_a_limit_beyond_the_context_is_lowered(talk: Talk) -> None:
    session, server = talk(refused(TOO_LARGE), answer("a"), max_tokens=4096)
    assert say(session, "hi") == "a"
    assert [body["max_tokens"] for body in server.bodies] == [4096, 2022]


def test_a_parameter_that_the_server_rejects_is_left_out_and_told_once(
    talk: Talk, told: list[str]
) -> None:
    session, server = talk(
        refused("Unrecognized request argument supplied: top_k", bare=True),
        refused("Unknown parameter: 'stream_options'."),
        answer("a"),
        answer("b"),
    )
    assert say(session, "hi") + say(session, "again") == "ab"
    assert {"top_k", "min_p"} & server.bodies[0].keys() == {"top_k", "min_p"}
    assert not {"top_k", "min_p", "stream_options"} & server.bodies[3].keys()
    assert len(told) == 2
    for sentence, name in zip(told, ("top_k", "stream_options"), strict=True):
        assert name in sentence
