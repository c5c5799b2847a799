import json
import os
import resource
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dots1_local.chat.message import Message
from dots1_local.chat.session import Session
from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error, UsageError
from tests.chat.conftest import GREEDY, Talk
from tests.helpers import EOS, TOKENS, random_tensors, tokens_of, write_random_gguf

LAYERS, ROW = 3, 2 * 32 * 4  # of a key or a value: heads, head_dim, F32


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write a model that answers in capitals, which tokenise to the tokens that it wrote."""
    head = random_tensors()["output.weight"]
    head[: ord("A")] = head[ord("Z") + 1 :] = 0
    return write_random_gguf(tmp_path / "model.gguf", tensors={"output.weight": head})


@pytest.fixture
def session(model: Path) -> Any:
    with engine(model) as opened, Session(opened, sampling=GREEDY) as session:
        yield session


def engine(model: Path, **changes: Any) -> Engine:
    options = {"n_ctx": 256, "kv_type": "F32", "flash_attention": False, "threads": 1}
    return Engine.open(model, **{**options, **changes})


def say(session: Session, text: str) -> str:
    return "".join(session.ask(text, 8))


def texts(messages: list[Message]) -> list[Message]:
    """Return the messages as a conversation's file has them."""
    return [Message(message.role, message.text) for message in messages]


def resumed(model: Path, state: Path, messages: list[Message], **changes: Any) -> tuple[int, str]:
    """Return how many tokens a new engine reuses, and what it answers to "more"."""
    with engine(model, **changes) as opened, Session(opened, sampling=GREEDY) as session:
        session.messages = texts(messages)
        spared = session.load_state(state)
        assert session.context_used == spared
        answer = say(session, "more")
        assert session.stats is not None
        assert session.stats.reused_tokens <= spared
        return session.stats.reused_tokens, answer


def test_a_new_process_resumes_without_computing_again(
    session: Session, model: Path, tmp_path: Path
) -> None:
    say(session, "hello 中")
    messages, used = list(session.messages), session.context_used
    state = tmp_path / "talk.kv"
    nbytes = session.save_state(state)
    assert 2 * LAYERS * ROW * used < nbytes < state.stat().st_size
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "talk.kv"]
    expected = say(session, "more")  # what was never interrupted
    assert resumed(model, state, messages) == (used, expected)


def test_a_current_file_is_not_written_again(session: Session, tmp_path: Path) -> None:
    assert session.save_state(tmp_path / "nothing.kv") == 0
    assert not (tmp_path / "nothing.kv").exists()
    say(session, "hello")
    state = tmp_path / "talk.kv"
    assert session.save_state(state) > 0
    assert session.save_state(state) == 0
    assert session.load_state(state) == session.context_used
    assert session.save_state(state) == 0
    state.unlink()
    assert session.save_state(state) > 0


def test_only_a_different_tail_is_computed(session: Session, model: Path, tmp_path: Path) -> None:
    say(session, "one")
    first = session.context_used
    say(session, "two")
    session.save_state(tmp_path / "talk.kv")
    spared, answer = resumed(model, tmp_path / "talk.kv", session.messages[:-2])
    assert first <= spared < len("two") + first + 3  # up to the second question
    session.undo()
    assert answer == say(session, "more")


def test_an_undone_turn_is_not_in_the_file(session: Session, tmp_path: Path) -> None:
    say(session, "one")
    say(session, "secret")
    session.undo()
    session.save_state(tmp_path / "talk.kv")
    content = (tmp_path / "talk.kv").read_bytes()
    kept, undone = (np.array(tokens_of(text), "<i4").tobytes() for text in ("one", "secret"))
    assert kept in content
    assert undone not in content
    assert session.stats is not None
    assert "".join(session.regenerate())


def test_commands_work_the_same_after_loading(session: Session, tmp_path: Path) -> None:
    say(session, "one")
    say(session, "two")
    session.save_state(tmp_path / "talk.kv")
    before = list(session.messages)
    deeds: list[Callable[[], Any]] = [
        lambda: "".join(session.regenerate()),
        session.undo,
        session.clear,
    ]
    for deed in deeds:
        outcomes = []
        for loads in (False, True):
            session.clear()
            say(session, "unrelated")
            session.messages = texts(before)
            assert not loads or session.load_state(tmp_path / "talk.kv")
            session.max_tokens = 8
            deed()
            outcomes.append((texts(session.messages), say(session, "now")))
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("changes", [{"n_ctx": 512}, {"kv_type": "F16"}, {"flash_attention": True}])
def test_another_context_is_computed_again(
    session: Session, model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    say(session, "hello")
    session.save_state(tmp_path / "talk.kv")
    spared, answer = resumed(model, tmp_path / "talk.kv", session.messages, **changes)
    again = resumed(model, tmp_path / "none.kv", session.messages, **changes)
    assert (spared, answer) == (0, again[1])


@pytest.mark.parametrize("change", ["weight", "size", "key"])
def test_another_model_is_computed_again(
    session: Session, model: Path, tmp_path: Path, change: str
) -> None:
    say(session, "hello")
    session.save_state(tmp_path / "talk.kv")
    content = bytearray(model.read_bytes())
    if change == "weight":
        content[-1] ^= 1
    elif change == "size":
        content += b"0"
    else:
        content = content.replace(b"[PAD267]", b"[PAD268]")
    other = tmp_path / "other.gguf"
    other.write_bytes(content)
    spared, answer = resumed(other, tmp_path / "talk.kv", session.messages)
    assert (spared, answer) == (0, resumed(other, tmp_path / "none.kv", session.messages)[1])


def test_another_shard_is_another_model(tmp_path: Path) -> None:
    write_random_gguf(tmp_path / "m.gguf", shard_tensors=20)
    first, *_, last = sorted(tmp_path.glob("m-*.gguf"))
    with engine(first) as opened, Session(opened, sampling=GREEDY) as session:
        say(session, "hello")
        session.save_state(tmp_path / "talk.kv")
        messages = session.messages
    assert resumed(first, tmp_path / "talk.kv", messages)[0] > 0
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    assert resumed(first, tmp_path / "talk.kv", messages)[0] == 0


def test_answers_keep_the_tokens_that_the_model_wrote(talk: Talk, tmp_path: Path) -> None:
    session = talk([*tokens_of("hel"), EOS])  # as text that would be one token and a byte
    say(session, "hi")
    session.save_state(tmp_path / "talk.kv")
    written = list(session.messages)
    session.messages = texts(written)
    session.load_state(tmp_path / "talk.kv")
    assert session.messages == written


@pytest.mark.parametrize("claim", [[TOKENS.index("<|endofresponse|>")], [*b"hex"], [-1], [1 << 40]])
def test_tokens_that_do_not_spell_it_are_ignored(talk: Talk, tmp_path: Path, claim: Any) -> None:
    session = talk([*tokens_of("hel"), EOS])
    say(session, "hi")
    state = tmp_path / "talk.kv"
    session.save_state(state)
    rewrite(state, footer={"answers": [[*b"hel", *claim]]})
    session.messages = texts(session.messages)
    assert session.load_state(state) > 0
    assert session.messages[-1].tokens is None


@pytest.mark.parametrize(
    "change",
    [{"answers": [[True]]}, {"answers": "hel"}, {"answers": [[[]]]}, {"tokens": []}, {"x": 1}],
)
def test_a_file_with_another_footer_is_not_read(
    session: Session, tmp_path: Path, change: dict[str, Any]
) -> None:
    say(session, "hi")
    state = tmp_path / "talk.kv"
    session.save_state(state)
    rewrite(state, footer=change)
    assert session.load_state(state) == 0


def test_a_full_disk_is_one_sentence(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(session, "hello")
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(Dots1Error, match=r"1\.0 kB free, but the KV cache needs 62\.2 kB"):
            session.save_state(tmp_path / "talk.kv")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(Dots1Error, match=r"cannot write .*talk\.kv: .*File too large"):
            session.save_state(tmp_path / "talk.kv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert session.save_state(tmp_path / "talk.kv") > 0


def test_only_its_own_kind_of_file_is_replaced(session: Session, tmp_path: Path) -> None:
    say(session, "hello")
    (tmp_path / "talk.kv").write_text("dear diary")
    with pytest.raises(UsageError, match=r"talk\.kv is not a saved KV cache"):
        session.save_state(tmp_path / "talk.kv")
    assert (tmp_path / "talk.kv").read_text() == "dear diary"
    with pytest.raises(Dots1Error, match="cannot write"):
        session.save_state(tmp_path / "missing" / "talk.kv")
    os.mkfifo(tmp_path / "pipe.kv")
    assert session.load_state(tmp_path / "pipe.kv") == 0


def rewrite(path: Path, body: bytes | None = None, footer: dict[str, Any] | None = None) -> None:
    """Change the engine's part of a state file, or fields of the footer."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[-16:-8])[0]
    old, fields = data[: -16 - length], json.loads(data[-16 - length : -16])
    text = json.dumps(fields | (footer or {})).encode()
    path.write_bytes(
        (old if body is None else body) + text + struct.pack("<Q8s", len(text), b"dots1-kv")
    )


def body_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: -16 - struct.unpack("<Q", data[-16:-8])[0]]


def test_no_damage_ends_the_process_or_changes_the_answer(
    session: Session, model: Path, tmp_path: Path
) -> None:
    """llama.cpp would abort on many of these."""
    say(session, "hello")
    state, messages = tmp_path / "talk.kv", texts(session.messages)
    session.save_state(state)
    whole, body = state.read_bytes(), body_of(state)
    count = struct.unpack_from("<I", body, 8)[0]
    expected = resumed(model, tmp_path / "none.kv", messages)[1]
    layer = 12 + 4 * count + 8 + 12 * count  # where the transposition, then layers are told
    random = Random(0)

    def damaged() -> bytes:
        match random.randrange(6):
            case 0:
                return body[: random.randrange(len(body))]
            case 1:
                return body + bytes(random.randrange(1, 999))
            case 2:  # one of the numbers before the first key
                numbers = [*range(0, 12, 4), *range(12 + 4 * count, layer + 20, 4)]
                place = random.choice(numbers)
                other = random.choice([0, 1, 2, count + 1, 256, 257, 1 << 31, (1 << 32) - 1])
                return body[:place] + struct.pack("<I", other) + body[place + 4 :]
            case 3:  # a later layer's type and row
                place = layer + 8 + random.randrange(LAYERS) * (12 + ROW * count)
                return body[:place] + random.randbytes(12) + body[place + 12 :]
            case 4:
                return random.randbytes(random.randrange(999))
            case _:
                return b"ggml" + body[4:]

    for number in range(300):
        session.messages = texts(messages)
        if number % 3:
            state.write_bytes(whole)
            rewrite(state, damaged())
        else:
            place = random.randrange(len(whole))
            state.write_bytes(whole[:place] + random.randbytes(random.choice([0, 9])))
        spared = session.load_state(state)
        assert spared == 0 or body_of(state) == body
        assert say(session, "more") == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_cache_of_nan_or_infinity_is_computed_again(
    session: Session, model: Path, tmp_path: Path, value: float
) -> None:
    say(session, "hello")
    state, messages = tmp_path / "talk.kv", texts(session.messages)
    session.save_state(state)
    body = bytearray(body_of(state))
    count = struct.unpack_from("<I", body, 8)[0]
    first = 12 + 16 * count + 8 + 8 + 12
    body[first : first + ROW * count] = np.full(ROW * count // 4, value, "<f4").tobytes()
    rewrite(state, bytes(body))
    expected = resumed(model, tmp_path / "none.kv", messages)[1]
    assert resumed(model, state, messages) == (0, expected)
