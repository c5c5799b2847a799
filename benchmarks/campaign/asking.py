"""Requests to a `dots1 serve` that is a program of the campaign."""

import json
import re
import signal
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException

from benchmarks.campaign.processes import Place, Program
from benchmarks.campaign.trial import Broken

__all__ = ["answer_once", "answers_of"]

_ADDRESS = r"http://127\.0\.0\.1:(\d+)/v1"


def answers_of(place: Place, program: Program, prompts: Sequence[str]) -> list[str]:
    """Ask a server for its answers; fewer, if it ends before."""
    found: list[str] = []
    listening: list[str] = []

    def ready() -> bool:
        log = place.log.read_text(errors="replace") if place.log.exists() else ""
        listening[:] = re.findall(_ADDRESS, log)
        return bool(listening)

    program.wait(ready)
    for prompt in prompts if listening else ():
        body = json.dumps({"prompt": prompt, "max_tokens": 8, "temperature": 0})
        try:
            status, content = _ask(int(listening[-1]), body)
        except (OSError, HTTPException, ValueError):
            break
        if status != 200:
            raise Broken(f"a server answered {status}: {content}")
        found.append(content["choices"][0]["text"])
    return found


def _ask(port: int, body: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """Ask until the server is no longer loading its model."""
    while True:
        with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as server:
            server.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = server.getresponse()
            content = json.loads(response.read())
        if response.status != 503:
            return response.status, content
        time.sleep(0.05)


def answer_once(place: Place, program: Program, prompt: str) -> None:
    """Ask a server for an answer, which it may be unable to give, and then to end."""
    with suppress(Broken):
        answers_of(place, program, [prompt])
    with suppress(ProcessLookupError):
        program.signal(signal.SIGTERM)
