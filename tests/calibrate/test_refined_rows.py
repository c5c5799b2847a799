"""Samples of rows, and what their errors cost, against sums over all rows."""

import numpy as np
import pytest

from dots1_local.architecture import TensorSpec
from dots1_local.calibrate.refined_rows import DrawnRows, EmbeddingSample, RowSample
from dots1_local.refine.metric import Metric

SPEC = TensorSpec("token_embd.weight", "embedding", None, (300, 32), ("embed",), (300, 32))
RANDOM = np.random.default_rng(0)
ERRORS = RANDOM.standard_normal((2, 300, 32)).astype(np.float32)
METRIC = Metric(np.eye(32, dtype=np.float32))


@pytest.mark.parametrize("costs", [np.ones(300), 1 / np.arange(1.0, 301)])
def test_weighted_rows_stand_for_all(costs: np.ndarray) -> None:
    values = costs * RANDOM.uniform(0.5, 1.5, 300)
    found = []
    for number in range(400):
        drawn = DrawnRows.of(f"matrix {number}", costs, 20)
        assert len(drawn.numbers) == len(set(drawn.numbers.tolist()))
        assert abs(len(drawn.numbers) - 20) <= 1
        np.testing.assert_array_equal(drawn.costs, costs[drawn.numbers])
        found.append((values[drawn.numbers] / drawn.chances).sum())
    assert np.mean(found) == pytest.approx(values.sum(), rel=0.02)
    assert np.std(found) < 0.1 * values.sum()


def test_errors_count_by_the_costs_of_rows() -> None:
    costs, inputs = 1 / np.arange(1.0, 301), RANDOM.standard_normal((50, 32)).astype(np.float32)
    found = []
    for number in range(200):
        drawn = DrawnRows.of(f"matrix {number}", costs, 40)
        sample = RowSample(SPEC, drawn, ERRORS[0, drawn.numbers], METRIC, inputs, None)
        found.append(sample.squares(*ERRORS[:, drawn.numbers]))
    refined, plain = ERRORS.astype(np.float64)
    exact = costs @ np.square(refined @ inputs.T).mean(axis=1)
    predicted = costs @ np.square(plain) @ np.square(inputs).mean(axis=0)
    assert np.mean(found, axis=0) == pytest.approx([exact, predicted], rel=0.02)


def test_a_row_of_the_embedding_is_judged_where_its_token_stands() -> None:
    tokens = RANDOM.integers(0, 10, 200)
    gradients = RANDOM.standard_normal((200, 32)).astype(np.float32)
    gradients[tokens == 3] *= 5
    drawn = DrawnRows.all_of(10)
    at_rows = [gradients[tokens == token] for token in range(10)]
    rows, everywhere = ERRORS[0, :10], gradients[:7]
    sample = EmbeddingSample(SPEC, drawn, rows, METRIC, everywhere, None, at_rows)
    expected = [
        sum(float(g @ errors[token]) ** 2 for g, token in zip(gradients, tokens, strict=True))
        for errors in ERRORS[:, :10]
    ]
    assert sample.squares(*ERRORS[:, :10]) == pytest.approx(expected, rel=1e-5)
