"""Texts and conversations to the tokens that `dots1 calibrate` calibrates on.

llama.cpp's own tokeniser makes them, from a GGUF of the checkpoint's vocabulary alone: calibration
then sees what the model is going to see.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.checkpoint import Checkpoint
from dots1_local.convert.metadata import end_tokens
from dots1_local.convert.vocabulary import write_vocabulary
from dots1_local.errors import CheckpointError, UsageError
from dots1_local.evaluate.perplexity import read_text
from dots1_local.runtime.chat.message import Message
from dots1_local.runtime.chat.prompt import Prompter
from dots1_local.runtime.vocabulary import Vocabulary

__all__ = ["Texts"]

_ROLES = ("system", "user", "assistant")


class Texts:
    """A checkpoint's tokeniser, and chunks of `n_ctx` tokens; use it in a `with` statement."""

    def __init__(self, checkpoint: Checkpoint, n_ctx: int) -> None:
        self._end, self._n_ctx = end_tokens(checkpoint)[:1], n_ctx
        self._name = str(checkpoint.path)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            write_vocabulary(checkpoint, path)
            self._vocabulary = Vocabulary.open(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._vocabulary.__exit__(*exception)

    def chunks(
        self, texts: Sequence[Path], chats: Sequence[Path], n_chunks: int | None
    ) -> NDArray[np.int32]:
        """Tokens (chunks, n_ctx) of all files, one after another, the rest cut off.

        Raises:
            UsageError: a file cannot be read, or all have fewer than 2 * n_ctx tokens.
            CheckpointError: there are `chats`, but no chat template.
        """
        tokens: list[int] = []
        for path in texts:
            tokens += self._vocabulary.tokenize(read_text(path), special=False, add_bos=True)
        for path in chats:
            for messages in _conversations(path):
                tokens += self._conversation(messages)
        n_ctx, names = self._n_ctx, ", ".join(map(str, (*texts, *chats)))
        if names and len(tokens) < 2 * n_ctx:  # what llama-imatrix and llama-perplexity ask for
            raise UsageError(
                f"{names} has {len(tokens)} tokens; a context of {n_ctx} needs {2 * n_ctx} or more"
            )
        count = min(len(tokens) // n_ctx, n_chunks or len(tokens))
        return np.array(tokens[: count * n_ctx], np.int32).reshape(count, n_ctx)

    def _conversation(self, messages: list[Message]) -> list[int]:
        """What the model had read and written by the end of its last answer."""
        prompt = self._prompter.tokens(messages[:-1])
        return [*prompt, *self._prompter.content(messages[-1]), *self._end]

    @cached_property
    def _prompter(self) -> Prompter:
        if "tokenizer.chat_template" not in self._vocabulary.gguf.keys:
            raise CheckpointError(
                f"{self._name} has no chat template, which --chat needs; calibrate it with -f"
            )
        return Prompter(self._vocabulary, self._name)


def _conversations(path: Path) -> Iterator[list[Message]]:
    """Each line's `{"messages": [{"role": ..., "content": ...}, ...]}`, the last an answer."""
    # splitlines() would also split at U+2028 and its like, which JSON strings may hold as they are.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            messages = [Message(m["role"], m["content"]) for m in json.loads(line)["messages"]]
            sound = all(m.role in _ROLES and isinstance(m.text, str) for m in messages)
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound or len(messages) < 2 or messages[-1].role != "assistant":
            raise UsageError(
                f"{path} has no conversation in line {number}; it takes "
                '{"messages": [{"role": ..., "content": ...}, ...]} that ends with an assistant'
            )
        yield messages
