from pathlib import Path

import pytest

from dots1_local.devices import limits as disk


def test_reads_a_file_that_is_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_FILE", 1 << 22)
    rate = disk.read_rate(tmp_path)  # None where temporary files are in RAM
    assert rate is None or rate > 0
    assert list(tmp_path.iterdir()) == []


def test_ram_is_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_FILE", 1 << 22)
    if not Path("/dev/shm").is_dir():
        pytest.skip("no file system in RAM is at the usual place")
    assert disk.read_rate(Path("/dev/shm")) is None


def test_where_nothing_can_be_written_there_is_no_figure(tmp_path: Path) -> None:
    assert disk.read_rate(tmp_path / "missing") is None
