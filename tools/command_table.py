"""The table of chat's commands in docs/chat.md, written from their registry.

    python -m tools.command_table

It replaces what stands between `<!-- commands -->` and `<!-- /commands -->`.
"""

from pathlib import Path

from dots1_local.cli.repl.commands import COMMANDS
from dots1_local.cli.repl.loop import Command
from tools.doc_block import replace_block

__all__ = ["render"]

PAGE = Path(__file__).parent.parent / "docs" / "chat.md"


def render() -> str:
    """The table in Markdown, a command a line."""
    rows = [_row("command", "also", "what it does"), _row("---", "---", "---")]
    return "".join([*rows, *map(_command_row, COMMANDS)])


def _command_row(command: Command) -> str:
    usage = f"`{command.name} {command.arguments}".rstrip() + "`"
    return _row(usage, ", ".join(f"`{alias}`" for alias in command.aliases), command.help)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    replace_block(PAGE, "commands", render())
