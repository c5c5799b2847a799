"""What each mix costs in quality: perplexity and KL divergence on the example, size on dots.llm1.

    python -m benchmarks.bench_mixes examples/dots1-tiny --imatrix FILE DQ4 Q4_K_M
    python -m benchmarks.bench_mixes examples/dots1-tiny                     every mix below

KL divergence is from the unquantised (BF16) model's next-token distribution to the mix's, mean ±
standard error over the scored halves of all chunks. Sizes for dots.llm1 are exact: the same
recipe planned on the real geometry.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from dots1_local.architecture import Dots1Config
from dots1_local.convert import Conversion
from dots1_local.errors import UsageError
from dots1_local.evaluate.kl_divergence import kl_divergence
from dots1_local.evaluate.perplexity import perplexity, read_text
from dots1_local.quant.recipes import Padding, make_plan
from tools.make_wide import published_config

MIXES = (
    "BF16",
    *("DQ6", "Q6_K", "DQ5", "Q5_K_M", "DQ4", "Q4_K_M", "DQ3", "Q3_K_M", "IQ3_XXS"),
    *("DQ2", "DQ2+pad", "Q2_K", "IQ2_XXS"),
)  # fmt: skip


def split_name(name: str) -> tuple[str, Padding]:
    """The recipe and the padding that NAME or NAME+pad stands for."""
    mix, _, pad = name.partition("+")
    return mix, "on" if pad else "off"


def prepare(checkpoint: Path, name: str, imatrix: Path | None) -> Conversion:
    """The conversion of a mix by NAME or NAME+pad."""
    mix, padding = split_name(name)
    return Conversion.prepare(checkpoint, mix, imatrix=imatrix, padding=padding)


def real_bytes(name: str, *, has_importance: bool) -> int:
    """What the same recipe comes to on dots.llm1, with the same decision about padding."""
    mix, padding = split_name(name)
    real = Dots1Config.from_json(published_config())
    plan = make_plan(real, mix, has_importance=has_importance, padding=padding)
    return sum(tensor.nbytes for tensor in plan.tensors(real))


def row(conversion: Conversion, name: str, path: Path, base: Path) -> str:
    """A mix's line of the table; `path` is where it is converted to."""
    conversion.run(path, force=True)
    found = kl_divergence(path, logits=base)
    weights = sum(tensor.spec.source_elements for tensor in conversion.tensors)
    size = real_bytes(name, has_importance=conversion.importance is not None)
    kl = found.kl_divergence
    return (
        f"| {conversion.plan.recipe}{'+pad' * name.endswith('+pad')} | {size / 1e9:.1f} GB "
        f"| {conversion.nbytes / 1e6:.1f} MB | {conversion.nbytes * 8 / weights:.2f} "
        f"| {found.perplexity.value:.3f} | {kl.value:.5f} ± {kl.error:.5f} |"
    )


def main() -> None:
    """Print a row for every mix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("mixes", nargs="*", default=MIXES, help="NAME or NAME+pad")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--chunks", type=int, help="of 512 tokens of heldout.txt [all]")
    options = parser.parse_intermixed_args()
    text = read_text(options.checkpoint / "heldout.txt")
    print("| mix | dots.llm1 | example | bpw | perplexity | KL divergence |")
    print("|---|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        path, base = Path(folder) / "mix.gguf", Path(folder) / "base.kld"
        Conversion.prepare(options.checkpoint, "BF16").run(path)
        perplexity(path, text, n_chunks=options.chunks, save_logits=base)
        for name in options.mixes:
            try:
                conversion = prepare(options.checkpoint, name, options.imatrix)
            except UsageError as error:
                print(f"| {name} | {error} |")
                continue
            print(row(conversion, name, path, base), flush=True)


if __name__ == "__main__":
    main()
