"""The routing file: against transformers' choices, and from damaged or foreign files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import Dots1ForCausalLM

from dots1_local.calibrate.calibrate import calibrate
from dots1_local.calibrate.routing import Routing, layer_routing, load_routing
from dots1_local.calibrate.routing_summary import summarise
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.hub.model_digest import model_digest
from dots1_local.quant.imatrix_file import load_importance
from tests.calibrate.calibration import LAYERS, random_tokens

NAME = "routing.safetensors"


@pytest.fixture(scope="module")
def tokens() -> NDArray[np.int32]:
    return random_tokens(5, n_ctx=600)  # three chunks are probed, and so computed first


@pytest.fixture(scope="module")
def folder(
    micro: Checkpoint, tokens: NDArray[np.int32], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("routing") / "out"
    calibrate(micro, path, tokens, threads=1)
    return path


def chosen_by_transformers(folder: Path, tokens: NDArray[np.int32]) -> list[NDArray[np.int64]]:
    """The experts (tokens, experts per token) that each MoE layer chooses."""
    model = Dots1ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: list[NDArray[np.int64]] = []

    def keep(_: Any, inputs: tuple[Any, ...]) -> None:
        found.append(inputs[1].numpy())

    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        layer.mlp.experts.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(torch.from_numpy(tokens).long())
    return found


def test_the_trace_has_transformers_choices_in_the_order_of_the_text(
    micro: Checkpoint, tokens: NDArray[np.int32], folder: Path
) -> None:
    routing = load_routing(folder)
    expected = np.stack(chosen_by_transformers(micro.path, tokens))
    assert routing.trace.shape == expected.shape == (LAYERS - 1, tokens.size, 2)
    same = np.sort(routing.trace, axis=-1) == np.sort(expected, axis=-1)
    assert same.mean() > 0.999  # another order of sums may decide a tie
    assert list(routing.layers) == [1, 2, 3]


def test_every_token_is_counted(micro: Checkpoint, tokens: NDArray[np.int32], folder: Path) -> None:
    routing, importance = load_routing(folder), load_importance(folder / "imatrix.gguf")
    assert routing.tokens == tokens.size
    for layer, counts in zip(routing.layers, routing.counts, strict=True):
        measured = importance.tensors[f"blk.{layer}.ffn_gate_exps.weight"].counts
        np.testing.assert_array_equal(counts, measured)
        trace = routing.trace[layer - routing.first_layer]
        np.testing.assert_array_equal(counts, np.bincount(trace.ravel(), minlength=4))
    assert routing.model == model_digest(micro)


def test_other_programs_read_the_file(folder: Path) -> None:
    with safe_open(folder / NAME, framework="numpy") as file:
        assert set(file.keys()) == {"counts", "trace"}
        assert json.loads(file.metadata()["geometry"])["n_routed_experts"] == 4
        assert file.get_tensor("trace").dtype == np.uint8


def test_a_long_text_leaves_whole_chunks_that_are_evenly_spread() -> None:
    chunk, position = np.mgrid[:130, :512]
    chosen = np.stack([chunk, 200 + position // 4], axis=-1)
    kept = layer_routing(chosen, 328)
    assert kept["counts"].sum() == 2 * 130 * 512
    assert kept["trace"].dtype == np.uint16
    trace = kept["trace"].reshape(64, 512, 2)  # 32,768 tokens
    assert trace[:, 0, 0].tolist() == [number * 130 // 64 for number in range(64)]
    assert (trace[:, :, 0] == trace[:, :1, 0]).all()
    assert (trace[:, :, 1] == 200 + np.arange(512) // 4).all()
    assert layer_routing(np.zeros((1, 40_000, 1), int), 256)["trace"].shape == (32_768, 1)


def test_no_text_leaves_no_routing(micro: Checkpoint, tmp_path: Path) -> None:
    none = np.empty((0, 32), np.int32)
    calibrate(micro, tmp_path, none, evaluation=random_tokens(2), threads=1, sensitivity=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_it_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(Dots1Error, match=rf"{NAME}.*dots1 calibrate"):
        load_routing(tmp_path)


def rewritten(folder: Path, tmp_path: Path, metadata: dict[str, str], **changes: Any) -> Path:
    arrays = load_file(folder / NAME)
    with safe_open(folder / NAME, framework="numpy") as file:
        old = file.metadata()
    arrays = {n: changes[n](each) if n in changes else each for n, each in arrays.items()}
    save_file(arrays, tmp_path / NAME, old | metadata)
    return tmp_path


def with_first(value: Any) -> Any:
    def change(array: NDArray[Any]) -> NDArray[Any]:
        array = array.copy()
        array.flat[0] = value
        return array

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {"trace": with_first(4)},  # no such expert
        {"trace": np.zeros_like},  # the same expert twice
        {"trace": lambda trace: trace[:2]},
        {"trace": lambda trace: trace[:, :1]},  # there are no halves
        {"trace": lambda trace: trace.astype(np.int64)},
        {"counts": with_first(-1)},
        {"counts": lambda counts: counts.astype(np.uint16)},
        {"counts": lambda counts: counts[0]},
    ],
)
def test_impossible_numbers_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(Dots1Error, match=NAME):
        load_routing(rewritten(folder, tmp_path, {}, **changes))


@pytest.mark.parametrize("metadata", [{"format": "2"}, {"geometry": "{"}, {"geometry": "{}"}])
def test_another_format_is_refused(folder: Path, tmp_path: Path, metadata: dict[str, str]) -> None:
    with pytest.raises(Dots1Error, match=f"{NAME} is not a routing file"):
        load_routing(rewritten(folder, tmp_path, metadata))


@pytest.mark.parametrize("length", [0, 7, 60, 1000])
def test_a_truncated_file_is_refused(folder: Path, tmp_path: Path, length: int) -> None:
    (tmp_path / NAME).write_bytes((folder / NAME).read_bytes()[:length])
    with pytest.raises(Dots1Error, match=NAME):
        load_routing(tmp_path)


def test_a_model_of_other_numbers_is_refused(micro: Checkpoint, folder: Path) -> None:
    routing = load_routing(folder)
    routing.check(micro.config)
    with pytest.raises(Dots1Error, match="4 routed experts, this model 8"):
        routing.check(replace(micro.config, n_routed_experts=8))


def test_an_even_router_uses_all_experts_alike() -> None:
    """Uniform choices: an eighth gets an eighth, and a hot set hits its share."""
    random = np.random.default_rng(0)
    trace = np.argsort(random.random((2, 4000, 16)), axis=-1)[..., :3].astype(np.uint8)
    counts = np.stack([np.bincount(each.ravel(), minlength=16) for each in trace])
    found = summarise(Routing(Path(), "", 1, counts, trace))
    np.testing.assert_allclose(found.top_share, 1 / 8, atol=0.01)
    np.testing.assert_allclose(found.effective, 16, atol=0.02)
    np.testing.assert_allclose(found.static, found.sizes / 16 + np.zeros((2, 1)), atol=0.03)
