"""The model's numbers: what the keys say, what the tensors tell, what the checkpoint has.

llama.cpp's `llama_model_dots1::load_arch_hparams` and `llama_model_base::load_hparams` tell which
keys it requires, and what it takes for a missing one.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from reprlib import repr as brief
from typing import Any

from dots1_local.architecture import Dots1Config
from dots1_local.files.gguf import GGUFFile, Value
from dots1_local.verify.findings import ABORTS, KIND_IDS, REFUSES, Change, Finding, Kind, remedy
from dots1_local.verify.tensors import config_from_tensors

__all__ = ["conflicts", "likely_config", "lint_numbers"]

_SIGMOID, _OTHER_GATINGS = 2, (1, 3, 4)  # enum llama_expert_gating_func_type
_MOST_LAYERS, _MOST_EXPERTS = 512, 1024  # llama.cpp's own limits

Numbers = Mapping[str, Any]  # by field of Dots1Config


@dataclass(frozen=True)
class _NumberKey:
    """`dots1.<name>`, which is `field` of a config; `missing` is what happens without it.

    `published` is the value in every published dots1 model.
    """

    name: str
    field: str
    missing: str
    kind: Kind = "u32"
    published: float | bool | None = None


_KEYS = (
    _NumberKey("context_length", "max_position_embeddings", REFUSES),
    _NumberKey("embedding_length", "hidden_size", REFUSES),
    _NumberKey("block_count", "num_hidden_layers", REFUSES),
    _NumberKey("feed_forward_length", "intermediate_size", REFUSES),
    _NumberKey("attention.head_count", "num_attention_heads", REFUSES),
    _NumberKey("attention.head_count_kv", "num_key_value_heads", REFUSES),
    _NumberKey("attention.key_length", "head_dim", REFUSES),
    _NumberKey("attention.value_length", "head_dim", REFUSES),
    _NumberKey("rope.dimension_count", "head_dim", ABORTS),
    _NumberKey("leading_dense_block_count", "first_k_dense_replace", REFUSES),
    _NumberKey("expert_count", "n_routed_experts", ABORTS),
    _NumberKey("expert_used_count", "num_experts_per_tok", ABORTS),
    _NumberKey("expert_shared_count", "n_shared_experts", REFUSES),
    _NumberKey("expert_feed_forward_length", "moe_intermediate_size", REFUSES),
    _NumberKey("attention.layer_norm_rms_epsilon", "rms_norm_eps", REFUSES, "f32"),
    _NumberKey(
        "rope.freq_base", "rope_theta",
        "llama.cpp silently takes 10000, and the model loses track of positions",
        "f32", 1e7,
    ),
    _NumberKey(
        "expert_weights_scale", "routed_scaling_factor",
        "llama.cpp silently leaves the routed experts' output unscaled", "f32", 2.5,
    ),
    _NumberKey(
        "expert_weights_norm", "norm_topk_prob",
        "llama.cpp silently leaves the weights of the chosen experts unnormalised", "bool", True,
    ),
)  # fmt: skip
# These may be arrays, of one number for each layer.
_BY_LAYER = (
    "feed_forward_length", "attention.head_count", "attention.head_count_kv", "expert_used_count",
    "expert_feed_forward_length",
)  # fmt: skip

# What the inventory depends on, except for what models without dense layers do not have.
_SHAPING = (
    "vocab_size", "hidden_size", "num_hidden_layers", "first_k_dense_replace",
    "num_attention_heads", "head_dim", "n_routed_experts", "moe_intermediate_size",
    "n_shared_experts",
)  # fmt: skip
# Tensors may be lost, so the key has the last word on the number of layers.
_COUNTED = ("num_hidden_layers", "first_k_dense_replace")


def conflicts(gguf: GGUFFile, checkpoint: Dots1Config) -> list[str]:
    """The fields in which tensors and checkpoint disagree, such as `hidden_size 64 (4096)`.

    Wider experts are padded ones; a lost layer does not make the file another model.
    """
    shown, wanted = config_from_tensors(gguf.tensors), asdict(checkpoint)
    return [
        f"{field} {value} ({wanted[field]})"
        for field, value in shown.items()
        if field not in _COUNTED
        and value != wanted[field]
        and not (field == "moe_intermediate_size" and value > wanted[field])
    ]


def likely_config(gguf: GGUFFile) -> Dots1Config | None:
    """Return the model that tensors and keys describe together, to tell what is wrong with a file.

    Return None if a number is in neither, or is beyond llama.cpp's limits.
    """
    tokens = gguf.keys.get("tokenizer.ggml.tokens")
    told: dict[str, Any] = {"vocab_size": len(tokens)} if isinstance(tokens, list) else {}
    for key in _KEYS:
        value = _number(key, gguf)
        if _is_sane(key, value):
            told[key.field] = value
    counted = {field: told[field] for field in _COUNTED if field in told}
    known = told | config_from_tensors(gguf.tensors) | counted
    if not all(field in known for field in _SHAPING):
        return None
    others: dict[str, Any] = dict.fromkeys((key.field for key in _KEYS), 1)  # no shape needs these
    config = Dots1Config(**others | known)
    small = config.num_hidden_layers <= _MOST_LAYERS and config.n_routed_experts <= _MOST_EXPERTS
    return config if small else None


def lint_numbers(gguf: GGUFFile, checkpoint: Dots1Config | None) -> Iterator[Finding]:
    """What is wrong with the `dots1.*` keys."""
    shown, wanted = config_from_tensors(gguf.tensors), None
    if checkpoint:
        stored_width = {k: v for k, v in shown.items() if k == "moe_intermediate_size"}
        wanted = asdict(checkpoint) | stored_width  # the width may be padded
    yield from _gating(gguf)
    defaults = _defaults(gguf, shown)
    for key in _KEYS:
        right = (wanted or shown).get(key.field)
        if f"dots1.{key.name}" in gguf.keys:
            yield from _check_value(key, gguf, shown, wanted)
        elif key.name not in defaults or defaults[key.name] != right:
            yield _finding(key, f"is missing: {key.missing}", right, shown)
    yield from _limits(gguf)


def _check_value(
    key: _NumberKey, gguf: GGUFFile, shown: Numbers, checkpoint: Numbers | None
) -> Iterator[Finding]:
    name, value = f"dots1.{key.name}", _number(key, gguf)
    wanted = checkpoint or {k: v for k, v in shown.items() if k not in _COUNTED}
    right = wanted.get(key.field)
    if not _is_sane(key, value):
        yield _finding(key, f"is {brief(value)}, which is not a usable number", right, shown)
    elif right is not None and not _same(value, right, key.kind):
        source = "the checkpoint has" if checkpoint else "the tensors show"
        yield _finding(key, f"is {value!r} where {source} {right!r}", right, shown)
    elif gguf.keys.kind(name) != KIND_IDS[key.kind] and not isinstance(gguf.keys[name], list):
        message = f"{name} is not stored as {key.kind}: {REFUSES}; --fix stores it so"
        yield Finding("keys", "error", message, (Change(name, key.kind, value),))
    elif checkpoint is None and key.published is not None and value != key.published:
        message = f"{name} is {value!r} where every published dots1 model has {key.published!r}"
        yield Finding("keys", "warning", f"{message}; compare with --against the checkpoint")


def _finding(key: _NumberKey, problem: str, right: Any, shown: Numbers) -> Finding:
    """The `right` value, if it is known, puts the key right unless the tensors do not fit it."""
    changes: tuple[Change, ...] = ()
    if right is not None and shown.get(key.field, right) == right:
        changes = (Change(f"dots1.{key.name}", key.kind, right),)
    message = f"dots1.{key.name} {problem}; {remedy(changes, f'--fix sets {right!r}')}"
    return Finding("keys", "error", message, changes)


def _number(key: _NumberKey, gguf: GGUFFile) -> Value | None:
    """A key's value, or the number that its array repeats for every layer."""
    value = gguf.keys.get(f"dots1.{key.name}")
    if key.name in _BY_LAYER and isinstance(value, list) and len(set(value)) == 1:
        return value[0]
    return value


def _is_sane(key: _NumberKey, value: Value | None) -> bool:
    if key.kind == "bool" or isinstance(value, bool):
        return key.kind == "bool" and isinstance(value, bool)
    if key.kind == "f32":
        zero = value == 0 and key.field == "rms_norm_eps"  # llama.cpp computes with 0, too
        return zero or (isinstance(value, int | float) and 0 < value < 1e12)
    return isinstance(value, int) and (value > 0 or key.field in _COUNTED) and value < 1 << 32


def _same(value: Any, right: Any, kind: Kind) -> bool:
    if kind == "f32":  # the file holds 32-bit floats
        return struct.pack("<f", value) == struct.pack("<f", right)
    return bool(value == right)


def _gating(gguf: GGUFFile) -> Iterator[Finding]:
    name = "dots1.expert_gating_func"
    gating = gguf.keys.get(name)
    if gating is None:
        wrong = f"is missing: {ABORTS}"
    elif gguf.keys.kind(name) != KIND_IDS["u32"]:
        wrong = f"is not stored as u32: {REFUSES}"
    elif gating == _SIGMOID:
        return
    elif gating not in _OTHER_GATINGS:
        wrong = f"is {brief(gating)}: {ABORTS}"
    else:
        wrong = f"is {brief(gating)}: the router weighs experts in another way than in training"
    message = f"{name} {wrong}; every dots1 model means sigmoid, and --fix sets {_SIGMOID}"
    yield Finding("gating", "error", message, (Change(name, "u32", _SIGMOID),))


def _limits(gguf: GGUFFile) -> Iterator[Finding]:
    """Numbers that llama.cpp asserts."""
    number = {key.name: _number(key, gguf) for key in _KEYS}
    for name, most in (("block_count", _MOST_LAYERS), ("expert_count", _MOST_EXPERTS)):
        count = number[name]
        if isinstance(count, int) and count > most:
            message = f"dots1.{name} is {count}, beyond {most}: {ABORTS}"
            yield Finding("keys", "error", message)
    experts, used = number["expert_count"], number["expert_used_count"]
    if isinstance(experts, int) and isinstance(used, int) and not 0 < used <= experts:
        yield Finding(
            "experts", "error",
            f"each token is routed to {used} of {experts} experts: {ABORTS}; compare with "
            "--against the checkpoint",
        )  # fmt: skip
    name = "dots1.expert_group_count"
    groups = gguf.keys.get(name, 0)
    if isinstance(groups, int) and groups > 1:
        yield Finding(
            "experts", "error",
            f"{name} is {groups}: llama.cpp chooses experts by group, which dots1 does not; --fix "
            "removes it", (Change(name),),
        )  # fmt: skip


def _defaults(gguf: GGUFFile, shown: Numbers) -> Numbers:
    """What llama.cpp takes for a missing key, by key; None if it does not need the key."""
    told = {key.name: _number(key, gguf) for key in _KEYS}
    hidden = told["embedding_length"] or shown.get("hidden_size")
    heads, head_dim = told["attention.head_count"], None
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        head_dim = hidden // heads
    defaults: dict[str, Any] = {
        "leading_dense_block_count": 0,
        "attention.head_count_kv": heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": told["attention.key_length"] or head_dim,
    }
    if shown.get("first_k_dense_replace") == 0:
        defaults["feed_forward_length"] = None
    return defaults
