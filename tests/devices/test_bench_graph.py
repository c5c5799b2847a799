"""The nodes that are timed compute what the model computes: they give numpy's results."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dots1_local.devices.backends import device
from dots1_local.devices.bench_graph import F16, F32, HEAD_DIM, I32, BenchDevice, BenchGraph
from dots1_local.errors import Dots1Error
from dots1_local.ggml import TYPES
from dots1_local.quant.encode import decode, encode

Array = NDArray[Any]


@pytest.fixture
def bench() -> Iterator[BenchDevice]:
    with BenchDevice("CPU", 1 << 20) as bench:
        yield bench


def normal(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def result(graph: BenchGraph, node: int, *shape: int) -> Array:
    values = np.empty(shape, np.float32)
    graph.once()
    graph.read(node, values)
    return values


def test_multiplies_tokens_by_the_experts_they_chose(bench: BenchDevice) -> None:
    experts, x = normal(4, 8, 32), normal(3, 32)
    ids = np.array([[0, 3], [2, 1], [3, 2]], np.int32)
    with BenchGraph(bench) as graph:
        weights = graph.weights(F32, 32, 8, 4)
        tokens, chosen = graph.tensor(F32, 32, 1, 3), graph.tensor(I32, 2, 3)
        node = graph.mul_mat_id(weights, tokens, chosen)
        assert graph.place()
        for tensor, data in ((weights, experts), (tokens, x), (chosen, ids)):
            graph.fill(tensor, data)
        expected = np.einsum("teoi,ti->teo", experts[ids], x)
        assert result(graph, node, 3, 2, 8) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("cast", [False, True])
def test_attention_reads_a_kv_cache(bench: BenchDevice, cast: bool) -> None:
    heads, cells, tokens = 2, 256, 3
    kind, dtype = (F32, np.float32) if cast else (F16, np.float16)
    q = normal(tokens, heads, HEAD_DIM)
    k, v = normal(2, cells, heads, HEAD_DIM).astype(dtype)
    with BenchGraph(bench) as graph:
        query, mask = graph.tensor(F32, HEAD_DIM, heads, tokens), graph.tensor(F16, cells, tokens)
        keys, values = (graph.weights(kind, HEAD_DIM, heads, cells) for _ in range(2))
        node = graph.attention(query, keys, values, mask, cast=cast)
        assert graph.place()
        filled = ((query, q), (keys, k), (values, v), (mask, np.zeros((tokens, cells), np.float16)))
        for tensor, data in filled:
            graph.fill(tensor, data)
        scores = np.exp(np.einsum("thd,chd->thc", q, k.astype(np.float32)) * HEAD_DIM**-0.5)
        weights = scores / scores.sum(-1, keepdims=True)
        expected = np.einsum("thc,chd->thd", weights, v.astype(np.float32))
        assert result(graph, node, tokens, heads, HEAD_DIM) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("repacked", [False, True])
def test_a_pattern_is_repeated_to_the_end(repacked: bool) -> None:
    kind = TYPES["Q4_0"]
    memory = device("CPU").extra_buffer_types[-1:] if repacked else (None,)
    if not memory:
        pytest.skip("this CPU repacks nothing")
    rows = encode(normal(3, 64), kind)
    with BenchDevice("CPU", 1 << 20, memory=memory[0]) as bench, BenchGraph(bench) as graph:
        weights = graph.weights(kind.ggml, 64, 16)
        x = graph.tensor(F32, 64, 1)
        node = graph.mul_mat(weights, x)
        if not graph.place():
            pytest.skip("this CPU repacks no Q4_0")
        graph.tile(weights, rows.reshape(-1))
        graph.fill(x, normal(1, 64))
        products = decode(rows, kind, 64) @ normal(64)
        expected = np.resize(products, 16)
        assert result(graph, node, 16) == pytest.approx(expected, abs=0.1)


def test_names_a_device_with_too_little_memory() -> None:
    with pytest.raises(Dots1Error, match=r"CPU.* memory"):
        BenchDevice("CPU", 1 << 60)


def test_finds_the_largest_tensor_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with BenchDevice("CPU", 1 << 26) as bench:
        assert bench.largest_tensor == 1 << 26  # a CPU has no limit
    tried: list[int] = []

    def multiplies(self: BenchDevice, rows: int) -> bool:
        tried.append(rows)
        return rows * 4096 * 2 <= 1 << 25

    monkeypatch.setattr(BenchDevice, "_multiplies", multiplies)
    with BenchDevice("CPU", 1 << 28) as bench:
        assert bench.largest_tensor == 1 << 25
        assert bench.largest_tensor == 1 << 25
    assert len(tried) == 4
