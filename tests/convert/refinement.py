"""Helpers for tests of refinement: a checkpoint, and a calibration folder made in a moment."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.calibrate.calibrate import calibrate
from dots1_local.calibrate.refinement_file import RefinementWriter
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.quant.imatrix_file import load_importance
from tests.micro import micro_checkpoint

LAYERS, EXPERTS, HIDDEN, WIDTH = 3, 4, 256, 192
SHAPE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 512,
    "moe_intermediate_size": WIDTH,
    "n_routed_experts": EXPERTS,
}


def small_checkpoint(folder: Path, shards: int = 3, **changes: Any) -> Path:
    """One dense layer and MoE layers, whose rows fit every type if experts are padded."""
    return micro_checkpoint(folder, shards=shards, **(SHAPE | changes))


def random_tokens(chunks: int = 20, n_ctx: int = 32) -> NDArray[np.int32]:
    return np.random.default_rng(0).integers(0, 200, (chunks, n_ctx)).astype(np.int32)


def calibration_folder(source: Path, folder: Path, tokens: NDArray[np.int32] | None = None) -> Path:
    """Importance as measured, and gradients drawn at random: the backward pass takes seconds."""
    checkpoint, chosen = Checkpoint.open(source), random_tokens() if tokens is None else tokens
    calibrate(checkpoint, folder, chosen, sensitivity=False, threads=1, datasets=["text.txt"])
    importance = load_importance(folder / "imatrix.gguf").sha256
    random = np.random.default_rng(1)
    size = checkpoint.config.hidden_size
    scales = np.exp(random.standard_normal(size)).astype(np.float32)
    path = folder / "refinement.safetensors"
    writer = RefinementWriter(path, chosen, checkpoint, importance, 3 * size, resume=False)
    for layer in range(checkpoint.config.num_hidden_layers):
        writer.put_outputs(layer, random.standard_normal((3 * size, size), np.float32) * scales)
    writer.put_embedding(random.standard_normal((3 * size, size), np.float32) * scales)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
