"""An example's plan projected to dots.llm1: bits per weight of each role, times its weights there.

An example's embedding is a tenth of its weights and dots.llm1's a hundredth; its expert width grows
by a third when padded, dots.llm1's by a twelfth. By role, what is compared is what will be stored.
"""

from collections.abc import Callable
from functools import cache

from dots1_local.architecture import Dots1Config, Role, inventory, padded_width
from dots1_local.quant.plan import PlannedTensor, QuantPlan
from tools.make_wide import published_config

__all__ = ["bits_per_weight", "projected_bytes", "projection"]


def projection(config: Dots1Config) -> Callable[[PlannedTensor], float]:
    """A function of a tensor of the model `config`: the bytes of dots.llm1 that it stands for."""
    factors = {padded: _factors(config, padded) for padded in (False, True)}

    def projected(tensor: PlannedTensor) -> float:
        padded = tensor.spec.elements != tensor.spec.source_elements
        return tensor.nbytes * factors[padded][tensor.spec.role]

    return projected


def projected_bytes(plan: QuantPlan, config: Dots1Config) -> dict[Role, float]:
    """Bytes of each role in dots.llm1, for a plan of the model `config`."""
    projected = projection(config)
    sizes: dict[Role, float] = {}
    for tensor in plan.tensors(config):
        sizes[tensor.spec.role] = sizes.get(tensor.spec.role, 0) + projected(tensor)
    return sizes


def bits_per_weight(nbytes: float) -> float:
    """Bits per weight of dots.llm1; padding does not count as weights."""
    return nbytes * 8 / sum(_elements(_real(), False).values())


def _factors(config: Dots1Config, padded: bool) -> dict[Role, float]:
    """The weights of each role in dots.llm1, relative to those in the example."""
    ours, real = _elements(config, padded), _elements(_real(), padded)
    return {role: real[role] / count for role, count in ours.items()}


@cache
def _real() -> Dots1Config:
    return Dots1Config.from_json(published_config())


@cache
def _elements(config: Dots1Config, padded: bool) -> dict[Role, int]:
    width = config.moe_intermediate_size
    counts: dict[Role, int] = {}
    for spec in inventory(config, padded_width(width) if padded else width):
        counts[spec.role] = counts.get(spec.role, 0) + spec.elements
    return counts
