"""The graph that llama.cpp builds for a ubatch of dots1, with what its memory depends on.

Nodes are in llama.cpp's order (`src/models/dots1.cpp`, `src/llama-graph.cpp`). Views are left out,
because they take no memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import CPU
from dots1_local.errors import GGUFError
from dots1_local.ggml import quant_type

__all__ = ["Node", "PlacedLayer", "PlacedWeight", "UbatchGraph", "UbatchShape"]

_ROTATION = 64  # llama.cpp rotates quantised KV by Hadamard matrices of at least this order


@dataclass(frozen=True)
class PlacedWeight:
    """The device of a weight, and its bytes if a GPU may copy it from RAM (`fetched`)."""

    device: str
    nbytes: int = 0
    fetched: bool = False


@dataclass(frozen=True)
class PlacedLayer:
    """The device of a layer's KV cache, and its weights by part (`attn_q`, `output_norm`)."""

    kv: str
    parts: tuple[tuple[str, PlacedWeight], ...]


@dataclass(frozen=True)
class UbatchShape:
    """What a ubatch holds: `tokens` of all sequences together, `outputs` of them with logits.

    Each stream of the KV cache has `cells` cells; sequences have one each, or share a single one.
    """

    tokens: int
    outputs: int
    streams: int
    cells: int
    kv_type: str
    flash_attention: bool


@dataclass(slots=True, eq=False)
class Node:
    """A tensor of the graph: `size` bytes, computed from `sources`, on `device` if it is given.

    An operation with a weight works on `rows` rows. An `inplace` node may take over the memory of a
    source of the same size. CUDA's flash attention asks for `extra` bytes, to hold keys and values
    as F16. CUDA keeps the sources of a node until the node `kept` is computed. `is_copy` marks a
    copy of the source on another device.
    """

    size: int
    sources: tuple["Node", ...] = ()
    device: str | None = None
    inplace: bool = False
    rows: int = 0
    weight: PlacedWeight | None = None
    extra: int = 0
    kept: "Node | None" = None
    is_copy: bool = False


class UbatchGraph:
    """The `inputs`, which are in RAM from the beginning, and the computed `nodes`, in order.

    The last of `layers` is the output layer. With `pinned`, norms are computed on the device
    of their layer, wherever their input is.
    """

    def __init__(
        self, config: Dots1Config, layers: Sequence[PlacedLayer], ubatch: UbatchShape, pinned: bool
    ) -> None:
        self.inputs: list[Node] = []
        self.nodes: list[Node] = []
        self._config, self._ubatch, self._pinned_norms = config, ubatch, pinned
        self._tokens = ubatch.tokens  # in the last block, only those with logits
        self._hidden, self._inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self._rotates = quant_type(ubatch.kv_type).block > 1 and not config.head_dim % _ROTATION
        self._make_inputs()
        embedding = Node(0, device=CPU, weight=PlacedWeight(CPU))  # always looked up in RAM
        x = self._op(4 * self._hidden * ubatch.tokens, embedding, self._ids)
        for index, layer in enumerate(layers[:-1]):
            self._enter(layer)
            x = self._block(x, is_last=index == len(layers) - 2)
        self._enter(layers[-1])
        norm = self._norm(x, "output_norm", self._hidden, pinned=False)
        self._matmul("output", norm, config.vocab_size)

    def _make_inputs(self) -> None:
        ubatch, tokens = self._ubatch, self._ubatch.tokens
        self._ids = self._input(4 * tokens)
        self._input(4 * self._hidden * tokens)  # embeddings in place of tokens, unused
        self._positions = self._input(4 * tokens)
        if self._rotates:
            order = _ROTATION
            while not self._config.head_dim % (2 * order):
                order *= 2
            self._k_rotation = self._input(4 * order * order)
            self._v_rotation = self._input(4 * _ROTATION * _ROTATION)
        self._k_slots = self._input(8 * tokens)
        values = 1 if ubatch.flash_attention else self._inner  # otherwise values are transposed
        self._v_slots = self._input(8 * tokens * values)
        self._mask = self._input(tokens * ubatch.cells * (2 if ubatch.flash_attention else 4))
        self._out_ids = self._input(4 * ubatch.outputs)

    def _input(self, size: int) -> Node:
        node = Node(size, device=CPU)
        self.inputs.append(node)
        return node

    def _enter(self, layer: PlacedLayer) -> None:
        self._layer = layer
        self._parts = {
            part: Node(weight.nbytes, device=weight.device, weight=weight)
            for part, weight in layer.parts
        }

    def _weight(self, part: str) -> Node:
        if part not in self._parts:
            raise GGUFError(f"a block of the model has no {part}; run dots1 verify on it")
        return self._parts[part]

    def _op(
        self, size: int, *sources: Node, inplace: bool = False, rows: int = 0, on: str | None = None
    ) -> Node:
        node = Node(size, sources, on, inplace, rows)
        self.nodes.append(node)
        return node

    def _matmul(self, part: str, x: Node, width: int) -> Node:
        return self._op(4 * width * self._tokens, self._weight(part), x, rows=self._tokens)

    def _norm(self, x: Node, part: str, width: int, *, pinned: bool = True, heads: int = 1) -> Node:
        size = 4 * width * self._tokens
        device = self._layer.kv if pinned and self._pinned_norms else None
        # A norm by head reads a view of its matrix, and llama.cpp never overwrites views.
        norm = self._op(size, x, inplace=heads == 1, on=device)
        return self._op(size, norm, self._weight(part), inplace=True, rows=heads * self._tokens)

    def _block(self, x: Node, *, is_last: bool) -> Node:
        attention = self._attention(x)
        if is_last:
            self._tokens = self._ubatch.outputs
            size = 4 * self._hidden * self._tokens
            attention = self._op(size, attention, self._out_ids)
            x = self._op(size, x, self._out_ids)
        size = 4 * self._hidden * self._tokens
        x = self._op(size, attention, x, inplace=True)
        norm = self._norm(x, "ffn_norm", self._hidden)
        if "ffn_gate_inp" in self._parts:
            experts = self._experts(norm)
            shared = self._config.moe_intermediate_size * self._config.n_shared_experts
            output = self._feed_forward(norm, shared, "_shexp")
            output = self._op(size, experts, output, inplace=True)
        else:
            output = self._feed_forward(norm, self._config.intermediate_size, "")
        return self._op(size, output, x, inplace=True)

    def _attention(self, x: Node) -> Node:
        ubatch, kv = self._ubatch, self._layer.kv
        norm = self._norm(x, "attn_norm", self._hidden)
        size = 4 * self._inner * ubatch.tokens
        query = self._rotate(self._position(norm, "attn_q"), "k")
        value = self._rotate(self._matmul("attn_v", norm, self._inner), "v")
        key = self._rotate(self._position(norm, "attn_k"), "k")
        self._op(0, key, self._k_slots, on=kv)
        self._op(0, value, self._v_slots, on=kv)
        cached = quant_type(ubatch.kv_type).row_bytes(self._inner) * ubatch.cells * ubatch.streams
        keys, values = Node(cached, device=kv), Node(cached, device=kv)
        if ubatch.flash_attention:
            as_f16 = 2 * self._inner * ubatch.cells * ubatch.streams
            if ubatch.kv_type == "F32":
                keys, values = self._op(as_f16, keys), self._op(as_f16, values)
            result = self._op(size, query, keys, values, self._mask)
            result.extra = 0 if ubatch.kv_type in ("F32", "F16") else 2 * as_f16
        else:
            heads = self._config.num_attention_heads
            scores = self._op(4 * heads * ubatch.cells * ubatch.tokens, keys, query)
            scores = self._op(scores.size, scores, self._mask, inplace=True)
            result = self._op(size, self._op(size, values, scores))
        return self._matmul("attn_output", self._rotate(result, "v"), self._hidden)

    def _position(self, x: Node, part: str) -> Node:
        """A projection of `x`, normalised by head and rotated by its position."""
        heads = self._config.num_attention_heads
        x = self._norm(self._matmul(part, x, self._inner), f"{part}_norm", self._inner, heads=heads)
        return self._op(x.size, x, self._positions, inplace=True)

    def _rotate(self, x: Node, which: str) -> Node:
        if not self._rotates:
            return x
        return self._op(x.size, self._k_rotation if which == "k" else self._v_rotation, x)

    def _feed_forward(self, x: Node, width: int, suffix: str) -> Node:
        gate = self._matmul(f"ffn_gate{suffix}", x, width)
        up = self._matmul(f"ffn_up{suffix}", x, width)
        product = self._op(gate.size, gate, up)
        return self._matmul(f"ffn_down{suffix}", product, self._hidden)

    def _experts(self, x: Node) -> Node:
        config, tokens = self._config, self._tokens
        used = config.num_experts_per_tok
        chosen, weights = self._route(x)
        inner = 4 * used * tokens * config.moe_intermediate_size
        outer = 4 * used * tokens * self._hidden
        gate = self._op(inner, self._weight("ffn_gate_exps"), x, chosen, rows=tokens)
        up = self._op(inner, self._weight("ffn_up_exps"), x, chosen, rows=tokens)
        product = self._op(inner, gate, up)
        down = self._op(outer, self._weight("ffn_down_exps"), product, chosen, rows=tokens)
        weighted = self._op(outer, down, weights, inplace=True)
        size = 4 * self._hidden * tokens
        total = self._op(size, *(weighted,) * min(used, 2))
        for _ in range(used - 2):
            total = self._op(size, total, weighted, inplace=True)
        if used > 1:
            weighted.kept = total
        return total

    def _route(self, x: Node) -> tuple[Node, Node]:
        """The ids of the chosen experts, and their weights."""
        config, tokens = self._config, self._tokens
        experts = 4 * config.n_routed_experts * tokens
        used = 4 * config.num_experts_per_tok * tokens
        scores = self._matmul("ffn_gate_inp", x, config.n_routed_experts)
        scores = self._op(experts, scores, inplace=True)
        biased = scores
        if "exp_probs_b" in self._parts:
            bias = self._weight("exp_probs_b")
            biased = self._op(experts, scores, bias, inplace=True, rows=tokens)
        chosen = self._op(experts, biased)
        weights = self._op(used, scores, chosen)
        if config.norm_topk_prob:
            total = self._op(4 * tokens, self._op(4 * tokens, weights), inplace=True)
            weights = self._op(used, weights, total)
        if config.routed_scaling_factor not in (0, 1):
            weights = self._op(used, weights)
        return chosen, weights
