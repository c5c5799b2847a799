"""The requests of chat pages and coding tools, sent as they send them."""

import json
from collections.abc import Iterator, Mapping

import pytest

from tests.conftest import Converted
from tests.serve.client_shapes import BEGUN, SHAPES, WEBUI_HEADERS, Shape
from tests.serve.served import Served


@pytest.fixture(scope="module")
def served(converted: Converted) -> Iterator[Served]:
    with Served(converted("DQ4"), "--api-key", "secret") as server:
        yield server


def send(
    server: Served, method: str, path: str, headers: Mapping[str, str], body: str | None = None
) -> tuple[int, str]:
    connection = server.connect()
    sent = {"Content-Type": "application/json", "Authorization": "Bearer secret", **headers}
    connection.request(method, path, body, sent)
    response = connection.getresponse()
    return response.status, response.read().decode()


def read(answer: str) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls in an answer, whole or streamed."""
    if answer.startswith("{"):
        documents = [json.loads(answer)]
    else:
        lines = [line.removeprefix("data: ") for line in answer.splitlines() if line[:5] == "data:"]
        assert lines.pop() == "[DONE]"
        documents = [json.loads(line) for line in lines]
    choices = [choice for document in documents for choice in document["choices"]]
    said = [each.get("message") or each.get("delta") or {} for each in choices]
    parts = [part for each in said for part in each.get("tool_calls") or ()]
    names = [part["function"]["name"] for part in parts if part["function"].get("name")]
    written = [""] * len(names)
    for part in parts:
        written[part["index"]] += part["function"]["arguments"]
    text = "".join(each.get("content") or "" for each in said)
    text += "".join(each.get("text", "") for each in choices)
    return text, list(zip(names, written, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
def test_a_client_gets_its_answer(served: Served, story: str, shape: Shape) -> None:
    beginning = " ".join(story.split()[:4])
    body = json.dumps(shape.body).replace(json.dumps(BEGUN), json.dumps(beginning))
    status, answer = send(served, "POST", shape.path, shape.headers, body)
    if isinstance(shape.wanted, tuple):
        assert status == shape.wanted[0]
        assert shape.wanted[1] in json.loads(answer)["error"]["message"]
        return
    assert status == 200, answer
    text, calls = read(answer)
    assert text or calls
    if shape.wanted != "any":
        assert bool(calls) == (shape.wanted == "call")
    if shape.wanted == "story":
        assert text == story
    if shape.wanted == "rest":
        assert story.startswith(beginning + text)
    for name, arguments in calls:
        assert name == "weather"
        assert json.loads(arguments)["city"] in ("Ulm", "Paris")


@pytest.mark.parametrize(
    "headers", [WEBUI_HEADERS, {"api-key": "secret"}, {"x-api-key": "secret", "Authorization": ""}]
)
def test_a_client_lists_the_models(served: Served, headers: Mapping[str, str]) -> None:
    """All four ask for /models beside the API, and take the `id` of each."""
    status, answer = send(served, "GET", "/v1/models", headers)
    assert status == 200
    assert [model["id"] for model in json.loads(answer)["data"]] == ["dots1"]
