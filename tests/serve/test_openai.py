"""A real server, with requests from the official client."""

import json
import shlex
import subprocess
from collections.abc import Iterator
from shutil import which
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from dots1_local.engine.engine import Engine
from tests.conftest import Converted
from tests.serve.served import Served

MODEL: dict[str, Any] = {"model": "dots1", "temperature": 0}
STORY: list[Any] = [{"role": "user", "content": "Tell me a story about a little cat."}]
# The command on the model card, except for the host.
CURL = """
curl URL/chat/completions \
    -H "Content-Type: application/json" \
    -d '{
        "model": "dots1",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Who won the world series in 2020?"}
        ],
        "max_tokens": 32,
        "temperature": 0
    }'
"""


@pytest.fixture(scope="module")
def served(converted: Converted) -> Iterator[Served]:
    with Served(converted("DQ4"), "--parallel", "2") as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.url, api_key="none", max_retries=0) as opened:
        yield opened


def test_the_models_are_listed(client: OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == client.models.retrieve("dots1").id == "dots1"
    assert model.model_extra
    assert model.model_extra["max_model_len"] == model.model_extra["meta"]["n_ctx"] == 2048


def test_the_slots_are_listed(served: Served) -> None:
    status, body = served.get("/slots")
    assert status == 200
    assert [(slot["id"], slot["busy"]) for slot in json.loads(body)] == [(0, False), (1, False)]


def test_a_stream_tells_its_progress_and_timings(client: OpenAI, story: str) -> None:
    """The client's own accumulator must not trip over what OpenAI does not send."""
    progress, timings = [], []
    stop = story[-4:]  # the client's stream raises an error where `max_tokens` ends an answer
    asked: dict[str, Any] = {"messages": STORY, "stop": stop, **MODEL}
    extra = {"return_progress": True, "stream_options": {"include_usage": True}}
    with client.chat.completions.stream(**asked, extra_body=extra) as stream:
        for event in stream:
            if event.type == "chunk":
                more = event.chunk.model_extra or {}
                progress += [more[key] for key in ("prompt_progress",) if key in more]
                timings += [more[key] for key in ("timings",) if key in more]
        answer = stream.get_final_completion()
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", story[: story.index(stop)])
    first, *_, last = progress
    assert first["processed"] == first["cache"]
    assert last["processed"] == last["total"]
    [found] = timings
    assert found["cache_n"] + found["prompt_n"] == last["total"]
    assert answer.usage
    assert found["predicted_n"] == answer.usage.completion_tokens
    speed = (found["predicted_n"] - 1) / found["predicted_ms"] * 1000
    assert found["predicted_per_second"] == pytest.approx(speed)


def test_an_answer_equals_a_sessions(client: OpenAI, story: str) -> None:
    answer = client.chat.completions.create(**MODEL, messages=STORY, max_tokens=24)
    assert answer.choices[0].message.content == story
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_a_stream_is_the_same_answer(client: OpenAI, story: str) -> None:
    chunks = list(
        client.chat.completions.create(
            **MODEL,
            messages=STORY,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    *others, last = chunks
    assert others[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in others) == story
    reasons = [chunk.choices[0].finish_reason for chunk in others]
    assert reasons == [None] * (len(others) - 1) + ["length"]
    assert len(others) > 20  # the text came in pieces
    assert [chunk.usage for chunk in others] == [None] * len(others)
    assert last.choices == []
    assert last.usage
    assert last.usage.completion_tokens == 24


def test_the_client_accumulates_a_stream(client: OpenAI, story: str) -> None:
    beginning, end = story[:-4], story[-4:]
    with client.chat.completions.stream(**MODEL, messages=STORY, stop=end) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        assert "".join(deltas) == beginning
        assert stream.get_final_completion().choices[0].message.content == beginning


def test_usage_counts_cached_tokens(client: OpenAI) -> None:
    def ask() -> Any:
        return client.completions.create(**MODEL, prompt="Tom and Sue ate cake." * 9, max_tokens=2)

    first, again = ask(), ask()
    assert again.usage.prompt_tokens_details.cached_tokens > 40
    assert again.choices[0].text == first.choices[0].text


def test_answers_end_before_a_stop_string(client: OpenAI, story: str) -> None:
    word = story.split()[5]
    answer = client.chat.completions.create(**MODEL, messages=STORY, stop=["zebra", word])
    assert answer.choices[0].message.content == story[: story.index(word)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_seed_makes_answers_repeatable_and_choices_differ(client: OpenAI) -> None:
    def ask(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model="dots1", messages=STORY, temperature=1.5, seed=seed, n=2, max_tokens=24
        )
        return [choice.message.content for choice in answer.choices]

    assert ask(1) == ask(1) != ask(2)
    assert len(set(ask(1))) == 2


def test_every_token_has_logprobs(client: OpenAI, story: str) -> None:
    answer = client.chat.completions.create(
        **MODEL, messages=STORY, max_tokens=24, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert len(logprobs.content) == 24
    assert b"".join(bytes(each.bytes or ()) for each in logprobs.content).decode() == story
    for each in logprobs.content:
        assert len(each.top_logprobs) == 3
        assert each.top_logprobs[0].token == each.token  # at temperature 0
        assert each.top_logprobs[0].logprob == each.logprob <= 0


def test_completions_have_the_older_logprobs_format(client: OpenAI) -> None:
    prompts = ["Once upon a", "Tom had a"]
    answer = client.completions.create(**MODEL, prompt=prompts, max_tokens=6, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        found = choice.logprobs
        assert found
        assert found.tokens
        assert found.text_offset
        assert found.top_logprobs
        assert "".join(found.tokens) == choice.text
        for token, offset, top in zip(
            found.tokens, found.text_offset, found.top_logprobs, strict=True
        ):
            assert choice.text[offset:].startswith(token)
            assert token in top
            assert len(top) == 2


def test_an_echo_begins_with_the_prompt(client: OpenAI) -> None:
    plain = client.completions.create(**MODEL, prompt="Once upon a", max_tokens=6)
    echoed = client.completions.create(
        **MODEL, prompt="Once upon a", max_tokens=6, echo=True, stream=True
    )
    text = "".join(chunk.choices[0].text for chunk in echoed)
    assert text == "Once upon a" + plain.choices[0].text


def test_a_bias_forbids_a_token(client: OpenAI, converted: Converted, story: str) -> None:
    with Engine.open(converted("DQ4"), threads=1) as engine:
        [first, *_] = engine.tokenize(story, special=False)
    answer = client.chat.completions.create(
        **MODEL, messages=STORY, max_tokens=1, logit_bias={str(first): -100}
    )
    assert not story.startswith(answer.choices[0].message.content or "")


class Pet(BaseModel):
    name: str = Field(max_length=12)  # a small model may write an endless one
    age: int = Field(ge=0, le=99)
    tame: bool


PET: Any = {
    "type": "json_schema",
    "json_schema": {"name": "pet", "schema": Pet.model_json_schema()},
}


def test_json_matches_the_schema(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="dots1", messages=STORY, response_format=Pet, seed=1, max_tokens=400
    )
    assert isinstance(answer.choices[0].message.parsed, Pet)


def test_a_document_can_be_begun(client: OpenAI) -> None:
    beginning = '{"name": "Tom", "age": 4'
    begun = [*STORY, {"role": "assistant", "content": beginning}]
    options: Any = {"model": "dots1", "response_format": PET, "max_tokens": 60, "temperature": 0}
    answer = client.chat.completions.create(messages=begun, **options)
    pet = Pet.model_validate_json(beginning + (answer.choices[0].message.content or ""))
    assert pet.name == "Tom"
    begun[-1]["content"] = "Tom"
    with pytest.raises(openai.BadRequestError, match="begin"):
        client.chat.completions.create(messages=begun, **options)


def test_json_can_be_any_object(client: OpenAI) -> None:
    # A small model may write an endless string; cut off, it is still the beginning of JSON.
    answer = client.chat.completions.create(
        **MODEL, messages=STORY, response_format={"type": "json_object"}, max_tokens=60
    )
    choice = answer.choices[0]
    assert choice.message.content
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_errors_become_the_clients_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=STORY)
    with pytest.raises(openai.BadRequestError, match="top_p") as refused:
        client.chat.completions.create(model="dots1", messages=STORY, top_p=2)
    assert refused.value.param == "top_p"
    with pytest.raises(openai.BadRequestError, match="2048 tokens") as too_long:
        client.completions.create(model="dots1", prompt="cat " * 3000)
    assert too_long.value.code == "context_length_exceeded"


@pytest.mark.skipif(not which("curl"), reason="there is no curl")
def test_the_cards_curl_works_unchanged(served: Served) -> None:
    command = shlex.split(CURL.replace("URL", served.url))
    found = subprocess.run([*command, "-s"], capture_output=True, check=True, timeout=60)
    answer = json.loads(found.stdout)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] <= 32
