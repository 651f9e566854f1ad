"""The packing probe: documents in one row stay apart, in every row."""

from pathlib import Path

import pytest

from olmodebug.examine import Result, run_probe
from olmodebug.probe import probes_in
from olmodebug.probes import packing
from olmodebug.report import Finding
from olmodebug.spec import Job, resolve
from tests.mutants.catalog import CLEAN, MUTANTS, materialize

PROBES = {probe.name.partition(".")[2]: probe for probe in probes_in(packing)}


def run(name: str, spec: str) -> Result:
    subject = resolve(Job(spec=spec))
    return run_probe(PROBES[name], subject)


def caught(name: str, mutant: str, folder: Path) -> Finding:
    """The one finding that the probe makes on a mutant, which must be in the right function with the right words."""
    item = next(m for m in MUTANTS if m.name == mutant)
    result = run(name, f"{materialize(item, folder)}:{item.build}")
    assert len(result.findings) == 1, (result.outcome, [f.message for f in result.findings])
    finding = result.findings[0]
    assert finding.where.function in (item.function, *item.also)
    assert any(word in f"{finding.message} {finding.cause}".lower() for word in item.words)
    return finding


@pytest.mark.parametrize(
    ("mutant", "cause"),
    [
        ("llama/documents-not-isolated", "document_ids is accepted and has no effect"),
        ("llama/documents-of-the-first-row", "the documents of row 0 are used for every row"),
    ],
)
def test_a_leak_between_documents_is_explained(mutant: str, cause: str, tmp_path: Path) -> None:
    finding = caught("documents-are-isolated", mutant, tmp_path)
    assert finding.severity == "error"
    assert cause in (finding.cause or "")


def test_isolated_documents_pass() -> None:
    result = run("documents-are-isolated", f"{CLEAN / 'llama_style.py'}:build_packed")
    assert (result.outcome.status, result.findings) == ("passed", ())


def test_positions_that_restart_promise_no_isolation() -> None:
    result = run("documents-are-isolated", f"{CLEAN / 'llama_style.py'}:build_positions")
    assert result.outcome.status == "not-applicable"
    assert "promise no isolation" in (result.outcome.reason or "")


def test_a_mask_of_documents_in_place_of_the_causal_one_is_found(tmp_path: Path) -> None:
    text = (CLEAN / "llama_style.py").read_text()
    old = "mask = mask + document_mask(document_ids)"
    assert text.count(old) == 1
    path = tmp_path / "documents_only.py"
    path.write_text(text.replace(old, "mask = document_mask(document_ids)"))
    (finding,) = run("documents-are-isolated", f"{path}:build_packed").findings
    assert "when only the last token changes" in finding.message
    assert "does not hide all later keys" in (finding.cause or "")
