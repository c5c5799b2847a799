"""A dots1 GGUF loaded into llama.cpp: tokens in, logits out.

This is llama.cpp's C API as the llama-cpp-python bindings expose it, not their `Llama` class,
which cannot place experts and keeps logits for a whole context. No call here computes more than
one ubatch, so that Ctrl-C is heard between two of them.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from llama_cpp import llama_cpp as llama
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error, GGUFError, UsageError
from dots1_local.gguf_file import GGUFFile
from dots1_local.progress import Progress, silent
from dots1_local.quant.types import quant_type
from dots1_local.runtime import engine_log
from dots1_local.runtime.hardware import physical_cores
from dots1_local.runtime.vocabulary import tokenize
from dots1_local.verify.lint import obstacle

__all__ = ["Engine", "Entry"]

_FLASH_ATTENTION = {None: -1, False: 0, True: 1}  # enum llama_flash_attn_type
_LONGEST_PIECE = 1 << 16
_USUAL_CONTEXT = 4096  # 4 GB of KV cache in dots.llm1


@dataclass(frozen=True)
class Entry:
    """One token of a ubatch: where it stands, in which sequence, whether its logits are wanted."""

    token: int
    position: int
    sequence: int = 0
    wanted: bool = False


class Engine:
    """A model and one context on the CPU; use it in a `with` statement.

    `n_ctx` is what one sequence may hold; `vocab` is a llama.cpp handle.
    """

    def __init__(
        self, gguf: GGUFFile, model: Any, context: Any, n_ctx: int, n_ubatch: int, n_outputs: int
    ) -> None:
        self.gguf = gguf
        self.n_ctx, self.n_ubatch = n_ctx, n_ubatch
        self._n_outputs = n_outputs
        self._model, self.context = model, context
        self._memory = llama.llama_get_memory(context)
        self._batch = llama.llama_batch_init(n_ubatch, 0, 1)
        self.vocab = llama.llama_model_get_vocab(model)
        self.n_vocab: int = llama.llama_vocab_n_tokens(self.vocab)
        self._ends = {gguf.keys.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot")}
        adds_bos = llama.llama_vocab_get_add_bos(self.vocab)
        self.bos: int | None = llama.llama_vocab_bos(self.vocab) if adds_bos else None
        # Without the key llama.cpp ends responses at token 11, which is a comma here.
        known = "tokenizer.ggml.eos_token_id" in gguf.keys
        self._assumed_end = None if known else llama.llama_vocab_eos(self.vocab)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        n_ctx: int | None = None,
        n_ubatch: int = 512,
        n_sequences: int = 1,
        threads: int | None = None,
        flash_attention: bool | None = None,
        kv_type: str = "F16",
        all_logits: bool = False,
        progress: Progress = silent,
    ) -> Self:
        """Load the model and make a context of `n_sequences` × `n_ctx` tokens.

        `n_ctx` is by default what the model was trained for, but at most 4096; 0 is all of it.
        `all_logits` makes room for the logits of a whole ubatch; without it, one row a sequence can
        be asked for. `flash_attention` None leaves the choice to llama.cpp.

        Raises:
            GGUFError: unreadable, another architecture, or something llama.cpp refuses.
            UsageError: a context longer than the model was trained for.
            Dots1Error: no memory for the context.
        """
        gguf = GGUFFile.open(path)
        check_loadable(gguf)
        n_ctx = _context_length(gguf, n_ctx)
        n_ubatch = min(n_ubatch, n_ctx * n_sequences)
        params = llama.llama_context_default_params()
        params.n_ctx = n_ctx * n_sequences
        params.n_seq_max = n_sequences
        params.n_batch = params.n_ubatch = n_ubatch
        params.n_outputs_max = n_ubatch if all_logits else n_sequences
        params.n_threads = params.n_threads_batch = _threads(threads)
        params.flash_attn_type = _FLASH_ATTENTION[flash_attention]
        params.type_k = params.type_v = quant_type(kv_type).ggml
        params.no_perf = True
        model = _load_model(gguf, progress)
        context = _make_context(gguf, model, params)
        return cls(gguf, model, context, n_ctx, n_ubatch, params.n_outputs_max)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and the model; a second call does nothing."""
        if self.context is not None:
            llama.llama_batch_free(self._batch)
            llama.llama_free(self.context)
            llama.llama_model_free(self._model)
            self.context = self._model = self.vocab = None

    def tokenize(self, text: str, *, special: bool, add_bos: bool = False) -> list[int]:
        """Token ids of `text`; only with `special` does "<|system|>" in it become that token.

        `add_bos` follows the file's own rule (`tokenizer.ggml.add_bos_token`).
        """
        return tokenize(self.vocab, text, special=special, add_bos=add_bos)

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for, maybe a part of a character; none for a control token."""
        size = 64
        while size <= _LONGEST_PIECE:
            buffer = ctypes.create_string_buffer(size)
            count: int = llama.llama_token_to_piece(self.vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count
        raise GGUFError(f"{self.gguf.files[0]} has a token of {size} bytes (id {token})")

    def is_end(self, token: int) -> bool:
        """Whether a response ends with this token."""
        return token in self._ends or (
            token != self._assumed_end and bool(llama.llama_vocab_is_eog(self.vocab, token))
        )

    def decode(
        self, tokens: Sequence[int], position: int, sequence: int = 0
    ) -> NDArray[np.float32]:
        """Append `tokens` at `position` of a sequence; the logits (n_vocab,) of the last one."""
        last = len(tokens) - 1
        entries = [Entry(t, position + i, sequence, i == last) for i, t in enumerate(tokens)]
        for start in range(0, len(entries), self.n_ubatch):
            rows = self.submit(entries[start : start + self.n_ubatch])
        logits: NDArray[np.float32] = rows[-1]
        return logits

    def decode_all(
        self, tokens: Sequence[int], position: int, sequence: int = 0
    ) -> Iterator[NDArray[np.float32]]:
        """The same, yielding the logits (n, n_vocab) of all tokens a ubatch at a time.

        Each array is llama.cpp's own and valid until the next one; needs `all_logits`.
        """
        entries = [Entry(t, position + i, sequence, True) for i, t in enumerate(tokens)]
        for start in range(0, len(entries), self.n_ubatch):
            yield self.submit(entries[start : start + self.n_ubatch])

    def submit(self, entries: Sequence[Entry]) -> NDArray[np.float32]:
        """Compute one ubatch; the logits (wanted entries, n_vocab), valid until the next call.

        Raises:
            UsageError: more entries than a ubatch holds.
            Dots1Error: llama.cpp failed; its context is full, or memory ran out.
        """
        if not 0 < len(entries) <= self.n_ubatch:
            raise UsageError(f"a ubatch holds 1 to {self.n_ubatch} tokens, not {len(entries)}")
        wanted = sum(entry.wanted for entry in entries)
        if wanted > self._n_outputs:  # llama.cpp would abort
            raise UsageError("open the engine with all_logits to ask for so many logits")
        self._fill(entries)
        with engine_log.errors() as errors:
            status = llama.llama_decode(self.context, self._batch)
        if status == 1:
            raise Dots1Error(f"the context of {self.n_ctx} tokens is full")
        if status:
            raise Dots1Error(f"llama.cpp failed to compute ({status}): {errors.last()}")
        if not wanted:
            return np.empty((0, self.n_vocab), np.float32)
        logits = llama.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, shape=(wanted, self.n_vocab))

    def _fill(self, entries: Sequence[Entry]) -> None:
        batch = self._batch
        batch.n_tokens = len(entries)
        for place, entry in enumerate(entries):
            batch.token[place] = entry.token
            batch.pos[place] = entry.position
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = entry.sequence
            batch.logits[place] = entry.wanted

    def forget(self, position: int = 0, sequence: int = -1) -> None:
        """Drop what is cached from `position` on, of one sequence or (-1) of all."""
        llama.llama_memory_seq_rm(self._memory, sequence, position, -1)


def _threads(wanted: int | None) -> int:
    """As asked, but never more than there are: llama.cpp only gets slower, or fails to start."""
    return min(wanted, os.cpu_count() or wanted) if wanted else physical_cores()


def check_loadable(gguf: GGUFFile) -> None:
    """Refuse what llama.cpp would load wrong, or abort the process over.

    Raises:
        GGUFError: another architecture, no model at all, or something is wrong with it.
    """
    if found := obstacle(gguf):
        raise GGUFError(f"dots1 verify finds in {gguf.files[0]}: {found.message}")


def _context_length(gguf: GGUFFile, wanted: int | None) -> int:
    """The context to make; beyond what a model was trained for, answers fall apart."""
    trained = gguf.keys.get("dots1.context_length")
    if not isinstance(trained, int) or trained < 1:
        raise GGUFError(f"{gguf.files[0]} has no dots1.context_length; convert it again")
    if wanted is None:
        return min(trained, _USUAL_CONTEXT)
    if wanted > trained:
        raise UsageError(
            f"{gguf.files[0]} was trained for contexts of {trained} tokens, not {wanted}"
        )
    return wanted or trained


def _load_model(gguf: GGUFFile, progress: Progress) -> Any:
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    total, interrupted = gguf.nbytes, []

    @llama.llama_progress_callback  # type: ignore[untyped-decorator]
    def report(fraction: float, _: Any) -> bool:
        try:
            progress(int(fraction * total), total, "bytes", "loading")
        except BaseException as error:  # Ctrl-C arrives here; ctypes would swallow it
            interrupted.append(error)
        return not interrupted

    params.progress_callback = report
    with engine_log.errors() as errors:
        model = llama.llama_model_load_from_file(bytes(gguf.files[0]), params)
    if interrupted:
        raise interrupted[0]
    if model is None:
        raise GGUFError(f"llama.cpp cannot load {gguf.files[0]}: {errors.last()}")
    return model


def _make_context(gguf: GGUFFile, model: Any, params: Any) -> Any:
    with engine_log.errors() as errors:
        context = llama.llama_init_from_model(model, params)
    if context is None:
        llama.llama_model_free(model)
        raise Dots1Error(
            f"llama.cpp cannot make a context of {params.n_ctx} tokens for {gguf.files[0]} "
            f"(try a smaller one): {errors.last()}"
        )
    return context
