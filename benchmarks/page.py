"""How long does Chromium take to draw a report? `python -m benchmarks.page report.html` prints milliseconds."""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

# The browser itself notes when a row of the table and the first figure are there.
WATCH = """
window.drawn = {};
new MutationObserver(() => {
  for (const [name, what] of [["table", "table.dataTable tbody td:nth-child(2)"], ["figure", ".chart[data-drawn=yes]"]])
    if (!drawn[name] && document.querySelector(what)) drawn[name] = performance.now();
}).observe(document, { subtree: true, childList: true, attributes: true });
"""


def opened(browser: Browser, page: Path) -> dict[str, float]:
    """Open a page in a new window, scroll to its first figure, and return when table and figure were there."""
    window = browser.new_context()
    tab = window.new_page()
    tab.add_init_script(WATCH)
    tab.goto(page.absolute().as_uri())
    tab.locator(".chart").first.scroll_into_view_if_needed()
    tab.wait_for_selector(".chart[data-drawn=yes]")
    found: dict[str, float] = tab.evaluate("drawn")
    window.close()
    return found


def main() -> None:
    """Print the median and the range of several openings."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=main.__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--times", type=int, default=10)
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        times = [opened(browser, arguments.page) for _ in range(arguments.times)]
    for name in ("table", "figure"):
        values = [one[name] for one in times]
        print(f"{name}: median {statistics.median(values):.0f} ms, {min(values):.0f} to {max(values):.0f}")


if __name__ == "__main__":
    main()
