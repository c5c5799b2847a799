import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from dots1_local.calibrate.routing import layer_routing, pack_routing
from dots1_local.cli._plan import plan
from dots1_local.devices.hardware import Hardware, load_hardware
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import load_placement, stored_placement
from dots1_local.placement.planner import place
from tests.helpers import write_random_gguf
from tests.micro import micro_config
from tests.placement.machines import machine, speed
from tools.make_gguf import write_gguf

MB = 10**6
app = typer.Typer()
app.command()(plan)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("plan") / "model.gguf")


def described(path: Path, hardware: Hardware) -> Path:
    path.write_text(json.dumps(hardware.to_json()))
    return path


@pytest.fixture(scope="module")
def a_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cpu, gpu = speed(1e6), speed(1e9, upload=1e6, upload_pageable=1e6)
    hardware = machine(4000 * MB, (2000 * MB,), cpu=cpu, gpu=gpu)
    return described(tmp_path_factory.mktemp("plan") / "machine.json", hardware)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_shows_the_device_of_each_part(model: Path, a_gpu: Path) -> None:
    result = run(model, "--hardware", a_gpu, "--context", "512")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert "context of 512 tokens" in result.stdout
    assert ["CUDA0", "RAM"] in lines
    assert ["attention", "199.2", "kB", "0", "B"] in lines  # 196,608 bytes, norms 2,560
    assert ["routed", "experts", "393.2", "kB", "0", "B"] in lines
    assert "layers          0-2 on CUDA0" in result.stdout
    assert "routed experts  1-2 on CUDA0" in result.stdout
    assert "-dev CUDA0 -ngl 4" in result.stdout
    assert [line[0] for line in lines if line and line[0] in ("0", "511")] == ["0", "511"]
    assert "\x1b" not in result.output


def test_json_is_a_plan_that_can_be_read_back(model: Path, a_gpu: Path, tmp_path: Path) -> None:
    result = run(model, "--hardware", a_gpu, "--kv", "q8_0", "--json")
    assert result.exit_code == 0, result.output
    (tmp_path / "plan.json").write_text(result.stdout)
    placement = load_placement(tmp_path / "plan.json")
    assert placement.kv_type == "Q8_0"
    predicted = json.loads(result.stdout)["predicted"]
    assert predicted["hardware"] == "a test's machine"
    assert predicted["devices"]["CUDA0"]["routed"] == 393_216
    assert predicted["speeds"][0]["decode"] > predicted["speeds"][-1]["decode"] > 0
    assert predicted["shortfall"] is None


def test_plans_for_several_answers_at_once(model: Path, a_gpu: Path, tmp_path: Path) -> None:
    options = ["--hardware", a_gpu, "--context", "512", "--parallel", "4"]
    result = run(model, *options)
    assert result.exit_code == 0, result.output
    assert "context of 4 × 512 tokens" in result.stdout
    assert "-c 2048 -b 512 -ub 512 -np 4 -kvu" in result.stdout
    assert "of one answer alone" in result.stdout
    found = json.loads(run(model, *options, "--json").stdout)
    assert (found["context"], found["sequences"]) == (512, 4)
    assert found["predicted"]["devices"]["CUDA0"]["kv"] == 4 * 512 * 3 * 2 * 64 * 2
    (tmp_path / "plan.json").write_text(json.dumps(found))
    assert load_placement(tmp_path / "plan.json").sequences == 4
    assert run(model, "--hardware", a_gpu, "--plan", tmp_path / "plan.json").stdout == result.stdout


def test_vram_and_ram_limit_the_plan(model: Path, a_gpu: Path) -> None:
    found = json.loads(run(model, "--hardware", a_gpu, "--vram", "1001MB", "--json").stdout)
    assert found["layers"].get("CUDA0", 0) < 4
    without = json.loads(run(model, "--hardware", a_gpu, "--vram", "0", "--json").stdout)
    assert (without["layers"], without["overrides"]) == ({}, [])
    result = run(model, "--hardware", a_gpu, "--vram", "100GB", "--ram", "1TB")
    assert "--vram 100.0 GB is more than the 2.0 GB of CUDA0" in result.stderr
    assert "--ram 1.0 TB is more than the 4.0 GB of CPU" in result.stderr


def test_columns_add_up_to_what_is_free(model: Path, a_gpu: Path) -> None:
    found = json.loads(run(model, "--hardware", a_gpu, "--json").stdout)["predicted"]["devices"]
    for name, free in (("CUDA0", 2000 * MB), ("CPU", 4000 * MB)):
        classes = {key: value for key, value in found[name].items() if key not in ("total", "free")}
        assert sum(classes.values()) == found[name]["total"]
        assert found[name]["total"] + found[name]["free"] == free


def test_shows_an_edited_plan(model: Path, a_gpu: Path, tmp_path: Path) -> None:
    made = json.loads(run(model, "--hardware", a_gpu, "--context", "512", "--json").stdout)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(made | {"overrides": [["_exps", "CPU"]], "ubatch": 64}))
    result = run(model, "--hardware", a_gpu, "--plan", plan)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["routed", "experts", "0", "B", "393.2", "kB"] in lines
    assert "routed experts  1-2 on RAM" in result.stdout
    assert "-ub 64" in result.stdout
    again = json.loads(run(model, "--hardware", a_gpu, "--plan", plan, "--json").stdout)
    speeds = [found["predicted"]["speeds"][0]["decode"] for found in (again, made)]
    assert speeds[0] < speeds[1]
    plan.write_text(json.dumps(made | {"kv_type": "Q5_0"}))
    assert "CUDA0 cannot compute" in run(model, "--hardware", a_gpu, "--plan", plan).stderr


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({}, ["--context", "16k"], "--plan sets"),
        ({}, ["--parallel", "2"], "--parallel"),
        ({}, ["--worker", "10.0.0.1:50052"], "--worker"),
        ({"model_bytes": 5}, [], "model.gguf (5 bytes"),
        ({"layers": {"CUDA1": 4}}, [], "CUDA1"),
        ({"layers": {"CPU": 4}}, [], "CPU"),
    ],
)
def test_plans_that_cannot_be_shown(
    model: Path,
    a_gpu: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    options: list[str],
    sentence: str,
) -> None:
    plan = tmp_path / "plan.json"
    made = place(GGUFFile.open(model), load_hardware(a_gpu))
    plan.write_text(json.dumps(made.to_json() | changes))
    result = run(model, "--hardware", a_gpu, "--plan", plan, *options)
    assert result.exit_code != 0
    assert sentence in str(result.exception)


def test_names_the_command_that_measures(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def here(workers: list[str], **options: Any) -> Hardware:
        asked.append(workers)
        return machine(workers=(4000 * MB,), cpu=speed(1e9))

    monkeypatch.setattr("dots1_local.devices.machine.this_machine", here)
    result = run(model, "--worker", "10.0.0.1:50052")
    assert asked == [["10.0.0.1:50052"]]
    assert "has not been measured (RPC0): run dots1 hardware --worker 10.0.0.1:50052" in (
        result.stderr
    )
    assert "decode tok/s" in result.stdout  # of the plan, which does without the worker


def test_a_model_that_does_not_fit_is_shown_and_exits_with_1(model: Path, tmp_path: Path) -> None:
    small = described(tmp_path / "small.json", machine(2001 * MB, cpu=speed(1e6), disk=1e6))
    result = run(model, "--hardware", small)
    assert result.exit_code == 1
    assert "the file itself, mapped" in result.stdout
    assert "RAM lacks" in result.stderr
    assert "would fit" in result.stderr
    assert "read from disk at 1.0 MB/s, it would write" in result.stderr


def test_warns_of_a_context_beyond_the_trained_one(model: Path, a_gpu: Path) -> None:
    result = run(model, "--hardware", a_gpu, "--context", "2k")
    assert result.exit_code == 0
    assert "2,048 tokens is beyond the 1,024 that the model was trained for" in result.stderr


def test_says_when_speeds_are_unknown(model: Path, tmp_path: Path) -> None:
    unmeasured = described(tmp_path / "unmeasured.json", machine())
    result = run(model, "--hardware", unmeasured)
    assert result.exit_code == 0
    assert "gives no speeds of CPU" in result.stderr
    assert "Speeds are not predicted" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--context", "17m"], "'17m'"),
        (["--context", "99999k"], "16,777,216"),
        (["--context", "much"], "'much'"),
        (["--parallel", "0"], "256 sequences"),
        (["--vram", "much"], "'much'"),
        (["--kv", "q4_k"], "Q4_K"),
        (["--worker", "10.0.0.1:50052"], "--worker"),
    ],
)
def test_invalid_options_are_refused(
    model: Path, a_gpu: Path, arguments: list[str], sentence: str
) -> None:
    result = run(model, "--hardware", a_gpu, *arguments)
    assert result.exit_code != 0
    assert sentence in str(result.exception)


def test_plans_as_the_library_does(model: Path, a_gpu: Path) -> None:

    found = json.loads(run(model, "--hardware", a_gpu, "--json").stdout)
    placement = place(GGUFFile.open(model), load_hardware(a_gpu))
    found.pop("predicted")
    assert found == placement.to_json()


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which a small GPU has room for some experts."""
    path = tmp_path_factory.mktemp("larger") / "model.gguf"
    config = micro_config(
        num_hidden_layers=5,
        hidden_size=512,
        moe_intermediate_size=512,
        n_routed_experts=16,
        num_experts_per_tok=2,
    )
    return write_gguf(path, config, "Q8_0", importance=False, headers_only=True)


def routing(folder: Path, model: Path, *, groups: int) -> Path:
    """The folder of a calibration whose tokens use so many pairs of experts in turn."""
    config = ModelGraph.read(GGUFFile.open(model)).config
    token, slot = np.mgrid[:64, :2]
    layers = [layer_routing((token % groups * 2 + slot)[None], 16) for _ in range(4)]
    folder.mkdir(exist_ok=True)
    (folder / "routing.safetensors").write_bytes(pack_routing(layers, config, "a digest"))
    return folder


def small_gpu(tmp_path: Path, upload: float) -> Path:
    gpu = speed(1e9, upload=upload, upload_pageable=upload / 2)
    hardware = machine(4000 * MB, (1000 * MB + 40 * MB,), cpu=speed(1e8), gpu=gpu)
    return described(tmp_path / "machine.json", hardware)


def test_a_cache_that_wins_comes_with_its_command(larger: Path, tmp_path: Path) -> None:
    arguments = (larger, "--hardware", small_gpu(tmp_path, 1e7), "--context", "256")
    plain = run(*arguments)
    assert "--moe-cache-mib" not in plain.stdout
    result = run(*arguments, "--routing", routing(tmp_path / "out", larger, groups=1))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(plain.stdout)
    assert re.search(r"would hit 100% of the choices \(it breaks even at \d+%\)", result.stdout)
    (command,) = re.findall(r".*--moe-cache-mib \d+$", result.stdout, re.MULTILINE)
    assert "-ot _exps=CPU" in command


def test_a_cache_that_loses_is_one_line(larger: Path, tmp_path: Path) -> None:
    arguments = (larger, "--hardware", small_gpu(tmp_path, 1e7), "--context", "256")
    result = run(*arguments, "--routing", routing(tmp_path / "out", larger, groups=8))
    last = result.stdout.splitlines()[-1]
    assert "does not pay (it breaks even at" in last
    assert "--moe-cache-mib" not in result.stdout
    found = json.loads(run(*arguments, "--routing", tmp_path / "out", "--json").stdout)
    cache = found["predicted"]["expert_cache"]
    assert not cache["wins"]
    assert cache["hit_rate"] < cache["needed"] < 1
    assert cache["decode"][1] < cache["decode"][0]


def test_the_folder_that_refinement_left_is_found(larger: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.symlink_to(larger)
    machine = small_gpu(tmp_path, 1e7)
    folder = tmp_path / "model.gguf.calibration"
    folder.mkdir()
    arguments = (model, "--hardware", machine, "--context", "256", "--json")
    assert "expert_cache" not in json.loads(run(*arguments).stdout)["predicted"]
    routing(folder, larger, groups=1)
    assert json.loads(run(*arguments).stdout)["predicted"]["expert_cache"]["wins"]


def test_routing_that_cannot_be_used(
    model: Path, larger: Path, a_gpu: Path, tmp_path: Path
) -> None:
    folder = routing(tmp_path / "out", larger, groups=1)
    result = run(model, "--hardware", a_gpu, "--routing", folder)
    assert "is of another model" in str(result.exception)
    result = run(larger, "--hardware", a_gpu, "--context", "256", "--routing", folder)
    assert result.stdout.splitlines()[-1] == (
        "No cache of experts in VRAM: all experts are in VRAM."
    )
    result = run(larger, "--hardware", a_gpu, "--routing", tmp_path)
    assert "routing.safetensors" in str(result.exception)


def test_a_stored_plan_is_pointed_out(a_gpu: Path, tmp_path: Path) -> None:
    model = write_random_gguf(tmp_path / "model.gguf")
    planned = run(model, "--hardware", a_gpu, "--json")
    assert "convert --for" not in planned.stderr
    stored = stored_placement(model)
    stored.write_text(planned.stdout)
    told = run(model, "--hardware", a_gpu)
    assert f"{stored.name}, which dots1 convert --for stored, is the plan" in told.stderr
    shown = run(model, "--hardware", a_gpu, "--plan", stored)
    assert "convert --for" not in shown.stderr
