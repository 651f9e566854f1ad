"""Findings from a comparison of two bundles, each with what to do and a script that shows its op alone."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..explain import source_lines
from ..records import Where
from ..report import Finding, Scalar
from ..units import listed, number_text, plural
from .alone import HEAD, arguments_code, op_code, write_script
from .bundle import Bundle, BundleError
from .compare import Comparison, Op, number
from .compiled import BACKENDS
from .policies import BF16_POLICY, LOW_POLICY, REDUCED_POLICY, TF32_POLICY

MOST = 5  # findings of one kind; the section counts them all

FLAGS = {
    TF32_POLICY: "torch.backends.cuda.matmul.allow_tf32 = False, or state the policy: an execution with tf32",
    BF16_POLICY: "torch.set_float32_matmul_precision('highest'), or state the policy: an execution with medium",
    REDUCED_POLICY: "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False, or an execution with reduced",
    LOW_POLICY: "add up in float32 and round once, or state the policy: an execution with reduced",
}


def findings(comparison: Comparison, right: Bundle, *, scripts: Path | None) -> list[Finding]:
    """What is wrong, arguments first, then weights, ops in the order in which they ran, and decisions."""
    dtype = right.head["execution"]["dtype"]
    words = right.head["words"]
    restless = min((op["i"] for op in comparison.nondeterministic if op["judged"].get("read")), default=math.inf)
    found = [_argument(item) for item in comparison.arguments[:MOST] if item["op"]["i"] < restless]
    found += _weights(comparison.weights)
    found += _stateful(comparison.stateful, words)
    groups = _grouped(comparison.bad)
    found += [_bad(group, words, dtype, right, scripts) for group in groups[:MOST]]
    found += [_policy(group, words, dtype, right, scripts) for group in _grouped(comparison.policies)[:MOST]]
    found += _compiled(comparison)
    if comparison.nonfinite:
        found += [_range(group, words, dtype, comparison.nonfinite) for group in _grouped(comparison.overflows)[:1]]
    decisions = comparison.section["decisions"]
    if decisions and decisions["changed"] and not comparison.bad:
        found.append(_decision(decisions, words))
    return found


def _compiled(comparison: Comparison) -> list[Finding]:
    """A compiled run that is not the uncompiled one: an error where float64 shows it too, else a warning."""
    known = next((c for c in comparison.section["compiled"] if c["verdict"] == "parts"), None)
    if known is None:
        return []
    again = known["float64"]
    persists = again is not None and again["backend"] is not None
    where = Where(**comparison.departed["where"]) if comparison.departed else Where()
    evidence: dict[str, Scalar] = {"backend": known["backend"]}
    expected = observed = None
    message = f"compiled with {known['backend']}, {where.module or 'the model'} does not compute what it computes uncompiled"
    if comparison.outside:
        worst = max(comparison.outside, key=lambda line: number(line["margin"]))
        name = f"{worst['what']} {worst['name']}".strip()
        turn = ", when it is called again" if all(line["turn"] for line in comparison.outside) else ""
        message += f": {name} differs{turn} by {number_text(number(worst['margin']))} times what roundings can make"
        total = 2 * sum(row["count"] for row in known["results"])
        evidence |= {"case": worst["case"], "bound": _plain(worst.get("limit")), "results_outside": f"{len(comparison.outside)} of {total}"}
        if worst.get("exact") is not None:
            expected, observed = f"{_text(worst['exact'])} at {worst['index']}, as uncompiled", _text(worst["observed"])
    cause = "in float64 the two agree: the compiled code computes the same with less precision" if again is not None else None
    if persists:
        cause = f"in float64 {again['what']}, so no rounding explains it; it differs {BACKENDS[again['backend']]}"
        evidence["first_backend"] = again["backend"]
    python = persists and again["backend"] != "inductor"
    return [
        Finding(
            probe="parity.compiled",
            severity="error" if persists or again is None else "warning",
            message=message,
            cause=cause,
            where=where,
            source=source_lines(where),
            fix="let nothing here depend on compiling or on a value that only Python changes; declare what a custom op mutates"
            if python
            else "keep this module out of the graph with torch.compiler.disable, and report it to PyTorch",
            expected=expected,
            observed=observed,
            evidence=evidence,
        )
    ]


def where_of(op: Op) -> Where:
    return Where(module=op["module"], function=op["function"], file=op["file"], line=op["line"], op=op["op"])


def _grouped(ops: Sequence[Op]) -> list[list[Op]]:
    """Ops at one line and of one kind are one finding: the layers of a model share their code."""
    groups: dict[tuple[Any, ...], list[Op]] = {}
    for op in ops:
        key = (op["op"], op["file"], op["line"], op["phase"], op["judged"]["verdict"])
        groups.setdefault(key, []).append(op)
    return list(groups.values())


def _bad(group: list[Op], words: str, dtype: str, right: Bundle, scripts: Path | None) -> Finding:
    op = group[0]
    judged = op["judged"]
    where = where_of(op)
    if judged["verdict"] == "nondeterministic" and judged.get("read"):
        return _restless(group, words)
    if judged["verdict"] == "nondeterministic":
        return Finding(
            probe="parity.determinism",
            severity="warning",
            message=f"{op['op']} gives other bits when the same run is repeated on {words}, and everything before it gives the same",
            where=where,
            source=source_lines(where),
            fix="torch.use_deterministic_algorithms(True) (an execution with deterministic), or accept it: its error is inside the bound",
            expected="equal bits",
            observed="other bits",
            evidence={"case": op["case"], "ops": len(group)},
        )
    times = number(judged["margin"])
    size = f"{number_text(times)} times the largest error that its arithmetic could make" if times < 1e30 else "no error of rounding"
    index = "".join(f"[{', '.join(map(str, judged['index']))}]" if judged.get("index") else "")
    reason = f" ({judged['reason']})" if judged.get("reason") else ""
    observed, exact = judged.get("observed"), judged.get("exact")
    evidence: dict[str, Scalar] = {
        "case": op["case"],
        "phase": op["phase"],
        "times_the_bound": times,
        "bound": _plain(judged.get("limit")),
        "elements_outside": f"{judged.get('mismatched')} of {judged.get('total')}",
        "ops_of_this_line": len(group),
        "inputs": ", ".join(op["in"][:6]),
    }
    script = _script(op, right, scripts)
    if script:
        evidence["script"] = script
    return Finding(
        probe="parity.ops",
        severity="error",
        message=f"{op['op']} on {words} differs from float64 on the same inputs by {size}{reason}",
        where=where,
        source=source_lines(where),
        fix=f"look at this op alone: python {script}" if script else "look at this op alone, on the inputs that the bundle keeps",
        expected=f"{_text(exact)} at {index or 'its one element'}" if exact is not None else None,
        observed=_text(observed) if observed is not None else None,
        evidence=evidence,
    )


def _restless(group: list[Op], words: str) -> Finding:
    op = group[0]
    where = where_of(op)
    read = op["judged"]["read"]
    return Finding(
        probe="parity.determinism",
        severity="warning",
        message=f"what {op['op']} reads on {words} changes from one run to the next: {read}, and everything before it gives the same bits",
        cause="the model keeps something from its earlier runs, in eval mode too; no kernel is at fault",
        where=where,
        source=source_lines(where),
        fix="change it in training only, or make it anew in every forward",
        expected="the same numbers in every run",
        observed=f"another {read}",
        evidence={"case": op["case"], "ops": len(group)},
    )


def _stateful(names: list[str], words: str) -> list[Finding]:
    if not names:
        return []
    return [
        Finding(
            probe="parity.determinism",
            severity="warning",
            message=f"called again on {words}, the model gives other numbers: a forward in eval mode changes {listed(names, 3)}",
            cause="the model reads what its last run left; no kernel is at fault, and here every run was started from the same values",
            where=Where(module=names[0].rpartition(".")[0]),
            fix="change it in training only, or make it anew in every forward",
            evidence={"changed": len(names)},
        )
    ]


def _policy(group: list[Op], words: str, dtype: str, right: Bundle, scripts: Path | None) -> Finding:
    op = group[0]
    where = where_of(op)
    policy = op["judged"]["policy"]
    script = _script(op, right, scripts)
    evidence: dict[str, Scalar] = {"case": op["case"], "times_the_bound": number(op["judged"]["margin"]), "ops_of_this_line": len(group)}
    roundoff = op["judged"].get("roundoff")
    if roundoff is not None:
        evidence["effective_roundoff"] = number(roundoff)
    if script:
        evidence["script"] = script
    return Finding(
        probe="parity.policy",
        severity="warning",
        message=f"{op['op']} on {words} is less precise than {dtype} arithmetic, and as precise as {policy}",
        cause=f"{policy}: with them the error is legal, and without them it is not; the execution did not ask for it",
        where=where,
        source=source_lines(where),
        fix=FLAGS.get(policy),
        expected=f"an error inside the bound of {dtype}",
        observed=f"inside the bound of {policy}",
        evidence=evidence,
    )


def _range(group: list[Op], words: str, dtype: str, results: list[str]) -> Finding:
    op = group[0]
    where = where_of(op)
    exact = number(op["judged"]["exact"])
    return Finding(
        probe="parity.range",
        severity="warning",
        message=f"{op['op']} overflows on {words}: its exact result {number_text(exact)} does not fit {dtype}, and {results[0]} is not finite",
        cause=f"the number itself is too large for {dtype}; no arithmetic is at fault",
        where=where,
        source=source_lines(where),
        fix="compute this part in float32, scale it down before, or use bfloat16, whose range is that of float32",
        expected=number_text(exact),
        observed=_text(op["judged"]["observed"]),
        evidence={"condition": dtype, "case": op["case"], "ops_of_this_line": len(group), "results_not_finite": len(results)},
    )


def _argument(item: dict[str, Any]) -> Finding:
    op = item["op"]
    where = where_of(op)
    other = where_of(item["left_op"])
    return Finding(
        probe="parity.arguments",
        severity="error",
        message=f"{op['op']} is called with {item['argument']} {item['right']}, and with {item['left']} on the left",
        cause=f"the argument {item['argument']} differs",
        where=where,
        source=source_lines(where),
        fix=f"make {item['argument']} the same on both sides",
        expected=str(item["left"]),
        observed=str(item["right"]),
        evidence={"left": str(other), "case": op["case"]},
    )


def _weights(names: list[str]) -> list[Finding]:
    if not names:
        return []
    rest = f" and {plural(len(names) - 1, 'other parameter')}" if len(names) > 1 else ""
    return [
        Finding(
            probe="parity.weights",
            severity="error",
            message=f"{names[0]}{rest} did not start from the same numbers on both sides",
            cause="the weights differ before anything is computed",
            where=Where(module=names[0].rpartition(".")[0]),
            fix="load the same checkpoint, or build both with the same seed",
            evidence={"parameters": len(names)},
        )
    ]


def _decision(decisions: dict[str, Any], words: str) -> Finding:
    worst = decisions["worst"]
    return Finding(
        probe="parity.decisions",
        severity="error",
        message=f"on {words} the most likely token changes at {plural(decisions['changed'], 'position')} where its lead is more than roundings take away",
        expected=f"the token of the left side, which leads by {number_text(worst['lead'])}",
        observed="another token",
        evidence={"case": worst["case"], "position": worst["position"], "lead": worst["lead"], "limit": worst["limit"]},
    )


SCRIPT = """double = lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
arguments = {arguments}
expected = {op}(**{{k: double(v) for k, v in arguments.items()}})
observed = {op}(**arguments)
for name, one in (("recorded", [tensors["recorded"]]), ("again", as_list(observed)[{output}:])):
    error = (one[0].double() - as_list(expected)[{output}].double()).abs()
    print(name, "largest error", float(error.max()), "at", [int(i) for i in torch.unravel_index(error.argmax(), error.shape)])
"""


def _script(op: Op, right: Bundle, scripts: Path | None) -> str | None:
    """Write the script that shows an op alone, and its inputs, beside the run's record; None without one."""
    repro = op.get("repro")
    if repro is None or scripts is None or any(isinstance(v, str) and v.startswith("torch.") for v in repro["arguments"].values()):
        return None
    try:
        inputs = {key: right.tensor(f"{repro['prefix']}/{key}") for key in repro["tensors"]}
        recorded = right.tensor(f"{repro['prefix']}/out{repro['output']}")
    except BundleError:
        return None
    if recorded is None or any(t is None for t in inputs.values()):
        return None
    tensors = {"recorded": recorded}
    text = HEAD.format(title=f"{op['op']} of {op['module']} on {right.head['words']}, against float64 on the same inputs")
    arguments = arguments_code({**inputs, **repro["arguments"]}, "", tensors)
    text += SCRIPT.format(arguments=arguments, op=op_code(repro["op"]), output=repro["output"])
    return write_script(scripts, f"op-{op['i']}-{op['op'].strip('_')}", text, tensors)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> Scalar:
    return None if value is None else number(value)
