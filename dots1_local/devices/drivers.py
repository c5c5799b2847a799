"""llama.cpp's GPU backends: how to build them and hide their devices, and which one is missing."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dots1_local.ggml import gpu_backends

__all__ = ["build_with", "hiding_variables", "missing_backends", "remedy"]

_ROOT = Path("/")


@dataclass(frozen=True)
class _Backend:
    """A backend as `name` in the engine, whose devices are called so with a number.

    `flag` builds it, and `hide` is the environment variable and the value that hide its devices.
    """

    name: str
    flag: str
    hide: tuple[str, str] | None = None


_BACKENDS = (
    _Backend("CUDA", "GGML_CUDA", ("CUDA_VISIBLE_DEVICES", "-1")),
    _Backend("ROCm", "GGML_HIP", ("HIP_VISIBLE_DEVICES", "-1")),
    _Backend("MUSA", "GGML_MUSA", ("MUSA_VISIBLE_DEVICES", "-1")),
    _Backend("Vulkan", "GGML_VULKAN", ("GGML_VK_VISIBLE_DEVICES", "")),
    _Backend("SYCL", "GGML_SYCL"),
    _Backend("MTL", "GGML_METAL"),
    _Backend("RPC", "GGML_RPC"),
)
_FLAGS = {backend.name: backend.flag for backend in _BACKENDS}
# A vendor's own backend and files of its driver. Vulkan's drivers are told apart by the vendor of
# the GPU, because a distribution installs all of Mesa's together.
_OWN = (
    ("CUDA", "NVIDIA", ("proc/driver/nvidia/version", "usr/lib/wsl/lib/libcuda.so*"), "nvidia-smi"),
    ("ROCm", "AMD", ("dev/kfd",), ""),
    ("MTL", "Apple", ("System/Library/Frameworks/Metal.framework",), ""),
)
_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_RENDER_NODES = "sys/class/drm/renderD*"
_VULKAN_DRIVERS = ("usr/share/vulkan/icd.d", "usr/local/share/vulkan/icd.d", "etc/vulkan/icd.d")
_SOFTWARE = "lvp_"  # Mesa's driver for processors


def build_with(*flags: str) -> str:
    """The command that installs llama-cpp-python with these build flags on."""
    arguments = " ".join(f"-D{flag}=on" for flag in flags)
    return (
        f'CMAKE_ARGS="{arguments}" pip install --force-reinstall --no-cache-dir --no-deps '
        "llama-cpp-python"
    )


def hiding_variables(devices: Sequence[str] = ()) -> list[str]:
    """VARIABLE=VALUE that hides each named device's backend; by default those that are built."""
    used = {device.rstrip("0123456789") for device in devices}
    built = gpu_backends()
    return [
        "=".join(backend.hide)
        for backend in _BACKENDS
        if backend.hide and (backend.name in used or (not used and _library(backend.flag) in built))
    ]


def remedy(device: str, built: Sequence[str]) -> str:
    """How to get a device that the engine, which has the `built` backends, does not have."""
    backend = device.rstrip("0123456789")
    if backend in _FLAGS and backend not in built and not _has_library(backend):
        command = build_with(*dict.fromkeys((_FLAGS[backend], "GGML_RPC")))
        return f"this llama-cpp-python was built without {backend}; build it anew: {command}"
    if backend == "RPC":
        return "name the worker that has it, in the plan or with --worker HOST:PORT"
    hide = next((each.hide for each in _BACKENDS if each.name == backend), None)
    if hide and hide[0] in os.environ:
        setting = f"{hide[0]}={os.environ[hide[0]]}"
        return f"{setting} may hide it: change that, or plan again on this machine"
    return "look whether dots1 hardware finds it, or plan again on this machine"


def missing_backends(engine: str, root: Path = _ROOT) -> tuple[str, ...]:
    """A sentence for each backend that this machine could use and `engine` was built without.

    `engine` is that of a `Hardware`, which lists the backends; `root` holds this machine's files.
    """
    built = engine.partition("(")[2].rstrip(")").split(", ")
    failing = [
        each.name for each in _BACKENDS if each.name not in built and _has_library(each.name)
    ]
    sentences = [
        f"this llama-cpp-python has {_title(name)}, but it does not start; look at the driver "
        "(dots1 -v hardware shows what it says)"
        for name in failing
    ]
    built = [*built, *failing]
    sentences += [
        f"there is {driver}, but this llama-cpp-python was built without {_title(name)}; to use "
        f"the GPU: {build_with(_FLAGS[name], 'GGML_RPC')}"
        for name, driver in _drivers(built, root)
    ]
    if "RPC" not in built:
        sentences.append(
            "this llama-cpp-python was built without RPC, which --worker needs; to get it: "
            f"{build_with('GGML_RPC')}"
        )
    return tuple(sentences)


def _drivers(built: Sequence[str], root: Path) -> Iterator[tuple[str, str]]:
    """Backends that are not built and the drivers that they could use.

    With Vulkan built, every GPU is used. A vendor's own backend is faster than Vulkan, but AMD's
    needs more software than a driver, so both are named.
    """
    if "Vulkan" in built:
        return
    served = {vendor for name, vendor, _, _ in _OWN if name in built}
    for name, vendor, files, tool in _OWN:
        found = any(any(root.glob(file)) for file in files) or (tool and shutil.which(tool))
        if found and name not in built:
            yield name, f"an {vendor} GPU's driver"
            served |= {vendor} - {"AMD"}
    if _has_vulkan_driver(root):
        vendors = {_vendor(node) for node in root.glob(_RENDER_NODES)}
        for vendor in sorted(vendors - served):
            yield "Vulkan", f"a Vulkan driver and an {vendor} GPU"


def _has_vulkan_driver(root: Path) -> bool:
    files = (file for folder in _VULKAN_DRIVERS for file in (root / folder).glob("*.json"))
    return any(not file.name.startswith(_SOFTWARE) for file in files)


def _vendor(node: Path) -> str:
    try:
        number = (node / "device" / "vendor").read_text(errors="replace").strip()
    except OSError:  # a GPU of a system on a chip has no such number
        return "onboard"
    return _VENDORS.get(number, "unknown")


def _title(backend: str) -> str:
    return "Metal" if backend == "MTL" else backend


def _has_library(backend: str) -> bool:
    return _library(_FLAGS[backend]) in gpu_backends()


def _library(flag: str) -> str:
    return flag.removeprefix("GGML_").lower()
