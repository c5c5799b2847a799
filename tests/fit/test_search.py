"""Files for a machine: against every plan of a small model, and rules at the real geometry."""

from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import pytest

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import Hardware, Rate
from dots1_local.devices.machine import find_hardware
from dots1_local.errors import UsageError
from dots1_local.fit.front import fit, knee_rank
from dots1_local.fit.search import MachineFile, Search
from dots1_local.fit.target import Target
from dots1_local.placement.footprint import GPU_RESERVE, RAM_RESERVE
from dots1_local.quant.choices import choices_by_width
from dots1_local.quant.plan import QuantPlan, parse_overrides
from dots1_local.quant.sensitivity import Sensitivity
from tests.micro import micro_config
from tests.placement.machines import machine, speed
from tests.quant.made_up import made_up
from tools.make_wide import published_config

REAL = Dots1Config.from_json(published_config())
SMALL = Dots1Config.from_json(
    micro_config(
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=512,
        n_routed_experts=16,
        num_hidden_layers=3,
    )
)
KINDS = ("Q6_K", "Q4_K", "IQ3_XXS")  # the smallest is slow on this CPU
FREE = ("gate_exps", "down_exps")
# So slow that matrices take most of the time, although they are small.
CPU_SPEED = speed(
    1e8,
    matmul={
        "Q6_K": Rate(5e7, 2e8),
        "Q4_K": Rate(9e7, 4e8),
        "IQ3_XXS": Rate(2e7, 3e8),
        "F32": Rate(5e7, 1e8),
    },
)
GPU_SPEED = speed(1e9, upload=4e8, upload_pageable=2e8, split=1e-6)


def search_of(config: Dots1Config, sensitivity: Sensitivity, on: Hardware, context: int) -> Search:
    """A search in which all but the experts and the head is fixed if the model is the small one."""
    fixed = [r"^(?!.*(gate|down)_exps)=Q6_K"]
    choices = choices_by_width(
        config,
        sensitivity,
        padding="off" if config is SMALL else "auto",
        overrides=parse_overrides(fixed if config is SMALL else []),
    )
    return Search(config, choices, on, context)


def small_machine(vram: int) -> Hardware:
    """A machine with enough RAM, and a GPU with `vram` bytes to use unless they are 0."""
    gpus = (GPU_RESERVE + vram,) if vram else ()
    return machine(RAM_RESERVE + 60_000_000, gpus, cpu=CPU_SPEED, gpu=GPU_SPEED)


def all_files(search: Search, sensitivity: Sensitivity) -> list[MachineFile]:
    """Every plan there is, placed."""
    free = [name for name in sensitivity.tensors if any(part in name for part in FREE)]
    others = {name: "Q6_K" for name in sensitivity.tensors if name not in free}
    files = []
    for kinds in product(KINDS, repeat=len(free)):
        types = others | dict(zip(free, kinds, strict=True))
        norms = {s: "F32" for s in _names(SMALL) if s not in types}
        plan = QuantPlan("", 512, 0, types | norms)
        files.append(search.placed(plan, sensitivity.predict(types)))
    return files


@cache
def _names(config: Dots1Config) -> tuple[str, ...]:
    from dots1_local.architecture import inventory

    return tuple(spec.name for spec in inventory(config))


@pytest.mark.parametrize("vram", [0, 14_000_000, 16_000_000, 22_000_000])
@pytest.mark.parametrize("seed", range(2))
def test_it_is_as_good_as_the_best_of_all_plans(seed: int, vram: int) -> None:
    """Within a speed, and within a KL divergence. It may be better than that: for a given plan,
    `place` does not try every matrix of routed experts on every device."""
    sensitivity = made_up(SMALL, kinds=KINDS, seed=seed)
    search = search_of(SMALL, sensitivity, small_machine(vram), 512)
    files = [file for file in all_files(search, sensitivity) if file.short <= 0]
    assert len(files) > 60
    fast, slow = min(f.decode for f in files), max(f.decode for f in files)
    assert slow > 1.3 * fast
    for share in (0.1, 0.2, 0.45, 1.0):
        limit = fast + share * (slow - fast)
        best = min(file.kl for file in files if file.decode <= limit)
        found = search.best(Target(decode=limit))
        assert found is not None
        assert found.short <= 0
        assert found.decode <= limit * (1 + 1e-9)
        assert found.kl <= best * (1 + 1e-6)
    for file in sorted(files, key=lambda each: each.kl)[:: len(files) // 4]:
        quickest = min(each.turn for each in files if each.kl <= file.kl)
        found = search.best(Target(kl=file.kl))
        assert found is not None
        assert found.short <= 0
        assert found.kl <= file.kl * (1 + 1e-9)
        assert found.turn <= quickest * (1 + 1e-6)


@pytest.mark.parametrize("name", ["cpu-96gb", "24gb-64gb"])
def test_the_real_model_has_a_front_that_fits(name: str) -> None:
    described = find_hardware(name)
    search = search_of(REAL, made_up(REAL), described, 16_384)
    found = fit(search)
    assert len(found.front) >= 4
    for file in found.front:
        assert file.short <= 0
        assert not any(other.dominates(file) for other in found.front)
    assert found.chosen == min(found.front, key=knee_rank)
    for before, after in pairwise(found.front):
        assert after.turn > 1.01 * before.turn or after.kl < before.kl / 1.01


def test_a_target_that_nothing_reaches_names_what_is_possible() -> None:
    on = small_machine(0)
    search = search_of(SMALL, made_up(SMALL, kinds=KINDS), on, 512)
    with pytest.raises(UsageError, match=r"no file decodes at 1e\+06 tok/s .*: the fastest"):
        fit(search, tok_s=1e6)
    with pytest.raises(UsageError, match=r"KL divergence of 1e-09 or less: the best"):
        fit(search, kl=1e-9)
    little = replace(on, cpu=replace(on.cpu, free=RAM_RESERVE))
    with pytest.raises(UsageError, match="has no room for any file of this model"):
        fit(search_of(SMALL, made_up(SMALL, kinds=KINDS), little, 512))
