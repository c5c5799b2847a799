"""GGUF to a Hugging Face checkpoint, for tools that read only those.

`Export.prepare` decides and checks everything from headers; `run` does the work.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from dots1_local.architecture import Dots1Config
from dots1_local.export.decode import write_shards
from dots1_local.export.documents import check_computes_the_same, documents, encoded
from dots1_local.export.expert_width import true_width
from dots1_local.export.folder import ExportFolder
from dots1_local.export.shards import Shard, exported_tensors, index_json, lay_out, model_tensors
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

    Weights become BF16, as published; the bias that chooses experts becomes F32. `stored_width` is
    the width of experts in the GGUF, with padding. `notices` are sentences for the user.
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
        """Read a file's header (any shard of a split one) and measure the padding of experts.

        Raises:
            GGUFError: llama.cpp would not load the file as dots1, or the file holds something that
                has no place in a checkpoint.
        """
        gguf = GGUFFile.open(path)
        check_loadable(gguf)
        stored = Dots1Config.from_gguf(gguf.keys, gguf.files[0])
        check_computes_the_same(gguf)
        tensors = model_tensors(gguf, stored)
        width = true_width(tensors, stored, threads=threads, progress=progress)
        config = replace(stored, moe_intermediate_size=width)
        stored_width = stored.moe_intermediate_size
        shards = lay_out(exported_tensors(gguf, config, stored_width), shard_size)
        small, notices = documents(gguf, config)
        small["model.safetensors.index.json"] = encoded(index_json(shards))
        return cls(gguf, config, stored_width, shards, small, tuple(notices))

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
        """Write the folder; resume at the shard where a former run of the same export stopped.

        With `force` a former export is replaced. If there was a former run, `on_resume` is called
        once, with the number of finished shards and of all shards.

        Raises:
            Dots1Error: the folder is not empty, cannot be written or does not fit the disk, or a
                weight is not finite. The next run takes over what is written so far.
        """
        path = Path(output)
        place = ExportFolder(path, self.shards, self.documents, self._identity(), force=force)
        with place as folder:
            if folder.done:
                on_resume(len(folder.done), len(self.shards), "shards", "")
            write_shards(folder, self.shards, threads=threads, progress=progress)
            folder.publish()
        names = (*(shard.name for shard in self.shards), *self.documents)
        files = tuple(path / name for name in names)
        return Exported(path, files, self.nbytes, len(folder.done))

    def _identity(self) -> str:
        """A digest of what the export depends on; files count with their sizes and times."""
        digest = hashlib.sha256()
        for file in self.gguf.files:
            stat = file.stat()
            digest.update(os.fsencode(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns};"))
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
    """Decode a GGUF into a Hugging Face checkpoint; see `Export` for the steps."""
    export = Export.prepare(path, shard_size=shard_size, threads=threads)
    return export.run(output, threads=threads, force=force, progress=progress)
