"""Errors from sampled rows: against all rows, decoded by gguf-py and added up by hand."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec
from dots1_local.calibrate.output_errors import measure, sample
from dots1_local.errors import CheckpointError
from dots1_local.ggml import TYPES
from dots1_local.quant.encode import encode

Floats = NDArray[np.float32]

PLAIN = TensorSpec("output.weight", "head", None, (96, 256), ("lm_head.weight",), (96, 256))
ROUTED = TensorSpec(
    "blk.1.ffn_down_exps.weight", "routed", 1, (4, 64, 256), ("a", "b", "c", "d"), (64, 192)
)
KINDS = ("Q8_0", "Q4_K", "IQ4_NL", "Q2_K", "IQ2_XXS", "IQ1_S")


class Case:
    """A tensor (experts, rows, columns) of random weights, and what errors in it cost."""

    def __init__(self, spec: TensorSpec, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.spec = spec
        shape = (len(spec.sources), *spec.source_shape)
        self.weights = (rng.standard_normal(shape) * 0.02).astype(np.float32)
        self.weights *= rng.gamma(2, 0.5, (*shape[:2], 1)).astype(np.float32)
        self.rows = rng.gamma(0.5, 1, (2, *shape[:2]))
        self.columns = rng.gamma(1, 1, (1, shape[0], shape[2]))
        self.importance = self.columns[0].astype(np.float32)

    def rows_of(self, expert: int, rows: NDArray[np.int64]) -> Floats:
        return np.asarray(self.weights[expert, rows])

    def decoded(self, name: str, guided: bool = True) -> Floats:
        """All rows, stored and decoded, at the width at which the type fits."""
        kind, width = TYPES[name], self.weights.shape[2]
        padding = 0 if kind.fits(width) else self.spec.columns - width
        out = np.empty_like(self.weights)
        for expert, rows in enumerate(np.pad(self.weights, ((0, 0), (0, 0), (0, padding)))):
            guide = np.pad(self.importance[expert], (0, padding)) if guided else None
            stored = encode(np.ascontiguousarray(rows), kind, guide)
            out[expert] = dequantize(stored, gguf.GGMLQuantizationType[name])[:, :width]
        return out

    def expected(self, name: str, guided: bool = True) -> tuple[float, float, float]:
        """Relative error, damage and flips, from every row."""
        off = (self.decoded(name, guided).astype(np.float64) - self.weights) ** 2
        own = self.weights.astype(np.float64) ** 2
        kl, tie = (
            np.einsum("er,erc,ec->", rows, off, self.columns[kind % len(self.columns)])
            for kind, rows in enumerate(self.rows)
        )
        whole = np.einsum("er,erc,ec->", self.rows[0], own, self.columns[0])
        return kl / whole, kl / 2, tie / 2

    def measured(self, count: int, seed: int = 0) -> dict[str, tuple[float, float, float]]:
        drawn = sample(self.spec, self.rows_of, self.rows, self.columns, count=count, seed=seed)
        effects, reference = measure(drawn, self.importance, threads=2)
        effects["reference"] = reference
        return {name: (e.error, e.damage, e.flips) for name, e in effects.items()}


@pytest.mark.parametrize("spec", [PLAIN, ROUTED], ids=["plain", "routed, padded"])
def test_all_rows_give_it_exactly(spec: TensorSpec) -> None:
    case = Case(spec)
    measured = case.measured(count=spec.rows)
    for name in KINDS:
        np.testing.assert_allclose(measured[name], case.expected(name), rtol=1e-5)
    np.testing.assert_allclose(measured["reference"], case.expected("Q4_0", False), rtol=1e-5)


@pytest.mark.parametrize("spec", [PLAIN, ROUTED], ids=["plain", "routed, padded"])
def test_some_rows_give_it_without_bias(spec: TensorSpec) -> None:
    """The mean of forty draws of a quarter of the rows is within its own sampling error."""
    case = Case(spec)
    expected = np.array([case.expected(name) for name in KINDS])
    draws = [case.measured(count=spec.rows // 4, seed=seed) for seed in range(40)]
    ratios = np.array([[draw[name] for name in KINDS] for draw in draws]) / expected
    spread = ratios.std(axis=0, ddof=1)
    assert spread.max() < 0.35
    assert (abs(ratios.mean(axis=0) - 1) < 4 * spread / 40**0.5).all()


def test_embedding_has_columns_of_its_own_for_each_cost() -> None:
    spec = replace(PLAIN, name="token_embd.weight", role="embedding")
    case = Case(spec)
    case.columns = np.random.default_rng(1).gamma(1, 1, (2, 1, 256))
    case.rows[1] = case.rows[0]
    measured = case.measured(count=spec.rows)
    for name in KINDS:
        np.testing.assert_allclose(measured[name], case.expected(name), rtol=1e-5)


def test_rows_of_no_weight_are_not_read() -> None:
    case = Case(ROUTED)
    case.rows[:, 1] = 0
    case.rows[:, :, 10:] = 0
    case.weights[1] = case.weights[:, 10:] = np.nan
    measured = case.measured(count=20)
    assert np.isfinite(list(measured.values())).all()


@pytest.mark.parametrize("kind", [0, 1])
def test_one_cost_may_be_nothing(kind: int) -> None:
    """Behind the last router nothing flips."""
    case = Case(ROUTED)
    case.rows[kind] = 0
    error, *costs = case.measured(count=256)["Q4_K"]
    assert costs[kind] == 0
    assert costs[1 - kind] > 0
    case.rows[kind] = case.rows[1 - kind]
    np.testing.assert_allclose(error, case.expected("Q4_K")[0], rtol=1e-5)


def test_both_costs_may_be_nothing() -> None:
    case = Case(PLAIN)
    case.rows[:] = 0
    error, damage, flips = case.measured(count=96)["Q4_K"]
    assert (damage, flips) == (0, 0)
    case.rows[:] = 1
    np.testing.assert_allclose(error, case.expected("Q4_K")[0], rtol=1e-5)


def test_zeros_are_stored_exactly() -> None:
    case = Case(PLAIN)
    case.weights[:] = 0
    assert set(case.measured(count=32).values()) == {(0.0, 0.0, 0.0)}


def test_types_that_fit_are_measured() -> None:
    """K- and IQ-types need a multiple of 256 columns; padding makes that of 192."""
    unpadded = replace(ROUTED, shape=(4, 64, 192))
    short = {"Q8_0", "Q5_0", "Q5_1", "Q4_1", "IQ4_NL", "MXFP4"}
    assert Case(unpadded).measured(count=32).keys() == short | {"reference"}
    every = TYPES.keys() - {"F32", "F16", "BF16", "Q4_0"}
    assert Case(ROUTED).measured(count=32).keys() == every | {"reference"}
    case = Case(PLAIN)
    drawn = sample(case.spec, case.rows_of, case.rows, case.columns, count=32)
    assert measure(drawn, None)[0].keys() == every - {"IQ2_XXS", "IQ2_XS", "IQ1_S"}


def test_reference_leaves_rows_that_are_no_whole_blocks() -> None:
    case = Case(TensorSpec("x.weight", "shared", 1, (64, 256), ("x",), (64, 48)))
    assert case.measured(count=64)["reference"] == (0, 0, 0)


def test_weights_too_large_for_a_type() -> None:
    """A block scale is a 16-bit number."""
    case = Case(PLAIN)
    case.weights[:] = 1e10
    drawn = sample(case.spec, case.rows_of, case.rows, case.columns)
    with pytest.raises(CheckpointError, match=r"output\.weight .*too large for Q4_0"):
        measure(drawn, case.importance)
