from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dots1_local.engine.engine import Entry
from dots1_local.serve.generation import GenerationRequest
from tests.helpers import write_random_gguf
from tests.serve.scheduling import Alone, Listener, RecordingScheduler, greedy, open_scheduler

SYSTEM = bytes(range(100))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("prefixes") / "model.gguf")


@pytest.fixture
def scheduler(model: Path) -> Iterator[RecordingScheduler]:
    with open_scheduler(model, slots=4) as scheduler:
        yield scheduler


def short(prompt: Sequence[int]) -> GenerationRequest:
    return greedy(prompt, max_tokens=3, top_logprobs=0)


def cached(listener: Listener, index: int = 0) -> int:
    return listener.wait().finished(index).cached_tokens


def sequences(ubatch: Sequence[Entry]) -> set[int]:
    return {entry.seq_id for entry in ubatch}


def test_a_conversation_continues_from_the_cache(
    scheduler: RecordingScheduler, model: Path
) -> None:
    first = scheduler.ask(greedy(SYSTEM, max_tokens=5, top_logprobs=0))
    assert cached(first) == 0
    answer = [each.token for each in first.logprobs()]
    prompt = [*SYSTEM, *answer, *b"and then?"]
    scheduler.ubatches.clear()
    second = scheduler.ask(short(prompt))
    assert cached(second) == 100 + 4  # the last token was sampled but not computed
    assert scheduler.computed == 1 + 9 + 2
    Alone(model).check(prompt, second.logprobs())


def test_the_last_token_is_computed_again(scheduler: RecordingScheduler, model: Path) -> None:
    assert cached(scheduler.ask(short(SYSTEM))) == 0
    again = scheduler.ask(short(SYSTEM))
    assert cached(again) == 99
    Alone(model).check(SYSTEM, again.logprobs())


def test_choices_compute_their_common_prompt_once(
    scheduler: RecordingScheduler, model: Path
) -> None:
    listener = scheduler.ask(*[short(SYSTEM)] * 7).wait()
    assert scheduler.computed == 100 + 6 + 7 * 2
    assert [cached(listener, index) for index in range(7)] == [0] + [99] * 6
    for index in range(7):
        Alone(model).check(SYSTEM, listener.logprobs(index))


def test_simultaneous_requests_compute_their_common_prefix_once(
    scheduler: RecordingScheduler, model: Path
) -> None:
    prompts = [SYSTEM + bytes([n] * 20) for n in range(101, 105)]
    scheduler.hold()
    listeners = [scheduler.ask(short(prompt)) for prompt in prompts]
    scheduler.release()
    assert [cached(listener) for listener in listeners] == [0, 100, 100, 100]
    for prompt, listener in zip(prompts, listeners, strict=True):
        Alone(model).check(prompt, listener.logprobs())


def test_only_choices_with_a_common_prefix_wait(scheduler: RecordingScheduler) -> None:
    scheduler.hold()
    listeners = [scheduler.ask(short(text)) for text in (SYSTEM * 2, SYSTEM * 2 + b"!", b"who?")]
    scheduler.release()
    assert [cached(listener) for listener in listeners] == [0, 200, 0]
    sizes = [len(ubatch) for ubatch in scheduler.ubatches]
    assert sizes[:4] == [64, 64, 64, 8 + 4]


@pytest.mark.parametrize(("length", "spared"), [(32, [0, 32, 32]), (31, [0, 0, 0])])
def test_a_short_prefix_is_computed_and_not_waited_for(
    scheduler: RecordingScheduler, length: int, spared: list[int]
) -> None:
    listener = scheduler.ask(*(short(SYSTEM[:length] + end) for end in (b"", b"a", b"bc")))
    assert [cached(listener, index) for index in range(3)] == spared


@pytest.mark.parametrize("ubatches", [0, 1])
def test_waiting_choices_continue_where_a_cancelled_one_stopped(
    scheduler: RecordingScheduler, model: Path, ubatches: int
) -> None:
    scheduler.hold()
    first = scheduler.submit([short(SYSTEM + b"one")], Listener())
    scheduler.next_ubatch()
    second, third = scheduler.ask(short(SYSTEM + b"two")), scheduler.ask(short(SYSTEM + b"too"))
    for _ in range(ubatches):
        scheduler.compute()
        assert sequences(scheduler.next_ubatch()) == {0}
    first.cancel()
    scheduler.release()
    # The cancelled choice computed one ubatch of 64, or its whole prompt.
    assert cached(second) == (64 if not ubatches else 100)
    assert cached(third) == 101
    Alone(model).check(SYSTEM + b"two", second.logprobs())
    Alone(model).check(SYSTEM + b"too", third.logprobs())


def test_a_new_request_shares_the_prefix_of_a_running_one(
    scheduler: RecordingScheduler, model: Path
) -> None:
    scheduler.hold()
    running = Listener()
    handle = scheduler.submit([greedy(SYSTEM, max_tokens=100)], running)
    for _ in range(4):
        scheduler.next_ubatch()
        scheduler.compute()
    scheduler.next_ubatch()
    beside = scheduler.ask(short(SYSTEM + b"!"))
    scheduler.release()
    assert cached(beside) == 100
    handle.cancel()
    Alone(model).check(SYSTEM + b"!", beside.logprobs())


def test_takes_the_least_recently_used_sequence(model: Path) -> None:
    ada, bob, cyd = (bytes([n]) * 80 for n in b"abc")
    with open_scheduler(model, slots=2) as scheduler:
        for prompt in (ada, bob, ada + b"!", cyd):
            scheduler.ask(short(prompt)).wait()
        assert cached(scheduler.ask(short(ada))) == 79
        assert cached(scheduler.ask(short(bob))) == 0


def test_spares_the_sequence_that_the_next_in_line_continues(model: Path) -> None:
    ada, bob, cyd = (bytes([n]) * 80 for n in b"abc")
    with open_scheduler(model, slots=2) as scheduler:
        for prompt in (ada, bob):
            scheduler.ask(short(prompt)).wait()
        listener = scheduler.ask(short(cyd), short(ada))
        assert [cached(listener, index) for index in (0, 1)] == [0, 79]


def test_an_empty_sequence_is_taken_before_a_cached_one(model: Path) -> None:
    with open_scheduler(model, slots=2) as scheduler:
        long = SYSTEM + b"a" * 120
        scheduler.ask(short(long)).wait()
        assert cached(scheduler.ask(short(SYSTEM + b"b"))) == 100
        assert cached(scheduler.ask(short(long))) == 219


@pytest.mark.parametrize("seed", range(8))
def test_answers_equal_those_given_alone_whatever_is_cancelled(model: Path, seed: int) -> None:
    choose = Random(seed)
    prompts: list[bytes] = [b""]
    for _ in range(12):
        part = bytes(choose.choices(b"abc", k=choose.randrange(1, 60)))
        prompts.append((choose.choice(prompts) + part)[:200])
    asked: list[tuple[bytes, Listener]] = []
    with open_scheduler(
        model, slots=choose.randrange(1, 5), n_ubatch=choose.randrange(8, 64)
    ) as scheduler:
        for _ in range(30):
            prompt, listener = choose.choice(prompts[1:]), Listener()
            options: dict[str, Any] = {"max_tokens": choose.randrange(1, 20), "top_logprobs": 0}
            handle = scheduler.submit([greedy(prompt, **options)], listener)
            if choose.random() < 0.3:
                if choose.random() < 0.5:
                    listener.wait_for_first()
                handle.cancel()
            else:
                asked.append((prompt, listener))
            if choose.random() < 0.2:
                listener.wait() if not handle.done else None
        for _, listener in asked:
            listener.wait()
    alone = Alone(model)
    for prompt, listener in asked:
        alone.check(prompt, listener.logprobs())
