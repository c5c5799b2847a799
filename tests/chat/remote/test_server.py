"""Finding a server and its model, and the errors if there is none."""

import gzip
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

import pytest

from dots1_local.chat.remote import RemoteSession
from dots1_local.chat.remote.address import Key
from dots1_local.chat.remote.server import Server
from dots1_local.errors import Dots1Error, UsageError
from tests.chat.remote.conftest import Talk, say
from tests.openai_server import VLLM_MODELS, Played, answer, as_json, playing, refused

BOMB = gzip.compress(bytes(1 << 28))  # 256 MiB


def test_opening_waits_for_a_model_that_is_loading(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dots1_local.chat.remote.server._STEP_SECONDS", 0)
    loading = refused("Loading model", 503, kind="unavailable_error")
    with playing(loading, loading, answer("a")) as server:
        session = RemoteSession(Server(server.url, notify=told.append))
        assert say(session, "hi") == "a"
    assert len(told) == 1
    assert "loading" in told[0]


def test_a_key_goes_to_the_server_and_nowhere_else(talk: Talk, told: list[str]) -> None:
    with playing(answer("never")) as other:
        on = Played([], 307, headers={"Location": f"{other.url}/chat/completions"})
        session, server = talk(on, key=Key("s3cret", "DOTS1_API_KEY"))
        with pytest.raises(Dots1Error, match=other.url):
            say(session, "hi")
        assert {each.headers["Authorization"] for each in server.asked} == {"Bearer s3cret"}
        assert (other.asked, told) == ([], [])


def test_a_key_that_strangers_can_read_is_told(
    talk: Talk, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dots1_local.chat.remote.server.is_exposed", lambda url: True)
    talk(key=Key("s3cret", "OPENAI_API_KEY"))
    (notice,) = told
    assert "OPENAI_API_KEY goes to 127.0.0.1 unencrypted" in notice


def test_a_proxy_of_the_environment_is_used_but_not_for_this_machine(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = "http://far.example/v1"
    with playing(answer("by proxy"), base=far) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix(far))
        monkeypatch.delenv("no_proxy", raising=False)
        assert say(RemoteSession(Server(far)), "hi") == "by proxy"
        assert proxy.asked[-1].headers["Host"] == "far.example"
        session, _ = talk(answer("straight"))
        assert say(session, "hi") == "straight"
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(Dots1Error, match=f"{far}.*SOCKS"):
        Server(far)


@contextmanager
def listening(reply: bytes | None) -> Iterator[str]:
    """Listen at a port and send one reply; None sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = Event()

        def serve() -> None:
            with listener.accept()[0] as client:
                if reply is None:
                    done.wait(30)
                else:
                    client.recv(65536)
                    client.sendall(reply)

        thread = Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "HTTP"),
        (b"\x00" * 100_000, "HTTP"),
        (b"", "HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "models"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"data": 7}', "models"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, "models"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nnot gzip", "cannot use"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + BOMB, "models"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "cut"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: x; charset=zip\r\n\r\n{}", "models"),
        (None, "0.2 seconds"),
    ],
)
def test_another_kind_of_server_is_told_in_one_sentence(
    reply: bytes | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dots1_local.chat.remote.server._TIMEOUT", 0.2)
    with listening(reply) as url, pytest.raises(Dots1Error, match=words) as caught:
        Server(url)
    assert url in str(caught.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1/v1", "nobody listens at http://127.0.0.1:1/v1"),
        ("http://no-such-host.invalid/v1", "host of http://no-such-host.invalid/v1"),
    ],
)
def test_a_server_that_is_not_there_is_told(
    url: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Dots1Error, match=words):
        Server(url)


@pytest.mark.parametrize(
    "elsewhere",
    [
        refused("Not Found", 404),
        as_json({"error": "Unexpected endpoint or method. (GET /models)"}),  # LM Studio
        Played([b"<html>"], kind="text/html"),  # a page for whatever is asked for
        as_json(VLLM_MODELS),  # llama.cpp's server, whose /completions is another API
    ],
)
def test_an_address_without_v1_is_completed(elsewhere: Played, told: list[str]) -> None:
    with playing(elsewhere=elsewhere) as server:
        found = Server(server.url.removesuffix("/v1"), notify=told.append)
        assert (str(found.url), found.model, found.n_ctx) == (server.url, "dots1", 2048)
        assert told == [f"using {server.url}"]


def test_llama_cpps_server_gives_its_context_elsewhere() -> None:
    entry = {"id": "m.gguf", "aliases": ["m"], "meta": {"n_ctx": 512, "n_ctx_train": 2048}}
    with playing(models=as_json({"object": "list", "data": [entry]})) as server:
        assert Server(server.url).n_ctx == 512
        assert Server(server.url, "any").model == "any"  # it accepts every name


def test_one_of_several_models_is_chosen() -> None:
    models = {"data": [*VLLM_MODELS["data"], {"id": "lora"}, {"id": "\x1b[2J"}, {"id": 7}, 7]}
    with playing(models=as_json(models)) as server:
        with pytest.raises(UsageError, match=r"with --model: dots1, lora$"):
            Server(server.url)
        assert Server(server.url, "dots1").n_ctx == 2048
        assert Server(server.url, "lora").n_ctx is None


def test_some_of_very_many_models_are_listed() -> None:
    models = {"data": [{"id": f"m{number}"} for number in range(400)]}
    with playing(models=as_json(models)) as server:
        with pytest.raises(UsageError, match=r": m0, m1, .* m19 and 380 more$"):
            Server(server.url)
        assert Server(server.url, "m399").model == "m399"


def test_a_missing_model_is_told_with_the_models_there_are() -> None:
    missing = refused("The model `dots2` does not exist.", 404, kind="NotFoundError")
    with playing(missing) as server:
        session = RemoteSession(Server(server.url, "dots2"))
        with pytest.raises(Dots1Error, match=r"dots2.*dots1"):
            say(session, "hi")


def test_a_session_is_opened_with_the_key_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setenv("DOTS1_API_KEY", "s3cret")
    monkeypatch.setattr("dots1_local.chat.remote.server.is_exposed", lambda url: True)
    with (
        playing(answer("hi")) as server,
        RemoteSession.open(server.url, notify=told.append, system="") as session,
    ):
        assert say(session, "hello") == "hi"
        assert server.bodies[0]["messages"][0] == {"role": "system", "content": ""}
        assert {each.headers["Authorization"] for each in server.asked} == {"Bearer s3cret"}
    assert "DOTS1_API_KEY goes to 127.0.0.1 unencrypted" in told[0]
