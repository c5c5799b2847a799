"""A killed conversion is finished by running it again, with the same bytes."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dots1_local.cli import app
from dots1_local.convert import Conversion, Result
from tests.micro import micro_checkpoint

POINTS = [0.05 + 0.1 * step for step in range(10)]

# Prints the tensor it is at once it has passed a share of the bytes, and waits to be killed, while
# its other threads still encode and write.
CHILD = """
import sys, time
from dots1_local.convert import Conversion

def progress(done, total, unit, what):
    if done >= float(sys.argv[3]) * total:
        print(what, flush=True)
        time.sleep(600)

Conversion.prepare(sys.argv[1], "Q2_K").run(
    sys.argv[2], threads=2, progress=progress,
    on_resume=lambda done, *_: print("resumed", done, flush=True),
)
"""


class Stopped(Exception):
    """Stands for Ctrl-C."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_checkpoint(
        tmp_path_factory.mktemp("checkpoint"),
        shards=3,
        hidden_size=256,
        num_hidden_layers=3,
        intermediate_size=512,
        moe_intermediate_size=256,
        n_routed_experts=8,
    )


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checksum of an uninterrupted conversion."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out.gguf"
    Conversion.prepare(checkpoint, "Q2_K").run(output)
    return sha256(output)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(checkpoint: Path) -> list[str]:
    return [tensor.spec.name for tensor in Conversion.prepare(checkpoint, "Q2_K").tensors]


def kill_at(point: float, checkpoint: Path, output: Path) -> tuple[int, str]:
    """Kill a conversion; return how many tensors it resumed with, and the one it was at."""
    command = [sys.executable, "-c", CHILD, str(checkpoint), str(output), str(point)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        resumed = int(line[1]) if line[0] == "resumed" else 0
        at = process.stdout.readline().strip() if line[0] == "resumed" else line[0]
        process.kill()
    return resumed, at


def run_until(point: float, checkpoint: Path, output: Path) -> int:
    """Interrupt a conversion in this process; return how many tensors were finished."""
    at = ""

    def stop(done: int, total: int, unit: str, what: str) -> None:
        nonlocal at
        at = what
        if done >= point * total:
            raise Stopped

    with pytest.raises(Stopped):
        Conversion.prepare(checkpoint, "Q2_K").run(output, progress=stop)
    return names(checkpoint).index(at)


def finish(checkpoint: Path, output: Path) -> Result:
    return Conversion.prepare(checkpoint, "Q2_K").run(output)


def journal(output: Path) -> Path:
    return output.with_name(output.name + ".journal")


def partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def test_killed_ten_times(checkpoint: Path, expected: str, tmp_path: Path) -> None:
    output, order = tmp_path / "out.gguf", names(checkpoint)
    finished = 0
    for point in POINTS:
        resumed, at = kill_at(point, checkpoint, output)
        assert resumed >= finished  # only the tensor that the kill interrupted is redone
        finished = order.index(at)
        assert not output.exists()
    result = CliRunner().invoke(
        app, ["convert", str(checkpoint), "-o", str(output), "--type", "Q2_K"]
    )
    assert result.exit_code == 0
    notices = [line for line in result.stderr.splitlines() if line.startswith("resuming")]
    assert notices in [
        [f"resuming: {done} of {len(order)} tensors are done"] for done in (finished, finished + 1)
    ]
    assert sha256(output) == expected
    assert list(tmp_path.iterdir()) == [output]


def test_a_torn_line_of_the_journal_costs_one_tensor(
    checkpoint: Path, expected: str, tmp_path: Path
) -> None:
    output = tmp_path / "out.gguf"
    run_until(0.3, checkpoint, output)
    os.truncate(journal(output), journal(output).stat().st_size - 9)
    finished = run_until(0.6, checkpoint, output)
    assert finish(checkpoint, output).resumed_tensors == finished
    assert sha256(output) == expected


def test_a_damaged_tensor_is_converted_again(
    checkpoint: Path, expected: str, tmp_path: Path
) -> None:
    output = tmp_path / "out.gguf"
    finished = run_until(0.5, checkpoint, output)
    with open(partial(output), "r+b") as file:
        file.seek(partial(output).stat().st_size // 3)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert finish(checkpoint, output).resumed_tensors == finished - 1
    assert sha256(output) == expected


@pytest.mark.parametrize("left", [b"", b"garbage\n", b"\xff\xfe\x00", b'{"identity": 5}\n{}\n'])
def test_a_malformed_journal_is_ignored(
    checkpoint: Path, expected: str, tmp_path: Path, left: bytes
) -> None:
    output = tmp_path / "out.gguf"
    run_until(0.5, checkpoint, output)
    journal(output).write_bytes(left)
    assert finish(checkpoint, output).resumed_tensors == 0
    assert sha256(output) == expected


@pytest.mark.parametrize("pieces", [None, [], [[1]], [[-5, 0]], [["a", "b"]], [[10**12, 0]], 7])
def test_a_malformed_line_of_the_journal_costs_one_tensor(
    checkpoint: Path, expected: str, tmp_path: Path, pieces: object
) -> None:
    output = tmp_path / "out.gguf"
    finished = run_until(0.5, checkpoint, output)
    lines = journal(output).read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"pieces": pieces})
    journal(output).write_text("\n".join(lines) + "\n")
    assert finish(checkpoint, output).resumed_tensors == finished - 1
    assert sha256(output) == expected


def test_a_partial_file_that_is_lost_or_cut(
    checkpoint: Path, expected: str, tmp_path: Path
) -> None:
    output = tmp_path / "out.gguf"
    run_until(0.5, checkpoint, output)
    partial(output).unlink()
    assert run_until(0.5, checkpoint, output) > 0
    os.truncate(partial(output), 1000)
    assert finish(checkpoint, output).resumed_tensors == 0
    assert sha256(output) == expected


def test_a_changed_checkpoint_begins_again(checkpoint: Path, expected: str, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    run_until(0.5, checkpoint, output)
    os.utime(next(checkpoint.glob("*.safetensors")))
    assert finish(checkpoint, output).resumed_tensors == 0
    assert sha256(output) == expected


def test_another_type_begins_again(checkpoint: Path, tmp_path: Path) -> None:
    output, direct = tmp_path / "out.gguf", tmp_path / "direct.gguf"
    run_until(0.5, checkpoint, output)
    result = Conversion.prepare(checkpoint, "Q8_0").run(output)
    Conversion.prepare(checkpoint, "Q8_0").run(direct)
    assert result.resumed_tensors == 0
    assert sha256(output) == sha256(direct)
