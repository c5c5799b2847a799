"""Keeping an answer to a grammar: llama.cpp says which tokens may come next.

A token is chosen first and then tested; only if the grammar refuses it are all tokens tested, which
takes milliseconds. llama.cpp throws where a grammar accepts a token it does not allow, and that
ends the process: so only tested tokens are given to it.
"""

import codecs
import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as llama
from numpy.typing import NDArray

from dots1_local.chat.grammar import Grammar
from dots1_local.engine import log as engine_log
from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error

__all__ = ["Constraint"]

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_UNWRITTEN = (2, 3, 5)  # UNKNOWN, CONTROL and UNUSED of enum llama_token_type: no visible text
_DEEPEST = 500  # nested brackets: testing all tokens takes longer with each


@dataclass(frozen=True)
class _Nesting:
    """How deep in brackets a JSON text is at one place."""

    depth: int = 0
    in_string: bool = False
    escaping: bool = False

    def after(self, piece: bytes) -> "_Nesting":
        depth, in_string, escaping = self.depth, self.in_string, self.escaping
        for byte in piece:
            if escaping:
                escaping = False
            elif byte == ord('"'):
                in_string = not in_string
            elif in_string:
                escaping = byte == ord("\\")
            else:
                depth += (byte in b"[{") - (byte in b"]}")
        return _Nesting(depth, in_string, escaping)


class Constraint:
    """A grammar's state in one answer; `close` it after use.

    Raises:
        Dots1Error: the engine's file does not say which tokens end an answer.
    """

    def __init__(self, grammar: Grammar, engine: Engine) -> None:
        self._banned = _banned(engine)
        self._candidates = np.empty(engine.n_vocab, _CANDIDATE)
        self._ids = np.arange(engine.n_vocab, dtype=np.int32)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._nesting = _Nesting()
        with engine_log.errors() as errors:
            self._grammar = llama.llama_sampler_init_grammar(
                engine.vocab, grammar.gbnf.encode(), b"root"
            )
        if not self._grammar:
            raise Dots1Error(f"llama.cpp refuses the grammar: {errors.last()}")

    def close(self) -> None:
        """Free the grammar; a second call does nothing."""
        if self._grammar:
            llama.llama_sampler_free(self._grammar)
            self._grammar = None

    def begin(self) -> None:
        """Start a text."""
        llama.llama_sampler_reset(self._grammar)
        self._decoder.reset()
        self._nesting = _Nesting()

    def next(self, chain: Any, engine: Engine, index: int) -> int:
        """The chain's choice among the tokens that may come next, accepted by both.

        Raises:
            Dots1Error: there is no such token.
        """
        pointer = llama.llama_get_logits_ith(engine.context, index)
        logits = np.ctypeslib.as_array(pointer, shape=(engine.n_vocab,))
        token = self._chosen(chain, logits)
        if not self._accept(token, engine):
            token = self._another(chain, logits, engine)
        llama.llama_sampler_accept(chain, token)
        return token

    def _another(self, chain: Any, logits: NDArray[np.float32], engine: Engine) -> int:
        self._fill(logits)
        llama.llama_sampler_apply(self._grammar, ctypes.byref(_array(self._candidates)))
        allowed = self._candidates["logit"].copy()
        allowed[self._banned] = -np.inf
        if self._nesting.depth == _DEEPEST and not self._nesting.in_string:
            allowed[_opening(engine)] = -np.inf
        while np.isfinite(allowed).any():
            token = self._chosen(chain, allowed)
            if self._accept(token, engine):
                return token
            allowed[token] = -np.inf
        raise Dots1Error("no token of the model continues what its answer must be")

    def _chosen(self, chain: Any, logits: NDArray[np.float32]) -> int:
        self._fill(logits)
        candidates = _array(self._candidates)
        llama.llama_sampler_apply(chain, ctypes.byref(candidates))
        return int(self._candidates["id"][candidates.selected])

    def _fill(self, logits: NDArray[np.float32]) -> None:
        self._candidates["id"] = self._ids
        self._candidates["logit"] = logits

    def _accept(self, token: int, engine: Engine) -> bool:
        """Accept the token as the text's next; False if the grammar refuses it."""
        if self._banned[token]:
            return False
        single = np.array([(token, 1, 0)], _CANDIDATE)
        llama.llama_sampler_apply(self._grammar, ctypes.byref(_array(single)))
        if single["logit"][0] == -np.inf:
            return False
        if engine.is_end(token):  # only its own end tokens were tested as such
            return bool(llama.llama_vocab_is_eog(engine.vocab, token))
        piece, before = engine.piece(token), self._decoder.getstate()
        nesting = self._nesting.after(piece)
        if nesting.depth > _DEEPEST:
            return False
        try:
            self._decoder.decode(piece)
        except UnicodeDecodeError:  # llama.cpp accepts overlong UTF-8
            self._decoder.setstate(before)
            return False
        self._nesting = nesting
        llama.llama_sampler_accept(self._grammar, token)
        return True


def _array(candidates: NDArray[np.void]) -> Any:
    """llama.cpp's view of the candidates, valid as long as they are."""
    data = candidates.ctypes.data_as(ctypes.POINTER(llama.llama_token_data))
    return llama.llama_token_data_array(data, len(candidates), -1, False)


def _opening(engine: Engine) -> NDArray[np.bool_]:
    """Tokens (n_vocab,) with an opening bracket in their text."""
    found = np.zeros(engine.n_vocab, np.bool_)
    tokens = engine.gguf.keys.get("tokenizer.ggml.tokens")
    for token, text in enumerate(tokens[: engine.n_vocab] if isinstance(tokens, list) else ()):
        found[token] = "[" in str(text) or "{" in str(text)
    return found


def _banned(engine: Engine) -> NDArray[np.bool_]:
    """Tokens (n_vocab,) that llama.cpp's grammars misjudge.

    It takes control tokens for the text of their names, which answers do not show. Those that it
    takes for an end of the answer are fine.
    """
    if "tokenizer.ggml.eos_token_id" not in engine.gguf.keys:  # llama.cpp would take id 11 for it
        raise Dots1Error(
            f"{engine.gguf.files[0]} does not say which token ends an answer, so no answer of it "
            "can be kept to a schema"
        )
    banned = np.zeros(engine.n_vocab, np.bool_)
    kinds = engine.gguf.keys.get("tokenizer.ggml.token_type")
    if isinstance(kinds, list):
        known = kinds[: engine.n_vocab]
        banned[: len(known)] = np.isin(known, _UNWRITTEN)
    for token in np.flatnonzero(banned):
        banned[token] = not llama.llama_vocab_is_eog(engine.vocab, int(token))
    return banned
