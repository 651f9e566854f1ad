"""The record of a run: its JSON, its schema, its verdict and its counts."""

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import olmodebug.report
from olmodebug.errors import ReportError
from olmodebug.records import Case, Where
from olmodebug.report import (
    Environment,
    Finding,
    Outcome,
    Report,
    Severity,
    SourceLine,
    Status,
    SubjectInfo,
    from_json,
    merge_by_root,
    read,
)

SCHEMA_FILE = Path(olmodebug.report.__file__).with_name("report.schema.json")
SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

FINDING = Finding(
    probe="causality.no-future",
    severity="error",
    message="logits at position 6 change by 0.43 when only tokens 7..10 change",
    cause="no causal mask",
    fix="mask the scores",
    fix_verified=True,
    where=Where(module="model.layers.0.self_attn", function="Attention.forward", file="model.py", line=88, op="softmax"),
    source=(SourceLine(number=88, text="    weights = scores.softmax(-1)", marked=True),),
    expected="0",
    observed="0.43",
    evidence={"max_abs": math.nan, "limit": math.inf, "low": -math.inf, "pairs": 55, "same": False, "mask": None},
    ruled_out=("label shift",),
    also=("cache.chunked",),
    raised="RuntimeError: no",
    case=Case(name="cut 2", input_ids=((5, 3, 8),), attention_mask=((1, 1, 0),)),
    reproduce="olmodebug check model.py:Model -k no-future",
)
REPORT = Report(
    subject=SubjectInfo(spec="model.py:Model", kind="Model", parameters=3742016, assumptions=("vocab_size 97",)),
    environment=Environment(olmodebug="0.1.0", python="3.12.0", platform="Linux", seed=7, command="olmodebug check"),
    outcomes=(Outcome(probe="causality.no-future", status="failed", seconds=0.5),),
    findings=(FINDING,),
    seconds=1.5,
    created="2026-01-02T03:04:05Z",
    id="3f9a",
)


def body(report: Report = REPORT) -> dict[str, Any]:
    """The report as a strict parser reads it."""

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    parsed: dict[str, Any] = json.loads(report.to_json(), parse_constant=refuse)
    return parsed


# Reports of every kind, as hypothesis makes them

words = st.text(max_size=2)  # too short for the words nan and inf, which come back as numbers
maybe = st.none() | words
names = st.sampled_from(["causality.no-future", "rope.relative-shift", "own_probes.a"])
seconds = st.floats(min_value=0, max_value=1e6)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words
tokens = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=2).map(tuple)


def tuples(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, max_size=2).map(tuple)


cases = st.builds(
    Case,
    name=words,
    input_ids=tokens,
    attention_mask=st.none() | tokens,
    position_ids=st.none() | tokens,
    labels=st.none() | tokens,
    seed=st.integers(),
)
places = st.builds(Where, module=words, function=maybe, file=maybe, line=st.none() | st.integers(1, 3), op=maybe)
findings = st.builds(
    Finding,
    probe=names,
    severity=st.sampled_from(get_args(Severity)),
    message=words.filter(bool),
    cause=maybe,
    fix=maybe,
    fix_verified=st.booleans(),
    where=places,
    source=tuples(st.builds(SourceLine, number=st.integers(1, 999), text=words, marked=st.booleans())),
    expected=maybe,
    observed=maybe,
    evidence=st.dictionaries(words, scalars, max_size=2),
    ruled_out=tuples(words),
    also=tuples(names),
    raised=maybe,
    case=st.none() | cases,
    reproduce=maybe,
)
outcomes = st.builds(Outcome, probe=names, status=st.sampled_from(get_args(Status)), reason=maybe, seconds=seconds)
subjects = st.builds(SubjectInfo, spec=words, kind=words, file=maybe, parameters=st.integers(0), assumptions=tuples(words))
environments = st.builds(
    Environment,
    olmodebug=words,
    python=words,
    platform=words,
    torch=maybe,
    gpu=maybe,
    seed=st.integers(),
    command=words,
)
reports = st.builds(
    Report,
    subject=subjects,
    environment=environments,
    outcomes=tuples(outcomes),
    findings=tuples(findings),
    seconds=seconds,
    created=words,
    id=words,
)


@settings(deadline=None, max_examples=40)
@given(reports)
def test_every_report_fits_the_schema_and_comes_back_equal(report: Report) -> None:
    VALIDATOR.validate(body(report))
    assert from_json(report.to_json()) == report


def test_numbers_that_are_not_finite_survive_as_words() -> None:
    evidence = body()["findings"][0]["evidence"]
    assert (evidence["max_abs"], evidence["limit"], evidence["low"]) == ("nan", "inf", "-inf")
    again = from_json(REPORT.to_json())
    assert math.isnan(again.findings[0].evidence["max_abs"])  # type: ignore[arg-type]
    assert again.findings[0].evidence["limit"] == math.inf
    assert again.to_json() == REPORT.to_json()


def test_a_hand_made_report_fits_the_schema() -> None:
    VALIDATOR.validate(body())
    VALIDATOR.validate(body(replace(REPORT, findings=(Finding(probe="a.b", severity="note", message="short"),))))


LATER = {
    "beside",
    "by",
    "compiled",
    "keep_outputs",
    "missing",
    "ordinary",
    "peak_owners",
}  # came after reports had been written without them
LATER_OF_RANKS = {"layers", "replicas"}


def test_the_schema_is_valid_strict_and_describes_every_property() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)

    def walk(schema: Any) -> None:
        if isinstance(schema, dict):
            if "properties" in schema:
                assert schema["additionalProperties"] is False
                optional = schema is SCHEMA["properties"]["sections"]  # each command writes its own
                later = LATER | (LATER_OF_RANKS if "collectives" in schema["properties"] else set())
                always = sorted(set(schema["properties"]) - later)
                assert sorted(schema.get("required", ())) == ([] if optional else always)
                for name, value in schema["properties"].items():
                    assert value.get("description"), name
            for value in schema.values():
                walk(value)
        if isinstance(schema, list):
            for value in schema:
                walk(value)

    walk(SCHEMA)


Damage = Callable[[dict[str, Any]], object]

DAMAGES: dict[str, Damage] = {
    "another schema": lambda b: b.update(schema="olmodebug/report@2"),
    "a field of its own": lambda b: b.update(extra=1),
    "no verdict": lambda b: b.pop("verdict"),
    "an unknown verdict": lambda b: b.update(verdict="ok"),
    "exit code 2, which leaves no report": lambda b: b.update(exit_code=2),
    "an unknown status": lambda b: b["outcomes"][0].update(status="xfail"),
    "negative seconds": lambda b: b["outcomes"][0].update(seconds=-1),
    "an unknown severity": lambda b: b["findings"][0].update(severity="fatal"),
    "a probe without a topic": lambda b: b["findings"][0].update(probe="no-future"),
    "no message": lambda b: b["findings"][0].update(message=""),
    "line 0": lambda b: b["findings"][0]["where"].update(line=0),
    "a column": lambda b: b["findings"][0]["where"].update(column=3),
    "evidence that is a list": lambda b: b["findings"][0]["evidence"].update(shape=[1, 2]),
    "token ids that are text": lambda b: b["findings"][0]["case"].update(input_ids=[["a"]]),
    "no input ids": lambda b: b["findings"][0]["case"].update(input_ids=None),
    "a missing count": lambda b: b["counts"].pop("skipped"),
    "half a parameter": lambda b: b["subject"].update(parameters=0.5),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_report_does_not_fit_the_schema(damage: Damage) -> None:
    damaged = deepcopy(body())
    damage(damaged)
    assert not VALIDATOR.is_valid(damaged)


# Reading


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid JSON"),
        ("{", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("[]", "observed None"),
        ('"olmodebug/report@1"', "observed None"),
        (
            REPORT.to_json().replace("report@1", "report@2"),
            "expected schema olmodebug/report@1, observed olmodebug/report@2",
        ),
        (REPORT.to_json().replace('"nan"', "NaN"), "NaN is no JSON number"),
        ('{"schema": "olmodebug/report@1"}', "damaged report"),
    ],
)
def test_what_is_no_report_of_this_version_is_a_report_error(text: str, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        from_json(text)


@pytest.mark.parametrize("name", ["subject", "environment", "outcomes", "findings"])
@pytest.mark.parametrize("value", [None, 5, "text", [5], ["text"], {"colour": "red"}])
def test_a_part_of_the_wrong_kind_is_a_report_error(name: str, value: object) -> None:
    with pytest.raises(ReportError, match="damaged report"):
        from_json(json.dumps(body() | {name: value}))


def test_a_report_is_written_whole_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    clean = replace(REPORT, findings=(replace(FINDING, evidence={"x": 0.5}),))
    clean.write(path)
    assert read(path) == clean
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"]


def test_a_file_that_cannot_be_read_is_a_report_error(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot read"):
        read(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ReportError, match="binary.json: not a report"):
        read(tmp_path / "binary.json")


# Verdict, exit code and counts


def ended(*statuses: Status, found: tuple[Finding, ...] = ()) -> Report:
    """A report whose probes a.0, a.1, ... ended like this."""
    results = tuple(Outcome(probe=f"a.{i}", status=status) for i, status in enumerate(statuses))
    return replace(REPORT, outcomes=results, findings=found)


@pytest.mark.parametrize(
    ("statuses", "verdict", "exit_code"),
    [
        (("passed",), "pass", 0),
        (("passed", "skipped", "not-applicable"), "pass", 0),
        (("expected-failure",), "pass", 0),
        (("passed", "failed"), "fail", 1),
        (("failed", "error"), "fail", 1),
        (("passed", "error"), "error", 3),
        (("error",), "error", 3),
        ((), "error", 5),
        (("skipped", "not-applicable"), "error", 5),
    ],
)
def test_verdict_and_exit_code_follow_from_the_outcomes(statuses: tuple[Status, ...], verdict: str, exit_code: int) -> None:
    report = ended(*statuses)
    assert (report.verdict, report.exit_code) == (verdict, exit_code)


def test_that_a_model_builds_is_no_answer_to_what_else_was_asked() -> None:
    built = replace(ended("passed").outcomes[0], probe="build.runs")
    other = replace(built, probe="packing.documents", status="not-applicable", reason="no documents")
    for outcomes, exit_code in (((built,), 0), ((built, other), 5), ((built, replace(other, status="passed")), 0)):
        assert replace(ended(), outcomes=outcomes).exit_code == exit_code
    assert replace(ended(), outcomes=(built, other)).unchecked == "nothing that was asked applies"


def test_an_error_finding_fails_a_report_without_outcomes() -> None:
    assert ended(found=(FINDING,)).exit_code == 1
    assert ended(found=(FINDING,)).verdict == "fail"


def test_an_error_finding_of_an_expected_failure_does_not_fail_the_report() -> None:
    assert ended("expected-failure", found=(replace(FINDING, probe="a.0"),)).exit_code == 0


def test_warnings_and_notes_do_not_fail_the_report() -> None:
    found = (replace(FINDING, severity="warning"), replace(FINDING, severity="note"))
    assert ended("passed", found=found).exit_code == 0


@settings(deadline=None)
@given(st.lists(st.sampled_from(get_args(Status)), max_size=12))
def test_counts_add_up(statuses: list[Status]) -> None:
    counts = ended(*statuses).counts
    parts = (counts.passed, counts.failed, counts.expected, counts.errors, counts.not_applicable, counts.skipped)
    assert sum(parts) == counts.total == len(statuses)
    assert counts.ran + counts.not_applicable + counts.skipped == counts.total
    assert str(counts).endswith(f"of {counts.total} probe{'s' * (counts.total != 1)}")


def test_counts_print_only_what_there_is() -> None:
    assert str(ended("passed").counts) == "1 ran (1 pass), of 1 probe"
    every = ended("passed", "failed", "expected-failure", "error", "not-applicable", "skipped").counts
    expected = "4 ran (1 pass, 1 fail, 1 expected-fail, 1 broke), 1 not applicable, 1 skipped, of 6 probes"
    assert str(every) == expected


def test_a_report_prints_its_verdict() -> None:
    expected = "<Report model.py:Model: fail, 1 error, 0 warnings; 1 ran (0 pass, 1 fail), of 1 probe>"
    assert repr(REPORT) == expected


# One root cause, one finding


def at(probe: str, line: int | None, severity: Severity = "error", file: str = "model.py") -> Finding:
    return Finding(probe=probe, severity=severity, message="wrong", where=Where(file=file, line=line))


def test_findings_at_one_line_join_the_first() -> None:
    merged = merge_by_root([at("a.x", 88), at("b.y", 88), at("c.z", 90), at("d.w", 88, "warning")])
    assert [(item.probe, item.also) for item in merged] == [("a.x", ("b.y", "d.w")), ("c.z", ())]


def test_a_finding_brings_its_own_also_along() -> None:
    merged = merge_by_root([at("a.x", 88), replace(at("b.y", 88), also=("c.z", "a.x"))])
    assert merged[0].also == ("b.y", "c.z")


def test_findings_without_a_line_or_a_file_stand_alone() -> None:
    loose = [at("a.x", None), at("b.y", None), Finding(probe="c.z", severity="error", message="no")]
    fileless = [replace(item, where=Where(line=88)) for item in loose]
    assert merge_by_root([*loose, *fileless]) == (*loose, *fileless)


def test_lines_of_two_files_are_two_places() -> None:
    assert len(merge_by_root([at("a.x", 88), at("b.y", 88, file="other.py")])) == 2


def test_a_warning_does_not_swallow_an_error() -> None:
    merged = merge_by_root([at("a.x", 88, "warning"), at("b.y", 88, "error")])
    assert [(item.probe, item.severity) for item in merged] == [("a.x", "warning"), ("b.y", "error")]


@settings(deadline=None)
@given(tuples(findings))
def test_merging_twice_changes_nothing(found: tuple[Finding, ...]) -> None:
    once = merge_by_root(found)
    assert merge_by_root(once) == once
    assert {item.probe for item in found} == {item.probe for item in once} | {
        name for item in once for name in item.also if name in {other.probe for other in found}
    }
