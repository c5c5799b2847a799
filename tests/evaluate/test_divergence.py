from math import isnan

import numpy as np
import pytest

from dots1_local.errors import Dots1Error
from dots1_local.evaluate.divergence import ROW, compare, histogram, summarise
from dots1_local.evaluate.logits_file import LogitsFile, encode
from tests.goldens.make_kld_goldens import BASE, N_CTX, PRINTED, exact_logits


def test_prints_what_llama_perplexity_prints() -> None:
    with LogitsFile.open(BASE) as base:
        rows = np.empty((base.layout.chunks, base.layout.scored), ROW)
        for chunk, tokens in enumerate(base.tokens):
            logits = exact_logits(tokens[N_CTX // 2 : -1], noisy=True)
            encoded = base.rows(chunk, 0, len(logits))
            rows[chunk] = compare(encoded, logits, tokens[N_CTX // 2 + 1 :])
    assert str(summarise(rows, N_CTX)) + "\n" == PRINTED.read_text(encoding="utf-8")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    scores = logits.astype(np.float64)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return scores


def test_agrees_with_the_textbook_definition() -> None:
    random = np.random.default_rng(0)
    p, q = random.normal(0, 2, (2, 50, 300)).astype(np.float32)
    targets = random.integers(0, 300, 50).astype(np.int32)
    rows = compare(encode(p), q, targets)
    log_p, log_q = log_softmax(p), log_softmax(q)
    each = np.arange(50)
    assert rows["kld"] == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(axis=1), abs=5e-4)
    assert rows["nll"] == pytest.approx(-log_q[each, targets], abs=1e-5)
    assert rows["nll_base"] == pytest.approx(-log_p[each, targets], abs=2e-4)
    assert rows["delta_p"] == pytest.approx(
        np.exp(log_q[each, targets]) - np.exp(log_p[each, targets]), abs=1e-4
    )
    assert (rows["same_top"] == (log_p.argmax(axis=1) == log_q.argmax(axis=1))).all()
    result = summarise(rows.reshape(5, 10), n_ctx=22)
    assert (result.tokens, result.chunks, result.n_ctx) == (50, 5, 22)
    assert result.kl_percentiles[50] == pytest.approx(np.median(rows["kld"]), rel=1e-6)
    assert result.kl_percentiles[90] == pytest.approx(np.percentile(rows["kld"], 90), rel=1e-5)
    assert result.delta_p_rms.value == pytest.approx(np.sqrt(np.mean(rows["delta_p"] ** 2)))
    assert result.correlation == pytest.approx(np.corrcoef(rows["nll"], rows["nll_base"])[0, 1])
    difference = rows["nll"].astype(np.float64) - rows["nll_base"]
    assert result.log_ratio.value == pytest.approx(difference.mean())
    assert result.log_ratio.error == pytest.approx(difference.std() / 7, rel=1e-3)
    assert (result.per_token == rows["kld"].astype(np.float32)).all()


def test_tokens_that_the_base_finds_impossible_do_not_count() -> None:
    p = np.array([[0, -15.9, -16, -30]], np.float32)
    q = np.array([[0, -1e5, -1e8, -1e8]], np.float32)
    rows = compare(encode(p), q, np.zeros(1, np.int32))
    assert rows["kld"][0] == pytest.approx(1e5 * np.exp(-15.9), abs=1e-4)


def test_the_first_of_equal_tokens_is_the_top() -> None:
    p, q = np.array([[1, 1, 0]], np.float32), np.array([[0, 1, 1]], np.float32)
    rows = [compare(encode(a), b, np.zeros(1, np.int32)) for a, b in [(p, q), (p, p)]]
    assert [bool(row["same_top"][0]) for row in rows] == [False, True]


@pytest.mark.parametrize("count", [1, 2, 9, 11, 40])
def test_undefined_statistics_of_few_or_equal_rows_are_nan(count: int) -> None:
    rows = np.zeros((1, count), ROW)
    rows["nll"], rows["same_top"] = 2, True
    result = summarise(rows, n_ctx=2 * count + 2)
    assert result.perplexity.value == pytest.approx(np.exp(2))
    assert isnan(result.correlation)
    assert set(result.kl_percentiles.values()) == {0}
    assert "Cor(ln(PPL(Q)), ln(PPL(base))):    nan%" in str(result)


@pytest.mark.parametrize(("count", "known"), [(9, False), (10, False), (11, True)])
def test_ten_tokens_have_no_error(count: int, known: bool) -> None:
    rows = np.zeros((1, count), ROW)
    rows["kld"] = rows["nll"] = rows["nll_base"] = np.arange(count)
    result = summarise(rows, n_ctx=2 * count + 2)
    assert (result.kl_divergence.error > 0) == known
    assert isnan(result.correlation) == (count < 10)


def test_percentiles_are_interpolated_in_float32() -> None:
    rows = np.zeros((1, 1_000_004), ROW)
    rows["kld"][0, 999_003:] = 1  # 0.999 * 1,000,003 is 999,002.997; in float32 it is 999,003
    assert summarise(rows, n_ctx=2_000_010).kl_percentiles[99.9] == 1


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(broken: float) -> None:
    p = np.zeros((2, 5), np.float32)
    q = p.copy()
    q[1, 3] = broken
    with pytest.raises(Dots1Error, match="NaN or infinite"):
        compare(encode(p), q, np.zeros(2, np.int32))


def counts(picture: str) -> dict[str, int]:
    rows = [line.split() for line in picture.splitlines()[1:]]
    return {row[0]: int(row[1].replace(",", "")) for row in rows}


def draw(*values: float) -> str:
    return histogram(np.array(values, np.float32))


def test_counts_every_token_by_thirds_of_a_decade() -> None:
    found = counts(draw(0.0011, 0.0021, 0.0022, 0.005, 0.009, 0.02))
    assert found == {"1.0e-03": 2, "2.2e-03": 1, "4.6e-03": 2, "1.0e-02": 1}


def test_zero_and_negative_values_are_in_the_first_row() -> None:
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
