"""A dialogue in a terminal: keys that a person types, and the screen that a person sees."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.terminal import ABORTS, CTRL_C, CTRL_D, PASTE_BEGIN, PASTE_END, TAB, UP, Terminal
from tests.helpers import EOS, scripted_tensors, tokens_of, write_random_gguf

Dialogue = Callable[..., Terminal]
SYSTEM = ("system", "You are a helpful assistant.")
SAID = "# 中文ok"
SEEN = "中文ok"  # as a rendered heading
ANSWER = ("assistant", SAID)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("repl")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A model that gives the same answer to everything."""
    tensors = scripted_tensors([*tokens_of(SAID), EOS])
    return write_random_gguf(folder / "model.gguf", tensors=tensors)


@pytest.fixture(scope="module")
def endless(folder: Path) -> Path:
    """A model that says "abc abc ..." without end, and whose context takes seconds to fill."""
    tensors = scripted_tensors(tokens_of("abc a"))
    return write_random_gguf(folder / "endless.gguf", tensors=tensors, context=32768)


@pytest.fixture
def dialogue(tmp_path: Path) -> Dialogue:
    def start(model: Path, *options: str, **others: Any) -> Terminal:
        return Terminal(tmp_path, "chat", model, "-t", "1", "--temp", "0", *options, **others)

    return start


def saved(terminal: Terminal, folder: Path) -> list[tuple[str, str]]:
    """Save the conversation with /save, and return its messages."""
    assert terminal.enter("/save talk").startswith("saved as talk.json")
    messages = json.loads((folder / "talk.json").read_text(encoding="utf-8"))["messages"]
    return [(message["role"], message["text"]) for message in messages]


def test_a_dialogue(model: Path, dialogue: Dialogue, tmp_path: Path) -> None:
    with dialogue(model, "-c", "512") as terminal:
        terminal.wait_for_prompt()
        assert terminal.lines == ["model.gguf, context of 512 tokens. /help lists commands.", ">"]

        answer, status = terminal.enter("hello 你好").splitlines()
        assert answer == SEEN
        assert "wrote 10 at " in status
        assert "of 512" in status

        terminal.send('"""one\r')
        terminal.wait_for("\n.")
        terminal.type('  二"""')
        assert terminal.finish().startswith(SEEN)

        terminal.send(f"{PASTE_BEGIN}pasted\r\n中文\n{PASTE_END}")
        terminal.wait_for("\n. 中文")
        terminal.enter("end")
        assert "there is no command /x" in terminal.enter("/x y")
        terminal.enter(" /x y")

        questions = ["hello 你好", "one\n  二", "pasted\n中文\nend", "/x y"]
        turns = [(("user", question), ANSWER) for question in questions]
        assert saved(terminal, tmp_path) == [SYSTEM, *sum(turns, ())]

        terminal.send("/exit\r")
        assert terminal.wait_for_end() == 0


@pytest.mark.parametrize(
    "pasted",
    [
        '"""docstring"""\ndef f(): ...',
        '"""',
        "/* a comment */\nint x;",
        "// a comment",
        "/etc/hosts",
        "/exit",
        "  /* indented */",
    ],
)
def test_what_is_pasted_is_text(
    model: Path, dialogue: Dialogue, tmp_path: Path, pasted: str
) -> None:
    with dialogue(model) as terminal:
        terminal.wait_for_prompt()
        terminal.send(f"{PASTE_BEGIN}{pasted}{PASTE_END}")
        terminal.wait_for(pasted.splitlines()[-1])
        assert terminal.finish().startswith(SEEN)
        terminal.send(UP)
        assert terminal.enter("!").startswith(SEEN)
        questions = [text for role, text in saved(terminal, tmp_path) if role == "user"]
        assert questions == [pasted, f"{pasted}!"]


@pytest.mark.parametrize("typed", ["// why?", "/* why */", "/etc/hosts: why?", "/1"])
def test_a_typed_slash_without_a_word_begins_a_message(
    model: Path, dialogue: Dialogue, tmp_path: Path, typed: str
) -> None:
    with dialogue(model) as terminal:
        terminal.wait_for_prompt()
        assert terminal.enter(typed).startswith(SEEN)
        assert ("user", typed) in saved(terminal, tmp_path)


def test_a_key_of_input_methods_changes_nothing(
    model: Path, dialogue: Dialogue, tmp_path: Path
) -> None:
    with dialogue(model) as terminal:
        terminal.wait_for_prompt()
        terminal.type("one")
        terminal.send("\0")
        terminal.enter(" 二")
        assert ("user", "one 二") in saved(terminal, tmp_path)


def test_history_outlives_the_process_and_ctrl_c_clears_the_line(
    model: Path, dialogue: Dialogue, tmp_path: Path
) -> None:
    with dialogue(model) as terminal:
        terminal.wait_for_prompt()
        terminal.enter("the first")
        terminal.send(CTRL_D)
        assert terminal.wait_for_end() == 0
    history = tmp_path / ".local" / "state" / "dots1" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with dialogue(model) as terminal:
        terminal.wait_for_prompt()
        terminal.type("not this")
        terminal.send(CTRL_C)
        terminal.wait_for_prompt()
        terminal.send(UP)
        terminal.wait_for("> the first")
        terminal.send("\x1b[D" * 5)  # left
        terminal.send("very ")
        terminal.wait_for("> the very first")
        terminal.finish()
        line = terminal.screen.cursor.y
        terminal.send(CTRL_C)
        terminal.wait_for_prompt(below=line)
        assert "Ctrl-D or /exit leaves." in terminal.lines
        questions = [text for role, text in saved(terminal, tmp_path) if role == "user"]
        assert questions == ["the very first"]


def test_chat_works_without_a_file_for_history(
    model: Path, dialogue: Dialogue, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with dialogue(model, XDG_STATE_HOME=str(tmp_path / "file")) as terminal:
        terminal.wait_for_prompt()
        assert terminal.enter("hi").startswith(SEEN)
        terminal.send(UP)
        terminal.wait_for("> hi\n" + SEEN)


def test_ctrl_c_keeps_a_partial_answer_and_drops_an_unanswered_question(
    endless: Path, dialogue: Dialogue, tmp_path: Path
) -> None:
    with dialogue(endless, "-c", "0") as terminal:
        terminal.wait_for_prompt()
        terminal.type("go")
        line = terminal.screen.cursor.y
        terminal.send("\r")
        terminal.wait_for("abc abc")
        terminal.send(CTRL_C)
        terminal.wait_for_prompt(below=line)
        assert "interrupted; what was written is kept" in terminal.text
        system, question, (role, answer) = before = saved(terminal, tmp_path)
        assert (system, question, role) == (SYSTEM, ("user", "go"), "assistant")
        assert answer == ("abc " * len(answer))[: len(answer)] != ""

        (tmp_path / "long.txt").write_text("x y " * 4000, encoding="utf-8")
        assert "16,0" in terminal.enter("/read long.txt")
        terminal.type("and this?")
        line = terminal.screen.cursor.y
        terminal.send("\r")
        terminal.wait_for("reading")
        terminal.send(CTRL_C)
        terminal.wait_for_prompt(below=line)
        assert "not part of the conversation (arrow-up brings it back)" in terminal.text
        terminal.send(UP)
        terminal.wait_for("> and this?")
        terminal.send(CTRL_C)
        terminal.wait_for_prompt()
        assert saved(terminal, tmp_path) == before


def test_commands_change_the_conversation(model: Path, dialogue: Dialogue, tmp_path: Path) -> None:
    editor = tmp_path / "my editor"
    editor.write_text('#!/bin/sh\nprintf " %s" "$1" >> "$2"\n', encoding="utf-8")
    editor.chmod(0o700)
    notes = tmp_path / "my notes.txt"
    notes.write_text("note 笔记", encoding="utf-8")
    with dialogue(model, EDITOR=f"'{editor}' more") as terminal:
        terminal.wait_for_prompt()
        assert "there is no answer" in terminal.enter("/regen")
        terminal.enter("one")
        terminal.enter("two")
        assert terminal.enter("/undo") == "dropped: two"
        assert terminal.enter("/retry").startswith(SEEN)
        assert saved(terminal, tmp_path) == [SYSTEM, ("user", "one"), ANSWER]
        assert terminal.enter("/edit").startswith(SEEN)
        assert saved(terminal, tmp_path) == [SYSTEM, ("user", "one more"), ANSWER]

        terminal.enter("/system  Say 'so'.")
        assert "my notes.txt: " in terminal.enter("/read my notes.txt")
        terminal.enter("two")
        attached = ("user", f"{notes.name}:\n\nnote 笔记\n\ntwo")
        talked = [("user", "one more"), ANSWER, attached, ANSWER]
        assert saved(terminal, tmp_path) == [("system", "Say 'so'."), *talked]
        terminal.enter("/system ''")
        assert saved(terminal, tmp_path) == talked
        assert "turns           2, " in terminal.enter("/show")

        terminal.enter("/set markdown off")
        terminal.enter("/set max_tokens 4")
        answer, reason, _ = terminal.enter("three").splitlines()
        assert (answer, reason) == ("#", "the answer is cut off after 4 tokens (max_tokens)")
        assert "all answers  6: " in terminal.enter("/stats")
        terminal.enter("/clear")
        assert saved(terminal, tmp_path) == []


def test_edit_without_an_editor_uses_the_prompt(
    model: Path, dialogue: Dialogue, tmp_path: Path
) -> None:
    with dialogue(model) as terminal:
        terminal.wait_for_prompt()
        terminal.enter("one")
        terminal.send("/edit\r")
        terminal.wait_for("/edit\n> one")
        terminal.enter(" more")
        assert saved(terminal, tmp_path) == [SYSTEM, ("user", "one more"), ANSWER]


def test_a_saved_conversation_is_resumed_in_a_new_process(
    model: Path, dialogue: Dialogue, tmp_path: Path
) -> None:
    with dialogue(model) as terminal:
        terminal.wait_for_prompt()
        terminal.enter("你好")
        terminal.enter("/set seed 5")
        before = saved(terminal, tmp_path)
        assert " kB of KV cache in talk.kv" in terminal.text
    with dialogue(model, "--load", "talk.json") as terminal:
        terminal.wait_for_prompt()
        begin, end = "talk.json: 1 turn, ", " tokens of it cached; the last: 你好"
        assert (terminal.lines[0][: len(begin)], terminal.lines[0][-len(end) :]) == (begin, end)
        terminal.enter("/clear")
        assert end in terminal.enter("/load ~/talk")
        assert "seed            5" in terminal.enter("/show")
        terminal.enter("and")
        assert saved(terminal, tmp_path) == [*before, ("user", "and"), ANSWER]


def test_tab_completes_commands_files_and_settings(
    model: Path, dialogue: Dialogue, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("n", encoding="utf-8")
    with dialogue(model) as terminal:
        terminal.wait_for_prompt()
        terminal.send("/sy" + TAB)
        terminal.wait_for("> /system")
        terminal.send(CTRL_C)
        terminal.wait_for_prompt()
        terminal.send("/set rep" + TAB)
        terminal.wait_for("> /set repeat_penalty")
        terminal.send(CTRL_C)
        terminal.wait_for_prompt()
        terminal.send("/file ~/no" + TAB)
        terminal.wait_for("> /file ~/notes.txt")
        assert "go with your next message" in terminal.finish()


def test_a_full_context_drops_the_oldest_turns(
    model: Path, dialogue: Dialogue, tmp_path: Path
) -> None:
    with dialogue(model, "-c", "128") as terminal:
        terminal.wait_for_prompt()
        shown = [terminal.enter(f"question {number}") for number in range(5)]
        assert SEEN in shown[-1]
        assert any("no longer fit" in each and "dropped" in each for each in shown)
        kept = saved(terminal, tmp_path)
        turns = [(("user", f"question {number}"), ANSWER) for number in range(5)]
        assert kept == [SYSTEM, *sum(turns, ())]
        dropped = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["dropped_turns"]
        assert 0 < dropped < 5
        terminal.enter("/clear")
        loaded = terminal.enter("/load talk")
        assert f"5 turns, {dropped} of them no longer in the context" in loaded
        assert " cached" in loaded


def test_a_full_context_stops_if_asked_to(model: Path, dialogue: Dialogue, tmp_path: Path) -> None:
    with dialogue(model, "-c", "64", "--overflow", "stop") as terminal:
        terminal.wait_for_prompt()
        terminal.enter("one")
        before = saved(terminal, tmp_path)
        assert "the context holds 64" in terminal.enter("x" * 40).replace("\n", " ")
        assert saved(terminal, tmp_path) == before


def test_ctrl_c_ends_a_single_answer(endless: Path, dialogue: Dialogue) -> None:
    with dialogue(endless, "-c", "0", "-p", "go") as terminal:
        terminal.wait_for("abc abc")
        terminal.send(CTRL_C)
        assert terminal.wait_for_end() == 130
        assert "Traceback" not in terminal.text


def test_json_of_a_dialogue_is_refused(model: Path, dialogue: Dialogue) -> None:
    with dialogue(model, "--json") as terminal:
        assert terminal.wait_for_end() == 2
        assert terminal.lines[0].startswith("dots1: --json is for one answer")


def test_only_answers_go_into_a_pipe(model: Path, dialogue: Dialogue, tmp_path: Path) -> None:
    with (tmp_path / "answers").open("wb") as answers, dialogue(model, stdout=answers) as terminal:
        terminal.wait_for_prompt()
        terminal.enter("hi")
        terminal.enter("/help")
        terminal.send(CTRL_D)
        assert terminal.wait_for_end() == 0
        assert "/regen" in terminal.text
    assert (tmp_path / "answers").read_text(encoding="utf-8") == f"{SAID}\n"


def test_a_dumb_terminal_gets_text_alone(model: Path, dialogue: Dialogue) -> None:
    with dialogue(model, TERM="dumb") as terminal:
        terminal.wait_for_prompt()
        assert terminal.enter("hi").startswith(SAID)
        assert b"\x1b" not in terminal.seen


def test_plain_does_not_render_markdown(model: Path, dialogue: Dialogue) -> None:
    with dialogue(model, "-p", "hi", "--plain") as terminal:
        assert terminal.wait_for_end() == 0
        assert terminal.lines[0] == SAID


def recovery_files(folder: Path) -> list[Path]:
    return sorted((folder / ".local" / "state" / "dots1").glob("recovery-*"))


def test_a_session_file_is_resumed_and_saved(
    model: Path, dialogue: Dialogue, tmp_path: Path
) -> None:
    file, state = tmp_path / "talk.json", tmp_path / "talk.kv"
    for turn, leave in enumerate(["/exit\r", CTRL_D, CTRL_C + CTRL_D]):
        with dialogue(model, "--session", "talk.json") as terminal:
            terminal.wait_for_prompt()
            assert (f"talk.json: {turn} turn" in terminal.lines[0]) == (turn > 0)
            terminal.enter(f"question {turn}")
            messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
            assert messages[-2]["text"] == f"question {turn}"
            before = state.stat().st_mtime_ns if turn else 0
            assert recovery_files(tmp_path) == []
            terminal.send(leave)
            assert terminal.wait_for_end() == 0
            assert state.stat().st_mtime_ns > before
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(state.stat().st_mode) == 0o600


def test_a_killed_dialogue_can_be_resumed(
    endless: Path, model: Path, dialogue: Dialogue, tmp_path: Path
) -> None:
    with dialogue(model) as other, dialogue(endless, "-c", "0") as terminal:
        other.wait_for_prompt()
        other.enter("elsewhere")
        terminal.wait_for_prompt()
        assert "cut off" not in terminal.text
        terminal.type("go")
        terminal.send("\r")
        terminal.wait_for("abc abc")
        mine = max(recovery_files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
        terminal.process.kill()
        terminal.process.wait()
        assert stat.S_IMODE(mine.stat().st_mode) == 0o600
        with dialogue(model) as next_one:
            next_one.wait_for_prompt()
            notice = f"a conversation was cut off; /load {mine} resumes"
            assert notice in " ".join(next_one.lines)
            next_one.send(f"/load {mine}\r")
            next_one.wait_for("> go")
            shown = " ".join(next_one.lines)
            assert "0 turns, held with endless.gguf; not answered yet: go" in shown
            next_one.finish()
            assert saved(next_one, tmp_path) == [SYSTEM, ("user", "go"), ANSWER]
            next_one.send(CTRL_D)
            assert next_one.wait_for_end() == 0
        other.send(CTRL_D)
        assert other.wait_for_end() == 0
    assert recovery_files(tmp_path) == []


@pytest.mark.parametrize("file", ["", "talk.json"])
def test_an_aborting_engine_is_one_sentence(
    endless: Path, dialogue: Dialogue, tmp_path: Path, file: str
) -> None:
    options = ["--session", file] if file else []
    with dialogue(endless, *options, "--plain", first=ABORTS) as terminal:
        terminal.wait_for_prompt()
        terminal.type("go")
        terminal.send("\r")
        assert terminal.wait_for_end() == 1
        [path] = [tmp_path / file] if file else recovery_files(tmp_path)
        written, told = terminal.text.split("> go\n")[1].split("\n", 1)
        assert told.replace("\n", " ").startswith("dots1: the connection to a worker was lost")
        assert f"/load {file or path}" in told.replace("\n", " ")
    kept = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert [m["text"] for m in kept[1:]] == ["go", written]
    assert written == "abc a"


def test_stats_count_drafts(endless: Path, dialogue: Dialogue) -> None:
    with dialogue(endless, "-n", "40", "--draft", "3") as terminal:
        terminal.wait_for_prompt()
        terminal.enter("hi")
        # "abc " is drafted once 12 characters after the first 4 are written: 6 times 3.
        assert "drafts       18 tokens, 18 of them right" in terminal.enter("/stats")
