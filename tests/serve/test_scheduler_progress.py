"""How far prompts are, and how long they and their answers take."""

import time
from pathlib import Path

import pytest

from dots1_local.serve.generation import Event, Finished, Progress
from tests.helpers import write_random_gguf
from tests.serve.scheduling import GREEDY, Listener, greedy, open_scheduler

LONG = bytes(range(150))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("progress") / "model.gguf")


def reported(listener: Listener, index: int = 0) -> list[tuple[int, int, int]]:
    """Of each report, the prompt's tokens, those cached and those processed."""
    events = listener.wait().events
    found = [e for e in events if isinstance(e, Progress) and e.index == index]
    assert sorted(found, key=lambda e: e.seconds) == found
    return [(e.prompt_tokens, e.cached_tokens, e.processed_tokens) for e in found]


def test_each_ubatch_of_a_prompt_is_reported(model: Path) -> None:
    with open_scheduler(model, slots=1, n_ubatch=64) as scheduler:
        asked = scheduler.ask(greedy(LONG, max_tokens=3, progress=True))
        assert reported(asked) == [(150, 0, 0), (150, 0, 64), (150, 0, 128), (150, 0, 150)]
        kinds = [type(event) for event in asked.events]
        assert kinds[:4] == [Progress] * 4  # before the answer
        assert Progress not in kinds[4:]
        longer = scheduler.ask(greedy(LONG + b"and then?", max_tokens=1, progress=True))
        assert reported(longer) == [(159, 150, 150), (159, 150, 159)]
        assert reported(scheduler.ask(greedy(LONG, max_tokens=1))) == []


def test_choices_that_wait_for_a_common_prompt_report_it_as_cached(model: Path) -> None:
    with open_scheduler(model, slots=2, n_ubatch=64) as scheduler:
        both = scheduler.ask(*(greedy(LONG, max_tokens=1, progress=True) for _ in range(2)))
        assert reported(both, 0)[-1] == (150, 0, 150)
        assert reported(both, 1) == [(150, 149, 149), (150, 149, 150)]


def test_tokens_from_the_prompt_cache_are_reported_as_cached(model: Path) -> None:
    with open_scheduler(model, slots=1, n_ubatch=64, cache_bytes=1 << 30) as scheduler:
        scheduler.ask(greedy(LONG, max_tokens=1)).wait()
        scheduler.ask(greedy(LONG[::-1], max_tokens=1)).wait()
        again = scheduler.ask(greedy(LONG, max_tokens=1, progress=True))
        assert reported(again) == [(150, 128, 128), (150, 128, 150)]  # a block has 128 tokens


def test_the_times_of_a_choice_end_where_the_next_begins(model: Path) -> None:
    times: list[tuple[Event, float]] = []
    with open_scheduler(model, slots=1, n_ubatch=64) as scheduler:
        scheduler.hold()
        listener = Listener()

        def observe(event: Event) -> None:
            times.append((event, time.monotonic()))
            listener(event)

        scheduler.submit([greedy(LONG, max_tokens=4, sampling=GREEDY, progress=True)], observe)
        for _ in range(3 + 3):  # ubatches of the prompt, and of the answer
            scheduler.next_ubatch()
            time.sleep(0.05)
            scheduler.compute()
        listener.wait()
    finished = listener.finished()
    begun, *_, prompt_end = [at for event, at in times if isinstance(event, Progress)]
    [end] = [at for event, at in times if isinstance(event, Finished)]
    assert finished.prompt_seconds == pytest.approx(prompt_end - begun, abs=0.03)
    assert finished.answer_seconds == pytest.approx(end - prompt_end, abs=0.03)
    assert min(finished.prompt_seconds, finished.answer_seconds) > 0.15
