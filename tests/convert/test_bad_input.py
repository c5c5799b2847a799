"""Errors of `dots1 convert` on bad input: one sentence, exit code 1 (2 for usage), no damage."""

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dots1_local.cli import main
from dots1_local.files.checkpoint import Checkpoint
from tests.micro import edit_json, micro_checkpoint
from tools.make_tokenizer import write_tokenizer

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
NAN, INF, HUGE = 0x7FC0, 0xFF80, 0x47C3  # bf16: NaN, -Inf, 99840

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_checkpoint(tmp_path_factory.mktemp("pristine"), hidden_size=256)


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(pristine, tmp_path / "checkpoint")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "out.gguf"


@pytest.fixture
def dots1(
    checkpoint: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run `dots1 convert CHECKPOINT -o OUTPUT` with more options; exit code and stderr."""

    def run(*options: str, type_: str = "Q8_0") -> tuple[int, str]:
        command = ["dots1", "convert", str(checkpoint), "-o", str(output), "--type", type_]
        monkeypatch.setattr("sys.argv", [*command, *options])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return code, capsys.readouterr().err

    return run


def assert_one_sentence(result: tuple[int, str], *words: str, code: int = 1) -> None:
    got, stderr = result
    assert got == code, stderr
    assert stderr.startswith("dots1: ")
    assert stderr.count("\n") == 1
    for word in words:
        assert word in stderr


def set_weight(checkpoint: Path, name: str, index: int, bits: int, count: int = 1) -> None:
    """Overwrite bf16 weights from `index` on."""
    place = Checkpoint.open(checkpoint).locate(name)
    with open(place.file, "r+b") as file:
        file.seek(place.offset + 2 * index)
        file.write(bits.to_bytes(2, "little") * count)


@pytest.mark.parametrize("bits", [NAN, INF])
@pytest.mark.parametrize(
    "name", [EXPERT, "model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"]
)
def test_weights_that_are_not_finite(
    dots1: Run, checkpoint: Path, output: Path, name: str, bits: int
) -> None:
    set_weight(checkpoint, name, 3, bits)
    output.write_text("precious")
    assert_one_sentence(dots1("--force"), name, "NaN")
    assert output.read_text() == "precious"


def test_the_row_of_a_nan_is_told(dots1: Run, checkpoint: Path) -> None:
    set_weight(checkpoint, EXPERT, 256 * 7 + 5, NAN)
    assert_one_sentence(dots1(), EXPERT, "NaN", "row 7")


def test_weights_beyond_f16(dots1: Run, checkpoint: Path, output: Path) -> None:
    set_weight(checkpoint, EXPERT, 0, HUGE)
    assert_one_sentence(dots1(type_="F16"), EXPERT, "F16", "BF16")
    assert dots1(type_="BF16")[0] == 0
    assert output.exists()


def test_a_repaired_checkpoint_is_converted_from_the_beginning(
    dots1: Run, checkpoint: Path, output: Path
) -> None:
    whole = shutil.copy(checkpoint / "model.safetensors", output.parent / "whole")
    set_weight(checkpoint, EXPERT, 3, NAN)
    assert dots1()[0] == 1
    shutil.copyfile(whole, checkpoint / "model.safetensors")
    code, stderr = dots1()
    assert code == 0
    assert "resuming" not in stderr


def test_existing_output(dots1: Run, output: Path) -> None:
    output.write_text("precious")
    assert_one_sentence(dots1(), str(output), "--force")
    assert output.read_text() == "precious"
    assert dots1("--force")[0] == 0
    assert output.read_bytes()[:4] == b"GGUF"
    assert list(output.parent.iterdir()) == [output]


def test_source_is_never_replaced(dots1: Run, checkpoint: Path) -> None:
    shard = checkpoint / "model.safetensors"
    before = shard.read_bytes()
    assert_one_sentence(dots1("-o", str(shard), "--force"), str(shard))
    assert shard.read_bytes() == before


@pytest.mark.parametrize("name", ["missing/out.gguf", "file/out.gguf"])
def test_no_such_folder(dots1: Run, output: Path, name: str) -> None:
    (output.parent / "file").touch()
    target = output.parent / name
    assert_one_sentence(dots1("-o", str(target)), "no such folder", str(target.parent))


def test_output_is_a_folder(dots1: Run, output: Path) -> None:
    output.mkdir()
    assert_one_sentence(dots1("--force"), f"{output} is a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_is_read_only(dots1: Run, output: Path) -> None:
    output.parent.chmod(0o500)
    assert_one_sentence(dots1(), f"cannot write {output}", "not writable")


@pytest.mark.parametrize("suffix", [".journal", ".partial"])
def test_working_file_is_in_the_way(dots1: Run, output: Path, suffix: str) -> None:
    output.with_name(output.name + suffix).mkdir()
    assert_one_sentence(dots1(), f"cannot write {output}")


def test_disk_too_small(dots1: Run, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    assert_one_sentence(dots1(), str(output.parent), "free", output.name)
    assert list(output.parent.iterdir()) == []


def test_disk_fills_up_on_the_way(
    dots1: Run, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, pwrite = 0, os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 300_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert_one_sentence(dots1(), "disk is full", "same command again")
    assert not output.exists()
    code, stderr = dots1()
    assert code == 0
    assert "resuming" in stderr
    assert list(output.parent.iterdir()) == [output]


def test_two_at_once(dots1: Run, output: Path) -> None:
    import fcntl

    with open(output.with_name(output.name + ".journal"), "a") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        assert_one_sentence(dots1(), "another conversion is writing", str(output))


def test_no_tokenizer(dots1: Run, checkpoint: Path, output: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    assert_one_sentence(dots1(), "tokenizer.json is missing")
    assert list(output.parent.iterdir()) == []


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def edit(tokenizer: dict[str, Any]) -> None:
        for key in path[:-1]:
            tokenizer = tokenizer[key]
        tokenizer[path[-1]] = to

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        lambda tokenizer: tokenizer.clear(),
        _set("model", to=None),
        _set("model", to=[]),
        _set("model", "type", to="Unigram"),
        _set("model", "vocab", to=[]),
        _set("model", "vocab", to={}),
        _set("model", "vocab", to={"a": "x"}),
        _set("model", "vocab", to={"a": 1, "b": 1}),
        _set("model", "vocab", to={"a": -1}),
        _set("model", "merges", to=None),
        _set("model", "merges", to=[1, 2]),
        _set("model", "merges", to=[[1, 2]]),
        _set("added_tokens", to=[{"id": 1}]),
        _set("added_tokens", to={"a": 1}),
        _set("added_tokens", to=[None]),
        _set("added_tokens", to=[{"id": 10**9, "content": "x", "special": True}]),
        _set("pre_tokenizer", to=None),
        _set("pre_tokenizer", to=[]),
        _set("pre_tokenizer", to={"type": "ByteLevel"}),
        _set("pre_tokenizer", "pretokenizers", to=None),
        _set("pre_tokenizer", "pretokenizers", to=["Split"]),
        _set("pre_tokenizer", "pretokenizers", to=[{"type": "Split", "pattern": "x"}]),
        _set(
            "pre_tokenizer",
            "pretokenizers",
            to=[{"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}{1,3}"}}],
        ),
    ],
)
def test_broken_tokenizer(
    dots1: Run, checkpoint: Path, output: Path, edit: Callable[[dict[str, Any]], None]
) -> None:
    edit_json(checkpoint / "tokenizer.json", edit)
    assert_one_sentence(dots1(), "tokenizer.json")
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b'{"chat_template": [1, 2]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": {}, "template": 1}]}'),
        ("chat_template.jinja", b"\xff\xfe"),
        ("generation_config.json", b"[]"),
    ],
)
def test_garbage_beside_the_weights(
    dots1: Run, checkpoint: Path, output: Path, name: str, content: bytes
) -> None:
    (checkpoint / name).write_bytes(content)
    assert_one_sentence(dots1(), name)
    assert list(output.parent.iterdir()) == []


def test_tokenizer_larger_than_the_vocabulary(dots1: Run, checkpoint: Path, output: Path) -> None:
    write_tokenizer(checkpoint, 400)
    assert_one_sentence(dots1(), "tokenizer.json", "390", "vocab_size", "288")
    assert list(output.parent.iterdir()) == []


def test_checkpoint_errors_reach_the_user(dots1: Run, checkpoint: Path, output: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 5000)
    assert_one_sentence(dots1(), "model.safetensors", "truncated")
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("type_", ["Q9_K", "", "q4", "../Q4_K"])
def test_unknown_type(dots1: Run, output: Path, type_: str) -> None:
    assert_one_sentence(dots1(type_=type_), repr(type_), "Q4_K_M", code=2)
    assert list(output.parent.iterdir()) == []


def test_type_that_needs_importance(dots1: Run) -> None:
    assert_one_sentence(dots1(type_="IQ2_XXS"), "importance", code=2)


@pytest.mark.parametrize(
    "options",
    [
        ("--tensor-type", "ffn_down"),
        ("--tensor-type", "ffn_down=Q9"),
        ("--tensor-type", "(=Q8_0"),
        ("--plan", "missing.json"),
        ("--plan", "tokenizer.json"),
        ("--split-max-size", "banana"),
        ("--threads", "0"),
        ("--pad-experts", "maybe"),
    ],
)
def test_options_that_make_no_sense(
    dots1: Run,
    checkpoint: Path,
    output: Path,
    options: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(checkpoint)
    code, stderr = dots1(*options)
    assert code == 2
    assert "Traceback" not in stderr
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"\x00" * 100])
def test_broken_imatrix(dots1: Run, output: Path, content: bytes | None) -> None:
    imatrix = output.parent / "imatrix.gguf"
    if content is not None:
        imatrix.write_bytes(content)
    assert_one_sentence(dots1("--imatrix", str(imatrix)), str(imatrix))


def test_weights_are_finite_even_if_their_sum_is_not(
    dots1: Run, checkpoint: Path, output: Path
) -> None:
    set_weight(checkpoint, EXPERT, 0, 0x7F7F, count=2000)  # the largest bf16: the sum overflows
    assert dots1(type_="BF16")[0] == 0
