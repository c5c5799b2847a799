"""A headless Chromium that tests drive, which may talk to nothing but the server under test."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from shutil import which
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

__all__ = ["Visit", "launch"]

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
TIMEOUT = 15_000  # milliseconds


@contextmanager
def launch() -> Iterator[Browser]:
    """Start Chromium, or skip the test if there is none."""
    program = next(filter(None, map(which, _PROGRAMS)), None)
    if program is None:
        pytest.skip("there is no Chromium; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(_OPTIONS))
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page in a profile of its own, and what it has asked, said and shown since it opened.

    `requests` are all addresses that it asked for, `trouble` what it logged as an error.
    """

    browser: Browser
    url: str
    options: dict[str, Any] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context = self.browser.new_context(locale="en-US", **self.options)
        self.context.set_default_timeout(TIMEOUT)
        self.context.on("page", self._watch)
        self.page = self.context.new_page()

    def _watch(self, page: Page) -> None:
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("request", self._keep_body)
        page.on("pageerror", lambda error: self.trouble.append(str(error)))
        page.on("dialog", self._keep_dialog)
        page.on("console", self._keep_error)

    def _keep_dialog(self, dialog: Any) -> None:
        self.trouble.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def _keep_error(self, said: Any) -> None:
        if said.type == "error":
            self.trouble.append(said.text)

    def _keep_body(self, request: Any) -> None:
        if request.url.endswith("/chat/completions"):
            self.bodies.append(request.post_data_json)

    def open(self, path: str = "", *, ready: bool = True) -> Page:
        """Open the page; with `ready`, wait until it knows the model."""
        self.page.goto(self.url + path)
        if ready:
            self.page.wait_for_selector("body[data-ready]")
        return self.page

    def ask(self, text: str) -> None:
        """Send a message."""
        self.page.fill("#draft", text)
        self.page.keyboard.press("Enter")

    def asked(self, text: str) -> str:
        """Send a message; return the text of its answer when that has ended."""
        self.ask(text)
        return self.answer()

    def answer(self) -> str:
        """Return the text of the last answer when it has ended."""
        self.page.wait_for_selector(".message.assistant:last-child:not(.writing)")
        return self.page.locator(".answer").last.inner_text()

    def questions(self) -> list[str]:
        return self.page.locator(".said").all_inner_texts()

    def hosts(self) -> set[str]:
        """Return where requests went to."""
        return {urlsplit(url).netloc for url in self.requests if not url.startswith("blob:")}

    def close(self) -> None:
        self.context.close()


Open = Callable[..., Visit]
