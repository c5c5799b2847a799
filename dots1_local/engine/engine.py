"""A dots1 GGUF loaded into llama.cpp: tokens in, logits out.

This uses llama.cpp's C API through the llama-cpp-python bindings, not their `Llama` class, which
cannot place experts and keeps logits for a whole context. No call computes more than one ubatch, so
that Ctrl-C takes effect between two of them.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as llama
from numpy.typing import NDArray

from dots1_local.engine import log as engine_log
from dots1_local.engine.loading import Loaded, load_model
from dots1_local.engine.model_params import EngineParams
from dots1_local.engine.vocabulary import Vocabulary
from dots1_local.engine.watch import Call, engine_call
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.gguf import GGUFFile
from dots1_local.files.gguf_keys import Change
from dots1_local.placement.placement import Placement
from dots1_local.progress import Progress, silent
from dots1_local.verify import check_loadable
from dots1_local.verify.correct import TEMPLATE, corrected

__all__ = ["Engine", "Entry", "Vocabulary", "open_loadable"]


@dataclass(frozen=True)
class Entry:
    """One token of a ubatch: its position, its sequence, and whether its logits are computed."""

    token: int
    position: int
    seq_id: int = 0
    logits: bool = False


class Engine(Vocabulary):
    """A model and one context; use it in a `with` statement.

    `n_ctx` is the tokens that one sequence may hold, and `vocab` a handle of llama.cpp's. `report`
    is what the engine allocated on each device, and `predicted` what the placement, if there is
    one, should take. `warnings` are sentences for the user. `says_end` tells whether the file has
    a token that ends responses.
    """

    def __init__(
        self, gguf: GGUFFile, loaded: Loaded, params: EngineParams, placement: Placement | None
    ) -> None:
        super().__init__(gguf, loaded.model)
        self.n_ctx, self.n_ubatch = params.n_ctx, params.n_ubatch
        self.params, self.placement = params, placement
        self.report, self.predicted = loaded.report, loaded.predicted
        self.warnings = loaded.warnings
        self._loaded, self.context, self._lock = loaded, loaded.context, RLock()
        self._memory = llama.llama_get_memory(self.context)
        self._batch = llama.llama_batch_init(self.n_ubatch, 0, 1)
        self.n_vocab: int = llama.llama_vocab_n_tokens(self.vocab)
        self._ends = {gguf.keys.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot")}
        # Without such a token llama.cpp ends responses at token 11, which is a comma here.
        eos = gguf.keys.get("tokenizer.ggml.eos_token_id")
        self.says_end = isinstance(eos, int) and 0 <= eos < self.n_vocab
        self._assumed_end = None if self.says_end else llama.llama_vocab_eos(self.vocab)

    @classmethod
    def open(
        cls,
        model: str | Path | GGUFFile,
        *,
        placement: Placement | None = None,
        progress: Progress = silent,
        **params: Any,
    ) -> "Engine":
        """Load a model and make a context, on the CPU or as `placement` says.

        `model` is a path, or a file that `open_loadable` has read. `params` are those of
        `EngineParams`, and take precedence over the placement.

        Raises:
            GGUFError: the file is unreadable, of another architecture, or llama.cpp refuses it.
            UsageError: the placement is for another file or other devices, or llama.cpp cannot make
                such a context.
            OutOfMemory: a device has too little memory; nothing stays loaded.
            Dots1Error: llama.cpp cannot make the context, or a worker does not answer.
        """
        gguf = model if isinstance(model, GGUFFile) else open_loadable(model)
        chosen = EngineParams.choose(gguf, placement, **params)
        return cls(gguf, load_model(gguf, placement, chosen, progress), chosen, placement)

    def close(self) -> None:
        """Free the context and the model; a second call does nothing."""
        with self.call():
            if self._model is not None:
                llama.llama_batch_free(self._batch)
                self._loaded.free()
                self._model = self.context = self.vocab = None

    @contextmanager
    def call(self) -> Iterator[Call]:
        """Within, llama.cpp may be called with the context: alone, and watched (`watch`)."""
        with engine_call(self._loaded.workers) as call, self._lock:
            yield call

    def is_end(self, token: int) -> bool:
        """Whether a response ends with this token."""
        return token in self._ends or (
            token != self._assumed_end and bool(llama.llama_vocab_is_eog(self.vocab, token))
        )

    def decode(
        self, tokens: Sequence[int], position: int, sequence: int = 0, *, drafted: int = 0
    ) -> NDArray[np.float32]:
        """Append `tokens` at `position` of a sequence; return the last one's logits (n_vocab,).

        The logits of as many tokens before it as are `drafted` are computed too.
        """
        first = len(tokens) - 1 - drafted
        entries = [Entry(t, position + i, sequence, i >= first) for i, t in enumerate(tokens)]
        for start in range(0, len(entries), self.n_ubatch):
            rows = self.submit(entries[start : start + self.n_ubatch])
        logits: NDArray[np.float32] = rows[-1]
        return logits

    def submit(self, entries: Sequence[Entry]) -> NDArray[np.float32]:
        """Compute one ubatch; return the logits (entries with logits, n_vocab).

        The array is valid until the next call.

        Raises:
            UsageError: a ubatch does not hold so many entries.
            Dots1Error: llama.cpp failed; its context is full, or memory ran out.
        """
        if not 0 < len(entries) <= self.n_ubatch:
            raise UsageError(f"a ubatch holds 1 to {self.n_ubatch} tokens, not {len(entries)}")
        n_rows = sum(entry.logits for entry in entries)
        if n_rows > self.params.n_outputs:  # llama.cpp would abort
            raise UsageError("open the engine with n_scored or all_logits for so many logits")
        self._fill(entries)
        with self.call(), engine_log.capture() as log:
            status = llama.llama_decode(self.context, self._batch)
            if n_rows and not status:  # it waits for what is computed
                logits = llama.llama_get_logits(self.context)
        if status == 1:
            raise Dots1Error(f"the context of {self.n_ctx} tokens is full")
        if status:
            raise Dots1Error(f"llama.cpp failed to compute ({status}): {log.cause()}")
        if not n_rows:
            return np.empty((0, self.n_vocab), np.float32)
        return np.ctypeslib.as_array(logits, shape=(n_rows, self.n_vocab))

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
        with self.call():
            llama.llama_memory_seq_rm(self._memory, sequence, position, -1)

    def copy(self, sequence: int, start: int, end: int) -> NDArray[np.uint8] | None:
        """Copy what is cached of the tokens from `start` to `end` of a sequence.

        The bytes are as llama.cpp writes them; None if that fails. Needs `shared_cache`.
        """
        spare = self._spare
        llama.llama_memory_seq_cp(self._memory, sequence, spare, start, end)
        state = np.empty(llama.llama_state_seq_get_size(self.context, spare), np.uint8)
        with self.call(), engine_log.capture():
            count = llama.llama_state_seq_get_data(
                self.context, _bytes_of(state), state.nbytes, spare
            )
        self.forget(0, spare)
        return state if count == state.nbytes else None

    def paste(self, state: NDArray[np.uint8], sequence: int, start: int, end: int) -> bool:
        """Append what `copy` returned to a sequence, which ends at `start`; False if that fails.

        Needs `shared_cache`.
        """
        spare = self._spare
        with self.call(), engine_log.capture():
            count = llama.llama_state_seq_set_data(
                self.context, _bytes_of(state), state.nbytes, spare
            )
        first = llama.llama_memory_seq_pos_min(self._memory, spare)
        last = llama.llama_memory_seq_pos_max(self._memory, spare)
        pasted = count == state.nbytes and (first, last) == (start, end - 1)
        if pasted:
            llama.llama_memory_seq_cp(self._memory, spare, sequence, 0, -1)
        self.forget(0, spare)
        return pasted

    @property
    def _spare(self) -> int:
        """The sequence that is for copies alone."""
        if not self.params.shared_cache:
            raise UsageError("open the engine with shared_cache to copy parts of sequences")
        return self.params.n_sequences

    def share(self, source: int, target: int, length: int) -> None:
        """Let an empty sequence begin with the first `length` tokens of another.

        They are not computed again: both sequences use the same cells, which stay as long as one of
        them does. Needs `shared_cache`.
        """
        if not self.params.shared_cache:  # llama.cpp would abort
            raise UsageError("open the engine with shared_cache to let sequences share tokens")
        llama.llama_memory_seq_cp(self._memory, source, target, 0, length)


def _bytes_of(array: NDArray[np.uint8]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def open_loadable(path: str | Path, chat_template: str | None = None) -> GGUFFile:
    """Read a file's header, correct its keys in memory, and refuse what llama.cpp cannot load.

    A `chat_template` takes the place of the file's.

    Raises:
        GGUFError: the file is unreadable, of another architecture, or something in it is wrong.
    """
    gguf = corrected(GGUFFile.open(path))
    check_loadable(gguf)
    if chat_template is not None:
        gguf = gguf.corrected((Change(TEMPLATE, "string", chat_template),))
    return gguf
