"""refinement.safetensors: against the Fisher information by hand, and of no other model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from dots1_local.calibrate.calibrate import calibrate
from dots1_local.calibrate.refinement_file import RefinementData
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.hub.model_digest import model_digest
from tests.calibrate.calibration import random_tokens
from tests.calibrate.passes import forward
from tests.micro import edit_json, micro_checkpoint

TOKENS = random_tokens(7)
HIDDEN, LAYERS = 64, 2


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(micro_checkpoint(tmp_path_factory.mktemp("micro")))


@pytest.fixture(scope="module")
def calibrated(micro: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "out"
    calibrate(micro, folder, TOKENS, refine=True, threads=1)
    return folder


def test_the_reader_returns_what_the_file_holds(micro: Checkpoint, calibrated: Path) -> None:
    data = RefinementData.load(calibrated, micro)
    stored = load_arrays(calibrated / "refinement.safetensors")
    np.testing.assert_array_equal(data.tokens, TOKENS)
    assert data.gradients == 2 * TOKENS.size  # two draws of each token
    moments = {f"outputs.{layer}": data.output_moment(layer) for layer in range(LAYERS)}
    moments["embedding"] = data.embedding_moment()
    assert set(stored) == {"tokens", *moments}
    for name, moment in moments.items():
        assert (str(stored[name].dtype), str(moment.dtype)) == ("float16", "float32")
        np.testing.assert_array_equal(moment, stored[name])
        assert np.trace(moment) / HIDDEN == pytest.approx(1, rel=1e-3)
        np.testing.assert_array_equal(moment, moment.T)


def test_the_last_layers_moment_is_the_fisher_information(tmp_path: Path) -> None:
    """J' (diag(p) - p p') J, with J by autograd; 2,048 tokens draw it twice."""
    folder = micro_checkpoint(tmp_path / "hf", num_hidden_layers=1, first_k_dense_replace=1)
    run = forward(folder, chunks=16, positions=128)
    calibrate(run.checkpoint, tmp_path / "out", run.tokens.numpy().astype(np.int32), refine=True)
    found = RefinementData.load(tmp_path / "out", run.checkpoint).output_moment(0)
    norm, head = (
        torch.from_numpy(run.checkpoint.read(name))
        for name in ("model.norm.weight", "lm_head.weight")
    )

    def logits(row: torch.Tensor) -> torch.Tensor:
        return head @ F.rms_norm(row, (HIDDEN,), norm, run.checkpoint.config.rms_norm_eps)

    rows = run.x[-1].flatten(0, 1)[::16]
    jacobian = torch.func.vmap(torch.func.jacrev(logits))(rows)
    p = (torch.func.vmap(logits)(rows)).softmax(-1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    fisher = (jacobian.transpose(1, 2) @ hessian @ jacobian).mean(0).numpy()
    fisher /= np.trace(fisher) / HIDDEN
    assert np.linalg.norm(found - fisher) < 0.25 * np.linalg.norm(fisher)
    assert np.linalg.norm(np.eye(HIDDEN) - fisher) > 0.35 * np.linalg.norm(fisher)


def test_other_results_do_not_change(micro: Checkpoint, calibrated: Path, tmp_path: Path) -> None:
    calibrate(micro, tmp_path / "out", TOKENS, threads=1)
    for name in ("imatrix.gguf", "sensitivity.json"):
        assert (calibrated / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_checkpoint_in_another_form_is_the_same_model(
    micro: Checkpoint, calibrated: Path, tmp_path: Path
) -> None:
    sharded = Checkpoint.open(micro_checkpoint(tmp_path / "sharded", shards=3))
    as_f32 = tmp_path / "f32"
    shutil.copytree(micro.path, as_f32)
    weights = {k: v.float() for k, v in load_file(micro.path / "model.safetensors").items()}
    save_file(weights, as_f32 / "model.safetensors")
    for same in (sharded, Checkpoint.open(as_f32)):
        assert model_digest(same) == model_digest(micro)
        RefinementData.load(calibrated, same)


def test_another_model_is_refused(calibrated: Path, tmp_path: Path) -> None:
    retrained = Checkpoint.open(micro_checkpoint(tmp_path / "retrained", seed=1))
    with pytest.raises(Dots1Error, match=r"refinement\.safetensors.*another model.*weights"):
        RefinementData.load(calibrated, retrained)
    larger = Checkpoint.open(micro_checkpoint(tmp_path / "larger", n_routed_experts=5))
    with pytest.raises(Dots1Error, match=r"another model.*n_routed_experts is 4.*5"):
        RefinementData.load(calibrated, larger)
    settings = micro_checkpoint(tmp_path / "settings")
    edit_json(settings / "config.json", lambda config: config.update(rope_theta=1000))
    with pytest.raises(Dots1Error, match=r"another model.*settings"):
        RefinementData.load(calibrated, Checkpoint.open(settings))


def damaged(calibrated: Path, folder: Path, how: str) -> Path:
    shutil.copytree(calibrated, folder)
    file = folder / "refinement.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if how == "gone":
        file.unlink()
    elif how == "short":
        file.write_bytes(content[:-1])
    elif how == "junk":
        file.write_bytes(b"junk")
    elif how == "without metadata":
        header.pop("__metadata__")
    elif how == "another shape":
        header["outputs.0"]["shape"] = [HIDDEN // 2, HIDDEN * 2]
    elif how == "another importance file":
        (folder / "imatrix.gguf").write_bytes(b"other")
    elif how == "no importance file":
        (folder / "imatrix.gguf").unlink()
    text = json.dumps(header).encode()
    if how in ("without metadata", "another shape"):
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("gone", r"no refinement\.safetensors.*calibrate --refine"),
        ("short", "damaged"),
        ("junk", "damaged"),
        ("without metadata", "not a refinement file"),
        ("another shape", "other shapes"),
        ("another importance file", r"another importance file than .*imatrix\.gguf"),
        ("no importance file", r"cannot read .*imatrix\.gguf"),
    ],
)
def test_damaged_folders_are_refused(
    micro: Checkpoint, calibrated: Path, tmp_path: Path, how: str, message: str
) -> None:
    folder = damaged(calibrated, tmp_path / "copy", how)
    with pytest.raises(Dots1Error, match=message):
        RefinementData.load(folder, micro)


@pytest.mark.parametrize(("name", "value"), [("outputs.1", b"\x00\x7e"), ("tokens", b"\xff" * 4)])
def test_numbers_are_checked_when_they_are_read(
    micro: Checkpoint, calibrated: Path, tmp_path: Path, name: str, value: bytes
) -> None:
    folder = shutil.copytree(calibrated, tmp_path / "copy")
    file = folder / "refinement.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    at = end + json.loads(content[8:end])[name]["data_offsets"][0]
    file.write_bytes(content[:at] + value + content[at + len(value) :])
    data = RefinementData.load(folder, micro)
    with pytest.raises(Dots1Error, match="token" if name == "tokens" else name):
        data.tokens if name == "tokens" else data.output_moment(1)


def test_refining_needs_the_backward_pass(micro: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sensitivity"):
        calibrate(micro, tmp_path / "out", TOKENS, refine=True, sensitivity=False)
    with pytest.raises(UsageError, match="text"):
        calibrate(micro, tmp_path / "out", TOKENS[:0], evaluation=TOKENS, refine=True)
    assert not (tmp_path / "out").exists()
