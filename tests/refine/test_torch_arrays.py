"""Refinement by torch, on CPU tensors, against the C++ kernels; bytes are decoded by ggml."""

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dots1_local.errors import UsageError
from dots1_local.ggml import TYPES
from dots1_local.quant.encode import decode
from dots1_local.refine.arrays import NUMPY, arrays_on
from dots1_local.refine.blocks import unpack
from dots1_local.refine.matrix import refine_matrix
from dots1_local.refine.metric import Metric, input_metric, output_metric
from tests.refine.test_matrix import correlated, moment, normal, objective


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_1", "IQ4_XS", "IQ3_XXS", "IQ2_XXS"])
def test_a_matrix_gets_the_same_codes_up_to_ties(name: str, coupled: bool) -> None:
    kind, matrix = TYPES[name], normal(136, 320, scale=0.02)
    outputs = output_metric(moment(136)) if coupled else None
    metric = Metric(input_metric(moment(320), 4096), outputs)
    first, second = (
        refine_matrix(matrix, kind, metric, None, columns=512, rounds=1, arrays=arrays)
        for arrays in (NUMPY, arrays_on("cpu"))
    )
    rows = (unpack(each.data, kind) for each in (first, second))
    for one, other in zip(*(vars(blocks).values() for blocks in rows), strict=True):
        # One tie changes what follows it, and d of its row by a bit: the objective below judges d.
        if one.dtype != np.float32 and one.size:
            assert (one == other).mean() >= 0.95
    expected, found = (
        objective(matrix - decode(each.data, kind, 512)[:, :320], metric)
        for each in (first, second)
    )
    assert found == pytest.approx(expected, rel=0.01)
    assert second.fitted == pytest.approx(first.fitted, rel=0.05)  # estimated on some rows
    assert not second.kept


def test_a_singular_moment_is_damped_until_it_has_a_factor() -> None:
    inputs, matrix = correlated(5, 320, 1), normal(8, 320, scale=0.02)
    metric, kind = Metric(inputs.T @ inputs), TYPES["Q4_0"]
    refined = refine_matrix(matrix, kind, metric, None, columns=320, arrays=arrays_on("cpu"))
    assert refined.fitted < 0.1
    assert np.isfinite(decode(refined.data, kind, 320)).all()


def test_zero_weights_stay_zero() -> None:
    metric, matrix = Metric(input_metric(moment(256), 4096)), np.zeros((4, 256), np.float32)
    arrays = arrays_on("cpu")
    for name in ("Q4_K", "IQ3_XXS", "Q8_0"):
        refined = refine_matrix(matrix, TYPES[name], metric, None, columns=256, arrays=arrays)
        assert not decode(refined.data, TYPES[name], 256).any()


def test_a_device_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dots1_local.refine.torch_arrays", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match="torch"):
        arrays_on("cuda")
