"""A calibration is resumed after any interruption, with the same bytes."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dots1_local.calibrate.calibrate import calibrate
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from tests.calibrate.calibration import LAYERS, Sink, random_tokens, run

# Prints its position at a part of the work, and waits there to be killed.
CHILD = """
import sys, time
import numpy as np
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.calibrate.calibrate import calibrate

def progress(done, total, unit, what):
    if done >= float(sys.argv[4]) * total:
        print(what, flush=True)
        time.sleep(60)

calibrate(
    Checkpoint.open(sys.argv[1]), sys.argv[2], np.load(sys.argv[3]), threads=1, progress=progress,
    sensitivity=False, on_resume=lambda done, *_: print("resumed", done, flush=True),
)
"""


def kill_in(layer: int, checkpoint: Checkpoint, output: Path, tokens: Path) -> list[str]:
    """What a run said before it was killed near the end of a layer."""
    point = str((layer + 0.9) / LAYERS)
    command = [sys.executable, "-c", CHILD, *map(str, (checkpoint.path, output, tokens)), point]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline()]
        if said[0].startswith("resumed"):
            said.append(process.stdout.readline())
        process.kill()
    return said


def test_killed_in_every_layer(micro: Checkpoint, expected: bytes, tmp_path: Path) -> None:
    output, tokens = tmp_path / "out", tmp_path / "tokens.npy"
    np.save(tokens, random_tokens(6))
    said = [kill_in(layer, micro, output, tokens) for layer in range(LAYERS)]
    resumed = [[], [], *([f"resumed {layer - 1}\n"] for layer in range(2, LAYERS))]
    assert said == [[*again, f"layer {layer}\n"] for layer, again in enumerate(resumed)]
    assert not (output / "imatrix.gguf").exists()
    assert run(micro, output, random_tokens(6)) == expected
    run(micro, tmp_path / "whole", random_tokens(6))
    routing = "routing.safetensors"
    assert (output / routing).read_bytes() == (tmp_path / "whole" / routing).read_bytes()


class Stopped(Exception):
    """Stands for the user's Ctrl-C."""


def stop_after(micro: Checkpoint, folder: Path, layers: int) -> None:
    def stop(done: int, total: int, unit: str, what: str) -> None:
        if what == f"layer {layers}":
            raise Stopped

    with pytest.raises(Stopped):
        calibrate(micro, folder, random_tokens(6), threads=1, progress=stop, sensitivity=False)


def test_a_damaged_stream_is_not_resumed(
    micro: Checkpoint, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    stop_after(micro, output, 2)
    with next((output / "work" / "stream").glob("stream-*")).open("r+b") as file:
        file.truncate(100)
    assert run(micro, output, random_tokens(6)) == expected


def test_another_run_is_removed_only_by_force(
    micro: Checkpoint, expected: bytes, tmp_path: Path
) -> None:
    output, other = tmp_path / "out", random_tokens(6, seed=9)
    stop_after(micro, output, 2)
    with pytest.raises(Dots1Error, match="unfinished calibration of another"):
        calibrate(micro, output, other, sensitivity=False)
    assert run(micro, output, other, force=True) != expected
    with pytest.raises(Dots1Error, match=r"imatrix\.gguf exists.*--force"):
        calibrate(micro, output, random_tokens(6), sensitivity=False)
    assert run(micro, output, random_tokens(6), force=True) == expected


def test_another_programs_work_folder_is_left_alone(micro: Checkpoint, tmp_path: Path) -> None:
    names = {"novel.txt", "layer-1.psd", "after_party.jpg", "after-all.txt", "sub"}
    work = tmp_path / "out" / "work"
    for name in names:
        (work / name).mkdir(parents=True)
    calibrate(micro, tmp_path / "out", random_tokens(2), threads=1, force=True, sensitivity=False)
    assert {path.name for path in work.iterdir()} == names


def test_work_may_be_a_link_to_another_disk(micro: Checkpoint, tmp_path: Path) -> None:
    output, scratch = tmp_path / "out", tmp_path / "scratch"
    output.mkdir()
    scratch.mkdir()
    (output / "work").symlink_to(scratch)
    calibrate(micro, output, random_tokens(2), threads=1, sensitivity=False)
    assert (output / "imatrix.gguf").exists()
    assert not list(scratch.iterdir())


def test_a_blocked_result_is_refused_before_the_work(micro: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out" / "imatrix.gguf").mkdir(parents=True)
    with pytest.raises(Dots1Error, match=r"imatrix\.gguf is a folder"):
        calibrate(
            micro, tmp_path / "out", random_tokens(2), threads=1, force=True, sensitivity=False
        )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["imatrix.gguf"]


def test_full_disk_loses_nothing(
    micro: Checkpoint, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, open_it = tmp_path / "out", os.open
    stop_after(micro, output, 1)

    def full(path: str, *args: Any) -> int:
        if str(path).endswith("layer-0001.gguf.partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_it(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with pytest.raises(Dots1Error, match=r"disk is full.*/out\b"):
            calibrate(micro, output, random_tokens(6), threads=1, sensitivity=False)
    resumed = []
    content = run(micro, output, random_tokens(6), on_resume=lambda *args: resumed.append(args[:2]))
    assert (content, resumed) == (expected, [(1, LAYERS)])


def test_full_disk_in_the_end_loses_nothing(
    micro: Checkpoint, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dots1_local.calibrate.calibration_results.write_imatrix", full)
        with pytest.raises(Dots1Error, match=r"disk is full.*/out\b"):
            calibrate(micro, tmp_path / "out", random_tokens(6), threads=1, sensitivity=False)
    assert run(micro, tmp_path / "out", random_tokens(6)) == expected


def test_too_little_space_is_refused_before_the_work(
    micro: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(Dots1Error, match="9 B free, but calibration needs"):
        calibrate(micro, tmp_path / "out", random_tokens(6), sensitivity=False)


def test_logits_that_cannot_be_written_cost_no_layer(micro: Checkpoint, tmp_path: Path) -> None:
    tokens, resumed = random_tokens(2), []
    shape = 2, 15, micro.config.vocab_size
    bad, good = Sink(*shape, fails=True), Sink(*shape)
    with pytest.raises(Dots1Error, match="the disk is full"):
        calibrate(
            micro,
            tmp_path / "out",
            tokens,
            evaluation=tokens,
            logits=bad,
            threads=1,
            sensitivity=False,
        )
    calibrate(micro, tmp_path / "out", tokens, evaluation=tokens, logits=good, threads=1,
              sensitivity=False, on_resume=lambda *args: resumed.append(args[:2]))  # fmt: skip
    assert resumed == [(LAYERS, LAYERS)]
    np.testing.assert_array_equal(good.rows, bad.rows)


def test_two_runs_do_not_share_a_folder(micro: Checkpoint, tmp_path: Path) -> None:
    def again(done: int, total: int, unit: str, what: str) -> None:
        with pytest.raises(Dots1Error, match="another calibration is running in"):
            calibrate(micro, tmp_path / "out", random_tokens(6), sensitivity=False)

    calibrate(
        micro, tmp_path / "out", random_tokens(6), threads=1, progress=again, sensitivity=False
    )


@pytest.mark.parametrize("moved", range(3))
def test_killed_while_the_results_get_their_places(
    micro: Checkpoint, expected: bytes, tmp_path: Path, moved: int
) -> None:
    output, replace, left = tmp_path / "out", os.replace, moved

    def moving(source: Path, target: Path) -> None:
        nonlocal left
        if Path(target).parent == output:
            left -= 1
            if left < 0:
                raise Stopped
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", moving)
        with pytest.raises(Stopped):
            run(micro, output, random_tokens(6))
    assert len([path for path in output.iterdir() if path.is_file()]) == moved
    assert run(micro, output, random_tokens(6)) == expected
    assert not (output / "work").exists()


def test_killed_after_the_results_have_their_places(
    micro: Checkpoint, expected: bytes, tmp_path: Path
) -> None:
    unlink = Path.unlink

    def removing(path: Path, missing_ok: bool = False) -> None:
        if (tmp_path / "calibration.json").exists():
            raise Stopped
        unlink(path, missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", removing)
        with pytest.raises(Stopped):
            run(micro, tmp_path, random_tokens(6))
    with pytest.raises(Dots1Error, match="--force"):
        run(micro, tmp_path, random_tokens(6))
    assert (tmp_path / "imatrix.gguf").read_bytes() == expected
    assert not (tmp_path / "work").exists()
