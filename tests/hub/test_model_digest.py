"""The digest of a model is that of its weights, wherever and however they are stored."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.hub import open_hub
from dots1_local.hub.model_digest import model_digest
from tests.hub_server import NAME, HubServer
from tests.micro import micro_checkpoint


def digest(folder: Path) -> str:
    return model_digest(Checkpoint.open(folder))


def test_it_depends_on_the_weights_and_not_on_their_shards(tmp_path: Path) -> None:
    one = digest(micro_checkpoint(tmp_path / "one"))
    assert digest(micro_checkpoint(tmp_path / "three", shards=3)) == one
    assert digest(micro_checkpoint(tmp_path / "other", seed=1)) != one
    assert digest(micro_checkpoint(tmp_path / "rope", rope_theta=1e6)) != one


def test_a_copy_in_f32_is_the_same_model(tmp_path: Path) -> None:
    folder = micro_checkpoint(tmp_path / "bf16")
    copy = shutil.copytree(folder, tmp_path / "f32")
    tensors = {name: t.float() for name, t in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors")
    assert digest(copy) == digest(folder)


@pytest.mark.parametrize(
    "changed",
    ["model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.down_proj.weight",
     "lm_head.weight"],
)  # fmt: skip
def test_one_changed_matrix_is_noticed(tmp_path: Path, changed: str) -> None:
    folder = micro_checkpoint(tmp_path / "model")
    before, path = digest(folder), folder / "model.safetensors"
    tensors = load_file(path)
    tensors[changed][0] *= 1.5
    save_file(tensors, path)
    assert digest(folder) != before


def test_the_hub_gives_the_folders_digest_for_a_few_bytes(hub: HubServer, tiny: Path) -> None:
    checkpoint = open_hub(NAME, endpoint=hub.endpoint)
    hub.requests.clear()
    assert model_digest(checkpoint) == digest(tiny)
    assert 0 < sum(request.count for request in hub.requests) < 10**6


def test_a_server_that_ignores_ranges_is_refused(hub: HubServer) -> None:
    checkpoint = open_hub(NAME, endpoint=hub.endpoint)
    hub.ignores_ranges = True
    with pytest.raises(CheckpointError, match="parts of files"):
        model_digest(checkpoint)
