"""transformers computes on an export what llama.cpp computes on the file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Dots1ForCausalLM, GenerationConfig

from dots1_local.convert import convert_checkpoint
from dots1_local.engine.engine import Engine
from dots1_local.export import export_checkpoint
from tests.conftest import Converted
from tests.helpers import all_logits

N_TOKENS = 192


@pytest.fixture(scope="module")
def tokens(tiny: Path, converted: Converted) -> list[int]:
    text = (tiny / "heldout.txt").read_text(encoding="utf-8")[:4000]
    with Engine.open(converted("F32"), n_ctx=64, threads=1) as engine:
        return engine.tokenize(text, special=False)[:N_TOKENS]


def engine_logits(path: Path, tokens: list[int]) -> Tensor:
    """(n, n_vocab), with an F32 cache and no flash attention."""
    with Engine.open(
        path, n_ctx=256, threads=1, kv_type="F32", flash_attention=False, all_logits=True
    ) as engine:
        return torch.from_numpy(all_logits(engine, tokens))


def transformers_logits(folder: Path, tokens: list[int], **options: Any) -> Tensor:
    model = Dots1ForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean KL divergence of `q` from `p` in nats a token."""
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (p, q))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("recipe", "options"), [("F32", {}), ("F32", {"padding": "on"}), ("DQ4", {})]
)
def test_logits_are_the_engines_where_nothing_is_rounded(
    converted: Converted, tokens: list[int], tmp_path: Path, recipe: str, options: dict[str, Any]
) -> None:
    """F32 weights keep llama.cpp from rounding activations: what is left is the order of sums."""
    export_checkpoint(converted(recipe, **options), tmp_path / "out")
    convert_checkpoint(tmp_path / "out", tmp_path / "exact.gguf", "F32")
    found = transformers_logits(tmp_path / "out", tokens, dtype=torch.float32)
    np.testing.assert_allclose(found, engine_logits(tmp_path / "exact.gguf", tokens), atol=1e-3)


@pytest.mark.parametrize("padding", ["off", "on"])
def test_the_quantised_model_is_the_one_that_is_evaluated(
    tiny: Path, converted: Converted, tokens: list[int], tmp_path: Path, padding: str
) -> None:
    """llama.cpp rounds activations to 8 bits for quantised weights, which transformers does not;
    that is small beside what quantisation to 2 bits does."""
    path = converted("Q2_K", padding=padding)
    export_checkpoint(path, tmp_path / "out")
    engine = engine_logits(path, tokens)
    found = transformers_logits(tmp_path / "out", tokens, dtype=torch.float32)
    original = transformers_logits(tiny, tokens, dtype=torch.float32)
    lost, apart = divergence(original, engine), divergence(engine, found)
    assert apart < lost / 10
    assert divergence(original, found) == pytest.approx(lost, rel=0.1)
    same = (engine.argmax(-1) == found.argmax(-1)).double().mean()
    assert same > 0.95


def test_loaded_as_published_it_is_bf16_with_an_exact_router_bias(
    tiny: Path, converted: Converted, tokens: list[int], tmp_path: Path
) -> None:
    export_checkpoint(converted("BF16"), tmp_path / "out")
    model = Dots1ForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    ends = GenerationConfig.from_pretrained(tiny).eos_token_id
    assert model.generation_config.eos_token_id == ends
    found = transformers_logits(tmp_path / "out", tokens)
    assert torch.equal(found, transformers_logits(tiny, tokens))
