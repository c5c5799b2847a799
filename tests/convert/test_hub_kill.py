"""A conversion shard by shard is killed or interrupted; it resumes, and keeps whole shards."""

import signal
import subprocess
from pathlib import Path
from threading import Event

import pytest

from tests.conftest import Converted
from tests.hub_server import NAME, HubServer, is_shard
from tests.workers import start_dots1

MB = 10**6


def program(hub: HubServer, output: Path) -> "subprocess.Popen[str]":
    """The command, in a process of its own."""
    options = ("-o", str(output), "--type", "Q8_0", "--low-disk", "-t", "1")
    return start_dots1("convert", NAME, *options, env=hub.environment(output.parent / "home"))


def strike(hub: HubServer, process: "subprocess.Popen[str]", number: int, after: int) -> None:
    """Send a signal to the process once the hub has sent it `after` bytes of shards."""
    struck = False

    def watch() -> None:
        nonlocal struck
        if not struck and sum(hub.shard_bytes().values()) >= after:
            struck = True
            process.send_signal(number)

    hub.watch = watch


@pytest.mark.parametrize("after", [6 * MB, 15 * MB, 30 * MB])
def test_a_killed_conversion_is_resumed(
    hub: HubServer, tiny: Path, converted: Converted, tmp_path: Path, after: int
) -> None:
    output = tmp_path / "out.gguf"
    with program(hub, output) as process:
        strike(hub, process, signal.SIGKILL, after)
        assert process.wait(timeout=60) == -signal.SIGKILL
    hub.watch = lambda: None
    assert not output.exists()
    whole = {path.name for path in tmp_path.glob("out.gguf.shards/*/*.safetensors")}
    asked = len(hub.shard_requests())
    with program(hub, output) as process:
        said, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    assert "wrote" in said
    assert output.read_bytes() == converted("Q8_0").read_bytes()
    again = [request.file for request in hub.shard_requests()[asked:]]
    assert len(again) == len(set(again))
    assert not whole & set(again)
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "home"}


def test_ctrl_c_does_not_wait_for_an_answer(hub: HubServer, tmp_path: Path) -> None:
    asked, given_up = Event(), Event()

    def stall() -> None:
        if any(is_shard(request.file) for request in hub.requests):
            asked.set()
            given_up.wait(60)

    hub.watch = stall
    with program(hub, tmp_path / "out.gguf") as process:
        asked.wait(60)
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=20)
        given_up.set()
    assert (process.returncode, complaints) == (130, "stopped\n")


def test_a_conversion_can_be_resumed_after_ctrl_c(hub: HubServer, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    with program(hub, output) as process:
        strike(hub, process, signal.SIGINT, 20 * MB)
        _, complaints = process.communicate(timeout=60)
    assert process.returncode == 130
    assert complaints.startswith("stopped; run the same command again")
    assert list(tmp_path.glob("out.gguf.shards/*/*"))
