"""Makes imatrix.json: hashes of what the llama-quantize and llama-imatrix programs write.

Only these programs read importance files (the library takes finished numbers), and no package
ships them. Build both from the llama.cpp sources in the sdist of the llama-cpp-python version
that pyproject.toml names (its vendor/llama.cpp folder) and run

    cmake -B build -DLLAMA_OPENSSL=OFF && cmake --build build -t llama-quantize llama-imatrix
    python -m tests.goldens.make_goldens build/bin

The model and the importance files are made here, from numpy's frozen RandomState and exact
arithmetic, so that tests make the same ones and compare only hashes. The encoders are in
libggml-base, which is built for any x86-64: the hashes hold on all of them.
"""

import argparse
import hashlib
import json
import struct
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import inventory
from dots1_local.quant import imatrix_file
from tests.quant import stock_llama
from tests.quant.stock_llama import FULL

CONFIG = replace(
    FULL,
    hidden_size=256, num_hidden_layers=3, num_attention_heads=1, num_key_value_heads=1,
    head_dim=32, intermediate_size=96, moe_intermediate_size=32, n_routed_experts=4,
    n_shared_experts=1, num_experts_per_tok=2, vocab_size=40,
)  # fmt: skip
MIXES = ("Q4_K_M", "Q4_0", "IQ4_XS", "IQ3_XXS", "Q2_K_S")
GOLDENS = Path(__file__).with_name("imatrix.json")
DATASET = "calibration.txt"
CHUNK_SIZE = 512

Floats = NDArray[np.float32]
Entries = dict[str, tuple[Floats, Floats]]


def entries() -> Entries:
    """Sums and counts with everything odd: experts unseen, fractions, all unseen, no entry."""
    random = np.random.RandomState(7)
    found: Entries = {}
    for spec in inventory(CONFIG):
        if spec.role not in ("attention", "dense", "shared", "routed"):
            continue
        experts = spec.shape[0] if spec.role == "routed" else 1
        counts = np.full(experts, 5000, np.float32)
        if spec.role == "routed":
            # llama.cpp rounds 0.4 to none and 6.5 to 7.
            odd = (700, 0.4, 6.5, 0) if spec.name != "blk.2.ffn_down_exps.weight" else (0,) * 4
            counts[:] = odd
        sums = random.randint(1, 1 << 20, (experts, spec.columns)).astype(np.float32)
        sums /= 64
        sums[counts < 0.5] = 0
        found[spec.name] = sums, counts
    del found["blk.2.attn_output.weight"]
    return found


def write_imatrix(path: Path, rounded: bool = False) -> Path:
    """The GGUF form; `rounded` counts are what llama-imatrix makes of it."""
    content = {
        name: (sums, np.floor(counts + 0.5).astype(np.float32) if rounded else counts)
        for name, (sums, counts) in entries().items()
    }
    chunks = 5000 // CHUNK_SIZE
    imatrix_file.write_imatrix(
        path, content, datasets=[DATASET], chunk_count=chunks, chunk_size=CHUNK_SIZE
    )
    return path


def write_dat(path: Path) -> Path:
    """The .dat form, as llama-imatrix converts it: entries without any data are left out."""
    seen = {name: entry for name, entry in sorted(entries().items()) if entry[1].any()}
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(seen)))
        for name, (sums, counts) in seen.items():
            whole = np.floor(counts + 0.5).astype(np.float32)[:, None]
            calls = -(-int(whole.max()) // CHUNK_SIZE)
            mean = np.where(whole > 0, sums / np.maximum(whole, 1), np.float32(1))
            values = (mean * np.float32(calls)).astype("<f4")
            file.write(struct.pack("<i", len(name)) + name.encode())
            file.write(struct.pack("<ii", calls, values.size) + values.tobytes())
        file.write(struct.pack("<ii", 5000 // CHUNK_SIZE, len(DATASET)) + DATASET.encode())
    return path


def write_model(path: Path) -> Path:
    return stock_llama.write_model(path, CONFIG, seed=3)


def short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path, help="folder of llama-quantize and llama-imatrix")
    programs = parser.parse_args().programs.resolve()
    with tempfile.TemporaryDirectory() as name:
        goldens = _goldens(programs, Path(name))
    GOLDENS.write_text(json.dumps(goldens, indent=1) + "\n")


def _goldens(programs: Path, folder: Path) -> dict[str, object]:
    model = write_model(folder / "model.gguf")
    forms = {"gguf": write_imatrix(folder / "in.gguf"), "dat": write_dat(folder / "in.dat")}
    return {
        "llama-imatrix": {form: _converted(programs, forms["gguf"], form) for form in forms},
        "llama-quantize": {
            form: {mix: _quantised(programs, model, imatrix, mix) for mix in MIXES}
            for form, imatrix in forms.items()
        },
    }


def _converted(programs: Path, imatrix: Path, form: str) -> str:
    """Hash of the file llama-imatrix makes of `imatrix`."""
    target = imatrix.with_name(f"converted.{form}")
    # It wants a model by name, but does not open it when it only converts.
    _run(programs / "llama-imatrix", "-m", "none", "--in-file", imatrix, "-o", target,
         "--output-format", form)  # fmt: skip
    return short_hash(target.read_bytes())


def _quantised(programs: Path, model: Path, imatrix: Path, mix: str) -> dict[str, str]:
    """Hash of each tensor that llama-quantize writes."""
    target = model.with_name("out.gguf")
    _run(programs / "llama-quantize", "--imatrix", imatrix, model, target, mix, "2")
    tensors = stock_llama.tensors_of(target)
    return {
        name: short_hash(stock_llama.read_bytes(target, tensor).tobytes())
        for name, tensor in sorted(tensors.items())
    }


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
