"""The parameters of an engine, and what llama.cpp is told of a placement before it loads a model.

The order matters: backends read the environment once when they start, a worker is probed before the
engine connects to it, and a device is looked up before it is used.
"""

import ctypes
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llama_cpp import llama_cpp as llama

from dots1_local.architecture import Dots1Config
from dots1_local.devices import backends, rpc
from dots1_local.devices.drivers import remedy
from dots1_local.devices.limits import physical_cores
from dots1_local.errors import UsageError
from dots1_local.files.gguf import GGUFFile
from dots1_local.files.gguf_keys import Change
from dots1_local.placement.placement import (
    MIN_BATCH,
    HostMemory,
    Placement,
    check_context,
    check_made_for,
    check_sequences,
    default_context,
)
from dots1_local.verify.correct import Override, key_overrides

__all__ = [
    "EngineParams", "connected", "default_model_params", "endpoints", "has_moe_cache",
    "model_params", "prepare",
]  # fmt: skip


@dataclass(frozen=True)
class EngineParams:
    """How an engine runs a model: the keywords that `load` and `Engine.open` take.

    A keyword that is left out or None takes its value from the placement, if there is one, else
    the default. The context holds `n_sequences` sequences (1) of `n_ctx` tokens each. `n_ctx` is
    by default what `default_context` says; 0 stands for all that the model was trained for.
    `n_ubatch` is the tokens that are computed at once (512). `threads` is for the CPU, by default
    its physical cores. `flash_attention` None leaves the choice to llama.cpp. `kv_type` is the
    type of the KV cache (F16). A ubatch can give the logits of one token for each sequence, those
    of one token and a draft of `n_draft` tokens, and those of `n_scored` tokens of prompts;
    `all_logits` makes room for those of a whole ubatch. With a `shared_cache` sequences can share
    their first tokens, a ubatch may mix sequences of any length, and parts of a sequence can be
    copied out and in.
    """

    n_ctx: int
    n_ubatch: int = 512
    n_sequences: int = 1
    threads: int = field(default_factory=physical_cores)
    flash_attention: bool | None = None
    kv_type: str = "F16"
    all_logits: bool = False
    shared_cache: bool = False
    n_draft: int = 0
    n_scored: int = 0

    @classmethod
    def choose(cls, gguf: GGUFFile, placement: Placement | None, **given: Any) -> "EngineParams":
        """Complete the parameters that are `given`.

        Raises:
            GGUFError: the file lacks numbers of the model.
            UsageError: llama.cpp cannot make such a context, or a number is too small or large.
        """
        known: dict[str, Any] = {}
        if placement:
            known |= {
                "n_ctx": placement.context,
                "n_ubatch": placement.ubatch,
                "threads": placement.threads,
                "kv_type": placement.kv_type,
                "flash_attention": placement.flash_attention,
            }
        known |= {name: value for name, value in given.items() if value is not None}
        trained = Dots1Config.from_gguf(gguf.keys, gguf.files[0]).max_position_embeddings
        default = default_context(trained, known.get("n_sequences") or 1)
        params = cls(**known | {"n_ctx": known.get("n_ctx", default) or trained})
        check_context(params.n_ctx, params.n_sequences)
        check_sequences(params.n_seq_max)
        for name in ("n_ubatch", "threads"):
            if getattr(params, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(params, name)}")
        return replace(
            params,
            n_ubatch=min(params.n_ubatch, params.n_ctx * params.n_sequences),
            # more threads than cores only slow llama.cpp down, or keep it from starting
            threads=min(params.threads, os.cpu_count() or params.threads),
        )

    @property
    def n_seq_max(self) -> int:
        """The sequences that llama.cpp is told of: a shared cache has one more, for copies."""
        return self.n_sequences + self.shared_cache

    @property
    def n_outputs(self) -> int:
        """Tokens of a ubatch that can have logits."""
        if self.all_logits:
            return max(self.n_ubatch, self.n_sequences)
        return max(self.n_sequences, min(max(1 + self.n_draft, self.n_scored), self.n_ubatch))

    def applied_to(self, placement: Placement) -> Placement:
        """The placement with these parameters in place of its own."""
        return replace(
            placement,
            context=self.n_ctx,
            sequences=self.n_sequences if self.shared_cache else 1,
            ubatch=self.n_ubatch,
            threads=self.threads,
            kv_type=self.kv_type.upper(),
            flash_attention=bool(self.flash_attention),
        )


_NONE, _MMAP = 0, 1  # enum llama_load_mode
connected: Counter[str] = Counter()  # the number of loaded models by worker
_started = False  # whether the backends have read the environment
# llama.cpp takes the first kind of RAM that fits a weight: pinned, repacked, plain. The other kinds
# are forbidden by: the load mode, use_extra_bufts (repacked), no_host (not pinned).
_HOST_MEMORY: dict[HostMemory, tuple[int, bool, bool]] = {
    "plain": (_NONE, False, True),
    "pinned": (_NONE, False, False),
    "repacked": (_NONE, True, True),
    "mapped": (_MMAP, False, True),
}


# The tag (enum llama_model_kv_override_type) and the field of an override.
_OVERRIDE_TAGS: dict[type, tuple[int, str]] = {
    int: (0, "val_i64"), float: (1, "val_f64"), bool: (2, "val_bool"), str: (3, "val_str"),
}  # fmt: skip


class _Override(ctypes.Structure):
    """struct llama_model_tensor_buft_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def has_moe_cache(bindings: Any = llama) -> bool:
    """Whether the engine can cache experts in VRAM: llama-server's --moe-cache-mib, from b11480.

    Its size is a field of struct llama_context_params; `bindings` are llama-cpp-python's.
    """
    return any(name == "moe_cache_size" for name, *_ in bindings.llama_context_params._fields_)


def prepare(gguf: GGUFFile, placement: Placement) -> list[str]:
    """Check that the placement can be used with this file, connect its workers; return warnings.

    Raises:
        UsageError: the placement is for another file.
        Dots1Error: a worker does not answer.
    """
    check_made_for(placement, gguf)
    warnings = _set_min_batch(placement)
    workers = endpoints(placement)
    # The engine would abort over a wrong address. A worker that serves this process answers nobody.
    rpc.probe(worker for worker in workers if not connected[worker])
    for worker in workers:
        backends.add_worker(worker)
    return warnings


def endpoints(placement: Placement | None) -> tuple[str, ...]:
    """The placement's workers as host:port.

    Raises:
        UsageError: an address is malformed.
    """
    return tuple(dict.fromkeys(map(rpc.parse_endpoint, placement.workers))) if placement else ()


def _set_min_batch(placement: Placement) -> list[str]:
    """Set the environment variable of `offload_min_batch`; return a warning if it is too late."""
    wanted = placement.offload_min_batch
    if wanted is None or os.environ.get(MIN_BATCH) == str(wanted):
        return []
    if _started:
        return [
            f"batches of {os.environ.get(MIN_BATCH, 'the default number of')} tokens, not "
            f"{wanted}, fetch weights from RAM: the engine cannot change that once it runs"
        ]
    os.environ[MIN_BATCH] = str(wanted)
    return []


def _handle(device: str) -> int:
    try:
        return backends.device(device).handle
    except UsageError as error:
        raise UsageError(f"{error}; {remedy(device, backends.backend_names())}") from None


def default_model_params(changes: Sequence[Change] = ()) -> Any:
    """A struct llama_model_params with nothing set but the keys of a file that are changed."""
    params = llama.llama_model_default_params()
    if changes:
        params.kv_overrides = overrides = _key_overrides(key_overrides(changes))
        params.kept = [overrides]  # the struct only points to it
    return params


def model_params(placement: Placement | None, changes: Sequence[Change] = ()) -> Any:
    """A struct llama_model_params; the caller must keep it while the model loads.

    Raises:
        UsageError: this engine has no such device; the message says how to get it.
    """
    global _started  # noqa: PLW0603 -- ggml's registry of backends is global too
    _started = True
    params = default_model_params(changes)
    devices = placement.used_devices if placement else ()
    # Never NULL: llama.cpp would then take all devices, lost workers too, and abort.
    handles = (ctypes.c_void_p * (len(devices) + 1))(*map(_handle, devices), None)
    params.devices = ctypes.cast(handles, ctypes.c_void_p)
    params.n_gpu_layers = placement.gpu_layers if placement else 0
    params.kept = [*getattr(params, "kept", ()), handles]
    if placement:
        layers = [placement.layers.get(device, 0) for device in devices]
        counts = (ctypes.c_float * llama.llama_max_devices())(*layers)
        overrides = _overrides(placement)
        params.tensor_split = counts
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
        mode, extra, no_host = _HOST_MEMORY[placement.host_memory]
        params.load_mode, params.use_extra_bufts, params.no_host = mode, extra, no_host
        params.kept += [counts, overrides]
    return params


def _overrides(placement: Placement) -> Any:
    """An array for `tensor_buft_overrides`, which ends with NULLs."""
    pairs = [(p.encode(), backends.device(d).buffer_type) for p, d in placement.overrides]
    return (_Override * (len(pairs) + 1))(*(_Override(*pair) for pair in pairs))


def _key_overrides(values: Mapping[str, Override]) -> Any:
    """An array for `kv_overrides`, which ends with an empty key."""
    array = (llama.llama_model_kv_override * (len(values) + 1))()
    for place, (key, value) in zip(array, values.items(), strict=False):
        place.key = key.encode()
        place.tag, field = _OVERRIDE_TAGS[type(value)]
        setattr(place.value, field, value.encode() if isinstance(value, str) else value)
    return array
