"""Are the tensors those of the model that the keys describe?

llama.cpp refuses a file with a missing or an unknown tensor, except for a missing router bias,
which it does not notice. It aborts the process over a norm or a router bias that is not F32.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dots1_local.architecture import Dots1Config, TensorSpec, inventory
from dots1_local.files.gguf import GGUFFile, GGUFTensor
from dots1_local.verify.findings import ABORTS, REFUSES, Finding, Severity, names

__all__ = ["config_from_tensors", "expected_tensors", "has_scale", "lint_tensors"]

# Tensors of one factor that llama.cpp reads beside a matrix of dots1; those of inputs have no use.
_SCALE = re.compile(
    r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps|_shexp)?)\.(input_)?scale"
)

_AGAIN = "convert the checkpoint again with dots1 convert"


def expected_tensors(config: Dots1Config, gguf: GGUFFile, width: int) -> list[TensorSpec]:
    """The inventory as `gguf` stores it: experts `width` wide, q, k and v perhaps in one tensor."""
    stored = {tensor.name for tensor in gguf.tensors}
    specs = []
    for spec in inventory(config, width):
        fused = f"blk.{spec.layer}.attn_qkv.weight"
        if fused not in stored or spec.part not in ("attn_q", "attn_k", "attn_v"):
            specs.append(spec)
        elif spec.part == "attn_q":
            specs.append(_fused(spec, fused))
    return specs


def _fused(query: TensorSpec, name: str) -> TensorSpec:
    """q, k and v one below the other, as llama.cpp's converter stores them with --fuse-qkv."""
    (source,) = query.sources
    sources = tuple(source.replace("q_proj", f"{letter}_proj") for letter in "qkv")
    rows, columns = query.shape
    return replace(query, name=name, shape=(3 * rows, columns), sources=sources)


def has_scale(name: str, stored: Container[str]) -> bool:
    """Whether another tensor of a file holds a factor of the matrix called `name`."""
    return name.removesuffix("weight") + "scale" in stored


def lint_tensors(gguf: GGUFFile, config: Dots1Config | None) -> Iterator[Finding]:
    """What is wrong with the tensors; if `config` is None, only types and places are checked."""
    yield from _types(gguf)
    yield from _places(gguf)
    if config is None:
        message = "the keys do not tell which tensors the model has"
        yield Finding("tensors", "error", message)
        return
    wanted = {t.name: t for t in expected_tensors(config, gguf, config.moe_intermediate_size)}
    found = {tensor.name: tensor for tensor in gguf.tensors}
    yield from _missing([name for name in wanted if name not in found])
    surplus = [name for name in found if name not in wanted]
    scales = [name for name in surplus if _SCALE.fullmatch(name)]
    if "output.weight" in found and found["output.weight"].type == "NVFP4":
        scales += [name for name in surplus if name in ("output.scale", "output.input_scale")]
    yield from _scales([name for name in scales if name.endswith(".scale")])
    yield from _surplus([name for name in surplus if name not in scales])
    yield from _misshaped(wanted, found)


def _types(gguf: GGUFFile) -> Iterator[Finding]:
    checks: tuple[tuple[str, Severity, str, str], ...] = (
        ("norms", "error", r".*_norm\.weight|.*\.exp_probs_b\..*", ABORTS),
        ("router", "warning", r".*\.ffn_gate_inp\..*", "experts are chosen less exactly"),
    )
    for check, severity, pattern, effect in checks:
        wrong = [t for t in gguf.tensors if t.type != "F32" and re.fullmatch(pattern, t.name)]
        if wrong:
            listed = names(t.name for t in wrong)
            message = f"{listed} is {wrong[0].type} where F32 is needed: {effect}; {_AGAIN}"
            yield Finding(check, severity, message)


def _places(gguf: GGUFFile) -> Iterator[Finding]:
    """llama.cpp takes a tensor only where the tensor before it in the header ends."""
    strayed, behind = [], 0
    for header in gguf.headers:
        end = header.data_start
        for tensor in header.tensors:
            if tensor.offset != end:
                strayed.append(tensor.name)
            end = header.aligned(tensor.offset + tensor.nbytes)
        behind += max(0, header.size - end)
    if strayed:
        message = f"there are gaps or overlaps before {names(strayed)}: {REFUSES}; {_AGAIN}"
        yield Finding("offsets", "error", message)
    elif behind:
        message = f"{behind} bytes after the last tensor belong to no tensor"
        yield Finding("offsets", "note", message)


def _missing(missing: list[str]) -> Iterator[Finding]:
    if missing:
        biases = all(name.endswith(".exp_probs_b.bias") for name in missing)
        effect = "silently chooses experts without it" if biases else "refuses to load the file"
        message = f"the file lacks {names(missing)}: llama.cpp {effect}; {_AGAIN}"
        yield Finding("tensors", "error", message)


def _surplus(surplus: list[str]) -> Iterator[Finding]:
    used = [n for n in surplus if n.endswith((".attn_q.bias", ".attn_k.bias", ".attn_v.bias"))]
    if used:
        message = f"{names(used)} is not part of a dots1 model, but llama.cpp adds it; {_AGAIN}"
        yield Finding("tensors", "error", message)
    others = [name for name in surplus if name not in used and not name.endswith(".attn_qkv.bias")]
    if others:
        message = f"{names(others)} is not part of a dots1 model: {REFUSES}; {_AGAIN}"
        yield Finding("tensors", "error", message)


def _scales(scales: list[str]) -> Iterator[Finding]:
    """Factors of whole matrices, of which a conversion to NVFP4 leaves out those that are 1.

    llama.cpp reads all, but its graph of dots1 has no place for those of feed-forward matrices.
    """
    unused = [name for name in scales if ".ffn_" in name]
    if unused:
        message = (
            f"llama.cpp does not multiply by {names(unused)} in a dots1 model, so that it computes "
            f"something else; {_AGAIN}"
        )
        yield Finding("scales", "error", message)
    if used := [name for name in scales if name not in unused]:
        message = (
            f"llama.cpp multiplies by {names(used)}, which dots1-local does not: it neither "
            "compares nor exports these tensors"
        )
        yield Finding("scales", "note", message)


def _misshaped(
    wanted: Mapping[str, TensorSpec], found: Mapping[str, GGUFTensor]
) -> Iterator[Finding]:
    wrong = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    if wrong:
        first = wrong[0]
        yield Finding(
            "tensors", "error",
            f"the keys do not fit the shape of {names(wrong)}: {first} is "
            f"{_shape(found[first].shape)} where the keys make it {_shape(wanted[first].shape)}, "
            f"and {REFUSES}; {_AGAIN}",
        )  # fmt: skip


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def config_from_tensors(tensors: Sequence[GGUFTensor]) -> dict[str, Any]:
    """The fields of `Dots1Config` that the tensors' shapes tell, whatever the keys say.

    If tensors of one kind differ in shape, the most frequent shape counts.
    """
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
    shapes = {part: counter.most_common(1)[0][0] for part, counter in by_part.items()}
    count = max(layers, default=-1) + 1
    vocab, hidden = _sizes(shapes, "token_embd", 2)
    experts, width, _ = _sizes(shapes, "ffn_gate_exps", 3)
    (head_dim,) = _sizes(shapes, "attn_q_norm", 1)
    heads = _quotient(_sizes(shapes, "attn_q", 2)[0], head_dim)
    fields = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": count or None,
        "first_k_dense_replace": min(routed, default=count) if count else None,
        "intermediate_size": _sizes(shapes, "ffn_gate", 2)[0],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "n_routed_experts": experts,
        "moe_intermediate_size": width,
        "n_shared_experts": _quotient(_sizes(shapes, "ffn_gate_shexp", 2)[0], width),
    }
    return {field: value for field, value in fields.items() if value is not None}


def _sizes(shapes: Mapping[str, tuple[int, ...]], part: str, dimensions: int) -> list[int | None]:
    """The dimensions of a part's tensors; None for what is zero or not known."""
    shape = shapes.get(part, ())
    return [size or None for size in shape] if len(shape) == dimensions else [None] * dimensions


def _quotient(rows: int | None, divisor: int | None) -> int | None:
    return rows // divisor if rows and divisor and rows % divisor == 0 else None
