"""How many faults are found, and where, beside the rules of others: `python -m tests.benchmarks.parity_faults [--layers N]`.

Each fault is put into the reference OLMo 1, 2 and 3 in float32, bfloat16 and float16; a run is forward, loss and backward.
Ours asks in the order of the command: arguments, weights, every op on its own inputs, then each module in float64 on the
reference's inputs, then custom backwards. The others get the ops of both runs aligned for them, and a float64 baseline.
The faults were written by the authors of the rule, so the rates are optimistic.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmodebug.executions.compare import argument_differences, corresponding_ops
from olmodebug.executions.derivative import underived
from olmodebug.executions.judge import judge
from olmodebug.executions.lift import departures
from olmodebug.executions.replay import expect
from olmodebug.executions.run import scalars
from olmodebug.records import Case, Event
from olmodebug.spec import Job, resolve
from olmodebug.subject import Subject
from olmodebug.tracing.recording import Moment
from olmodebug.tracing.tracer import record

from .parity_fault_list import DEVICE, GENERATIONS, MODEL, NORMED, RMS, DeviceFault, ModelFault, deep
from .parity_peers import PEERS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OURS = "olmodebug"
MASKED = 6e4


@dataclass(slots=True)
class Trace:
    """What one run leaves for the rules: every op with its float outputs, and our judgement."""

    ops: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)
    flagged: list[dict[str, Any]] = field(default_factory=list)
    baseline: dict[int, int] | None = None  # which op of the float64 run corresponds to each


@dataclass(slots=True)
class Score:
    """Counts of one rule in one dtype."""

    runs: int = 0
    found: int = 0
    placed: int = 0
    clean: int = 0
    alarms: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.parity_faults", description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--generation", default="", help="one generation")
    parser.add_argument("--dtype", default="", help="one dtype")
    parser.add_argument("--clean", action="store_true", help="clean runs only")
    parser.add_argument("--store", metavar="FILE", help="also write the counts, to draw one table of several runs")
    parser.add_argument("--stored", nargs="+", metavar="FILE", help="run nothing: one table of these")
    arguments = parser.parse_args()
    if arguments.stored:
        print(joined([json.loads(Path(name).read_text()) for name in arguments.stored]))
        return
    torch.set_num_threads(1)
    started = time.perf_counter()
    scores: dict[tuple[str, str], Score] = defaultdict(Score)
    missed: list[str] = []
    for name in GENERATIONS:
        if arguments.generation in name:
            bench = Bench(name, arguments.layers)
            for dtype in [one for one in DTYPES if arguments.dtype in str(one)]:
                bench.run(dtype, scores, missed, arguments.only, arguments.clean)
                print(table(scores, arguments.layers, time.perf_counter() - started), *missed, sep="\n", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    print(table(scores, arguments.layers, seconds))
    print("\n".join(missed))
    if arguments.store:
        counts = [[*key, asdict(score)] for key, score in scores.items()]
        values = {"layers": arguments.layers, "seconds": seconds, "scores": counts, "missed": missed}
        Path(arguments.store).write_text(json.dumps(values), encoding="utf-8")


def joined(runs: list[dict[str, Any]]) -> str:
    """One table of runs that were made apart: a generation or a dtype each."""
    scores: dict[tuple[str, str], Score] = defaultdict(Score)
    for run in runs:
        for rule, kind, counts in run["scores"]:
            for name, count in counts.items():
                setattr(scores[rule, kind], name, getattr(scores[rule, kind], name) + count)
    lines = [table(scores, runs[0]["layers"], sum(run["seconds"] for run in runs))]
    return "\n".join([*lines, "", "Missed or misplaced by olmodebug:", "", *(line for run in runs for line in run["missed"])])


def table(scores: dict[tuple[str, str], Score], layers: int, seconds: float) -> str:
    """The result as Markdown."""
    names = [str(dtype)[6:] for dtype in DTYPES]
    faults = len({f.name for f in (*DEVICE, *NORMED, *MODEL) if not getattr(f, "legal", False)})
    lines = [
        f"{layers} layers, {faults} faults, reference OLMo 1, 2, 3, torch {torch.__version__}, CPU, {seconds:.0f} s",
        "",
        "| rule: detected % / first place exact % / clean runs flagged % | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for rule in (OURS, *PEERS):
        cells = []
        for name in names:
            one = scores[rule, name]
            faulty, clean = max(1, one.runs), max(1, one.clean)
            cells.append(f"{100 * one.found / faulty:.1f} / {100 * one.placed / faulty:.1f} / {100 * one.alarms / clean:.1f}")
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    counts = ", ".join(f"{scores[OURS, name].runs} faulty and {scores[OURS, name].clean} clean in {name}" for name in names)
    return "\n".join([*lines, "", f"Runs: {counts}."])


class Bench:
    """One generation of the reference model."""

    def __init__(self, name: str, layers: int) -> None:
        self.name = name
        self.layers = layers
        config: dict[str, Any] = {"num_hidden_layers": layers, "attn_implementation": "eager"}
        if name == "olmo3-tiny":
            config["layer_types"] = (["sliding_attention"] * 3 + ["full_attention"]) * ((layers + 3) // 4)
            config["layer_types"] = config["layer_types"][:layers]
        self.base = resolve(Job(spec=name, config=config))
        batch, length = self.base.sizes()
        ids = self.base.token_ids(batch, length, seed=11)
        self.case = Case(name="a batch", input_ids=ids, labels=ids)

    def run(self, dtype: torch.dtype, scores: dict[tuple[str, str], Score], missed: list[str], only: str, clean: bool) -> None:
        kind = str(dtype)[6:]
        rounded = copy.deepcopy(self.base.model).to(dtype)
        reference = self.subject(rounded, dtype)
        truth = self.subject(copy.deepcopy(rounded), torch.float64)
        left, exact = self.trace(reference, None, judged=False), self.trace(truth, None, judged=False)
        devices = [f for f in (*DEVICE, *(NORMED if self.name in RMS else ())) if dtype in f.dtypes and only in f.name]
        if clean:
            devices = [f for f in devices if f.legal]
        for fault in devices:
            right = self.trace(reference, fault, judged=True, backward=fault.phase == "backward")
            self.note(scores, kind, fault, right.flagged, left, right, exact, dtype, missed)
        if not clean:
            for change in MODEL:
                if self.name in change.generations and dtype in change.dtypes and only in change.name:
                    self.model_fault(change, reference, truth, left, exact, dtype, scores, missed)
        for seed in (0,) if not only else ():
            ids = self.base.token_ids(*self.base.sizes(), seed=100 + seed)
            case = Case(name="a batch", input_ids=ids, labels=ids)
            again = self.trace(reference, None, judged=True, case=case)
            note = DeviceFault(name=f"clean {seed}", op="", module="", change=lambda a, o: o, legal=True)
            base, base64 = (self.trace(one, None, judged=False, case=case) for one in (reference, truth))
            self.note(scores, kind, note, again.flagged, base, again, base64, dtype, missed)

    def subject(self, model: Any, dtype: torch.dtype) -> Subject:
        """The model in this dtype, as a subject."""
        from dataclasses import replace

        return replace(self.base, model=model.to(dtype).eval(), _twins={}, _last=[])

    def trace(self, subject: Subject, fault: DeviceFault | None, *, judged: bool, case: Case | None = None, backward: bool = True) -> Trace:
        """One forward, loss and backward, with every op kept, and judged on its own inputs; a fault of the forward is in it."""
        trace = Trace()
        state: dict[str, Any] = {"seen": 0}
        used = case or self.case

        def before(event: Event, func: Any, args: Any, kwargs: Any) -> None:
            state["expected"] = expect(func, args, kwargs) if judged else None
            hit = (
                fault is not None
                and (event.op, event.phase) == (fault.op, fault.phase)
                and _selected(event.where.module, deep(fault.module, self.layers))
            )
            state["hit"] = hit and state["seen"] == fault.nth if fault else False
            state["seen"] += bool(hit)
            state["args"] = [a.clone() for a in args if isinstance(a, Tensor)] if state["hit"] else []

        def replace(index: int, outputs: list[Tensor]) -> None:
            if state["hit"] and fault is not None:
                outputs[0].copy_(fault.change(state["args"], outputs[0].clone()))

        def after(moment: Moment) -> None:
            event = moment.event
            op = {"op": event.op, "module": event.where.module, "phase": event.phase, "case": "", "scalars": scalars(moment.arguments)}
            op |= {"in": [str(t) for t in event.inputs], "file": event.where.file, "line": event.where.line, "hit": state["hit"]}
            trace.ops.append(op)
            floats = [t.detach().double().clone() for t in moment.outputs if t.is_floating_point() and t.numel()]
            trace.outputs.append(floats[:1])
            if state["expected"] is not None:
                found = judge(state["expected"], moment.outputs)
                if found.verdict in ("diverged", "explained"):
                    trace.flagged.append(op)

        def run() -> None:
            subject.model.zero_grad()
            output = subject.call(used)
            assert output.loss is not None
            if backward:
                output.loss.backward()

        record(subject.model, run, before=before, on_event=after, replace=replace, log=False)
        return trace

    def model_fault(
        self,
        change: ModelFault,
        reference: Subject,
        truth: Subject,
        left: Trace,
        exact: Trace,
        dtype: torch.dtype,
        scores: dict[tuple[str, str], Score],
        missed: list[str],
    ) -> None:
        """A changed copy of the reference, asked in the command's order."""
        broken = copy.deepcopy(reference.model)
        change.change(broken)
        candidate = self.subject(broken, dtype)
        right = self.trace(candidate, None, judged=True, backward=change.name.startswith("backward"))
        flagged = [
            b
            for a, b in corresponding_ops(_as_long(left.ops, right.ops), right.ops)
            if any(True for _ in argument_differences(a, b, True)) and a["phase"] == "forward"
        ]
        weights = dict(reference.model.named_parameters())
        if not flagged:
            names = [n for n, p in broken.named_parameters() if n in weights and not torch.equal(p, weights[n])]
            flagged = [{"module": n.rpartition(".")[0], "op": "", "phase": "forward"} for n in names]
        flagged = flagged or right.flagged
        if not flagged:
            wide = copy.deepcopy(reference.model)
            change.change(wide)
            lifted = self.subject(wide, torch.float64)
            flagged = [{"module": d.module, "op": "", "phase": d.kind} for d in departures(truth, lifted, self.case)]
            flagged = [{"module": u.module, "op": "", "phase": "backward"} for u in underived(lifted, self.case)] or flagged
        self.note(scores, str(dtype)[6:], change, flagged, left, right, exact, dtype, missed)

    def note(
        self,
        scores: dict[tuple[str, str], Score],
        kind: str,
        fault: DeviceFault | ModelFault,
        flagged: list[dict[str, Any]],
        left: Trace,
        right: Trace,
        exact: Trace,
        dtype: torch.dtype,
        missed: list[str],
    ) -> None:
        """Count what every rule said about one run."""
        legal = isinstance(fault, DeviceFault) and fault.legal

        def right_place(op: dict[str, Any]) -> bool:
            if isinstance(fault, DeviceFault):
                return bool(op.get("hit"))
            return _same(op["module"], deep(fault.module, self.layers))

        _count(scores[OURS, kind], legal, bool(flagged), bool(flagged) and right_place(flagged[0]))
        if legal and flagged:
            missed.append(f"- false alarm, {self.name} {kind}: {fault.name} at {flagged[0]['op']} of {flagged[0]['module']}")
        if not legal and not (flagged and right_place(flagged[0])):
            where = f"placed at {flagged[0]['op']} of {flagged[0]['module']}" if flagged else "not found"
            missed.append(f"- {self.name} {kind}: {fault.name}: {where}")
        triples = list(_triples(left, right, exact))
        for name, rule in PEERS.items():
            first = next((op for op, c, r, x in triples if _flags(rule, c, r, x, dtype)), None)
            _count(scores[name, kind], legal, first is not None, first is not None and right_place(first))


def _count(score: Score, legal: bool, found: bool, placed: bool) -> None:
    if legal:
        score.clean += 1
        score.alarms += found
    else:
        score.runs += 1
        score.found += found
        score.placed += placed


def _selected(module: str, wanted: str) -> bool:
    """Whether a module is the one that a device fault names, or a kind of rotary embedding."""
    return module.endswith(wanted) or (wanted == "rotary_emb" and wanted in module)


def _same(module: str, wanted: str) -> bool:
    """Whether a module is the one that an implementation fault is in, or a kind of rotary embedding."""
    return module == wanted or (wanted.endswith("rotary_emb") and module.startswith(wanted))


def _triples(left: Trace, right: Trace, exact: Trace) -> Iterator[tuple[dict[str, Any], Tensor, Tensor, Tensor]]:
    """Outputs of corresponding ops: candidate, reference, float64 baseline."""
    if left.baseline is None:
        position = {id(op): i for i, op in enumerate(exact.ops)}
        left.baseline = {id(a): position[id(b)] for a, b in _paired(left.ops, exact.ops)}
    baseline = left.baseline
    of_left = {id(op): i for i, op in enumerate(left.ops)}
    of_right = {id(op): i for i, op in enumerate(right.ops)}
    for a, b in _paired(_as_long(left.ops, right.ops), right.ops):
        if id(a) not in baseline:
            continue
        tensors = right.outputs[of_right[id(b)]], left.outputs[of_left[id(a)]], exact.outputs[baseline[id(a)]]
        if all(tensors) and tensors[0][0].shape == tensors[1][0].shape == tensors[2][0].shape:
            yield b, tensors[0][0], tensors[1][0], tensors[2][0]


def _paired(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Ops of two runs that correspond: of one kind, in one module, in the order of both runs."""
    keys_a, keys_b = ([(op["op"], op["module"], op["phase"]) for op in side] for side in (left, right))
    if keys_a == keys_b:
        yield from zip(left, right, strict=True)
        return
    for block in difflib.SequenceMatcher(a=keys_a, b=keys_b, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            yield left[block.a + i], right[block.b + i]


def _as_long(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The left ops without their backward where the right run has none."""
    return left if any(op["phase"] == "backward" for op in right) else [op for op in left if op["phase"] == "forward"]


def _flags(rule: Callable[..., bool], candidate: Tensor, reference: Tensor, baseline: Tensor, dtype: torch.dtype) -> bool:
    # Masks hold the smallest number of a dtype, which float64 has elsewhere; they are left out, in the others' favour.
    finite = (reference.abs() < MASKED) & (baseline.abs() < MASKED)
    if not bool(finite.any()):
        return False
    return rule(candidate[finite], reference[finite], baseline[finite], dtype)


if __name__ == "__main__":
    main()
