"""llama.cpp on our files computes what the torch reference computes on the checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dots1_local.engine.engine import Engine
from dots1_local.evaluate.perplexity import perplexity
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.reference.model import logits as reference_logits
from tests.conftest import Converted
from tests.helpers import all_logits

N_TOKENS = 192


def engine_logits(path: Path, tokens: list[int]) -> NDArray[np.float32]:
    """(n, n_vocab) with an F32 cache and no flash attention, so that nothing is rounded."""
    with Engine.open(
        path, n_ctx=256, kv_type="F32", flash_attention=False, all_logits=True
    ) as engine:
        return all_logits(engine, tokens)


@pytest.fixture(scope="module")
def tokens(tiny: Path, converted: Converted) -> list[int]:
    text = (tiny / "heldout.txt").read_text(encoding="utf-8")[:4000]
    with Engine.open(converted("F32"), n_ctx=64) as engine:
        return engine.tokenize(text, special=False)[:N_TOKENS]


def test_logits_are_the_references(tiny: Path, converted: Converted, tokens: list[int]) -> None:
    expected = reference_logits(Checkpoint.open(tiny), torch.tensor([tokens]))[0].numpy()
    found = engine_logits(converted("F32"), tokens)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_64_greedy_tokens_are_the_references(
    tiny: Path, converted: Converted, tokens: list[int]
) -> None:
    checkpoint, prompt = Checkpoint.open(tiny), tokens[:32]
    expected = list(prompt)
    for _ in range(64):
        last = reference_logits(checkpoint, torch.tensor([expected]))[0, -1]
        expected.append(int(last.argmax()))
    found = list(prompt)
    with Engine.open(converted("F32"), n_ctx=128, kv_type="F32", flash_attention=False) as engine:
        row = engine.decode(prompt, 0)
        for position in range(len(prompt), len(prompt) + 64):
            found.append(int(row.argmax()))
            row = engine.decode(found[-1:], position)
    assert found == expected


def test_padding_changes_no_bit_of_the_logits(converted: Converted, tokens: list[int]) -> None:
    plain = engine_logits(converted("F32"), tokens)
    padded = engine_logits(converted("F32", padding="on"), tokens)
    assert np.array_equal(plain, padded)


@pytest.mark.parametrize(
    ("mix", "with_importance", "limit"),
    [
        ("DQ2", True, 1.05),
        ("DQ2", False, 1.05),
        ("DQ3", True, 1.03),
        ("DQ4", False, 1.02),
        ("DQ5", False, 1.02),
        ("DQ6", False, 1.02),
    ],
)
def test_padded_dynamic_files_load_and_score(
    tiny: Path, converted: Converted, mix: str, with_importance: bool, limit: float
) -> None:
    text = (tiny / "heldout.txt").read_text(encoding="utf-8")[:40_000]
    options = {"imatrix": tiny / "imatrix.gguf"} if with_importance else {}
    whole = perplexity(converted("BF16"), text, n_ctx=256, n_chunks=8, threads=1)
    padded = perplexity(
        converted(mix, padding="on", **options), text, n_ctx=256, n_chunks=8, threads=1
    )
    assert padded.value < limit * whole.value
