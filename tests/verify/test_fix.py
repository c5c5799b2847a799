import errno
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dots1_local.chat.session import Session
from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error
from dots1_local.files.partial_file import partial_path
from dots1_local.verify import verify_gguf
from dots1_local.verify.fix import check_output, write_fixed
from tests.helpers import EOS, scripted_tensors, tokens_of, write_random_gguf
from tests.verify.patch import fields, rewrite, tensor_bytes

GATING = "dots1.expert_gating_func"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    tensors = scripted_tensors([*tokens_of("fine"), EOS])
    right = write_random_gguf(tmp_path / "right.gguf", tensors=tensors)
    wrong = {"tokenizer.ggml.eos_token_id": 11}
    path = rewrite(right, tmp_path / "broken.gguf", wrong, remove=[GATING])
    right.unlink()
    return path


def fix(path: Path, output: Path, **options: Any) -> tuple[Path, ...]:
    return write_fixed(verify_gguf(path, quick=True), output, **options)


def test_only_the_wrong_keys_change(broken: Path, tmp_path: Path) -> None:
    before = broken.read_bytes()
    (fixed,) = fix(broken, tmp_path / "fixed.gguf")
    assert broken.read_bytes() == before
    expected = fields(broken)
    assert list(fields(fixed)) == [*expected, GATING]
    changed = [key for key in expected if fields(fixed)[key] != expected[key]]
    assert changed == ["tokenizer.ggml.eos_token_id"]
    assert tensor_bytes(fixed) == tensor_bytes(broken)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["broken.gguf", "fixed.gguf"]


def test_a_fixed_file_answers_and_stops(broken: Path, tmp_path: Path) -> None:
    (fixed,) = fix(broken, tmp_path / "fixed.gguf")
    with Engine.open(fixed, n_ctx=256, threads=1) as engine, Session(engine) as session:
        assert "".join(session.ask("How are you?")) == "fine"


def test_every_key_of_a_real_file_stays_what_it_is(converted: Any, tmp_path: Path) -> None:
    path = rewrite(converted("DQ4"), tmp_path / "model.gguf", remove=[GATING])
    (fixed,) = fix(path, tmp_path / "fixed.gguf")
    found = fields(fixed)
    assert found.pop(GATING) == fields(converted("DQ4"))[GATING]
    assert found == fields(path)
    assert tensor_bytes(fixed) == tensor_bytes(converted("DQ4"))


def test_all_shards_of_a_split_file_are_copied(tmp_path: Path) -> None:
    write_random_gguf(tmp_path / "model.gguf", gating=1, shard_tensors=12)
    shards = sorted(tmp_path.iterdir())
    paths = fix(shards[2], tmp_path / "fixed.gguf")
    assert [path.name for path in paths] == [f"fixed-0000{n}-of-00004.gguf" for n in (1, 2, 3, 4)]
    assert verify_gguf(paths[0]).findings == ()
    for before, after in zip(shards, paths, strict=True):
        assert tensor_bytes(before) == tensor_bytes(after)
    with Engine.open(paths[0], n_ctx=64, threads=1) as engine:
        assert engine.decode([1, 2, 3], 0).shape == (engine.n_vocab,)


def test_a_copy_killed_while_its_shards_got_their_names_is_made_again(tmp_path: Path) -> None:
    write_random_gguf(tmp_path / "model.gguf", gating=1, shard_tensors=12)
    source = min(tmp_path.iterdir())
    paths = fix(source, tmp_path / "fixed.gguf")
    whole = [path.read_bytes() for path in paths]
    for path in paths[:2]:  # the last one gets its name first
        path.rename(partial_path(path))
    assert [path.read_bytes() for path in fix(source, tmp_path / "fixed.gguf")] == whole
    assert not list(tmp_path.glob("*.partial"))


def test_without_copy_file_range_the_copy_is_the_same(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fast,) = fix(broken, tmp_path / "fast.gguf")

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    (slow,) = fix(broken, tmp_path / "slow.gguf")
    assert slow.read_bytes() == fast.read_bytes()


def test_an_existing_file_is_replaced_only_by_force(broken: Path, tmp_path: Path) -> None:
    output = tmp_path / "fixed.gguf"
    output.write_text("precious")
    with pytest.raises(Dots1Error, match=r"fixed\.gguf exists; give --force"):
        fix(broken, output)
    assert output.read_text() == "precious"
    fix(broken, output, force=True)
    assert {found.check for found in verify_gguf(output).findings} == {"zeros"}  # as scripted


@pytest.mark.parametrize("name", ["broken.gguf", "link.gguf", "hard.gguf"])
def test_the_input_is_never_written(broken: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "link.gguf").symlink_to(broken)
    os.link(broken, tmp_path / "hard.gguf")
    before = broken.read_bytes()
    with pytest.raises(Dots1Error, match="is the file to be fixed"):
        fix(broken, tmp_path / name, force=True)
    assert broken.read_bytes() == before


@pytest.mark.parametrize("reason", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_copy_leaves_nothing(broken: Path, tmp_path: Path, reason: Any) -> None:
    def stop(done: int, total: int, *_: object) -> None:
        raise reason

    with pytest.raises((KeyboardInterrupt, Dots1Error)):
        fix(broken, tmp_path / "fixed.gguf", progress=stop)
    assert [file.name for file in tmp_path.iterdir()] == ["broken.gguf"]


def test_a_full_disk_is_found_before_the_first_byte(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000))
    with pytest.raises(Dots1Error, match=r"1\.0 kB free, but fixed\.gguf needs \d+\.\d kB"):
        fix(broken, tmp_path / "fixed.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["broken.gguf"]


def test_the_space_of_a_killed_copy_counts_as_free(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    (tmp_path / "fixed.gguf.partial").write_bytes(broken.read_bytes())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000))
    (fixed,) = fix(broken, tmp_path / "fixed.gguf")
    assert {found.check for found in verify_gguf(fixed).findings} == {"zeros"}  # as scripted


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_link_or_pipe_in_place_of_the_working_file_is_replaced(
    broken: Path, tmp_path: Path, kind: str
) -> None:
    other, partial = tmp_path / "other", tmp_path / "fixed.gguf.partial"
    other.write_text("precious")
    partial.symlink_to(other) if kind == "link" else os.mkfifo(partial)
    (fixed,) = fix(broken, tmp_path / "fixed.gguf")
    assert other.read_text() == "precious"
    assert fixed.is_file()
    assert not fixed.is_symlink()


def test_a_circular_link_is_refused(broken: Path, tmp_path: Path) -> None:
    output = tmp_path / "fixed.gguf"
    output.symlink_to(output)
    with pytest.raises(Dots1Error, match=r"cannot write .*fixed\.gguf"):
        fix(broken, output)


@pytest.mark.parametrize("output", ["", ".", "/", ".."])
def test_a_folder_is_refused_as_output(broken: Path, output: str) -> None:
    with pytest.raises(Dots1Error, match="is a folder; name a file"):
        fix(broken, Path(output))


def test_a_folder_that_is_not_writable_is_found_before_reading(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(Dots1Error, match="not writable"):
        check_output(broken, tmp_path / "fixed.gguf")


def test_an_unfinished_split_conversion_keeps_its_working_files(tmp_path: Path) -> None:
    write_random_gguf(tmp_path / "model.gguf", gating=1, shard_tensors=12)
    (tmp_path / "fixed.gguf.journal").touch()
    working = tmp_path / "fixed-00001-of-00004.gguf.partial"
    working.write_text("hours of work")
    with pytest.raises(Dots1Error, match="is unfinished"):
        fix(tmp_path / "model-00001-of-00004.gguf", tmp_path / "fixed.gguf", force=True)
    assert working.read_text() == "hours of work"


def test_an_unfinished_conversion_keeps_its_working_files(broken: Path, tmp_path: Path) -> None:
    (tmp_path / "fixed.gguf.journal").touch()
    with pytest.raises(Dots1Error, match="is unfinished"):
        fix(broken, tmp_path / "fixed.gguf", force=True)


def test_a_missing_folder_is_refused(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(Dots1Error, match="no such folder"):
        fix(broken, tmp_path / "nowhere" / "fixed.gguf")
