"""The output folder: nothing is lost or half-done, and other people's files stay."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from dots1_local.cli import app
from dots1_local.errors import Dots1Error
from dots1_local.export import Export, Exported
from tests.helpers import write_random_gguf

SHARD_SIZE = 60_000

# Says where it is once it has passed a share of the bytes, and waits there to be killed.
CHILD = """
import sys, time
from dots1_local.export import Export

def progress(done, total, unit, what):
    if done >= float(sys.argv[3]) * total:
        print(what, flush=True)
        time.sleep(600)

Export.prepare(sys.argv[1], shard_size=60_000).run(sys.argv[2], threads=1, progress=progress)
"""


class Stopped(Exception):
    """Stands for the user's Ctrl-C."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("model") / "m.gguf")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted export."""
    output = tmp_path_factory.mktemp("expected") / "out"
    export(model, output)
    return contents(output)


def export(model: Path, output: Path, *, force: bool = False) -> Exported:
    return Export.prepare(model, shard_size=SHARD_SIZE).run(output, threads=1, force=force)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_at(share: float, model: Path, output: Path, *, force: bool = False) -> int:
    """Interrupt an export in this process; returns how many shards were complete."""

    def stop(done: int, total: int, unit: str, what: str) -> None:
        if done >= share * total:
            raise Stopped

    with pytest.raises(Stopped):
        Export.prepare(model, shard_size=SHARD_SIZE).run(
            output, threads=1, force=force, progress=stop
        )
    return len(list(partial(output).glob("*.safetensors")))


def partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


@pytest.mark.parametrize("share", [0.01, 0.4, 1.0])
def test_a_killed_run_resumes_at_its_shard(
    model: Path, expected: dict[str, bytes], tmp_path: Path, share: float
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", CHILD, str(model), str(output), str(share)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    assert not output.exists()
    complete = sorted(partial(output).glob("*.safetensors"))
    before = {path.name: path.stat().st_mtime_ns for path in complete}
    arguments = ["export", str(model), "-o", str(output), "--shard-size", str(SHARD_SIZE)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert contents(output) == expected
    count = len(Export.prepare(model, shard_size=SHARD_SIZE).shards)
    resumed = f"resuming: {len(complete)} of {count} shards are done"
    assert (resumed in result.stderr) == bool(complete)
    assert {name: (output / name).stat().st_mtime_ns for name in before} == before
    assert list(tmp_path.iterdir()) == [output]


def test_a_shard_that_was_cut_is_done_again(
    model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    count = stop_at(0.7, model, output)
    shards = sorted(partial(output).glob("*.safetensors"))
    os.truncate(shards[0], 1000)
    shards[1].write_bytes(bytes(shards[1].stat().st_size))
    assert export(model, output).resumed_shards == count - 2
    assert contents(output) == expected


def test_another_source_or_layout_starts_afresh(
    model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output, other = tmp_path / "out", tmp_path / "m.gguf"
    write_random_gguf(other, tensors={"output_norm.weight": np.full(64, 2, np.float32)})
    assert stop_at(0.7, other, output) > 0
    assert export(model, output).resumed_shards == 0
    assert contents(output) == expected
    shutil.rmtree(output)
    assert stop_at(0.7, model, output) > 0
    Export.prepare(model).run(output, threads=1)
    assert len(list(output.glob("*.safetensors"))) == 1


def test_an_export_killed_while_it_is_published(
    model: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            export(model, output)
    assert contents(output) == expected
    assert export(model, output).resumed_shards == len(list(output.glob("*.safetensors")))
    assert contents(output) == expected
    assert list(tmp_path.iterdir()) == [output]
    with pytest.raises(Dots1Error, match="not empty"):
        export(model, output)


def test_a_full_disk_is_found_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(Dots1Error, match=r"1\.0 kB free, but out needs"):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_keeps_what_there_is(
    model: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, pwrite, written = tmp_path / "out", os.pwrite, 0

    def full(fd: int, data: bytes, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 3 * SHARD_SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(Dots1Error, match=r"disk is full; .* run the same command again"):
            export(model, output)
    assert export(model, output).resumed_shards > 0
    assert contents(output) == expected


def test_an_empty_folder_is_free_and_a_former_export_is_replaced_only_if_asked(
    model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    export(model, output)
    (output / "config.json").write_text("{}")
    with pytest.raises(Dots1Error, match="is not empty; give --force to replace it"):
        export(model, output)
    assert (output / "config.json").read_text() == "{}"
    export(model, output, force=True)
    assert contents(output) == expected


@pytest.mark.parametrize("folder", ["out", "out.partial"])
def test_files_that_no_export_wrote_stay(model: Path, tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / folder / "thesis.txt").write_text("years of work")
    with pytest.raises(Dots1Error, match=r"holds thesis\.txt, which no export writes"):
        export(model, tmp_path / "out", force=True)
    assert len(list((tmp_path / folder).iterdir())) == 2


def test_files_that_appear_during_an_export_stay(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert stop_at(0.5, model, output) > 0
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(Dots1Error, match="not empty"):
        export(model, output)

    def work(done: int, total: int, unit: str, what: str) -> None:
        (output / "thesis.txt").write_text("years of work")

    (output / "thesis.txt").unlink()
    with pytest.raises(Dots1Error, match="no export writes"):
        Export.prepare(model, shard_size=SHARD_SIZE).run(output, threads=1, progress=work)
    assert (output / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["", ".", "..", "file", "no/out", "link"])
def test_impossible_places_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(Dots1Error):
        export(model, Path(name), force=True)


def test_a_link_keeps_pointing(model: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    link.symlink_to(target)
    export(model, link)
    assert link.is_symlink()
    assert contents(target) == expected


def test_two_exports_into_one_folder_are_refused(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    complaints: list[str] = []

    def again(done: int, total: int, unit: str, what: str) -> None:
        if not complaints:
            with pytest.raises(Dots1Error) as error:
                export(model, output)
            complaints.append(str(error.value))

    Export.prepare(model, shard_size=SHARD_SIZE).run(output, threads=1, progress=again)
    assert "another export" in complaints[0]
    assert str(output) in complaints[0]
