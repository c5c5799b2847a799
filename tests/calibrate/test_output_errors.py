"""Effects from sampled rows: against all rows, decoded by gguf-py and summed by hand."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec
from dots1_local.calibrate.output_errors import draw_rows, measure, read_rows, sample
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.ggml import TYPES
from dots1_local.quant.encode import encode
from tests.micro import micro_checkpoint

Floats = NDArray[np.float32]

PLAIN = TensorSpec("output.weight", "head", None, (96, 256), ("lm_head.weight",), (96, 256))
ROUTED = TensorSpec(
    "blk.1.ffn_down_exps.weight", "routed", 1, (4, 64, 256), ("a", "b", "c", "d"), (64, 192)
)
KINDS = ("Q8_0", "Q4_K", "IQ4_NL", "Q2_K", "IQ2_XXS", "IQ1_S")


class Case:
    """A tensor (experts, rows, columns) of random weights, and the costs of errors in it."""

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
        """All rows encoded and decoded, at the width that the type fits."""
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
def test_all_rows_give_the_exact_effects(spec: TensorSpec) -> None:
    case = Case(spec)
    measured = case.measured(count=spec.rows)
    for name in KINDS:
        np.testing.assert_allclose(measured[name], case.expected(name), rtol=1e-5)
    np.testing.assert_allclose(measured["reference"], case.expected("Q4_0", False), rtol=1e-5)


@pytest.mark.parametrize("spec", [PLAIN, ROUTED], ids=["plain", "routed, padded"])
def test_some_rows_give_unbiased_effects(spec: TensorSpec) -> None:
    """The mean of forty draws of a quarter of the rows is within its own sampling error."""
    case = Case(spec)
    expected = np.array([case.expected(name) for name in KINDS])
    draws = [case.measured(count=spec.rows // 4, seed=seed) for seed in range(40)]
    ratios = np.array([[draw[name] for name in KINDS] for draw in draws]) / expected
    spread = ratios.std(axis=0, ddof=1)
    assert spread.max() < 0.35
    assert (abs(ratios.mean(axis=0) - 1) < 4 * spread / 40**0.5).all()


def test_each_cost_may_have_its_own_column_costs() -> None:
    spec = replace(PLAIN, name="token_embd.weight", role="embedding")
    case = Case(spec)
    case.columns = np.random.default_rng(1).gamma(1, 1, (2, 1, 256))
    case.rows[1] = case.rows[0]
    measured = case.measured(count=spec.rows)
    for name in KINDS:
        np.testing.assert_allclose(measured[name], case.expected(name), rtol=1e-5)


def test_rows_of_weight_0_are_not_read() -> None:
    case = Case(ROUTED)
    case.rows[:, 1] = 0
    case.rows[:, :, 10:] = 0
    case.weights[1] = case.weights[:, 10:] = np.nan
    measured = case.measured(count=20)
    assert np.isfinite(list(measured.values())).all()


@pytest.mark.parametrize("kind", [0, 1])
def test_one_cost_may_be_0(kind: int) -> None:
    """After the last router nothing flips."""
    case = Case(ROUTED)
    case.rows[kind] = 0
    error, *costs = case.measured(count=256)["Q4_K"]
    assert costs[kind] == 0
    assert costs[1 - kind] > 0
    case.rows[kind] = case.rows[1 - kind]
    np.testing.assert_allclose(error, case.expected("Q4_K")[0], rtol=1e-5)


def test_both_costs_may_be_0() -> None:
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
    others = {"F32", "F16", "BF16", "Q4_0", "NVFP4", "Q2_0", "TQ2_0", "TQ1_0", "Q1_0"}
    every = TYPES.keys() - others
    assert Case(ROUTED).measured(count=32).keys() == every | {"reference"}
    case = Case(PLAIN)
    drawn = sample(case.spec, case.rows_of, case.rows, case.columns, count=32)
    assert measure(drawn, None)[0].keys() == every - {"IQ2_XXS", "IQ2_XS", "IQ1_S"}


def test_reference_is_0_if_its_blocks_do_not_fit() -> None:
    case = Case(TensorSpec("x.weight", "shared", 1, (64, 256), ("x",), (64, 48)))
    assert case.measured(count=64)["reference"] == (0, 0, 0)


def test_weights_too_large_for_a_type() -> None:
    """A block scale is a 16-bit number."""
    case = Case(PLAIN)
    case.weights[:] = 1e10
    drawn = sample(case.spec, case.rows_of, case.rows, case.columns)
    with pytest.raises(CheckpointError, match=r"output\.weight .*too large for Q4_0"):
        measure(drawn, case.importance)


def test_rows_are_drawn_with_the_returned_probability() -> None:
    """Half by each kind's share, and at most once: rows 0 to 3 of (6, 2, 1, 1) / 10, two drawn."""
    weights = np.array([[6.0, 2, 1, 1, 0], [60, 20, 10, 10, 0]])
    counts = np.zeros(5)
    for seed in range(4000):
        rows, chances = draw_rows(weights, 2, seed)
        assert chances.tolist() == [[1, 0.5, 0.25, 0.25][row] for row in rows]
        counts[rows] += 1
    assert (counts[0], counts[4]) == (4000, 0)
    np.testing.assert_allclose(counts[1:4] / 4000, [0.5, 0.25, 0.25], atol=0.04)


def test_each_kind_has_half_the_draws() -> None:
    weights = np.array([[1.0, 1, 0, 0], [0, 0, 8, 8]])
    assert draw_rows(weights, 2, 0)[1].tolist() == [0.5, 0.5]
    assert draw_rows(weights * [[0], [1]], 2, 0)[0].tolist() == [2, 3]


def test_few_rows_are_all_drawn() -> None:
    weights = np.random.default_rng(0).random((2, 100)) + 1e-9
    rows, chances = draw_rows(weights, 100, 0)
    assert (rows == np.arange(100)).all()
    assert (chances == 1).all()
    assert len(draw_rows(np.zeros((2, 100)), 1000, 0)[0]) == 100


def test_draws_without_any_weight_are_even() -> None:
    rows, chances = draw_rows(np.zeros((2, 1000)), 10, 0)
    assert len(rows) == 10
    np.testing.assert_allclose(chances, 0.01)


@pytest.mark.parametrize("shards", [1, 3])
def test_rows_equal_the_checkpoints(tmp_path: Path, shards: int) -> None:
    checkpoint = Checkpoint.open(micro_checkpoint(tmp_path, shards))
    rows = np.array([0, 1, 2, 5, 30, 31])
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.experts.2.up_proj.weight"):
        whole = checkpoint.read(name)
        np.testing.assert_array_equal(read_rows(checkpoint, name, rows), whole[rows])


def test_damage_is_found_in_its_row(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(micro_checkpoint(tmp_path))
    piece = checkpoint.locate("lm_head.weight")
    with piece.file.open("r+b") as file:
        file.seek(piece.offset + (7 * 64 + 3) * 2)
        file.write(b"\xc0\x7f")  # NaN in bf16
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has NaN .* weights in row 7"):
        read_rows(checkpoint, "lm_head.weight", np.array([2, 7, 9]))
    assert np.isfinite(read_rows(checkpoint, "lm_head.weight", np.array([6, 8]))).all()
    piece.file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated"):
        read_rows(checkpoint, "lm_head.weight", np.array([6]))
    piece.file.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        read_rows(checkpoint, "lm_head.weight", np.array([6]))
