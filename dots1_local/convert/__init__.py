"""Safetensors to GGUF, streaming.

`Conversion.prepare` decides and checks everything from headers alone; `run` does the work.
"""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path

from gguf import GGUFWriter

from dots1_local.convert.budget import Budget, load_calibration, predicted_kl
from dots1_local.convert.from_hub import fetch_shards, remove_shards
from dots1_local.convert.metadata import end_tokens, write_metadata
from dots1_local.convert.pipeline import Pipeline, verify_layout
from dots1_local.convert.tokenizer import Tokenizer, read_tokenizer
from dots1_local.convert.writer import ALIGNMENT, Journal, Output, lay_out
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.partial_file import check_target
from dots1_local.progress import Progress, silent
from dots1_local.quant.allocate import Allocator
from dots1_local.quant.allocation import Allocation
from dots1_local.quant.importance import Importance, load_importance
from dots1_local.quant.plan import PlannedTensor, QuantPlan, parse_overrides
from dots1_local.quant.recipes import Padding, make_plan
from dots1_local.quant.stock import require_importance

__all__ = ["Budget", "Conversion", "Result", "convert_checkpoint"]


@dataclass(frozen=True)
class Result:
    """What a finished conversion wrote."""

    paths: tuple[Path, ...]
    nbytes: int
    resumed_tensors: int


@dataclass(frozen=True)
class Conversion:
    """A conversion that is decided and checked, and not yet done.

    `predicted_kl` is in nats a token, known where calibration measured every type; `allocation`
    tells why the types are what they are, where a budget decided.
    """

    checkpoint: Checkpoint
    plan: QuantPlan
    tensors: tuple[PlannedTensor, ...]
    tokenizer: Tokenizer = field(repr=False)
    importance: Importance | None = field(default=None, repr=False)
    predicted_kl: float | None = None
    allocation: Allocation | None = field(default=None, repr=False)

    @classmethod
    def prepare(
        cls,
        checkpoint: str | Path | Checkpoint,
        recipe: str | QuantPlan = "DQ4",
        *,
        imatrix: str | Path | None = None,
        calibration: str | Path | None = None,
        padding: Padding = "auto",
        overrides: Sequence[str] = (),
    ) -> "Conversion":
        """Choose every tensor's type and make sure the checkpoint holds what it promises.

        The importance is `imatrix`, or else that in the folder `calibration`. A checkpoint on the
        hub is given as what `open_hub` returns.

        Raises:
            CheckpointError: the checkpoint is incomplete or corrupt, or of another architecture.
            UsageError: an unknown recipe or type, or one that lacks the importance it needs.
        """
        source = _opened(checkpoint)
        if calibration is not None and imatrix is None:
            imatrix = Path(calibration) / "imatrix.gguf"
        importance = load_importance(imatrix) if imatrix else None
        plan = (
            recipe
            if isinstance(recipe, QuantPlan)
            else make_plan(
                source.config,
                recipe,
                has_importance=importance is not None,
                padding=padding,
                overrides=parse_overrides(overrides),
            )
        )
        conversion = cls._checked(source, plan, importance)
        if calibration is None or importance is None:
            return conversion
        predicted = predicted_kl(Path(calibration), source.config, plan, importance)
        return replace(conversion, predicted_kl=predicted)

    @classmethod
    def allocate(
        cls,
        checkpoint: str | Path | Checkpoint,
        budget: Budget,
        *,
        calibration: str | Path,
        imatrix: str | Path | None = None,
        padding: Padding = "auto",
        overrides: Sequence[str] = (),
        split_max_size: int | None = None,
    ) -> "Conversion":
        """Choose the types that calibration predicts to do least damage within a budget.

        `calibration` is the folder with sensitivity.json and imatrix.gguf. Give `split_max_size`
        here as well as to `run`: the headers of shards count for a budget of file size.

        Raises:
            CheckpointError: as `prepare`.
            UsageError: the budget is out of reach; the message names what is possible.
            Dots1Error: the folder lacks a file, or holds another model's, or files that do not
                belong together; with an `imatrix` the latter is taken as meant.
        """
        source = _opened(checkpoint)
        sensitivity, importance = load_calibration(Path(calibration), imatrix)
        allocator = Allocator(
            source.config,
            sensitivity,
            covered=importance,
            padding=padding,
            overrides=parse_overrides(overrides),
            cost=_aligned_bytes if budget.kind == "size" else attrgetter("nbytes"),
        )
        any_plan = allocator.reaching(allocator.least_kl, f"measured {budget}")
        undecided = cls._checked(source, any_plan.plan, importance)._with(any_plan)

        any_overhead = cache(lambda: undecided._overhead(split_max_size))

        def overhead(allocation: Allocation | None) -> int:
            if allocation is None or split_max_size is None:  # headers differ by shards alone
                return any_overhead()
            return undecided._with(allocation)._overhead(split_max_size)

        parameters = sum(tensor.spec.source_elements for tensor in undecided.tensors)
        return undecided._with(budget.allocate(allocator, parameters, overhead))

    @classmethod
    def _checked(
        cls,
        source: Checkpoint,
        plan: QuantPlan,
        importance: Importance | None,
    ) -> "Conversion":
        tensors = plan.tensors(source.config)
        specs = tuple(tensor.spec for tensor in tensors)
        source.check(specs)
        source.check_nothing_else(specs)
        if importance is not None:
            importance.check(specs)
        require_importance(plan.types, importance or (), plan.recipe)
        tokenizer = read_tokenizer(source.path, source.config.vocab_size, end_tokens(source))
        return cls(source, plan, tensors, tokenizer, importance)

    def _with(self, allocation: Allocation) -> "Conversion":
        plan = allocation.plan
        tensors = plan.tensors(self.checkpoint.config)
        return replace(
            self, plan=plan, tensors=tensors, predicted_kl=allocation.kl, allocation=allocation
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def file_bytes(self, split_max_size: int | None = None) -> int:
        """Bytes of the file or files, headers and alignment included."""
        return self._lay_out(Path("any.gguf"), split_max_size).total_bytes

    def _overhead(self, split_max_size: int | None) -> int:
        return self.file_bytes(split_max_size) - sum(map(_aligned_bytes, self.tensors))

    def run(
        self,
        output: str | Path,
        *,
        split_max_size: int | None = None,
        threads: int | None = None,
        force: bool = False,
        low_disk: bool = False,
        progress: Progress = silent,
        on_resume: Progress = silent,
    ) -> Result:
        """Write the file, going on where a former run of the same conversion stopped.

        `on_resume` is called once, with tensors done and in all, if there was such a run. The
        shards of a checkpoint on the hub are fetched into its cache first; with `low_disk` they
        come to the output's folder one after another, and go when they are converted: `progress`
        counts both what is fetched and what is written.

        Raises:
            Dots1Error: the output exists, cannot be written or does not fit the disk, a weight
                is not finite, the hub cannot be reached or sends damaged files. What is written
                and fetched so far stays for the next run.
            UsageError: `low_disk` of a folder, which is on the disk already.
        """
        path = Path(output)
        # What a link points to is written, not the link.
        path = path.resolve() if os.path.islink(path) else path
        laid_out, source = self._lay_out(path, split_max_size), self.checkpoint
        try:
            _check_target(laid_out, force, source.shards)
            low = fetch_shards(source, laid_out, self.tensors, low_disk, progress)
        except OSError as error:
            raise Dots1Error(f"cannot use {error.filename or path}: {error.strerror}") from None
        with (
            Journal(laid_out, self._fingerprint(), progress, source.fingerprint) as journal,
            low.supply(journal.done) if low else nullcontext() as supply,
        ):
            if journal.done:
                on_resume(len(journal.done), len(self.tensors), "tensors", "")
            source = low.checkpoint if low else source
            Pipeline(source, journal, self.importance, threads, supply).run(progress)
            verify_layout(laid_out)
            journal.publish()
        remove_shards(laid_out)
        return Result(laid_out.paths, laid_out.total_bytes, len(journal.done))

    def _lay_out(self, path: Path, split_max_size: int | None) -> Output:
        writer = GGUFWriter(None, "dots1")
        write_metadata(writer, self.checkpoint, self.plan, self.importance, self.predicted_kl)
        self.tokenizer.write(writer)
        return lay_out(path, writer, self.tensors, split_max_size)

    def _fingerprint(self) -> str:
        """Changes when an input does."""
        shards = self.checkpoint.fingerprint
        # Another encoder may choose other bytes: a file never mixes two.
        return f"{shards} {self.importance and self.importance.sha256} {_encoder_version()}"


def convert_checkpoint(
    checkpoint: str | Path | Checkpoint,
    output: str | Path,
    recipe: str | QuantPlan = "DQ4",
    *,
    imatrix: str | Path | None = None,
    padding: Padding = "auto",
    overrides: Sequence[str] = (),
    split_max_size: int | None = None,
    threads: int | None = None,
    force: bool = False,
    low_disk: bool = False,
    progress: Progress = silent,
) -> Result:
    """Convert a Hugging Face dots1 checkpoint to GGUF; see `Conversion` for the steps."""
    conversion = Conversion.prepare(
        checkpoint, recipe, imatrix=imatrix, padding=padding, overrides=overrides
    )
    return conversion.run(
        output,
        split_max_size=split_max_size,
        threads=threads,
        force=force,
        low_disk=low_disk,
        progress=progress,
    )


def _opened(checkpoint: str | Path | Checkpoint) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)


def _aligned_bytes(tensor: PlannedTensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _encoder_version() -> str:
    return f"{version('dots1-local')} {version('llama-cpp-python')}"


def _check_target(output: Output, force: bool, sources: Sequence[Path]) -> None:
    for path in output.paths:
        if path.is_file() and any(_same(path, source) for source in sources):
            raise Dots1Error(f"{path} is part of the checkpoint; write to another file")
        check_target(path, force=force)


def _same(path: Path, source: Path) -> bool:
    return source.exists() and path.samefile(source)
