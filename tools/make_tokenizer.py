"""A synthetic tokenizer of dots.llm1's form and size: byte-level BPE with Qwen2's pre-tokeniser.

The vocabulary has the 256 bytes, then merges of two bytes, then of two bytes and a third, until it
is full. As in a trained BPE, every merge makes a new token. Letters come first, so that plain text
has merges. `tools/make_wide.py` writes it beside its random weights.
"""

import json
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

__all__ = ["SPECIAL_TOKENS", "ordinary_tokens", "write_tokenizer"]

# From id 151,643 up; the first and the last have the same ids as in the published model.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|system|>",
    "<|endofsystem|>",
    "<|userprompt|>",
    "<|endofuserprompt|>",
    "<|response|>",
    "<|endofresponse|>",
)

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}<|system|>{{ message.content }}<|endofsystem|>"
    "{% elif message.role == 'user' %}<|userprompt|>{{ message.content }}<|endofuserprompt|>"
    "{% else %}<|response|>{{ message.content }}<|endofresponse|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|response|>{% endif %}"
)


def ordinary_tokens(vocab_size: int) -> int:
    """The number of ordinary tokens among `vocab_size` rows: 151,643 of the published 152,064.

    A small vocabulary also has some rows without a token.
    """
    return min(151643, vocab_size - 16)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json for a vocabulary of `vocab_size` rows.

    Raises:
        ValueError: there are fewer rows than bytes and special tokens.
    """
    if ordinary_tokens(vocab_size) < 256:
        raise ValueError("a byte-level vocabulary needs 272 rows or more")
    first = ordinary_tokens(vocab_size)
    special = [_special(first + index, token) for index, token in enumerate(SPECIAL_TOKENS)]
    _write_json(folder / "tokenizer.json", _tokenizer(first, special))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(special))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")


def _special(index: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, **flags, "special": True}


def _tokenizer(ordinary: int, special: list[dict[str, Any]]) -> dict[str, Any]:
    letters = _byte_letters()
    merges = list(islice(_merges(letters), ordinary - len(letters)))
    tokens = letters + [left + right for left, right in merges]
    split = {
        "type": "Split",
        "pattern": {"Regex": _QWEN2_SPLIT},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _tokenizer_config(special: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in special
        },
        "bos_token": None,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL_TOKENS[0],
        "model_max_length": 32768,
        "pad_token": SPECIAL_TOKENS[0],
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes: lower-case letters and space lead."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in shown] + [chr(0x100 + i) for i in range(256 - len(shown))]
    return sorted(letters, key=lambda letter: (not "a" <= letter <= "z", letter != "Ġ", letter))


def _merges(letters: list[str]) -> Iterator[tuple[str, str]]:
    yield from product(letters, letters)
    pairs = (left + right for left, right in product(letters, letters))
    yield from product(pairs, letters)
