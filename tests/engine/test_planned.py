import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dots1_local import load
from dots1_local.cli import app
from dots1_local.devices.hardware import Device, Hardware
from dots1_local.engine.engine import Engine
from dots1_local.engine.loading import OutOfMemory
from dots1_local.errors import UsageError
from dots1_local.files.gguf_header import GGUFHeader
from dots1_local.placement.footprint import Usage
from dots1_local.placement.placement import Placement, stored_placement
from tests.helpers import write_random_gguf

GB = 10**9
CARD = Device("CUDA0", "CUDA", "a card", 24 * GB, 24 * GB)
MACHINE = Hardware(
    name="described",
    source="a test",
    engine="any",
    cores=1,
    cpu=Device("CPU", "CPU", "a processor", 64 * GB, 64 * GB),
    devices=(CARD,),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("planned") / "model.gguf")


def in_ram(path: Path) -> Placement:
    size = path.stat().st_size
    return Placement(path.name, size, 3, 512, "F16", True, 64, 1, "plain")


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    """What each plan was made from: the card's free bytes, and the parameters."""
    made: list[tuple[int, dict[str, Any]]] = []

    def place(gguf: Any, hardware: Hardware, **wishes: Any) -> Placement:
        made.append((hardware.device("CUDA0").free, wishes))
        return in_ram(gguf.files[0])

    def this_machine(workers: Any, *, measure: str) -> Hardware:
        assert (workers, measure) == ((), "cached")
        return MACHINE

    monkeypatch.setattr("dots1_local.devices.machine.this_machine", this_machine)
    monkeypatch.setattr("dots1_local.placement.planner.place", place)
    return made


def test_loads_by_a_plan_file_or_into_ram(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(in_ram(model).to_json()))
    with load(model, plan) as engine:
        assert engine.n_ctx == 512
        assert engine.placement == in_ram(model)
    with load(model, threads=1) as engine:
        assert engine.placement is None
    with pytest.raises(UsageError, match="cannot read"):
        load(model, tmp_path / "missing.json")


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose headers are parsed."""
    parsed: list[str] = []
    read = GGUFHeader.read

    def counted(path: Path) -> GGUFHeader:
        parsed.append(path.name)
        return read(path)

    monkeypatch.setattr(GGUFHeader, "read", counted)
    return parsed


def test_a_load_parses_each_header_once(
    model: Path, tmp_path: Path, plans: list[Any], headers: list[str]
) -> None:
    for placement in (None, in_ram(model), "auto"):
        headers.clear()
        load(model, placement, n_ctx=256, threads=1).close()
        assert headers == ["model.gguf"]
    write_random_gguf(tmp_path / "split.gguf", shard_tensors=20)
    shards = sorted(tmp_path.iterdir())
    headers.clear()
    load(shards[-1], threads=1).close()
    assert sorted(headers) == [shard.name for shard in shards]


def test_chat_parses_the_header_once(model: Path, tmp_path: Path, headers: list[str]) -> None:
    kept = ("--session", str(tmp_path / "conversation.json"))
    result = CliRunner().invoke(app, ["chat", str(model), "-p", "hi", "-n", "1", *kept])
    assert result.exit_code == 0
    assert headers == ["model.gguf"]


def test_plans_for_the_given_parameters(model: Path, plans: list[Any]) -> None:
    with load(model, "auto", n_ctx=0, kv_type="Q8_0", threads=1) as engine:
        assert engine.n_ctx == 1024
        assert engine.warnings == ()
    load(model, "auto", n_ctx=256).close()
    assert plans == [
        (24 * GB, {"context": 1024, "sequences": 1, "kv_type": "Q8_0", "threads": 1}),
        (24 * GB, {"context": 256, "sequences": 1, "kv_type": None, "threads": None}),
    ]
    plans.clear()
    load(model, "auto", n_sequences=4, shared_cache=True).close()
    assert plans == [(24 * GB, {"context": None, "sequences": 4, "kv_type": None, "threads": None})]


@pytest.mark.parametrize(
    ("planned", "options", "each", "sentence"),
    [
        ((512, 1), {"n_sequences": 4}, 128, "context of 512 tokens is divided: 4 × 128"),
        ((512, 2), {"n_sequences": 4}, 256, "context of 2 × 512 tokens is divided: 4 × 256"),
        ((512, 4), {"n_sequences": None}, 512, None),
        ((512, 4), {"n_sequences": 2}, 512, None),
        ((512, 1), {"n_sequences": 4, "n_ctx": 384}, 384, None),
        ((512, 1), {"n_sequences": 4, "n_ctx": 0}, 1024, None),  # all that it was trained for
    ],
)
def test_divides_the_context_of_a_plan_among_sequences(
    model: Path, planned: tuple[int, int], options: dict[str, Any], each: int, sentence: str | None
) -> None:
    plan = replace(in_ram(model), context=planned[0], sequences=planned[1])
    told: list[str] = []
    with load(model, plan, notify=told.append, shared_cache=True, threads=1, **options) as engine:
        sequences = options["n_sequences"] or planned[1]
        assert (engine.params.n_sequences, engine.n_ctx) == (sequences, each)
        # 3 layers, keys and values of 64 numbers in F16
        kv = sequences * each * 3 * 2 * 64 * 2
        assert engine.predicted["CPU"].kv == kv
        assert engine.report["CPU"].kv == pytest.approx(kv, abs=10_000)
        assert engine.report["CPU"].compute == pytest.approx(
            engine.predicted["CPU"].compute + sequences * 268 * 4, abs=20_000
        )  # to which the log adds what logits are put in
    assert [sentence] == [s.removeprefix("the plan's ") for s in told] if sentence else not told


def test_a_plan_for_several_sequences_can_run_one(model: Path) -> None:
    with load(model, replace(in_ram(model), sequences=4), threads=1) as engine:
        assert (engine.params.n_sequences, engine.n_ctx) == (1, 512)
        assert engine.predicted["CPU"].kv == 512 * 3 * 2 * 64 * 2


def test_plans_again_with_less_memory(
    model: Path, plans: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [OutOfMemory("CUDA0", 7, f"CUDA0 ran out ({n})") for n in range(4)]
    real = Engine.open

    def reluctant(*values: Any, **options: Any) -> Engine:
        if failures:
            raise failures.pop(0)
        return real(*values, **options)

    used = {"CUDA0": 23 * GB}

    def footprint(gguf: Any, placement: Placement) -> dict[str, Usage]:
        return {name: Usage(routed=size) for name, size in used.items()}

    monkeypatch.setattr("dots1_local.engine.planned.footprint", footprint)
    monkeypatch.setattr(Engine, "open", reluctant)
    with pytest.raises(OutOfMemory, match="3"):
        load(model, "auto")
    assert [free for free, _ in plans] == [24 * GB, 23 * GB, 21 * GB, 17 * GB]
    failures.append(OutOfMemory("CUDA0", 7, "CUDA0 ran out"))
    used["CUDA0"] = 5 * GB  # which was too much: what else seemed free is of no use
    plans.clear()
    with load(model, "auto") as engine:
        assert engine.warnings == (
            "CUDA0 ran out; planned again to take at least 1.0 GB less of it",
        )
    assert [free for free, _ in plans] == [24 * GB, 5 * GB]  # of which 1 GB is margin


@pytest.fixture
def stored(model: Path) -> Iterator[Path]:
    """The placement beside the model, as `dots1 convert --for` stores it."""
    path = stored_placement(model)
    path.write_text(json.dumps(in_ram(model).to_json()))
    yield path
    path.unlink()


def test_takes_the_placement_beside_the_file(model: Path, plans: list[Any], stored: Path) -> None:
    with load(model, "auto") as engine:
        assert engine.placement == in_ram(model)
    assert not plans


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": {"CUDA7": 1}}, "described has no device CUDA7"),
        ({"threads": 64}, "it uses 64 threads, and there are 1 cores"),
        ({"model_bytes": 5}, "was made for"),
        ({"context": 10_000_000_000}, "context"),
    ],
)
def test_a_placement_for_another_machine_or_file_is_replaced(
    model: Path, plans: list[Any], stored: Path, changes: dict[str, Any], reason: str
) -> None:
    stored.write_text(json.dumps(in_ram(model).to_json() | changes))
    said: list[str] = []
    with load(model, "auto", notify=said.append) as engine:
        assert engine.placement == in_ram(model)
    assert len(plans) == 1
    [sentence] = [each for each in said if each.startswith(stored.name)]
    assert reason in sentence
    assert sentence.endswith("; planned anew")


def test_a_stored_placement_needs_its_memory(
    model: Path, plans: list[Any], stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = replace(MACHINE, cpu=replace(MACHINE.cpu, free=1000))
    monkeypatch.setattr("dots1_local.devices.machine.this_machine", lambda *_, **__: little)
    said: list[str] = []
    load(model, "auto", notify=said.append).close()
    assert len(plans) == 1
    assert any(each.startswith(stored.name) and "CPU lacks" in each for each in said)


def test_other_wishes_come_before_a_stored_placement(
    model: Path, plans: list[Any], stored: Path
) -> None:
    said: list[str] = []
    with load(model, "auto", n_ctx=256, notify=said.append):
        assert len(plans) == 1
    assert not any(stored.name in sentence for sentence in said)
