import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from dots1_local.errors import Dots1Error, GGUFError, UsageError
from dots1_local.evaluate.kl_divergence import kl_divergence
from dots1_local.evaluate.perplexity import perplexity
from tests.goldens.make_kld_goldens import BASE, ESTIMATE, N_CTX, PRINTED, text, write_model
from tests.helpers import CONFIG, TOKENS, TYPES, write_random_gguf


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base.gguf", noisy=False)


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    return write_model(tmp_path / "noisy.gguf", noisy=True)


def test_saves_the_bytes_llama_perplexity_writes(base: Path, tmp_path: Path) -> None:
    saved = tmp_path / "base.kld"
    result = perplexity(base, text(), n_ctx=N_CTX, save_logits=saved, threads=1)
    assert saved.read_bytes() == BASE.read_bytes()
    assert f"Final estimate: {result}\n" == ESTIMATE.read_text()


@pytest.mark.parametrize(
    ("n_ctx", "chunks", "plain", "saved"),  # what llama-perplexity prints
    [
        (8, 10, "181.3621 +/- 72.34413", "181.3620 +/- 72.34412"),
        (10, 30, "170.6143 +/- 27.83039", "170.6144 +/- 27.83040"),
    ],
)
def test_rounds_as_llama_perplexity_does_when_it_saves(
    base: Path, tmp_path: Path, n_ctx: int, chunks: int, plain: str, saved: str
) -> None:
    for target, printed in ((None, plain), (tmp_path / "base.kld", saved)):
        result = perplexity(
            base, text(), n_ctx=n_ctx, n_chunks=chunks, save_logits=target, threads=1
        )
        assert str(result) == f"PPL = {printed}"


def test_file_and_model_give_what_llama_perplexity_prints(base: Path, noisy: Path) -> None:
    printed = PRINTED.read_text(encoding="utf-8")
    by_file = kl_divergence(noisy, logits=BASE, threads=1)
    assert f"{by_file}\n" == printed
    by_model = kl_divergence(noisy, reference=base, text=text(), n_ctx=N_CTX, threads=1)
    assert f"{by_model}\n" == printed
    assert (by_file.per_token == by_model.per_token).all()
    assert kl_divergence(noisy, logits=BASE, n_chunks=2, threads=2).tokens == 62


def test_does_not_depend_on_how_rows_are_cut(
    noisy: Path, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dots1_local.evaluate.scoring._BLOCK", 700)  # blocks of 2 rows
    assert f"{kl_divergence(noisy, logits=BASE, threads=3)}\n" == PRINTED.read_text("utf-8")
    perplexity(base, text(), n_ctx=N_CTX, save_logits=tmp_path / "a.kld", threads=3)
    assert (tmp_path / "a.kld").read_bytes() == BASE.read_bytes()


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "model.gguf")
    result = kl_divergence(path, reference=path, text="abcdefg" * 40, n_ctx=32, threads=1)
    assert result.kl_divergence.value == pytest.approx(0, abs=1e-5)
    assert result.same_top.value == 1
    assert result.perplexity.value == pytest.approx(result.base_perplexity.value, rel=1e-3)


def test_a_model_of_another_vocabulary_is_refused(noisy: Path, tmp_path: Path) -> None:
    other = write_random_gguf(tmp_path / "other.gguf")
    with pytest.raises(UsageError, match=r"vocabulary of 267, .*other.gguf has 268"):
        kl_divergence(other, logits=BASE, threads=1)
    with pytest.raises(UsageError, match=r"other.gguf has a vocabulary of 268, .* has 267"):
        kl_divergence(noisy, reference=other, text=text(), n_ctx=N_CTX, threads=1)


def test_a_model_that_reads_the_text_in_other_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_random_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr("tests.helpers.MERGES", ("h e",))
    other = write_random_gguf(tmp_path / "other.gguf")
    with pytest.raises(UsageError, match="divide the text into different tokens"):
        kl_divergence(path, reference=other, text="hell" * 200, n_ctx=64, threads=1)


def test_contradictions_are_refused(base: Path, noisy: Path) -> None:
    with pytest.raises(UsageError, match="needs one base"):
        kl_divergence(noisy, text=text())
    with pytest.raises(UsageError, match="needs one base"):
        kl_divergence(noisy, text=text(), logits=BASE, reference=base)
    with pytest.raises(UsageError, match=r"base\.kld has its own text"):
        kl_divergence(noisy, text=text(), logits=BASE)
    with pytest.raises(UsageError, match="needs a text"):
        kl_divergence(noisy, reference=base)
    with pytest.raises(UsageError, match="has chunks of 64 tokens, not 512"):
        kl_divergence(noisy, logits=BASE, n_ctx=512)


def test_chunks_beyond_the_trained_context_cause_a_warning(tmp_path: Path) -> None:
    model = write_random_gguf(tmp_path / "model.gguf")
    n_ctx, slots = 2 * CONFIG.max_position_embeddings, 4 + len(TOKENS)
    file = tmp_path / "long.kld"
    with file.open("wb") as out:
        out.write(b"_logits_" + struct.pack("<3i", n_ctx, len(TOKENS), 1))
        out.truncate(20 + 4 * n_ctx + (n_ctx // 2 - 1) * slots * 2)
    told: list[str] = []
    kl_divergence(model, logits=file, threads=1, notify=told.append)
    assert "was trained for contexts of 1,024 tokens" in "".join(told)


def test_rows_that_are_damaged_stop_the_run(noisy: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(BASE, tmp_path))
    with path.open("r+b") as file:
        file.seek(-2 * (len(TYPES) - 1 + 5), os.SEEK_END)
        file.write(struct.pack("<f", np.nan))
    with pytest.raises(Dots1Error, match="row 30 of chunk 3"):
        kl_divergence(noisy, logits=path, threads=1)


def test_an_interrupted_run_saves_nothing(base: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, unit: str, what: str) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "out" / "a.kld"
    target.parent.mkdir()
    with pytest.raises(KeyboardInterrupt):
        perplexity(base, text(), n_ctx=N_CTX, save_logits=target, threads=1, progress=interrupt)
    assert not os.listdir(target.parent)


def test_an_existing_file_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    path = Path(shutil.copy(BASE, tmp_path))
    with pytest.raises(Dots1Error, match="exists; give --force"):
        perplexity(tmp_path / "missing.gguf", text(), save_logits=path)
    with pytest.raises(GGUFError):
        perplexity(tmp_path / "missing.gguf", text(), save_logits=path, force=True)
    assert path.read_bytes() == BASE.read_bytes()


def test_progress_shows_the_figures_so_far(noisy: Path) -> None:
    told: list[tuple[int, int, str]] = []
    kl_divergence(
        noisy,
        logits=BASE,
        threads=1,
        progress=lambda done, total, unit, what: told.append((done, total, what)),
    )
    assert told[-1][:2] == (4 * N_CTX, 4 * N_CTX)
