"""What the dynamic mixes cost in quality, and that no stock mix of their size costs less.

    python -m pytest -m perplexity -n auto

Measured on the example against its BF16 conversion; sizes are those on dots.llm1. Each mix is
converted and measured once, whichever process of pytest-xdist comes first.
"""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.bench_mixes import prepare, real_bytes
from dots1_local.evaluate.kl_divergence import kl_divergence
from dots1_local.evaluate.perplexity import perplexity, read_text
from dots1_local.quant.stock import STOCK_MIXES

CHUNKS = 16  # of 512 tokens; 4080 of them are scored
# Mean KL divergence, a tenth above what was measured: other processors round otherwise.
BOUNDS = {
    "DQ2": 0.0264, "DQ2+pad": 0.0297, "DQ3": 0.0090, "DQ4": 0.0031, "DQ5": 0.00154, "DQ6": 0.00107,
}  # fmt: skip
WITHOUT_IMPORTANCE = {
    "DQ2": 0.0215, "DQ2+pad": 0.0243, "DQ3": 0.0083, "DQ4": 0.0034, "DQ5": 0.00177, "DQ6": 0.00094,
}  # fmt: skip
# The example's rows of 704 are no blocks of Q1_0, which stock has no other type for.
STOCK = sorted({mix.name for mix in STOCK_MIXES.values() if mix.quantised} - {"Q1_0"})

Measure = Callable[..., float]

pytestmark = pytest.mark.perplexity


@pytest.fixture(scope="session")
def measure(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Mean KL divergence of a mix by NAME or NAME+pad, with the example's importance or without."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    base = folder / "mixes-base.kld"

    def write_base() -> None:
        path = folder / "mixes-base.gguf"
        prepare(tiny, "BF16", None).run(path, threads=1)
        text = read_text(tiny / "heldout.txt")
        perplexity(path, text, n_chunks=CHUNKS, save_logits=base, threads=1)

    def made(name: str, importance: bool = True) -> float:
        label = f"mixes-{name}-{importance}"
        path, result = folder / f"{label}.gguf", folder / f"{label}.json"

        def write_result() -> None:
            once(base, write_base)
            prepare(tiny, name, tiny / "imatrix.gguf" if importance else None).run(path, threads=1)
            found = kl_divergence(path, logits=base, threads=1).kl_divergence.value
            path.unlink()
            result.write_text(json.dumps(found))

        once(result, write_result)
        return float(json.loads(result.read_text()))

    return made


def once(path: Path, make: Callable[[], None]) -> None:
    """Have `path` made by one process; the others wait for it."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make()


@pytest.mark.parametrize("name", BOUNDS)
def test_a_dynamic_mix_keeps_its_quality(measure: Measure, name: str) -> None:
    assert measure(name) < BOUNDS[name]


@pytest.mark.parametrize("name", WITHOUT_IMPORTANCE)
def test_a_dynamic_mix_keeps_its_quality_without_importance(measure: Measure, name: str) -> None:
    assert measure(name, importance=False) < WITHOUT_IMPORTANCE[name]


@pytest.mark.parametrize("name", STOCK)
def test_no_stock_mix_is_as_small_and_as_good(measure: Measure, name: str) -> None:
    size = real_bytes(name, has_importance=True)
    found = measure(name)
    for ours in BOUNDS:
        if size <= real_bytes(ours, has_importance=True):
            assert found > measure(ours), f"{name} is no larger than {ours}, and better"
