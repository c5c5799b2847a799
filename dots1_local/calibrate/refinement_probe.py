"""What the backward pass measures for refinement: moments of gradients, savings of refined rows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec, inventory, padded_width
from dots1_local.calibrate.output_errors import read_rows
from dots1_local.calibrate.output_gain import output_gain
from dots1_local.calibrate.probe_files import ProbeFiles
from dots1_local.calibrate.refined_effects import RefinedRatios
from dots1_local.calibrate.refined_errors import RefinedErrors
from dots1_local.calibrate.refined_rows import DrawnRows, EmbeddingSample, all_errors
from dots1_local.calibrate.refinement_file import RefinementWriter, gradient_moment
from dots1_local.calibrate.refinement_sample import OUTER_ROWS
from dots1_local.calibrate.weighted_errors import WeightedErrors
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.refine.metric import Metric, input_metric

__all__ = ["RefinementProbe"]

_HELD_OUT = 512  # gradients

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class RefinementProbe:
    """Continues in the backward pass what `RefinementSample` began in the forward pass.

    `probed` (chunks, positions) are the probed tokens. Methods raise Dots1Error if a file of the
    forward pass is damaged, CheckpointError if a tensor is, and OSError if the disk is full or
    broken.
    """

    checkpoint: Checkpoint
    files: ProbeFiles
    writer: RefinementWriter
    probed: NDArray[np.int32]
    threads: int | None = None

    def head(self) -> RefinedRatios:
        """What refined rows of the head save."""
        layers = self.checkpoint.config.num_hidden_layers
        errors, _ = self.files.sample(layers)
        return RefinedRatios(errors, WeightedErrors(self.files.error_rows(layers)))

    def layer(self, layer: int, kl: Floats, tie: Floats) -> RefinedRatios:
        """What refined rows of a layer save, whose outputs have the gradients `kl` and `tie`:
        (draws, tokens, hidden)."""
        self.writer.put_outputs(layer, kl)
        errors, judged = self.files.sample(layer)
        weighted = WeightedErrors(self.files.error_rows(layer), f"model.layers.{layer}.")
        if judged is None:
            return RefinedRatios(errors, weighted)
        config = self.checkpoint.config
        specs = inventory(config, padded_width(config.moe_intermediate_size))
        spec = next(spec for spec in specs if judged.source in spec.sources)
        gain = output_gain(judged, spec, self.checkpoint, kl, tie, self.threads)
        return RefinedRatios(errors, weighted, gain)

    def embedding(self, spec: TensorSpec, gradients: Floats) -> RefinedRatios:
        """What refined rows of the embedding save, from the gradients at the first layer's input:
        (draws, chunks, positions, hidden).

        Rows are refined with one half of the chunks. Each is judged by the gradients in the others
        where its token stands: what matters there is not what matters at other tokens.
        """
        self.writer.put_embedding(gradients)
        none = RefinedRatios({})
        half = gradients.shape[1] // 2
        others = gradients[:, half:].reshape(len(gradients), -1, gradients.shape[-1])
        scale = np.sqrt(np.square(others, dtype=np.float64).mean())
        if not half or not scale:
            return none
        fitted, others = gradients[:, :half], others / np.float32(scale)
        metric = Metric(input_metric(gradient_moment(fitted), fitted[..., 0].size))
        tokens = self.probed[half:].ravel()
        counts = np.bincount(tokens, minlength=spec.source_shape[0]).astype(np.float64)
        drawn = DrawnRows.of(spec.name, counts, OUTER_ROWS)
        rows = read_rows(self.checkpoint, spec.sources[0], drawn.numbers)
        at_rows = [np.concatenate(others[:, tokens == number]) for number in drawn.numbers]
        held_out = np.concatenate(others[:, :: -(-others[..., 0].size // _HELD_OUT)])
        sample = EmbeddingSample(spec, drawn, rows, metric, held_out, None, at_rows)
        (found,) = all_errors({spec.name: sample}, self.threads).values()
        pairs = {kind: [pair] for kind, pair in found.pairs.items()}
        return RefinedRatios({spec.name: RefinedErrors([0], pairs)})
