"""Conversations that do not fit into the context."""

from itertools import pairwise
from typing import Any

import pytest

from dots1_local.chat.message import Message, Stats
from dots1_local.chat.prompt import Prompter
from dots1_local.chat.session import Session
from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error, GGUFError
from tests.chat.conftest import Talk
from tests.helpers import EOS, TEMPLATE, tokens_of

LONG = [*range(65, 120), EOS]  # an answer of 55 tokens
ENDLESS = [*tokens_of("abcdefg"), *tokens_of("a")]


def stats(session: Session) -> Stats:
    assert session.stats is not None
    return session.stats


def say(session: Session, text: str, **options: Any) -> str:
    return "".join(session.ask(text, **options))


def asked(session: Session) -> list[str]:
    """The questions in the context."""
    return [message.text for message in session.context if message.role == "user"]


def test_whole_oldest_turns_make_room(talk: Talk) -> None:
    session = talk(LONG, n_ctx=256, system="S")
    dropped = []
    for number in range(12):
        assert say(session, f"question {number}") == bytes(LONG[:-1]).decode()
        dropped.append(stats(session).dropped_turns)
        assert stats(session).stop == "end"
        assert session.messages[0] == Message("system", "S")
        assert asked(session) == [f"question {n}" for n in range(sum(dropped), number + 1)]
        assert len(session.messages) == 1 + 2 * (number + 1)
    # A turn is about 70 tokens: three fit, and a quarter must be free for an answer.
    assert dropped[:3] == [0, 0, 0]
    assert sum(dropped) > 6


def test_dropping_is_not_repeated_at_every_turn(talk: Talk) -> None:
    session = talk([*tokens_of("yes"), EOS], n_ctx=512)
    drops, computed = 0, []
    for number in range(200):
        say(session, f"question {number}")
        drops += stats(session).dropped_turns > 0
        computed.append(stats(session).prompt_tokens - stats(session).reused_tokens)
    # 200 turns of about 20 tokens; each drop frees about half of three quarters of 512.
    assert 10 < drops < 30
    assert sum(size > 30 for size in computed[1:]) == drops


def test_the_question_alone_may_use_the_room_meant_for_the_answer(talk: Talk) -> None:
    session = talk([*tokens_of("yes"), EOS], n_ctx=64, system="S")
    say(session, "one")
    assert say(session, "x" * 50) == "yes"
    assert asked(session) == ["x" * 50]
    assert stats(session).dropped_turns == 1


@pytest.mark.parametrize("overflow", ["drop", "stop"])
def test_a_question_that_cannot_fit_is_refused(talk: Talk, overflow: str) -> None:
    session = talk([*tokens_of("yes"), EOS], n_ctx=64, system="S", overflow=overflow)
    say(session, "one")
    before = list(session.messages)
    with pytest.raises(Dots1Error, match=r"context holds 64; .* --context"):
        session.ask("x" * 64)
    session.clear()
    with pytest.raises(Dots1Error, match=r"prompt .*1,006 tokens .*shorten"):
        session.ask("x" * 1000)
    session.messages = list(before)
    assert session.messages == before
    assert say(session, "two") == "yes"


def test_stopping_refuses_and_says_both_numbers(talk: Talk, submitted: list[int]) -> None:
    session = talk(LONG, n_ctx=128, system="", overflow="stop")
    say(session, "x" * 20)
    submitted.clear()
    with pytest.raises(Dots1Error, match=r"128 tokens .*128; set overflow"):
        session.ask("x" * (128 - 3 - 20 - 55 - 4))
    assert submitted == []
    assert len(session.messages) == 2


def test_stopping_ends_an_answer_with_the_context(talk: Talk) -> None:
    session = talk(ENDLESS, n_ctx=64, overflow="stop")
    say(session, "hi")
    assert stats(session).stop == "context"
    assert stats(session).prompt_tokens + stats(session).generated_tokens == 64


def test_one_turn_alone_ends_with_the_context(talk: Talk) -> None:
    session = talk(ENDLESS, n_ctx=64, overflow="drop")
    say(session, "hi")
    assert (stats(session).stop, stats(session).dropped_turns) == ("context", 0)


def test_an_answer_continues_beyond_the_context(
    talk: Talk, submitted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "is_end", lambda engine, token: False)
    session = talk(n_ctx=160, system="S")
    for number in range(3):
        say(session, f"question {number}", max_tokens=12)
    submitted.clear()
    say(session, "more", max_tokens=120)
    assert (stats(session).stop, stats(session).generated_tokens) == ("length", 120)
    assert (stats(session).dropped_turns, asked(session)) == (3, ["more"])
    answer = session.messages[-1].tokens
    assert answer is not None

    # From where the context was full, each token is the likeliest after what is left.
    engine = talk(n_ctx=160)._engine
    tokens = Prompter(engine).tokens(session.context[:-1])
    already = 160 - stats(session).prompt_tokens
    known = len("<S>") + 1  # the system message and <|userprompt|>
    assert sorted(submitted[1:])[-2:] == [1, len(tokens) + already - known]
    tokens += answer[:already]
    logits = engine.decode(tokens, 0)
    for token in answer[already:]:
        assert token == logits.argmax()
        logits = engine.decode([token], len(tokens))
        tokens.append(token)


def test_raw_documents_lose_their_beginning(talk: Talk) -> None:
    session = talk(ENDLESS, n_ctx=64, raw=True)
    for _ in range(5):
        say(session, "xxxxx", max_tokens=10)
    assert stats(session).stop == "length"
    assert len(asked(session)) < 5
    assert session.context_used <= 64


def test_a_template_that_refuses_the_remaining_turns_is_an_error(talk: Talk) -> None:
    picky = "{% if messages|length == 3 %}{{ raise_exception('three') }}{% endif %}" + TEMPLATE
    session = talk(LONG, n_ctx=128, system="", gguf={"template": picky})
    say(session, "x" * 30)
    with pytest.raises(GGUFError, match="three"):
        session.ask("x" * 30)
    assert [m.role for m in session.messages] == ["user", "assistant"]


def test_messages_may_be_in_any_order(talk: Talk) -> None:
    session = talk(LONG, n_ctx=128, system="S")
    odd = [
        Message("assistant", "a" * 40),
        Message("system", "T"),
        Message("user", "b" * 40),
        Message("user", "c"),
    ]
    session.messages += odd
    say(session, "d")
    assert [m.text for m in session.context][:3] == ["S", "T", "c"]
    assert all(a.role != "user" or b.role != "system" for a, b in pairwise(session.context))


def test_what_left_the_context_is_there_again_if_a_turn_is_undone(talk: Talk) -> None:
    session = talk([*tokens_of("yes"), EOS], n_ctx=64, system="S")
    say(session, "one")
    say(session, "x" * 50)
    session.undo()
    say(session, "two")
    assert asked(session) == ["one", "two"]
