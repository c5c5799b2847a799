"""Refined matrices, decoded by ggml, against objectives and feedback computed by hand."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dots1_local.ggml import TYPES
from dots1_local.quant.encode import decode, encode
from dots1_local.refine.blocks import block_format, unpack
from dots1_local.refine.fast_encoder import encode_fast
from dots1_local.refine.matrix import refine_matrix
from dots1_local.refine.metric import Metric, input_metric, output_metric

Floats = NDArray[np.float32]

# ggml takes seconds to prepare the codebooks of the other types.
FAST = [
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K",
    "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_XXS",
]  # fmt: skip


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)


def correlated(rows: int, columns: int, seed: int) -> Floats:
    """Inputs (rows, columns) that mostly lie in a few directions, the same for every seed."""
    directions = normal(columns, columns, seed=99) * np.exp(-np.arange(columns) / 40)[:, None]
    inputs: Floats = normal(rows, columns, seed=seed) @ directions.astype(np.float32)
    return inputs + normal(rows, columns, seed=seed + 1, scale=0.25)


def moment(columns: int, rows: int = 4096) -> Floats:
    inputs = correlated(rows, columns, 1)
    second: Floats = inputs.T @ inputs / np.float32(rows)
    return second


def objective(errors: Floats, metric: Metric) -> float:
    """tr(HO E H E') in F64."""
    e, h = errors.astype(float), metric.inputs.astype(float)
    outputs = np.eye(len(e)) if metric.outputs is None else metric.outputs
    return float(np.trace(outputs @ e @ h @ e.T))


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("name", FAST)
def test_refinement_lowers_the_error_of_what_ggml_decodes(name: str, coupled: bool) -> None:
    kind, matrix = TYPES[name], normal(40, 320, scale=0.02)
    outputs = output_metric(moment(40)) if coupled else None
    metric = Metric(input_metric(moment(320), 4096), outputs)
    refined = refine_matrix(matrix, kind, metric, correlated(300, 320, 7), columns=512)
    diagonal = np.pad(np.diag(metric.inputs), (0, 192))
    plain = encode(np.pad(matrix, ((0, 0), (0, 192))), kind, diagonal)
    before, after = (
        objective(matrix - decode(data, kind, 512)[:, :320], metric)
        for data in (plain, refined.data)
    )
    assert not refined.kept
    assert after < 0.6 * before
    assert refined.fitted == pytest.approx(after / before, rel=0.2)
    assert refined.held_out < 0.6


@pytest.fixture
def unscaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows stay as coordinate descent leaves them."""
    monkeypatch.setattr("dots1_local.refine.matrix._LARGEST_SCALE", 1)


@pytest.mark.usefixtures("unscaled")
def test_feedback_is_that_of_gptq() -> None:
    kind, matrix = TYPES["Q8_0"], normal(6, 64, scale=0.02)
    metric = Metric(input_metric(moment(64), 4096))
    refined = refine_matrix(matrix, kind, metric, None, columns=64, rounds=0)
    scales = unpack(encode(matrix, kind, np.diag(metric.inputs).copy()), kind).d.repeat(32, axis=1)
    left, hessian = matrix.astype(float), metric.inputs.astype(float)
    for column in range(64):  # GPTQ as published, with the inverse of what is left of H
        inverse = np.linalg.inv(hessian[column:, column:])
        scale = scales[:, column]
        error = left[:, column] - np.rint(left[:, column] / scale) * scale
        left[:, column] -= error
        left[:, column + 1 :] -= np.outer(error, inverse[0, 1:] / inverse[0, 0])
    same = np.isclose(decode(refined.data, kind, 64), left, atol=1e-6)
    assert same.mean() > 0.98  # F32 and F64 round near ties differently


@pytest.mark.usefixtures("unscaled")
@pytest.mark.parametrize("coupled", [False, True])
def test_no_change_of_one_code_lowers_the_error_further(coupled: bool) -> None:
    kind, matrix = TYPES["Q4_0"], normal(8, 64, scale=0.02)
    outputs = output_metric(moment(8)) if coupled else None
    metric = Metric(input_metric(moment(64), 4096), outputs)
    refined = refine_matrix(matrix, kind, metric, None, columns=64, rounds=30)
    blocks, values = unpack(refined.data, kind), block_format(kind).values[:, 0]
    errors = matrix - decode(refined.data, kind, 64)
    least = objective(errors, metric)
    for row, column in product(range(8), range(64)):
        for value in values:
            changed = errors.copy()
            changed[row, column] = matrix[row, column] - blocks.d[row, column // 32] * value
            assert objective(changed, metric) > least * (1 - 1e-5)


@pytest.mark.parametrize("name", ["IQ2_XXS", "Q2_K", "Q3_K"])
def test_outputs_are_neither_too_small_nor_too_large(name: str) -> None:
    """Least squares would make them too small by the part of the error in their mean square."""
    kind, matrix = TYPES[name], normal(40, 512, scale=0.02)
    metric = Metric(input_metric(moment(512), 4096))
    refined = refine_matrix(matrix, kind, metric, None, columns=512)
    errors = decode(refined.data, kind, 512) - matrix
    outputs = matrix @ metric.inputs
    size = (outputs * matrix).sum(axis=1)
    part = (errors @ metric.inputs * errors).sum() / size.sum()
    assert np.abs((outputs * errors).sum(axis=1) / size).max() < 0.2 * part


def test_ggmls_bytes_stay_if_held_out_inputs_do_not_gain() -> None:
    kind, matrix = TYPES["Q4_K"], normal(8, 256, scale=0.02)
    first, other = normal(256, seed=1), normal(256, seed=2)
    other -= first * (first @ other) / (first @ first)
    metric = Metric((np.outer(first, first) + np.eye(256) / 100).astype(np.float32))
    importance = np.ones(256, np.float32)
    refined = refine_matrix(matrix, kind, metric, other[None], columns=256, importance=importance)
    assert refined.fitted < 1 <= refined.held_out
    assert refined.kept
    assert np.array_equal(refined.data, encode(matrix, kind, importance))


def test_a_type_without_blocks_keeps_ggmls_bytes() -> None:
    matrix = normal(4, 64)
    refined = refine_matrix(matrix, TYPES["F16"], Metric(moment(64)), None, columns=64)
    assert refined.kept
    assert np.array_equal(refined.data.view(np.float16), matrix.astype(np.float16))


def test_zero_weights_stay_zero() -> None:
    matrix = np.zeros((4, 256), np.float32)
    metric = Metric(input_metric(moment(256), 4096))
    for name in ("Q4_K", "IQ3_XXS", "Q8_0"):
        refined = refine_matrix(matrix, TYPES[name], metric, None, columns=256)
        assert not decode(refined.data, TYPES[name], 256).any()


def test_factor_of_a_singular_moment() -> None:
    inputs = correlated(5, 300, 1)
    singular = Metric(inputs.T @ inputs)
    factor = singular.factor.astype(float)
    assert not np.tril(factor, -1).any()
    scale = np.trace(singular.inputs) / 300
    np.testing.assert_allclose(factor @ factor.T, singular.inputs, atol=0.02 * scale, rtol=0)


def test_few_tokens_are_shrunk_towards_the_prior() -> None:
    own, prior = np.diag([4.0, 0.0]).astype(np.float32), np.diag([1.0, 3.0]).astype(np.float32)
    shrunk = input_metric(own, 6, prior)  # 6 observations and 2 of the prior
    expected = np.diag([(6 * 4 + 2 * 1) / 8, 2 * 3 / 8])
    damping = shrunk[0, 0] - expected[0, 0]
    np.testing.assert_allclose(shrunk, expected + damping * np.eye(2), rtol=1e-6)
    assert 0 < damping < 0.31 * np.trace(expected) / 2


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    code = "from dots1_local.refine.kernels import _library; _library()"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "no compiler 'no-such-compiler'; install g++" in found.stderr


def test_what_a_killed_compiler_left_goes_when_it_runs_again(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "open(os.environ['TMPDIR'] + '/temporary.o', 'w')\n"
        "if os.path.exists('again'): open(sys.argv[sys.argv.index('-o') + 1], 'w').write('built')\n"
        "else: open('again', 'w'), os.kill(os.getppid(), 9)\n"
    )
    compiler.chmod(0o755)
    command = [sys.executable, "-c", "from dots1_local.refine.kernels import _library; _library()"]
    cache = tmp_path / "cache"
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "CXX": str(compiler)}
    for left in (2, 1):  # PATH.partial and PATH.build; then the library alone
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert len(list((cache / "dots1").iterdir())) == left
    assert next((cache / "dots1").iterdir()).read_text() == "built"


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_XXS"])
def test_the_fast_encoder_is_no_worse_than_ggmls(name: str) -> None:
    kind, matrix = TYPES[name], normal(64, 512, scale=0.02)
    importance = np.exp(normal(512, seed=3))
    plain, fast = encode(matrix, kind, importance), encode_fast(matrix, kind, importance)
    before, after = (
        (importance * np.square(matrix - decode(data, kind, 512))).sum() for data in (plain, fast)
    )
    assert after < before
