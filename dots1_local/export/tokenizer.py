"""tokenizer.json and tokenizer_config.json, from a GGUF's vocabulary.

GGUF only names the way text is split. dots1 models have Qwen2's; for any other name no tokenizer
is written, as one that splits text differently would go unnoticed.
"""

from typing import Any

from gguf import TokenType

from dots1_local.convert.tokenizer import QWEN2_SPLIT
from dots1_local.files.gguf import GGUFFile, Value
from dots1_local.verify.tokens import QWEN2_NAMES

__all__ = ["end_tokens", "tokenizer_config_json", "tokenizer_json", "why_none"]

_PREFIX = "tokenizer.ggml."
_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED)


def end_tokens(gguf: GGUFFile) -> list[int]:
    """The ids that the file says a response ends with, the end of the sequence first."""
    ids = (_token_id(gguf, end) for end in ("eos", "eot"))
    return list(dict.fromkeys(index for index in ids if index is not None))


def why_none(gguf: GGUFFile) -> str | None:
    """Why no tokenizer.json can do what the file's tokenizer does; None if one can."""
    pre = gguf.keys.get(f"{_PREFIX}pre")
    if pre not in QWEN2_NAMES:
        return f"{_PREFIX}pre is {pre!r:.40}, not 'qwen2'"
    for end in ("bos", "eos"):
        if gguf.keys.get(f"{_PREFIX}add_{end}_token"):
            return f"{_PREFIX}add_{end}_token adds a token to every text"
    vocab = _vocab(gguf)
    for merge in _merges(gguf):
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            return f"the merge {' '.join(merge)!r:.40} is none of two tokens that make a third"
    return None


def tokenizer_json(gguf: GGUFFile) -> dict[str, Any]:
    """What the tokenizers library reads; ids without a token are left out.

    Added tokens stand in the vocabulary too, or else the library would number them anew.
    """
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False,
    }  # fmt: skip
    split = {
        "type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, **token} for index, token in _added(gguf).items()],
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
            "vocab": _vocab(gguf),
            "merges": _merges(gguf),
        },
    }


def tokenizer_config_json(gguf: GGUFFile, context: int) -> dict[str, Any]:
    """What transformers reads besides; `context` is the most tokens the model takes."""
    template = gguf.keys.get("tokenizer.chat_template")
    tokens = _strings(gguf, "tokens")
    named = {name: _token_id(gguf, key) for name, key in (("eos", "eos"), ("pad", "padding"))}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): token for index, token in _added(gguf).items()},
        "bos_token": None,
        **({"chat_template": template} if isinstance(template, str) else {}),
        "clean_up_tokenization_spaces": False,
        **{
            f"{name}_token": None if index is None else tokens[index]
            for name, index in named.items()
        },
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def _vocab(gguf: GGUFFile) -> dict[str, int]:
    tokens, types = _strings(gguf, "tokens"), _types(gguf)
    return {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if token and kind != TokenType.UNUSED
    }


def _added(gguf: GGUFFile) -> dict[int, dict[str, Any]]:
    """Tokens that are found in a text before it is split, by id."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    types = _types(gguf)
    return {
        index: {"content": token, **flags, "special": types[index] == TokenType.CONTROL}
        for token, index in _vocab(gguf).items()
        if types[index] in _ADDED
    }


def _merges(gguf: GGUFFile) -> list[list[str]]:
    return [merge.split(" ") for merge in _strings(gguf, "merges")]


def _token_id(gguf: GGUFFile, name: str) -> int | None:
    """The id of a special token such as "eos", if the file names one that exists."""
    index = gguf.keys.get(f"{_PREFIX}{name}_token_id")
    types = _types(gguf)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(types):
        return None
    return index if types[index] != TokenType.UNUSED else None


def _strings(gguf: GGUFFile, name: str) -> list[str]:
    value = gguf.keys[f"{_PREFIX}{name}"]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _types(gguf: GGUFFile) -> list[Value]:
    value = gguf.keys[f"{_PREFIX}token_type"]
    return [*value] if isinstance(value, list) else []
