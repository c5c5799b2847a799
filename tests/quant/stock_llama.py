"""The installed llama.cpp as an oracle for quantisation, and dots1 models for it to quantise."""

import ctypes
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from llama_cpp import _logger
from numpy.typing import NDArray

from dots1_local.architecture import Dots1Config, TensorSpec, inventory
from dots1_local.files.gguf_header import GGUFHeader, GGUFTensor
from dots1_local.ggml import quant_type
from dots1_local.quant.plan import Override

Importances = Mapping[str, NDArray[np.float32]]

FULL = Dots1Config(
    hidden_size=4096, num_hidden_layers=62, num_attention_heads=32, num_key_value_heads=32,
    head_dim=128, intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=128,
    n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, routed_scaling_factor=2.5,
    norm_topk_prob=True, vocab_size=152064, rms_norm_eps=1e-5, rope_theta=1e7,
    max_position_embeddings=32768,
)  # fmt: skip


class StockError(Exception):
    """llama.cpp refused; the message is its log."""


def write_model(path: Path, config: Dots1Config, seed: int | None = None) -> Path:
    """A dots1 GGUF without tokenizer: BF16 matrices, F32 norms and routers.

    Values are random with outliers; without a seed the tensors' bytes are a hole in the file.
    """
    writer = GGUFWriter(None, "dots1")
    _add_keys(writer, config)
    for spec in inventory(config):
        kind = GGMLQuantizationType[source_type(spec)]
        size = 2 if kind == GGMLQuantizationType.BF16 else 4
        writer.add_tensor_info(
            spec.name, spec.shape, np.dtype(np.float32), size * spec.elements, raw_dtype=kind
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    _fill(path, config, seed)
    return path


def source_type(spec: TensorSpec) -> str:
    """The type of a tensor in a BF16 conversion."""
    return "F32" if spec.role in ("norm", "router") else "BF16"


def _add_keys(writer: GGUFWriter, config: Dots1Config) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _fill(path: Path, config: Dots1Config, seed: int | None) -> None:
    end = path.stat().st_size
    offsets = []
    for spec in inventory(config):
        offsets.append(-(-end // 32) * 32)
        end = offsets[-1] + spec.elements * (2 if source_type(spec) == "BF16" else 4)
    with path.open("r+b") as file:
        file.truncate(-(-end // 32) * 32)
        if seed is None:
            return
        rng = np.random.RandomState(seed)
        for spec, offset in zip(inventory(config), offsets, strict=True):
            file.seek(offset)
            file.write(_random(rng, spec).tobytes())


def _random(rng: np.random.RandomState, spec: TensorSpec) -> NDArray[np.generic]:
    # A frozen generator, integers and exact arithmetic: the same bits on every machine.
    values = rng.randint(-1000, 1001, spec.elements).astype(np.float32) / np.float32(32768)
    values[rng.randint(0, spec.elements, 1 + spec.elements // 200)] *= np.float32(8)
    if source_type(spec) == "F32":
        return values
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def tensors_of(path: Path) -> dict[str, GGUFTensor]:
    """The tensor table of a GGUF file."""
    return {tensor.name: tensor for tensor in GGUFHeader.read(path).tensors}


def read_bytes(path: Path, tensor: GGUFTensor) -> NDArray[np.uint8]:
    """The bytes of a tensor."""
    return np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.offset)


def read_rows(path: Path, name: str) -> NDArray[np.float32]:
    """Read a BF16 tensor of a model as float32."""
    tensor = tensors_of(path)[name]
    raw = read_bytes(path, tensor).view(np.uint16)
    return (raw.astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)


def stock_quantise(
    source: Path,
    target: Path,
    file_type: int,
    importance: Importances | None = None,
    overrides: Sequence[Override] = (),
) -> None:
    """llama_model_quantize, which also decodes quantised tensors.

    Raises:
        StockError: it refused.
    """
    _quantise(source, target, file_type, importance, overrides, dry_run=False)


def stock_types(
    source: Path,
    file_type: int,
    importance: Importances | None = None,
    overrides: Sequence[Override] = (),
) -> dict[str, str]:
    """The types that llama_model_quantize would write, from the log of its dry run."""
    log = _quantise(source, Path("unused"), file_type, importance, overrides, dry_run=True)
    pattern = (
        r"\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = +(\S+), size = .*? MiB(?: -> .*?\((\S+)\))?\n"
    )
    rows = re.findall(pattern, log)
    return {name: quant_type(after or before).name for name, before, after in rows}


def _quantise(
    source: Path,
    target: Path,
    file_type: int,
    importance: Importances | None,
    overrides: Sequence[Override],
    dry_run: bool,
) -> str:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.dry_run = file_type, 2, dry_run
    parameters.allow_requantize = True
    entries = [
        (name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
        for name, values in (importance or {}).items()
    ]
    if importance is not None:
        table = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)
        parameters.imatrix = table
    if overrides:
        pairs = [(o.pattern.pattern.encode(), quant_type(o.type).ggml) for o in overrides]
        parameters.tt_overrides = (
            llama_cpp.llama_model_tensor_override * (len(pairs) + 1)
        )(*pairs)  # fmt: skip
    with captured_log() as log:
        failed = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(parameters)
        )
    if failed:
        raise StockError("".join(log))
    return "".join(log)


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """The text that llama.cpp logs in the block."""
    pieces: list[str] = []

    def append(level: int, text: bytes, user_data: object) -> None:
        pieces.append(text.decode(errors="replace"))

    keep = llama_cpp.llama_log_callback(append)
    llama_cpp.llama_log_set(keep, None)
    try:
        yield pieces
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, None)


@cache
def random_importance(config: Dots1Config, seed: int = 1) -> dict[str, NDArray[np.float32]]:
    """Importance, (experts, columns), for every tensor that an imatrix run covers."""
    rng = np.random.RandomState(seed)
    return {
        spec.name: (rng.randint(1, 10000, (spec.rows // spec.shape[-2], spec.columns)) ** 2 / 1e6)
        .astype(np.float32)
        for spec in inventory(config)
        if spec.role in ("attention", "dense", "shared", "routed")
    }  # fmt: skip
