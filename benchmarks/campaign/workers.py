"""Workers that freeze, die, come back, fall silent, or are not what they seem.

A trial starts a worker and one verb that uses it: a question (`chat -p`), a dialogue in a terminal,
`perplexity`, `serve` with a request, or `plan`, which measures the worker. At a random moment
something happens to the worker. Then either a person presses Ctrl-C twice, or waits.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random
from threading import Lock, Thread
from typing import Self
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from benchmarks.campaign.silent_proxy import SilentProxy
from benchmarks.campaign.trial import Broken, Part
from dots1_local.architecture import Dots1Config
from dots1_local.devices.rpc import probe
from dots1_local.errors import Dots1Error
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.placement import Placement
from tests.cli.terminal import CTRL_C, Terminal
from tests.workers import Worker, free_port

__all__ = ["PART"]

VERBS = ("question", "dialogue", "perplexity", "serve", "plan")
_EXAMPLE = Path(__file__).parents[2] / "examples/dots1-tiny"
_HEARD = 2.0  # seconds in which Ctrl-C must show an effect
_GIVEN_UP = 60.0 + 5.0  # seconds after which a silent worker must have been given up
_LOST = 15.0  # seconds after which a lost or wrong worker must have been named
_START = 60.0  # seconds for a verb to begin, on a busy machine
_setting_up = Lock()


def _model(work: Path) -> Path:
    """The example as a GGUF in a home folder where the CPU's speed is known, made once."""
    home = work / "workers-home"
    path = home / "tiny.gguf"
    with _setting_up:
        if not path.exists():
            home.mkdir(parents=True, exist_ok=True)
            text = "One more sentence follows the one before. " * 4000
            (home / "text.txt").write_text(text)
            made = home / "made.gguf"
            convert = _command("convert", _EXAMPLE, "-o", made, "--type", "F16", "--force")
            for command in (convert, _command("hardware")):
                subprocess.run(command, check=True, capture_output=True, env=_env(home))
            made.rename(path)
    return path


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dots1_local", *map(str, arguments)]


def _env(home: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}


class Verb:
    """A verb of dots1 that uses the worker at `endpoint`, as a process that began to work."""

    def __init__(self, name: str, endpoint: str, folder: Path, draw: Random) -> None:
        model = _model(next(each for each in folder.parents if each.name == "workers").parent)
        self.name, self._folder, self._model = name, folder, model
        self._stack, self._terminal = ExitStack(), None
        self.replies: list[str] = []  # of the server: status and error, or the kind of failure
        plan = folder / "plan.json"
        layers = draw.randint(1, 3)
        plan.write_text(json.dumps(_placement(model, endpoint, layers).to_json()))
        arguments: Sequence[object] = {
            "question": ("chat", model, "--plan", plan, "--raw", "-p", "One day", "-n", 400,
                         "--temp", 0, "--session", folder / "session.json"),
            "dialogue": ("chat", model, "--plan", plan),
            "perplexity": ("perplexity", model, "--plan", plan, "-f", model.parent / "text.txt",
                           "--chunks", 12),
            "serve": ("serve", model, "--plan", plan, "--port", port := free_port()),
            "plan": ("plan", model, "--worker", endpoint),
        }[name]  # fmt: skip
        self._port, self._asked = port, False
        if name == "dialogue":
            self._terminal = Terminal(folder, *arguments)
            self._stack.enter_context(self._terminal)
            self.process: subprocess.Popen[bytes] = self._terminal.process
            self.output = folder / "none"
        else:
            self.output = folder / "output.txt"
            with self.output.open("wb") as output:
                self.process = subprocess.Popen(
                    _command(*arguments),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=_env(model.parent),
                    preexec_fn=lambda: signal.signal(  # noqa: PLW1509
                        signal.SIGINT, signal.default_int_handler
                    ),
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        self._stack.close()

    def begin(self) -> None:
        """Ask what takes a while, as soon as the verb is ready for it."""
        if self._terminal is not None:
            self._terminal.wait_for_prompt()
            self._terminal.send("Tell me a long story\r")
        elif self.name == "serve":
            self._wait_for("listening on", _START)
            self._asked = True
            Thread(target=self._request, daemon=True).start()

    def ask_late(self) -> None:
        """Ask a server that has nothing to do yet, if it has loaded its model."""
        if self.name == "serve" and not self._asked:
            self.ended(1.5)
            if "listening on" in self.text and self.process.poll() is None:
                self.begin()

    def interrupt(self) -> None:
        if self._terminal is not None:
            self._terminal.send(CTRL_C)
        else:
            self.process.send_signal(signal.SIGINT)

    def ended(self, seconds: float) -> bool:
        """Whether the process ends within so many seconds."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read(0.05)
        return self.process.poll() is not None

    @property
    def text(self) -> str:
        """All that it has printed; a terminal's lines are joined."""
        self._read(0)
        if self._terminal is not None:
            return " ".join(self._terminal.text.split())
        return self.output.read_text(errors="replace")

    @property
    def home(self) -> Path:
        return self._folder if self._terminal is not None else self._model.parent

    def _read(self, seconds: float) -> None:
        if self._terminal is None:
            time.sleep(seconds)
            return
        while self._terminal._read(seconds):
            seconds = 0

    def _wait_for(self, text: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.text:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise Broken(f"{self.name} did not say {text!r}: {self.text[-300:]}")
            time.sleep(0.05)

    def _request(self) -> None:
        """Send one request after the other until one is not answered with a text."""
        body = json.dumps({"prompt": "One day", "max_tokens": 900}).encode()
        url = f"http://127.0.0.1:{self._port}/v1/completions"
        request = Request(url, body, {"Content-Type": "application/json"})
        while True:
            try:
                with urlopen(request, timeout=300) as reply:
                    self.replies.append(f"{reply.status} {reply.read()[:200]!r}")
            except HTTPError as error:
                return self.replies.append(f"{error.code} {error.read()[:300]!r}")
            except OSError as error:
                if "refused" not in str(error):  # it was sent, and the server ended
                    self.replies.append(f"failed: {error}")
                return None


def _placement(model: Path, endpoint: str, layers: int) -> Placement:
    config = Dots1Config.from_gguf(GGUFFile.open(model).keys, model)
    return Placement(
        str(model), model.stat().st_size, config.num_hidden_layers, 1024, "F16", True, 64, 1,
        "plain",
        layers={"RPC0": layers}, workers=(endpoint,),
    )  # fmt: skip


@contextmanager
def _at_work(draw: Random, folder: Path, endpoint: str, verbs: Sequence[str]) -> Iterator[Verb]:
    """A verb at a random moment: while it starts, or while it works."""
    with Verb(draw.choice(verbs), endpoint, folder, draw) as verb:
        early = draw.random() < 0.3
        if not early:
            verb.begin()
        time.sleep(draw.uniform(0, 3 if early or verb.name == "plan" else 1.5))
        yield verb


def _check_end(verb: Verb, codes: Sequence[int], endpoint: str = "") -> None:
    code, text = verb.process.wait(), verb.text
    if text.rstrip().endswith("KeyboardInterrupt") and "    app()" not in text:
        return  # Ctrl-C came while Python was importing the program
    code = 130 if code == -signal.SIGINT else code  # Ctrl-C came while the process was ending
    if code not in (*codes, 0) and not (verb.name == "plan" and code == 130):
        raise Broken(f"{verb.name} ended with {code}: {text[-400:]}")
    if "Traceback" in text:
        raise Broken(f"{verb.name} shows a traceback: {text[-1000:]}")
    if code == 1 and endpoint and not any(word in text for word in (endpoint, "worker")):
        raise Broken(f"{verb.name} does not name the worker: {text[-400:]}")
    if verb.name == "serve":
        time.sleep(0.2)
        if any(reply.startswith(("failed", "4")) for reply in verb.replies):
            raise Broken(f"a request got no answer: {verb.replies}")
    recovered = list(verb.home.glob(".local/state/dots1/recovery-*.json"))
    if verb.name == "dialogue" and "Tell me a long" in text and code and not recovered:
        raise Broken(f"the dialogue left no recovery file: {text[-400:]}")


def _press_ctrl_c(verb: Verb, draw: Random) -> None:
    """Press Ctrl-C twice; each must show an effect within two seconds."""
    before = verb.text
    verb.interrupt()
    if verb.ended(draw.uniform(0.2, _HEARD)):
        return
    verb.interrupt()
    pressed = time.monotonic()
    if not verb.ended(_HEARD + 1):
        raise Broken(
            f"{verb.name} runs on after the second Ctrl-C: {verb.text[len(before) :][-400:]!r}"
        )
    if time.monotonic() - pressed > _HEARD + 0.5:  # half a second is for a busy machine
        raise Broken(f"{verb.name} ended {time.monotonic() - pressed:.1f} s after Ctrl-C")


def _end_of_silence(verb: Verb, draw: Random, endpoint: str) -> None:
    """Press Ctrl-C, or wait until the worker is given up; a server may be terminated."""
    chosen = draw.random()
    verb.ask_late()
    if chosen < 0.15:
        if verb.name == "dialogue" and _at_prompt(verb):
            return  # nobody waits
        if not verb.ended(_GIVEN_UP + _LOST):
            raise Broken(f"{verb.name} still waits after a minute: {verb.text[-400:]}")
        _check_end(verb, (1,), endpoint)
    elif verb.name == "serve" and chosen < 0.6:
        verb.process.terminate()
        if not verb.ended(10 + 5 + 5):
            raise Broken(f"serve does not end at SIGTERM: {verb.text[-400:]}")
        _check_end(verb, (0, 128 + signal.SIGTERM, -signal.SIGTERM))
    elif verb.name == "dialogue":
        _press_ctrl_c_in_dialogue(verb, draw)
    else:
        time.sleep(draw.uniform(0, 2))
        _press_ctrl_c(verb, draw)
        _check_end(verb, (130,))


def _press_ctrl_c_in_dialogue(verb: Verb, draw: Random) -> None:
    while not verb.text:  # before, Ctrl-C is not heard at this terminal
        verb.ended(0.1)
    time.sleep(draw.uniform(0, 2))
    verb.interrupt()
    if verb.ended(draw.uniform(0.2, _HEARD)):
        return _check_end(verb, (130,))
    if _at_prompt(verb):  # the answer had ended before the worker froze
        return None
    verb.interrupt()
    if not verb.ended(_HEARD + 0.5) and not _at_prompt(verb):
        raise Broken(f"the dialogue runs on after the second Ctrl-C: {verb.text[-400:]}")
    return None if verb.process.poll() is None else _check_end(verb, (130,))


def _at_prompt(verb: Verb) -> bool:
    return verb.text.rstrip().endswith((">", "leaves."))


def _frozen(draw: Random, folder: Path) -> None:
    with Worker() as worker, _at_work(draw, folder, worker.endpoint, VERBS) as verb:
        os.kill(worker.process.pid, signal.SIGSTOP)
        if verb.name not in ("dialogue", "plan", "serve") and draw.random() < 0.2:
            time.sleep(draw.uniform(0.5, 5))
            os.kill(worker.process.pid, signal.SIGCONT)
            if not verb.ended(_START):
                raise Broken(f"{verb.name} does not go on with its worker: {verb.text[-400:]}")
            _check_end(verb, (0,) if verb.process.returncode == 0 else (), worker.endpoint)
        else:
            _end_of_silence(verb, draw, worker.endpoint)


def _half_open(draw: Random, folder: Path) -> None:
    with (
        Worker() as worker,
        SilentProxy(worker.port) as proxy,
        _at_work(draw, folder, proxy.endpoint, VERBS) as verb,
    ):
        proxy.fall_silent()
        _end_of_silence(verb, draw, proxy.endpoint)
        verb.process.kill()
        proxy.close()
        _check_serves(worker.endpoint)


def _killed(draw: Random, folder: Path) -> None:
    with Worker() as worker, _at_work(draw, folder, worker.endpoint, VERBS) as verb:
        worker.kill()
        _check_lost(verb, worker.endpoint)


def _check_lost(verb: Verb, endpoint: str) -> None:
    verb.ask_late()
    if verb.ended(_LOST):
        return _check_end(verb, (1,), endpoint)
    if verb.name == "dialogue" and _at_prompt(verb):
        return None  # it had answered
    raise Broken(f"{verb.name} does not notice the loss: {verb.text[-400:]}")


def _restarted(draw: Random, folder: Path) -> None:
    port = free_port()
    endpoint = f"127.0.0.1:{port}"
    command = _command("worker", "--port", port, "-t", 1, "--device", "CPU")
    log = (folder / "worker.txt").open("wb")
    with log, subprocess.Popen(command, stdout=log, stderr=log) as supervisor:
        try:
            _wait_until_listening(endpoint)
            with _at_work(draw, folder, endpoint, VERBS) as verb:
                for child in _children(supervisor.pid):
                    with suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                _check_lost_or_went_on(verb, endpoint)
            again = folder / "again"
            again.mkdir()
            _wait_until_listening(endpoint)
            with Verb("question", endpoint, again, draw) as verb:
                if not verb.ended(_START) or verb.process.returncode:
                    raise Broken(f"the worker does not serve again: {verb.text[-400:]}")
        finally:
            supervisor.terminate()
            supervisor.wait(10)


def _check_lost_or_went_on(verb: Verb, endpoint: str) -> None:
    """A verb that had not connected yet uses the worker that came back."""
    verb.ask_late()
    if verb.ended(_START if verb.name == "perplexity" else _LOST):
        _check_end(verb, (1,), endpoint)
    elif verb.name in ("question", "perplexity"):
        raise Broken(f"{verb.name} does not notice the loss: {verb.text[-400:]}")


def _children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_until_listening(endpoint: str) -> None:
    deadline = time.monotonic() + _START
    while True:
        try:
            return probe([endpoint], 1)
        except Dots1Error as error:
            if time.monotonic() > deadline:
                raise Broken(f"the worker does not serve: {error}") from None
            time.sleep(0.2)


def _check_serves(endpoint: str) -> None:
    """The worker is free for the next client, after a while."""
    try:
        probe([endpoint], 10)
    except Dots1Error as error:
        raise Broken(f"the worker stays occupied: {error}") from None


def _two_clients(draw: Random, folder: Path) -> None:
    with Worker() as worker, socket.create_connection(("127.0.0.1", worker.port)) as first:
        hello = struct.pack("<BQ24x", 14, 24)
        first.sendall(hello)
        first.recv(36, socket.MSG_WAITALL)
        with Verb(draw.choice(VERBS), worker.endpoint, folder, draw) as verb:
            if draw.random() < 0.3:
                time.sleep(draw.uniform(0, 4))
                verb.interrupt()
                if not verb.ended(_HEARD + 0.5):
                    raise Broken(f"{verb.name} does not hear Ctrl-C: {verb.text[-400:]}")
                _check_end(verb, (130, 1, -signal.SIGINT))
            else:
                if not verb.ended(_START):
                    raise Broken(f"{verb.name} waits for an occupied worker: {verb.text[-400:]}")
                if verb.process.returncode != 1:
                    raise Broken(f"{verb.name} ended with {verb.process.returncode}")
                _check_end(verb, (1,), worker.endpoint)
        first.sendall(struct.pack("<BQ", 15, 0))  # how many devices: the first is still served
        if len(first.recv(12, socket.MSG_WAITALL)) != 12:
            raise Broken("the first client lost the worker")


def _wrong_version(draw: Random, folder: Path) -> None:
    answer = _wrong_answer(draw)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=_answer_all, args=(listener, answer), daemon=True).start()
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
        with Verb(draw.choice(VERBS), endpoint, folder, draw) as verb:
            if not verb.ended(_START):
                raise Broken(f"{verb.name} works with a wrong worker: {verb.text[-400:]}")
            if verb.process.returncode != 1 or endpoint not in verb.text:
                code, text = verb.process.returncode, verb.text[-400:]
                raise Broken(f"{verb.name} ended with {code} over {answer!r}: {text}")
            _check_end(verb, (1,), endpoint)


def _wrong_answer(draw: Random) -> bytes | None:
    """What a stranger answers: another version, or something else; None is no answer at all."""
    version = bytes(draw.randrange(5, 256) for _ in range(3))
    wrong: list[Callable[[], bytes | None]] = [
        lambda: struct.pack("<Q", 28) + version + bytes(25),
        lambda: struct.pack("<Q", draw.choice((0, 3, 4, 1 << 20, 1 << 63))) + version,
        lambda: b"HTTP/1.1 400 Bad Request\r\n\r\n",
        lambda: draw.randbytes(draw.randrange(1, 200)),
        lambda: b"",
        lambda: None,
    ]
    return draw.choice(wrong)()


def _answer_all(listener: socket.socket, answer: bytes | None) -> None:
    kept = []
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            client.recv(33)
            if answer is None:
                kept.append(client)
            else:
                client.sendall(answer)
                client.close()


PART = Part(
    "never hangs longer than a stated bound; Ctrl-C is heard within two seconds",
    {
        "frozen": (_frozen, 60),
        "killed": (_killed, 40),
        "restarted": (_restarted, 25),
        "half-open": (_half_open, 25),
        "wrong version": (_wrong_version, 20),
        "two clients": (_two_clients, 30),
    },
)
