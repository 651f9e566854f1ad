"""Every HTML page in a real browser: no request, no complaint, nothing wider than a phone, all of it by keyboard, light and dark."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from olmodebug.render.html import html
from olmodebug.report import read
from tests.browser import NAMES, Browser, chromium
from tests.reports import REPORTS, SAMPLES
from tests.test_render_formats import REPORT
from tests.test_render_html import PARITY, SHAPES, TRAINING

PROGRAM = chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason=f"no headless browser is installed: none of {', '.join(NAMES)} is on the path"),
]

HAND_MADE = sorted((Path(__file__).parent / "samples").glob("*.json"))
PAGES = {name: read(REPORTS / f"{name}.json") for name in SAMPLES} | {f"sample-{path.stem}": read(path) for path in HAND_MADE}
PAGES["large"] = replace(REPORT, sections={"parity": PARITY, "training": TRAINING, "shapes": SHAPES} | PAGES["sample-memory"].sections)

PHONE, DESK = 390, 1200  # CSS pixels
TALLEST_ROW = 200  # CSS pixels: eight lines of text
MOST_BYTES = 300 * 1024
FOCUSABLE = "summary, a[href], button, input, select, [tabindex='0']"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(params=sorted(PAGES))
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text(html(PAGES[request.param]), encoding="utf-8")
    return path


def test_a_page_asks_for_nothing_and_the_browser_has_nothing_to_complain_of(browser: Browser, page: Path) -> None:
    browser.screen(DESK)
    browser.open(page.as_uri())
    asked = {request["request"]["url"] for request in browser.told("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    assert browser.told("Log.entryAdded") == []
    assert browser.told("Runtime.exceptionThrown") == []
    assert page.stat().st_size < MOST_BYTES


def test_the_policy_of_a_page_stops_what_it_should(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    text = html(PAGES["large"])
    path.write_text(text.replace("</body>", "<img src='https://example.org/a.png'><script>document.title = 'ran'</script></body>"))
    browser.open(path.as_uri())
    assert browser.value("document.title") != "ran"
    assert len(browser.told("Log.entryAdded")) >= 2


def test_nothing_of_a_page_is_wider_than_a_phone(browser: Browser, page: Path) -> None:
    browser.screen(PHONE)
    browser.open(page.as_uri())
    assert browser.value("document.documentElement.scrollWidth") <= PHONE
    browser.value("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.value("document.documentElement.scrollWidth") <= PHONE
    tallest = browser.value("Math.max(0, ...[...document.querySelectorAll('table.data tr')].map(row => row.offsetHeight))")
    assert tallest < TALLEST_ROW, "a column is too narrow for its words"


def test_the_keyboard_reaches_whatever_can_be_opened_or_followed(browser: Browser, page: Path) -> None:
    browser.screen(DESK)
    browser.open(page.as_uri())
    visible = f'[...document.querySelectorAll("{FOCUSABLE}")].filter(each => each.checkVisibility())'
    expected = browser.value(f"{visible}.length")
    browser.value("window.reached = new Set()")
    for _ in range(expected + 2):
        browser.press_tab()
        browser.value("window.reached.add(document.activeElement)")
    assert browser.value(f"{visible}.filter(each => !window.reached.has(each)).map(each => each.outerHTML.slice(0, 80))") == []


def test_light_and_dark_are_two_pictures_and_neither_is_blank(browser: Browser, page: Path) -> None:
    browser.screen(DESK)
    pictures = {}
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        browser.open(page.as_uri())
        pictures[scheme] = browser.picture()
    browser.scheme("light")
    browser.open("about:blank")
    blank = browser.picture()
    assert pictures["light"] != pictures["dark"]
    assert all(len(picture) > 3 * len(blank) for picture in pictures.values())  # what has text in it packs less well
