"""What each mix costs in quality: perplexity and KL divergence on the example, size on dots.llm1.

    python -m benchmarks.bench_quality examples/dots1-tiny --imatrix FILE DQ4 Q4_K_M
    python -m benchmarks.bench_quality examples/dots1-tiny                     every mix below

KL divergence is from the unquantised (BF16) model's next-token distribution to the mix's, mean ±
standard error over the scored halves of all chunks. Sizes for dots.llm1 are exact: the same
recipe planned on the real geometry.
"""

import argparse
from collections.abc import Iterator
from math import exp
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import Dots1Config
from dots1_local.convert import Conversion
from dots1_local.errors import UsageError
from dots1_local.quant.recipes import Padding, make_plan
from dots1_local.runtime.engine import Engine
from tools.make_wide import published_config

MIXES = (
    "BF16",
    *("DQ6", "Q6_K", "DQ5", "Q5_K_M", "DQ4", "Q4_K_M", "DQ3", "Q3_K_M", "IQ3_XXS"),
    *("DQ2", "DQ2+pad", "Q2_K", "IQ2_XXS"),
)  # fmt: skip
CONTEXT = 512

Rows = NDArray[np.float32]


def log_probabilities(path: Path, text: str, n_chunks: int | None) -> Iterator[tuple[Rows, Rows]]:
    """For each chunk's second half: log p of every token (n, n_vocab), and the true tokens."""
    with Engine.open(path, n_ctx=CONTEXT, all_logits=True) as engine:
        tokens = engine.tokenize(text, special=False)
        for start in range(0, len(tokens) - CONTEXT + 1, CONTEXT)[: n_chunks or None]:
            chunk = tokens[start : start + CONTEXT]
            engine.forget()
            logits = np.concatenate([rows.copy() for rows in engine.decode_all(chunk, 0)])
            scored = logits[CONTEXT // 2 : -1].astype(np.float64)
            scored -= scored.max(axis=1, keepdims=True)
            scored -= np.log(np.exp(scored).sum(axis=1, keepdims=True))
            yield scored.astype(np.float32), np.array(chunk[CONTEXT // 2 + 1 :])


def compare(
    reference: list[tuple[Rows, Rows]], path: Path, text: str
) -> tuple[float, float, float]:
    """Perplexity, mean KL divergence and its standard error."""
    losses, divergences = [], []
    for (whole, _), (found, targets) in zip(
        reference, log_probabilities(path, text, len(reference)), strict=True
    ):
        losses.append(-found[np.arange(len(targets)), targets])
        divergences.append((np.exp(whole) * (whole - found)).sum(axis=1))
    kl = np.concatenate(divergences)
    return exp(np.concatenate(losses).mean()), float(kl.mean()), float(kl.std() / len(kl) ** 0.5)


def real_bytes(conversion: Conversion, mix: str, padding: Padding) -> int:
    """What the same recipe comes to on dots.llm1, with the same decision about padding."""
    real = Dots1Config.from_json(published_config())
    plan = make_plan(
        real,
        mix,
        has_importance=conversion.importance is not None,
        padding=padding,
    )
    return sum(tensor.nbytes for tensor in plan.tensors(real))


def main() -> None:
    """Print a row for every mix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("mixes", nargs="*", default=MIXES, help="NAME or NAME+pad")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--chunks", type=int, help="of 512 tokens of heldout.txt [all]")
    options = parser.parse_intermixed_args()
    text = (options.checkpoint / "heldout.txt").read_text(encoding="utf-8")
    print("| mix | dots.llm1 | example | bpw | perplexity | KL divergence |")
    print("|---|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.gguf"
        Conversion.prepare(options.checkpoint, "BF16").run(whole)
        reference = list(log_probabilities(whole, text, options.chunks))
        for name in options.mixes:
            mix, _, pad = name.partition("+")
            padding: Padding = "on" if pad else "off"
            path = Path(folder) / "mix.gguf"
            try:
                conversion = Conversion.prepare(
                    options.checkpoint, mix, imatrix=options.imatrix, padding=padding
                )
            except UsageError as error:
                print(f"| {name} | {error} |")
                continue
            conversion.run(path, force=True)
            perplexity, kl, error_of_kl = compare(reference, path, text)
            weights = sum(t.spec.source_elements for t in conversion.tensors)
            print(
                f"| {conversion.plan.recipe}{'+pad' * bool(pad)} "
                f"| {real_bytes(conversion, mix, padding) / 1e9:.1f} GB "
                f"| {conversion.nbytes / 1e6:.1f} MB | {conversion.nbytes * 8 / weights:.2f} "
                f"| {perplexity:.3f} | {kl:.5f} ± {error_of_kl:.5f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
