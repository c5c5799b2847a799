"""A refined conversion of a checkpoint on the hub, with all its shards or a few at a time."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from dots1_local.convert import Conversion
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.hub import open_hub
from tests.convert.refinement import calibration_folder, small_checkpoint
from tests.hub_server import NAME, HubServer

LAYERS, SHARDS = 5, 7
SETTINGS: dict[str, Any] = {"padding": "on", "refine": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(
        tmp_path_factory.mktemp("hub") / "model", shards=SHARDS, num_hidden_layers=LAYERS
    )


@pytest.fixture(scope="module")
def calibrated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration_folder(folder, tmp_path_factory.mktemp("calibrated") / "out")


@pytest.fixture(scope="module")
def expected(
    folder: Path, calibrated: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    output = tmp_path_factory.mktemp("from-folder") / "out.gguf"
    conversion = Conversion.prepare(folder, "Q2_K", calibration=calibrated, **SETTINGS)
    conversion.run(output, threads=2)
    return tensors(output)


@pytest.fixture
def remote(hub: HubServer, folder: Path) -> HubServer:
    hub.commit(folder)
    return hub


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


def prepare(hub: HubServer, calibrated: Path, **options: Any) -> Conversion:
    checkpoint = open_hub(NAME, endpoint=hub.endpoint)
    return Conversion.prepare(checkpoint, "Q2_K", calibration=calibrated, **(SETTINGS | options))


def check(output: Path, expected: dict[str, np.ndarray]) -> None:
    found = tensors(output)
    assert found.keys() == expected.keys()
    for name, data in found.items():
        np.testing.assert_array_equal(data, expected[name], name)
    assert list(output.parent.glob("out*")) == [output]


def fetched(hub: HubServer) -> Counter[str]:
    """How often each shard was fetched, without the samples that a digest reads."""
    sizes = {path.name: path.stat().st_size for path in hub.commits[hub.main].glob("*.safetensors")}
    return Counter(r.file for r in hub.requests if r.file in sizes and r.count > sizes[r.file] / 2)


def test_few_shards_lie_on_disk_and_each_is_fetched_once(
    remote: HubServer, calibrated: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    output, most, said = tmp_path / "out.gguf", 0, list[str]()

    def look() -> None:
        nonlocal most
        most = max(most, len(list((tmp_path / "out.gguf.shards").rglob("*.safetensors"))))

    remote.watch = look
    conversion = prepare(remote, calibrated)
    conversion.run(output, threads=2, low_disk=True, notify=said.append)
    check(output, expected)
    assert 0 < most <= 4
    assert list(fetched(remote).values()) == [1] * SHARDS
    assert len(said) == 1
    assert "the refining pass" in said[0]


def test_tensors_that_are_not_refined_are_converted_with_their_layer(
    remote: HubServer, folder: Path, calibrated: Path, tmp_path: Path
) -> None:
    overrides = [r"blk\.[13]\.attn=BF16", "token_embd=F16", "ffn_up_exps=F16"]
    conversion = prepare(remote, calibrated, overrides=overrides)
    conversion.run(tmp_path / "out.gguf", threads=2, low_disk=True)
    assert list(fetched(remote).values()) == [1] * SHARDS
    plain = Conversion.prepare(
        folder, "Q2_K", calibration=calibrated, **SETTINGS, overrides=overrides
    )
    plain.run(tmp_path / "plain.gguf", threads=2)
    check(tmp_path / "out.gguf", tensors(tmp_path / "plain.gguf"))


class Stopped(Exception):
    """Stands for Ctrl-C."""


def test_a_resumed_run_fetches_what_is_left(
    remote: HubServer,
    folder: Path,
    calibrated: Path,
    expected: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    def stop(done: int, total: int, unit: str, what: str) -> None:
        if what.startswith("layer 3, 100%"):
            raise Stopped

    output = tmp_path / "out.gguf"
    with pytest.raises(Stopped):
        prepare(remote, calibrated).run(output, threads=2, low_disk=True, progress=stop)
    remote.requests.clear()
    prepare(remote, calibrated).run(output, threads=2, low_disk=True)
    check(output, expected)
    source = Checkpoint.open(folder)
    passed = source.locate("model.layers.1.self_attn.o_proj.weight").file.name
    assert passed not in fetched(remote)


def test_the_cache_holds_all_shards(
    remote: HubServer, calibrated: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    prepare(remote, calibrated).run(tmp_path / "out.gguf", threads=2)
    check(tmp_path / "out.gguf", expected)
    assert list(fetched(remote).values()) == [1] * SHARDS
