"""The output of every verb: streams that are full, closed or not Unicode."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import write_random_gguf

DOTS1 = [sys.executable, "-c", "from dots1_local.cli import main; main()"]
TINY = Path(__file__).parents[2] / "examples" / "dots1-tiny"
MODEL = object()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("main") / "model.gguf")


@pytest.mark.parametrize("arguments", [["inspect", "--json"], ["inspect"]])
def test_a_full_disk_is_one_sentence(model: Path, arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [*DOTS1, *arguments, model], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.stderr == "dots1: cannot write the output: No space left on device\n"
    assert result.returncode == 1


def test_a_closed_pipe_is_not_an_error(model: Path) -> None:
    with subprocess.Popen(
        [*DOTS1, "inspect", "--json", model], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_is_no_traceback(model: Path, closed: str) -> None:
    shell = f'"$@" {closed}'
    command = ["sh", "-c", shell, "sh", *DOTS1, "inspect", str(model)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.returncode == 0


def test_json_is_readable_in_any_encoding(model: Path) -> None:
    result = subprocess.run(
        [*DOTS1, "inspect", "--json", model],
        capture_output=True,
        check=True,
        env={"PYTHONIOENCODING": "ascii"},
    )
    assert result.stdout.isascii()


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", TINY, "--type", "Q8_0", "-o", "-"],
        ["calibrate", TINY, "-f", TINY / "heldout.txt", "--importance-only", "-o", "-"],
        ["export", MODEL, "-o", "-"],
        ["verify", MODEL, "--quick", "--fix", "-"],
        ["chat", MODEL, "-p", "hi", "--session", "-"],
    ],
)
def test_no_output_is_written_to_a_file_called_minus(
    model: Path, tmp_path: Path, arguments: list[object]
) -> None:
    command = [*DOTS1, *(str(model if each is MODEL else each) for each in arguments)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "cannot be -" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_too_little_memory_to_start_is_one_sentence(tmp_path: Path) -> None:
    code = """
import resource
from pathlib import Path
from dots1_local.cli import main
has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (has + (1 << 20),) * 2)
main()
"""
    output = tmp_path / "out.gguf"
    command = [
        sys.executable,
        "-c",
        code,
        "convert",
        str(TINY),
        "-o",
        str(output),
        "--type",
        "Q8_0",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("dots1: not enough memory")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
