"""Write tokenizer.json as GGUF's tokenizer keys.

llama.cpp knows pre-tokenisers by name. Only Qwen2's is accepted, because llama.cpp would silently
tokenise differently with any other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from gguf import GGUFWriter, TokenType

from dots1_local.convert.metadata import end_tokens
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint, load_json
from dots1_local.files.json_file import JsonError, convert_json

__all__ = ["QWEN2_SPLIT", "Tokenizer", "read_tokenizer", "write_vocabulary"]


# The split pattern of Qwen2's tokenizer.json, which llama.cpp calls "qwen2".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END_OF_RESPONSE = "<|endofresponse|>"
_END_OF_TEXT = "<|endoftext|>"


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool


class _BpeModel(msgspec.Struct):
    type: Literal["BPE"]
    vocab: Annotated[dict[str, int], msgspec.Meta(min_length=1)]
    merges: list[str | list[str]]


class _TokenizerFile(msgspec.Struct):
    model: _BpeModel
    added_tokens: list[_AddedToken]
    pre_tokenizer: Any = None


@dataclass(frozen=True)
class Tokenizer:
    """What GGUF stores of a tokenizer; `tokens` is as long as vocab_size."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    eos: int
    eot: int
    pad: int | None
    chat_template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Add the keys. With add_bos_token true, llama.cpp would begin every text with token 11."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        writer.add_token_merges(list(self.merges))
        writer.add_eos_token_id(self.eos)
        writer.add_eot_token_id(self.eot)
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        writer.add_add_bos_token(False)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_tokenizer(folder: Path, vocab_size: int, end_tokens: list[int]) -> Tokenizer:
    """Read tokenizer.json, tokenizer_config.json and the chat template.

    `end_tokens` are the ids that end generation according to the configs, most specific first.

    Raises:
        CheckpointError: a file is missing or malformed, the pre-tokeniser is not Qwen2's, or an id
            is beyond vocab_size.
    """
    path = folder / "tokenizer.json"
    try:
        found = convert_json(load_json(path), _TokenizerFile)
        merges = tuple(_merges(found.model))
    except JsonError as error:
        raise CheckpointError(f"{path} is not a byte-level BPE tokenizer: {error}") from None
    if not _has_qwen2_split(found.pre_tokenizer):
        raise CheckpointError(
            f"{path} has another pre-tokeniser than Qwen2's, which dots1 models use"
        )
    tokens, types = _table(path, found, vocab_size)
    eos, eot = _end_pair(path, tokens, end_tokens)
    pad = _pad_token(folder, tokens)
    return Tokenizer(tokens, types, merges, eos, eot, pad, _chat_template(folder))


def _merges(model: _BpeModel) -> Iterator[str]:
    for merge in model.merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or "".join(pair) not in model.vocab:
            raise JsonError(f"{merge!r:.40} does not join two parts of a token", "model.merges")
        yield " ".join(pair)


def _has_qwen2_split(pre_tokenizer: Any) -> bool:
    try:
        steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
        patterns = [s["pattern"]["Regex"] for s in steps if s.get("type") == "Split"]
    except (AttributeError, KeyError, TypeError):
        return False
    return patterns == [QWEN2_SPLIT]


def _table(
    path: Path, found: _TokenizerFile, vocab_size: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return tokens and types by id; ids without a token become `[PADn]`, stock's names."""
    vocab = found.model.vocab
    by_id = {index: (token, TokenType.NORMAL) for token, index in vocab.items()}
    if len(by_id) != len(vocab):
        raise CheckpointError(f"{path} gives two tokens the same id")
    for added in found.added_tokens:
        kind = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        by_id[added.id] = (added.content, kind)
    lowest, highest = min(by_id), max(by_id)
    if lowest < 0:
        raise CheckpointError(f"{path} has the negative token id {lowest}")
    if highest >= vocab_size:
        raise CheckpointError(
            f"{path} has token id {highest}, but config.json's vocab_size is only {vocab_size}"
        )
    rows = [by_id.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(vocab_size)]
    return tuple(token for token, _ in rows), tuple(int(kind) for _, kind in rows)


def _end_pair(path: Path, tokens: tuple[str, ...], end_tokens: list[int]) -> tuple[int, int]:
    """Return the ids of end of sequence and end of turn, of which GGUF holds one each.

    The configs' own ids come first; `<|endofresponse|>` and `<|endoftext|>` complete the pair.
    """
    ends = list(end_tokens)
    if unknown := [index for index in ends if not 0 <= index < len(tokens)]:
        raise CheckpointError(
            f"the configs beside {path} end responses with token {unknown[0]}, but the vocabulary "
            f"has {len(tokens)} tokens"
        )
    ids = {token: index for index, token in enumerate(tokens)}
    for name in (_END_OF_RESPONSE, _END_OF_TEXT):
        if name in ids and ids[name] not in ends:
            ends.append(ids[name])
    if not ends:
        raise CheckpointError(f"neither {path} nor the configs name a token that ends a response")
    return ends[0], ends[1] if len(ends) > 1 else ends[0]


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return load_json(path) if path.exists() else {}


def _pad_token(folder: Path, tokens: tuple[str, ...]) -> int | None:
    pad = _tokenizer_config(folder).get("pad_token")
    if isinstance(pad, dict):
        pad = pad.get("content")
    return tokens.index(pad) if pad in tokens else None


def _chat_template(folder: Path) -> str | None:
    """Read chat_template.jinja, where newer transformers save it, or tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not readable text: {error}") from None
    template = _tokenizer_config(folder).get("chat_template")
    try:
        if isinstance(template, list):  # several named templates; "default" is for chats
            template = {t["name"]: t["template"] for t in template}.get("default")
    except (KeyError, TypeError):
        path = folder / "tokenizer_config.json"
        raise CheckpointError(f"{path} has a malformed chat_template") from None
    return template if isinstance(template, str) else None


def write_vocabulary(checkpoint: Checkpoint, path: Path) -> None:
    """Write a GGUF file without tensors, for llama.cpp to tokenise with.

    Raises:
        CheckpointError: as `read_tokenizer`.
    """
    tokenizer = read_tokenizer(
        checkpoint.path, checkpoint.config.vocab_size, end_tokens(checkpoint)
    )
    writer = GGUFWriter(path, "dots1")
    writer.add_vocab_size(checkpoint.config.vocab_size)
    tokenizer.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
