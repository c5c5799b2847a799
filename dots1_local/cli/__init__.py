"""The `dots1` command: each verb is a file that parses options, calls the library, and prints.

Verbs import heavy modules (numpy, llama_cpp) when they run, so that `dots1 --help` is instant.
"""

import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from dots1_local.cli._bench import bench
from dots1_local.cli._calibrate import calibrate
from dots1_local.cli._chat import chat
from dots1_local.cli._convert import convert
from dots1_local.cli._evaluate import evaluate
from dots1_local.cli._export import export
from dots1_local.cli._hardware import hardware
from dots1_local.cli._inspect import inspect
from dots1_local.cli._output import show_engine_log
from dots1_local.cli._perplexity import perplexity
from dots1_local.cli._plan import plan
from dots1_local.cli._serve import serve
from dots1_local.cli._verify import verify
from dots1_local.cli._worker import worker
from dots1_local.errors import Dots1Error

__all__ = ["app", "main"]

app = typer.Typer(
    name="dots1",
    help="Run rednote's dots.llm1 on hardware you own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verb in (
    convert,
    calibrate,
    export,
    inspect,
    verify,
    perplexity,
    evaluate,
    chat,
    serve,
    hardware,
    plan,
    bench,
    worker,
):
    app.command(_verb.__name__)(_verb)

_debug = False


def _version(value: bool) -> None:
    if value:
        from dots1_local import __version__

        typer.echo(f"dots1-local {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what the engine and drivers log.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    global _debug  # noqa: PLW0603 -- main() outlives the parsed context
    _debug = debug
    if verbose:
        show_engine_log()


def main() -> None:
    """Run the command line; print an expected failure as one sentence on stderr."""
    _open_missing_streams()
    _escape_what_has_no_encoding()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except Dots1Error as error:
        if _debug:
            raise
        print(f"dots1: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # typer does so too, but not while it makes the command
        sys.exit(130)
    except (MemoryError, ImportError) as error:
        if _debug or not _is_about_memory(error):
            raise
        print(
            "dots1: not enough memory for this command; free some, or allow more", file=sys.stderr
        )
        sys.exit(1)
    except OSError as error:  # the library words its own errors; what is left concerns stdout
        if _debug:
            raise
        if not isinstance(error, BrokenPipeError):  # it is not an error if the reader has left
            print(f"dots1: cannot write the output: {error.strerror or error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # drop what is buffered
        sys.exit(1)


def _is_about_memory(error: Exception) -> bool:
    """Return whether memory ran out; the system's loader says so of a module that it can't map."""
    words = ("failed to map segment", "annot allocate memory")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def _escape_what_has_no_encoding() -> None:
    """Print characters that a stream's encoding lacks, and bytes of names that are not text, as
    escapes such as \\udce9, which JSON reads as well."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _open_missing_streams() -> None:
    """Let standard streams that are closed lead nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
