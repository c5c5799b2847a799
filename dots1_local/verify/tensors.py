"""Are the tensors those of the model that the keys describe?

llama.cpp refuses a file with a tensor too few or too many, except for a lost router bias, which
it does not miss; and it aborts the process over a norm or a router bias that is not F32.

What the shapes of a file's tensors say of the model, whatever its keys say.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dots1_local.architecture import Dots1Config, TensorSpec, inventory
from dots1_local.files.gguf import GGUFFile, GGUFTensor, role_of
from dots1_local.verify.findings import ABORTS, REFUSES, Finding, Severity, names

__all__ = [
    "Numbers",
    "expected_tensors",
    "lint_tensors",
    "shown_by",
]


_AGAIN = "convert the checkpoint again with dots1 convert"


def expected_tensors(config: Dots1Config, gguf: GGUFFile, width: int) -> list[TensorSpec]:
    """The inventory as `gguf` stores it: experts `width` wide, q, k and v maybe in one tensor."""
    stored = {tensor.name for tensor in gguf.tensors}
    specs = []
    for spec in inventory(config, width):
        fused = f"blk.{spec.layer}.attn_qkv.weight"
        if fused not in stored or spec.part not in ("attn_q", "attn_k", "attn_v"):
            specs.append(spec)
        elif spec.part == "attn_q":
            specs.append(_fused(spec, fused))
    return specs


def lint_tensors(gguf: GGUFFile, config: Dots1Config | None) -> Iterator[Finding]:
    """What is wrong with the tensors; without a `config` that the keys describe, their types."""
    yield from _types(gguf)
    yield from _places(gguf)
    if config is None:
        message = "which tensors should be there cannot be told from the keys"
        yield Finding("tensors", "error", message)
        return
    wanted = {t.name: t for t in expected_tensors(config, gguf, config.moe_intermediate_size)}
    found = {tensor.name: tensor for tensor in gguf.tensors}
    yield from _missing([name for name in wanted if name not in found])
    yield from _surplus([name for name in found if name not in wanted])
    yield from _misshaped(wanted, found)


def _fused(query: TensorSpec, name: str) -> TensorSpec:
    """q, k and v one under the other, as llama.cpp's converter stores them with --fuse-qkv."""
    (source,) = query.sources
    sources = tuple(source.replace("q_proj", f"{letter}_proj") for letter in "qkv")
    rows, columns = query.shape
    return replace(query, name=name, shape=(3 * rows, columns), sources=sources)


def _missing(missing: list[str]) -> Iterator[Finding]:
    if missing:
        biases = all(name.endswith(".exp_probs_b.bias") for name in missing)
        effect = "silently chooses experts without it" if biases else "refuses to load the file"
        message = f"{names(missing)} missing: llama.cpp {effect}; {_AGAIN}"
        yield Finding("tensors", "error", message)


def _surplus(surplus: list[str]) -> Iterator[Finding]:
    used = [n for n in surplus if n.endswith((".attn_q.bias", ".attn_k.bias", ".attn_v.bias"))]
    if used:
        message = f"{names(used)} is no part of a dots1 model, but llama.cpp adds it; {_AGAIN}"
        yield Finding("tensors", "error", message)
    others = [n for n in surplus if n not in used and not n.endswith(("scale", ".attn_qkv.bias"))]
    if others:
        message = f"{names(others)} is no part of a dots1 model: {REFUSES}; {_AGAIN}"
        yield Finding("tensors", "error", message)


def _misshaped(
    wanted: Mapping[str, TensorSpec], found: Mapping[str, GGUFTensor]
) -> Iterator[Finding]:
    wrong = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    if wrong:
        first = wrong[0]
        yield Finding(
            "tensors", "error",
            f"{names(wrong)} misshaped: {first} is {_shape(found[first].shape)} where the keys "
            f"make it {_shape(wanted[first].shape)}, and {REFUSES}; {_AGAIN}",
        )  # fmt: skip


def _places(gguf: GGUFFile) -> Iterator[Finding]:
    """llama.cpp takes a tensor only where the one before it in the header ends."""
    strayed, behind = [], 0
    for header in gguf.headers:
        end = header.data_start
        for tensor in header.tensors:
            if tensor.offset != end:
                strayed.append(tensor.name)
            end = header.aligned(tensor.offset + tensor.nbytes)
        behind += max(0, header.file.stat().st_size - end)
    if strayed:
        message = f"{names(strayed)} not where the tensor before it ends: {REFUSES}; {_AGAIN}"
        yield Finding("offsets", "error", message)
    elif behind:
        message = f"{behind} bytes after the last tensor belong to none"
        yield Finding("offsets", "note", message)


def _types(gguf: GGUFFile) -> Iterator[Finding]:
    checks: tuple[tuple[str, Severity, tuple[str, ...], str], ...] = (
        ("norms", "error", ("norm", "exp_probs_b"), ABORTS),
        ("router", "warning", ("ffn_gate_inp",), "experts are chosen less exactly"),
    )
    for check, severity, parts, effect in checks:
        wrong = [t for t in gguf.tensors if t.type != "F32" and _is_part(t.name, parts)]
        if wrong:
            listed = names(t.name for t in wrong)
            message = f"{listed} is {wrong[0].type} where F32 is needed: {effect}; {_AGAIN}"
            yield Finding(check, severity, message)


def _is_part(name: str, parts: Iterable[str]) -> bool:
    if role_of(name) == "norm":
        return "norm" in parts
    return any(f".{part}." in name for part in parts)


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


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
