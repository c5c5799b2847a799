"""Compare predicted bytes of every device with what the engine reserves on two workers.

Files are sparse and have the real widths: the engine plans everything and allocates nothing. Small
ones it really loads. All that connects to a worker runs in a child process, as in test_loading.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from dots1_local.architecture import Dots1Config
from dots1_local.devices import backends
from dots1_local.errors import GGUFError, UsageError
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement import footprint as footprint_module
from dots1_local.placement import graph_memory
from dots1_local.placement.footprint import footprint
from dots1_local.placement.model_graph import ModelGraph
from tests.engine.engine_memory import Decisions, Sizes, placement_for, taken
from tests.engine.sparse_gguf import write_sparse_gguf
from tests.helpers import CONFIG, write_random_gguf
from tests.placement.gpu_like import fetching_device, like_cuda
from tests.workers import local_worker
from tools.make_gguf import write_gguf
from tools.make_wide import published_config

MIB = 2**20
ROUNDING = 60_000  # the engine's log is exact to 5 kB a buffer, and aligns tensors
TYPES = {
    "embedding": "Q6_K", "attention": "Q8_0", "dense": "Q8_0", "shared": "Q8_0",
    "routed": "Q4_K", "ffn_down_exps": "Q5_0", "head": "Q6_K",
}  # fmt: skip
SIX = Dots1Config.from_json(published_config(num_hidden_layers=6))
WHOLE = Dots1Config.from_json(published_config())
SMALL = replace(
    CONFIG, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
    head_dim=64, intermediate_size=1280, moe_intermediate_size=256, n_routed_experts=16,
    num_experts_per_tok=4, vocab_size=2048, max_position_embeddings=4096,
)  # fmt: skip

Run = Callable[..., Any]

# Of a model with 6 blocks.
PLACES: dict[str, Decisions] = {
    "all in RAM": {},
    "all on a device": {"layers": {"RPC0": 7}},
    "late layers on a device": {"layers": {"RPC0": 4}},
    "the head on a device": {"layers": {"RPC0": 1}},
    "experts in RAM": {"layers": {"RPC0": 7}, "overrides": [("_exps", "CPU")]},
    "late experts in RAM": {"layers": {"RPC0": 7}, "overrides": [(r"\.[345]\..*_exps", "CPU")]},
    "one matrix of a layer in RAM": {
        "layers": {"RPC0": 7},
        "overrides": [(r"blk\.3\.ffn_down_exps", "CPU"), (r"blk\.[45]\..*_exps", "CPU")],
    },
    "late layers without experts": {"layers": {"RPC0": 4}, "overrides": [("_exps", "CPU")]},
    "KV cache in RAM": {
        "layers": {"RPC0": 4},
        "overrides": [(r"blk\.[012]\.(attn_[qkv]|ffn_.*)\.weight", "RPC0")],
    },
    "two devices": {"layers": {"RPC0": 3, "RPC1": 4}, "overrides": [("nothing", "CPU")]},
    "two devices, experts in RAM": {
        "layers": {"RPC0": 3, "RPC1": 4},
        "overrides": [("_exps", "CPU")],
    },
    "experts on the other device": {
        "layers": {"RPC0": 4, "RPC1": 2},
        "overrides": [(r"blk\.2\..*_exps", "RPC1"), (r"blk\.[45]\..*_exps", "CPU")],
    },
    "nothing but experts on a device": {
        "layers": {"RPC0": 0},
        "overrides": [(r"blk\.[12]\..*_exps", "RPC0")],
    },
}
SHAPES: tuple[Decisions, ...] = (
    {"context": 16384},
    {"context": 32768, "ubatch": 2048, "kv_type": "Q8_0"},
    {"context": 4096, "flash_attention": False},
    {"context": 1000, "ubatch": 4096, "kv_type": "BF16"},
    {"context": 512, "ubatch": 64, "n_outputs": 64},
    {"context": 512, "n_outputs": 512, "n_sequences": 4},
)
# Sequences that share a KV cache.
SHARED: tuple[Decisions, ...] = (
    {"context": 4096, "sequences": 4},
    {"context": 8192, "sequences": 8, "ubatch": 2048, "kv_type": "Q8_0"},
    {"context": 1000, "sequences": 2, "flash_attention": False},
    {"context": 700, "sequences": 3, "ubatch": 100, "kv_type": "F32"},
    {"context": 2048, "sequences": 8, "ubatch": 64, "flash_attention": False, "n_outputs": 64},
    {"context": 100, "sequences": 2, "ubatch": 1024},
)


@pytest.fixture(scope="module")
def endpoints() -> Iterator[list[str]]:
    with local_worker() as one, local_worker() as other:
        # They say something of each client, and would wait for a reader once the pipe is full.
        readers = [Thread(target=list, args=[each.process.stdout]) for each in (one, other)]
        for reader in readers:
            reader.start()
        yield [one.endpoint, other.endpoint]
        for worker, reader in zip((one, other), readers, strict=True):
            worker.kill()
            reader.join()


@pytest.fixture(scope="module")
def run(endpoints: list[str]) -> Iterator[Run]:
    """Call a function of this module in the child process that is connected to the workers."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda function, *values: pool.submit(function, endpoints, *values).result()


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("footprint") / "six.gguf"
    return write_sparse_gguf(path, SIX, TYPES, vocabulary=False)


def read_graph(path: Path) -> ModelGraph:
    return ModelGraph.read(GGUFFile.open(path))


def predicted(path: Path, decisions: Decisions) -> dict[str, Sizes]:
    graph = read_graph(path)
    sequences: int = decisions.get("n_sequences", 1)
    outputs: int = decisions.get("n_outputs", sequences)
    usage = footprint(
        graph, placement_for(path, decisions), n_sequences=sequences, n_outputs=outputs
    )
    sizes = {name: (each.weights, each.kv, each.compute) for name, each in usage.items()}
    return {"RPC0": (0, 0, 0), "RPC1": (0, 0, 0), **sizes}


def assert_computes_as_predicted(
    path: Path, decisions: Decisions, real: Mapping[str, Sizes], slack: float = 0
) -> None:
    for device, (_, _, compute) in predicted(path, decisions).items():
        assert compute == pytest.approx(real[device][2], abs=ROUNDING + slack), device


@pytest.mark.parametrize("shape", [*SHAPES, *SHARED], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_compute_buffers_are_the_engines(six: Path, run: Run, place: str, shape: Decisions) -> None:
    decisions = {**PLACES[place], **shape}
    # A run without allocation forgets which device norms were left to, which here is a difference.
    slack = 8 * MIB * shape.get("ubatch", 512) / 512 if place.startswith("two") else 0
    assert_computes_as_predicted(six, decisions, run(taken, six, decisions), slack)


@pytest.mark.parametrize("place", [*PLACES, "pipelined"])
def test_everything_is_as_predicted_after_a_real_load(tmp_path: Path, run: Run, place: str) -> None:
    path = write_sparse_gguf(tmp_path / "small.gguf", SMALL, TYPES, vocabulary=False)
    decisions = PLACES.get(place, {"layers": {"RPC0": 3, "RPC1": 4}})
    for shape in (
        {"context": 2048},
        {"context": 1024, "kv_type": "Q8_0"},
        {"context": 300, "n_sequences": 3, "n_outputs": 512},
        {"context": 300, "sequences": 4},
        {"context": 100, "sequences": 8, "ubatch": 64, "kv_type": "Q8_0"},
        {"context": 200, "sequences": 2, "flash_attention": False},
        {"context": 512, "flash_attention": False},
    ):
        real = run(taken, path, {**decisions, **shape}, False)
        for device, sizes in predicted(path, {**decisions, **shape}).items():
            assert sizes == pytest.approx(real[device], abs=ROUNDING), (device, shape)


@pytest.mark.parametrize("place", [
    {"layers": {"RPC0": 63}, "overrides": [(r"\.([3-5]\d|2[2-9]|6\d)\..*_exps", "CPU"),
                                          (r"\.21\.ffn_down_exps", "CPU")]},
    {"layers": {"RPC0": 20, "RPC1": 30}, "overrides": [(r"\.(1|[4-6]\d)\..*_exps", "CPU")]},
])  # fmt: skip
def test_all_62_layers(tmp_path: Path, run: Run, place: Decisions) -> None:
    path = write_sparse_gguf(tmp_path / "whole.gguf", WHOLE, TYPES, vocabulary=False)
    decisions = {**place, "context": 16384}
    assert_computes_as_predicted(path, decisions, run(taken, path, decisions))


@pytest.mark.parametrize("shape", [*SHAPES[:3], *SHARED[:3]], ids=str)
@pytest.mark.parametrize("place", [place for place in PLACES if place != "two devices"])
def test_fetched_weights_lie_on_the_first_device(
    six: Path, run: Run, monkeypatch: pytest.MonkeyPatch, place: str, shape: Decisions
) -> None:
    monkeypatch.setattr(footprint_module, "_FETCHING", ("RPC",))
    decisions = {**PLACES[place], **shape}
    slack = 8 * MIB * shape.get("ubatch", 512) / 512 if place.startswith("two") else 0
    assert_computes_as_predicted(six, decisions, run(taken_by_a_gpu, six, decisions), slack)


def taken_by_a_gpu(workers: Sequence[str], path: Path, decisions: Decisions) -> dict[str, Sizes]:
    """What the engine takes if the first worker fetches weights from RAM like a GPU."""
    with fetching_device(backends.add_worker(workers[0])[0].handle):
        return taken(workers, path, decisions)


@pytest.mark.parametrize("place", ["all on a device", "experts in RAM", "late layers on a device"])
@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize(
    ("context", "ubatch", "kv_type"),
    [(32768, 512, "Q8_0"), (16384, 2048, "Q4_0"), (8192, 4096, "BF16"), (8192, 512, "F16")],
)
def test_cuda_needs_larger_buffers(
    six: Path, run: Run, monkeypatch: pytest.MonkeyPatch, place: str, context: int, ubatch: int,
    kv_type: str, sequences: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(footprint_module, "_FETCHING", ("RPC",))
    monkeypatch.setattr(graph_memory, "CUDA", ("RPC",))
    graph_memory.reserved_buffers.cache_clear()
    decisions = {**PLACES[place], "context": context // sequences, "sequences": sequences}
    decisions |= {"ubatch": ubatch, "kv_type": kv_type}
    # Keys and values beside the result as F16, unless they are.
    more = 0 if kv_type == "F16" else 2 * context * 4096 * 2
    real = run(taken_by_cuda, six, decisions, more)
    assert_computes_as_predicted(six, decisions, real)
    graph_memory.reserved_buffers.cache_clear()


def taken_by_cuda(
    workers: Sequence[str], path: Path, decisions: Decisions, attention_bytes: int
) -> dict[str, Sizes]:
    device = backends.add_worker(workers[0])[0]
    with like_cuda(device.handle, device.buffer_type, attention_bytes):
        return taken_by_a_gpu(workers, path, decisions)


def compute_of(path: Path, device: str, **decisions: Any) -> int:
    placement = placement_for(path, {"layers": {device: 7}, **decisions})
    return footprint(read_graph(path), placement)[device].compute


def test_repacked_weights_do_not_lie_in_the_gpus_buffer(six: Path) -> None:
    experts = {"overrides": [("ffn_(gate|up)_exps", "CPU")], "context": 512}
    gate = 128 * 1408 * 4096 * 144 // 256
    assert compute_of(six, "CUDA0", **experts) > gate
    assert compute_of(six, "CUDA0", **experts, host_memory="repacked") < gate
    assert compute_of(six, "CUDA0", **experts, ubatch=16) < gate
    assert compute_of(six, "CUDA0", **experts, offload_min_batch=1024) < gate
    assert compute_of(six, "RPC0", **experts) < gate


def test_a_placement_or_file_of_another_model_is_refused(six: Path, tmp_path: Path) -> None:
    graph = read_graph(six)
    with pytest.raises(UsageError, match=r"62 blocks.*six\.gguf has 6"):
        footprint(graph, replace(placement_for(six, {}), blocks=62))
    path = write_random_gguf(tmp_path / "part.gguf", without=["blk.2.attn_output.weight"])
    with pytest.raises(GGUFError, match=r"no tensor blk\.2\.attn_output\.weight; run dots1 verify"):
        read_graph(path)


def test_bytes_by_role_are_as_calculated_by_hand(six: Path) -> None:
    decisions = {"layers": {"RPC0": 7}, "overrides": [(r"\.5\..*_exps", "CPU")], "context": 1000}
    usage = footprint(read_graph(six), placement_for(six, decisions))
    gate, down = 128 * 1408 * 4096 * 144 // 256, 128 * 1408 * 4096 * 22 // 32
    assert usage["CPU"].routed == 2 * gate + down
    assert usage["RPC0"].routed == 4 * (2 * gate + down)
    assert usage["RPC0"].attention == 6 * 4 * 4096 * 4096 * 34 // 32
    assert usage["RPC0"].dense == 3 * 10944 * 4096 * 34 // 32
    assert usage["RPC0"].shared == 5 * 3 * 2816 * 4096 * 34 // 32
    assert usage["RPC0"].router == 5 * 4 * 128 * 4097
    assert usage["CPU"].embedding == usage["RPC0"].head == 152_064 * 4096 * 210 // 256
    assert (usage["RPC0"].kv, usage["CPU"].kv) == (6 * 1024 * 2 * 4096 * 2, 0)
    assert usage["CPU"].weights == usage["CPU"].routed + usage["CPU"].embedding
    assert usage["CPU"].total == sum(
        (usage["CPU"].weights, usage["CPU"].kv, usage["CPU"].compute, usage["CPU"].scratch)
    )


@pytest.mark.parametrize(
    ("config", "decisions", "logged"),
    [
        ("tiny", {"ubatch": 512}, 7.70),
        ("tiny", {"context": 8192, "ubatch": 2048}, 60.79),
        ("tiny", {"context": 4096, "kv_type": "Q8_0"}, 11.23),
        ("small", {"ubatch": 512}, 26.76),
        ("small", {"context": 8192, "ubatch": 2048}, 137.04),
    ],
)
def test_vulkan_computes_shared_experts_early(
    tmp_path: Path, config: str, decisions: Decisions, logged: float
) -> None:
    """`logged`: MiB in the log of an engine with a Vulkan device, benchmarks/vulkan_offload.sh."""
    tiny = json.loads(Path("examples/dots1-tiny/config.json").read_text(encoding="utf-8"))
    small = published_config(
        num_hidden_layers=8, hidden_size=1024, num_attention_heads=8, num_key_value_heads=8,
        intermediate_size=2816, moe_intermediate_size=512, n_routed_experts=32, vocab_size=4096,
    )  # fmt: skip
    geometry = {"tiny": tiny, "small": small}[config]
    path = write_gguf(tmp_path / "model.gguf", geometry, headers_only=True)
    layers = {"Vulkan0": geometry["num_hidden_layers"] + 1}
    nbytes = compute_of(path, "Vulkan0", layers=layers, **decisions)
    assert nbytes == pytest.approx(logged * MIB, rel=0.015)
    assert nbytes > (logged - 0.01) * MIB  # too little would be worse than too much
