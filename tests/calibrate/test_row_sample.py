"""Which rows are drawn, how often, and reading them."""

from pathlib import Path

import numpy as np
import pytest

from dots1_local.calibrate.output_errors import draw_rows, read_rows
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from tests.micro import micro_checkpoint


def test_rows_are_drawn_as_often_as_promised() -> None:
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
def test_rows_are_the_checkpoints(tmp_path: Path, shards: int) -> None:
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
    with pytest.raises(CheckpointError, match="truncated while being read"):
        read_rows(checkpoint, "lm_head.weight", np.array([6]))
    piece.file.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        read_rows(checkpoint, "lm_head.weight", np.array([6]))
