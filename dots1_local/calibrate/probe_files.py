"""The files of a calibration for sensitivity, refinement and routing, in `DIR/work`; see
`calibration_folder`."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dots1_local.calibrate.refined_errors import ErrorRows, JudgedMatrix, RefinedErrors
from dots1_local.errors import Dots1Error
from dots1_local.files.json_file import convert_json, parse_json
from dots1_local.files.partial_file import open_partial
from dots1_local.quant.sensitivity import Effect

__all__ = ["ProbeFiles"]

Floats = NDArray[np.float32]
Effects = Mapping[str, Mapping[str, Effect]]  # by GGUF name and type
T = TypeVar("T")

_SUFFIXES = {
    "probe": "npy", "back": "npy", "judged": "npy", "errors": "safetensors",
    "routing": "safetensors",
}  # fmt: skip


@dataclass(frozen=True)
class _Sample:
    judged: str | None  # the name of the judged matrix
    errors: Mapping[str, RefinedErrors]


class ProbeFiles:
    """The files of the probed chunks, and those of the routing.

    Methods that read raise Dots1Error if a file is missing, damaged, or of another shape; methods
    that write raise OSError if the disk is full or broken.
    """

    def __init__(self, work: Path) -> None:
        self._work = work

    def save_forward(self, layer: int, inputs: Floats, noise: float) -> None:
        """Save a layer's inputs, and the noise of its router's margins (0 if it has no router)."""
        self._save(self._path("probe", layer), inputs)
        self._save(self._path("noise", layer), noise)

    def inputs(self, layer: int, shape: tuple[int, ...]) -> Floats:
        """The inputs that `save_forward` saved."""
        return self._load(self._path("probe", layer), shape)

    def noise(self, layer: int) -> float:
        """The noise that `save_forward` saved."""
        return self._read(self._path("noise", layer), float)

    def save_routing(self, layer: int, routing: Mapping[str, NDArray[Any]]) -> None:
        """Save the experts that tokens chose in a layer; see `layer_routing`."""
        self._save(self._path("routing", layer), dict(routing))

    def routing(self, layer: int) -> dict[str, NDArray[Any]]:
        """What `save_routing` saved."""
        return self._parsed(self._path("routing", layer), _parse_arrays)

    def save_sample(
        self,
        layer: int,
        errors: Mapping[str, RefinedErrors],
        rows: Mapping[str, ErrorRows],
        judged: JudgedMatrix | None,
    ) -> None:
        """Save what a sample of refined rows has found in a layer; the head is that after the last.

        See `RefinementSample`.
        """
        if judged is not None:
            parts = (judged.metric, judged.importance[None], judged.held_out)
            self._save(self._path("judged", layer), np.concatenate(parts))
        arrays: dict[str, NDArray[Any]] = {}
        for name, each in rows.items():
            arrays |= {f"{name}.{part}": array for part, array in vars(each).items()}
        self._save(self._path("errors", layer), arrays)
        source = None if judged is None else judged.source
        self._save(self._path("sample", layer), asdict(_Sample(source, errors)))

    def sample(self, layer: int) -> tuple[Mapping[str, RefinedErrors], JudgedMatrix | None]:
        """What `save_sample` saved."""
        found = self._read(self._path("sample", layer), _Sample)
        if found.judged is None:
            return found.errors, None
        parts = self._load(self._path("judged", layer), (-1, -1))
        columns = parts.shape[1]
        metric, (importance,), held_out = np.split(parts, (columns, columns + 1))
        return found.errors, JudgedMatrix(found.judged, metric, held_out, importance)

    def error_rows(self, layer: int) -> dict[str, ErrorRows]:
        """The errors of rows that `save_sample` saved."""
        arrays = self._parsed(self._path("errors", layer), _parse_arrays)
        names = (name.removesuffix(".errors") for name in arrays if name.endswith(".errors"))
        parts = [field.name for field in fields(ErrorRows)]
        return {n: ErrorRows(*(arrays[f"{n}.{part}"] for part in parts)) for n in names}

    def save_backward(
        self, layer: int, gradients: Floats, effects: Effects, refined: Effects | None = None
    ) -> None:
        """Save what was measured in a layer, and the gradients at its input.

        `refined` are the effects of refined rows. The head counts as the layer after the last one.
        """
        self._save_effects("effects", layer, effects)
        if refined is not None:
            self._save_effects("refined", layer, refined)
        self._save(self._path("back", layer), gradients)
        self._path("back", layer + 1).unlink(missing_ok=True)

    def reached(self, layers: int) -> int | None:
        """The last layer that `save_backward` was called for, or None."""
        present = (layer for layer in range(layers + 1) if self._path("back", layer).exists())
        return next(present, None)

    def gradients(self, layer: int, shape: tuple[int, ...]) -> Floats:
        """The gradients that `save_backward` saved for the layer that is `reached`."""
        return self._load(self._path("back", layer), shape)

    def effects(self, layers: int, *, refined: bool = False) -> dict[str, dict[str, Effect]]:
        """Everything that was measured, from the head back to the first layer."""
        found: dict[str, dict[str, Effect]] = {}
        for layer in range(layers, -1, -1):
            path = self._path("refined" if refined else "effects", layer)
            found |= self._read(path, dict[str, dict[str, Effect]])
        return found

    def _save_effects(self, name: str, layer: int, effects: Effects) -> None:
        measured = {
            tensor: {kind: asdict(effect) for kind, effect in by_type.items()}
            for tensor, by_type in effects.items()
        }
        self._save(self._path(name, layer), measured)

    def _path(self, name: str, layer: int) -> Path:
        return self._work / f"{name}-{layer:04}.{_SUFFIXES.get(name, 'json')}"

    def _save(self, path: Path, value: Any) -> None:
        with open_partial(path) as file:
            if isinstance(value, np.ndarray):
                np.save(file, value)
            elif path.suffix == ".safetensors":
                file.write(save(value))
            else:
                file.write(json.dumps(value).encode())

    def _load(self, path: Path, shape: tuple[int, ...]) -> Floats:
        """Load an array; -1 stands for any length."""

        def parse(file: IO[bytes]) -> Floats:
            values = np.lib.format.read_array(file, allow_pickle=False)
            fits = len(values.shape) == len(shape)
            fits = fits and all(
                n in (-1, length) for n, length in zip(shape, values.shape, strict=True)
            )
            if values.dtype != np.float32 or not fits:
                raise ValueError(f"it holds {values.dtype} {values.shape}")
            return np.asarray(values)

        return self._parsed(path, parse)

    def _read(self, path: Path, kind: type[T]) -> T:
        return self._parsed(path, lambda file: convert_json(parse_json(file.read()), kind))

    def _parsed(self, path: Path, parse: Callable[[IO[bytes]], T]) -> T:
        try:
            with path.open("rb") as file:
                return parse(file)
        except (OSError, ValueError, EOFError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise Dots1Error(
                f"{path} is damaged ({reason}); remove {self._work} to start over"
            ) from None


def _parse_arrays(file: IO[bytes]) -> dict[str, NDArray[Any]]:
    try:
        arrays: dict[str, NDArray[Any]] = load(file.read())
    except SafetensorError as error:
        raise ValueError(error) from None
    return arrays
