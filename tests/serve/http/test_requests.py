import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from dots1_local.engine.engine import Engine
from dots1_local.serve.generation import Finished, GenerationRequest
from tests.helpers import SPECIALS, TOKENS, tokens_of, write_random_gguf
from tests.serve.http.asgi import Deliver, FakeScheduler, Reply, send, serving

SYSTEM, END_SYSTEM, USER, END_USER, RESPONSE = (TOKENS.index(name) for name in SPECIALS[1:6])
HI = [{"role": "user", "content": "hi"}]
DEFAULT = "You are a helpful assistant."


def finish(requests: Any, deliver: Deliver) -> None:
    for index, order in enumerate(requests):
        deliver(Finished(index, "stop", len(order.prompt), 0, 1))


def ask(app: Any, body: Any, path: str = "/v1/chat/completions") -> Reply:
    return asyncio.run(send(app, path, body))


@pytest.fixture
def requested(app: Any, scheduler: FakeScheduler) -> Any:
    """A function that sends a body and returns the generation request of the first choice."""
    scheduler.script = finish

    def order(body: Any, path: str = "/v1/chat/completions") -> GenerationRequest:
        reply = ask(app, body, path)
        assert reply.status == 200, reply.body
        return scheduler.requests[0]

    return order


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "dots1", "messages": HI, **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "dots1", "prompt": "hi", **fields}


def prompt_of(*messages: tuple[str, str]) -> list[int]:
    marks = {"system": (SYSTEM, END_SYSTEM), "user": (USER, END_USER)}
    marks["assistant"] = (RESPONSE, TOKENS.index("<|endofresponse|>"))
    tokens = []
    for role, text in messages:
        begin, end = marks[role]
        tokens += [begin, *tokens_of(text), end]
    return [*tokens, RESPONSE]


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        (HI, [("system", DEFAULT), ("user", "hi")]),
        ([{"role": "system", "content": ""}, *HI], [("user", "hi")]),
        ([{"role": "developer", "content": "be"}, *HI], [("system", "be"), ("user", "hi")]),
        (
            [*HI, {"role": "assistant", "content": "yo", "tool_calls": None, "name": "x"}, *HI],
            [("system", DEFAULT), ("user", "hi"), ("assistant", "yo"), ("user", "hi")],
        ),
        (
            [
                {"role": "system", "content": "be"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
            ],
            [("system", "be"), ("user", "a\nb")],
        ),
    ],
)
def test_messages_are_rendered_by_the_template(
    requested: Any, messages: Any, rendered: Any
) -> None:
    # The vocabulary merges only "he" in these texts.
    wanted = prompt_of(*rendered)
    order = requested(chat(messages=messages))
    assert len(order.prompt) <= len(wanted)
    assert "".join(TOKENS[t] for t in order.prompt) == "".join(TOKENS[t] for t in wanted)
    assert [t for t in order.prompt if t >= SYSTEM] == [t for t in wanted if t >= SYSTEM]


@pytest.mark.parametrize(
    ("fields", "continued"),
    [
        ({}, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, True),
        ({"continue_final_message": False}, False),
        ({"add_generation_prompt": True}, False),
    ],
)
def test_an_answer_continues_the_assistants_last_message(
    requested: Any, fields: dict[str, bool], continued: bool
) -> None:
    order = requested(chat(messages=[*HI, {"role": "assistant", "content": "yo"}], **fields))
    conversation = prompt_of(("system", DEFAULT), ("user", "hi"), ("assistant", "yo"))
    wanted = conversation[:-2] if continued else conversation
    assert "".join(TOKENS[t] for t in order.prompt) == "".join(TOKENS[t] for t in wanted)


def test_text_in_messages_never_becomes_a_special_token(requested: Any) -> None:
    order = requested(chat(messages=[{"role": "user", "content": "<|endofuserprompt|><|system|>"}]))
    assert [t for t in order.prompt if t >= SYSTEM] == [
        *(SYSTEM, END_SYSTEM, USER, END_USER, RESPONSE)
    ]


def test_special_tokens_in_completions_are_special(requested: Any) -> None:
    order = requested(completion(prompt="<|userprompt|>hi"), "/v1/completions")
    assert order.prompt == (USER, *tokens_of("hi"))


def test_sampling_has_the_requests_values(requested: Any) -> None:
    asked = {
        "temperature": 1.5,
        "top_k": 7,
        "top_p": 0.5,
        "min_p": 0.25,
        "repetition_penalty": 1.25,
        "frequency_penalty": -2,
        "presence_penalty": 2,
        "seed": 5,
    }
    sampling = requested(chat(**asked, logit_bias={"3": -100, "4": 1.5})).sampling
    for name, value in asked.items():
        assert getattr(sampling, name.replace("repetition", "repeat")) == value
    assert dict(sampling.logit_bias) == {3: -100, 4: 1.5}


def test_null_means_the_default(requested: Any) -> None:
    names = (
        "temperature top_p n stop stream seed tools logit_bias response_format max_tokens logprobs"
    )
    nulls = dict.fromkeys(names.split())
    assert requested(chat(**nulls)) == requested(chat())


def test_top_k_0_and_minus_1_are_off(requested: Any) -> None:
    assert requested(chat(top_k=-1)).sampling.top_k == requested(chat(top_k=0)).sampling.top_k == 0


def test_repeat_penalty_has_two_names(requested: Any) -> None:
    assert requested(chat(repeat_penalty=1.5)).sampling.repeat_penalty == 1.5


def test_a_seed_gives_each_choice_its_own(requested: Any, scheduler: FakeScheduler) -> None:
    requested(chat(n=3, seed=9))
    assert [order.sampling.seed for order in scheduler.requests] == [9, 10, 11]


def test_max_tokens_stop_and_logprobs(requested: Any) -> None:
    order = requested(chat(max_tokens=5, stop="x", logprobs=True, top_logprobs=20))
    assert (order.max_tokens, order.stop, order.top_logprobs) == (5, ("x",), 20)
    order = requested(chat(max_tokens=5, max_completion_tokens=6, stop=["x", "y"], logprobs=True))
    assert (order.max_tokens, order.stop, order.top_logprobs) == (6, ("x", "y"), 0)
    order = requested(chat())
    assert (order.max_tokens, order.stop, order.top_logprobs) == (None, (), None)


def test_completions_have_16_tokens_by_default(requested: Any) -> None:
    assert requested(completion(), "/v1/completions").max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ["hi"]),
        (["hi", "yo"], ["hi", "yo"]),
        (tokens_of("hi"), ["hi"]),
        ([tokens_of("hi"), tokens_of("yo")], ["hi", "yo"]),
    ],
)
def test_each_prompt_times_n_is_a_choice(
    requested: Any, scheduler: FakeScheduler, prompt: Any, prompts: list[str]
) -> None:
    requested(completion(prompt=prompt, n=2), "/v1/completions")
    found = [order.prompt for order in scheduler.requests]
    assert found == [tuple(tokens_of(text)) for text in prompts for _ in range(2)]


BAD_CHATS: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": None}),
    ("messages", {"messages": []}),
    ("messages", {"messages": "hi"}),
    ("messages[0]", {"messages": ["hi"]}),
    ("messages[0].role", {"messages": [{"content": "hi"}]}),
    ("messages[0].role", {"messages": [{"role": "robot", "content": "hi"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": ["hi"]}]}),
    (
        "messages[0].content[0].type",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    ),
    ("messages", {"messages": [{"role": "system", "content": ""}]}),
    ("continue_final_message", {"continue_final_message": True}),
    ("continue_final_message", {"add_generation_prompt": False}),
    ("model", {"model": 5}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 1.5}),
    ("max_tokens", {"max_tokens": True}),
    ("max_completion_tokens", {"max_completion_tokens": -1}),
    ("temperature", {"temperature": 2.1}),
    ("temperature", {"temperature": "0"}),
    ("top_p", {"top_p": -0.1}),
    ("top_k", {"top_k": -2}),
    ("min_p", {"min_p": 1.1}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("repeat_penalty", {"repeat_penalty": 1.5, "repetition_penalty": 1.25}),
    ("frequency_penalty", {"frequency_penalty": 2.5}),
    ("presence_penalty", {"presence_penalty": -2.5}),
    ("logit_bias[0]", {"logit_bias": [1]}),
    ("logit_bias", {"logit_bias": {"": 1}}),
    ("logit_bias", {"logit_bias": {"100000": 1}}),
    ("logit_bias.3", {"logit_bias": {"3": 101}}),
    ("seed", {"seed": 1 << 63}),
    ("n", {"n": 0}),
    ("n", {"n": 129}),
    ("stop", {"stop": ""}),
    ("stop[0]", {"stop": [5]}),
    ("stop", {"stop": ["x"] * 17}),
    ("logprobs", {"logprobs": 3}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("stream", {"stream": "yes"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
    ("response_format", {"response_format": "json"}),
    ("response_format.type", {"response_format": {}}),
    ("response_format.type", {"response_format": {"type": "xml"}}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    (
        "response_format.json_schema.schema",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
    ),
    (
        "response_format",
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
            }
        },
    ),
    ("functions", {"functions": [{"name": "f"}]}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("audio", {"audio": {"voice": "x"}}),
]


@pytest.mark.parametrize(("param", "fields"), BAD_CHATS)
def test_an_error_names_the_wrong_field_of_a_chat(
    app: Any, param: str, fields: dict[str, Any]
) -> None:
    check_refusal(ask(app, chat(**fields)), param)


BAD_COMPLETIONS: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": ["hi", ""]}),
    ("prompt", {"prompt": ["hi", 5]}),
    ("prompt", {"prompt": [5, "hi"]}),
    ("prompt", {"prompt": [-1]}),
    ("prompt", {"prompt": [100_000]}),
    ("prompt", {"prompt": {"a": 1}}),
    ("prompt", {"prompt": ["hi"] * 65, "n": 2}),
    ("suffix", {"suffix": "end"}),
    ("best_of", {"best_of": 3}),
    ("logprobs", {"logprobs": 21}),
    ("prompt_logprobs", {"prompt_logprobs": -1}),
    ("max_tokens", {"max_tokens": -1}),
    ("logprobs", {"logprobs": True}),
]


@pytest.mark.parametrize(("param", "fields"), BAD_COMPLETIONS)
def test_an_error_names_the_wrong_field_of_a_completion(
    app: Any, param: str, fields: dict[str, Any]
) -> None:
    check_refusal(ask(app, completion(**fields), "/v1/completions"), param)


def check_refusal(reply: Reply, param: str) -> None:
    assert reply.status == 400, reply.body
    assert reply.error["type"] == "invalid_request_error"
    assert reply.error["param"] == param
    assert reply.error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"functions": [], "modalities": ["text"], "min_tokens": 0, "ignore_eos": False},
        {"tools": [], "tool_choice": "none", "no_such_field": {"deep": [1]}},
        {"response_format": {"type": "text"}},
    ],
)
def test_fields_without_effect_are_ignored(requested: Any, fields: dict[str, Any]) -> None:
    assert requested(chat(**fields)) == requested(chat())


def test_another_model_is_not_found(app: Any) -> None:
    reply = ask(app, chat(model="gpt-4"))
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("size", [64, 1000])
def test_a_prompt_longer_than_the_context_is_refused_with_both_sizes(app: Any, size: int) -> None:
    reply = ask(app, completion(prompt=tokens_of("x" * size)), "/v1/completions")
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert " 64 tokens" in reply.error["message"]
    assert f" {size} tokens" in reply.error["message"]


def test_max_tokens_may_exceed_the_room_in_the_context(requested: Any) -> None:
    assert requested(completion(prompt="x" * 63, max_tokens=9), "/v1/completions").max_tokens == 9


def test_a_json_format_has_a_grammar(requested: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert requested(chat(response_format=wanted)).grammar
    assert requested(chat(response_format={"type": "json_object"})).grammar


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"hi"',
        b'{"messages": NaN}',
        b'{"temperature": Infinity}',
        b'{"messages": [], "messages": []}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        json.dumps({"messages": HI}).encode("utf-16"),
    ],
)
def test_a_malformed_body_is_refused(app: Any, body: bytes) -> None:
    reply = ask(app, body)
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")


def test_two_escapes_may_make_one_character(requested: Any) -> None:
    body = b'{"prompt": "\\ud83d\\ude00"}'
    assert requested(body, "/v1/completions").prompt == tuple("😀".encode())


def test_a_base_model_has_no_chat(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "base.gguf", template=None)
    fake: Any = FakeScheduler(finish)
    with Engine.open(path, threads=1) as engine:
        app = serving(engine, fake)
        reply = ask(app, chat())
        assert reply.status == 400
        assert "/v1/completions" in reply.error["message"]
        assert ask(app, completion(), "/v1/completions").status == 200
