"""Second moments of a layer's inputs, against numpy on the rows that the whole layer multiplies."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dots1_local.calibrate.hooks import Expert, Hooks
from dots1_local.calibrate.moments import Moment, Moments, moment_name
from dots1_local.calibrate.stream import Segment, WorkingMemory, forward_layer
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.reference.layers import layer_forward
from dots1_local.reference.model import Compute, load_layer
from tests.micro import micro_checkpoint

Rows = dict[str, np.ndarray]
CPU = Compute(torch.device("cpu"))
SHAPE = (40, 32, 64)
DENSE, MOE = 0, 1


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(micro_checkpoint(tmp_path_factory.mktemp("micro")))


def stream(seed: int = 0) -> torch.Tensor:
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(seed))


def inputs_of_all_matrices(checkpoint: Checkpoint, layer: int) -> Rows:
    """The rows that each matrix is multiplied by when the whole layer is computed at once."""
    seen: dict[str, list[np.ndarray]] = {}

    def observe(name: str, rows: torch.Tensor) -> None:
        seen.setdefault(name, []).append(rows.numpy())

    weights = load_layer(checkpoint, layer)
    layer_forward(stream(), weights, checkpoint.config, layer, observe)
    return {name: np.concatenate(rows) for name, rows in seen.items()}


def expected(rows: np.ndarray) -> Moment:
    every = next(step for step in (12, 24, 48) if len(rows) <= 512 * step)
    held = np.arange(len(rows)) % every == 0
    fitted = rows[~held].astype(np.float64)
    mean = fitted.T @ fitted / max(1, len(fitted))
    return Moment(mean.astype(np.float32), len(fitted), rows[held])


def check(found: Moment | None, rows: np.ndarray) -> None:
    assert found is not None
    by_hand = expected(rows)
    assert found.tokens == by_hand.tokens
    np.testing.assert_allclose(found.mean, by_hand.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.held_out, by_hand.held_out, rtol=1e-4, atol=1e-4)


def gathered(
    checkpoint: Checkpoint, layer: int, moments: Moments, names: list[str]
) -> Iterator[tuple[str, Moment | None]]:
    """Moments taken when the hooks say that they are complete."""
    taken: dict[str, Moment | None] = {}

    def common() -> None:
        taken.update({name: moments.take(name) for name in names if "mlp.experts" not in name})

    def expert(done: Expert) -> None:
        prefix = f"mlp.experts.{done.number}."
        taken.update({name: moments.take(name) for name in names if name.startswith(prefix)})

    segments = [Segment(0, 10, moments.observe), Segment(10, 40, moments.observe)]
    hooks = Hooks(common, expert)
    forward_layer(stream(), checkpoint, layer, segments, CPU, lambda _: None, hooks)
    yield from taken.items()


@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_moments_are_those_of_the_rows_of_each_matrix(micro: Checkpoint, layer: int) -> None:
    rows = inputs_of_all_matrices(micro, layer)
    names = sorted({moment_name(name) for name in rows} - {"mlp.gate.weight"})
    for name, moment in gathered(micro, layer, Moments(), names):
        check(moment, rows[name])
    parts = {name.split(".")[-2] for name in names}
    assert parts == {"q_proj", "o_proj", "gate_proj", "down_proj"}


def test_matrices_with_the_same_inputs_share_a_moment() -> None:
    for part, same in (("k", "q"), ("v", "q"), ("q", "q"), ("o", "o")):
        name = f"self_attn.{part}_proj.weight"
        assert moment_name(name) == f"self_attn.{same}_proj.weight"
    assert moment_name("mlp.experts.7.up_proj.weight") == "mlp.experts.7.gate_proj.weight"
    assert moment_name("lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize("columns", [96, 700])
def test_rows_may_come_in_any_blocks(columns: int) -> None:
    """Of so many rows, every 48th is held out."""
    rows = np.random.default_rng(1).standard_normal((13000, columns), np.float32)
    moments = Moments()
    for part in torch.from_numpy(rows).split(1300):
        moments.observe("lm_head.weight", part)
    check(moments.take("lm_head.weight"), rows)
    assert moments.take("lm_head.weight") is None


def test_nan_is_refused_by_the_name_of_the_matrix() -> None:
    moments = Moments()
    moments.observe("self_attn.o_proj.weight", torch.full((20, 8), torch.nan))
    with pytest.raises(CheckpointError, match=r"self_attn\.o_proj.*NaN"):
        moments.take("self_attn.o_proj.weight")


def test_an_expert_tells_its_rows_and_the_hidden_rows_of_others(micro: Checkpoint) -> None:
    """All rows through expert 2, whose own are those that the whole layer sends to it."""
    weights = load_layer(micro, MOE)
    rows = inputs_of_all_matrices(micro, MOE)
    seen: list[np.ndarray] = []

    def expert(done: Expert) -> None:
        if done.number == 2:
            own = done.inputs[done.rows].numpy()
            np.testing.assert_allclose(own, rows["mlp.experts.2.gate_proj.weight"], atol=1e-5)
            everything = torch.arange(len(done.inputs))
            done.hidden(everything, lambda _, hidden: seen.append(hidden.numpy()))

    hooks = Hooks(expert=expert)
    forward_layer(stream(), micro, MOE, [Segment(0, 40)], CPU, lambda _: None, hooks)
    inputs = rows["mlp.gate.weight"].astype(np.float64)
    gate, up = (weights[f"mlp.experts.{part}_proj"][2].double().numpy() for part in ("gate", "up"))
    by_hand = inputs @ gate.T / (1 + np.exp(-inputs @ gate.T)) * (inputs @ up.T)
    np.testing.assert_allclose(np.concatenate(seen), by_hand, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_working_memory_in_files_leaves_x_as_it_was(
    micro: Checkpoint, layer: int, tmp_path: Path
) -> None:
    x, before = stream(), stream()
    maps = (np.memmap(tmp_path / name, np.float32, "w+", shape=SHAPE) for name in "ab")
    working = WorkingMemory(*map(torch.from_numpy, maps))
    segments = [Segment(0, 40)]
    forward_layer(x, micro, layer, segments, CPU, lambda _: None, working=working)
    assert torch.equal(x, before)
    forward_layer(x, micro, layer, segments, CPU, lambda _: None)
    assert torch.equal(x, working.after)
