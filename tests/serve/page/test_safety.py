"""What a hostile model, a stranger and another site cannot do."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Page

import dots1_local
from dots1_local.engine.engine import Engine
from tests.serve.page.browser import Open, Visit
from tests.serve.page.scripted import ScriptedScheduler, run_app, scripted_app
from tests.serve.served import connect

PAGE = Path(dots1_local.__file__).parent / "serve" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
HOSTILE = """
<script>alert("script"); document.title = "taken"</script>
<img src="https://evil.example/a.png" onerror="alert('image')">
<svg onload="alert('svg')"><use href="https://evil.example/b.svg#x"/></svg>
<iframe src="https://evil.example/" srcdoc="<script>alert('frame')</script>"></iframe>
<style>@import url(https://evil.example/c.css); body { display: none }</style>
<link rel="stylesheet" href="https://evil.example/d.css"><base href="https://evil.example/">
<form action="https://evil.example/"><button>x</button><input name="key" autofocus onfocus=alert(1)></form>
<meta http-equiv="refresh" content="0;url=https://evil.example/">
<a href="javascript:alert('raw link')" id="draft" name="body">raw</a> <math><mtext></form><mglyph>

![picture](https://evil.example/e.png "t") ![](data:image/svg+xml,<svg onload=alert(2)>)
[web](https://example.com/a?b=c) [script](javascript:alert('link')) [data](data:text/html,x)
[relative](../v1/models) <https://example.com/auto> [mail](mailto:a@example.com)
[x](https://example.com/"onmouseover="alert(3)) `<b onclick=alert(4)>`

| a | b |
|---|
| <td onclick=alert(5)> **open [ ![ <

```html
<script>alert("code")</script>
```
1. ```
   never closed
> * - + 1. # [[[((( *** ___ ~~~ <!-- $$ \\\\[
"""  # noqa: E501
LINES = [
    "plain text with **strong** and `code`", "- an item", "# heading", "> quote", "| a | b |",
    "1. one", "```", "x = 1", "```", "", "*" * 40, "[" * 40, "<" * 20, "$$", "_a_ " * 9,
]  # fmt: skip


@pytest.mark.parametrize("cut", [3, 1000], ids=["in small pieces", "in large pieces"])
def test_a_hostile_answer_does_nothing(chat: Visit, scheduler: ScriptedScheduler, cut: int) -> None:
    pieces = [HOSTILE[at : at + cut] for at in range(0, len(HOSTILE), cut)]
    scheduler.answers = [pieces, ["fine"]]
    chat.asked("Attack.")
    chat.page.wait_for_timeout(300)  # for what may come late
    assert chat.trouble == []  # no dialog, and not even a violation of the policy
    assert len(chat.hosts()) == 1
    assert chat.page.title() == "Attack. · dots1"
    forbidden = (
        "script, img, iframe, svg:not(.icon), style, link, form, button:not(.plain), [onclick]"
    )
    assert chat.page.locator(".answer").locator(forbidden).count() == 0
    attributes = chat.page.eval_on_selector_all(
        ".answer *", "all => [...new Set(all.flatMap(each => each.getAttributeNames()))].sort()"
    )
    assert not [name for name in attributes if name.startswith("on") or name in ("id", "style")]
    links = chat.page.eval_on_selector_all(
        ".answer a", "all => all.map(each => [each.getAttribute('href'), each.target, each.rel])"
    )
    assert {href.split(":")[0] for href, _, _ in links} == {"https", "mailto"}
    assert {(target, rel) for _, target, rel in links} == {("_blank", "noopener noreferrer")}
    shown = chat.page.locator(".answer").inner_text()
    assert '<script>alert("script")' in shown  # what was written can be read
    assert "image, not loaded: picture" in shown
    assert chat.asked("Still there?") == "fine"


def watch(page: Page) -> None:
    """Measure the longest task of the page's thread from now on: it answers no click meanwhile."""
    page.evaluate(
        """() => {
            window.longest = 0;
            new PerformanceObserver((list) => {
                for (const task of list.getEntries()) longest = Math.max(longest, task.duration);
            }).observe({ type: "longtask" });
        }"""
    )


def in_pieces(text: str) -> list[str]:
    return [text[at : at + 400] for at in range(0, len(text), 400)]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(LINES[n % len(LINES)] for n in range(10_000)) + "\n",
        "```python\n" + "x = 1  # and so on\n" * 10_000 + "```\n",
        "- an item\n" * 10_000,
    ],
    ids=["all kinds of lines", "code", "a list"],
)
def test_10_000_lines_do_not_freeze_the_page(
    chat: Visit, scheduler: ScriptedScheduler, text: str
) -> None:
    scheduler.answers = [in_pieces(f"{text}\n\nthe end")]
    watch(chat.page)
    assert chat.asked("Write much.").endswith("the end")
    assert chat.page.evaluate("longest") < 1500  # milliseconds; a tenth of it if nothing else runs
    assert chat.trouble == []


def test_repeated_marks_do_not_freeze_the_page(chat: Visit, scheduler: ScriptedScheduler) -> None:
    """Marks that let simple parsers of Markdown look at the rest of the text again and again."""
    watch(chat.page)
    for mark in ("[", "*", "`", "<", "![", "\\[", "$$", "> ", "- ", "_a", "&", "~", "1. > "):
        scheduler.answers = [in_pieces(mark * 20_000 + "\n\nend")]
        chat.page.keyboard.press("Control+Shift+O")
        assert chat.asked("Repeat.").rstrip().endswith("end")
        assert chat.page.evaluate("longest") < 3000, mark


@pytest.fixture
def locked_url(engine: Engine, scheduler: ScriptedScheduler) -> Iterator[str]:
    with run_app(scripted_app(engine, scheduler, api_key="secret")) as url:
        yield url


def test_the_key_is_asked_for(visit: Open, locked_url: str, scheduler: ScriptedScheduler) -> None:
    scheduler.answers = [["opened"]]
    guest = visit(locked_url)
    page = guest.open(ready=False)
    page.get_by_label("API key", exact=True).last.fill("wrong")
    page.click("dialog >> text=Save")
    page.wait_for_selector("dialog >> text=does not take this key")
    page.get_by_label("API key", exact=True).last.fill("secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("body[data-ready]")
    assert guest.asked("Hello?") == "opened"
    guest.open()  # the tab keeps the key
    other = guest.context.new_page()
    other.goto(locked_url)
    other.wait_for_selector("dialog[open]")  # another tab does not
    assert not any("secret" in url for url in guest.requests)


def test_the_key_can_be_remembered(visit: Open, locked_url: str) -> None:
    guest = visit(locked_url)
    page = guest.open(ready=False)
    page.get_by_label("API key", exact=True).last.fill("secret")
    page.get_by_label("Remember it").check()
    page.click("dialog >> text=Save")
    page.wait_for_selector("body[data-ready]")
    other = guest.context.new_page()
    other.goto(locked_url)
    other.wait_for_selector("body[data-ready]")
    other.click("#open-settings")
    other.click("text=Forget the key")
    other.reload()
    other.wait_for_selector("dialog[open]")


@dataclass
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes


def get(url: str, path: str, **headers: str) -> Reply:
    """Ask for a path as it is written, with all its dots and slashes."""
    with closing(connect(int(url.rstrip("/").rpartition(":")[2]))) as connection:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET", path, headers=named)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, found, response.read())


def test_files_need_no_key_and_the_api_does(locked_url: str) -> None:
    page = get(locked_url, "/")
    assert page.status == 200
    assert page.headers["content-security-policy"] == POLICY
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for path in ("/v1/models", "/v1/placement", "/slots", "/metrics", "/page/none.js"):
        assert get(locked_url, path).status == 401, path


def test_only_the_pages_files_are_served(page_url: str) -> None:
    for path in (
        "/page/", "/page/../http/app.py", "/page/..%2fhttp/app.py", "/index.html",
        "/page/index.html", "/page/vendor/../main.js", "/page",
    ):  # fmt: skip
        assert get(page_url, path).status == 404, path
    main = get(page_url, "/page/main.js")
    assert main.body == (PAGE / "main.js").read_bytes()
    assert main.headers["content-type"] == "text/javascript; charset=utf-8"
    assert main.headers["content-security-policy"] == POLICY
    packed = get(page_url, "/page/main.js", accept_encoding="br, gzip")
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == main.body
    again = get(page_url, "/page/main.js", if_none_match=main.headers["etag"])
    assert (again.status, again.body) == (304, b"")


def test_without_the_page_there_is_nothing_at_the_root(engine: Engine) -> None:
    with run_app(scripted_app(engine, ScriptedScheduler(), page=False)) as url:
        assert get(url, "/").status == get(url, "/page/main.js").status == 404
        assert json.loads(get(url, "/").body)["error"]["type"] == "not_found_error"
        assert get(url, "/v1/models").status == 200


def test_vendored_files_are_what_the_registry_had() -> None:
    packages = json.loads((PAGE / "vendor" / "versions.json").read_text())["packages"]
    recorded = {name: digest for each in packages for name, digest in each["sha256"].items()}
    found = {
        path.relative_to(PAGE / "vendor").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (PAGE / "vendor").rglob("*")
        if path.is_file() and path.name != "versions.json"
    }
    assert found == recorded
    assert all(each["integrity"].startswith("sha512-") for each in packages)
    assert {each["license"] for each in packages} == {"MIT", "Apache-2.0", "BSD-3-Clause"}


def test_the_page_names_no_other_host() -> None:
    """The name of SVG is no address that anybody asks."""
    found = {
        match[1]
        for path in PAGE.rglob("*.*")
        if path.suffix in (".js", ".css", ".html", ".svg") and "vendor" not in path.parts
        for match in re.finditer(r"(?:https?:)?//([\w.-]+\.\w+)", path.read_text(encoding="utf-8"))
    }
    assert found == {"www.w3.org"}
