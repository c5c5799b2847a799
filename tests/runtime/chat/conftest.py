"""The judge of grammars: llama.cpp, on a vocabulary that has every byte."""

from collections.abc import Callable, Iterator

import pytest

from dots1_local.runtime.chat.grammar import Grammar
from dots1_local.runtime.engine import Engine
from tests.helpers import write_random_gguf
from tests.runtime.chat.grammars import accepts

Judge = Callable[[Grammar, str], bool]


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    """Tell whether llama.cpp takes a text for a whole one of a grammar."""
    path = write_random_gguf(tmp_path_factory.mktemp("judge") / "model.gguf")
    with Engine.open(path, n_ctx=32, threads=1) as engine:
        yield lambda grammar, text: accepts(engine, grammar, text)
