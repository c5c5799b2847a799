"""The pictures of the chat page in docs/img, taken anew.

    python -m tools.page_screenshots

It needs Chromium, and a font with Chinese characters. A script speaks in place of the model, as
fast as `dots1 plan` predicts for the machine of the third picture; no such machine is needed.
"""

import re
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from playwright.sync_api import Browser, Page

from dots1_local.engine.engine import Engine
from tests.helpers import write_random_gguf
from tests.serve.page.browser import launch
from tests.serve.page.scripted import ScriptedScheduler, full_size_placement, run_app, scripted_app

FOLDER = Path(__file__).parent.parent / "docs" / "img"
MACHINE, CONTEXT = "24gb-64gb", 16_384
MOST_BYTES = 150_000  # of a picture
DESKTOP: dict[str, Any] = {"viewport": {"width": 1200, "height": 880}, "color_scheme": "light"}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "device_scale_factor": 1.5,
    "is_mobile": True, "has_touch": True,
}  # fmt: skip

QUESTION = "How does a mixture-of-experts layer choose its experts?"
ANSWER = """\
A small matrix, the **router**, scores every expert for each token, and the best few are used:

1. The token's hidden state times the router's matrix gives a score for each expert.
2. A sigmoid turns the scores into weights between 0 and 1.
3. The best six of 128 are computed, and their outputs are added up by weight.

```python
def route(hidden, gate, bias, top=6):
    scores = 1 / (1 + np.exp(-hidden @ gate.T))
    chosen = np.argsort(-(scores + bias))[:top]  # the bias balances the load
    return chosen, scores[chosen] / scores[chosen].sum() * 2.5
```

| part | read for each token |
|---|--:|
| routed experts | 6 of 128 |
| shared experts | all |
| attention | all |
"""
CHINESE = """\
杭州是浙江省的省会，以**西湖**闻名。

- 龙井茶产自西湖边的山丘。
- 京杭大运河从这里开始，一直通到北京。
- 许多互联网公司的总部设在这里。

> 上有天堂，下有苏杭。
"""


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as name, launch() as browser:
        folder = Path(name)
        placement = full_size_placement(folder, MACHINE)
        speed = placement["predicted"]["speeds"][0]["decode"]
        model = write_random_gguf(folder / "model.gguf", context=CONTEXT)
        with Engine.open(model, n_ctx=CONTEXT, threads=1) as engine:
            scheduler = ScriptedScheduler([_pieces(ANSWER), _pieces(CHINESE)], pause=1 / speed)
            app = scripted_app(engine, scheduler, placement, name="dots.llm1")
            with run_app(app) as url:
                _chat(browser, url)
                _phone(browser, url)
                _placement(browser, url)
    large = [path.name for path in FOLDER.glob("page-*.png") if path.stat().st_size > MOST_BYTES]
    if large:
        sys.exit(f"{', '.join(large)}: larger than {MOST_BYTES:,} bytes")


def _chat(browser: Browser, url: str) -> None:
    page = _open(browser, url, DESKTOP)
    _ask(page, QUESTION)
    page.mouse.move(0, 0)
    page.screenshot(path=FOLDER / "page-chat.png")


def _phone(browser: Browser, url: str) -> None:
    page = _open(browser, url, PHONE)
    page.click("#open-sidebar")
    page.click("#switch-language")
    page.keyboard.press("Escape")
    _ask(page, "用三句话介绍一下杭州")
    page.screenshot(path=FOLDER / "page-phone.png")


def _placement(browser: Browser, url: str) -> None:
    page = _open(browser, url, {**DESKTOP, "viewport": {"width": 1200, "height": 1000}})
    page.click("#tab-placement")
    page.wait_for_selector(".slot")
    page.locator(".map").first.focus()
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    page.screenshot(path=FOLDER / "page-placement.png")


def _open(browser: Browser, url: str, options: dict[str, Any]) -> Page:
    page = browser.new_context(**options).new_page()
    page.goto(url)
    page.wait_for_selector("body[data-ready]")
    return page


def _ask(page: Page, question: str) -> None:
    page.fill("#draft", question)
    page.keyboard.press("Enter")
    page.wait_for_selector(".stats", timeout=120_000)
    time.sleep(1)  # until code has its colours


def _pieces(text: str) -> list[str]:
    """Return a text in pieces of about a token."""
    return re.findall(r"\n+| ?[\w'-]+|[一-鿿]{1,2}| ?[^\w\s]| +", text)


if __name__ == "__main__":
    main()
