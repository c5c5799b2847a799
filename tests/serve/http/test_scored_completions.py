"""Echoed prompts with log-probabilities, in OpenAI's older form and in vLLM's."""

import asyncio
import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest

from dots1_local.engine.engine import Engine
from dots1_local.serve.generation import (
    Event,
    Finished,
    GenerationRequest,
    Piece,
    Scored,
    TokenLogprob,
)
from tests.serve.http.asgi import Deliver, FakeScheduler, Reply, send, serving

# "a猫b", of which the cat is two tokens, and an answer "!" followed by an end token.
CAT = "猫".encode()
SCORED = Scored(
    0,
    b"a",
    (
        TokenLogprob(1, CAT[:2], -0.5, ((1, CAT[:2], -0.5), (9, b"x", -1.0)), 1),
        TokenLogprob(2, CAT[2:], -2.0, ((8, b"y", -0.1), (7, b"y", -0.2)), 5),
        TokenLogprob(3, b"b", -3.0, ((4, b"b", -0.25), (5, b"c", -2.0)), 8),
    ),
)
ANSWER: tuple[Event, ...] = (
    Piece(0, "!", (TokenLogprob(6, b"!", -0.75, ((6, b"!", -0.75), (5, b"c", -9.0)), 1),)),
    Piece(0, "", (TokenLogprob(0, b"", float("-inf"), (), 40),)),
    Finished(0, "stop", 4, 0, 2),
)


class Scoring(FakeScheduler):
    """Delivers the events above for one prompt."""

    def submit(self, requests: Sequence[GenerationRequest], deliver: Deliver) -> Any:
        self.requests = list(requests)
        if requests[0].prompt_logprobs is not None:
            deliver(SCORED)
        for event in ANSWER:
            deliver(event)
        return self.handle


def ask(engine: Engine, **fields: Any) -> tuple[Reply, GenerationRequest]:
    scheduler = Scoring()
    body = {"prompt": "a猫b", **fields}
    reply = asyncio.run(send(serving(engine, scheduler), "/v1/completions", body))
    return reply, scheduler.requests[0]


EXPECTED = {
    "tokens": ["a", "\\xe7\\x8c", "\\xab", "b", "!", ""],
    "token_logprobs": [None, -0.5, -2.0, -3.0, -0.75, -9999.0],
    "top_logprobs": [
        None,
        {"\\xe7\\x8c": -0.5, "x": -1.0},
        {"\\xab": -2.0, "y": -0.1},  # of two tokens with one text, the likelier
        {"b": -0.25, "c": -2.0},
        {"!": -0.75, "c": -9.0},
        {"": -9999.0},
    ],
    "text_offset": [0, 1, 1, 2, 3, 4],
}


def test_an_echo_has_the_logprobs_of_prompt_and_answer(engine: Engine) -> None:
    reply, request = ask(engine, echo=True, logprobs=2, max_tokens=1)
    assert request.prompt_logprobs == request.top_logprobs == 2
    [choice] = reply.json["choices"]
    assert choice["text"] == "a猫b!"
    assert choice["logprobs"] == EXPECTED
    assert "prompt_logprobs" not in choice
    assert reply.json["usage"]["completion_tokens"] == 2


def test_a_stream_has_the_same_lists(engine: Engine) -> None:
    reply, _ = ask(engine, echo=True, logprobs=2, stream=True)
    chunks = [json.loads(event)["choices"][0] for event in reply.events[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == "a猫b!"
    lists = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    assert {key: [*chain(*(each[key] for each in lists))] for key in EXPECTED} == EXPECTED
    assert chunks[-1]["finish_reason"] == "stop"


def test_the_top_has_as_many_tokens_as_were_asked_for(engine: Engine) -> None:
    reply, request = ask(engine, echo=True, logprobs=1, prompt_logprobs=2)
    assert (request.prompt_logprobs, request.top_logprobs) == (2, 1)
    [choice] = reply.json["choices"]
    assert choice["logprobs"]["top_logprobs"][1] == {"\\xe7\\x8c": -0.5}
    assert choice["logprobs"]["top_logprobs"][2] == {"\\xab": -2.0, "y": -0.1}


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_logprobs_have_vllms_form(engine: Engine, stream: bool) -> None:
    reply, request = ask(engine, prompt_logprobs=1, stream=stream)
    assert (request.prompt_logprobs, request.top_logprobs) == (1, None)
    documents = [json.loads(event) for event in reply.events[:-1]] if stream else [reply.json]
    choices = [document["choices"][0] for document in documents]
    assert "".join(choice["text"] for choice in choices) == "!"
    [found] = [each["prompt_logprobs"] for each in choices if "prompt_logprobs" in each]
    assert found == [
        None,
        {"1": {"logprob": -0.5, "rank": 1, "decoded_token": "\\xe7\\x8c"}},
        {
            "2": {"logprob": -2.0, "rank": 5, "decoded_token": "\\xab"},
            "8": {"logprob": -0.1, "rank": 1, "decoded_token": "y"},
        },
        {
            "3": {"logprob": -3.0, "rank": 8, "decoded_token": "b"},
            "4": {"logprob": -0.25, "rank": 1, "decoded_token": "b"},
        },
    ]
    assert all(choice["logprobs"] is None for choice in choices)


@pytest.mark.parametrize(
    ("fields", "top", "prompt"),
    [
        ({"logprobs": 5}, 5, None),
        ({"logprobs": 20, "echo": True}, 20, 20),
        ({"logprobs": 0, "echo": True, "max_tokens": 0}, 0, 0),
        ({"echo": True}, None, None),
    ],
)
def test_the_prompt_is_scored_where_it_is_echoed_with_logprobs(
    engine: Engine, fields: dict[str, Any], top: int | None, prompt: int | None
) -> None:
    _, request = ask(engine, **fields)
    assert (request.top_logprobs, request.prompt_logprobs) == (top, prompt)
    assert request.max_tokens == fields.get("max_tokens", 16)


@pytest.mark.parametrize(("tokens", "status"), [(0, 200), (1, 400)])
def test_a_prompt_without_an_answer_may_fill_the_context(
    engine: Engine, tokens: int, status: int
) -> None:
    reply, _ = ask(engine, prompt="x") if tokens else ask(engine, prompt="x", max_tokens=0)
    assert reply.status == 200
    body = {"prompt": [5] * 64, "max_tokens": tokens}
    reply = asyncio.run(send(serving(engine, Scoring()), "/v1/completions", body))
    assert reply.status == status


def get(engine: Engine, path: str, body: Any = None) -> Reply:
    return asyncio.run(send(serving(engine, FakeScheduler()), path, body))


def test_tokens_are_counted_as_vllm_does(engine: Engine) -> None:
    text = "Hi <|endofresponse|>猫"
    found = get(engine, "/tokenize", {"prompt": text, "return_token_strs": True}).json
    assert found["tokens"] == engine.tokenize(text, special=True)
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 64
    assert "".join(found["token_strs"][:2]) == "Hi"
    back = get(engine, "/detokenize", {"tokens": found["tokens"]}).json
    assert back == {"prompt": text, "content": text}  # for clients of vLLM and of llama-server
    plain = get(engine, "/tokenize", {"prompt": text, "add_special_tokens": False}).json
    assert plain["token_strs"] is None
    assert plain["tokens"] == found["tokens"]  # this model adds no BOS


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "hi"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_wrong_fields_are_named(engine: Engine, path: str, body: Any, param: str) -> None:
    reply = get(engine, path, body)
    assert reply.status == 400
    assert reply.error["param"] == param


def test_the_tokenizer_is_described(engine: Engine) -> None:
    found = get(engine, "/tokenizer_info").json
    keys: Any = engine.gguf.keys
    names = keys["tokenizer.ggml.tokens"]
    assert found["eos_token"] == names[keys["tokenizer.ggml.eos_token_id"]]
    assert found["chat_template"] == keys.get("tokenizer.chat_template")
    assert found["add_bos_token"] is False
    assert found["bos_token"] is None
