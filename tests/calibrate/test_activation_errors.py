"""Errors of rounded activations, against the functions that llama.cpp rounds them with."""

import ctypes

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dots1_local import ggml
from dots1_local.architecture import Dots1Config
from dots1_local.calibrate.column_sums import ColumnSums
from dots1_local.calibrate.probe import BLOCKS, activation_errors
from dots1_local.ggml import TYPES, QuantType
from tests.micro import micro_config

# Of ggml's enum and blocks: Q8_0 {f16 d; int8 q[32]}, Q8_1 {f16 d, s; int8 q[32]},
# Q8_K {f32 d; int8 q[256]; int16 sums[16]}.
LAYOUTS = {
    8: np.dtype([("d", "f2"), ("q", "i1", 32)]),
    9: np.dtype([("d", "f2"), ("s", "f2"), ("q", "i1", 32)]),
    15: np.dtype([("d", "f4"), ("q", "i1", 256), ("sums", "i2", 16)]),
}


class Traits(ctypes.Structure):
    """The head of ggml-cpu.h's `struct ggml_type_traits_cpu`."""

    _fields_ = (
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
    )


def traits(kind: int) -> Traits:
    cpu = ggml.library("ggml-cpu")
    cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(Traits)
    cpu.ggml_cpu_init()
    found: Traits = cpu.ggml_get_type_traits_cpu(kind).contents
    return found


def rounded(rows: NDArray[np.float32], kind: int) -> NDArray[np.float32]:
    """Rows as llama.cpp's CPU kernels round them."""
    layout = LAYOUTS[kind]
    blocks = np.zeros(rows.size // layout["q"].shape[0], layout)
    traits(kind).from_float(rows.ctypes.data, blocks.ctypes.data, rows.size)
    values = blocks["d"].astype(np.float32)[:, None] * blocks["q"]
    return np.asarray(values.reshape(rows.shape), np.float32)


@pytest.mark.parametrize(
    "kind", [k for k in TYPES.values() if k.candidate and k.bpw < 16], ids=lambda k: k.name
)
def test_blocks_of_activations_are_as_long_as_blocks_of_weights(kind: QuantType) -> None:
    assert LAYOUTS[traits(kind.ggml).vec_dot_type]["q"].shape[0] == kind.block
    assert kind.block in BLOCKS


def test_errors_equal_llama_cpps() -> None:
    config = Dots1Config.from_json(micro_config(hidden_size=512))
    rows = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    rows[:, 7] *= 20  # an outlier, which sets the scale of its block
    noise = ColumnSums(config, 1, activation_errors)
    noise.observe("self_attn.q_proj.weight", rows[:40])
    noise.observe("self_attn.q_proj.weight", rows[40:])
    by_length = noise.means()["blk.1.attn_q.weight"]
    assert by_length.shape == (2, 1, 512)
    for ours, kind in zip(by_length, (8, 15), strict=True):
        expected = np.square(rounded(rows.numpy(), kind) - rows.numpy()).mean(axis=0)
        np.testing.assert_allclose(ours[0].mean(), expected.mean(), rtol=0.02)
        others = np.arange(512) != 7  # Q8_0's scale is a 16-bit float, which shows there
        np.testing.assert_allclose(ours[0][others], expected[others], rtol=0.1)


def test_each_expert_has_errors_of_its_own() -> None:
    config = Dots1Config.from_json(micro_config())
    noise = ColumnSums(config, 1, activation_errors)
    noise.observe("mlp.experts.2.up_proj.weight", torch.rand(5, 64))
    found = noise.means()
    assert set(found) == {"blk.1.ffn_up_exps.weight"}
    by_expert = found["blk.1.ffn_up_exps.weight"].sum(axis=(0, 2))
    assert by_expert[2] > 0
    assert not by_expert[[0, 1, 3]].any()


def test_rows_need_not_fill_a_block() -> None:
    config = Dots1Config.from_json(micro_config(moe_intermediate_size=40))
    noise = ColumnSums(config, 1, activation_errors)
    exact = torch.zeros(3, 40)
    exact[:, 32:] = torch.tensor([127.0, 1, 2, 3, 4, 5, 6, 7])  # a scale of 1: nothing to round
    noise.observe("mlp.experts.0.down_proj.weight", exact)
    assert not noise.means()["blk.1.ffn_down_exps.weight"].any()
