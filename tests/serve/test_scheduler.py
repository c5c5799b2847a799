from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.serve.generation import Event, Finished, Piece, QueueFull
from dots1_local.serve.scheduler import Load, Scheduler, SlotState
from tests.helpers import EOS, TOKENS, scripted_tensors, tokens_of, write_random_gguf
from tests.serve.scheduling import (
    Alone,
    Listener,
    RecordingScheduler,
    greedy,
    open_engine,
    open_scheduler,
)

ASK = [TOKENS.index("<|response|>")]
ENDLESS = "abcdefghijklmnopqrstuvwxyza"


def scripted(folder: Path, answer: str, *, ends: bool = True) -> Path:
    tokens = [*tokens_of(answer), *([EOS] if ends else [])]
    return write_random_gguf(folder / "scripted.gguf", tensors=scripted_tensors(tokens))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes the alphabet without an end."""
    return scripted(tmp_path_factory.mktemp("endless"), ENDLESS, ends=False)


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights: each token depends on all tokens before it."""
    return write_random_gguf(tmp_path_factory.mktemp("wild") / "model.gguf")


@pytest.fixture
def scheduler(endless: Path) -> Iterator[RecordingScheduler]:
    with open_scheduler(endless) as scheduler:
        yield scheduler


def test_events_are_the_text_and_then_the_finish(tmp_path: Path) -> None:
    with open_scheduler(scripted(tmp_path, "yes")) as scheduler:
        listener = scheduler.ask(greedy([*b"hi", *ASK])).wait()
    *pieces, finished = listener.events
    assert pieces == [Piece(0, "y"), Piece(0, "e"), Piece(0, "s")]
    # Like other servers, this one counts the end token.
    assert isinstance(finished, Finished)
    expected = Finished(0, "stop", prompt_tokens=3, cached_tokens=0, completion_tokens=4)
    assert replace(finished, prompt_seconds=0, answer_seconds=0) == expected


@pytest.mark.parametrize(
    ("options", "text", "reason", "written"),
    [
        ({"max_tokens": 3}, "bcd", "length", 3),
        ({"stop": ("ef",)}, "bcd", "stop", 5),
        ({"stop": ("efX", "h")}, "bcdefg", "stop", 7),
        ({"stop": ("de",), "max_tokens": 4}, "bc", "stop", 4),
        ({"stop": ("de",), "max_tokens": 3}, "bcd", "length", 3),
    ],
)
def test_an_answer_ends_at_max_tokens_or_a_stop_string(
    scheduler: RecordingScheduler, options: dict[str, object], text: str, reason: str, written: int
) -> None:
    listener = scheduler.ask(greedy("a", **options)).wait()
    assert listener.text() == text
    assert listener.finished().reason == reason
    assert listener.finished().completion_tokens == written


@pytest.mark.parametrize("wanted", [None, 1000])
def test_an_answer_ends_at_the_end_of_the_context(endless: Path, wanted: int | None) -> None:
    with open_scheduler(endless, n_ctx=64) as scheduler:
        listener = scheduler.ask(greedy("a" * 60, max_tokens=wanted)).wait()
        assert (listener.text(), listener.finished().reason) == ("bcde", "length")
        scheduler.ask(greedy("a" * 63)).wait()
        for length in (64, 65):
            with pytest.raises(Dots1Error, match=f"is {length} tokens long and .* holds 64"):
                scheduler.ask(greedy("a" * length))


def test_parallel_answers_equal_those_given_alone(wild: Path) -> None:
    prompts = [bytes(range(i, i + 3 + 11 * (i % 9))) for i in range(24)]
    with open_scheduler(wild, slots=5, n_ubatch=48) as scheduler:
        listeners = [scheduler.ask(greedy(p, max_tokens=30, top_logprobs=0)) for p in prompts]
        for listener in listeners:
            listener.wait()
        widest = max(len({entry.seq_id for entry in ubatch}) for ubatch in scheduler.ubatches)
    assert widest == 5
    alone = Alone(wild)
    for prompt, listener in zip(prompts, listeners, strict=True):
        alone.check(prompt, listener.logprobs())
    with pytest.raises(AssertionError):  # the check can fail
        alone.check(prompts[-2], listeners[-1].logprobs())


def test_a_running_choice_gets_a_token_in_every_ubatch(endless: Path) -> None:
    with open_scheduler(endless, n_ctx=1024, n_ubatch=512) as scheduler:
        scheduler.hold()
        writer = scheduler.ask(greedy("a", max_tokens=40))
        scheduler.next_ubatch()
        scheduler.ask(greedy("x" * 1000, max_tokens=1))
        scheduler.release()
        writer.wait()
        alone, *beside = scheduler.ubatches[:41]
    assert len(alone) == 1
    assert all(ubatch[0].seq_id == alone[0].seq_id for ubatch in beside[:39])
    assert sum(len(ubatch) > 1 for ubatch in beside) >= 2
    assert len(beside[0]) == 1 + 32  # the first prefill budget


def test_prompts_alone_fill_ubatches(endless: Path) -> None:
    with open_scheduler(endless, n_ctx=512, n_ubatch=128) as scheduler:
        scheduler.hold()
        listeners = [scheduler.ask(greedy(text * 200, max_tokens=1)) for text in ("x", "y")]
        scheduler.release()
        for listener in listeners:
            listener.wait()
    assert [len(ubatch) for ubatch in scheduler.ubatches] == [128, 128, 128, 16]


def test_first_in_first_out(endless: Path) -> None:
    finished: list[str] = []
    with open_scheduler(endless, slots=1) as scheduler:
        last = Listener()
        for name in "abc":

            def note(event: Event, name: str = name) -> None:
                if isinstance(event, Finished):
                    finished.append(name)

            scheduler.submit([greedy(name * 10, max_tokens=3)], note)
        scheduler.submit([greedy("z", max_tokens=1)], last)
        last.wait()
    assert finished == ["a", "b", "c"]


def test_more_choices_than_slots_take_turns(scheduler: RecordingScheduler) -> None:
    listener = scheduler.ask(*(greedy(letter, max_tokens=4) for letter in "abcdefg")).wait()
    texts = [listener.text(index) for index in range(7)]
    assert texts == ["bcde", "cdef", "defg", "efgh", "fghi", "ghij", "hijk"]


def test_a_full_queue_refuses_whole_requests(endless: Path) -> None:
    with open_scheduler(endless, slots=1, queue_size=2) as scheduler:
        scheduler.hold()
        first = scheduler.ask(
            *[greedy("a", max_tokens=2)] * 9
        )  # an idle scheduler accepts any number
        scheduler.next_ubatch()
        assert scheduler.load == Load(running=1, waiting=8, slots=1)
        with pytest.raises(QueueFull, match="8 answers are waiting") as refused:
            scheduler.ask(greedy("b"))
        assert refused.value.retry_after >= 1
        scheduler.release()
        first.wait()

        scheduler.hold()
        running = Listener()
        scheduler.submit([greedy("a", max_tokens=2)], running)
        handle = scheduler.submit([greedy("b")], Listener())
        with pytest.raises(QueueFull):
            scheduler.ask(greedy("c"), greedy("d"))
        scheduler.ask(greedy("c", max_tokens=1))
        handle.cancel()
        last = scheduler.ask(greedy("d", max_tokens=1))
        with pytest.raises(QueueFull):
            scheduler.ask(greedy("e"))
        scheduler.release()
        assert last.wait().text() == "e"


def test_cancelling_frees_the_sequence_before_the_next_ubatch(endless: Path) -> None:
    with open_scheduler(endless, slots=1) as scheduler:
        scheduler.hold()
        cancelled = Listener()
        handle = scheduler.submit([greedy("a"), greedy("q")], cancelled)
        scheduler.next_ubatch()
        next_one = scheduler.ask(greedy("xy", max_tokens=1))
        handle.cancel()
        handle.cancel()
        assert scheduler.load == Load(running=0, waiting=1, slots=1)
        scheduler.compute()
        assert [entry.token for entry in scheduler.next_ubatch()] == [*b"xy"]
        scheduler.release()
        next_one.wait()
        assert cancelled.events == []


def test_a_listener_may_cancel_its_own_request(scheduler: RecordingScheduler) -> None:
    heard: list[Event] = []

    def listen(event: Event) -> None:
        heard.append(event)
        if len(heard) == 3:
            handle.cancel()

    scheduler.hold()
    handle = scheduler.submit([greedy("a")], listen)
    scheduler.release()
    assert scheduler.ask(greedy("b" * 50, max_tokens=50)).wait().finished().reason == "length"
    assert heard == [Piece(0, "b"), Piece(0, "c"), Piece(0, "d")]


def test_logprobs_come_with_the_text_of_their_tokens(endless: Path, wild: Path) -> None:
    with open_scheduler(endless) as scheduler:
        listener = scheduler.ask(greedy("a", top_logprobs=2, stop=("dex", "gh"))).wait()
    pieces = [event for event in listener.events if isinstance(event, Piece)]
    spoken = [(p.text, b"".join(each.piece for each in p.logprobs)) for p in pieces]
    assert spoken == [("b", b"b"), ("c", b"c"), ("def", b"def")]
    with open_scheduler(wild) as scheduler:
        listener = scheduler.ask(greedy("hello", top_logprobs=3, max_tokens=20)).wait()
    for each in listener.logprobs():
        assert each.top[0] == (each.token, each.piece, each.logprob)
        assert [likely[2] for likely in each.top] == sorted((t[2] for t in each.top), reverse=True)
        assert len(each.top) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": [len(TOKENS)]}, f"from 0 to {len(TOKENS) - 1}"),
        ({"prompt": [-1]}, "from 0 to"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens is -1"),
        ({"prompt": "a", "stop": ("b", "")}, "stop string is empty"),
    ],
)
def test_refuses_requests_that_would_fail_later(
    scheduler: RecordingScheduler, options: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        scheduler.ask(greedy("fine"), greedy(**options))  # type: ignore[arg-type]
    assert scheduler.load == Load(running=0, waiting=0, slots=2)


def test_refuses_engines_that_would_abort(wild: Path) -> None:
    with (
        open_engine(wild, 64, 64, n_sequences=2) as engine,
        pytest.raises(UsageError, match="shared_cache"),
    ):
        Scheduler(engine)
    with (
        open_engine(wild, 64, 2, n_sequences=3, shared_cache=True) as engine,
        pytest.raises(UsageError, match="3 sequences"),
    ):
        Scheduler(engine)


def test_one_sequence_needs_no_shared_cache(endless: Path) -> None:
    with Engine.open(endless, n_ctx=64, threads=1) as engine:
        scheduler = Scheduler(engine)
        listener = Listener()
        scheduler.submit([greedy("a", max_tokens=2)], listener)
        assert listener.wait().text() == "bc"
        scheduler.close(0)


def test_slots_tell_what_they_hold_and_how_far_they_are(endless: Path) -> None:
    with open_scheduler(endless, slots=2) as scheduler:
        scheduler.ask(greedy("abc", max_tokens=3)).wait()
        scheduler.hold()
        listener = scheduler.ask(greedy("xyz!", max_tokens=5))
        scheduler.next_ubatch()
        for _ in range(3):  # the prompt, and two tokens
            scheduler.compute()
            scheduler.next_ubatch()
        states = {state.busy: state for state in scheduler.slots}
        scheduler.release()
        listener.wait()
    assert states[False] == SlotState(states[False].id, 3 + 2)  # the last token is not computed
    assert states[True] == SlotState(states[True].id, 4 + 2, True, 4, 3)
