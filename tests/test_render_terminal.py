"""What the terminal shows, on hand-made values at fixed widths without colour."""

import io
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import RenderableType

from olmodebug.records import Case, Where
from olmodebug.render.layout import line, printable
from olmodebug.render.terminal import (
    console,
    environment_view,
    finding_view,
    outcomes_view,
    probes_view,
    report_view,
)
from olmodebug.report import Environment, Finding, Outcome, Report, Scalar, SourceLine, SubjectInfo

WIDTHS = (40, 60, 80, 120)

FINDING = Finding(
    probe="causality.no-future",
    severity="error",
    message="logits at position 6 change by 0.43 when only tokens 7..10 change; nothing before the change may move",
    cause="the scores weight[bold] get no causal mask",
    fix="mask the scores [batch, num_heads, seq_len, seq_len] before the softmax",
    fix_verified=True,
    where=Where(
        module="model.layers.0.self_attn",
        function="OLMoAttention.forward",
        file="olmo_model.py",
        line=88,
        op="softmax",
    ),
    source=(
        SourceLine(number=87, text="        scores = q @ k.transpose(-1, -2) * self.scale"),
        SourceLine(number=88, text="        weights = scores.softmax(-1)", marked=True),
    ),
    expected="0 at positions 0..6",
    observed="0.43 at position 6 of f32[1,11,97]",
    evidence={"max_abs": 0.43123, "limit": 1e-13, "peak_bytes": 1610612736, "norm": float("nan")},
    ruled_out=("label shift", "mask added as 0/1"),
    also=("cache.chunked", "padding.left"),
    raised="RuntimeError: The size of tensor a (2)\nmust match the size of tensor b (11)",
    case=Case(name="cut 7", input_ids=((5, 3, 8), (1, 9, 4)), attention_mask=((1, 1, 1), (0, 1, 1))),
    reproduce="olmodebug check olmo_model.py:OLMo -k no-future",
)
WARNING = Finding(
    probe="precision.half",
    severity="warning",
    message="the scores overflow in float16",
    where=Where(module="model.layers.0.self_attn"),
    reproduce="olmodebug check olmo_model.py:OLMo -k half",
)
NOTE = Finding(probe="init.scale", severity="note", message="the output layer starts at 0.02")

SUBJECT = SubjectInfo(
    spec="olmo_model.py:OLMo",
    kind="OLMoForCausalLM",
    parameters=3742016,
    parameter_bytes=14968064,
    dtype="float32",
    convention="forward(input_ids, attention_mask) -> .logits",
    assumptions=("vocab_size 97, from the embedding",),
)
ENVIRONMENT = Environment(
    olmodebug="0.1.0",
    python="3.12.1",
    platform="Linux",
    torch="2.13.0",
    seed=7,
    command="olmodebug check olmo_model.py:OLMo",
)
FAILED = Outcome(probe="causality.no-future", status="failed", seconds=0.25)
PASSED = Outcome(probe="rope.relative-shift", status="passed", seconds=1.25)
SKIPPED = Outcome(probe="device.cuda", status="skipped", reason="no CUDA device")
NO_CACHE = Outcome(probe="cache.chunked", status="not-applicable", reason="the model keeps no cache")
BROKE = Outcome(probe="loss.shift", status="error", reason="Traceback:\n  File probes/loss.py\nKeyError: 'x'\n")
EXPECTED = Outcome(probe="causality.no-future", status="expected-failure", reason="prefix-LM")


def report(*outcomes: Outcome, found: tuple[Finding, ...] = (), id: str = "3f9a") -> Report:
    return Report(subject=SUBJECT, environment=ENVIRONMENT, outcomes=outcomes, findings=found, seconds=3.25, id=id)


def drawn(view: RenderableType, width: int | None, encoding: str = "utf-8") -> str:
    """The view as a file of this encoding receives it."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    console(stream, width=width).print(view)
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode(encoding)


def same(text: str, golden: str) -> None:
    assert text == golden.removeprefix("\n")


def without_space(text: str) -> str:
    return re.sub(r"\s", "", text)


# One finding


def test_a_finding_at_80_columns() -> None:
    same(
        drawn(finding_view(FINDING), 80),
        """
error  causality.no-future
  logits at position 6 change by 0.43 when only tokens 7..10 change; nothing
  before the change may move
  --> olmo_model.py:88 in OLMoAttention.forward   (module
      model.layers.0.self_attn, softmax)
     |
  87 |   scores = q @ k.transpose(-1, -2) * self.scale
> 88 |   weights = scores.softmax(-1)
     |
  cause      the scores weight[bold] get no causal mask
  fix        mask the scores [batch, num_heads, seq_len, seq_len] before the
             softmax   [verified: the probe passes with it]
  expected   0 at positions 0..6
  observed   0.43 at position 6 of f32[1,11,97]
  evidence   max_abs = 0.431, limit = 1e-13, peak_bytes = 1.50 GiB, norm = nan
  ruled out  label shift
             mask added as 0/1
  also       failing because of this: cache.chunked, padding.left
  raised     RuntimeError: The size of tensor a (2)
             must match the size of tensor b (11)
  smallest   cut 7: input_ids [2,3] 5 3 8 / 1 9 4; attention_mask [2,3] 1 1 1 /
             0 1 1; seed 0
  reproduce  olmodebug check olmo_model.py:OLMo -k no-future
""",
    )


def test_a_finding_at_40_columns() -> None:
    short = replace(FINDING, expected=None, observed=None, ruled_out=(), also=(), raised=None, case=None)
    same(
        drawn(finding_view(short), 40),
        """
error  causality.no-future
  logits at position 6 change by 0.43
  when only tokens 7..10 change; nothing
  before the change may move
  --> olmo_model.py:88 in
      OLMoAttention.forward   (module
      model.layers.0.self_attn, softmax)
     |
  87 |   scores = q @ k.transpose(-1,
         -2) * self.scale
> 88 |   weights = scores.softmax(-1)
     |
  cause      the scores weight[bold] get
             no causal mask
  fix        mask the scores [batch,
             num_heads, seq_len,
             seq_len] before the softmax
             [verified: the probe passes
             with it]
  evidence   max_abs = 0.431, limit =
             1e-13, peak_bytes = 1.50
             GiB, norm = nan
  reproduce  olmodebug check
             olmo_model.py:OLMo -k
             no-future
""",
    )


def test_a_finding_at_60_columns_says_only_what_is_known() -> None:
    same(
        drawn(finding_view(WARNING), 60),
        """
warning  precision.half
  the scores overflow in float16
  --> module model.layers.0.self_attn
  reproduce  olmodebug check olmo_model.py:OLMo -k half
""",
    )


def test_a_place_at_120_columns_is_one_line() -> None:
    place = "  --> olmo_model.py:88 in OLMoAttention.forward   (module model.layers.0.self_attn, softmax)\n"
    assert place in drawn(finding_view(FINDING), 120)


@pytest.mark.parametrize(
    ("where", "place"),
    [
        (Where(), ""),
        (Where(file="model.py"), "  --> model.py\n"),
        (Where(file="model.py", line=3, op="add"), "  --> model.py:3   (add)\n"),
        (Where(function="Norm.forward"), "  --> Norm.forward\n"),
    ],
)
def test_a_place_is_as_precise_as_it_is_known(where: Where, place: str) -> None:
    finding = Finding(probe="a.b", severity="error", message="wrong", where=where)
    assert drawn(finding_view(finding), 80) == f"error  a.b\n  wrong\n{place}"


def test_source_keeps_its_indentation_and_shows_its_gaps() -> None:
    source = (
        SourceLine(number=9, text="    if mask is not None:"),
        SourceLine(number=10, text="        scores += mask[b, s]", marked=True),
        SourceLine(number=104, text=""),
        SourceLine(number=105, text="\treturn scores"),
    )
    finding = Finding(probe="a.b", severity="error", message="wrong", source=source)
    same(
        drawn(finding_view(finding), 80),
        """
error  a.b
  wrong
      |
    9 |   if mask is not None:
>  10 |       scores += mask[b, s]
      ...
  104 |
  105 |   return scores
      |
""",
    )


def test_a_long_case_says_how_much_it_leaves_out() -> None:
    case = Case(name="long", input_ids=(tuple(range(100)),), seed=3)
    text = drawn(finding_view(Finding(probe="a.b", severity="error", message="wrong", case=case)), 500)
    assert "smallest   long: input_ids [1,100] 0 1 2 3" in text
    assert text.endswith(" 38 39 and 60 more; seed 3\n")


# Nothing is lost


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "text",
    [
        "f32[2,8,16]",
        "[batch, seq_len]",
        "weight[bold]",
        "[/bold]",
        "[red]error[/red]",
        "scores[b, h, q, k]",
        ":warning: [link=x]",
        "model.layers.31.self_attn.rotary_emb.inv_freq" * 3,
    ],
)
def test_brackets_and_long_paths_survive_everywhere(text: str, width: int) -> None:
    finding = Finding(
        probe="a.b",
        severity="error",
        message=text,
        cause=text,
        fix=text,
        where=Where(module=text),
        source=(SourceLine(number=1, text=text),),
        observed=text,
        evidence={text: text},
        ruled_out=(text,),
        also=(text,),
        raised=text,
        case=Case(name=text, input_ids=((1,),)),
        reproduce=text,
    )
    drawn_text = drawn(finding_view(finding), width)
    assert without_space(drawn_text).count(without_space(text)) == 13
    assert max(map(len, drawn_text.splitlines())) <= width
    assert "…" not in drawn_text
    subject = replace(SUBJECT, spec=text, kind=text, convention=text, assumptions=(text,))
    result = replace(report(Outcome(probe=text, status="skipped", reason=text)), subject=subject)
    assert without_space(drawn(report_view(result), width)).count(without_space(text)) == 6
    assert without_space(drawn(probes_view([(text, text, text)] * 2), width)).count(without_space(text)) == 4


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(st.sampled_from("ab [](){}/\n:漢é=.,"), max_size=60),
    head=st.text(st.sampled_from("ab[]漢"), max_size=30),
    indent=st.integers(0, 30),
    width=st.integers(10, 90),
)
def test_a_line_loses_nothing_and_stays_within_its_width(text: str, head: str, indent: int, width: int) -> None:
    made = drawn(line(text, head=head, indent=min(indent, width // 2)), width)
    assert without_space(made) == without_space(head + text)
    cells = [sum(2 if letter == "漢" else 1 for letter in row) for row in made.splitlines()]
    assert max(cells) <= width


def test_a_pipe_gets_one_line_for_each_record() -> None:
    lines = drawn(finding_view(FINDING), None).splitlines()
    assert f"  {FINDING.message}" in lines
    assert len(lines) == 19
    assert lines[-1] == f"  reproduce  {FINDING.reproduce}"


@pytest.mark.parametrize("width", [None, *WIDTHS])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_a_stream_that_is_not_utf8_gets_plain_symbols_and_escapes(encoding: str, width: int | None) -> None:
    finding = replace(FINDING, message="mask × 漢", source=(SourceLine(number=1, text="# größe … 漢"),))
    text = drawn(report_view(report(FAILED, found=(finding,)), verbose=True), width, encoding)
    assert "mask x \\u6f22" in text
    assert "x fail" in text


def test_ascii_repeats_every_symbol() -> None:
    text = drawn(outcomes_view(report(FAILED, PASSED, SKIPPED, NO_CACHE, EXPECTED, BROKE)), 80, "ascii")
    assert [row[0] for row in text.splitlines()[:6]] == ["x", "+", "-", "-", "x", "!"]


def test_what_a_terminal_would_obey_is_shown_instead() -> None:
    assert printable("\x1b[31mred\x07\r\nnext\rover\tx\x9b", "utf-8") == "\\x1b[31mred\\x07\nnext\\x0dover\tx\\x9b"
    assert printable("bad \udc80 name", "utf-8") == "bad \\udc80 name"


# Reports


def test_a_passing_report_is_a_few_lines() -> None:
    same(
        drawn(report_view(report(PASSED, NO_CACHE)), 80),
        """
olmo_model.py:OLMo  OLMoForCausalLM, 3.74M parameters (14.3 MiB, f32)
  called     forward(input_ids, attention_mask) -> .logits
  assumed    vocab_size 97, from the embedding

✓ pass       1 ran (1 pass), 1 not applicable, of 2 probes; 3.2 s
next         olmodebug report 3f9a --verbose
""",
    )


def test_errors_come_first_then_warnings_then_notes_in_one_line() -> None:
    bare = replace(FINDING, source=(), where=Where(), cause=None, fix=None, expected=None, observed=None, evidence={})
    bare = replace(bare, ruled_out=(), also=(), raised=None, case=None)
    found = (NOTE, WARNING, bare, replace(NOTE, probe="init.depth"))
    same(
        drawn(report_view(report(FAILED, PASSED, SKIPPED, found=found)), 80),
        """
olmo_model.py:OLMo  OLMoForCausalLM, 3.74M parameters (14.3 MiB, f32)
  called     forward(input_ids, attention_mask) -> .logits
  assumed    vocab_size 97, from the embedding

error  causality.no-future
  logits at position 6 change by 0.43 when only tokens 7..10 change; nothing
  before the change may move
  reproduce  olmodebug check olmo_model.py:OLMo -k no-future

warning  precision.half
  the scores overflow in float16
  --> module model.layers.0.self_attn
  reproduce  olmodebug check olmo_model.py:OLMo -k half

note         init.scale, init.depth  (in full with --verbose)
skipped      device.cuda: no CUDA device
✗ fail       2 ran (1 pass, 1 fail), 1 skipped, of 3 probes; 1 error, 1 warning,
             2 notes; 3.2 s
next         olmodebug check olmo_model.py:OLMo -k no-future
""",
    )


def test_nothing_checked_says_so_and_why() -> None:
    same(
        drawn(report_view(report(SKIPPED, replace(SKIPPED, probe="device.half"), NO_CACHE)), 60),
        """
olmo_model.py:OLMo  OLMoForCausalLM, 3.74M parameters (14.3
                    MiB, f32)
  called     forward(input_ids, attention_mask) -> .logits
  assumed    vocab_size 97, from the embedding

skipped      device.cuda, device.half: no CUDA device
n/a          cache.chunked: the model keeps no cache
! error      nothing was checked: 0 ran (0 pass), 1 not
             applicable, 2 skipped, of 3 probes; 3.2 s
next         olmodebug probes
""",
    )


def test_many_probes_that_are_skipped_for_one_reason_are_counted_and_not_listed() -> None:
    many = [replace(SKIPPED, probe=f"topic.rule-{i}", reason="the model does not build or run") for i in range(70)]
    text = drawn(report_view(report(*many)), 100)
    assert "skipped      70 probes: the model does not build or run\n" in text
    assert "topic.rule-1" not in text
    assert "topic.rule-69" in drawn(report_view(report(*many), verbose=True), 100)


def test_a_probe_that_broke_shows_its_traceback_and_an_expected_failure_its_reason() -> None:
    text = drawn(report_view(report(PASSED, EXPECTED, BROKE, found=(replace(NOTE, probe="causality.no-future"),))), 120)
    same(
        text.split("\n\n")[1],
        """
broke        loss.shift: Traceback:
               File probes/loss.py
             KeyError: 'x'
expected     causality.no-future: prefix-LM
! error      3 ran (1 pass, 1 expected-fail, 1 broke), of 3 probes; 1 note; 3.2 s
next         olmodebug report 3f9a --verbose
""",
    )


def test_verbose_shows_notes_versions_and_every_outcome() -> None:
    same(
        drawn(report_view(report(PASSED, SKIPPED, found=(NOTE,)), verbose=True), 80),
        """
olmo_model.py:OLMo  OLMoForCausalLM, 3.74M parameters (14.3 MiB, f32)
  called     forward(input_ids, attention_mask) -> .logits
  assumed    vocab_size 97, from the embedding
  with       olmodebug 0.1.0, python 3.12.1, torch 2.13.0, Linux, device cpu,
             seed 7

note  init.scale
  the output layer starts at 0.02

✓ passed                  1.2 s  rope.relative-shift
– skipped                  0 ms  device.cuda: no CUDA device

✓ pass       1 ran (1 pass), 1 skipped, of 2 probes; 1 note; 3.2 s
next         olmodebug probes --verbose
""",
    )


@pytest.mark.parametrize(
    ("made", "command"),
    [
        (report(FAILED, found=(WARNING, FINDING)), "olmodebug check olmo_model.py:OLMo -k no-future"),
        (report(FAILED, found=(replace(FINDING, reproduce=None),)), "olmodebug replay 3f9a"),
        (report(FAILED, id=""), "olmodebug check olmo_model.py:OLMo --verbose"),
        (report(PASSED, found=(WARNING,)), "olmodebug check olmo_model.py:OLMo -k half"),
        (report(PASSED, found=(replace(WARNING, reproduce=None),)), "olmodebug report 3f9a --verbose"),
        (report(PASSED, BROKE), "olmodebug report 3f9a --verbose"),
        (report(), "olmodebug probes"),
    ],
)
def test_the_last_line_is_the_next_command(made: Report, command: str) -> None:
    assert drawn(report_view(made), 120).splitlines()[-1] == f"next         {command}"


def test_an_error_without_any_outcome_is_a_failure_and_not_nothing_checked() -> None:
    text = drawn(report_view(report(found=(FINDING,))), 120)
    assert "✗ fail       0 ran (0 pass), of 0 probes; 1 error; 3.2 s\n" in text


# Probes and the machine

PROBES = [
    (
        "causality.no-future",
        "No token sees a later one.",
        "No token sees a later one.\n\n    Why: training.\n      [b]\n    ",
    ),
    ("rope.shift", "Scores depend on distance only.", "Scores depend on distance only."),
]


def test_probes_are_listed_by_name_and_first_line() -> None:
    same(
        drawn(probes_view(PROBES), 80),
        """
causality.no-future  No token sees a later one.
rope.shift           Scores depend on distance only.
""",
    )


def test_in_a_narrow_window_the_first_line_stands_under_the_name() -> None:
    same(
        drawn(probes_view(PROBES[:1] * 2), 38).splitlines(keepends=True)[0]
        + drawn(probes_view(PROBES[:1] * 2), 38).splitlines(keepends=True)[1],
        """
causality.no-future
    No token sees a later one.
""",
    )


@pytest.mark.parametrize("view", [probes_view(PROBES[:1]), probes_view(PROBES[:1], full=True)])
def test_a_single_probe_shows_its_whole_docstring(view: RenderableType) -> None:
    same(
        drawn(view, 80),
        """
causality.no-future
  No token sees a later one.

  Why: training.
    [b]
""",
    )


def test_no_probes_are_no_lines() -> None:
    assert drawn(probes_view([]), 80) == ""


def test_the_machine_is_a_line_for_each_topic() -> None:
    details: dict[str, Scalar | dict[str, Scalar]] = {
        "memory": {"total_bytes": 25269370880, "available_bytes": None},
        "sdpa": {"flash": True, "math": False},
        "gpu": "no NVIDIA driver: NVML Shared Library Not Found",
    }
    same(
        drawn(environment_view(ENVIRONMENT, details), 80),
        """
  olmodebug  0.1.0
  platform   Linux
  memory     total_bytes = 23.5 GiB, available_bytes = none
  sdpa       flash = yes, math = no
  gpu        no NVIDIA driver: NVML Shared Library Not Found
""",
    )


# The console and the imports


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_and_no_color_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    colours = re.compile(r"\x1b\[[0-9;]*3[0-7]")
    coloured, plain, piped = Terminal(), Terminal(), io.StringIO()
    console(coloured, width=80).print(finding_view(FINDING))
    console(piped).print(finding_view(FINDING))
    monkeypatch.setenv("NO_COLOR", "1")
    console(plain, width=80).print(finding_view(FINDING))
    assert colours.search(coloured.getvalue())
    assert not colours.search(plain.getvalue())
    assert "\x1b" not in piped.getvalue()
    strip = re.compile(r"\x1b\[[0-9;]*m")
    assert strip.sub("", coloured.getvalue()) == strip.sub("", plain.getvalue()) == drawn(finding_view(FINDING), 80)


def test_drawing_needs_no_torch() -> None:
    code = "import sys, olmodebug.render.terminal; print([m for m in ('torch', 'numpy', 'hypothesis') if m in sys.modules])"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
    assert done.stdout.strip() == "[]"
