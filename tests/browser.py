"""A headless Chromium for tests: opens a page, says what happened, takes its picture."""

from __future__ import annotations

import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Visit", "find_browser", "visit"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_REPORT = "browser-test-report"

# Put before everything else in a page: collects errors, and writes them and what was found into the
# document when all is loaded, where --dump-dom shows it.
_PROBE = """<script>(() => {
  const errors = [];
  addEventListener("error", (event) => errors.push(String(event.message || event.target.src
    || event.target.href || event.type)), true);
  addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
  addEventListener("securitypolicyviolation", (event) => errors.push(event.blockedURI));
  const shout = console.error;
  console.error = (...words) => { errors.push(words.join(" ")); shout(...words); };
  addEventListener("load", () => setTimeout(() => {
    const box = (node) => { const r = node.getBoundingClientRect(); return [r.width, r.height]; };
    const found = {
      errors,
      background: getComputedStyle(document.body).backgroundColor,
      drawings: [...document.querySelectorAll("svg[role=img]")].map((svg) => ({
        label: svg.getAttribute("aria-label"), size: box(svg),
        shapes: svg.querySelectorAll("path, rect, use, line, circle").length })),
      images: [...document.images].map((image) => ({ source: image.getAttribute("src"),
        size: [image.naturalWidth, image.naturalHeight] })),
      tables: [...document.querySelectorAll("table")].filter((t) => t.querySelector("th button"))
        .map((table) => {
          const key = (row, k) => Number(row.cells[k].dataset.sort);
          const column = (k) => [...table.tBodies[0].rows].map((row) => key(row, k));
          return [...table.querySelectorAll("th")].flatMap((heading, k) => {
            const button = heading.querySelector("button");
            if (!button) return [];
            const before = column(k);
            button.click();
            const rising = column(k);
            button.click();
            return [{ heading: button.textContent, before, rising, falling: column(k) }];
          });
        }),
      wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
      requests: performance.getEntriesByType("resource").map((entry) => entry.name),
    };
    const note = document.createElement("script");
    note.type = "application/json";
    note.id = "browser-test-report";
    note.textContent = JSON.stringify(found);
    document.documentElement.append(note);
  }, 300));
})();</script>"""


@dataclass(frozen=True)
class Visit:
    """What a browser found on a page.

    Attributes:
        errors: Messages of the page's own scripts, of the console, and of refused requests.
        background: Colour behind the page.
        drawings: Inline pictures: label, size in pixels, number of shapes.
        images: Image elements: address, natural size in pixels, which is 0 where it failed.
        tables: Of every sortable table, for each heading the column's sort keys before, and after
            the first and the second click.
        wide: Whether the page is wider than the window.
        requests: Addresses that were loaded beside the page itself.
    """

    errors: list[str]
    background: str
    drawings: list[dict[str, object]]
    images: list[dict[str, object]]
    tables: list[list[dict[str, object]]]
    wide: bool
    requests: list[str] = field(default_factory=list)


@functools.cache
def find_browser() -> str | None:
    """Path of a Chromium or Chrome, or of the one that playwright has installed."""
    for name in (os.environ.get("CHANPRUNE_BROWSER", ""), *_NAMES):
        found = shutil.which(name) if name else None
        if found:
            return found
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


def visit(
    page: Path, *, dark: bool = False, picture: Path | None = None, width: int = 1200
) -> Visit:
    """Opens a page of files in a browser that resolves no host, and sorts its tables.

    Args:
        page: An HTML file. A copy with a probe is put beside it and removed afterwards.
        dark: Ask for the dark theme.
        picture: Also write a screenshot there, as PNG.
        width: Of the window, in pixels.
    """
    browser = find_browser()
    assert browser is not None, "ask find_browser first"
    text = page.read_text(encoding="utf-8")
    copy = page.with_name(f".probed-{page.name}")
    copy.write_text(re.sub(r"(<head[^>]*>)", lambda m: m[0] + _PROBE, text, count=1), "utf-8")
    try:
        with tempfile.TemporaryDirectory() as profile:
            command = [
                *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update"),
                *("--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files"),
                *(f"--user-data-dir={profile}", f"--window-size={width},2000"),
                *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=6000"),
                *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            ]
            done = _run([*command, "--dump-dom", copy.as_uri()])
            if picture is not None:
                _run([*command, f"--screenshot={picture}", "--hide-scrollbars", page.as_uri()])
    finally:
        copy.unlink()
    note = re.search(rf'id="{_REPORT}"[^>]*>(.*?)</script>', done.stdout, re.DOTALL)
    assert note is not None, f"the page did not come to its end: {done.stderr[-2000:]}"
    found = Visit(**json.loads(html.unescape(note[1]) if "&quot;" in note[1] else note[1]))
    console = re.findall(r"CONSOLE[:(].*", done.stderr)
    found.errors.extend(line for line in console if "error" in line.lower())
    return found


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


if __name__ == "__main__":  # python tests/browser.py PAGE PICTURE [dark]
    print(visit(Path(sys.argv[1]), dark="dark" in sys.argv, picture=Path(sys.argv[2])))
