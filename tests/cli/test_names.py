"""Names of files that are not UTF-8, and streams in other encodings: no traceback, no lost name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dots1_local.files.gguf import GGUFFile
from tests.helpers import EOS, scripted_tensors, tokens_of, write_random_gguf
from tests.micro import micro_checkpoint

NAME = os.fsdecode(b"caf\xe9")
# Encodings of stdout: those of C.UTF-8, of other UTF-8 locales, and of a GBK locale.
STREAMS = ["utf-8:surrogateescape", "utf-8:strict", "gbk"]


@pytest.fixture(params=STREAMS)
def dots1(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """Run a command in `tmp_path`."""

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        environment = os.environ | {"PYTHONIOENCODING": request.param}
        return subprocess.run(
            [sys.executable, "-m", "dots1_local", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, check=False,
        )  # fmt: skip

    return run


def test_a_checkpoint_and_a_file_may_have_any_name(dots1: Any, tmp_path: Path) -> None:
    micro_checkpoint(tmp_path / NAME)
    for command in (
        ["convert", NAME, "--dry-run"],
        ["convert", NAME, "-o", f"{NAME}.gguf", "--type", "Q8_0"],
        ["inspect", f"{NAME}.gguf"],
        ["verify", f"{NAME}.gguf", "--against", NAME],
        ["export", f"{NAME}.gguf", "-o", f"{NAME}-out"],
    ):
        result = dots1(*command)
        assert (command, result.returncode, b"Traceback" in result.stderr) == (command, 0, False)
    assert (tmp_path / f"{NAME}-out" / "config.json").exists()
    assert GGUFFile.open(tmp_path / f"{NAME}.gguf").keys["general.name"]


def test_an_importance_file_may_have_any_name(dots1: Any, tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "imatrix.gguf", tmp_path / NAME)
    result = dots1("convert", str(tiny), "-o", "x.gguf", "--type", "Q8_0", "--imatrix", NAME)
    assert result.returncode == 0, result.stderr


def test_json_is_valid_and_tells_the_name(dots1: Any, tmp_path: Path) -> None:
    write_random_gguf(tmp_path / f"{NAME}.gguf")
    result = dots1("inspect", f"{NAME}.gguf", "--json")
    assert json.loads(result.stdout.decode("utf-8"))["path"] == f"{NAME}.gguf"


def test_a_plan_of_such_a_file_can_be_handed_back(dots1: Any, tmp_path: Path) -> None:
    tensors = scripted_tensors([*tokens_of("ok"), EOS])
    write_random_gguf(tmp_path / f"{NAME}.gguf", tensors=tensors)
    planned = dots1("plan", f"{NAME}.gguf", "--json")
    (tmp_path / "plan.json").write_bytes(planned.stdout)
    result = dots1("chat", f"{NAME}.gguf", "--plan", "plan.json", "-p", "hi", "--temp", "0")
    assert (result.stdout, result.returncode) == (b"ok\n", 0), result.stderr


@pytest.mark.parametrize("option", ["-p", "--system", "--stop"])
def test_text_that_is_none_is_refused(dots1: Any, tmp_path: Path, option: str) -> None:
    write_random_gguf(tmp_path / "model.gguf")
    asked = [] if option == "-p" else ["-p", "hi"]
    result = dots1("chat", "model.gguf", *asked, option, NAME)
    assert result.returncode == 2
    assert b"UTF-8" in result.stderr
    assert result.stdout == b""
