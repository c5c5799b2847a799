"""Plans that are refined in one pass become the files that `Conversion` writes one by one."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.refine_together import refine_together
from dots1_local.convert import Conversion
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.quant.recipes import make_plan
from tests.convert.refinement import calibration_folder, sha256, small_checkpoint


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_files_equal_those_of_conversions(tmp_path: Path) -> None:
    source = small_checkpoint(tmp_path / "hf")
    calibration = calibration_folder(source, tmp_path / "calibrated")
    config = Checkpoint.open(source).config
    plans = {
        tmp_path / f"{name}.gguf": make_plan(config, name, has_importance=True, padding="on")
        for name in ("IQ2_XXS", "Q3_K_S", "Q8_0")
    }
    sizes = refine_together(source, calibration, plans, tmp_path / "work")
    for path, plan in plans.items():
        alone = tmp_path / "alone.gguf"
        conversion = Conversion.prepare(source, plan, calibration=calibration, refine=True)
        assert conversion.run(alone, threads=1, force=True).nbytes == sizes[path]
        assert sha256(path) == sha256(alone)
    assert {path.name for path in tmp_path.iterdir()} == {
        "hf", "calibrated", "alone.gguf", *(path.name for path in plans),
    }  # fmt: skip
    assert np.unique([sha256(path) for path in plans]).size == 3
