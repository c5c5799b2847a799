"""OpenAI's Responses API, with requests from the official client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.conftest import Converted
from tests.serve.served import Served

STORY = "Tell me a story about a little cat."
RAIN: Any = {
    "type": "function",
    "name": "rain",
    "description": "Will it rain?",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
}


def connected(server: Served) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(converted: Converted) -> Iterator[OpenAI]:
    with Served(converted("DQ4")) as server, connected(server) as opened:
        yield opened


@pytest.fixture(scope="module")
def caller(calling: Served) -> Iterator[OpenAI]:
    """A client of a model that writes "So:" and then a call."""
    with connected(calling) as opened:
        yield opened


def ask(client: OpenAI, **options: Any) -> Any:
    asked = {"model": "dots1", "temperature": 0, "input": STORY, **options}
    return client.responses.create(**asked)


def test_an_answer_equals_a_sessions(client: OpenAI, story: str) -> None:
    answer = ask(client, max_output_tokens=24)
    assert answer.output_text == story
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 24
    assert answer.usage.total_tokens == answer.usage.input_tokens + 24
    assert answer.model == "dots1"


def test_a_stream_is_the_same_answer(client: OpenAI, story: str) -> None:
    with client.responses.stream(
        model="dots1", input=STORY, temperature=0, max_output_tokens=24
    ) as stream:
        events: list[Any] = list(stream)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text == story
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.incomplete"


def test_instructions_and_items_reach_the_model(client: OpenAI) -> None:
    def size(**options: Any) -> int:
        return int(ask(client, max_output_tokens=1, **options).usage.input_tokens)

    parts = [{"type": "input_text", "text": text} for text in ("Tell me a story", "of a cat.")]
    joined = "Tell me a story\nof a cat."
    items = [{"role": "user", "content": parts}]
    assert size(input=items) == size(input=joined)
    assert size(input=[{"role": "developer", "content": "Hi."}, *items]) == size(
        input=joined, instructions="Hi."
    )
    longer = [*items, {"role": "assistant", "content": "Once."}, {"role": "user", "content": "Go."}]
    assert size(input=longer) > size(input=items) + 3


def test_a_call_is_an_item_of_its_own(caller: OpenAI) -> None:
    answer = ask(caller, tools=[RAIN])
    text, call = answer.output
    assert answer.output_text == text.content[0].text == "So:"
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "rain",
        {"at": "Ulm"},
    )
    assert answer.status == "completed"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "No."}
    again = [{"role": "user", "content": STORY}, *answer.output, result]
    more = ask(caller, tools=[RAIN], input=again)
    assert more.usage.input_tokens - answer.usage.input_tokens > len('So:rain{"at": "Ulm"}No.')


def test_the_client_accumulates_a_streamed_call(caller: OpenAI) -> None:
    with caller.responses.stream(model="dots1", input=STORY, temperature=0, tools=[RAIN]) as stream:
        kinds = [event.type for event in stream]
        final: Any = stream.get_final_response()
    text, call = final.output
    assert (text.content[0].text, json.loads(call.arguments)) == ("So:", {"at": "Ulm"})
    assert kinds.count("response.output_item.added") == 2
    assert kinds.count("response.output_item.done") == 2
    assert "response.function_call_arguments.delta" in kinds
    assert kinds[-1] == "response.completed"


class Pet(BaseModel):
    name: str = Field(max_length=12)  # a small model may write an endless one
    tame: bool


def test_a_text_can_have_a_schema(client: OpenAI) -> None:
    answer = client.responses.parse(
        model="dots1", input=STORY, text_format=Pet, max_output_tokens=400
    )
    assert isinstance(answer.output_parsed, Pet)


def test_a_call_can_be_required(client: OpenAI) -> None:
    tool = RAIN | {"parameters": {"type": "object", "properties": {"at": {"enum": ["Ulm"]}}}}
    choice = {"type": "function", "name": "rain"}
    [call] = ask(client, tools=[tool], tool_choice=choice, max_output_tokens=200).output
    assert (call.type, call.name) == ("function_call", "rain")


BAD: list[tuple[str, dict[str, Any]]] = [
    ("previous_response_id", {"previous_response_id": "resp_1"}),
    ("input", {"input": []}),
    ("input[0].role", {"input": [{"content": "hi"}]}),
    ("input[0].content", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
    ("tools[0]", {"tools": [{"type": "web_search"}]}),
    ("tool_choice", {"tools": [RAIN], "tool_choice": {"type": "function", "name": "snow"}}),
    ("max_output_tokens", {"max_output_tokens": 0}),
    ("input", {"input": "long " * 5000}),
]


@pytest.mark.parametrize(("param", "options"), BAD)
def test_an_error_names_the_wrong_field(
    client: OpenAI, param: str, options: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **options)
    assert refused.value.param
    assert refused.value.param.startswith(param)


def test_nothing_is_stored(client: OpenAI, tmp_path: Path) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
