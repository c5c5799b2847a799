"""What a GGUF model holds: its keys, and its tensors with their roles, split files included."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dots1_local.architecture import Role
from dots1_local.errors import GGUFError
from dots1_local.gguf_header import GGUFTensor, Keys, Value, read_header

__all__ = ["GGUFFile", "GGUFTensor", "Value", "role_of"]

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")

_ROLES: dict[str, Role] = {
    "token_embd": "embedding",
    "output": "head",
    "output_norm": "norm",
    **dict.fromkeys(("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"), "norm"),
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), "attention"),
    **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "dense"),
    **dict.fromkeys(("ffn_gate_inp", "exp_probs_b"), "router"),
    **dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"), "shared"),
    **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), "routed"),
}


def role_of(name: str) -> Role | None:
    """The role of a GGUF tensor by its name; None where no dots1 model has such a tensor."""
    match = re.fullmatch(r"(?:blk\.\d+\.)?(\w+)\.(?:weight|bias)", name)
    return _ROLES.get(match[1]) if match else None


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file; of a split one, the first shard's keys and all tensors."""

    files: tuple[Path, ...]
    keys: Mapping[str, Value]
    tensors: tuple[GGUFTensor, ...]

    @classmethod
    def open(cls, path: str | Path) -> "GGUFFile":
        """Read the header at `path`, which may be any shard of a split file.

        Raises:
            GGUFError: missing, no GGUF, truncated, inconsistent, or a shard is not there.
        """
        keys, tensors = read_header(Path(path))
        count = keys.get("split.count", 1)
        if not isinstance(count, int) or count <= 1:
            return cls((Path(path),), keys, tensors)
        files = _shards(Path(path), count)
        shards = [read_header(file) for file in files]
        everything = tuple(tensor for _, part in shards for tensor in part)
        _check_split(files, [keys for keys, _ in shards], everything)
        return cls(files, shards[0][0], everything)

    @property
    def nbytes(self) -> int:
        """Size on disk of all files together."""
        return sum(file.stat().st_size for file in self.files)


def _shards(path: Path, count: int) -> tuple[Path, ...]:
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise GGUFError(
            f"{path} is one of {count} shards but is not named NAME-00001-of-{count:05}.gguf; "
            "give it its name back"
        )
    names = (f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))
    files = tuple(path.with_name(name) for name in names)
    for file in files:
        if not file.exists():
            raise GGUFError(f"shard {file} is missing; fetch it, {count} shards make up the model")
    return files


def _check_split(
    files: tuple[Path, ...], keys: list[Keys], tensors: tuple[GGUFTensor, ...]
) -> None:
    for number, (file, own) in enumerate(zip(files, keys, strict=True)):
        if (own.get("split.no"), own.get("split.count")) != (number, len(files)):
            raise GGUFError(f"{file} is not shard {number + 1} of {len(files)} of one model")
    promised = keys[0].get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise GGUFError(
            f"the shards of {files[0]} hold {len(tensors)} tensors where {promised} are promised"
        )
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise GGUFError(f"two shards of {files[0]} hold a tensor of the same name")
