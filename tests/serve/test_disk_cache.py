"""Prompts that come back after a restart, and disks that fail."""

import errno
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from threading import Event as Flag

import numpy as np
import pytest

from dots1_local.files.partial_file import open_locked
from dots1_local.serve import disk_cache, prompt_cache
from dots1_local.serve.generation import Scored
from tests.helpers import all_logits, random_tensors, until, write_random_gguf
from tests.serve.scheduling import (
    Alone,
    Listener,
    RecordingScheduler,
    greedy,
    log_softmax,
    open_engine,
    open_scheduler,
)

PATIENCE = 60  # seconds; only a broken cache needs so long
LONG = Random(1).randbytes(300)  # two full blocks, and one of 44 tokens
OTHER = Random(2).randbytes(300)
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("cache") / "model.gguf")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "prompts"


def ask(scheduler: RecordingScheduler, prompt: Sequence[int]) -> Listener:
    return scheduler.ask(greedy(prompt, max_tokens=3, top_logprobs=0)).wait()


def cached(listener: Listener) -> int:
    return listener.finished().cached_tokens


def files(disk: Path) -> list[Path]:
    return sorted(disk.glob("*/*.kv"))


def answer_once(model: Path, disk: Path, *prompts: Sequence[int], **options: object) -> Listener:
    """Serve the prompts with an empty RAM, and end the server; return what the last one got."""
    with open_scheduler(model, slots=1, n_ctx=512, disk=disk, **options) as scheduler:  # type: ignore[arg-type]
        for prompt in prompts:
            found = ask(scheduler, prompt)
        scheduler.close(PATIENCE)
    return found


def test_a_conversation_goes_on_after_a_restart(model: Path, disk: Path) -> None:
    first = answer_once(model, disk, LONG)
    prompt = [*LONG, *(each.token for each in first.logprobs()), *b"and then?"]
    again = answer_once(model, disk, prompt)
    assert cached(again) == 300 + 2  # the last token was sampled but not computed
    Alone(model).check(prompt, again.logprobs())


def test_a_changed_line_costs_what_follows_it(model: Path, disk: Path) -> None:
    answer_once(model, disk, LONG)
    changed = LONG[:200] + b"!" + LONG[201:]
    again = answer_once(model, disk, changed)
    assert cached(again) == 200
    Alone(model).check(changed, again.logprobs())


def test_an_answer_is_saved_while_the_server_waits_for_the_next(model: Path, disk: Path) -> None:
    with open_scheduler(model, slots=1, n_ctx=512, disk=disk) as scheduler:
        ask(scheduler, LONG)
        until(lambda: len(files(disk)) == 3)
        with open_scheduler(model, slots=1, n_ctx=512, disk=disk) as another:
            assert cached(ask(another, LONG)) == 299
        assert cached(ask(scheduler, OTHER)) == 0
        assert cached(ask(scheduler, LONG)) == 299


def test_prompts_share_what_they_begin_with(model: Path, disk: Path) -> None:
    answer_once(model, disk, LONG)
    before = {path: path.stat().st_ino for path in files(disk)}
    answer_once(model, disk, LONG[:256] + OTHER[:200])
    assert len(files(disk)) == 3 + 2
    assert before.items() <= {path: path.stat().st_ino for path in files(disk)}.items()


def test_a_longer_end_takes_the_place_of_a_shorter_one(model: Path, disk: Path) -> None:
    first = answer_once(model, disk, LONG)
    longer = LONG + bytes(each.token for each in first.logprobs()[:2]) + OTHER[:60]
    answer_once(model, disk, longer)
    assert len(files(disk)) == 3
    assert cached(answer_once(model, disk, longer)) == 361


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swap(path: Path) -> None:
    """Give a file the name of another block at the same position."""
    path.rename(path.with_name(f"{path.name[:9]}{'0' * 32}.kv"))


@pytest.mark.parametrize(
    "harm",
    [
        damage,
        cut,
        make_folder,
        swap,
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"dots1-kv-block-1" + b"\xff" * 9000),
        lambda path: path.write_bytes(os.urandom(9000)),
    ],
)
def test_a_damaged_block_is_computed_again(
    model: Path, disk: Path, harm: Callable[[Path], object]
) -> None:
    answer_once(model, disk, LONG)
    harm(files(disk)[1])
    again = answer_once(model, disk, LONG)
    assert cached(again) == 128
    Alone(model).check(LONG, again.logprobs())


def test_what_a_killed_server_left_half_written_goes_when_the_next_one_starts(
    model: Path, disk: Path
) -> None:
    answer_once(model, disk, LONG)
    block = files(disk)[0]
    half, written = (block.with_name(f"0000000{n}-{'0' * 32}.kv.partial") for n in (1, 2))
    half.write_bytes(b"half")
    with open_locked(written, "busy"):  # as by another server
        answer_once(model, disk, OTHER)
        assert [path.name for path in block.parent.glob("*.partial")] == [written.name]


def test_other_models_and_types_have_their_own_blocks(
    model: Path, disk: Path, tmp_path: Path
) -> None:
    answer_once(model, disk, LONG)
    other = write_random_gguf(tmp_path / "other.gguf", tensors=random_tensors(seed=5))
    assert cached(answer_once(other, disk, LONG)) == 0
    assert cached(answer_once(model, disk, LONG, kv_type="F16")) == 0
    assert cached(answer_once(model, disk, LONG)) == 299
    with open_scheduler(model, slots=1, n_ctx=768, disk=disk) as scheduler:
        assert cached(ask(scheduler, LONG)) == 0


def test_what_was_used_longest_ago_is_removed(model: Path, disk: Path) -> None:
    answer_once(model, disk, LONG)
    room = sum(path.stat().st_size for path in files(disk))
    stranger = disk / "notes.txt"
    stranger.write_text("mine")
    limit = int(2.2 * room)
    for prompt in (OTHER, LONG, Random(3).randbytes(300)):
        answer_once(model, disk, prompt, disk_bytes=limit)
        assert sum(path.stat().st_size for path in files(disk)) <= limit
    assert cached(answer_once(model, disk, LONG, disk_bytes=limit)) == 299
    assert cached(answer_once(model, disk, OTHER, disk_bytes=limit)) < 299
    assert stranger.read_text() == "mine"


def test_the_beginning_of_a_prompt_stays_longest(model: Path, disk: Path) -> None:
    answer_once(model, disk, LONG)
    sizes = [path.stat().st_size for path in files(disk)]
    answer_once(model, disk, OTHER[:128], disk_bytes=sum(sizes))
    assert cached(answer_once(model, disk, LONG)) >= 128


def test_a_limit_too_small_for_a_block_keeps_nothing(
    model: Path, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = answer_once(model, disk, LONG, disk_bytes=5000)
    assert files(disk) == []
    Alone(model).check(LONG, found.logprobs())
    assert str(disk) in caplog.text


def test_the_folder_may_vanish(model: Path, disk: Path) -> None:
    with open_scheduler(model, slots=1, n_ctx=512, disk=disk) as scheduler:
        ask(scheduler, LONG)
        until(lambda: len(files(disk)) == 3)
        shutil.rmtree(disk)
        Alone(model).check(OTHER, ask(scheduler, OTHER).logprobs())
        again = ask(scheduler, LONG)
        assert cached(again) == 0
        Alone(model).check(LONG, again.logprobs())
        scheduler.close(PATIENCE)
    assert cached(answer_once(model, disk, LONG)) == 299


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_harms_no_answer(
    model: Path,
    disk: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*given: object, **options: object) -> Iterator[None]:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk_cache, "open_partial", fail)
    with open_scheduler(model, slots=1, n_ctx=512, disk=disk, cache_bytes=PLENTY) as scheduler:
        for prompt in (LONG, OTHER, LONG):
            found = ask(scheduler, prompt)
            Alone(model).check(prompt, found.logprobs())
        assert cached(found) == 299  # from RAM
        scheduler.close(PATIENCE)
    assert files(disk) == []
    assert caplog.text.count(os.strerror(number)) == 1


def test_a_slow_disk_delays_no_answer(
    model: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, fsync = Flag(), os.fsync

    def slow(descriptor: int) -> None:
        assert released.wait(PATIENCE)
        fsync(descriptor)

    monkeypatch.setattr("dots1_local.files.partial_file.os.fsync", slow)
    prompts = [Random(seed).randbytes(300) for seed in range(4)]
    with open_scheduler(model, slots=1, n_ctx=512, disk=disk, cache_bytes=PLENTY) as scheduler:
        for prompt in prompts:
            ask(scheduler, prompt)
        assert cached(ask(scheduler, prompts[0])) == 299  # while nothing is written yet
        assert files(disk) == []
        released.set()
        scheduler.close(PATIENCE)
    for prompt in prompts:
        assert cached(answer_once(model, disk, prompt)) == 299


def test_a_disk_that_does_not_answer_delays_only_what_it_has(
    model: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_once(model, disk, LONG)
    released, crc32 = Flag(), zlib.crc32

    def hang(data: memoryview) -> int:
        assert released.wait(PATIENCE)
        return crc32(data)

    with open_scheduler(model, slots=2, n_ctx=512, disk=disk) as scheduler:
        monkeypatch.setattr("dots1_local.serve.disk_cache.zlib.crc32", hang)
        waiting = scheduler.ask(greedy(LONG, max_tokens=3, top_logprobs=0))
        Alone(model).check(OTHER, ask(scheduler, OTHER).logprobs())
        assert not waiting.events
        monkeypatch.setattr(prompt_cache, "_GIVE_UP", 0)
        assert cached(waiting.wait()) == 0
        Alone(model).check(LONG, waiting.logprobs())
        released.set()


def test_conversations_in_any_order_are_answered_right(model: Path, disk: Path) -> None:
    random = Random(7)
    stems = [random.randbytes(random.randrange(100, 300)) for _ in range(6)]
    alone, hits = Alone(model), 0
    for _ in range(3):
        with open_scheduler(
            model, slots=3, n_ctx=512, disk=disk, disk_bytes=1 << 22, queue_size=100
        ) as scheduler:
            prompts = [
                random.choice(stems) + random.randbytes(random.randrange(1, 60)) for _ in range(20)
            ]
            listeners = [
                scheduler.ask(greedy(prompt, max_tokens=3, top_logprobs=0)) for prompt in prompts
            ]
            found = [listener.wait() for listener in listeners]
            scheduler.close(PATIENCE)
        hits += sum(cached(each) >= 90 for each in found)
        for prompt, each in zip(prompts, found, strict=True):
            alone.check(prompt, each.logprobs())
    assert hits > 40


def test_logprobs_of_a_cached_prompt_are_computed(model: Path, disk: Path) -> None:
    answer_once(model, disk, LONG)
    with open_scheduler(model, slots=1, n_ctx=512, n_scored=16, disk=disk) as scheduler:
        request = greedy(LONG, max_tokens=0, prompt_logprobs=0)
        [scored] = [
            each for each in scheduler.ask(request).wait().events if isinstance(each, Scored)
        ]
    with open_engine(model, 512, 512, all_logits=True) as engine:
        expected = log_softmax(all_logits(engine, list(LONG[:-1])))[range(299), list(LONG[1:])]
    assert np.allclose([each.logprob for each in scored.logprobs], expected, atol=1e-3)
