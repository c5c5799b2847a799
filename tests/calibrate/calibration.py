"""What the tests of calibration share."""

from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.calibrate.run import calibrate
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint

LAYERS = 4


def random_tokens(chunks: int, n_ctx: int = 32, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 200, (chunks, n_ctx)).astype(np.int32)


def run(checkpoint: Checkpoint, folder: Path, tokens: NDArray[np.int32], **options: Any) -> bytes:
    calibrate(checkpoint, folder, tokens, sensitivity=False, threads=1, **options)
    assert [path.name for path in folder.iterdir()] == ["imatrix.gguf"]
    return (folder / "imatrix.gguf").read_bytes()


class Sink:
    """Keeps logits; with `fails`, cannot keep them in the end."""

    def __init__(self, *shape: int, fails: bool = False) -> None:
        self.rows, self.fails = np.full(shape, np.nan, np.float32), fails

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None and self.fails:
            raise Dots1Error("the disk is full")

    def write(self, chunk: int, start: int, logits: NDArray[np.float32]) -> None:
        self.rows[chunk, start : start + len(logits)] = logits
