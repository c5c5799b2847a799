"""Anthropic's Messages API, with requests from the official client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from tests.conftest import Converted
from tests.serve.served import Served

ASKED: dict[str, Any] = {"model": "dots1", "extra_body": {"temperature": 0}}
STORY: list[Any] = [{"role": "user", "content": "Tell me a story about a little cat."}]
RAIN: Any = {
    "name": "rain",
    "description": "Will it rain?",
    "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}},
}


CALL: Any = {"type": "tool_use", "id": "toolu_1", "name": "rain", "input": {}}


def connected(server: Served, key: str = "none") -> Anthropic:
    return Anthropic(base_url=server.url.removesuffix("/v1"), api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(converted: Converted) -> Iterator[Anthropic]:
    with Served(converted("DQ4")) as server, connected(server) as opened:
        yield opened


@pytest.fixture(scope="module")
def caller(calling: Served) -> Iterator[Anthropic]:
    """A client of a model that writes "So:" and then a call."""
    with connected(calling) as opened:
        yield opened


def ask(client: Anthropic, **options: Any) -> Any:
    return client.messages.create(**ASKED, **{"max_tokens": 24, "messages": STORY, **options})


def test_an_answer_equals_a_sessions(client: Anthropic, story: str) -> None:
    answer = ask(client)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "dots1")
    [block] = answer.content
    assert (block.type, block.text) == ("text", story)
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    assert answer.usage.output_tokens == 24
    counted = client.messages.count_tokens(model="dots1", messages=STORY)
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == counted.input_tokens


def test_a_stream_is_the_same_answer(client: Anthropic, story: str) -> None:
    with client.messages.stream(**ASKED, max_tokens=24, messages=STORY) as stream:
        text = "".join(stream.text_stream)
        message: Any = stream.get_final_message()
    assert text == message.content[0].text == story
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 24


def test_blocks_and_a_system_text_reach_the_model(client: Anthropic) -> None:
    blocks = [{"type": "text", "text": "Tell me a story"}, {"type": "text", "text": "of a cat."}]
    count = client.messages.count_tokens
    message: Any = {"role": "user", "content": blocks}
    joined: Any = {"role": "user", "content": "Tell me a story\nof a cat."}
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    one = count(model="dots1", messages=[message], system=system).input_tokens
    assert one == count(model="dots1", messages=[joined], system="Be brief.").input_tokens
    assert one < count(model="dots1", messages=[joined], system="Be brief. " * 20).input_tokens


def test_the_answer_continues_a_last_message_of_the_assistant(
    client: Anthropic, story: str
) -> None:
    beginning = " ".join(story.split()[:4])
    begun = [*STORY, {"role": "assistant", "content": beginning}]
    answer = ask(client, messages=begun, max_tokens=8)
    assert answer.content[0].text
    assert story.startswith(beginning + answer.content[0].text)


def test_a_stop_sequence_is_named(client: Anthropic, story: str) -> None:
    stop = story.split()[4]
    answer = ask(client, stop_sequences=["never written", stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert answer.content[0].text == story[: story.index(stop)]


def test_a_call_is_a_block_of_its_own(caller: Anthropic) -> None:
    answer = ask(caller, tools=[RAIN], max_tokens=100)
    text, call = answer.content
    assert (text.type, text.text) == ("text", "So:")
    assert (call.type, call.name, call.input) == ("tool_use", "rain", {"at": "Ulm"})
    assert answer.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "No."}
    messages = [
        *STORY,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
    ]
    sizes = [
        caller.messages.count_tokens(model="dots1", messages=each, tools=[RAIN]).input_tokens
        for each in (STORY, messages)
    ]
    assert sizes[1] - sizes[0] > len('So:rain{"at": "Ulm"}No.And now?')


def test_the_client_accumulates_a_streamed_call(caller: Anthropic) -> None:
    with caller.messages.stream(**ASKED, max_tokens=100, messages=STORY, tools=[RAIN]) as stream:
        events = [event.type for event in stream]
        message: Any = stream.get_final_message()
    text, call = message.content
    assert (text.text, call.name, call.input) == ("So:", "rain", {"at": "Ulm"})
    assert message.stop_reason == "tool_use"
    assert events.count("content_block_start") == events.count("content_block_stop") == 2


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "rain"}])
def test_a_call_can_be_required(client: Anthropic, choice: Any) -> None:
    one: Any = {**RAIN, "input_schema": {"type": "object", "properties": {"at": {"enum": ["Ulm"]}}}}
    answer = ask(
        client,
        tools=[one],
        tool_choice=choice | {"disable_parallel_tool_use": True},
        max_tokens=200,
    )
    [call] = answer.content
    assert (call.name, answer.stop_reason) == ("rain", "tool_use")
    assert call.input in ({}, {"at": "Ulm"})


def test_errors_have_anthropics_shape(client: Anthropic, tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [
        {"max_tokens": 0},
        {"messages": []},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [*STORY, {"role": "assistant", "content": [CALL]}]},
        {"tools": [RAIN], "tool_choice": {"type": "tool", "name": "snow"}},
        {"messages": [{"role": "user", "content": "long " * 5000}]},
    ]
    for options in bad:
        with pytest.raises(anthropic.BadRequestError) as refused:
            ask(client, **options)
        body: Any = refused.value.body
        assert body["type"] == "error"
        assert body["error"]["type"] == "invalid_request_error"
        assert body["error"]["message"]
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude", max_tokens=1, messages=STORY)


def test_the_key_may_come_in_its_own_header(converted: Converted) -> None:
    with Served(converted("DQ4"), "--api-key", "secret") as server:
        with connected(server, "secret") as opened:
            assert ask(opened, max_tokens=1).content
        with connected(server, "wrong") as opened, pytest.raises(anthropic.AuthenticationError):
            ask(opened)
        connection = server.connect()
        connection.request("POST", "/v1/messages", "{}", {"Content-Type": "application/json"})
        error = json.loads(connection.getresponse().read())["error"]
        assert error["type"] == "authentication_error"
