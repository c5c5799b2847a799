"""A server whose model calls a tool, with requests from the official client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

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
SAID = ("<tool_call>", '{"name":"rain","arguments":{"at":"Ulm"}}', "</tool_call>", "<tool_call>{}")
WORDS = range(1, 5)
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "rain",
        "description": "Will it rain?",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
ASKED: list[Any] = [{"role": "user", "content": "Rain?"}]


def write(path: Path, *answer: int, template: str = TEMPLATE) -> Path:
    tokens = list(TOKENS)
    tokens[WORDS.start : WORDS.stop] = SAID
    tensors = scripted_tensors([*answer, EOS])
    return write_random_gguf(path, template=template, tokens=tokens, tensors=tensors)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A client of a model that writes "So:" and then a call."""
    path = write(tmp_path_factory.mktemp("tools") / "model.gguf", *tokens_of("So:"), *WORDS[:3])
    with (
        Served(path) as server,
        OpenAI(base_url=server.url, api_key="none", max_retries=0) as opened,
    ):
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


def test_a_call_that_was_cut_off_is_text(client: OpenAI) -> None:
    choice = ask(client, max_tokens=4).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == ("So:<tool_call>", None)
    assert choice.finish_reason == "length"


def test_calls_have_logprobs_too(client: OpenAI) -> None:
    for choice in (
        ask(client, logprobs=True).choices,
        [each.choices[0] for each in ask(client, logprobs=True, stream=True)],
    ):
        tokens = [token for each in choice if each.logprobs for token in each.logprobs.content]
        assert "".join(token.token for token in tokens) == "So:" + "".join(SAID[:3])


@pytest.mark.parametrize("options", [{"tools": None}, {"tool_choice": "none"}])
def test_without_tools_tags_are_text(client: OpenAI, options: dict[str, Any]) -> None:
    choice = ask(client, **options).choices[0]
    assert choice.message.content == "So:" + "".join(SAID[:3])
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
    ("tool_choice", {"tool_choice": "required"}),
    ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "rain"}}}),
    ("response_format", {"response_format": {"type": "json_object"}}),
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


def test_a_template_without_tool_call_tags_refuses_tools(tmp_path: Path) -> None:
    template = TEMPLATE.replace("tool_call>", "call>")
    with (
        Served(write(tmp_path / "model.gguf", *WORDS[:3], template=template)) as server,
        OpenAI(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="template") as refused:
            ask(client)
        assert refused.value.param == "tools"
        assert ask(client, tools=None).choices[0].message.content == "".join(SAID[:3])
