"""Convert recipes and compare them with the unquantised example on held-out text.

Results are saved in a folder whose name depends on all inputs, so that an interrupted run is
resumed, and a changed checkpoint or text is measured anew. Delete the folder after a change to
calibration or refinement.
Converted models are deleted once they are measured.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from benchmarks.quality_texts import FOREIGN, domains, spread, write_logits
from dots1_local.architecture import Dots1Config
from dots1_local.calibrate.manifest import (
    IMATRIX,
    REFINED_SENSITIVITY,
    REFINEMENT,
    SENSITIVITY,
)
from dots1_local.convert import convert_checkpoint
from dots1_local.evaluate.divergence import Estimate
from dots1_local.evaluate.kl_divergence import kl_divergence
from dots1_local.evaluate.perplexity import read_text
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.quant.plan import QuantPlan
from dots1_local.quant.sensitivity import Sensitivity, load_sensitivity

__all__ = ["Example", "Quality", "say"]

_TOGETHER = 8  # plans refined in one pass

Figures = NDArray[np.float32]


@dataclass(frozen=True)
class Quality:
    """A recipe's KL divergence from the unquantised model on held-out text, in nats a token.

    `percentile` is the 99th, `same_top` a share of tokens, `nbytes` the file's size; `per_token`
    is (chunks, scored tokens). `by_domain` has the same figures by domain, and those of the foreign
    text, if it was evaluated.
    """

    nbytes: int
    kl: Estimate
    percentile: float
    same_top: Estimate
    per_token: Figures
    by_domain: Mapping[str, Figures]


@dataclass(frozen=True)
class Example:
    """A checkpoint with `calibration.txt` and `heldout.txt`, and the folder of its results.

    `chunks` of the held-out text are evaluated, spread evenly over it; None takes all. So are
    `foreign` chunks of the foreign text.
    """

    path: Path
    work: Path
    chunks: int | None
    workers: int
    foreign: int = 0

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
        for file in (*files, *texts, FOREIGN):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        folder = self.work / f"{self.name}-{digest.hexdigest()[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def calibrated(self) -> Path:
        """The calibration folder; it is measured if it does not exist."""
        folder = self.folder / "calibrated"
        if not (folder / REFINEMENT).exists():
            say(f"{self.name}: calibrating")
            dots1 = str(Path(sys.executable).with_name("dots1"))
            text = str(self.path / "calibration.txt")
            command = [dots1, "calibrate", str(self.path), "-o", str(folder), "-f", text]
            subprocess.run([*command, "--refine"], check=True, stdout=sys.stderr)
        return folder

    @cached_property
    def sensitivity(self) -> Sensitivity:
        return load_sensitivity(self.calibrated / SENSITIVITY)

    @cached_property
    def refined_sensitivity(self) -> Sensitivity:
        return load_sensitivity(self.calibrated / REFINED_SENSITIVITY)

    @cached_property
    def calibration_chunks(self) -> int:
        """The chunks of the calibration text."""
        with safe_open(self.calibrated / REFINEMENT, framework="numpy") as file:
            return int(file.get_slice("tokens").get_shape()[0])

    def with_fewer_tokens(self, chunks: int) -> Path:
        """The calibration folder with `chunks` of its text for the second moments of inputs.

        Importance and the moments of gradients stay those of all the text.
        """
        folder = self.folder / f"calibrated-{chunks}"
        if not (folder / REFINEMENT).exists():
            folder.mkdir(exist_ok=True)
            shutil.copy(self.calibrated / IMATRIX, folder)
            with safe_open(self.calibrated / REFINEMENT, framework="numpy") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
            tensors["tokens"] = spread(tensors["tokens"], chunks)
            save_file(tensors, folder / "unfinished", metadata)
            os.replace(folder / "unfinished", folder / REFINEMENT)
        return folder

    @cached_property
    def bases(self) -> dict[str, Path]:
        """The BF16 conversion's logits files for the chunks of each text to evaluate."""
        texts = {f"base-{self.chunks or 'all'}.kld": (self.path / "heldout.txt", self.chunks)}
        if self.foreign:
            texts[f"foreign-{self.foreign}.kld"] = (FOREIGN, self.foreign)
        missing = [name for name in texts if not (self.folder / name).exists()]
        if missing:
            say(f"{self.name}: the unquantised model's logits")
            model = self.folder / f"{missing[0]}.gguf"
            convert_checkpoint(self.path, model, "BF16", force=True)
            for name in missing:
                text, count = texts[name]
                write_logits(model, read_text(text), count, self.folder / name)
            model.unlink()
        paths = [self.folder / name for name in texts]
        return dict(zip(("heldout", "foreign"), paths, strict=False))

    @cached_property
    def domains(self) -> list[str]:
        """The domain of each chunk of held-out text to evaluate."""
        return domains(self.path, self.chunks)

    def measure(self, plans: Sequence[QuantPlan], refine: Path | None = None) -> list[Quality]:
        """The quality of every plan; earlier results are read from disk.

        With `refine`, which is a calibration folder, the files are refined.
        """
        known = _Inputs(self.path, self.calibrated / IMATRIX, refine, self.bases)
        records = [self.folder / f"{known.digest(plan)}.json" for plan in plans]
        missing = {r: plan for r, plan in zip(records, plans, strict=True) if not r.exists()}
        size = min(_TOGETHER, -(-len(missing) // self.workers)) if refine else 1
        todo = list(missing.items())
        batches = [dict(todo[start : start + size]) for start in range(0, len(todo), size or 1)]
        # At this size two models on one thread each are faster than one after the other on two.
        pool = ProcessPoolExecutor(self.workers, get_context("spawn"))
        try:
            texts = [{r: plan.to_json() for r, plan in batch.items()} for batch in batches]
            running = [
                (batch, pool.submit(_measure, known, text))
                for batch, text in zip(batches, texts, strict=True)
            ]
            for number, (batch, result) in enumerate(running, 1):
                for plan, kl in zip(batch.values(), result.result(), strict=True):
                    done = f"{self.name} {number}/{len(running)}"
                    say(f"{done}: {plan.recipe}{', refined' * bool(refine)} {kl:.5f}")
        finally:
            pool.shutdown(cancel_futures=True)
        return [_read(record, self.domains) for record in records]


def say(what: str) -> None:
    """Print progress to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Inputs:
    """What the files of a checkpoint are made with, and the bases that they are compared with."""

    checkpoint: Path
    imatrix: Path
    refine: Path | None
    bases: Mapping[str, Path]

    def digest(self, plan: QuantPlan) -> str:
        """Identify what the results depend on, beside the checkpoint and its texts."""
        files = [self.imatrix, *([self.refine / REFINEMENT] if self.refine else [])]
        sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        names = [base.name for base in self.bases.values()]
        inputs = (plan.expert_width, sorted(plan.types.items()), sums, names)
        return hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]

    def convert(self, plans: Mapping[Path, QuantPlan], work: Path) -> dict[Path, int]:
        """Write the files, and return their bytes."""
        if self.refine:
            from benchmarks.refine_together import refine_together  # imports torch

            return refine_together(self.checkpoint, self.refine, plans, work)
        return {path: self._plain(path, plan) for path, plan in plans.items()}

    def _plain(self, path: Path, plan: QuantPlan) -> int:
        return convert_checkpoint(
            self.checkpoint, path, plan, imatrix=self.imatrix, threads=1, force=True
        ).nbytes


def _measure(inputs: _Inputs, texts: Mapping[Path, str]) -> list[float]:
    """Convert and compare in a new process, and save the results to the records that are given
    with the plans' texts; return the mean KL divergences."""
    plans = {record: QuantPlan.from_json(text) for record, text in texts.items()}
    first = next(iter(plans))
    models = {record.with_suffix(".gguf"): plan for record, plan in plans.items()}
    written = inputs.convert(models, first.with_suffix(".work"))
    return [
        _compare(inputs, plan, record, model, written[model])
        for (record, plan), model in zip(plans.items(), models, strict=True)
    ]


def _compare(inputs: _Inputs, plan: QuantPlan, record: Path, model: Path, nbytes: int) -> float:
    found = {
        name: kl_divergence(model, logits=base, threads=1) for name, base in inputs.bases.items()
    }
    model.unlink()
    heldout = found["heldout"]
    per_token = {name: each.per_token.reshape(each.chunks, -1) for name, each in found.items()}
    np.savez(record.with_suffix(".npz"), allow_pickle=False, **per_token)
    facts = {
        "recipe": plan.recipe,
        "refined": inputs.refine is not None,
        "nbytes": nbytes,
        "kl": [heldout.kl_divergence.value, heldout.kl_divergence.error],
        "percentile": heldout.kl_percentiles[99.0],
        "same_top": [heldout.same_top.value, heldout.same_top.error],
        "plan": json.loads(plan.to_json()),
    }
    unfinished = record.with_suffix(".tmp")
    unfinished.write_text(json.dumps(facts))
    os.replace(unfinished, record)
    return heldout.kl_divergence.value


def _read(record: Path, labels: Sequence[str]) -> Quality:
    facts = json.loads(record.read_text())
    kl, same_top = (Estimate(*facts[key]) for key in ("kl", "same_top"))
    with np.load(record.with_suffix(".npz")) as figures:
        per_token, by_domain = figures["heldout"], {}
        for name in dict.fromkeys(labels):
            by_domain[name] = per_token[[label == name for label in labels]]
        if "foreign" in figures:
            by_domain["foreign"] = figures["foreign"]
    return Quality(facts["nbytes"], kl, facts["percentile"], same_top, per_token, by_domain)
