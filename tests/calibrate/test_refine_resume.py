"""A run with refinement is resumed after any interruption, with the same bytes."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dots1_local.calibrate.calibrate import calibrate
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from tests.calibrate.calibration import RESULTS, random_tokens
from tests.micro import micro_checkpoint

TOKENS = random_tokens(6)
LAYERS = 2
ALL_RESULTS = {*RESULTS, "refinement.safetensors", "sensitivity-refined.json"}


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("micro")
    return Checkpoint.open(micro_checkpoint(folder, num_hidden_layers=LAYERS))


def refined(checkpoint: Checkpoint, folder: Path, **options: Any) -> dict[str, bytes]:
    calibrate(checkpoint, folder, TOKENS, refine=True, threads=1, **options)
    assert {path.name for path in folder.iterdir()} == ALL_RESULTS
    return {name: (folder / name).read_bytes() for name in ALL_RESULTS}


@pytest.fixture(scope="module")
def moments(micro: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copies of the folder, each made before a file got its name; the last one is the result."""
    kept = tmp_path_factory.mktemp("moments")
    output, replace = kept / "output", os.replace

    def keep(*names: Any) -> None:
        shutil.copytree(output, kept / f"{len(list(kept.iterdir())):03}")
        replace(*names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", keep)
        refined(micro, output)
    output.rename(kept / "999")
    return sorted(kept.iterdir())


@pytest.fixture(scope="module")
def expected(moments: list[Path]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in moments[-1].iterdir()}


def before(moments: list[Path], file: str, folder: Path) -> Path:
    """A copy of the first moment at which the work folder holds a file."""
    there = next(moment for moment in moments if (moment / "work" / file).exists())
    return shutil.copytree(there, folder)


def test_killed_at_any_moment(
    micro: Checkpoint, moments: list[Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    """--force finishes a run that has already moved a result."""
    assert set(expected) == ALL_RESULTS
    assert len(moments) > 20
    for moment in moments[-2::-3]:
        folder = shutil.copytree(moment, tmp_path / moment.name)
        assert refined(micro, folder, force=(folder / "imatrix.gguf").exists()) == expected


def test_evaluation_changes_no_bit(
    micro: Checkpoint, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Rows of the text to evaluate are in no moment and no sample."""
    other = random_tokens(2, seed=1)
    assert refined(micro, tmp_path / "out", evaluation=other) == expected


@pytest.mark.parametrize("how", ["empty", "short", "gone"])
@pytest.mark.parametrize(
    "name",
    [
        "sample-0000.json", "errors-0000.safetensors", "judged-0000.npy", "refined-0001.json",
        "refinement.safetensors",
    ],
)  # fmt: skip
def test_damaged_files_are_named(
    micro: Checkpoint, moments: list[Path], tmp_path: Path, name: str, how: str
) -> None:
    """The way out that the error names works."""
    folder = before(moments, f"back-{LAYERS - 1:04}.npy", tmp_path / "out")
    file = folder / "work" / name
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) - 1 if how == "short" else 0])
    with pytest.raises(Dots1Error, match=rf"{name} .*damaged.*remove .*work"):
        calibrate(micro, folder, TOKENS, refine=True, threads=1)


@pytest.mark.parametrize("name", ["sample-0000.json", "judged-0001.npy", "refined-0001.json"])
def test_full_disk_loses_nothing(
    micro: Checkpoint,
    moments: list[Path],
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    folder, open_it = shutil.copytree(moments[0], tmp_path / "out"), os.open

    def full(path: Any, *args: Any, **options: Any) -> int:
        if Path(path).name == f"{name}.partial":
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_it(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with pytest.raises(Dots1Error, match=r"disk is full.*/out\b"):
            calibrate(micro, folder, TOKENS, refine=True, threads=1)
    assert refined(micro, folder) == expected


def test_full_disk_while_moments_are_written(
    micro: Checkpoint,
    moments: list[Path],
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file has its size from the start, but not its place on the disk."""
    folder = before(moments, f"back-{LAYERS:04}.npy", tmp_path / "out")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dots1_local.calibrate.refinement_file.write_all", full)
        with pytest.raises(Dots1Error, match=r"disk is full.*/out\b"):
            calibrate(micro, folder, TOKENS, refine=True, threads=1)
    assert refined(micro, folder) == expected


def test_too_little_memory_is_one_sentence(
    micro: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10^18 bytes are requested, which numpy refuses."""
    monkeypatch.setattr(
        "dots1_local.calibrate.refinement_sample.input_metric", lambda *_: np.empty(1 << 57)
    )
    with pytest.raises(Dots1Error, match="not enough memory"):
        calibrate(micro, tmp_path / "out", TOKENS, refine=True, threads=1)


def test_a_run_without_refinement_is_another_one(
    micro: Checkpoint, moments: list[Path], tmp_path: Path
) -> None:
    folder = before(moments, f"back-{LAYERS:04}.npy", tmp_path / "out")
    with pytest.raises(Dots1Error, match="unfinished calibration of another"):
        calibrate(micro, folder, TOKENS, threads=1)
    calibrate(micro, folder, TOKENS, threads=1, force=True)
    assert {path.name for path in folder.iterdir()} == RESULTS
