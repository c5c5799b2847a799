"""A checkpoint small enough to calibrate in no time, and what calibrating it writes."""

import pytest

from dots1_local.checkpoint import Checkpoint
from tests.micro import micro_checkpoint
from tests.quant.calibration import LAYERS, random_tokens, run


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("micro")
    return Checkpoint.open(micro_checkpoint(folder, num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def expected(micro: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an uninterrupted run on `random_tokens(6)` writes."""
    return run(micro, tmp_path_factory.mktemp("uninterrupted") / "out", random_tokens(6))
