"""What the engine computes for a token, in its order: steps around one weight each.

The order and the numbers of nodes are those of llama.cpp's graph of dots1, views not counted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dots1_local.architecture import Dots1Config
from dots1_local.errors import GGUFError
from dots1_local.files.gguf import GGUFFile, GGUFTensor

__all__ = ["ATTENTION", "HEAD", "Graph", "Step", "is_routed"]

ATTENTION = "attention"  # the step that reads the KV cache
HEAD = "output"

_BEFORE_KV = (
    ("attn_norm", 2), ("attn_q", 1), ("attn_q_norm", 3), ("attn_v", 1), ("attn_k", 1),
    ("attn_k_norm", 3),
)  # fmt: skip
_AFTER_KV = (("attn_output", 2), ("ffn_norm", 2))
_DENSE = (("ffn_up", 1), ("ffn_gate", 2), ("ffn_down", 2))
_ROUTER = (("ffn_gate_inp", 9),)
_ROUTED = (("ffn_up_exps", 1), ("ffn_gate_exps", 2), ("ffn_down_exps", 1))
_SHARED = (("ffn_up_shexp", 1), ("ffn_gate_shexp", 2), ("ffn_down_shexp", 3))
_FINAL = (("output_norm", 2), (HEAD, 1))


@dataclass(frozen=True)
class Step:
    """A weight and the `nodes` of the graph around it; `output` floats of a token come out.

    `weights` are those that a token is multiplied with, all experts' where it is routed; 0 for
    norms, whose arithmetic is in their nodes, and for attention.
    """

    name: str
    part: str
    layer: int
    type: str
    nbytes: int
    weights: int
    nodes: int
    output: int


@dataclass(frozen=True)
class Graph:
    """A model's steps; `tensors` holds all of the file's by name."""

    gguf: GGUFFile
    config: Dots1Config
    steps: tuple[Step, ...]
    tensors: Mapping[str, GGUFTensor]

    @classmethod
    def read(cls, gguf: GGUFFile) -> "Graph":
        """The graph of a file's model.

        Raises:
            GGUFError: another architecture, missing numbers, or missing tensors.
        """
        config = Dots1Config.from_gguf(gguf.keys, gguf.files[0])
        tensors = {tensor.name: tensor for tensor in gguf.tensors}
        try:
            steps = tuple(_steps(config, tensors))
        except KeyError as error:
            raise GGUFError(
                f"{gguf.files[0]} has no tensor {error.args[0]}; run dots1 verify on it"
            ) from None
        return cls(gguf, config, steps, tensors)


def is_routed(part: str) -> bool:
    """Whether `part` holds routed experts, of which a token needs a few."""
    return part.endswith("_exps")


def _steps(config: Dots1Config, tensors: Mapping[str, GGUFTensor]) -> Iterator[Step]:
    inner = config.num_attention_heads * config.head_dim
    for layer in range(config.num_hidden_layers):
        block = f"blk.{layer}."
        for part, nodes in _BEFORE_KV:
            yield _step(config, tensors, block, part, layer, nodes)
        yield Step("", ATTENTION, layer, "", 0, 0, 3, inner)
        dense = config.is_dense(layer)
        for part, nodes in (*_AFTER_KV, *(_DENSE if dense else (*_ROUTER, *_ROUTED, *_SHARED))):
            yield _step(config, tensors, block, part, layer, nodes)
    for part, nodes in _FINAL:
        yield _step(config, tensors, "", part, config.num_hidden_layers, nodes)


def _step(
    config: Dots1Config,
    tensors: Mapping[str, GGUFTensor],
    block: str,
    part: str,
    layer: int,
    nodes: int,
) -> Step:
    name = f"{block}{part}.weight"
    tensor = tensors[name]
    used = config.num_experts_per_tok if is_routed(part) else 1
    rows = tensor.shape[-2] if len(tensor.shape) > 1 else config.hidden_size
    if part == "ffn_gate_inp":
        rows = config.hidden_size  # what experts are given comes from before it
    if part == "ffn_down_exps":
        nodes += used  # weighting the experts' outputs, adding them up
    weights = tensor.elements if len(tensor.shape) > 1 else 0
    return Step(name, part, layer, tensor.type, tensor.nbytes, weights, nodes, used * rows)
