"""Prompts that come back after their slot was given away."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from tests.helpers import write_random_gguf
from tests.serve.scheduling import Alone, Listener, RecordingScheduler, greedy, open_scheduler

FIRST, SECOND, THIRD = bytes(range(100)), bytes(range(100, 200)), bytes(range(50, 150))
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("cache") / "model.gguf")


def ask(scheduler: RecordingScheduler, prompt: Sequence[int]) -> Listener:
    return scheduler.ask(greedy(prompt, max_tokens=3, top_logprobs=0)).wait()


def cached(listener: Listener) -> int:
    return listener.finished().cached_tokens


def state_bytes(scheduler: RecordingScheduler, prompt: Sequence[int]) -> int:
    """The bytes of the state of a prompt and what was written after it."""
    ask(scheduler, prompt)
    state = scheduler.engine.copy(0, 0, len(prompt) + 2)
    assert state is not None
    return state.nbytes


def test_a_conversation_comes_back_after_another(model: Path) -> None:
    with open_scheduler(model, slots=1, cache_bytes=PLENTY) as scheduler:
        first = ask(scheduler, FIRST)
        assert cached(ask(scheduler, SECOND)) == 0
        prompt = [*FIRST, *(each.token for each in first.logprobs()), *b"and then?"]
        again = ask(scheduler, prompt)
        assert cached(again) == 100 + 2  # the last token was sampled but not computed
        Alone(model).check(prompt, again.logprobs())
        back = ask(scheduler, SECOND)
        assert cached(back) == 99
        Alone(model).check(SECOND, back.logprobs())


def test_without_a_cache_it_is_computed_again(model: Path) -> None:
    with open_scheduler(model, slots=1) as scheduler:
        ask(scheduler, FIRST)
        ask(scheduler, SECOND)
        assert cached(ask(scheduler, FIRST)) == 0


def test_a_changed_line_costs_what_follows_it(model: Path) -> None:
    with open_scheduler(model, slots=1, cache_bytes=PLENTY) as scheduler:
        ask(scheduler, FIRST)
        ask(scheduler, SECOND)
        changed = FIRST[:60] + b"!" + FIRST[61:]
        again = ask(scheduler, changed)
        assert cached(again) == 60
        Alone(model).check(changed, again.logprobs())


def test_what_was_used_longest_ago_goes_first(model: Path) -> None:
    with open_scheduler(model, slots=1) as scheduler:
        room = 2 * state_bytes(scheduler, FIRST)
    with open_scheduler(model, slots=1, cache_bytes=room) as scheduler:
        for prompt in (FIRST, SECOND, THIRD, bytes(range(150, 250))):
            ask(scheduler, prompt)  # the last one pushes FIRST out
        assert cached(ask(scheduler, SECOND)) == 99
        assert cached(ask(scheduler, FIRST)) == 0


def test_a_cache_too_small_for_a_prompt_keeps_nothing(model: Path) -> None:
    with open_scheduler(model, slots=1) as scheduler:
        room = state_bytes(scheduler, FIRST) - 1
    with open_scheduler(model, slots=1, cache_bytes=room) as scheduler:
        ask(scheduler, FIRST)
        ask(scheduler, SECOND)
        assert cached(ask(scheduler, FIRST)) == 0


def test_a_state_that_cannot_be_read_is_computed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_scheduler(model, slots=1, cache_bytes=PLENTY) as scheduler:
        ask(scheduler, FIRST)
        ask(scheduler, SECOND)
        monkeypatch.setattr(scheduler.engine, "paste", lambda *block: False)
        again = ask(scheduler, FIRST)
        assert cached(again) == 0
        Alone(model).check(FIRST, again.logprobs())


def test_conversations_in_any_order_are_answered_right(model: Path) -> None:
    random = Random(7)
    stems = [random.randbytes(60) for _ in range(6)]
    with open_scheduler(model, slots=2, cache_bytes=PLENTY, queue_size=100) as scheduler:
        prompts = [
            random.choice(stems) + random.randbytes(random.randrange(1, 60)) for _ in range(60)
        ]
        listeners = [
            scheduler.ask(greedy(prompt, max_tokens=3, top_logprobs=0)) for prompt in prompts
        ]
        found = [listener.wait() for listener in listeners]
    assert sum(cached(each) >= 60 for each in found) > 40
    alone = Alone(model)
    for prompt, each in zip(prompts, found, strict=True):
        alone.check(prompt, each.logprobs())
