import errno
import fcntl
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from dots1_local.errors import Dots1Error
from dots1_local.evaluate.logits_file import MAGIC, LogitsFile, decode
from dots1_local.evaluate.logits_writer import LogitsWriter, check_logits_target
from tests.evaluate.test_logits_file import SCORED, tokens
from tests.goldens.make_kld_goldens import BASE, N_CTX, N_VOCAB, exact_logits

FLAT = np.zeros((SCORED, N_VOCAB), np.float32)


def test_writes_the_same_bytes_in_any_order_and_from_any_thread(tmp_path: Path) -> None:
    path = tmp_path / "base.kld"
    with LogitsWriter(path, tokens(), N_VOCAB) as writer, ThreadPoolExecutor(4) as pool:

        def write(place: tuple[int, int]) -> None:
            chunk, start = place
            wanted = tokens()[chunk, N_CTX // 2 + start : N_CTX - 1][:8]
            writer.write(chunk, start, exact_logits(wanted, noisy=False))

        list(pool.map(write, reversed(list(product(range(4), range(0, SCORED, 8))))))
        assert not path.exists()
    assert path.read_bytes() == BASE.read_bytes()
    assert os.listdir(tmp_path) == ["base.kld"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    writer = LogitsWriter(tmp_path / "a.kld", tokens(), N_VOCAB)

    def interrupted() -> None:
        with writer:
            assert os.listdir(tmp_path) == ["a.kld.partial"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not os.listdir(tmp_path)


def test_an_incomplete_file_is_not_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(Dots1Error, match="lacks rows"),
        LogitsWriter(tmp_path / "a.kld", tokens(), N_VOCAB) as writer,
    ):
        writer.write(0, 0, FLAT)
    assert not os.listdir(tmp_path)


def test_only_a_logits_file_is_replaced_and_only_by_force(tmp_path: Path) -> None:
    path = Path(shutil.copy(BASE, tmp_path))
    with pytest.raises(Dots1Error, match="exists; give --force to replace it"):
        LogitsWriter(path, tokens(), N_VOCAB).__enter__()
    with LogitsWriter(path, tokens()[:1], N_VOCAB, force=True) as writer:
        assert path.read_bytes() == BASE.read_bytes()
        writer.write(0, 0, FLAT)
    with LogitsFile.open(path) as file:
        assert file.layout.chunks == 1
    path.write_bytes(b"GGUF, say")
    with pytest.raises(Dots1Error, match="logits file"):
        LogitsWriter(path, tokens(), N_VOCAB, force=True).__enter__()
    with pytest.raises(Dots1Error, match="no such folder"):
        LogitsWriter(tmp_path / "none" / "a.kld", tokens(), N_VOCAB).__enter__()
    with pytest.raises(Dots1Error, match="is a folder; name a file"):
        LogitsWriter(tmp_path, tokens(), N_VOCAB, force=True).__enter__()


def test_links_are_followed_to_a_file_but_not_in_circles(tmp_path: Path) -> None:
    link, loop = tmp_path / "link.kld", tmp_path / "loop.kld"
    link.symlink_to("real.kld")
    loop.symlink_to("loop.kld")
    with LogitsWriter(link, tokens()[:1], N_VOCAB) as writer:
        writer.write(0, 0, FLAT)
    assert link.is_symlink()
    assert (tmp_path / "real.kld").read_bytes()[:8] == MAGIC
    with pytest.raises(Dots1Error, match=f"cannot write {loop}: .*symbolic links"):
        check_logits_target(loop, force=True)


def test_a_working_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.kld.partial").symlink_to("precious")
    (tmp_path / "precious").write_bytes(b"GGUF, say")
    with pytest.raises(Dots1Error, match="symbolic links"):
        LogitsWriter(tmp_path / "a.kld", tokens(), N_VOCAB).__enter__()
    assert (tmp_path / "precious").read_bytes() == b"GGUF, say"


def test_a_file_that_another_run_has_just_finished_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.kld"
    locked = fcntl.flock

    def late(fd: int, operation: int) -> None:  # the other run gives its file the name, and ends
        shutil.copy(BASE, path.with_name("a.kld.partial"))
        os.replace(path.with_name("a.kld.partial"), path)
        locked(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(Dots1Error, match="another run is writing"):
        LogitsWriter(path, tokens(), N_VOCAB).__enter__()
    assert path.read_bytes() == BASE.read_bytes()


def test_a_full_disk_is_found_before_the_first_byte(tmp_path: Path) -> None:
    shape = 1 << 20, 512
    huge = np.lib.stride_tricks.as_strided(tokens(), shape, (0, 0))
    with pytest.raises(Dots1Error, match=r"GB free, but a.kld needs 81324\.1 GB"):
        LogitsWriter(tmp_path / "a.kld", huge, 152_064).__enter__()
    assert not os.listdir(tmp_path)


def test_a_disk_that_fills_up_is_said_to_be_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = LogitsWriter(tmp_path / "a.kld", tokens(), N_VOCAB)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Dots1Error, match=r"the disk is full; .*a\.kld is not written"):
        writer.__enter__()
    assert not os.listdir(tmp_path)


def test_two_runs_do_not_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "a.kld"
    with pytest.raises(Dots1Error, match="another run is writing"):  # noqa: SIM117
        with LogitsWriter(path, tokens(), N_VOCAB):
            LogitsWriter(path, tokens(), N_VOCAB).__enter__()
    path.with_name("a.kld.partial").write_bytes(b"left by a killed run")
    with LogitsWriter(path, tokens()[:1], N_VOCAB) as writer:
        writer.write(0, 0, FLAT)
    with LogitsFile.open(path) as file:
        assert decode(file.rows(0, 0, 1), N_VOCAB) == pytest.approx(-np.log(N_VOCAB))
