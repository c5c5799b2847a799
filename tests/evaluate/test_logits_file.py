import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dots1_local.errors import Dots1Error
from dots1_local.evaluate.logits_file import LogitsFile, decode, encode
from tests.goldens.make_kld_goldens import BASE, N_CTX, N_VOCAB, exact_logits, text

SCORED = N_CTX // 2 - 1


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
    with pytest.raises(Dots1Error, match="no numbers"):
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
        Damage(lambda raw: b"", "is no logits file; make one with dots1 perplexity --save-logits"),
        Damage(lambda raw: b"GGUF" + raw[4:], "is no logits file"),
        Damage(lambda raw: raw[:19], "is no logits file"),
        Damage(lambda raw: raw[:-1], "has 68499 bytes where 4 chunks take 68500; it is incomplete"),
        Damage(lambda raw: raw + b"\0", "has 68501 bytes"),
        Damage(header(N_CTX, N_VOCAB, 0), "claims 0 chunks"),
        Damage(header(2, N_VOCAB, 4), "claims 4 chunks of 2 tokens"),
        Damage(header(N_CTX, -1, 4), "a vocabulary of -1"),
        Damage(header(-N_CTX, N_VOCAB, -4), "claims -4 chunks of -64 tokens"),
        Damage(header(2**31 - 1, 2**31 - 1, 2**31 - 1), "which no logits file has"),
        Damage(header(N_CTX, N_VOCAB, 5), "where 5 chunks take"),
        Damage(patched(20, struct.pack("<i", N_VOCAB)), "tokens 10 to 267 in a vocabulary of 267"),
        Damage(patched(24, struct.pack("<i", -1)), "damaged: it has tokens -1"),
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
def test_rows_that_are_no_probabilities_are_refused(
    tmp_path: Path, head: tuple[float, float]
) -> None:
    path = tmp_path / "bad.kld"
    place = 20 + 4 * 4 * N_CTX + (SCORED + 2) * 2 * (N_VOCAB + 5)
    path.write_bytes(patched(place, struct.pack("<2f", *head))(BASE.read_bytes()))
    with LogitsFile.open(path) as file:
        file.rows(0, 0, SCORED)
        with pytest.raises(Dots1Error, match="row 2 of chunk 1 holds no log-probabilities"):
            file.rows(1, 0, SCORED)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(Dots1Error, match=f"cannot read {path}|{path} is no logits file"):
            LogitsFile.open(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Dots1Error, match="is no logits file"):
        LogitsFile.open(tmp_path / "pipe")


def test_a_file_that_gets_shorter_is_noticed(tmp_path: Path) -> None:
    path = Path(shutil.copy(BASE, tmp_path))
    with LogitsFile.open(path) as file:
        os.truncate(path, 60_000)
        with pytest.raises(Dots1Error, match="got shorter"):
            file.rows(3, 0, SCORED)
