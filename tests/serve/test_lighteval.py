"""What lighteval 0.13.0 sends and reads, as recorded from its source; it is not installed.

Its LiteLLM client (`lighteval endpoint litellm`, models/endpoints/litellm_model.py) is the one for
servers of OpenAI's API, and only lets models write. Its vLLM client (models/vllm/vllm_model.py)
scores endings by `prompt_logprobs`, which /v1/completions takes and returns in vLLM's form.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dots1ForCausalLM

from tests.conftest import Converted
from tests.serve.served import Served
from tests.serve.transformers_scores import log_likelihood

MESSAGES = [  # prompt_manager.py: few-shot examples are turns
    {"role": "user", "content": "The little cat sat on the"},
    {"role": "assistant", "content": "mat."},
    {"role": "user", "content": "Once upon a time there was a"},
]
ENDINGS = (" girl named Lily.", " potato", " little boy")


@pytest.fixture(scope="module")
def served(converted: Converted) -> Iterator[Served]:
    with Served(converted("F32"), "-c", "512", "--parallel", "2") as server:
        yield server


def post(served: Served, path: str, **body: Any) -> tuple[int, Any]:
    connection = served.connect()
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@pytest.mark.parametrize(
    "given",
    [
        {"n": 1, "temperature": 0.0, "stop": ["\n\n", "Question:"], "logprobs": False},
        {"n": 2, "temperature": 0.6, "top_p": 0.95, "seed": 42, "frequency_penalty": 0.1},
        {"n": 1, "temperature": 0.0, "stop": [], "repetition_penalty": 1.1, "logprobs": True},
    ],
)
def test_the_litellm_client_lets_the_model_write(served: Served, given: dict[str, Any]) -> None:
    # Both names of the limit, a response_format, and what LiteLLM passes on in every request.
    limits = {"max_tokens": 12, "max_completion_tokens": 12}
    body = {"model": "dots1", "messages": MESSAGES, "response_format": {"type": "text"}}
    status, reply = post(served, "/v1/chat/completions", **body, **limits, **given)
    assert status == 200
    # It reads these, and asks again without its cache if the first text is empty.
    texts = [choice["message"]["content"] for choice in reply["choices"]]
    assert len(texts) == given["n"]
    assert all(isinstance(text, str) and text for text in texts)
    assert all(choice["message"].get("reasoning_content") is None for choice in reply["choices"])


def test_the_vllm_client_scores_endings_by_prompt_logprobs(
    served: Served, tiny: Path, tokenize: Callable[[str], list[int]]
) -> None:
    model = Dots1ForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    context = tokenize("Once upon a time there was a")
    continuations = [tokenize(ending) for ending in ENDINGS]
    greedy = context[:]  # an ending that is the likeliest, token by token
    for _ in range(3):
        with torch.inference_mode():
            greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
    continuations.append(greedy[len(context) :])
    # _generate(generate=False): temperature 0, prompt_logprobs 1, max_tokens 1; prompts are tokens.
    prompts = [context + continuation for continuation in continuations]
    asked = {"temperature": 0, "prompt_logprobs": 1, "max_tokens": 1}
    status, reply = post(served, "/v1/completions", model="dots1", prompt=prompts, **asked)
    assert status == 200
    for choice, continuation in zip(reply["choices"], continuations, strict=True):
        # _loglikelihood_tokens: from the end, the entry of each token of the continuation.
        found = [
            entry[str(token)]
            for token, entry in zip(
                continuation[::-1], choice["prompt_logprobs"][::-1], strict=False
            )
        ]
        total, likeliest = log_likelihood(model, context, continuation)
        assert sum(each["logprob"] for each in found) == pytest.approx(total, abs=0.05)
        assert all(each["rank"] == 1 for each in found) == likeliest
    assert likeliest
