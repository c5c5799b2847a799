"""A GGUF file with the header, geometry and vocabulary of a real model, and no weights."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from dots1_local.architecture import Dots1Config, TensorSpec, inventory
from dots1_local.ggml import QuantType, quant_type

__all__ = ["write_sparse_gguf"]


def write_sparse_gguf(
    path: Path,
    config: Dots1Config,
    types: Mapping[str, str],
    expert_width: int | None = None,
    *,
    vocabulary: bool = True,
) -> Path:
    """Write it; `types` are by name, part or role; norms and routers are F32.

    Without `vocabulary` llama.cpp loads it in milliseconds, to compute on token ids.
    """
    width = expert_width or config.moe_intermediate_size
    writer = GGUFWriter(path, "dots1")
    _add_keys(writer, config, width)
    (_add_vocabulary if vocabulary else _add_vocabulary_size)(writer, config.vocab_size)
    size = 0
    for spec in inventory(config, width):
        kind = _type(spec, types)
        row = kind.row_bytes(spec.columns)
        dtype = np.dtype(np.float32 if kind.name == "F32" else np.uint8)
        shape = (*spec.shape[:-1], row // dtype.itemsize)
        raw = GGMLQuantizationType(kind.ggml)
        writer.add_tensor_info(spec.name, shape, dtype, spec.rows * row, raw_dtype=raw)
        size += -(-spec.rows * row // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + size)
    return path


def _type(spec: TensorSpec, types: Mapping[str, str]) -> QuantType:
    if spec.role in ("norm", "router"):
        return quant_type("F32")
    return quant_type(types.get(spec.name) or types.get(spec.part) or types[spec.role])


def _add_keys(writer: GGUFWriter, config: Dots1Config, width: int) -> None:
    for key, number in {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": width,
        "expert_gating_func": 2,
    }.items():
        writer.add_uint32(f"dots1.{key}", number)
    writer.add_bool("dots1.expert_weights_norm", config.norm_topk_prob)
    writer.add_float32("dots1.expert_weights_scale", config.routed_scaling_factor)
    writer.add_float32("dots1.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("dots1.rope.freq_base", config.rope_theta)


def _add_vocabulary(writer: GGUFWriter, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"token {number}" for number in range(size)])
    writer.add_token_types([1] * size)
    writer.add_token_merges(["a b"] * size)


def _add_vocabulary_size(writer: GGUFWriter, size: int) -> None:
    writer.add_uint32("dots1.vocab_size", size)
    writer.add_tokenizer_model("no_vocab")
