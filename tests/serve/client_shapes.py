"""Requests as Open WebUI, Continue, aider and LibreChat send them, read from their sources.

Each comment names the file and the commit that a shape was read from. litellm 1.110.2,
@langchain/openai 1.5.8 and @continuedev/openai-adapters 1.37.0, which aider, LibreChat and Continue
send with, were seen to send the same. Texts are the tests' own; temperature 0 makes an answer that
of a `Session`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BEGUN", "SHAPES", "WEBUI_HEADERS", "Shape"]

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
ASKED = "Tell me a story about a little cat."
TALK: list[Any] = [SYSTEM, {"role": "user", "content": ASKED}]
BEGUN = "..."  # in a shape, for the beginning of the story
IMAGE = {"url": "data:image/png;base64,iVBORw0KGgo="}
CITY = {"type": "object", "properties": {"city": {"enum": ["Ulm", "Paris"]}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "The weather.", "parameters": CITY}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"name": "weather", "arguments": '{"city": "Ulm"}'}
NAMED = {"type": "function", "function": {"name": "weather"}}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Shape:
    """A request and what comes back: the `story`, its `rest`, a `text`, a `call` or `any` of these.

    A refusal is its status and a word of its message.
    """

    name: str
    body: Mapping[str, Any]
    wanted: str | tuple[int, str] = "story"
    path: str = CHAT
    headers: Mapping[str, str] = field(default_factory=dict)


# Open WebUI, backend/open_webui/routers/openai.py at 671f577264ed5bed6ec2c7cf97703b450a6ce2ec;
# with ENABLE_FORWARD_USER_INFO_HEADERS it adds the user's.
WEBUI_HEADERS = {
    "X-OpenWebUI-User-Name": "Ada%20L",
    "X-OpenWebUI-User-Id": "6f1c",
    "X-OpenWebUI-User-Email": "ada@example.org",
    "X-OpenWebUI-User-Role": "user",
    "X-OpenWebUI-Chat-Id": "c0ffee",
}
WEBUI = [
    Shape(
        "Open WebUI: a message, with the model's parameters set",
        {
            "stream": True,
            "model": "dots1",
            "messages": TALK,
            "temperature": 0.0,
            "top_p": 0.9,
            "max_tokens": 24,
            "frequency_penalty": 0.0,
            "seed": 42,
            "stop": ["<|im_end|>"],
            "logit_bias": {"1234": 0},
            "stream_options": {"include_usage": True},
            "user": {"name": "Ada L", "id": "6f1c", "email": "ada@example.org", "role": "user"},
        },
        headers=WEBUI_HEADERS,
    ),
    # src/lib/components/chat/Chat.svelte at 002b16df89715ad3e5d5ae9f39f5e5764f064d61; a proxy or a
    # pipeline in between may pass on what the page sends to Open WebUI's own server.
    Shape(
        "Open WebUI: all that its page sends",
        {
            "stream": True,
            "model": "dots1",
            "messages": TALK,
            "params": {"format": None, "keep_alive": None},
            "files": [{"type": "collection", "id": "k1", "name": "notes"}],
            "tool_ids": ["calculator"],
            "features": {"image_generation": False, "web_search": False},
            "session_id": "Zx8yW",
            "chat_id": "c0ffee",
            "id": "0b5a",
            "background_tasks": {"title_generation": True, "tags_generation": True},
            "stream_options": {"include_usage": True},
            "metadata": {"user_id": "6f1c", "chat_id": "c0ffee"},
            "options": {"num_ctx": 8192},
            "temperature": 0,
            "max_tokens": 24,
        },
    ),
    Shape(
        "Open WebUI: continue response",
        {
            "stream": True,
            "model": "dots1",
            "messages": [*TALK, {"role": "assistant", "content": BEGUN}],
            "temperature": 0,
            "max_tokens": 8,
        },
        "rest",
    ),
    Shape(
        "Open WebUI: an image",
        {
            "stream": True,
            "model": "dots1",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is this?"},
                        {"type": "image_url", "image_url": IMAGE},
                    ],
                }
            ],
        },
        (400, "reads only text"),
    ),
    # backend/open_webui/routers/tasks.py at 074d48839d00c84107a99e43e2d36a9413e027a5
    Shape(
        "Open WebUI: the title of a chat",
        {
            "model": "dots1",
            "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title."}],
            "stream": False,
            "max_completion_tokens": 24,
            "metadata": {
                "task": "title_generation",
                "task_body": {"messages": []},
                "chat_id": None,
            },
        },
        "text",
    ),
]

# Continue, core/llm/openaiTypeConverters.ts at 0228b897b83e77ea032c9b9a797ba8aba4cad1da, and
# packages/openai-adapters/src/apis/OpenAI.ts at 023111db46abd5620dc79ad62350ccb0002a53ff
CONTINUE = [
    Shape(
        "Continue: a chat",
        {
            "messages": TALK,
            "model": "dots1",
            "max_tokens": 24,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        headers={"x-stainless-lang": "js", "Accept": "application/json", "api-key": "secret"},
    ),
    Shape(
        "Continue: the agent after a tool's result",
        {
            "messages": [
                *TALK,
                {
                    "role": "assistant",
                    "content": " ",
                    "tool_calls": [{"id": "call_1", "type": "function", "function": CALL}],
                },
                {"role": "tool", "content": "Rain.", "tool_call_id": "call_1"},
            ],
            "model": "dots1",
            "max_tokens": 60,
            "temperature": 0,
            "stream": True,
            "tools": [{"type": "function", "function": {**FUNCTION, "strict": False}}],
            "parallel_tool_calls": False,
            "stream_options": {"include_usage": True},
        },
        "any",
    ),
    Shape(
        "Continue: an image",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is this?"},
                        {"type": "image_url", "image_url": {**IMAGE, "detail": "auto"}},
                    ],
                }
            ],
            "model": "dots1",
            "stream": True,
        },
        (400, "reads only text"),
    ),
    # core/autocomplete/templating/AutocompleteTemplate.ts at
    # 3d08fc96bfd93ca315fde2c06d7ee1aa0e4a99f0 for a model that it does not know, and
    # getStopTokens.ts at 2ae584e8c8f262039172aa2e2588a26257650a52
    Shape(
        "Continue: autocomplete",
        {
            "prompt": "<fim_prefix>def add(a, b):\n    return <fim_suffix>\n<fim_middle>",
            "model": "dots1",
            "max_tokens": 24,
            "temperature": 0.01,
            "stream": True,
            "stop": [
                "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>", "<|endoftext|>",
                "</fim_middle>", "</code>", "\n\n", "\r\n\r\n", "/src/", "#- coding: utf-8", "```",
            ],
        },
        "text",
        COMPLETIONS,
    ),
    Shape(
        "Continue: autocomplete by a provider that fills in the middle",
        {
            "model": "dots1",
            "prompt": "def add(a, b):\n    return ",
            "suffix": "\n",
            "max_tokens": 24,
            "stop": ["\n\n"],
            "stream": True,
        },
        (404, "/v1/completions"),
        "/v1/fim/completions",
        {"x-api-key": "", "Accept": "application/json"},
    ),
    Shape(
        "Continue: a suffix",
        {"model": "dots1", "prompt": "def add(a, b):", "suffix": "\n", "stream": True},
        (400, "suffix"),
        COMPLETIONS,
    ),
]  # fmt: skip

# aider, aider/models.py at f5e88087702d35229c5b7fae2307b3f0e95da504;
# the user may set reasoning_effort and max_tokens.
AIDER = [
    Shape(
        "aider: an edit",
        {
            "model": "dots1",
            "messages": TALK,
            "stream": True,
            "temperature": 0,
            "reasoning_effort": "low",
            "max_tokens": 24,
        },
    ),
    Shape(
        "aider: a commit message",
        {"model": "dots1", "messages": TALK, "temperature": 0, "max_tokens": 24},
    ),
    Shape(
        "aider: an edit by a function",
        {
            "model": "dots1",
            "messages": TALK,
            "temperature": 0,
            "tools": [TOOL],
            "tool_choice": NAMED,
        },
        "call",
    ),
    # aider/coders/base_coder.py at 16856bb4caa80b527219a0ae0b24c52881569553, after an answer whose
    # finish_reason was "length"; later versions add `prefix`.
    Shape(
        "aider: the rest of an answer",
        {
            "model": "dots1",
            "messages": [*TALK, {"role": "assistant", "content": BEGUN, "prefix": True}],
            "stream": True,
            "temperature": 0,
            "max_tokens": 8,
        },
        "rest",
    ),
]

# LibreChat, packages/api/src/endpoints/openai/llm.ts at f31d896770494965500bc3c3659b8f75a1f67e00,
# which hands its options to langchainjs, libs/providers/langchain-openai/src/chat_models/
# completions.ts at 03562e1b6225475a748f776cfbe4e31d6c146fbd
LIBRECHAT = [
    Shape(
        "LibreChat: a message",
        {
            "model": "dots1",
            "temperature": 0,
            "top_p": 1,
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "user": "65a1",
            "stream": True,
            "stream_options": {"include_usage": True},
            "reasoning_effort": "medium",
            "max_tokens": 24,
            "messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": ASKED}]}],
        },
    ),
    Shape(
        "LibreChat: an agent after a tool's result",
        {
            "model": "dots1",
            "user": "65a1",
            "stream": True,
            "tools": [TOOL],
            "stream_options": {"include_usage": True},
            "max_tokens": 60,
            "temperature": 0,
            "messages": [
                *TALK,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "call_1", "type": "function", "function": CALL}],
                },
                {
                    "role": "tool",
                    "content": "Rain.",
                    "name": "weather",
                    "tool_call_id": "call_1",
                },
            ],
        },
        "any",
    ),
    Shape(
        "LibreChat: a title by a function",
        {
            "model": "dots1",
            "temperature": 0.2,
            "stream": False,
            "tools": [TOOL],
            "tool_choice": NAMED,
            "messages": [{"role": "user", "content": "Write a title."}],
        },
        "call",
    ),
    # api/app/clients/OpenAIClient.js at 02fdca7772483807e99024ca9b5e8bf0c2a216fb
    Shape(
        "LibreChat: a title",
        {
            "model": "dots1",
            "temperature": 0.2,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "max_tokens": 16,
            "messages": [{"role": "system", "content": "Please generate a title.\n\n||>Title:"}],
        },
        "text",
    ),
]
SHAPES = [*WEBUI, *CONTINUE, *AIDER, *LIBRECHAT]
