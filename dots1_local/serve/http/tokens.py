"""POST /tokenize and /detokenize in vLLM's and llama-server's forms, and GET /tokenizer_info.

Evaluation harnesses count tokens with them, so that they need no tokenizer of their own.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct

from dots1_local.engine.engine import Engine
from dots1_local.serve.http.chat_request import Messages
from dots1_local.serve.http.request import check_token

__all__ = ["DetokenizeFields", "TokenizeFields", "piece_of", "text_of", "tokenizer_info"]

_MAX_TOKENS = 1 << 22  # of a body
_TOKENS = {f"{name}_token": f"tokenizer.ggml.{key}_token_id" for name, key in [
    ("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")
]}  # fmt: skip


class TokenizeFields(Struct, frozen=True):
    """A text, unless the body has messages; these have their special tokens anyway.

    The other fields of a chat, such as its tools, may come with messages. llama-server calls the
    text `content`, and has other defaults: no BOS, and special tokens in it are special.
    """

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    content: str | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeFields(Struct, frozen=True):
    """Tokens of one text."""

    tokens: Annotated[list[int], Meta(max_length=_MAX_TOKENS)]


def text_of(tokens: list[int], engine: Engine) -> str:
    """The text of tokens, with the names of special ones, or an ApiError if one does not exist."""
    for token in tokens:
        check_token(token, engine.n_vocab, "tokens")
    pieces = (engine.piece(token, special=True) for token in tokens)
    return b"".join(pieces).decode("utf-8", errors="replace")


def piece_of(token: int, engine: Engine) -> str | list[int]:
    """A token's text, or its bytes if they are not UTF-8, as llama-server writes them."""
    piece = engine.piece(token, special=True)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def tokenizer_info(engine: Engine) -> dict[str, Any]:
    """Special tokens by their names in tokenizer_config.json, and the chat template."""
    keys = engine.gguf.keys
    numbers = {name: keys.get(key) for name, key in _TOKENS.items()}
    return {
        "tokenizer_class": str(keys.get("tokenizer.ggml.model", "")),
        "model_max_length": engine.n_ctx,
        "add_bos_token": engine.bos is not None,
        "chat_template": keys.get("tokenizer.chat_template"),
        **{
            name: text_of([number], engine)
            if isinstance(number, int) and 0 <= number < engine.n_vocab
            else None
            for name, number in numbers.items()
        },
    }
