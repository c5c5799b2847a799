"""README and docs promise nothing that `--help`, the code or the planner does not know."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dots1_local.cli import app
from dots1_local.cli.repl.commands import COMMANDS as CHAT_COMMANDS
from tools import command_table, draw_design, machine_table
from tools.make_gguf import write_gguf
from tools.make_wide import published_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAT = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page.read_text(encoding="utf-8") for page in FILES]
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
    assert f"<!-- commands -->\n{command_table.render()}<!-- /commands -->" in CHAT


def test_the_transcript_uses_commands_there_are() -> None:
    used = set(re.findall(r"^> (/\S+)", CHAT, re.MULTILINE))
    refused = set(re.findall(r"^there is no command (/\w+)", CHAT, re.MULTILINE))
    assert used - refused
    assert used - refused <= {name for command in CHAT_COMMANDS for name in command.names}


@pytest.mark.parametrize("page", FILES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", FILES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    paths = re.findall(r"`([a-z_]+/[\w/]+\.(?:py|md|sh))`", page.read_text(encoding="utf-8"))
    missing = [
        p for p in paths if not any((ROOT / top / p).exists() for top in ("", "dots1_local"))
    ]
    assert not missing


def test_the_table_of_machines_is_what_is_planned(tmp_path: Path) -> None:
    [row] = re.findall(r"^\| DQ3 \|.*$", README, re.MULTILINE)
    path = tmp_path / "dots.gguf"
    write_gguf(path, published_config(), "DQ3", importance=False, headers_only=True)
    cells = [cell.strip() for cell in row.split("|")[4:-1]]
    assert cells[0] == machine_table.cell(path, machine_table.MACHINES[0], "16k")
    assert cells[-1] == machine_table.cell(path, machine_table.MACHINES[-1], "16k")
    assert f"{path.stat().st_size / 1e9:.1f} GB" in row


def test_the_picture_shows_the_imports() -> None:
    picture = (ROOT / "docs" / "design.svg").read_text(encoding="utf-8")
    assert picture == draw_design.render(), "run python -m tools.draw_design"
