"""A placement: what lives on which device and how the model is run. Decisions and nothing else.

What follows from them, bytes and speeds, is computed elsewhere, so that an edited placement is
believed in what it decides and in nothing it claims.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from dots1_local.devices.hardware import CPU
from dots1_local.errors import UsageError
from dots1_local.files.gguf import GGUFFile
from dots1_local.files.json_file import Fields, read_document
from dots1_local.ggml import KV_TYPES, quant_type

__all__ = [
    "MAX_CONTEXT",
    "MAX_SEQUENCES",
    "MIN_BATCH",
    "HostMemory",
    "Placement",
    "check_context",
    "check_made_for",
    "human_context",
    "load_placement",
    "placement_from",
]

# Weights in RAM: allocated ("plain"), allocated where a GPU can fetch them itself ("pinned"),
# allocated in the order the CPU's kernels like best ("repacked"), or the file itself ("mapped").
HostMemory = Literal["plain", "pinned", "repacked", "mapped"]

MIN_BATCH = "GGML_OP_OFFLOAD_MIN_BATCH"  # where the engine's backends read `offload_min_batch`
MAX_CONTEXT = 1 << 24  # tokens, more than any model was trained for
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
_MOST_TOKENS = (1 << 31) - 1  # of all sequences together
_FORMAT, _VERSION = "dots1-placement", 1
_BLOCK = re.compile(r"blk\.(\d+)\.")
_LONGEST = 1 << 11  # characters of a pattern, some times what naming each layer by itself takes
# What Python's re has and std::regex has not: groups but (?: (?= (?!, possessive repeats, \A \Z.
_PYTHON_ONLY = re.compile(r"\(\?(?![:=!])|[*+?}]\+|\\[AZ]")


@dataclass(frozen=True)
class Placement:
    """What the engine is told, under the engine's own ideas.

    `layers` counts whole layers by device, in the engine's order; the output layer is the last one.
    As in llama.cpp, the first layers are the CPU's where fewer than all (blocks + 1) are counted.
    A layer's device holds its KV cache and its weights, but for weights that match a pattern of
    `overrides`, (regular expression, device) pairs of which the first that matches counts. Batches
    of at least `offload_min_batch` tokens fetch weights from RAM to the first GPU; None leaves that
    to the engine. `workers` are the host:port whose devices are named in it. `model` and
    `model_bytes` name the file it was made for. The embedding is always in RAM. So many `sequences`
    of `context` tokens each share one KV cache.
    """

    model: str
    model_bytes: int
    blocks: int
    context: int
    kv_type: str
    flash_attention: bool
    ubatch: int
    threads: int
    host_memory: HostMemory
    offload_min_batch: int | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    overrides: tuple[tuple[str, str], ...] = ()
    workers: tuple[str, ...] = ()
    sequences: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    @property
    def tokens(self) -> int:
        """Those that the KV cache is for, of all sequences."""
        return self.context * self.sequences

    @property
    def gpu_layers(self) -> int:
        """llama.cpp's n_gpu_layers: all counted layers, the output layer among them."""
        return sum(self.layers.values())

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that the engine is to use beside the CPU, in its order."""
        return tuple(self.layers)

    @property
    def used_devices(self) -> tuple[str, ...]:
        """The same, and those beside the CPU that have single tensors only."""
        overriding = (device for _, device in self.overrides if device != CPU)
        return tuple(dict.fromkeys((*self.devices, *overriding)))

    def device_of_layer(self, layer: int) -> str:
        """Where the KV cache of block `layer` lives; `blocks` is the output layer."""
        return self._by_layer[layer]

    def device_of(self, tensor: str) -> str:
        """Where the tensor of that GGUF name lives."""
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
        """Devices of tensors that somebody has asked for: patterns are slow."""
        return {}

    @cached_property
    def _by_layer(self) -> tuple[str, ...]:
        first = (CPU,) * (self.blocks + 1 - self.gpu_layers)
        return first + tuple(name for name, count in self.layers.items() for _ in range(count))

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str]]:
        return [(re.compile(pattern), device) for pattern, device in self.overrides]

    def to_json(self) -> dict[str, Any]:
        """What `load_placement` reads."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content["layers"] = dict(self.layers)
        content["overrides"] = [list(override) for override in self.overrides]
        content["workers"] = list(self.workers)
        return {"format": _FORMAT, "version": _VERSION, **content}


def load_placement(path: str | Path) -> Placement:
    """Read a placement that `dots1 plan --json` printed and a person may have edited.

    Raises:
        UsageError: unreadable, no placement, or one that makes no sense.
    """
    return placement_from(read_document(path, _FORMAT, "placement", _VERSION), str(path))


def placement_from(raw: Fields, what: str) -> Placement:
    """A placement from the keys of `to_json`, less format and version; `what` begins errors.

    Raises:
        UsageError: no placement, or one that makes no sense.
    """
    blocks = raw.integer("blocks", 1, 1 << 10)
    placement = Placement(
        model=raw.text("model"),
        model_bytes=raw.integer("model_bytes"),
        blocks=blocks,
        context=raw.integer("context", 1, MAX_CONTEXT),
        kv_type=raw.choice("kv_type", KV_TYPES),
        flash_attention=raw.boolean("flash_attention"),
        ubatch=raw.integer("ubatch", 1, 1 << 20),
        threads=raw.integer("threads", 1, 1 << 12),
        host_memory=raw.choice("host_memory", get_args(HostMemory)),
        offload_min_batch=raw.integer("offload_min_batch", 1, 1 << 30)
        if raw.given("offload_min_batch")
        else None,
        layers=_layers(raw.group("layers")),
        overrides=tuple(_override(what, item) for item in raw.items("overrides")),
        workers=tuple(_worker(what, item) for item in raw.items("workers", 16)),
        sequences=raw.integer("sequences", 1) if raw.given("sequences") else 1,
    )
    raw.ignore("predicted")  # what `dots1 plan --json` says of it beside
    raw.end()
    if placement.gpu_layers > blocks + 1:
        raise UsageError(
            f"{what} gives devices {placement.gpu_layers} layers of the {blocks + 1} there are"
        )
    check_context(placement.context, placement.sequences)
    if not placement.flash_attention and quant_type(placement.kv_type).block > 1:
        raise UsageError(
            f"{what} has a KV cache in {placement.kv_type} and no flash attention, which needs it"
        )
    return placement


def check_made_for(placement: Placement, gguf: GGUFFile) -> None:
    """See that a placement, perhaps an edited one, is for that file.

    Raises:
        UsageError: it is for another file, or counts layers of the CPU.
    """
    blocks = gguf.keys.get("dots1.block_count")
    if (placement.model_bytes, placement.blocks) != (gguf.nbytes, blocks):
        raise UsageError(
            f"this placement was made for {placement.model} ({placement.model_bytes:,} bytes, "
            f"{placement.blocks} blocks), not for {gguf.files[0]} ({gguf.nbytes:,} bytes, {blocks} "
            "blocks); plan again"
        )
    if CPU in placement.layers:
        raise UsageError(f"this placement counts layers of the {CPU}, whose are all that are left")


def check_context(context: int, sequences: int = 1) -> None:
    """See that llama.cpp can make a context of so many tokens for each sequence.

    Raises:
        UsageError: it cannot.
    """
    if not 0 < sequences <= MAX_SEQUENCES:
        raise UsageError(f"llama.cpp has 1 to {MAX_SEQUENCES} sequences at once, not {sequences:,}")
    if not 0 < context * sequences <= _MOST_TOKENS:
        tokens = human_context(context, sequences)
        raise UsageError(f"llama.cpp can make no context of {tokens} tokens")


def human_context(context: int, sequences: int = 1) -> str:
    """'16,384' tokens, or '4 × 16,384' of sequences that have as many each."""
    return f"{sequences} × {context:,}" if sequences > 1 else f"{context:,}"


def _layers(raw: Fields) -> dict[str, int]:
    return {device: raw.integer(device, 0, 1 << 10) for device in raw.rest()}


def _override(what: str, item: Any) -> tuple[str, str]:
    pair = isinstance(item, list) and len(item) == 2 and all(isinstance(s, str) for s in item)
    if not pair:
        raise UsageError(f'{what} has {item!r:.60} as an override, not ["pattern", "device"]')
    pattern = f"{what} has the pattern {item[0]!r:.60}"
    if len(item[0]) > _LONGEST:
        raise UsageError(f"{pattern} of {len(item[0]):,} characters; {_LONGEST:,} are enough")
    if other := _PYTHON_ONLY.search(item[0]):
        raise UsageError(f"{pattern}, of which llama.cpp's std::regex does not know {other[0]!r}")
    try:
        re.compile(item[0])
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"{pattern}: {error}") from None
    return item[0], item[1]


def _worker(what: str, item: Any) -> str:
    if not isinstance(item, str):
        raise UsageError(f"{what} has {item!r:.60} as a worker, not HOST:PORT")
    return item
