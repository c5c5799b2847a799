"""Every parameter of llama-server, vLLM, OpenAI and Anthropic: what becomes of it here.

A parameter that changes an answer elsewhere is honoured or refused, never ignored. The lists are
llama.cpp's tools/server/server-schema.cpp, server-common.cpp and README.md (of llama-cpp-python
0.3.36), vLLM's protocol.py of chats and completions, and the reference pages of both companies.
"""

import asyncio
import json
import math
from dataclasses import replace
from typing import Any

import pytest

from dots1_local.engine.engine import Engine
from dots1_local.serve.generation import Finished, GenerationRequest
from tests.helpers import EOS, SPECIALS, TOKENS, scripted_tensors, tokens_of, write_random_gguf
from tests.serve.http.asgi import Deliver, FakeScheduler, Reply, send, serving
from tests.serve.scheduling import open_scheduler

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
HI = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI},
    TEXT: {"prompt": "hi"},
    MESSAGES: {"messages": HI, "max_tokens": 9},
    RESPONSES: {"input": "hi"},
}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
WRITTEN = {"type": "json_schema", "schema": SCHEMA}

# What is honoured: the effect on the generation request.
HONOURED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("n_predict", {"n_predict": 7}, {"max_tokens": 7}),
    ("n_predict without limit", {"n_predict": -1}, {"max_tokens": None}),
    ("n_cmpl", {"n_cmpl": 2}, {"n": 2}),
    ("n", {"n": 2}, {"n": 2}),
    ("stop", {"stop": ["x"]}, {"stop": ("x",)}),
    ("stop_token_ids", {"stop_token_ids": [5, 6]}, {"stop_tokens": frozenset({5, 6})}),
    ("cache_prompt", {"cache_prompt": False}, {"cache_prompt": False}),
    ("temperature", {"temperature": 0.5}, {"sampling.temperature": 0.5}),
    ("top_k", {"top_k": 3}, {"sampling.top_k": 3}),
    ("top_p", {"top_p": 0.5}, {"sampling.top_p": 0.5}),
    ("min_p", {"min_p": 0.5}, {"sampling.min_p": 0.5}),
    ("repeat_penalty", {"repeat_penalty": 1.5}, {"sampling.repeat_penalty": 1.5}),
    ("repetition_penalty", {"repetition_penalty": 1.5}, {"sampling.repeat_penalty": 1.5}),
    ("repeat_last_n", {"repeat_last_n": 9}, {"sampling.repeat_last_n": 9}),
    ("repeat_last_n of all", {"repeat_last_n": -1}, {"sampling.repeat_last_n": 64}),
    ("frequency_penalty", {"frequency_penalty": 1}, {"sampling.frequency_penalty": 1}),
    ("presence_penalty", {"presence_penalty": 1}, {"sampling.presence_penalty": 1}),
    ("seed", {"seed": 3}, {"sampling.seed": 3}),
    ("logit_bias by id", {"logit_bias": {"3": 1}}, {"sampling.logit_bias": ((3, 1),)}),
    ("logit_bias by text", {"logit_bias": {"hi": 1}},
     {"sampling.logit_bias": ((104, 1), (105, 1))}),
    ("logit_bias pairs", {"logit_bias": [[3, -2], ["5", 1]]},
     {"sampling.logit_bias": ((3, -2), (53, 1))}),
    ("logit_bias that bans", {"logit_bias": [[3, False]]},
     {"sampling.logit_bias": ((3, -math.inf),)}),
]  # fmt: skip

# What is refused, with a value that has an effect, and one that has none.
REFUSED_BY_ALL: dict[str, tuple[Any, Any]] = {
    # llama-server
    "adaptive_target": (0.5, -1.0),
    "dry_multiplier": (0.8, 0.0),
    "dynatemp_range": (0.5, 0),
    "grammar_lazy": (True, False),
    "grammar_triggers": ([{"type": 0, "value": "x"}], []),
    "lora": ([{"id": 0, "scale": 1}], []),
    "min_keep": (3, 0),
    "mirostat": (2, 0),
    "n_indent": (4, 0),
    "n_probs": (3, 0),
    "post_sampling_probs": (True, False),
    "preserved_tokens": (["x"], []),
    "response_fields": (["content"], []),
    "return_tokens": (True, False),
    "samplers": (["temperature", "top_k"], ["top_k", "top_p", "min_p", "temperature"]),
    "t_max_predict_ms": (500, 0),
    "t_max_prompt_ms": (500, -1),
    "top_n_sigma": (1.5, -1),
    "typical_p": (0.5, 1.0),
    "xtc_probability": (0.5, 0.0),
    # vLLM
    "allowed_token_ids": ([3], []),
    "bad_words": (["x"], []),
    "cache_salt": ("s", None),
    "ec_transfer_params": ({"a": 1}, {}),
    "guided_whitespace_pattern": (" ", None),
    "include_stop_str_in_output": (True, False),
    "kv_transfer_params": ({"a": 1}, {}),
    "length_penalty": (2, 1.0),
    "logits_processors": (["x"], []),
    "logprob_token_ids": ([3], []),
    "priority": (1, 0),
    "prompt_embeds": ("AAAA", None),
    "repetition_detection": ({"max_pattern_size": 3}, None),
    "return_prompt_text": (True, False),
    "return_token_ids": (True, False),
    "return_tokens_as_token_ids": (True, False),
    "skip_special_tokens": (False, True),
    "structural_tag": ("{}", None),
    "use_beam_search": (True, False),
    "vllm_xargs": ({"a": 1}, {}),
    "watermarking": (True, False),
}
OF_CHATS: dict[str, tuple[Any, Any]] = {
    "add_special_tokens": (True, False),
    "audio": ({"voice": "x"}, None),
    "best_of": (2, 1),
    "chat_template": ("x", None),
    "documents": ([{"title": "x"}], []),
    "echo": (True, False),
    "function_call": ({"name": "f"}, "auto"),
    "functions": ([{"name": "f"}], []),
    "modalities": (["text", "audio"], ["text"]),
    "moderation": ({}, None),
    "web_search_options": ({}, None),
}
ONE_ANSWER: dict[str, tuple[Any, Any]] = {
    "logprobs": (True, False), "n": (2, 1), "n_cmpl": (2, 1), "top_logprobs": (2, 0)
}  # fmt: skip
REFUSED: dict[str, dict[str, tuple[Any, Any]]] = {
    CHAT: {**REFUSED_BY_ALL, **OF_CHATS, "prompt_logprobs": (1, None)},
    TEXT: {**REFUSED_BY_ALL, "chat_template_kwargs": ({"a": 1}, {}), "suffix": ("x", "")},
    MESSAGES: {
        **REFUSED_BY_ALL, **OF_CHATS, **ONE_ANSWER, "container": ("c", None),
        "mcp_servers": ([{"url": "x"}], []),
    },
    RESPONSES: {
        **REFUSED_BY_ALL, **OF_CHATS, **ONE_ANSWER, "background": (True, False),
        "context_management": ([{"type": "compaction"}], []), "conversation": ("c", None),
        "previous_response_id": ("r", None), "prompt": ({"id": "p"}, None),
        "include": (["message.output_text.logprobs"], ["reasoning.encrypted_content"]),
    },
}  # fmt: skip

# What is accepted without effect, and why.
HARMLESS: dict[str, tuple[Any, str]] = {
    # what changes speed or how the answer is cut into chunks, and no text
    "backend_sampling": (True, "speed"),
    "id_slot": (3, "slots share what they hold"),
    "n_cache_reuse": (256, "speed"),
    "return_mm_kwargs": (True, "only where vLLM renders prompts"),
    "return_token_offsets": (True, "only where vLLM renders prompts"),
    "sse_ping_interval": (-1, "comments"),
    "stream_interval": (5, "chunks"),
    "timings_per_token": (True, "the last chunk has them"),
    "verbose": (True, "debugging"),
    # what steers something that is off here
    "adaptive_decay": (0.5, "adaptive_target is off"),
    "dry_allowed_length": (3, "dry_multiplier is 0"),
    "dry_base": (2, "dry_multiplier is 0"),
    "dry_penalty_last_n": (64, "dry_multiplier is 0"),
    "dry_sequence_breakers": (["\n"], "dry_multiplier is 0"),
    "dynatemp_exponent": (1.5, "dynatemp_range is 0"),
    "mirostat_eta": (0.1, "mirostat is 0"),
    "mirostat_tau": (5.0, "mirostat is 0"),
    "n_discard": (1, "the context is never shifted"),
    "n_keep": (1, "the context is never shifted"),
    "xtc_threshold": (0.1, "xtc_probability is 0"),
    "guided_decoding_backend": ("xgrammar", "llguidance does it"),
    "media_io_kwargs": ({}, "no media"),
    "mm_processor_kwargs": ({}, "no media"),
    "routed_experts_prompt_start": (3, "experts are not returned"),
    "spaces_between_special_tokens": (False, "special tokens are not text"),
    # what the model does not have: it does not think
    "include_reasoning": (False, "no thinking"),
    "reasoning_budget_tokens": (5, "no thinking"),
    "reasoning_effort": ("high", "no thinking"),
    "reasoning_format": ("auto", "no thinking"),
    "thinking": ({"type": "enabled", "budget_tokens": 1024}, "no thinking"),
    "thinking_budget_tokens": (5, "no thinking"),
    "thinking_token_budget": (5, "no thinking"),
    "verbosity": ("low", "no such model"),
    # what names the request or its user
    "metadata": ({"a": "b"}, "a name"),
    "prediction": ({"type": "content", "content": "x"}, "speed"),
    "prompt_cache_key": ("k", "a name"),
    "prompt_cache_retention": ("24h", "speed"),
    "request_id": ("r", "a name"),
    "safety_identifier": ("u", "a name"),
    "service_tier": ("auto", "speed"),
    "session_id": ("s", "a name"),
    "store": (True, "nothing is stored"),
    "user": ("me", "a name"),
}
ALSO_HARMLESS: list[tuple[str, str, Any]] = [
    (RESPONSES, "truncation", "auto"),
    (RESPONSES, "max_tool_calls", 3),
    (RESPONSES, "reasoning", {"effort": "low"}),
    (RESPONSES, "text", {"verbosity": "low"}),
    (RESPONSES, "stream_options", {"include_obfuscation": False}),
    (MESSAGES, "context_management", {"edits": [{"type": "clear_thinking_20251015"}]}),
    (MESSAGES, "output_config", {"effort": "low"}),
    (MESSAGES, "inference_geo", "us"),
    (MESSAGES, "cache_control", {"type": "ephemeral"}),
]


def finish(requests: Any, deliver: Deliver) -> None:
    for index, each in enumerate(requests):
        deliver(Finished(index, "stop", len(each.prompt), 0, 1))


def ask(app: Any, path: str, **fields: Any) -> Reply:
    return asyncio.run(send(app, path, {**BODIES[path], **fields}))


@pytest.fixture
def request_of(app: Any, scheduler: FakeScheduler) -> Any:
    """A function that sends a body and returns the requests of its choices."""
    scheduler.script = finish

    def requested(path: str, **fields: Any) -> list[GenerationRequest]:
        reply = ask(app, path, **fields)
        assert reply.status == 200, reply.body
        return scheduler.requests

    return requested


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
@pytest.mark.parametrize(("fields", "effect"), [case[1:] for case in HONOURED])
def test_what_is_honoured_reaches_the_scheduler(
    request_of: Any, path: str, fields: dict[str, Any], effect: dict[str, Any]
) -> None:
    if path == RESPONSES and "n" in effect:
        return  # it has one answer
    [usual] = request_of(path)
    found = request_of(path, **fields)
    count = effect.get("n", 1)
    changes = {name: value for name, value in effect.items() if name != "n"}
    sampling = {
        name.removeprefix("sampling."): value for name, value in changes.items() if "." in name
    }
    others = {name: value for name, value in changes.items() if "." not in name}
    wanted = replace(usual, sampling=replace(usual.sampling, **sampling), **others)
    assert found == [wanted] * count


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, names in REFUSED.items() for name in names]
)
def test_what_is_refused_is_named_and_its_default_is_not(
    app: Any, request_of: Any, path: str, name: str
) -> None:
    effect, harmless = REFUSED[path][name]
    reply = ask(app, path, **{name: effect})
    assert reply.status == 400
    assert name in reply.error["message"]
    assert "param" not in reply.error or reply.error["param"] == name
    assert request_of(path, **{name: harmless}) == request_of(path)


@pytest.mark.parametrize("path", BODIES)
def test_null_is_a_default(request_of: Any, path: str) -> None:
    assert request_of(path, **dict.fromkeys(REFUSED[path])) == request_of(path)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_changes_nothing(request_of: Any, path: str, name: str) -> None:
    assert request_of(path, **{name: HARMLESS[name][0]}) == request_of(path)


@pytest.mark.parametrize(("path", "name", "value"), ALSO_HARMLESS)
def test_what_is_harmless_in_one_api_changes_nothing(
    request_of: Any, path: str, name: str, value: Any
) -> None:
    assert request_of(path, **{name: value}) == request_of(path)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"n_predict": 7, "max_tokens": 8}),
        (CHAT, {"n_predict": 0}),
        (TEXT, {"n": 2, "n_cmpl": 3}),
        (TEXT, {"json_schema": SCHEMA, "grammar": 'root ::= "a"'}),
        (TEXT, {"ignore_eos": True, "response_format": {"type": "json_object"}}),
        (TEXT, {"truncate_prompt_tokens": 0}),
        (TEXT, {"stop_token_ids": [100_000]}),
        (TEXT, {"logit_bias": [[100_000, 1]]}),
        (TEXT, {"structured_outputs": {"structural_tag": "x"}}),
        (TEXT, {"grammar": "root ::= ["}),
        (TEXT, {"grammar": "root ::= " + "(" * 5000}),
        (TEXT, {"grammar": "".join(f'r{n} ::= r{n + 1} "a"\n' for n in range(5000))}),
        (TEXT, {"guided_regex": "("}),
        (TEXT, {"guided_regex": "a?" * 20_000}),
        (TEXT, {"guided_choice": []}),
        (CHAT, {"response_format": {"type": "text", "schema": SCHEMA}}),
        (CHAT, {"chat_template_kwargs": {"messages": []}}),
        (CHAT, {"tools": [{"function": {"name": "f"}}], "guided_regex": "a"}),
        (CHAT, {"messages": [{**HI[0], "prefix": True}]}),
        (MESSAGES, {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}),
    ],
)
def test_what_contradicts_or_is_wrong_is_refused(app: Any, path: str, fields: Any) -> None:
    reply = ask(app, path, **fields)
    assert reply.status == 400, reply.body
    assert path == MESSAGES or reply.error["param"].split("[")[0].split(".")[0] in fields


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that, asked anything, would say "ab" and end."""
    path = tmp_path_factory.mktemp("talking") / "model.gguf"
    write_random_gguf(path, tensors=scripted_tensors([*tokens_of("ab"), EOS]))
    with open_scheduler(path, slots=2, n_ctx=64) as scheduler:
        yield serving(scheduler.engine, scheduler)


def said(app: Any, path: str, **fields: Any) -> str:
    found = ask(app, path, temperature=0, **fields)
    assert found.status == 200, found.body
    if path == MESSAGES:
        return "".join(block["text"] for block in found.json["content"])
    if path == RESPONSES:
        return "".join(part["text"] for item in found.json["output"] for part in item["content"])
    choice = found.json["choices"][0]
    return str(choice["text"] if path == TEXT else choice["message"]["content"])


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"response_format": {"type": "json_object", "schema": SCHEMA}}),
        (CHAT, {"response_format": WRITTEN}),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
        (CHAT, {"json_schema": SCHEMA}),
        (CHAT, {"guided_json": SCHEMA}),
        (TEXT, {"guided_json": json.dumps(SCHEMA)}),
        (TEXT, {"structured_outputs": {"json": SCHEMA}}),
        (MESSAGES, {"output_config": {"format": WRITTEN}}),
        (MESSAGES, {"output_format": WRITTEN}),
        (RESPONSES, {"text": {"format": {**WRITTEN, "name": "x"}}}),
        (RESPONSES, {"json_schema": SCHEMA}),
    ],
)
def test_a_schema_is_kept_to_by_every_name(talking: Any, path: str, fields: Any) -> None:
    limit = {MESSAGES: "max_tokens", RESPONSES: "max_output_tokens"}.get(path, "n_predict")
    bias = {"logit_bias": [[" \t\n", False]]}  # the model would write nothing but white space
    assert json.loads(said(talking, path, **{limit: 40}, **bias, **fields)) == {"a": 1}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, "ab"),
        ({"grammar": 'root ::= "c" [d-d] "e"'}, "cde"),
        ({"guided_grammar": 'root ::= "x" | "x"'}, "x"),
        ({"guided_regex": "b(cd){2}"}, "bcdcd"),
        ({"guided_choice": ["no", "no"]}, "no"),
        ({"structured_outputs": {"choice": ["yes"]}}, "yes"),
        ({"structured_outputs": {"regex": "[y]"}}, "y"),
        ({"structured_outputs": {"grammar": 'root ::= "z"'}}, "z"),
        ({"stop_token_ids": tokens_of("b")}, "a"),
        ({"logit_bias": {"a": False}, "guided_choice": ["a", "b"]}, "b"),
        ({"n_predict": 1}, "a"),
    ],
)
def test_the_answer_is_as_asked(talking: Any, fields: Any, wanted: str) -> None:
    assert said(talking, CHAT, **fields) == wanted


def test_an_answer_ends_as_late_as_asked(talking: Any) -> None:
    def length(**fields: Any) -> Any:
        reply = ask(talking, CHAT, temperature=0, **fields).json
        return reply["usage"]["completion_tokens"], reply["choices"][0]["finish_reason"]

    assert length() == (3, "stop")
    assert length(min_tokens=8)[0] > 8
    assert length(ignore_eos=True, max_tokens=20) == (20, "length")
    assert length(min_tokens=2) == (3, "stop")


def test_no_tokens_are_written_if_none_are_asked_for(talking: Any) -> None:
    reply = ask(talking, TEXT, max_tokens=0).json
    assert reply["choices"][0]["text"] == ""
    assert reply["usage"]["completion_tokens"] == 0


def test_a_prompt_is_computed_anew_if_asked(talking: Any) -> None:
    def cached(**fields: Any) -> Any:
        usage = ask(talking, TEXT, prompt="x" * 40, max_tokens=1, **fields).json["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    cached()
    assert cached() == 39
    assert cached(cache_prompt=False) == 0
    assert cached() == 39


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, "efg"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "abc"),
        ({"truncate_prompt_tokens": 99}, "abcdefg"),
        ({"truncate_prompt_tokens": -1}, "abcdefg"),
    ],
)
def test_a_prompt_is_truncated_as_asked(request_of: Any, fields: Any, kept: str) -> None:
    [found] = request_of(TEXT, prompt="abcdefg", **fields)
    assert found.prompt == tuple(tokens_of(kept))


def test_a_prompt_is_truncated_to_the_room_beside_the_answer(request_of: Any) -> None:
    [found] = request_of(TEXT, prompt="x" * 200, truncate_prompt_tokens=-1, max_tokens=10)
    assert len(found.prompt) == 54  # of a context of 64


def test_the_marked_last_message_is_continued(request_of: Any) -> None:
    begun = {"role": "assistant", "content": "yo"}
    [found] = request_of(CHAT, messages=[*HI, {**begun, "prefix": True}])
    assert found.prompt[-2:] == tuple(tokens_of("yo"))


def test_the_template_reads_its_variables(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("template") / "model.gguf"
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ mood }}<|response|>"
    fake: Any = FakeScheduler(finish)
    with Engine.open(write_random_gguf(path, template=template), n_ctx=64, threads=1) as engine:
        app = serving(engine, fake)
        given = {"mood": "!?", "unread": SPECIALS[0]}
        assert ask(app, CHAT, chat_template_kwargs=given).status == 200
        assert fake.requests[0].prompt[-3:] == (*tokens_of("!?"), TOKENS.index("<|response|>"))
        refused = ask(app, CHAT, chat_template_kwargs={"mood": SPECIALS[0]})
        assert (refused.status, refused.error["param"]) == (400, "chat_template_kwargs")


def test_texts_are_tokenised_in_llama_servers_form(app: Any) -> None:
    def tokens(**fields: Any) -> Any:
        reply = asyncio.run(send(app, "/tokenize", fields))
        assert reply.status == 200, reply.body
        return reply.json

    marker = SPECIALS[3]
    assert tokens(content="hi") == {"tokens": tokens_of("hi")}
    assert tokens(content=marker) == {"tokens": [TOKENS.index(marker)]}
    assert len(tokens(content=marker, parse_special=False)["tokens"]) > 5
    assert tokens(content="é", with_pieces=True)["tokens"] == [
        {"id": 0xC3, "piece": [0xC3]}, {"id": 0xA9, "piece": [0xA9]}
    ]  # fmt: skip
    assert tokens(content="") == {"tokens": []}
    assert tokens(prompt="hi")["count"] == 2  # vLLM's form
    back = asyncio.run(send(app, "/detokenize", {"tokens": tokens_of("hi")})).json
    assert back == {"content": "hi", "prompt": "hi"}
    both = asyncio.run(send(app, "/tokenize", {"content": "a", "prompt": "b"}))
    assert (both.status, both.error["param"]) == (400, "content")
