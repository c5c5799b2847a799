import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dots1_local.ggml import TYPES
from dots1_local.quant.encode import bad_blocks, decode, encode
from dots1_local.verify import verify_gguf
from tests.helpers import write_random_gguf
from tests.verify.patch import Data, rewrite

TERNARY = {"TQ1_0": 52, "TQ2_0": 64}  # with the place of the scale


@pytest.mark.parametrize("name", TYPES)
def test_a_block_is_finite_if_its_scales_are(name: str) -> None:
    kind = TYPES[name]
    data = np.random.default_rng(0).integers(0, 256, (20_000, kind.bytes), np.uint8)
    data[::50] = 255
    decoded = decode(data, kind, kind.block)
    bad = np.flatnonzero(~np.isfinite(decoded).all(axis=1))
    assert set(bad) <= set(bad_blocks(data.reshape(-1), name))
    # A scale of MXFP4 that may overflow need not, if all weights are small.
    if name not in ("MXFP4", "NVFP4", *TERNARY):  # in the others, some bytes have no meaning
        assert set(bad) == set(bad_blocks(data.reshape(-1), name))


def test_mxfp4_overflows_from_the_scale_on_that_counts_as_bad() -> None:
    kind = TYPES["MXFP4"]
    for exponent, bad in ((252, False), (253, True), (254, True), (255, True)):
        block = np.array([[exponent, *[0x77] * 16]], np.uint8)  # all weights the largest there is
        assert np.isfinite(decode(block, kind, 32)).all() == (not bad)
        assert bool(bad_blocks(block.reshape(-1), "MXFP4").size) == bad


@pytest.mark.parametrize("name", TERNARY)
def test_ternary_codes_are_those_that_ggml_writes(name: str) -> None:
    """Encoding what a block decodes to gives the block again unless one of its bytes is illegal."""
    kind, place = TYPES[name], TERNARY[name]
    rng = np.random.default_rng(0)
    weights = rng.integers(-1, 2, (2000, kind.block)).astype(np.float32)
    data = encode(weights, kind)
    for row, column in enumerate(rng.integers(0, place, len(data) - 100)):
        data[row, column] = rng.integers(256)
    again = encode(decode(data, kind, kind.block), kind)
    bad = np.flatnonzero((data != again).any(axis=1))
    assert 50 < bad.size < 1800
    np.testing.assert_array_equal(bad_blocks(data.reshape(-1), name), bad)
    data = encode(weights, kind)
    data[7, place : place + 2] = np.array([np.inf], np.float16).view(np.uint8)
    assert bad_blocks(data.reshape(-1), name).tolist() == [7]


def test_nvfp4_scales_end_where_e4m3_has_its_nan() -> None:
    block = np.zeros((256, 36), np.uint8)
    block[:, 3] = np.arange(256)
    assert bad_blocks(block.reshape(-1), "NVFP4").tolist() == list(range(0x7F, 256))


@pytest.mark.parametrize(("threads", "row", "column"), [(1, 0, 0), (2, 31, 63)])
def test_a_nan_is_found_where_it_is(tmp_path: Path, threads: int, row: int, column: int) -> None:
    experts = np.ones((8, 32, 64), np.float32)
    experts[3, row, column] = np.nan
    experts[5, 1, 1] = -np.inf
    tensors = {"blk.1.ffn_up_exps.weight": experts}
    report = verify_gguf(write_random_gguf(tmp_path / "m.gguf", tensors=tensors), threads=threads)
    (finding,) = report.findings
    assert finding.severity == "error"
    assert f"first in expert 3, row {row} of blk.1.ffn_up_exps.weight" in finding.message
    assert sum(tensor.bad_blocks for tensor in report.tensors) == 2


def test_a_broken_scale_is_found_deep_in_a_tensor_and_ggml_is_silent(
    converted: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def damage(data: Data) -> Data:
        # A down projection of 256 rows of 192: 6 blocks of Q5_0, 22 bytes each, a row.
        data.reshape(24, 256, 6, 22)[23, 255, 5, :2] = (0x00, 0x7E)  # a float16 NaN
        return data

    name = "blk.4.ffn_down_exps.weight"
    path = rewrite(converted("DQ4"), tmp_path / "broken.gguf", edit={name: damage})
    (finding,) = verify_gguf(path).findings
    assert f"in 1 block of {name}, first in expert 23, row 255" in finding.message
    assert capfd.readouterr() == ("", "")


def test_memory_does_not_grow_with_what_is_broken(tmp_path: Path) -> None:
    broken = {"output.weight": np.full((4096, 4096), np.nan, np.float16)}
    path = write_random_gguf(tmp_path / "m.gguf", tensors=broken)  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        report = verify_gguf(path, threads=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(tensor.bad_blocks for tensor in report.tensors) == 4096**2
    assert peak < 64 << 20  # a place of each block is 128 MiB


def test_progress_ends_with_all_bytes(converted: Any) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_gguf(
        converted("DQ4"), progress=lambda done, total, *_: seen.append((done, total))
    )
    assert seen[-1] == (report.nbytes, report.nbytes)
    assert seen == sorted(seen)


def test_a_file_cut_short_while_it_is_read(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "model.gguf")
    size = path.stat().st_size

    def cut(done: int, total: int, unit: str, what: str) -> None:
        os.truncate(path, size // 2)

    with pytest.raises(Exception, match="ended early"):
        verify_gguf(path, threads=1, progress=cut)
