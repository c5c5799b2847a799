"""llama-server's `timings` and `prompt_progress`, in chats and completions."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from dots1_local.serve.generation import Finished, GenerationRequest, Piece, Progress
from tests.serve.http.asgi import Deliver, FakeScheduler, send

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
ENDPOINTS = pytest.mark.parametrize(
    ("path", "asked"), [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "hi"})]
)
# 30 tokens of the prompt in 0.5 s, and 4 steps after the first token in 2 s.
TIMINGS = {
    "cache_n": 10,
    "prompt_n": 30,
    "prompt_ms": 500,
    "prompt_per_token_ms": pytest.approx(500 / 30),
    "prompt_per_second": 60,
    "predicted_n": 5,
    "predicted_ms": 2000,
    "predicted_per_token_ms": 500,
    "predicted_per_second": 2,
}


def answers(requests: Sequence[GenerationRequest], deliver: Deliver) -> None:
    for index, request in enumerate(requests):
        if request.progress:
            deliver(Progress(index, 40, 10, 10, 0.0))
            deliver(Progress(index, 40, 10, 40, 0.5))
        deliver(Piece(index, "Hello"))
        deliver(Finished(index, "length", 40, 10, 5, prompt_seconds=0.5, answer_seconds=2.0))


@pytest.fixture
def scheduler() -> FakeScheduler:
    return FakeScheduler(answers)


def chunks(app: Any, path: str, asked: dict[str, Any]) -> list[Any]:
    reply = asyncio.run(send(app, path, {**asked, "stream": True}))
    *documents, last = reply.events
    assert (reply.status, last) == (200, "[DONE]")
    return [json.loads(each) for each in documents]


@ENDPOINTS
def test_an_answer_and_the_last_chunk_have_timings(app: Any, path: str, asked: Any) -> None:
    assert asyncio.run(send(app, path, asked)).json["timings"] == TIMINGS
    *others, last = chunks(app, path, asked)
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["timings"] == TIMINGS
    assert not any("timings" in each for each in others)
    *others, last = chunks(app, path, {**asked, "stream_options": {"include_usage": True}})
    assert last["choices"] == []
    assert last["timings"] == TIMINGS
    assert not any("timings" in each for each in others)


@ENDPOINTS
def test_several_choices_add_up(app: Any, path: str, asked: Any) -> None:
    found = asyncio.run(send(app, path, {**asked, "n": 2})).json["timings"]
    assert (found["prompt_n"], found["prompt_ms"], found["prompt_per_second"]) == (60, 1000, 60)
    assert (found["predicted_n"], found["predicted_per_second"]) == (10, 2)


def test_drafts_are_counted_if_there_are_any(app: Any, scheduler: FakeScheduler) -> None:
    drafted = Finished(0, "stop", 4, 0, 9, drafted_tokens=8, accepted_tokens=6)
    scheduler.script = lambda requests, deliver: deliver(drafted)
    found = asyncio.run(send(app, "/v1/chat/completions", CHAT)).json["timings"]
    assert (found["draft_n"], found["draft_n_accepted"]) == (8, 6)
    assert found["predicted_per_second"] == 0  # it took no time that a clock can tell


@ENDPOINTS
def test_a_stream_tells_the_progress_if_asked(app: Any, path: str, asked: Any) -> None:
    assert not any("prompt_progress" in each for each in chunks(app, path, asked))
    told = [
        each
        for each in chunks(app, path, {**asked, "n": 2, "return_progress": True})
        if "prompt_progress" in each
    ]
    assert [each["choices"][0]["index"] for each in told] == [0, 0, 1, 1]
    assert told[1]["prompt_progress"] == {"total": 40, "cache": 10, "processed": 40, "time_ms": 500}
    [choice] = told[1]["choices"]
    assert choice["finish_reason"] is None
    assert [choice.get("text", ""), choice.get("delta", {})] == ["", {}]


@ENDPOINTS
def test_whole_answers_have_no_progress(
    app: Any, scheduler: FakeScheduler, path: str, asked: Any
) -> None:
    assert asyncio.run(send(app, path, {**asked, "return_progress": True})).status == 200
    assert not any(request.progress for request in scheduler.requests)


def test_progress_is_no_first_token(app: Any, scheduler: FakeScheduler) -> None:
    def script(requests: Sequence[GenerationRequest], deliver: Deliver) -> None:
        deliver(Progress(0, 40, 10, 10, 0.0))
        deliver(Finished(0, "stop", 40, 10, 1))

    scheduler.script = script
    chunks(app, "/v1/completions", {"prompt": "hi", "return_progress": True})
    metrics = asyncio.run(send(app, "/metrics")).body.decode()
    assert "dots1_first_token_seconds_count 0.0" in metrics
