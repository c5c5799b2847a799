"""GET /props, and the `meta` of a model in /v1/models, in llama-server's form.

Clients read the context's length in either, and the web pages of others the rest.
"""

from typing import Any

from llama_cpp import llama_cpp as llama

from dots1_local import __version__
from dots1_local.chat.sampling import Sampling
from dots1_local.engine.engine import Engine
from dots1_local.serve.http.tokens import tokenizer_info

__all__ = ["model_meta", "props"]


def model_meta(engine: Engine) -> dict[str, Any]:
    """The model's figures; `size` is the bytes of its tensors, and `n_ctx` is for one answer."""
    model = llama.llama_get_model(engine.context)
    return {
        "vocab_type": llama.llama_vocab_type(engine.vocab),
        "n_vocab": engine.n_vocab,
        "n_ctx": engine.n_ctx,
        "n_ctx_train": llama.llama_model_n_ctx_train(model),
        "n_embd": llama.llama_model_n_embd(model),
        "n_params": llama.llama_model_n_params(model),
        "size": llama.llama_model_size(model),
    }


def props(engine: Engine, name: str) -> dict[str, Any]:
    """What the server has loaded, and how it answers by default.

    The model's file is named without its folder, which is nobody's business.
    """
    tokenizer, sampling = tokenizer_info(engine), Sampling()
    return {
        "default_generation_settings": {
            "n_ctx": engine.n_ctx,
            "params": {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p,
                "repeat_last_n": sampling.repeat_last_n,
                "repeat_penalty": sampling.repeat_penalty,
                "frequency_penalty": sampling.frequency_penalty,
                "presence_penalty": sampling.presence_penalty,
                "n_predict": -1,  # no limit but the context
            },
        },
        "total_slots": engine.params.n_sequences,
        "model_alias": name,
        "model_path": engine.gguf.files[0].name,
        "modalities": {"vision": False, "audio": False, "video": False},
        "chat_template": tokenizer["chat_template"] or "",
        "bos_token": tokenizer["bos_token"] or "",
        "eos_token": tokenizer["eos_token"] or "",
        "build_info": f"dots1-local {__version__}, llama.cpp {llama.llama_version().decode()}",
        "is_sleeping": False,
    }
