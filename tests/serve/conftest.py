"""What the servers of all APIs are tested with."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dots1_local.chat.sampling import Sampling
from dots1_local.chat.session import Session
from dots1_local.engine.engine import Engine
from tests.conftest import Converted
from tests.helpers import EOS, TOKENS, scripted_tensors, tokens_of, write_random_gguf
from tests.serve.served import Served

# Similar to the templates of the Hermes and Qwen families.
TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "<|endofsystem|>{% endif %}"
    "{% for m in messages %}<|userprompt|>{{ m.content }}{% for call in m.tool_calls %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|endofuserprompt|>"
    "{% endfor %}<|response|>"
)
# Each part of the answer is one token, because a scripted answer cannot repeat a token.
SAID = ("<tool_call>", '{"name":"rain","arguments":{"at":"Ulm"}}', "</tool_call>")
ANSWER = "So:" + "".join(SAID)


@pytest.fixture(scope="session")
def story(converted: Converted) -> str:
    """The answer of a `Session` in this process."""
    with (
        Engine.open(converted("DQ4"), threads=1) as engine,
        Session(engine, sampling=Sampling(temperature=0), max_tokens=24) as session,
    ):
        return "".join(session.ask("Tell me a story about a little cat."))


@pytest.fixture(scope="session")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose model writes "So:" and then a call of the tool `rain`."""
    words = range(1, 1 + len(SAID))
    tokens = list(TOKENS)
    tokens[words.start : words.stop] = SAID
    tensors = scripted_tensors([*tokens_of("So:"), *words, EOS])
    path = tmp_path_factory.mktemp("tools") / "model.gguf"
    with Served(
        write_random_gguf(path, template=TEMPLATE, tokens=tokens, tensors=tensors)
    ) as server:
        yield server


@pytest.fixture(scope="session")
def tokenize(tiny: Path) -> Callable[[str], list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    return lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)
