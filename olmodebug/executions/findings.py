"""Findings from a comparison of two bundles, each with what to do and a script that shows its op alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..explain import source_lines
from ..records import Where
from ..report import Finding, Scalar
from ..units import number_text, plural
from .bundle import Bundle, BundleError
from .compare import Comparison, Op, number
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
    found = [_argument(item) for item in comparison.arguments[:MOST]]
    found += _weights(comparison.weights)
    groups = _grouped(comparison.bad)
    found += [_bad(group, words, dtype, right, scripts) for group in groups[:MOST]]
    found += [_policy(group, words, dtype, right, scripts) for group in _grouped(comparison.policies)[:MOST]]
    if comparison.nonfinite:
        found += [_range(group, words, dtype, comparison.nonfinite) for group in _grouped(comparison.overflows)[:1]]
    decisions = comparison.section["decisions"]
    if decisions and decisions["changed"] and not comparison.bad:
        found.append(_decision(decisions, words))
    return found


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


# A script that shows one op alone, without olmodebug

SCRIPT = '''"""{title}"""
import torch
from safetensors.torch import load_file

tensors = load_file("{file}")
{arguments}
expected = torch.ops.aten.{op}(**{{k: double(v) for k, v in arguments.items()}})
observed = torch.ops.aten.{op}(**arguments)
for name, one in (("recorded", [tensors["recorded"]]), ("again", as_list(observed)[{output}:])):
    error = (one[0].double() - as_list(expected)[{output}].double()).abs()
    print(name, "largest error", float(error.max()), "at", [int(i) for i in torch.unravel_index(error.argmax(), error.shape)])
'''
HELPERS = """double = lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
as_list = lambda v: [v] if isinstance(v, torch.Tensor) else list(v)
arguments = {"""


def _script(op: Op, right: Bundle, scripts: Path | None) -> str | None:
    """Write the script and its inputs beside the run's record; its path from the working directory, None without one."""
    repro = op.get("repro")
    if repro is None or scripts is None or any(isinstance(v, str) and v.startswith("torch.") for v in repro["arguments"].values()):
        return None
    from safetensors.torch import save_file

    name = f"op-{op['i']}-{op['op'].strip('_')}"
    tensors = {key: right.tensor(f"{repro['prefix']}/{key}") for key in repro["tensors"]}
    recorded = right.tensor(f"{repro['prefix']}/out{repro['output']}")
    if recorded is None or any(t is None for t in tensors.values()):
        return None
    lines = HELPERS + "".join(f'"{key}": tensors["{key}"], ' for key in tensors)
    lines += "".join(f'"{key}": {value!r}, ' for key, value in repro["arguments"].items()) + "}"
    try:
        scripts.mkdir(parents=True, exist_ok=True)
        save_file({**{k: t for k, t in tensors.items() if t is not None}, "recorded": recorded}, scripts / f"{name}.safetensors")
        text = SCRIPT.format(
            title=f"{op['op']} of {op['module']} on {right.head['words']}, against float64 on the same inputs",
            file=_shown(scripts / f"{name}.safetensors"),
            arguments=lines,
            op=repro["op"].removeprefix("aten.").removesuffix(".default"),
            output=repro["output"],
        )
        (scripts / f"{name}.py").write_text(text, encoding="utf-8")
    except (OSError, BundleError):
        return None
    return _shown(scripts / f"{name}.py")


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> Scalar:
    return None if value is None else number(value)
