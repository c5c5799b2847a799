from collections.abc import Iterator
from typing import Any

import pytest

from dots1_local.engine.engine import Engine
from tests.helpers import write_random_gguf
from tests.serve.http.asgi import FakeScheduler, serving


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine for its tokeniser, with a context of 64 tokens."""
    path = write_random_gguf(tmp_path_factory.mktemp("served") / "model.gguf")
    with Engine.open(path, n_ctx=64, threads=1) as opened:
        yield opened


@pytest.fixture
def scheduler() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture
def app(engine: Engine, scheduler: FakeScheduler) -> Any:
    return serving(engine, scheduler)
