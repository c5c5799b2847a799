"""The Dockerfile, the compose file and the systemd units use options and variables that exist."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner

from dots1_local.cli import app

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = (ROOT / "compose.yaml").read_text(encoding="utf-8")
UNITS = sorted((ROOT / "docs" / "systemd").glob("*.service"))
STARTS = [re.search(r"^ExecStart=\S+/dots1 (.+)$", unit.read_text(), re.M) for unit in UNITS]
COMPOSED = re.search(r"^ +command: (.+)$", COMPOSE, re.M)


def _help(verb: str) -> str:
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, verb
    return result.stdout


@contextmanager
def _answering(status: int) -> Iterator[int]:
    """A server that answers /health with `status`, and everything else with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("command", [match[1] for match in (*STARTS, COMPOSED) if match])
def test_verbs_and_options_exist(command: str) -> None:
    verb, *rest = shlex.split(command)
    options = {word for word in rest if word.startswith("-")}
    assert options <= set(re.findall(r"--[a-z][a-z-]*", _help(verb)))


def test_every_unit_and_the_compose_file_start_a_verb() -> None:
    assert len(UNITS) == 2
    assert all((*STARTS, COMPOSED))


@pytest.mark.parametrize("text", [DOCKERFILE, COMPOSE, *(unit.read_text() for unit in UNITS)])
def test_the_server_knows_the_variables_it_is_given(text: str) -> None:
    ours = {"DOTS1_MODEL", "DOTS1_OPTIONS", "DOTS1_WORKER_HOST"}  # of the units themselves
    assert set(re.findall(r"DOTS1_[A-Z_]+", text)) - ours <= set(
        re.findall(r"DOTS1_[A-Z_]+", _help("serve"))
    )


def test_the_server_listens_where_the_image_says(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["serve", str(tmp_path / "none.gguf")], env={"DOTS1_HOST": "no.such.host.invalid"}
    )
    assert result.exit_code
    assert "no.such.host.invalid" in str(result.exception)


def test_the_build_context_has_what_the_dockerfile_copies() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M)
    assert {word for line in lines for word in line.split()} == kept
    assert all((ROOT / name).exists() for name in kept)


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_passes_only_while_the_server_is_ready(status: int, code: int) -> None:
    match = re.search(r"^HEALTHCHECK.*?CMD (\[.*?\])$", DOCKERFILE, re.M | re.S)
    assert match
    command = json.loads(match[1].replace("\\\n", ""))
    with _answering(status) as port:
        script = command[-1].replace("8000", str(port))
        done = subprocess.run([sys.executable, *command[1:-1], script], timeout=20, check=False)
    assert done.returncode == code


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_finds_nothing_wrong(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/dots1/bin/dots1", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
