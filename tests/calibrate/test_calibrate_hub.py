"""A calibration of a checkpoint on the hub, with its shards in the cache or a few at a time."""

import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dots1_local.calibrate.calibrate import calibrate
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.hub import open_hub
from tests.calibrate.calibration import Sink, random_tokens
from tests.hub_server import NAME, HubServer
from tests.micro import micro_checkpoint
from tests.workers import start_dots1

LAYERS, SHARDS = 7, 6
TOKENS, EVALUATED = random_tokens(6), random_tokens(2, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards of 0.7 MB, more than a request for a header takes."""
    return micro_checkpoint(
        tmp_path_factory.mktemp("layers") / "dots1-tiny",
        shards=SHARDS,
        num_hidden_layers=LAYERS,
        n_routed_experts=16,
        moe_intermediate_size=96,
    )


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of a run on the folder."""
    output = tmp_path_factory.mktemp("from-folder") / "out"
    calibrate(Checkpoint.open(folder), output, TOKENS, threads=1)
    return contents(output)


@pytest.fixture
def remote(hub: HubServer, folder: Path) -> HubServer:
    hub.commit(folder)
    return hub


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Let every disk have so many free bytes."""
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("dots1_local.files.partial_file.shutil.disk_usage", lambda folder: usage)


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def run(hub: HubServer, output: Path, revision: str | None = None, **options: Any) -> list[str]:
    """Calibrate with few shards; return what was said."""
    said: list[str] = []
    checkpoint = open_hub(NAME, revision, endpoint=hub.endpoint)
    settings: dict[str, Any] = {
        "low_disk": True,
        "threads": 1,
        "notify": said.append,
    } | options
    calibrate(checkpoint, output, TOKENS, **settings)
    return said


def fetched(hub: HubServer) -> Counter[str]:
    """How often each shard was fetched, without the samples that a digest reads."""
    sizes = {path.name: path.stat().st_size for path in hub.commits[hub.main].glob("*.safetensors")}
    return Counter(r.file for r in hub.requests if r.file in sizes and r.count > sizes[r.file] / 2)


def test_the_cache_holds_all_shards(
    remote: HubServer, expected: dict[str, bytes], tmp_path: Path
) -> None:
    assert run(remote, tmp_path / "out", low_disk=False) == []
    assert contents(tmp_path / "out") == expected
    assert list(fetched(remote).values()) == [1] * SHARDS
    assert run(remote, tmp_path / "again") == []  # with little disk, nothing has to be fetched
    assert contents(tmp_path / "again") == expected
    assert list(fetched(remote).values()) == [1] * SHARDS


def test_few_shards_lie_on_disk_and_are_fetched_twice(
    remote: HubServer, folder: Path, tmp_path: Path
) -> None:
    output, near, most = tmp_path / "out", tmp_path / "near", 0

    def look() -> None:
        nonlocal most
        most = max(most, len(list((output / "work/shards").rglob("*.safetensors"))))

    remote.watch = look
    said = run(remote, output, refine=True)
    calibrate(Checkpoint.open(folder), near, TOKENS, refine=True, threads=1)
    assert contents(output) == contents(near)
    assert max(fetched(remote).values()) == 2
    assert 0 < most <= 4
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    assert len(said) == 2
    assert f"{total:.1f} MB for the forward pass, then {total:.1f} MB for the backward" in said[0]
    assert "at 100 Mbit/s" in said[0]
    assert f"{total:.1f} MB for the backward pass: about" in said[1]
    assert "measured" in said[1]


def test_the_logits_need_the_head_once_more(
    remote: HubServer, folder: Path, tmp_path: Path
) -> None:
    near, far = (Sink(len(EVALUATED), 15, 288) for _ in range(2))
    checkpoint = Checkpoint.open(folder)
    calibrate(checkpoint, tmp_path / "near", TOKENS, evaluation=EVALUATED, logits=near, threads=1)
    run(remote, tmp_path / "out", evaluation=EVALUATED, logits=far)
    np.testing.assert_array_equal(far.rows, near.rows)
    assert not (tmp_path / "out/work").exists()


class Stopped(Exception):
    """Stands for the user's Ctrl-C."""


def stop_at(name: str) -> Callable[..., None]:
    def stop(done: int, total: int, unit: str, what: str) -> None:
        if what == name:
            raise Stopped

    return stop


@pytest.mark.parametrize(
    ("name", "layers"),
    [("layer 0", 7), ("layer 3", 4), ("head", 0), ("layer 6, backward", 0)],
)
def test_a_stopped_run_goes_on_with_the_layers_that_are_left(
    remote: HubServer, expected: dict[str, bytes], tmp_path: Path, name: str, layers: int
) -> None:
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        run(remote, output, progress=stop_at(name))
    assert len(list((output / "work/shards").rglob("*.safetensors"))) <= 4
    remote.requests.clear()
    said = run(remote, output)
    assert contents(output) == expected
    again = fetched(remote)
    assert max(again.values()) == (2 if layers else 1)
    assert sum(again.values()) <= SHARDS + SHARDS * layers / LAYERS
    assert said[0].startswith("fetching ")


def test_a_run_stopped_on_its_way_back_fetches_no_later_layer(
    remote: HubServer, folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        run(remote, output, progress=stop_at("layer 2, backward"))
    remote.requests.clear()
    run(remote, output)
    assert contents(output) == expected
    checkpoint = Checkpoint.open(folder)
    of_layer_4 = checkpoint.locate("model.layers.4.self_attn.q_proj.weight").file.name
    assert of_layer_4 not in fetched(remote)


def test_a_run_stopped_at_its_very_end_fetches_the_head_only(
    remote: HubServer,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object) -> None:
        raise Stopped

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("dots1_local.calibrate.calibrate.manifest_json", stop)
        with pytest.raises(Stopped):
            run(remote, output)
    remote.requests.clear()
    run(remote, output)
    assert contents(output) == expected
    assert sum(fetched(remote).values()) <= 2  # the norm is not in the head's shard


def test_the_first_run_may_have_had_more_disk(
    remote: HubServer, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        run(remote, output, progress=stop_at("layer 2"))
    run(remote, output, low_disk=False)
    assert contents(output) == expected


def test_a_killed_program_resumes(remote: HubServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time there was a small model. " * 40)
    options = ["-f", str(tmp_path / "text.txt"), "-c", "32", "-t", "1", "--importance-only"]
    output, environment = str(tmp_path / "out"), remote.environment(tmp_path / "home")

    def start() -> "subprocess.Popen[str]":
        arguments = [NAME, *options, "-o", output, "--low-disk"]
        return start_dots1("calibrate", *arguments, env=environment)

    with start() as process:

        def watch() -> None:
            if len(fetched(remote)) == SHARDS - 1:
                process.send_signal(signal.SIGKILL)

        remote.watch = watch
        assert process.wait(timeout=120) == -signal.SIGKILL
    remote.watch = lambda: None
    with start() as process:
        _, complaints = process.communicate(timeout=120)
    assert process.returncode == 0, complaints
    assert "fetching" in complaints
    with start_dots1("calibrate", str(folder), *options, "-o", str(tmp_path / "near")) as process:
        process.communicate(timeout=120)
    assert contents(tmp_path / "out") == contents(tmp_path / "near")


def test_a_branch_that_moved_is_not_mixed(
    remote: HubServer, folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output, first = tmp_path / "out", remote.main
    with pytest.raises(Stopped):
        run(remote, output, progress=stop_at("layer 2"))
    remote.commit(shutil.copytree(folder, tmp_path / "moved"))
    with pytest.raises(Dots1Error, match=f"--revision {first}.*{remote.main[:12]} now.*--force"):
        run(remote, output)
    run(remote, output, first)
    assert contents(output) == expected


def test_a_damaged_shard_ends_the_run_and_loses_no_layer(
    remote: HubServer, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output, shard = tmp_path / "out", f"model-00004-of-0000{SHARDS}.safetensors"
    remote.damaged[shard] = 2
    with pytest.raises(Dots1Error, match=f"{shard}.*another hash"):
        run(remote, output)
    resumed: list[int] = []
    run(remote, output, on_resume=lambda done, *_: resumed.append(done))
    assert contents(output) == expected
    assert resumed[0] > 0


@pytest.mark.parametrize(
    ("free", "low_disk", "says"),
    [
        (50_000, True, "calibration needs"),
        (800_000, True, r"calibration with \d shards needs"),
        (
            3_000_000,
            False,
            r"calibration with the checkpoint needs.*--low-disk, which needs 2\.\d MB",
        ),
    ],
)
def test_a_disk_that_is_too_small_is_known_beforehand(
    remote: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    low_disk: bool,
    says: str,
) -> None:
    """The residual stream takes 98 kB; a shard takes 0.7 MB."""
    set_free(monkeypatch, free)
    with pytest.raises(Dots1Error, match=says):
        run(remote, tmp_path / "out", low_disk=low_disk, sensitivity=False)
    assert not fetched(remote)


def test_nothing_is_fetched_ahead_if_the_disk_is_short(
    remote: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, most = tmp_path / "out", 0

    def look() -> None:
        nonlocal most
        most = max(most, len(list((output / "work/shards").rglob("*.safetensors"))))

    set_free(monkeypatch, 2_400_000)
    remote.watch = look
    run(remote, output, sensitivity=False)
    assert 0 < most <= 3


def test_low_disk_is_refused_for_a_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="on the disk already"):
        calibrate(Checkpoint.open(folder), tmp_path / "out", TOKENS, low_disk=True)
