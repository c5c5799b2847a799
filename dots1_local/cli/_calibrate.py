"""`dots1 calibrate`: measure importance, sensitivity and reference logits of a checkpoint."""

import importlib.util
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from dots1_local.cli._open import open_checkpoint
from dots1_local.cli._options import (
    CHECKPOINT,
    HUB_PANEL,
    Json,
    Revision,
    Threads,
    argument,
    exit_on_interrupt,
    flag,
    option,
    text_file,
    verb,
)
from dots1_local.cli._output import (
    notice,
    notice_resumed,
    print_json,
    print_table,
    progress_bar,
)
from dots1_local.errors import UsageError
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dots1_local.calibrate.coverage import Coverage
    from dots1_local.files.checkpoint import Checkpoint

    Tokens = NDArray[np.int32]

__all__ = ["CalibrateOptions", "calibrate"]


@dataclass(frozen=True, eq=False, repr=False)
class CalibrateOptions:
    checkpoint: str = argument(CHECKPOINT)
    output: Path = option("Write to this folder.", "--output", "-o", value=MISSING, metavar="DIR")
    file: list[Path] | None = option(
        "Calibrate on this text, UTF-8; - is what is piped in; repeatable.",
        "--file",
        "-f",
        parser=text_file,
        metavar="FILE",
    )
    chat: list[Path] | None = option(
        "Calibrate on these conversations, in the chat template's format; repeatable.",
        metavar="FILE.jsonl",
    )
    logits: Path | None = option(
        "Write the checkpoint's log-probabilities to this file, for dots1 perplexity.",
        metavar="FILE",
    )
    logits_text: Path | None = option("Compute --logits for this text, UTF-8.", metavar="TEXT")
    context: int = option(
        "Cut texts into chunks of this many tokens.", "--context", "-c", value=512, min=16
    )
    chunks: int | None = option("Calibrate on at most this many chunks.", min=1, default="all")
    logits_chunks: int | None = option(
        "Write the logits of at most this many chunks.", min=1, default="all"
    )
    importance_only: bool = flag("Do not measure sensitivity.", "--importance-only")
    refine: bool = flag("Also measure what dots1 convert --refine needs.", "--refine")
    shrink_below: int = option(
        "Shrink the importance of experts that fewer tokens reach towards their layer's "
        "mean; 0 shrinks none.",
        value=100,
        metavar="TOKENS",
        min=0,
    )
    device: str | None = option("Compute on this torch device.", default="a GPU if there is one")
    precision: Literal["F32", "BF16"] = option(
        "Multiply matrices in this type; BF16 is 2 to 4 times faster on CPUs that have it.",
        value="F32",
    )
    revision: Revision = None
    low_disk: bool = flag(
        "Fetch shards when a layer needs them, and delete them after it; the backward pass "
        "fetches them again.",
        "--low-disk",
        panel=HUB_PANEL,
    )
    threads: Threads = None
    force: bool = flag("Replace earlier results, and drop an unfinished run.", "--force")
    json: Json = False


@verb
def calibrate(options: CalibrateOptions) -> None:
    """Measure what quantisation should spare, one layer of the checkpoint at a time.

    This writes DIR/imatrix.gguf, for --imatrix of dots1 convert and of llama-quantize, and
    DIR/sensitivity.json, which tells dots1 convert --calibration DIR what each type does to each
    tensor. With --refine it also writes refinement.safetensors and sensitivity-refined.json, for
    dots1 convert --refine. DIR/routing.safetensors has the experts that tokens chose; dots1 inspect
    DIR shows what a cache of experts would hit. If a run is interrupted, the same command resumes
    it after the last finished layer.

    Examples:

      dots1 calibrate dots.llm1.inst -f calibration.txt -o calibrated

      dots1 calibrate dots.llm1.inst -o calibrated --logits base.kld --logits-text wiki.test.raw

      dots1 calibrate rednote-hilab/dots.llm1.inst -f calibration.txt -o calibrated --low-disk
    """
    _check(options)
    from dots1_local.calibrate.manifest import (
        IMATRIX,
        REFINED_SENSITIVITY,
        REFINEMENT,
        ROUTING,
        SENSITIVITY,
    )
    from dots1_local.evaluate.texts import open_vocabulary, tokenize

    checkpoint = open_checkpoint(options.checkpoint, options.revision, options.low_disk)
    n_ctx, text = options.context, options.logits_text
    files, chats = options.file or [], options.chat or []
    with open_vocabulary(checkpoint) as vocabulary:
        tokens = tokenize(checkpoint, vocabulary, n_ctx, files, chats, options.chunks)
        evaluation = None
        if text:
            limit = options.logits_chunks
            evaluation = tokenize(checkpoint, vocabulary, n_ctx, [text], [], limit)
    if options.refine:
        from dots1_local.refine.token_needs import advice

        if sentence := advice(checkpoint.config, tokens.size):
            notice(sentence)
    coverage = _run(checkpoint, tokens, evaluation, options)
    imatrix = options.output / IMATRIX if tokens.size else None
    measured = imatrix and not options.importance_only
    sensitivity = options.output / SENSITIVITY if measured else None
    names = {"refinement": REFINEMENT, "refined_sensitivity": REFINED_SENSITIVITY}
    refined = {key: options.output / name for key, name in names.items() if options.refine}
    if options.json:
        print_json(
            {
                "imatrix": imatrix and str(imatrix),
                "sensitivity": sensitivity and str(sensitivity),
                "routing": str(options.output / ROUTING) if coverage else None,
                **{key: str(path) for key, path in refined.items()},
                "tokens": tokens.size,
                "layers": [asdict(layer) for layer in coverage],
                "logits": options.logits and str(options.logits),
            }
        )
    elif coverage:
        _show(coverage, options.shrink_below)
    if imatrix is not None:
        also = "".join(f" and {path}" for path in (sensitivity, *refined.values()) if path)
        notice(f"wrote {imatrix}{also} from {tokens.size:,} tokens")
    if options.logits is not None:
        notice(f"wrote {options.logits} ({human_bytes(options.logits.stat().st_size)})")


def _check(options: CalibrateOptions) -> None:
    if not options.file and not options.chat and options.logits is None:
        raise typer.BadParameter("name a text to calibrate on", param_hint="--file / -f")
    if options.refine and not (options.file or options.chat):
        raise typer.BadParameter("--refine needs a text to calibrate on", param_hint="--refine")
    if options.refine and options.importance_only:
        raise typer.BadParameter("--refine and --importance-only exclude each other")
    if (options.logits is None) != (options.logits_text is None):
        raise typer.BadParameter("--logits and --logits-text go together")
    if importlib.util.find_spec("torch") is None:
        raise UsageError("dots1 calibrate computes with PyTorch: pip install 'dots1-local[torch]'")


def _run(
    checkpoint: "Checkpoint",
    tokens: "Tokens",
    evaluation: "Tokens | None",
    options: CalibrateOptions,
) -> "list[Coverage]":
    from dots1_local.calibrate.calibrate import calibrate as run
    from dots1_local.evaluate.logits_file import LogitsWriter, check_logits_target
    from dots1_local.evaluate.texts import dataset_names

    writer, force = None, options.force
    if options.logits is not None and evaluation is not None:
        check_logits_target(options.logits, force)
        vocabulary = checkpoint.config.vocab_size
        writer = LogitsWriter(options.logits, evaluation, vocabulary, force=force)
    with (
        exit_on_interrupt("stopped; run the same command again to resume after the last layer"),
        progress_bar("calibration") as progress,
    ):
        return run(
            checkpoint,
            options.output,
            tokens,
            evaluation=evaluation,
            logits=writer,
            datasets=dataset_names(options.file or [], options.chat or []),
            device=options.device,
            precision=options.precision,
            threads=options.threads,
            sensitivity=not options.importance_only,
            refine=options.refine,
            least=options.shrink_below,
            force=force,
            low_disk=options.low_disk,
            progress=progress,
            on_resume=notice_resumed,
            notify=notice,
        )


def _show(coverage: "list[Coverage]", least: int) -> None:
    """Print how many tokens reached the experts of each layer, and warn if they were few."""
    header = ("layer", "experts", "unseen", f"under {least}", "fewest tokens", "median")
    rows = [(c.layer, c.experts, c.unseen, c.rare, c.fewest, c.median) for c in coverage]
    print_table(header, ([f"{number:,}" for number in row] for row in rows), numbers_from=0)
    if rare := sum(c.rare for c in coverage):
        whole = sum(c.experts for c in coverage)
        notice(
            f"{rare} of {whole} experts saw fewer than {least} tokens, so their importance is in "
            "part the mean of their layer; calibrate on more text"
        )
