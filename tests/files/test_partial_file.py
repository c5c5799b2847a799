import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from dots1_local.errors import Dots1Error
from dots1_local.files.partial_file import (
    check_space,
    disk_errors,
    open_locked,
    open_partial,
    partial_path,
    remove_abandoned,
    write_whole,
)

# Locks the file it is given, says so, and waits there to be killed.
HOLDER = """
import sys, time
from pathlib import Path
from dots1_local.files.partial_file import open_locked

with open_locked(Path(sys.argv[1]), "busy"):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_file_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    partial_path(path).write_bytes(b"left by a killed run, and longer")
    with open_partial(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failed_block_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with open_partial(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_one_process_writes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with open_partial(path) as file:
        with pytest.raises(Dots1Error, match=r"a\.bin"), open_partial(path):
            pass
        file.write(b"mine")
    assert path.read_bytes() == b"mine"


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(Dots1Error, match="busy"), open_locked(path, "busy"):
            pass
        process.send_signal(signal.SIGKILL)
    with open_locked(path, "busy") as file:
        assert file.read() == b""


def test_what_a_killed_writer_left_goes_with_the_next_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    partial_path(path).write_bytes(b"left by a killed run, and longer")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.json"]


def test_two_writers_of_a_small_file_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with ThreadPoolExecutor(1) as pool:
        with open_partial(path) as file:
            second = pool.submit(write_whole, path, b"second")
            with pytest.raises(TimeoutError):
                second.result(timeout=0.1)
            file.write(b"first")
        second.result(timeout=10)
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a.json"]


def test_only_files_that_nobody_writes_are_abandoned(tmp_path: Path) -> None:
    written, left = (partial_path(tmp_path / name) for name in ("written", "left"))
    left.touch()
    with open_locked(written, "busy"):
        remove_abandoned([written, left])
        assert os.listdir(tmp_path) == [written.name]


def test_a_scratch_file_has_no_name_that_a_kill_could_leave(tmp_path: Path) -> None:
    code = (
        "from dots1_local.files.partial_file import scratch_file\n"
        "import os, signal\n"
        "with scratch_file() as path:\n"
        "    path.write_bytes(b'12'); assert path.read_bytes() == b'12'\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_link_folder_or_pipe_is_not_written_through(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "a.bin", tmp_path / "other"
    other.write_bytes(b"precious")
    partial = partial_path(path)
    {"link": lambda: partial.symlink_to(other), "folder": partial.mkdir,
     "pipe": lambda: os.mkfifo(partial)}[kind]()  # fmt: skip
    with pytest.raises(Dots1Error, match=r"a\.bin"), disk_errors(path), open_partial(path):
        pass
    assert other.read_bytes() == b"precious"
    assert not path.exists()


def test_only_the_owner_reads_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    partial_path(path).touch(0o666)
    with open_partial(path, private=True):
        pass
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_appended_lines_follow_those_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for line in (b"one\n", b"two\n"):
        with open_locked(path, "busy", append=True) as file:
            file.write(line)
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_small_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("short", [1, 10, 10_000])
def test_the_free_and_the_needed_bytes_are_never_told_as_one_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(5_000_000 - short))
    with pytest.raises(Dots1Error, match="free, but file needs") as refused:
        check_space(tmp_path / "file", 5_000_000, [])
    free, needed = re.findall(r"(?:has|needs) ([\d.,]+ \w+)", str(refused.value))
    assert free != needed
