"""Which tensors an exported checkpoint holds, in which shard and where, from headers alone."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from math import prod

from dots1_local.architecture import Dots1Config, Role, TensorSpec
from dots1_local.errors import GGUFError
from dots1_local.files.gguf import GGUFFile, GGUFTensor
from dots1_local.files.safetensors import pack_header
from dots1_local.ggml import TYPES, QuantType
from dots1_local.verify.tensors import expected_tensors

__all__ = ["ExportedTensor", "Shard", "exported_tensors", "index_json", "lay_out", "model_tensors"]

_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor of the checkpoint, and where the GGUF's tensor `stored` holds it.

    Its rows begin at `first_row`, counted over all experts. If the stored rows are longer, the rest
    of each is padding.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    stored: GGUFTensor
    first_row: int

    @property
    def dtype(self) -> str:
        """BF16, except for the bias that chooses experts, as in published checkpoints."""
        return "F32" if self.name.endswith(_BIAS) else "BF16"

    @property
    def kind(self) -> QuantType:
        """The type in the checkpoint."""
        return TYPES[self.dtype]

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.kind.bytes


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors, each with its offset from the file's beginning."""

    name: str
    header: bytes
    tensors: tuple[tuple[ExportedTensor, int], ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor, _ in self.tensors)


def model_tensors(gguf: GGUFFile, config: Dots1Config) -> dict[str, GGUFTensor]:
    """The tensors of a file that llama.cpp can load, by name.

    Raises:
        GGUFError: a tensor has no place in a checkpoint, or a type that is not decoded.
    """
    specs = expected_tensors(config, gguf, config.moe_intermediate_size)
    wanted = {spec.name for spec in specs}
    for tensor in gguf.tensors:
        if tensor.name not in wanted:
            raise GGUFError(
                f"{tensor.file} has {tensor.name}, which has no place in a Hugging Face checkpoint "
                "of dots1"
            )
        if tensor.type not in TYPES:
            raise GGUFError(
                f"{tensor.file} stores {tensor.name} as {tensor.type}, but dots1-local decodes "
                f"only {', '.join(TYPES)}"
            )
    return {tensor.name: tensor for tensor in gguf.tensors}


def exported_tensors(
    gguf: GGUFFile, config: Dots1Config, stored_width: int
) -> list[ExportedTensor]:
    """Every tensor in the published order: layer by layer, and expert by expert in a layer.

    `config` has the true expert width; `stored_width` may include padding.
    """
    stored = {tensor.name: tensor for tensor in gguf.tensors}
    specs = expected_tensors(config, gguf, stored_width)
    ordered: list[ExportedTensor] = []
    for (_, role), group in groupby(specs, key=lambda spec: (spec.layer, spec.role)):
        parts = [list(_parts(spec, stored[spec.name])) for spec in group]
        by_expert = zip(*parts, strict=True) if role == "routed" else parts
        ordered += chain.from_iterable(by_expert)
    return ordered


def _parts(spec: TensorSpec, stored: GGUFTensor) -> Iterator[ExportedTensor]:
    rows = spec.rows // len(spec.sources)
    for index, source in enumerate(spec.sources):
        yield ExportedTensor(source, spec.role, spec.source_shape, stored, index * rows)


def lay_out(tensors: Iterable[ExportedTensor], shard_size: int) -> tuple[Shard, ...]:
    """Shards of at most `shard_size` bytes of tensors; a larger tensor gets its own shard."""
    groups: list[list[ExportedTensor]] = []
    room = 0
    for tensor in tensors:
        if not groups or tensor.nbytes > room:
            groups.append([])
            room = shard_size
        groups[-1].append(tensor)
        room -= tensor.nbytes
    count = len(groups)
    return tuple(
        _shard(f"model-{number:05}-of-{count:05}.safetensors", group)
        for number, group in enumerate(groups, 1)
    )


def _shard(name: str, tensors: Sequence[ExportedTensor]) -> Shard:
    """F32 tensors come first, so that every number is aligned."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.kind.bytes)
    described = {tensor.name: (tensor.dtype, tensor.shape) for tensor in ordered}
    header, offsets = pack_header(described, {"format": "pt"})
    return Shard(name, header, tuple((tensor, offsets[tensor.name]) for tensor in ordered))


def index_json(shards: Sequence[Shard]) -> dict[str, object]:
    """The contents of model.safetensors.index.json."""
    weight_map = {tensor.name: shard.name for shard in shards for tensor, _ in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor, _ in shard.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
