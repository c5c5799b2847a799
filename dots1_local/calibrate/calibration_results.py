"""The results of a calibration, from what its two passes measured."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.architecture import inventory
from dots1_local.calibrate.calibration_folder import CalibrationFolder
from dots1_local.calibrate.coverage import Coverage, coverage, shrink
from dots1_local.calibrate.forward import ForwardPass
from dots1_local.calibrate.manifest import (
    IMATRIX,
    REFINED_SENSITIVITY,
    REFINEMENT,
    ROUTING,
    SENSITIVITY,
)
from dots1_local.calibrate.probe import DRAWS, Probe
from dots1_local.calibrate.refinement_file import RefinementWriter
from dots1_local.calibrate.refinement_probe import RefinementProbe
from dots1_local.calibrate.rounded_divergence import rounded_divergence
from dots1_local.calibrate.routing import pack_routing
from dots1_local.files.partial_file import disk_errors
from dots1_local.hub.pass_shards import Provide
from dots1_local.progress import Progress
from dots1_local.quant.imatrix_file import load_importance, write_imatrix

__all__ = ["measure_reference_kl", "write_imatrix_file", "write_routing", "write_sensitivity"]

Floats = NDArray[np.float32]
Tokens = NDArray[np.int32]


def write_imatrix_file(
    forward: ForwardPass,
    x: Tensor,
    folder: CalibrationFolder,
    datasets: Sequence[str],
    least: int,
) -> list[Coverage]:
    """Write all that was measured to one file; return the coverage of each layer."""
    covered = []
    entries: dict[str, tuple[Floats, Floats]] = {}
    specs = {spec.name: spec for spec in inventory(forward.checkpoint.config)}
    for name, (sums, counts) in chain(folder.measured(), forward.head(x).items()):
        spec = specs[name]
        is_routed = spec.role == "routed"
        entries[name] = shrink(sums, counts, least) if is_routed else (sums, counts)
        if spec.layer is not None and spec.part == "ffn_gate_exps":
            covered.append(coverage(spec.layer, counts, least))
    with disk_errors(folder.path):
        write_imatrix(
            folder.draft(IMATRIX),
            entries,
            datasets=datasets,
            chunk_count=len(forward.calibration),
            chunk_size=x.shape[1],
            extra={
                "dots1_local.calibration.precision": "BF16" if forward.compute.bf16 else "F32",
                "dots1_local.calibration.shrunk_below": least,
            },
        )
    return covered


def write_routing(forward: ForwardPass, folder: CalibrationFolder, digest: str) -> None:
    """Write the experts that tokens chose in all layers, for the model with a digest."""
    layers = [folder.probe.routing(layer) for layer in forward.routed_layers]
    with disk_errors(folder.path):
        folder.draft(ROUTING).write_bytes(pack_routing(layers, forward.checkpoint.config, digest))


def measure_reference_kl(forward: ForwardPass, x: Tensor) -> float:
    """The KL divergence of the model with rounded weights, if `x` is the residual stream in the
    end."""
    exact, rounded = forward.exact_probes(x), forward.rounded_probes(x)
    device = forward.compute.device
    return rounded_divergence(exact, rounded, forward.checkpoint, forward.rounding, device)


def write_sensitivity(
    forward: ForwardPass,
    output: Tensor,
    reference_kl: float,
    folder: CalibrationFolder,
    text: Tokens | None,
    progress: Progress,
    provide: Provide,
) -> None:
    """Run the backward pass; with `text` it also writes what refining needs."""
    checkpoint, importance = forward.checkpoint, load_importance(folder.draft(IMATRIX))
    with disk_errors(folder.path):
        refinement = None
        if text is not None:
            resume = folder.probe.reached(checkpoint.config.num_hidden_layers) is not None
            draft, gradients = folder.draft(REFINEMENT), DRAWS * output[..., 0].numel()
            if resume:
                folder.reclaim(REFINEMENT)
            writer = RefinementWriter(
                draft, text, checkpoint, importance.sha256, gradients, resume=resume
            )
            probed = forward.calibration[: len(output)]
            refinement = RefinementProbe(checkpoint, folder.probe, writer, probed, forward.threads)
        probe = Probe(
            checkpoint,
            folder.probe,
            importance,
            forward.frequencies,
            forward.compute,
            forward.threads,
            refinement,
            provide,
        )
        measured, refined = probe.run(output, reference_kl, progress)
        folder.draft(SENSITIVITY).write_text(measured.to_json(), encoding="utf-8")
        if refined is not None:
            folder.draft(REFINED_SENSITIVITY).write_text(refined.to_json(), encoding="utf-8")
