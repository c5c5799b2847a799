"""The page in other languages, widths, themes and places, and the view of what is where."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

import dots1_local
from dots1_local.engine.engine import Engine
from dots1_local.serve.scheduler import Load, SlotState
from tests.serve.page.browser import Open, Visit
from tests.serve.page.scripted import ScriptedScheduler, run_app, scripted_app

PAGE = Path(dots1_local.__file__).parent / "serve" / "page"
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}


@pytest.fixture
def placed_url(
    engine: Engine, scheduler: ScriptedScheduler, two_devices: dict[str, Any]
) -> Iterator[str]:
    with run_app(scripted_app(engine, scheduler, two_devices)) as url:
        yield url


def test_chinese(visit: Open, page_url: str, scheduler: ScriptedScheduler) -> None:
    scheduler.answers = [["你好,", "世界。"]]
    chinese = visit(page_url)
    chinese.context.add_init_script(
        "Object.defineProperty(navigator, 'language', { get: () => 'zh-CN' })"
    )
    page = chinese.open()
    assert page.get_attribute("html", "lang") == "zh-CN"
    assert page.inner_text("#new-chat") == "新对话"
    page.focus("#draft")
    ime = chinese.context.new_cdp_session(page)
    ime.send("Input.imeSetComposition", {"text": "ni hao", "selectionStart": 6, "selectionEnd": 6})
    page.dispatch_event("#draft", "keydown", {"key": "Enter", "isComposing": True})
    assert chinese.questions() == []  # Enter chose a word, and sent nothing
    ime.send("Input.insertText", {"text": "你好吗?"})
    page.keyboard.press("Enter")
    assert chinese.answer() == "你好,世界。"
    assert chinese.questions() == ["你好吗?"]
    assert "个 token" in page.inner_text(".stats")
    page.click("#switch-language")
    assert page.inner_text("#new-chat") == "New conversation"
    chinese.open()
    assert page.get_attribute("html", "lang") == "en"


def test_both_languages_say_everything() -> None:
    texts = (PAGE / "texts.js").read_text(encoding="utf-8")
    english, chinese = texts.split("\n  zh: {")
    keys = [re.findall(r"^    (\w+): \"", part, re.MULTILINE) for part in (english, chinese)]
    assert keys[0] == keys[1] == sorted(set(keys[0]), key=str.lower)
    holes = [re.findall(r"^    (\w+): (.*)$", part, re.MULTILINE) for part in (english, chinese)]
    for (key, one), (_, other) in zip(*holes, strict=True):
        assert sorted(re.findall(r"\{\w+\}", one)) == sorted(re.findall(r"\{\w+\}", other)), key
    sources = [path for path in PAGE.glob("*.*") if path.name != "texts.js"]
    used = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert [key for key in keys[0] if f'"{key}"' not in used] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_never_scrolls_sideways(
    visit: Open, placed_url: str, scheduler: ScriptedScheduler, scheme: str
) -> None:
    scheduler.answers = [["a" * 300 + "\n\n```\n" + "b" * 300 + "\n```\n\n| c | d |\n|-|-|\n|1|2|"]]
    phone = visit(placed_url, color_scheme=scheme, **PHONE)
    page = phone.open()

    def wide() -> bool:
        return bool(page.evaluate("document.documentElement.scrollWidth > innerWidth"))

    assert not wide()
    phone.asked("x" * 200)
    assert not wide()
    page.click("#open-sidebar")
    assert page.evaluate("document.activeElement.id") == "new-chat"
    page.click("#open-settings")
    assert not wide()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.click("#tab-placement")
    page.wait_for_selector(".map")
    assert not wide()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(25, 24, 23)") == (scheme == "dark")


def test_the_theme_can_be_chosen(chat: Visit) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light = chat.page.evaluate(colour)
    chat.page.click("#switch-theme")
    dark = chat.page.evaluate(colour)
    assert light != dark
    chat.open()
    assert chat.page.evaluate(colour) == dark


def test_behind_a_path_prefix(
    visit: Open, engine: Engine, scheduler: ScriptedScheduler, two_devices: dict[str, Any]
) -> None:
    """As behind nginx with `location /llm/ { proxy_pass http://127.0.0.1:8000/; }`."""
    scheduler.answers = [["```python\nx = 1\n```"]]
    app = scripted_app(engine, scheduler, two_devices)

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix("/llm/") if scope["path"].startswith("/llm/") else "none"
        await app({**scope, "path": f"/{path}", "raw_path": f"/{path}".encode()}, receive, send)

    with run_app(proxy) as url:
        remote = visit(f"{url}llm/")
        page = remote.open()
        remote.asked("Code?")
        page.wait_for_selector(".hljs-number")  # loaded when it was needed
        page.click("#tab-placement")
        page.wait_for_selector(".map")
        assert all(each.startswith(f"{url}llm/") for each in remote.requests)
        assert remote.trouble == []


def test_what_is_where(
    visit: Open, placed_url: str, scheduler: ScriptedScheduler, two_devices: dict[str, Any]
) -> None:
    scheduler.load = Load(1, 2, 2)
    scheduler.slots = (SlotState(0, 5000, True, 4000, 1000), SlotState(1, 800))
    scheduler.cache.disk_used = 3_200_000_000
    shown = visit(placed_url)
    page = shown.open()
    page.click("#tab-placement")
    page.wait_for_selector(".slot")
    assert page.locator(".panel h2").nth(0).inner_text().split("\n")[0].startswith("CUDA0")
    assert "RAM" in page.locator(".panel h2").nth(1).inner_text()
    assert page.locator(".bar").count() == 4  # planned and allocated, on both
    gpu, ram = (page.locator(".panel").nth(number) for number in (0, 1))
    routed = {
        each["name"]: f"{each['planned']['routed'] / 1e9:.1f} GB" for each in two_devices["devices"]
    }
    for panel, name in ((gpu, "CUDA0"), (ram, "CPU")):
        label = panel.locator(".bar").first.get_attribute("aria-label") or ""
        assert f"routed experts {routed[name]}" in label
    layers = gpu.locator(".map").get_attribute("aria-label") or ""
    assert "KV cache 62" in layers
    gpu.locator(".map").focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    tip = page.inner_text(".tip")
    assert tip.startswith("Layer 1\nattention: 71.3 MB, Q8_0\n")
    assert page.locator(".cards").inner_text().count("17.1 tok/s") == 1
    assert "1 running, 2 waiting" in page.inner_text(".cards")
    assert "3.2 GB on disk" in page.inner_text(".cards")
    assert page.locator(".slot").all_inner_texts()[0].split("\n")[-1] == "5,000 / 16,384"
    scheduler.slots = (SlotState(0, 5100, True, 4000, 1100), SlotState(1, 800))
    page.wait_for_selector(".cards :text('measured · now')")
    page.click(".legend >> text=KV cache")
    faded = "() => getComputedStyle(document.querySelector('.segment.attention')).opacity < 0.5"
    page.wait_for_function(faded)
    assert page.locator("#placement *").count() < 600  # 62 layers are a few paths
    assert shown.trouble == []


def test_the_placement_in_json(two_devices: dict[str, Any]) -> None:
    """Parts and devices agree, and nothing of the file is missing."""
    weights = [part for part in two_devices["parts"] if part["role"] != "kv"]
    assert abs(sum(part["bytes"] for part in weights) / two_devices["model"]["bytes"] - 1) < 1e-3
    for device in two_devices["devices"]:
        for role in ("attention", "routed", "shared", "kv", "embedding"):
            parts = [
                part["bytes"]
                for part in two_devices["parts"]
                if (part["role"], part["device"]) == (role, device["name"])
            ]
            assert sum(parts) == device["planned"][role], (device["name"], role)
    json.dumps(two_devices, allow_nan=False)


def test_shortcuts(chat: Visit, scheduler: ScriptedScheduler) -> None:
    scheduler.answers = [["one"]]
    page = chat.page
    chat.asked("First?")
    page.keyboard.press("ArrowUp")
    assert page.locator(".message.user textarea").input_value() == "First?"
    page.keyboard.press("Escape")
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("nothing like it")
    assert page.locator("#conversations .open").count() == 0
    page.keyboard.press("Control+.")
    assert page.is_visible("#placement")
    page.keyboard.press("Control+Shift+O")
    assert page.is_visible(".welcome")
    page.locator("#tab-chat").focus()
    page.keyboard.press("?")
    assert page.locator(".keys dt").count() == page.locator(".keys dd").count() > 6
