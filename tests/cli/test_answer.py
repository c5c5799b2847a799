"""Answers that are streamed to stdout: Ctrl-C, encodings and a full disk."""

import errno
import io
import os
import signal
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, cast

import pytest

from dots1_local.cli.repl import loop
from dots1_local.cli.repl.answer import NotAnswered, print_answer, stream
from dots1_local.cli.repl.commands import COMMANDS
from dots1_local.errors import Dots1Error
from dots1_local.progress import Progress

if TYPE_CHECKING:
    from dots1_local.chat.session import Session


@pytest.fixture(autouse=True)
def _handler_is_given_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_ends_the_answer_between_two_pieces() -> None:
    written: list[str] = []
    ended: list[str] = []

    def ask(progress: Progress) -> Generator[str, None, None]:
        try:
            yield "a"
            ctrl_c()
            yield "b"
            yield "c"
        finally:
            ended.append("closed")

    stream(ask, written.append)
    assert (written, ended) == (["a", "b"], ["closed"])


def test_ctrl_c_works_while_the_prompt_is_read() -> None:
    def ask(progress: Progress) -> Generator[str, None, None]:
        progress(0, 9, "tokens", "reading")
        ctrl_c()
        progress(5, 9, "tokens", "reading")
        yield "never"

    written: list[str] = []
    with pytest.raises(NotAnswered):
        stream(ask, written.append)
    assert written == []


def test_ctrl_c_before_the_first_word_means_not_answered() -> None:
    def ask(progress: Progress) -> Generator[str, None, None]:
        ctrl_c()
        yield ""
        yield "never"

    with pytest.raises(NotAnswered):
        stream(ask, lambda text: None)


def test_ctrl_c_while_the_context_is_read_again_keeps_the_answer() -> None:
    def ask(progress: Progress) -> Generator[str, None, None]:
        yield "a"
        ctrl_c()
        progress(0, 9, "tokens", "reading")
        yield "never"

    written: list[str] = []
    stream(ask, written.append)
    assert written == ["a"]


def test_ctrl_c_many_times_is_ctrl_c_once() -> None:
    def ask(progress: Progress) -> Generator[str, None, None]:
        try:
            ctrl_c()
            ctrl_c()
            yield "a"
            yield "never"
        finally:
            ctrl_c()

    written: list[str] = []
    stream(ask, written.append)
    assert written == ["a"]


def test_ctrl_c_at_any_time_does_not_end_a_dialogue(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["", "/what", "/exit"])  # "" is Ctrl-C at an empty prompt

    class Editor:
        def __init__(self, *_: object) -> None:
            pass

        def read(self, draft: str) -> str:
            ctrl_c()
            if line := next(lines):
                return line
            raise KeyboardInterrupt

    notices: list[str] = []

    def notice(message: str) -> None:
        notices.append(message)
        ctrl_c()

    monkeypatch.setattr(loop, "LineEditor", Editor)
    monkeypatch.setattr(loop, "notice", notice)
    loop.Repl(cast("Session", None), COMMANDS).run()
    assert [message.split()[0] for message in notices] == ["Ctrl-D", "there"]


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "中文\n"), ("ascii", "??\n"), ("gbk", "中文\n")]
)
def test_characters_that_stdout_cannot_encode_become_question_marks(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str
) -> None:
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding=encoding))
    print_answer(lambda progress: (piece for piece in ["中", "文"]), markdown=False)
    assert data.getvalue().decode(encoding) == shown


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys.stdout, "write", fail)
    with pytest.raises(Dots1Error, match="cannot write the answer: No space left"):
        print_answer(lambda progress: (piece for piece in ["a"]), markdown=True)
