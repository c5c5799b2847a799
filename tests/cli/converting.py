"""`dots1 convert` as a command, and what it says where it refuses."""

from pathlib import Path

from typer.testing import CliRunner, Result

from dots1_local.cli import app
from dots1_local.errors import Dots1Error

__all__ = ["convert", "refused"]


def convert(checkpoint: Path, *options: object) -> Result:
    """Run the command on a checkpoint."""
    return CliRunner().invoke(app, ["convert", str(checkpoint), *map(str, options)])


def refused(result: Result) -> str:
    """Return the sentence that the command line prints."""
    if isinstance(result.exception, Dots1Error):
        return str(result.exception)
    assert result.exit_code == 2
    return result.stderr
