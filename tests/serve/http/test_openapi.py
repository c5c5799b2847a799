"""The document at /openapi.json: what it names, and that the server keeps to it.

schemathesis makes bodies that match the document and bodies that do not.
"""

import asyncio
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from dots1_local.engine.engine import Engine
from tests.helpers import write_random_gguf
from tests.serve.http.asgi import FakeScheduler, send, serving
from tests.serve.scheduling import open_scheduler

DOCS = Path(__file__).parents[3] / "docs/serve.md"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
NEEDED = {"model", "messages", "input", "prompt", "tokens", "max_tokens", "content"}
WITH_BODIES = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An application with a scheduler that generates."""
    path = write_random_gguf(tmp_path_factory.mktemp("described") / "model.gguf")
    with open_scheduler(path, slots=2, n_ctx=64) as scheduler:
        yield serving(scheduler.engine, scheduler)


def statuses(served: Any, method: str, path: str, mode: GenerationMode, n: int) -> Counter[int]:
    """Send up to `n` requests, check the answers, and count their statuses."""
    found: Counter[int] = Counter()
    schema = schemathesis.openapi.from_asgi("/openapi.json", served)

    @hypothesis.settings(
        max_examples=n,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=schema[path][method].as_strategy(generation_mode=mode))
    def exchange(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            fill(case.body)
        response = case.call()
        found[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    exchange()
    return found


def fill(body: Any) -> None:
    """Do what most bodies need, which the document cannot express.

    Messages have content and belong to a call. Few optional fields are given, because many
    contradict each other.
    """
    if not isinstance(body, dict):
        return
    for message in body.get("messages") or ():
        message.pop("prefix", None)
        for name in ("content", "tool_call_id"):
            if message.get(name) is None:
                message[name] = "a"
    optional = sorted(body.keys() - NEEDED)
    kept = random.Random(repr(optional)).sample(optional, min(3, len(optional)))
    for name in set(optional) - set(kept):
        del body[name]


@pytest.mark.parametrize("path", WITH_BODIES)
def test_bodies_that_match_have_documented_answers(served: Any, path: str) -> None:
    found = statuses(served, "POST", path, GenerationMode.POSITIVE, 12)
    assert found[200], f"only {found}"


@pytest.mark.parametrize("path", WITH_BODIES)
def test_bodies_that_do_not_match_are_refused(served: Any, path: str) -> None:
    assert set(statuses(served, "POST", path, GenerationMode.NEGATIVE, 6)) <= {400, 404}


@pytest.mark.parametrize(
    "path",
    ["/health", "/metrics", "/slots", "/props", "/v1/models", "/v1/models/{name}", "/openapi.json"],
)
def test_what_is_read_has_documented_answers(served: Any, path: str) -> None:
    assert statuses(served, "GET", path, GenerationMode.POSITIVE, 5)


def test_the_documentation_names_the_same_endpoints(served: Any) -> None:
    described = asyncio.run(send(served, "/openapi.json")).json["paths"]
    table = DOCS.read_text().split("## Endpoints")[1].split("\n\n")[0]
    named: set[str] = set()
    for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        method = ""
        for cell in re.findall(r"`(.*?)`", row):
            *given, path = cell.split()
            [method] = given or [method]
            named.add(f"{method} {path}".replace("NAME", "{name}"))
    assert named - {"GET /", "GET /page/..."} == {
        f"{method.upper()} {path}" for path, methods in described.items() for method in methods
    }


def test_the_description_needs_the_key_and_says_so(engine: Engine) -> None:
    app = serving(engine, FakeScheduler(), api_key="secret")
    assert asyncio.run(send(app, "/openapi.json")).status == 401
    key = [("Authorization", "Bearer secret")]
    found = asyncio.run(send(app, "/openapi.json", headers=key)).json["paths"]
    keyless = {path for path, methods in found.items() if "security" not in str(methods)}
    assert keyless == {"/health"}
    assert "401" in found["/v1/messages"]["post"]["responses"]
