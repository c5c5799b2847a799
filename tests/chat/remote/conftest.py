"""Sessions with a server that plays back what others send."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from dots1_local.chat.remote import RemoteSession
from dots1_local.chat.remote.address import Key
from dots1_local.chat.remote.server import Server
from tests.openai_server import Played, Playing, playing

Talk = Callable[..., tuple[RemoteSession, Playing]]


@pytest.fixture
def told() -> list[str]:
    """What a person is told."""
    return []


@pytest.fixture
def talk(told: list[str]) -> Iterator[Talk]:
    """A session with a server that answers as given."""
    with ExitStack() as stack:

        def start(
            *answers: Played, models: Played | None = None, key: Key | None = None, **options: Any
        ) -> tuple[RemoteSession, Playing]:
            server = stack.enter_context(playing(*answers, models=models))
            found = Server(server.url, None, key, told.append)
            return stack.enter_context(RemoteSession(found, **options)), server

        yield start


def say(session: RemoteSession, text: str) -> str:
    return "".join(session.ask(text))


def texts(session: RemoteSession) -> list[str]:
    return [message.text for message in session.messages]
