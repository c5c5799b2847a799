import errno
import fcntl
import os
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dots1_local.errors import Dots1Error
from dots1_local.evaluate.logits_file import (
    LogitsFile,
    LogitsWriter,
    check_logits_target,
    decode,
    encode,
)
from tests.goldens.make_kld_goldens import BASE, N_CTX, N_VOCAB, exact_logits, text

SCORED = N_CTX // 2 - 1
FLAT = np.zeros((SCORED, N_VOCAB), np.float32)


def tokens() -> np.ndarray:
    return np.array(list(text().encode())[: 4 * N_CTX], np.int32).reshape(4, N_CTX)


def test_reads_what_llama_perplexity_wrote() -> None:
    with LogitsFile.open(BASE) as base:
        layout = base.layout
        assert (layout.n_ctx, layout.n_vocab, layout.chunks) == (N_CTX, N_VOCAB, 4)
        assert (base.tokens == tokens()).all()
        rows = base.rows(2, 5, 3)
    logits = exact_logits(tokens()[2, N_CTX // 2 + 5 :][:3], noisy=False).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    kept = log_p > log_p.max(axis=1, keepdims=True) - 16
    half_a_step = (log_p.max() - log_p.min()) / 65535 / 2 + 1e-6
    assert np.abs(decode(rows, N_VOCAB) - log_p)[kept].max() <= half_a_step


def test_takes_log_probabilities_for_logits() -> None:
    logits = exact_logits(tokens()[0], noisy=False)
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    found = decode(encode(log_p.astype(np.float32)), N_VOCAB)
    assert found == pytest.approx(decode(encode(logits), N_VOCAB), abs=3e-4)


def test_rows_without_contrast_or_with_too_much() -> None:
    equal = encode(np.full((1, 4), 7, np.float32))
    assert decode(equal, 4) == pytest.approx(np.full((1, 4), -np.log(4)))
    steep = decode(encode(np.array([[0, -10, -16, -40]], np.float32)), 4)
    # Under e^-16 nothing is told apart; the head is a few millionths below log 1.
    assert steep == pytest.approx(np.array([[0, -10, -16, -16]]), abs=2e-4)
    with pytest.raises(Dots1Error, match="NaN"):
        encode(np.array([[0, np.nan]], np.float32))


class Damage(NamedTuple):
    make: Callable[[bytes], bytes]
    message: str


def header(n_ctx: int, n_vocab: int, chunks: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:8] + struct.pack("<3i", n_ctx, n_vocab, chunks) + raw[20:]


def patched(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:offset] + value + raw[offset + len(value) :]


@pytest.mark.parametrize(
    "damage",
    [
        Damage(lambda raw: b"", "dots1 perplexity --save-logits"),
        Damage(lambda raw: b"GGUF" + raw[4:], "is not a logits file"),
        Damage(lambda raw: raw[:19], "is not a logits file"),
        Damage(lambda raw: raw[:-1], "has 68499 bytes, but 4 chunks take 68500"),
        Damage(lambda raw: raw + b"\0", "has 68501 bytes"),
        Damage(header(N_CTX, N_VOCAB, 0), "claims 0 chunks"),
        Damage(header(2, N_VOCAB, 4), "claims 4 chunks of 2 tokens"),
        Damage(header(N_CTX, -1, 4), "a vocabulary of -1"),
        Damage(header(-N_CTX, N_VOCAB, -4), "claims -4 chunks of -64 tokens"),
        Damage(header(2**31 - 1, 2**31 - 1, 2**31 - 1), "which no logits file has"),
        Damage(header(N_CTX, N_VOCAB, 5), "but 5 chunks take"),
        Damage(patched(20, struct.pack("<i", N_VOCAB)), "tokens 10 to 267"),
        Damage(patched(24, struct.pack("<i", -1)), "tokens -1"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Damage) -> None:
    path = tmp_path / "bad.kld"
    path.write_bytes(damage.make(BASE.read_bytes()))
    with pytest.raises(Dots1Error) as found:
        LogitsFile.open(path)
    assert damage.message.replace("tokens 10", f"tokens {tokens().min()}") in str(found.value)


@pytest.mark.parametrize(
    "head", [(np.nan, -5), (1e-4, np.nan), (np.inf, -np.inf), (-1e-4, 0), (1, -5), (1e-4, -1e30)]
)
def test_rows_that_are_not_log_probabilities_are_refused(
    tmp_path: Path, head: tuple[float, float]
) -> None:
    path = tmp_path / "bad.kld"
    place = 20 + 4 * 4 * N_CTX + (SCORED + 2) * 2 * (N_VOCAB + 5)
    path.write_bytes(patched(place, struct.pack("<2f", *head))(BASE.read_bytes()))
    with LogitsFile.open(path) as file:
        file.rows(0, 0, SCORED)
        with pytest.raises(Dots1Error, match=r"bad\.kld .*row 2 of chunk 1"):
            file.rows(1, 0, SCORED)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(Dots1Error, match=f"cannot read {path}|{path} is not a logits file"):
            LogitsFile.open(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Dots1Error, match="is not a logits file"):
        LogitsFile.open(tmp_path / "pipe")


def test_a_file_that_gets_shorter_is_noticed(tmp_path: Path) -> None:
    path = Path(shutil.copy(BASE, tmp_path))
    with LogitsFile.open(path) as file:
        os.truncate(path, 60_000)
        with pytest.raises(Dots1Error, match="became shorter"):
            file.rows(3, 0, SCORED)


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
    assert (tmp_path / "real.kld").read_bytes()[:8] == b"_logits_"
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
    with pytest.raises(Dots1Error, match=r"B free, but a.kld needs 81\.3 TB"):
        LogitsWriter(tmp_path / "a.kld", huge, 152_064).__enter__()
    assert not os.listdir(tmp_path)


def test_a_disk_that_becomes_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
