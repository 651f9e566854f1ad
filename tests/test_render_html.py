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


# Sections as their schemas describe them, hand-made: a large model, and values that are not finite

LAYERS = [
    {"module": f"model.layers.{i}", "kind": "OlmoDecoderLayer", "drift": 0.004 * 1.1**i, "margin": 0.5, "ops": 104} for i in range(32)
]
SIDE = {"subject": "olmo2-32B", "device": "cpu", "dtype": "float64", "gpu": None, "torch": "2.13.0"}
FIRST = {
    "module": "model.layers.7.self_attn",
    "function": "OLMoAttention.forward",
    "file": "my_model.py",
    "line": 88,
    "op": "softmax",
    "phase": "forward",
    "case": "long",
    "verdict": "diverged",
    "margin": "inf",
    "policy": None,
    "reason": None,
}
PARITY = {
    "runs": [
        {
            "left": {**SIDE, "execution": "cpu float64"},
            "right": {**SIDE, "execution": "cpu bfloat16"},
            "verdict": "parts",
            "ops": {"exact": 3000, "within": 200, "explained": 0, "diverged": 1, "nondeterministic": 0, "range": 0, "unverified": 4},
            "coverage": 0.998,
            "first": FIRST,
            "layers": [layer | ({"margin": "inf"} if i == 7 else {"margin": 0.0} if i == 9 else {}) for i, layer in enumerate(LAYERS)],
            "products": [{"behaves_like": "float32 sums, one rounding to bf16", "count": 120, "roundoff": 0.0016}],
            "policies": [{"policy": "reduced precision", "count": 3, "declared": False}],
            "unverified": [{"reason": "no rule for <op>", "count": 4}],
            "decisions": {"positions": 77, "same": 70, "ties": 5, "changed": 2, "smallest_lead": "nan", "worst": None},
            "results": [{"case": "long", "what": "logits", "name": "", "drift": "nan", "count": 1}],
            "died": None,
            "left_out": 2,
        }
    ],
    "implementations": {
        "reference": "olmo2-tiny",
        "case": "2 rows of 11 tokens",
        "limit": 1e-10,
        "logits": {"largest_difference": 0.4, "largest_magnitude": 3.0, "agree": False},
        "gradients": None,
        "mapping": [
            {"slot": "layer.q_proj.weight", "subject": "h.0.attn.qkv.weight[0:64]", "reference": "model.layers.0.self_attn.q_proj.weight"}
        ],
        "settled_by_value": ["gate and up"],
        "tensors": {"subject": 40, "subject_found": 12, "reference": 44, "reference_found": 12},
        "layers": [{"module": "h.0.attn.qkv", "difference": 1e-15}, {"module": "h.0.attn.out", "difference": 0.3}],
        "tried": [{"cause": "rotary halves against pairs", "vanishes": True}],
    },
}
STEP = {
    "rate": 1e-3,
    "grad_norm": 1.0,
    "update_ratio": None,
    "largest_logit": None,
    "loss_scale": None,
    "tokens": 4096,
    "skipped": False,
    "seconds": 0.1,
}
NOTHING_MEASURED = {"validation_before": None, "validation_after": None, "test_after": None}
TRAINING = {
    "recipe": {
        "name": "small", "steps": 3000, "batch_size": 8, "seq_len": 512, "optimizer": "muon", "learning_rate": 0.02, "embedding_rate": 0.1,
        "norm_rate": 0.1, "warmup_steps": 20, "schedule": "cosine", "final_share": 0.1, "betas": [0.9, 0.95], "epsilon": 1e-8, "weight_decay": 0.1,
        "momentum": 0.95, "clip_norm": 1.0, "initializer_range": None, "document_tokens": None,
    },
    "data": None,
    "runs": [
        {
            "subject": subject, "parameters": 3742016, "said": ["a <b>choice</b>"], "stopped": "nan",
            "steps": [{**STEP, "step": i + 1, "loss": None if i == 99 else 4 + 7 / (1 + i / 50) + (i % 7) / 10} for i in range(3000)],
            "skipped": [3], "spikes": [91], "untouched": ["model.norm.weight"], "seconds": 33.0, "tokens_per_second": None, "flop_utilisation": None,
            "peak_bytes": 2**31, "chunked_loss": False, "evaluated": NOTHING_MEASURED, "samples": {"before": None, "after": {"prompt": "Once", "text": " <i>upon"}},
            "checkpoint": False,
        }
        for subject in ("olmo1-4M", "my_model.py:build")
    ],
}  # fmt: skip
MODULE = {
    "kind": "Linear",
    "inputs": ["(B, T, hidden)"],
    "outputs": ["(B, T, hidden)"],
    "parameters": 4,
    "parameter_bytes": 16,
    "dtype": "float32",
    "repeat": 1,
}
SHAPES = {
    "subject": "olmo2-32B", "names": {"hidden": 5120}, "parameters": 32, "parameter_bytes": 128, "device": "meta", "dtype": "float32", "runs": [],
    "rows": [{**MODULE, "path": "", "kind": "Olmo", "depth": 0, "called": True}] + [
        {**MODULE, "path": f"layers.{i}" + (f".part{j}" if j else ""), "depth": 1 + bool(j), "called": True} for i in range(32) for j in range(12)
    ],
}  # fmt: skip


def test_a_model_of_32_layers_with_everything_measured_stays_small() -> None:
    memory = read(Path(__file__).parent / "samples" / "memory.json").sections["memory"]
    report = replace(REPORT, sections={"parity": PARITY, "training": TRAINING, "shapes": SHAPES, "memory": memory})
    text = check_page(html(report)).text
    for words in (
        "✗ They part.",
        "First: my_model.py:88 ( softmax, module model.layers.7.self_attn, forward, case long ), inf times its bound.",
        "first: model.layers.7",
        "2 decided otherwise",
        "3 ops explained by reduced precision, which nobody asked for",
        "✗ The logits differ: largest difference 0.4 of magnitude 3",
        "first: h.0.attn.out",
        "rotary halves against pairs",
        "3000 steps of 8 x 512 tokens, muon",
        "spike at 91",
        "stopped: nan",
        "never got a gradient: model.norm.weight",
        "It does not fit a budget of 8.00 GiB.",
    ):
        assert "".join(words.split()) in "".join(text.split()), words


def test_leaks_are_drawn_where_the_future_is_and_only_above_the_limit() -> None:
    matrix = [[1.0 if p >= t else 1e-15 for p in range(4)] for t in range(4)]
    matrix[3][1] = "nan"
    section = {"input_ids": [1, 2, 3, 4], "matrix": matrix, "limit": 1e-13, "cut": 2, "modules": [], "setting": "train mode"}
    page = check_page(html(replace(REPORT, sections={"leaks": section})))
    assert "1 of 6 pairs leak" in page.text
    assert "In train mode." in page.text
    assert "token 3 changed: logits at position 1 move by" in page.text
    cells = [attributes.get("class") for tag, attributes in page.tags if tag == "rect"]
    assert (cells.count("cell"), cells.count("allowed")) == (1, 10)


def test_a_step_on_ranks_shows_its_errors_by_layer_and_what_replicas_hold() -> None:
    page = check_page(html(read(Path(__file__).parent / "samples" / "ranks.json")))
    assert "4 ranks (four), beside 1 rank (one)." in page.text
    assert "✓ exactly the same." in page.text  # weights before the step
    assert "✓ within rounding." in page.text  # module outputs
    assert "✗ 2 layers of 2 beyond rounding." in page.text  # gradients
    assert "shapes differ" in page.text
    assert "first: model.layers.1" in page.text
    assert "model.layers.1.norm.weight: not the same bits on all ranks after the step" in page.text
    assert "Calls between ranks: 3, 3, 3, 2, by rank." in page.text


TITLES = {topic: figure.title for topic, figure in FIGURES.items()}
