"""Failures between here and the hub: each is one sentence, and fetched shards are kept."""

import errno
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub import constants

from dots1_local.convert import Conversion
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.checkpoint import INDEX
from dots1_local.hub import open_checkpoint, open_hub
from tests.conftest import Converted
from tests.convert.conftest import SECOND, prepare, refusal, sizes
from tests.hub_server import NAME, HubServer
from tests.micro import edit_json


def test_a_header_that_differs_from_the_shards(
    hub: HubServer, tiny: Path, converted: Converted, tmp_path: Path
) -> None:
    """A header that arrived damaged may still be valid: here two experts have changed places."""
    begin = (tiny / SECOND).read_bytes()
    end = 8 + int.from_bytes(begin[:8], "little")
    table = json.loads(begin[8:end])
    first, second = [name for name in table if re.search(r"experts\.\d+\.up_proj", name)][:2]
    table[first], table[second] = table[second], table[first]
    text = json.dumps(table, separators=(",", ":")).encode().ljust(end - 8)
    hub.starts[SECOND] = begin[:8] + text
    for low_disk in (False, True):
        output = tmp_path / f"{low_disk}.gguf"
        wrong = prepare(hub)
        said = refusal(partial(wrong.run, output, low_disk=low_disk))
        assert f"{SECOND} of {NAME}" in said
        assert "another header" in said
    hub.starts.clear()
    prepare(hub).run(output, low_disk=True)
    assert output.read_bytes() == converted("Q8_0").read_bytes()


def test_a_dead_connection_ends_the_conversion_and_keeps_other_shards(
    hub: HubServer, tiny: Path, tmp_path: Path
) -> None:
    hub.cuts[SECOND] = [4_000_000, *[0] * 40]
    said = refusal(lambda: prepare(hub).run(tmp_path / "out.gguf"))
    assert hub.endpoint in said
    assert "run the same command again" in said
    hub.cuts.clear()
    before = hub.shard_bytes()
    prepare(hub).run(tmp_path / "out.gguf")
    fetched = {name: count - before.get(name, 0) for name, count in hub.shard_bytes().items()}
    assert fetched[SECOND] == sizes(tiny)[SECOND] - 4_000_000
    whole = [name for name, count in before.items() if count == sizes(tiny)[name]]
    assert all(fetched[name] == 0 for name in whole)


def test_a_wrong_hash_twice_is_refused(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    hub.damaged[SECOND] = 2
    said = refusal(lambda: prepare(hub).run(tmp_path / "out.gguf"))
    assert SECOND in said
    assert "another hash" in said
    assert not (tmp_path / "out.gguf").exists()
    left = [path for path in cache.glob("*/blobs/*") if path.suffix == ""]
    assert all(
        sha256(path.read_bytes()).hexdigest() == path.name for path in left if len(path.name) == 64
    )


def test_a_run_that_goes_on_from_another_commit_is_refused(
    hub: HubServer, tiny: Path, converted: Converted, tmp_path: Path
) -> None:
    output, first = tmp_path / "out.gguf", hub.main

    def stop(done: int, total: int, unit: str, what: str) -> None:
        if what.startswith("blk.2"):
            raise KeyboardInterrupt

    checkpoint = open_hub(NAME, endpoint=hub.endpoint)
    with pytest.raises(KeyboardInterrupt):
        Conversion.prepare(checkpoint, "Q8_0").run(output, progress=stop)
    hub.commit(shutil.copytree(tiny, tmp_path / "moved"))
    said = refusal(lambda: prepare(hub).run(output))
    assert f"--revision {first}" in said
    assert f"main is {hub.main[:12]} now" in said
    again = open_hub(NAME, first, endpoint=hub.endpoint)
    assert Conversion.prepare(again, "Q8_0").run(output).resumed_tensors > 0
    assert output.read_bytes() == converted("Q8_0").read_bytes()


class Case(NamedTuple):
    """What the server answers for a file or the API, and words that the error contains."""

    where: str
    statuses: list[int]
    says: tuple[str, ...]


@pytest.mark.parametrize(
    "case",
    [
        Case("api", [401], ("repository", "HF_TOKEN", "hf auth login")),
        Case("api", [403], ("terms", "HF_TOKEN", "hf auth login")),
        Case("api", [404], ("repository",)),
        Case("api", [429] * 4, ("429", "wait")),
        Case("api", [503] * 4, ("503", "run the same command again")),
        Case("config.json", [404], ("no file config.json",)),
        Case(SECOND, [403], ("terms",)),
        Case(SECOND, [404], (f"no file {SECOND}",)),
        Case(SECOND, [500] * 40, ("500", SECOND)),
    ],
    ids=str,
)
def test_what_the_hub_refuses(hub: HubServer, tmp_path: Path, case: Case) -> None:
    hub.statuses[case.where] = list(case.statuses)
    said = refusal(lambda: prepare(hub).run(tmp_path / "out.gguf"))
    for words in case.says:
        assert words in said
    assert hub.endpoint in said or NAME in said


def test_a_gated_repository_without_a_token(hub: HubServer) -> None:
    hub.gated, hub.statuses["api"] = True, [401]
    said = refusal(lambda: prepare(hub))
    assert "terms" in said
    assert "HF_TOKEN" in said


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_short_failure_is_retried(hub: HubServer, tmp_path: Path, status: int) -> None:
    hub.statuses["api"] = [status]
    hub.statuses[SECOND] = [status, status]
    prepare(hub).run(tmp_path / "out.gguf")


def test_names_that_are_neither_a_folder_nor_an_id(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("dots.llm1.inst", "./some/where", "a/b/c", "/no/where", "a--b/c", "a/.."):
        said = refusal(partial(open_checkpoint, text))
        assert f"folder: {text}" in said or f"folder {text}" in said
        assert "id on the hub, organisation/model" in said
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    said = refusal(lambda: open_checkpoint("models/dots"))
    assert "no folder models/dots" in said
    assert "repository models/dots" in said
    assert "no revision v9" in refusal(lambda: open_hub(NAME, "v9", endpoint=hub.endpoint))


def test_a_folder_has_no_revision(tiny: Path) -> None:
    assert "folder" in refusal(lambda: open_checkpoint(str(tiny), "main"), UsageError)


def test_no_server_there(cache: Path) -> None:
    said = refusal(lambda: open_hub(NAME, endpoint="http://127.0.0.1:9"))
    assert "cannot be reached" in said


def test_a_server_that_is_not_a_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "main", "no commit")
    hub.commits["no commit"] = hub.commits[next(iter(hub.commits))]
    assert "HF_ENDPOINT" in refusal(lambda: open_hub(NAME, endpoint=hub.endpoint))


@pytest.mark.parametrize("page", [b"<html>Log in</html>", b"\xff\xfe", b"[" * 10**5, b"[]", b"{}"])
def test_a_malformed_answer_of_the_api(hub: HubServer, page: bytes) -> None:
    hub.page = page
    assert "HF_ENDPOINT" in refusal(lambda: open_hub(NAME, endpoint=hub.endpoint))


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HF_ENDPOINT", "http://[::"), ("HTTP_PROXY", "ftp://x"), ("HF_TOKEN", "hf_\N{BULLET}")],
)
def test_malformed_settings_in_the_environment(
    hub: HubServer, tmp_path: Path, variable: str, value: str
) -> None:
    environment = hub.environment(tmp_path) | {"NO_PROXY": "", variable: value}
    dots1 = Path(sys.executable).with_name("dots1")
    command = [str(dots1), "convert", NAME, "--dry-run"]
    found = subprocess.run(command, env=environment, capture_output=True, check=False, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert re.fullmatch(r"dots1: .* HF_ or proxy variable .*\n", found.stderr)
    assert "hf_" not in found.stderr


def test_a_home_that_is_a_file(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{__file__}/token")
    assert "token: Not a directory" in refusal(lambda: open_hub(NAME, endpoint=hub.endpoint))


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = refusal(lambda: open_checkpoint("some/model"), UsageError)
    assert "pip install 'dots1-local[hub]'" in said
    assert "no folder some/model" in said


@pytest.mark.parametrize(
    ("shard", "says"),
    [
        ("../config.json", "not a file name"),
        ("pytorch_model.bin", "safetensors"),
        ("model-00009-of-00003.safetensors", "does not exist"),
        (".safetensors", "'.safetensors'"),
    ],
)
def test_an_index_that_names_other_files(
    hub: HubServer, tiny: Path, tmp_path: Path, shard: str, says: str
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "hf")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"model.x": shard}))
    hub.commit(folder)
    assert says in refusal(lambda: open_hub(NAME, endpoint=hub.endpoint))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", SECOND),
        (b"\xff" * 100, SECOND),
        ((5).to_bytes(8, "little") + b"{{{{{", SECOND),
        ((1 << 40).to_bytes(8, "little") + b"{}", SECOND),
    ],
)
def test_headers_are_not_trusted(
    hub: HubServer, tiny: Path, tmp_path: Path, content: bytes, says: str
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "hf")
    (folder / SECOND).write_bytes(content)
    hub.commit(folder)
    assert says in refusal(lambda: open_hub(NAME, endpoint=hub.endpoint))


def test_a_truncated_shard_is_found_before_the_first_byte(
    hub: HubServer, tiny: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "hf")
    with open(folder / SECOND, "r+b") as file:
        file.truncate(10**6)
    hub.commit(folder)
    said = refusal(lambda: open_hub(NAME, endpoint=hub.endpoint))
    assert SECOND in said
    assert "truncated" in said
    assert hub.shard_requests() == []


def test_a_full_disk_is_found_before_the_first_byte(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"free": 50_000_000}
    usage = type("Usage", (), free)
    monkeypatch.setattr("dots1_local.files.partial_file.shutil.disk_usage", lambda folder: usage)
    said = refusal(lambda: prepare(hub).run(tmp_path / "out.gguf"), Dots1Error)
    assert "50.0 MB free" in said
    assert "--low-disk, which needs 25.9 MB" in said
    assert hub.shard_requests() == []


@pytest.mark.parametrize("low_disk", [False, True])
def test_a_cache_that_cannot_be_read(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low_disk: bool
) -> None:
    def denied(path: Path, file: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    prepare(hub).run(tmp_path / "out.gguf")
    next(tmp_path.glob("cache/*/.dots1-verified.json")).unlink()
    conversion = prepare(hub)
    for module in ("client", "verified"):
        monkeypatch.setattr(f"dots1_local.hub.{module}.has_digest", denied)
    again = partial(conversion.run, tmp_path / "again.gguf", low_disk=low_disk)
    assert re.fullmatch("cannot (use|write) .*/model-.*safetensors: .*", refusal(again, Dots1Error))


def test_low_disk_is_not_advised_if_the_output_alone_is_too_large(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10_000_000})
    monkeypatch.setattr("dots1_local.files.partial_file.shutil.disk_usage", lambda folder: usage)
    assert "--low-disk" not in refusal(lambda: prepare(hub).run(tmp_path / "out.gguf"), Dots1Error)


def test_the_hubs_library_does_not_warn_of_a_full_disk(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1}))
    open_hub(NAME, endpoint=hub.endpoint)  # its warning would be an error here


def test_a_disk_that_fills_up_meanwhile(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    conversion = prepare(hub)
    with monkeypatch.context() as patch:
        patch.setattr("dots1_local.hub.large_file._Target.take", full)
        said = refusal(lambda: conversion.run(tmp_path / "out.gguf"), Dots1Error)
    assert "the disk is full" in said
    prepare(hub).run(tmp_path / "out.gguf")


def test_a_repository_without_files(hub: HubServer) -> None:
    hub.page = json.dumps({"id": NAME, "sha": hub.main, "siblings": []}).encode()
    assert "no file config.json" in refusal(lambda: prepare(hub))
