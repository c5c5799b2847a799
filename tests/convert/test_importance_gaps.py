"""Importance files that count tokens but have sums of 0: no weight is lost without a word."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from typer.testing import CliRunner, Result

from dots1_local.cli import app
from dots1_local.errors import UsageError
from dots1_local.quant.imatrix_file import load_importance, write_imatrix
from dots1_local.quant.stock import stock_mix
from tests.conftest import Converted
from tests.quant.stock_llama import read_bytes, stock_quantise, tensors_of

Sums = np.ndarray
TENSOR, EXPERT = "blk.3.attn_q.weight", "blk.1.ffn_up_exps.weight"


def empty(sums: Sums) -> None:
    sums[:] = 0


def empty_expert(sums: Sums) -> None:
    sums[3] = 0


def empty_columns(sums: Sums) -> None:
    sums[:, 32:64] = 0


def imatrix(tiny: Path, path: Path, changes: Mapping[str, Callable[[Sums], None]]) -> Path:
    """The example's importance file with changed sums and the same counts."""
    found = load_importance(tiny / "imatrix.gguf")
    entries = {name: (found.sums(name).copy(), t.counts) for name, t in found.tensors.items()}
    for name, change in changes.items():
        change(entries[name][0])
    write_imatrix(path, entries, datasets=["text"], chunk_count=1, chunk_size=512)
    return path


def convert(tiny: Path, output: Path, mix: str, importance: Path, *options: object) -> Result:
    arguments = [tiny, "-o", output, "--type", mix, "--imatrix", importance, *options]
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def relative_error(converted: Converted, path: Path, name: str, part: tuple[slice, ...]) -> float:
    """‖W − Ŵ‖ / ‖W‖ of a part (experts, columns) of a tensor, by gguf-py's decoder."""
    found, exact = (
        next(t for t in GGUFReader(file).tensors if t.name == name)
        for file in (path, converted("BF16"))
    )
    theirs = quants.dequantize(exact.data, GGMLQuantizationType.BF16)
    ours = quants.dequantize(found.data, found.tensor_type).reshape(theirs.shape)
    experts, columns = part
    difference, whole = ((x[experts, ..., columns]) for x in (ours - theirs, theirs))
    return float(np.linalg.norm(difference) / np.linalg.norm(whole))


def test_a_stock_mix_stays_stock_and_names_what_it_loses(
    tiny: Path, converted: Converted, tmp_path: Path
) -> None:
    given = imatrix(tiny, tmp_path / "bad.gguf", {TENSOR: empty, EXPERT: empty_expert})
    result = convert(tiny, tmp_path / "ours.gguf", "Q4_K_M", given)
    assert result.exit_code == 0
    for word in ("bad.gguf", TENSOR, EXPERT, "expert 3", "Q4_K_M"):
        assert word in result.stderr
    loaded = load_importance(given)
    values = ((name, loaded.get(name)) for name in loaded.tensors)
    importance = {name: value for name, value in values if value is not None}
    stock = tmp_path / "stock.gguf"
    stock_quantise(converted("BF16"), stock, stock_mix("Q4_K_M").file_type, importance)
    ours = tensors_of(tmp_path / "ours.gguf")
    for name, expected in tensors_of(stock).items():
        same = read_bytes(stock, expected) == read_bytes(ours[name].file, ours[name])
        assert np.all(same), name


def test_verify_finds_tensors_and_experts_without_weights(tiny: Path, tmp_path: Path) -> None:
    given = imatrix(tiny, tmp_path / "bad.gguf", {TENSOR: empty, EXPERT: empty_expert})
    convert(tiny, tmp_path / "ours.gguf", "Q4_K_M", given)
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "ours.gguf")])
    assert result.exit_code == 1
    error, warning, _ = result.stdout.splitlines()
    assert error.startswith("error: ")
    assert TENSOR in error
    assert warning.startswith("warning: ")
    assert f"expert 3 of {EXPERT}" in warning


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        (TENSOR, empty, (slice(None), slice(None))),
        (EXPERT, empty_expert, (slice(3, 4), slice(None))),
        (EXPERT, empty_columns, (slice(None), slice(32, 64))),
    ],
)
def test_own_mixes_take_zeros_as_no_data(
    tiny: Path,
    converted: Converted,
    tmp_path: Path,
    name: str,
    change: Callable[[Sums], None],
    part: tuple[slice, ...],
) -> None:
    given = imatrix(tiny, tmp_path / "bad.gguf", {name: change})
    output = tmp_path / "ours.gguf"
    result = convert(tiny, output, "DQ3", given, "--tensor-type", f"{TENSOR}=IQ4_NL")
    assert result.exit_code == 0
    assert name in result.stderr
    assert relative_error(converted, output, name, part) < 0.5  # of lost weights it is about 1


def test_types_that_need_importance_need_more_than_zeros(tiny: Path, tmp_path: Path) -> None:
    given = imatrix(tiny, tmp_path / "bad.gguf", {EXPERT: empty})
    result = convert(tiny, tmp_path / "ours.gguf", "DQ2", given)
    assert isinstance(result.exception, UsageError)
    assert EXPERT in str(result.exception)
    assert not (tmp_path / "ours.gguf").exists()
