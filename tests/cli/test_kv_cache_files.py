"""Conversations and KV caches in files, and the memory that /show prints."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dots1_local.chat.conversation import load_conversation
from dots1_local.chat.session import Session
from dots1_local.cli.repl.autosave import resume, save
from dots1_local.cli.repl.commands import COMMANDS
from dots1_local.cli.repl.loop import Repl
from dots1_local.engine.engine import Engine
from tests.engine.engine_memory import placement_for
from tests.helpers import write_random_gguf


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    model = write_random_gguf(tmp_path / "model.gguf")
    with Engine.open(model, n_ctx=128, threads=1) as engine, Session(engine) as session:
        yield session


def say(session: Session, text: str) -> None:
    for _ in session.ask(text, 4):
        pass


def test_a_cache_never_stays_beside_another_conversation(session: Session, tmp_path: Path) -> None:
    path, state = tmp_path / "talk.json", tmp_path / "talk.kv"
    say(session, "secret")
    save(path, session)
    assert state.exists()
    session.system = ""
    session.clear()
    save(path, session)  # nothing said, so nothing cached
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.gguf", "talk.json"]


def test_saving_another_conversation_removes_a_stale_cache(
    session: Session, tmp_path: Path
) -> None:
    path, state = tmp_path / "talk.json", tmp_path / "talk.kv"
    say(session, "secret")
    save(path, session)
    path.rename(tmp_path / "renamed.json")
    session.messages = []
    save(path, session)
    assert not state.exists()
    state.write_text("dear diary")
    save(path, session)
    assert state.read_text() == "dear diary"


def test_saving_an_unchanged_conversation_keeps_its_cache(session: Session, tmp_path: Path) -> None:
    path, state = tmp_path / "talk.json", tmp_path / "talk.kv"
    say(session, "hello")
    save(path, session)
    before = state.read_bytes()
    model = tmp_path / "model.gguf"
    with Engine.open(model, n_ctx=64, threads=1) as engine, Session(engine) as other:
        resume(path, load_conversation(path), other)
        assert other.context_used == 0  # the cache fits another context size
        save(path, other)
    assert state.read_bytes() == before


def test_symbolic_links_are_followed(session: Session, tmp_path: Path) -> None:
    far = tmp_path / "far"
    far.mkdir()
    say(session, "one")
    save(far / "talk.json", session)
    for name in ("talk.json", "talk.kv"):
        (tmp_path / name).symlink_to(far / name)
    say(session, "two")
    save(tmp_path / "talk.json", session)
    assert all((tmp_path / name).is_symlink() for name in ("talk.json", "talk.kv"))
    assert sorted(each.name for each in far.iterdir()) == ["talk.json", "talk.kv"]
    session.messages = []
    resume(far / "talk.json", load_conversation(far / "talk.json"), session)
    assert [each.text for each in session.messages if each.role == "user"] == ["one", "two"]
    assert session.context_used > 0


def test_show_prints_the_memory_of_each_device(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Repl(session, COMMANDS).run_command("/show")
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("on CPU")]
    assert " kB weights, " in line
    assert "planned" not in line
    model = tmp_path / "model.gguf"
    placement = placement_for(model, {"context": 64, "ubatch": 16, "host_memory": "mapped"})
    with (
        Engine.open(model, placement=placement, n_ctx=256) as engine,  # n_ctx wins over the plan's
        Session(engine) as planned,
    ):
        Repl(planned, COMMANDS).run_command("/show")
        kv = next(each for each in planned.memory if each.what == "kv")
    assert kv.device == "CPU"
    # Keys and values of 3 layers, each 64 wide at 2 bytes, for 256 tokens.
    assert kv.predicted == pytest.approx(3 * 2 * 64 * 2 * 256, abs=5000)
    assert kv.real == pytest.approx(kv.predicted, abs=5000)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("on CPU")]
    assert "; planned " in line
