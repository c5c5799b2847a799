"""Makes calibrate.imatrix: some of what llama-imatrix measures on the example model.

Build it from the sources that make_goldens.py names (target llama-imatrix) and run

    python -m tests.goldens.make_calibrate_goldens build/bin/llama-imatrix

It runs on the F32 conversion with an F32 cache and without flash attention, so that nothing is
rounded, on 4 chunks of 512 tokens: chunks go by fours, and of a lesser rest llama-imatrix leaves
out batches of fewer than 16 tokens. Every eighth column is kept.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from dots1_local.convert import convert_checkpoint
from dots1_local.quant.imatrix_file import load_importance, write_imatrix

GOLDEN = Path(__file__).with_name("calibrate.imatrix")
CHUNKS, N_CTX, STEP = 4, 512, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path, help="llama-imatrix")
    parser.add_argument("--example", type=Path, default=Path("examples/dots1-tiny"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert_checkpoint(arguments.example, folder / "model.gguf", "F32")
        command = [
            arguments.program.resolve(), "-m", folder / "model.gguf", "-o", folder / "out.gguf",
            "-f", arguments.example / "heldout.txt", "-c", str(N_CTX), "--chunks", str(CHUNKS),
            "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-ppl",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        _thin(folder / "out.gguf")


def _thin(path: Path) -> None:
    measured = load_importance(path)
    entries = {
        name: (measured.sums(name)[:, ::STEP], tensor.counts)
        for name, tensor in measured.tensors.items()
    }
    write_imatrix(
        GOLDEN,
        entries,
        datasets=["heldout.txt"],
        chunk_count=measured.chunk_count,
        chunk_size=measured.chunk_size,
    )


if __name__ == "__main__":
    main()
