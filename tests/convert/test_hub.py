"""A checkpoint on the hub, fetched whole into the hub's cache."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from dots1_local.convert import Conversion
from dots1_local.files.checkpoint import INDEX
from dots1_local.hub import open_checkpoint, open_hub
from dots1_local.hub.client import HubFile
from tests.conftest import Converted
from tests.convert.conftest import CHUNK, SECOND, prepare, refusal, sizes
from tests.hub_server import FORMER_NAME, HEADER, NAME, HubServer, is_shard
from tests.micro import micro_checkpoint


def contents(cache: Path) -> list[Path]:
    """The cache's files that hold shards."""
    return [path for path in cache.glob("*/blobs/*") if path.stat().st_size > 10**6]


def test_the_same_bytes_as_from_a_folder(
    hub: HubServer, tiny: Path, converted: Converted, tmp_path: Path
) -> None:
    prepare(hub).run(tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == converted("Q8_0").read_bytes()
    assert hub.shard_bytes() == sizes(tiny)
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "cache"}
    prepare(hub).run(tmp_path / "again.gguf")
    assert hub.shard_bytes() == sizes(tiny)


def test_a_renamed_repository_is_found(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_hub(FORMER_NAME, endpoint=hub.endpoint)
    Conversion.prepare(checkpoint, "Q8_0").run(tmp_path / "out.gguf", low_disk=True)
    assert hub.shard_bytes() == sizes(tiny)


def test_only_files_that_are_needed_are_fetched(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "hf")
    for name in ("modeling_dots1.py", "pytorch_model.bin", "training_args.bin"):
        (folder / name).write_bytes(b"never")
    hub.commit(folder)
    prepare(hub).run(tmp_path / "out.gguf")
    assert {request.file for request in hub.requests} == {
        "README.md", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", INDEX, *sizes(tiny),
    }  # fmt: skip


def test_headers_are_enough_to_decide_everything(hub: HubServer) -> None:
    conversion = Conversion.prepare(open_hub(NAME, endpoint=hub.endpoint), "Q8_0")
    assert conversion.file_bytes() > 10**7
    assert hub.shard_requests() == []
    assert sum(request.count for request in hub.requests if ".safetensors" in request.file) <= (
        3 * HEADER + 40_000  # and the index
    )


def test_the_cache_is_the_one_that_other_programs_use(
    hub: HubServer, cache: Path, tmp_path: Path
) -> None:
    prepare(hub).run(tmp_path / "out.gguf")
    path = huggingface_hub.try_to_load_from_cache(NAME, SECOND)
    assert isinstance(path, str)
    assert huggingface_hub.hf_hub_download(NAME, SECOND, revision=hub.main) == path
    (repo,) = huggingface_hub.scan_cache_dir(cache).repos
    assert {file.file_name for file in next(iter(repo.revisions)).files} >= {SECOND, "config.json"}
    assert len(contents(cache)) == 3


def test_shards_of_another_program_are_checked_and_used(
    hub: HubServer, tiny: Path, cache: Path, tmp_path: Path
) -> None:
    for name in sizes(tiny):
        huggingface_hub.hf_hub_download(NAME, name, endpoint=hub.endpoint)
    spoiled = next(path for path in contents(cache) if path.stat().st_size == sizes(tiny)[SECOND])
    with open(spoiled, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    hub.requests.clear()
    prepare(hub).run(tmp_path / "out.gguf")
    assert hub.shard_bytes() == {SECOND: sizes(tiny)[SECOND]}


def test_a_mirror_with_other_etags_sends_nothing_twice(
    hub: HubServer, tiny: Path, cache: Path, tmp_path: Path
) -> None:
    hub.etags = "mirrored-"
    prepare(hub).run(tmp_path / "out.gguf")
    assert hub.shard_bytes() == sizes(tiny)
    assert len(contents(cache)) == 3


def test_shards_that_another_program_fetched_from_a_mirror_are_used(
    hub: HubServer, tiny: Path, converted: Converted, tmp_path: Path
) -> None:
    hub.etags = "mirrored-"
    for name in sizes(tiny):
        huggingface_hub.hf_hub_download(NAME, name, endpoint=hub.endpoint)
    hub.requests.clear()
    prepare(hub).run(tmp_path / "out.gguf")
    assert hub.shard_requests() == []
    assert (tmp_path / "out.gguf").read_bytes() == converted("Q8_0").read_bytes()


def test_a_shard_is_hashed_once(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(hub).run(tmp_path / "out.gguf")
    hashed: list[str] = []

    def note(path: Path, file: HubFile) -> bool:
        hashed.append(file.name)
        return True

    for module in ("client", "verified"):
        monkeypatch.setattr(f"dots1_local.hub.{module}.has_digest", note)
    prepare(hub).run(tmp_path / "again.gguf")
    assert not any(map(is_shard, hashed))


@pytest.mark.parametrize("cuts", [[3_000_000], [3_000_000, 1, 5_000_000, 0, 0, 40_000]])
def test_a_cut_connection_is_resumed(
    hub: HubServer, tiny: Path, converted: Converted, tmp_path: Path, cuts: list[int]
) -> None:
    hub.cuts[SECOND] = list(cuts)
    prepare(hub).run(tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == converted("Q8_0").read_bytes()
    assert len([request for request in hub.shard_requests() if request.file == SECOND]) > 1
    assert hub.shard_bytes()[SECOND] <= sizes(tiny)[SECOND] + len(cuts) * CHUNK


@pytest.mark.parametrize("name", [SECOND, "config.json"])
def test_what_a_killed_download_left_is_removed(
    hub: HubServer, tiny: Path, cache: Path, tmp_path: Path, name: str
) -> None:
    """huggingface_hub gives every download a new temporary name, and forgets it if killed."""
    prepare(hub).run(tmp_path / "out.gguf")
    file = next(cache.glob(f"*/snapshots/*/{name}"))
    blob = file.resolve()
    left = blob.with_name(f"{blob.name}.0123abcd.incomplete")
    blob.rename(left)
    file.unlink()
    prepare(hub).run(tmp_path / "again.gguf")
    assert not left.exists()
    assert blob.read_bytes() == (tiny / name).read_bytes()


@pytest.mark.parametrize("kept", [0, 1_000_000, None])
def test_a_killed_download_of_a_shard_goes_on_where_it_was(
    hub: HubServer, tiny: Path, cache: Path, tmp_path: Path, kept: int | None
) -> None:
    prepare(hub).run(tmp_path / "out.gguf")
    shard = next(cache.glob(f"*/snapshots/*/{SECOND}"))
    blob = shard.resolve()
    with blob.open("r+b") as content:
        content.truncate(blob.stat().st_size if kept is None else kept)
    blob.rename(blob.with_name(f"{blob.name}.incomplete"))
    shard.unlink()
    hub.requests.clear()
    prepare(hub).run(tmp_path / "again.gguf")
    size = sizes(tiny)[SECOND]
    assert hub.shard_bytes().get(SECOND, 0) == (0 if kept is None else size - kept)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_old_temporary_files_of_huggingface_hub_are_removed(
    hub: HubServer, cache: Path, tmp_path: Path
) -> None:
    prepare(hub).run(tmp_path / "out.gguf")
    (folder,) = cache.glob("models--*")
    (folder / "tmp12345678").mkdir()
    names = "blobs/tmp_0123", "refs/main.92c9d8ca.tmp", "tmp12345678/dummy_file_src"
    old = [folder / name for name in names]
    young = [path.with_name(f"{path.stem}-young{path.suffix}") for path in old[:2]]
    for path in (*old, *young):
        path.touch()
    for path in old:
        os.utime(path, (0, 0))
    prepare(hub).run(tmp_path / "again.gguf")
    assert not any(path.exists() for path in (*old, folder / "tmp12345678"))
    assert all(path.exists() for path in young)


def test_a_killed_download_is_known_by_its_branch_after_the_next_run(
    hub: HubServer, cache: Path, tmp_path: Path
) -> None:
    """Without a network, the branch is all that a command names."""
    prepare(hub).run(tmp_path / "out.gguf")
    (branch,) = cache.glob("*/refs/main")
    branch.unlink()  # as if the kill had come when all shards had just arrived
    prepare(hub).run(tmp_path / "again.gguf")
    assert branch.read_text() == hub.main


def test_a_server_without_ranges_sends_all_again(
    hub: HubServer, converted: Converted, tmp_path: Path
) -> None:
    hub.ignores_ranges = True
    hub.cuts[SECOND] = [100_000, 4_000_000]  # of its header, which is enough, and of all
    prepare(hub).run(tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == converted("Q8_0").read_bytes()


def test_a_damaged_shard_is_fetched_again(
    hub: HubServer, converted: Converted, tmp_path: Path
) -> None:
    hub.damaged[SECOND] = 1
    prepare(hub).run(tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == converted("Q8_0").read_bytes()


def test_small_files_are_hashed_too(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    prepare(hub).run(tmp_path / "out.gguf")
    config = next(cache.glob("*/snapshots/*/config.json"))
    config.resolve().write_text(config.read_text().replace("1e-05", "1e-06"))
    open_hub(NAME, endpoint=hub.endpoint)
    assert "1e-05" in config.read_text()


def test_a_branch_that_moves_is_not_mixed(
    hub: HubServer, converted: Converted, tmp_path: Path
) -> None:
    checkpoint = open_hub(NAME, endpoint=hub.endpoint)
    hub.commit(micro_checkpoint(tmp_path / "other", shards=3))
    Conversion.prepare(checkpoint, "Q8_0").run(tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == converted("Q8_0").read_bytes()


def test_offline_the_cache_is_enough(
    hub: HubServer, converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(hub).run(tmp_path / "out.gguf")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(hub.requests)
    for low_disk in (False, True):
        output = tmp_path / f"{low_disk}.gguf"
        Conversion.prepare(open_checkpoint(NAME), "Q8_0").run(output, low_disk=low_disk)
        assert output.read_bytes() == converted("Q8_0").read_bytes()
    assert len(hub.requests) == count
    assert "HF_HUB_OFFLINE" in refusal(lambda: open_checkpoint("someone/else"))


def test_a_token_is_sent_to_the_hub_only(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    prepare(hub).run(tmp_path / "out.gguf")
    assert hub.tokens == {("127.0.0.1", "Bearer hf_secret"), ("localhost", "")}


def test_a_header_longer_than_usual(hub: HubServer, tmp_path: Path) -> None:
    folder = micro_checkpoint(tmp_path / "hf", n_routed_experts=500, num_experts_per_tok=2)
    assert int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little") > HEADER
    hub.commit(folder)
    conversion = Conversion.prepare(open_hub(NAME, endpoint=hub.endpoint), "Q8_0")
    conversion.run(tmp_path / "out.gguf")
    Conversion.prepare(folder, "Q8_0").run(tmp_path / "expected.gguf")
    found, expected = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("out", "expected"))
    assert found[-conversion.nbytes :] == expected[-conversion.nbytes :]


def test_a_conversion_from_a_folder_does_not_import_the_hub(tmp_path: Path) -> None:
    script = (
        "import sys; from dots1_local.convert import convert_checkpoint; "
        f"convert_checkpoint({str(micro_checkpoint(tmp_path / 'hf'))!r}, "
        f"{str(tmp_path / 'out.gguf')!r}); print('huggingface_hub' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert found.stdout == b"False\n"


def test_a_dry_run_of_a_hub_id(hub: HubServer, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("dots1")), "convert", NAME, "--dry-run"]
    said, found = (
        subprocess.run(
            [*command, *options],
            env=hub.environment(tmp_path),
            capture_output=True,
            check=True,
            text=True,
        )
        for options in ([], ["--json"])
    )
    assert said.stderr == found.stderr == ""
    for words in (hub.main[:12], "3 shards, 38.7 MB", "52.4 MB", "2 shards, 25.9 MB"):
        assert words in said.stdout
    assert json.loads(found.stdout)["hub"] == {
        "id": NAME,
        "commit": hub.main,
        "shards": 3,
        "bytes": 38_665_192,
        "cached_bytes": 0,
        "low_disk": {"shards": 3, "bytes": 38_665_192},
        "low_disk_least": {"shards": 2, "bytes": 25_891_648},
    }
    assert hub.shard_requests() == []
