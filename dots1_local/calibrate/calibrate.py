"""Calibration: a forward pass over a checkpoint measures importance and writes reference logits;
a backward pass measures sensitivity.

All tokens pass layer n; then its weights are dropped, and what was measured is saved. Memory holds
the residual stream twice (32 KiB per token of dots.llm1) and the part of a layer that all tokens
use (0.8 GB for dots.llm1's dense layer, 0.4 GB for the others; twice that for sensitivity, exact
and rounded), whatever the number of layers. The backward pass needs no residual stream.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dots1_local.architecture import inventory
from dots1_local.calibrate.calibration_folder import CalibrationFolder
from dots1_local.calibrate.calibration_results import (
    measure_reference_kl,
    write_imatrix_file,
    write_routing,
    write_sensitivity,
)
from dots1_local.calibrate.coverage import FEW_TOKENS, Coverage
from dots1_local.calibrate.forward import PROBED, ForwardPass, probed_first
from dots1_local.calibrate.manifest import (
    IMATRIX,
    MANIFEST,
    REFINED_SENSITIVITY,
    REFINEMENT,
    ROUTING,
    SENSITIVITY,
    manifest_json,
)
from dots1_local.calibrate.probe import BACKWARD_WORK
from dots1_local.calibrate.refinement_file import refinement_bytes
from dots1_local.errors import UsageError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.partial_file import disk_errors
from dots1_local.hub import HubCheckpoint
from dots1_local.hub.model_digest import model_digest
from dots1_local.hub.pass_shards import (
    HEAD,
    backward_steps,
    forward_steps,
    open_shards,
)
from dots1_local.progress import Progress, silent
from dots1_local.reference.model import Compute
from dots1_local.refine.token_needs import require_tokens

__all__ = ["LogitsSink", "calibrate", "find_device"]

Floats = NDArray[np.float32]
Tokens = NDArray[np.int32]
Precision = Literal["F32", "BF16"]


class LogitsSink(AbstractContextManager["LogitsSink", None], Protocol):
    """Keeps logits, if its `with` block ends without an exception; `LogitsWriter` is one."""

    def write(self, chunk: int, start: int, logits: Floats, /) -> None:
        """Take logits (n, n_vocab) of a chunk's scored rows from row `start` on."""


def calibrate(
    checkpoint: Checkpoint,
    folder: str | Path,
    tokens: Tokens,
    *,
    evaluation: Tokens | None = None,
    logits: LogitsSink | None = None,
    sensitivity: bool = True,
    refine: bool = False,
    datasets: Sequence[str] = (),
    device: str | None = None,
    precision: Precision = "F32",
    threads: int | None = None,
    least: int = FEW_TOKENS,
    force: bool = False,
    low_disk: bool = False,
    progress: Progress = silent,
    on_resume: Progress = silent,
    notify: Callable[[str], None] = lambda sentence: None,
) -> list[Coverage]:
    """Measure the importance of every matrix (`folder`/imatrix.gguf), and the effects of each type
    on it (`folder`/sensitivity.json), with `tokens` (chunks, n_ctx). With `refine`, also measure
    what the refining of matrices needs (`folder`/refinement.safetensors), and the effects of each
    type if matrices are refined (`folder`/sensitivity-refined.json). The experts that tokens choose
    are recorded, too (`folder`/routing.safetensors).

    `evaluation` are more chunks of the same length; the logits of their scored tokens go to
    `logits`. A run that was killed is resumed after the last layer that it finished; `on_resume` is
    then called with the finished layers of the pass and their total. By default `device` is a GPU
    if there is one. With BF16, activations are rounded before each multiplication, which CPUs with
    AVX512-BF16 or AMX compute several times faster.

    The importance of experts with fewer than `least` tokens is drawn to their layer's mean (see
    `shrink`); 0 leaves it as llama-imatrix computes it. Returns the coverage of each layer.

    The shards of a checkpoint on the hub are fetched into its cache first; with `low_disk` they are
    fetched into the folder when a layer needs them, and removed after it. Then the backward pass
    fetches them again, and `notify` hears beforehand how many bytes a pass fetches.

    Raises:
        CheckpointError: the checkpoint is incomplete or corrupt, a result is NaN or infinite, or
            the hub cannot be reached or sends damaged files.
        UsageError: there are no tokens, or too few to refine; chunks are too long, the device is
            unknown, or `low_disk` is given for a folder.
        Dots1Error: a result exists, or an unfinished run with other inputs, and `force` is not set;
            the disk is full; the folder is not writable; a file of the unfinished run is damaged;
            there is too little memory.
    """
    evaluated = tokens[:0] if evaluation is None else evaluation
    if refine and not (sensitivity and len(tokens)):
        raise UsageError("refine needs a calibration text, and the passes that measure sensitivity")
    _check(checkpoint, np.concatenate([tokens, evaluated]))
    if refine:
        require_tokens(checkpoint.config, tokens.size)
    compute = Compute(find_device(device), precision == "BF16")
    if threads is not None:
        torch.set_num_threads(threads)
    probed = min(len(tokens), max(1, PROBED // tokens.shape[1])) if sensitivity else 0
    text, tokens = tokens, tokens[probed_first(len(tokens), probed)]
    forward = ForwardPass(checkpoint, tokens, evaluated, probed, compute, threads, refine)
    digest = model_digest(checkpoint)
    opened = CalibrationFolder(
        Path(folder),
        _identity(forward, least, refine),
        forward.shape,
        checkpoint.config.num_hidden_layers,
        forward.probe_bytes,
        refinement_bytes(checkpoint.config) if refine else 0,
        force=force,
        results=[IMATRIX] * (len(tokens) > 0)
        + [SENSITIVITY] * (probed > 0)
        + [REFINEMENT, REFINED_SENSITIVITY] * refine
        + [ROUTING] * (len(forward.routed_layers) > 0)
        + [MANIFEST] * (len(tokens) > 0),
    )
    with opened, forward.memory_errors():
        _report_resumed(opened, checkpoint.config.num_hidden_layers, on_resume)
        passes = _passes(opened, checkpoint.config.num_hidden_layers, probed > 0)
        with disk_errors(opened.path):
            shards = open_shards(
                checkpoint, opened.shards, [*passes.values()], opened.need,
                low_disk=low_disk, progress=progress,
            )  # fmt: skip
        forward = replace(forward, checkpoint=shards.checkpoint)
        shards.announce(passes, notify)
        with logits or nullcontext() as sink:
            with shards.over(passes.pop("the forward pass")) as provide:
                work = BACKWARD_WORK * forward.probed_tokens
                x = forward.run(opened, _part(progress, 0, work), provide)
                covered = (
                    write_imatrix_file(forward, x, opened, datasets, least) if len(tokens) else []
                )
                if forward.routed_layers:
                    write_routing(forward, opened, digest)
                if refine:
                    forward.sample_head(x, opened)
                if probed:
                    reference_kl = measure_reference_kl(forward, x)
            shards.announce(passes, notify)
            if probed:
                with shards.over(passes["the backward pass"]) as provide:
                    backward = _part(progress, forward.tokens.size, 0)
                    kept = text if refine else None
                    probes = forward.exact_probes(x).to(compute.device)
                    write_sensitivity(
                        forward, probes, reference_kl, opened, kept, backward, provide
                    )
            if sink is not None:
                with shards.over([HEAD]) as provide:
                    provide(HEAD, lambda waiting: None)
                    for chunk, start, rows in forward.logits(x):
                        sink.write(chunk, start, rows)
        if len(tokens):
            _write_manifest(opened, checkpoint.name, digest)
        opened.publish()
    return covered


def _identity(forward: ForwardPass, least: int, refine: bool) -> str:
    """What must agree for a run to be resumed."""
    # The effects depend on the importance that the encoders used, and so on `least`.
    parts = [forward.identity(), *[str(least)] * (forward.probed > 0), *["refine"] * refine]
    if isinstance(forward.checkpoint, HubCheckpoint):
        parts.append(forward.checkpoint.fingerprint)
    return " ".join(parts)


def _passes(folder: CalibrationFolder, layers: int, probed: bool) -> dict[str, list[str]]:
    """The steps that are left of the passes over the layers."""
    passes = {"the forward pass": forward_steps(layers, folder.finished)}
    if probed:
        passes["the backward pass"] = backward_steps(layers, folder.probe.reached(layers))
    return passes


def _write_manifest(folder: CalibrationFolder, name: str, digest: str) -> None:
    measured = [folder.draft(result) for result in folder.results if result != MANIFEST]
    with disk_errors(folder.path):
        manifest = manifest_json(name, digest, measured)
        folder.draft(MANIFEST).write_text(manifest, encoding="utf-8")


def _report_resumed(folder: CalibrationFolder, layers: int, on_resume: Progress) -> None:
    reached = folder.probe.reached(layers)
    if folder.finished == layers and reached is not None:
        on_resume(layers - reached, layers, "layers of the backward pass", "")
    elif folder.finished:
        on_resume(folder.finished, layers, "layers", "")


def _part(progress: Progress, before: int, after: int) -> Progress:
    """Report a part of the work to `progress`, with the amounts of work before and after it."""

    def report(done: int, total: int, unit: str, what: str) -> None:
        progress(before + done, before + total + after, unit, what)

    return report


def _check(checkpoint: Checkpoint, tokens: Tokens) -> None:
    specs = inventory(checkpoint.config)
    checkpoint.check(specs)
    checkpoint.check_nothing_else(specs)
    longest = checkpoint.config.max_position_embeddings
    if not tokens.size:
        raise UsageError("calibration needs a text")
    if tokens.shape[1] > longest:
        raise UsageError(f"the model was trained for contexts of {longest} tokens")
    if tokens.min() < 0 or tokens.max() >= checkpoint.config.vocab_size:
        raise UsageError("a token is not in this model's vocabulary")


def find_device(name: str | None) -> torch.device:
    """Return the device of that name; by default a GPU if there is one.

    Raises:
        UsageError: torch has no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError):  # depending on the kind of device
        raise UsageError(f"torch has no device {name!r} here") from None
    return device
