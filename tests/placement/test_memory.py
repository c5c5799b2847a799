"""Compare predicted memory with hand calculations and with what the engine reserves.

The engine loads sparse files at the real widths with `no_alloc`: it plans everything and allocates
nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import llama_cpp as llama

from dots1_local.architecture import Dots1Config
from dots1_local.devices.machine import find_hardware
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.gguf import GGUFFile
from dots1_local.ggml import quant_type
from dots1_local.placement.footprint import footprint, kv_bytes
from dots1_local.placement.memory import (
    compute_bytes,
    parse_memory,
    weights_budget,
)
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.planner import place
from dots1_local.quant.allocate import Allocator
from tests.engine.sparse_gguf import write_sparse_gguf
from tests.helpers import CONFIG
from tests.placement.machines import machine
from tests.quant.made_up import made_up
from tools.make_wide import published_config

GB, MIB = 10**9, 2**20
ROUNDING = 10_000  # the engine logs hundredths of MiB
ROLES = ("embedding", "attention", "dense", "shared", "routed", "head")
INPUTS = 20_000  # bytes of token ids and positions in a ubatch of 512
REAL = Dots1Config.from_json(published_config())
FEW_LAYERS = Dots1Config.from_json(published_config(num_hidden_layers=4))
_log: list[str] = []


@pytest.mark.parametrize(
    ("text", "gpus", "ram"),
    [
        ("24GB gpu + 64GB ram", [24 * GB], 64 * GB),
        ("2x24GB gpu + 128 GB ram", [24 * GB, 24 * GB], 128 * GB),
        ("64 gb RAM+24 GiB VRAM", [24 * 2**30], 64 * GB),
        ("24GB gpu + 12 GB GPU", [24 * GB, 12 * GB], 0),
        ("2 x 48GB ram", [], 96 * GB),
        ("96GBram", [], 96 * GB),
    ],
)
def test_reads_memory(text: str, gpus: list[int], ram: int) -> None:
    memory = parse_memory(text)
    assert [device.free for device in memory.devices] == gpus
    assert memory.cpu.free == memory.cpu.total == ram


@pytest.mark.parametrize(
    "text", ["", "64GB", "24GB gpu +", "24GB gpu, 64GB ram", "0x24GB gpu", "much ram", "0GB ram"]
)
def test_text_that_is_not_a_memory_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"not a (memory|size)"):
        parse_memory(text)


def test_kv_cache_of_the_real_model() -> None:
    # 62 layers x (key + value) x 32 heads x 128 = 507,904 numbers a token
    assert kv_bytes(REAL, 32768) == 32768 * 507_904 * 2 == 32768 * 1_015_808
    assert kv_bytes(REAL, 32768, "q8_0") == 32768 * 507_904 * 34 // 32 == 32768 * 539_648
    assert kv_bytes(REAL, 1000) == kv_bytes(REAL, 1024)
    with pytest.raises(UsageError, match=r"Q9.*F32, F16, BF16, Q8_0, Q5_1"):
        kv_bytes(REAL, 4096, "q9")
    with pytest.raises(UsageError, match=r"Q4_K.*F32, F16"):
        kv_bytes(REAL, 1024, "q4_k")


def test_compute_buffer_of_the_real_model() -> None:
    mask = 512 * 4096 * 2
    # Six experts' gate, up and product (1408 wide) and output; the residual, two norms, attention.
    moe = 512 * 4 * (6 * (3 * 1408 + 4096) + 4 * 4096)
    assert compute_bytes(REAL, 4096, n_outputs=1) == pytest.approx(mask + moe, abs=INPUTS)
    # Logits fit behind the gaps of the last block only: embeddings, residual, norm and attention.
    logits = 512 * 4 * (152_064 + 4 * 4096)
    assert compute_bytes(REAL, 512, n_outputs=512) == pytest.approx(
        512 * 512 * 2 + logits, abs=INPUTS
    )
    scores = 512 * 4 * (32 * 32768 + 7 * 4096) + 512 * 32768 * 4
    without = compute_bytes(REAL, 32768, n_outputs=1, flash_attention=False)
    assert without == pytest.approx(scores, abs=INPUTS)


def test_budget_of_ram() -> None:
    budget = weights_budget(REAL, parse_memory("96GB ram"), 16384)
    kv = 16384 * 1_015_808
    # 512 tokens' input and expert numbers of a MoE product; a row of logits
    scratch = 512 * 6 * (1408 * 34 // 32 + 8 * 128) + 4 * 152_064
    buffers = compute_bytes(REAL, 16384) + scratch
    assert (budget.kv, budget.buffers) == (kv, buffers)
    assert budget.reserve == 2 * GB
    assert budget.weights == 96 * GB - kv - buffers - 2 * GB
    assert budget.explanation == (
        "96.0 GB ram - 16.6 GB KV cache for 16,384 tokens (f16) - 160.9 MB buffers - 2.0 GB left "
        "free = 77.2 GB for weights"
    )


def test_names_the_context_that_would_fit() -> None:
    with pytest.raises(Dots1Error, match=r"33.3 GB KV cache .* at least 27.9 GB") as error:
        weights_budget(REAL, parse_memory("60GB ram"), 32768)
    match = re.search(r"a context of ([\d,]+) tokens would fit", str(error.value))
    assert match
    fitting = int(match[1].replace(",", ""))
    weights_budget(REAL, parse_memory("60GB ram"), fitting)
    with pytest.raises(Dots1Error):
        weights_budget(REAL, parse_memory("60GB ram"), fitting + 1)


@pytest.mark.parametrize(
    ("memory", "n_ctx", "sentence"),
    [
        ("24GB ram", 16384, "no context fits, and the shortest one lacks 6.[0-9] GB"),
        ("1GB gpu + 64GB ram", 4096, "gpu of 1.0 GB has no room .* leave it out"),
        ("80GB gpu + 2GB ram", 4096, "ram of 2.0 GB has no room"),
        ("96GB ram", 32769, "trained for contexts of 1 to 32768 tokens, not 32769"),
    ],
)
def test_says_what_is_short(memory: str, n_ctx: int, sentence: str) -> None:
    with pytest.raises(Dots1Error, match=sentence):
        weights_budget(REAL, parse_memory(memory), n_ctx)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize(
    ("memory", "n_ctx", "kv_type"),
    [
        ("96GB ram", 16384, "F16"),
        ("24GB gpu + 64GB ram", 16384, "Q8_0"),
        ("8GB gpu + 64GB ram", 8192, "F16"),
        ("2x24GB gpu + 64GB ram", 32768, "F16"),
    ],
)
def test_a_file_made_for_a_memory_is_planned_to_fill_it(
    allocator: Allocator, tmp_path: Path, memory: str, n_ctx: int, kv_type: str, measured: bool
) -> None:
    budget = weights_budget(REAL, parse_memory(memory), n_ctx, kv_type).weights
    plan = allocator.within(budget, "memory").plan
    path = tmp_path / "model.gguf"
    write_sparse_gguf(path, REAL, plan.types, plan.expert_width, vocabulary=False)
    graph, hardware = ModelGraph.read(GGUFFile.open(path)), parse_memory(memory)
    if measured:
        like = find_hardware("24gb-64gb")
        cpu = replace(hardware.cpu, speed=like.cpu.speed)
        gpus = [replace(gpu, speed=like.devices[0].speed) for gpu in hardware.devices]
        hardware = replace(hardware, cpu=cpu, devices=tuple(gpus))
    placement = place(graph, hardware, context=n_ctx, kv_type=kv_type)
    assert placement.host_memory != "mapped"
    usage = footprint(graph, placement)
    spare = {name: hardware.device(name).free - used.total for name, used in usage.items()}
    spare["CPU"] -= 2 * GB
    for gpu in hardware.devices:
        spare[gpu.name] -= 1 * GB
    assert min(spare.values()) >= 0
    # Matrices of experts are on one device as a whole.
    largest = max(tensor.nbytes for tensor in graph.tensors if "_exps" in tensor.name)
    assert sum(spare.values()) < 1.5 * largest * len(hardware.devices) + 100_000_000


@pytest.fixture(scope="module")
def allocator() -> Allocator:
    return Allocator(REAL, made_up(REAL))


def test_every_device_has_the_reserve_of_its_kind() -> None:
    budget = weights_budget(REAL, machine(64 * GB, (24 * GB,), (32 * GB,)), 4096)
    assert "24.0 GB gpu + 32.0 GB worker + 64.0 GB ram - " in budget.explanation
    assert budget.reserve == (1 + 2 + 2) * GB  # a worker's machine has other programs too


def test_buffers_of_a_small_model_do_not_grow_with_the_memory() -> None:
    budget = weights_budget(CONFIG, machine(96 * GB, (12 * GB,)), 1024)
    assert budget.buffers < 1 * GB


@pytest.fixture(scope="module")
def real_widths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from _load(tmp_path_factory.mktemp("memory") / "real.gguf", FEW_LAYERS)


@pytest.fixture(scope="module")
def small_widths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from _load(tmp_path_factory.mktemp("memory") / "small.gguf", CONFIG)


@pytest.mark.parametrize("options", [
    {"n_outputs": 1}, {"n_outputs": 512}, {"n_outputs": 1, "flash_attention": False},
    {"n_outputs": 1, "kv_type": "f32"}, {"n_outputs": 1, "kv_type": "q8_0"},
])  # fmt: skip
@pytest.mark.parametrize(("n_ctx", "n_ubatch"), [(1000, 512), (4096, 64), (32768, 2048)])
def test_compute_buffer_is_the_engines(
    real_widths: Any, n_ctx: int, n_ubatch: int, options: dict[str, Any]
) -> None:
    reserved = _compute_buffer(real_widths, n_ctx, n_ubatch, **options)
    predicted = compute_bytes(FEW_LAYERS, n_ctx, n_ubatch, **options)
    assert predicted == pytest.approx(reserved, abs=ROUNDING)


def test_compute_buffer_of_a_small_model(small_widths: Any) -> None:
    reserved = _compute_buffer(small_widths, 1024, 512, n_outputs=1)
    assert compute_bytes(CONFIG, 1024, n_outputs=1) == pytest.approx(reserved, abs=ROUNDING)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_kv_cache_is_the_engines(real_widths: Any, kv_type: str) -> None:
    log = _reserve(real_widths, 1000, 512, n_outputs=1, kv_type=kv_type)
    assert kv_bytes(FEW_LAYERS, 1000, kv_type) == _mebibytes(r"llama_kv_cache: size", log)


def _load(path: Path, config: Dots1Config) -> Iterator[Any]:
    params = llama.llama_model_default_params()
    params.n_gpu_layers = params.load_mode = 0  # no mmap, which no_alloc aborts over
    params.no_alloc = True
    llama.llama_log_set(_keep, None)
    file = write_sparse_gguf(path, config, dict.fromkeys(ROLES, "Q4_0"), vocabulary=False)
    model = llama.llama_model_load_from_file(bytes(file), params)
    assert model, "".join(_log)
    yield model
    llama.llama_model_free(model)


def _reserve(
    model: Any,
    n_ctx: int,
    n_ubatch: int,
    *,
    n_outputs: int,
    flash_attention: bool = True,
    kv_type: str = "f16",
) -> str:
    """Make a context, and return what the engine logs."""
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ubatch, n_ubatch
    params.n_outputs_max, params.flash_attn_type = n_outputs, int(flash_attention)
    params.type_k = params.type_v = quant_type(kv_type).ggml
    llama.llama_log_set(_keep, None)
    _log.clear()
    context = llama.llama_init_from_model(model, params)
    assert context, "".join(_log)
    llama.llama_free(context)
    return "".join(_log)


def _compute_buffer(model: Any, n_ctx: int, n_ubatch: int, **options: Any) -> float:
    return _mebibytes("compute buffer size", _reserve(model, n_ctx, n_ubatch, **options))


def _mebibytes(label: str, log: str) -> float:
    match = re.search(rf"{label} = +([\d.]+) MiB", log)
    assert match, log
    return float(match[1]) * MIB


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _keep(level: int, text: bytes, _: Any) -> None:
    _log.append(text.decode("utf-8", errors="replace"))
