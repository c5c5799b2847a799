"""Calibration with sensitivity, and what the tests of it expect."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.calibrate.run import calibrate
from dots1_local.files.checkpoint import Checkpoint

RESULTS = {"imatrix.gguf", "sensitivity.json"}
BLOCKS_OF_32 = {"Q8_0", "Q5_1", "Q5_0", "Q4_1", "IQ4_NL", "MXFP4"}
BLOCKS_OF_256 = {"Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S",
                 "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}  # fmt: skip
NEEDS_IMPORTANCE = {"IQ2_XS", "IQ2_XXS", "IQ1_S"}


def probed(
    checkpoint: Checkpoint, folder: Path, tokens: NDArray[np.int32], **options: Any
) -> dict[str, bytes]:
    """The files that a run leaves, which are its results."""
    calibrate(checkpoint, folder, tokens, threads=1, **options)
    assert {path.name for path in folder.iterdir()} == RESULTS
    return {name: (folder / name).read_bytes() for name in RESULTS}
