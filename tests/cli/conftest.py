"""What several commands are tested with."""

import hashlib
import shutil
from pathlib import Path

import pytest

from dots1_local.files.checkpoint import Checkpoint
from tests.quant.made_up import made_up


@pytest.fixture(scope="session")
def calibration(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a calibration of dots1-tiny whose sensitivity is invented."""
    folder = tmp_path_factory.mktemp("calibrated")
    shutil.copy(tiny / "imatrix.gguf", folder)
    digest = hashlib.sha256((folder / "imatrix.gguf").read_bytes()).hexdigest()
    sensitivity = made_up(Checkpoint.open(tiny).config, imatrix=digest)
    (folder / "sensitivity.json").write_text(sensitivity.to_json())
    return folder
