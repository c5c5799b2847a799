"""Sessions with tiny models."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from dots1_local.chat.grammar import Grammar
from dots1_local.chat.sampling import Sampling
from dots1_local.chat.session import Session
from dots1_local.engine.engine import Engine
from tests.helpers import scripted_tensors, write_random_gguf

GREEDY = Sampling(temperature=0)

Talk = Callable[..., Session]


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Talk]:
    """Open a session with a model that answers with the given tokens, or a random one."""
    numbers = count()
    with ExitStack() as stack:

        def make(
            answer: Sequence[int] | None = None,
            *,
            n_ctx: int = 256,
            n_ubatch: int = 512,
            n_draft: int = 0,
            gguf: Mapping[str, Any] | None = None,
            **options: Any,
        ) -> Session:
            tensors = scripted_tensors(answer) if answer else None
            path = tmp_path / f"model{next(numbers)}.gguf"
            write_random_gguf(path, tensors=tensors, **(gguf or {}))
            engine = Engine.open(
                path,
                n_ctx=n_ctx,
                n_ubatch=n_ubatch,
                kv_type="F32",
                flash_attention=False,
                threads=1,
                n_draft=n_draft,
            )
            stack.enter_context(engine)
            chosen = {"sampling": GREEDY, "draft": n_draft, **options}
            return stack.enter_context(Session(engine, **chosen))

        yield make


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each ubatch since the last `clear()`."""
    sizes: list[int] = []
    submit = Engine.submit

    def spy(self: Engine, entries: Any) -> Any:
        sizes.append(len(entries))
        return submit(self, entries)

    monkeypatch.setattr(Engine, "submit", spy)
    return sizes


Compile = Callable[[Any], Grammar]


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A random model that has a token for each byte."""
    path = write_random_gguf(tmp_path_factory.mktemp("engine") / "model.gguf")
    with Engine.open(path, n_ctx=1024, threads=1, kv_type="F32", flash_attention=False) as engine:
        yield engine


@pytest.fixture(scope="session")
def compiled(engine: Engine) -> Compile:
    """Compile a JSON schema for that model."""
    return lambda schema: Grammar(schema, engine)
