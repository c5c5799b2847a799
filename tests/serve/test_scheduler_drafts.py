"""Drafts in a server: for a choice that is alone, and without effect on what is written."""

import json
from pathlib import Path
from typing import Any

import pytest

from dots1_local.chat.grammar import Grammar
from dots1_local.chat.sampling import Sampling
from dots1_local.serve.generation import GenerationRequest
from tests.helpers import EOS, scripted_tensors, tokens_of, write_random_gguf
from tests.serve.scheduling import Alone, Listener, RecordingScheduler, greedy, open_scheduler

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Text that the random model does not continue as it was, so that drafts are rejected.
REPETITIVE = b"to be or not to be, to do or not to do, to go or not to go, to be or not to be"
SCHEMA = {
    "type": "array",
    "items": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
    "minItems": 4,
    "maxItems": 12,
}


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes the alphabet without an end."""
    tensors = scripted_tensors(tokens_of(LETTERS + "a"))
    return write_random_gguf(tmp_path_factory.mktemp("endless") / "model.gguf", tensors=tensors)


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights: each token depends on all tokens before it."""
    return write_random_gguf(tmp_path_factory.mktemp("wild") / "model.gguf")


def sizes(scheduler: RecordingScheduler) -> list[int]:
    return [len(ubatch) for ubatch in scheduler.ubatches]


def texts(model: Path, *requests: GenerationRequest, n_draft: int) -> list[tuple[str, int]]:
    """What one request after another gets, and how many drafted tokens were right."""
    with open_scheduler(model, slots=1, n_draft=n_draft, n_ctx=512) as scheduler:
        listeners = [scheduler.ask(request).wait() for request in requests]
    return [(each.text(), each.finished().accepted_tokens) for each in listeners]


def test_a_choice_alone_is_drafted(endless: Path) -> None:
    with open_scheduler(endless, n_draft=7) as scheduler:
        listener = scheduler.ask(greedy(LETTERS, max_tokens=52, top_logprobs=0)).wait()
    assert listener.text() == LETTERS * 2
    # The first letters are known from the prompt once 12 of them are there again.
    assert sizes(scheduler) == [26, *[1] * 11, *[8] * 5]
    finished = listener.finished()
    assert (finished.drafted_tokens, finished.accepted_tokens) == (35, 35)
    assert finished.completion_tokens == 52
    Alone(endless).check(LETTERS.encode(), listener.logprobs())


@pytest.mark.usefixtures("short_matches")
def test_logprobs_are_those_of_the_tokens_own_positions(wild: Path) -> None:
    with open_scheduler(wild, n_draft=5) as scheduler:
        listener = scheduler.ask(greedy(REPETITIVE, max_tokens=100, top_logprobs=2)).wait()
    finished = listener.finished()
    assert 0 < finished.accepted_tokens < finished.drafted_tokens
    assert len(scheduler.ubatches) < 100
    Alone(wild).check(REPETITIVE, listener.logprobs())
    assert all(each.top[0][:2] == (each.token, each.piece) for each in listener.logprobs())


@pytest.mark.usefixtures("short_matches")
def test_sampled_answers_and_later_requests_are_those_without_drafts(wild: Path) -> None:
    sampling = Sampling(0.3, seed=3, frequency_penalty=-0.5)
    requests = [
        GenerationRequest((*REPETITIVE, *range(n)), sampling, max_tokens=n) for n in range(1, 80, 6)
    ]
    plain, drafted = (texts(wild, *requests, n_draft=n) for n in (0, 9))
    assert [text for text, _ in plain] == [text for text, _ in drafted]
    assert sum(accepted for _, accepted in drafted) > 20


@pytest.mark.parametrize("options", [
    {"max_tokens": 39}, {"max_tokens": 40}, {"max_tokens": 45}, {"max_tokens": 46},
    {"stop": ("pqrstuvwxyzabcdefghij",)}, {"stop": ("zabcdefghijklmnopqr",), "max_tokens": 44},
])  # fmt: skip
def test_an_answer_ends_inside_a_draft_as_it_would_without(
    endless: Path, options: dict[str, Any]
) -> None:
    ends = []
    for n_draft in (0, 7):
        with open_scheduler(endless, n_draft=n_draft) as scheduler:
            listener = scheduler.ask(greedy(LETTERS, **options)).wait()
            finished = listener.finished()
            again = scheduler.ask(greedy(LETTERS * 2, max_tokens=2)).wait().finished()
        ends.append(
            (listener.text(), finished.reason, finished.completion_tokens, again.cached_tokens)
        )
    assert ends[0] == ends[1]
    assert finished.accepted_tokens


def test_an_answer_ends_at_the_end_of_the_context(endless: Path) -> None:
    with open_scheduler(endless, n_ctx=64, n_draft=7) as scheduler:
        listener = scheduler.ask(greedy(LETTERS)).wait()
    assert listener.finished().completion_tokens == 64 - 26
    assert listener.finished().accepted_tokens > 15


def test_an_end_token_inside_a_draft_ends_the_answer(tmp_path: Path) -> None:
    tensors = scripted_tensors([*tokens_of(LETTERS), EOS])
    model = write_random_gguf(tmp_path / "model.gguf", tensors=tensors)
    prompt = [*tokens_of(LETTERS), EOS, *tokens_of("Now a")]
    with open_scheduler(model, n_draft=20) as scheduler:
        listener = scheduler.ask(greedy(prompt)).wait()
        assert scheduler.ask(greedy(prompt, max_tokens=1)).wait().text() == "b"
    assert listener.text() == LETTERS[1:]
    assert listener.finished().reason == "stop"
    assert (listener.finished().drafted_tokens, listener.finished().accepted_tokens) == (20, 14)


def test_parallel_choices_are_not_drafted(endless: Path) -> None:
    with open_scheduler(endless, n_draft=7) as scheduler:
        scheduler.hold()
        first = scheduler.ask(greedy(LETTERS, max_tokens=20))
        scheduler.next_ubatch()
        second = scheduler.ask(greedy(LETTERS.upper() + LETTERS, max_tokens=70))
        scheduler.release()
        assert first.wait().text() == LETTERS[:20]
        assert second.wait().text() == (LETTERS * 3)[:70]
    assert first.finished().drafted_tokens == 0
    assert second.finished().accepted_tokens > 20
    for ubatch in scheduler.ubatches:
        if len({entry.seq_id for entry in ubatch}) == 2:
            assert sum(entry.logits for entry in ubatch) <= 2


@pytest.mark.usefixtures("short_matches")
def test_a_choice_that_comes_after_a_draft_is_not_disturbed(wild: Path) -> None:
    prompts = (REPETITIVE, b"something else")
    with open_scheduler(wild, n_draft=5) as scheduler:
        scheduler.hold()
        listeners = [scheduler.ask(greedy(REPETITIVE, max_tokens=90, top_logprobs=0))]
        while sum(entry.logits for entry in scheduler.next_ubatch()) == 1:  # until it is drafted
            scheduler.compute()
        listeners.append(scheduler.ask(greedy(prompts[1], max_tokens=90, top_logprobs=0)))
        scheduler.release()
        for listener in listeners:
            listener.wait()
    for prompt, listener in zip(prompts, listeners, strict=True):
        Alone(wild).check(prompt, listener.logprobs())


@pytest.mark.usefixtures("short_matches")
def test_a_cancelled_draft_leaves_the_cache_right(wild: Path) -> None:
    with open_scheduler(wild, slots=1, n_draft=9) as scheduler:
        scheduler.hold()
        listener = Listener()
        handle = scheduler.submit([greedy(REPETITIVE, max_tokens=90)], listener)
        while sum(entry.logits for entry in scheduler.next_ubatch()) == 1:
            scheduler.compute()
        handle.cancel()
        scheduler.release()
        drafted = [entry.token for entry in scheduler.ubatches[-1]]
        prompt = [*(e.token for u in scheduler.ubatches[:-1] for e in u), *drafted[:4], 7, 8]
        again = scheduler.ask(greedy(prompt, max_tokens=30, top_logprobs=0)).wait()
    assert again.finished().cached_tokens == len(prompt) - 2
    Alone(wild).check(prompt, again.logprobs())


@pytest.mark.usefixtures("short_matches")
def test_a_schema_holds_and_the_document_is_the_same(wild: Path) -> None:
    written = []
    for n_draft in (0, 6):
        with open_scheduler(wild, n_ctx=512, n_draft=n_draft) as scheduler:
            grammar = Grammar(SCHEMA, scheduler.engine)
            listener = scheduler.ask(greedy(b"say:", grammar=grammar, max_tokens=400)).wait()
        written.append(listener.text())
    assert written[0] == written[1]
    assert 4 <= len(json.loads(written[1])) <= 12
    finished = listener.finished()
    assert 0 < finished.accepted_tokens < finished.drafted_tokens


def test_auto_begins_by_itself_and_never_without_a_match(endless: Path) -> None:
    with open_scheduler(endless, n_draft=30, draft="auto") as scheduler:
        repeated = scheduler.ask(greedy(LETTERS, max_tokens=60)).wait()
        new = scheduler.ask(greedy("a", max_tokens=30)).wait()
    assert repeated.text() == (LETTERS * 3)[:60]
    assert repeated.finished().drafted_tokens >= 15
    assert new.finished().drafted_tokens == 0
