"""Texts and conversations as the chunks of tokens that `dots1 calibrate` runs through a checkpoint.

llama.cpp's own tokeniser makes the tokens, from a GGUF of the checkpoint's vocabulary alone, so
that calibration sees the tokens that the model will see.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dots1_local.chat.message import Message
from dots1_local.chat.prompt import Prompter
from dots1_local.convert.metadata import end_tokens
from dots1_local.convert.tokenizer import write_vocabulary
from dots1_local.engine.engine import Vocabulary
from dots1_local.errors import CheckpointError, UsageError
from dots1_local.evaluate.perplexity import read_text
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.partial_file import scratch_file

__all__ = ["open_vocabulary", "tokenize"]

_ROLES = ("system", "user", "assistant")


@contextmanager
def open_vocabulary(checkpoint: Checkpoint) -> Iterator[Vocabulary]:
    """Load the checkpoint's tokeniser in llama.cpp.

    Raises:
        CheckpointError: the checkpoint has no tokeniser that can be converted.
    """
    with scratch_file() as path:
        write_vocabulary(checkpoint, path)
        vocabulary = Vocabulary.load(path)
    with vocabulary:
        yield vocabulary


def dataset_names(texts: Sequence[Path], chats: Sequence[Path]) -> list[str]:
    """Return what an importance file calls the files that `tokenize` was given."""
    return [*(path.name for path in texts), *(f"{path.name} (chat)" for path in chats)]


def tokenize(
    checkpoint: Checkpoint,
    vocabulary: Vocabulary,
    n_ctx: int,
    texts: Sequence[Path],
    chats: Sequence[Path],
    n_chunks: int | None,
) -> NDArray[np.int32]:
    """Return the tokens (chunks, n_ctx) of all files in order, without an incomplete last chunk.

    Raises:
        UsageError: a file cannot be read, or all files have fewer than 2 * n_ctx tokens.
        CheckpointError: there are `chats`, but the checkpoint has no chat template.
    """
    tokens: list[int] = []
    for path in texts:
        tokens += vocabulary.tokenize(read_text(path), special=False, add_bos=True)
    if chats:
        tokens += _tokenize_chats(checkpoint, vocabulary, chats)
    names = ", ".join(map(str, (*texts, *chats)))
    if names and len(tokens) < 2 * n_ctx:  # what llama-imatrix and llama-perplexity ask for
        raise UsageError(
            f"{names} has {len(tokens)} tokens; a context of {n_ctx} needs {2 * n_ctx} or more"
        )
    count = min(len(tokens) // n_ctx, n_chunks or len(tokens))
    return np.array(tokens[: count * n_ctx], np.int32).reshape(count, n_ctx)


def _tokenize_chats(
    checkpoint: Checkpoint, vocabulary: Vocabulary, chats: Sequence[Path]
) -> Iterator[int]:
    """Yield what the model has read and written at the end of each conversation."""
    name = str(checkpoint.path)
    if "tokenizer.chat_template" not in vocabulary.gguf.keys:
        raise CheckpointError(
            f"{name} has no chat template, which --chat needs; calibrate it with -f"
        )
    prompter = Prompter(vocabulary, name)
    for path in chats:
        for messages in _read_chats(path):
            yield from prompter.tokens(messages[:-1])
            yield from prompter.content(messages[-1])
            yield from end_tokens(checkpoint)[:1]


def _read_chats(path: Path) -> Iterator[list[Message]]:
    """Yield the conversation in each line: {"messages": [{"role": ..., "content": ...}, ...]}."""
    # splitlines() would also split at U+2028 and its like, which JSON strings may contain.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            messages = [Message(m["role"], m["content"]) for m in json.loads(line)["messages"]]
            valid = all(m.role in _ROLES and isinstance(m.text, str) for m in messages)
        except (ValueError, KeyError, TypeError, RecursionError):
            valid = False
        if not valid or len(messages) < 2 or messages[-1].role != "assistant":
            raise UsageError(
                f"{path} has no conversation in line {number}; a line must be "
                '{"messages": [{"role": ..., "content": ...}, ...]} and end with the assistant'
            )
        yield messages
