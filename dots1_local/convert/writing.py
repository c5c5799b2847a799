"""Write the file of a conversion: tensor after tensor, or layer after layer if it is refined."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dots1_local.convert.from_hub import fetch_shards, refuse_other_commit, shards_folder
from dots1_local.convert.output import Output
from dots1_local.convert.pipeline import Encoder, Pipeline, verify_layout
from dots1_local.convert.writer import Journal, is_complete
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.gguf import cores
from dots1_local.files.partial_file import check_target
from dots1_local.hub.pass_shards import forward_steps, open_shards
from dots1_local.hub.shard_supply import remove_shards
from dots1_local.progress import Progress
from dots1_local.quant.importance import Importance
from dots1_local.quant.plan import PlannedTensor

if TYPE_CHECKING:
    from dots1_local.convert.refined_results import TensorResult
    from dots1_local.convert.refining import Refining

__all__ = ["Result", "Writing"]

Refined = tuple["TensorResult", ...]


@dataclass(frozen=True)
class Result:
    """What a finished conversion wrote; `refined` says what refinement did to each tensor."""

    paths: tuple[Path, ...]
    nbytes: int
    resumed_tensors: int
    refined: "tuple[TensorResult, ...]" = ()


@dataclass(frozen=True)
class Writing:
    """A conversion on its way to its file; see `Conversion.run` for what the fields mean."""

    source: Checkpoint
    output: Output
    tensors: Sequence[PlannedTensor]
    importance: Importance | None
    refining: "Refining | None"
    fingerprint: str
    encoder: Encoder
    threads: int | None
    force: bool
    low_disk: bool
    progress: Progress
    on_resume: Progress
    notify: Callable[[str], None]

    def run(self) -> Result:
        """Write the file, or what is left of it."""
        with self._path_errors():
            force = self.force or is_complete(self.output, self.fingerprint)
            _check_target(self.output, force, self.source.shards)
            write = self._plain() if self.refining is None else self._refined(self.refining)
        source = self.source.fingerprint
        with Journal(self.output, self.fingerprint, self.progress, source) as journal:
            if journal.done:
                self.on_resume(len(journal.done), len(self.tensors), "tensors", "")
            refined = write(journal)
            verify_layout(self.output)
            journal.publish(self._remove_inputs)
        return Result(self.output.paths, self.output.total_bytes, len(journal.done), refined)

    def _remove_inputs(self) -> None:
        """Remove what was fetched and computed for this file alone."""
        remove_shards(shards_folder(self.output))
        if self.refining:
            self.refining.files(self.source, self.output).remove()

    def _plain(self) -> Callable[[Journal], Refined]:
        """Fetch shards, and return a function that converts all tensors."""
        shards = fetch_shards(self.source, self.output, self.tensors, self.low_disk, self.progress)

        def write(journal: Journal) -> Refined:
            with shards.without(journal.done) if shards else nullcontext() as supply:
                source = supply.checkpoint if supply else self.source
                pipeline = Pipeline(
                    source, journal, self.importance, self.threads, supply, self.encoder
                )
                pipeline.run(self.progress)
            return ()

        return write

    def _refined(self, refining: "Refining") -> Callable[[Journal], Refined]:
        """Fetch shards, unless few may be on the disk, and return a function that refines."""
        from dots1_local.convert.refining import RefinedConversion

        refuse_other_commit(self.source, self.output)
        need = refining.need(self.source, self.output)
        need.check()
        steps = forward_steps(self.source.config.num_hidden_layers)
        shards = open_shards(
            self.source, shards_folder(self.output), [steps], need,
            low_disk=self.low_disk, progress=self.progress,
        )  # fmt: skip

        def write(journal: Journal) -> Refined:
            return RefinedConversion(
                refining, shards, journal, self.threads or cores(), self.encoder, self.progress,
                self.notify,
            ).run()  # fmt: skip

        return write

    @contextmanager
    def _path_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = error.filename or self.output.target
            raise Dots1Error(f"cannot use {where}: {error.strerror}") from None


def _check_target(output: Output, force: bool, sources: Sequence[Path]) -> None:
    for path in output.paths:
        if path.is_file() and any(path.samefile(each) for each in sources if each.exists()):
            raise Dots1Error(f"{path} is part of the checkpoint; write to another file")
        check_target(path, force=force)
