import logging
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from dots1_local.chat.sampler import Sampler
from dots1_local.errors import Dots1Error
from dots1_local.serve.generation import Event
from dots1_local.serve.scheduler import State
from tests.helpers import scripted_tensors, tokens_of, write_random_gguf
from tests.serve.scheduling import Served, order, serving

ENDLESS = scripted_tensors(tokens_of("abcdefghijklmnopqrstuvwxyza"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    return write_random_gguf(folder / "model.gguf", tensors=ENDLESS)


@pytest.fixture
def served(model: Path) -> Iterator[Served]:
    with serving(model) as served:
        yield served


def fail_once(served: Served, error: Exception) -> None:
    submit = served._submit

    def fail(entries: Any) -> Any:
        served._submit = submit
        raise error

    served._submit = fail


def test_an_engines_failure_ends_what_runs_and_nothing_else(served: Served) -> None:
    served.hold()
    running = [served.ask(order(text, max_tokens=50)) for text in ("a", "k")]
    served.next_ubatch()
    waiting = served.ask(order("q" * 80, max_tokens=3))
    fail_once(served, Dots1Error("the GPU is tired"))
    served.release()
    for listener in running:
        assert listener.wait().failure == "the GPU is tired"
        assert len(listener.events) == 1
    assert waiting.wait().text() == "rst"
    assert waiting.finished().cached_tokens == 0
    assert served.ask(order("a", max_tokens=2)).wait().text() == "bc"


def test_choices_that_wait_fail_with_the_others(served: Served) -> None:
    served.hold()
    listener = served.ask(*[order("a", max_tokens=50)] * 5)
    served.next_ubatch()
    fail_once(served, Dots1Error("the GPU is tired"))
    served.release()
    assert served.ask(order("x", max_tokens=2)).wait().text() == "yz"
    assert [type(event).__name__ for event in listener.events] == ["Failed"]


def test_bugs_are_logged_not_told(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    fail_once(served, IndexError("secret"))
    listener = served.ask(order("a")).wait()
    assert listener.failure == "something went wrong in the server; its log says what"
    assert "secret" in caplog.text


def test_an_engine_that_cannot_go_on_closes(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(*_: int) -> None:
        raise OSError("gone")

    served.hold()
    running, waiting = served.ask(*[order("a")] * 2), served.ask(order("b"))
    served.next_ubatch()
    fail_once(served, Dots1Error("the GPU fell out"))
    monkeypatch.setattr(served._engine, "forget", forget)
    served.release()
    assert running.wait().failure == "the GPU fell out"
    assert "cannot go on" in waiting.wait().failure
    served.close(60)
    with pytest.raises(Dots1Error, match="cannot go on"):
        served.ask(order("c"))
    assert served.failed
    assert "gone" in caplog.text


def test_a_damaged_model_is_an_error_not_an_answer(tmp_path: Path) -> None:
    broken = {"output_norm.weight": np.full(64, np.nan, np.float32)}
    path = write_random_gguf(tmp_path / "model.gguf", tensors=broken)
    with serving(path) as served:
        for _ in range(2):
            assert "are no numbers" in served.ask(order("a" * 50)).wait().failure


def test_a_sampler_that_fails_harms_nobody_else(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Sampler.begin

    def picky(self: Sampler, prompt: Any) -> None:
        if prompt[0] == ord("x"):
            raise Dots1Error("no grammar can do that")
        begin(self, prompt)

    monkeypatch.setattr(Sampler, "begin", picky)
    served.hold()
    fine = served.ask(order("a", max_tokens=30))
    served.next_ubatch()
    for _ in range(3):
        bad = served.ask(order("x"))
    served.release()
    assert bad.wait().failure == "no grammar can do that"
    assert fine.wait().finished().completion_tokens == 30
    assert served.ask(order("a", max_tokens=1), order("b", max_tokens=1)).wait().text(1) == "c"


def test_a_listener_that_fails_is_told_no_more(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Event] = []

    def deaf(event: Event) -> None:
        heard.append(event)
        raise RuntimeError("what?")

    served.submit([order("a")], deaf)
    assert served.ask(order("b", max_tokens=3)).wait().text() == "cde"
    assert len(heard) == 1
    assert "could not be delivered" in caplog.text
    assert served.ask(order("c", max_tokens=3)).wait().text() == "def"


def test_closing_with_patience_finishes_what_was_taken(served: Served) -> None:
    served.hold()
    listeners = [served.ask(order("a", max_tokens=20)) for _ in range(5)]
    closing = Thread(target=served.close, args=(60,))
    closing.start()
    served.release()
    closing.join(60)
    assert [listener.finished().completion_tokens for listener in listeners] == [20] * 5
    with pytest.raises(Dots1Error, match="shutting down"):
        served.ask(order("a"))
    served.close(60)
    assert served.state == State(running=0, waiting=0, slots=2)


def test_closing_without_patience_fails_what_was_taken(served: Served) -> None:
    served.hold()
    running, waiting = served.ask(*[order("a")] * 2), served.ask(order("b"))
    served.next_ubatch()
    patient, hasty = (Thread(target=served.close, args=(time,)) for time in (600, 0))
    patient.start()
    hasty.start()
    served.release()
    for thread in (patient, hasty):
        thread.join(60)
        assert not thread.is_alive()
    for listener in (running, waiting):
        assert "shutting down" in listener.wait().failure
    served._engine.decode(tokens_of("free again"), 0)


def test_nothing_is_logged_when_all_is_well(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        served.ask(order("a", max_tokens=3)).wait()
        served.close(60)
    assert not caplog.records
