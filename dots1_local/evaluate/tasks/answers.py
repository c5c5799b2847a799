"""Answers that survive whatever ends a run: a SQLite file for each model, by the request's hash.

lm_eval has such a cache too. Its keys leave out the context and the sampling, a long text is kept
only as a whole, and it unpickles what the file holds, which runs a stranger's code.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from dots1_local.errors import Dots1Error
from dots1_local.files.digest import hash_model
from dots1_local.files.gguf import GGUFFile

__all__ = ["Answer", "AnswerFile", "answer_key", "answers_path"]

Answer = tuple[float, bool] | str
"""A log-likelihood and whether each token was the likeliest one, or a text."""


def answers_path(folder: Path, gguf: GGUFFile, settings: tuple[Any, ...]) -> Path:
    """Return where the answers of a model are; `settings` are those that change its answers."""
    engine = version("dots1-local"), version("llama-cpp-python"), *settings
    digest = hashlib.sha256(repr(engine).encode())
    hash_model(digest, gguf)
    return folder / f"{digest.hexdigest()[:32]}.answers"


def answer_key(body: dict[str, Any]) -> str:
    """Return the hash of a request, by its JSON body."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class AnswerFile:
    """Answers by the hash of their request, for one thread; use it in a `with` statement."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=60)
            self._database.execute("PRAGMA journal_mode = WAL")  # commits do not wait for the disk
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"
            )
            self._database.commit()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._database.close()

    def get(self, key: str) -> Answer | None:
        """Return an answer, or None if there is none that makes sense."""
        with self._errors():
            row = self._database.execute(
                "SELECT answer FROM answers WHERE key = ?", (key,)
            ).fetchone()
        try:
            value = json.loads(row[0]) if row else None
        except (ValueError, TypeError, RecursionError):
            return None
        match value:
            case str():
                return value
            case [int() | float() as total, bool() as greedy]:
                return float(total), greedy
        return None

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer for good."""
        with self._errors(), self._database:
            self._database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answer))
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise Dots1Error(
                f"cannot keep answers in {self.path} ({error}); name another folder with "
                "--answers, or delete the file if it is damaged"
            ) from None
