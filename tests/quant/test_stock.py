"""Stock mixes against the installed llama.cpp: types at any geometry, and bytes."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from gguf import LlamaFileType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dots1_local.architecture import Dots1Config, inventory
from dots1_local.errors import UsageError
from dots1_local.files.gguf_header import GGUFHeader
from dots1_local.ggml import TYPES, quant_type
from dots1_local.quant.encode import encode
from dots1_local.quant.plan import override_type, parse_overrides
from dots1_local.quant.stock import (
    STOCK_MIXES,
    file_type,
    needs_importance,
    require_importance,
    stock_mix,
    stock_types,
)
from tests.quant import stock_llama
from tests.quant.stock_llama import FULL, StockError

MIXES = sorted({mix.name for mix in STOCK_MIXES.values()})
# Any entry makes stock assume that there is importance; a dry run checks nothing else.
SOME = {"x": np.ones(1, np.float32)}

# Stock wants importance for at least one of their tensors.
REFUSED = [
    "IQ1_M", "IQ1_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_XS", "IQ3_XXS", "Q2_K_S",
]  # fmt: skip

# Stock has no other type for rows that do not fit their blocks of 128.
WITHOUT_FALLBACK = ["Q1_0"]

# Rows of whole K-blocks and of less, in as few weights as can be: IQ1_M takes its time.
SMALL = replace(
    FULL,
    hidden_size=256, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1,
    head_dim=32, intermediate_size=32, moe_intermediate_size=32, n_routed_experts=2,
    n_shared_experts=1, num_experts_per_tok=1, vocab_size=40,
)  # fmt: skip
EVEN = replace(SMALL, head_dim=128, intermediate_size=128, moe_intermediate_size=128)


def our_types(config: Dots1Config, mix: str, measured: bool, *overrides: str) -> dict[str, str]:
    return stock_types(
        inventory(config),
        mix,
        n_expert=config.n_routed_experts,
        has_importance=measured,
        overrides=parse_overrides(overrides),
    )


@pytest.fixture(scope="module")
def full_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stock_llama.write_model(tmp_path_factory.mktemp("full") / "full.gguf", FULL)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stock_llama.write_model(tmp_path_factory.mktemp("small") / "small.gguf", SMALL, seed=0)


@pytest.fixture(scope="module")
def even_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stock_llama.write_model(tmp_path_factory.mktemp("even") / "even.gguf", EVEN, seed=0)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix not in WITHOUT_FALLBACK])
def test_types_of_the_full_model(full_model: Path, mix: str, measured: bool) -> None:
    importance = SOME if measured else None
    stock = stock_llama.stock_types(full_model, STOCK_MIXES[mix].file_type, importance)
    assert our_types(FULL, mix, measured) == stock
    assert len(stock) == 990


@pytest.mark.parametrize("mix", WITHOUT_FALLBACK)
def test_rows_that_stock_has_no_type_for(full_model: Path, mix: str) -> None:
    """Layer 0 of the full model has rows of 10,944, which are not a multiple of 128."""
    with pytest.raises(StockError, match="no tensor type fallback"):
        stock_llama.stock_types(full_model, STOCK_MIXES[mix].file_type)
    with pytest.raises(UsageError, match="10944"):
        our_types(FULL, mix, False)
    stock = stock_llama.stock_types(
        full_model, STOCK_MIXES[mix].file_type, None, parse_overrides([r"blk\.0\.ffn_down=q4_0"])
    )
    assert our_types(FULL, mix, False, r"blk\.0\.ffn_down=q4_0") == stock


@st.composite
def configs(draw: st.DrawFn) -> Dots1Config:
    heads = draw(st.integers(1, 3))
    return replace(
        SMALL,
        hidden_size=draw(st.sampled_from([8, 96, 256, 288, 512])),
        num_hidden_layers=draw(st.sampled_from([1, 2, 7, 8, 17, 33])),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=draw(st.sampled_from([20, 96, 512])),
        moe_intermediate_size=draw(st.sampled_from([16, 32, 128, 256])),
        n_routed_experts=draw(st.sampled_from([1, 2, 4, 8, 16])),
        num_experts_per_tok=1,
        n_shared_experts=draw(st.integers(1, 2)),
        first_k_dense_replace=draw(st.integers(0, 1)),
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    config=configs(),
    measured=st.booleans(),
    mixes=st.lists(st.sampled_from(MIXES), min_size=8, max_size=8, unique=True),
)
def test_types_of_any_model(
    tmp_path: Path, config: Dots1Config, measured: bool, mixes: list[str]
) -> None:
    model = stock_llama.write_model(tmp_path / "any.gguf", config)
    for mix in mixes:
        importance = SOME if measured else None
        try:
            stock = stock_llama.stock_types(model, STOCK_MIXES[mix].file_type, importance)
        except StockError:
            assert mix in WITHOUT_FALLBACK
            with pytest.raises(UsageError, match="no other type"):
                our_types(config, mix, measured)
        else:
            assert our_types(config, mix, measured) == stock, mix


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q3_K_M", "IQ2_XXS", "Q4_K_S", "MXFP4_MOE", "IQ3_XS"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["ffn_down=q6_k"],
        ["attn_v=q8_0", r"blk\.1?[0-5]\.ffn=iq4_xs"],  # attn_v is no longer counted
        [r"blk\.[0-3]\.attn_v=f16", "attn=q5_k", "embd|output=q4_0"],  # the first one wins
        ["down_exps=q2_0", "down=tq2_0", "up=nvfp4", "gate=tq1_0"],
        ["blk.1.=f32", ".=IQ3_S"],
    ],
)
def test_overrides(full_model: Path, mix: str, overrides: list[str]) -> None:
    stock = stock_llama.stock_types(
        full_model, STOCK_MIXES[mix].file_type, SOME, parse_overrides(overrides)
    )
    assert our_types(FULL, mix, True, *overrides) == stock


def test_overrides_apply_to_files_that_are_not_quantised() -> None:
    types = our_types(FULL, "BF16", False, "ffn_.*_exps=q8_0")
    assert types["blk.1.ffn_up_exps.weight"] == "Q8_0"
    assert types["blk.1.ffn_up_shexp.weight"] == "BF16"


def test_override_ignores_case() -> None:
    (override,) = parse_overrides([r"FFN_\Down=Q8_0"])
    assert override_type("blk.0.ffn_down.weight", [override]) == "Q8_0"
    assert override_type("blk.0.ffn_7own.weight", [override]) is None


@pytest.mark.parametrize("text", ["attn_q", "=q8_0", "attn_q=", "attn_(=q8_0", "attn_q=q9_0"])
def test_bad_override(text: str) -> None:
    with pytest.raises(UsageError):
        parse_overrides([text])


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix not in WITHOUT_FALLBACK])
def test_bytes_with_importance(small_model: Path, tmp_path: Path, mix: str) -> None:
    compare_files(small_model, tmp_path / "out.gguf", mix, measured=True)


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix not in REFUSED + WITHOUT_FALLBACK])
def test_bytes_without_importance(small_model: Path, tmp_path: Path, mix: str) -> None:
    compare_files(small_model, tmp_path / "out.gguf", mix, measured=False)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize(
    ("mix", "overrides"),
    [("Q1_0", ()), ("Q2_0", ()), ("Q4_K_M", ["exps=nvfp4", "attn=q1_0"])],
)
def test_bytes_of_rows_of_128(
    even_model: Path, tmp_path: Path, mix: str, overrides: list[str], measured: bool
) -> None:
    compare_files(even_model, tmp_path / "out.gguf", mix, measured, EVEN, overrides)


@pytest.mark.parametrize("mix", REFUSED)
def test_refused_without_importance(small_model: Path, tmp_path: Path, mix: str) -> None:
    """Both refuse, because of the tensor that stock names."""
    with pytest.raises(StockError) as stock:
        stock_llama.stock_quantise(small_model, tmp_path / "x", STOCK_MIXES[mix].file_type)
    types = our_types(SMALL, mix, False)
    offending, target = re.findall(r"(?:offending tensor|target type): (\S+)", str(stock.value))
    assert types[offending] == target.upper()
    assert needs_importance(offending, types[offending], mix)
    with pytest.raises(UsageError):
        require_importance(types, (), mix)


def compare_files(
    source: Path,
    target: Path,
    mix: str,
    measured: bool,
    config: Dots1Config = SMALL,
    overrides: Sequence[str] = (),
) -> None:
    importance = stock_llama.random_importance(config) if measured else None
    number = STOCK_MIXES[mix].file_type
    stock_llama.stock_quantise(source, target, number, importance, parse_overrides(overrides))
    types = our_types(config, mix, measured, *overrides)
    require_importance(types, importance or (), mix)
    assert GGUFHeader.read(target).keys["general.file_type"] == STOCK_MIXES[mix].file_type
    written = stock_llama.tensors_of(target)
    assert {name: tensor.type for name, tensor in written.items()} == types
    for name, tensor in written.items():
        stock = hash_of(stock_llama.read_bytes(target, tensor))
        assert our_hash(source, name, types[name], config if measured else None) == stock, name


@cache
def our_hash(model: Path, name: str, type_name: str, measured: Dots1Config | None) -> str:
    """A hash of an encoded tensor; cached, because a tensor has the same type in many mixes."""
    source = stock_llama.tensors_of(model)[name]
    if source.type == "F32":
        return hash_of(stock_llama.read_bytes(model, source))
    rows = stock_llama.read_rows(model, name)
    weights = stock_llama.random_importance(measured).get(name) if measured else None
    encoded = [
        encode(expert, TYPES[type_name], None if weights is None else weights[index])
        for index, expert in enumerate(rows.reshape(-1, *rows.shape[-2:]))
    ]
    return hash_of(np.concatenate(encoded))


def hash_of(data: NDArray[np.uint8]) -> str:
    return hashlib.sha256(data.tobytes()).hexdigest()


def test_missing_importance_is_refused_by_name_and_type() -> None:
    types = our_types(FULL, "IQ2_XXS", True)
    covered = {name for name in types if name != "blk.7.ffn_up_exps.weight"}
    with pytest.raises(UsageError, match=r"blk\.7\.ffn_up_exps\.weight would be IQ2_XXS"):
        require_importance(types, covered, "IQ2_XXS")
    require_importance(types, types.keys(), "IQ2_XXS")


def test_encoders_that_insist_on_importance_are_refused_for_the_embedding_too() -> None:
    # Stock lets this through and then aborts in the encoder.
    types = our_types(FULL, "Q4_K_M", False, "token_embd=iq2_xs")
    with pytest.raises(UsageError, match=r"token_embd\.weight would be IQ2_XS"):
        require_importance(types, (), "Q4_K_M")


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix != "Q2_0"])  # newer than gguf-py
def test_file_types_are_ggufs(mix: str) -> None:
    name = "ALL_F32" if mix == "F32" else f"MOSTLY_{mix}"
    assert STOCK_MIXES[mix].file_type == LlamaFileType[name]


def test_a_file_may_be_mostly_of_any_type() -> None:
    for name in TYPES:
        number = file_type(name)
        if number in {each.value for each in LlamaFileType}:
            assert LlamaFileType(number).name.startswith(("ALL_", f"MOSTLY_{name}"))
        else:
            assert (name, number) == ("Q2_0", 41)


def test_llama_quantize_has_no_mix_of_nvfp4(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(StockError, match="invalid output file type 39"):
        stock_llama.stock_quantise(small_model, tmp_path / "x", file_type("NVFP4"))
    with pytest.raises(UsageError, match="no mix"):
        stock_mix("NVFP4")


def test_mix_names() -> None:
    assert stock_mix("q4_k").name == "Q4_K_M"
    assert stock_mix("iq2_xxs").file_type == 19
    assert quant_type(stock_mix("IQ2_S").default).name == "IQ2_XS"
    with pytest.raises(UsageError, match="no mix 'Q4_K_XL'; there are"):
        stock_mix("Q4_K_XL")
