"""The HTML page: from the report alone, whole, safe, and without a request to anywhere."""

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from olmodebug.render.figures import FIGURES
from olmodebug.render.html import TEMPLATES, html
from olmodebug.report import Outcome, Report, read
from tests.test_render_formats import FINDING, NOTHING, REPORT

VOID = {"meta", "link", "br", "hr", "img", "input"}
LARGEST_BYTES = 300 * 1024


class Page(HTMLParser):
    """Every tag with its attributes; a tag that is closed in the wrong place is a failure."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check_page(text: str) -> Page:
    """What must hold of every page that we write."""
    page = Page(text)
    assert len(text.encode()) < LARGEST_BYTES
    for tag, attributes in page.tags:
        assert tag not in {"script", "img", "iframe", "object", "embed", "form", "base"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in {"src", "style", "action", "srcset", "xlink:href"}, (tag, name)
            if name == "href":
                assert value is not None
                assert value.startswith("#") or value == "data:,", value
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        target = attributes.get("href") or ""
        assert not target.startswith("#") or target[1:] in ids, target
    (policy,) = [a["content"] or "" for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    assert f"<style>{style}</style>" in text
    assert "url(" not in style
    assert "@import" not in style
    return page


@pytest.mark.parametrize("report", [REPORT, NOTHING, replace(REPORT, findings=())], ids=["findings", "nothing", "clean"])
def test_the_page_is_whole_and_asks_for_nothing(report: Report) -> None:
    check_page(html(report))


def test_it_says_everything_that_the_finding_says() -> None:
    text = check_page(html(REPORT)).text
    for words in (
        "✗ fail olmo_model.py:OLMo",
        "4 ran (1 pass, 2 fail, 1 expected-fail), 1 not applicable, 1 skipped, of 6 probes; 1 error, 1 warning, 1 note",
        FINDING.message,
        "my model.py:88 Attention.forward, module layers.0.attn, softmax",
        "87 scores = q @ k.transpose(-1, -2)",
        "88 weights = scores.softmax(-1)",
        "cause the scores weight[bold] get no causal mask",
        "✓ verified: the probe passes with it",
        "max_abs 0.431",
        "norm nan",
        "also failing because of this cache.chunked",
        "olmodebug check 'my model.py:GPT' -k no-future",
        "no KV cache yet",
        "olmodebug replay 3f9a",
        "torch 2.13.0",
    ):
        assert words in text, words


def test_errors_come_first() -> None:
    text = check_page(html(REPORT)).text
    assert text.index("causality.no-future") < text.index("precision.half") < text.index("init.scale")


def test_nothing_from_the_report_is_markup() -> None:
    hostile = "</style></code><script>alert(1)</script><b onclick=x>\"'&"
    finding = replace(FINDING, message=hostile, cause=hostile, reproduce=hostile, evidence={hostile: hostile}, also=(hostile,))
    report = replace(REPORT, findings=(finding,), subject=replace(REPORT.subject, spec=hostile))
    page = check_page(html(report))
    assert page.text.count(hostile) >= 6


def test_control_characters_are_shown_and_not_sent() -> None:
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", html(replace(REPORT, findings=(replace(FINDING, message="a\x1b[31m\x00"),))))


def test_probes_that_share_a_reason_share_a_line() -> None:
    many = tuple(Outcome(probe=f"rope.rule-{i}", status="skipped", reason="the model does not build") for i in range(40))
    assert check_page(html(replace(REPORT, outcomes=many, findings=()))).text.count("the model does not build") == 1


SAMPLES = sorted((Path(__file__).parent / "samples").glob("*.json"))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_every_section_is_drawn_small_and_safe(path: Path) -> None:
    report = read(path)
    page = check_page(html(report))
    headings = [title for topic, title in TITLES.items() if topic in report.sections]
    if not headings:
        pytest.skip("no figure draws a section of this sample yet")
    assert set(report.sections) <= set(TITLES), "a section that nothing draws"
    for title in headings:
        assert title in page.text


TITLES = {topic: figure.title for topic, figure in FIGURES.items()}
