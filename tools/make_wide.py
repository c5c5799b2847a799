"""Write random dots1 checkpoints in the published layout, at the real widths or smaller.

    python -m tools.make_wide build/wide --moe 2        1 dense + 2 MoE layers: 12 GB
    python -m tools.make_wide build/full --moe 61 --shards 60 --headers-only
    python -m tools.make_wide build/micro --moe 1 --hidden 256 --heads 4 --dense-width 512 \
        --experts 4 --top 2 --width 64 --vocab 512 --shards 3

`--headers-only` writes true headers and sparse files: the whole 286 GB geometry in seconds.
Tests call `write_checkpoint(path, published_config(...))`.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from itertools import groupby
from math import prod
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import Dots1Config, inventory
from tools.make_tokenizer import ordinary_tokens, write_tokenizer

__all__ = ["published_config", "write_checkpoint"]

_CHUNK = 4 << 20  # weights generated at a time

Tensors = list[tuple[str, tuple[int, ...]]]


def published_config(**changes: Any) -> dict[str, Any]:
    """config.json of dots.llm1.base, with `changes`; the end token follows the vocabulary."""
    vocab = changes.get("vocab_size", 152064)
    config = {
        "architectures": ["Dots1ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": ordinary_tokens(vocab),
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 10944,
        "max_position_embeddings": 32768,
        "model_type": "dots1",
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 62,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "routed_scaling_factor": 2.5,
        "sliding_window": None,
        "topk_method": "noaux_tc",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.3",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab,
    }
    return config | changes


def write_checkpoint(
    path: str | Path,
    config: dict[str, Any],
    shards: int = 1,
    headers_only: bool = False,
    seed: int = 0,
) -> Path:
    """Write a checkpoint of `config` (the contents of its config.json) into the folder `path`.

    The weights depend on `seed` and `config`, not on the number of shards. A single shard is
    `model.safetensors` without an index, as the Hugging Face libraries write it.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    end = config["eos_token_id"]
    generation = {"_from_model_config": True, "eos_token_id": end}
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(folder, config["vocab_size"])
    groups = _split(_tensors(Dots1Config.from_json(config)), shards)
    _write_shards(folder, groups, headers_only, np.random.Generator(np.random.SFC64(seed)))
    return folder


def _tensors(config: Dots1Config) -> Tensors:
    """Every tensor under its published name, in natural order: an expert's three are adjacent."""
    found = {name: spec.source_shape for spec in inventory(config) for name in spec.sources}
    return sorted(found.items(), key=lambda item: _natural(item[0]))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in name.split(".")]


def _nbytes(shape: tuple[int, ...]) -> int:
    return prod(shape) * 2


def _split(tensors: Tensors, shards: int) -> list[Tensors]:
    """At most `shards` groups of about equal size, in order."""
    total = sum(_nbytes(shape) for _, shape in tensors)
    numbers, start = [], 0
    for _, shape in tensors:
        numbers.append(start * shards // total)
        start += _nbytes(shape)
    grouped = groupby(zip(numbers, tensors, strict=True), key=lambda pair: pair[0])
    return [[tensor for _, tensor in group] for _, group in grouped]


def _write_shards(
    folder: Path, groups: list[Tensors], headers_only: bool, rng: np.random.Generator
) -> None:
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        if len(groups) == 1:
            name = "model.safetensors"
        _write_shard(folder / name, tensors, headers_only, rng)
        weight_map |= dict.fromkeys((tensor for tensor, _ in tensors), name)
    if len(groups) > 1:
        total = sum(_nbytes(shape) for tensors in groups for _, shape in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(
    path: Path, tensors: Tensors, headers_only: bool, rng: np.random.Generator
) -> None:
    header, end = _header(tensors)
    with open(path, "wb") as file:
        file.write(header)
        if headers_only:
            file.truncate(len(header) + end)
            return
        for name, shape in tensors:
            for chunk in _weights(name, prod(shape), rng):
                file.write(chunk.data)


def _header(tensors: Tensors) -> tuple[bytes, int]:
    """The safetensors header, length prefix included, and the bytes of data that follow it."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + _nbytes(shape)
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text, end


def _weights(name: str, count: int, rng: np.random.Generator) -> Iterator[NDArray[np.uint16]]:
    """bf16 bit patterns: about 1 for norms, normal with deviation 0.02 otherwise."""
    table = _NORMS if name.endswith("norm.weight") else _MATRICES
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        raw = rng.bit_generator.random_raw(-(-size // 4))
        yield table[np.asarray(raw).view(np.uint16)[:size]]


def _quantiles(mean: float) -> NDArray[np.uint16]:
    """65,536 quantiles of the normal distribution as bf16 bits.

    Looking up 16 random bits costs 2 ns a weight, so that generation keeps up with the disk.
    """
    normal = NormalDist(mean, 0.02)
    values = [normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)]
    bits = np.array(values, np.float32).view(np.uint32)
    return ((bits + 0x8000) >> 16).astype(np.uint16)


_NORMS, _MATRICES = _quantiles(1.0), _quantiles(0.0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="folder to write")
    for option, default, what in (
        ("--dense", 1, "layers with a plain FFN"),
        ("--moe", 2, "layers with routed experts"),
        ("--hidden", 4096, "hidden size"),
        ("--heads", 32, "attention heads; hidden / heads is the head dimension"),
        ("--dense-width", 10944, "width of a plain FFN"),
        ("--experts", 128, "routed experts of a layer"),
        ("--width", 1408, "width of a routed expert"),
        ("--top", 6, "experts a token is routed to"),
        ("--shared", 2, "shared experts"),
        ("--vocab", 152064, "vocabulary rows, 272 or more"),
        ("--shards", 4, "safetensors files, at most"),
        ("--seed", 0, "of the random weights"),
    ):
        parser.add_argument(option, type=int, default=default, help=f"{what} [{default}]")
    parser.add_argument("--headers-only", action="store_true", help="sparse files without weights")
    return parser.parse_args()


def main() -> None:
    """Write the checkpoint that the command line describes."""
    args = _arguments()
    config = published_config(
        hidden_size=args.hidden,
        num_hidden_layers=args.dense + args.moe,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        intermediate_size=args.dense_width,
        moe_intermediate_size=args.width,
        n_routed_experts=args.experts,
        n_shared_experts=args.shared,
        num_experts_per_tok=min(args.top, args.experts),
        first_k_dense_replace=args.dense,
        vocab_size=args.vocab,
    )
    total = sum(_nbytes(shape) for _, shape in _tensors(Dots1Config.from_json(config)))
    args.path.mkdir(parents=True, exist_ok=True)
    if not args.headers_only and total > shutil.disk_usage(args.path).free:
        sys.exit(f"{args.path} has no room for {total / 1e9:.1f} GB; try --headers-only")
    write_checkpoint(args.path, config, args.shards, args.headers_only, args.seed)
    print(f"{args.path}: {total / 1e9:.1f} GB of weights", file=sys.stderr)


if __name__ == "__main__":
    main()
