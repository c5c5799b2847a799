"""A random dots1 GGUF small enough to write and load in milliseconds, made by gguf-py alone."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from gguf import ExpertGatingFuncType, GGUFWriter, TokenType
from numpy.typing import NDArray

from dots1_local.architecture import Dots1Config, TensorSpec, inventory
from dots1_local.engine.engine import Engine, Entry

Tensors = dict[str, NDArray[np.float32]]

SPECIALS = (
    "<|endoftext|>", "<|system|>", "<|endofsystem|>", "<|userprompt|>", "<|endofuserprompt|>",
    "<|response|>", "<|endofresponse|>",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}<|system|>{{ m.content }}<|endofsystem|>"
    "{% elif m.role == 'user' %}<|userprompt|>{{ m.content }}<|endofuserprompt|>"
    "{% else %}<|response|>{{ m.content }}<|endofresponse|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|response|>{% endif %}"
)
MERGES = ("h e", "l l", "he ll", "hell o")
# GPT-2's stand-in for each byte: itself where it prints, else the next code point from 256 up.
PRINTING = {*range(33, 127), *range(161, 173), *range(174, 256)}
OTHERS = sorted(set(range(256)) - PRINTING)
BYTES = [chr(b if b in PRINTING else 256 + OTHERS.index(b)) for b in range(256)]
TOKENS = [*BYTES, "he", "ll", "hell", "hello", *SPECIALS, "[PAD267]"]
TYPES = [TokenType.NORMAL] * 260 + [TokenType.CONTROL] * len(SPECIALS) + [TokenType.UNUSED]
EOT, EOS = TOKENS.index("<|endoftext|>"), TOKENS.index("<|endofresponse|>")

CONFIG = Dots1Config(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=96,
    moe_intermediate_size=32,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
    vocab_size=len(TOKENS),
    rms_norm_eps=1e-5,
    rope_theta=1e7,
    max_position_embeddings=1024,
)


def write_random_gguf(
    path: Path,
    *,
    without: Sequence[str] = (),
    template: str | None = TEMPLATE,
    tokens: Sequence[str] = TOKENS,
    types: Sequence[int] = TYPES,
    tensors: Tensors | None = None,
    architecture: str = "dots1",
    gating: int = ExpertGatingFuncType.SIGMOID,
    shard_tensors: int = 0,
    context: int = CONFIG.max_position_embeddings,
    rms_norm_eps: float = CONFIG.rms_norm_eps,
) -> Path:
    """Write it; `without` leaves tensors and keys out, `tensors` replaces some.

    The vocabulary has as many tokens as there are `types`.
    """
    writer = GGUFWriter(path, architecture, split_max_tensors=shard_tensors)
    _add_keys(writer, architecture, gating, context, without)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", rms_norm_eps)
    _add_tokenizer(writer, tokens[: len(types)], types, template, without)
    for name, value in (random_tensors() | (tensors or {})).items():
        if name not in without:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensors(seed: int = 0) -> Tensors:
    """Every tensor of `CONFIG` by GGUF name, F32, so scaled that activations stay near 1."""
    rng = np.random.default_rng(seed)
    return {spec.name: _values(spec, rng) for spec in inventory(CONFIG)}


def scripted_tensors(answer: Sequence[int]) -> Tensors:
    """Tensors of a model that, asked anything, answers with these tokens (each at most once).

    Where the last of them is there before, the answer goes on from there and never ends.

    Layers add nothing, so the logits depend on the last token alone, and the head's row for the
    next token is the embedding of the last.
    """
    names = ("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp")
    tensors = {
        spec.name: np.zeros(spec.shape, np.float32)
        for spec in inventory(CONFIG)
        if spec.part in names
    }
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((CONFIG.vocab_size, CONFIG.hidden_size)).astype(np.float32)
    head = np.zeros_like(embedding)
    for before, after in pairwise([TOKENS.index("<|response|>"), *answer]):
        head[after] += embedding[before]
    ones = np.ones(CONFIG.hidden_size, np.float32)
    return tensors | {
        "token_embd.weight": embedding, "output.weight": head, "output_norm.weight": ones,
    }  # fmt: skip


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def tokens_of(text: str) -> list[int]:
    """The tokens of a text in which no merge applies: one a byte."""
    return list(text.encode())


def _values(spec: TensorSpec, rng: np.random.Generator) -> NDArray[np.float32]:
    if spec.role == "norm":
        return rng.uniform(0.5, 1.5, spec.shape).astype(np.float32)
    return rng.normal(0, spec.columns**-0.5, spec.shape).astype(np.float32)


def _add_keys(
    writer: GGUFWriter, architecture: str, gating: int, context: int, without: Sequence[str]
) -> None:
    numbers = {
        "block_count": CONFIG.num_hidden_layers,
        "context_length": context,
        "embedding_length": CONFIG.hidden_size,
        "feed_forward_length": CONFIG.intermediate_size,
        "attention.head_count": CONFIG.num_attention_heads,
        "attention.head_count_kv": CONFIG.num_key_value_heads,
        "attention.key_length": CONFIG.head_dim,
        "attention.value_length": CONFIG.head_dim,
        "leading_dense_block_count": CONFIG.first_k_dense_replace,
        "expert_count": CONFIG.n_routed_experts,
        "expert_used_count": CONFIG.num_experts_per_tok,
        "expert_shared_count": CONFIG.n_shared_experts,
        "expert_feed_forward_length": CONFIG.moe_intermediate_size,
        "expert_gating_func": int(gating),
        "vocab_size": CONFIG.vocab_size,
    }
    for key, number in numbers.items():
        if key not in without:
            writer.add_uint32(f"{architecture}.{key}", number)
    writer.add_bool(f"{architecture}.expert_weights_norm", CONFIG.norm_topk_prob)
    writer.add_float32(f"{architecture}.expert_weights_scale", CONFIG.routed_scaling_factor)
    writer.add_float32(f"{architecture}.rope.freq_base", CONFIG.rope_theta)


def _add_tokenizer(
    writer: GGUFWriter,
    tokens: Sequence[str],
    types: Sequence[int],
    template: str | None,
    without: Sequence[str],
) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(list(tokens))
    writer.add_token_types([int(kind) for kind in types])
    writer.add_token_merges(list(MERGES))
    if "eos_token_id" not in without:
        writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(EOT)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)


def all_logits(engine: Engine, tokens: Sequence[int]) -> NDArray[np.float32]:
    """The logits (n, n_vocab) of all tokens, from the first position on; needs `all_logits`."""
    entries = [Entry(token, position, 0, True) for position, token in enumerate(tokens)]
    parts = range(0, len(entries), engine.n_ubatch)
    return np.concatenate([engine.submit(entries[i : i + engine.n_ubatch]).copy() for i in parts])
