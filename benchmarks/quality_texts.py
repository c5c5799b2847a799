"""The texts that quality is measured on, and the domain of each of their chunks.

An example's `heldout.txt` has the held-out ends of English books, of Chinese novels and of stories,
one after another. `foreign.txt` is of a domain that calibration has not seen: documentation and
Python source of this project, as they were when the file was made.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import UsageError
from dots1_local.evaluate.logits_file import LogitsWriter
from dots1_local.evaluate.perplexity import read_text
from dots1_local.evaluate.scoring import cut, open_engine, score
from dots1_local.evaluate.texts import open_vocabulary
from dots1_local.files.checkpoint import Checkpoint

__all__ = ["FOREIGN", "N_CTX", "domains", "shared_passages", "spread", "write_logits"]

FOREIGN = Path(__file__).with_name("foreign.txt")
N_CTX = 512
_SCORED = 3 * N_CTX // 4  # the middle of the scored half of a chunk
_PASSAGE = 100  # characters that no text has twice by chance


def write_logits(model: Path, text: str, count: int | None, output: Path) -> None:
    """Write a model's logits for `count` chunks of the text to a file."""
    with open_engine(model, N_CTX, threads=1) as engine:
        chunks = spread(cut(engine, text, N_CTX, None), count)
        with LogitsWriter(output, chunks, engine.n_vocab) as writer:
            for ubatch in score(engine, chunks):
                for block in ubatch.blocks:
                    writer.write(block.chunk, block.start, block.logits)


def spread(chunks: NDArray[np.int32], count: int | None) -> NDArray[np.int32]:
    """`count` chunks at equal distances, so that all parts of a text are sampled.

    Raises:
        UsageError: there are not so many.
    """
    if count is None:
        return chunks
    if not 2 <= count <= len(chunks):
        raise UsageError(f"the text has 2 to {len(chunks)} chunks to take")
    places = (np.arange(count) + 0.5) * len(chunks) / count
    return chunks[places.astype(np.int64)]


def domains(example: Path, count: int | None) -> list[str]:
    """The domain of each of `count` chunks of an example's held-out text."""
    ends = _ends(example)
    chunks = spread(np.arange(ends[-1][1] // N_CTX, dtype=np.int32), count)
    middles = (int(chunk) * N_CTX + _SCORED for chunk in chunks)
    return [next(name for name, end in ends if middle < end) for middle in middles]


def _ends(example: Path) -> list[tuple[str, int]]:
    """The domains of the held-out text in order, and the token that each ends before."""
    text = read_text(example / "heldout.txt")
    sizes = json.loads((example / "training.json").read_text())["heldout"]
    ends, stop = [], -1  # a newline is between two domains
    with open_vocabulary(Checkpoint.open(example)) as vocabulary:
        for name, facts in sizes.items():
            stop += 1 + facts["bytes"]
            beginning = text.encode()[:stop].decode()
            ends.append((name, len(vocabulary.tokenize(beginning, special=False, add_bos=True))))
    return ends


def shared_passages(example: Path) -> int:
    """Passages of 100 characters that the text to evaluate on shares with calibration's."""
    heldout, calibration = (
        read_text(example / f"{name}.txt") for name in ("heldout", "calibration")
    )
    seen = {calibration[i : i + _PASSAGE] for i in range(len(calibration) - _PASSAGE + 1)}
    starts = range(len(heldout) - _PASSAGE + 1)
    return sum(heldout[i : i + _PASSAGE] in seen for i in starts)
