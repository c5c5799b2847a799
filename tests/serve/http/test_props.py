"""GET /props and the entries of /v1/models, in llama-server's form."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from dots1_local.engine.engine import Engine
from tests.serve.http.asgi import FakeScheduler, send, serving

DOCS = Path(__file__).parents[3] / "docs/serve.md"


@pytest.fixture
def file(engine: Engine) -> GGUFReader:
    return GGUFReader(engine.gguf.files[0])


def get(app: Any, path: str) -> Any:
    reply = asyncio.run(send(app, path))
    assert reply.status == 200
    return reply.json


def field(file: GGUFReader, name: str) -> Any:
    found = file.get_field(name)
    assert found
    return found.contents()


def test_props_describe_the_model(app: Any, engine: Engine, file: GGUFReader) -> None:
    found = get(app, "/props")
    assert found["default_generation_settings"]["n_ctx"] == 64
    assert found["total_slots"] == 1
    assert found["model_alias"] == "dots1"
    assert found["modalities"] == {"vision": False, "audio": False, "video": False}
    assert found["chat_template"] == field(file, "tokenizer.chat_template")
    tokens = field(file, "tokenizer.ggml.tokens")
    assert found["eos_token"] == tokens[field(file, "tokenizer.ggml.eos_token_id")]
    assert found["build_info"]


def test_the_settings_are_the_documented_defaults(app: Any) -> None:
    settings = get(app, "/props")["default_generation_settings"]["params"]
    rows = DOCS.read_text().splitlines()
    for name in ("temperature", "top_k", "top_p", "min_p"):
        [row] = [each for each in rows if each.startswith(f"| `{name}` |")]
        assert settings[name] == float(row.strip("|").split("|")[-1])


def test_props_do_not_say_where_the_file_is(app: Any, engine: Engine) -> None:
    path = engine.gguf.files[0]
    found = get(app, "/props")
    assert found["model_path"] == path.name
    assert str(path.parent) not in json.dumps([found, get(app, "/v1/models")])


def test_the_models_entry_has_its_figures(app: Any, file: GGUFReader) -> None:
    [entry] = get(app, "/v1/models")["data"]
    assert get(app, "/v1/models/dots1") == entry
    assert entry["max_model_len"] == entry["meta"]["n_ctx"] == 64
    assert entry["meta"]["n_ctx_train"] == field(file, "dots1.context_length")
    assert entry["meta"]["n_embd"] == field(file, "dots1.embedding_length")
    assert entry["meta"]["n_vocab"] == len(field(file, "tokenizer.ggml.tokens"))
    assert entry["meta"]["n_params"] == sum(int(np.prod(each.shape)) for each in file.tensors)
    assert entry["meta"]["size"] == sum(int(each.n_bytes) for each in file.tensors)
    assert entry["meta"]["vocab_type"] == 2  # LLAMA_VOCAB_TYPE_BPE


def test_props_need_the_key(engine: Engine) -> None:
    app = serving(engine, FakeScheduler(), api_key="secret")
    assert asyncio.run(send(app, "/props")).status == 401
    key = [("Authorization", "Bearer secret")]
    assert asyncio.run(send(app, "/props", headers=key)).status == 200
