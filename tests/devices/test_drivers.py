"""Which backend a build lacks, told from made-up files of drivers; and advice about devices."""

import re
from pathlib import Path

import pytest

from dots1_local.devices import drivers
from dots1_local.devices.drivers import hiding_variables, missing_backends, remedy

CPU_ONLY = "llama-cpp-python 1 (RPC, CPU)"


@pytest.fixture(autouse=True)
def no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def write(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def gpu(root: Path, number: int, vendor: str) -> None:
    """A GPU as the kernel shows it, and the Vulkan drivers that Mesa's package always installs."""
    names = ("intel", "intel_hasvk", "lvp", "nouveau", "radeon", "virtio")
    write(root, *(f"usr/share/vulkan/icd.d/{name}_icd.json" for name in names))
    device = root / f"sys/class/drm/renderD{number}/device"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")


def flags(root: Path, engine: str = CPU_ONLY) -> list[str]:
    """The flag that each sentence advises, besides that for workers."""
    found = [re.findall(r"-DGGML_(\w+)=on", each) for each in missing_backends(engine, root)]
    assert all(each[-1] == "RPC" for each in found)
    return [each[0] for each in found]


def test_nothing_is_missing_without_a_gpu(tmp_path: Path) -> None:
    assert missing_backends(CPU_ONLY, tmp_path) == ()
    (sentence,) = missing_backends("llama-cpp-python 1 (CPU)", tmp_path)
    assert "without RPC" in sentence
    assert "-DGGML_RPC=on" in sentence


@pytest.mark.parametrize("file", ["proc/driver/nvidia/version", "usr/lib/wsl/lib/libcuda.so.1"])
def test_cuda_for_nvidia(tmp_path: Path, file: str) -> None:
    write(tmp_path, file)
    (sentence,) = missing_backends(CPU_ONLY, tmp_path)
    assert "NVIDIA" in sentence
    assert 'CMAKE_ARGS="-DGGML_CUDA=on -DGGML_RPC=on"' in sentence
    gpu(tmp_path, 128, "0x10de")
    assert flags(tmp_path) == ["CUDA"]  # not Vulkan too, which is slower
    assert flags(tmp_path, "x 1 (CUDA, RPC, CPU)") == []
    assert flags(tmp_path, "x 1 (Vulkan, RPC, CPU)") == []


def test_hip_or_vulkan_for_amd(tmp_path: Path) -> None:
    write(tmp_path, "dev/kfd")
    assert flags(tmp_path) == ["HIP"]
    gpu(tmp_path, 128, "0x1002")
    hip, vulkan = missing_backends(CPU_ONLY, tmp_path)
    assert "AMD" in hip
    assert "without ROCm" in hip
    assert "AMD" in vulkan
    assert "without Vulkan" in vulkan
    assert flags(tmp_path) == ["HIP", "VULKAN"]
    assert flags(tmp_path, "x 1 (ROCm, RPC, CPU)") == []
    assert flags(tmp_path, "x 1 (Vulkan, RPC, CPU)") == []


@pytest.mark.parametrize(
    ("vendor", "name"), [("0x8086", "Intel"), ("0x10de", "NVIDIA"), ("0x9999", "unknown")]
)
def test_vulkan_for_others(tmp_path: Path, vendor: str, name: str) -> None:
    gpu(tmp_path, 129, vendor)  # NVIDIA's with the kernel's own driver, which has no CUDA
    (sentence,) = missing_backends(CPU_ONLY, tmp_path)
    assert f"an {name} GPU" in sentence
    assert "-DGGML_VULKAN=on" in sentence


def test_two_gpus_of_two_vendors(tmp_path: Path) -> None:
    write(tmp_path, "proc/driver/nvidia/version")
    gpu(tmp_path, 128, "0x8086")
    gpu(tmp_path, 129, "0x10de")
    assert flags(tmp_path) == ["CUDA", "VULKAN"]
    assert flags(tmp_path, "x 1 (CUDA, RPC, CPU)") == ["VULKAN"]


def test_vulkan_needs_a_gpu_and_a_driver_for_it(tmp_path: Path) -> None:
    write(tmp_path, "usr/share/vulkan/icd.d/radeon_icd.json")
    assert flags(tmp_path) == []
    gpu(tmp_path / "b", 128, "0x8086")
    for driver in (tmp_path / "b/usr/share/vulkan/icd.d").iterdir():
        if not driver.name.startswith("lvp"):
            driver.unlink()
    assert flags(tmp_path / "b") == []


def test_metal_for_macs(tmp_path: Path) -> None:
    (tmp_path / "System/Library/Frameworks/Metal.framework").mkdir(parents=True)
    (sentence,) = missing_backends(CPU_ONLY, tmp_path)
    assert "without Metal" in sentence
    assert "-DGGML_METAL=on" in sentence
    assert flags(tmp_path, "x 1 (MTL, BLAS, RPC, CPU)") == []


def test_a_backend_that_does_not_start_need_not_be_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with GGML_VK_VISIBLE_DEVICES=7: the library is there, but registers nothing."""
    gpu(tmp_path, 128, "0x8086")
    monkeypatch.setattr(drivers, "gpu_backends", lambda: ("vulkan",))
    (sentence,) = missing_backends(CPU_ONLY, tmp_path)
    assert "has Vulkan" in sentence
    assert "CMAKE_ARGS" not in sentence
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "7")
    assert "GGML_VK_VISIBLE_DEVICES=7 may hide it" in remedy("Vulkan0", ["CPU"])


def test_hides_the_devices_in_question() -> None:
    assert hiding_variables(["Vulkan1"]) == ["GGML_VK_VISIBLE_DEVICES="]
    assert hiding_variables(["ROCm0", "CUDA0", "CUDA1"]) == [
        "CUDA_VISIBLE_DEVICES=-1",
        "HIP_VISIBLE_DEVICES=-1",
    ]
    assert hiding_variables(["MTL0"]) == []


def test_says_how_to_get_a_device_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GGML_VK_VISIBLE_DEVICES", raising=False)
    assert "-DGGML_VULKAN=on" in remedy("Vulkan0", ["CPU"])
    assert "-DGGML_HIP=on" in remedy("ROCm1", ["CUDA", "CPU"])
    assert "--worker" in remedy("RPC0", ["RPC", "CPU"])
    assert "plan again" in remedy("Vulkan0", ["Vulkan", "CPU"])
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "3")
    assert "GGML_VK_VISIBLE_DEVICES=3 may hide it" in remedy("Vulkan0", ["Vulkan", "CPU"])
