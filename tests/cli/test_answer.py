"""Ctrl-C in an answer: where it is heard, and what it leaves."""

import signal
from collections.abc import Generator, Iterator

import pytest

from dots1_local.cli.repl.answer import NotAnswered, stream
from dots1_local.progress import Progress


@pytest.fixture(autouse=True)
def _handler_is_given_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_ends_the_answer_between_two_pieces() -> None:
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


def test_it_is_heard_while_the_prompt_is_read() -> None:
    def ask(progress: Progress) -> Generator[str, None, None]:
        progress(0, 9, "tokens", "reading")
        ctrl_c()
        progress(5, 9, "tokens", "reading")
        yield "never"

    written: list[str] = []
    with pytest.raises(NotAnswered):
        stream(ask, written.append)
    assert written == []


def test_an_answer_without_a_word_is_none() -> None:
    def ask(progress: Progress) -> Generator[str, None, None]:
        ctrl_c()
        yield ""
        yield "never"

    with pytest.raises(NotAnswered):
        stream(ask, lambda text: None)


def test_what_was_said_counts_when_room_is_made_in_mid_answer() -> None:
    def ask(progress: Progress) -> Generator[str, None, None]:
        yield "a"
        ctrl_c()
        progress(0, 9, "tokens", "reading")
        yield "never"

    written: list[str] = []
    stream(ask, written.append)
    assert written == ["a"]


def test_a_second_one_is_an_interrupt() -> None:
    def ask(progress: Progress) -> Generator[str, None, None]:
        ctrl_c()
        ctrl_c()
        yield "never"

    with pytest.raises(KeyboardInterrupt):
        stream(ask, lambda text: None)
