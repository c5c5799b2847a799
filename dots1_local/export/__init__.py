"""GGUF to a Hugging Face checkpoint of what it decodes to, which any tool of that world reads.

`Export.prepare` decides and checks everything from headers; `run` does the work.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dots1_local.architecture import Dots1Config
from dots1_local.export.configuration import check_computes_the_same, config_json
from dots1_local.export.expert_width import true_width
from dots1_local.export.folder import Folder
from dots1_local.export.layout import Shard, index_json, lay_out, model_tensors, tensors_of
from dots1_local.export.pipeline import write_shards
from dots1_local.export.tokenizer import end_tokens, tokenizer_config_json, tokenizer_json, why_none
from dots1_local.files.gguf import GGUFFile
from dots1_local.progress import Progress, silent
from dots1_local.verify import check_loadable

__all__ = ["SHARD_SIZE", "Export", "Exported", "export_checkpoint"]

SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class Exported:
    """What a finished export wrote."""

    path: Path
    files: tuple[Path, ...]
    nbytes: int
    resumed_shards: int


@dataclass(frozen=True)
class Export:
    """An export that is decided and checked, but not yet written.

    Weights are BF16, as published, and the bias that experts are chosen by is F32. `stored_width`
    is how wide experts are in the GGUF, padding included. `notices` are sentences for the user.
    """

    gguf: GGUFFile
    config: Dots1Config
    stored_width: int
    shards: tuple[Shard, ...] = field(repr=False)
    documents: Mapping[str, bytes] = field(repr=False)
    notices: tuple[str, ...]

    @classmethod
    def prepare(
        cls,
        path: str | Path,
        *,
        shard_size: int = SHARD_SIZE,
        threads: int | None = None,
        progress: Progress = silent,
    ) -> "Export":
        """Read a file's header (any shard of a split one), and find out whether experts are padded.

        Raises:
            GGUFError: not a dots1 GGUF that llama.cpp loads, or one that holds what a checkpoint
                has no place for.
        """
        gguf = GGUFFile.open(path)
        check_loadable(gguf)
        stored = Dots1Config.from_gguf(gguf.keys, gguf.files[0])
        check_computes_the_same(gguf)
        tensors = model_tensors(gguf, stored)
        width = true_width(tensors, stored, threads=threads, progress=progress)
        config = replace(stored, moe_intermediate_size=width)
        stored_width = stored.moe_intermediate_size
        shards = lay_out(tensors_of(gguf, config, stored_width), shard_size)
        documents, notices = _documents(gguf, config)
        documents["model.safetensors.index.json"] = index_json(shards)
        written = {name: _encoded(value) for name, value in documents.items()}
        return cls(gguf, config, stored_width, shards, written, tuple(notices))

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(shard.nbytes for shard in self.shards) + sum(map(len, self.documents.values()))

    def run(
        self,
        output: str | Path,
        *,
        threads: int | None = None,
        force: bool = False,
        progress: Progress = silent,
        on_resume: Progress = silent,
    ) -> Exported:
        """Write the folder, going on at the shard where a former run of the same export stopped.

        With `force` a former export is replaced. `on_resume` is called once, with shards done and
        in all, if there was such a run.

        Raises:
            Dots1Error: the folder is not empty, cannot be written or does not fit the disk, or a
                weight is not finite. What is written so far stays for the next run.
        """
        path = Path(output)
        place = Folder(path, self.shards, self.documents, self._identity(), force=force)
        with place as folder:
            if folder.done:
                on_resume(len(folder.done), len(self.shards), "shards", "")
            write_shards(folder, self.shards, threads=threads, progress=progress)
            folder.publish()
        names = (*(shard.name for shard in self.shards), *self.documents)
        files = tuple(path / name for name in names)
        return Exported(path, files, self.nbytes, len(folder.done))

    def _identity(self) -> str:
        """Changes when the export does; sizes and times stand for the contents of the GGUF."""
        digest = hashlib.sha256()
        for file in self.gguf.files:
            stat = file.stat()
            digest.update(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns};".encode())
        for shard in self.shards:
            digest.update(shard.header)
        for data in self.documents.values():
            digest.update(data)
        digest.update(f"{version('dots1-local')} {version('llama-cpp-python')}".encode())
        return digest.hexdigest()


def export_checkpoint(
    path: str | Path,
    output: str | Path,
    *,
    shard_size: int = SHARD_SIZE,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write what a GGUF decodes to as a Hugging Face checkpoint; see `Export` for the steps."""
    export = Export.prepare(path, shard_size=shard_size, threads=threads)
    return export.run(output, threads=threads, force=force, progress=progress)


def _documents(gguf: GGUFFile, config: Dots1Config) -> tuple[dict[str, Any], list[str]]:
    """The small files as JSON, and notices about them."""
    notices, ends = [], end_tokens(gguf)
    documents: dict[str, Any] = {"config.json": config_json(config, ends)}
    if ends:
        documents["generation_config.json"] = {"eos_token_id": ends}  # config.json has the first
    else:
        notices.append(
            "generation_config.json is left out: the file names no token that ends a response"
        )
    if reason := why_none(gguf):
        notices.append(
            f"tokenizer.json is left out, as none would split text like the file's: {reason}; "
            "take the original model's"
        )
    else:
        context = config.max_position_embeddings
        documents["tokenizer.json"] = tokenizer_json(gguf)
        documents["tokenizer_config.json"] = tokenizer_config_json(gguf, context)
    return documents, notices


def _encoded(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
