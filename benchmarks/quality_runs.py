"""Convert recipes and compare them with the unquantised example on held-out text.

Results are saved in a folder whose name depends on all inputs, so that an interrupted run is
resumed, and a changed checkpoint or text is measured anew. Delete the folder after a change to
calibration itself.
Converted models are deleted once they are measured.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import Dots1Config
from dots1_local.convert import convert_checkpoint
from dots1_local.errors import UsageError
from dots1_local.evaluate.divergence import Estimate
from dots1_local.evaluate.logits_file import LogitsWriter
from dots1_local.evaluate.perplexity import kl_divergence, read_text
from dots1_local.evaluate.scoring import cut, open_engine, score
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.quant.plan import QuantPlan
from dots1_local.quant.sensitivity import Sensitivity, load_sensitivity

__all__ = ["Example", "Quality", "say"]

_N_CTX = 512
_PASSAGE = 100  # characters that no text has twice by chance


@dataclass(frozen=True)
class Quality:
    """A recipe's KL divergence from the unquantised model, in nats a token.

    `percentile` is the 99th, `same_top` a share of tokens, `nbytes` the file's size; `per_token`
    is (chunks, scored tokens).
    """

    nbytes: int
    kl: Estimate
    percentile: float
    same_top: Estimate
    per_token: NDArray[np.float32]


@dataclass(frozen=True)
class Example:
    """A checkpoint with `calibration.txt` and `heldout.txt`, and the folder of its results.

    `chunks` of the held-out text are evaluated, spread evenly over it; None takes all.
    """

    path: Path
    work: Path
    chunks: int | None
    workers: int

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def config(self) -> Dots1Config:
        return Checkpoint.open(self.path).config

    @cached_property
    def folder(self) -> Path:
        """The part of the work folder for this checkpoint, its texts and the encoders."""
        files = (p for p in sorted(self.path.iterdir()) if p.suffix in (".json", ".safetensors"))
        texts = (self.path / f"{text}.txt" for text in ("calibration", "heldout"))
        digest = hashlib.sha256(f"{version('dots1-local')} {version('llama-cpp-python')}".encode())
        for file in (*files, *texts):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        folder = self.work / f"{self.name}-{digest.hexdigest()[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def imatrix(self) -> Path:
        """The importance file; it is measured if it does not exist."""
        folder = self.folder / "calibrated"
        if not (folder / "sensitivity.json").exists():
            say(f"{self.name}: calibrating")
            dots1 = str(Path(sys.executable).with_name("dots1"))
            text = str(self.path / "calibration.txt")
            command = [dots1, "calibrate", str(self.path), "-o", str(folder), "-f", text]
            subprocess.run(command, check=True, stdout=sys.stderr)
        return folder / "imatrix.gguf"

    @cached_property
    def sensitivity(self) -> Sensitivity:
        return load_sensitivity(self.imatrix.with_name("sensitivity.json"))

    @cached_property
    def base(self) -> Path:
        """The BF16 conversion's logits file for the chunks to evaluate."""
        path = self.folder / f"base-{self.chunks or 'all'}.kld"
        if not path.exists():
            say(f"{self.name}: the unquantised model's logits")
            model = path.with_suffix(".gguf")
            convert_checkpoint(self.path, model, "BF16", force=True)
            write_logits(model, read_text(self.path / "heldout.txt"), self.chunks, path)
            model.unlink()
        return path

    def shared_passages(self) -> int:
        """Passages of 100 characters that the text to evaluate on shares with calibration's."""
        heldout, calibration = (
            read_text(self.path / f"{name}.txt") for name in ("heldout", "calibration")
        )
        seen = {calibration[i : i + _PASSAGE] for i in range(len(calibration) - _PASSAGE + 1)}
        starts = range(len(heldout) - _PASSAGE + 1)
        return sum(heldout[i : i + _PASSAGE] in seen for i in starts)

    def measure(self, plans: Sequence[QuantPlan]) -> list[Quality]:
        """The quality of every plan; earlier results are read from disk."""
        base, imatrix = self.base, self.imatrix
        importance = hashlib.sha256(imatrix.read_bytes()).hexdigest()
        records = [self.folder / f"{_digest(plan, importance, base)}.json" for plan in plans]
        missing = {
            record: plan for record, plan in zip(records, plans, strict=True) if not record.exists()
        }
        # At this size two models on one thread each are faster than one after the other on two.
        pool = ProcessPoolExecutor(self.workers, get_context("spawn"))
        try:
            running = [
                (plan, pool.submit(_measure, self.path, plan.to_json(), imatrix, base, record))
                for record, plan in missing.items()
            ]
            for number, (plan, result) in enumerate(running, 1):
                say(f"{self.name} {number}/{len(running)}: {plan.recipe} {result.result():.5f}")
        finally:
            pool.shutdown(cancel_futures=True)
        return [_read(record) for record in records]


def write_logits(model: Path, text: str, count: int | None, output: Path) -> None:
    """Write a model's logits for `count` chunks of the text to a file."""
    with open_engine(model, _N_CTX, None) as engine:
        chunks = spread(cut(engine, text, _N_CTX, None), count)
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
        raise UsageError(f"the held-out text has 2 to {len(chunks)} chunks to evaluate")
    places = (np.arange(count) + 0.5) * len(chunks) / count
    return chunks[places.astype(np.int64)]


def say(what: str) -> None:
    """Print progress to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def _digest(plan: QuantPlan, importance: str, base: Path) -> str:
    inputs = (plan.expert_width, sorted(plan.types.items()), importance, base.name)
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]


def _measure(checkpoint: Path, plan_json: str, imatrix: Path, base: Path, record: Path) -> float:
    """Convert and compare in a new process, and save the result; return the mean KL divergence."""
    model = record.with_suffix(".gguf")
    plan = QuantPlan.from_json(plan_json)
    result = convert_checkpoint(checkpoint, model, plan, imatrix=imatrix, threads=1, force=True)
    found = kl_divergence(model, logits=base, threads=1)
    model.unlink()
    np.save(record.with_suffix(".npy"), found.per_token.reshape(found.chunks, -1))
    facts = {
        "recipe": plan.recipe,
        "nbytes": result.nbytes,
        "kl": [found.kl_divergence.value, found.kl_divergence.error],
        "percentile": found.kl_percentiles[99.0],
        "same_top": [found.same_top.value, found.same_top.error],
        "plan": json.loads(plan_json),
    }
    unfinished = record.with_suffix(".tmp")
    unfinished.write_text(json.dumps(facts))
    os.replace(unfinished, record)
    return found.kl_divergence.value


def _read(record: Path) -> Quality:
    facts = json.loads(record.read_text())
    kl, same_top = (Estimate(*facts[key]) for key in ("kl", "same_top"))
    per_token = np.load(record.with_suffix(".npy"))
    return Quality(facts["nbytes"], kl, facts["percentile"], same_top, per_token)
