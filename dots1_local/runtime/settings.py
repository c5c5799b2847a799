"""How a context is made: what was asked for, else what a placement says, else what is usual."""

import os
from dataclasses import dataclass, replace

from dots1_local.errors import GGUFError
from dots1_local.gguf_file import GGUFFile
from dots1_local.runtime.devices.hardware import physical_cores
from dots1_local.runtime.placing.placement import Placement, check_context

__all__ = ["Settings", "settings", "trained_for"]

_USUAL_CONTEXT = 4096  # 4 GB of KV cache in dots.llm1


@dataclass(frozen=True)
class Settings:
    """How the context is made: `n_sequences` × `n_ctx` tokens, `n_outputs` logits a ubatch.

    In a `shared_cache` sequences may hold the same cells, and a ubatch may mix them at will.
    """

    n_ctx: int
    n_ubatch: int
    n_sequences: int
    n_outputs: int
    threads: int
    flash_attention: bool | None
    kv_type: str
    shared_cache: bool = False

    def applied_to(self, placement: Placement) -> Placement:
        """The placement as it will be: what was asked for explicitly has replaced its own."""
        return replace(
            placement,
            context=self.n_ctx,
            sequences=self.n_sequences if self.shared_cache else 1,
            ubatch=self.n_ubatch,
            threads=self.threads,
            kv_type=self.kv_type.upper(),
            flash_attention=bool(self.flash_attention),
        )


def settings(
    gguf: GGUFFile,
    placement: Placement | None,
    *,
    n_ctx: int | None = None,
    n_ubatch: int | None = None,
    n_sequences: int = 1,
    threads: int | None = None,
    flash_attention: bool | None = None,
    kv_type: str | None = None,
    all_logits: bool = False,
    shared_cache: bool = False,
) -> Settings:
    """What was asked for, else what the placement says, else what is usual.

    Raises:
        GGUFError: the file does not say what context the model was trained for.
        UsageError: a context that llama.cpp cannot count, or too many sequences.
    """
    if placement:
        n_ctx = placement.context if n_ctx is None else n_ctx
        n_ubatch = n_ubatch or placement.ubatch
        threads = threads or placement.threads
        kv_type = kv_type or placement.kv_type
        if flash_attention is None:
            flash_attention = placement.flash_attention
    n_ctx = _context_length(gguf, n_ctx, n_sequences)
    n_ubatch = min(n_ubatch or 512, n_ctx * n_sequences)
    return Settings(
        n_ctx=n_ctx,
        n_ubatch=n_ubatch,
        n_sequences=n_sequences,
        n_outputs=n_ubatch if all_logits else n_sequences,
        threads=_threads(threads),
        flash_attention=flash_attention,
        kv_type=kv_type or "F16",
        shared_cache=shared_cache,
    )


def _context_length(gguf: GGUFFile, wanted: int | None, n_sequences: int) -> int:
    trained = trained_for(gguf)
    n_ctx = min(trained, _USUAL_CONTEXT) if wanted is None else wanted or trained
    check_context(n_ctx, n_sequences)
    return n_ctx


def trained_for(gguf: GGUFFile) -> int:
    """The context that the model was trained for, in tokens.

    Raises:
        GGUFError: the file does not say.
    """
    trained = gguf.keys.get("dots1.context_length")
    if not isinstance(trained, int) or trained < 1:
        raise GGUFError(f"{gguf.files[0]} has no dots1.context_length; convert it again")
    return trained


def _threads(wanted: int | None) -> int:
    """As asked, but never more than there are: llama.cpp only gets slower, or fails to start."""
    return min(wanted, os.cpu_count() or wanted) if wanted else physical_cores()
