import numpy as np

from dots1_local.calibrate.run import Coverage, coverage, shrink


def test_shrinkage_by_hand() -> None:
    """The layer's mean is (66, 22) / 11 = (6, 2); below 4 tokens it takes part."""
    sums = np.array([[50, 10], [16, 12], [0, 0]], np.float32)
    counts = np.array([8, 3, 0], np.float32)
    shrunk, tokens = shrink(sums, counts, least=4)
    np.testing.assert_array_equal(tokens, [8, 3, 1])
    expected = np.array([[50 / 8, 10 / 8], [(16 + 6) / 4, (12 + 2) / 4], [6, 2]])
    np.testing.assert_allclose(shrunk / tokens[:, None], expected, rtol=1e-6)


def test_nothing_is_shrunk_that_was_seen_enough() -> None:
    sums, counts = np.ones((2, 3), np.float32), np.array([4, 5], np.float32)
    for least in (0, 4):
        shrunk, tokens = shrink(sums, counts, least)
        np.testing.assert_array_equal(shrunk, sums)
        np.testing.assert_array_equal(tokens, counts)


def test_coverage_by_hand() -> None:
    counts = np.array([0, 7, 200, 90, 100, 1000], np.float32)
    assert coverage(3, counts) == Coverage(3, 6, unseen=1, rare=3, fewest=0, median=95)
