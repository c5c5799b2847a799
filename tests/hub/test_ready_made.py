"""GGUF models on the hub: their types, their headers, and fetching them into the hub's cache."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import huggingface_hub
import pytest
from gguf import GGUFReader

from dots1_local.errors import CheckpointError, Dots1Error
from dots1_local.files.gguf import GGUFFile
from dots1_local.hub import client
from dots1_local.hub.client import Stopped
from dots1_local.hub.large_file import fetch_file
from dots1_local.hub.ready_made import HubModel, find_models, parse_reference
from tests import hub_server
from tests.convert.conftest import CHUNK, refusal
from tests.helpers import random_tensors, write_random_gguf
from tests.hub_server import NAME, HubServer

ONE = "dots-Q4_K_M.gguf"
SHARDS = [f"UD-Q2_K_XL/dots-UD-Q2_K_XL-0000{n}-of-00004.gguf" for n in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, a split file in a folder, and what is no model of its own."""
    folder = tmp_path_factory.mktemp("repository")
    write_random_gguf(folder / ONE)
    (folder / "UD-Q2_K_XL").mkdir()
    write_random_gguf(folder / "UD-Q2_K_XL/dots-UD-Q2_K_XL.gguf", shard_tensors=12)
    for name in ("mmproj-F16.gguf", "dots-imatrix.gguf", "IQ1_M-00002-of-00003.gguf", "README.md"):
        (folder / name).write_bytes(b"GGUF")
    return folder


@pytest.fixture
def hub(repository: Path, cache: Path) -> Iterator[HubServer]:
    with HubServer(repository) as server:
        yield server
        huggingface_hub.close_session()


def model(hub: HubServer, wanted: str) -> HubModel:
    found = find_models(NAME, endpoint=hub.endpoint).choose(wanted)
    assert found is not None
    return found


def sent(hub: HubServer) -> int:
    return sum(request.count for request in hub.requests)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("org/name", ("org/name", None)),
        ("org/dots.llm1.inst-GGUF:UD-Q4_K_XL", ("org/dots.llm1.inst-GGUF", "UD-Q4_K_XL")),
        ("folder/model.gguf", None),
        ("model.gguf", None),
        ("./org/name", None),
        ("/org/name", None),
        ("org/name:", None),
        ("C:/models/x", None),
    ],
)
def test_what_names_a_model_on_the_hub(text: str, reference: tuple[str, str | None] | None) -> None:
    assert parse_reference(text) == reference


def test_types_are_found_in_files_and_folders(hub: HubServer) -> None:
    models = find_models(NAME, endpoint=hub.endpoint)
    found = {each.type: [file.name for file in each.files] for each in models.models}
    assert found == {"Q4_K_M": [ONE], "UD-Q2_K_XL": SHARDS}
    assert [each.nbytes for each in models.models] == sorted(each.nbytes for each in models.models)
    assert models.choose(None) is None
    assert models.choose("Q8_0") is None
    assert models.choose("q2_k_xl") == models.choose("UD-Q2_K_XL")


def test_files_of_the_same_type_have_longer_names(hub: HubServer, tmp_path: Path) -> None:
    for name in ("a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "c/b-Q8_0.gguf", "plain.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"GGUF")
    hub.commit(tmp_path)
    models = find_models(NAME, endpoint=hub.endpoint).models
    assert {each.type for each in models} == {"a-Q4_K_M", "b-Q4_K_M", "Q8_0", "plain"}


def test_a_repository_without_models_says_so(hub: HubServer, tiny: Path) -> None:
    hub.commit(tiny)
    said = refusal(lambda: find_models(NAME, endpoint=hub.endpoint))
    assert "has no GGUF model" in said


@pytest.mark.parametrize("wanted", ["Q4_K_M", "UD-Q2_K_XL"])
def test_a_header_is_read_without_the_weights(
    hub: HubServer, repository: Path, tmp_path: Path, wanted: str
) -> None:
    """The oracle is what gguf-py finds in the files."""
    large = tmp_path / "large"
    shutil.copytree(repository, large)
    for path in large.rglob("*.gguf"):
        with path.open("ab") as file:
            file.truncate(path.stat().st_size + (1 << 31))  # sparse
    hub.commit(large)
    found = model(hub, wanted)
    gguf = found.header()
    files = [repository / file.name for file in found.files]
    tensors = {t.name: t.tensor_type.name for file in files for t in GGUFReader(file).tensors}
    assert {tensor.name: tensor.type for tensor in gguf.tensors} == tensors
    assert gguf.keys["dots1.block_count"] == 3
    assert gguf.nbytes == sum((large / file.name).stat().st_size for file in found.files)
    assert sent(hub) <= len(files) << 18


def test_a_long_header_is_read_in_steps(hub: HubServer, tmp_path: Path) -> None:
    tokens = [f"token-{number:0>100}" for number in range(60_000)]
    path = tmp_path / "long-Q8_0.gguf"
    write_random_gguf(path, tokens=tokens, types=[1] * len(tokens))
    hub.commit(tmp_path)
    gguf = model(hub, "Q8_0").header()
    assert gguf.keys.strings("tokenizer.ggml.tokens") == tokens
    assert gguf.headers[0].data_start > 6_000_000
    assert sent(hub) < gguf.headers[0].data_start + 3_500_000


@pytest.mark.parametrize("wanted", ["Q4_K_M", "UD-Q2_K_XL"])
def test_a_fetched_model_is_in_the_cache_that_all_programs_use(
    hub: HubServer, repository: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    found = model(hub, wanted)
    path = found.fetch()
    for file in found.files:
        cached = huggingface_hub.try_to_load_from_cache(NAME, file.name)
        assert isinstance(cached, str)
        assert Path(cached).read_bytes() == (repository / file.name).read_bytes()
    once = sent(hub)
    assert once == found.nbytes
    name = found.files[0].name
    assert huggingface_hub.hf_hub_download(NAME, name, endpoint=hub.endpoint) == str(path)
    assert found.fetch() == path
    assert sent(hub) == once
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (offline,) = find_models(NAME).models  # the other type is not there
    assert offline.type == wanted
    assert offline.fetch() == path
    assert GGUFFile.open(path).tensors == offline.header().tensors


def test_without_a_connection_the_cache_is_used(repository: Path, cache: Path) -> None:
    with HubServer(repository) as server:
        path = model(server, "Q4_K_M").fetch()
    huggingface_hub.close_session()
    found = find_models(NAME, endpoint=server.endpoint)
    assert "cannot be reached" in found.notes[0]
    assert found.models[0].fetch() == path


def test_what_another_program_fetched_is_checked_and_used(hub: HubServer, cache: Path) -> None:
    huggingface_hub.hf_hub_download(NAME, ONE, endpoint=hub.endpoint)
    fetched = sent(hub)
    assert model(hub, "Q4_K_M").fetch()
    assert sent(hub) == fetched


def test_a_stopped_download_goes_on_where_it_was(hub: HubServer, repository: Path) -> None:
    found, stop = model(hub, "Q4_K_M"), Event()

    def received(count: int) -> None:
        if count > found.nbytes // 2:
            stop.set()

    with pytest.raises(Stopped):
        fetch_file(found.repo, found.files[0], received=received, stop=stop)
    first = sent(hub)
    hub.requests.clear()
    assert found.fetch().read_bytes() == (repository / ONE).read_bytes()
    assert hub.requests[0].start >= found.nbytes // 2
    assert first + sent(hub) < found.nbytes + 8 * CHUNK


@pytest.mark.parametrize("cuts", [[100_000], [100_000, 0, 0, 200_000, 0]])
def test_a_cut_connection_is_taken_up_again(
    hub: HubServer, repository: Path, cuts: list[int]
) -> None:
    hub.cuts[ONE] = list(cuts)
    assert model(hub, "Q4_K_M").fetch().read_bytes() == (repository / ONE).read_bytes()
    assert len(hub.requests) == len(cuts) + 1


def test_an_answer_has_a_longest_length(
    hub: HubServer, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_LONGEST", 200_000)
    found = model(hub, "Q4_K_M")
    assert found.fetch().read_bytes() == (repository / ONE).read_bytes()
    assert [r.start for r in hub.requests] == list(range(0, found.nbytes, 200_000))


def test_a_full_disk_is_found_before_the_first_byte(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = model(hub, "UD-Q2_K_XL")  # each shard alone would fit
    usage = SimpleNamespace(free=found.nbytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert NAME in refusal(found.fetch, Dots1Error)
    assert hub.requests == []


def test_a_server_that_sends_no_parts_sends_all_again(hub: HubServer, repository: Path) -> None:
    hub.ignores_ranges = True
    hub.cuts[ONE] = [100_000]
    assert model(hub, "Q4_K_M").fetch().read_bytes() == (repository / ONE).read_bytes()


@pytest.mark.parametrize("times", [1, 2])
def test_a_damaged_file_is_fetched_once_more(hub: HubServer, repository: Path, times: int) -> None:
    hub.damaged[ONE] = times
    found = model(hub, "Q4_K_M")
    if times == 1:
        assert found.fetch().read_bytes() == (repository / ONE).read_bytes()
        return
    assert "another hash" in refusal(found.fetch)
    assert not found.is_cached
    assert not list(found.path.parents[2].glob("blobs/*"))


def test_a_small_file_need_not_be_in_lfs(
    hub: HubServer, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_server, "is_large", lambda name: False)
    found = model(hub, "Q4_K_M")
    assert len(found.files[0].digest) == 40
    assert found.fetch().read_bytes() == (repository / ONE).read_bytes()


def test_a_name_that_leaves_the_folder_is_no_model(hub: HubServer, cache: Path) -> None:
    evil = b'{"id": "x/y", "sha": "%s", "siblings": [%s]}' % (
        hub.main.encode(),
        b", ".join(
            b'{"rfilename": "%s", "size": 9, "blobId": "%s"}' % (name, b"0" * 40)
            for name in (b"../../Q4_K_M.gguf", b"/Q8_0.gguf", b"a//b.gguf", b".hidden/Q2_K.gguf")
        ),
    )
    hub.page = evil
    with pytest.raises(CheckpointError, match="has no GGUF model"):
        find_models(NAME, endpoint=hub.endpoint)


def test_shards_that_do_not_belong_together_are_refused(hub: HubServer, tmp_path: Path) -> None:
    tensors = random_tensors()
    for number in (1, 2):
        write_random_gguf(tmp_path / f"x-Q8_0-0000{number}-of-00002.gguf", tensors=tensors)
    hub.commit(tmp_path)
    with pytest.raises(Dots1Error, match="is not shard 1 of 2"):
        model(hub, "Q8_0").header()
