"""The README promises nothing that `--help` does not know."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dots1_local.cli import app
from dots1_local.cli.repl.commands import COMMANDS as CHAT_COMMANDS
from tools import command_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))]
COMMANDS = re.findall(r"^(?:\$ )?dots1 (.+)$", "\n".join(PAGES), re.MULTILINE)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_and_options_exist(command: str) -> None:
    verb, *rest = shlex.split(command, comments=True)
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, verb
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", result.stdout))
    options = {word.split("=")[0] for word in rest if word.startswith("-")}
    assert options <= known


def test_every_verb_is_shown() -> None:
    assert COMMANDS
    verbs = {command.name for command in app.registered_commands}
    assert {command.split()[0] for command in COMMANDS} == verbs


def test_the_tree_lists_what_is_there() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    named = set(re.findall(r"^ {0,4}([a-z_0-9]+(?:\.py|/))", tree, re.MULTILINE))
    package = ROOT / "dots1_local"
    there = {p.name if p.suffix else f"{p.name}/" for p in package.iterdir()}
    there = {name for name in there if not name.startswith(("__", "py.typed"))}
    assert there <= named


def test_the_table_of_chats_commands_is_their_registry() -> None:
    assert f"<!-- commands -->\n{command_table.render()}<!-- /commands -->" in README


def test_the_transcript_uses_commands_there_are() -> None:
    used = set(re.findall(r"^> (/\S+)", README, re.MULTILINE))
    refused = set(re.findall(r"^there is no command (/\w+)", README, re.MULTILINE))
    assert used - refused
    assert used - refused <= {name for command in CHAT_COMMANDS for name in command.names}
