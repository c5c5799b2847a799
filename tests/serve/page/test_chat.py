"""Conversations on the page: asking, stopping, versions, keeping, exporting, attaching."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dots1_local.engine.engine import Engine
from tests.conftest import Converted
from tests.serve.page.browser import Open, Visit
from tests.serve.page.scripted import ScriptedScheduler, run_app, scripted_app
from tests.serve.served import Served


@pytest.fixture(scope="module")
def served(converted: Converted) -> Iterator[Served]:
    with Served(converted("DQ4")) as server:
        yield server


def test_a_conversation_with_a_real_model(visit: Open, served: Served, story: str) -> None:
    told = visit(f"http://127.0.0.1:{served.port}/")
    page = told.open()
    page.click("#open-settings")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max. tokens").fill("24")
    page.keyboard.press("Escape")
    assert told.asked("Tell me a story about a little cat.") == story.strip()
    assert "24 tokens" in page.locator(".stats").inner_text()
    assert "tok/s" in page.locator(".stats").inner_text()
    told.asked("And then?")
    assert [each["role"] for each in told.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert told.bodies[1]["messages"][1]["content"] == story
    used = page.locator("#context").inner_text()
    assert re.fullmatch(r"\d+ / 2,048", used)
    page.click("#tab-placement")
    page.wait_for_selector(".panel h2:has-text('RAM')")
    assert page.locator(".bar-label").all_inner_texts() == ["planned", "allocated"]
    assert told.trouble == []


def test_an_answer_can_be_stopped(chat: Visit, scheduler: ScriptedScheduler) -> None:
    scheduler.answers, scheduler.pause = [["one ", "two "], ["Once more."]], 0.0
    scheduler.go_on.clear()
    chat.ask("Count.")
    chat.page.wait_for_selector(".answer:has-text('one two')")
    chat.page.keyboard.press("Escape")
    chat.page.wait_for_selector(".note:has-text('Stopped')")
    while not scheduler.handles[0].done:  # the server learns of it
        chat.page.wait_for_timeout(10)
    assert chat.answer().strip() == "one two"
    scheduler.go_on.set()
    assert chat.asked("Go on.") == "Once more."


def test_versions_of_answers_and_questions(chat: Visit, scheduler: ScriptedScheduler) -> None:
    scheduler.answers = [["first"], ["second"], ["of the edited"]]
    assert chat.asked("What?") == "first"
    chat.page.click("[aria-label='Another answer']")
    chat.page.wait_for_selector(".answer:has-text('second')")
    assert chat.answer() == "second"
    chat.page.click("[aria-label='Previous version']")
    assert chat.answer() == "first"
    chat.page.hover(".message.user")
    chat.page.click("[aria-label='Edit']")
    chat.page.fill(".message.user textarea", "What else?")
    chat.page.keyboard.press("Enter")
    chat.page.wait_for_selector(".answer:has-text('edited')")
    assert chat.questions() == ["What else?"]
    assert [each["content"] for each in chat.bodies[2]["messages"]] == ["What else?"]
    chat.page.click("[aria-label='Previous version']")
    assert chat.questions() == ["What?"]
    assert chat.answer() == "first"


def test_a_reload_restores_conversations(chat: Visit, scheduler: ScriptedScheduler) -> None:
    scheduler.answers = [["about **cats**"], ["about dogs, and"]]
    chat.asked("Cats?")
    chat.page.keyboard.press("Control+Shift+O")
    scheduler.go_on.clear()
    chat.ask("Dogs?")
    chat.page.wait_for_selector(".answer:has-text('dogs')")
    chat.page.wait_for_function(  # a partial answer is kept every second or two
        """async () => {
            const open = indexedDB.open("dots1:/");
            await new Promise((resolve) => (open.onsuccess = resolve));
            const store = open.result.transaction("conversations").objectStore("conversations");
            const all = store.getAll();
            await new Promise((resolve) => (all.onsuccess = resolve));
            return all.result.length === 2;
        }"""
    )
    chat.open()
    titles = chat.page.locator("#conversations .name").all_inner_texts()
    assert titles == ["Dogs?", "Cats?"]
    chat.page.click("#conversations .open >> nth=1")
    assert chat.answer() == "about cats"
    assert chat.page.locator(".answer strong").inner_text() == "cats"
    chat.page.click("#conversations .open >> nth=0")
    assert chat.page.locator(".note").inner_text() == "Stopped"


def test_another_tab_shows_what_was_said(chat: Visit, scheduler: ScriptedScheduler) -> None:
    scheduler.answers = [["told"]]
    other = chat.context.new_page()
    other.goto(chat.url)
    other.wait_for_selector("body[data-ready]")
    chat.asked("Tell.")
    other.click("#conversations .open:has-text('Tell.')")
    other.wait_for_selector(".message.assistant:not(.writing) .answer:has-text('told')")
    assert chat.trouble == []


def test_a_browser_that_keeps_nothing(visit: Open, page_url: str, scheduler: Any) -> None:
    scheduler.answers = [["an answer"]]
    closed = visit(page_url)
    closed.context.add_init_script(
        """
        const refuse = () => { throw new DOMException("denied", "SecurityError"); };
        for (const name of ["localStorage", "sessionStorage"]) {
            Object.defineProperty(window, name, { get: refuse });
        }
        IDBFactory.prototype.open = refuse;
        """
    )
    page = closed.open()
    page.wait_for_selector("#notice:has-text('does not keep')")
    assert closed.asked("Hello?") == "an answer"
    assert closed.trouble == []


def test_an_export_comes_back(
    visit: Open, chat: Visit, page_url: str, scheduler: ScriptedScheduler, tmp_path: Path
) -> None:
    scheduler.answers = [["one"], ["two"]]
    chat.asked("中文?")
    chat.page.click("[aria-label='Another answer']")
    chat.page.wait_for_selector(".answer:has-text('two')")
    chat.answer()
    chat.page.click("#open-settings")
    chat.page.get_by_label("System prompt").fill("Be brief.")
    with chat.page.expect_download() as download:
        chat.page.click("text=Export all")
    download.value.save_as(tmp_path / "all.json")
    other = visit(page_url)
    page = other.open()
    page.click("#open-settings")
    page.set_input_files("#import-file", tmp_path / "all.json")
    page.wait_for_selector("#notice:has-text('1 conversations were imported')")
    page.keyboard.press("Escape")
    page.click("#conversations .open")
    assert other.questions() == ["中文?"]
    assert other.answer() == "two"
    page.click("[aria-label='Previous version']")
    assert other.answer() == "one"
    page.click("#open-settings")
    assert page.get_by_label("System prompt").input_value() == "Be brief."


def exported(messages: Any) -> str:
    """Return an export with one conversation, which has these messages."""
    conversation = {"title": "x", "created": 1, "updated": 1, "settings": {}, "shown": {}}
    content = [{**conversation, "messages": messages}]
    return json.dumps({"format": "dots1-conversations", "version": 1, "conversations": content})


def message(name: str, parent: str) -> dict[str, Any]:
    return {"id": name, "parent": parent, "role": "user", "text": "x", "created": 1}


BAD_EXPORTS = {
    "no JSON": "{",
    "another format": "[]",
    "no message": exported({"a": 1}),
    "a circle": exported({"a": message("a", "b"), "b": message("b", "a")}),
    "no parent": exported({"a": message("a", "elsewhere")}),
    "another role": exported({"a": {**message("a", ""), "role": "system"}}),
}


def test_a_bad_import_is_refused(chat: Visit, tmp_path: Path) -> None:
    chat.page.click("#open-settings")
    for name, content in BAD_EXPORTS.items():
        (tmp_path / f"{name}.json").write_text(content, encoding="utf-8")
        chat.page.set_input_files("#import-file", tmp_path / f"{name}.json")
        chat.page.wait_for_selector(f"#notice:has-text('{name}.json is not an export')")
    assert chat.page.locator("#conversations .open").count() == 0


def test_files_settings_and_deletion(
    chat: Visit, scheduler: ScriptedScheduler, tmp_path: Path
) -> None:
    scheduler.answers = [["read"]]
    (tmp_path / "notes.md").write_text("a\n```\nb\n```\n", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    page = chat.page
    page.set_input_files("#file-input", [tmp_path / "notes.md", tmp_path / "picture.png"])
    page.wait_for_selector("#notice:has-text('picture.png is not a text file')")
    page.click("#open-settings")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Top K").fill("7")
    page.get_by_label("Temperature").fill("9")  # out of range, so the default stays
    page.keyboard.press("Escape")
    chat.asked("What is in it?")
    body = chat.bodies[0]
    system, question = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert question["content"] == "notes.md:\n````\na\n```\nb\n```\n````\n\nWhat is in it?"
    assert (body["top_k"], body.get("temperature")) == (7, None)
    page.hover("#conversations li")
    page.click("[aria-label='Delete: What is in it?']")
    page.click("dialog >> text=Delete >> nth=-1")
    page.wait_for_selector(".welcome")
    chat.open()
    assert page.locator("#conversations .open").count() == 0


def test_the_end_stays_in_sight_until_the_user_scrolls(
    chat: Visit, scheduler: ScriptedScheduler
) -> None:
    text = "A paragraph.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n" * 12
    pieces = [text[at : at + 5] for at in range(0, len(text), 5)]
    scheduler.answers, scheduler.pause = [pieces, pieces], 0.002
    rest = "scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight"
    chat.asked("First?")
    assert chat.page.evaluate(rest) < 2
    chat.ask("Second?")
    chat.page.wait_for_selector(".writing .answer table")
    chat.page.hover("#scroller")
    chat.page.mouse.wheel(0, -600)
    chat.answer()
    assert chat.page.evaluate(rest) > 500  # less than the wheel: the end of an answer moves
    chat.page.click("#to-end")
    assert chat.page.evaluate(rest) < 2


def test_what_the_server_refuses_is_said(chat: Visit, scheduler: ScriptedScheduler) -> None:
    scheduler.answers = [["now it fits"]]
    chat.ask("x" * 5000)
    assert "4096 tokens" in chat.page.locator(".note.failed").inner_text()
    chat.page.click("[aria-label='Edit']")
    chat.page.fill(".message.user textarea", "y")
    chat.page.keyboard.press("Enter")
    chat.page.wait_for_selector(".answer:has-text('now it fits')")


def test_progress_of_a_prompt_is_shown(chat: Visit) -> None:
    """A stream may say how much of the prompt is read, as llama-server's does."""
    chunks = [
        {"choices": [], "prompt_progress": {"total": 4096, "cache": 0, "processed": 1024}},
        {"choices": [{"index": 0, "delta": {"content": "done"}, "finish_reason": None}]},
    ]
    lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    first, rest = lines.split("\n\n", 1)
    chat.page.evaluate(
        """([first, rest]) => {
            const real = window.fetch;
            window.fetch = (url, options) => {
                if (!String(url).endsWith("/chat/completions")) return real(url, options);
                window.asked = JSON.parse(options.body);
                const body = new ReadableStream({ start(to) {
                    to.enqueue(new TextEncoder().encode(first + "\\n\\n"));
                    window.goOn = () => {
                        to.enqueue(new TextEncoder().encode(rest + "data: [DONE]\\n\\n"));
                        to.close();
                    };
                } });
                return Promise.resolve(new Response(body));
            };
        }""",
        [first, rest],
    )
    chat.ask("Read this.")
    chat.page.wait_for_selector(".progress:has-text('1,024 of 4,096 tokens')")
    assert chat.page.evaluate("asked.return_progress")
    chat.page.evaluate("goOn()")
    assert chat.answer() == "done"


def test_the_page_waits_for_the_model(visit: Open, engine: Engine) -> None:
    app = scripted_app(engine, ScriptedScheduler())
    loading = [True]

    async def gate(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        from starlette.responses import JSONResponse

        if loading and scope["path"] == "/v1/models":
            error = {"error": {"message": "loading", "type": "x", "param": None, "code": None}}
            await JSONResponse(error, 503)(scope, receive, send)
        else:
            await app(scope, receive, send)

    with run_app(gate) as url:
        waiting = visit(url)
        page = waiting.open(ready=False)
        page.wait_for_selector("#notice:has-text('loading the model')")
        loading.clear()
        page.wait_for_selector("body[data-ready]")
        assert not page.is_visible("#notice")
