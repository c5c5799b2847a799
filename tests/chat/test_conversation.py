import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dots1_local.chat.conversation import (
    Conversation,
    Settings,
    load_conversation,
    save_conversation,
    state_path,
)
from dots1_local.chat.message import Message
from dots1_local.chat.sampling import Sampling
from dots1_local.errors import UsageError
from tests.chat.conftest import Talk
from tests.helpers import EOS, tokens_of

SAVED: dict[str, Any] = {
    "format": "dots1-conversation",
    "version": 1,
    "model": "dots.gguf",
    "settings": {"temperature": 0.5, "seed": None, "max_tokens": 9, "stop": ["x"]},
    "messages": [
        {"role": "system", "text": "S"},
        {"role": "user", "text": "中"},
        {"role": "assistant", "text": "文"},
    ],
}


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({**SAVED, **changes}), encoding="utf-8")
    return path


def test_a_conversation_is_restored_and_continues(talk: Talk, tmp_path: Path) -> None:
    sampling = Sampling(0, 7, 0.5, 0.25, 1.5, 3, 0.5, -0.5, ((5, -100), (6, 1.5)))
    settings = {"sampling": sampling, "max_tokens": 4, "stop": ("zz", "中z"), "overflow": "stop"}
    session = talk([*tokens_of("中文"), EOS], system="S", **settings)
    "".join(session.ask("hi"))
    save_conversation(tmp_path / "talk.json", session)

    conversation = load_conversation(tmp_path / "talk.json")
    texts = (("system", "S"), ("user", "hi"), ("assistant", "中"))
    assert [(m.role, m.text, m.tokens) for m in conversation.messages] == [
        (*each, None) for each in texts
    ]
    assert conversation.model == session.model == "model0.gguf"
    other = talk([*tokens_of("中文"), EOS])
    conversation.apply(other)
    assert {name: getattr(other, name) for name in settings} == settings
    assert "".join(other.ask("more")) == "中"


def test_the_file_is_for_people_too(talk: Talk, tmp_path: Path) -> None:
    session = talk([*tokens_of("中文"), EOS], system="")
    "".join(session.ask("你好\n吗"))
    save_conversation(tmp_path / "talk.json", session)
    text = (tmp_path / "talk.json").read_text(encoding="utf-8")
    assert '  "model": "model0.gguf",\n' in text
    assert '"text": "你好\\n吗"' in text
    assert '"text": "中文"' in text
    assert json.loads(text)["format"] == "dots1-conversation"


def test_a_question_without_an_answer_is_kept_apart(talk: Talk, tmp_path: Path) -> None:
    session = talk([*tokens_of("yes"), EOS], system="")
    "".join(session.ask("one"))
    asked = [*session.messages, Message("user", "two\udce4")]
    save_conversation(tmp_path / "talk.json", session, asked)
    conversation = load_conversation(tmp_path / "talk.json")
    assert conversation.messages == (Message("user", "one"), Message("assistant", "yes"))
    assert conversation.unanswered == "two?"
    save_conversation(tmp_path / "talk.json", session)
    assert load_conversation(tmp_path / "talk.json").unanswered == ""


@pytest.mark.parametrize(
    ("name", "state"), [("talk.json", "talk.kv"), ("talk", "talk.kv"), ("a.txt", "a.txt.kv")]
)
def test_the_kv_cache_is_kept_beside_it(tmp_path: Path, name: str, state: str) -> None:
    assert state_path(tmp_path / name) == tmp_path / state


def test_half_a_surrogate_can_be_saved(talk: Talk, tmp_path: Path) -> None:
    session = talk([*tokens_of("yes"), EOS], system="")
    "".join(session.ask("a\udce4b\ud800"))
    save_conversation(tmp_path / "talk.json", session)
    assert load_conversation(tmp_path / "talk.json").messages[0].text == "a?b?"


def test_saving_again_replaces_but_nothing_else_is_overwritten(talk: Talk, tmp_path: Path) -> None:
    session = talk([*tokens_of("yes"), EOS])
    path = tmp_path / "talk.json"
    save_conversation(path, session)
    "".join(session.ask("hi"))
    save_conversation(path, session)
    assert len(load_conversation(path).messages) == 3
    for name, content in (("notes.txt", "dear diary"), ("other.json", '{"format": "x"}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match="not a saved conversation"):
            save_conversation(tmp_path / name, session)
        assert (tmp_path / name).read_text() == content
    with pytest.raises(UsageError, match="is not a file"):
        save_conversation(tmp_path, session)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    session = talk([*tokens_of("yes"), EOS])
    folder = tmp_path / "saved"
    folder.mkdir()
    save_conversation(folder / "talk.json", session)
    before = (folder / "talk.json").read_bytes()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match=r"cannot write .*talk\.json: No space left on device"):
        save_conversation(folder / "talk.json", session)
    assert [path.name for path in folder.iterdir()] == ["talk.json"]
    assert (folder / "talk.json").read_bytes() == before


@pytest.mark.parametrize("name", ["missing/talk.json", "a\0b", "x" * 300])
def test_an_unusable_path_is_one_sentence(talk: Talk, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"cannot (write|read) "):
        save_conversation(tmp_path / name, talk([EOS]))
    with pytest.raises(UsageError, match="cannot read "):
        load_conversation(tmp_path / name)


def test_missing_settings_have_defaults(tmp_path: Path) -> None:
    messages = (Message("system", "S"), Message("user", "中"), Message("assistant", "文"))
    assert load_conversation(written(tmp_path)) == Conversation(
        "dots.gguf", messages, Settings(0.5, max_tokens=9, stop=("x",), overflow="drop")
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "other"}, ["not a saved conversation"]),
        ({"version": 2}, ["version", "2"]),
        ({"dropped_turns": -1}, ["dropped_turns"]),
        ({"dropped_turns": 2}, ["dropped_turns"]),
        ({"model": None}, ["model", "null"]),
        ({"settings": []}, ["settings", "array"]),
        ({"settings": {"temperature": "hot"}}, ["settings.temperature", "str"]),
        ({"settings": {"temperature": None}}, ["settings.temperature", "null"]),
        ({"settings": {"temperature": True}}, ["settings.temperature", "bool"]),
        ({"settings": {"temperature": 101}}, ["temperature", "101"]),
        ({"settings": {"temperature": 10**400}}, ["temperature"]),
        ({"settings": {"top_k": 1.5}}, ["settings.top_k", "float"]),
        ({"settings": {"seed": 1.5}}, ["settings.seed", "float"]),
        ({"settings": {"presence_penalty": 3}}, ["presence penalty", "3"]),
        ({"settings": {"logit_bias": 1}}, ["settings.logit_bias", "int"]),
        ({"settings": {"logit_bias": [[1]]}}, ["settings.logit_bias[0]", "length"]),
        ({"settings": {"logit_bias": [[1, True]]}}, ["settings.logit_bias[0][1]", "bool"]),
        ({"settings": {"logit_bias": [[1.5, 1]]}}, ["settings.logit_bias[0][0]", "float"]),
        ({"settings": {"max_tokens": 0}}, ["settings.max_tokens", "1"]),
        ({"settings": {"max_tokens": True}}, ["settings.max_tokens", "bool"]),
        ({"settings": {"stop": "abc"}}, ["settings.stop", "str"]),
        ({"settings": {"stop": [""]}}, ["settings.stop[0]", "length"]),
        ({"settings": {"overflow": ["drop"]}}, ["settings.overflow"]),
        ({"unanswered": 1}, ["unanswered", "int"]),
        ({"messages": None}, ["messages", "null"]),
        ({"messages": ["hi"]}, ["messages[0]", "str"]),
        ({"messages": [{"role": "user"}]}, ["messages[0]", "text"]),
        ({"messages": [{"role": ["user"], "text": "x"}]}, ["messages[0].role"]),
        ({"messages": [{"role": "tool", "text": "x"}]}, ["messages[0].role", "tool"]),
        ({"messages": [{"role": "assistant", "text": "x"}]}, ["messages[0]", "assistant"]),
        ({"messages": [{"role": "user", "text": "x"}]}, ["messages[0]", "no answer"]),
        ({"messages": SAVED["messages"] + SAVED["messages"]}, ["messages[3]", "system", "user"]),
    ],
)
def test_a_damaged_conversation_is_one_sentence(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(UsageError) as error:
        load_conversation(path)
    assert str(error.value).startswith(str(path))
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"[" * 100_000, b"null", b'{"version": 1}', b"1" * 9999, b'{"x": NaN}']
)
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(UsageError, match="not a saved conversation"):
        load_conversation(tmp_path / "f")


def test_an_enormous_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="too large"):
        load_conversation(tmp_path / "f")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(
    part=st.sampled_from(["settings", "messages", "version", "model", *SAVED["settings"]]),
    value=ANYTHING,
)
def test_any_content_is_a_conversation_or_one_sentence(
    part: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    setting = {"settings": {**SAVED["settings"], part: value}}
    content = {**SAVED, **({part: value} if part in SAVED else setting)}
    path.write_text(json.dumps(content), encoding="utf-8")
    problem = ""
    try:
        load_conversation(path)
    except UsageError as error:
        problem = str(error)
    assert "\n" not in problem
