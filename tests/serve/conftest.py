"""What the servers of all APIs are tested with."""

import pytest

from dots1_local.chat.sampling import Sampling
from dots1_local.chat.session import Session
from dots1_local.engine.engine import Engine
from tests.conftest import Converted


@pytest.fixture(scope="session")
def story(converted: Converted) -> str:
    """The answer of a `Session` in this process."""
    with (
        Engine.open(converted("DQ4"), threads=1) as engine,
        Session(engine, sampling=Sampling(temperature=0), max_tokens=24) as session,
    ):
        return "".join(session.ask("Tell me a story about a little cat."))
