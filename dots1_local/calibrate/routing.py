"""routing.safetensors: the experts that the tokens of a calibration text chose, layer by layer.

    routing = load_routing(folder)
    routing.counts     int64 (MoE layers, experts): the tokens that chose each expert
    routing.trace      uint8 or uint16 (MoE layers, tokens, experts per token): the chosen experts

`counts` are of all tokens. `trace` has whole chunks of the text, evenly spread and in the order of
the text, of at most 32,768 tokens together: 12 MB for dots.llm1. The file names its model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import Dots1Config
from dots1_local.calibrate.manifest import ROUTING
from dots1_local.errors import CheckpointError, Dots1Error
from dots1_local.files.json_file import JsonError, convert_json, parse_json
from dots1_local.files.safetensors import load_arrays, pack_header
from dots1_local.quant.sensitivity import geometry

__all__ = ["TRACED", "Routing", "layer_routing", "load_routing", "pack_routing"]

TRACED = 32_768  # tokens

_FORMAT = "1"
_COUNTS, _TRACE = "counts", "trace"
_MAX_BYTES = 1 << 28  # a file of dots.llm1 has 12 MB
_MAX_EXPERTS = 1 << 12

Choices = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class Routing:
    """The contents of a routing file; `first_layer` is the first MoE layer, and `path` the file.

    `model` is the digest of the model that chose.
    """

    path: Path
    model: str
    first_layer: int
    counts: NDArray[np.int64]
    trace: Choices

    @property
    def layers(self) -> range:
        """The numbers of the MoE layers."""
        return range(self.first_layer, self.first_layer + len(self.counts))

    @property
    def experts(self) -> int:
        """The routed experts of a layer."""
        return int(self.counts.shape[1])

    @property
    def used(self) -> int:
        """The experts that each token chooses in a layer."""
        return int(self.trace.shape[2])

    @property
    def tokens(self) -> int:
        """The tokens that were counted."""
        return int(self.counts[0].sum()) // self.used

    def check(self, config: Dots1Config) -> None:
        """Refuse a model of other numbers of layers or experts.

        Raises:
            Dots1Error: the numbers differ.
        """
        numbers = {
            "layers": (self.layers.stop, config.num_hidden_layers),
            "dense layers": (self.first_layer, config.first_k_dense_replace),
            "routed experts": (self.experts, config.n_routed_experts),
            "experts per token": (self.used, config.num_experts_per_tok),
        }
        for name, (theirs, ours) in numbers.items():
            if theirs != ours:
                raise Dots1Error(
                    f"{self.path} is of another model: it has {theirs} {name}, this model {ours}"
                )


def layer_routing(chosen: NDArray[Any], experts: int) -> dict[str, NDArray[Any]]:
    """What a routing file keeps of one layer's choices (chunks, positions, experts per token)."""
    chunks, positions, used = chosen.shape
    kept = min(chunks, max(1, TRACED // positions))
    some = chosen[np.arange(kept) * chunks // kept, :TRACED]
    kind = np.uint8 if experts <= 256 else np.uint16
    return {
        _COUNTS: np.bincount(chosen.ravel(), minlength=experts),
        _TRACE: some.reshape(-1, used).astype(kind),
    }


def pack_routing(
    layers: Sequence[Mapping[str, NDArray[Any]]], config: Dots1Config, digest: str
) -> bytes:
    """The file of what `layer_routing` keeps of all MoE layers of the model with a digest."""
    counts, trace = (np.stack([each[name] for each in layers]) for name in (_COUNTS, _TRACE))
    metadata = {"format": _FORMAT, "geometry": json.dumps(geometry(config)), "model": digest}
    tensors = {
        _COUNTS: ("I64", counts.shape),
        _TRACE: ("U8" if trace.itemsize == 1 else "U16", trace.shape),
    }
    header, _ = pack_header(tensors, metadata)
    return header + counts.astype("<i8").tobytes() + trace.astype(f"<u{trace.itemsize}").tobytes()


def load_routing(folder: Path) -> Routing:
    """Read the routing file in a calibration folder.

    Raises:
        Dots1Error: the file is missing or damaged.
    """
    path = folder / ROUTING
    if not path.is_file():
        raise Dots1Error(
            f"{folder} has no {ROUTING}, which dots1 calibrate writes; name the folder of a "
            "calibration, or calibrate again if it is an old one"
        )
    try:
        arrays, metadata = load_arrays(path, _MAX_BYTES)
    except CheckpointError as error:
        raise Dots1Error(f"{error}; calibrate again") from None
    except OSError as error:
        raise Dots1Error(f"cannot read {path}: {error.strerror}") from None
    try:
        measured = convert_json(parse_json(metadata["geometry"].encode()), dict[str, int])
        first, stop = measured["first_k_dense_replace"], measured["num_hidden_layers"]
        known = metadata["format"] == _FORMAT
        routing = Routing(path, metadata["model"], first, arrays[_COUNTS], arrays[_TRACE])
    except (KeyError, JsonError):
        known = False
    if not known:
        raise Dots1Error(f"{path} is not a routing file that this version of dots1 reads")
    if not _is_whole(routing, stop):
        raise Dots1Error(f"{path} holds impossible numbers; calibrate again")
    return routing


def _is_whole(routing: Routing, stop: int) -> bool:
    """Whether shapes fit each other, and every token chooses as many different experts."""
    counts, trace = routing.counts, routing.trace
    if counts.dtype != np.int64 or trace.dtype.kind != "u" or (counts.ndim, trace.ndim) != (2, 3):
        return False
    layers, tokens, used = trace.shape
    shapes = 0 < used <= routing.experts <= _MAX_EXPERTS and 1 < tokens <= TRACED
    if not shapes or not len(counts) == layers == stop - routing.first_layer > 0:
        return False
    if counts.min() < 0 or counts.max() > 1 << 40 or (counts.sum(1) != counts[0].sum()).any():
        return False
    repeated = (np.diff(np.sort(trace.astype(np.int16), axis=-1)) == 0).any()
    return int(trace.max()) < routing.experts and not repeated
