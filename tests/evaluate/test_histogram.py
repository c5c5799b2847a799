import numpy as np
import pytest

from dots1_local.evaluate.divergence import histogram


def counts(picture: str) -> dict[str, int]:
    rows = [line.split() for line in picture.splitlines()[1:]]
    return {row[0]: int(row[1].replace(",", "")) for row in rows}


def draw(*values: float) -> str:
    return histogram(np.array(values, np.float32))


def test_counts_every_token_by_thirds_of_a_decade() -> None:
    found = counts(draw(0.0011, 0.0021, 0.0022, 0.005, 0.009, 0.02))
    assert found == {"1.0e-03": 2, "2.2e-03": 1, "4.6e-03": 2, "1.0e-02": 1}


def test_what_rounding_made_zero_or_negative_is_below() -> None:
    assert counts(draw(-2e-6, 0, 5e-8)) == {"below": 3}
    assert counts(draw(-1, 1.1e-7)) == {"below": 1, "1.0e-07": 1}


def test_marks_percentiles_where_they_fall() -> None:
    rows = draw(*[0.0015] * 80, *[0.03] * 15, *[5.0] * 5).splitlines()[1:]
    marks = {row.split()[0]: row.split()[3:] for row in rows if "%" in row}
    assert marks == {"1.0e-03": ["10%", "50%"], "2.2e-02": ["90%"], "4.6e+00": ["99%", "99.9%"]}


def test_bars_are_in_proportion_and_never_vanish() -> None:
    rows = draw(*[0.0015] * 1000, *[0.003] * 500, 0.005).splitlines()[1:]
    assert [row.split()[2] for row in rows] == ["█" * 36, "█" * 18, "▏"]


@pytest.mark.parametrize(
    "values", [[0.01], [0.0], [1e-9, 1e9], np.geomspace(1e-9, 1e3, 10_000), [0.01] * 3]
)
def test_fits_80_columns(values: list[float]) -> None:
    picture = draw(*values)
    assert max(map(len, picture.splitlines())) <= 80
    assert len(picture.splitlines()) <= 33
    assert sum(counts(picture).values()) == len(values)
    assert all(line == line.rstrip() for line in picture.splitlines())
