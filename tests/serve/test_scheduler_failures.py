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
from dots1_local.serve.scheduler import Load
from tests.helpers import scripted_tensors, tokens_of, write_random_gguf
from tests.serve.scheduling import RecordingScheduler, greedy, open_scheduler

ENDLESS = scripted_tensors(tokens_of("abcdefghijklmnopqrstuvwxyza"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    return write_random_gguf(folder / "model.gguf", tensors=ENDLESS)


@pytest.fixture
def scheduler(model: Path) -> Iterator[RecordingScheduler]:
    with open_scheduler(model) as scheduler:
        yield scheduler


def fail_once(scheduler: RecordingScheduler, error: Exception) -> None:
    submit = scheduler.engine_submit

    def fail(entries: Any) -> Any:
        scheduler.engine_submit = submit
        raise error

    scheduler.engine_submit = fail


def test_an_engine_failure_fails_running_choices_only(scheduler: RecordingScheduler) -> None:
    scheduler.hold()
    running = [scheduler.ask(greedy(text, max_tokens=50)) for text in ("a", "k")]
    scheduler.next_ubatch()
    waiting = scheduler.ask(greedy("q" * 80, max_tokens=3))
    fail_once(scheduler, Dots1Error("the GPU is tired"))
    scheduler.release()
    for listener in running:
        assert listener.wait().failure == "the GPU is tired"
        assert len(listener.events) == 1
    assert waiting.wait().text() == "rst"
    assert waiting.finished().cached_tokens == 0
    assert scheduler.ask(greedy("a", max_tokens=2)).wait().text() == "bc"


def test_waiting_choices_fail_with_the_others_of_their_request(
    scheduler: RecordingScheduler,
) -> None:
    scheduler.hold()
    listener = scheduler.ask(*[greedy("a", max_tokens=50)] * 5)
    scheduler.next_ubatch()
    fail_once(scheduler, Dots1Error("the GPU is tired"))
    scheduler.release()
    assert scheduler.ask(greedy("x", max_tokens=2)).wait().text() == "yz"
    assert [type(event).__name__ for event in listener.events] == ["Failed"]


def test_bugs_are_logged_and_hidden_from_clients(
    scheduler: RecordingScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    fail_once(scheduler, IndexError("secret"))
    listener = scheduler.ask(greedy("a")).wait()
    assert listener.failure == "something went wrong in the server; its log says what"
    assert "secret" in caplog.text


def test_an_engine_that_cannot_continue_closes_the_scheduler(
    scheduler: RecordingScheduler, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(*_: int) -> None:
        raise OSError("gone")

    scheduler.hold()
    running, waiting = scheduler.ask(*[greedy("a")] * 2), scheduler.ask(greedy("b"))
    scheduler.next_ubatch()
    fail_once(scheduler, Dots1Error("the GPU fell out"))
    monkeypatch.setattr(scheduler.engine, "forget", forget)
    scheduler.release()
    assert running.wait().failure == "the GPU fell out"
    assert "cannot continue" in waiting.wait().failure
    scheduler.close(60)
    with pytest.raises(Dots1Error, match="cannot continue"):
        scheduler.ask(greedy("c"))
    assert scheduler.failed
    assert "gone" in caplog.text


def test_a_damaged_model_is_an_error(tmp_path: Path) -> None:
    broken = {"output_norm.weight": np.full(64, np.nan, np.float32)}
    path = write_random_gguf(tmp_path / "model.gguf", tensors=broken)
    with open_scheduler(path) as scheduler:
        for _ in range(2):
            assert "not finite" in scheduler.ask(greedy("a" * 50)).wait().failure


def test_a_failing_sampler_fails_its_choice_only(
    scheduler: RecordingScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Sampler.begin

    def picky(self: Sampler, prompt: Any) -> None:
        if prompt[0] == ord("x"):
            raise Dots1Error("no grammar can do that")
        begin(self, prompt)

    monkeypatch.setattr(Sampler, "begin", picky)
    scheduler.hold()
    fine = scheduler.ask(greedy("a", max_tokens=30))
    scheduler.next_ubatch()
    for _ in range(3):
        bad = scheduler.ask(greedy("x"))
    scheduler.release()
    assert bad.wait().failure == "no grammar can do that"
    assert fine.wait().finished().completion_tokens == 30
    assert scheduler.ask(greedy("a", max_tokens=1), greedy("b", max_tokens=1)).wait().text(1) == "c"


def test_a_failing_listener_is_not_called_again(
    scheduler: RecordingScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Event] = []

    def raising(event: Event) -> None:
        heard.append(event)
        raise RuntimeError("what?")

    scheduler.submit([greedy("a")], raising)
    assert scheduler.ask(greedy("b", max_tokens=3)).wait().text() == "cde"
    assert len(heard) == 1
    assert "could not be delivered" in caplog.text
    assert scheduler.ask(greedy("c", max_tokens=3)).wait().text() == "def"


def test_closing_with_a_timeout_finishes_accepted_requests(scheduler: RecordingScheduler) -> None:
    scheduler.hold()
    listeners = [scheduler.ask(greedy("a", max_tokens=20)) for _ in range(5)]
    closing = Thread(target=scheduler.close, args=(60,))
    closing.start()
    scheduler.release()
    closing.join(60)
    assert [listener.finished().completion_tokens for listener in listeners] == [20] * 5
    with pytest.raises(Dots1Error, match="shutting down"):
        scheduler.ask(greedy("a"))
    scheduler.close(60)
    assert scheduler.load == Load(running=0, waiting=0, slots=2)


def test_closing_without_a_timeout_fails_accepted_requests(scheduler: RecordingScheduler) -> None:
    scheduler.hold()
    running, waiting = scheduler.ask(*[greedy("a")] * 2), scheduler.ask(greedy("b"))
    scheduler.next_ubatch()
    slow, fast = (Thread(target=scheduler.close, args=(time,)) for time in (600, 0))
    slow.start()
    fast.start()
    scheduler.release()
    for thread in (slow, fast):
        thread.join(60)
        assert not thread.is_alive()
    for listener in (running, waiting):
        assert "shutting down" in listener.wait().failure
    scheduler.engine.decode(tokens_of("free again"), 0)


def test_nothing_is_logged_without_failures(
    scheduler: RecordingScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        scheduler.ask(greedy("a", max_tokens=3)).wait()
        scheduler.close(60)
    assert not caplog.records
