"""Ctrl-C at any moment leaves a conversation that can continue."""

import re
import sys
from types import FrameType
from typing import Any

import pytest

from dots1_local.chat.message import Message
from dots1_local.chat.session import Session
from dots1_local.engine.engine import Engine
from tests.chat.conftest import Talk

QUESTION = "x" * 20
STEP = 41


class Interrupt:
    """Raise KeyboardInterrupt at the n-th line of chat/ or engine/; 0 only counts lines."""

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not re.search(r"dots1_local/(chat|engine)/", frame.f_code.co_filename):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self


def ask(session: Session, max_tokens: int, at: int) -> int:
    """Ask with an interrupt; return how many lines ran."""
    interrupt = Interrupt(at)
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        "".join(session.ask(QUESTION, max_tokens))
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return interrupt.lines


@pytest.mark.parametrize(
    ("n_ctx", "max_tokens", "dropped", "n_draft"),
    [(256, 8, 0, 0), (80, 8, 1, 0), (100, 30, 1, 0), (256, 30, 0, 5), (100, 30, 1, 5)],
    ids=["fits", "dropped before the answer", "dropped in its midst", "drafts", "drafts, dropped"],
)
@pytest.mark.usefixtures("short_matches")
def test_ctrl_c_at_any_line_leaves_conversation_and_cache_consistent(
    talk: Talk,
    monkeypatch: pytest.MonkeyPatch,
    n_ctx: int,
    max_tokens: int,
    dropped: int,
    n_draft: int,
) -> None:
    monkeypatch.setattr(Engine, "is_end", lambda engine, token: False)
    session, fresh = (
        talk(n_ctx=n_ctx, n_ubatch=8, system="S", n_draft=drafted) for drafted in (n_draft, 0)
    )
    begun = [Message("system", "S"), Message("user", "a" * 20), Message("assistant", "b" * 25)]
    expected: dict[str, str] = {}

    def next_answer(messages: list[Message], left: int) -> str:
        key = repr((messages, left))
        if key not in expected:
            fresh.clear()
            "".join(fresh.ask("something else", max_tokens=1))
            fresh.messages, fresh.dropped = list(messages), left
            expected[key] = "".join(fresh.ask("and now?", max_tokens=4))
        return expected[key]

    session.messages = list(begun)
    lines = ask(session, max_tokens, 0)
    assert lines > 10 * STEP
    assert session.stats is not None
    assert session.stats.dropped_turns == dropped
    assert bool(session.stats.drafted_tokens) == bool(n_draft)
    for at in range(1, lines, STEP):
        session.messages, session.dropped = list(begun), 0
        ask(session, max_tokens, at)
        kept, left = list(session.messages), session.dropped
        asked = [message.text for message in kept if message.role == "user"]
        assert kept == begun or (asked[-1] == QUESTION and kept[-1].role == "assistant")
        assert "".join(session.ask("and now?", max_tokens=4)) == next_answer(kept, left)
