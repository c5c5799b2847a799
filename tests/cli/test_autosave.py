"""Conversations that are saved as they grow, without a model."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dots1_local.chat.conversation import save_conversation
from dots1_local.chat.message import Message
from dots1_local.chat.sampling import Sampling
from dots1_local.cli.repl.autosave import AutoSave, in_use, unfinished_sessions
from dots1_local.errors import UsageError

SAID = [Message("user", "one"), Message("assistant", "A")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "dots1"


def session(messages: list[Message]) -> Any:
    settings = {"sampling": Sampling(), "max_tokens": None, "stop": (), "overflow": "drop"}
    return SimpleNamespace(
        model="m.gguf",
        messages=messages,
        dropped=0,
        save_state=lambda *_: 0,
        **cast("Any", settings),
    )


def autosave(*files: Path) -> AutoSave:
    return AutoSave(session(list(SAID)), *files)


def test_a_session_is_unfinished_only_when_its_process_is_gone(folder: Path) -> None:
    kept = autosave()
    for asked in ("two", "three"):
        path = kept.save([*SAID, Message("user", asked)])
        assert path is not None
        assert json.loads(path.read_text())["unanswered"] == asked
        assert list(folder.iterdir()) == [path]
        assert unfinished_sessions() == []
    kept.release()  # as the end of its process does
    assert unfinished_sessions() == [path]


def test_a_good_end_removes_its_recovery_file_and_the_claimed_one(folder: Path) -> None:
    lost = folder / "recovery-20250101-000000-1.json"
    folder.mkdir(parents=True)
    lost.write_text(json.dumps({"format": "dots1-conversation"}))
    kept = autosave()
    kept.save()
    kept.claim(folder / "elsewhere.json")
    kept.claim(lost)
    assert unfinished_sessions() == []
    other = autosave()
    other.claim(lost)
    other.finish()
    assert lost.exists()  # it belongs to the other dialogue
    kept.finish()
    assert list(folder.iterdir()) == []


def test_what_a_killed_dialogue_left_half_written_goes_with_the_next_save(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "recovery-20250101-000000-1.json.partial").write_text("{")
    kept = autosave()
    assert [kept.save()] == list(folder.iterdir())
    kept.release()


def test_a_half_written_kv_cache_goes_with_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "talk.kv.partial").write_bytes(b"left by a killed dialogue")
    autosave().save_as(tmp_path / "talk.json")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_an_empty_conversation_is_not_saved(folder: Path, tmp_path: Path) -> None:
    kept = AutoSave(session([Message("system", "S")]), tmp_path / "talk.json")
    assert kept.save() is None
    kept.finish()
    assert not (tmp_path / "talk.json").exists()


def test_a_recovery_file_replaces_a_file_that_cannot_be_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "diary.json"
    file.write_text("dear diary")
    kept = autosave(file)
    paths = {kept.save(), kept.save()}
    assert capsys.readouterr().err.count("diary.json is not a saved conversation") == 1
    with pytest.raises(UsageError, match=r"diary\.json"):
        kept.finish()
    assert paths == set(folder.iterdir())
    kept.release()


def test_without_any_writable_folder_nothing_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert autosave().save() is None
    assert unfinished_sessions() == []


def test_a_recovery_file_that_is_the_session_file_stays(folder: Path) -> None:
    lost = folder / "recovery-20250101-000000-1.json"
    folder.mkdir(parents=True)
    save_conversation(lost, session(SAID))
    kept = autosave(lost)
    kept.claim(lost)
    kept.save()
    kept.finish()
    assert list(folder.iterdir()) == [lost]


def test_a_recovery_file_that_a_person_saves_in_stays(folder: Path) -> None:
    lost = folder / "recovery-20250101-000000-1.json"
    folder.mkdir(parents=True)
    save_conversation(lost, session(SAID))
    kept = autosave()
    kept.claim(lost)
    kept.save_as(lost)
    kept.finish()
    assert lost.exists()
    assert unfinished_sessions() == [lost]
    lost.with_suffix(".kv").touch()  # which there is if anything was computed
    assert unfinished_sessions() == []


def test_only_the_resumed_recovery_file_is_removed(folder: Path) -> None:
    folder.mkdir(parents=True)
    first, second = paths = [folder / f"recovery-20250101-000000-{n}.json" for n in (1, 2)]
    for path in paths:
        save_conversation(path, session(SAID))
    kept = autosave()
    kept.claim(first)
    kept.claim(second)
    assert unfinished_sessions() == [first]
    kept.finish()
    assert list(folder.iterdir()) == [first]
    assert not second.exists()


def test_a_dialogue_does_not_write_to_the_file_of_another(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    one, two = autosave(file), autosave(file)
    assert not in_use(file)
    for _ in range(2):  # each save makes another file
        assert one.save() == file
        assert in_use(file)
    recovery = two.save([*SAID, Message("user", "two")])
    assert recovery is not None
    assert recovery.parent == folder
    assert "another dialogue keeps its conversation in" in capsys.readouterr().err
    for deed in (two.finish, lambda: autosave().save_as(file)):
        with pytest.raises(UsageError, match="choose another name"):
            deed()
    assert "unanswered" not in json.loads(file.read_text())
    one.save_as(file)  # named by a person
    assert in_use(file)
    one.finish()
    assert not in_use(file)
    two.release()


def test_in_use_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "talk.json")
    assert not in_use(tmp_path / "talk.json")
