"""What the measurement of sensitivity keeps on disk: forward, what it needs on the way back; then
how far back it has come.

Beside a calibration's own files in `DIR/work` lie `probe-NNNN.npy`, what entered each layer of the
probed chunks; `noise-NNNN.json`, how rounding moved the router's margins there; `back-NNNN.npy`,
the gradients at what enters the last layer dealt with; and `effects-NNNN.json`, what was measured
in it. Files get their names when they are complete.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error
from dots1_local.quant.sensitivity import Effect

__all__ = ["Effects", "ProbeFolder"]

Floats = NDArray[np.float32]
Effects = Mapping[str, Mapping[str, Effect]]  # by GGUF tensor name and type


class ProbeFolder:
    """Files of the probed chunks in a folder that exists.

    Whoever calls turns OSError into a sentence.
    """

    def __init__(self, work: Path) -> None:
        self._work = work

    def keep_forward(self, layer: int, entered: Floats, noise: float) -> None:
        """Keep what entered a layer, and the noise of its router's margins (0 if it has none)."""
        self._save(self._input(layer), entered)
        self._write(self._work / f"noise-{layer:04}.json", {"sigma": noise})

    def entered(self, layer: int) -> Floats:
        """What `keep_forward` was given.

        Raises:
            Dots1Error: it is damaged.
        """
        return self._load(self._input(layer))

    def noise(self, layer: int) -> float:
        """The noise of a router's margins."""
        return float(self._read(self._work / f"noise-{layer:04}.json")["sigma"])

    def keep_backward(self, layer: int, gradients: Floats, effects: Effects) -> None:
        """Keep what was measured in a layer, and the gradients at what enters it.

        The layer after the last stands for the head.
        """
        measured = {
            name: {kind: asdict(effect) for kind, effect in by_type.items()}
            for name, by_type in effects.items()
        }
        self._write(self._work / f"effects-{layer:04}.json", measured)
        self._save(self._gradients(layer), gradients)
        self._gradients(layer + 1).unlink(missing_ok=True)

    def reached(self, layers: int) -> tuple[int, Floats] | None:
        """The last layer that `keep_backward` was called for, and its gradients; None if none was.

        Raises:
            Dots1Error: they are damaged.
        """
        for layer in range(layers + 1):
            if self._gradients(layer).exists():
                return layer, self._load(self._gradients(layer))
        return None

    def effects(self, layers: int) -> dict[str, dict[str, Effect]]:
        """Everything that was measured, from the head back to the first layer."""
        return {
            str(name): {kind: Effect(**values) for kind, values in by_type.items()}
            for layer in range(layers, -1, -1)
            for name, by_type in self._read(self._work / f"effects-{layer:04}.json").items()
        }

    def _input(self, layer: int) -> Path:
        return self._work / f"probe-{layer:04}.npy"

    def _gradients(self, layer: int) -> Path:
        return self._work / f"back-{layer:04}.npy"

    def _save(self, path: Path, values: Floats) -> None:
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, values)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def _load(self, path: Path) -> Floats:
        try:
            return np.asarray(np.load(path, allow_pickle=False), np.float32)
        except (ValueError, EOFError) as error:
            raise Dots1Error(f"{path} is damaged ({error}); start over with --force") from None

    def _write(self, path: Path, value: Any) -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(value))
        os.replace(partial, path)

    def _read(self, path: Path) -> Any:
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise Dots1Error(f"{path} is damaged ({error}); start over with --force") from None
