"""Convert safetensors to GGUF, streaming.

`Conversion.prepare` decides and checks everything from headers alone; `run` does the work.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gguf import GGUFWriter

from dots1_local.calibrate.manifest import IMATRIX
from dots1_local.convert.budget import Budget, load_calibration, load_refinement, predicted_kl
from dots1_local.convert.metadata import end_tokens, write_metadata
from dots1_local.convert.output import Output, aligned_bytes, lay_out
from dots1_local.convert.pipeline import EncoderName, encoder_named
from dots1_local.convert.tokenizer import Tokenizer, read_tokenizer
from dots1_local.convert.writing import Result, Writing
from dots1_local.errors import UsageError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.progress import Progress, silent
from dots1_local.quant.allocate import Allocator
from dots1_local.quant.allocation import Allocation
from dots1_local.quant.imatrix_file import load_importance
from dots1_local.quant.importance import Importance
from dots1_local.quant.plan import PlannedTensor, QuantPlan, parse_overrides
from dots1_local.quant.recipes import Padding, make_plan
from dots1_local.quant.stock import STOCK_MIXES, require_importance

if TYPE_CHECKING:
    from dots1_local.calibrate.refinement_file import RefinementData
    from dots1_local.convert.refining import Refining

__all__ = ["Budget", "Conversion", "Result", "convert_checkpoint"]

Precision = Literal["F32", "BF16"]


@dataclass(frozen=True)
class Conversion:
    """A conversion that is decided and checked, but not done yet.

    `predicted_kl` is in nats per token, and known if calibration measured every type; if a budget
    decided, `allocation` explains its choice of types. With `refinement`, types that can be refined
    are.
    """

    checkpoint: Checkpoint
    plan: QuantPlan
    tensors: tuple[PlannedTensor, ...]
    tokenizer: Tokenizer = field(repr=False)
    importance: Importance | None = field(default=None, repr=False)
    predicted_kl: float | None = None
    allocation: Allocation | None = field(default=None, repr=False)
    refinement: "RefinementData | None" = field(default=None, repr=False)
    encoder: EncoderName = "ggml"

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
        refine: bool = False,
        encoder: EncoderName = "ggml",
    ) -> "Conversion":
        """Choose every tensor's type, and check that the checkpoint holds every tensor.

        The importance is `imatrix`, or else that in the folder `calibration`. Pass the result of
        `open_hub` for a checkpoint on the hub. To `refine`, the folder must have been calibrated
        for it. With the `encoder` "fast", ggml does not encode the types that
        `refine.fast_encoder` encodes better.

        Raises:
            CheckpointError: the checkpoint is incomplete, corrupt, or of another architecture.
            UsageError: a recipe or type is unknown, or needs importance that is not given.
            Dots1Error: `refine` is set, and the folder lacks a file or is of another model.
        """
        source = _opened(checkpoint)
        if calibration is not None and imatrix is None:
            imatrix = Path(calibration) / IMATRIX
        importance = load_importance(imatrix) if imatrix else None
        if not isinstance(recipe, QuantPlan):
            recipe = make_plan(
                source.config,
                recipe,
                has_importance=importance is not None,
                padding=padding,
                overrides=parse_overrides(overrides),
            )
        if importance is not None and not _is_stock(recipe, encoder, refine):
            importance = importance.filled()
        conversion = replace(cls._checked(source, recipe, importance), encoder=encoder)
        if calibration is None or importance is None:
            if refine:
                raise UsageError("refinement needs the folder of a calibration for refinement")
            return conversion
        folder = Path(calibration)
        if refine:
            _check_refinable(conversion.tensors)
        predicted = predicted_kl(folder, source.config, recipe, importance, refine=refine)
        refinement = load_refinement(folder, source) if refine else None
        return replace(conversion, predicted_kl=predicted, refinement=refinement)

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
        refine: bool = False,
        encoder: EncoderName = "ggml",
        one_layout: bool = False,
    ) -> "Conversion":
        """Choose the types with the least predicted KL divergence within a budget.

        `calibration` is the folder with sensitivity.json and imatrix.gguf; to `refine`, it must
        have been calibrated for that, and the divergence of refined types is predicted. Give
        `split_max_size` here as well as to `run`: a budget of file size includes the headers of
        shards. With `one_layout`, each matrix of experts has one type in all layers.

        Raises:
            CheckpointError: as `prepare`.
            UsageError: the budget cannot be met; the message names what is possible.
            Dots1Error: the folder lacks a file, or its files belong to another model or, unless
                `imatrix` is given, not to each other.
        """
        source = _opened(checkpoint)
        sensitivity, importance = load_calibration(Path(calibration), imatrix, refine=refine)
        refinement = load_refinement(Path(calibration), source) if refine else None
        allocator = Allocator(
            source.config,
            sensitivity,
            covered=importance,
            padding=padding,
            overrides=parse_overrides(overrides),
            cost=aligned_bytes if budget.kind == "size" else attrgetter("nbytes"),
            one_layout=one_layout,
        )
        largest = allocator.reaching(allocator.least_kl, f"measured {budget}")
        undecided = cls._checked(source, largest.plan, importance)
        undecided = replace(undecided, refinement=refinement, encoder=encoder)

        def overhead(allocation: Allocation) -> int:
            return undecided._with(allocation)._overhead(split_max_size)

        parameters = sum(tensor.spec.source_elements for tensor in undecided.tensors)
        return undecided._with(budget.allocate(allocator, parameters, overhead))

    @classmethod
    def _checked(
        cls, source: Checkpoint, plan: QuantPlan, importance: Importance | None
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
        """Bytes of all tensors, without headers."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def file_bytes(self, split_max_size: int | None = None) -> int:
        """Return the bytes of the file or files, with headers and alignment."""
        return self._lay_out(Path("any.gguf"), split_max_size).total_bytes

    def _overhead(self, split_max_size: int | None) -> int:
        return self.file_bytes(split_max_size) - sum(map(aligned_bytes, self.tensors))

    def run(
        self,
        output: str | Path,
        *,
        split_max_size: int | None = None,
        threads: int | None = None,
        force: bool = False,
        low_disk: bool = False,
        device: str | None = None,
        precision: Precision = "F32",
        progress: Progress = silent,
        on_resume: Progress = silent,
        notify: Callable[[str], None] = lambda sentence: None,
    ) -> Result:
        """Write the file; an interrupted run of the same conversion is resumed.

        If there was such a run, `on_resume` is called once, with finished tensors and all tensors.
        The shards of a checkpoint on the hub are fetched into its cache first; with `low_disk` they
        are fetched into the output's folder one after another and removed once converted. Then
        `progress` counts the bytes that are fetched as well as those that are written.

        Refinement computes the layers on the torch `device`, by default a GPU if there is one, and
        multiplies in `precision`. It reads shards in the order of the layers; `notify` hears how
        many bytes it fetches with `low_disk`.

        Raises:
            Dots1Error: the output exists, cannot be written or does not fit the disk, a weight
                is not finite, or the hub cannot be reached or sends damaged files. The next run
                resumes with what is written and fetched.
            UsageError: `low_disk` is given for a folder, which is on the disk already.
        """
        path = Path(output)
        path = path.resolve() if os.path.islink(path) else path  # replace the target, not the link
        refining = self._refining(device, precision)
        return Writing(
            self.checkpoint,
            self._lay_out(path, split_max_size),
            self.tensors,
            self.importance,
            refining,
            self._fingerprint(refining),
            encoder_named(self.encoder),
            threads,
            force,
            low_disk,
            progress,
            on_resume,
            notify,
        ).run()

    def _refining(self, device: str | None, precision: Precision) -> "Refining | None":
        if self.refinement is None or self.importance is None:
            return None
        from dots1_local.convert.refining import Refining  # imports torch

        return Refining(self.refinement, self.importance, device, precision == "BF16")

    def _lay_out(self, path: Path, split_max_size: int | None) -> Output:
        writer = GGUFWriter(None, "dots1")
        tokens = self.refinement.tokens.size if self.refinement else 0
        write_metadata(
            writer, self.checkpoint, self.plan, self.importance, self.predicted_kl, tokens
        )
        if self.encoder != "ggml":
            writer.add_string("dots1_local.encoder", self.encoder)
        self.tokenizer.write(writer)
        return lay_out(path, writer, self.tensors, split_max_size)

    def _fingerprint(self, refining: "Refining | None") -> str:
        """Identify the inputs and the encoders: a resumed file must not mix two of either."""
        encoders = f"{version('dots1-local')} {version('llama-cpp-python')}"
        if self.encoder != "ggml":
            encoders += f" {self.encoder}"
        if refining:
            encoders += f" {refining.fingerprint()}"
        importance = self.importance and self.importance.sha256
        return f"{self.checkpoint.fingerprint} {importance} {encoders}"


def convert_checkpoint(
    checkpoint: str | Path | Checkpoint,
    output: str | Path,
    recipe: str | QuantPlan = "DQ4",
    *,
    imatrix: str | Path | None = None,
    padding: Padding = "auto",
    overrides: Sequence[str] = (),
    **options: Any,
) -> Result:
    """Convert a Hugging Face dots1 checkpoint to GGUF; `options` are those of `Conversion.run`."""
    conversion = Conversion.prepare(
        checkpoint, recipe, imatrix=imatrix, padding=padding, overrides=overrides
    )
    return conversion.run(output, **options)


def _is_stock(plan: QuantPlan, encoder: EncoderName, refine: bool) -> bool:
    """Whether the tensors have to be those of llama-quantize, to the last byte."""
    return plan.recipe in STOCK_MIXES and encoder == "ggml" and not refine


def _check_refinable(tensors: Sequence[PlannedTensor]) -> None:
    from dots1_local.refine.blocks import refinable  # decodes codebooks

    if not any(refinable(tensor.kind) for tensor in tensors):
        kinds = ", ".join(sorted({tensor.kind.name for tensor in tensors}))
        raise UsageError(f"there is nothing to refine in tensors of {kinds}; leave --refine out")


def _opened(checkpoint: str | Path | Checkpoint) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
