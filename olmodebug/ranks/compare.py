"""One training step on many ranks against the same step in one process: where they part first, and why.

Tensors are compared in their logical form: a DTensor by its placements, a plain tensor under the layouts it can have
(every rank the whole, its rows, a shard, a share of a sum). Everything is in float64, where a broken rule is far above
rounding. A cause is told only when it reproduces the observed numbers to rounding.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..compare import ROUNDINGS
from ..records import Where
from ..report import Finding, Outcome, Scalar
from .record import Collective, RankEvent, RankRecord

WHOLE_TENSORS = ("allreduce", "broadcast")


@dataclass(slots=True, kw_only=True)
class Held:
    """One named tensor on every rank: its events and local parts, in the order of ranks."""

    events: list[RankEvent]
    parts: list[Tensor]

    @property
    def where(self) -> Where:
        return self.events[0].where


@dataclass(slots=True, kw_only=True)
class Stages:
    """Everything noted, by stage and name, in the order of notes; `missing` names are on some ranks only."""

    by_stage: dict[str, dict[str, Held]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def of(self, stage: str) -> dict[str, Held]:
        return self.by_stage.get(stage, {})


@dataclass(slots=True, kw_only=True)
class Comparison:
    """What was compared and what was found; `also` are rules that fail because of an earlier one."""

    findings: list[Finding]
    outcomes: list[Outcome]
    compared: dict[str, int]


def compare_ranks(single: RankRecord, ranks: list[RankRecord], *, limit: float) -> Comparison:
    """Every rule over a single process's record and those of all ranks; `limit` is relative, as `roundings_limit` gives it."""
    truth, held = gather([single]), gather(ranks)
    judge = _Judge(truth, held, ranks, limit)
    checks: list[tuple[str, Callable[[], Finding | None]]] = [
        ("ranks.same-data", judge.data),
        ("ranks.same-start", judge.start),
        ("ranks.forward-agrees", judge.forward),
        ("ranks.loss-agrees", judge.loss),
        ("ranks.norm-agrees", judge.norm),
        ("ranks.gradients-agree", judge.gradients),
        ("ranks.step-agrees", judge.step),
    ]
    findings: list[Finding] = []
    outcomes: list[Outcome] = []
    for probe, check in checks:
        finding = check()
        outcomes.append(Outcome(probe=probe, status="passed" if finding is None or finding.severity != "error" else "failed"))
        if finding is None:
            continue
        if findings and findings[0].severity == "error":  # one root: what parts later parts because of it
            findings[0] = replace(findings[0], also=(*findings[0].also, probe))
            outcomes[-1] = Outcome(probe=probe, status="skipped", reason=f"it depends on {findings[0].probe}, which failed")
        else:
            findings.append(replace(finding, probe=probe))
    compared = {stage: len(held.of(stage)) for stage in ("forward", "gradient", "step", "state")}
    return Comparison(findings=findings, outcomes=outcomes, compared=compared)


def gather(records: list[RankRecord]) -> Stages:
    """The tensors of some records by stage and name."""
    stages = Stages()
    found: dict[tuple[str, str], list[tuple[RankEvent, Tensor | None]]] = {}
    for record in records:
        for event in record.events():
            found.setdefault((event.stage, event.name), []).append((event, record.load(event)))
    for (stage, name), items in found.items():
        parts = [part for _, part in items if part is not None]
        if stage == "data" and parts:  # several forwards a step: their rows together
            per_rank = len(items) // len(records) or 1
            parts = [torch.cat(parts[i : i + per_rank]) for i in range(0, len(parts), per_rank)]
            stages.by_stage.setdefault(stage, {})[name] = Held(events=[event for event, _ in items], parts=parts)
        elif len(parts) == len(records):
            stages.by_stage.setdefault(stage, {})[name] = Held(events=[event for event, _ in items], parts=parts)
        else:
            stages.missing.append(f"{stage} {name}")
    return stages


def first_unlike_collectives(ranks: list[RankRecord]) -> tuple[int, list[Collective | None]] | None:
    """The first place where ranks call different collectives, with each rank's; None where all call the same. Streams.

    Shapes must be alike too where every rank gives a whole tensor; shards may be uneven.
    """
    for number, calls in enumerate(zip_longest(*(record.collectives() for record in ranks))):
        if len({(call.op, call.shape if call.op in WHOLE_TENSORS else ()) if call else None for call in calls}) > 1:
            return number, list(calls)
    return None


def unlike_replicas(ranks: list[RankRecord], *, stages: Iterable[str] = ("start", "step")) -> Iterator[tuple[str, str, list[int]]]:
    """(stage, name, ranks that differ from rank 0) for every tensor that each rank holds whole, by digest alone.

    One line a rank is in memory at a time, so that a thousand records fit. Sharded tensors are passed over.
    """
    wanted = set(stages)
    for events in zip(*((e for e in record.events() if e.stage in wanted) for record in ranks), strict=False):
        first = events[0]
        if first.placements and set(first.placements) != {"replicate"}:
            continue
        other = [rank for rank, event in enumerate(events) if (event.name, event.digest) != (first.name, first.digest)]
        if other:
            yield first.stage, first.name, other


class _Judge:
    """The rules over one pair of records."""

    def __init__(self, truth: Stages, held: Stages, ranks: list[RankRecord], limit: float) -> None:
        self.truth, self.held, self.ranks, self.limit = truth, held, ranks, limit
        self.world = len(ranks)
        self.floor = limit / ROUNDINGS
        self.rows = self._rows()
        self._undo_clipping()

    def data(self) -> Finding | None:
        """Every row of the batch is seen once, or every rank sees all of them."""
        batch, seen = self._ids(self.truth)[0], self._ids(self.held)
        if self.rows is None:
            return _finding("a rank saw a row that is not in the batch", expected="rows of the batch that the step was given")
        everyone = all(sorted(rows) == list(range(len(batch))) for rows in self.rows)
        counts = [sum(rows.count(row) for rows in self.rows) for row in range(len(batch))]
        if everyone or counts == [1] * len(batch):
            return None
        evidence: dict[str, Scalar] = {f"rows of rank {rank}": ", ".join(map(str, rows)) for rank, rows in enumerate(self.rows)}
        lost = [row for row, count in enumerate(counts) if count == 0]
        repeated = [row for row, count in enumerate(counts) if count > 1]
        message = "; ".join(
            [f"rows {_few(repeated)} of the batch are seen by more than one rank"] * bool(repeated)
            + [f"rows {_few(lost)} by none" if repeated else f"rows {_few(lost)} of the batch are seen by no rank"] * bool(lost)
        )
        same = repeated and all(rows == self.rows[0] for rows in self.rows)
        return _finding(
            message,
            cause="every rank takes the same rows: its rank does not enter the choice" if same and len(seen) > 1 else None,
            fix="give rank r the rows r, r + world_size, ...; a DistributedSampler does" if repeated else None,
            expected="each row once, or all rows on every rank",
            evidence=evidence,
        )

    def start(self) -> Finding | None:
        """The ranks start from the weights of the model that was handed in."""
        wrong = list(self._unlike("start"))
        if not wrong:
            return None
        name, held, gap = wrong[0]
        whole = held.parts[0].shape == self.truth.of("start")[name].parts[0].shape and _whole(held)
        replicas = [rank for rank, part in enumerate(held.parts) if not torch.equal(part, held.parts[0])] if whole else []
        if replicas:
            message = f"ranks start from different weights: {name} of rank {replicas[0]} is not that of rank 0"
            return _finding(
                message,
                module=name.rpartition(".")[0],
                where=held.where,
                cause="the replicas were initialised apart, and nothing made them equal",
                fix="seed every rank alike, or broadcast rank 0's weights before the first step",
                evidence={"weights that differ": f"{len(wrong)} of {len(self.truth.of('start'))}", "largest difference": gap},
            )
        what = "the weights that the ranks start from are" if whole else "the shards of the ranks, put together, are"
        message = f"{what} not the weight of the model: {name} differs by {gap:.3g}"
        return _finding(message, module=name.rpartition(".")[0], where=held.where, evidence={"largest difference": gap})

    def forward(self) -> Finding | None:
        """The first module whose input agrees with the single process and whose output does not."""
        share: str | None = None
        for name, held in self.held.of("forward").items():
            expected = self.truth.of("forward").get(name)
            if expected is None:
                continue
            fit = self._layout(expected.parts[0], held)
            if fit == "share":  # whoever takes it next may reduce it
                share = share or name
                if not name:
                    return self._unreduced(share, name)
            if fit is not None:
                continue
            given, given_expected = self.held.of("input").get(name), self.truth.of("input").get(name)
            entry = self._layout(given_expected.parts[0], given) if given is not None and given_expected is not None else "whole"
            if entry == "share" or (share is not None and (share.startswith(name + ".") or not name)):
                return self._unreduced(share or name, name)
            if entry is not None:
                return self._output(name, expected.parts[0], held)
        return None

    def gradients(self) -> Finding | None:
        """The gradients that the optimizer got are those of the whole batch."""
        wrong = list(self._unlike("gradient"))
        gone = [name for name in self.truth.of("gradient") if name not in self.held.of("gradient")]
        if not wrong and not gone:
            return None
        if not wrong:
            return _finding(f"{gone[0]} has a gradient in one process and none on the ranks", module=gone[0].rpartition(".")[0])
        called = {name.partition("#")[0]: i for i, name in enumerate(self.truth.of("input"))}
        # gradients come from the loss backwards: of those that differ, that of the module called last parts first
        name, held, gap = max(wrong, key=lambda item: called.get(item[0].rpartition(".")[0], -1))
        cause, fix, evidence = self._why([(n, h) for n, h, _ in wrong], len(self.truth.of("gradient")))
        scale = float(self.truth.of("gradient")[name].parts[0].abs().max())
        message = f"the gradient of {name} is not that of the whole batch: it differs by {gap:.3g}, and is of magnitude {scale:.3g}"
        return _finding(
            message,
            module=name.rpartition(".")[0],
            where=held.where,
            cause=cause,
            fix=fix,
            evidence={"gradients that differ": f"{len(wrong)} of {len(self.truth.of('gradient'))}", **evidence},
        )

    def norm(self) -> Finding | None:
        """The gradient norm that each rank clips by is that of the whole gradient."""
        expected, held = self.truth.of("norm").get("grad_norm"), self.held.of("norm").get("grad_norm")
        if expected is None or held is None:
            return None
        norm, reported = float(expected.parts[0]), [float(part) for part in held.parts]
        if held.events[0].placements == ("partial",):
            reported = [sum(value**2 for value in reported) ** 0.5]
        if all(abs(value - norm) <= 2 * self.limit * norm for value in reported):
            return None
        cause = fix = None
        together = sum(value**2 for value in reported) ** 0.5
        if len(reported) > 1 and abs(together - norm) <= 1e3 * self.limit * norm:
            cause = "each rank takes the norm of its own shards: the squares of these norms sum to the square of the whole one"
            fix = "sum the squares over ranks before the root; for DTensors call full_tensor() on the norm"
        elif self.gradients() is not None:
            return None  # the gradients themselves are wrong, and say so
        return _finding(
            f"the gradient norm is {norm:.6g} in one process, and {', '.join(f'{value:.6g}' for value in reported)} on the ranks",
            cause=cause,
            fix=fix,
            expected=f"{norm:.6g} on every rank",
            observed=", ".join(f"{value:.6g}" for value in reported),
        )

    def loss(self) -> Finding | None:
        """A loss that all ranks report alike is that of the whole batch."""
        expected, held = self.truth.of("loss").get("loss"), self.held.of("loss").get("loss")
        if expected is None or held is None:
            return None
        loss, reported = float(expected.parts[0]), [float(part) for part in held.parts]
        if max(reported) - min(reported) > self.limit * abs(loss) or abs(reported[0] - loss) <= self.limit * abs(loss):
            return None  # unlike losses are those of each rank's own rows, which is a way to log
        cause = None
        if abs(reported[0] - loss - float(torch.tensor(self.world, dtype=torch.float64).log())) <= self.limit * abs(loss):
            cause = f"it is too large by ln {self.world}: the vocabulary is summed over on every rank, on logits that are whole already"
        return _finding(
            f"every rank reports a loss of {reported[0]:.6g}; that of the batch is {loss:.6g}",
            severity="error" if cause else "warning",
            cause=cause,
        )

    def step(self) -> Finding | None:
        """What the optimizer did to every weight, and the momentum it keeps, is one number times the whole gradient."""
        gradients, start, after, state = self.truth.of("gradient"), self.held.of("start"), self.held.of("step"), self.held.of("state")
        moved = {
            name: Held(events=after[name].events, parts=[a - b for a, b in zip(start[name].parts, after[name].parts, strict=True)])
            for name in gradients
            if name in start and name in after
        }
        kept = {name: state[f"{name}.momentum_buffer"] for name in gradients if f"{name}.momentum_buffer" in state}
        for what, found in (("change of the weight", moved), ("momentum of", kept)):
            factor = self._factor(found)
            if what.startswith("change") and found and abs(factor) < self.limit:
                return _finding("the step changed no weight, though every gradient agrees", evidence={"weights": len(found)})
            scale = abs(factor) * self._scale(gradients)
            for name, held in found.items():
                expected = gradients[name].parts[0] * factor
                gap = self._gap(expected, held)
                # the change is a difference of two weights, each rounded
                rounding = self.floor * float(start[name].parts[0].abs().max()) if name in start else 0.0
                if gap > 64 * self.limit * scale + rounding:
                    return _finding(
                        f"after the step the {what} {name} differs by {gap:.3g} from {factor:.3g} times its gradient, though the gradient agrees",
                        module=name.rpartition(".")[0],
                        where=gradients[name].where,
                        evidence={"largest difference": gap, "gradients agree": True},
                    )
        return None

    def _factor(self, found: dict[str, Held]) -> float:
        """The number that the whole gradients are multiplied by in the largest of these tensors, on rank 0."""
        gradients = self.truth.of("gradient")
        best, factor = 0.0, 1.0
        for name, held in found.items():
            flat = gradients[name].parts[0].double().flatten()
            whole = self._joined(held)[0]
            if whole.numel() == flat.numel() and float(flat.dot(flat)) > best:
                best = float(flat.dot(flat))
                factor = float(flat.dot(whole.double().flatten())) / best
        return factor

    def _unlike(self, stage: str) -> Iterator[tuple[str, Held, float]]:
        """Named tensors whose logical form is not the single process's, with the largest difference."""
        scale = self._scale(self.truth.of(stage))
        for name, held in self.held.of(stage).items():
            expected = self.truth.of(stage).get(name)
            if expected is None:
                continue
            gap = self._gap(expected.parts[0], held)
            own = float(expected.parts[0].abs().max()) if expected.parts[0].numel() else 0.0
            if gap > max(self.limit * own, self.floor * scale):
                yield name, held, gap

    def _gap(self, expected: Tensor, held: Held) -> float:
        """How far the logical tensor is from the expected one, under the layout that comes nearest."""
        joined = join(held, self.ranks)
        if joined is not None:
            return _distance(expected, joined)
        if _whole(held) and held.parts[0].shape == expected.shape:
            return max(_distance(expected, part) for part in held.parts)
        shards = [torch.cat(held.parts, dim) for dim in range(expected.ndim) if _fits(held.parts, dim, expected)]
        return min((_distance(expected, whole) for whole in shards), default=float("inf"))

    def _layout(self, expected: Tensor, held: Held) -> str | None:
        """How a module's tensor lies over the ranks: `whole`, `rows`, `shard`, `share`; None where nothing fits."""
        own = float(expected.abs().max()) if expected.is_floating_point() and expected.numel() else 0.0
        bound = max(self.limit * own, self.floor * self._scale(self.truth.of("forward")))
        joined = join(held, self.ranks)
        if joined is not None and held.events[0].placements:
            return "whole" if _distance(expected, joined) <= bound else None
        if all(_distance(expected, part) <= bound for part in held.parts):
            return "whole"
        rows = self.rows
        if rows is not None and all(
            part.ndim and len(part) == len(mine) and _distance(expected[mine], part) <= bound
            for part, mine in zip(held.parts, rows, strict=True)
            if expected.ndim and len(expected) > max(mine, default=0)
        ):
            if expected.ndim and len(expected) > max(max(mine, default=0) for mine in rows):
                return "rows"
        if any(_distance(expected, torch.cat(held.parts, d)) <= bound for d in range(expected.ndim) if _fits(held.parts, d, expected)):
            return "shard"
        same_shape = all(part.shape == expected.shape for part in held.parts)
        return "share" if same_shape and _distance(expected, torch.stack(held.parts).sum(0)) <= bound else None

    def _output(self, name: str, expected: Tensor, held: Held) -> Finding:
        cause = fix = None
        evidence: dict[str, Scalar] = {"world size": self.world}
        if all(part.shape == expected.shape for part in held.parts):
            gap = max(_distance(expected, part) for part in held.parts)
            evidence["largest difference"] = gap
            for parameter, start in self.truth.of("start").items():
                inside = parameter.startswith(name + ".") and parameter.removeprefix(name + ".").count(".") == 0
                if inside and start.parts[0].shape == expected.shape[-1:]:
                    extra = expected + (self.world - 1) * start.parts[0]
                    if all(_distance(extra, part) <= 4 * self.limit * float(extra.abs().max()) for part in held.parts):
                        cause = f"{parameter} is added once on each rank, and the sum over ranks counts it {self.world} times"
                        fix = "add the bias after the all_reduce, or on one rank only"
            ratio = _ratio(expected, held.parts[0], self.limit)
            if cause is None and ratio is not None:
                cause = f"it is the single process's output times {ratio:.6g}"
        return _finding(
            f"the output of {name or 'the model'} differs from the single process, and its input agrees",
            module=name,
            where=held.where,
            cause=cause,
            fix=fix,
            evidence=evidence,
        )

    def _unreduced(self, name: str, user: str) -> Finding:
        """A share of a sum that is used as if it were the sum: blamed on the module that gave it."""
        return _finding(
            f"the output of {name} is used as it is, though every rank holds only its share of a sum",
            module=name,
            where=self.held.of("forward")[name].where,
            cause="the sum over ranks is the single process's value to rounding, and no rank has it: an all_reduce is missing",
            fix="reduce the output over the ranks before it is used",
            evidence={"parts in": user or "the model", "world size": self.world},
        )

    def _why(self, wrong: list[tuple[str, Held]], total: int) -> tuple[str | None, str | None, dict[str, Scalar]]:
        """(cause, fix, evidence) of wrong gradients: the hypothesis that reproduces all of them, if there is one."""
        scale = self._scale(self.truth.of("gradient"))

        def holds(test: Callable[[str, Held], float]) -> bool:
            return all(test(name, held) <= max(16 * self.limit * scale, self.floor * scale) for name, held in wrong)

        def expected(name: str) -> Tensor:
            return self.truth.of("gradient")[name].parts[0]

        plain = all(_whole(held) and held.parts[0].shape == expected(name).shape for name, held in wrong)
        apart = plain and any(not torch.equal(held.parts[0], part) for _, held in wrong for part in held.parts[1:])
        if apart and holds(lambda n, h: _distance(expected(n), torch.stack(h.parts).sum(0))):
            return (
                "each rank keeps its share: the sum over ranks is the whole gradient to rounding, and no rank has it",
                "all_reduce (sum) these gradients over the ranks before the step",
                {},
            )
        if apart and holds(lambda n, h: _distance(expected(n), torch.stack(h.parts).mean(0))):
            return (
                "each rank keeps the gradient of its own rows: their mean is the whole gradient to rounding, and no rank has it",
                "average these gradients over the ranks before the step; with DDP let the last micro-batch synchronise",
                {},
            )
        ratios = [_ratio(expected(name), part, 64 * self.limit) for name, held in wrong for part in self._joined(held)]
        if len(wrong) and all(r is not None for r in ratios) and max(ratios) - min(ratios) <= 1e-6 * abs(ratios[0]):  # type: ignore[type-var,operator,arg-type]
            ratio = float(ratios[0])  # type: ignore[arg-type]
            words = {
                self.world: "they are summed over ranks where they should be averaged",
                1 / self.world: "they are divided by the number of ranks once too often",
            }
            known = next((text for value, text in words.items() if abs(ratio - value) < 1e-6), None)
            return (known or f"every one of them is the whole gradient times {ratio:.6g}"), None, {"factor": ratio}
        means = self._mean_of_means()
        if means and holds(lambda n, h: max(_distance(means[n], part) for part in self._joined(h))):
            return (
                "they are the mean over ranks of each rank's own mean: the ranks have unequal numbers of labelled tokens, and those with few count for more",
                "divide each rank's summed loss by the labelled tokens of all ranks (all_reduce the count), times the world size where gradients are averaged",
                {},
            )
        return None, None, {}

    def _joined(self, held: Held) -> list[Tensor]:
        whole = join(held, self.ranks)
        return [whole] if whole is not None else held.parts

    def _mean_of_means(self) -> dict[str, Tensor] | None:
        """The gradients if every rank took the mean over its own rows, before clipping; None when it cannot be told."""
        if self.rows is None or any(not rows for rows in self.rows):
            return None
        labels = {row: self.truth.of(f"row-{row}") for row in range(len(self._ids(self.truth)[0]))}
        counts = {row: float(self.truth.of("count")[f"row-{row}"].parts[0]) for row in labels if f"row-{row}" in self.truth.of("count")}
        if len(counts) != len(labels) or not all(labels.values()):
            return None
        means = {}
        for name in self.truth.of("gradient"):
            per_rank = [sum(labels[r][name].parts[0] for r in rows) / sum(counts[r] for r in rows) for rows in self.rows]
            means[name] = sum(per_rank) / self.world
        return means  # type: ignore[return-value]

    def _undo_clipping(self) -> None:
        """Scale each rank's gradients back to the norm that its step reports, which it had before it clipped them."""
        norms, gradients = self.held.of("norm").get("grad_norm"), self.held.of("gradient")
        if norms is None or not gradients or norms.events[0].placements == ("partial",):
            return
        wholes = {name: join(held, self.ranks) for name, held in gradients.items()}
        for rank, reported in enumerate(norms.parts):
            mine = [held.parts[rank] if wholes[name] is None else wholes[name] for name, held in gradients.items()]
            norm = sum(float(part.double().pow(2).sum()) for part in mine if part is not None) ** 0.5
            for held in gradients.values():
                held.parts[rank] = held.parts[rank] * (float(reported) / norm if norm else 1.0)

    def _ids(self, stages: Stages) -> list[list[list[int]]]:
        held = stages.of("data").get("input_ids")
        return [part.tolist() for part in held.parts] if held else [[]]

    def _rows(self) -> list[list[int]] | None:
        """The rows of the batch that each rank saw, by content; None where one is not in the batch."""
        batch = [tuple(row) for row in self._ids(self.truth)[0]]
        found = []
        for rank in self._ids(self.held):
            if not all(tuple(row) in batch for row in rank):
                return None
            found.append([batch.index(tuple(row)) for row in rank])
        return found

    @staticmethod
    def _scale(stage: dict[str, Held]) -> float:
        return max(
            (float(h.parts[0].abs().max()) for h in stage.values() if h.parts[0].numel() and h.parts[0].is_floating_point()), default=0.0
        )


def join(held: Held, ranks: list[RankRecord]) -> Tensor | None:
    """The whole of a DTensor from its local parts, mesh dimension by mesh dimension from the last; None for a plain one."""
    placements = held.events[0].placements
    if not placements:
        return None
    parts = {record.coordinate: part for record, part in zip(ranks, held.parts, strict=True)}
    for dim in range(len(placements) - 1, -1, -1):
        groups: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for coordinate, part in parts.items():
            groups.setdefault(coordinate[:dim], []).append((coordinate[dim], part))
        kind = placements[dim]
        parts = {key: _combined(kind, [part for _, part in sorted(group, key=lambda item: item[0])]) for key, group in groups.items()}
    return next(iter(parts.values()))


def _combined(kind: str, parts: list[Tensor]) -> Tensor:
    if kind == "partial":
        return torch.stack(parts).sum(0)
    return torch.cat(parts, int(kind.partition(":")[2])) if kind.startswith("shard") else parts[0]


def _whole(held: Held) -> bool:
    """Whether every rank holds a plain tensor of one shape."""
    return not held.events[0].placements and len({part.shape for part in held.parts}) == 1


def _fits(parts: list[Tensor], dim: int, expected: Tensor) -> bool:
    shapes = [[size for d, size in enumerate(part.shape) if d != dim] for part in parts]
    others = [size for d, size in enumerate(expected.shape) if d != dim]
    same = all(part.ndim == expected.ndim for part in parts) and all(shape == others for shape in shapes)
    return same and sum(part.shape[dim] for part in parts) == expected.shape[dim]


def _distance(expected: Tensor, part: Tensor) -> float:
    if expected.shape != part.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    gap = (expected.double() - part.double()).abs().max()
    return float("inf") if torch.isnan(gap) else float(gap)


def _ratio(expected: Tensor, part: Tensor, limit: float) -> float | None:
    """The number that the expected tensor times gives the part to rounding; None where there is none, or it is 1."""
    if expected.shape != part.shape or not expected.numel():
        return None
    flat, other = expected.double().flatten(), part.double().flatten()
    square = float(flat.dot(flat))
    if not square:
        return None
    ratio = float(flat.dot(other)) / square
    near = float((other - ratio * flat).abs().max()) <= limit * max(float(other.abs().max()), 1e-300)
    return ratio if near and abs(ratio - 1) > limit and ratio else None


def _finding(message: str, *, severity: Any = "error", module: str = "", where: Where | None = None, **fields: Any) -> Finding:
    place = replace(where or Where(), module=module)
    return Finding(probe="", severity=severity, message=message, where=place, **fields)


def _few(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:6])) + (f" and {len(rows) - 6} more" if len(rows) > 6 else "")
