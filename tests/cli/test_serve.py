import json
import os
import re
import signal
import socket
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from dots1_local.cli import app
from dots1_local.cli._prompt_cache import open_cache
from dots1_local.devices import limits
from tests.cli.terminal import ABORTS
from tests.helpers import EOS, scripted_tensors, tokens_of, until, write_random_gguf
from tests.serve.served import DOTS1, Served, connect
from tests.workers import Program, free_port

BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}], "temperature": 0})
JSON = {"Content-Type": "application/json"}
# Loading that takes until it is stopped.
LOADING = (
    "-c",
    "import threading, dots1_local.engine.planned as planned; "
    "planned.load = lambda *a, **k: print('loads', flush=True) or threading.Event().wait(); "
    "from dots1_local.cli import main; main()",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A model that answers 中文 to everything."""
    path = folder / "model.gguf"
    return write_random_gguf(path, tensors=scripted_tensors([*tokens_of("中文"), EOS]))


@pytest.fixture(scope="module")
def endless(folder: Path) -> Path:
    """A model that never ends its answer."""
    path = folder / "endless.gguf"
    return write_random_gguf(path, tensors=scripted_tensors(tokens_of("abca")), context=1 << 20)


def post(connection: HTTPConnection, body: str = BODY, **headers: str) -> tuple[int, Any]:
    connection.request("POST", "/v1/chat/completions", body, {**JSON, **headers})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def begin_stream(connection: HTTPConnection) -> Any:
    """Request a stream, and return the response after its first text."""
    asked = json.dumps({**json.loads(BODY), "stream": True})
    connection.request("POST", "/v1/chat/completions", asked, JSON)
    response = connection.getresponse()
    while b'"content":"a"' not in response.readline():
        pass
    return response


def reachable(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serves_until_a_signal_and_exits_cleanly(model: Path, number: signal.Signals) -> None:
    with Served(model, "--served-model-name", "org/my", "-c", "512") as server:
        assert "as org/my, context of 512 tokens, 1 answer at once" in server.told
        connection = server.connect()
        status, answer = post(connection)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "中文")
        assert server.get("/v1/models/org/my")[0] == 200
        os.kill(server.process.pid, number)
        assert server.wait_for_end() == 0
        assert server.process.stdout
        assert server.process.stdout.read() == ""
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", server.port))


@pytest.mark.parametrize(("option", "drafted"), [("5", True), ("off", False)])
def test_usage_tells_how_many_drafted_tokens_were_right(
    endless: Path, option: str, drafted: bool
) -> None:
    with Served(endless, "-c", "512", "--draft", option) as server:
        _, answer = post(server.connect(), json.dumps({**json.loads(BODY), "max_tokens": 60}))
    details = answer["usage"]["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"] > 30) == drafted
    assert details["rejected_prediction_tokens"] == 0


def test_the_page_is_served_unless_it_is_turned_off(model: Path) -> None:
    with Served(model) as server:
        assert f"chat page at http://127.0.0.1:{server.port}/" in server.told
        status, page = server.get("/")
        assert (status, page[:15]) == (200, b"<!doctype html>")
        _, placement = server.get("/v1/placement")
        [device] = json.loads(placement)["devices"]
        assert (device["name"], device["allocated"]["kv"]) == ("CPU", device["planned"]["kv"])
    with Served(model, "--no-page") as server:
        assert "page" not in server.told
        assert server.get("/")[0] == 404


def test_a_running_answer_is_finished_before_the_end(endless: Path) -> None:
    with Served(endless, "-c", "3k") as server:
        connection = server.connect()
        stream = begin_stream(connection)
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.wait_for("answers have 10 seconds")
        assert stream.read().endswith(b"data: [DONE]\n\n")
        assert server.wait_for_end() == 0


def test_a_second_interrupt_ends_it_at_once(endless: Path) -> None:
    with Served(endless, "-c", "1024k") as server:
        begin_stream(server.connect())
        idle = server.connect()
        idle.request("GET", "/health")
        idle.getresponse().read()
        os.kill(server.process.pid, signal.SIGINT)
        assert idle.sock.recv(1) == b""  # the server knows of the signal
        os.kill(server.process.pid, signal.SIGINT)
        assert server.wait_for_end() == 130


def test_a_client_that_leaves_makes_room_for_the_next(endless: Path) -> None:
    with Served(endless, "-c", "1024k", "--queue", "1") as server:
        first = server.connect()
        stream = begin_stream(first)
        second, third = server.connect(), server.connect()
        second.request("POST", "/v1/chat/completions", BODY, JSON)
        while json.loads(server.get("/health")[1])["waiting"] < 1:
            pass
        status, refusal = post(third)
        assert (status, refusal["error"]["type"]) == (429, "rate_limit_error")
        stream.close()
        first.close()
        second.close()
        while json.loads(server.get("/health")[1])["running"]:
            pass
        assert begin_stream(third).status == 200


def test_what_is_refused_does_not_end_the_connection(model: Path) -> None:
    with Served(model) as server:
        connection = server.connect()
        status, error = post(connection, " " * (9 << 20))
        assert (status, error["error"]["type"]) == (413, "invalid_request_error")
        socket_before = connection.sock
        assert post(connection)[0] == 200
        assert connection.sock is socket_before


def test_a_lost_worker_is_one_sentence(endless: Path) -> None:
    program = ("-c", f"{ABORTS.replace('decode', 'submit')}\n{DOTS1[1]}")
    with Served(endless, program=program) as server:
        status, answer = post(server.connect())
        assert status >= 500
        assert "worker was lost" in answer["error"]["message"]
        assert server.wait_for("").startswith("dots1: the connection to a worker was lost")
        assert server.wait_for_end() == 1


def test_an_engine_that_cannot_go_on_ends_the_server(model: Path) -> None:
    broken = (
        "-c",
        "from dots1_local.serve.scheduler import Scheduler; "
        f"Scheduler._work_to_do = lambda self: 1 / 0; {DOTS1[1]}",
    )
    with Served(model, program=broken) as server:
        assert "the engine has failed" in server.wait_for("dots1: ")
        assert server.wait_for_end() == 1


def test_while_the_model_is_loaded_it_can_be_asked_and_stopped(model: Path) -> None:
    free = free_port()
    with Program(*LOADING, "serve", str(model), "--port", str(free)) as program:
        program.wait_for("loads")
        while not reachable(free):
            pass
        with closing(connect(free)) as connection:
            status, error = post(connection)
        assert (status, error["error"]["type"]) == (503, "service_unavailable_error")
        os.kill(program.process.pid, signal.SIGINT)
        assert program.wait_for_end() == 130
        assert program.process.stdout
        assert program.process.stdout.read() == ""


def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    with Program(*DOTS1, "serve", str(tmp_path / "none.gguf"), "--port", "0") as program:
        assert program.wait_for("none.gguf").startswith("dots1: ")
        assert program.wait_for_end() == 1


def test_a_draft_that_is_not_possible_is_refused(model: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(model), "--draft", "often"])
    assert "often" in str(result.exception)


def test_a_port_that_is_taken_is_one_sentence(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", str(model), "--port", port])
        assert str(result.exception).startswith(f"cannot listen at 127.0.0.1, port {port}: ")


def test_prompts_outlast_a_server_that_is_killed(model: Path, tmp_path: Path) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "word " * 10}], "max_tokens": 1})
    disk = tmp_path / "prompts"
    with Served(model, "-c", "1024", "--prompt-cache", str(disk)) as server:
        _, first = post(server.connect(), body)
        until(lambda: any(disk.glob("*/*.kv")))
        server.kill()
    with Served(model, "-c", "1024", "--prompt-cache", str(disk)) as server:
        _, again = post(server.connect(), body)
        assert b"restored_tokens 0.0" not in server.get("/metrics")[1]
    n_prompt = first["usage"]["prompt_tokens"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == n_prompt - 1


@pytest.mark.parametrize(
    "options",
    [
        ("--prompt-cache-size", "1GB"),
        ("--prompt-cache-ram", "much"),
        ("--prompt-cache", "/dev/null/prompts"),
    ],
)
def test_a_prompt_cache_that_cannot_be_is_one_sentence(
    model: Path, options: tuple[str, ...]
) -> None:
    result = CliRunner().invoke(app, ["serve", str(model), "--port", "0", *options])
    assert getattr(result.exception, "exit_code", None) in (1, 2)
    assert options[-1] in str(result.exception) or options[0] in str(result.exception)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "x" * 70 + ".invalid", ""])
def test_an_address_that_is_not_ours_is_one_sentence(model: Path, host: str) -> None:
    with Program(*DOTS1, "serve", str(model), "--host", host, "--port", "0") as program:
        assert program.wait_for("").startswith("dots1: cannot listen at ")
        assert program.wait_for_end() == 1


def test_a_key_from_the_environment_is_asked_for(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOTS1_API_KEY", "secret")
    with Served(model) as server:
        connection = server.connect()
        assert post(connection)[0] == 401
        assert post(connection, Authorization="Bearer secret")[0] == 200
        assert server.get("/health")[0] == 200


def test_an_open_address_without_a_key_is_warned_of(model: Path) -> None:
    with Program(*DOTS1, "serve", str(model), "--port", "0", "--host", "0.0.0.0") as program:
        assert "--api-key" in program.wait_for("warning")
        found = re.search(r":(\d+)/v1", program.wait_for("listening"))
        assert found
        with closing(connect(int(found[1]))) as connection:
            assert post(connection)[0] == 200


@pytest.mark.parametrize(
    "options",
    [("--api-key", ""), ("--api-key", "a\nb"), ("--api-key", " a"), ("--served-model-name", " ")],
)
def test_what_nobody_could_send_is_a_usage_error(model: Path, options: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["serve", str(model), *options])
    assert getattr(result.exception, "exit_code", None) == 2
    assert options[0] in str(result.exception)


@pytest.mark.parametrize(
    ("memory", "free"),
    [("mapped", 30_000_000_000), ("plain", 90_000_000_000), (None, 30_000_000_000)],
)
def test_the_prompt_cache_leaves_the_mapped_model_in_ram(
    monkeypatch: pytest.MonkeyPatch, memory: str | None, free: int
) -> None:
    monkeypatch.setattr(limits, "available_ram", lambda: limits.RAM(90_000_000_000, 96_000_000_000))
    placement = memory and SimpleNamespace(host_memory=memory)
    engine: Any = SimpleNamespace(placement=placement, gguf=SimpleNamespace(nbytes=60_000_000_000))
    for given, expected in ((None, min(8 << 30, free // 4)), ("0", 0), ("2GiB", 2 << 30)):
        assert open_cache(engine, given, None, None).ram_bytes == expected
