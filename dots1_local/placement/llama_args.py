"""A placement as arguments of llama.cpp: patterns of tensor names, and a whole command line.

Patterns are few, short, and read alike by std::regex and Python's re. They contain no comma and no
equals sign, because llama.cpp's command line splits its arguments there (common/arg.cpp).
"""

import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from dots1_local.devices.hardware import CPU, Hardware
from dots1_local.placement.placement import MIN_BATCH, Placement

__all__ = [
    "EXPERTS", "EXPERT_PARTS", "command_line", "expert_overrides", "gpu_weight_overrides",
    "layer_pattern", "llama_flags", "ram_weight_overrides",
]  # fmt: skip

EXPERTS = "_exps"  # a pattern that matches all routed experts
EXPERT_PARTS = ("up", "gate", "down")  # in the order in which llama.cpp multiplies

Overrides = list[tuple[str, str]]

# Without mmap llama.cpp prefers the GPUs' pinned buffers, then buffers for repacked weights.
_HOST_MEMORY = {
    "pinned": ("-lm", "none"),
    "repacked": ("-lm", "none", "--no-host"),
    "plain": ("-lm", "none", "--no-host", "--no-repack"),
    "mapped": ("-lm", "mmap", "--no-repack"),
}


def ram_weight_overrides(layers: Sequence[int]) -> Overrides:
    """Overrides that put the weights of some layers in RAM and leave their KV cache on its device.

    The norms stay with the KV cache, because llama.cpp normalises on that device.
    """
    return [(rf"blk\.{layer_pattern(layers)}\.(?!.*_norm)", CPU)] if layers else []


def gpu_weight_overrides(devices: Mapping[int, str]) -> Overrides:
    """Overrides that put weights of layers whose KV cache is in RAM on devices, by layer.

    Routed experts and norms stay. `attn_output` stays too: llama.cpp computes attention on the CPU
    only if `attn_output` is there; otherwise it would copy the KV cache for every token.
    """
    layers: defaultdict[str, list[int]] = defaultdict(list)
    for layer, device in devices.items():
        layers[device].append(layer)
    return [
        (rf"blk\.{layer_pattern(numbers)}\.(?!attn_output|.*_norm|.*_exps)", device)
        for device, numbers in layers.items()
    ]


def expert_overrides(placed: Mapping[int, Mapping[str, str]]) -> Overrides:
    """Overrides that put routed experts on the devices that `placed` gives by layer and part."""
    layers: defaultdict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
    for layer, devices in placed.items():
        for device in dict.fromkeys(devices.values()):
            parts = tuple(part for part in EXPERT_PARTS if devices.get(part) == device)
            layers[device, parts].append(layer)
    names = {parts: f"({'|'.join(parts)})" if len(parts) > 1 else parts[0] for _, parts in layers}
    names[EXPERT_PARTS] = ".*"
    return [
        (rf"blk\.{layer_pattern(numbers)}\.ffn_{names[parts]}_exps", device)
        for (device, parts), numbers in layers.items()
    ]


def layer_pattern(layers: Iterable[int]) -> str:
    """A pattern that matches these numbers: [23, 24, 30, …, 39] -> '(2[34]|3[0-9])'."""
    units_of: defaultdict[int, set[int]] = defaultdict(set)
    for layer in layers:
        units_of[layer // 10].add(layer % 10)
    tens_of: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for tens, units in sorted(units_of.items()):
        alone = tens == 0 or tens > 9  # a character class matches one digit
        tens_of[_class(units), tens if alone else 1].append(tens)
    parts = [
        (_class(set(tens)) if tens[0] < 10 else str(tens[0])) * (tens != [0]) + units
        for (units, _), tens in tens_of.items()
    ]
    return parts[0] if len(parts) == 1 and parts[0].isdigit() else f"({'|'.join(parts)})"


def _class(digits: set[int]) -> str:
    """A pattern of one digit: {3} -> '3', {3, 4, 5, 8} -> '[3-58]'."""
    if len(digits) == 1:
        return str(next(iter(digits)))
    text = ""
    for digit in sorted(digits):
        if digit - 1 not in digits:
            last = digit
            while last + 1 in digits:
                last += 1
            text += str(digit) + ("" if last == digit else f"{'-' * (last > digit + 1)}{last}")
    return f"[{text}]"


def command_line(
    placement: Placement,
    hardware: Hardware,
    model: str,
    keys: Mapping[str, bool | int | float | str] | None = None,
) -> str:
    """A shell command; `llama-server` stands for any of llama.cpp's programs.

    `keys` are those of the file that llama.cpp has to take other values for.
    """
    command = ["llama-server", "-m", model, *llama_flags(placement, hardware)]
    if keys:
        command += ["--override-kv", ",".join(f"{k}={_typed(v)}" for k, v in keys.items())]
    environment = ""
    if placement.offload_min_batch is not None:
        environment = f"{MIN_BATCH}={placement.offload_min_batch} "
    return environment + shlex.join(command)


def llama_flags(placement: Placement, hardware: Hardware) -> list[str]:
    """Flags of llama-cli, llama-server and the like, without the model's path."""
    flags = ["--rpc", ",".join(placement.workers)] if placement.workers else []
    flags += ["-dev", ",".join(placement.layers) or "none", "-ngl", str(placement.gpu_layers)]
    if len(placement.layers) > 1:
        flags += ["-ts", ",".join(map(str, placement.layers.values()))]
    if placement.overrides:
        pairs = (f"{pattern}={_buffer(hardware, name)}" for pattern, name in placement.overrides)
        flags += ["-ot", ",".join(pairs)]
    ubatch, kv_type = str(placement.ubatch), placement.kv_type.lower()
    flags += ["-c", str(placement.tokens), "-b", ubatch, "-ub", ubatch]
    if placement.sequences > 1:
        flags += ["-np", str(placement.sequences), "-kvu"]
    flags += ["-ctk", kv_type, "-ctv", kv_type, "-fa", "on" if placement.flash_attention else "off"]
    flags += ["-t", str(placement.threads), *_HOST_MEMORY[placement.host_memory], "-fit", "off"]
    return flags


def _typed(value: bool | int | float | str) -> str:
    """A key's value as --override-kv takes it."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{type(value).__name__}:{text}"


def _buffer(hardware: Hardware, name: str) -> str:
    """llama.cpp's name of a device's buffers; it numbers the devices of each worker from 0."""
    device = hardware.device(name)
    if name == CPU or device.worker is None:
        return name
    number = [each.name for each in hardware.devices if each.worker == device.worker].index(name)
    return f"RPC{number}[{device.worker}]"
