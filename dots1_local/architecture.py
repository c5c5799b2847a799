"""What a dots.llm1 model consists of: its configuration and the inventory of its tensors.

Everything else in the package decides something about the tensors listed here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from dots1_local.errors import CheckpointError, Dots1Error, GGUFError

__all__ = ["ROLES", "Dots1Config", "Role", "TensorSpec", "inventory", "padded_width"]

Role = Literal["embedding", "head", "norm", "attention", "dense", "router", "shared", "routed"]
ROLES: tuple[Role, ...] = (
    "embedding", "head", "norm", "attention", "dense", "router", "shared", "routed",
)  # fmt: skip

# Numbers beyond these are garbage, not a bigger model, and its inventory would fill the memory.
_LIMIT = 1 << 24
_MOST_LAYERS = _MOST_EXPERTS = 1024


# The key, without "dots1.", of each field of a config.
_GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count",
    "num_experts_per_tok": "expert_used_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}


@dataclass(frozen=True)
class Dots1Config:
    """The numbers of a dots1 model, under their names in config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
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
        given = {"norm_topk_prob": False, "tie_word_embeddings": False} | given
        return _config(_Values("config.json", given | _rope_theta(raw), CheckpointError))

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
        names = {field: f"dots1.{key}" for field, key in _GGUF_KEYS.items()}
        raw = {field: _uniform(keys[name]) for field, name in names.items() if name in keys}
        raw = {"first_k_dense_replace": 0, "tie_word_embeddings": False} | raw
        if raw["first_k_dense_replace"] == 0:
            raw.setdefault("intermediate_size", 1)
        tokens = keys.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list):
            raw["vocab_size"] = len(tokens)
        return _config(_Values(str(file), raw, GGUFError, names))

    def is_dense(self, layer: int) -> bool:
        """Whether `layer` has a plain FFN instead of routed experts."""
        return layer < self.first_k_dense_replace


def padded_width(width: int, multiple: int = 256) -> int:
    """The expert width, rounded up so that rows fit every K- and IQ-type."""
    return -(-width // multiple) * multiple


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


@dataclass(frozen=True)
class _Values:
    """Values by field of a config, checked when they are taken.

    A wrong value raises `error`, which names `source` and the field's name there.
    """

    source: str
    raw: Mapping[str, Any]
    error: type[Dots1Error]
    names: Mapping[str, str] = field(default_factory=dict)

    def integer(
        self, name: str, *, default: int | None = None, least: int = 1, most: int = _LIMIT
    ) -> int:
        value = self.raw.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self._wrong(name, f"an integer from {least} to {most}")
        return value

    def number(self, name: str, *, zero: bool = False) -> float:
        """A number above 0, or 0 if `zero` allows it."""
        value = self.raw.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(name, "a number")
        if not (0 < value < 1e12 or (zero and value == 0)):
            raise self._wrong(name, "a positive number")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.raw.get(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def _wrong(self, name: str, wanted: str) -> Dots1Error:
        found = f"is {self.raw[name]!r:.40}" if name in self.raw else "is missing"
        named = self.names.get(name, name)
        return self.error(f"{self.source} needs {named} to be {wanted}, but it {found}")


def _config(values: _Values) -> Dots1Config:
    heads = values.integer("num_attention_heads")
    hidden = values.integer("hidden_size")
    config = Dots1Config(
        hidden_size=hidden,
        num_hidden_layers=values.integer("num_hidden_layers", most=_MOST_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=values.integer("num_key_value_heads", default=heads),
        head_dim=values.integer("head_dim", default=hidden // heads),
        intermediate_size=values.integer("intermediate_size"),
        moe_intermediate_size=values.integer("moe_intermediate_size"),
        n_routed_experts=values.integer("n_routed_experts", most=_MOST_EXPERTS),
        n_shared_experts=values.integer("n_shared_experts"),
        num_experts_per_tok=values.integer("num_experts_per_tok"),
        first_k_dense_replace=values.integer("first_k_dense_replace", least=0),
        routed_scaling_factor=values.number("routed_scaling_factor"),
        norm_topk_prob=values.boolean("norm_topk_prob"),
        vocab_size=values.integer("vocab_size"),
        rms_norm_eps=values.number("rms_norm_eps", zero=True),
        rope_theta=values.number("rope_theta"),
        max_position_embeddings=values.integer("max_position_embeddings"),
        tie_word_embeddings=values.boolean("tie_word_embeddings"),
    )
    _check_consistent(config, values)
    return config


def _check_consistent(config: Dots1Config, values: _Values) -> None:
    if config.num_experts_per_tok > config.n_routed_experts:
        raise values.error(
            f"{values.source} routes each token to {config.num_experts_per_tok} experts "
            f"but has only {config.n_routed_experts}"
        )
    if config.first_k_dense_replace > config.num_hidden_layers:
        raise values.error(
            f"{values.source} has {config.first_k_dense_replace} dense layers "
            f"but only {config.num_hidden_layers} layers"
        )
    if config.num_attention_heads != config.num_key_value_heads:
        raise values.error(
            f"{values.source} has {config.num_key_value_heads} key-value heads for "
            f"{config.num_attention_heads} query heads; llama.cpp's dots1 needs as many of both"
        )


def _uniform(value: Any) -> Any:
    """The number that a short array repeats for every layer, as some keys are stored."""
    is_array = isinstance(value, list) and len(value) <= _MOST_LAYERS
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
