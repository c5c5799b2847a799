from itertools import islice
from random import Random
from typing import Any

import pytest

from dots1_local.chat.dialogue import SYSTEM_PROMPT
from dots1_local.chat.message import Message, Stats
from dots1_local.chat.session import Session
from dots1_local.errors import GGUFError, UsageError
from tests.chat.conftest import Talk
from tests.helpers import EOS, EOT, TOKENS, tokens_of

MARKER = {name: TOKENS.index(name) for name in TOKENS if name.startswith("<|")}
YES = [*tokens_of("yes"), EOS]


def stats(session: Session) -> Stats:
    assert session.stats is not None
    return session.stats


def say(session: Session, text: str, **options: Any) -> str:
    return "".join(session.ask(text, **options))


def test_streams_whole_characters(talk: Talk) -> None:
    session = talk([*tokens_of("中文"), EOS])
    assert list(session.ask("hi")) == ["", "", "中", "", "", "文"]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_a_cut_never_shows_part_of_a_character(talk: Talk, length: int) -> None:
    session = talk([*tokens_of("中文"), EOS])
    assert say(session, "hi", max_tokens=length) == "中文"[: length // 3]
    assert (stats(session).stop, stats(session).generated_tokens) == ("length", length)
    assert session.messages[-1].tokens == tuple(tokens_of("中文"[: length // 3]))


@pytest.mark.parametrize("end", [EOS, EOT])
def test_stops_at_either_end_token(talk: Talk, end: int) -> None:
    session = talk([*tokens_of("yes"), end, *tokens_of("no")])
    assert say(session, "hi") == "yes"
    assert stats(session).stop == "end"


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (("def",), "abc", 6),  # as many as were needed to see it
        (("xyz", "f", "ef"), "abcd", 6),
        (("cdz", "e"), "abcd", 5),
        (("cdef", "d"), "ab", 6),  # the one that begins first, though it ends last
        (("cdez", "d"), "abc", 6),
        (("efgz",), "abcdefg", 7),
        (("hello",), "abcdefg", 7),
    ],
)
def test_stops_before_a_stop_string(
    talk: Talk, stop: tuple[str, ...], text: str, tokens: int
) -> None:
    session = talk([*tokens_of("abcdefg"), EOS], stop=stop)
    assert say(session, "hi") == session.messages[-1].text == text
    assert stats(session).stop == ("end" if text == "abcdefg" else "stop")
    assert stats(session).generated_tokens == tokens
    assert session.messages[-1].tokens == tuple(tokens_of(text))


def test_a_stop_string_inside_a_token_leaves_text_without_tokens(talk: Talk) -> None:
    session = talk([TOKENS.index("hello"), ord("."), EOS], stop=("llo",))
    assert say(session, "hi") == "he"
    assert session.messages[-1] == Message("assistant", "he", None)
    assert say(session, "again") == "he"


def test_refuses_an_empty_stop_string_and_an_answer_of_nothing(talk: Talk) -> None:
    session = talk(YES)
    with pytest.raises(UsageError, match="max_tokens"):
        session.ask("hi", max_tokens=0)
    session.stop = ("",)
    with pytest.raises(UsageError, match="stop string is empty"):
        session.ask("hi")


def test_a_second_turn_computes_only_what_is_new(talk: Talk, submitted: list[int]) -> None:
    session = talk(YES)
    say(session, "one")
    first = stats(session)
    assert first.reused_tokens == 0
    assert submitted == [first.prompt_tokens, 1, 1, 1]  # each of "yes", to ask what follows
    submitted.clear()
    assert say(session, "two") == "yes"
    second = stats(session)
    assert second.reused_tokens == first.prompt_tokens + first.generated_tokens
    new = [EOS, MARKER["<|userprompt|>"], *b"two", MARKER["<|endofuserprompt|>"]]
    assert submitted == [len(new) + 1, 1, 1, 1]  # and <|response|>
    assert session.context_used == second.prompt_tokens + 3


def test_undo_and_regenerate_reuse_the_rest(talk: Talk, submitted: list[int]) -> None:
    session = talk(YES)
    say(session, "one")
    say(session, "two")
    submitted.clear()
    "".join(session.regenerate())
    assert submitted == [1, 1, 1, 1]
    submitted.clear()
    assert session.undo() == Message("user", "two")
    say(session, "tea")
    assert submitted == [len("ea") + 2, 1, 1, 1]


def test_another_system_prompt_computes_everything_after_it(
    talk: Talk, submitted: list[int]
) -> None:
    session = talk(YES, system="be brief")
    say(session, "one")
    submitted.clear()
    session.system = "be bold"
    say(session, "two")
    known = [MARKER["<|system|>"], *b"be b"]
    assert submitted[0] == stats(session).prompt_tokens - len(known)


def test_the_cache_does_not_change_the_answer(talk: Talk) -> None:
    session = talk()
    answers = [say(session, text, max_tokens=12) for text in ("one", "two", "three")]
    fresh = talk()
    fresh.messages = session.messages[:-2]
    assert say(fresh, "three", max_tokens=12) == answers[-1]
    assert stats(fresh).reused_tokens == 0


@pytest.mark.parametrize("n_draft", [0, 5])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.usefixtures("short_matches")
def test_any_history_gives_a_fresh_sessions_answer(talk: Talk, seed: int, n_draft: int) -> None:
    choose = Random(seed)
    session, fresh = (
        talk(n_ctx=128, n_ubatch=16, stop=("e", "zz"), n_draft=n) for n in (n_draft, 0)
    )

    def interrupted() -> None:
        stream = session.ask("x" * choose.randrange(20), max_tokens=20)
        "".join(islice(stream, choose.randrange(10)))
        stream.close()

    deeds = [
        lambda: say(session, "y" * choose.randrange(40), max_tokens=choose.randrange(1, 20)),
        interrupted,
        session.undo,
        session.clear,
        lambda: setattr(session, "system", "z" * choose.randrange(20)),
        lambda: "".join(session.regenerate()) if len(session.messages) > 1 else None,
    ]
    for _ in range(40):
        choose.choice(deeds[:3] if choose.random() < 0.7 else deeds)()
        fresh.messages = []
        say(fresh, "unrelated", max_tokens=1)
        fresh.messages = list(session.context)
        assert say(session, "now", max_tokens=5) == say(fresh, "now", max_tokens=5)
        assert session.context == fresh.context
        assert session.context_used == fresh.context_used <= 128


def test_a_long_prompt_is_computed_by_ubatches_and_reported(
    talk: Talk, submitted: list[int]
) -> None:
    session = talk(YES, n_ubatch=16, system="")
    told: list[tuple[int, int, str, str]] = []
    say(session, "x" * 37, progress=lambda *report: told.append(report))
    assert submitted[:3] == [16, 16, 8]
    assert told == [(done, 40, "tokens", "reading") for done in (0, 16, 32, 40)]


@pytest.mark.parametrize("last", [0, 16, 32, 40])
def test_prefill_can_be_stopped_and_resumed(talk: Talk, submitted: list[int], last: int) -> None:
    def stop(done: int, total: int, unit: str, what: str) -> None:
        if done == last:
            raise KeyboardInterrupt

    session = talk(YES, n_ubatch=16, system="")
    with pytest.raises(KeyboardInterrupt):
        say(session, "x" * 37, progress=stop)
    assert (session.messages, session.stats, session.context_used) == ([], None, last)
    submitted.clear()
    assert say(session, "x" * 37) == "yes"
    assert sum(submitted[:-3]) == max(40 - last, 1)


def test_regenerate_stopped_in_prefill_keeps_the_old_answer(talk: Talk) -> None:
    def stop(done: int, total: int, unit: str, what: str) -> None:
        raise KeyboardInterrupt

    session = talk(YES)
    say(session, "one")
    before = list(session.messages)
    with pytest.raises(KeyboardInterrupt):
        "".join(session.regenerate(progress=stop))
    assert session.messages == before


def test_a_conversation_continues_after_a_closed_stream(talk: Talk) -> None:
    session = talk([*tokens_of("abcdef"), EOS])
    stream = session.ask("hi")
    assert list(islice(stream, 3)) == ["a", "b", "c"]
    stream.close()
    assert stats(session).stop == "interrupted"
    assert session.messages[-1] == Message("assistant", "abc", tuple(b"abc"))
    assert say(session, "again") == "abcdef"


def test_the_answer_kept_is_what_was_shown(talk: Talk) -> None:
    for count in range(1, 9):
        session = talk([*tokens_of("a中<ef"), EOS], stop=("<end>",))
        stream = session.ask("hi")
        shown = "".join(islice(stream, count))
        stream.close()
        assert session.messages[-1].text == shown


def test_so_far_has_the_unfinished_answer(talk: Talk) -> None:
    session = talk([*tokens_of("ab"), EOS], system="")
    seen: list[list[str]] = []

    def look(done: int = 0, total: int = 0, unit: str = "", what: str = "") -> None:
        seen.append([message.text for message in session.so_far])

    for _ in session.ask("hi", progress=look):
        look()
    assert seen == [["hi"], ["hi"], ["hi", "a"], ["hi", "ab"]]
    assert session.so_far == session.messages


def test_an_unstarted_stream_is_not_a_turn(talk: Talk) -> None:
    session = talk(YES)
    session.ask("hi").close()
    assert [message.role for message in session.messages] == ["system"]


def test_an_open_answer_ends_when_the_next_begins(talk: Talk) -> None:
    session = talk([*tokens_of("abc"), EOS], system="")
    first = session.ask("one")
    assert next(first) == "a"
    assert say(session, "two") == "abc"
    first.close()
    assert [m.text for m in session.messages] == ["one", "a", "two", "abc"]
    again = session.regenerate()
    assert next(again) == "a"
    session.clear()
    again.close()
    assert session.messages == []


def test_regenerate_replaces_the_last_answer(talk: Talk) -> None:
    session = talk(YES)
    with pytest.raises(UsageError, match="no answer"):
        session.regenerate()
    say(session, "one", max_tokens=1)
    assert "".join(session.regenerate()) == "yes"
    assert [m.text for m in session.messages] == [SYSTEM_PROMPT, "one", "yes"]


def test_turns_can_be_undone_to_the_first(talk: Talk) -> None:
    session = talk(YES)
    say(session, "one")
    say(session, "two")
    assert [session.undo(), session.undo(), session.undo()] == [
        Message("user", "two"),
        Message("user", "one"),
        None,
    ]
    assert [m.role for m in session.messages] == ["system"]


def test_the_system_message_can_be_replaced_removed_and_added(talk: Talk) -> None:
    session = talk(YES)
    say(session, "one")
    for text in ("be brief", "", "be bold"):
        session.system = text
        assert session.system == text
        expected = [text] * bool(text) + ["one", "yes"]
        assert [m.text for m in session.messages] == expected
    session.clear()
    assert session.messages == [Message("system", "be bold")]


def test_without_a_system_prompt_there_is_no_system_message(talk: Talk) -> None:
    assert talk(YES, system="").messages == []


def test_counts_the_tokens_of_a_text(talk: Talk) -> None:
    assert talk(YES).count("hello 中") == 1 + 1 + 3


def test_raw_completes_one_document(talk: Talk, submitted: list[int]) -> None:
    session = talk([*tokens_of("tqu"), EOS], raw=True, gguf={"template": None})
    assert (session.raw, session.messages) == (True, [])
    assert say(session, "<|response|>t", max_tokens=1) == "q"
    assert submitted == [len("<|response|>t")]
    assert say(session, "") == "u"
    assert submitted[1:] == [1, 1]
    assert say(session, "\nt") == "qu"


def test_raw_refuses_an_empty_document(talk: Talk) -> None:
    with pytest.raises(UsageError, match="nothing to complete"):
        talk(YES, raw=True).ask("")


def test_a_chat_needs_a_template(talk: Talk) -> None:
    with pytest.raises(GGUFError, match="--raw"):
        talk(YES, gguf={"template": None})
