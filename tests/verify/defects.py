"""Defects of GGUF files that --fix puts right: how to make them, and what verify says of them."""

from typing import Any

from gguf import GGUFValueType

from tests.helpers import EOT, TOKENS, TYPES

__all__ = ["FIXABLE", "as_types"]

PREFIX = "tokenizer.ggml."
U32, I32, U64 = GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.UINT64


def as_types(**changed: int) -> list[int]:
    return [changed.get(token.strip("<|>"), int(t)) for token, t in zip(TOKENS, TYPES, strict=True)]


# Keyword arguments of `rewrite`, the severity, and a part of the message.
FIXABLE: list[tuple[dict[str, Any], str, str]] = [
    ({"remove": ["dots1.expert_gating_func"]}, "error", "aborts the process"),
    ({"values": {"dots1.expert_gating_func": 1}}, "error", "expert_gating_func is 1"),
    ({"values": {"dots1.expert_gating_func": 0}}, "error", "0: llama.cpp aborts the process"),
    ({"types": {"dots1.expert_gating_func": I32}}, "error", "refuses to load"),
    ({"remove": [PREFIX + "add_bos_token"]}, "warning", "11, a comma"),
    ({"values": {PREFIX + "add_bos_token": True}}, "error", "every prompt begins with token"),
    (
        {"values": {PREFIX + "bos_token_id": 11}, "types": {PREFIX + "bos_token_id": U32}},
        "warning",
        "bos_token_id is 11",
    ),
    ({"values": {PREFIX + "eos_token_id": 11}}, "error", "responses end at that token"),
    ({"values": {PREFIX + "eos_token_id": 999}}, "error", "999, which is not a token"),
    ({"values": {PREFIX + "eot_token_id": 999}}, "warning", "'<|endoftext|>'"),
    ({"types": {PREFIX + "eos_token_id": I32}}, "error", "eos_token_id is not stored as u32"),
    ({"types": {PREFIX + "eot_token_id": U64}}, "error", "eot_token_id is not stored as u32"),
    ({"types": {PREFIX + "add_bos_token": U32}}, "error", "not stored as bool"),
    (
        {"values": {PREFIX + "mask_token_id": -1}, "types": {PREFIX + "mask_token_id": I32}},
        "error",
        "--fix removes it",
    ),
    ({"remove": [PREFIX + "eos_token_id"]}, "error", "takes 11, a comma"),
    ({"remove": [PREFIX + "eot_token_id"]}, "warning", "'<|endoftext|>'"),
    ({"values": {PREFIX + "eos_token_id": EOT}}, "error", "a chat never stops"),
    ({"remove": [PREFIX + "pre"]}, "error", "pre is missing"),
    ({"values": {PREFIX + "pre": "llama-bpe"}}, "error", "pre is 'llama-bpe'"),
    ({"values": {PREFIX + "token_type": as_types(system=1)}}, "error", "spell it out"),
    ({"values": {PREFIX + "token_type": as_types(system=4)}}, "warning", "forge it"),
    ({"remove": ["dots1.embedding_length"]}, "error", "--fix sets 64"),
    ({"remove": ["dots1.block_count"]}, "error", "--fix sets 3"),
    ({"remove": ["dots1.leading_dense_block_count"]}, "error", "--fix sets 1"),
    ({"remove": ["dots1.feed_forward_length"]}, "error", "--fix sets 96"),
    ({"remove": ["dots1.attention.head_count"]}, "error", "--fix sets 2"),
    ({"remove": ["dots1.expert_count"]}, "error", "--fix sets 8"),
    ({"remove": ["dots1.expert_shared_count"]}, "error", "--fix sets 2"),
    ({"values": {"dots1.expert_feed_forward_length": 33}}, "error", "tensors show 32"),
    ({"values": {"dots1.attention.value_length": 64}}, "error", "tensors show 32"),
    ({"types": {"dots1.context_length": I32}}, "error", "not stored as u32"),
]
