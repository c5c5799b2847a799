"""A calibration is published on the hub, and others use it for the same model only."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from dots1_local.calibrate.calibrate import calibrate
from dots1_local.calibrate.manifest import (
    fetch_calibration,
    fetch_routing,
    find_calibration,
)
from dots1_local.convert import Budget, Conversion
from dots1_local.errors import CheckpointError, Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from tests.calibrate.calibration import random_tokens
from tests.hub_server import NAME, HubServer
from tests.micro import edit_json, micro_checkpoint
from tests.workers import start_dots1

FILES = {"imatrix.gguf", "sensitivity.json", "refinement.safetensors"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(micro_checkpoint(tmp_path_factory.mktemp("micro")))


@pytest.fixture(scope="module")
def calibrated(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "out"
    calibrate(model, folder, random_tokens(4), refine=True, threads=1)
    return folder


@pytest.fixture
def published(calibrated: Path, cache: Path, tmp_path: Path) -> Iterator[HubServer]:
    """A copy of the calibration on a hub."""
    with HubServer(shutil.copytree(calibrated, tmp_path / "published")) as server:
        yield server
        huggingface_hub.close_session()


def fetch(hub: HubServer, checkpoint: Checkpoint, **options: Any) -> Path:
    return fetch_calibration(NAME, checkpoint, endpoint=hub.endpoint, **options)


def requested(hub: HubServer) -> set[str]:
    return {request.file for request in hub.requests}


def test_the_manifest_has_the_hashes(calibrated: Path) -> None:
    manifest = json.loads((calibrated / "calibration.json").read_text())
    hashes = {n: hashlib.sha256((calibrated / n).read_bytes()).hexdigest() for n in FILES}
    assert hashes.items() <= manifest["files"].items()
    assert set(manifest["files"]) == {path.name for path in calibrated.iterdir()} - {
        "calibration.json"
    }


def test_a_published_calibration_is_used(
    published: HubServer, model: Checkpoint, calibrated: Path
) -> None:
    folder = fetch(published, model)
    assert "refinement.safetensors" not in requested(published)
    near, far = (
        Conversion.allocate(model, Budget("bpw", 6), calibration=each)
        for each in (calibrated, folder)
    )
    assert far.plan == near.plan
    assert fetch(published, model, refine=True) == folder
    for name in FILES:
        assert (folder / name).read_bytes() == (calibrated / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [(NAME, 0, "measured 6 bpw"), ("some/where", 1, "no folder some/where, and .* no repository")],
)
def test_the_command_takes_its_id(
    published: HubServer, model: Checkpoint, tmp_path: Path, name: str, code: int, says: str
) -> None:
    command = ["convert", str(model.path), "--dry-run", "--bpw", "6", "--calibration", name]
    with start_dots1(*command, env=published.environment(tmp_path / "home")) as process:
        found, complaints = process.communicate(timeout=60)
    assert process.returncode == code
    assert re.search(says, found + complaints)


def test_without_a_network_the_cache_is_enough(
    published: HubServer, model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(published, model)
    count = len(published.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_calibration(NAME, model) == folder
    assert len(published.requests) == count
    with pytest.raises(CheckpointError, match=r"no folder some/where.*HF_HUB_OFFLINE"):
        find_calibration("some/where", model)


def test_another_model_of_the_same_shape_is_refused(
    published: HubServer, model: Checkpoint, tmp_path: Path
) -> None:
    other = Checkpoint.open(micro_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(Dots1Error, match=f"calibrated on {model.name}, whose weights.*other"):
        fetch(published, other)
    assert requested(published) == {"calibration.json"}


def test_files_of_two_calibrations_are_refused(published: HubServer, model: Checkpoint) -> None:
    path = published.commits[published.main] / "imatrix.gguf"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(Dots1Error, match=r"imatrix\.gguf of .*calibration\.json"):
        fetch(published, model)


@pytest.mark.parametrize("change", [{"format": 2}, {"files": [1]}, {"model": None}])
def test_a_manifest_is_not_trusted(
    published: HubServer, model: Checkpoint, change: dict[str, Any]
) -> None:
    path = published.commits[published.main] / "calibration.json"
    edit_json(path, lambda manifest: manifest.update(change))
    with pytest.raises(Dots1Error, match="not the manifest of a calibration"):
        fetch(published, model)


def test_a_repository_without_a_calibration(published: HubServer, model: Checkpoint) -> None:
    (published.commits[published.main] / "calibration.json").unlink()
    with pytest.raises(Dots1Error, match=r"has no calibration\.json.*name their folder"):
        fetch(published, model)


def test_a_folder_is_a_folder(model: Checkpoint, tmp_path: Path) -> None:
    assert find_calibration(str(tmp_path), model) == tmp_path
    assert find_calibration("no/such/folder", model) == Path("no/such/folder")


def test_published_routing_is_fetched_alone(published: HubServer, calibrated: Path) -> None:
    folder = fetch_routing(NAME, endpoint=published.endpoint)
    name = "routing.safetensors"
    assert requested(published) == {"calibration.json", name}
    assert (folder / name).read_bytes() == (calibrated / name).read_bytes()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "has no routing"),
        (lambda path: path.write_bytes(b""), "not the file"),
    ],
)
def test_published_routing_is_checked(
    published: HubServer, damage: Callable[[Path], object], says: str
) -> None:
    damage(published.commits[published.main] / "routing.safetensors")
    with pytest.raises(Dots1Error, match=says):
        fetch_routing(NAME, endpoint=published.endpoint)
