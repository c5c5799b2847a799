"""The files of a calibration for sensitivity and refinement, in `DIR/work`; see
`calibration_folder`."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error
from dots1_local.files.json_file import convert_json, parse_json
from dots1_local.files.partial_file import open_partial
from dots1_local.quant.sensitivity import Effect

__all__ = ["ProbeFiles"]

Floats = NDArray[np.float32]
Effects = Mapping[str, Mapping[str, Effect]]  # by GGUF name and type
T = TypeVar("T")


class ProbeFiles:
    """The files of the probed chunks.

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

    def save_backward(self, layer: int, gradients: Floats, effects: Effects) -> None:
        """Save what was measured in a layer, and the gradients at its input.

        The head counts as the layer after the last one.
        """
        measured = {
            name: {kind: asdict(effect) for kind, effect in by_type.items()}
            for name, by_type in effects.items()
        }
        self._save(self._path("effects", layer), measured)
        self._save(self._path("back", layer), gradients)
        self._path("back", layer + 1).unlink(missing_ok=True)

    def reached(self, layers: int) -> int | None:
        """The last layer that `save_backward` was called for, or None."""
        present = (layer for layer in range(layers + 1) if self._path("back", layer).exists())
        return next(present, None)

    def gradients(self, layer: int, shape: tuple[int, ...]) -> Floats:
        """The gradients that `save_backward` saved for the layer that is `reached`."""
        return self._load(self._path("back", layer), shape)

    def effects(self, layers: int) -> dict[str, dict[str, Effect]]:
        """Everything that was measured, from the head back to the first layer."""
        found: dict[str, dict[str, Effect]] = {}
        for layer in range(layers, -1, -1):
            found |= self._read(self._path("effects", layer), dict[str, dict[str, Effect]])
        return found

    def _path(self, name: str, layer: int) -> Path:
        suffix = "npy" if name in ("probe", "back") else "json"
        return self._work / f"{name}-{layer:04}.{suffix}"

    def _save(self, path: Path, value: Any) -> None:
        with open_partial(path) as file:
            if isinstance(value, np.ndarray):
                np.save(file, value)
            else:
                file.write(json.dumps(value).encode())

    def _load(self, path: Path, shape: tuple[int, ...]) -> Floats:
        def parse(file: IO[bytes]) -> Floats:
            values = np.lib.format.read_array(file, allow_pickle=False)
            if values.dtype != np.float32 or values.shape != shape:
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
