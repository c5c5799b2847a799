"""A checkpoint that is calibrated in a moment, and its importance file."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dots1_local.files.checkpoint import Checkpoint
from tests.calibrate.calibration import LAYERS, random_tokens, run
from tests.calibrate.passes import Passed, forward
from tests.convert.conftest import cache, hub
from tests.micro import micro_checkpoint

__all__ = ["cache", "hub"]


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("micro")
    return Checkpoint.open(micro_checkpoint(folder, num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def expected(micro: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The importance file of an uninterrupted run on `random_tokens(6)`."""
    return run(micro, tmp_path_factory.mktemp("uninterrupted") / "out", random_tokens(6))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On busy cores, threads would wait for each other at every small product."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def passed(tiny: Path) -> Passed:
    return forward(tiny)
