"""Plans for the machines that come with the package, and the real geometry, against goldens.

`tests/goldens/plans/by_hand.md` calculates them by hand; the same arithmetic is done here, from the
model's dimensions and the machines' figures alone. To write the goldens again after a change that
is meant: `python -m tests.placement.test_golden_plans`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import Hardware, Speed
from dots1_local.devices.machine import find_hardware
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.footprint import footprint
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import Placement, load_placement
from dots1_local.placement.planner import place
from dots1_local.placement.speed_model import SpeedModel
from tests.engine.sparse_gguf import write_sparse_gguf
from tools.make_wide import published_config

GOLDENS = Path(__file__).parents[1] / "goldens" / "plans"
MACHINES = ("24gb-64gb", "24gb-128gb", "2x24gb-128gb", "12gb-96gb", "cpu-96gb")
BITS = {"Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q5_0": 5.5, "Q4_K": 4.5, "IQ3_XXS": 3.0625,
        "IQ2_XXS": 2.0625, "F16": 16, "F32": 32}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A file: the width of its experts, and its types by role or part."""

    width: int
    types: dict[str, str]

    def weights(self) -> dict[str, int]:
        """How many weights of each kind a layer has, all experts' of a matrix as one."""
        return {
            "attention": 4096 * 4096,
            "dense": 4096 * 10944,
            "shared": 4096 * 2 * self.width,
            "gate_up": 128 * 4096 * self.width,
            "down": 128 * 4096 * self.width,
            "head": 152064 * 4096,
            "router": 4096 * 128,
        }

    def nbytes(self, kind: str) -> float:
        return self.weights()[kind] * BITS[self.types[kind]] / 8


FILES = {
    "90gb": Made(1408, {
        "router": "F32",
        "embedding": "Q8_0", "head": "Q8_0", "attention": "Q8_0", "dense": "Q8_0",
        "shared": "Q8_0", "gate_up": "Q4_K", "down": "Q5_0",
    }),
    "50gb": Made(1536, {  # experts padded, so that narrow types fit their rows
        "router": "F32",
        "embedding": "Q4_K", "head": "Q6_K", "attention": "Q5_K", "dense": "Q5_0",
        "shared": "Q5_K", "gate_up": "IQ2_XXS", "down": "IQ3_XXS",
    }),
}  # fmt: skip
CASES = [(machine, file) for file in FILES for machine in MACHINES]


def write_model(folder: Path, name: str) -> GGUFFile:
    config = Dots1Config.from_json(published_config())
    made = FILES[name]
    types = {"routed": made.types["gate_up"], "ffn_down_exps": made.types["down"], **made.types}
    return GGUFFile.open(write_sparse_gguf(folder / f"{name}.gguf", config, types, made.width))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GGUFFile]:
    folder = tmp_path_factory.mktemp("goldens")
    return {name: write_model(folder, name) for name in FILES}


@dataclass(frozen=True)
class Counts:
    """How many matrices are beside the CPU, and how many layers have all or nothing there."""

    gate_up: int
    down: int
    kv: int
    whole: int  # layers of which nothing is in RAM
    in_ram: int  # layers that are in RAM as a whole
    outputs: int  # attn_output


def counts_of(placement: Placement) -> Counts:
    def on_gpu(part: str) -> list[int]:
        layers = range(0 if part.startswith("attn") else 1, 62)
        names = {layer: f"blk.{layer}.{part}.weight" for layer in layers}
        return [layer for layer, name in names.items() if placement.device_of(name) != "CPU"]

    up, gate, down = (on_gpu(f"ffn_{part}_exps") for part in ("up", "gate", "down"))
    attention = on_gpu("attn_q")
    kv = [layer for layer in range(62) if placement.device_of_layer(layer) != "CPU"]
    return Counts(
        gate_up=len(up) + len(gate),
        down=len(down),
        kv=len(kv),
        whole=len(set(up) & set(gate) & set(down) & set(kv)),
        in_ram=62 - len(attention),
        outputs=len(on_gpu("attn_output")),
    )


def bytes_of_gpus(made: Made, counts: Counts, placement: Placement) -> float:
    """Weights and KV cache beside the CPU; routers and norms are F32 (2.1 MB a layer)."""
    there = 62 - counts.in_ram
    dense = 0 if counts.in_ram else 1
    kv = 16384 * 2 * 4096 * BITS[placement.kv_type] / 8
    return (
        (3 * there + counts.outputs) * made.nbytes("attention")
        + 3 * dense * made.nbytes("dense")
        + (there - dense) * (3 * made.nbytes("shared") + 4 * 128 * 4097)
        + counts.gate_up * made.nbytes("gate_up")
        + counts.down * made.nbytes("down")
        + bool(placement.layers) * made.nbytes("head")
        + counts.kv * kv
    )


@pytest.mark.parametrize(("machine", "file"), CASES)
def test_plans_are_the_goldens(machine: str, file: str, models: dict[str, GGUFFile]) -> None:
    golden = load_placement(GOLDENS / f"{machine}-{file}.json")
    assert place(models[file], find_hardware(machine)) == golden


@pytest.mark.parametrize(("machine", "file"), CASES)
def test_goldens_agree_with_the_table(machine: str, file: str) -> None:
    placement = load_placement(GOLDENS / f"{machine}-{file}.json")
    counts = counts_of(placement)
    table = (GOLDENS / "by_hand.md").read_text()
    match = re.search(rf"\| {machine} \| {file} \|(.*)\|", table)
    assert match
    row = [cell.strip() for cell in match[1].split("|")]
    written = (placement.kv_type, counts.kv, 62 - counts.in_ram, counts.gate_up, counts.down)
    assert row[:5] == list(map(str, written))


@pytest.mark.parametrize(("machine", "file"), CASES)
def test_gpus_are_filled(machine: str, file: str, models: dict[str, GGUFFile]) -> None:
    """All of the room is taken: what is left is less than one more matrix on each GPU."""
    placement = load_placement(GOLDENS / f"{machine}-{file}.json")
    made, hardware, counts = FILES[file], find_hardware(machine), counts_of(placement)
    used = bytes_of_gpus(made, counts, placement)
    usage = footprint(ModelGraph.read(models[file]), placement)
    weights = sum(usage[name].weights + usage[name].kv for name in placement.layers)
    assert weights == pytest.approx(used, rel=1e-3, abs=1)
    for device in hardware.devices:
        left = device.free - 1_000_000_000 - usage[device.name].total
        largest = max(made.nbytes("gate_up"), made.nbytes("down"))
        assert 0 <= left < largest, device.name


@pytest.mark.parametrize(("machine", "file"), CASES)
def test_decode_agrees_with_the_calculation_by_hand(
    machine: str, file: str, models: dict[str, GGUFFile]
) -> None:
    placement, hardware = load_placement(GOLDENS / f"{machine}-{file}.json"), find_hardware(machine)
    model = SpeedModel(ModelGraph.read(models[file]), hardware, placement)
    in_ram = placement.host_memory != "mapped"  # what is read from disk comes on top
    by_hand = decode_by_hand(FILES[file], counts_of(placement), hardware, placement)
    if in_ram:
        assert model.decode(0) == pytest.approx(by_hand, rel=0.01)
    else:
        assert model.decode(0) > by_hand
    table = (GOLDENS / "by_hand.md").read_text()
    match = re.search(rf"\| {machine} \| {file} \|(.*)\|", table)
    assert match
    assert float(match[1].split("|")[-1]) == pytest.approx(1 / by_hand, abs=0.006)


def decode_by_hand(made: Made, counts: Counts, hardware: Hardware, placement: Placement) -> float:
    """Seconds of the first token."""
    gpu = hardware.devices[0].speed if hardware.devices else None
    cpu = hardware.cpu.speed
    assert cpu
    there, routed = 62 - counts.in_ram, 6 / 128
    dense = there == 62
    on_gpu = {
        "attention": 3 * there + counts.outputs, "dense": 3 * dense,
        "shared": 3 * (there - dense), "router": there - dense, "gate_up": counts.gate_up * routed,
        "down": counts.down * routed, "head": gpu is not None,
    }  # fmt: skip
    everything = {
        "attention": 4 * 62, "dense": 3, "shared": 3 * 61, "router": 61,
        "gate_up": 2 * 61 * routed, "down": 61 * routed, "head": 1,
    }  # fmt: skip
    seconds = 0.0
    for kind, count in everything.items():
        seconds += (count - on_gpu[kind]) * _product(made, kind, cpu, placement)
        if gpu:
            seconds += on_gpu[kind] * _product(made, kind, gpu, placement)
    # 43 nodes a layer (10 of them the experts'), 23 of the dense layer, 3 of the output
    nodes = 61 * 43 + 23 + 3
    if gpu is None:
        return seconds + nodes * cpu.node + cpu.split
    at_experts = 61 - max(counts.gate_up // 2, counts.down) - counts.in_ram + (not dense)
    # Of a layer with its weights in RAM the KV cache may be on a GPU, and its norms: 13 nodes.
    bare = max(0, counts.kv - there)
    in_ram = 43 * (counts.in_ram - (not dense)) + 23 * (not dense) - 13 * bare
    on_cpu = 10 * at_experts + in_ram
    seconds += (nodes - on_cpu) * gpu.node + on_cpu * cpu.node
    # the CPU begins, and has experts; between two of those, and after the last, a GPU goes on
    # a layer that attends in RAM takes two turns more: for q, and for k and v; one with its weights
    # in RAM four: to normalise before q, k and the FFN are multiplied, and q; and to attend
    turns = 1 + at_experts + 2 * max(0, there - counts.kv) + 4 * bare
    # a token is 4,096 floats each way, and 6 x 4,096 on the way back from experts
    crossing = (at_experts * 7 + bare * 8) * 4096 * 4 / gpu.upload
    return seconds + turns * (cpu.split + gpu.split) + crossing


def _product(made: Made, kind: str, speed: Speed, placement: Placement) -> float:
    name = made.types[kind]
    rates = dict(speed.matmul)
    if placement.host_memory == "repacked":
        rates |= speed.repacked
    return max(made.nbytes(kind) / speed.bandwidth, made.weights()[kind] / rates[name].decode)


def _write() -> None:
    with TemporaryDirectory() as folder:
        for machine, file in CASES:
            model, hardware = write_model(Path(folder), file), find_hardware(machine)
            placement = place(model, hardware)
            text = json.dumps(placement.to_json(), indent=1) + "\n"
            (GOLDENS / f"{machine}-{file}.json").write_text(text)
            counts = counts_of(placement)
            speed = 1 / decode_by_hand(FILES[file], counts, hardware, placement)
            print(
                f"| {machine} | {file} | {placement.kv_type} | {counts.kv} | {62 - counts.in_ram} "
                f"| {counts.gate_up} | {counts.down} | {speed:.2f} |"
            )


if __name__ == "__main__":
    _write()
