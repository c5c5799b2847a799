import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dots1_local.chat.sampling import Sampling
from dots1_local.cli import app
from dots1_local.errors import Dots1Error, UsageError
from tests.cli.terminal import ABORTS
from tests.engine.engine_memory import placement_for
from tests.helpers import EOS, TEMPLATE, scripted_tensors, tokens_of, write_random_gguf

CHAT = [sys.executable, "-c", "from dots1_local.cli import main; main()", "chat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A model that answers 中文 to everything."""
    path = folder / "model.gguf"
    return write_random_gguf(path, tensors=scripted_tensors([*tokens_of("中文"), EOS]))


def run(model: Path, *options: str, piped: bytes | str | None = None) -> Any:
    return CliRunner().invoke(app, ["chat", str(model), "--temp", "0", "-t", "1", *options], piped)


def test_a_prompt_gives_one_answer_on_stdout(model: Path) -> None:
    result = run(model, "-p", "hi")
    assert result.exit_code == 0, result.output
    assert (result.stdout, result.stderr) == ("中文\n", "")


def test_piped_text_is_the_prompt(model: Path) -> None:
    result = run(model, piped="hi\nthere\n")
    assert (result.stdout, result.stderr) == ("中文\n", "")


@pytest.mark.parametrize(
    ("piped", "options", "asked"),
    [
        ("some\ncontext\n", ["-p", "why?"], "some\ncontext\n\nwhy?"),
        ("", ["-p", "why?"], "why?"),
        (" \n", ["-p", "why?"], "why?"),
        ("context", ["-p", ""], "context"),
        ("x" * 20_000, ["-p", "why?"], "x" * 20_000 + "\n\nwhy?"),
        ("once\n", ["-p", "upon", "--raw"], "once\nupon"),
    ],
)
def test_piped_text_comes_before_the_prompt(
    folder: Path, tmp_path: Path, piped: str, options: list[str], asked: str
) -> None:
    tensors = scripted_tensors([*tokens_of("中文"), EOS])
    model = write_random_gguf(folder / "long.gguf", tensors=tensors, context=32768)
    command = [*CHAT, str(model), "-c", "0", "-n", "1", "--session", "talk.json", *options]
    subprocess.run(command, cwd=tmp_path, input=piped.encode(), check=True)
    messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert [each["text"] for each in messages if each["role"] == "user"] == [asked]


def test_a_pipe_without_end_is_refused(model: Path) -> None:
    result = run(model, "-p", "hi", piped="y\n" * (3 << 20))
    assert isinstance(result.exception, UsageError)
    assert "4,194,304 bytes" in str(result.exception)


def test_a_pipe_that_stays_open_is_named(model: Path) -> None:
    with subprocess.Popen(
        [*CHAT, str(model), "-p", "hi", "--temp", "0"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"/dev/null" in process.stderr.readline()
        process.stdin.close()
        assert process.stdout.read().decode() == "中文\n"


def test_piped_text_is_in_the_encoding_of_the_locale(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    CliRunner(charset="gbk").invoke(
        app, ["chat", str(model), "--session", str(file)], "你好".encode("gbk")
    )
    messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert messages[-2] == {"role": "user", "text": "你好"}


def test_answers_can_be_cut(model: Path) -> None:
    result = run(model, "-p", "hi", "-n", "4")
    assert (result.stdout, result.stderr) == ("中\n", "")


def test_answers_end_before_a_stop_string(model: Path) -> None:
    assert run(model, "-p", "hi", "--stop", "x", "--stop", "文").stdout == "中\n"


def test_json_holds_the_answer_and_its_figures(model: Path) -> None:
    result = run(model, "-p", "hi", "--json", "--seed", "7", "--system", "")
    found = json.loads(result.stdout)
    speeds = [found.pop(name) for name in list(found) if name.endswith("per_second")]
    assert found == {
        "text": "中文",
        "stop": "end",
        "seed": 7,
        "prompt_tokens": 5,  # <|userprompt|> h i <|endofuserprompt|> <|response|>
        "reused_tokens": 0,
        "generated_tokens": 6,
        "dropped_turns": 0,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
        "model": "model.gguf",
    }
    assert len(speeds) == 2
    assert all(speed > 0 for speed in speeds)
    assert result.stderr == ""


@pytest.mark.parametrize(("option", "least"), [("7", 54), ("off", 0), ("0", 0), ("auto", 15)])
def test_drafts_are_counted_and_change_nothing_else(folder: Path, option: str, least: int) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    model = folder / "alphabet.gguf"
    write_random_gguf(model, tensors=scripted_tensors(tokens_of(letters + "a")))
    found = json.loads(run(model, "-p", "hi", "-n", "100", "--json", "--draft", option).stdout)
    assert found["text"] == (letters * 4)[:100]
    assert found["generated_tokens"] == 100
    # The first draft comes after 38 letters: 7 times 7, and 5 with the last letter.
    assert found["accepted_tokens"] == found["drafted_tokens"] >= least
    assert option == "auto" or found["drafted_tokens"] == least


@pytest.mark.parametrize("option", ["often", "-1", "256", "1.5"])
def test_a_draft_that_is_not_possible_is_refused(model: Path, option: str) -> None:
    result = run(model, "-p", "hi", "--draft", option)
    assert result.exit_code != 0
    assert option in str(result.exception)


def test_json_tells_a_script_why_an_answer_stopped(model: Path) -> None:
    found = json.loads(run(model, "-p", "hi", "--json", "-n", "3").stdout)
    assert (found["text"], found["stop"], found["seed"]) == ("中", "length", None)


def test_terminal_control_is_taken_out_of_answers_but_not_of_json(folder: Path) -> None:
    said = "\x1b[2Ja"
    tensors = scripted_tensors([*tokens_of(said), EOS])
    model = write_random_gguf(folder / "control.gguf", tensors=tensors)
    assert run(model, "-p", "hi").stdout == "a\n"
    assert json.loads(run(model, "-p", "hi", "--json").stdout)["text"] == said


def test_raw_completes_text_without_a_template(folder: Path) -> None:
    tensors = scripted_tensors(tokens_of("abc"))
    model = write_random_gguf(folder / "base.gguf", tensors=tensors, template=None)
    found = json.loads(run(model, "--raw", "-p", "xa", "--json", "-n", "2").stdout)
    assert (found["text"], found["prompt_tokens"]) == ("bc", 2)
    refused = run(model, "-p", "xa")
    assert refused.exit_code == 1
    assert "no chat template" in str(refused.exception)


def test_a_saved_conversation_is_resumed(model: Path, tmp_path: Path) -> None:
    saved = {
        "format": "dots1-conversation",
        "version": 1,
        "model": "other.gguf",
        "settings": {"max_tokens": 3},
        "messages": [{"role": "user", "text": "one"}, {"role": "assistant", "text": "two"}],
    }
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(saved), encoding="utf-8")

    def answer(*options: str) -> Any:
        load = ["--load", str(path), "-p", "three", "--json"]
        return json.loads(run(model, *load, *options).stdout)

    markers = 7  # around three messages and before the answer
    assert answer()["prompt_tokens"] == len("onetwothree") + markers
    assert answer()["text"] == "中"  # its own limit of 3 tokens holds
    assert answer("-n", "6")["text"] == "中文"


def test_a_session_file_is_created_and_resumed(model: Path, tmp_path: Path) -> None:
    file, state = tmp_path / "talk.json", tmp_path / "talk.kv"
    for turns in (1, 2):
        found = json.loads(run(model, "--session", str(file), "-p", "hi", "--json").stdout)
        assert (found["text"], found["reused_tokens"] > 0) == ("中文", turns == 2)
        messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
        assert [m["text"] for m in messages[1:]] == ["hi", "中文"] * turns
        assert state.stat().st_size > 1000
    state.unlink()
    found = json.loads(run(model, "--session", str(file), "-p", "hi", "--json").stdout)
    assert (found["text"], found["reused_tokens"]) == ("中文", 0)


def test_an_aborting_engine_leaves_the_answer_so_far(model: Path, tmp_path: Path) -> None:
    aborting = ABORTS + CHAT[2]
    file = tmp_path / "talk.json"
    done = subprocess.run(
        [
            *CHAT[:2],
            aborting,
            "chat",
            model,
            "-p",
            "hi",
            "--temp",
            "0",
            "-t",
            "1",
            "--session",
            file,
        ],
        capture_output=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert (done.returncode, done.stdout.decode()) == (1, "中")
    assert done.stderr.startswith(b"dots1: the connection to a worker was lost")
    assert done.stderr.count(b"\n") == 1
    messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert [m["text"] for m in messages[1:]] == ["hi", "中"]


def test_a_plan_decides_the_context(model: Path, tmp_path: Path) -> None:
    placement = placement_for(model, {"context": 64, "ubatch": 16, "host_memory": "mapped"})
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(placement.to_json()), encoding="utf-8")
    assert run(model, "-p", "hi", "--plan", str(path)).stdout == "中文\n"
    refused = run(model, "-p", "x" * 99, "--plan", str(path))
    assert "the context holds 64" in str(refused.exception)


def test_a_dialogue_keeps_its_session_file_to_itself(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text("{}")
    with file.open("rb") as dialogue:
        fcntl.flock(dialogue, fcntl.LOCK_EX)
        refused = run(model, "--session", str(file), "-p", "hi")
        assert "talk.json; leave it first" in str(refused.exception)


@pytest.mark.parametrize(("text", "tokens"), [("1k", 1024), ("512", 512), ("0", 1024)])
def test_context_sizes_may_have_a_suffix(model: Path, text: str, tokens: int) -> None:
    refused = run(model, "-p", "x" * 2000, "-c", text)
    assert f"the context holds {tokens:,}" in str(refused.exception)


@pytest.mark.parametrize(
    "options", [["--temp", "-1"], ["--top-p", "2"], ["-n", "0"], ["-c", "some"], ["--threads", "0"],
                ["--top-k", "-1"], ["--overflow", "grow"], ["--stop", ""], ["--load", "nowhere"],
                ["--session", "no/where.json"], ["--load", "a", "--session", "b"],
                ["--plan", "nowhere"]]
)  # fmt: skip
def test_invalid_options_are_refused(model: Path, options: list[str]) -> None:
    result = CliRunner().invoke(app, ["chat", str(model), "-p", "hi", *options])
    assert result.exit_code != 0
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("options", "piped", "sentence"),
    [
        (["-p", ""], None, "-p is empty"),
        ([], " \n", "what is piped in is empty"),
        ([], b"caf\xe9", "UTF-8 .*byte 3"),
    ],
)
def test_nothing_to_answer_is_one_sentence(
    model: Path, options: list[str], piped: str | bytes | None, sentence: str
) -> None:
    result = run(model, *options, piped=piped)
    assert re.search(sentence, str(result.exception))
    assert result.stdout == ""


def test_an_empty_stop_string_is_refused_before_the_model_is_opened(tmp_path: Path) -> None:
    result = run(tmp_path / "nowhere.gguf", "-p", "hi", "--stop", "")
    assert "--stop" in str(result.exception)


def test_help_shows_the_defaults_of_sampling() -> None:
    shown = CliRunner().invoke(app, ["chat", "--help"], env={"COLUMNS": "300"}).stdout
    usual = Sampling()
    for option, value in {
        "--temp": usual.temperature,
        "--top-k": usual.top_k,
        "--top-p": usual.top_p,
        "--min-p": usual.min_p,
        "--repeat-penalty": usual.repeat_penalty,
    }.items():
        line = next(
            line for line in shown.splitlines() if line[0:1] == "│" and f"{option} " in line
        )
        assert f"[default: ({value})]" in line


def test_a_closed_pipe_ends_the_answer_quietly(folder: Path) -> None:
    endless = scripted_tensors(tokens_of("ab\na"))
    model = write_random_gguf(folder / "endless.gguf", tensors=endless, context=16384)
    ours, theirs = os.pipe()
    process = subprocess.Popen(
        [*CHAT, str(model), "-p", "hi", "--temp", "0", "-t", "1", "-c", "0"],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    os.close(theirs)
    assert os.read(ours, 1)
    os.close(ours)
    _, complaints = process.communicate(timeout=60)
    assert complaints == b""


CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|response|>"


@pytest.mark.parametrize("raw", [False, True])
def test_what_is_wrong_with_a_file_is_said_once(tmp_path: Path, raw: bool) -> None:
    path = write_random_gguf(tmp_path / "wrong.gguf", template=CHATML)
    options = ["-n", "2", "-c", "128", *(["--raw"] if raw else [])]
    result = CliRunner().invoke(app, ["chat", str(path), "-p", "Hello", *options])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("<|im_start|>, <|im_end|>") == (0 if raw else 1)


def test_a_chat_template_can_be_given(tmp_path: Path) -> None:
    tensors = scripted_tensors([*tokens_of("fine"), EOS])
    path = write_random_gguf(tmp_path / "wrong.gguf", template=CHATML, tensors=tensors)
    (tmp_path / "right.jinja").write_text(TEMPLATE)
    options = ["-p", "Hello", "-c", "128", "--chat-template"]
    result = CliRunner().invoke(app, ["chat", str(path), *options, str(tmp_path / "right.jinja")])
    assert (result.exit_code, result.stdout) == (0, "fine\n"), result.output
    assert "template" not in result.stderr
    (tmp_path / "bad.jinja").write_text("{% for")
    result = CliRunner().invoke(app, ["chat", str(path), *options, str(tmp_path / "bad.jinja")])
    assert result.exit_code != 0
    assert "bad.jinja does not parse" in str(result.exception)


@pytest.mark.parametrize("name", [".", ".."])
def test_a_folder_is_no_model(name: str) -> None:
    result = CliRunner().invoke(app, ["chat", name, "-p", "Hello"])
    assert isinstance(result.exception, Dots1Error)
    assert "is a folder" in str(result.exception)
