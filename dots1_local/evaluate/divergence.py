"""KL divergence and related statistics, as llama-perplexity defines and prints them.

P is the next-token distribution of the base model, Q that of the model under test. `compare`
returns figures for each scored token, `summarise` statistics over all of them, and `histogram` a
picture of the KL divergence of tokens. Numbers are float32 or float64 as in llama-perplexity, so
that the printed digits agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error
from dots1_local.evaluate.logits_file import decode
from dots1_local.evaluate.scoring import NOT_FINITE, Floats, exp32, log_sum_exp

__all__ = ["ROW", "Divergence", "Estimate", "compare", "histogram", "summarise"]

# Logarithms are natural; delta_p is Q's probability of the true token minus P's.
ROW = np.dtype(
    [("nll", "f4"), ("nll_base", "f4"), ("kld", "f8"), ("delta_p", "f4"), ("same_top", "?")]
)
_FLOOR = np.float32(-16)  # tokens whose probability in P is below e^-16 do not count

KL_POINTS = (100.0, 99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1, 0.0)
DELTA_P_POINTS = (100.0, 99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1, 0.0)
_NAMES = {100.0: "Maximum", 50.0: "Median ", 0.0: "Minimum"}

Figures = NDArray[np.void]  # of type ROW


@dataclass(frozen=True)
class Estimate:
    """A mean, or a function of means, and its standard error (0 for 10 values or fewer)."""

    value: float
    error: float


@dataclass(frozen=True)
class Divergence:
    """How a model differs from its base on `tokens` scored tokens.

    `str` is llama-perplexity's output. Percentiles are by percent: 100 is the maximum, 50 the
    median. Probabilities are 0 to 1 here and percent in the output. Undefined values, such as the
    correlation of constants, are NaN.
    """

    tokens: int
    chunks: int
    n_ctx: int
    perplexity: Estimate
    base_perplexity: Estimate
    correlation: float
    log_ratio: Estimate
    ratio: Estimate
    difference: Estimate
    kl_divergence: Estimate
    kl_percentiles: Mapping[float, float]
    delta_p: Estimate
    delta_p_percentiles: Mapping[float, float]
    delta_p_rms: Estimate
    same_top: Estimate
    per_token: Floats = field(repr=False, compare=False)
    """KL divergence of each scored token, in the text's order (tokens,)."""

    def __str__(self) -> str:
        lines = [
            "====== Perplexity statistics ======",
            f"Mean PPL(Q)                   : {_pair(self.perplexity)}",
            f"Mean PPL(base)                : {_pair(self.base_perplexity)}",
            f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * self.correlation:6.2f}%",
            f"Mean ln(PPL(Q)/PPL(base))     : {_pair(self.log_ratio)}",
            f"Mean PPL(Q)/PPL(base)         : {_pair(self.ratio)}",
            f"Mean PPL(Q)-PPL(base)         : {_pair(self.difference)}",
            "",
            "====== KL divergence statistics ======",
            f"Mean    KLD: {_pair(self.kl_divergence)}",
            *(f"{_point(p)} KLD: {value:10.6f}" for p, value in self.kl_percentiles.items()),
            "",
            "====== Token probability statistics ======",
            f"Mean    Δp: {_percent(self.delta_p)}",
            *(f"{_point(p)} Δp: {100 * v:6.3f}%" for p, v in self.delta_p_percentiles.items()),
            f"RMS Δp    : {_percent(self.delta_p_rms)}",
            f"Same top p: {_percent(self.same_top)}",
        ]
        return "\n".join(lines)


def _pair(estimate: Estimate) -> str:
    return f"{estimate.value:10.6f} ± {estimate.error:10.6f}"


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:6.3f} ± {100 * estimate.error:5.3f} %"


def _point(percent: float) -> str:
    return _NAMES.get(percent, f"{percent:4.1f}%  ")


def compare(base: NDArray[np.uint16], logits: Floats, targets: NDArray[np.int32]) -> Figures:
    """Figures (n,) of type `ROW` for encoded rows of P, logits of Q (n, n_vocab), true tokens (n,).

    Raises:
        Dots1Error: a logit is not finite.
    """
    each = np.arange(len(targets))
    rows = np.empty(len(targets), ROW)
    log_p = decode(base, logits.shape[1])
    top, log_sum = log_sum_exp(logits)
    log_z = top + log_sum.astype(np.float32)
    rows["nll"] = log_z - logits[each, targets]
    rows["nll_base"] = -log_p[each, targets]
    rows["delta_p"] = exp32(-rows["nll"]) - exp32(-rows["nll_base"])
    rows["same_top"] = logits.argmax(axis=1) == log_p.argmax(axis=1)
    terms = log_p - logits
    terms += log_z[:, None]
    p = exp32(log_p)
    p[log_p <= _FLOOR] = 0
    with np.errstate(invalid="ignore"):
        terms *= p
        rows["kld"] = terms.sum(axis=1, dtype=np.float64)
    if not np.isfinite(rows["kld"]).all():
        raise Dots1Error(NOT_FINITE)
    return rows


def summarise(rows: Figures, n_ctx: int) -> Divergence:
    """Compute statistics over all figures (chunks, scored tokens)."""
    every = rows.reshape(-1)
    count = len(every)
    with np.errstate(all="ignore"):  # 0 / 0 and the like are NaN, as in C
        nll, base = every["nll"], every["nll_base"]
        log_q, log_p = _mean(nll), _mean(base)
        covariance = _covariance(nll, base)
        q, p = _exp(log_q), _exp(log_p)
        log_ratio = Estimate(log_q.value - log_p.value, _difference(log_q, log_p, covariance))
        difference = _difference(q, p, q.value * p.value * covariance)
        squares = _mean((every["delta_p"] * every["delta_p"]).astype(np.float64))
        rms = np.sqrt(squares.value)
        same = np.float64(np.count_nonzero(every["same_top"])) / count
        per_token = every["kld"].astype(np.float32)
        kld, delta_p = np.sort(per_token), np.sort(every["delta_p"])
        return Divergence(
            tokens=count,
            chunks=len(rows),
            n_ctx=n_ctx,
            perplexity=q,
            base_perplexity=p,
            correlation=float(covariance / (np.float64(log_q.error) * log_p.error)),
            log_ratio=log_ratio,
            ratio=_exp(log_ratio),
            difference=Estimate(q.value - p.value, difference),
            kl_divergence=_mean(every["kld"]),
            kl_percentiles={percent: _percentile(kld, percent) for percent in KL_POINTS},
            delta_p=_mean(every["delta_p"]),
            delta_p_percentiles={point: _percentile(delta_p, point) for point in DELTA_P_POINTS},
            delta_p_rms=Estimate(float(rms), float(np.float64(0.5) / rms * squares.error)),
            same_top=Estimate(float(same), float(np.sqrt(same * (1 - same) / (count - 1)))),
            per_token=per_token,
        )


def _mean(values: NDArray[Any]) -> Estimate:
    """The mean; values are squared in their own precision and summed in float64."""
    count = len(values)
    mean = values.sum(dtype=np.float64) / count
    variance = (values * values).sum(dtype=np.float64) / count - mean * mean
    known = variance > 0 and count > 10
    return Estimate(float(mean), float(np.sqrt(variance / (count - 1))) if known else 0.0)


def _covariance(a: Floats, b: Floats) -> float:
    """The covariance of the two means."""
    count = len(a)
    if count < 10:
        return 0.0
    products = (a * b).sum(dtype=np.float64) / count
    means = a.sum(dtype=np.float64) / count * (b.sum(dtype=np.float64) / count)
    return float((products - means) / (count - 1))


def _exp(log: Estimate) -> Estimate:
    value = float(np.exp(log.value))
    return Estimate(value, value * log.error)


def _difference(a: Estimate, b: Estimate, covariance: float) -> float:
    """The standard error of a - b."""
    variance = a.error * a.error + b.error * b.error - 2 * covariance
    return float(np.sqrt(np.float64(variance)))


def _percentile(ascending: Floats, percent: float) -> float:
    """Interpolate between the two nearest values in float32; the median is exact."""
    last = len(ascending) - 1
    if percent == 50:
        return float(np.float32(0.5) * (ascending[last // 2] + ascending[(last + 1) // 2]))
    if percent in (0, 100):
        return float(ascending[0 if percent == 0 else last])
    place = np.float32(percent / 100) * np.float32(last)
    lower = int(place)
    part = place - np.float32(lower)
    upper = ascending[min(lower + 1, last)]
    return float((np.float32(1) - part) * ascending[lower] + part * upper)


_LOWEST, _HIGHEST = -21, 9  # thirds of a decade: 1e-7, below which all is rounding, to 1000
_MARKS = (10.0, 50.0, 90.0, 99.0, 99.9)
_WIDTH = 36
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def histogram(values: NDArray[np.float32]) -> str:
    """Draw bars of the number of tokens by KL divergence (tokens,) in at most 80 columns.

    The scale is logarithmic. Each row is a third of a decade and begins at the value printed; the
    first row holds everything below 1e-7, including zero and negative values. On the right are the
    percentiles that fall into the row.
    """
    if not values.size:
        return "no tokens"
    edges = (10 ** (np.arange(_LOWEST, _HIGHEST) / 3)).astype(np.float32)
    places = np.clip(np.searchsorted(edges, values, side="right"), 0, _HIGHEST - _LOWEST)
    counts = np.bincount(places)
    marks = np.searchsorted(np.cumsum(counts), np.array(_MARKS) / 100 * (values.size - 1), "right")
    first = int(places.min())
    rows = ["KL divergence tokens"]
    for place, count in enumerate(counts[first:].tolist(), first):
        label = f"{10 ** ((_LOWEST + place - 1) / 3):.1e}" if place else "below"
        names = " ".join(
            f"{mark:g}%" for mark, at in zip(_MARKS, marks, strict=True) if at == place
        )
        bar = _bar(count / int(counts.max()))
        rows.append(f"{label:>8} {count:>11,}  {bar:<{_WIDTH}} {names}".rstrip())
    return "\n".join(rows)


def _bar(share: float) -> str:
    """A bar in eighths of a character; if `share` is not 0, at least one eighth."""
    eighths = max(round(share * _WIDTH * 8), share > 0)
    return (_EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()
