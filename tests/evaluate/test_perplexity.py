import json
from math import exp, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFValueType
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dots1_local.cli import app
from dots1_local.engine.engine import Engine
from dots1_local.errors import UsageError
from dots1_local.evaluate.perplexity import perplexity, read_text
from tests.conftest import Converted
from tests.helpers import CONFIG, TOKENS, all_logits, write_random_gguf
from tests.verify.patch import rewrite

TEXT = "".join(chr(33 + index * index % 90) for index in range(700))  # no merge applies


def test_a_model_that_knows_nothing_has_the_vocabulary_size(tmp_path: Path) -> None:
    zeros = np.zeros((CONFIG.vocab_size, CONFIG.hidden_size), np.float32)
    path = write_random_gguf(tmp_path / "zero.gguf", tensors={"output.weight": zeros})
    result = perplexity(path, TEXT, n_ctx=64, threads=1)
    assert result.value == pytest.approx(CONFIG.vocab_size)
    assert result.error == pytest.approx(0, abs=1e-5)
    # 700 bytes are 10 chunks of 64, and the 31 tokens after each one's 33rd are predicted.
    assert (result.chunks, result.tokens) == (10, 310)


def test_counts_only_as_many_chunks_as_asked(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "model.gguf")
    assert perplexity(path, TEXT, n_ctx=32, n_chunks=3, threads=1).chunks == 3


@pytest.mark.parametrize("n_ctx", [32, 100, 300])
def test_does_not_depend_on_how_chunks_are_batched(tmp_path: Path, n_ctx: int) -> None:
    path = write_random_gguf(tmp_path / "model.gguf")
    with Engine.open(path, n_ctx=n_ctx, all_logits=True, threads=1) as engine:
        losses = []
        for start in range(0, len(TEXT) - n_ctx + 1, n_ctx):
            tokens = list(TEXT[start : start + n_ctx].encode())
            engine.forget()
            rows = all_logits(engine, tokens)
            losses.append(_losses(rows, tokens))
    assert perplexity(path, TEXT, n_ctx=n_ctx, threads=1).value == pytest.approx(
        exp(np.concatenate(losses).mean()), rel=1e-2
    )


def test_a_small_ubatch_evaluates_fewer_chunks_side_by_side(tmp_path: Path) -> None:
    path, plan = write_random_gguf(tmp_path / "model.gguf"), tmp_path / "plan.json"
    found = CliRunner().invoke(app, ["plan", str(path), "--context", "32", "--json"]).stdout
    plan.write_text(json.dumps(json.loads(found) | {"ubatch": 4}))
    small = perplexity(path, TEXT, n_ctx=32, threads=1, placement=plan)
    whole = perplexity(path, TEXT, n_ctx=32, threads=1)
    assert (small.chunks, small.tokens) == (whole.chunks, whole.tokens) == (21, 21 * 15)
    assert small.value == pytest.approx(whole.value, rel=1e-2)


def test_a_wrong_bos_is_corrected_before_a_text_is_scored(tmp_path: Path) -> None:
    plain = write_random_gguf(tmp_path / "plain.gguf")
    bos, keys = TOKENS.index("<|system|>"), ("add_bos_token", "bos_token_id")
    add, number = (f"tokenizer.ggml.{key}" for key in keys)
    types = {number: GGUFValueType.UINT32}
    path = rewrite(plain, tmp_path / "bos.gguf", {add: True, number: bos}, types=types)
    as_it_should_be = perplexity(plain, TEXT, n_ctx=8, threads=1).value
    assert perplexity(path, TEXT, n_ctx=8, threads=1).value == as_it_should_be


def test_agrees_with_transformers_logits(tiny: Path, converted: Converted) -> None:
    text = read_text(tiny / "heldout.txt")[:3000]
    with Engine.open(converted("F32"), n_ctx=64) as engine:
        tokens = engine.tokenize(text, special=False)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    chunks = torch.tensor(tokens[: len(tokens) // 128 * 128]).reshape(-1, 128)
    with torch.no_grad():
        logits = model(chunks).logits.numpy()
    losses = np.concatenate(
        [_losses(rows, chunk) for rows, chunk in zip(logits, chunks.tolist(), strict=True)]
    )
    result = perplexity(converted("F32"), text, n_ctx=128, threads=1)
    assert result.chunks == len(chunks)
    assert result.value == pytest.approx(exp(losses.mean()), rel=2e-3)
    deviation = losses.std() / sqrt(len(losses) - 1)
    assert result.error == pytest.approx(exp(losses.mean()) * deviation, rel=2e-3)


def _losses(rows: np.ndarray, tokens: list[int]) -> np.ndarray:
    """-log p of the tokens that perplexity scores, by the definition."""
    scores = rows.astype(np.float64)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    first = len(tokens) // 2
    return np.array([-log_p[i, tokens[i + 1]] for i in range(first, len(tokens) - 1)])


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "model.gguf")
    with pytest.raises(UsageError, match="at least 128 tokens; this one has 127"):
        perplexity(path, TEXT[:127], n_ctx=64, threads=1)
    assert perplexity(path, TEXT[:128], n_ctx=64, threads=1).chunks == 2


def test_text_is_read_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("a\r\nb\n中\n\n".encode())
    assert read_text(path) == "a\r\nb\n中\n"  # llama-perplexity drops one newline
    path.write_bytes(b"a\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_text(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_text(tmp_path)


def test_reports_every_token(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "model.gguf")
    done: list[int] = []
    perplexity(
        path,
        TEXT,
        n_ctx=64,
        threads=1,
        progress=lambda count, total, unit, what: done.append(count),
    )
    assert done == sorted(done)
    assert done[-1] == 640
