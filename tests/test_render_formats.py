"""Every form of a report as text, on hand-made values: golden texts, and what each format's readers demand."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from olmodebug.commands import shared
from olmodebug.records import Where
from olmodebug.render.formats import FORMATS
from olmodebug.report import Finding, Outcome, Report, SourceLine, from_json
from tests.test_render_terminal import BROKE, ENVIRONMENT, FAILED, NO_CACHE, NOTE, PASSED, SKIPPED, SUBJECT, WARNING, same

FINDING = Finding(
    probe="causality.no-future",
    severity="error",
    message="logits at position 6 change by 0.43; nothing before [a change] may move",
    cause="the scores weight[bold] get no causal mask",
    fix="mask the scores [batch, num_heads, seq_len, seq_len] before the softmax",
    fix_verified=True,
    where=Where(module="layers.0.attn", function="Attention.forward", file="my model.py", line=88, op="softmax"),
    source=(
        SourceLine(number=87, text="        scores = q @ k.transpose(-1, -2)"),
        SourceLine(number=88, text="        weights = scores.softmax(-1)", marked=True),
    ),
    evidence={"max_abs": 0.43123, "norm": float("nan")},
    also=("cache.chunked",),
    reproduce="olmodebug check 'my model.py:GPT' -k no-future",
)
CHUNKED = Outcome(probe="cache.chunked", status="failed", seconds=0.5)
EXPECTED = Outcome(probe="cache.table-end", status="expected-failure", reason="no KV cache yet")
REPORT = Report(
    subject=SUBJECT,
    environment=ENVIRONMENT,
    outcomes=(PASSED, FAILED, CHUNKED, SKIPPED, replace(NO_CACHE, probe="cache.past-the-window"), EXPECTED),
    findings=(NOTE, FINDING, WARNING),
    seconds=3.25,
    created="2026-01-02T03:04:05Z",
    id="3f9a",
)
NOTHING = Report(subject=SUBJECT, environment=ENVIRONMENT)


def test_the_command_line_offers_every_format_and_full() -> None:
    assert set(shared.FORMATS) == {"full", *FORMATS}


def test_concise_is_a_line_a_finding_worst_first_then_the_verdict() -> None:
    same(
        FORMATS["concise"](REPORT),
        """
my model.py:88: error causality.no-future: logits at position 6 change by 0.43; nothing before [a change] may move
model.layers.0.self_attn: warning precision.half: the scores overflow in float16
olmo_model.py:OLMo: note init.scale: the output layer starts at 0.02
olmo_model.py:OLMo: fail: 4 ran (1 pass, 2 fail, 1 expected-fail), 1 not applicable, 1 skipped, of 6 probes; 1 error, 1 warning, 1 note
""",
    )


def test_concise_says_when_nothing_was_checked() -> None:
    same(FORMATS["concise"](NOTHING), "\nolmo_model.py:OLMo: error: nothing was checked; 0 ran (0 pass), of 0 probes\n")


def test_json_is_the_record_itself() -> None:
    assert from_json(FORMATS["json"](REPORT)).to_json() == REPORT.to_json()


def test_jsonl_is_a_strict_record_a_line_and_loses_nothing() -> None:
    made = replace(REPORT, sections={"training": {"loss": [1.0]}})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in FORMATS["jsonl"](made).splitlines()]
    assert [line["record"] for line in lines] == ["report", *["outcome"] * 6, *["finding"] * 3, "section"]
    body = json.loads(made.to_json())
    assert {**lines[0], "record": 0} == {name: body[name] for name in body if name not in ("outcomes", "findings", "sections")} | {
        "record": 0
    }
    assert [{k: v for k, v in line.items() if k != "record"} for line in lines[1:7]] == body["outcomes"]
    assert lines[8]["evidence"] == {"max_abs": 0.43123, "norm": "nan"}
    assert lines[-1] == {"record": "section", "topic": "training", "value": {"loss": [1.0]}}


def test_github_annotations_stand_at_the_line_and_escape_what_would_end_them() -> None:
    finding = replace(FINDING, message="50% off,\nthen: two", where=replace(FINDING.where, file="a:b,c.py"))
    same(
        FORMATS["github"](replace(REPORT, findings=(finding, NOTE))),
        """
::error file=a%3Ab%2Cc.py,line=88,title=causality.no-future::50%25 off,%0Athen: two%0Acause: the scores weight[bold] get no causal mask\
%0Afix: mask the scores [batch, num_heads, seq_len, seq_len] before the softmax%0Areproduce: olmodebug check 'my model.py:GPT' -k no-future
::notice title=init.scale::the output layer starts at 0.02
olmo_model.py:OLMo: fail: 4 ran (1 pass, 2 fail, 1 expected-fail), 1 not applicable, 1 skipped, of 6 probes; 1 error, 1 note
""",
    )


@pytest.mark.parametrize(("number", "annotations"), [(10, 10), (11, 10), (40, 10)])
def test_github_gets_no_more_of_a_kind_than_it_shows_and_is_told_how_many_are_left(number: int, annotations: int) -> None:
    lines = FORMATS["github"](replace(REPORT, findings=(FINDING,) * number + (WARNING,) * number)).splitlines()
    for kind in ("error", "warning"):
        shown = [line for line in lines if line.startswith(f"::{kind} ")]
        assert len(shown) == annotations
        assert ("and " in shown[-1] and f"{number - 9} more" in shown[-1]) == (number > 10)


def test_junit_counts_what_it_holds_and_gives_failures_their_text() -> None:
    root = ET.fromstring(FORMATS["junit"](REPORT))
    (suite,) = root
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "6",
        "failures": "2",
        "errors": "0",
        "skipped": "3",
    }
    cases = {f"{case.get('classname')}.{case.get('name')}": case for case in suite.iter("testcase")}
    assert list(cases) == [outcome.probe for outcome in REPORT.outcomes]
    failure = cases["causality.no-future"].find("failure")
    assert failure is not None
    assert failure.get("message") == "my model.py:88: logits at position 6 change by 0.43; nothing before [a change] may move"
    assert "weights = scores.softmax(-1)" in (failure.text or "")
    joined = cases["cache.chunked"].find("failure")
    assert joined is not None
    assert joined.get("type") == "causality.no-future"  # one root cause, told where it was found
    skipped = cases["cache.table-end"].find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "expected failure: no KV cache yet"


def test_junit_holds_a_finding_that_no_probe_made_and_a_probe_that_broke() -> None:
    root = ET.fromstring(FORMATS["junit"](replace(REPORT, outcomes=(BROKE,), findings=(FINDING,))))
    assert [(case.get("name"), [child.tag for child in case]) for case in root.iter("testcase")] == [
        ("shift", ["error"]),
        ("no-future", ["failure"]),
    ]


def test_junit_survives_what_xml_cannot_hold() -> None:
    text = FORMATS["junit"](replace(REPORT, findings=(replace(FINDING, message="a\x00b\x1b[31m ]]> <&> é 漢"),)))
    assert "\\x00b\\x1b[31m ]]> <&> é 漢" in (next(ET.fromstring(text).iter("failure")).get("message") or "")
    assert text.isascii()


# What SARIF 2.1.0 demands of the objects that we write: required properties, closed property sets, enumerations.
# The official schema (108 KB) accepts the same files; this is the part of it that we touch, written out from the standard.
TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}, "additionalProperties": False}
WORD = {"type": "string"}
SARIF: dict[str, Any] = {
    "type": "object",
    "required": ["version", "runs"],
    "additionalProperties": False,
    "properties": {
        "$schema": {"type": "string", "format": "uri"},
        "version": {"const": "2.1.0"},
        "runs": {"type": "array", "items": {"$ref": "#/$defs/run"}},
    },
    "$defs": {
        "run": {
            "type": "object",
            "required": ["tool"],
            "additionalProperties": False,
            "properties": {
                "tool": {
                    "type": "object",
                    "required": ["driver"],
                    "additionalProperties": False,
                    "properties": {
                        "driver": {
                            "type": "object",
                            "required": ["name"],
                            "additionalProperties": False,
                            "properties": {
                                "name": WORD,
                                "version": WORD,
                                "rules": {"type": "array", "uniqueItems": True, "items": {"$ref": "#/$defs/rule"}},
                            },
                        }
                    },
                },
                "invocations": {"type": "array", "items": {"$ref": "#/$defs/invocation"}},
                "columnKind": {"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
                "results": {"type": "array", "items": {"$ref": "#/$defs/result"}},
            },
        },
        "rule": {"type": "object", "required": ["id"], "additionalProperties": False, "properties": {"id": WORD, "name": WORD}},
        "invocation": {
            "type": "object",
            "required": ["executionSuccessful"],
            "additionalProperties": False,
            "properties": {
                "executionSuccessful": {"type": "boolean"},
                "exitCode": {"type": "integer"},
                "commandLine": WORD,
                "startTimeUtc": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"},
            },
        },
        "result": {
            "type": "object",
            "required": ["message"],
            "additionalProperties": False,
            "properties": {
                "ruleId": WORD,
                "ruleIndex": {"type": "integer", "minimum": -1},
                "level": {"enum": ["none", "note", "warning", "error"]},
                "message": TEXT,
                "partialFingerprints": {"type": "object", "additionalProperties": WORD},
                "locations": {"type": "array", "items": {"$ref": "#/$defs/location"}},
                "suppressions": {
                    "type": "array",
                    "uniqueItems": True,
                    "items": {
                        "type": "object",
                        "required": ["kind"],
                        "properties": {"kind": {"enum": ["inSource", "external"]}, "justification": WORD},
                    },
                },
            },
        },
        "location": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "physicalLocation": {
                    "type": "object",
                    "required": ["artifactLocation"],
                    "additionalProperties": False,
                    "properties": {
                        "artifactLocation": {
                            "type": "object",
                            "required": ["uri"],
                            "additionalProperties": False,
                            "properties": {"uri": {"type": "string", "pattern": r"^[A-Za-z0-9/_.:%~-]+$"}},
                        },
                        "region": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {"startLine": {"type": "integer", "minimum": 1}, "snippet": TEXT},
                        },
                    },
                },
                "logicalLocations": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["fullyQualifiedName"],
                        "additionalProperties": False,
                        "properties": {"fullyQualifiedName": WORD},
                    },
                },
            },
        },
    },
}


@pytest.mark.parametrize("made", [REPORT, NOTHING, replace(REPORT, findings=())], ids=["findings", "nothing", "clean"])
def test_sarif_holds_what_the_standard_demands(made: Report) -> None:
    import jsonschema

    body = json.loads(FORMATS["sarif"](made), parse_constant=pytest.fail)
    jsonschema.Draft202012Validator(SARIF).validate(body)
    (run,) = body["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert all(rules[result["ruleIndex"]] == result["ruleId"] for result in run["results"])


def test_sarif_names_file_line_and_snippet_and_keeps_its_fingerprint_when_numbers_move() -> None:
    def result(finding: Finding) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(FORMATS["sarif"](replace(REPORT, findings=(finding,))))["runs"][0]["results"][0]
        return found

    first = result(FINDING)
    physical = first["locations"][0]["physicalLocation"]
    assert physical == {
        "artifactLocation": {"uri": "my%20model.py"},
        "region": {"startLine": 88, "snippet": {"text": "        weights = scores.softmax(-1)"}},
    }
    moved = result(replace(FINDING, message="by 0.44", where=replace(FINDING.where, line=90)))
    assert moved["partialFingerprints"] == first["partialFingerprints"]
    assert result(replace(FINDING, probe="rope.keeps-norm"))["partialFingerprints"] != first["partialFingerprints"]


def test_markdown_shows_source_cause_and_fix_and_no_bracket_is_markup() -> None:
    same(
        FORMATS["md"](replace(REPORT, findings=(FINDING,))),
        r"""
## olmodebug: fail

`olmo_model.py:OLMo` (OLMoForCausalLM, 3.74M parameters): 4 ran (1 pass, 2 fail, 1 expected-fail), 1 not applicable, 1 skipped, of 6 probes; 1 error, in 3.2 s

### Error: `causality.no-future`

logits at position 6 change by 0.43; nothing before \[a change\] may move

at `my model.py:88`, `Attention.forward`, `softmax`, `layers.0.attn`

```python
    87 | scores = q @ k.transpose(-1, -2)
>   88 | weights = scores.softmax(-1)
```

- **cause**: the scores weight\[bold\] get no causal mask
- **fix**: mask the scores \[batch, num_heads, seq_len, seq_len\] before the softmax (verified: the probe passes with it)
- **evidence**: max_abs = 0.431, norm = nan
- **also failing because of this**: cache.chunked
- **reproduce**: `olmodebug check 'my model.py:GPT' -k no-future`

| how it ended | why | probes |
|---|---|---|
| skipped | no CUDA device | `device.cuda` |
| expected-failure | no KV cache yet | `cache.table-end` |

olmodebug 0.1.0, Python 3.12.1, torch 2.13.0, device cpu, seed 7, Linux

`olmodebug check olmo_model.py:OLMo`
""",
    )


@pytest.mark.parametrize("name", [*FORMATS, "full"])
def test_every_format_is_drawn_without_torch_and_in_any_encoding(name: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(replace(REPORT, findings=(replace(FINDING, message="λ ≤ 3 → 漢"),)).to_json(), encoding="utf-8")
    program = f"""
import sys
from olmodebug.cli import main
code = main(["report", "report.json", "--format", "{name}", "--html", "page.html", "--md", "page.md", "--json", "again.json"])
assert not {{"torch", "transformers", "hypothesis"}} & set(sys.modules), sys.modules.keys()
sys.exit(code)
"""
    environment = {"PATH": "", "PYTHONPATH": str(Path(__file__).parents[1]), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert (b"0.43" in done.stdout or b"3.25" in done.stdout) or name in ("concise", "github")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "report.json").read_bytes()
    assert re.search("λ ≤ 3 → 漢", (tmp_path / "page.html").read_text(encoding="utf-8"))


def test_the_page_of_a_workflow_step_gets_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from olmodebug.cli import main

    (tmp_path / "report.json").write_text(REPORT.to_json(), encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert main(["report", str(tmp_path / "report.json"), "--format", "github"]) == 0
    assert capsys.readouterr().out == FORMATS["github"](REPORT)
    assert (tmp_path / "summary.md").read_text(encoding="utf-8") == FORMATS["md"](REPORT)
