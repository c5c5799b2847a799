"""A server whose model calls a tool, with requests from the official client."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.conftest import Converted
from tests.serve.conftest import ANSWER
from tests.serve.served import Served

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "rain",
        "description": "Will it rain?",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
ASKED: list[Any] = [{"role": "user", "content": "Rain?"}]


@pytest.fixture(scope="module")
def client(calling: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=calling.url, api_key="none", max_retries=0) as opened:
        yield opened


def ask(client: OpenAI, **options: Any) -> Any:
    asked = {"model": "dots1", "temperature": 0, "messages": ASKED, "tools": [TOOL], **options}
    return client.chat.completions.create(**asked)


def test_a_call_is_separated_from_text(client: OpenAI) -> None:
    answer = ask(client, n=2)
    assert len({choice.message.tool_calls[0].id for choice in answer.choices}) == 2
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "So:"
        [call] = choice.message.tool_calls
        assert (call.type, call.function.name) == ("function", "rain")
        assert json.loads(call.function.arguments) == {"at": "Ulm"}


def test_the_client_accumulates_a_streamed_call(client: OpenAI) -> None:
    asked: Any = {"model": "dots1", "messages": ASKED, "tools": [TOOL], "temperature": 0}
    with client.chat.completions.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        [choice] = stream.get_final_completion().choices
    assert "".join(deltas) == choice.message.content == "So:"
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls or []
    assert call.function.name == "rain"
    assert json.loads(call.function.arguments) == {"at": "Ulm"}


def test_a_call_and_its_result_can_be_sent_back(client: OpenAI) -> None:
    said = ask(client).choices[0].message
    told = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "No."}
    first, second = (ask(client, messages=m) for m in (ASKED, [*ASKED, said, told]))
    added = second.usage.prompt_tokens - first.usage.prompt_tokens
    assert added > len('So:No.{"name": "rain", "arguments": {"at": "Ulm"}}')


def test_a_call_that_was_cut_off_before_its_arguments_is_text(client: OpenAI) -> None:
    choice = ask(client, max_tokens=4).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == ("So:<tool_call>", None)
    assert choice.finish_reason == "length"


def test_calls_have_logprobs_too(client: OpenAI) -> None:
    for choice in (
        ask(client, logprobs=True).choices,
        [each.choices[0] for each in ask(client, logprobs=True, stream=True)],
    ):
        tokens = [token for each in choice if each.logprobs for token in each.logprobs.content]
        assert "".join(token.token for token in tokens) == ANSWER


@pytest.mark.parametrize("options", [{"tools": None}, {"tool_choice": "none"}])
def test_without_tools_tags_are_text(client: OpenAI, options: dict[str, Any]) -> None:
    choice = ask(client, **options).choices[0]
    assert choice.message.content == ANSWER
    assert choice.finish_reason == "stop"


def call(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


BAD: list[tuple[str, dict[str, Any]]] = [
    ("tools", {"tools": [TOOL] * 129}),
    ("tools", {"tools": [{"function": {"name": "a", "description": "<|system|>"}}]}),
    ("tools[0]", {"tools": ["rain"]}),
    ("tools[0].type", {"tools": [{"type": "custom", "custom": {"name": "a"}}]}),
    ("tools[0].function", {"tools": [{"type": "function"}]}),
    ("tools[0].function.name", {"tools": [{"function": {"name": ""}}]}),
    ("tools[0].function.parameters", {"tools": [{"function": {"name": "a", "parameters": []}}]}),
    ("tool_choice", {"tool_choice": "always"}),
    ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "snow"}}}),
    ("tool_choice", {"tool_choice": "required", "tools": []}),
    ("tool_choice.allowed_tools", {"tool_choice": {"type": "allowed_tools"}}),
    (
        "tool_choice",
        {
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"function": {"name": "snow"}}]},
            }
        },
    ),
    ("tools", {"tools": [{"function": {"name": "a", "parameters": {"type": "thing"}}}]}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    ("messages[0].tool_call_id", {"messages": [{"role": "tool", "content": "No."}]}),
    ("messages[0].tool_calls[0].function.arguments", {"messages": [call(name="a")]}),
    ("messages[0].tool_calls[0].function.name", {"messages": [call(arguments="{}")]}),
    ("tools", {"messages": [call(name="a", arguments="[]")]}),
]


@pytest.mark.parametrize(("param", "options"), BAD)
def test_an_error_names_the_wrong_field(
    client: OpenAI, param: str, options: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **options)
    assert refused.value.param == param


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"enum": ["C", "F"]},
                "days": {"$ref": "#/$defs/days"},
            },
            "required": ["city", "unit", "days"],
            "$defs": {"days": {"type": "array", "items": {"enum": [1, 2, 7]}, "maxItems": 2}},
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def untrained(converted: Converted) -> Iterator[OpenAI]:
    """A client of dots1-tiny, whose template knows no tools and which never saw any."""
    with (
        Served(converted("DQ4"), "--context", "1024") as server,
        OpenAI(base_url=server.url, api_key="none", max_retries=0) as opened,
    ):
        yield opened


def check_weather(arguments: str) -> None:
    found = json.loads(arguments)
    assert list(found) == ["city", "unit", "days"]
    assert found["unit"] in ("C", "F")
    assert all(isinstance(day, int) for day in found["days"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_any_model_calls_tools_as_their_schemas_say(
    untrained: OpenAI, choice: Any, seed: int
) -> None:
    asked: Any = {
        "model": "dots1",
        "messages": ASKED,
        "tools": [WEATHER, CLOCK],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "seed": seed,
        "max_tokens": 200,
    }
    [answer] = untrained.chat.completions.create(**asked).choices
    assert answer.finish_reason == "tool_calls"
    [call] = answer.message.tool_calls or []
    if call.function.name == "weather":
        check_weather(call.function.arguments)
    else:
        assert choice == "required"
        assert (call.function.name, json.loads(call.function.arguments)) == ("clock", {})


def test_arguments_are_streamed_as_they_are_written(untrained: OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    options = {"tools": [CLOCK, WEATHER], "tool_choice": choice, "temperature": 0.7, "seed": 1}
    choices = [chunk.choices[0] for chunk in ask(untrained, **options, stream=True)]
    parts = [part for each in choices for part in each.delta.tool_calls or []]
    assert parts[0].function.name == "weather"
    assert parts[0].id
    assert all(part.function.name is None and part.id is None for part in parts[1:])
    assert len(parts) > 5
    check_weather("".join(part.function.arguments for part in parts))
    assert choices[-1].finish_reason == "tool_calls"


def test_a_result_leads_to_an_answer(untrained: OpenAI) -> None:
    """A conversation with a call and its result goes on; the tools are part of the prompt."""
    options = {"tools": [CLOCK], "max_tokens": 60}
    first = ask(untrained, **options, tool_choice="required")
    said = first.choices[0].message
    [call, *_] = said.tool_calls
    told = {"role": "tool", "tool_call_id": call.id, "content": "noon"}
    second = ask(untrained, **options, messages=[*ASKED, said, told], tool_choice="none")
    plain = ask(untrained, tools=[], max_tokens=1)
    assert second.choices[0].message.tool_calls is None
    assert first.usage.prompt_tokens > plain.usage.prompt_tokens + 60


@pytest.mark.parametrize(("first", "calls"), [("{", 0), ("<", 1)])
def test_an_answer_with_a_schema_is_a_document_or_calls(
    untrained: OpenAI, first: str, calls: int
) -> None:
    """A bias for the first character decides which of the two."""
    schema = {"type": "object", "properties": {"tame": {"type": "boolean"}}, "required": ["tame"]}
    tokenized: Any = untrained.post(
        str(untrained.base_url).replace("/v1/", "/tokenize"), body={"prompt": first}, cast_to=object
    )
    answer = ask(
        untrained,
        tools=[CLOCK],
        parallel_tool_calls=False,
        response_format={"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}},
        logit_bias={str(tokenized["tokens"][-1]): 100},
        max_tokens=100,
    )
    [choice] = answer.choices
    assert len(choice.message.tool_calls or ()) == calls
    if calls:
        assert choice.message.tool_calls[0].function.name == "clock"
    else:
        assert isinstance(json.loads(choice.message.content)["tame"], bool)


@pytest.mark.parametrize("beginning", ["", "Once upon", "Once <"])
def test_an_answer_with_tools_can_be_begun(untrained: OpenAI, beginning: str) -> None:
    begun = [*ASKED, {"role": "assistant", "content": beginning}]
    [choice] = ask(untrained, tools=[CLOCK], messages=begun, max_tokens=5).choices
    assert choice.message.content or choice.message.tool_calls
    if beginning:
        with pytest.raises(openai.BadRequestError, match="begin"):
            ask(untrained, tools=[CLOCK], messages=begun, tool_choice="required")


def test_a_call_that_is_cut_off_is_told_by_its_reason(untrained: OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    [answer] = ask(untrained, tools=[WEATHER], tool_choice=choice, max_tokens=20).choices
    assert answer.finish_reason == "length"
