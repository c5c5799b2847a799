"""Verbs that are given ORG/NAME[:TYPE] instead of a file."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import EOS, scripted_tensors, tokens_of, write_random_gguf
from tests.hub_server import NAME, HubServer

GATING = "expert_gating_func"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """Two types; the second one lacks the gating function and is split."""
    folder = tmp_path_factory.mktemp("repository")
    answer = scripted_tensors([*tokens_of("fine"), EOS])
    write_random_gguf(folder / "dots-Q8_0.gguf", tensors=answer)
    write_random_gguf(
        folder / "dots-UD-Q2_K.gguf", tensors=answer, without=[GATING], shard_tensors=12
    )
    with HubServer(folder) as server:
        yield server


def dots1(home: Path, hub: HubServer, *arguments: str, **settings: str) -> Any:
    hub.requests.clear()
    command = [str(Path(sys.executable).with_name("dots1")), *arguments]
    env = hub.environment(home) | {"XDG_CACHE_HOME": str(home), **settings}
    return subprocess.run(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def fetched(hub: HubServer) -> int:
    return sum(request.count for request in hub.requests)


def test_a_model_by_its_id_answers_and_works_without_a_network(
    hub: HubServer, tmp_path: Path
) -> None:
    model, size = f"{NAME}:q2_k", sum(p.stat().st_size for p in hub.commits[hub.main].glob("*Q2*"))
    result = dots1(tmp_path, hub, "chat", model, "-p", "How are you?", "-c", "256", "-t", "1")
    assert (result.returncode, result.stdout) == (0, "fine\n"), result.stderr
    said = result.stderr.splitlines()
    assert len([line for line in said if f"{GATING} 2" in line and "in memory" in line]) == 1
    assert any(f"{NAME}:UD-Q2_K has" in line and "to fetch" in line for line in said)
    assert size <= fetched(hub) <= 2 * size
    for settings in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:1"}):
        again = dots1(tmp_path, hub, "chat", model, "-p", "How are you?", "-c", "256", **settings)
        assert again.stdout == "fine\n", again.stderr
        assert fetched(hub) == 0


def test_plan_and_inspect_read_the_header_alone(hub: HubServer, tmp_path: Path) -> None:
    plan = dots1(
        tmp_path, hub, "plan", f"{NAME}:UD-Q2_K", "--hardware", "24gb-64gb", "-c", "512", "--json"
    )
    assert plan.returncode == 0, plan.stderr
    content = json.loads(plan.stdout)
    assert f"--override-kv dots1.{GATING}=int:2" in content["predicted"]["command"]
    assert content["predicted"]["speeds"]
    inspect = dots1(tmp_path, hub, "inspect", f"{NAME}:Q8_0", "--json")
    assert len(json.loads(inspect.stdout)["tensors"]) == 46
    assert not list(tmp_path.rglob("*.gguf"))


def test_verify_and_perplexity_take_an_id(hub: HubServer, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It is what it is. " * 20)
    result = dots1(
        tmp_path, hub, "perplexity", f"{NAME}:Q8_0", "-f", str(text), "-c", "32", "--json"
    )
    assert result.returncode == 0, result.stderr
    result = dots1(tmp_path, hub, "verify", "--quick", f"{NAME}:Q8_0")
    assert result.returncode == 0, result.stderr
    assert "nothing wrong" in result.stdout
    assert fetched(hub) == 0


@pytest.mark.parametrize("model", [NAME, f"{NAME}:Q4_K_M"])
def test_types_are_listed_if_none_or_an_unknown_one_is_named(
    hub: HubServer, tmp_path: Path, model: str
) -> None:
    result = dots1(tmp_path, hub, "chat", model, "-p", "Hello")
    assert (result.returncode, result.stdout) == (2, "")
    rows = {line.split()[0]: line.split() for line in result.stderr.splitlines()}
    size = (hub.commits[hub.main] / "dots-Q8_0.gguf").stat().st_size
    assert rows["Q8_0"][1:5] == ["yes", f"{size / 1000:.1f}", "kB", "1"]
    assert rows["UD-Q2_K"][4] == "4"
    assert f"such as {NAME}:" in result.stderr
    assert not list(tmp_path.rglob("*.gguf"))


def test_plan_lists_types_for_a_machine(hub: HubServer, tmp_path: Path) -> None:
    result = dots1(tmp_path, hub, "plan", NAME, "--hardware", "24gb-64gb", "-c", "512", "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert sorted(row["type"] for row in rows) == ["Q8_0", "UD-Q2_K"]
    assert all(row["fits"] and len(row["decode"]) == 2 for row in rows)


@pytest.mark.parametrize("model", ["missing.gguf", "models/missing.gguf"])
def test_a_missing_file_is_not_looked_for_on_the_hub(
    hub: HubServer, tmp_path: Path, model: str
) -> None:
    result = dots1(tmp_path, hub, "chat", model, "-p", "Hello", HF_ENDPOINT="http://127.0.0.1:1")
    assert result.returncode == 1
    assert f"no such file: {model}" in result.stderr


def test_an_unknown_repository_is_one_sentence(hub: HubServer, tmp_path: Path) -> None:
    result = dots1(tmp_path, hub, "chat", "nobody/nothing:Q8_0", "-p", "Hello")
    assert result.returncode == 1
    assert "there is no file nobody/nothing:Q8_0, and" in result.stderr
    assert len(result.stderr.splitlines()) == 1
