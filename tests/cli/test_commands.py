"""Commands of a dialogue, without a terminal: what they change, print and refuse."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dots1_local.chat.conversation import save_conversation
from dots1_local.chat.message import Message
from dots1_local.chat.session import Session
from dots1_local.cli.repl.commands import COMMANDS
from dots1_local.cli.repl.loop import Repl
from dots1_local.engine.engine import Engine
from dots1_local.errors import UsageError
from tests.helpers import EOS, scripted_tensors, write_random_gguf


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = tmp_path_factory.mktemp("commands") / "model.gguf"
    write_random_gguf(path, tensors=scripted_tensors([65, EOS]))
    with Engine.open(path, n_ctx=64, threads=1) as engine:
        yield engine


@pytest.fixture
def repl(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repl]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with Session(engine) as session:
        yield Repl(session, COMMANDS)


def test_no_two_commands_share_a_name() -> None:
    names = [name for command in COMMANDS for name in command.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("/set temperature 0.25", "temperature  0.25"),
        ("/set temp=0", "temperature  0.0"),
        ("/set top-k 5", "top_k  5"),
        ("/set seed 7", "seed  7"),
        ("/set seed random", "seed  random"),
        ("/set max_tokens 12", "max_tokens  12"),
        ("/set max_tokens off", "max_tokens  off"),
        (r"/set stop END '\n\n' 完", r'stop  "END" "\n\n" "完"'),
        (r"/set stop \n a\b", r'stop  "\n" "a\\b"'),
        ("/set stop a=b", 'stop  "a=b"'),
        ("/set stop none", "stop  none"),
        ("/set overflow stop", "overflow  stop"),
        ("/set markdown off", "markdown  off"),
    ],
)
def test_a_setting_is_changed_and_shown(
    repl: Repl, capsys: pytest.CaptureFixture[str], line: str, shown: str
) -> None:
    repl.run_command(line)
    assert capsys.readouterr() == ("", shown + "\n")


def test_settings_reach_the_session(repl: Repl) -> None:
    for line in ("/set min_p 0.1", "/set max_tokens 3", "/set stop a 'b c'", "/set overflow stop"):
        repl.run_command(line)
    session = repl.session
    assert (session.sampling.min_p, session.max_tokens) == (0.1, 3)
    assert (session.stop, session.overflow) == (("a", "b c"), "stop")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/set heat 1", "'heat'.*temperature, "),
        ("/set to 1", "top_k, top_p$"),
        ("/set temp hot", "temperature .*number.*'hot'"),
        ("/set temp -1", r"temperature .*-1\.0"),
        ("/set temp nan", "temperature .*nan"),
        ("/set top_k 1.5", "top_k .*whole number"),
        ("/set top_p 2", r"top-p .*2\.0"),
        ("/set max_tokens 0", "max_tokens .*whole number.*off"),
        ("/set stop ''", "stop .*strings"),
        ("/set stop 'open", "stop .*strings"),
        ("/set overflow grow", "overflow .*drop or stop"),
        ("/set markdown yes", "markdown .*on or off"),
        ("/regen", "no answer"),
        ("/undo", "no turn"),
        ("/edit", "no message"),
        ("/stats", "no answer"),
        ("/save", "file name"),
        ("/load", "file name"),
        ("/load ~nobody-by-this-name/x", "home folder.*nobody-by-this-name"),
        ("/read a\x1b[31m.txt", "control characters"),
        ("/save .", r"\. is not a file name"),
        ("/load /", "/ is not a file name"),
        ("/save a/..", r"a/\.\. is not a file name"),
        ("/undo 3", "/undo"),
        ("/read nowhere.txt", r"nowhere\.txt: No such file"),
        ("/read .", r"^\. .*not a file"),
        ("/read /dev/zero", "/dev/zero .*not a file"),
        ("/read pipe", "pipe .*not a file"),
        ("/read large.txt", r"large\.txt .*4,194,304 bytes"),
        ("/read latin.txt", r"latin\.txt .*UTF-8 .*byte 3"),
        ("/read long.txt", r"long\.txt .*75 tokens.* 64"),
        ("/what", "/what.*/help .*space"),
        ("/", "no command /;"),
        ("/x\x1b[2Jy", "no command /xy;"),
    ],
)
def test_errors_are_one_sentence(
    repl: Repl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "long.txt").write_text("x" * 64, encoding="utf-8")
    (tmp_path / "large.txt").write_bytes(b"x" * ((4 << 20) + 1))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=sentence) as error:
        repl.run_command(line)
    assert "\n" not in str(error.value)
    assert repl.attached == {}


def test_an_attached_file_can_be_detached(repl: Repl, tmp_path: Path) -> None:
    path = tmp_path / "a file"
    path.write_text("text", encoding="utf-8")
    repl.run_command(f'/read "{path}"')
    repl.run_command(f"/read {path}")
    assert repl.attached == {str(path): "a file:\n\ntext"}
    repl.run_command("/read")
    assert repl.attached == {}


def test_control_characters_of_a_file_do_not_reach_the_terminal(
    repl: Repl, capsys: pytest.CaptureFixture[str]
) -> None:
    repl.session.messages = [Message("user", "\x1b[2Jone\n\ntwo"), Message("assistant", "A")]
    repl.run_command("/undo")
    assert capsys.readouterr().err == "dropped: one two\n"


def test_load_reports_the_conversation_and_its_settings(
    repl: Repl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repl.session.messages = [Message("user", "one"), Message("assistant", "A")]
    path = tmp_path / "talk.json"
    repl.run_command(f"/save {path}")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"] = "other\x1b[2J.gguf"
    content["settings"] |= {"temperature": 0.5, "stop": ["a\x9bb"]}
    path.write_text(json.dumps(content), encoding="utf-8")
    capsys.readouterr()
    repl.run_command(f"/load {path}")
    assert capsys.readouterr().err.splitlines() == [
        f"{path}: 1 turn, held with other.gguf; the last: one",
        'settings now: temperature 0.5, stop "a"',
    ]
    content["model"] = repl.session.model
    path.write_text(json.dumps(content), encoding="utf-8")
    repl.run_command(f"/load {path}")
    assert capsys.readouterr().err == f"{path}: 1 turn; the last: one\n"


def test_a_kv_cache_that_cannot_be_saved_is_a_notice(
    repl: Repl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "".join(repl.session.ask("hello!")) == "A"
    path, state = tmp_path / "talk.json", tmp_path / "talk.kv"
    state.write_text("dear diary")
    repl.run_command(f"/save {path}")
    said = capsys.readouterr().err
    assert said.startswith(f"saved as {path}, but without its KV cache: {state} ")
    assert said.count("\n") == 1
    repl.run_command(f"/load {path}")
    assert capsys.readouterr().err == f"{path}: 1 turn; the last: hello!\n"


def test_a_question_without_an_answer_is_offered_again(
    repl: Repl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.json"
    asked = [Message("user", "one"), Message("assistant", "A"), Message("user", "/two")]
    save_conversation(path, repl.session, asked)
    repl.run_command(f"/load {path}")
    assert capsys.readouterr().err == f"{path}: 1 turn; not answered yet: /two\n"
    assert repl.session.messages == asked[:2]
    assert repl.draft == " /two"  # a slash alone would begin a command


def test_show_counts_the_conversation_as_it_is(
    repl: Repl, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "".join(repl.session.ask("hello!")) == "A"
    repl.run_command("/show")
    assert "turns           1, 3 tokens of text\n" in capsys.readouterr().err
    repl.run_command("/clear")
    repl.run_command("/show")
    assert "turns           0, 0 tokens of text\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/help", "/?", "/HELP"])
def test_help_names_every_command(
    repl: Repl, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    repl.run_command(name)
    shown = capsys.readouterr().err
    assert all(command.name in shown and command.help in shown for command in COMMANDS)
