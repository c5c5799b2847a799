"""Conversations kept while they go on, without a model: only what is said matters."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dots1_local.chat.conversation import save_conversation
from dots1_local.chat.message import Message
from dots1_local.chat.sampling import Sampling
from dots1_local.cli.repl.autosave import Keeper, in_use, left_behind
from dots1_local.errors import UsageError

SAID = [Message("user", "one"), Message("assistant", "A")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "dots1"


def session(messages: list[Message]) -> Any:
    settings = {"sampling": Sampling(), "max_tokens": None, "stop": (), "overflow": "drop"}
    return SimpleNamespace(
        model="m.gguf", messages=messages, save_state=lambda *_: 0, **cast("Any", settings)
    )


def keeper(*files: Path) -> Keeper:
    return Keeper(session(list(SAID)), *files)


def test_what_is_in_use_is_not_left_behind_until_its_process_is_gone(folder: Path) -> None:
    kept = keeper()
    for asked in ("two", "three"):
        path = kept.keep([*SAID, Message("user", asked)])
        assert path is not None
        assert json.loads(path.read_text())["unanswered"] == asked
        assert list(folder.iterdir()) == [path]
        assert left_behind() == []
    for lock in kept._locks.values():  # as the end of a process does
        lock.close()
    assert left_behind() == [path]


def test_a_good_end_leaves_nothing_of_its_own_or_of_what_it_took_over(folder: Path) -> None:
    lost = folder / "recovery-20250101-000000-1.json"
    folder.mkdir(parents=True)
    lost.write_text(json.dumps({"format": "dots1-conversation"}))
    kept = keeper()
    kept.keep()
    kept.adopt(folder / "elsewhere.json")
    kept.adopt(lost)
    assert left_behind() == []
    other = keeper()
    other.adopt(lost)
    other.end()
    assert lost.exists()  # it is the other's
    kept.end()
    assert list(folder.iterdir()) == []


def test_nothing_said_is_nothing_to_keep(folder: Path, tmp_path: Path) -> None:
    kept = Keeper(session([Message("system", "S")]), tmp_path / "talk.json")
    assert kept.keep() is None
    kept.end()
    assert not (tmp_path / "talk.json").exists()


def test_a_file_that_cannot_be_written_is_told_once_and_stood_in_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "diary.json"
    file.write_text("dear diary")
    kept = keeper(file)
    paths = {kept.keep(), kept.keep()}
    assert capsys.readouterr().err.count("diary.json is no saved conversation") == 1
    with pytest.raises(UsageError, match="it stays as it is"):
        kept.end()
    assert paths == set(folder.iterdir())
    for lock in kept._locks.values():
        lock.close()


def test_no_place_at_all_costs_nothing_but_the_recovery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert keeper().keep() is None
    assert left_behind() == []


def test_a_recovery_file_that_is_gone_on_with_in_place_stays(folder: Path) -> None:
    lost = folder / "recovery-20250101-000000-1.json"
    folder.mkdir(parents=True)
    save_conversation(lost, session(SAID))
    kept = keeper(lost)
    kept.adopt(lost)
    kept.keep()
    kept.end()
    assert list(folder.iterdir()) == [lost]


def test_what_is_saved_in_a_recovery_file_is_no_longer_one(folder: Path) -> None:
    lost = folder / "recovery-20250101-000000-1.json"
    folder.mkdir(parents=True)
    save_conversation(lost, session(SAID))
    kept = keeper()
    kept.adopt(lost)
    kept.save(lost)
    kept.end()
    assert lost.exists()
    assert left_behind() == [lost]
    lost.with_suffix(".kv").touch()  # as there is if anything was computed
    assert left_behind() == []


def test_of_recovery_files_only_the_one_gone_on_with_is_removed(folder: Path) -> None:
    folder.mkdir(parents=True)
    first, second = paths = [folder / f"recovery-20250101-000000-{n}.json" for n in (1, 2)]
    for path in paths:
        save_conversation(path, session(SAID))
    kept = keeper()
    kept.adopt(first)  # and look at it
    kept.adopt(second)
    assert left_behind() == [first]
    kept.end()
    assert list(folder.iterdir()) == [first]
    assert not second.exists()


def test_no_dialogue_writes_where_another_keeps_its_conversation(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    one, two = keeper(file), keeper(file)
    assert not in_use(file)
    for _ in range(2):  # each time it is another file
        assert one.keep() == file
        assert in_use(file)
    recovery = two.keep([*SAID, Message("user", "two")])
    assert recovery is not None
    assert recovery.parent == folder
    assert "another dialogue keeps its conversation in" in capsys.readouterr().err
    for deed in (two.end, lambda: keeper().save(file)):
        with pytest.raises(UsageError, match="choose another name"):
            deed()
    assert "unanswered" not in json.loads(file.read_text())
    one.save(file)  # by name, too
    assert in_use(file)
    one.end()
    assert not in_use(file)
    for lock in two._locks.values():
        lock.close()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "talk.json")
    assert not in_use(tmp_path / "talk.json")
