"""`dots1 calibrate`: importance, and reference logits, of a checkpoint no memory holds.

Texts and conversations to the tokens that `dots1 calibrate` calibrates on.

llama.cpp's own tokeniser makes them, from a GGUF of the checkpoint's vocabulary alone: calibration
then sees what the model is going to see.
"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dots1_local.cli._output import (
    Json,
    Threads,
    human_bytes,
    notice,
    notice_resumed,
    print_json,
    progress_bar,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dots1_local.calibrate.run import Coverage
    from dots1_local.files.checkpoint import Checkpoint

    Tokens = NDArray[np.int32]

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.chat.message import Message
from dots1_local.chat.prompt import Prompter
from dots1_local.convert.metadata import end_tokens
from dots1_local.convert.tokenizer import write_vocabulary
from dots1_local.engine.vocabulary import Vocabulary
from dots1_local.errors import CheckpointError, UsageError
from dots1_local.evaluate.perplexity import read_text
from dots1_local.files.checkpoint import Checkpoint

__all__ = [
    "Texts",
    "calibrate",
]


def calibrate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write.", metavar="DIR")
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", help="A text to calibrate on, UTF-8; repeatable."),
    ] = None,
    chat: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Conversations to calibrate on, in the chat template's format; repeatable.",
        ),
    ] = None,
    logits: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the checkpoint's log-probabilities for dots1 perplexity."
        ),
    ] = None,
    logits_text: Annotated[
        Path | None, typer.Option(metavar="TEXT", help="The text --logits is about, UTF-8.")
    ] = None,
    context: Annotated[
        int, typer.Option("--context", "-c", min=16, help="Tokens in a chunk.")
    ] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, help="Calibrate on at most so many chunks.")
    ] = None,
    logits_chunks: Annotated[
        int | None, typer.Option(min=1, help="Write the logits of at most so many chunks.")
    ] = None,
    importance_only: Annotated[
        bool, typer.Option("--importance-only", help="Leave sensitivity out.")
    ] = False,
    shrink_below: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            min=0,
            help="Draw experts that fewer tokens reach towards their layer's mean; 0 draws none.",
        ),
    ] = 100,
    device: Annotated[
        str | None, typer.Option(help="Where torch computes.", show_default="a GPU if there is one")
    ] = None,
    precision: Annotated[
        Literal["F32", "BF16"],
        typer.Option(help="Of matrix products; BF16 is 2 to 4 times faster where a CPU has it."),
    ] = "F32",
    threads: Threads = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace results, and drop another unfinished run.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure what quantisation should spare, streaming the checkpoint a layer at a time.

    Writes DIR/imatrix.gguf, for --imatrix of dots1 convert and of llama-quantize, and
    DIR/sensitivity.json, what each type does to each tensor, for --calibration of dots1 convert. An
    interrupted run goes on after the last layer it finished when the same command is run again.

    Examples:

      dots1 calibrate dots.llm1.inst -f calibration.txt -o calibrated

      dots1 calibrate dots.llm1.inst -o calibrated --logits base.kld --logits-text wiki.test.raw
    """
    if not text and not chat and logits is None:
        raise typer.BadParameter("name a text to calibrate on", param_hint="--file / -f")
    if (logits is None) != (logits_text is None):
        raise typer.BadParameter("--logits and --logits-text go together")
    _need_torch()
    from dots1_local.files.checkpoint import Checkpoint

    source = Checkpoint.open(checkpoint)
    with Texts(source, context) as texts:
        calibration = texts.chunks(text or [], chat or [], chunks)
        evaluation = texts.chunks([logits_text], [], logits_chunks) if logits_text else None
    covered = _run(
        source,
        output,
        calibration,
        evaluation,
        logits,
        datasets=[
            *(path.name for path in text or []),
            *(f"{path.name} (chat)" for path in chat or []),
        ],
        device=device,
        precision=precision,
        threads=threads,
        sensitivity=not importance_only,
        least=shrink_below,
        force=force,
    )
    imatrix = output / "imatrix.gguf" if calibration.size else None
    sensitivity = output / "sensitivity.json" if imatrix and not importance_only else None
    if json:
        print_json(_as_json(covered, imatrix, sensitivity, calibration.size, logits))
    elif covered:
        _report(covered, shrink_below)
    if imatrix is not None:
        also = f" and {sensitivity}" if sensitivity else ""
        notice(f"wrote {imatrix}{also} from {calibration.size:,} tokens")
    if logits is not None:
        notice(f"wrote {logits} ({human_bytes(logits.stat().st_size)})")


def _need_torch() -> None:
    from importlib.util import find_spec

    from dots1_local.errors import UsageError

    if find_spec("torch") is None:
        raise UsageError("dots1 calibrate computes with PyTorch: pip install 'dots1-local[torch]'")


def _run(
    checkpoint: "Checkpoint",
    output: Path,
    tokens: "Tokens",
    evaluation: "Tokens | None",
    logits: Path | None,
    *,
    force: bool,
    **settings: Any,
) -> "list[Coverage]":
    from dots1_local.calibrate.run import calibrate as library
    from dots1_local.evaluate.logits_writer import LogitsWriter, check_logits_target

    writer = None
    if logits is not None and evaluation is not None:
        check_logits_target(logits, force)
        writer = LogitsWriter(logits, evaluation, checkpoint.config.vocab_size, force=force)
    try:
        with progress_bar("calibration") as progress:
            return library(
                checkpoint,
                output,
                tokens,
                evaluation=evaluation,
                logits=writer,
                force=force,
                progress=progress,
                on_resume=notice_resumed,
                **settings,
            )
    except KeyboardInterrupt:
        notice("stopped; run the same command again to go on after the last finished layer")
        raise typer.Exit(130) from None


def _as_json(
    covered: "list[Coverage]",
    imatrix: Path | None,
    sensitivity: Path | None,
    tokens: int,
    logits: Path | None,
) -> dict[str, Any]:
    return {
        "imatrix": str(imatrix) if imatrix else None,
        "sensitivity": str(sensitivity) if sensitivity else None,
        "tokens": tokens,
        "layers": [asdict(coverage) for coverage in covered],
        "logits": str(logits) if logits else None,
    }


def _report(covered: "list[Coverage]", least: int) -> None:
    """How many tokens reached the experts of each layer, and a word where they were few."""
    from dots1_local.cli._output import print_table

    header = ("layer", "experts", "unseen", f"under {least}", "fewest tokens", "median")
    rows = [(c.layer, c.experts, c.unseen, c.rare, c.fewest, c.median) for c in covered]
    print_table(header, ([f"{number:,}" for number in row] for row in rows), numbers_from=0)
    if rare := sum(c.rare for c in covered):
        whole = sum(c.experts for c in covered)
        notice(
            f"{rare} of {whole} experts saw fewer than {least} tokens, and their importance is "
            "in part their layer's mean; calibrate on more text"
        )


_ROLES = ("system", "user", "assistant")


class Texts:
    """A checkpoint's tokeniser, and chunks of `n_ctx` tokens; use it in a `with` statement."""

    def __init__(self, checkpoint: Checkpoint, n_ctx: int) -> None:
        self._end, self._n_ctx = end_tokens(checkpoint)[:1], n_ctx
        self._name = str(checkpoint.path)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            write_vocabulary(checkpoint, path)
            self._vocabulary = Vocabulary.open(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._vocabulary.__exit__(*exception)

    def chunks(
        self, texts: Sequence[Path], chats: Sequence[Path], n_chunks: int | None
    ) -> NDArray[np.int32]:
        """Tokens (chunks, n_ctx) of all files, one after another, the rest cut off.

        Raises:
            UsageError: a file cannot be read, or all have fewer than 2 * n_ctx tokens.
            CheckpointError: there are `chats`, but no chat template.
        """
        tokens: list[int] = []
        for path in texts:
            tokens += self._vocabulary.tokenize(read_text(path), special=False, add_bos=True)
        for path in chats:
            for messages in _conversations(path):
                tokens += self._conversation(messages)
        n_ctx, names = self._n_ctx, ", ".join(map(str, (*texts, *chats)))
        if names and len(tokens) < 2 * n_ctx:  # what llama-imatrix and llama-perplexity ask for
            raise UsageError(
                f"{names} has {len(tokens)} tokens; a context of {n_ctx} needs {2 * n_ctx} or more"
            )
        count = min(len(tokens) // n_ctx, n_chunks or len(tokens))
        return np.array(tokens[: count * n_ctx], np.int32).reshape(count, n_ctx)

    def _conversation(self, messages: list[Message]) -> list[int]:
        """What the model had read and written by the end of its last answer."""
        prompt = self._prompter.tokens(messages[:-1])
        return [*prompt, *self._prompter.content(messages[-1]), *self._end]

    @cached_property
    def _prompter(self) -> Prompter:
        if "tokenizer.chat_template" not in self._vocabulary.gguf.keys:
            raise CheckpointError(
                f"{self._name} has no chat template, which --chat needs; calibrate it with -f"
            )
        return Prompter(self._vocabulary, self._name)


def _conversations(path: Path) -> Iterator[list[Message]]:
    """Each line's `{"messages": [{"role": ..., "content": ...}, ...]}`, the last an answer."""
    # splitlines() would also split at U+2028 and its like, which JSON strings may hold as they are.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            messages = [Message(m["role"], m["content"]) for m in json.loads(line)["messages"]]
            sound = all(m.role in _ROLES and isinstance(m.text, str) for m in messages)
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound or len(messages) < 2 or messages[-1].role != "assistant":
            raise UsageError(
                f"{path} has no conversation in line {number}; it takes "
                '{"messages": [{"role": ..., "content": ...}, ...]} that ends with an assistant'
            )
        yield messages
