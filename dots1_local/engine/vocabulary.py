"""The tokeniser of a GGUF file, in llama.cpp."""

import ctypes
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from llama_cpp import llama_cpp as llama

from dots1_local.engine import log as engine_log
from dots1_local.engine.model_params import default_model_params
from dots1_local.errors import Dots1Error, GGUFError
from dots1_local.files.gguf import GGUFFile
from dots1_local.verify.correct import TOKEN_TYPES, corrected

__all__ = ["Vocabulary"]

_CONTROL = 3  # of enum llama_token_type
_MAX_PIECE = 1 << 16  # bytes


class Vocabulary:
    """The tokeniser of a GGUF file, which need not hold tensors; use it in a `with` statement."""

    def __init__(self, gguf: GGUFFile, model: Any) -> None:
        self.gguf, self._model = gguf, model
        self.vocab = llama.llama_model_get_vocab(model)
        adds_bos = llama.llama_vocab_get_add_bos(self.vocab)
        self.bos: int | None = llama.llama_vocab_bos(self.vocab) if adds_bos else None

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Load the keys of a file alone.

        Raises:
            GGUFError: the file is missing or corrupt, or llama.cpp refuses it.
        """
        gguf = corrected(GGUFFile.open(path))
        params = default_model_params(gguf.changes)
        params.vocab_only, params.n_gpu_layers = True, 0
        with engine_log.capture() as log:
            model = llama.llama_model_load_from_file(bytes(Path(path)), params)
        if model is None:
            raise GGUFError(f"llama.cpp cannot load {path}: {log.cause()}")
        return Vocabulary(gguf, model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what was loaded; a second call does nothing."""
        if self._model is not None:
            llama.llama_model_free(self._model)
            self._model = self.vocab = None

    def tokenize(self, text: str, *, special: bool, add_bos: bool = False) -> list[int]:
        """Token ids of `text`; "<|system|>" in it becomes that token only if `special`.

        `add_bos` follows the file's own rule (`tokenizer.ggml.add_bos_token`).
        """
        if not (special and self._markers):
            return self._tokenize(text, special, add_bos)
        parts = re.split("(" + "|".join(map(re.escape, self._markers)) + ")", text)
        tokens = self._tokenize(parts[0], special, add_bos)
        for marker, part in zip(parts[1::2], parts[2::2], strict=True):
            tokens += [self._markers[marker], *self._tokenize(part, special, False)]
        return tokens

    def _tokenize(self, text: str, special: bool, add_bos: bool) -> list[int]:
        raw = text.encode("utf-8", errors="replace")
        room = len(raw) + 2
        tokens = (llama.llama_token * room)()
        count = llama.llama_tokenize(self.vocab, raw, len(raw), tokens, room, add_bos, special)
        if count < 0:
            raise Dots1Error("llama.cpp could not tokenise the text")
        return list(tokens[:count])

    @cached_property
    def _markers(self) -> Mapping[str, int]:
        """The control tokens that llama.cpp takes for text, because the file says so."""
        if all(change.key != TOKEN_TYPES for change in self.gguf.changes):
            return {}
        kinds = self.gguf.keys[TOKEN_TYPES]
        assert isinstance(kinds, list)
        controls = (token for token, kind in enumerate(kinds) if kind == _CONTROL)
        texts = self.gguf.keys.strings("tokenizer.ggml.tokens")
        found = {texts[token]: token for token in controls if not self._is_control(token)}
        return dict(sorted(found.items(), key=lambda item: -len(item[0])))

    def _is_control(self, token: int) -> bool:
        return bool(llama.llama_vocab_is_control(self.vocab, token))

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token, perhaps a part of a character.

        A control token has none, or its name if `special`.
        """
        if name := self._marker_names.get(token):
            return name.encode() if special else b""
        size = 64
        while size <= _MAX_PIECE:
            buffer = ctypes.create_string_buffer(size)
            count: int = llama.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count
        raise GGUFError(f"{self.gguf.files[0]} has a token of {size} bytes (id {token})")

    @cached_property
    def _marker_names(self) -> Mapping[int, str]:
        return {token: name for name, token in self._markers.items()}
