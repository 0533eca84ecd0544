"""Reports and documentation in a real browser: no error, every picture drawn, nothing loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import find_browser, visit
from test_report import example_report

from chanprune_ext.report import write_report

if TYPE_CHECKING:
    from browser import Visit

ROOT = Path(__file__).parents[2]
PAGES = sorted(page.stem for page in (ROOT / "docs").glob("*.md"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_browser() is None,
        reason="no browser: install chromium or google-chrome, or name one in CHANPRUNE_BROWSER",
    ),
]


def brightness(found: Visit) -> float:
    """Of the background, 0 to 255."""
    numbers = found.background.partition("(")[2].rstrip(")").split(",")[:3]
    return sum(float(number) for number in numbers) / 3


def assert_sound(found: Visit) -> None:
    assert found.errors == []
    for drawing in found.drawings:
        width, height = drawing["size"]
        assert width > 100, drawing
        assert height > 40, drawing
        assert drawing["shapes"] >= 4, drawing
    for image in found.images:
        assert min(image["size"]) > 0, image


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_report_is_drawn_and_sorted(tmp_path: Path, dark: bool) -> None:
    page = write_report(example_report(), tmp_path)
    found = visit(page, dark=dark)
    assert_sound(found)
    assert len(found.drawings) == 5
    assert found.requests == []
    assert not found.wide
    assert (brightness(found) < 80) == dark
    assert len(found.tables) == 3
    for table in found.tables:
        assert table
        for column in table:
            assert column["rising"] == sorted(column["before"])
            assert column["falling"] == sorted(column["before"], reverse=True)


def test_a_report_fits_a_telephone(tmp_path: Path) -> None:
    found = visit(write_report(example_report(), tmp_path), width=500)
    assert_sound(found)
    assert not found.wide


def test_what_is_wrong_with_a_page_is_seen(tmp_path: Path) -> None:
    """The browser would tell: otherwise the other tests could not fail."""
    page = tmp_path / "page.html"
    page.write_text(
        "<!DOCTYPE html><html><head><title>x</title></head><body>"
        "<svg role='img' aria-label='empty' width='200' height='100'></svg>"
        "<img src='missing.png'><script>console.error('first');</script>"
        "<script>nothing.at.all</script>"
        "<script src='https://example.org/a.js'></script></body></html>"
    )
    found = visit(page)
    told = "\n".join(found.errors)
    assert "first" in told
    assert "nothing is not defined" in told
    assert "missing.png" in told
    assert "https://example.org/a.js" in told
    assert any("example.org" in address for address in found.requests)
    assert found.images[0]["size"] == [0, 0]
    assert found.drawings[0]["shapes"] == 0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_the_documentation_is_drawn(site: Path, page: str) -> None:
    found = visit(site / f"{page}.html", dark=page == "how-it-works")
    assert_sound(found)
    assert all(address.startswith("file:") for address in found.requests)
    assert not found.wide
    if page == "how-it-works":
        assert len(found.drawings) >= 4
        assert brightness(found) < 80
    if page == "benchmarks":
        assert found.images
