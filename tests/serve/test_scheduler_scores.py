"""Log-probabilities of prompts, beside the log-softmax of the same model alone."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dots1_local.errors import UsageError
from dots1_local.serve.generation import GenerationRequest, Scored
from tests.helpers import all_logits, write_random_gguf
from tests.serve.scheduling import Listener, greedy, log_softmax, open_engine, open_scheduler

TEXT = bytes(range(100))
TOP = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("scores") / "model.gguf")


scored = partial(greedy, max_tokens=0, prompt_logprobs=TOP)


def scores(listener: Listener, index: int = 0) -> Scored:
    [event] = [e for e in listener.wait().events if isinstance(e, Scored) and e.index == index]
    return event


def expected(model: Path, tokens: Sequence[int]) -> NDArray[np.float64]:
    """The log-softmax (n, n_vocab) of all tokens."""
    with open_engine(model, 1024, 1024, all_logits=True) as engine:
        return log_softmax(all_logits(engine, tokens))


def check(model: Path, prompt: Sequence[int], found: Scored, top: int = TOP) -> None:
    """Check the log-probability of each token, its rank, and the likeliest tokens there."""
    rows = expected(model, prompt)
    assert [each.token for each in found.logprobs] == list(prompt[1:])
    for row, each in zip(rows, found.logprobs, strict=False):
        assert each.logprob == pytest.approx(row[each.token], abs=1e-3)
        likeliest = np.sort(row)[::-1]
        assert abs(likeliest[each.rank - 1] - row[each.token]) < 1e-3
        best = [logprob for *_, logprob in each.top]  # cached ones may be more than were asked for
        assert len(best) >= top
        assert best == pytest.approx(likeliest[: len(best)], abs=1e-3)
        same = [logprob for token, _, logprob in each.top if token == each.token]
        assert same in ([], [each.logprob])  # the same float


@pytest.mark.parametrize("limits", [{}, {"n_scored": 7}, {"n_scored": 64}, {"n_ubatch": 9}])
def test_each_token_of_a_prompt_has_its_own(model: Path, limits: dict[str, Any]) -> None:
    with open_scheduler(model, **limits) as scheduler:
        listener = scheduler.ask(scored(TEXT))
        check(model, TEXT, scores(listener))
        end = listener.finished()
        assert (end.reason, end.prompt_tokens, end.completion_tokens) == ("length", 100, 0)
        assert listener.text() == ""
        most = limits.get("n_scored", 2)
        assert max(sum(e.logits for e in u) for u in scheduler.ubatches) <= max(2, most)


def test_a_prompt_may_fill_the_context(model: Path) -> None:
    with open_scheduler(model, n_ctx=64, n_scored=16) as scheduler:
        prompt = TEXT[:64]
        check(model, prompt, scores(scheduler.ask(scored(prompt))))
        with pytest.raises(Exception, match="64 tokens long"):
            scheduler.ask(scored(prompt, max_tokens=1))
        with pytest.raises(UsageError, match="at least 0"):
            scheduler.ask(scored(prompt, max_tokens=-1))


def test_an_answer_follows_the_scores(model: Path) -> None:
    with open_scheduler(model, n_scored=16) as scheduler:
        both = scheduler.ask(scored(TEXT, max_tokens=4, top_logprobs=0))
        check(model, TEXT, scores(both))
        alone = scheduler.ask(greedy(TEXT, max_tokens=4, top_logprobs=0)).wait()
        assert both.text() == alone.text()
        assert [e.token for e in both.logprobs()] == [e.token for e in alone.logprobs()]
        kinds = [type(event).__name__ for event in both.events]
        assert kinds[0] == "Scored"


def test_what_is_cached_without_scores_is_scored(model: Path) -> None:
    with open_scheduler(model, n_scored=16) as scheduler:
        scheduler.ask(greedy(TEXT, max_tokens=2)).wait()
        check(model, TEXT, scores(scheduler.ask(scored(TEXT))))
        scheduler.ubatches.clear()
        again = scheduler.ask(scored(TEXT))
        check(model, TEXT, scores(again))
        assert scheduler.computed == 2  # the last token, and the one that scores it
        assert again.finished().cached_tokens == 98
        more = scheduler.ask(scored(TEXT, prompt_logprobs=TOP + 1))
        check(model, TEXT, scores(more), TOP + 1)
        assert scheduler.computed == 2 + 100
        check(model, TEXT, scores(scheduler.ask(scored(TEXT, prompt_logprobs=0))), 0)
        assert scheduler.computed == 2 + 100 + 2


def test_endings_compute_their_context_once(model: Path) -> None:
    endings = [TEXT + bytes([n] * 20) for n in range(101, 105)]
    with open_scheduler(model, slots=4, n_scored=16) as scheduler:
        scheduler.hold()
        listeners = [scheduler.ask(scored(ending)) for ending in endings]
        scheduler.release()
        for ending, listener in zip(endings, listeners, strict=True):
            check(model, ending, scores(listener))
        # Each ending computes the context's last token again, which scores its first one.
        assert scheduler.computed == 120 + 3 * 21
        later = scheduler.ask(scored(TEXT + b"!" * 5))
        check(model, TEXT + b"!" * 5, scores(later))
        assert later.finished().cached_tokens == 99


def test_choices_of_one_request_share_scores(model: Path) -> None:
    with open_scheduler(model, slots=2, n_scored=16) as scheduler:
        listener = scheduler.ask(*[scored(TEXT, max_tokens=3, top_logprobs=0)] * 5).wait()
        for index in range(5):
            check(model, TEXT, scores(listener, index))
        assert scheduler.computed == 100 + 4 * 2 + 5 * 2


def test_scored_and_other_requests_mix(model: Path) -> None:
    random = Random(5)
    stems = [random.randbytes(n) for n in (1, 3, 40, 90)]

    def request() -> GenerationRequest:
        prompt = random.choice(stems) + random.randbytes(random.randrange(30))
        if random.random() < 0.4:
            return greedy(prompt, max_tokens=3, top_logprobs=0)
        return scored(
            prompt, max_tokens=random.choice([0, 2]), prompt_logprobs=random.choice([0, 3])
        )

    requests = [request() for _ in range(60)]
    with open_scheduler(model, slots=3, n_scored=11, queue_size=100) as scheduler:
        listeners = [scheduler.ask(each) for each in requests]
        for each, listener in zip(requests, listeners, strict=True):
            listener.wait()
            if each.prompt_logprobs is not None:
                check(model, each.prompt, scores(listener), each.prompt_logprobs)


def test_scores_do_not_outlive_their_tokens(model: Path) -> None:
    """Prompts that leave a cached text at every point are scored as if they were alone."""
    texts = [TEXT[:n] + bytes([200]) * (30 - n) for n in range(0, 30, 3)]
    with open_scheduler(model, slots=1, n_scored=8) as scheduler:
        for before, after in pairwise(texts):
            scheduler.ask(greedy(before, max_tokens=3)).wait()
            check(model, after, scores(scheduler.ask(scored(after))))
