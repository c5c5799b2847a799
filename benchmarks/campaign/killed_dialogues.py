"""Chats with a session and servers with a prompt cache that are killed at a random moment, byte or
file operation.

What was answered before the kill must be in the session's file, and asking on must come to the
conversation of a run that nobody disturbed. A server must take the killed one's folder of prompts,
answer alike, keep to the limit, and leave nothing half-written.
"""

import json
import os
import pty
import re
import select
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from threading import Event, Thread
from typing import Any

from benchmarks.campaign.asking import answers_of
from benchmarks.campaign.inputs import TEXT, inputs, one_at_a_time, q8
from benchmarks.campaign.processes import Measure, Place, Program, Strike
from benchmarks.campaign.trial import Broken, Trial
from dots1_local.files.partial_file import partial_path

__all__ = ["CHAT_TRIALS"]

_QUESTIONS = ("Who is Tim?", "Tell me about a cat.", "What did Lily see?")
_GREEDY = ("--temp", "0", "-n", "24", "-t", "1", "--draft", "off", "-c", "1k")
_CHAT = ("chat", "q8.gguf", *_GREEDY)
_ATTEMPTS = 20  # at a kill that comes before the end
_CLEAR = "\x15"  # Ctrl-U: drops the question that a killed dialogue left unanswered
_QUIET = 0.3  # seconds without output before a dialogue takes the next line
_PROMPTS = tuple(TEXT[start : start + 900] for start in range(0, 4500, 900))
_LIMIT = 4_000_000  # bytes of cached prompts; all prompts take more
_SERVE = ("serve", "q8.gguf", "--port", "0", "-c", "1k", "-t", "1", "--draft", "off",
          "--prompt-cache-ram", "0", "--prompt-cache", "prompts",
          "--prompt-cache-size", str(_LIMIT))  # fmt: skip
_BLOCK = re.compile(r"prompts/[0-9a-f]{32}/\d{8}-[0-9a-f]{32}\.kv")


def _new_place(folder: Path) -> Place:
    place = Place(folder)
    (place.work / "q8.gguf").symlink_to(q8())
    return place


def _names(place: Place) -> set[str]:
    return {
        path.relative_to(place.folder).as_posix()
        for top in (place.work, place.home, place.temporary)
        for path in top.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


def _saved(file: Path) -> dict[str, Any]:
    """A conversation's document; {} if there is none yet."""
    try:
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise Broken(f"{file.name} is half-written") from None
    return document


def _turns(document: dict[str, Any]) -> int:
    return sum(message["role"] == "assistant" for message in document.get("messages", ()))


def _check_kept(file: Path, expected: dict[str, Any], finished: int, strike: Strike) -> int:
    """Return the turns in a file, which must be the first ones, and all that were finished."""
    kept = _saved(file)
    if _turns(kept) < finished:
        raise Broken(f"{finished} turns were answered, {_turns(kept)} are kept, after {strike}")
    messages = kept.get("messages", [])
    if messages != expected["messages"][: len(messages)]:
        raise Broken(f"other messages are kept, after {strike}: {messages}")
    return _turns(kept)


def _check_end(place: Place, expected: dict[str, Any], names: set[str], file: Path) -> None:
    if _saved(file) != expected:
        raise Broken(f"another conversation in the end: {_saved(file)}")
    if stray := sorted(_names(place) - names):
        raise Broken(f"left behind: {', '.join(stray)}")
    if missing := sorted(names - _names(place) - {"work/talk.kv"}):  # nothing was left to compute
        raise Broken(f"missing: {', '.join(missing)}")


# One question at a time: dots1 chat --session talk.json -p QUESTION


def _ask(place: Place, number: int, operation: int | None = None) -> Program:
    arguments = (*_CHAT, "--session", "talk.json", "-p", _QUESTIONS[number])
    return Program(place, arguments, operation=operation)


@cache
def _undisturbed_questions() -> tuple[dict[str, Any], frozenset[str], tuple[Measure, ...]]:
    place, measures = _new_place(inputs() / "undisturbed-questions"), []
    for number in range(len(_QUESTIONS)):
        code, measure = _ask(place, number).measure()
        if code:
            raise Broken(f"the undisturbed run ended with {code}: {place.said()}")
        measures.append(measure)
    return _saved(place.work / "talk.json"), frozenset(_names(place)), tuple(measures)


def _questions(random: Random, folder: Path) -> None:
    with one_at_a_time:
        expected, names, measures = _undisturbed_questions()
    place, kills = _new_place(folder), 0
    file = place.work / "talk.json"
    for number in range(len(_QUESTIONS)):
        while _turns(_saved(file)) <= number:
            kill = kills < 3 and (random.random() < 0.6 or number == len(_QUESTIONS) - 1 > kills)
            strike = Strike.drawn(random, measures[number]) if kill else Strike()
            program = _ask(place, number, strike.operation)
            if kill and program.meets(strike):
                kills += 1
                _check_kept(file, expected, number, strike)
            elif code := program.wait():
                raise Broken(f"a question after {kills} kills ended with {code}: {place.said()}")
    cache = place.work / "talk.kv"
    if _saved(file) == expected and (not cache.exists() or partial_path(cache).exists()):
        return  # killed after the last answer was saved and before its KV cache
    _check_end(place, expected, set(names), file)


# A dialogue in a terminal


class _Dialogue:
    """A dialogue whose keys are typed by a thread; `finished` counts the answers it has seen."""

    def __init__(self, place: Place, keys: Sequence[str], seen: Callable[[], int], *options: str,
                 operation: int | None = None) -> None:  # fmt: skip
        self.finished = 0
        self._keys, self._seen, self._over = keys, seen, Event()
        self._ours, self._theirs = pty.openpty()
        terminal = os.ttyname(self._theirs)
        self.program = Program(
            place, (*_CHAT, *options), operation=operation, terminal=terminal, limit=60
        )
        self._shown, self._heard = b"", time.monotonic()
        self._typist = Thread(target=self._type, daemon=True)
        self._typist.start()

    def __enter__(self) -> "_Dialogue":
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._typist.join()
        os.close(self._ours)
        os.close(self._theirs)

    def _type(self) -> None:
        self._hear_until(lambda: b"/help lists commands" in self._shown)
        for number, keys in enumerate(self._keys):
            self._hear_until(lambda: time.monotonic() > self._heard + _QUIET)
            os.write(self._ours, keys.encode())
            if "/" not in keys:
                before = self._seen() if number == 0 else self.finished
                self._hear_until(lambda before=before: self._seen() > before)  # type: ignore[misc]
                if not self._over.is_set():
                    self.finished = self._seen()
        self._hear_until(lambda: False)

    def _hear_until(self, happened: Callable[[], bool]) -> None:
        while not (self._over.is_set() or happened()):
            if select.select([self._ours], [], [], 0.005)[0]:
                with suppress(OSError):
                    self._shown += os.read(self._ours, 1 << 16)
                    self._heard = time.monotonic()


@dataclass(frozen=True)
class _Kept:
    """Where a dialogue keeps its conversation: in `file`, or else in a recovery file."""

    file: str | None

    def path(self, place: Place) -> Path:
        if self.file:
            return place.work / self.file
        found = sorted((place.home / ".local/state/dots1").glob("recovery-*.json"))
        return max(found, key=lambda path: path.stat().st_mtime_ns, default=place.work / "none")

    def start(
        self, place: Place, turns: int, operation: int | None = None, load: Path | None = None
    ) -> _Dialogue:
        """Ask what comes after so many turns, and leave with /exit after a session's last turn."""
        asked = [f"{_CLEAR}{question}\r" for question in _QUESTIONS[turns:]]
        opening = [f"/load {load}\r"] if load else []
        options = ("--session", self.file) if self.file else ()
        closing = [f"{_CLEAR}/save talk\r"] * (not self.file) + [f"{_CLEAR}/exit\r"]

        def seen() -> int:
            with suppress(Broken, OSError):
                return _turns(_saved(self.path(place)))
            return 0

        return _Dialogue(place, [*opening, *asked, *closing], seen, *options,
                         operation=operation)  # fmt: skip


@cache
def _undisturbed_dialogue(kept: _Kept) -> tuple[dict[str, Any], frozenset[str], Measure]:
    place = _new_place(inputs() / f"undisturbed-dialogue-{kept.file}")
    with kept.start(place, 0) as dialogue:
        code, measure = dialogue.program.measure()
    if code:
        raise Broken(f"the undisturbed dialogue ended with {code}")
    return _saved(place.work / "talk.json"), frozenset(_names(place)), measure


def _dialogue(kept: _Kept) -> Trial:
    def try_once(random: Random, folder: Path) -> None:
        with one_at_a_time:
            expected, names, measure = _undisturbed_dialogue(kept)
        for attempt in range(_ATTEMPTS):
            place = _new_place(folder / str(attempt))
            strike = Strike.drawn(random, measure)
            with kept.start(place, 0, strike.operation) as dialogue:
                killed = dialogue.program.meets(strike)
            if killed:
                break
        else:
            raise Broken(f"the dialogue ended before each of {_ATTEMPTS} kills")
        left = kept.path(place)
        saved = kept.file is None and (place.work / "talk.json").exists()
        turns = _check_kept(place.work / "talk.json" if saved else left, expected,
                            dialogue.finished, strike)  # fmt: skip
        if saved and not left.exists():
            return  # it had said good-bye to everything
        load = left if kept.file is None and left.exists() else None
        with kept.start(place, turns, load=load) as dialogue:
            if code := dialogue.program.wait():
                raise Broken(f"the second dialogue ended with {code}, after {strike}")
        _check_end(place, expected, set(names), place.work / "talk.json")

    return try_once


# A server


def _served(place: Place, prompts: Sequence[str], strike: Strike | None = None) -> tuple[Any, ...]:
    """Serve until the strike, or until all answers have come; return them, and how it went."""
    place.log.unlink(missing_ok=True)
    program = Program(place, _SERVE, operation=strike.operation if strike else None)
    answers: list[str] = []
    failures: list[Exception] = []

    def ask() -> None:
        try:
            answers.extend(answers_of(place, program, prompts))
        except Exception as error:  # it is raised below
            failures.append(error)

    client = Thread(target=ask)
    client.start()
    killed = strike is not None and program.meets(strike, lambda: not client.is_alive())
    client.join()
    if failures:
        raise failures[0]
    if killed:
        return answers, True, None
    with suppress(ProcessLookupError):
        program.signal(signal.SIGTERM)
    code, measure = program.measure()
    if code == -signal.SIGKILL and strike is not None:
        return answers, True, None
    if code or len(answers) < len(prompts):
        raise Broken(f"a server ended with {code} after {len(answers)} answers: {place.said()}")
    return answers, False, measure


@cache
def _undisturbed_server() -> tuple[list[str], frozenset[str], Measure]:
    place = _new_place(inputs() / "undisturbed-server")
    answers, _, measure = _served(place, _PROMPTS)
    return answers, frozenset(_names(place)), measure


def _server(random: Random, folder: Path) -> None:
    with one_at_a_time:
        expected, names, measure = _undisturbed_server()
    for attempt in range(_ATTEMPTS):
        place = _new_place(folder / str(attempt))
        if random.random() < 0.5:  # blocks that are read, replaced and removed
            shutil.copytree(inputs() / "undisturbed-server/work/prompts", place.work / "prompts")
        order = random.sample(range(len(_PROMPTS)), len(_PROMPTS))
        strike = Strike.drawn(random, measure)
        answers, killed, _ = _served(place, [_PROMPTS[each] for each in order], strike)
        if answers != [expected[each] for each in order[: len(answers)]]:
            raise Broken(f"other answers before the kill: {answers}")
        if killed:
            break
    else:
        raise Broken(f"the server ended before each of {_ATTEMPTS} kills")
    blocks = sorted(place.work.rglob("*.kv"))
    if blocks and random.random() < 0.5:
        _damage(random, random.choice(blocks))
    again, _, _ = _served(place, _PROMPTS)
    if again != expected:
        raise Broken(f"other answers after {strike}: {again}")
    left = {path.relative_to(place.work).as_posix() for path in place.work.rglob("*")
            if path.is_file() and path.name != "q8.gguf"}  # fmt: skip
    if stray := sorted(path for path in left if not _BLOCK.fullmatch(path)):
        raise Broken(f"left behind: {', '.join(stray)}, after {strike}")
    if (nbytes := sum((place.work / path).stat().st_size for path in left)) > _LIMIT:
        raise Broken(f"{nbytes} bytes are cached, the limit is {_LIMIT}, after {strike}")
    elsewhere = {path for path in _names(place) if not path.startswith("work/")}
    if stray := sorted(elsewhere - names):
        raise Broken(f"left behind: {', '.join(stray)}, after {strike}")


def _damage(random: Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


CHAT_TRIALS: dict[str, tuple[Trial, int]] = {
    "chat --session -p": (_questions, 50),
    "a dialogue with --session": (_dialogue(_Kept("talk.json")), 50),
    "a dialogue without a file": (_dialogue(_Kept(None)), 20),
    "serve --prompt-cache": (_server, 100),
}
