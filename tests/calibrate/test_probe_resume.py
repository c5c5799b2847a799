"""A run that measures sensitivity is resumed after any interruption, with the same bytes."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dots1_local.calibrate.calibrate import calibrate
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from tests.calibrate.calibration import RESULTS, Sink, probed, random_tokens
from tests.micro import micro_checkpoint

LAYERS = 2
TOKENS = random_tokens(6)
EVALUATED = random_tokens(2, seed=1)


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("micro")
    return Checkpoint.open(micro_checkpoint(folder, num_hidden_layers=LAYERS))


def sink() -> Sink:
    return Sink(len(EVALUATED), 15, 288)


@pytest.fixture(scope="module")
def moments(micro: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copies of the folder, each made before a file got its name or was removed; the last copy is
    the result of the whole run."""
    kept = tmp_path_factory.mktemp("moments")
    output = kept / "output"

    def keep() -> None:
        shutil.copytree(output, kept / f"{len(list(kept.iterdir())):03}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", before(keep, os.replace))
        patch.setattr(Path, "unlink", before(keep, Path.unlink))
        probed(micro, output, TOKENS, evaluation=EVALUATED, logits=sink())
    keep()
    shutil.rmtree(output)
    return sorted(kept.iterdir())


def before(act: Any, function: Any) -> Any:
    def both(*args: Any, **options: Any) -> Any:
        act()
        return function(*args, **options)

    return both


@pytest.fixture(scope="module")
def expected(moments: list[Path]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in moments[-1].iterdir()}


@pytest.fixture
def half_way(moments: list[Path], tmp_path: Path) -> Path:
    """A folder whose backward pass has finished the last layer."""
    there = (m for m in moments if (m / "work" / f"back-{LAYERS - 1:04}.npy").exists())
    return shutil.copytree(next(there), tmp_path / "out")


def test_killed_at_any_moment(
    micro: Checkpoint, moments: list[Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    """--force finishes a run that has already moved a result."""
    logits = sink()
    calibrate(micro, tmp_path / "all", TOKENS, evaluation=EVALUATED, logits=logits, threads=1)
    assert len(moments) > 20
    for moment in moments[:-1]:
        folder, again = tmp_path / moment.name, sink()
        shutil.copytree(moment, folder)
        there = RESULTS & {path.name for path in folder.iterdir()}
        found = probed(micro, folder, TOKENS, evaluation=EVALUATED, logits=again, force=bool(there))
        assert found == expected, moment
        np.testing.assert_array_equal(again.rows, logits.rows)


def test_nothing_is_published_before_all_is_measured(moments: list[Path]) -> None:
    for moment in moments:
        if RESULTS & {path.name for path in moment.iterdir()}:
            there = {path.name for folder in (moment, moment / "work") if folder.exists()
                     for path in folder.iterdir()}  # fmt: skip
            assert there >= RESULTS


def test_a_resumed_run_reports_the_finished_layers(
    micro: Checkpoint, moments: list[Path], tmp_path: Path
) -> None:
    said = []
    for moment in moments[:-1]:
        folder = shutil.copytree(moment, tmp_path / moment.name)
        with pytest.raises(Stopped):
            calibrate(micro, folder, TOKENS, evaluation=EVALUATED, threads=1, force=True,
                      on_resume=lambda *now: said.append(now[:3]), progress=stop)  # fmt: skip
    forward = [(layer, LAYERS, "layers") for layer in range(1, LAYERS + 1)]
    back = [(layer, LAYERS, "layers of the backward pass") for layer in range(LAYERS + 1)]
    assert list(dict.fromkeys(said)) == [*forward, *back]


class Stopped(Exception):
    """Stands for the user's Ctrl-C."""


def stop(done: int, total: int, unit: str, what: str) -> None:
    raise Stopped


def test_interrupted_at_any_report(
    micro: Checkpoint, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Ctrl-C comes a little later each time; finished layers are not computed again."""
    reports = [0]

    def interrupt(done: int, total: int, unit: str, what: str) -> None:
        reports[0] -= 1
        if reports[0] < 0:
            raise KeyboardInterrupt

    for count in range(0, 45, 4):
        reports[0] = count
        try:
            calibrate(micro, tmp_path / "out", TOKENS, evaluation=EVALUATED, threads=1,
                      progress=interrupt)  # fmt: skip
        except KeyboardInterrupt:
            continue
        break
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == expected


@pytest.mark.parametrize(
    "file", ["back-0001.npy.partial", "effects-0001.json.partial", "sensitivity.json"]
)
def test_full_disk_loses_nothing(
    micro: Checkpoint,
    moments: list[Path],
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
) -> None:
    has_head = (m for m in moments if (m / "work" / f"back-{LAYERS:04}.npy").exists())
    folder = shutil.copytree(next(has_head), tmp_path / "out")

    def unless_full(open_it: Callable[..., Any]) -> Callable[..., Any]:
        def full(path: Path | str, *args: Any, **options: Any) -> Any:
            if Path(path).name == file:
                raise OSError(errno.ENOSPC, "No space left on device")
            return open_it(path, *args, **options)

        return full

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", unless_full(Path.open))
        patch.setattr(os, "open", unless_full(os.open))
        with pytest.raises(Dots1Error, match=r"disk is full.*/out\b"):
            calibrate(micro, folder, TOKENS, evaluation=EVALUATED, threads=1)
    assert [path.name for path in folder.iterdir()] == ["work"]
    assert probed(micro, folder, TOKENS, evaluation=EVALUATED) == expected


@pytest.mark.parametrize("how", ["empty", "short", "gone", "junk"])
@pytest.mark.parametrize("name", ["probe-0000.npy", "noise-0000.json", "effects-0002.json"])
def test_damaged_files_are_named(
    micro: Checkpoint, half_way: Path, expected: dict[str, bytes], name: str, how: str
) -> None:
    """The way out that the error names works."""
    file = half_way / "work" / name
    content = {"empty": b"", "short": file.read_bytes()[:-1], "junk": b'[{"PK": [0]}]'}
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[how])
    with pytest.raises(Dots1Error, match=rf"{name} .*damaged.*remove .*work"):
        calibrate(micro, half_way, TOKENS, evaluation=EVALUATED, threads=1)
    shutil.rmtree(half_way / "work")
    assert probed(micro, half_way, TOKENS, evaluation=EVALUATED) == expected


def test_damaged_gradients_are_named(micro: Checkpoint, half_way: Path) -> None:
    file = half_way / "work" / "back-0001.npy"
    np.save(file, np.zeros((4, 6, 31, 64), np.float32))
    with pytest.raises(Dots1Error, match=r"back-0001\.npy .*damaged.*\(4, 6, 31"):
        calibrate(micro, half_way, TOKENS, evaluation=EVALUATED, threads=1)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Dots1Error, match=r"back-0001\.npy .*damaged.*remove .*work"):
        calibrate(micro, half_way, TOKENS, evaluation=EVALUATED, threads=1)


@pytest.mark.parametrize(
    "other", [{"sensitivity": False}, {"least": 0}, {"precision": "BF16"}, {"evaluation": None}]
)
def test_a_run_with_other_settings_is_removed_only_by_force(
    micro: Checkpoint, half_way: Path, other: dict[str, Any]
) -> None:
    """This includes `least`: the encoders use the importance that it changes."""
    options: dict[str, Any] = {"evaluation": EVALUATED, "threads": 1} | other
    with pytest.raises(Dots1Error, match="unfinished calibration of another"):
        calibrate(micro, half_way, TOKENS, **options)
    calibrate(micro, half_way, TOKENS, **options, force=True)
    assert not (half_way / "work").exists()
