"""`dots1 chat --url`: the same verb and dialogue with a server."""

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from typer.testing import CliRunner

from dots1_local.cli import app
from tests.cli.terminal import CTRL_C, CTRL_D, Terminal
from tests.helpers import EOS, scripted_tensors, tokens_of, write_random_gguf
from tests.openai_server import Played, answer, as_json, chunk, playing, refused, sse, usage
from tests.workers import Program

SAID = "中文"


def run(url: str, *options: str, piped: str | None = None, **environment: str) -> Any:
    env = {"DOTS1_API_KEY": "", "OPENAI_API_KEY": "", **environment}
    return CliRunner().invoke(app, ["chat", "--url", url, "--temp", "0", *options], piped, env=env)


def test_a_prompt_gives_one_answer_on_stdout() -> None:
    with playing(answer("中", "文\x1b[2J"), answer("one"), answer("two")) as server:
        result = run(server.url, "-p", "hi")
        assert (result.stdout, result.stderr, result.exit_code) == (f"{SAID}\n", "", 0)
        assert run(server.url, piped="hi\nthere\n").stdout == "one\n"
        result = run(server.url, "--raw", "-p", "once", "--stop", "x", "-n", "3", "--model", "m")
        assert result.stdout == "two\n"
    asked = server.bodies
    assert [asked[1]["messages"][-1]["content"], asked[2]["prompt"]] == ["hi\nthere", "once"]
    assert [asked[2][name] for name in ("stop", "max_tokens", "model")] == [["x"], 3, "m"]


@pytest.mark.parametrize(
    ("counts", "figures"),
    [
        (usage(20, 2, 5), [20, 5, 2]),
        (usage(20, 2), [20, None, 2]),
        ({"choices": []}, [None, None, None]),
    ],
)
def test_json_has_null_for_what_the_server_does_not_report(
    counts: dict[str, Any], figures: list[int | None]
) -> None:
    with playing(Played([sse(*map(chunk, SAID), chunk(finish="stop"), counts)])) as server:
        found = json.loads(run(server.url, "-p", "hi", "--json", "--seed", "7").stdout)
    names = ("prompt_tokens", "reused_tokens", "generated_tokens")
    assert [found[name] for name in names] == figures
    assert (found["prompt_tokens_per_second"] is None) == (figures[1] is None)
    assert (found["text"], found["stop"], found["seed"], found["model"]) == (
        SAID,
        "end",
        7,
        "dots1",
    )


def test_a_session_file_is_resumed_without_a_kv_cache(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    with playing(answer("one"), answer("two")) as server:
        for question in ("1?", "2?"):
            assert run(server.url, "--session", str(file), "-p", question).exit_code == 0
    said = [message["content"] for message in server.bodies[1]["messages"]]
    assert said == ["You are a helpful assistant.", "1?", "one", "2?"]
    assert list(tmp_path.iterdir()) == [file]


def test_an_answer_that_breaks_off_is_shown_and_saved_and_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    with playing(Played([sse(chunk("par"), done=False)], cut=True)) as server:
        result = run(server.url, "--session", str(file), "-p", "hi")
    assert (result.stdout, result.exit_code) == ("par\n", 1)
    assert server.url in str(result.exception)
    messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert [m["text"] for m in messages[1:]] == ["hi", "par"]


def test_the_key_comes_from_the_environment() -> None:
    wrong = refused("Incorrect API key provided", 401)
    with playing(answer("a"), models=None) as server:
        run(server.url, "-p", "hi", OPENAI_API_KEY="theirs")
        assert {each.headers["Authorization"] for each in server.asked} == {"Bearer theirs"}
    with playing(models=wrong) as server:
        refusal = run(server.url, "-p", "hi", DOTS1_API_KEY="ours", OPENAI_API_KEY="theirs")
        assert "key in DOTS1_API_KEY" in str(refusal.exception)
        refusal = run(server.url, "-p", "hi")
        assert "set DOTS1_API_KEY" in str(refusal.exception)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "--url"),
        (["--model", "m", "x.gguf"], "--url"),
        (["--url", "http://h/v1", "x.gguf"], "x.gguf"),
        (["--url", "http://h/v1", "-c", "4k"], "--context"),
        (["--url", "http://h/v1", "-t", "4"], "--threads"),
        (["--url", "http://h/v1", "--draft", "auto"], "--draft"),
        (["--url", "http://h/v1", "--plan", "p"], "--plan"),
        (["--url", "http://h/v1", "--worker", "w:1"], "--worker"),
        (["--url", "h:8000/v1"], "h:8000/v1"),
    ],
)
def test_invalid_options_are_refused(options: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["chat", "-p", "hi", *options])
    assert sentence in str(result.exception)
    assert result.exit_code != 0


def test_a_dialogue(tmp_path: Path) -> None:
    timings = {"cache_n": 12, "prompt_n": 10, "prompt_ms": 20.0, "predicted_ms": 30.0}
    counted = sse(chunk("# 中文"), chunk(finish="stop"), usage(22, 3, timings=timings))
    cut = Played([sse(chunk("half"), done=False)], cut=True)
    with (
        playing(Played([counted]), answer("vLLM"), answer("full", finish="length", prompt=2047),
                cut, answer("again"), answer("at last")) as server,
        Terminal(tmp_path, "chat", "--url", server.url) as terminal,
    ):  # fmt: skip
        terminal.wait_for_prompt()
        assert terminal.lines[0] == (
            f"dots1 at {server.url}, context of 2,048 tokens. /help lists commands."
        )
        assert terminal.enter("hi").splitlines() == [
            SAID, "read 10 at 500.0 tok/s · wrote 3 at 100.0 tok/s · context 25 of 2,048"
        ]  # fmt: skip
        assert "stop reason: end" in terminal.enter("/stats")
        shown = terminal.enter("/show")
        assert f"model           dots1 at {server.url}" in shown
        assert "turns           1, 6 characters of text" in shown

        answered = terminal.enter("and you?")
        assert answered.startswith("vLLM\nprompt 20, first word after 0")
        assert answered.endswith("· context 21 of 2,048")
        assert "first word   after " in terminal.enter("/stats")
        (tmp_path / "note.txt").write_text("text", encoding="utf-8")
        assert "note.txt: 15 characters, which go with" in terminal.enter("/read note.txt")
        assert "the context of 2,048 tokens is full" in terminal.enter("on")

        broken = terminal.enter("more")
        assert broken.startswith("half\nthe connection to")
        assert terminal.enter("/regen").startswith("again")
        assert terminal.enter("/save talk") == "saved as talk.json"
        terminal.enter("/clear")
        loaded = terminal.enter("/load talk")
        assert "4 turns, 3 of them no longer in the context; the last: more" in loaded
        assert terminal.enter("on").startswith("at last")
        assert [m["content"] for m in server.bodies[-1]["messages"]][-3:] == ["more", "again", "on"]
        terminal.send(CTRL_D)
        assert terminal.wait_for_end() == 0
    assert not (tmp_path / "talk.kv").exists()


def test_ctrl_c_works_while_the_server_is_silent(tmp_path: Path) -> None:
    held = Event()
    waiting = Played([held])
    written = Played([sse(chunk("some words "), done=False), held])
    with (
        playing(waiting, written, answer("next")) as server,
        Terminal(tmp_path, "chat", "--url", server.url) as terminal,
    ):
        terminal.wait_for_prompt()
        for question, seen, outcome in (
            ("hi", "", "stopped; the question is not part of the conversation"),
            ("write", "some", "interrupted; what was written is kept"),
        ):
            terminal.type(question)
            line = terminal.screen.cursor.y
            terminal.send("\r")
            assert server.posted.acquire(timeout=30)
            terminal.wait_for(seen)
            terminal.send(CTRL_C)
            terminal.wait_for_prompt(below=line)
            assert outcome in terminal.text
        assert terminal.enter("go on").startswith("next")
        said = [message["content"] for message in server.bodies[-1]["messages"][1:]]
        assert said == ["write", "some words ", "go on"]
        held.set()


def test_a_dialogue_survives_a_server_that_is_gone(tmp_path: Path) -> None:
    with playing() as server, Terminal(tmp_path, "chat", "--url", server.url) as terminal:
        terminal.wait_for_prompt()
        server.stop()
        assert "start the server, or check --url" in terminal.enter("hi")
        assert "turns           0, " in terminal.enter("/show")


def test_model_chooses_among_a_servers_models() -> None:
    with playing(models=as_json({"data": [{"id": "a"}, {"id": "b"}]})) as server:
        assert "with --model: a, b" in str(run(server.url, "-p", "hi").exception)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a `dots1 serve` whose model answers 中文 to everything."""
    path = tmp_path_factory.mktemp("ours") / "model.gguf"
    write_random_gguf(path, tensors=scripted_tensors([*tokens_of(SAID), EOS]))
    code = "from dots1_local.cli import main; main()"
    with Program("-c", code, "serve", str(path), "--port", "0", "-c", "128", "-t", "1") as program:
        yield program.wait_for("listening on").split()[2]


def test_our_own_server_answers_as_the_engine_does(ours: str) -> None:
    found = json.loads(run(ours, "-p", "hi", "--system", "", "--json").stdout)
    figures = [found[name] for name in ("prompt_tokens", "generated_tokens", "reused_tokens")]
    assert (found["text"], found["stop"], figures[0]) == (SAID, "end", 5)
    assert figures[1] in (6, 7)  # some servers count the token that ends an answer
    assert figures[2] is not None
    assert run(ours, "-p", "hi", "-n", "3").stdout == "中\n"
    assert run(ours, "-p", "hi", "--stop", "文").stdout == "中\n"
    assert run(ours, "--raw", "-p", "中").stdout == "文\n"
    refusal = str(run(ours, "-p", "x" * 200).exception)
    assert "the context holds 128; shorten it" in refusal
    assert "has no model x; it has dots1" in str(run(ours, "-p", "hi", "--model", "x").exception)


def test_a_long_dialogue_with_our_own_server_drops_old_turns(ours: str, tmp_path: Path) -> None:
    with Terminal(tmp_path, "chat", "--url", ours, "--temp", "0") as terminal:
        terminal.wait_for_prompt()
        shown = [terminal.enter("x" * 20) for _ in range(4)]
        assert [answered.splitlines()[0] for answered in shown] == [SAID] * 4
        assert "oldest turn" in terminal.text
        assert "of 128" in shown[-1]
