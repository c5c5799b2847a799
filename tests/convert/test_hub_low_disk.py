"""A checkpoint on the hub, fetched, converted and dropped shard by shard."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Event

import pytest
from safetensors.torch import load_file, save_file

from dots1_local.convert import Conversion
from dots1_local.convert.from_hub import order_of
from dots1_local.errors import CheckpointError, Dots1Error, UsageError
from dots1_local.files.checkpoint import INDEX, Checkpoint
from dots1_local.hub import HubCheckpoint
from tests.conftest import Converted
from tests.convert.conftest import CHUNK, SECOND, prepare, sizes
from tests.hub_server import HubServer
from tests.micro import micro_checkpoint

FIRST, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 3))
MB = 10**6


class Witness:
    """Looks at the shards beside an output, and remembers the most shards and bytes."""

    def __init__(self, output: Path) -> None:
        self._folder = output.with_name(output.name + ".shards")
        self.most_bytes = self.most_shards = 0

    def look(self) -> None:
        found = list(self._sizes())
        self.most_bytes = max(self.most_bytes, sum(found))
        self.most_shards = max(self.most_shards, len(found))

    def _sizes(self) -> Iterable[int]:
        for pattern in ("*.safetensors", "*.incomplete"):
            for path in self._folder.rglob(pattern):
                try:
                    yield path.stat().st_size
                except FileNotFoundError:  # it has just been renamed or removed
                    continue


def test_the_same_bytes_as_from_a_folder(
    hub: HubServer, tiny: Path, converted: Converted, tmp_path: Path
) -> None:
    output = tmp_path / "out.gguf"
    conversion = prepare(hub)
    assert isinstance(conversion.checkpoint, HubCheckpoint)
    peak = order_of(conversion.checkpoint, conversion.tensors).peak()
    witness = Witness(output)
    hub.watch = witness.look
    conversion.run(output, low_disk=True)
    assert output.read_bytes() == converted("Q8_0").read_bytes()
    assert hub.shard_bytes() == sizes(tiny)
    assert 0 < witness.most_bytes <= peak.nbytes
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "cache"}


def test_the_output_may_be_named_from_the_current_folder(
    hub: HubServer, converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(hub).run(Path("out.gguf"), low_disk=True)
    assert Path("out.gguf").read_bytes() == converted("Q8_0").read_bytes()


def test_the_next_shard_is_fetched_while_one_is_encoded(hub: HubServer, tmp_path: Path) -> None:
    another = Event()
    in_time: list[bool] = []

    def watch() -> None:
        if len(hub.shard_bytes()) > 1:
            another.set()

    def encoding(done: int, total: int, unit: str, what: str) -> None:
        if not what.startswith("fetching") and not in_time:
            in_time.append(another.wait(60))

    hub.watch = watch
    prepare(hub).run(tmp_path / "out.gguf", low_disk=True, progress=encoding)
    assert in_time == [True]


def test_progress_counts_what_is_fetched_and_what_is_written(
    hub: HubServer, tiny: Path, tmp_path: Path
) -> None:
    conversion = prepare(hub)
    total = conversion.nbytes + sum(sizes(tiny).values())
    heard: list[tuple[int, int]] = []

    def note(done: int, total: int, unit: str, what: str) -> None:
        heard.append((done, total))

    conversion.run(tmp_path / "out.gguf", low_disk=True, progress=note)
    assert heard == sorted(heard)
    assert {of for _, of in heard} == {total}
    assert heard[-1] == (total, total)


def test_split_output(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    prepare(hub).run(tmp_path / "out.gguf", low_disk=True, split_max_size=5 * MB)
    (tmp_path / "folder").mkdir()
    Conversion.prepare(tiny, "Q8_0").run(tmp_path / "folder/out.gguf", split_max_size=5 * MB)
    expected = sorted((tmp_path / "folder").iterdir())
    assert len(expected) > 3
    for path in expected:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def layered(folder: Path) -> Path:
    """60 shards of 62 layers, as dots.llm1 has, with a hundredth of its width."""
    return micro_checkpoint(
        folder,
        shards=60,
        hidden_size=128,
        num_hidden_layers=62,
        intermediate_size=256,
        moe_intermediate_size=64,
        n_routed_experts=8,
    )


def sorted_as_text(folder: Path) -> Path:
    """The same tensors in shards by name, so that layer 10 comes before layer 2."""
    source = layered(folder)
    shards = sorted(source.glob("*.safetensors"))
    tensors = {name: value for shard in shards for name, value in load_file(shard).items()}
    share = sum(tensor.nbytes for tensor in tensors.values()) / 60
    start, weight_map = 0, {}
    for name in sorted(tensors):
        weight_map[name] = shards[int(start // share)].name
        start += tensors[name].nbytes
    for shard in shards:
        held = {name: tensors[name] for name in tensors if weight_map[name] == shard.name}
        save_file(held, shard)
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return source


@pytest.mark.parametrize("cut", [layered, sorted_as_text])
def test_of_60_shards_3_lie_on_disk(
    hub: HubServer, tmp_path: Path, cut: Callable[[Path], Path]
) -> None:
    folder, output = cut(tmp_path / "dots1-tiny"), tmp_path / "out.gguf"
    assert len(Checkpoint.open(folder).shards) == 60
    hub.commit(folder)
    witness = Witness(output)
    hub.watch = witness.look
    prepare(hub).run(output, low_disk=True)
    assert witness.most_shards <= 3
    assert witness.most_bytes <= 3 * max(sizes(folder).values())
    assert all(count <= sizes(folder)[name] for name, count in hub.shard_bytes().items())
    Conversion.prepare(folder, "Q8_0").run(tmp_path / "expected.gguf")
    assert output.read_bytes() == (tmp_path / "expected.gguf").read_bytes()


def test_cut_connections(hub: HubServer, tiny: Path, converted: Converted, tmp_path: Path) -> None:
    for shard in (FIRST, SECOND, THIRD):
        hub.cuts[shard] = [2 * MB, 0, 1, 3 * MB]
    prepare(hub).run(tmp_path / "out.gguf", low_disk=True)
    assert (tmp_path / "out.gguf").read_bytes() == converted("Q8_0").read_bytes()
    for shard, size in sizes(tiny).items():
        assert hub.shard_bytes()[shard] <= size + 4 * CHUNK


def test_a_wrong_hash(hub: HubServer, converted: Converted, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    hub.damaged[SECOND] = 2
    with pytest.raises(CheckpointError, match=SECOND):
        prepare(hub).run(output, low_disk=True)
    assert not list(tmp_path.glob(f"out.gguf.shards/*/{SECOND}*"))
    prepare(hub).run(output, low_disk=True)
    assert output.read_bytes() == converted("Q8_0").read_bytes()


def test_shards_in_the_cache_are_read_there(
    hub: HubServer, tiny: Path, converted: Converted, tmp_path: Path
) -> None:
    prepare(hub).run(tmp_path / "whole.gguf")
    (tmp_path / "cache/models--someone--dots1-tiny/snapshots" / hub.main / SECOND).unlink()
    hub.requests.clear()
    prepare(hub).run(tmp_path / "out.gguf", low_disk=True)
    assert (tmp_path / "out.gguf").read_bytes() == converted("Q8_0").read_bytes()
    assert hub.shard_bytes() == {SECOND: sizes(tiny)[SECOND]}
    snapshot = tmp_path / "cache/models--someone--dots1-tiny/snapshots" / hub.main
    assert (snapshot / FIRST).exists()


def interrupt(hub: HubServer, output: Path) -> None:
    """A conversion that is stopped in its second half."""

    def stop(done: int, total: int, unit: str, what: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(hub).run(output, low_disk=True, progress=stop)


def test_another_commit_is_refused_and_its_shards_never_used(
    hub: HubServer, tiny: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.gguf"
    interrupt(hub, output)
    changed = shutil.copytree(tiny, tmp_path / "dots1-tiny")
    weights = load_file(changed / THIRD)
    name = next(iter(weights))
    weights[name][0] += 1
    save_file(weights, changed / THIRD)
    hub.commit(changed)
    with pytest.raises(CheckpointError, match="--revision"):
        prepare(hub).run(output, low_disk=True)
    output.with_name("out.gguf.journal").unlink()
    shards, seen = output.with_name("out.gguf.shards"), set()

    def look(done: int, total: int, unit: str, what: str) -> None:
        seen.update(os.listdir(shards))

    prepare(hub).run(output, low_disk=True, progress=look)
    assert seen == {hub.main}
    Conversion.prepare(changed, "Q8_0").run(tmp_path / "expected.gguf")
    assert output.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert not output.with_name("out.gguf.shards").exists()


def test_a_conversion_resumed_without_low_disk_leaves_no_shards(
    hub: HubServer, converted: Converted, tmp_path: Path
) -> None:
    output = tmp_path / "out.gguf"
    interrupt(hub, output)
    assert prepare(hub).run(output).resumed_tensors > 0
    assert output.read_bytes() == converted("Q8_0").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "cache"}


@pytest.mark.parametrize(("room", "most"), [(38, 3), (30, 2)])
def test_nothing_is_fetched_ahead_if_the_disk_is_short(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, most: int
) -> None:
    conversion, output = prepare(hub), tmp_path / "out.gguf"
    usage = type("Usage", (), {"free": conversion.file_bytes() + (room + 1) * MB})
    monkeypatch.setattr("dots1_local.files.partial_file.shutil.disk_usage", lambda folder: usage)
    witness = Witness(output)
    hub.watch = witness.look
    conversion.run(output, low_disk=True)
    assert witness.most_shards <= most
    assert witness.most_bytes <= (room + 1) * MB


def test_a_disk_that_is_too_small_is_known_beforehand(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = prepare(hub)
    usage = type("Usage", (), {"free": conversion.file_bytes() + 25 * MB})
    monkeypatch.setattr("dots1_local.files.partial_file.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(Dots1Error, match=r"out\.gguf with 2 shards needs"):
        conversion.run(tmp_path / "out.gguf", low_disk=True)
    assert hub.shard_requests() == []
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_low_disk_is_refused_for_a_folder(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="on the disk already"):
        Conversion.prepare(tiny, "Q8_0").run(tmp_path / "out.gguf", low_disk=True)
    assert os.listdir(tmp_path) == []
