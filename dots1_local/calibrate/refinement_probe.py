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
from dots1_local.calibrate.refined_rows import RowSample, all_errors
from dots1_local.calibrate.refinement_file import RefinementWriter, gradient_moment
from dots1_local.calibrate.refinement_sample import ROWS, draw
from dots1_local.calibrate.weighted_errors import WeightedErrors
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.refine.metric import Metric, input_metric

__all__ = ["RefinementProbe"]

_HELD_OUT = 512  # gradients

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class RefinementProbe:
    """Continues in the backward pass what `RefinementSample` began in the forward pass.

    Gradients are (draws, tokens, hidden). Methods raise Dots1Error if a file of the forward pass is
    damaged, CheckpointError if a tensor is, and OSError if the disk is full or broken.
    """

    checkpoint: Checkpoint
    files: ProbeFiles
    writer: RefinementWriter
    threads: int | None = None

    def head(self) -> RefinedRatios:
        """What refined rows of the head save."""
        layers = self.checkpoint.config.num_hidden_layers
        errors, _ = self.files.sample(layers)
        return RefinedRatios(errors, WeightedErrors(self.files.error_rows(layers)))

    def layer(self, layer: int, kl: Floats, tie: Floats) -> RefinedRatios:
        """What refined rows of a layer save, whose outputs have the gradients `kl` and `tie`."""
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

    def embedding(
        self, spec: TensorSpec, gradients: Floats, frequencies: NDArray[np.floating]
    ) -> RefinedRatios:
        """What refined rows of the embedding save, from the gradients at the first layer's input.

        Rows are refined with one half of them, and judged by the others. `frequencies`
        (vocabulary,) are those of the tokens.
        """
        self.writer.put_embedding(gradients)
        none = RefinedRatios({})
        half = gradients.shape[1] // 2
        fitted, others = gradients[:, :half], gradients[:, half:].reshape(-1, gradients.shape[-1])
        held_out = others[:: -(-len(others) // _HELD_OUT)]
        scale = np.sqrt(np.square(held_out, dtype=np.float64).mean())
        if not half or not scale:
            return none
        metric = Metric(input_metric(gradient_moment(fitted), fitted[..., 0].size))
        numbers = draw(spec.name, frequencies, ROWS)
        rows = read_rows(self.checkpoint, spec.sources[0], numbers)
        sample = RowSample(spec, numbers, rows, metric, held_out / np.float32(scale), None)
        (found,) = all_errors({spec.name: sample}, self.threads).values()
        pairs = {kind: [pair] for kind, pair in found.pairs.items()}
        return RefinedRatios({spec.name: RefinedErrors([0], pairs)})
