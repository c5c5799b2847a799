"""The small files of an export, from a GGUF's keys: configs and tokenizer.

A GGUF only names the way text is split. dots1 models have Qwen2's; for any other name no
tokenizer.json is written, because nobody would notice that it splits text differently.
"""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
from gguf import TokenType

from dots1_local.architecture import Dots1Config
from dots1_local.convert.tokenizer import QWEN2_SPLIT
from dots1_local.errors import GGUFError
from dots1_local.files.gguf import GGUFFile, Value
from dots1_local.verify.tokens import QWEN2_NAMES

__all__ = ["check_computes_the_same", "documents", "encoded"]

_PREFIX = "tokenizer.ggml."
_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED)
# Keys that change RoPE in llama.cpp, and the values that change nothing.
_HARMLESS: dict[str, tuple[str | int, ...]] = {
    "dots1.rope.scaling.type": ("none", "linear"),
    "dots1.rope.scaling.factor": (0, 1),
    "dots1.rope.scale_linear": (0, 1),
    "dots1.rope.scaling.attn_factor": (1,),
    "dots1.rope.scaling.alpha": (0,),
}


def documents(gguf: GGUFFile, config: Dots1Config) -> tuple[dict[str, bytes], list[str]]:
    """The contents of the small files by name, and sentences about what is left out."""
    notices, ends = [], _end_tokens(gguf)
    found: dict[str, Any] = {"config.json": _config_json(config, ends)}
    if ends:
        found["generation_config.json"] = {"eos_token_id": ends}  # config.json has the first only
    else:
        notices.append(
            "generation_config.json is left out: the file names no token that ends a response"
        )
    if reason := _why_no_tokenizer(gguf):
        notices.append(
            f"tokenizer.json is left out: it could not split text as the file's tokenizer does "
            f"({reason}); take the original model's"
        )
    else:
        context = config.max_position_embeddings
        found["tokenizer.json"] = _tokenizer_json(gguf)
        found["tokenizer_config.json"] = _tokenizer_config_json(gguf, context)
    return {name: encoded(value) for name, value in found.items()}, notices


def encoded(value: object) -> bytes:
    """A JSON file's bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def check_computes_the_same(gguf: GGUFFile) -> None:
    """Raise a GGUFError if keys scale RoPE, which no config.json of dots1 can describe."""
    for key, harmless in _HARMLESS.items():
        if key in gguf.keys and gguf.keys[key] not in harmless:
            raise GGUFError(
                f"{gguf.files[0]} scales RoPE ({key} is {gguf.keys[key]!r:.40}), which "
                "dots1-local does not export; remove the key"
            )


def _config_json(config: Dots1Config, ends: list[int]) -> dict[str, Any]:
    """A config.json that transformers of any version, vLLM and SGLang can read.

    Published configs differ in how they name the scoring of experts, where they put RoPE's base,
    and what they leave out; all forms are written.
    """
    numbers = {
        name: _shortest(value) if isinstance(value, float) else value
        for name, value in asdict(config).items()
    }
    fixed = {
        "architectures": ["Dots1ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": ends[0] if ends else None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "dots1",
        "moe_layer_freq": 1,
        "n_group": 1,
        "rope_parameters": {"rope_theta": numbers["rope_theta"], "rope_type": "default"},
        "rope_scaling": None,
        "scoring_func": "sigmoid",
        "sliding_window": None,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
    }
    return dict(sorted((numbers | fixed).items()))


def _shortest(value: float) -> float:
    """The shortest number that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _end_tokens(gguf: GGUFFile) -> list[int]:
    """The ids of the tokens that end a response, the end of the sequence first."""
    ids = (_token_id(gguf, end) for end in ("eos", "eot"))
    return list(dict.fromkeys(index for index in ids if index is not None))


def _why_no_tokenizer(gguf: GGUFFile) -> str | None:
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
            return f"the merge {' '.join(merge)!r:.40} does not join two tokens to a third"
    return None


def _tokenizer_json(gguf: GGUFFile) -> dict[str, Any]:
    """A tokenizer.json for the tokenizers library; ids without a token are left out.

    Added tokens are in the vocabulary, too; otherwise the library would give them other ids.
    """
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False,
    }  # fmt: skip
    split = {
        "type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    bpe = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
        "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": _vocab(gguf), "merges": _merges(gguf),
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
        "model": bpe,
    }


def _tokenizer_config_json(gguf: GGUFFile, context: int) -> dict[str, Any]:
    """What transformers reads besides tokenizer.json; `context` is the model's most tokens."""
    template = gguf.keys.get("tokenizer.chat_template")
    tokens = gguf.keys.strings(f"{_PREFIX}tokens")
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
    tokens, types = gguf.keys.strings(f"{_PREFIX}tokens"), _types(gguf)
    return {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if token and kind != TokenType.UNUSED
    }


def _added(gguf: GGUFFile) -> dict[int, dict[str, Any]]:
    """The tokens that are found in a text before the text is split, by id."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    types = _types(gguf)
    return {
        index: {"content": token, **flags, "special": types[index] == TokenType.CONTROL}
        for token, index in _vocab(gguf).items()
        if types[index] in _ADDED
    }


def _merges(gguf: GGUFFile) -> list[list[str]]:
    return [merge.split(" ") for merge in gguf.keys.strings(f"{_PREFIX}merges")]


def _token_id(gguf: GGUFFile, name: str) -> int | None:
    """The id of a special token such as "eos", if the file names a token that exists."""
    index = gguf.keys.get(f"{_PREFIX}{name}_token_id")
    types = _types(gguf)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(types):
        return None
    return index if types[index] != TokenType.UNUSED else None


def _types(gguf: GGUFFile) -> list[Value]:
    value = gguf.keys[f"{_PREFIX}token_type"]
    return [*value] if isinstance(value, list) else []
