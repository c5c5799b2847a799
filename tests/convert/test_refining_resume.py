"""A refined conversion that was interrupted is finished by another run, to the same bytes."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dots1_local.convert import Conversion, Result
from dots1_local.errors import Dots1Error
from tests.convert.refinement import LAYERS, calibration_folder, sha256, small_checkpoint

# Prints what it computes when this begins with a text, and waits there to be killed.
CHILD = """
import sys, time
from dots1_local.convert import Conversion

def progress(done, total, unit, what):
    if what.startswith(sys.argv[4]):
        print(what, flush=True)
        time.sleep(60)

Conversion.prepare(
    sys.argv[1], "Q4_0", calibration=sys.argv[2], refine=True
).run(sys.argv[3], threads=2, progress=progress)
"""
NARROW = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}  # quick
AT_LAST = "layer {}, 100%"  # when its last rows are computed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint"), **NARROW)


@pytest.fixture(scope="module")
def calibrated(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration_folder(checkpoint, tmp_path_factory.mktemp("calibrated") / "out")


Prepare = Callable[[], Conversion]


@pytest.fixture(scope="module")
def prepare(checkpoint: Path, calibrated: Path) -> Prepare:
    return lambda: Conversion.prepare(checkpoint, "Q4_0", calibration=calibrated, refine=True)


@pytest.fixture(scope="module")
def expected(prepare: Prepare, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Result]:
    """The checksum and the results of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out.gguf"
    result = prepare().run(output, threads=2)
    return sha256(output), result


class Stopped(Exception):
    """Stands for Ctrl-C."""


def stop_at(prepare: Prepare, output: Path, where: str) -> None:
    def stop(done: int, total: int, unit: str, what: str) -> None:
        if what.startswith(where):
            raise Stopped

    with pytest.raises(Stopped):
        prepare().run(output, threads=2, progress=stop)


def finish(prepare: Prepare, output: Path, expected: tuple[str, Result]) -> list[str]:
    """Complete a conversion; check its bytes and results, and return what it computed."""
    heard: list[str] = []
    result = prepare().run(output, threads=2, progress=lambda *args: heard.append(args[3]))
    assert sha256(output) == expected[0]
    assert result.refined == expected[1].refined
    assert list(output.parent.iterdir()) == [output]
    return list(dict.fromkeys(what.split(",")[0] for what in heard))


def test_killed_in_every_layer(
    checkpoint: Path,
    calibrated: Path,
    prepare: Prepare,
    tmp_path: Path,
    expected: tuple[str, Result],
) -> None:
    output = tmp_path / "out.gguf"
    places = ["embedding", *map(AT_LAST.format, range(LAYERS)), "head"]
    for place in places:
        command = [sys.executable, "-c", CHILD, *map(str, (checkpoint, calibrated, output)), place]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(place)
            process.kill()
    assert "layer 2" not in finish(prepare, output, expected)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_finished_layers_are_not_passed_again(
    prepare: Prepare, tmp_path: Path, expected: tuple[str, Result], layer: int
) -> None:
    output = tmp_path / "out.gguf"
    stop_at(prepare, output, AT_LAST.format(layer))
    computed = finish(prepare, output, expected)
    assert [what for what in computed if what.startswith("layer")] == [
        f"layer {number}" for number in range(layer, LAYERS)
    ]


def test_a_tensor_that_is_lost_is_refined_again(
    prepare: Prepare, tmp_path: Path, expected: tuple[str, Result]
) -> None:
    """Its moments are gone, so that the tokens pass from the beginning."""
    output = tmp_path / "out.gguf"
    stop_at(prepare, output, AT_LAST.format(2))
    lines = output.with_name("out.gguf.journal").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "blk.0.attn_q.weight" not in line]
    assert len(kept) == len(lines) - 1
    output.with_name("out.gguf.journal").write_text("".join(kept))
    assert "layer 0" in finish(prepare, output, expected)


@pytest.mark.parametrize("lost", ["*", "stream-*", "results*", "identity"])
def test_files_of_the_pass_may_get_lost(
    prepare: Prepare, tmp_path: Path, expected: tuple[str, Result], lost: str
) -> None:
    output = tmp_path / "out.gguf"
    stop_at(prepare, output, AT_LAST.format(1))
    for path in output.with_name("out.gguf.refine").glob(lost):
        path.unlink()
    prepare().run(output, threads=2)
    assert sha256(output) == expected[0]


def test_a_stream_of_another_size_is_not_used(
    prepare: Prepare, tmp_path: Path, expected: tuple[str, Result]
) -> None:
    output = tmp_path / "out.gguf"
    stop_at(prepare, output, AT_LAST.format(1))
    for path in output.with_name("out.gguf.refine").glob("stream-*"):
        os.truncate(path, 100)
    assert "layer 0" in finish(prepare, output, expected)


def test_a_full_disk_loses_nothing(
    prepare: Prepare, tmp_path: Path, expected: tuple[str, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.gguf"

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(Dots1Error, match=r"disk is full.*out\.gguf\.refine"):
            prepare().run(output, threads=2)
    stop_at(prepare, output, AT_LAST.format(2))
    with monkeypatch.context() as patch:
        patch.setattr("dots1_local.convert.writer.write_all", full)
        with pytest.raises(Dots1Error, match=r"disk is full.*out\.gguf"):
            prepare().run(output, threads=2)
    finish(prepare, output, expected)


def test_too_little_space_is_refused_before_the_work(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(Dots1Error, match=r"out\.gguf.*640 tokens"):
        prepare().run(tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_other_files_in_the_folder_stay(
    prepare: Prepare, tmp_path: Path, expected: tuple[str, Result]
) -> None:
    output, folder = tmp_path / "out.gguf", tmp_path / "out.gguf.refine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    prepare().run(output, threads=2)
    assert sha256(output) == expected[0]
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_too_little_memory_is_one_sentence(
    prepare: Prepare, tmp_path: Path, expected: tuple[str, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.gguf"

    def out_of_memory(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("dots1_local.convert.refined.input_metric", out_of_memory)
        with pytest.raises(Dots1Error, match=r"not enough memory.*--threads"):
            prepare().run(output, threads=2)
    finish(prepare, output, expected)
