"""Importance files: the numbers that llama-quantize reads from them, and files that are refused."""

import json
import platform
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dots1_local.architecture import TensorSpec, inventory
from dots1_local.errors import Dots1Error
from dots1_local.ggml import TYPES
from dots1_local.quant.encode import encode
from dots1_local.quant.imatrix_file import load_importance, write_imatrix
from dots1_local.quant.importance import Importance, pad_columns
from dots1_local.quant.stock import stock_types
from tests.goldens import make_goldens
from tests.goldens.make_goldens import CONFIG, MIXES, short_hash
from tests.quant import stock_llama

GOLDENS: dict[str, Any] = json.loads(make_goldens.GOLDENS.read_text())
SPECS = {spec.name: spec for spec in inventory(CONFIG)}
ROUTED = "blk.1.ffn_up_exps.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imatrix")
    make_goldens.write_model(folder / "model.gguf")
    make_goldens.write_imatrix(folder / "in.gguf")
    make_goldens.write_dat(folder / "in.dat")
    return folder


def test_we_write_what_llama_imatrix_writes(tmp_path: Path) -> None:
    ours = make_goldens.write_imatrix(tmp_path / "x.gguf", rounded=True).read_bytes()
    assert short_hash(ours) == GOLDENS["llama-imatrix"]["gguf"]
    assert list(tmp_path.iterdir()) == [tmp_path / "x.gguf"]


def test_the_dat_fixture_is_what_llama_imatrix_writes(folder: Path) -> None:
    assert short_hash((folder / "in.dat").read_bytes()) == GOLDENS["llama-imatrix"]["dat"]


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason="other compilers fuse multiplications and additions",
)
@pytest.mark.parametrize("form", ["gguf", "dat"])
@pytest.mark.parametrize("mix", MIXES)
def test_tensors_are_those_of_llama_quantize(folder: Path, form: str, mix: str) -> None:
    """File to bytes: experts without data, fractional counts, tensors without an entry."""
    importance = load_importance(folder / f"in.{form}")
    types = stock_types(
        tuple(SPECS.values()), mix, n_expert=CONFIG.n_routed_experts, has_importance=True
    )
    expected = GOLDENS["llama-quantize"][form][mix]
    assert expected.keys() == SPECS.keys()
    matrices = [spec for spec in SPECS.values() if stock_llama.source_type(spec) == "BF16"]
    for spec in matrices:
        data = encoded(folder / "model.gguf", spec, types[spec.name], importance)
        assert short_hash(data) == expected[spec.name], spec.name


def encoded(model: Path, spec: TensorSpec, type_name: str, importance: Importance) -> bytes:
    rows = stock_llama.read_rows(model, spec.name)
    weights = importance.for_tensor(spec)
    return b"".join(
        encode(expert, TYPES[type_name], None if weights is None else weights[index]).tobytes()
        for index, expert in enumerate(rows.reshape(-1, *rows.shape[-2:]))
    )


def test_facts_about_a_file(folder: Path) -> None:
    importance = load_importance(folder / "in.gguf")
    assert importance.datasets == ("calibration.txt",)
    assert importance.chunk_count == 9
    assert importance.chunk_size == 512
    assert importance.partial[ROUTED] == (1, 3)
    assert importance.partial["blk.2.ffn_down_exps.weight"] == (0, 1, 2, 3)
    assert "blk.0.attn_q.weight" not in importance.partial
    assert "blk.2.attn_output.weight" not in importance
    assert importance.for_tensor(SPECS["blk.2.attn_output.weight"]) is None
    assert short_hash((folder / "in.gguf").read_bytes()) == importance.sha256[:16]
    importance.check(tuple(SPECS.values()))


def test_both_forms_agree(folder: Path) -> None:
    gguf, dat = load_importance(folder / "in.gguf"), load_importance(folder / "in.dat")
    assert dat.datasets == gguf.datasets
    assert dat.chunk_count == gguf.chunk_count
    assert dat.partial == {}
    for name in dat.tensors:
        one, other = gguf.for_tensor(SPECS[name]), dat.for_tensor(SPECS[name])
        assert one is not None
        assert other is not None
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_values_by_hand(tmp_path: Path) -> None:
    sums = np.array([[6, 3], [0, 0], [9, 1]], np.float32)
    counts = np.array([3, 0, 2], np.float32)
    path = tmp_path / "x.gguf"
    write_imatrix(path, {"a": (sums, counts)}, datasets=["t"], chunk_count=1, chunk_size=5)
    expected = np.array([[2, 1], [1, 1], [4.5, 0.5]], np.float32)
    np.testing.assert_array_equal(load_importance(path).get("a"), expected)
    assert load_importance(path).get("b") is None


@pytest.mark.parametrize(("calls", "expected"), [(4, 1.5), (0, 6.0)])
def test_dat_values_by_hand(tmp_path: Path, calls: int, expected: float) -> None:
    path = tmp_path / "x.dat"
    path.write_bytes(struct.pack("<ii1siif", 1, 1, b"a", calls, 1, 6.0))
    importance = load_importance(path)
    np.testing.assert_array_equal(importance.get("a"), [[expected]])
    assert importance.datasets == ()
    assert importance.chunk_count == 0


def test_padding(folder: Path) -> None:
    importance = load_importance(folder / "in.gguf")
    for spec in inventory(CONFIG, expert_width=256):
        plain, padded = importance.for_tensor(SPECS[spec.name]), importance.for_tensor(spec)
        if plain is None or padded is None:
            assert plain is padded
            continue
        assert padded.shape == (spec.rows // spec.shape[-2], spec.columns)
        np.testing.assert_array_equal(padded[:, : plain.shape[1]], plain)
        assert not padded[:, plain.shape[1] :].any()
        assert all(row.flags.c_contiguous for row in padded)
    assert pad_columns(np.ones((2, 1408), np.float32), 1536).sum() == 2816


def test_importance_of_a_padded_model_fits_the_padded_model(tmp_path: Path) -> None:
    spec = next(
        s for s in inventory(CONFIG, expert_width=256) if s.name.endswith("down_exps.weight")
    )
    path = tmp_path / "x.gguf"
    entry = np.full((4, 256), 6, np.float32), np.full(4, 2, np.float32)
    write_imatrix(path, {spec.name: entry}, datasets=[], chunk_count=0, chunk_size=1)
    values = load_importance(path).for_tensor(spec)
    np.testing.assert_array_equal(values, np.full((4, 256), 3))


def test_another_models_file_is_refused(folder: Path) -> None:
    importance = load_importance(folder / "in.gguf")
    wide = tuple(inventory(replace(CONFIG, hidden_size=512)))
    message = r"in\.gguf: blk\.0\.attn_q\.weight has 256 values .* 1 x 512"
    with pytest.raises(Dots1Error, match=message):
        importance.check(wide)
    with pytest.raises(Dots1Error, match=r"in\.gguf covers no tensor"):
        importance.check(tuple(spec for spec in wide if spec.role == "norm"))


def test_wrong_size_of_the_embedding_is_ignored_as_stock_does(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    entry = np.ones((1, 7), np.float32), np.ones(1, np.float32)
    write_imatrix(path, {"token_embd.weight": entry}, datasets=[], chunk_count=0, chunk_size=1)
    assert load_importance(path).for_tensor(SPECS["token_embd.weight"]) is None


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("sum", -1),
        ("sum", np.nan),
        ("sum", np.inf),
        ("count", -1),
        ("count", np.nan),
        ("count", 1e30),
    ],
)
def test_impossible_numbers_are_refused(
    folder: Path, tmp_path: Path, what: str, value: float
) -> None:
    suffix = {"sum": "in_sum2", "count": "counts"}[what]
    tensor = stock_llama.tensors_of(folder / "in.gguf")[f"{ROUTED}.{suffix}"]
    content = bytearray((folder / "in.gguf").read_bytes())
    struct.pack_into("<f", content, tensor.offset + 4, value)
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(Dots1Error, match=rf"bad\.gguf: {ROUTED} has a {what}"):
        load_importance(path)


@pytest.mark.parametrize("value", [-1, np.nan, np.inf])
def test_impossible_numbers_are_not_written(tmp_path: Path, value: float) -> None:
    one, bad = np.ones((1, 1), np.float32), np.full((1, 1), value, np.float32)
    for sums, counts in ((one, bad[0]), (bad, one[0])):
        with pytest.raises(Dots1Error, match="a has a sum or count"):
            write_imatrix(
                tmp_path / "x", {"a": (sums, counts)}, datasets=[], chunk_count=0, chunk_size=1
            )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"imatrix.chunk_count", b"imatrix.chunk_cOunt", "bad.gguf .*imatrix.chunk_count"),
        (
            b"up_exps.weight.counts",
            b"up_exps.weight.cOunts",
            "up_exps.weight has .* counts",
        ),
        (
            b"up_exps.weight.in_sum2",
            b"up_exps.weight.in_sum3",
            "up_exps.weight has .* counts",
        ),
    ],
)
def test_damaged_names(folder: Path, tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes((folder / "in.gguf").read_bytes().replace(old, new, 1))
    with pytest.raises(Dots1Error, match=message):
        load_importance(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends before number of tensors"),
        (b"junk and no importance file", "ends before|corrupt"),
        (struct.pack("<i", 0), "number of tensors is 0"),
        (struct.pack("<ii", 1, 2**31 - 1), "length of a name is 2147483647"),
        (struct.pack("<ii", 1, -1), "length of a name is -1"),
        (struct.pack("<ii1sii", 1, 1, b"a", 1, 2**31 - 1), "values of a is 2147483647"),
        (struct.pack("<ii1sii", 1, 1, b"a", 1, 1 << 26), "ends before the values of a"),
        (struct.pack("<ii1sii", 1, 1, b"a", 1, 0), "number of values of a is 0"),
        (struct.pack("<ii1siif", 1, 1, b"a", -3, 1, 1), "ncall of a is -3"),
        (struct.pack("<ii1siif", 2**31 - 1, 1, b"a", 1, 1, 1), "ends before length of a name"),
        (struct.pack("<ii1siif", 1, 1, b"a", 1, 1, np.nan), "a has a sum that is"),
        (struct.pack("<ii1siifii", 1, 1, b"a", 1, 1, 1, 1, 99), "ends before the dataset name"),
        (struct.pack("<i", 2) + struct.pack("<i1siif", 1, b"a", 1, 1, 1) * 2, "a comes twice"),
    ],
)
def test_bad_dat_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.dat"
    path.write_bytes(content)
    with pytest.raises(Dots1Error, match=message) as error:
        load_importance(path)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(Dots1Error, match="none"):
        load_importance(tmp_path / "none.gguf")
    with pytest.raises(Dots1Error, match="directory"):
        load_importance(tmp_path)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_every_truncation_is_refused(folder: Path, tmp_path: Path, form: str) -> None:
    content = (folder / f"in.{form}").read_bytes()
    path = tmp_path / "cut"
    trailer = 8 + len("calibration.txt")
    for length in (*range(0, len(content) - trailer - 32, 997), len(content) - trailer - 33):
        path.write_bytes(content[:length])
        with pytest.raises(Dots1Error, match="cut"):
            load_importance(path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), form=st.sampled_from(["gguf", "dat"]))
def test_damaged_files_never_fail_otherwise(
    folder: Path, tmp_path: Path, data: st.DataObject, form: str
) -> None:
    content = bytearray((folder / f"in.{form}").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # Mostly in the header, where lengths are.
        position = data.draw(st.integers(0, min(len(content) - 8, 6000)))
        content[position : position + 8] = data.draw(st.binary(min_size=8, max_size=8))
    path = tmp_path / "damaged"
    path.write_bytes(content)
    # Anything but a Dots1Error fails here.
    with suppress(Dots1Error):
        importance = load_importance(path)
        for spec in SPECS.values():
            importance.for_tensor(spec)
