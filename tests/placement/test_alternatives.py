import pytest

from dots1_local.devices.hardware import CPU, Device, Hardware
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.alternatives import baselines, with_ubatch
from dots1_local.placement.footprint import GPU_RESERVE, footprint
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.planner import place
from tools.make_gguf import write_gguf
from tools.make_wide import published_config

GB = 10**9
ROOM = 6 * GB
# A layer of DQ4: 128 x 4096 x 1408 weights, gate and up of 4.5 bits and down of 5.5.
EXPERTS = 128 * 4096 * 1408 * (2 * 4.5 + 5.5) / 8
MACHINE = Hardware(
    name="here",
    source="by hand",
    engine="any",
    cores=1,
    cpu=Device(CPU, "CPU", "a processor", 64 * GB, 64 * GB),
    devices=(Device("CUDA0", "CUDA", "a GPU", ROOM + GPU_RESERVE, 80 * GB),),
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ModelGraph:
    """The header of a model of the real widths: a dense layer and six others."""
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    config = published_config(num_hidden_layers=7)
    return ModelGraph.read(GGUFFile.open(write_gguf(path, config, headers_only=True)))


def test_hand_made_placements_take_the_most_that_fits(wide: ModelGraph) -> None:
    found = dict(baselines(wide, MACHINE, place(wide, MACHINE, context=4096)))
    # All but experts takes 2 to 3 GB, the KV cache 0.47 of them: two layers' experts of 1.34 GB
    # fit, and four do not.
    usage = footprint(wide, found.pop("experts of the first 5 layers in RAM"))
    assert usage[CPU].routed == 4 * EXPERTS
    assert 0 <= ROOM - usage["CUDA0"].total < EXPERTS
    usage = footprint(wide, found.pop("all routed experts in RAM"))
    assert usage[CPU].routed == 6 * EXPERTS
    assert set(footprint(wide, found.pop("all on the CPU"))) == {CPU}
    (whole,) = found.values()
    assert 0 <= ROOM - footprint(wide, whole)["CUDA0"].total < 1.2 * EXPERTS


def test_larger_ubatches_fit_too(wide: ModelGraph) -> None:
    ours = place(wide, MACHINE, context=8192)
    for ubatch in (512, 1024, 2048, 4096):
        placement = with_ubatch(wide, MACHINE, ours, ubatch)
        assert placement.ubatch == ubatch
        assert footprint(wide, placement)["CUDA0"].total <= ROOM
