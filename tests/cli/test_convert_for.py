"""`dots1 convert --for`: the file, the placement stored beside it, and what is printed."""

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dots1_local.devices.hardware import Rate
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.footprint import GPU_RESERVE, RAM_RESERVE, shortfall
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import check_made_for, load_placement, stored_placement
from dots1_local.placement.planner import place
from dots1_local.placement.speed_model import SpeedModel
from dots1_local.quant.choices import KINDS
from tests.cli.converting import convert, refused
from tests.placement.machines import machine, speed

CPU_SPEED = speed(
    1e8, matmul={k: Rate(2e7 if k.startswith("IQ") else 8e7, 4e8) for k in (*KINDS, "F32")}
)
GPU_SPEED = speed(
    1e9,
    matmul={kind: Rate(1e9, 4e9) for kind in (*KINDS, "F32")},
    upload=4e8,
    upload_pageable=2e8,
    split=1e-6,
)
MACHINE = machine(
    RAM_RESERVE + 60_000_000, (GPU_RESERVE + 14_000_000,), cpu=CPU_SPEED, gpu=GPU_SPEED
)


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """A machine whose GPU holds part of dots1-tiny, as a description."""
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(MACHINE.to_json()))
    return path


def test_the_file_gets_the_placement_that_was_shown(
    tiny: Path, calibration: Path, described: Path, tmp_path: Path
) -> None:
    options = ("--for", described, "--calibration", calibration, "--context", 512, "--json")
    shown = json.loads(convert(tiny, *options, "--dry-run").stdout)
    chosen = shown["for"]["front"][shown["for"]["chosen"]]
    out = tmp_path / "mine.gguf"
    written = json.loads(convert(tiny, *options, "-o", out).stdout)
    assert written["for"] == shown["for"]

    gguf = GGUFFile.open(out)
    stored = load_placement(stored_placement(out))
    check_made_for(stored, gguf)
    assert stored.model == "mine.gguf"
    asked = {k: v for k, v in chosen["placement"].items() if not k.startswith("model")}
    assert {k: v for k, v in stored.to_json().items() if not k.startswith("model")} == asked
    assert {t.name: t.type for t in gguf.tensors} == chosen["types"]
    assert sum(t.nbytes for t in gguf.tensors) == chosen["bytes"]

    graph = ModelGraph.read(gguf)
    assert max(shortfall(graph, MACHINE, stored).values()) <= 0
    model = SpeedModel(graph, MACHINE, stored)
    depth = shown["for"]["prompt"] + shown["for"]["answer"] // 2
    assert 1 / model.decode(depth) == pytest.approx(chosen["decode"])
    # The planner alone decides on whole layers; this machine has a better placement.
    alone = SpeedModel(graph, MACHINE, place(graph, MACHINE, context=512))
    assert model.decode(depth) < 0.9 * alone.decode(depth)


def test_the_front_is_printed_and_drawn(
    tiny: Path, calibration: Path, described: Path, tmp_path: Path
) -> None:
    options = ("--for", described, "--calibration", calibration, "--context", 512, "--dry-run")
    picture = tmp_path / "front.svg"
    text = convert(tiny, *options, "--front", picture).stdout
    found = json.loads(convert(tiny, *options, "--json").stdout)["for"]
    rows = [line for line in text.splitlines() if re.search(r"\d MB .*\d\.\d{4} ", line)]
    assert [float(re.findall(r"\d\.\d{4}", row)[0]) for row in rows] == [
        pytest.approx(file["kl"], abs=6e-5) for file in found["front"]
    ]
    assert [n for n, row in enumerate(rows) if "→" in row] == [found["chosen"]]
    assert f"A turn reads {found['prompt']} tokens and writes {found['answer']}." in text
    root = ElementTree.parse(picture).getroot()
    assert root.tag.endswith("svg")
    circles = [each.get("class") for each in root.iter() if each.tag.endswith("circle")]
    assert sorted(circles, key=str) == ["chosen", *["file"] * len(rows)]


def test_a_target_decides_which_file_is_made(
    tiny: Path, calibration: Path, described: Path
) -> None:
    options = (
        "--for",
        described,
        "--calibration",
        calibration,
        "--context",
        512,
        "--dry-run",
        "--json",
    )

    def found(*target: object) -> dict[str, float]:
        [file] = json.loads(convert(tiny, *options, *target).stdout)["for"]["front"]
        return dict(file)

    fast, good = found("--tok-s", 100), found("--max-kld", 0.002)
    assert fast["decode"] >= 100 > good["decode"]
    assert good["kl"] <= 0.002 < fast["kl"]
    small = json.loads(convert(tiny, *options, "--size", "9MB").stdout)
    assert small["file_bytes"] <= 9_000_000
    assert "no file decodes at 1e+06 tok/s" in refused(convert(tiny, *options, "--tok-s", 1e6))


def test_a_machine_needs_speeds(tiny: Path, calibration: Path, described: Path) -> None:
    without = replace(MACHINE, cpu=replace(MACHINE.cpu, speed=None))
    described.write_text(json.dumps(without.to_json()))
    said = refused(convert(tiny, "--calibration", calibration, "--dry-run", "--for", described))
    assert "gives no speeds of CPU" in said
    assert "dots1 hardware --json" in said
