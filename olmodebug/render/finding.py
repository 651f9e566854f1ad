"""One finding, in the manner of a compiler: what is wrong, the place, the cause, the repair, the evidence."""

import textwrap
from collections.abc import Iterator, Sequence

from rich.console import Group

from ..records import Case, Rows, Where
from ..report import Finding, Severity, SourceLine
from ..units import facts_text
from .layout import Line, line, row

CASE_TOKENS = 40  # integers of one input shown in a finding's smallest case; the report holds them all

STYLES: dict[Severity, str] = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}


def finding_view(finding: Finding) -> Group:
    """One finding, from its message to the command that shows it again."""
    return Group(*_finding(finding))


def details_view(finding: Finding) -> Group:
    """What stands under a finding's message: the place, its lines, the cause, the repair, the evidence."""
    return Group(*_details(finding))


def _finding(finding: Finding) -> Iterator[Line]:
    yield line((finding.severity, STYLES[finding.severity]), "  ", (finding.probe, "bold"))
    yield line((finding.message, "bold"), indent=2)
    yield from _details(finding)


def _details(finding: Finding) -> Iterator[Line]:
    place = place_text(finding.where)
    if place:
        yield line(place, head=("  --> ", "dim"), indent=6)
    yield from _source(finding.source)
    verified = "   [verified: the probe passes with it]" if finding.fix_verified else ""
    yield from _rows(
        ("cause", finding.cause),
        ("fix", f"{finding.fix}{verified}" if finding.fix else None),
        ("expected", finding.expected),
        ("observed", finding.observed),
        ("evidence", facts_text(finding.evidence)),
        ("ruled out", "\n".join(finding.ruled_out)),
        ("also", f"failing because of this: {', '.join(finding.also)}" if finding.also else None),
        ("raised", finding.raised),
        ("smallest", case_text(finding.case) if finding.case else None),
        ("reproduce", finding.reproduce),
    )


def place_text(where: Where) -> str:
    """`model.py:88 in Attention.forward   (module model.layers.0.self_attn, softmax)`, or what is known of it."""
    file = f"{where.file}:{where.line}" if where.file and where.line else where.file or ""
    code = " in ".join(filter(None, [file, where.function]))
    inside = ", ".join(filter(None, [f"module {where.module}" if where.module else "", where.op]))
    return f"{code}   ({inside})" if code and inside else code or inside


def _source(lines: Sequence[SourceLine]) -> Iterator[Line]:
    """The subject's lines behind a gutter of their numbers, the marked one with `>`."""
    if not lines:
        return
    digits = max(2, *(len(str(item.number)) for item in lines))
    gutter = (f"{'':{digits + 3}}|", "dim")
    code = textwrap.dedent("\n".join(item.text.expandtabs(4) for item in lines)).split("\n")
    yield line(head=gutter, indent=digits + 4)
    for previous, item, text in zip((None, *lines), lines, code, strict=False):
        if previous and item.number != previous.number + 1:
            yield line(head=(f"{'':{digits + 3}}...", "dim"), indent=digits + 6)
        head = f"{'>' if item.marked else ' '} {item.number:>{digits}} |"
        margin = len(text) - len(text.lstrip())
        style = "bold" if item.marked else ""
        yield line((text.strip(), style), head=(head, style or "dim"), indent=len(head) + 3 + margin)
    yield line(head=gutter, indent=digits + 4)


def _rows(*rows: tuple[str, str | None]) -> Iterator[Line]:
    for label, text in rows:
        if text:
            yield row(label, text)


def case_text(case: Case) -> str:
    """`cut 7: input_ids [1,4] 5 3 8 1; seed 0`: rows are parted by a slash."""
    inputs = {"input_ids": case.input_ids, "attention_mask": case.attention_mask}
    inputs |= {"position_ids": case.position_ids, "labels": case.labels}
    texts = [f"{name} {_tokens(rows)}" for name, rows in inputs.items() if rows is not None]
    return f"{case.name}: {'; '.join([*texts, f'seed {case.seed}'])}"


def _tokens(rows: Rows) -> str:
    numbers = [number for row in rows for number in row]
    if len(numbers) > CASE_TOKENS:
        shown = f"{' '.join(map(str, numbers[:CASE_TOKENS]))} and {len(numbers) - CASE_TOKENS} more"
    else:
        shown = " / ".join(" ".join(map(str, row)) for row in rows)
    return f"[{len(rows)},{len(rows[0]) if rows else 0}] {shown}"
