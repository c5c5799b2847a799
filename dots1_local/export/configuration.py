"""config.json, from a GGUF's keys."""

from typing import Any

import numpy as np

from dots1_local.architecture import Dots1Config
from dots1_local.errors import GGUFError
from dots1_local.files.gguf import GGUFFile

__all__ = ["check_computes_the_same", "config_json"]

# Keys that change RoPE in llama.cpp, and the values with which they don't.
_HARMLESS: dict[str, tuple[str | int, ...]] = {
    "dots1.rope.scaling.type": ("none", "linear"),
    "dots1.rope.scaling.factor": (0, 1),
    "dots1.rope.scale_linear": (0, 1),
    "dots1.rope.scaling.attn_factor": (1,),
    "dots1.rope.scaling.alpha": (0,),
}


def check_computes_the_same(gguf: GGUFFile) -> None:
    """Refuse keys with which llama.cpp computes something that no dots1 config.json can say.

    Raises:
        GGUFError: RoPE is scaled.
    """
    for key, harmless in _HARMLESS.items():
        if key in gguf.keys and gguf.keys[key] not in harmless:
            raise GGUFError(
                f"{gguf.files[0]} scales RoPE ({key} is {gguf.keys[key]!r:.40}), which "
                "dots1-local does not export; remove the key"
            )


def config_json(config: Dots1Config, ends: list[int]) -> dict[str, Any]:
    """What transformers of any version, vLLM and SGLang read of a dots1 model.

    Where published configs differ (how experts are scored, where RoPE's base stands, what may be
    left out), all their forms are written.
    """
    theta = _shortest(config.rope_theta)
    return {
        "architectures": ["Dots1ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": ends[0] if ends else None,
        "first_k_dense_replace": config.first_k_dense_replace,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "dots1",
        "moe_intermediate_size": config.moe_intermediate_size,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": config.n_routed_experts,
        "n_shared_experts": config.n_shared_experts,
        "norm_topk_prob": config.norm_topk_prob,
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": _shortest(config.rms_norm_eps),
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": theta,
        "routed_scaling_factor": _shortest(config.routed_scaling_factor),
        "scoring_func": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def _shortest(value: float) -> float:
    """The shortest number that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
