"""A real Chromium without a window."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from conftest import ROOT
from playwright.sync_api import Browser, Page, sync_playwright

SHOTS = ROOT / "screenshots"  # kept by CI, not by git
LOCAL = ("file:", "data:", "blob:")


@dataclass
class Seen:
    """A page with what its console complained of and what it asked the network for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def shoot(self, name: str) -> None:
        SHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


@dataclass(frozen=True)
class Chromium:
    browser: Browser

    def open(self, address: str, **options: Any) -> Seen:
        """Open a page in a window of its own."""
        seen = Seen(self.browser.new_context(**options).new_page())
        page = seen.page
        page.on("console", lambda said: said.type == "error" and seen.complaints.append(said.text))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(LOCAL) or seen.requests.append(asked.url))
        page.set_default_timeout(10_000)
        page.goto(address)
        return seen


@contextmanager
def started() -> Iterator[Chromium]:
    """Start the Chromium of the system, without which tests marked `chromium` are skipped."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            yield Chromium(browser)
        finally:
            browser.close()
