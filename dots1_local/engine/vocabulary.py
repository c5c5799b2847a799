"""llama.cpp's tokeniser without a model: what it makes of a text, it makes of it everywhere."""

from pathlib import Path
from typing import Any, Self

from llama_cpp import llama_cpp as llama

from dots1_local.engine import log as engine_log
from dots1_local.errors import Dots1Error, GGUFError
from dots1_local.files.gguf import GGUFFile

__all__ = ["Vocabulary", "tokenize"]


def tokenize(vocab: Any, text: str, *, special: bool, add_bos: bool = False) -> list[int]:
    """Token ids of `text` by a llama.cpp vocabulary handle.

    Only with `special` does "<|system|>" in it become that token; `add_bos` follows the file's own
    rule (`tokenizer.ggml.add_bos_token`).
    """
    raw = text.encode("utf-8", errors="replace")
    room = len(raw) + 2
    tokens = (llama.llama_token * room)()
    count = llama.llama_tokenize(vocab, raw, len(raw), tokens, room, add_bos, special)
    if count < 0:
        raise Dots1Error("llama.cpp could not tokenise the text")
    return list(tokens[:count])


class Vocabulary:
    """The tokens of a GGUF file, whose tensors may be missing; use it in a `with` statement."""

    def __init__(self, gguf: GGUFFile, model: Any) -> None:
        self.gguf, self._model = gguf, model
        self._vocab = llama.llama_model_get_vocab(model)
        adds_bos = llama.llama_vocab_get_add_bos(self._vocab)
        self.bos: int | None = llama.llama_vocab_bos(self._vocab) if adds_bos else None

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Load the keys alone.

        Raises:
            GGUFError: the file is missing or corrupt, or llama.cpp refuses it.
        """
        gguf = GGUFFile.open(path)
        params = llama.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = True, 0
        with engine_log.errors() as errors:
            model = llama.llama_model_load_from_file(bytes(Path(path)), params)
        if model is None:
            raise GGUFError(f"llama.cpp cannot load {path}: {errors.last()}")
        return cls(gguf, model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        llama.llama_model_free(self._model)

    def tokenize(self, text: str, *, special: bool, add_bos: bool = False) -> list[int]:
        """Token ids of a text; see `tokenize`."""
        return tokenize(self._vocab, text, special=special, add_bos=add_bos)
