from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dots1_local.engine.engine import Engine, Entry
from dots1_local.errors import Dots1Error, GGUFError, UsageError
from dots1_local.files.gguf import GGUFFile
from tests.helpers import EOS, EOT, TOKENS, all_logits, tokens_of, write_random_gguf
from tests.verify.patch import rewrite

TEXT = list(b"the quick brown fox jumps over the lazy dog" * 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("engine") / "model.gguf")


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine.open(
        model,
        n_ctx=256,
        n_ubatch=64,
        kv_type="F32",
        flash_attention=False,
        all_logits=True,
        threads=1,
    ) as engine:
        yield engine


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"architecture": "llama"}, "architecture 'llama'"),
        ({"tensors": {"output_norm.weight": np.ones(64, np.float16)}}, "output_norm.weight is F16"),
        (
            {"tensors": {"blk.1.exp_probs_b.bias": np.ones(8, np.float16)}},
            "exp_probs_b.bias is F16",
        ),
        ({"without": ["blk.1.exp_probs_b.bias"]}, "exp_probs_b.bias"),
        ({"without": ["blk.1.attn_q.weight"]}, "blk.1.attn_q.weight"),
        ({"without": ["feed_forward_length"]}, "dots1.feed_forward_length"),
    ],
)
def test_refuses_what_would_abort_or_run_wrong(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    path = write_random_gguf(tmp_path / "bad.gguf", **options)
    with pytest.raises(GGUFError, match=sentence) as error:
        Engine.open(path, threads=1)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_repeated_tokens_that_would_abort(model: Path, tmp_path: Path) -> None:
    tokens = {"tokenizer.ggml.tokens": [*TOKENS[:-1], TOKENS[0]]}
    path = rewrite(model, tmp_path / "bad.gguf", tokens)
    with pytest.raises(GGUFError, match=r"token.* 2 times"):
        Engine.open(path, threads=1)


def test_names_why_a_context_cannot_be_made(model: Path) -> None:
    with pytest.raises(Dots1Error, match="flash_attn"):
        Engine.open(model, kv_type="Q8_0", flash_attention=False, threads=1)


def test_warns_of_a_context_beyond_training(model: Path) -> None:
    for chosen in (0, None, 1024):
        with Engine.open(model, n_ctx=chosen, threads=1) as engine:
            assert (engine.n_ctx, engine.warnings) == (1024, ())
    with Engine.open(model, n_ctx=1280, threads=1) as engine:
        engine.decode(TEXT * 7, 0)
        assert engine.n_ctx == 1280
        [warning] = engine.warnings
        assert "trained for contexts of 1,024 tokens" in warning


@pytest.mark.parametrize(
    ("sequences", "flash_attention", "warnings"),
    [(2, False, 1), (1, False, 0), (2, None, 0), (2, True, 0)],
)
def test_warns_of_a_shared_cache_without_flash_attention(
    model: Path, sequences: int, flash_attention: bool | None, warnings: int
) -> None:
    """Without flash attention masked tokens are computed too."""
    with Engine.open(
        model,
        n_ctx=256,
        n_sequences=sequences,
        shared_cache=True,
        flash_attention=flash_attention,
        threads=1,
    ) as engine:
        assert len(engine.warnings) == warnings
        assert all("without flash attention" in each for each in engine.warnings)


@pytest.mark.parametrize("n_ctx", [-1, 1 << 31, 1 << 40])
def test_refuses_contexts_that_llama_cpp_cannot_make(model: Path, n_ctx: int) -> None:
    with pytest.raises(UsageError, match=f"{n_ctx:,} tokens"):
        Engine.open(model, n_ctx=n_ctx, threads=1)


def test_refuses_more_sequences_than_llama_cpp_has(model: Path) -> None:
    for n_sequences in (0, 257):
        with pytest.raises(UsageError, match=f"256 sequences.* {n_sequences}"):
            Engine.open(model, n_ctx=8, n_sequences=n_sequences, threads=1)
    with pytest.raises(UsageError, match="256 × 8,388,608 tokens"):
        Engine.open(model, n_ctx=1 << 23, n_sequences=256, threads=1)
    Engine.open(model, n_ctx=8, n_sequences=255, shared_cache=True, threads=1).close()


def test_refuses_parameters_that_make_no_sense(model: Path) -> None:
    with pytest.raises(UsageError, match="n_ubatch"):
        Engine.open(model, n_ubatch=0)
    with pytest.raises(UsageError, match="threads"):
        Engine.open(model, threads=0)
    with pytest.raises(TypeError, match="n_context"):
        Engine.open(model, n_context=64)


def test_reports_what_it_allocated(model: Path) -> None:
    with Engine.open(model, n_ctx=512, kv_type="F32", threads=1) as engine:
        [device] = engine.report
        taken = engine.report["CPU"]
    assert device == "CPU"
    assert taken.kv == pytest.approx(512 * 3 * 2 * 64 * 4, abs=10_000)
    weights = sum(tensor.nbytes for tensor in GGUFFile.open(model).tensors)
    assert taken.weights == pytest.approx(weights, abs=10_000)
    assert taken.compute > 0


def test_prints_nothing(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Engine.open(model, n_ctx=64, threads=1) as engine:
        engine.decode(TEXT[:8], 0)
    assert capfd.readouterr() == ("", "")


def test_reports_progress_and_can_be_interrupted_while_loading(model: Path) -> None:
    shares: list[float] = []

    def interrupt(done: int, total: int, unit: str, what: str) -> None:
        shares.append(done / total)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine.open(model, n_ctx=64, progress=interrupt, threads=1)
    assert shares == [pytest.approx(0, abs=1)]


def test_loads_a_split_file(tmp_path: Path, engine: Engine) -> None:
    write_random_gguf(tmp_path / "model.gguf", shard_tensors=12)
    last = sorted(tmp_path.iterdir())[-1]
    engine.forget()
    with Engine.open(last, n_ctx=256, kv_type="F32", flash_attention=False, threads=1) as split:
        np.testing.assert_allclose(split.decode(TEXT, 0), engine.decode(TEXT, 0), atol=1e-5)


def test_only_special_text_becomes_special_tokens(engine: Engine) -> None:
    text = "hello<|endofresponse|>"
    hello = TOKENS.index("hello")
    assert engine.tokenize(text, special=True) == [hello, EOS]
    assert engine.tokenize(text, special=False) == [hello, *tokens_of("<|endofresponse|>")]
    assert engine.tokenize("中", special=False) == tokens_of("中")


def test_pieces_are_bytes_and_control_tokens_have_no_bytes(engine: Engine) -> None:
    assert b"".join(map(engine.piece, tokens_of("中文 \n\0"))) == "中文 \n\0".encode()
    assert engine.piece(TOKENS.index("hello")) == b"hello"
    assert engine.piece(EOS) == b""


def test_both_end_tokens_end_a_response(engine: Engine) -> None:
    assert [token for token in range(engine.n_vocab) if engine.is_end(token)] == [EOT, EOS]


def test_without_the_key_no_ordinary_token_ends_a_response(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "model.gguf", without=["eos_token_id"])
    with Engine.open(path, n_ctx=64, threads=1) as engine:
        assert not engine.is_end(11)
        assert engine.is_end(EOT)


def test_ubatches_and_forgetting_do_not_change_logits(engine: Engine) -> None:
    engine.forget()
    rows = all_logits(engine, TEXT)
    assert rows.shape == (len(TEXT), engine.n_vocab)
    engine.forget(50)
    continued = engine.decode(TEXT[50:100], 50)
    np.testing.assert_allclose(continued, rows[99], atol=1e-4)


def test_sequences_do_not_see_each_other(model: Path) -> None:
    with Engine.open(
        model,
        n_ctx=64,
        n_sequences=2,
        kv_type="F32",
        flash_attention=False,
        all_logits=True,
        threads=1,
    ) as engine:
        mixed = [Entry(t, i, s, True) for s in (0, 1) for i, t in enumerate(TEXT[s * 8 :][:8])]
        rows = engine.submit(mixed).copy()
        engine.forget()
        for sequence in (0, 1):
            alone = engine.decode(TEXT[sequence * 8 :][:8], 0, sequence)
            np.testing.assert_allclose(rows[sequence * 8 + 7], alone, atol=1e-4)


def test_refuses_requests_that_would_abort(model: Path) -> None:
    with Engine.open(model, n_ctx=64, threads=1) as engine:
        with pytest.raises(UsageError, match="all_logits"):
            engine.submit([Entry(t, i, 0, True) for i, t in enumerate(TEXT[:2])])
        with pytest.raises(UsageError, match="1 to 64 tokens"):
            engine.submit([Entry(0, i) for i in range(65)])
        with pytest.raises(UsageError, match="1 to 64 tokens"):
            engine.submit([])


def test_a_full_context_is_an_error(model: Path) -> None:
    with Engine.open(model, n_ctx=256, threads=1) as engine:
        engine.decode([0] * 256, 0)
        with pytest.raises(Dots1Error, match="256 tokens is full"):
            engine.decode([0], 256)


def test_a_ubatch_may_be_smaller_than_the_number_of_sequences(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "model.gguf")
    params: dict[str, Any] = {"n_ctx": 64, "n_ubatch": 4, "n_sequences": 8, "all_logits": True}
    with Engine.open(path, **params) as engine:  # llama.cpp would abort
        assert engine.decode([1, 2, 3], 0).shape == (engine.n_vocab,)
