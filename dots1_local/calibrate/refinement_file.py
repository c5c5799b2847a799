"""refinement.safetensors: what calibration measures for the refining of matrices.

    data = RefinementData.load(folder, checkpoint)
    data.tokens                  int32 (chunks, n_ctx): the calibration text, in its order
    data.output_moment(layer)    float32 (hidden, hidden): HO at the output of a layer
    data.embedding_moment()      float32 (hidden, hidden): the metric of the embedding's rows
    data.gradients               the number of gradients in each moment

HO is the second moment of the gradients of KL divergence at a layer's output: it serves every
matrix that writes to the residual stream there. The embedding's metric is that of the gradients at
the first layer's input. Both have the mean diagonal 1 and are stored as F16; each is read when it
is asked for. The file names the model and the importance file that it was measured with.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from dots1_local.architecture import Dots1Config
from dots1_local.calibrate.manifest import IMATRIX, REFINEMENT
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.digest import file_sha256
from dots1_local.files.json_file import JsonError, convert_json, parse_json
from dots1_local.files.partial_file import write_all
from dots1_local.files.safetensors import pack_header
from dots1_local.hub.model_digest import model_digest
from dots1_local.quant.sensitivity import check_geometry, geometry

__all__ = ["RefinementData", "RefinementWriter", "gradient_moment", "refinement_bytes"]

Floats = NDArray[np.float32]
Tokens = NDArray[np.int32]
Shape = tuple[int, ...]

_FORMAT = "1"
_TOKENS, _EMBEDDING = "tokens", "embedding"


def refinement_bytes(config: Dots1Config) -> int:
    """About the size of a model's refinement file, with the space that making it needs."""
    width = config.moe_intermediate_size
    judged = 4 * width * (width + 513)  # one matrix of each layer: see `JudgedMatrix`
    errors = 3000 * (4 * config.hidden_size + width)  # of sampled rows: see `ErrorRows`
    return (config.num_hidden_layers + 1) * (_moment_bytes(config) + judged + errors)


def _moment_bytes(config: Dots1Config) -> int:
    return 2 * config.hidden_size**2


def _outputs(layer: int) -> str:
    return f"outputs.{layer}"


def gradient_moment(gradients: Floats) -> Floats:
    """The second moment (hidden, hidden) of gradients (..., hidden), with the mean diagonal 1."""
    rows = gradients.reshape(-1, gradients.shape[-1])
    moment: Floats = rows.T @ rows
    mean = np.trace(moment, dtype=np.float64) / len(moment)
    return moment / np.float32(mean) if mean > 0 else moment


@dataclass(frozen=True)
class RefinementData:
    """An opened refinement.safetensors whose contents fit the checkpoint that it was opened for.

    `imatrix` is the SHA-256 of the importance file that was measured with it. Each moment is the
    mean over so many `gradients`.
    """

    path: Path
    config: Dots1Config
    imatrix: str
    gradients: int

    @classmethod
    def load(cls, folder: Path, checkpoint: Checkpoint) -> "RefinementData":
        """Open the file in a calibration folder.

        Raises:
            Dots1Error: the file is missing or damaged, was measured on another model, or does not
                belong to the folder's importance file.
        """
        path = folder / REFINEMENT
        if not path.is_file():
            raise Dots1Error(
                f"{folder} has no {REFINEMENT}; make it with dots1 calibrate --refine -o {folder}"
            )
        metadata = _metadata(path)
        _check_model(path, metadata, checkpoint)
        found = file_sha256(folder / IMATRIX)
        if found != metadata["imatrix"]:
            raise Dots1Error(
                f"{path} was measured with another importance file than {folder / IMATRIX}; "
                "calibrate again with --refine"
            )
        return cls(path, checkpoint.config, found, int(metadata["gradients"]))

    @cached_property
    def tokens(self) -> Tokens:
        """The calibration text (chunks, n_ctx).

        Raises:
            Dots1Error: a token is not in the model's vocabulary.
        """
        tokens = self._read(_TOKENS)
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise Dots1Error(f"{self.path} has a token that is not in this model's vocabulary")
        return tokens

    def output_moment(self, layer: int) -> Floats:
        """HO at the output of a layer: (hidden, hidden).

        Raises:
            Dots1Error: a number is NaN or infinite.
        """
        return self._moment(_outputs(layer))

    def embedding_moment(self) -> Floats:
        """The metric of the embedding's rows: (hidden, hidden).

        Raises:
            Dots1Error: a number is NaN or infinite.
        """
        return self._moment(_EMBEDDING)

    def _moment(self, name: str) -> Floats:
        moment = self._read(name).astype(np.float32)
        if not np.isfinite(moment).all():
            raise Dots1Error(f"{self.path}: {name} is NaN or infinite; calibrate again")
        return moment

    def _read(self, name: str) -> NDArray[Any]:
        try:
            with safe_open(self.path, framework="numpy") as file:
                return np.asarray(file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise Dots1Error(f"cannot read {name} in {self.path}: {error}") from None


def _tensors(tokens: tuple[int, ...], config: Dots1Config) -> dict[str, tuple[str, Shape]]:
    """The dtype and shape of every tensor, in the file's order."""
    moment = ("F16", (config.hidden_size, config.hidden_size))
    layers = range(config.num_hidden_layers)
    return {_TOKENS: ("I32", tokens), _EMBEDDING: moment} | {_outputs(n): moment for n in layers}


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise Dots1Error(f"{path} is not a refinement file, or is damaged: {error}") from None
    keys = {"geometry", "model", "imatrix", "gradients"}
    known = metadata.get("format") == _FORMAT and keys <= set(metadata)
    if not known or not re.fullmatch(r"[1-9]\d{,11}", metadata["gradients"]):
        raise Dots1Error(f"{path} is not a refinement file that this version of dots1 reads")
    return metadata


def _check_model(path: Path, metadata: Mapping[str, str], checkpoint: Checkpoint) -> None:
    try:
        measured = convert_json(parse_json(metadata["geometry"].encode()), dict[str, int])
    except JsonError as error:
        raise Dots1Error(f"{path} does not describe its model: {error}") from None
    check_geometry(str(path), measured, checkpoint.config)
    with safe_open(path, framework="numpy") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        described = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in found.items()}
    tokens = described.get(_TOKENS, ("I32", ()))[1]
    if described != _tensors(tokens, checkpoint.config) or len(tokens) != 2 or 0 in tokens:
        raise Dots1Error(f"{path} lacks tensors, or has tensors of other shapes; calibrate again")
    if metadata["model"] != model_digest(checkpoint):
        raise Dots1Error(
            f"{path} was measured on another model than {checkpoint.source}: the shapes of both "
            "are equal, but not their weights or settings"
        )


class RefinementWriter:
    """Fills a refinement file in any order, also in several runs with the same inputs.

    Methods raise OSError if the disk is full or broken.
    """

    def __init__(
        self,
        path: Path,
        tokens: Tokens,
        checkpoint: Checkpoint,
        imatrix: str,
        gradients: int,
        *,
        resume: bool,
    ) -> None:
        """Begin the file at `path`, or `resume` it.

        `imatrix` is the SHA-256 of the importance file; so many `gradients` are in each moment.

        Raises:
            Dots1Error: the file to resume is missing or damaged.
        """
        config = checkpoint.config
        metadata = {
            "format": _FORMAT,
            "geometry": json.dumps(geometry(config)),
            "model": model_digest(checkpoint),
            "imatrix": imatrix,
            "gradients": str(gradients),
        }
        tensors = _tensors(tokens.shape, config)
        header, self._offsets = pack_header(tensors, metadata)
        self._path = path
        start = header + tokens.astype("<i4").tobytes()
        end = max(self._offsets.values()) + _moment_bytes(config)
        if not resume:
            with open(path, "wb") as file:
                file.write(start)
                file.truncate(end)
        elif not _is_begun(path, start, end):
            raise Dots1Error(f"{path} is damaged; remove {path.parent} to start over")

    def put_outputs(self, layer: int, gradients: Floats) -> None:
        """Write the moment of the gradients (..., hidden) at the output of a layer."""
        self._put(_outputs(layer), gradients)

    def put_embedding(self, gradients: Floats) -> None:
        """Write the moment of the gradients (..., hidden) at the first layer's input."""
        self._put(_EMBEDDING, gradients)

    def _put(self, name: str, gradients: Floats) -> None:
        data = gradient_moment(gradients).astype("<f2").view(np.uint8)
        with open(self._path, "r+b") as file:
            write_all(file.fileno(), data.reshape(-1).data, self._offsets[name])
            os.fsync(file.fileno())


def _is_begun(path: Path, start: bytes, size: int) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with open(path, "rb") as file:
        return file.read(len(start)) == start
