"""What the shapes of a file's tensors say of the model, whatever its keys say."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dots1_local.gguf_file import GGUFTensor

__all__ = ["Numbers", "shown_by"]

Numbers = dict[str, Any]  # by field of Dots1Config


def shown_by(tensors: Sequence[GGUFTensor]) -> Numbers:
    """What the shapes of the tensors show, as far as they do; the usual one of each kind counts."""
    by_part: defaultdict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
    layers, routed = set(), set()
    for tensor in tensors:
        match = re.fullmatch(r"(?:blk\.(\d{1,4})\.)?(\w+)\.weight", tensor.name)
        if match:
            by_part[match[2]][tensor.shape] += 1
        if match and match[1]:
            layers.add(int(match[1]))
        if match and match[1] and match[2] == "ffn_gate_exps":
            routed.add(int(match[1]))
    found = _Shapes({part: shapes.most_common(1)[0][0] for part, shapes in by_part.items()})
    count = max(layers, default=-1) + 1
    head_dim = found.size("attn_q_norm", 0, dimensions=1)
    width = found.size("ffn_gate_exps", 1, dimensions=3)
    heads = found.quotient("attn_q", head_dim)
    shown: Numbers = {
        "vocab_size": found.size("token_embd", 0),
        "hidden_size": found.size("token_embd", 1),
        "num_hidden_layers": count or None,
        "first_k_dense_replace": min(routed, default=count) if count else None,
        "intermediate_size": found.size("ffn_gate", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "n_routed_experts": found.size("ffn_gate_exps", 0, dimensions=3),
        "moe_intermediate_size": width,
        "n_shared_experts": found.quotient("ffn_gate_shexp", width),
    }
    return {field: value for field, value in shown.items() if value is not None}


@dataclass(frozen=True)
class _Shapes:
    """Shapes by name without block number and suffix."""

    by_part: Mapping[str, tuple[int, ...]]

    def size(self, part: str, dimension: int, *, dimensions: int = 2) -> int | None:
        shape = self.by_part.get(part, ())
        return (shape[dimension] or None) if len(shape) == dimensions else None

    def quotient(self, part: str, divisor: int | None) -> int | None:
        rows = self.size(part, 0)
        return rows // divisor if rows and divisor and rows % divisor == 0 else None
