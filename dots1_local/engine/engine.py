"""A dots1 GGUF loaded into llama.cpp: tokens in, logits out.

This is llama.cpp's C API as the llama-cpp-python bindings expose it, not their `Llama` class,
which cannot place experts and keeps logits for a whole context. No call here computes more than
one ubatch, so that Ctrl-C is heard between two of them.
"""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from llama_cpp import llama_cpp as llama
from numpy.typing import NDArray

from dots1_local.engine import log as engine_log
from dots1_local.engine.loading import Loaded, load_model
from dots1_local.engine.model_params import Settings, settings
from dots1_local.engine.vocabulary import tokenize
from dots1_local.errors import Dots1Error, GGUFError, UsageError
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.placement import Placement
from dots1_local.progress import Progress, silent
from dots1_local.verify import check_loadable

__all__ = ["Engine", "Entry"]

_LONGEST_PIECE = 1 << 16


@dataclass(frozen=True)
class Entry:
    """One token of a ubatch: its position, its sequence, and whether its logits are computed."""

    token: int
    position: int
    seq_id: int = 0
    logits: bool = False


class Engine:
    """A model and one context; use it in a `with` statement.

    `n_ctx` is what one sequence may hold; `vocab` is a llama.cpp handle. `report` is what the
    engine took of each device, and `predicted` what the placement should take, if there is one;
    `warnings` are sentences for whoever asked for it.
    """

    def __init__(
        self, gguf: GGUFFile, loaded: Loaded, made: Settings, placement: Placement | None
    ) -> None:
        self.gguf = gguf
        self.n_ctx, self.n_ubatch = made.n_ctx, made.n_ubatch
        self.settings, self.placement = made, placement
        self.report, self.predicted = loaded.report, loaded.predicted
        self.warnings = loaded.warnings
        self._n_outputs = made.n_outputs
        self._loaded, self.context = loaded, loaded.context
        self._memory = llama.llama_get_memory(self.context)
        self._batch = llama.llama_batch_init(self.n_ubatch, 0, 1)
        self.vocab = llama.llama_model_get_vocab(loaded.model)
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
        placement: Placement | None = None,
        n_ctx: int | None = None,
        n_ubatch: int | None = None,
        n_sequences: int = 1,
        threads: int | None = None,
        flash_attention: bool | None = None,
        kv_type: str | None = None,
        all_logits: bool = False,
        shared_cache: bool = False,
        progress: Progress = silent,
    ) -> Self:
        """Load the model and make a context of `n_sequences` × `n_ctx` tokens.

        All on the CPU, or as `placement` says; what is given besides wins over what that says.
        `n_ctx` is by default what `default_context` says; 0 is all that the model was trained for.
        `all_logits` makes room for the logits of a whole ubatch (512 tokens); without it, one row a
        sequence can be asked for. `flash_attention` None leaves the choice to llama.cpp. With a
        `shared_cache` sequences can `share` what they begin with.

        Raises:
            GGUFError: unreadable, another architecture, or something llama.cpp refuses.
            UsageError: a placement for another file or other devices.
            OutOfMemory: a device has too little; nothing is left of the attempt.
            Dots1Error: no such context, or a worker that does not answer.
        """
        gguf = GGUFFile.open(path)
        check_loadable(gguf)
        wanted = settings(
            gguf,
            placement,
            n_ctx=n_ctx,
            n_ubatch=n_ubatch,
            n_sequences=n_sequences,
            threads=threads,
            flash_attention=flash_attention,
            kv_type=kv_type,
            all_logits=all_logits,
            shared_cache=shared_cache,
        )
        return cls(gguf, load_model(gguf, placement, wanted, progress), wanted, placement)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and the model; a second call does nothing."""
        if self.context is not None:
            llama.llama_batch_free(self._batch)
            self._loaded.free()
            self.context = self.vocab = None

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
        """Compute one ubatch; the logits (entries with logits, n_vocab), valid until the next call.

        Raises:
            UsageError: more entries than a ubatch holds.
            Dots1Error: llama.cpp failed; its context is full, or memory ran out.
        """
        if not 0 < len(entries) <= self.n_ubatch:
            raise UsageError(f"a ubatch holds 1 to {self.n_ubatch} tokens, not {len(entries)}")
        wanted = sum(entry.logits for entry in entries)
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
            batch.seq_id[place][0] = entry.seq_id
            batch.logits[place] = entry.logits

    def forget(self, position: int = 0, sequence: int = -1) -> None:
        """Drop what is cached from `position` on, of one sequence or (-1) of all."""
        llama.llama_memory_seq_rm(self._memory, sequence, position, -1)

    def share(self, source: int, target: int, length: int) -> None:
        """Have an empty sequence begin with the first `length` tokens of another, computed once.

        Both use the same cells, which stay as long as one of them does; needs `shared_cache`.
        """
        if not self.settings.shared_cache:  # llama.cpp would abort
            raise UsageError("open the engine with shared_cache to let sequences share tokens")
        llama.llama_memory_seq_cp(self._memory, source, target, 0, length)
