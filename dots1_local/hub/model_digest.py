"""A digest that tells a model from others of the same shape, without reading all weights.

A folder and the hub give the same digest, and so do copies in other shards, or in a type that
holds the same numbers. What is measured on a model carries its digest, so that nobody uses it for
another model: dots.llm1.base and dots.llm1.inst differ in nothing but their weights.
"""

import hashlib
from collections import defaultdict

from dots1_local.architecture import Dots1Config, inventory
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.hub.client import parallel_map

__all__ = ["model_digest"]

_WEIGHTS = 4096  # read from each sampled tensor
_AT_ONCE = 8  # requests


def model_digest(checkpoint: Checkpoint) -> str:
    """The SHA-256 of the configuration and of sampled weights.

    These are the first weights of each kind of tensor in the first and in the last layer that has
    one: about 30 tensors. Of a checkpoint on the hub, only these bytes are fetched.

    Raises:
        CheckpointError: a tensor is missing or unreadable, or the hub cannot be reached.
    """
    names = _sampled(checkpoint.config)
    starts = parallel_map(lambda name, _: checkpoint.read_start(name, _WEIGHTS), names, _AT_ONCE)
    digest = hashlib.sha256(repr(checkpoint.config).encode())
    for name, values in zip(names, starts, strict=True):
        digest.update(name.encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _sampled(config: Dots1Config) -> list[str]:
    """The names of the tensors whose weights are read; norms of two models may agree."""
    by_part: dict[str, list[str]] = defaultdict(list)
    for spec in inventory(config):
        if spec.role != "norm":
            by_part[spec.part].append(spec.sources[0])
    return [name for names in by_part.values() for name in dict.fromkeys((names[0], names[-1]))]
