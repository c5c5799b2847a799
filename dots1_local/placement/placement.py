"""A placement: which device holds what, and how llama.cpp runs the model.

A placement holds decisions only. Bytes and speeds are computed from it elsewhere, so that a plan
file which a person has edited is trusted for its decisions and for nothing else.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from msgspec import Meta

from dots1_local.devices.hardware import CPU
from dots1_local.errors import UsageError
from dots1_local.files.gguf import GGUFFile
from dots1_local.files.json_file import JsonError, convert_json, read_json
from dots1_local.ggml import KV_TYPES, quant_type

__all__ = [
    "MAX_CONTEXT", "MAX_SEQUENCES", "MIN_BATCH", "HostMemory", "Placement", "check_context",
    "check_made_for", "check_sequences", "default_context", "human_context", "load_placement",
    "placement_from_json", "stored_placement",
]  # fmt: skip

# How RAM holds weights: allocated ("plain"), allocated where a GPU can copy them from at full speed
# ("pinned"), allocated and rearranged for the CPU's kernels ("repacked"), or the file ("mapped").
HostMemory = Literal["plain", "pinned", "repacked", "mapped"]

MIN_BATCH = "GGML_OP_OFFLOAD_MIN_BATCH"  # environment variable that holds `offload_min_batch`
MAX_CONTEXT = 1 << 24  # tokens, more than any model was trained for
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
_MAX_TOKENS = (1 << 31) - 1  # of all sequences together
_DEFAULT_CONTEXT, _DEFAULT_SHARE = 16_384, 4096  # tokens of all sequences, and of each at least
_FORMAT, _VERSION = "dots1-placement", 1
_WRITTEN = ("layers", "overrides", "workers")  # in every plan file, though often empty
_BLOCK = re.compile(r"blk\.(\d+)\.")
_MAX_PATTERN = 1 << 11  # characters; naming each layer by itself takes a fraction of it
# Python's re knows these and std::regex does not: groups but (?: (?= (?!, possessive repeats, \A \Z
_PYTHON_ONLY = re.compile(r"\(\?(?![:=!])|[*+?}]\+|\\[AZ]")


@dataclass(frozen=True)
class Placement:
    """What llama.cpp is told, in llama.cpp's own terms.

    `layers` counts the whole layers of each device, in llama.cpp's order; the output layer is the
    last one. If they are fewer than all (blocks + 1), the first layers stay on the CPU. A layer's
    device holds its KV cache and its weights, except weights that match one of `overrides`: pairs
    of a regular expression and a device, of which the first match wins. The embedding is in RAM.
    Ubatches of at least `offload_min_batch` tokens copy weights from RAM to the first GPU; None
    leaves the limit to llama.cpp. `workers` lists the HOST:PORT of each worker in use. `model` and
    `model_bytes` identify the file. `sequences` of `context` tokens each share one KV cache.
    """

    model: Annotated[str, Meta(max_length=1 << 12)]
    model_bytes: Annotated[int, Meta(ge=0)]
    blocks: Annotated[int, Meta(ge=1, le=1 << 10)]
    context: Annotated[int, Meta(ge=1, le=MAX_CONTEXT)]
    kv_type: str
    flash_attention: bool
    ubatch: Annotated[int, Meta(ge=1, le=1 << 20)]
    threads: Annotated[int, Meta(ge=1, le=1 << 12)]
    host_memory: HostMemory
    offload_min_batch: Annotated[int, Meta(ge=1, le=1 << 30)] | None = None
    layers: Mapping[str, Annotated[int, Meta(ge=0, le=1 << 10)]] = field(default_factory=dict)
    overrides: tuple[tuple[str, str], ...] = ()
    workers: Annotated[tuple[str, ...], Meta(max_length=16)] = ()
    sequences: Annotated[int, Meta(ge=1)] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    @property
    def tokens(self) -> int:
        """Tokens that the KV cache holds, for all sequences together."""
        return self.context * self.sequences

    @property
    def gpu_layers(self) -> int:
        """llama.cpp's n_gpu_layers: all counted layers, including the output layer."""
        return sum(self.layers.values())

    @property
    def used_devices(self) -> tuple[str, ...]:
        """All devices besides the CPU: first those with layers, then those with single tensors."""
        overriding = (device for _, device in self.overrides if device != CPU)
        return tuple(dict.fromkeys((*self.layers, *overriding)))

    def device_of_layer(self, layer: int) -> str:
        """Return the device that holds the KV cache of `layer`; `blocks` is the output layer."""
        return self._by_layer[layer]

    def device_of(self, tensor: str) -> str:
        """Return the device that holds the tensor with this GGUF name."""
        if tensor not in self._known:
            self._known[tensor] = self._find(tensor)
        return self._known[tensor]

    def _find(self, tensor: str) -> str:
        for pattern, device in self._patterns:
            if pattern.search(tensor):
                return device
        if tensor.startswith("token_embd."):
            return CPU
        block = _BLOCK.match(tensor)
        return self.device_of_layer(int(block[1]) if block else self.blocks)

    @cached_property
    def _known(self) -> dict[str, str]:
        """Devices by tensor, for all placements that agree; matching patterns is slow."""
        return _known_devices(self.blocks, tuple(self.layers.items()), self.overrides)

    @cached_property
    def _by_layer(self) -> tuple[str, ...]:
        first = (CPU,) * (self.blocks + 1 - self.gpu_layers)
        return first + tuple(name for name, count in self.layers.items() for _ in range(count))

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str]]:
        return [(re.compile(pattern), device) for pattern, device in self.overrides]

    def to_json(self) -> dict[str, Any]:
        """Return the content of a plan file, which `load_placement` reads."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content["layers"] = dict(self.layers)
        content["overrides"] = [list(override) for override in self.overrides]
        content["workers"] = list(self.workers)
        return {"format": _FORMAT, "version": _VERSION, **content}


def load_placement(path: str | Path) -> Placement:
    """Read a plan file that `dots1 plan --json` printed and a person may have edited.

    Raises:
        UsageError: the file is unreadable, is not a plan, or a value in it is impossible.
    """
    return placement_from_json(read_json(path, "plan of dots1 plan"), str(path))


def placement_from_json(raw: Any, what: str) -> Placement:
    """Convert what `Placement.to_json` returned; `what` names the file in errors.

    Raises:
        UsageError: `raw` is not a plan, or a value in it is impossible.
    """
    _check_format(raw, what)
    ignored = ("format", "version", "predicted")  # `dots1 plan --json` predicts bytes and speeds
    content = {key: value for key, value in raw.items() if key not in ignored}
    try:
        if unknown := content.keys() - {field.name for field in fields(Placement)}:
            raise JsonError("unknown key", min(unknown))
        if missing := [key for key in _WRITTEN if key not in content]:
            raise JsonError("missing key", missing[0])
        placement = convert_json(content, Placement)
        _check(placement)
    except JsonError as error:
        raise UsageError(f"{what}: {error}") from None
    check_context(placement.context, placement.sequences)
    return placement


def _check_format(raw: Any, what: str) -> None:
    """Refuse JSON that is not a plan of `dots1 plan`, and say what it is if that is known."""
    kind = raw.get("format") if isinstance(raw, dict) else None
    if kind == _FORMAT:
        if raw.get("version") != _VERSION:
            raise UsageError(f"{what} is a plan from another version of dots1-local; plan again")
        return
    reason = f'its "format" is {kind!r:.40}' if kind else 'it has no "format"'
    if isinstance(raw, dict) and "recipe" in raw and "types" in raw:
        reason = "it is a quantisation plan, which dots1 convert takes"
    raise UsageError(f"{what} is not a plan that dots1 plan --json printed: {reason}")


def _check(placement: Placement) -> None:
    """Check what the types of the fields cannot say."""
    kv_type, given = placement.kv_type, placement.gpu_layers
    if not placement.model.isprintable():
        raise JsonError("expected a line of text", "model")
    if kv_type not in KV_TYPES:
        raise JsonError(f"{kv_type!r:.40} is not one of {', '.join(KV_TYPES)}", "kv_type")
    if not placement.flash_attention and quant_type(kv_type).block > 1:
        raise JsonError(f"a KV cache in {kv_type} needs flash attention", "kv_type")
    if given > placement.blocks + 1:
        raise JsonError(
            f"devices get {given} layers, but the model has {placement.blocks + 1}", "layers"
        )
    for number, (pattern, _) in enumerate(placement.overrides):
        if reason := _pattern_error(pattern):
            raise JsonError(f"the pattern {pattern!r:.60} {reason}", f"overrides[{number}]")


@lru_cache(maxsize=32)
def _known_devices(
    blocks: int, layers: tuple[tuple[str, int], ...], overrides: tuple[tuple[str, str], ...]
) -> dict[str, str]:
    """Devices by tensor, filled by placements of so many blocks that agree in the rest."""
    return {}


def _pattern_error(pattern: str) -> str | None:
    if len(pattern) > _MAX_PATTERN:
        return f"has {len(pattern):,} characters; the limit is {_MAX_PATTERN:,}"
    if other := _PYTHON_ONLY.search(pattern):
        return f"contains {other[0]!r}, which llama.cpp's std::regex does not know"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression: {error}"
    return None


def stored_placement(model: Path) -> Path:
    """Return where `dots1 convert --for` stores the placement of a file, or of a first shard."""
    return model.parent / f"{model.name}.placement.json"


def check_made_for(placement: Placement, gguf: GGUFFile) -> None:
    """Check that a placement, perhaps an edited one, was made for this file.

    Raises:
        UsageError: it was made for another file, or it counts layers of the CPU.
    """
    blocks = gguf.keys.get("dots1.block_count")
    if (placement.model_bytes, placement.blocks) != (gguf.nbytes, blocks):
        raise UsageError(
            f"this placement was made for {placement.model} ({placement.model_bytes:,} bytes, "
            f"{placement.blocks} blocks), not for {gguf.files[0]} ({gguf.nbytes:,} bytes, {blocks} "
            "blocks); plan again"
        )
    if CPU in placement.layers:
        raise UsageError(f"this placement counts layers of the {CPU}, which gets all others anyway")


def default_context(trained: int, sequences: int = 1) -> int:
    """Return the tokens of each sequence if the user names no context: 16,384 for all together.

    Each has at least 4,096, and at most the `trained` tokens that the model was trained for.
    """
    return min(max(_DEFAULT_CONTEXT // sequences, _DEFAULT_SHARE), trained)


def check_context(context: int, sequences: int = 1) -> None:
    """Check that llama.cpp can make a context of this many tokens for each sequence.

    Raises:
        UsageError: it cannot.
    """
    check_sequences(sequences)
    if not 0 < context * sequences <= _MAX_TOKENS:
        tokens = human_context(context, sequences)
        raise UsageError(f"llama.cpp cannot make a context of {tokens} tokens")


def check_sequences(count: int) -> None:
    """Raise a UsageError if a context of llama.cpp cannot have so many sequences."""
    if not 0 < count <= MAX_SEQUENCES:
        raise UsageError(f"llama.cpp runs 1 to {MAX_SEQUENCES} sequences at once, not {count:,}")


def human_context(context: int, sequences: int = 1) -> str:
    """Write 16,384 tokens as '16,384', or as '4 × 16,384' for four sequences."""
    return f"{sequences} × {context:,}" if sequences > 1 else f"{context:,}"
