"""What the measurement of sensitivity keeps on disk: forward, what it needs on the way back; then
how far back it has come.

Beside a calibration's own files in `DIR/work` lie `probe-NNNN.npy`, what entered each layer of the
probed chunks; `noise-NNNN.json`, how rounding moved the router's margins there; `back-NNNN.npy`,
the gradients at what enters the last layer dealt with; and `effects-NNNN.json`, what was measured
in it, before them. Files get their names when they are complete.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error
from dots1_local.files.partial_file import open_partial
from dots1_local.quant.sensitivity import Effect

__all__ = ["Effects", "ProbeFolder"]

Floats = NDArray[np.float32]
Effects = Mapping[str, Mapping[str, Effect]]  # by GGUF tensor name and type
T = TypeVar("T")


class ProbeFolder:
    """Files of the probed chunks in a folder that exists.

    Whoever calls turns OSError into a sentence.
    """

    def __init__(self, work: Path) -> None:
        self._work = work

    def keep_forward(self, layer: int, entered: Floats, noise: float) -> None:
        """Keep what entered a layer, and the noise of its router's margins (0 if it has none)."""
        self._save(self._input(layer), entered)
        self._save(self._work / f"noise-{layer:04}.json", noise)

    def entered(self, layer: int, shape: tuple[int, ...]) -> Floats:
        """What `keep_forward` was given.

        Raises:
            Dots1Error: it is damaged, or of another shape.
        """
        return self._load(self._input(layer), shape)

    def noise(self, layer: int) -> float:
        """The noise of a router's margins.

        Raises:
            Dots1Error: the file is damaged.
        """
        return self._read(self._work / f"noise-{layer:04}.json", float)

    def keep_backward(self, layer: int, gradients: Floats, effects: Effects) -> None:
        """Keep what was measured in a layer, and the gradients at what enters it.

        The layer after the last stands for the head.
        """
        measured = {
            name: {kind: asdict(effect) for kind, effect in by_type.items()}
            for name, by_type in effects.items()
        }
        self._save(self._work / f"effects-{layer:04}.json", measured)
        self._save(self._gradients(layer), gradients)
        self._gradients(layer + 1).unlink(missing_ok=True)

    def reached(self, layers: int) -> int | None:
        """The last layer that `keep_backward` was called for; None if it was for none."""
        there = (layer for layer in range(layers + 1) if self._gradients(layer).exists())
        return next(there, None)

    def gradients(self, layer: int, shape: tuple[int, ...]) -> Floats:
        """Those that `keep_backward` was given for the layer that is `reached`.

        Raises:
            Dots1Error: they are damaged, or of another shape.
        """
        return self._load(self._gradients(layer), shape)

    def effects(self, layers: int) -> dict[str, dict[str, Effect]]:
        """Everything that was measured, from the head back to the first layer.

        Raises:
            Dots1Error: a file is damaged.
        """
        found: dict[str, dict[str, Effect]] = {}
        for layer in range(layers, -1, -1):
            found |= self._read(self._work / f"effects-{layer:04}.json", _as_effects)
        return found

    def _input(self, layer: int) -> Path:
        return self._work / f"probe-{layer:04}.npy"

    def _gradients(self, layer: int) -> Path:
        return self._work / f"back-{layer:04}.npy"

    def _save(self, path: Path, value: Any) -> None:
        """An array, or what JSON can hold: on the disk before it has its name."""
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

    def _read(self, path: Path, parse: Callable[[Any], T]) -> T:
        return self._parsed(path, lambda file: parse(json.load(file)))

    def _parsed(self, path: Path, parse: Callable[[IO[bytes]], T]) -> T:
        try:
            with path.open("rb") as file:
                return parse(file)
        except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise Dots1Error(
                f"{path} is damaged ({reason}); remove {self._work} to start over"
            ) from None


def _as_effects(raw: Any) -> dict[str, dict[str, Effect]]:
    return {
        str(name): {kind: Effect(**values) for kind, values in by_type.items()}
        for name, by_type in raw.items()
    }
