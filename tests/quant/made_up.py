"""Made-up sensitivity: every bit divides the damage by four, and tensors differ at random."""

import numpy as np

from dots1_local.architecture import Dots1Config, inventory, padded_width
from dots1_local.ggml import TYPES
from dots1_local.quant.sensitivity import Effect, Sensitivity, geometry

KINDS = ("Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "IQ4_NL", "IQ3_S", "Q3_K", "IQ3_XXS", "Q2_K",
         "IQ2_S", "IQ2_XS", "IQ2_XXS")  # fmt: skip


def made_up(
    config: Dots1Config, *, imatrix: str = "0" * 64, kinds: tuple[str, ...] = KINDS, seed: int = 0
) -> Sensitivity:
    rng = np.random.default_rng(seed)
    specs = inventory(config, padded_width(config.moe_intermediate_size))
    whole = sum(spec.elements for spec in specs)
    tensors = {}
    for spec in specs:
        if spec.role in ("norm", "router"):
            continue
        scale = float(rng.lognormal()) * (spec.elements / whole) ** 0.5
        errors = {kind: 4.0 ** -TYPES[kind].bpw * rng.uniform(0.9, 1.2) for kind in kinds}
        tensors[spec.name] = {
            kind: Effect(error, scale * error, 0.002 * scale * error)
            for kind, error in errors.items()
            if TYPES[kind].fits(spec.columns)
        }
    return Sensitivity(geometry(config), imatrix, 4096, "Q4_K", 0.01, 0.006, tensors)
