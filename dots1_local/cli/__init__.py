"""The `dots1` command: one file per verb, each parses, calls the library, and renders.

Heavy imports (numpy, llama_cpp) happen inside the verbs, so that `dots1 --help` is instant.
"""

import os
import sys
from typing import Annotated

import typer

from dots1_local.cli._bench import bench
from dots1_local.cli._calibrate import calibrate
from dots1_local.cli._chat import chat
from dots1_local.cli._convert import convert
from dots1_local.cli._export import export
from dots1_local.cli._hardware import hardware
from dots1_local.cli._inspect import inspect
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
app.command("convert")(convert)
app.command("calibrate")(calibrate)
app.command("export")(export)
app.command("inspect")(inspect)
app.command("verify")(verify)
app.command("perplexity")(perplexity)
app.command("chat")(chat)
app.command("serve")(serve)
app.command("hardware")(hardware)
app.command("plan")(plan)
app.command("bench")(bench)
app.command("worker")(worker)

_debug = False


def _version(value: bool) -> None:
    if value:
        from dots1_local import __version__

        typer.echo(f"dots1-local {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    global _debug  # noqa: PLW0603 -- main() outlives the parsed context
    _debug = debug


def main() -> None:
    """Run the command line; every expected failure is one sentence on stderr."""
    _open_missing_streams()
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
    except OSError as error:  # the library words its own; what is left is stdout's
        if _debug:
            raise
        if not isinstance(error, BrokenPipeError):  # a reader that has left is no error
            print(f"dots1: cannot write the output: {error.strerror or error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is buffered has nowhere to go
        sys.exit(1)


def _open_missing_streams() -> None:
    """Where a standard stream is closed, let it lead nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
