"""The body of a request, in OpenAI's parameters and the few that open engines add to them."""

from collections.abc import Mapping, Sequence
from typing import Any

from dots1_local.chat.message import Message
from dots1_local.chat.sampling import Sampling

__all__ = ["GROUPS", "prompt_of", "sampling_of"]

# Parameters that a server may not know; each group may be left out as a whole.
GROUPS = (
    ("top_k", "min_p", "repetition_penalty", "repeat_penalty"),
    ("stream_options",),
)


def prompt_of(messages: Sequence[Message], *, raw: bool) -> tuple[str, dict[str, Any]]:
    """The endpoint's path that answers the messages, and the parameters that hold them.

    Where there is no system prompt, an empty one is sent, as servers and templates else put in
    their own.
    """
    if raw:
        return "completions", {"prompt": "".join(message.text for message in messages)}
    if not any(message.role == "system" for message in messages):
        messages = [Message("system", ""), *messages]
    said = [{"role": message.role, "content": message.text} for message in messages]
    return "chat/completions", {"messages": said}


def sampling_of(sampling: Sampling) -> Mapping[str, Any]:
    """The sampling parameters under the names of vLLM, SGLang and llama.cpp's server."""
    wanted: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
    }
    if sampling.repeat_penalty != 1:
        wanted["repetition_penalty"] = wanted["repeat_penalty"] = sampling.repeat_penalty
    if sampling.seed is not None:
        wanted["seed"] = sampling.seed % (
            1 << 32
        )  # they all take this, and `Sampler` does the same
    if sampling.frequency_penalty or sampling.presence_penalty:
        wanted["frequency_penalty"] = sampling.frequency_penalty
        wanted["presence_penalty"] = sampling.presence_penalty
    if sampling.logit_bias:
        wanted["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    return wanted
