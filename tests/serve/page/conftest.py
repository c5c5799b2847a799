from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from playwright.sync_api import Browser

from dots1_local.engine.engine import Engine
from tests.helpers import write_random_gguf
from tests.serve.page.browser import Open, Visit, launch
from tests.serve.page.scripted import ScriptedScheduler, full_size_placement, run_app, scripted_app


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One for all tests of the page; other tests could not use asyncio while it runs."""
    with launch() as browser:
        yield browser


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine for its tokeniser, with a context of 4,096 tokens."""
    path = tmp_path_factory.mktemp("page") / "model.gguf"
    with Engine.open(write_random_gguf(path, context=4096), n_ctx=4096, threads=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def two_devices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The placement of the real model on a GPU of 24 GB and 64 GB of RAM."""
    return full_size_placement(tmp_path_factory.mktemp("placement"), "24gb-64gb")


@pytest.fixture
def scheduler() -> ScriptedScheduler:
    return ScriptedScheduler()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Open an address in a new profile: `visit(url, locale="zh-CN")`."""
    with ExitStack() as stack:

        def open_profile(url: str, **options: Any) -> Visit:
            opened = Visit(browser, url, options)
            stack.callback(opened.close)
            return opened

        yield open_profile


@pytest.fixture
def page_url(engine: Engine, scheduler: ScriptedScheduler) -> Iterator[str]:
    """The address of a server whose model says what the scheduler is told."""
    with run_app(scripted_app(engine, scheduler)) as url:
        yield url


@pytest.fixture
def chat(visit: Open, page_url: str) -> Visit:
    """The page, open."""
    opened = visit(page_url)
    opened.open()
    return opened
