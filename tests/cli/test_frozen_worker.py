"""A worker that is stopped in mid-answer: what each verb says, saves and exits with."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from dots1_local.placement.placement import Placement
from tests.cli.terminal import CTRL_C, Terminal
from tests.helpers import scripted_tensors, tokens_of, write_random_gguf
from tests.workers import Program, Worker, free_port, local_worker

# A worker is given up after 3 seconds instead of 60, so that tests are quick.
SOON = """
from dots1_local.devices import liveness
liveness.PATIENCE = 3.0
from dots1_local.engine import watch
watch._TOLD = 1.0
"""
DOTS1 = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
DOTS1 += "from dots1_local.cli import main; main()"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says "abc abc ..." without end."""
    path = tmp_path_factory.mktemp("frozen") / "endless.gguf"
    return write_random_gguf(path, tensors=scripted_tensors(tokens_of("abc a")), context=32768)


@pytest.fixture
def worker() -> Iterator[Worker]:
    with local_worker() as worker:
        yield worker
        os.kill(worker.process.pid, signal.SIGCONT)


@pytest.fixture
def plan(model: Path, worker: Worker, tmp_path: Path) -> Path:
    placement = Placement(
        str(model), model.stat().st_size, 3, 4096, "F16", True, 64, 1, "plain",
        layers={"RPC0": 2}, workers=(worker.endpoint,),
    )  # fmt: skip
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(placement.to_json()))
    return path


def freeze(worker: Worker) -> None:
    """Stop the worker, and wait until the engine waits for it."""
    os.kill(worker.process.pid, signal.SIGSTOP)
    time.sleep(0.5)


def test_the_second_ctrl_c_saves_a_dialogue_and_exits_with_130(
    model: Path, plan: Path, worker: Worker, tmp_path: Path
) -> None:
    with Terminal(tmp_path, "chat", model, "--plan", plan) as terminal:
        terminal.wait_for_prompt()
        terminal.type("a question")
        terminal.send("\r")
        terminal.wait_for("abc abc")
        freeze(worker)
        terminal.send(CTRL_C)
        pressed = time.monotonic()
        terminal.wait_for("Ctrl-C again ends")
        assert time.monotonic() - pressed < 2
        terminal.send(CTRL_C)
        pressed = time.monotonic()
        assert terminal.wait_for_end() == 130
        assert time.monotonic() - pressed < 2
    [recovery] = tmp_path.glob(".local/state/dots1/recovery-*.json")
    question, answer = json.loads(recovery.read_text())["messages"][-2:]
    assert question["text"] == "a question"
    assert answer["text"].startswith("abc abc")


def test_a_silent_worker_is_named_and_given_up(
    model: Path, plan: Path, worker: Worker, tmp_path: Path
) -> None:
    session = tmp_path / "session.json"
    arguments = ("chat", model, "--plan", plan, "--session", session, "-p", "a question")
    with Program("-uc", SOON + DOTS1, *map(str, arguments)) as program:
        assert program.process.stdin
        program.process.stdin.close()
        assert program.process.stdout
        program.process.stdout.read(8)
        freeze(worker)
        assert f"{worker.endpoint} has not answered" in program.wait_for("has not answered for 1")
        assert worker.endpoint in program.wait_for("has not answered for 3")
        assert program.wait_for_end() == 1
    assert json.loads(session.read_text())["messages"][-1]["text"].startswith("abc")


def test_a_worker_that_goes_on_in_time_loses_nothing(
    model: Path, plan: Path, worker: Worker
) -> None:
    arguments = ("chat", model, "--plan", plan, "-p", "a question", "-n", "2000", "--raw")
    with Program("-uc", SOON + DOTS1, *map(str, arguments)) as program:
        assert program.process.stdin
        program.process.stdin.close()
        assert program.process.stdout
        program.process.stdout.read(8)
        freeze(worker)
        program.wait_for("has not answered for 1")
        os.kill(worker.process.pid, signal.SIGCONT)
        assert program.wait_for_end() == 0


def test_perplexity_so_far_is_told(model: Path, plan: Path, worker: Worker, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc " * 20000)
    arguments = ("perplexity", model, "--plan", plan, "-f", text, "-c", "64")
    with Program("-uc", DOTS1, *map(str, arguments)) as program:
        time.sleep(5)
        freeze(worker)
        program.process.send_signal(signal.SIGINT)
        program.wait_for("Ctrl-C again ends")
        program.process.send_signal(signal.SIGINT)
        assert "so far PPL" in program.wait_for("stopped")
        assert program.wait_for_end() == 130


@pytest.mark.parametrize("ends", ["by itself", "by SIGTERM"])
def test_a_server_answers_its_requests_with_an_error_and_ends(
    model: Path, plan: Path, worker: Worker, ends: str
) -> None:
    port = free_port()
    first = SOON if ends == "by itself" else "import dots1_local.cli._serve as s; s._GRACE = 1\n"
    arguments = ("serve", model, "--plan", plan, "--port", port)
    with Program("-uc", first + DOTS1, *map(str, arguments)) as program:
        program.wait_for("listening on")
        with closing(HTTPConnection("127.0.0.1", port, timeout=30)) as client:
            body = json.dumps({"prompt": "a", "max_tokens": 4000})
            client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            time.sleep(0.3)
            freeze(worker)
            if ends == "by SIGTERM":
                program.process.terminate()
            reply = client.getresponse()
            assert reply.status >= 500
            assert json.loads(reply.read())["error"]["message"]
        assert program.wait_for_end() == (1 if ends == "by itself" else 0)


def test_looking_at_a_machine_gives_a_silent_worker_up(worker: Worker, tmp_path: Path) -> None:
    """The worker freezes while a child process measures it."""
    soon = "import dots1_local.devices.liveness as l; l.PATIENCE = 3.0\n"
    asked = {"workers": [worker.endpoint], "answering": [worker.endpoint], "measure": "RPC0"}
    request = json.dumps(asked | {"threads": 1})
    child = "from dots1_local.devices import child, machine; child.respond(machine._answer)"
    with Program("-uc", soon + child, request) as program:
        program.wait_for("progress")
        freeze(worker)
        assert worker.endpoint in program.wait_for("error")
        assert program.wait_for_end() == 1
