"""What a memory section means: it does not fit, it may not, something was not as predicted. Judged from the section alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..records import Where
from ..report import Finding, Outcome
from ..units import bytes_text

STEP, FITS, EVENTS, HOLDS, LEARNS = (
    "memory.step-runs",
    "memory.fits-the-budget",
    "memory.events-as-predicted",
    "memory.figures-hold",
    "memory.short-training-learns",
)
Section = Mapping[str, Any]


def findings_of(section: Section) -> list[Finding]:
    """The findings that a section gives."""
    found = [_fit(section), *_opaque(section)]
    if confirmation := section["confirmation"]:
        found += [_events(confirmation), _figures(section, confirmation), _training(confirmation), _out_of_memory(section, confirmation)]
    return [finding for finding in found if finding is not None]


def outcomes_of(section: Section | None, findings: Iterable[Finding]) -> tuple[Outcome, ...]:
    """How each question ended."""
    failed = {finding.probe for finding in findings if finding.severity == "error"}
    if section is None:
        return (Outcome(probe=STEP, status="failed"),)
    reasons = _not_asked(section)
    made = []
    for probe in (STEP, FITS, EVENTS, HOLDS, LEARNS):
        if probe in failed:
            made.append(Outcome(probe=probe, status="failed"))
        elif probe in reasons:
            made.append(Outcome(probe=probe, status="not-applicable", reason=reasons[probe]))
        else:
            made.append(Outcome(probe=probe, status="passed"))
    return tuple(made)


def _not_asked(section: Section) -> dict[str, str]:
    reasons = {}
    if section["budget_bytes"] is None:
        reasons[FITS] = "no budget: give --budget or --gpu"
    confirmation = section["confirmation"]
    why = (confirmation or {}).get("skipped") or "prediction only"
    if confirmation is None or confirmation["events"] is None:
        reasons[EVENTS] = why
    if confirmation is None or not confirmation["figures"]:
        reasons[HOLDS] = why
    if confirmation is None or confirmation["training"] is None:
        reasons[LEARNS] = why
    return reasons


def _fit(section: Section) -> Finding | None:
    budget, figures = section["budget_bytes"], section["figures"]
    needed = figures["process"] or figures["tensors"]
    if budget is None or needed is None or needed["safe"] <= budget:
        return None
    over = needed["expected"] > budget
    peak = section["peak"]
    cause, where = (
        peak["owner"],
        Where(module="" if peak["module"].startswith("(") else peak["module"], file=peak["file"], line=peak["line"], op=peak["op"]),
    )
    context = needed["expected"] - figures["reserved"]["expected"] if figures["process"] else 0
    if context > needed["expected"] / 2:  # whoever holds the peak of the tensors, it is little beside this
        cause, where = (
            f"{context / needed['expected']:.0%} of it is the CUDA context, {bytes_text(context)} before any tensor is made",
            Where(),
        )
    band = f"{bytes_text(needed['low'])} to {bytes_text(needed['safe'])}"
    if over:
        message = f"does not fit: expected at most {bytes_text(budget)}, predicted {bytes_text(needed['expected'])} ({band})"
    else:
        message = f"may not fit: predicted {bytes_text(needed['expected'])} ({band}) for a budget of {bytes_text(budget)}"
    return Finding(
        probe=FITS,
        severity="error" if over else "warning",
        message=message,
        cause=cause,
        fix=_helps(section),
        where=where,
        expected=f"at most {bytes_text(budget)}",
        observed=f"{bytes_text(needed['expected'])} predicted",
        evidence={"budget_bytes": budget, "expected_bytes": needed["expected"], "safe_bytes": needed["safe"]},
    )


def _helps(section: Section) -> str | None:
    fitting = [row for row in section["what_ifs"] if row["fits"]]
    sizes = [row for row in section["largest"] if row["value"]]
    parts = []
    if fitting:
        best = max(fitting, key=lambda row: row["saved_bytes"])
        parts.append(f"{best['change']}: {bytes_text(best['needed']['expected'])} (traced)")
    for row in sizes:
        parts.append(f"--{row['axis'].replace('_', '-')} {row['value']} (safe figure {bytes_text(row['safe_bytes'])})")
    return "; or ".join(parts) or None


def _opaque(section: Section) -> Sequence[Finding]:
    if not section["opaque"]:
        return ()
    names = ", ".join(section["opaque"])
    message = f"memory inside {names} is not seen: operators outside aten show their outputs only, so the figures may be too low"
    return (Finding(probe="memory.opaque-operators", severity="warning", message=message),)


def _events(confirmation: Section) -> Finding | None:
    events = confirmation["events"]
    if events is None or events["identical"]:
        return None
    message = f"the run allocated otherwise than predicted: {events['first_difference']}"
    # What kernels of the card take for a moment differs between releases; whether it matters, the figures say.
    return Finding(probe=EVENTS, severity="note" if events["device"] == "cuda" else "warning", message=message)


def _figures(section: Section, confirmation: Section) -> Finding | None:
    beyond = [row for row in confirmation["figures"] if row["name"].startswith("safe ") and row["measured_bytes"] > row["predicted_bytes"]]
    if not beyond:
        return None
    row = beyond[0]
    message = (
        f"more memory than the safe figure: {row['name'].removeprefix('safe ')} measured {bytes_text(row['measured_bytes'])}, "
        f"safe figure {bytes_text(row['predicted_bytes'])}"
    )
    return Finding(probe=HOLDS, severity="warning", message=message)


def _training(confirmation: Section) -> Finding | None:
    training = confirmation["training"]
    if training is None or training["fell"]:
        return None
    first, last = float(training["first_loss"]), float(training["last_loss"])  # a report has nan as a word
    message = f"the loss of the short training did not fall: {first:.3g} at first, {last:.3g} after {training['steps']} steps"
    return Finding(probe=LEARNS, severity="warning", message=message, evidence={"overflow_steps": training["overflow_steps"]})


def _out_of_memory(section: Section, confirmation: Section) -> Finding | None:
    lost = confirmation["out_of_memory"]
    if lost is None:
        return None
    peak = section["peak"] or {}
    return Finding(
        probe=STEP,
        severity="error",
        message=f"out of memory in {lost['step']}: {lost['text']}",
        cause=peak.get("owner"),
        fix=_helps(section),
        evidence={
            name: lost[name]
            for name in ("requested_bytes", "allocated_bytes", "reserved_bytes", "largest_free_bytes", "limit_bytes")
            if lost[name] is not None
        },
    )
