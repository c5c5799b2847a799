"""Helpers for tests of calibration."""

from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.calibrate.calibrate import calibrate
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint

LAYERS = 4


def random_tokens(chunks: int, n_ctx: int = 32, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 200, (chunks, n_ctx)).astype(np.int32)


def run(checkpoint: Checkpoint, folder: Path, tokens: NDArray[np.int32], **options: Any) -> bytes:
    calibrate(checkpoint, folder, tokens, sensitivity=False, threads=1, **options)
    assert {path.name for path in folder.iterdir()} == {
        "imatrix.gguf",
        "routing.safetensors",
        "calibration.json",
    }
    return (folder / "imatrix.gguf").read_bytes()


class Sink:
    """Keeps logits in memory; with `fails`, closing it fails."""

    def __init__(self, *shape: int, fails: bool = False) -> None:
        self.rows, self.fails = np.full(shape, np.nan, np.float32), fails

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None and self.fails:
            raise Dots1Error("the disk is full")

    def write(self, chunk: int, start: int, logits: NDArray[np.float32]) -> None:
        self.rows[chunk, start : start + len(logits)] = logits


RESULTS = {"imatrix.gguf", "sensitivity.json", "routing.safetensors", "calibration.json"}
BLOCKS_OF_32 = {"Q8_0", "Q5_1", "Q5_0", "Q4_1", "IQ4_NL", "MXFP4"}
BLOCKS_OF_256 = {"Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S",
                 "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}  # fmt: skip
NEEDS_IMPORTANCE = {"IQ2_XS", "IQ2_XXS", "IQ1_S"}


def probed(
    checkpoint: Checkpoint, folder: Path, tokens: NDArray[np.int32], **options: Any
) -> dict[str, bytes]:
    """Calibrate with sensitivity; return the contents of the results by name."""
    calibrate(checkpoint, folder, tokens, threads=1, **options)
    config = checkpoint.config
    dense = config.first_k_dense_replace == config.num_hidden_layers
    expected = RESULTS - {"routing.safetensors"} if dense else RESULTS
    assert {path.name for path in folder.iterdir()} == expected
    return {name: (folder / name).read_bytes() for name in expected}
