"""What a dots.llm1 model consists of: its configuration and the inventory of its tensors.

Everything else in the package decides something about the tensors listed here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec

from dots1_local.errors import CheckpointError, Dots1Error, GGUFError

__all__ = ["GGUF_KEYS", "ROLES", "Dots1Config", "Role", "TensorSpec", "inventory", "padded_width"]

Role = Literal["embedding", "head", "norm", "attention", "dense", "router", "shared", "routed"]
ROLES: tuple[Role, ...] = get_args(Role)

# Numbers beyond these are garbage, not a bigger model, and its inventory would fill the memory.
_MOST = 1024
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=_MOST)]  # of layers, or of experts
_Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e12)]

# The key, without "dots1.", of each field of a config.
GGUF_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "vocab_size": "vocab_size",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "first_k_dense_replace": "leading_dense_block_count",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "n_shared_experts": "expert_shared_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
}


@dataclass(frozen=True)
class Dots1Config:
    """The numbers of a dots1 model, under their names in config.json."""

    hidden_size: _Size
    num_hidden_layers: _Count
    num_attention_heads: _Size
    num_key_value_heads: _Size
    head_dim: _Size
    intermediate_size: _Size
    moe_intermediate_size: _Size
    n_routed_experts: _Count
    n_shared_experts: _Size
    num_experts_per_tok: _Size
    first_k_dense_replace: Annotated[int, msgspec.Meta(ge=0)]
    routed_scaling_factor: _Positive
    norm_topk_prob: bool
    vocab_size: _Size
    rms_norm_eps: Annotated[float, msgspec.Meta(ge=0, lt=1e12)]
    rope_theta: _Positive
    max_position_embeddings: _Size
    tie_word_embeddings: bool = False

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Dots1Config":
        """Read the published forms of config.json, and those that transformers writes.

        Raises:
            CheckpointError: the architecture is another one, a key is missing, or the model is a
                variant that llama.cpp does not compute.
        """
        _check_architecture(raw)
        given = {key: value for key, value in raw.items() if value is not None}
        given = {"norm_topk_prob": False} | given | _rope_theta(raw)
        return _config(given, "config.json", CheckpointError)

    @classmethod
    def from_gguf(cls, keys: Mapping[str, Any], file: str | Path) -> "Dots1Config":
        """Read the `dots1.*` keys of `file`; `moe_intermediate_size` is the stored, padded width.

        A key that llama.cpp does not require has llama.cpp's default.

        Raises:
            GGUFError: the architecture is another one, a key is missing, or its value is not
                usable; the message names the file and the key.
        """
        architecture = keys.get("general.architecture")
        if architecture != "dots1":
            raise GGUFError(
                f"{file} holds a model of architecture {architecture!r:.40}; "
                "dots1-local runs dots1 models only"
            )
        names = {field: f"dots1.{key}" for field, key in GGUF_KEYS.items()}
        raw = {field: _uniform(keys[name]) for field, name in names.items() if name in keys}
        if raw.setdefault("first_k_dense_replace", 0) == 0:
            raw.setdefault("intermediate_size", 1)
        tokens = keys.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list):
            raw["vocab_size"] = len(tokens)
        return _config(raw, str(file), GGUFError, names)

    def is_dense(self, layer: int) -> bool:
        """Whether `layer` has a plain FFN instead of routed experts."""
        return layer < self.first_k_dense_replace


def padded_width(width: int) -> int:
    """The expert width, rounded up so that rows fit the blocks of every K- and IQ-type."""
    return -(-width // 256) * 256


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the GGUF file, and the checkpoint's tensors that it is made from.

    `shape` is in numpy order, (experts, rows, columns) for routed experts. Each tensor in `sources`
    has `source_shape`, which is smaller than `shape` if the expert width is padded.
    """

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source_shape: tuple[int, ...]

    @property
    def part(self) -> str:
        """The name without block number and suffix: `ffn_down_exps`, `attn_q`, `token_embd`."""
        return self.name.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]

    @property
    def adds_to_residual(self) -> bool:
        """Whether the layer adds what this matrix computes to the residual stream."""
        return self.part in ("attn_output", "ffn_down", "ffn_down_shexp", "ffn_down_exps")

    @property
    def columns(self) -> int:
        """The length of a row: quantisation blocks run along this dimension."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """The number of rows, over all experts."""
        return prod(self.shape[:-1])

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def source_elements(self) -> int:
        """The number of weights that the checkpoint holds for this tensor, without padding."""
        return prod(self.source_shape) * len(self.sources)


@lru_cache(maxsize=8)
def inventory(config: Dots1Config, expert_width: int | None = None) -> tuple[TensorSpec, ...]:
    """Every tensor of the model in file order, with experts padded to `expert_width`."""
    return tuple(_tensors(config, expert_width or config.moe_intermediate_size))


def _tensors(config: Dots1Config, width: int) -> Iterator[TensorSpec]:
    hidden, vocab = config.hidden_size, config.vocab_size
    yield _plain("token_embd.weight", "embedding", None, "model.embed_tokens.weight", vocab, hidden)
    for layer in range(config.num_hidden_layers):
        yield from _attention(config, layer)
        yield _plain(
            f"blk.{layer}.ffn_norm.weight", "norm", layer,
            f"model.layers.{layer}.post_attention_layernorm.weight", hidden,
        )  # fmt: skip
        yield from (_dense if config.is_dense(layer) else _moe)(config, layer, width)
    yield _plain("output_norm.weight", "norm", None, "model.norm.weight", hidden)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    yield _plain("output.weight", "head", None, head, vocab, hidden)


def _plain(name: str, role: Role, layer: int | None, source: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, role, layer, shape, (source,), shape)


def _attention(config: Dots1Config, layer: int) -> Iterator[TensorSpec]:
    gguf, hf = f"blk.{layer}.", f"model.layers.{layer}."
    hidden, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    yield _plain(f"{gguf}attn_norm.weight", "norm", layer, f"{hf}input_layernorm.weight", hidden)
    for gguf_part, hf_part, rows, columns in (
        ("attn_q", "q_proj", inner, hidden),
        ("attn_k", "k_proj", inner, hidden),
        ("attn_v", "v_proj", inner, hidden),
        ("attn_output", "o_proj", hidden, inner),
    ):
        source = f"{hf}self_attn.{hf_part}.weight"
        yield _plain(f"{gguf}{gguf_part}.weight", "attention", layer, source, rows, columns)
    for letter in "qk":
        source = f"{hf}self_attn.{letter}_norm.weight"
        name = f"{gguf}attn_{letter}_norm.weight"
        yield _plain(name, "norm", layer, source, config.head_dim)


def _dense(config: Dots1Config, layer: int, width: int) -> Iterator[TensorSpec]:
    for part, shape in _ffn_shapes(config.hidden_size, config.intermediate_size):
        source = f"model.layers.{layer}.mlp.{part}_proj.weight"
        yield _plain(f"blk.{layer}.ffn_{part}.weight", "dense", layer, source, *shape)


def _moe(config: Dots1Config, layer: int, width: int) -> Iterator[TensorSpec]:
    gguf, hf = f"blk.{layer}.", f"model.layers.{layer}.mlp."
    hidden, experts, shared = config.hidden_size, config.n_routed_experts, config.n_shared_experts
    unpadded = config.moe_intermediate_size
    yield _plain(f"{gguf}ffn_gate_inp.weight", "router", layer, f"{hf}gate.weight", experts, hidden)
    bias = f"{hf}gate.e_score_correction_bias"
    yield _plain(f"{gguf}exp_probs_b.bias", "router", layer, bias, experts)
    stored, published = _ffn_shapes(hidden, width), _ffn_shapes(hidden, unpadded)
    for (part, shape), (_, source_shape) in zip(stored, published, strict=True):
        sources = tuple(f"{hf}experts.{e}.{part}_proj.weight" for e in range(experts))
        name = f"{gguf}ffn_{part}_exps.weight"
        yield TensorSpec(name, "routed", layer, (experts, *shape), sources, source_shape)
    stored, published = _ffn_shapes(hidden, width * shared), _ffn_shapes(hidden, unpadded * shared)
    for (part, shape), (_, source_shape) in zip(stored, published, strict=True):
        sources = (f"{hf}shared_experts.{part}_proj.weight",)
        name = f"{gguf}ffn_{part}_shexp.weight"
        yield TensorSpec(name, "shared", layer, shape, sources, source_shape)


def _ffn_shapes(hidden: int, width: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    return (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width)))


def _check_architecture(raw: Mapping[str, Any]) -> None:
    names = raw.get("architectures")
    model_type = raw.get("model_type")
    if names != ["Dots1ForCausalLM"] and not (names is None and model_type == "dots1"):
        found = names or model_type
        raise CheckpointError(
            f"config.json describes {found!r}; dots1-local converts Dots1ForCausalLM only"
        )
    for key, allowed in (
        ("scoring_func", (None, "sigmoid", "noaux_tc")),
        ("topk_method", (None, "noaux_tc")),
        ("n_group", (None, 1)),
        ("topk_group", (None, 1)),
        ("moe_layer_freq", (None, 1)),
        ("hidden_act", (None, "silu")),
        ("attention_bias", (None, False)),
        ("use_sliding_window", (None, False)),
    ):
        if raw.get(key) not in allowed:
            raise CheckpointError(
                f"config.json has {key} = {raw[key]!r}, a variant no published dots1 model uses "
                "and llama.cpp's dots1 does not compute"
            )
    kinds = raw.get("layer_types")
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        raise CheckpointError(
            "config.json gives layers sliding attention, which llama.cpp's dots1 does not compute"
        )


def _config(
    raw: dict[str, Any],
    source: str,
    error: type[Dots1Error],
    names: Mapping[str, str] | None = None,
) -> Dots1Config:
    """Convert values by field; an error names `source` and the field by its name there."""
    heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
    if heads is not None:
        raw.setdefault("num_key_value_heads", heads)
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        raw.setdefault("head_dim", hidden // heads)
    try:
        config = msgspec.convert(raw, Dots1Config)
    except msgspec.ValidationError as problem:
        reason, _, path = str(problem).replace("`", "").partition(" - at $.")
        field = path or reason.rsplit(" ", 1)[-1]  # "Object missing required field hidden_size"
        found = f"{reason.lower()}: {raw[field]!r:.40}" if field in raw else "it is missing"
        key = (names or {}).get(field, field)
        raise error(f"{source} has no usable {key}: {found}") from None
    if config.num_experts_per_tok > config.n_routed_experts:
        raise error(
            f"{source} routes each token to {config.num_experts_per_tok} experts but has only "
            f"{config.n_routed_experts}"
        )
    if config.first_k_dense_replace > config.num_hidden_layers:
        raise error(
            f"{source} has {config.first_k_dense_replace} dense layers but only "
            f"{config.num_hidden_layers} layers"
        )
    if config.num_attention_heads != config.num_key_value_heads:
        raise error(
            f"{source} has {config.num_key_value_heads} key-value heads for "
            f"{config.num_attention_heads} query heads; llama.cpp's dots1 needs as many of both"
        )
    return config


def _uniform(value: Any) -> Any:
    """The number that a short array repeats for every layer, as some keys are stored."""
    is_array = isinstance(value, list) and len(value) <= _MOST
    return value[0] if is_array and len(set(value)) == 1 else value


def _rope_theta(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` if it is under `rope_parameters`, where transformers >= 5 puts it."""
    parameters = raw.get("rope_parameters")
    for rope in (parameters, raw.get("rope_scaling")):
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
        if kind not in (None, "default"):
            raise CheckpointError(f"config.json scales RoPE ({kind!r}), which is not supported")
    if isinstance(parameters, Mapping) and "rope_theta" in parameters:
        return {"rope_theta": parameters["rope_theta"]}
    return {}
