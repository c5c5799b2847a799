"""Errors in the words of vLLM, SGLang, llama.cpp's server, OpenAI and FastAPI."""

import json
import re
from collections.abc import Mapping
from typing import Any

import httpx2
import pytest

from dots1_local.chat.remote.address import Key
from dots1_local.chat.remote.reply import Refusal, TooLong, status_error

URL = "http://host:8000/v1"


def refusal(
    status: int, body: Any, headers: Mapping[str, str] | None = None, key: Key | None = None
) -> Refusal:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = httpx2.Response(status, headers=headers)
    return status_error(head, data, url=URL, key=key, model="dots1", models="a, b")


def error(message: str, **detail: Any) -> dict[str, Any]:
    return {"error": {"message": message, **detail}}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (  # vLLM
            error(
                "This model's maximum context length is 2048 tokens. However, your request has "
                "3000 input tokens. Please reduce the length of the input messages.",
                type="BadRequestError",
            ),
            TooLong(3000, 2048),
        ),
        (
            error(
                "'max_tokens' or 'max_completion_tokens' is too large: 4096. This model's maximum "
                "context length is 2048 tokens and your request has 26 input tokens "
                "(4096 > 2048 - 26)."
            ),
            TooLong(26, 2048),
        ),
        (
            error(
                "You passed 2500 input tokens and requested 500 output tokens. However, the "
                "model's context length is only 2048 tokens, resulting in a maximum "
                "input length of 1548 tokens. Please reduce the length of the input prompt."
            ),
            TooLong(2500, 2048),
        ),
        (  # older vLLM
            {
                "object": "error",
                "message": "This model's maximum context length is 2048 tokens. However, you "
                "requested 3000 tokens (2500 in the messages, 500 in the completion). Please "
                "reduce the length of the messages or completion.",
                "type": "BadRequestError",
                "param": None,
                "code": 400,
            },
            TooLong(2500, 2048),
        ),
        (
            error(
                "The decoder prompt (length 2500) is longer than the maximum model length of 2048. "
                "Make sure that `max_model_len` is no smaller than the number of text tokens."
            ),
            TooLong(2500, 2048),
        ),
        (  # SGLang
            {
                "object": "error",
                "message": "The input (3000 tokens) is longer than the model's context length "
                "(2048 tokens).",
                "code": 400,
            },
            TooLong(3000, 2048),
        ),
        (
            error(
                "Requested token count exceeds the model's maximum context length of 2048 tokens. "
                "You requested a total of 2600 tokens: 2100 tokens from the input messages and 500 "
                "tokens for the completion."
            ),
            TooLong(2100, 2048),
        ),
        (  # llama.cpp's server
            error(
                "request (3505 tokens) exceeds the available context size (512 tokens), try "
                "increasing it",
                code=400,
                type="exceed_context_size_error",
                n_prompt_tokens=3505,
                n_ctx=512,
            ),
            TooLong(3505, 512),
        ),
        (  # OpenAI
            error(
                "This model's maximum context length is 8,192 tokens. However, your messages "
                "resulted in 10,000 tokens.",
                code="context_length_exceeded",
            ),
            TooLong(10000, 8192),
        ),
        (error("too much", code="context_length_exceeded"), TooLong(None, None)),
        (error("too much", code=["context_length_exceeded"], type={}), None),
        (error("temperature must be non-negative, got -1", type="BadRequestError"), None),
        ({}, None),
    ],
)
def test_a_prompt_that_is_too_long_is_recognised_with_its_numbers(
    body: dict[str, Any], found: TooLong | None
) -> None:
    assert refusal(400, body).too_long == found


@pytest.mark.parametrize(
    ("status", "body", "rejected"),
    [
        (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "top_k"],
                           "msg": "Extra inputs are not permitted", "input": 40}]}, True),
        (400, error("Unrecognized request argument supplied: top_k"), True),
        (400, error("Unknown parameter: 'min_p'.", code="unknown_parameter"), True),
        (400, error("The min_p parameter is not yet supported with speculative decoding."), True),
        (400, error("top_k must be -1 (disable), or at least 1, got 0."), False),
        (400, error("Unknown parameter: 'seed'."), False),
        (500, error("unexpected top_k"), False),
    ],
)  # fmt: skip
def test_a_rejected_parameter_is_told_from_a_bad_value(
    status: int, body: dict[str, Any], rejected: bool
) -> None:
    assert refusal(status, body).rejects_parameter(("top_k", "min_p")) is rejected


@pytest.mark.parametrize(
    ("status", "body", "headers", "words"),
    [
        (401, {"error": "Unauthorized"}, {}, "DOTS1_API_KEY.*: Unauthorized$"),
        (404, error("The model `dots1` does not exist."), {}, "no model dots1; .* a, b$"),
        (404, {"detail": "Not Found"}, {}, "--url: Not Found$"),
        (429, error("Too many requests."), {"Retry-After": "7"},
         "busy: Too many requests; .* in 7 s$"),
        (503, b"", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, "busy; try again later$"),
        (308, b"", {"Location": "http://other/v1"}, "redirects to http://other/v1; .*--url"),
        (502, b"<html><h1>Bad Gateway</h1></html>", {}, "error 502$"),
        (400, {"detail": [{"loc": ["body", "messages"], "msg": "Field required"}]}, {},
         "error 400: body.messages: Field required$"),
        (500, b'{"error": {"message": "\\u001b[2J\\u202eone\\n\\ntwo"}}', {},
         r"error 500: \[2J one two$"),
        (500, error("x" * 999), {}, f"error 500: {'x' * 300}…$"),
        (500, b"[" * 100_000, {}, "error 500$"),
        (500, b'{"error": {"message": 7}}', {}, "error 500$"),
    ],
)  # fmt: skip
def test_an_error_is_one_sentence(
    status: int, body: Any, headers: dict[str, str], words: str
) -> None:
    sentence = str(refusal(status, body, headers))
    assert sentence.startswith(URL)
    assert re.search(words, sentence), sentence


@pytest.mark.parametrize(
    ("status", "said", "words"),
    [
        (401, "Incorrect API key provided: s3cret.",
         ("OPENAI_API_KEY", ": Incorrect API key provided: (the key)")),
        (400, "x" * 296 + "s3cret", ("x" * 296 + "(the…",)),
        (302, "", ("http://other/?key=(the key)",)),
    ],
)  # fmt: skip
def test_a_key_is_named_by_its_variable_alone(
    status: int, said: str, words: tuple[str, ...]
) -> None:
    key, onwards = Key("s3cret", "OPENAI_API_KEY"), {"Location": "http://other/?key=s3cret"}
    sentence = str(refusal(status, error(said), onwards, key))
    assert "s3c" not in sentence
    for each in words:
        assert each in sentence
