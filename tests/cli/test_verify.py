import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dots1_local.cli import app
from tests.helpers import random_tensors, write_random_gguf

SCRIPT = """
import sys
from dots1_local.cli import app
app(sys.argv[1:], standalone_mode=False)
print(*sorted({"torch", "transformers", "llama_cpp", "gguf"} & set(sys.modules)), file=sys.stderr)
"""
BROKEN = {"blk.0.attn_q.weight": np.full((64, 64), np.nan, np.float32)}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random_gguf(tmp_path / "model.gguf")


@pytest.fixture
def without_gating(tmp_path: Path) -> Path:
    return write_random_gguf(tmp_path / "elsewhere.gguf", without=["expert_gating_func"])


def test_a_right_file_is_one_line(model: Path) -> None:
    result = run(model)
    assert result.exit_code == 0
    size = sum(tensor.nbytes for tensor in random_tensors().values())
    line = f"{model}: 46 tensors, {size / 1000:.1f} kB, every block finite; nothing wrong\n"
    assert (result.stdout, result.stderr) == (line, "")


def test_findings_come_worst_first_and_fail(without_gating: Path) -> None:
    result = run(without_gating, "--quick")
    assert result.exit_code == 1
    first, summary = result.stdout.splitlines()
    assert first.startswith("error: dots1.expert_gating_func is missing")
    assert summary.endswith("blocks not looked at; 1 error")


def test_warnings_do_not_fail(tmp_path: Path) -> None:
    result = run(write_random_gguf(tmp_path / "base.gguf", template=None))
    assert result.exit_code == 0
    assert result.stdout.startswith("warning: there is no tokenizer.chat_template")


def test_fixes_what_keys_can_fix(without_gating: Path, tmp_path: Path) -> None:
    output = tmp_path / "fixed.gguf"
    result = run(without_gating, "--fix", output)
    assert result.exit_code == 0
    assert result.stderr == f"wrote {output} with dots1.expert_gating_func corrected\n"
    assert run(output).exit_code == 0


def test_what_a_fix_leaves_wrong_still_fails(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "broken.gguf", gating=1, tensors=BROKEN)
    result = run(path, "--fix", tmp_path / "fixed.gguf")
    assert result.exit_code == 1
    assert "1 with damaged blocks; 2 errors" in result.stdout
    assert (tmp_path / "fixed.gguf").exists()


def test_nothing_to_fix_writes_nothing(model: Path, tmp_path: Path) -> None:
    result = run(model, "--fix", tmp_path / "fixed.gguf")
    assert result.exit_code == 0
    assert "is not written" in result.stderr
    assert not (tmp_path / "fixed.gguf").exists()


def test_a_fix_that_cannot_be_written_is_refused_before_reading(model: Path) -> None:
    result = run(model, "--fix", model, "--force")
    assert model.name in str(result.exception)
    assert result.stdout == ""


def test_a_template_does_not_reach_the_terminal(tmp_path: Path) -> None:
    template = "{{ raise_exception('\x1b[2J\\n') }}"
    result = run(write_random_gguf(tmp_path / "hostile.gguf", template=template), "--quick")
    assert len(result.stdout.splitlines()) == 2
    assert "\x1b" not in result.stdout


def test_against_lists_the_worst_ten(tiny: Path, converted: Any) -> None:
    result = run(converted("DQ4"), "--against", tiny)
    assert result.exit_code == 0
    header, *rows = result.stdout.splitlines()
    assert header.split()[:3] == ["tensor", "role", "type"]
    assert len(rows) == 12  # ten, a blank line, and the summary
    assert rows[0].split()[1:3] == ["routed", "Q4_K"]


def test_json_has_everything(tiny: Path, converted: Any, without_gating: Path) -> None:
    found = json.loads(run(converted("DQ4"), "--against", tiny, "--json").stdout)
    assert (found["ok"], found["findings"], len(found["tensors"])) == (True, [], 78)
    assert all(0 <= tensor["error"] < 0.1 for tensor in found["tensors"])
    found = json.loads(run(without_gating, "--json").stdout)
    assert found["ok"] is False
    (finding,) = found["findings"]
    assert (finding["check"], finding["fix"]) == ("gating", ["dots1.expert_gating_func"])


def test_what_is_no_gguf_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing of the kind")
    assert "not a GGUF file" in str(run(tmp_path / "x.gguf").exception)


def test_loads_neither_torch_nor_the_engine(model: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, "verify", str(model)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr.split() == []
