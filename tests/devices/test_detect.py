"""Whatever happens to the child is one sentence; shell scripts stand for engines in trouble."""

import json
import sys
from pathlib import Path

import pytest

from dots1_local.devices import machine as detect
from dots1_local.devices.hardware import CPU, Device, Hardware
from dots1_local.errors import Dots1Error

GOOD = Hardware("m", "s", "e", 1, Device(CPU, "CPU", "a CPU", 1, 2)).to_json()
del GOOD["format"], GOOD["version"]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that is run in place of Python."""
    script = tmp_path / "engine"
    script.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return script


def says(message: object) -> str:
    return f"printf '%s\\n' 'dots1-engine {json.dumps(message)}'"


def test_the_real_one_answers() -> None:
    found = detect.detect({"workers": []})
    assert found.engine.startswith("llama-cpp-python ")
    assert "CPU" in found.engine
    assert found.cpu.speed is None


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (
            'echo "/src/ggml-cuda.cu:12: CUDA error: out of luck." >&2; kill -ABRT $$',
            r"^the engine died while measuring CUDA0: CUDA error: out of luck; if a driver",
        ),
        ("kill -ABRT $$", "died while measuring CUDA0: Aborted; if"),
        ("exit 3", "died while measuring CUDA0: exit code 3; if"),
        (r"printf 'a\033[31mb' >&2; exit 1", r"CUDA0: a\[31mb; if"),
        ("exec sleep 60", "did not answer for 0 seconds while measuring CUDA0; check"),
        ("echo all is well; echo '{}'", "died while measuring CUDA0: exit code 0"),
        ("echo 'dots1-engine {'", "answer made no sense while measuring CUDA0; try"),
        ("echo 'dots1-engine 5'", "answer made no sense while measuring CUDA0; try"),
        (says({"answer": {"name": 3}}), "made no sense while measuring CUDA0: the answer has 3"),
        (says({"answer": None}), "made no sense while measuring CUDA0: the answer is None"),
        (says({"error": "no memory left"}), "^no memory left$"),
    ],
)
def test_an_engine_in_trouble_is_one_sentence(
    engine: Path, monkeypatch: pytest.MonkeyPatch, script: str, sentence: str
) -> None:
    monkeypatch.setattr(detect, "_PATIENCE", 0.3)
    engine.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(Dots1Error, match=sentence) as error:
        detect.detect({"workers": [], "measure": "CUDA0", "threads": 1})
    assert "\n" not in str(error.value)


def test_what_a_driver_prints_is_ignored(engine: Path) -> None:
    progress = says({"progress": [1, 2, "measurements", "CPU Q8_0"]})
    answer = says({"answer": GOOD})
    noise = "echo found 7 devices; printf '\\377\\376 no line end'; echo"
    engine.write_text(f"#!/bin/sh\n{noise}\n{progress}\n{noise}\n{answer}\nexit 9\n")
    told: list[tuple[int, int, str, str]] = []
    found = detect.detect({"workers": []}, lambda *step: told.append(step))
    assert found.cpu.total == 2
    assert told == [(1, 2, "measurements", "CPU Q8_0")]


def test_nobody_at_a_workers_address_aborts_only_the_child() -> None:
    with pytest.raises(Dots1Error, match="looking for devices: Failed to connect"):
        detect.detect({"workers": ["127.0.0.1:1"]})
