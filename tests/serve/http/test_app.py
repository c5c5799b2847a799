import asyncio
from collections.abc import AsyncIterator, Sequence
from threading import Event
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error
from dots1_local.serve.generation import Failed, Finished, GenerationRequest, Piece, QueueFull
from dots1_local.serve.http import request as http_request
from dots1_local.serve.http.app import make_app
from dots1_local.serve.http.model import Model
from dots1_local.serve.http.service import Service
from dots1_local.serve.scheduler import Load
from tests.serve.http.asgi import (
    JSON,
    Deliver,
    Exchange,
    FakeScheduler,
    Reply,
    exchange,
    send,
    serving,
)

CHAT = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
STREAM = {**HI, "stream": True}


def ask(app: Any, path: str, *more: Any) -> Reply:
    return asyncio.run(send(app, path, *more))


def finished(index: int = 0) -> Finished:
    return Finished(index, "stop", 3, 2, 1)


def test_choices_are_separated_whatever_their_order(app: Any, scheduler: FakeScheduler) -> None:
    def script(requests: Sequence[GenerationRequest], deliver: Deliver) -> None:
        for event in (Piece(1, "b"), Piece(0, "a"), Piece(1, "B"), finished(1), Piece(0, "A")):
            deliver(event)
        deliver(Finished(0, "length", 3, 2, 7, drafted_tokens=5, accepted_tokens=3))

    scheduler.script = script
    found = ask(app, CHAT, {**HI, "n": 2}).json
    assert [c["message"]["content"] for c in found["choices"]] == ["aA", "bB"]
    assert [c["finish_reason"] for c in found["choices"]] == ["length", "stop"]
    assert found["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 8,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 3,
            "rejected_prediction_tokens": 2,
        },
    }


def test_a_silent_stream_is_kept_alive(engine: Engine) -> None:
    fake = FakeScheduler()
    delivers: list[Deliver] = []
    fake.script = lambda requests, deliver: delivers.append(deliver)

    async def run() -> Reply:
        request = exchange(serving(engine, fake, ping=0.001), CHAT, STREAM)
        pings = 0
        while pings < 3:
            message = await request.sent.get()
            pings += message.get("body", b"").startswith(b":")
        await request.sent.put({"type": "http.response.start", "status": 200, "headers": []})
        delivers[0](finished())
        return await request.reply()

    assert asyncio.run(run()).events[-1] == "[DONE]"


def test_simultaneous_events_are_sent_together(app: Any, scheduler: FakeScheduler) -> None:
    def script(requests: Sequence[GenerationRequest], deliver: Deliver) -> None:
        for _ in range(100):
            deliver(Piece(0, "a"))
        deliver(finished())

    async def run() -> tuple[int, Reply]:
        request = exchange(app, CHAT, STREAM)
        await asyncio.wait([request.task])
        return request.sent.qsize(), await request.reply()

    scheduler.script = script
    messages, reply = asyncio.run(run())
    assert messages < 10
    assert len(reply.events) == 1 + 100 + 1 + 1


@pytest.mark.parametrize("asked", [HI, STREAM])
def test_disconnecting_cancels_at_once(app: Any, scheduler: FakeScheduler, asked: Any) -> None:
    async def run() -> bool:
        request = exchange(app, CHAT, asked)
        while not scheduler.requests:
            await asyncio.sleep(0)
        assert not scheduler.handle.cancelled.is_set()
        request.leave()
        await request.task
        return scheduler.handle.cancelled.is_set()

    assert asyncio.run(run())


def test_a_failure_in_mid_stream_is_an_event(app: Any, scheduler: FakeScheduler) -> None:
    def script(requests: Sequence[GenerationRequest], deliver: Deliver) -> None:
        deliver(Piece(0, "a"))
        deliver(Failed("the engine is gone"))

    scheduler.script = script
    reply = ask(app, CHAT, STREAM)
    assert reply.status == 200
    assert '"message":"the engine is gone","type":"server_error"' in reply.events[-1]


def test_a_failure_before_a_whole_answer_is_an_error(app: Any, scheduler: FakeScheduler) -> None:
    scheduler.script = lambda requests, deliver: deliver(Failed("the engine is gone"))
    reply = ask(app, CHAT, HI)
    assert (reply.status, reply.error["type"]) == (500, "server_error")
    assert reply.error["message"] == "the engine is gone"


def test_a_full_queue_says_when_to_retry(app: Any, scheduler: FakeScheduler) -> None:
    def script(requests: Sequence[GenerationRequest], deliver: Deliver) -> None:
        raise QueueFull(64, 7)

    scheduler.script = script
    reply = ask(app, CHAT, HI)
    assert (reply.status, reply.headers["retry-after"]) == (429, "7")
    assert reply.error["type"] == "rate_limit_error"


def test_a_closed_scheduler_is_unavailable(app: Any, scheduler: FakeScheduler) -> None:
    def script(requests: Sequence[GenerationRequest], deliver: Deliver) -> None:
        raise Dots1Error("the server is shutting down")

    scheduler.script = script
    assert ask(app, CHAT, HI).status == 503


def test_a_bug_is_hidden_from_clients(
    app: Any, scheduler: FakeScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    def script(requests: Sequence[GenerationRequest], deliver: Deliver) -> None:
        raise ValueError("secret")

    async def run() -> Reply:
        request = exchange(app, CHAT, HI)
        await asyncio.wait([request.task])
        assert isinstance(
            request.task.exception(), ValueError
        )  # Starlette raises it again for the server's log
        request.task = asyncio.create_task(asyncio.sleep(0))
        return await request.reply()

    scheduler.script = script
    reply = asyncio.run(run())
    assert (reply.status, reply.error["type"]) == (500, "server_error")
    assert b"secret" not in reply.body
    assert "secret" in caplog.text


def test_requests_are_refused_until_the_model_is_loaded(engine: Engine) -> None:
    service = Service("dots1")
    app = make_app(service)
    for path, asked in (("/v1/models", None), (CHAT, HI), ("/v1/completions", {"prompt": "hi"})):
        reply = ask(app, path, asked)
        assert (reply.status, reply.error["type"]) == (503, "service_unavailable_error")
        assert int(reply.headers["retry-after"]) > 0
    health = ask(app, "/health")
    assert (health.status, health.json) == (503, {"status": "loading"})
    fake: Any = FakeScheduler()
    service.open(Model(engine, "dots1"), fake)
    health = ask(app, "/health")
    assert health.status == 200
    assert health.json == {"status": "ok", "running": 0, "waiting": 0, "slots": 1}
    service.close()
    assert ask(app, CHAT, HI).status == 503
    assert ask(app, "/health").json["status"] == "closing"


def test_health_answers_while_a_prompt_is_tokenised(
    app: Any, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, resume = Event(), Event()
    original = Model.chat

    def slow(self: Model, fields: Any) -> Any:
        begun.set()
        assert resume.wait(60)
        return original(self, fields)

    monkeypatch.setattr(Model, "chat", slow)
    scheduler.script = lambda requests, deliver: deliver(finished())

    async def run() -> tuple[Reply, Reply]:
        request = exchange(app, CHAT, HI)
        assert await asyncio.to_thread(begun.wait, 60)
        health = await send(app, "/health")
        resume.set()
        return health, await request.reply()

    health, answer = asyncio.run(run())
    assert health.status == answer.status == 200


def test_models_are_listed_with_their_context(app: Any) -> None:
    [entry] = ask(app, "/v1/models").json["data"]
    assert (entry["id"], entry["object"], entry["max_model_len"]) == ("dots1", "model", 64)
    assert entry["created"] > 1_600_000_000
    assert ask(app, "/v1/models/dots1").json == entry
    assert ask(app, "/v1/models/org/other").error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("path", "asked", "status"),
    [
        ("/page", None, 404),
        ("/v1", None, 404),
        ("/v1/embeddings", {"input": "hi"}, 404),
        (CHAT, None, 405),
        ("/v1/models", {}, 405),
        ("/health", {}, 405),
    ],
)
def test_unknown_paths_and_methods_are_openai_errors(
    app: Any, path: str, asked: Any, status: int
) -> None:
    reply = ask(app, path, asked)
    assert reply.status == status
    assert set(reply.error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("kind", [(), (("Content-Type", "text/plain"),)])
def test_a_body_of_another_content_type_is_refused(app: Any, kind: Any) -> None:
    assert ask(app, CHAT, HI, kind).status == 415


def test_the_content_type_may_have_a_charset(app: Any, scheduler: FakeScheduler) -> None:
    scheduler.script = lambda requests, deliver: deliver(finished())
    kind = (("content-type", "Application/JSON; charset=utf-8"),)
    assert ask(app, CHAT, HI, kind).status == 200


@pytest.mark.parametrize("length", [(), (("Content-Length", "5"),)])
def test_an_endless_body_is_refused_at_the_limit(app: Any, length: Any) -> None:
    taken = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b" " * (1 << 20)

    async def run() -> Reply:
        return await Exchange(app, "POST", CHAT, parts(), (*JSON, *length)).reply()

    assert asyncio.run(run()).status == 413
    assert taken == 9


def test_a_body_that_does_not_arrive_is_refused(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_request, "_BODY_SECONDS", 0.01)

    async def parts() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async def run() -> Reply:
        return await Exchange(app, "POST", CHAT, parts(), JSON).reply()

    reply = asyncio.run(run())
    assert (reply.status, reply.headers["connection"]) == (408, "close")


@pytest.mark.parametrize("given", [None, "Bearer", "Bearer wrong", "Basic kéy", "Bearer kéy "])
def test_a_key_is_required_everywhere_but_at_health(engine: Engine, given: str | None) -> None:
    app = serving(engine, FakeScheduler(), api_key="key")
    headers = [] if given is None else [("Authorization", given)]
    for path in ("/v1/models", "/v1/nothing"):
        reply = ask(app, path, None, headers)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
    assert ask(app, "/health", None, headers).status == 200
    assert ask(app, "/v1/models", None, [("Authorization", "bearer key")]).status == 200


def test_web_pages_are_allowed_only_from_given_origins(engine: Engine) -> None:
    origin = ("Origin", "https://page.example")
    preflight = (origin, ("Access-Control-Request-Method", "POST"))
    allowed = "access-control-allow-origin"
    closed = serving(engine, FakeScheduler())
    assert allowed not in ask(closed, "/health", None, (origin,)).headers
    opened = serving(engine, FakeScheduler(), origins=[origin[1]], api_key="key")
    assert ask(opened, "/health", None, (origin,)).headers[allowed] == origin[1]
    refused = ask(opened, "/v1/models", None, (origin,))
    assert (refused.status, refused.headers[allowed]) == (
        401,
        origin[1],
    )  # the page can read the error
    other = (("Origin", "https://other.example"),)
    assert allowed not in ask(opened, "/health", None, other).headers

    async def ask_first() -> Reply:
        return await Exchange(opened, "OPTIONS", CHAT, nothing(), preflight).reply()

    assert asyncio.run(ask_first()).status == 200


async def nothing() -> AsyncIterator[bytes]:
    yield b""


def test_metrics_count_what_was_answered(engine: Engine) -> None:
    events: list[Any] = [
        Piece(0, "Hel"),
        Piece(0, "lo"),
        Finished(0, "stop", 7, 3, 5, drafted_tokens=4, accepted_tokens=2),
    ]

    def script(requests: Sequence[GenerationRequest], deliver: Deliver) -> None:
        for event in events:
            deliver(event)

    scheduler = FakeScheduler(script, load=Load(2, 1, 4))

    async def scrape() -> dict[str, float]:
        app = serving(engine, scheduler)
        for _ in range(2):
            await send(app, "/v1/completions", {"prompt": "x"})
        reply = await send(app, "/metrics")
        assert reply.headers["content-type"].startswith("text/plain")
        families = text_string_to_metric_families(reply.body.decode())
        samples = [sample for family in families for sample in family.samples]
        return {sample.name + sample.labels.get("reason", ""): sample.value for sample in samples}

    found = asyncio.run(scrape())
    expected = {
        "cache_ram_bytes": 4096, "cache_disk_bytes": 8192, "restored_tokens": 64,
        "prompt_tokens_total": 14, "cached_tokens_total": 6, "generated_tokens_total": 10,
        "drafted_tokens_total": 8, "accepted_tokens_total": 4, "answers_totalstop": 2,
        "first_token_seconds_count": 2, "answer_seconds_count": 2,
        "running": 2, "waiting": 1, "slots": 4,
    }  # fmt: skip
    assert {name: found[f"dots1_{name}"] for name in expected} == expected
