from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType

from dots1_local.engine.engine import Engine
from dots1_local.verify import Finding, verify_gguf
from dots1_local.verify.fix import write_fixed
from tests.helpers import EOS, EOT, TEMPLATE, TOKENS, write_random_gguf
from tests.verify.defects import FIXABLE
from tests.verify.patch import fields, rewrite

PREFIX = "tokenizer.ggml."
U32, I32, U64 = GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.UINT64
CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|response|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("lint") / "model.gguf")


def only(path: Path) -> Finding:
    (finding,) = verify_gguf(path, quick=True).findings
    return finding


def check_fixed(path: Path, tmp_path: Path) -> None:
    """What --fix writes is clean, and llama.cpp loads it and computes."""
    (fixed,) = write_fixed(verify_gguf(path, quick=True), tmp_path / "fixed.gguf")
    assert verify_gguf(fixed).findings == ()
    with Engine.open(fixed, n_ctx=64, threads=1) as engine:
        assert engine.bos is None
        assert [t for t in range(engine.n_vocab) if engine.is_end(t)] == [EOT, EOS]
        assert engine.decode([EOS, 7, 8], 0).shape == (len(TOKENS),)


def test_a_good_file_has_no_findings(model: Path) -> None:
    report = verify_gguf(model)
    assert report.ok
    assert report.findings == ()
    assert len(report.tensors) == 46


@pytest.mark.parametrize(("change", "severity", "sentence"), FIXABLE)
def test_findings_that_fix_puts_right(
    model: Path, tmp_path: Path, change: dict[str, Any], severity: str, sentence: str
) -> None:
    path = rewrite(model, tmp_path / "elsewhere.gguf", **change)
    finding = only(path)
    assert finding.severity == severity
    assert sentence in finding.message
    check_fixed(path, tmp_path)


@pytest.mark.parametrize(
    ("change", "severity", "sentence"),
    [
        ({"remove": ["dots1.context_length"]}, "error", "refuses to load"),
        ({"remove": ["dots1.rope.freq_base"]}, "error", "silently takes 10000"),
        ({"values": {"dots1.rope.freq_base": 10000.0}}, "warning", "10000000.0"),
        ({"remove": ["dots1.expert_weights_scale"]}, "error", "unscaled"),
        ({"remove": ["dots1.expert_weights_norm"]}, "error", "unnormalised"),
        ({"values": {"dots1.expert_weights_norm": False}}, "warning", "published"),
        (
            {"values": {"dots1.attention.layer_norm_rms_epsilon": -1.0}},
            "error",
            "usable number",
        ),
        ({"values": {"dots1.expert_used_count": 9}}, "error", "9 of 8 experts"),
        ({"values": {"dots1.block_count": 600}}, "error", "600, beyond 512"),
        ({"remove": ["token_embd.weight"]}, "error", "lacks token_embd.weight"),
        ({"remove": [PREFIX + "model"]}, "error", "model is missing: llama.cpp refuses to load"),
        ({"remove": [PREFIX + "tokens"]}, "error", "no tokenizer: llama.cpp refuses to load"),
        ({"remove": [PREFIX + "merges"]}, "error", "merges is missing"),
        ({"values": {PREFIX + "model": "llama"}}, "error", "'llama'"),
        ({"values": {PREFIX + "tokens": [*TOKENS[:-1], "he"]}}, "error", "2 times"),
        ({"values": {PREFIX + "token_type": [1] * 9}}, "error", "9 token types for 268"),
        ({"remove": ["tokenizer.chat_template"]}, "warning", "base model"),
        ({"values": {"tokenizer.chat_template": "{% for"}}, "error", "does not parse"),
        ({"values": {"tokenizer.chat_template": "{{ 1 / 0 }}"}}, "error", "fails"),
        ({"values": {"tokenizer.chat_template": "hi <|response|>"}}, "error", "user's message"),
        ({"values": {"tokenizer.chat_template": CHATML}}, "error", "<|im_start|>, <|im_end|>"),
        (
            {"values": {"tokenizer.chat_template": TEMPLATE[: TEMPLATE.index("{% if add")]}},
            "warning",
            "does not end a prompt with <|response|>",
        ),
    ],
)
def test_findings_that_need_the_checkpoint(
    model: Path, tmp_path: Path, change: dict[str, Any], severity: str, sentence: str
) -> None:
    report = verify_gguf(rewrite(model, tmp_path / "elsewhere.gguf", **change), quick=True)
    assert report.findings[0].severity == severity
    assert sentence in report.findings[0].message
    assert report.changes == ()


def test_empty_tokens_do_not_count_as_repeated(model: Path, tmp_path: Path) -> None:
    tokens = {PREFIX + "tokens": ["", "", *TOKENS[2:]]}
    path = rewrite(model, tmp_path / "elsewhere.gguf", tokens)
    assert verify_gguf(path, quick=True).ok
    Engine.open(path, n_ctx=64, threads=1).close()


def test_llama_cpp_computes_without_an_epsilon(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "model.gguf", rms_norm_eps=0.0)
    assert verify_gguf(path, quick=True).findings == ()
    with Engine.open(path, n_ctx=64, threads=1) as engine:
        assert np.isfinite(engine.decode([EOS, 7, 8], 0)).all()


def test_a_lost_tokenizer_is_reported_once(model: Path, tmp_path: Path) -> None:
    path = rewrite(model, tmp_path / "elsewhere.gguf", remove=[PREFIX + "tokens"])
    assert only(path).check == "tokenizer"


def test_another_architecture_is_the_only_finding(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "llama.gguf", architecture="llama")
    assert "'llama'" in only(path).message


@pytest.mark.parametrize(
    "key",
    [
        "dots1.rope.freq_base",
        "dots1.context_length",
        "dots1.expert_used_count",
        "dots1.expert_weights_scale",
        "dots1.expert_gating_func",
        "tokenizer.chat_template",
        PREFIX + "tokens",
        PREFIX + "merges",
        PREFIX + "eos_token_id",
    ],
)
def test_a_checkpoint_supplies_missing_keys(
    tiny: Path, converted: Any, tmp_path: Path, key: str
) -> None:
    right = converted("DQ4")
    path = rewrite(right, tmp_path / "elsewhere.gguf", remove=[key])
    report = verify_gguf(path, tiny, quick=True)
    assert report.findings
    (fixed,) = write_fixed(report, tmp_path / "fixed.gguf")
    assert verify_gguf(fixed, tiny, quick=True).findings == ()
    assert fields(fixed)[key] == fields(right)[key]


def test_a_checkpoint_says_which_value_is_right(tiny: Path, converted: Any, tmp_path: Path) -> None:
    wrong = {
        "dots1.rope.freq_base": 10000.0,
        "dots1.attention.layer_norm_rms_epsilon": 1e-6,
        "dots1.expert_weights_scale": 1.0,
        "tokenizer.chat_template": TEMPLATE + "<|response|>",
    }
    path = rewrite(converted("DQ4"), tmp_path / "elsewhere.gguf", wrong)
    report = verify_gguf(path, tiny, quick=True)
    assert {change.key for change in report.changes} == set(wrong)
    (fixed,) = write_fixed(report, tmp_path / "fixed.gguf")
    assert fields(fixed) == fields(converted("DQ4"))


def test_a_checkpoint_of_another_model_corrects_nothing(model: Path, tiny: Path) -> None:
    report = verify_gguf(model, tiny, quick=True)
    assert "hidden_size 64 (256)" in report.findings[0].message
    assert report.changes == ()


def test_a_tokenizer_with_other_types_is_not_the_checkpoint_s(
    tiny: Path, converted: Any, tmp_path: Path
) -> None:
    types = {PREFIX + "token_type": [3] * 4096}  # nothing but control tokens: answers are empty
    path = rewrite(converted("DQ4"), tmp_path / "elsewhere.gguf", types)
    report = verify_gguf(path, tiny, quick=True)
    assert [finding.message.split(";")[0] for finding in report.findings] == [
        "the tokenizer is not the checkpoint's"
    ]
    assert [change.key for change in report.changes] == [PREFIX + "token_type"]
