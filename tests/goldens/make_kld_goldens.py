"""Makes base.kld, perplexity.txt, kl_divergence.txt: what llama-perplexity makes of two models.

Build it from the sources that make_goldens.py names (target llama-perplexity) and run

    python -m tests.goldens.make_kld_goldens build/bin/llama-perplexity

The models' logits are exact in float32 in whatever order they are summed, so that the file and the
text are the same on every processor: layers add nothing, embeddings are vectors of 1 and -1, which
the last norm leaves alone, and the head holds multiples of 1/64. The vocabulary is odd, for the
padding of rows.
"""

import argparse
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dots1_local.evaluate.logits_file import LogitsFile
from tests.helpers import CONFIG, TYPES, scripted_tensors, write_random_gguf

BASE = Path(__file__).with_name("base.kld")
PRINTED = Path(__file__).with_name("kl_divergence.txt")
ESTIMATE = Path(__file__).with_name("perplexity.txt")  # the base model's
N_VOCAB = CONFIG.vocab_size - 1
N_CTX = 64
LENGTH = 300  # 4 chunks and a rest; 31 tokens of each are scored
# No merge applies to these, and every byte of them is a token of that number.
CHARACTERS = [chr(c) for c in (*range(33, 104), *range(109, 127), *range(0xA1, 0x180))]

Ints = NDArray[np.int64]


def embedding() -> Ints:
    """(n_vocab, hidden_size) of 1 and -1."""
    return np.random.RandomState(1).randint(0, 2, (N_VOCAB, CONFIG.hidden_size)) * 2 - 1


def head(noisy: bool) -> Ints:
    """(n_vocab, hidden_size) in units of 1/64; logits get a deviation of 2.5.

    The noise is of rank 1: none after some tokens, a deviation of 1 after others.
    """
    random = np.random.RandomState(2)
    exact = np.rint(random.normal(0, 20, (N_VOCAB, CONFIG.hidden_size))).astype(int)
    noise = np.rint(random.normal(0, 2.4, N_VOCAB)).astype(int)
    if noisy:
        exact += np.outer(noise, random.randint(0, 2, CONFIG.hidden_size) * 2 - 1)
    return exact


def exact_logits(tokens: NDArray[np.int32], noisy: bool) -> NDArray[np.float32]:
    """What the model computes after each of the tokens: (*tokens.shape, n_vocab)."""
    units = embedding()[tokens] @ head(noisy).T
    return (units / 64).astype(np.float32)


def write_model(path: Path, noisy: bool) -> Path:
    """The base model, or the same with noise on its head."""
    tensors = scripted_tensors([]) | {
        "token_embd.weight": embedding().astype(np.float32),
        "output.weight": (head(noisy) / 64).astype(np.float32),
    }
    return write_random_gguf(path, tensors=tensors, types=TYPES[:N_VOCAB], rms_norm_eps=0)


def text() -> str:
    """Characters that the base model finds rather likely, each the best of some random ones."""
    random = np.random.RandomState(3)
    table = embedding() @ head(noisy=False).T
    written = b"A"
    while len(written) < LENGTH:
        choice = [CHARACTERS[i].encode() for i in random.randint(0, len(CHARACTERS), 20)]
        written += max(choice, key=lambda added: _mean_logit(table, written[-1:] + added))
    return written.decode()


def _mean_logit(table: Ints, after: bytes) -> float:
    return sum(int(table[pair]) for pair in pairwise(after)) / (len(after) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path, help="llama-perplexity")
    program = parser.parse_args().program.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, noisy = (write_model(folder / f"{n}.gguf", n) for n in (False, True))
        (folder / "text").write_text(text())
        common = ["-c", str(N_CTX), "-t", "1", "--kl-divergence-base", str(BASE)]
        logged = _run(program, "-m", base, "-f", folder / "text", *common).stderr
        printed = _run(program, "-m", noisy, "--kl-divergence", *common).stdout
    ESTIMATE.write_text(logged[logged.index("Final estimate") :].splitlines()[0] + "\n")
    PRINTED.write_text(printed[printed.index("======") :].rstrip() + "\n", encoding="utf-8")
    with LogitsFile.open(BASE) as file:
        assert bytes(file.tokens.reshape(-1).tolist()) == text().encode()[: file.tokens.size]


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    main()
